"""How far bfloat16 takes a velocity from that of the same weights in float32, and the floor that this puts under the
loss of output distillation.

    python -m benchmarks.bfloat16                          # networks of the shapes world as they are drawn
    python -m benchmarks.bfloat16 --workdir=quickstart     # a trained run, on its validation batches

    error = || v_16 - v_32 || / || v_32 ||,   floor = mean (v_16 - v_32)^2

The floor is L_out of a student that has become its teacher, weight for weight, and computes in bfloat16 where the
target is of float32: no training on that target gets below it on average. Prints a line of JSON for each network; with
--out they are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.measuring import commit, machine
from snapgen_jax.config import load_experiment, resolve
from snapgen_jax.diffusion.path import interpolate
from snapgen_jax.experiment import Experiment, ValidationBatches
from snapgen_jax.generation import load
from snapgen_jax.generation import load_config as config_of
from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.module import build, for_platform, init
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import VALIDATION_TIMES
from snapgen_jax.systems.denoiser import Denoiser

Tree = Any
DRAWN = {
    "UNet, preset smoke": lambda: UNetConfig.preset("smoke"),
    "UNet, preset shapes": lambda: UNetConfig.preset("shapes"),
    "student of the shapes world": lambda: load_experiment("configs/shapes/student.py:patches").recipe.network,
}


class Points(NamedTuple):
    """Examples `x_0` `[B, ...]` with noise `eps`, and what the network attends to."""

    x_0: jax.Array
    eps: jax.Array
    condition: Any


def compare(
    denoiser: Denoiser, params: Tree, points: Sequence[Points], dtype: str = "bfloat16"
) -> dict[str, dict[str, float]]:
    """Velocities of one network in `dtype` beside those in float32: `{time: {velocity, floor, error}}`, the first two
    mean squares, and "all", over all times together."""

    def velocities(dtype: str) -> Any:
        network, _ = build(dataclasses.replace(for_platform(denoiser.network.config, "cpu"), dtype=dtype))
        computing = dataclasses.replace(denoiser, network=network)

        @jax.jit
        def at(t: jax.Array, point: Points) -> jax.Array:
            level = denoiser.schedule.level(jnp.full(point.x_0.shape[:1], t))
            x_t = interpolate(point.x_0, point.eps, level.t)
            return computing(params, x_t, level, point.condition)[0].astype(jnp.float32)

        return at

    exact, rounded = velocities("float32"), velocities(dtype)
    rows, sums = {}, [0.0, 0.0]
    for t in VALIDATION_TIMES:
        squares = [0.0, 0.0]
        for point in points:
            v, w = exact(jnp.float32(t), point), rounded(jnp.float32(t), point)
            for i, x in enumerate((v, w - v)):
                squares[i] += float(jnp.mean(jnp.square(x))) / len(points)
        rows[f"t={t:.2f}"] = _row(*squares)
        sums = [a + b / len(VALIDATION_TIMES) for a, b in zip(sums, squares, strict=True)]
    return {**rows, "all": _row(*sums)}


def _row(velocity: float, floor: float) -> dict[str, float]:
    return {"velocity": velocity, "floor": floor, "error": (floor / velocity) ** 0.5}


def away_from_zero(params: Tree, key: jax.Array) -> Tree:
    """Drawn parameters whose kernels that begin at zero are drawn too, at the variance of their fan-in."""
    leaves, shape = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def one(x: jax.Array, key: jax.Array) -> jax.Array:
        if x.ndim < 2 or bool(jnp.any(x)):
            return x
        return jax.random.normal(key, x.shape, x.dtype) * (x.shape[-1] / x.size) ** 0.5

    return jax.tree.unflatten(shape, map(one, leaves, keys))


def as_drawn(config: UNetConfig, batch: int = 16, size: int = 8, tokens: int = 20) -> dict[str, dict[str, float]]:
    """`compare` for a network that was not trained, on noise in place of latents and text states."""
    network, _ = build(for_platform(config, "cpu"))
    params = away_from_zero(jax.jit(init, static_argnums=0)(network, jax.random.key(0)), jax.random.key(1))
    x, _, context = config.input_spec(batch, size, size, tokens)
    keys = iter(jax.random.split(jax.random.key(2), 4))
    x_0, eps = (jax.random.normal(next(keys), x.shape) for _ in range(2))
    states, pooled = (jax.random.normal(next(keys), s.shape) for s in (context.sequence, context.pooled))
    condition = TextContext(states, jnp.ones(context.mask.shape), pooled)
    return compare(Denoiser(network), params, [Points(x_0, eps, condition)])


def points_of_run(workdir: str, batches: int = 4) -> tuple[Denoiser, Tree, list[Points]]:
    """The denoiser of a trained run of flow matching, its averaged weights, and its validation batches under the
    condition in float32."""
    generator = load(workdir)
    experiment = Experiment(resolve(config_of(workdir)), workdir, "cpu")
    recipe: Any = experiment.recipe
    networks = recipe.weights(generator.params, generator.frozen)

    def points() -> Iterator[Points]:
        for n, batch in enumerate(itertools.islice(ValidationBatches(experiment), batches)):
            x_0 = recipe.inputs.clean(networks, batch.arrays)
            told = recipe.inputs.draw_condition(networks, batch.arrays, jax.random.key(n), {})
            eps = jax.random.normal(jax.random.key(n), x_0.shape)
            yield Points(x_0, eps, recipe.inputs.condition(networks, told))

    return recipe.denoiser, networks[recipe.role], list(points())


def of_run(workdir: str) -> tuple[Any, dict[str, dict[str, float]]]:
    """The config of the network of a trained run, and `compare` on its validation batches."""
    denoiser, params, points = points_of_run(workdir)
    return denoiser.network.config, compare(denoiser, params, points)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", action="append", default=[], help="a trained run; in place of networks as drawn")
    parser.add_argument("--out", type=pathlib.Path, help="file to which the lines are added")
    options = parser.parse_args(argv)
    found = [(name, make(), "drawn", as_drawn(make())) for name, make in DRAWN.items() if not options.workdir]
    for workdir in options.workdir:
        steps = config_of(workdir).train_steps
        config, rows = of_run(workdir)
        found.append((pathlib.Path(workdir).name, config, f"{steps} updates", rows))
    for name, config, weights, rows in found:
        about = {"network": name, "parameters": parameters(config), "weights": weights}
        line = json.dumps({**about, "times": rows, "machine": machine(), "commit": commit()})
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
