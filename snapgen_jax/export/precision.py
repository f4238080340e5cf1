"""What the weights of a `.tflite` file are stored in: float16, eight bits, or eight and four bits by layer.

All start from the float32 file, by ai-edge-quantizer. TensorFlow's own float16 mode is not used: it also rounds small
tables, such as frequencies, and the error of a denoiser then grows with the time.

Integer weights are symmetric, with a scale for each output channel. A CPU computes with them in integers, for which it
rounds activations on the fly ("dynamic range"); a GPU multiplies them out and computes in floating point. Inputs,
outputs, biases, norms, depthwise convolutions and tables that a gather reads stay float32.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from snapgen_jax.export.flatbuffer import Description, describe

Precision = Literal["f32", "f16", "int8", "mixed"]
PRECISIONS: tuple[Precision, ...] = ("f32", "f16", "int8", "mixed")
DEFAULT: tuple[Precision, ...] = ("f32", "f16", "int8")
QUANTISED: tuple[Precision, ...] = ("int8", "mixed")
# What a CPU does with integer weights: it computes in integers, or multiplies them out first, as a GPU does.
Arithmetic = Literal["integer", "float"]

# Operators whose weights become integers. DEPTHWISE_CONV_2D is not among them: XNNPACK, the CPU's delegate, computes it
# in floating point alone, and a network that leaves it at every block is slower than float32. Its weights are few.
EIGHT_BITS = ("BATCH_MATMUL", "CONV_2D", "CONV_2D_TRANSPOSE", "EMBEDDING_LOOKUP", "FULLY_CONNECTED")
FOUR_BITS = ("CONV_2D", "FULLY_CONNECTED")
LEAST_WEIGHTS = 1024  # four bits of fewer save nothing

# Names that one may try, and why there is no such precision.
UNUSABLE = (
    (r"int8.*(block|b\d)", "eight bits have no blocks: the quantiser would leave every weight float32 and say nothing"),
    (r"(int|w)2", "with two bits a network gives NaN, or something that is half error"),
    (r"static|a8|a16", "static files take int8 in place of float32 inputs, and draw something else"),
    (r"(int|w)4", "four bits everywhere lose a seventh of the score or more; `mixed` has them where they do no harm"),
)


class QuantisationError(RuntimeError):
    """The quantiser refused a file, or changed nothing in it."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights that can take four bits.

    Attributes:
        scopes: names of the operators that use them, as the quantiser calls those.
        kind: of the operators, "CONV_2D".
        shape: of the weights.
    """

    scopes: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)


def checked(names: Sequence[str]) -> tuple[Precision, ...]:
    """The precisions of some names.

    Raises:
        ValueError: a name is none, with the reason where it is one that cannot be had; or there is none, or twice one.
    """
    for name in names:
        if name not in PRECISIONS:
            reason = next((f": {why}" for pattern, why in UNUSABLE if re.search(pattern, name.lower())), "")
            raise ValueError(f"there is no precision {name!r}{reason}; give some of {', '.join(PRECISIONS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the precisions are {list(names)}; give some of {', '.join(PRECISIONS)}, each once")
    return tuple(precision for precision in PRECISIONS if precision in names)


def write_variant(
    precision: Precision,
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    four: Sequence[Layer] = (),
    arithmetic: Arithmetic = "integer",
) -> None:
    """Writes a variant of a float32 file: "f16", "int8", or "mixed" with these layers in four bits.

    Raises:
        QuantisationError: see `quantise`.
    """
    if precision == "f16":
        cast_float16(source, target)
    else:
        quantise(source, target, four, arithmetic)


def cast_float16(source: str | pathlib.Path, target: str | pathlib.Path) -> pathlib.Path:
    """Casts the weights of convolutions and matrix products of a float32 `.tflite` file to float16.

    A DEQUANTIZE before each use keeps the arithmetic, the inputs and the outputs float32; a GPU fuses it away. Biases,
    norms and tables stay float32.

    Args:
        source: a float32 file, made by either backend.
        target: the file to write.

    Returns:
        `target`.
    """
    from ai_edge_quantizer import recipe_manager

    job = _job(source)
    job.add_weight_only_config(**_rule(16), algorithm_key=recipe_manager.AlgorithmName.FLOAT_CASTING)
    return _write(job, target)


def quantise(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    four: Sequence[Layer] = (),
    arithmetic: Arithmetic = "integer",
    others: Literal["int8", "f32"] = "int8",
) -> int:
    """Rounds the weights of convolutions and matrix products of a float32 `.tflite` file to integers.

    Args:
        source: a float32 file, made by either backend.
        target: the file to write.
        four: layers of `layers(source)` that take four bits.
        arithmetic: how a CPU computes: "integer" is what is shipped, "float" what a GPU makes of the same weights.
        others: what all other layers take.

    Returns:
        How many weights have become integers; 0 where the file has no convolution and no product with weights, and
        `target` is then as `source`.

    Raises:
        QuantisationError: the quantiser refuses the file, or a layer of `four` did not take four bits.
    """
    job = _job(source)
    add = job.add_dynamic_config if arithmetic == "integer" else job.add_weight_only_config
    if others == "int8":
        for operator in EIGHT_BITS:
            add(**_rule(8, operator))
    for layer in four:
        for scope in layer.scopes:
            add(**_rule(4, layer.kind, f"^{re.escape(scope)}$"))
    path = _write(job, target)
    stored = weights_of(describe(path))
    wanted = sum(layer.size for layer in four)
    if stored.get("int4", 0) != wanted:
        raise QuantisationError(
            f"{source}: {wanted} weights were to take four bits, and the quantiser gave them to {stored.get('int4', 0)}"
        )
    return stored.get("int8", 0) + stored.get("int4", 0)


def layers(source: str | pathlib.Path) -> list[Layer]:
    """The weights of a float32 file that can take four bits, in the order of their first use."""
    users: dict[int, list[Any]] = collections.defaultdict(list)
    for operator in describe(source).operators:
        for tensor in operator.inputs[1:2]:
            if tensor.constant and tensor.dtype == "float32" and len(tensor.shape) > 1:
                users[tensor.buffer].append((operator, tensor.shape))
    found = []
    for uses in users.values():
        kinds = {operator.name for operator, _ in uses}
        if len(kinds) == 1 and kinds <= set(FOUR_BITS) and math.prod(uses[0][1]) >= LEAST_WEIGHTS:
            scopes = tuple("".join(f"{made.name};" for made in operator.outputs) for operator, _ in uses)
            found.append(Layer(scopes, kinds.pop(), uses[0][1]))
    return found


def weights_of(description: Description) -> dict[str, int]:
    """{dtype: how many stored numbers} of a file; each buffer counts once."""
    buffers = {tensor.buffer: tensor for tensor in description.tensors if tensor.constant}
    found: dict[str, int] = {}
    for tensor in buffers.values():
        found[tensor.dtype] = found.get(tensor.dtype, 0) + math.prod(tensor.shape)
    return found


def _job(source: str | pathlib.Path) -> Any:
    from ai_edge_quantizer import quantizer

    return quantizer.Quantizer(str(source))


def _rule(bits: int, operator: str = "ALL_SUPPORTED", scopes: str = ".*") -> Mapping[str, Any]:
    from ai_edge_quantizer import qtyping

    return {"regex": scopes, "operation_name": qtyping.TFLOperationName[operator], "num_bits": bits}


def _write(job: Any, target: str | pathlib.Path) -> pathlib.Path:
    target, silence = pathlib.Path(target), io.StringIO()  # it prints progress bars and a summary of sizes
    target.unlink(missing_ok=True)  # it warns of a file that it overwrites
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            job.quantize().export_model(str(target), overwrite=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise QuantisationError(f"{target.name}: the quantiser failed: {error}") from error
    target.chmod(0o644)  # it marks the file as a program
    return target
