"""The programs that train on inputs are large, and run a few times."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def inputs_are_quick_to_compile(quick_to_compile):
    """See `quick_to_compile`."""
