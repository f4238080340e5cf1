"""JAX against LiteRT, function by function, and how large the numbers inside a file grow."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.precision import Precision
from snapgen_jax.export.sampler import Arrays, Unit, relative_l2
from snapgen_jax.training.exports import ExportUnit

# Relative L2 error of one call. Float32 files differ from XLA in the order of their sums alone; a float16 weight is
# off by 2^-12 of itself on average, which some tens of layers add up to under 1e-3. Eight bits give 3e-2 to 5e-2, from
# one to some hundred million weights; four bits in all layers 0.3 to 0.4, and in some of them what a budget allows.
LIMITS: dict[Precision, float] = {"f32": 1e-5, "f16": 2e-3, "int8": 0.1, "mixed": 0.3}
# On the GPU accelerator in float32 arithmetic: its sines and its order of sums are rougher than the CPU's.
GPU_LIMITS: dict[Precision, float] = {"f32": 1e-4, "f16": 2.1e-3, "int8": 0.1, "mixed": 0.3}
Device = Literal["CPU", "GPU"]
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
    """The unit's function in JAX on the CPU, numpy in and numpy out: the reference of its file. `weights`: what
    `unit.select` returned."""
    params = jax.device_put(weights, cpu_device())
    compiled = jax.jit(unit.function)

    def run(**inputs: np.ndarray) -> Arrays:
        return {name: np.asarray(array) for name, array in compiled(params, **inputs).items()}

    return run


def compare(reference: Unit, candidate: Unit, cases: Mapping[str, Arrays]) -> dict[str, float]:
    """{case: relative L2 error of the candidate, the worst of its outputs}."""
    errors = {}
    for case, inputs in cases.items():
        expected, found = reference(**inputs), candidate(**inputs)
        errors[case] = worst(expected, found)
    return errors


def worst(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float:
    """The relative L2 error of the output that is furthest off; infinite where any holds NaN or infinity."""
    return max(relative_l2(found[name], expected[name]) for name in expected)


def hold(name: str, precision: Precision, errors: Mapping[str, float], device: Device = "CPU") -> None:
    """Raises `VerificationError` with every case that exceeds the limit of its precision and device."""
    limit = (LIMITS if device == "CPU" else GPU_LIMITS)[precision]
    bad = {case: error for case, error in errors.items() if not error <= limit}
    if bad:
        listed = ", ".join(f"{error:.2e} at {case}" for case, error in bad.items())
        notes = " An infinite error is an output with NaN or infinity." if np.inf in bad.values() else ""
        where = "" if device == "CPU" else "'s GPU accelerator"
        notes += "" if device == "CPU" else " It is right on the CPU; --gpu=skip exports it nevertheless."
        raise VerificationError(
            f"{name} in {precision}: LiteRT{where} differs from JAX by {listed} (relative L2); at most "
            f"{limit:.0e} is accepted.{notes} Nothing was written."
        )


class Activations:
    """The largest |value| that any operator of a file makes, over all calls that are shown to it.

    Two kinds of numbers are large on purpose and are left out: the mask is replaced by ones, and of a softmax's input
    only the positive side counts, since a masked score may well fall to minus infinity. NaN counts as infinite.

    Attributes:
        value, tensor: the largest so far, and the tensor that holds it.
        calls: how many calls were looked at.
    """

    def __init__(self, path: pathlib.Path, signature: str) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        description = describe(path)
        operators, self._graph = description.operators, description.graphs[signature]
        self._scores = {tensor.name for op in operators if op.name == "SOFTMAX" for tensor in op.inputs}
        made = {tensor.name for op in operators for tensor in op.outputs if tensor.dtype == "float32"}
        self._interpreter = Interpreter(
            str(path),
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,  # it would hide its tensors
        )
        self._runner = self._interpreter.get_signature_runner(signature)
        self._indices = [
            (d["index"], d["name"]) for d in self._interpreter.get_tensor_details(self._graph) if d["name"] in made
        ]
        self.value, self.tensor, self.calls = 0.0, "", 0

    def look(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Runs one call."""
        self._runner(**{name: np.ones_like(array) if name == "mask" else array for name, array in inputs.items()})
        self.calls += 1
        for index, name in self._indices:
            values = self._interpreter.get_tensor(index, self._graph)
            top = float(values.max() if name in self._scores else np.abs(values).max())
            top = np.inf if np.isnan(top) else top
            if top > self.value:
                self.value, self.tensor = top, name

    def watch(self, unit: Unit, until: float) -> Unit:
        """The same function, whose calls are looked at, too, as long as `time.monotonic()` is below `until`."""

        def run(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
            if time.monotonic() < until:
                self.look(inputs)
            return unit(**inputs)

        return run

    def hold(self, name: str) -> None:
        """Raises `VerificationError` where float16 arithmetic would have less than a factor of two to spare."""
        if not self.value <= FLOAT16_HEADROOM:
            raise VerificationError(
                f"{name}: |{self.tensor}| reaches {self.value:.3g}, and float16 ends at 65504, so that a GPU that "
                f"computes in it may draw garbage; at most {FLOAT16_HEADROOM:.4g} is accepted. Normalise or scale what "
                "makes it; --gpu=skip exports it nevertheless, for clients that ask for float32 arithmetic. "
                "Nothing was written."
            )
