"""JAX -> StableHLO -> TFLite without TensorFlow: the only file that touches litert-converter's private API.

`litert-converter` 0.5 is the engine under litert-torch, undocumented, and pinned in `setup.py` for that reason. It
needs less memory and time than the way through TensorFlow.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

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
    # Compiled modules without type stubs.
    api, ir, passmanager, stablehlo = (
        importlib.import_module(f"litert_converter.{name}")
        for name in ("converter_api_ext", "mlir.ir", "mlir.passmanager", "mlir.dialects.stablehlo")
    )
    params = jax.tree.map(jnp.asarray, params)  # closed over: they become the module's constants
    context = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        modules = []
        for name, (called, named) in {signature: (function, inputs), **others}.items():
            serialized, outputs = _stablehlo(called, params, named)
            module = stablehlo.deserialize_portable_artifact(context, serialized)
            api.set_signature(module.operation, signature_name=name, input_names=list(named), output_names=outputs)
            modules.append(module)
        module = api.merge_modules(modules)  # equal constants become one
        config = api.ConvertToTFLConfig()
        config.enable_x64 = False
        api.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        api.export_flatbuffer_to_file(module.operation, str(path))


def _stablehlo(
    function: Callable[..., dict[str, jax.Array]], params: Any, inputs: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[bytes, list[str]]:
    """The serialized module of a function, and the names of its outputs in their order."""
    outputs = list(jax.eval_shape(lambda named: function(params, **named), dict(inputs)))

    def positional(*arrays: jax.Array) -> list[jax.Array]:
        named = function(params, **dict(zip(inputs, arrays, strict=True)))
        return [named[name] for name in outputs]

    exported = jax_export.export(jax.jit(positional, keep_unused=True), platforms=["cpu"])(*inputs.values())
    return exported.mlir_module_serialized, outputs
