"""The programs of the recipes are large, and run a few times."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def recipes_are_quick_to_compile(quick_to_compile):
    """See `quick_to_compile`."""
