"""What a GPU's compiler is given by a training step of the 379M UNet, counted without a GPU.

    python -m benchmarks.program_size               # a minute and 2 GB
    python -m benchmarks.program_size --save=NAME   # and keeps the lines in benchmarks/results/program_size-NAME.jsonl

A line each for loss, gradient and whole step at 256 px, batch 64, lowered for CUDA: seconds to trace and to lower,
operations (constants, broadcasts and reshapes aside), and products and convolutions, of which those of equal shapes
count once under `distinct`: XLA tunes each of these on the card. The same with one block in every transformer is what a
scan over equal blocks would leave, its own loop aside.
"""

from __future__ import annotations

import argparse
import collections
import re
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks.measuring import append, commit
from snapgen_jax.inputs.stored import StoredConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.process import prepare
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.keys import key
from snapgen_jax.training.step import make_step

PLAIN = ("constant", "broadcast_in_dim", "reshape", "case", "return")  # no work of the compiled program
DEPTHS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one block a transformer": {"down_depth": (1, 1, 1), "mid_depth": 1, "up_depth": (0, 1, 1)},
}


def size_of(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Of a function's program for CUDA."""
    start = time.perf_counter()
    traced = jax.jit(function).trace(*arguments)
    middle = time.perf_counter()
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    end = time.perf_counter()
    return {"trace_s": round(middle - start, 2), "lower_s": round(end - middle, 2), **counts(text)}


def counts(text: str) -> dict[str, Any]:
    """Of a StableHLO program."""
    kinds = collections.Counter(re.findall(r"\bstablehlo\.([a-z_]+)[ (\"<]", text))
    found: dict[str, Any] = {
        "program_mb": round(len(text) / 1e6, 2),
        "operations": sum(count for kind, count in kinds.items() if kind not in PLAIN),
    }
    for name, kind in (("products", "dot_general"), ("convolutions", "convolution")):
        shapes = [line.partition("=")[2] for line in text.splitlines() if f"stablehlo.{kind}" in line]
        found |= {name: len(shapes), f"distinct_{name}": len({re.sub(r"%\w+(#\d+)?", "%", s) for s in shapes})}
    return found


def parts(recipe: FlowMatching) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, size) of the parts of a recipe's step."""
    state, step = jax.eval_shape(lambda: recipe.init(key(0, 0, "init"))), make_step(recipe, 0)  # type: ignore[arg-type]
    batch, params = next(iter(recipe.batch_specs().values())), state.players["model"].params
    random = jax.eval_shape(lambda: jax.random.key(0))

    def loss(params: Any, batch: Any, random: jax.Array) -> jax.Array:
        networks = recipe.weights({"model": params}, {})
        return recipe.loss(networks, recipe.draw(networks, batch, random), {})[0]

    yield "loss", size_of(loss, params, batch, random)
    yield "gradient", size_of(jax.grad(loss), params, batch, random)
    yield "step", size_of(step, state, {}, batch)


def pretend_cudnn() -> None:
    """Lets programs with cuDNN's attention be lowered where there is no cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

    if jax_cudnn.cuda_versions is None:
        jax_cudnn.cuda_versions = types.SimpleNamespace(cudnn_get_version=lambda: 91_000)


def main() -> None:
    """Counts, prints and stores."""
    prepare()
    pretend_cudnn()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", default="", metavar="NAME")
    options = parser.parse_args()
    for depth, changes in DEPTHS.items():
        network = UNetConfig.preset("t2i", **changes)
        config = FlowMatchingConfig(batch_size=64, network=network, inputs=StoredConfig(), ema_decay=0.9999)
        for part, found in parts(FlowMatching(config, "gpu")):
            about = {"blocks": depth, "part": part, "jax": jax.__version__, "commit": commit()}
            append({**about, **found}, "program_size", options.save)


if __name__ == "__main__":
    main()
