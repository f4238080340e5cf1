"""Test set-up: CPU only, eight fake devices, programs that are quick to compile, and a cache of them between runs."""

import importlib.metadata
import os
import pathlib

CACHE = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# On a busy machine eight devices on two cores may wait long for each other; XLA would abort the process after 40 s.
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=240"
# A training step compiles in 6.6 s in place of 17.8, and in 34 without `quick_to_compile`.
QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", PATIENT, *QUICK]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

import jax  # noqa: E402  # reads what is set above
import pytest  # noqa: E402


@pytest.fixture(scope="module")
def quick_to_compile():
    """Programs that are large and run a few times are compiled as quickly as XLA can, without most optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
