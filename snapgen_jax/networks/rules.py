"""Sharding rules of several networks in one tree."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import PartitionSpec

Rules = Sequence[tuple[str, PartitionSpec]]


def within(name: str, rules: Rules) -> list[tuple[str, PartitionSpec]]:
    """The rules of a network, for the parameters below `name` alone: "kernel$" holds for `name/conv/kernel`."""
    return [(rf"(?:^|(?<=/)){name}/(?:.*/)?(?:{pattern})", spec) for pattern, spec in rules]
