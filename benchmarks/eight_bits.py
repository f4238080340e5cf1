"""How far a teacher in eight bits is from the same teacher in bfloat16, by time.

    python -m benchmarks.eight_bits                            # MMDiTs of width 512 with stand-in weights
    python -m benchmarks.eight_bits --workdir=runs/teacher     # a trained run, on its validation batches

    error = || v - v_16 || / || v_16 ||,   and against float32 || v - v_32 || / || v_32 ||

All of them start from the same float32 weights; in eight bits the products of the tokens are int8 or e4m3, and all
else is bfloat16, as a teacher with `precision` computes. Between two computations in bfloat16 lie the roundings of
both: what eight bits add is seen against float32, beside bfloat16's own error. Prints a line of JSON for each network;
with --save=NAME it is kept in `results/eight_bits-NAME.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bfloat16 import Points, points_of_run
from benchmarks.measuring import append, commit, machine
from snapgen_jax.diffusion.path import interpolate
from snapgen_jax.generation import load_config
from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.eight_bit_network import in_precision
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Platform, build, for_platform, stand_in
from snapgen_jax.networks.text import TextContext
from snapgen_jax.recipes.flow_matching import VALIDATION_TIMES
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.weights.frozen import in_eight_bits

Tree = Any
Velocity = Callable[[jax.Array, Points], jax.Array]
FORMATS = ("int8", "fp8")
_WIDTHS: dict[str, Any] = {
    "heads": 8,
    "context_width": 256,
    "pooled_width": 256,
    "position_size": 16,
    "position_base": 16,
}
DRAWN = {f"MMDiT of {depth} blocks": MMDiTConfig(depth=depth, **_WIDTHS) for depth in (12, 38)}
SIDE, TOKENS = 32, 77  # of the latent; text tokens


def velocities(denoiser: Denoiser, params: Tree) -> dict[str, Velocity]:
    """The velocity at a time and points, in float32, in bfloat16 and in each format."""
    platforms: dict[str, Platform] = {"float32": "cpu", "bfloat16": "gpu", **dict.fromkeys(FORMATS, "gpu")}
    config = dataclasses.replace(denoiser.network.config, dtype="auto")

    def of(precision: str, platform: Platform) -> Velocity:
        chosen: Any = precision if precision in FORMATS else "compute"
        fixed: Any = dataclasses.replace(for_platform(config, platform), **kept)
        network, _ = build(in_precision(fixed, chosen))
        weights = params if chosen == "compute" else in_eight_bits(params, network)
        computing = dataclasses.replace(denoiser, network=network)

        @jax.jit
        def at(weights: Tree, t: jax.Array, point: Points) -> jax.Array:
            level = denoiser.schedule.level(jnp.full(point.x_0.shape[:1], t))
            x_t = interpolate(point.x_0, point.eps, level.t)
            return computing(weights, x_t, level, point.condition)[0].astype(jnp.float32)

        return lambda t, point: at(weights, t, point)

    # Of the platform's choices the dtype alone is of interest: the rest stays as it is on this machine.
    own = for_platform(config, "cpu")
    kept = {field.name: getattr(own, field.name) for field in dataclasses.fields(own) if field.name == "depthwise"}
    return {precision: of(precision, platform) for precision, platform in platforms.items()}


def compare(denoiser: Denoiser, params: Tree, points: Sequence[Points]) -> dict[str, dict[str, float]]:
    """`{time: {"int8": error against bfloat16, "int8, float32": error against float32 ...}}`, and "all", over all times
    together."""
    computed = velocities(denoiser, params)
    against = {name: (name, "bfloat16") for name in FORMATS}
    against |= {f"{name}, float32": (name, "float32") for name in ("bfloat16", *FORMATS)}
    squares: dict[str, dict[str, tuple[float, float]]] = {}
    for t in VALIDATION_TIMES:
        sums = {name: [0.0, 0.0] for name in against}
        for point in points:
            v = {name: velocity(jnp.float32(t), point) for name, velocity in computed.items()}
            for name, (of, base) in against.items():
                for i, x in enumerate((v[of] - v[base], v[base])):
                    sums[name][i] += float(jnp.mean(jnp.square(x)))
        squares[f"t={t:.2f}"] = {name: (error, size) for name, (error, size) in sums.items()}
    rows = {t: {name: (error / size) ** 0.5 for name, (error, size) in of.items()} for t, of in squares.items()}
    whole = {
        name: (sum(of[name][0] for of in squares.values()) / sum(of[name][1] for of in squares.values())) ** 0.5
        for name in against
    }
    return {**rows, "all": whole}


def with_stand_ins(config: MMDiTConfig, batch: int = 2) -> dict[str, dict[str, float]]:
    """`compare` for weights that keep the variance of their inputs, on noise in place of latents and text states."""
    network, _ = build(for_platform(config, "cpu"))
    side = min(SIDE, config.position_size * config.patch)
    x, _, context = config.input_spec(batch, side, side, TOKENS)
    keys = iter(jax.random.split(jax.random.key(2), 4))
    x_0, eps, states, pooled = (
        jax.random.normal(next(keys), s.shape) for s in (x, x, context.sequence, context.pooled)
    )
    condition = TextContext(states, jnp.ones(context.mask.shape), pooled)
    params = jax.jit(stand_in, static_argnums=(0, 1))(network, 0)
    return compare(Denoiser(network), params, [Points(x_0, eps, condition)])


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", action="append", default=[], help="a trained run; in place of stand-ins")
    parser.add_argument("--save", default="", help="keep the lines in results/eight_bits-SAVE.jsonl")
    options = parser.parse_args(argv)

    def keep(name: str, config: Any, weights: str, rows: dict[str, dict[str, float]]) -> None:
        about = {"network": name, "width": config.width, "parameters": parameters(config), "weights": weights}
        append({**about, "times": rows, "machine": machine(), "commit": commit()}, "eight_bits", options.save)

    for workdir in options.workdir:
        denoiser, params, points = points_of_run(workdir)
        name, steps = pathlib.Path(workdir).name, load_config(workdir).train_steps
        keep(name, denoiser.network.config, f"{steps} updates", compare(denoiser, params, points))
    for name, config in DRAWN.items() if not options.workdir else ():
        keep(name, config, "stand-ins", with_stand_ins(config))


if __name__ == "__main__":
    main()
