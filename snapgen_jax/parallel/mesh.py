"""The device mesh: which axes there are, and how a batch lies on them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from snapgen_jax.bounds import at_least, check

Tree = Any
BATCH_AXES = ("data", "fsdp")
AXES = (*BATCH_AXES, "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; one axis may be -1 and takes what is left.

    Attributes:
        data: replicas of the parameters, each with its share of the batch.
        fsdp: parameters and their optimizer state are split over this axis, and the batch as well.
        tensor: the widths inside attention and feed-forward networks are split over this axis, and the batch is not.
        slices: TPU slices (or other groups of hosts) that only the data centre's network joins. They share out `data`,
            so that of all traffic only the sum of the gradients crosses between them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        check(self, slices=at_least(1))

    PRESETS: ClassVar[dict[str, dict[str, int]]] = {
        "data": {},
        "fsdp": {"data": 1, "fsdp": -1},
        "fsdp8": {"fsdp": 8},
        "tensor2": {"tensor": 2},
        "two_slices": {"slices": 2},
    }

    @classmethod
    def preset(cls, name: str) -> MeshConfig:
        """The mesh of that name. "data" replicates, "fsdp" splits over all devices, "fsdp8" over groups of eight."""
        if name not in cls.PRESETS:
            raise ValueError(f"there is no mesh {name!r}; the presets are {', '.join(cls.PRESETS)}")
        return cls(**cls.PRESETS[name])


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over those given, ordered so that neighbours in it are neighbours in the machine.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or the slices do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.tensor]
    asked = " x ".join(f"mesh.{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(f"{asked}: give positive sizes, at most one of them -1")
    known = math.prod(s for s in sizes if s != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"{asked} does not fit {len(devices)} devices; "
            "make the product equal to the number of devices, or set one of them to -1"
        )
    shape = [len(devices) // known if s == -1 else s for s in sizes]
    if shape[0] % config.slices:
        raise ValueError(f"mesh.data={shape[0]} does not divide over mesh.slices={config.slices}; change one of them")
    if config.slices == 1:
        types = (jax.sharding.AxisType.Auto,) * len(AXES)
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    inside = (shape[0] // config.slices, *shape[1:])
    try:
        array = mesh_utils.create_hybrid_device_mesh(inside, (config.slices, 1, 1), devices)
    except ValueError as error:
        raise ValueError(f"mesh.slices={config.slices} does not fit these devices: {error}") from error
    return Mesh(array, AXES)


def mesh_of(tree: Tree) -> Mesh | None:
    """The mesh that the arrays of a tree lie on; None for arrays of one device, or of none."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    meshes = (getattr(leaf.sharding, "mesh", None) for leaf in leaves)
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading dimension split over every batch axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def put_batch(batch: Tree, mesh: Mesh) -> Tree:
    """This host's share of a global batch -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """Refuses a global batch that cannot be split, before any device time is spent.

    Raises:
        ValueError: with the numbers, and the next sizes that would do.
    """
    shares = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    parts = shares * microbatches
    if batch_size % parts:
        lower = batch_size // parts * parts
        options = f"{lower} or {lower + parts}" if lower else f"{parts}"
        raise ValueError(
            f"a global batch of {batch_size} does not divide over {shares} devices x {microbatches} microbatches; "
            f"set batch_size to {options}, or change mesh or microbatches"
        )
