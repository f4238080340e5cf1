"""Recipes are compiled for these tests as quickly as XLA can: the programs are large, and run a few times."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
