"""Plans one forward pass of each published network at full size on TPU v5e 4x4, without a TPU.

    python -m benchmarks.plan_published                     # all of them, some minutes
    python -m benchmarks.plan_published sd15 dit_xl_2

Writes `results/plan/published_forward-v5e_4x4.json`, one plan a network: memory, arithmetic and traffic of a call of
its batch, the parameters whole on every chip in bfloat16 and the batch split over all of them. A network that is
planned again replaces its entry.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.module import apply, build, for_platform
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.svd_unet import SVDUNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from snapgen_jax.parallel.plan import plan_step, topology

TOPOLOGY = "v5e:4x4"
RESULT = pathlib.Path(__file__).parent / "results" / "plan" / "published_forward-v5e_4x4.json"


class Case(NamedTuple):
    """A network, and the sizes of its inputs beyond the batch."""

    config: Any
    batch: int
    sizes: dict[str, int]
    bucket: str


CASES = {
    "sd15": Case(SDUNetConfig.preset("sd15", attention="chunked"), 128, {"height": 64, "width": 64}, "512x512"),
    "sd21": Case(SDUNetConfig.preset("sd21", attention="chunked"), 128, {"height": 96, "width": 96}, "768x768"),
    "sdxl": Case(SDUNetConfig.preset("sdxl", attention="chunked"), 64, {"height": 128, "width": 128}, "1024x1024"),
    "svd": Case(
        SVDUNetConfig.preset("svd", attention="chunked"), 16, {"height": 72, "width": 128, "frames": 14}, "576x1024x14"
    ),
    "dit_xl_2": Case(DiTConfig.preset("xl_2"), 256, {"height": 32, "width": 32}, "256x256"),
    "clip_h_14": Case(ClipVisionConfig.preset("h_14"), 256, {}, "224x224"),
    "clip_big_g_14": Case(ClipVisionConfig.preset("big_g_14"), 256, {}, "224x224"),
}


def plan(case: Case, place: str = TOPOLOGY) -> dict[str, Any]:
    """The plan of a forward pass, as plain data."""
    where = topology(place)
    mesh = make_mesh(MeshConfig(), where.devices)
    network, spec = build(for_platform(case.config, "tpu"))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), spec)
    inputs = case.config.input_spec(case.batch, **case.sizes)
    call = functools.partial(apply, network)
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        lowered = jax.jit(call, in_shardings=(whole, *[batch_sharding(mesh)] * len(inputs))).lower(params, *inputs)
        found = plan_step(
            lowered,
            where,
            mesh,
            bucket=case.bucket,
            global_batch=case.batch,
            state=params,
            train_steps=1,
            part="forward",
        )
    return found.to_json()


def chosen(cases: Iterable[str], what: str, description: str | None) -> list[str]:
    """Those of the cases that the command line names; all where it names none."""
    known = list(cases)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=known, help=f"of {', '.join(known)}; all by default")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no {what} {unknown[0]!r}; choose of {', '.join(known)}")
    return names


def main() -> None:
    """Plans and stores what is asked for."""
    for name in chosen(CASES, "network", __doc__):
        entry = {"network": name, **plan(CASES[name])}
        known = json.loads(RESULT.read_text()) if RESULT.exists() else []
        kept = {one["network"]: one for one in known} | {name: entry}
        RESULT.write_text(json.dumps([kept[n] for n in CASES if n in kept], indent=2) + "\n")
        print(
            f"{name}: {entry['peak_bytes'] / 1e9:.1f} GB, compute {1e3 * entry['compute_seconds']:.0f} ms, "
            f"HBM {1e3 * entry['hbm_seconds']:.0f} ms"
        )


if __name__ == "__main__":
    main()
