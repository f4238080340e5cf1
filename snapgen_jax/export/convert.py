"""A JAX function to a `.tflite` file, by either of two converters."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pathlib
import pickle
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np

from snapgen_jax.export.precision import Precision, QuantisationError, write_variant
from snapgen_jax.training.exports import Branches

Backend = Literal["jax2tf", "litert"]
BACKENDS: dict[Backend, tuple[str, str]] = {  # the library, and the extra of setup.py that installs it
    "jax2tf": ("tensorflow", "export"),
    "litert": ("litert_converter", "export-litert"),
}
# A function and its inputs, as `to_tflite` takes them.
Call = tuple[Callable[..., dict[str, jax.Array]], Mapping[str, jax.ShapeDtypeStruct]]
MOST_BYTES = 2**31 - 2**24  # of weights; the graph beside them is small


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
    others: Mapping[str, Call] = MappingProxyType({}),
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
        others: further signatures of the file, `{signature: (function, inputs)}` over the same parameters, which the
            file holds once.

    Returns:
        `path`.

    Raises:
        ValueError: an input or a parameter has a dtype that does not export, or the backend is unknown, or does not
            write branches.
        ConversionError: the converter refused; says what it said.
        ImportError: the backend is not installed; says how to install it.
    """
    path = pathlib.Path(path)
    if backend not in BACKENDS:
        raise ValueError(f"unknown export backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend != "jax2tf" and any(
        isinstance(called, Branches) for called, _ in ((function, inputs), *others.values())
    ):
        raise ValueError(f"{signature}: the backend {backend!r} writes no branches; use the backend 'jax2tf'")
    for name, spec in [*inputs.items(), *(pair for _, named in others.values() for pair in named.items())]:
        if spec.dtype not in (np.float32, np.int32):
            raise ValueError(f"{signature}: input {name!r} is {spec.dtype}; a file takes float32 and int32 only")
    if (size := sum(4 * np.size(leaf) for leaf in jax.tree.leaves(params))) > MOST_BYTES:
        raise ValueError(
            f"{signature}: its parameters are {size / 1e9:.2f} GB in float32, and a .tflite file ends at 2 GiB; split "
            "it into consecutive units"
        )
    require(backend)
    params = jax.tree.map(_float32, params)
    for called, named in ((function, inputs), *others.values()):
        jax.eval_shape(called, params, **named)  # the function's own errors, before a converter dresses them up
    try:
        converter = importlib.import_module(f"snapgen_jax.export.{backend}_backend")
        converter.convert(function, params, inputs, signature, path, others)
    except Exception as error:  # both converters raise their own kinds, some private
        raise ConversionError(f"{signature}: the {backend!r} backend failed: {_brief(error)}") from error
    return path


def to_tflite_apart(
    function: Callable[..., dict[str, jax.Array]],
    params: Any,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    signature: str,
    path: str | pathlib.Path,
    backend: Backend = "jax2tf",
    variants: Mapping[Precision, str | pathlib.Path] = MappingProxyType({}),
    others: Mapping[str, Call] = MappingProxyType({}),
) -> int:
    """`to_tflite` in a process of its own, which returns all memory when it ends; arguments and errors are the same.

    Args:
        variants: files of "f16" and "int8" to write as well.

    Returns:
        The most memory that the process has held, in bytes.

    Raises:
        TypeError: the function does not pickle; one of a module, or a `functools.partial` of it, does.
    """
    path = pathlib.Path(path)
    arrays = jax.tree.map(_float32, params)
    rest = (
        dict(inputs),
        signature,
        str(path),
        backend,
        dict(others),
        {name: str(target) for name, target in variants.items()},
    )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".convert.") as folder:
        job = pathlib.Path(folder) / "job.pickle"
        try:
            with job.open("wb") as file:
                pickle.dump((function, arrays, *rest), file, protocol=5)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise TypeError(f"{signature}: its function does not travel to another process: {error}") from error
        places = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-m", "snapgen_jax.export.convert", str(job)],
            env={**os.environ, **places},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-5:]) or f"it ended with code {done.returncode}"
        raise ConversionError(f"{signature}: the process that converts it failed: {_brief(ValueError(said))}")
    return int(done.stdout.splitlines()[-1])


def _apart(job: str) -> None:
    """What that process does; prints its peak memory."""
    with open(job, "rb") as file:
        *conversion, variants = pickle.load(file)
    os.remove(job)
    path = to_tflite(*conversion)
    for precision, target in variants.items():
        with contextlib.suppress(QuantisationError):  # who asks for the file tries again, and says why it cannot be had
            write_variant(precision, path, target)
    print(_peak())


def _peak() -> int:
    """The most memory that this process has held, in bytes. On Linux `ru_maxrss` would begin with the parent's."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


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


if __name__ == "__main__":
    _apart(sys.argv[1])
