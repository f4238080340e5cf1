"""A JAX function to a `.tflite` file, by either of two converters."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

Backend = Literal["jax2tf", "litert"]
BACKENDS: dict[Backend, tuple[str, str]] = {  # the library, and the extra of setup.py that installs it
    "jax2tf": ("tensorflow", "export"),
    "litert": ("litert_converter", "export-litert"),
}


class ConversionError(RuntimeError):
    """The converter did not lower the function. The message is the converter's, without the weights it prints."""


def require(backend: Backend) -> None:
    """Raises ImportError, which says how to install it, where the converter of a backend is not installed."""
    library, extra = BACKENDS[backend]
    if importlib.util.find_spec(library) is None:
        raise ImportError(
            f"exporting by {backend!r} needs {library}, which is not installed: pip install 'snapgen-jax[{extra}]', or "
            "`make dev` in a clone"
        )


def to_tflite(
    function: Callable[..., dict[str, jax.Array]],
    params: Any,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    signature: str,
    path: str | pathlib.Path,
    backend: Backend = "jax2tf",
) -> pathlib.Path:
    """Converts `function(params, **inputs) -> {name: array}` to a float32 `.tflite` file with one named signature.

    Args:
        function: pure, static shapes, rank 4 at most, float32 and int32 only; no random draw (the noise is the
            client's) and no loop over steps (so is the sampler).
        params: any tree of float arrays; becomes the file's constants.
        inputs: shape and dtype of each named input.
        signature: name under which a client finds the function.
        path: the file to write.
        backend: "jax2tf" through TensorFlow, "litert" without it. Both give the same numbers.

    Returns:
        `path`.

    Raises:
        ValueError: an input or a parameter has a dtype that does not export, or the backend is unknown.
        ConversionError: the converter refused; says what it said.
        ImportError: the backend is not installed; says how to install it.
    """
    path = pathlib.Path(path)
    if backend not in BACKENDS:
        raise ValueError(f"unknown export backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    for name, spec in inputs.items():
        if spec.dtype not in (np.float32, np.int32):
            raise ValueError(f"{signature}: input {name!r} is {spec.dtype}; a file takes float32 and int32 only")
    require(backend)
    params = jax.tree.map(_float32, params)
    jax.eval_shape(function, params, **inputs)  # the function's own errors, before a converter dresses them up
    try:
        converter = importlib.import_module(f"snapgen_jax.export.{backend}_backend")
        converter.convert(function, params, inputs, signature, path)
    except Exception as error:  # both converters raise their own kinds, some private
        raise ConversionError(f"{signature}: the {backend!r} backend failed: {_brief(error)}") from error
    return path


def _float32(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.dtype not in (np.float32, np.int32):
        if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise ValueError(f"a parameter of dtype {array.dtype} does not export; expected a float or int32")
        array = array.astype(np.float32)
    return array


def _brief(error: Exception, limit: int = 1500) -> str:
    """The converters quote whole modules, weights included, in their messages: keep the sentences."""
    text = re.sub(r'module = ".*?", platforms', "module = ..., platforms", str(error), flags=re.DOTALL)
    text = "\n".join(line if len(line) < 400 else line[:400] + " ..." for line in text.splitlines() if line.strip())
    return text if len(text) <= limit else text[:limit] + " ..."
