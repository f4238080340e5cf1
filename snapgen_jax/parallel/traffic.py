"""What a compiled TPU program moves through memory and computes in its loops, read from its text.

XLA's own count (`cost_analysis`) falls short of both. Its bytes are those of every operand and result, wherever the
compiler has put them: on TPU many lie in the vector memory beside the arithmetic, and a weight that is fetched into it
in four parts counts five times. And it counts the body of a loop once, however often it runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16}
BITS |= {"bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+(?:fn)?)?)\[([\d,]*)\](\{[^}]*\})?")
_TILED = re.compile(r"\{([\d,]*):T\(([\d,]+)\)")
_OPERATION = re.compile(r"\s*([\w\-]+)\((.*)")
_NAME = re.compile(r"%([\w.\-]+)")
_WINDOW = re.compile(r"(\w+)=(-?[\dx_\-]+)")
_STATED_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')  # of a kernel, in its `backend_config`
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id")
# Copies that only name parts of a buffer as a whole, or set one aside.
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer")
_SLICES = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device does in one run of a program.

    Attributes:
        memory_bytes: read from and written to the device's memory; what stays on the chip is not in it. Kernels that
            are not XLA's own are taken to read each operand once.
        repeated_flops: of matrix products and convolutions in the iterations of loops after the first, which XLA's
            count leaves out.
        int8_flops: of products of int8 by int8, as often as they run.
    """

    memory_bytes: int
    repeated_flops: int
    int8_flops: int


@dataclasses.dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    on_chip: bool


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str
    arrays: tuple[_Array, ...]  # of the result
    operands: tuple[str, ...]
    text: str

    @property
    def memory_bytes(self) -> int:
        return sum(array.bytes for array in self.arrays if not array.on_chip)

    def called(self, role: str) -> str:
        found = re.search(rf"\b{role}=%?([\w.\-]+)", self.text)
        return found[1] if found else ""


_Computation = dict[str, _Instruction]
_Computations = dict[str, _Computation]


def traffic(text: str) -> Traffic:
    """Reads the text of a compiled module.

    A fusion that reads only a slice of an operand, or writes one in place, moves that slice. A loop runs as often as
    its condition says that compares a counter with a constant; one that ends otherwise is counted once.

    Raises:
        ValueError: the text is not that of a module.
    """
    computations, entry = _parse(text)
    moved = repeated = int8 = 0
    for name, times in _runs(computations, entry, 1):
        for instruction in computations[name].values():
            moved += times * _moved(computations, computations[name], instruction)
        repeated += (times - 1) * _products(computations, computations[name])
        int8 += times * _products(computations, computations[name], of="s8")
    return Traffic(moved, repeated, int8)


def repeated_lines(text: str) -> Iterator[tuple[str, int]]:
    """The lines of a compiled module, and how often each runs."""
    computations, entry = _parse(text)
    counts = dict(_runs(computations, entry, 1))
    times = 1
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            times = counts.get(begins[2], 1)
        yield line, times


def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry, current = "", {}
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations.setdefault(begins[2], {})
            entry = begins[2] if begins[1] else entry
        elif named := _INSTRUCTION.match(line):
            rest = line[named.end() :]
            type_end = _closing(rest) if rest.startswith("(") else rest.index(" ")
            operation = _OPERATION.match(rest[type_end:])
            if operation is None:
                continue
            arrays = tuple(_array(*found) for found in _ARRAY.findall(rest[:type_end]))
            given = operation[2][: _closing("(" + operation[2]) - 2]
            current[named[2]] = _Instruction(named[2], operation[1], arrays, tuple(_NAME.findall(given)), line)
    if not entry:
        raise ValueError("this is not the text of a compiled module: it has no ENTRY")
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis ends with which a text begins."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return i + 1
    return len(text) + 1


def _array(dtype: str, dims: str, layout: str) -> _Array:
    """An array and the room that it takes: its two minor dimensions are filled up to whole tiles."""
    shape = tuple(int(d) for d in dims.split(",") if d)
    room = list(shape)
    if tiled := _TILED.match(layout):
        order = [int(axis) for axis in tiled[1].split(",") if axis]  # minor to major
        tile = [int(size) for size in tiled[2].split(",")]
        for axis, size in zip(order, reversed(tile), strict=False):
            room[axis] = -(-shape[axis] // size) * size
    return _Array(dtype, shape, math.prod(room) * BITS.get(dtype, 32) // 8, "S(" in layout)


def _runs(computations: _Computations, name: str, times: int) -> Iterator[tuple[str, int]]:
    """The computations that run as sequences of instructions, and how often each does."""
    yield name, times
    for instruction in computations[name].values():
        if instruction.kind == "while":
            trips = _trips(computations[instruction.called("condition")])
            yield from _runs(computations, instruction.called("body"), times * trips)
        elif instruction.kind in ("call", "async-start"):
            called = instruction.called("to_apply") or instruction.called("calls")
            yield from _runs(computations, called, times)


def _trips(condition: _Computation) -> int:
    """How often a loop runs whose condition is `counter < constant`, counted from zero."""
    bounds = [re.search(r"constant\((\d+)\)", i.text) for i in condition.values() if i.kind == "constant"]
    return int(bounds[0][1]) if len(bounds) == 1 and bounds[0] else 1


def _moved(computations: _Computations, computation: _Computation, i: _Instruction) -> int:
    if i.kind in (*_FREE, "while", "call", "async-start") or i.kind.endswith("-done"):
        return 0
    if i.kind == "custom-call" and any(f'"{name}"' in i.text for name in _FREE_CALLS):
        return 0
    if i.kind in ("copy-start", "slice-start"):
        source, target = i.arrays[:2]
        size = min(source.bytes, target.bytes)
        return sum(size for array in (source, target) if not array.on_chip)
    operands = [computation[name] for name in dict.fromkeys(i.operands) if name in computation]  # each is read once
    if i.kind.endswith("-start"):  # its type repeats its operands before its results
        return sum(o.memory_bytes for o in operands) * 2
    if i.kind == "dynamic-update-slice":
        return 2 * operands[1].memory_bytes
    if i.kind in _SLICES:
        return i.memory_bytes + min(i.arrays[0].bytes, operands[0].memory_bytes)
    if i.kind == "fusion":
        return _moved_by_fusion(computations, i, operands)
    return i.memory_bytes + sum(o.memory_bytes for o in operands)


def _moved_by_fusion(computations: _Computations, i: _Instruction, operands: list[_Instruction]) -> int:
    body = computations[i.called("calls")]
    root = _root(body)
    parts = [body[name] for name in root.operands] if root.kind == "tuple" else [root]
    if len(parts) == len(i.arrays):
        written = [_written(computations, body, part) for part in parts]
    else:  # a reduction of several arrays at once
        written = [array.bytes for array in i.arrays]
    moved = sum(min(array.bytes, size) for array, size in zip(i.arrays, written, strict=True) if not array.on_chip)
    for index, operand in enumerate(operands):
        moved += min(operand.memory_bytes, _read(computations, body, _parameter(body, index)))
    return moved


def _read(computations: _Computations, body: _Computation, value: _Instruction) -> int:
    """Bytes that a fusion reads of a value: all of them, unless it takes slices alone, or writes one into it."""
    whole = sum(array.bytes for array in value.arrays)
    total = whole if value is _root(body) else 0
    for user in (user for user in body.values() if value.name in user.operands):
        index = user.operands.index(value.name)
        if user.kind == "bitcast":
            total += _read(computations, body, user)
        elif user.kind == "fusion":
            inner = computations[user.called("calls")]
            total += _read(computations, inner, _parameter(inner, index))
        elif user.kind in _SLICES and index == 0:
            total += user.arrays[0].bytes
        elif user.kind != "dynamic-update-slice" or index != 0:
            total += whole
    return min(whole, total)


def _written(computations: _Computations, body: _Computation, value: _Instruction) -> int:
    """Bytes that a fusion writes of a result: all of them, unless it puts a slice into an array that it was given."""
    if value.kind == "bitcast":
        return _written(computations, body, body[value.operands[0]])
    if value.kind == "fusion":
        inner = computations[value.called("calls")]
        return _written(computations, inner, _root(inner))
    if value.kind == "dynamic-update-slice":
        return body[value.operands[1]].arrays[0].bytes
    return sum(array.bytes for array in value.arrays)


def _root(body: _Computation) -> _Instruction:
    return next(i for i in body.values() if i.text.lstrip().startswith("ROOT "))


def _parameter(body: _Computation, index: int) -> _Instruction:
    return next(i for i in body.values() if i.kind == "parameter" and f" parameter({index})" in i.text)


def _products(computations: _Computations, computation: _Computation, of: str = "") -> int:
    """Operations of the matrix products and convolutions of a computation and of its fusions, and what kernels that are
    not XLA's own say of themselves; with `of` those alone of two operands of this dtype."""
    total = 0
    for i in computation.values():
        if i.kind == "fusion":
            total += _products(computations, computations[i.called("calls")], of)
        elif i.kind in ("convolution", "dot"):
            operands = [computation[name].arrays[0] for name in i.operands[:2]]
            flops = _convolution_flops if i.kind == "convolution" else _dot_flops
            if all(of in ("", operand.dtype) for operand in operands):
                total += flops(i, *(operand.shape for operand in operands))
        elif not of and i.kind == "custom-call" and (stated := _STATED_FLOPS.search(i.text)):
            total += int(stated[1])
    return total


def _dot_flops(i: _Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    del right
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
    summed = [left[int(d)] for d in found[1].split(",") if d] if found else []
    return 2 * math.prod(i.arrays[0].shape) * math.prod(summed)


def _convolution_flops(i: _Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """XLA lowers matrix products to convolutions too, batches and heads to their windows; only taps that meet a number
    of the input count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text)
    if labels is None:
        return 0
    inputs, kernels, outputs = (dict(zip(group, range(len(group)), strict=True)) for group in labels.groups())
    window = re.search(r"window=\{([^}]*)\}", i.text)
    fields = {name: value.split("x") for name, value in _WINDOW.findall(window[1])} if window else {}
    out = i.arrays[0].shape
    taps = 1
    for position, label in enumerate(sorted(label for label in inputs if label.isdigit())):

        def field(name: str, default: str, position: int = position) -> str:
            return fields[name][position] if name in fields else default

        stride, dilated, spread = (int(field(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(field("pad", "0_0").split("_")[0])
        last = (left[inputs[label]] - 1) * dilated
        places = (
            o * stride + k * spread - before for o in range(out[outputs[label]]) for k in range(right[kernels[label]])
        )
        taps *= sum(0 <= place <= last and place % dilated == 0 for place in places)
    groups = re.search(r"batch_group_count=(\d+)", i.text)
    batch = out[outputs["b"]] // (int(groups[1]) if groups else 1) or 1
    return 2 * taps * batch * out[outputs["f"]] * right[kernels["i"]]
