"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import re

from snapgen_jax.parallel.traffic import BITS, repeated_lines

log = logging.getLogger(__name__)

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_LINE = re.compile(rf"= (?P<type>.+?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<rest>.*)")
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+(?:fn)?)?)\[([\d,]*)\]")
# Groups are listed ({{0,1},{2,3}}), counted ([groups,size]<=...), or named as axes of a mesh, whole or in part, with an
# order of its devices or not: mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a','b':(1)2}.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? *\{([^}]*)\})"
)
_DEVICES = re.compile(r"^HloModule .*\bnum_partitions=(\d+)", re.MULTILINE)
# What leaves a slice is handed to the host, which exchanges it with those of the other slices.
_LEAVES = re.compile(r'= \((?P<type>\S+), .* send\(.*_xla_megascale_transfer_type="(?P<transfer>\w+)"')
ACROSS = "across slices"
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All operations of one kind in a program.

    Attributes:
        count: how many.
        bytes: of their results on one device, together.
        wire_bytes: what one device sends (and receives) for them over a ring.
    """

    count: int
    bytes: int
    wire_bytes: int


def collectives(text: str, slices: int = 1) -> dict[str, Collective]:
    """The collectives of a program by kind, from the text of its compiled module; one in a loop is counted as often as
    the loop runs. What a device sends to other slices is of the kind `ACROSS`.

    A ring of n devices moves (n-1)/n of a gathered or scattered array past each device, and twice that for a sum.

    Args:
        text: of the module.
        slices: that the program was compiled for.
    """
    found: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    all_devices = int(header[1]) if (header := _DEVICES.search(text)) else 1
    unread: list[str] = []
    for line, times in repeated_lines(text):
        if leaves := _LEAVES.search(line):
            size = sum(_size(*array) for array in _ARRAY.findall(leaves["type"]))
            factor = 2 * (slices - 1) / slices if leaves["transfer"] == "ALL_REDUCE" else slices - 1
            found[ACROSS] += [(size, round(factor * size))] * times
            continue
        match = _LINE.search(line)
        if match is None:
            continue
        kind, sizes = match["kind"], [_size(*array) for array in _ARRAY.findall(match["type"])]
        if not sizes:
            continue
        # A started gather or permute has (operand, result, ...) for a type; a sum has its results.
        size = max(sizes) if match["start"] and kind in ("all-gather", "collective-permute") else sum(sizes)
        if kind == "collective-permute":
            sent = size
        else:
            devices = _ring(match["rest"], unread) or all_devices
            whole = size * devices if kind == "reduce-scatter" else size
            sent = round((2 if kind == "all-reduce" else 1) * (devices - 1) / devices * whole)
        found[kind] += [(size, sent)] * times
    if unread:
        log.warning("%d collectives count as of all devices; no groups are read in %.300s", len(unread), unread[0])
    return {
        kind: Collective(len(sizes), sum(s for s, _ in sizes), sum(w for _, w in sizes))
        for kind, sizes in sorted(found.items())
    }


def _ring(operands: str, unread: list[str]) -> int:
    """How many devices take part; 0 for all, and where the text, which `unread` then gets, says it in another form."""
    groups = _GROUPS.search(operands)
    if groups is None:
        if "replica_groups={}" not in operands:
            unread.append(operands)
        return 0
    listed, _, counted, axes, named = groups.groups()
    if listed is not None:
        return len(listed.split(","))
    if counted is not None:
        return int(counted)
    sizes = {name: int(size) for name, size, _ in _AXIS.findall(axes)}
    return math.prod(int(part) if part else sizes[name] for name, _, part in _AXIS.findall(named))


def _size(dtype: str, dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d) * BITS.get(dtype, 32) // 8
