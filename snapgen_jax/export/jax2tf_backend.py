"""JAX -> TensorFlow -> TFLite: the only file that touches jax2tf and TensorFlow's converter.

`jax2tf.convert` wraps the function's StableHLO in one operator (`XlaCallModule`), which TensorFlow's converter opens
and lowers to TFLite builtins. Parameters travel as variables, not as constants of the traced function: a GraphDef ends
at 2 GB. Signatures are named by going through a SavedModel, the one public way to name them; equal constants of several
become one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax

from snapgen_jax.export.means import sums_to_means
from snapgen_jax.training.exports import Branches

Call = tuple[Callable[..., dict[str, jax.Array]], Mapping[str, jax.ShapeDtypeStruct]]


def convert(
    function: Callable[..., dict[str, jax.Array]],
    params: Any,
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    signature: str,
    path: pathlib.Path,
    others: Mapping[str, Call] = MappingProxyType({}),
) -> None:
    """Writes `function(params, **inputs)` as a float32 `.tflite` file. See `snapgen_jax.export.convert.to_tflite`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, on import
    import tensorflow as tf
    from jax.experimental import jax2tf

    leaves, treedef = jax.tree.flatten(params)
    module: Any = tf.Module()
    module.weights = [tf.Variable(leaf) for leaf in leaves]

    def native(function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of weights and other arguments, without the former."""
        converted = jax2tf.convert(
            lambda leaves, *args: function(jax.tree.unflatten(treedef, leaves), *args),
            with_gradient=False,
            native_serialization_platforms=["cpu"],
        )
        return lambda *args: converted(list(module.weights), *args)

    def branching(function: Branches, named: dict[str, Any]) -> dict[str, Any]:
        def choose(run: Any, name: str, entering: Any) -> Any:
            # Its weights are constants of the branch: as operands of the IF they would be packed at each call.
            inside = jax2tf.convert(
                lambda entering: function.module(name, params, entering),
                with_gradient=False,
                native_serialization_platforms=["cpu"],
            )
            # A branch that only hands its operand on, or whose shape is open, is one that TFLite does not allocate.
            value = tf.cond(run, lambda: inside(entering), lambda: named[name] * 1.0)
            return tf.ensure_shape(value, named[name].shape)

        def decide(name: str, values: dict[str, Any]) -> Any:
            return native(functools.partial(function.decide, name))(values, named)

        return function.composed(decide, choose, lambda values: native(function.finish)(values, named))

    def traced(function: Callable[..., dict[str, jax.Array]], inputs: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
        def call(**named: Any) -> dict[str, Any]:
            if isinstance(function, Branches):
                return branching(function, named)
            return native(lambda weights, named: function(weights, **named))(named)

        specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name=name) for name, spec in inputs.items()}
        return tf.function(call, autograph=False).get_concrete_function(**specs)

    calls = {signature: (function, inputs), **others}
    signatures = {name: traced(*call) for name, call in calls.items()}
    with _only_errors(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        tf.saved_model.save(module, folder, signatures=signatures)
        path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=list(signatures)).convert())
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
