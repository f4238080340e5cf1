"""Where the time of an update goes: the loss, its gradient as XLA derives it and as `networks.layers.product` does, the
optimizer leaf by leaf and in vectors.

    python -m benchmarks.update                                        # the quickstart's
    python -m benchmarks.update --config=configs/shapes/student.py:quick --save=NAME

Prints JSON lines, and with --save keeps them in `benchmarks/results/update-NAME.jsonl`. Parts take turns, and each is
called several times before it is waited for, as the loop does. On a machine with other work, give the command a
real-time priority (`chrt -f 5`).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.measuring import by_turns, commit, machine, random_like
from snapgen_jax.config import load_config, resolve
from snapgen_jax.networks import layers
from snapgen_jax.process import prepare
from snapgen_jax.training.keys import key
from snapgen_jax.training.optimizer import step_player
from snapgen_jax.training.ravel import gather
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step

RESULTS = pathlib.Path(__file__).parent / "results"
Tree = Any


def operations(compiled: jax.stages.Compiled) -> int:
    """How many operations a program starts, those of its loops counted once."""
    text = compiled.as_text() or ""
    found = re.findall(r"^  (?:ROOT )?%\S+ = .*? ([a-z-]+)\(", text[text.index("ENTRY") :], flags=re.MULTILINE)
    return sum(name not in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple") for name in found)


def parts(recipe: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """`{name: (function, arguments)}`; a function gives back its first argument anew, or reads it only."""
    state = jax.jit(recipe.init)(key(0, 0, "init"))
    frozen, batch = random_like(recipe.frozen_spec()), random_like(next(iter(recipe.batch_specs().values())))
    config, params = recipe.config, state.players["model"].params
    grads = random_like(jax.eval_shape(lambda: params))

    def loss(params: Tree, frozen: Tree, batch: Tree) -> jax.Array:
        networks = recipe.weights({"model": params}, frozen)
        return recipe.loss(networks, recipe.draw(networks, batch, key(0, 0, "update"), 0), state.extra)[0]

    def derived(*arguments: Any) -> Tree:
        with mock.patch.object(layers, "of_rows", jnp.dot):
            return jax.grad(loss)(*arguments)

    def learn(state: Tree, grads: Tree) -> Tree:
        player, _ = step_player(
            state.players["model"],
            grads,
            recipe.optimizer,
            state.step,
            clip_norm=config.optimizer.clip_norm,
            ema_decay=config.ema_decay,
        )
        return state.replace(players={"model": player})

    def whole(state: Tree, frozen: Tree, batch: Tree) -> Tree:
        return make_step(recipe, 0)(state, frozen, batch)[0]

    return {
        "loss": (loss, (params, frozen, batch)),
        "gradient, as XLA derives it": (derived, (params, frozen, batch)),
        "gradient": (jax.grad(loss), (params, frozen, batch)),
        "optimizer, leaf by leaf": (learn, (state, grads)),
        "optimizer, in vectors": (learn, (gather(state), grads)),
        "update, leaf by leaf": (whole, (state, frozen, batch)),
        "update, in vectors": (whole, (gather(state), frozen, batch)),
    }


def measure(recipe: Recipe, calls: int, rounds: int) -> list[dict[str, Any]]:
    """A record of each part: milliseconds of the fastest and the median round, and operations."""
    records, turns = [], {}
    for name, (function, arguments) in parts(recipe).items():
        carries = not name.startswith(("loss", "gradient"))
        program = jax.jit(function, donate_argnums=0 if carries else ()).lower(*arguments).compile()
        held = [jax.tree.map(jnp.array, arguments[0])]

        def several(
            program: Any = program, held: Any = held, rest: Any = arguments[1:], carries: bool = carries
        ) -> Any:
            for _ in range(calls):
                out = program(held[0], *rest)
                held[0] = out if carries else held[0]
            return out

        turns[name] = several
        records.append({"part": name, "operations": operations(program)})
    for record, times in zip(records, by_turns(turns, rounds).values(), strict=True):
        ordered = sorted(1e3 * t / calls for t in times)
        record |= {"milliseconds": ordered[0], "milliseconds_median": ordered[len(ordered) // 2]}
    return records


def main() -> None:
    """Measures, prints and keeps."""
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shapes/quickstart.py", help="of a recipe of one player")
    parser.add_argument("--calls", type=int, default=10, help="in a row, before the last is waited for")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--save", metavar="NAME", help="keep the lines in benchmarks/results/update-NAME.jsonl")
    options = parser.parse_args()
    recipe = resolve(load_config(options.config)).build(jax.default_backend())
    where = {"config": options.config, "machine": machine(), "commit": commit()}
    lines = [json.dumps({**record, **where}) for record in measure(recipe, options.calls, options.rounds)]
    print("\n".join(lines))
    if options.save:
        (RESULTS / f"update-{options.save}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
