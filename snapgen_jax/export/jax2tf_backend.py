"""JAX -> TensorFlow -> TFLite: the only file that touches jax2tf and TensorFlow's converter.

`jax2tf.convert` wraps the function's StableHLO in one operator (`XlaCallModule`), which TensorFlow's converter opens
and lowers to TFLite builtins. Parameters travel as variables, not as constants of the traced function: a GraphDef ends
at 2 GB. The signature is named by going through a SavedModel, the one public way to name it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from snapgen_jax.export.means import sums_to_means


def convert(
    function: Callable[..., dict[str, jax.Array]],
    params: Any,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    signature: str,
    path: pathlib.Path,
) -> None:
    """Writes `function(params, **inputs)` as a float32 `.tflite` file. See `snapgen_jax.export.convert.to_tflite`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, on import
    import tensorflow as tf
    from jax.experimental import jax2tf

    leaves, treedef = jax.tree.flatten(params)
    native = jax2tf.convert(
        lambda leaves, named: function(jax.tree.unflatten(treedef, leaves), **named),
        with_gradient=False,
        native_serialization_platforms=["cpu"],
    )
    module: Any = tf.Module()
    module.weights = [tf.Variable(leaf) for leaf in leaves]
    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in inputs.items()}
    traced = tf.function(lambda **named: native(list(module.weights), named), autograph=False)
    concrete = traced.get_concrete_function(**specs)
    with _only_errors(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        tf.saved_model.save(module, folder, signatures={signature: concrete})
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=[signature]).convert())
    sums_to_means(path)


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Saving warns of every operator without a gradient; none is wanted here."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
