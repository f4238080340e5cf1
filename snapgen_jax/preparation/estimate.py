"""What an encoding takes, before anything is written: bytes of the shards, and chip-hours on TPUs that are not here.

Bytes are those of the arrays, before ArrayRecord's compression: states and latents hardly shrink, token ids and masks
do. Time is that at the peaks of the chip, of the encoders compiled for the topology (`parallel.plan`): a lower bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from snapgen_jax.networks.module import frozen_spec
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from snapgen_jax.parallel.plan import Plan, Topology, plan_step
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.preparation.stored import Encoding

Tree = Any
CHIPS_OF_A_HOST = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an encoding takes.

    Attributes:
        form: "states" or "tokens".
        images, captions: how many.
        image_bytes: stored once an example, the mean of the sizes.
        caption_bytes: stored for each caption.
        plans: by part: "images HxW" of each size, and "captions" where text encoders run.
    """

    form: str
    images: int
    captions: int
    image_bytes: float
    caption_bytes: int
    plans: Mapping[str, Plan]

    @property
    def bytes(self) -> float:
        """Of all shards."""
        return self.images * self.image_bytes + self.captions * self.caption_bytes

    @property
    def chip_hours(self) -> float:
        """At the peaks, every size with as many images as another; infinite where the encoders do not fit."""
        if not all(plan.fits for plan in self.plans.values()):
            return math.inf
        seconds = {name: plan.chips / plan.examples_per_second for name, plan in self.plans.items()}
        texts = seconds.pop("captions", 0.0)
        images = float(np.mean(list(seconds.values()))) if seconds else 0.0
        return (self.images * images + self.captions * texts) / 3600

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        figures = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "plans"}
        plans = {name: plan.to_json() for name, plan in self.plans.items()}
        return {**figures, "bytes": self.bytes, "chip_hours": self.chip_hours, "plans": plans}

    def line(self) -> str:
        """The estimate for a person."""
        chips = next(iter(self.plans.values())).chips
        topology = next(iter(self.plans.values())).topology
        fits = ", ".join(f"{name} {plan.peak_bytes / 1e9:.1f} GB" for name, plan in self.plans.items())
        time = f"{self.chip_hours:,.0f} chip-hours, {self.chip_hours / chips:,.1f} h on {topology}, at best"
        if math.isinf(self.chip_hours):
            time = f"the encoders do not fit {topology}; take one of more memory"
        return (
            f"{self.form}: {self.bytes / 1e12:,.3f} TB ({self.image_bytes / 1e3:,.1f} kB an image, "
            f"{self.caption_bytes / 1e3:,.1f} kB a caption); {time}; of a chip's memory: {fits}"
        )


def estimate(
    encoding: Encoding, form: str, where: Topology, images: int, captions: int, batch_per_device: int = 8
) -> Estimate:
    """Compiles the encoders for a topology; reads and writes nothing.

    Args:
        encoding: what is stored, built for the platform "tpu".
        form: "states" or "tokens", for the table.
        where: the topology. The encoders are split over the chips of a host, as `encode` does.
        images, captions: how many there are.
        batch_per_device: images, and captions, that a device encodes together.
    """
    arrays = encoding.arrays()
    sizes = {bucket: {n: _bytes(s) for n, s in specs.items()} for bucket, specs in encoding.specs.items()}
    once = [sum(x for n, x in of.items() if not arrays[n].captions) for of in sizes.values()]
    each = sum(x for n, x in next(iter(sizes.values())).items() if arrays[n].captions)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=min(CHIPS_OF_A_HOST, len(where.devices))), where.devices)
    rows = batch_per_device * mesh.size
    built = encoding.networks()
    networks = {role: frozen_spec(network) for role, network in built.items()}
    places = tree_shardings(networks, rules_of(built), mesh)
    networks = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), networks, places)

    def planned(function: Any, batch: Tree, name: str) -> Plan:
        with jax.set_mesh(mesh):
            lowered = jax.jit(function).lower(networks, batch)
        return plan_step(lowered, where, mesh, bucket=name, global_batch=rows, state={}, train_steps=1, part="encode")

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))

    plans = {}
    if any(role.partition("/")[2].startswith("codec") for role in built):
        for bucket, (height, width) in encoding.sizes.items():
            plans[f"images {bucket}"] = planned(encoding.encode_images, array((height, width, 3), np.uint8), bucket)
    if any(not role.partition("/")[2].startswith("codec") for role in built):
        tokens = {
            name: array((length,), np.float32 if name.endswith("_mask") else np.int32)
            for name, length in encoding.token_lengths().items()
        }
        plans["captions"] = planned(encoding.encode_text, tokens, "captions")
    return Estimate(form, images, captions, float(np.mean(once)), each, plans)


def _bytes(spec: Any) -> int:
    return math.prod(spec.shape[1:]) * np.dtype(spec.dtype).itemsize


def with_text(config: Any, form: str) -> Any:
    """A recipe's config whose stored inputs, a teacher's too, are of that form of text."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    if vars(config).get("kind") in ("stored", "stored_encodings"):
        return dataclasses.replace(config, text=form)  # type: ignore[call-arg]
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        changed = with_text(value, form)
        if changed is not value:
            changes[field.name] = changed
    return dataclasses.replace(config, **changes) if changes else config
