"""Evolution of a UNet under a latency budget, as stages of a chain that derive.

    value(block) = score lost without it / time saved without it

SnapFusion (arXiv 2306.00980, section 3.2 and algorithm 1). `evolve` takes a run of the recipe `block_dropping`, whose
network knows to do without any one block. It measures what each is worth, takes out those of the lowest value until the
budget is met, and puts a copy behind those of the highest; room for the copies is made first. A run that starts from it
(`init_from`, `moved`) goes on with the evolved network, and a further round may follow. `random_architecture` meets the
budget by chance: what a search must beat.

Each result and each action is a line of the stage's `items.jsonl`. Times come from a table that was measured before
(`docs/snapfusion.md`); without one, multiply-adds stand for them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from snapgen_jax.bookkeeping import Items
from snapgen_jax.generation import Generator, load, load_recipe
from snapgen_jax.networks.counting import size
from snapgen_jax.networks.evolved import (
    Action,
    Evolving,
    Moved,
    architecture,
    candidates,
    changed,
    composed,
    kind,
    kinds,
    renamed,
)
from snapgen_jax.recipes.block_dropping import RUNS, BlockDropping
from snapgen_jax.scoring import measure
from snapgen_jax.training.exits import ConfigError

SCORE, LOSS = "score", "loss"
Cost = Callable[[Evolving], float]


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Times of a network's blocks and of what else it consists of, such as those of a phone.

    Attributes:
        network: the config, as JSON, of which the blocks are.
        latent: height and width of the latents that were measured.
        tokens: of the texts.
        blocks: milliseconds of one block of each kind, see `networks.evolved.kind`.
        rest: of all else.
    """

    network: Mapping[str, Any]
    latent: Sequence[int]
    tokens: int
    blocks: Mapping[str, float]
    rest: float

    @classmethod
    def read(cls, path: str, network: Evolving, latent: Sequence[int], tokens: int) -> LatencyTable:
        """Reads a table.

        Args:
            path: of the file.
            network: whose blocks it is to know; see `check_kinds` for those of others.
            latent, tokens: height and width of its latents, and tokens of its texts.

        Raises:
            ConfigError: it is no such table, of another network or other sizes, or its times are none.
        """
        try:
            found = json.loads(pathlib.Path(path).read_text())
            blocks, rest = {k: float(v) for k, v in found["blocks"].items()}, float(found["rest"])
            table = cls(found["network"], [*map(int, found["latent"])], int(found["tokens"]), blocks, rest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"table={path!r} is no table of latencies: {error!r}; make it with `python -m "
                "benchmarks.latency_table`, or see docs/snapfusion.md for its form"
            ) from error
        is_now, was = described(network), dict(table.network)
        if different := sorted(key for key in is_now.keys() | was.keys() if is_now.get(key) != was.get(key)):
            raise ConfigError(
                f"table={path!r} is of another network; these fields differ: "
                f"{', '.join(f'{k}={was.get(k)!r} (network: {is_now.get(k)!r})' for k in different)}"
            )
        if (table.latent, table.tokens) != ([*latent], tokens):
            raise ConfigError(
                f"table={path!r} is of latents {table.latent} and texts of {table.tokens} tokens, and the run has "
                f"{[*latent]} and {tokens}; measure it for these"
            )
        bad = {name: ms for name, ms in blocks.items() if not (math.isfinite(ms) and ms > 0)}
        bad |= {} if math.isfinite(rest) and rest >= 0 else {"rest": rest}
        if bad:
            raise ConfigError(
                f"table={path!r} has the times {bad}, in milliseconds; a block takes more than 0, and all else 0 or "
                "more: measure them again, with more --rounds"
            )
        table.check_kinds(network, path)
        return table

    def check_kinds(self, network: Evolving, path: str) -> None:
        """Raises ConfigError where the table has no time of a block of a network."""
        if missing := sorted({*kinds(network)} - self.blocks.keys()):
            raise ConfigError(f"table={path!r} has no time of {', '.join(missing)}; measure them")

    def __call__(self, network: Evolving) -> float:
        """Milliseconds of a network."""
        return self.rest + sum(self.blocks[kind(network, block)] for block in network.droppable_blocks())


def described(network: Evolving) -> dict[str, Any]:
    """The fields of a network's config by which a table of times is its: not the blocks, which evolve, nor choices for
    a platform."""
    platform = {"dtype", "depthwise", "attention", "attention_chunk", "remat", "separable_block"}
    fields = json.loads(json.dumps(dataclasses.asdict(network)))
    return {name: value for name, value in fields.items() if name not in {*architecture(network), *platform}}


def multiply_adds(latent: Sequence[int], tokens: int) -> Cost:
    """The cost of a network where no table says it: millions of multiply-adds of one call, for latents of a height and
    width and texts of so many tokens."""

    @functools.cache
    def cost(network: Evolving) -> float:
        return size(network, network.input_spec(1, latent[0], latent[1], tokens))[1] / 1e6

    return cost


# --- the search ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One action: what was done to which block, its value, and what the network costs then."""

    action: Action
    block: str
    value: float
    cost: float


@dataclasses.dataclass(frozen=True)
class Evolution:
    """A network on its way: its config, where its blocks come from, and the actions that made it."""

    network: Evolving
    moved: Moved = ()
    steps: tuple[Step, ...] = ()

    def after(self, action: Action, block: str, value: float, cost: Cost) -> Evolution:
        """The network after one more action."""
        network, moved = changed(self.network, block, action)
        step = Step(action, block, value, cost(network))
        return Evolution(network, composed(self.moved, moved), (*self.steps, step))


def savings(network: Evolving, cost: Cost) -> dict[str, float]:
    """`{block: what the network costs less without it}`."""
    whole = cost(network)
    return {block: whole - cost(changed(network, block, "remove")[0]) for block in candidates(network)}


def search(network: Evolving, values: Mapping[str, float], cost: Cost, budget: float, copies: int) -> Evolution:
    """Removes the blocks of the lowest value until the budget is met, then copies those of the highest.

    Args:
        network: where it begins.
        values: of its blocks: score lost over cost saved.
        cost: of a network.
        budget: that the last network meets.
        copies: blocks to copy at most; fewer where the budget has no room for them. So much is removed that they fit; a
            block is either removed or copied.

    Raises:
        ConfigError: without all of these blocks it costs more still.
    """
    order = sorted(values, key=lambda block: values[block])
    for count in range(min(copies, len(order)), -1, -1):
        low, high = order[: len(order) - count], order[len(order) - count :]
        made = _within(network, values, cost, budget, low, high)
        if made is not None:
            return made
    least = cost(network) - sum(savings(network, cost).values())
    raise ConfigError(
        f"budget={budget:.6g}: without {', '.join(sorted(order)) or 'any block'} the network costs {least:.6g} still; "
        "raise the budget"
    )


def _within(
    network: Evolving, values: Mapping[str, float], cost: Cost, budget: float, low: Sequence[str], high: Sequence[str]
) -> Evolution | None:
    """The network with copies of the blocks `high`, and without as many of the blocks `low` as the budget asks for;
    None where it asks for more."""
    saved, made = savings(network, cost), Evolution(network)
    names = {block: block for block in values}  # what each is called by now

    def act(made: Evolution, action: Action, block: str) -> Evolution:
        before, made = made.network, made.after(action, names[block], values[block], cost)
        moved = changed(before, names[block], action)[1]
        for other, name in names.items():
            if other != block and name in before.droppable_blocks():
                names[other] = renamed(made.network, moved, name, before)
        return made

    room, left = budget - sum(saved[block] for block in high), list(low)
    while left and cost(made.network) > room:
        made = act(made, "remove", left[0])
        names.pop(left.pop(0))
    if cost(made.network) > room:
        return None
    for block in reversed(high):
        made = act(made, "copy", block)
    return made


def by_chance(network: Evolving, cost: Cost, budget: float, copies: int, seed: int) -> Evolution:
    """As `search`, with values that are random numbers."""
    blocks = candidates(network)
    values = np.random.default_rng(seed).random(len(blocks))
    return search(network, dict(zip(blocks, values.tolist(), strict=True)), cost, budget, copies)


# --- stages of a chain -----------------------------------------------------------------------------------------------


def evolve(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """One round of evolution, a stage of a chain that derives.

    Args:
        stages: "from", a run of `block_dropping`.
        workdir: of the stage.
        options: `budget`, the share of the cost of the network at `stages["origin"]` (of "from" without it) that the
            evolved one may have; `copies`, see `search`; `table`, a file of latencies or ""; `metric`, "score" or
            "loss", what is lost without a block; `per_category` and `categories` of the score.

    Returns:
        `network`, the fields that changed; `moved`, where blocks come from; `cost`, `budget` and `actions`.
    """
    generator = _generator(stages["from"])
    network, cost, budget = _problem(stages, generator, options)
    items, saved = Items(workdir), savings(network, cost)
    lost = _score_lost if options["metric"] == SCORE else _loss_gained
    what = f"what is lost without a block, {options['metric']}"
    found = items.run(what, lambda: lost(stages["from"], generator, options))
    values = {block: found[block] / saved[block] for block in candidates(network)}
    for block, value in values.items():
        items.run(f"value of {block}", lambda b=block, v=value: {"lost": found[b], "saved": saved[b], "value": v})
    return _result(items, search(network, values, cost, budget, options["copies"]), cost, budget)


def random_architecture(
    stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """A network of the same budget by chance. As `evolve`, with `seed` in place of the metric."""
    network, cost, budget = _problem(stages, _generator(stages["from"]), options)
    return _result(Items(workdir), by_chance(network, cost, budget, options["copies"], options["seed"]), cost, budget)


def _generator(run: epath.Path) -> Generator:
    generator = load(run)
    if not isinstance(generator.recipe, BlockDropping):
        raise ConfigError(f"{run} is no run of the recipe 'block_dropping', whose blocks can be missed; name one")
    return generator


def sizes_of(generator: Generator) -> tuple[tuple[int, int], int]:
    """Height and width of a run's latents, and tokens of its texts, by which a block's cost goes."""
    recipe: Any = generator.recipe
    told = jax.eval_shape(recipe.inputs.null_condition, recipe.weights(generator.params, generator.frozen))
    height, width = recipe.inputs.latent_shape()[:2]
    return (height, width), told.sequence.shape[1]


def _problem(
    stages: Mapping[str, epath.Path], generator: Generator, options: Mapping[str, Any]
) -> tuple[Evolving, Cost, float]:
    """The network to begin with, the cost of one, and the budget."""
    if options.get("metric", SCORE) not in (SCORE, LOSS):
        raise ConfigError(f"metric={options['metric']!r}; choose {SCORE!r} or {LOSS!r}")
    if not 0 < options["budget"] <= 1 or options["copies"] < 0:
        raise ConfigError(
            f"budget={options['budget']} and copies={options['copies']}; give a share above 0 and at most 1, and 0 or "
            "more copies"
        )
    recipe: Any = generator.recipe
    network: Evolving = recipe.config.network
    origin: Any = load_recipe(stages["origin"]) if "origin" in stages else recipe
    sizes = sizes_of(generator)
    cost = multiply_adds(*sizes)
    if options["table"]:
        cost = LatencyTable.read(options["table"], network, *sizes)
        cost.check_kinds(origin.config.network, options["table"])
    return network, cost, options["budget"] * cost(origin.config.network)


def _score_lost(run: epath.Path, generator: Generator, options: Mapping[str, Any]) -> dict[str, float]:
    """`{block: score of all blocks - score without it}`; one compiled program draws for all."""
    recipe: Any = generator.recipe
    asked = {"compositional": {name: options[name] for name in ("per_category", "categories")}}

    def score(runs: np.ndarray) -> float:
        masked = generator.with_weights({**generator.params, RUNS: runs}, generator.frozen)
        return measure(run, ("compositional",), options=asked, generator=masked).numbers["score.overall"]

    blocks = recipe.blocks
    whole = score(np.ones(len(blocks), bool))
    return {block: whole - score(np.arange(len(blocks)) != i) for i, block in enumerate(blocks)}


def _loss_gained(run: epath.Path, generator: Generator, options: Mapping[str, Any]) -> dict[str, float]:
    """`{block: validation loss without it - validation loss of all blocks}`."""
    del options
    numbers = measure(run, ("validation_loss",), generator=generator).numbers
    recipe: Any = generator.recipe
    return {block: numbers[f"validation_loss.without.{block}"] for block in recipe.blocks}


def _result(items: Items, made: Evolution, cost: Cost, budget: float) -> dict[str, Any]:
    steps = [dataclasses.asdict(step) for step in made.steps]
    for number, step in enumerate(steps, 1):
        items.run(f"action {number}: {step['action']} {step['block']}", lambda step=step: step)
    return {
        "network": architecture(made.network),
        "moved": [list(pair) for pair in made.moved],
        "cost": cost(made.network),
        "budget": budget,
        "actions": [f"{step['action']} {step['block']}" for step in steps],
    }
