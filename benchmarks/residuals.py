"""What the forward pass of the 379M UNet keeps for its backward pass, by `network.remat` and dtype.

    python -m benchmarks.residuals            # a minute: the program is traced from shapes, and nothing is compiled
    python -m benchmarks.residuals --save     # keeps it in `benchmarks/results/residuals.json`

Counted are the arrays that derivatives read and that are no argument: each once, whatever reads it. XLA may keep less,
where it computes again what is cheap; `snapgen plan --config.network.remat=...` says what a compiled step needs.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from benchmarks.measuring import commit
from snapgen_jax.networks import layers
from snapgen_jax.networks.counting import PIXELS_PER_LATENT
from snapgen_jax.networks.module import apply, build, for_platform
from snapgen_jax.networks.unet import UNetConfig

RESULT = pathlib.Path(__file__).parent / "results" / "residuals.json"
CASES = ((256, 64), (512, 16), (1024, 1))  # pixels, batch


def kept(function: Callable[..., Any], params: Any, *args: Any) -> dict[str, int]:
    """Bytes by dtype that the derivative of a function to its first argument keeps; arguments are arrays or shapes.

    As on TPU and GPU: on CPU `layers.of_rows` adds copies to a trace, which a compiled program shares.
    """

    def backward(params: Any, *args: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: function(params, *args), params)[1])

    with mock.patch.object(layers, "of_rows", jnp.dot):
        jaxpr = jax.make_jaxpr(backward)(params, *args).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    found: collections.Counter[str] = collections.Counter()
    for v in {v for v in jaxpr.outvars if isinstance(v, Var) and v not in given}:
        found[str(v.aval.dtype)] += v.aval.size * v.aval.dtype.itemsize  # type: ignore[attr-defined]
    return dict(found)


def kept_by(config: UNetConfig, pixels: int, batch: int) -> dict[str, int]:
    """`kept` of the velocity of a UNet and its parameters, for square images of that many pixels a side."""
    network, spec = build(config)
    side = pixels // PIXELS_PER_LATENT
    return kept(lambda params, *args: apply(network, params, *args)[0], spec, *config.input_spec(batch, side, side))


def main() -> None:
    """Traces, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"keep it in {RESULT.name}")
    options, records = parser.parse_args(), []
    for pixels, batch in CASES:
        for remat in ("none", "products", "attention", "blocks"):
            config = for_platform(UNetConfig.preset("t2i", remat=remat), "tpu")
            found = kept_by(config, pixels, batch)
            total = {"bytes": sum(found.values()), "bytes_per_image": sum(found.values()) // batch}
            records.append({"pixels": pixels, "batch": batch, "remat": remat, **total, "by_dtype": found})
            print(json.dumps(records[-1]), flush=True)
    if options.save:
        RESULT.write_text(
            json.dumps({"network": "unet t2i, bfloat16", "commit": commit(), "kept": records}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
