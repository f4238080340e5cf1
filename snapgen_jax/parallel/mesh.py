"""The device mesh: which axes there are, and how a batch lies on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = Any
AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; one axis may be -1 and takes what is left.

    Attributes:
        data: replicas of the parameters, each with its share of the batch.
        fsdp: parameters and their optimizer state are split over this axis, and the batch as well.
    """

    data: int = -1
    fsdp: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over those given.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}: give positive sizes, at most one of them -1"
        )
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"mesh.data={config.data} x mesh.fsdp={config.fsdp} does not fit {len(devices)} devices; "
            "make the product equal to the number of devices, or set one of them to -1"
        )
    shape = [len(devices) // known if s == -1 else s for s in sizes]
    return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading dimension split over every batch axis."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """This host's share of a global batch -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Refuses a global batch that cannot be split, before any device time is spent.

    Raises:
        ValueError: with the numbers, and the next sizes that would do.
    """
    parts = mesh.size * microbatches
    if batch_size % parts:
        lower = batch_size // parts * parts
        options = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise ValueError(
            f"a global batch of {batch_size} does not divide over {mesh.size} devices x {microbatches} microbatches; "
            f"set batch_size to {options}, or change mesh or microbatches"
        )
