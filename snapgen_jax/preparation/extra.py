"""The libraries of the extra `prepare`, imported when they are used."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from snapgen_jax.data.errors import DataError


def require(module: str) -> Any:
    """A module of the extra.

    Raises:
        DataError: it is not installed; says how to install it.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Beam warns of Google's libraries, which nobody asked for
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"`snapgen prepare` needs {module.partition('.')[0]} ({error}); install the extra: "
            "pip install 'snapgen-jax[prepare]'"
        ) from error
    finally:
        logging.disable(before)
