"""What a `.tflite` file may hold, so that it runs on a phone: on its CPU always, on its GPU for the denoiser.

The gates read the flatbuffer. They are stricter than the CPU interpreter, because a graph that only the CPU takes is
found out late, on a device.
"""

from __future__ import annotations

import dataclasses
import pathlib

from snapgen_jax.export.flatbuffer import Description, Operator, Tensor, describe

IO_DTYPES = ("float32", "int32")

# Operators that LiteRT's GPU accelerator (ML Drift) ran in full when each was tried alone, or that the documentation of
# the GPU delegate lists. What is missing here falls back to the CPU in the middle of a graph, or fails to compile.
# fmt: off
GPU_OPERATORS = frozenset([
    "ABS", "ADD", "ARG_MAX", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "CONV_2D", "COS", "DEPTHWISE_CONV_2D",
    "DEQUANTIZE", "DIV", "EXP", "FULLY_CONNECTED", "GELU", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MINIMUM",
    "MUL", "NEG", "ONE_HOT", "PAD", "REDUCE_MAX", "RELU", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR",
    "RSQRT", "SIN", "SLICE", "SOFTMAX", "STRIDED_SLICE", "SUB", "SUM", "TANH", "TRANSPOSE", "TRANSPOSE_CONV",
])
# fmt: on
# Operators of two tensors, element by element; the smaller one is repeated.
ELEMENTWISE = frozenset(["ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "POW", "SQUARED_DIFFERENCE", "FLOOR_DIV"])
CONTROL_FLOW = frozenset({"IF", "WHILE", "CALL", "CALL_ONCE"})


class IncompatibleModelError(ValueError):
    """The file holds something that a phone's runtime does not take. The message names every operator and tensor."""


@dataclasses.dataclass(frozen=True)
class Requirements:
    """What is asked of one file.

    Attributes:
        branches: whether an IF may stand in it: no GPU runs one, nor a file that holds one in part.
        max_rank: the highest rank of any tensor; GPU delegates stop at 4.
        gpu: whether each operator must be one that the GPU accelerator takes whole.
        required: operators that must be there ("DEPTHWISE_CONV_2D": a shifted form of it is right on a workstation and
            nine times the work on a phone).
    """

    max_rank: int = 4
    gpu: bool = False
    branches: bool = False
    required: tuple[str, ...] = ()


def check(path: str | pathlib.Path, requirements: Requirements = Requirements()) -> Description:
    """Describes a file and holds it to its requirements.

    Always asked: no custom operator, no Flex operator (TensorFlow's own kernels), no leftover of StableHLO, no control
    flow, float32 or int32 inputs and outputs, static shapes, no tensor that nothing uses.

    Raises:
        IncompatibleModelError: names every breach, its operator and its tensor.
    """
    description = describe(path)
    found = breaches(description, requirements)
    if found:
        shown = "\n".join(f"  {line}" for line in found[:20]) + ("\n  ..." if len(found) > 20 else "")
        raise IncompatibleModelError(f"{path}: {len(found)} reason(s) why a phone would not run it:\n{shown}")
    return description


def breaches(description: Description, requirements: Requirements) -> list[str]:
    """One sentence for each breach; empty where all is well."""
    found = []
    for operator in description.operators:
        reason = _forbidden(operator.name, requirements)
        if reason:
            found.append(f"{operator.name} {reason}; it makes {_names(operator.outputs)}")
        if requirements.gpu and (misread := _misread(operator)):
            found.append(misread)
        for tensor in operator.outputs:
            if len(tensor.shape) > requirements.max_rank:
                found.append(
                    f"{operator.name} makes {tensor.name!r} of shape {list(tensor.shape)}: rank {len(tensor.shape)}, "
                    f"at most {requirements.max_rank} is taken"
                )
    for kind, signatures in (("input", description.inputs), ("output", description.outputs)):
        for name, tensor in ((n, t) for tensors in signatures.values() for n, t in tensors.items()):
            if tensor.dtype not in IO_DTYPES:
                found.append(f"{kind} {name!r} is {tensor.dtype}; {' or '.join(IO_DTYPES)} was expected")
    found += [
        f"tensor {tensor.name!r} has a shape that is only known at run time"
        for tensor in description.tensors
        if not tensor.static
    ]
    found += [
        f"tensor {tensor.name!r} {list(tensor.shape)} is used by no operator, and makes calibration fail"
        for tensor in description.orphans
    ]
    found += [f"there is no {name} in the graph" for name in requirements.required if name not in description.histogram]
    return found


def _forbidden(name: str, requirements: Requirements) -> str | None:
    if name.startswith("CUSTOM:Flex"):
        return "needs TensorFlow's own kernels (Flex)"
    if name.startswith("CUSTOM:"):
        return "is a custom operator"
    if name.startswith("STABLEHLO_"):
        return "was not lowered to a TFLite builtin"
    if name in CONTROL_FLOW and not (requirements.branches and name == "IF"):
        return "is control flow, which belongs to the client"
    if requirements.gpu and name not in GPU_OPERATORS:
        return "is not run by the GPU accelerator"
    return None


def _misread(operator: Operator) -> str | None:
    """Ranks that a GPU delegate aligns otherwise than TFLite does, so that it computes garbage and reports success.

    TFLite aligns shapes at their last axis. ML Drift reads `[N, C]` as `[N, 1, 1, C]` and `[1, N, C]` as
    `[1, 1, N, C]`: the first axis is the batch, whatever the rank. Both agree where the tensor of lower rank has a
    first axis of one, or that axis only.
    """
    if operator.name not in ELEMENTWISE or len(operator.inputs) != 2:
        return None
    low, high = sorted(operator.inputs, key=lambda tensor: len(tensor.shape))
    if len(low.shape) == len(high.shape) or len(low.shape) < 2 or low.shape[0] == 1:
        return None
    return (
        f"{operator.name} of {low.name!r} {list(low.shape)} and {high.name!r} {list(high.shape)} is computed wrongly "
        f"by the GPU accelerator, which takes the {low.shape[0]} for a batch; give both tensors the same rank, "
        "as in an image [1, H, W, C] and a table [1, H, W, C]"
    )


def flex_operators(description: Description) -> int:
    """How many nodes need TensorFlow's own kernels."""
    return sum(operator.name.startswith("CUSTOM:Flex") for operator in description.operators)


def _names(tensors: tuple[Tensor, ...]) -> str:
    return ", ".join(f"{tensor.name!r} {list(tensor.shape)}" for tensor in tensors)
