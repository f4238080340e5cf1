"""JAX against LiteRT, function by function, and how large the numbers inside a file grow."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.precision import Precision
from snapgen_jax.export.sampler import Arrays, Unit
from snapgen_jax.export.verify import relative_l2
from snapgen_jax.training.exports import ExportUnit

# Relative L2 error of one call. Float32 files differ from XLA in the order of their sums alone; a float16 weight is
# off by 2^-12 of itself on average, which some tens of layers add up to under 1e-3.
LIMITS: dict[Precision, float] = {"f32": 1e-5, "f16": 2e-3}
# Half of float16's largest number: what a GPU that computes in float16 holds with a factor of two to spare.
FLOAT16_HEADROOM = 32_752.0


class VerificationError(RuntimeError):
    """The exported file does not compute what JAX computes."""


def cpu_device() -> Any:
    """Where references are computed: an accelerator rounds matrix products that a phone's CPU does not.

    Raises:
        VerificationError: JAX was started without its CPU backend.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise VerificationError(
            "the exported files are compared with JAX on the CPU, and JAX was started without it; "
            "add it, as in JAX_PLATFORMS=tpu,cpu"
        ) from error


def jax_unit(unit: ExportUnit, weights: Mapping[str, Any]) -> Unit:
    """The unit's function in JAX on the CPU, numpy in and numpy out: the reference of its file."""
    params = jax.device_put(unit.select(weights), cpu_device())
    compiled = jax.jit(unit.function)

    def run(**inputs: np.ndarray) -> Arrays:
        return {name: np.asarray(array) for name, array in compiled(params, **inputs).items()}

    return run


def compare(reference: Unit, candidate: Unit, cases: Mapping[str, Arrays]) -> dict[str, float]:
    """{case: relative L2 error of the candidate, the worst of its outputs}."""
    errors = {}
    for case, inputs in cases.items():
        expected, found = reference(**inputs), candidate(**inputs)
        errors[case] = max(relative_l2(found[name], expected[name]) for name in expected)
    return errors


def hold(name: str, precision: Precision, errors: Mapping[str, float]) -> None:
    """Raises `VerificationError` with every case that exceeds the limit of its precision."""
    bad = {case: error for case, error in errors.items() if not error <= LIMITS[precision]}
    if bad:
        listed = ", ".join(f"{error:.2e} at {case}" for case, error in bad.items())
        raise VerificationError(
            f"{name} in {precision}: LiteRT differs from JAX by {listed} (relative L2); at most "
            f"{LIMITS[precision]:.0e} is accepted. Nothing was written."
        )


def largest_activation(path: pathlib.Path, signature: str, cases: Mapping[str, Arrays]) -> tuple[float, str]:
    """The largest |value| that any operator of a file makes, and the tensor that holds it.

    Two kinds of numbers are large on purpose and are left out: the mask is replaced by ones, and of a softmax's input
    only the positive side counts, since a masked score may well fall to minus infinity.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    operators = describe(path).operators
    scores = {tensor.name for op in operators if op.name == "SOFTMAX" for tensor in op.inputs}
    made = {tensor.name for op in operators for tensor in op.outputs if tensor.dtype == "float32"}
    interpreter = Interpreter(
        str(path),
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,  # a delegate hides its tensors
    )
    runner = interpreter.get_signature_runner(signature)
    indices = [(d["index"], d["name"]) for d in interpreter.get_tensor_details() if d["name"] in made]
    largest = (0.0, "")
    for inputs in cases.values():
        runner(**{name: np.ones_like(array) if name == "mask" else array for name, array in inputs.items()})
        for index, name in indices:
            values = interpreter.get_tensor(index)
            top = values.max() if name in scores else np.abs(values).max()
            largest = max(largest, (float(top), name))
    return largest
