"""Test set-up: CPU only, eight fake devices, programs that are quick to compile, and a cache of them between runs."""

import gc
import os
import pathlib

from tests.flags import xla_flags

CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}".strip()

# Tracing makes millions of objects that live on; to look through them as often as Python does is a seventh of the time.
gc.set_threshold(100_000, 10, 10)

import jax  # noqa: E402  # reads what is set above
import pytest  # noqa: E402


@pytest.fixture(scope="module")
def quick_to_compile():
    """Programs that are large and run a few times are compiled as quickly as XLA can, without most optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
