"""Robust training: any block may be left out, so that what one is worth can be measured without training anew.

    h <- { block(h)  with probability 1 - p,   h  with probability p }     for each block whose shapes allow it

SnapFusion (arXiv 2306.00980, section 3.1). The loss is that of flow matching. Which blocks run is drawn once for a
batch, and a block that does not run is a branch not taken: it costs nothing. The paper does not say p; here it grows
over the run, since a network that knows nothing yet has no block to miss.

What was trained is drawn from with all blocks. `ablated` asks it without each of them, and `RUNS` among the weights
says which run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import check, within
from snapgen_jax.diffusion.path import interpolate, velocity
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.evolved import Evolving, moved_weights
from snapgen_jax.networks.module import Platform, build
from snapgen_jax.networks.taps import Reuse
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, Point
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Metrics
from snapgen_jax.training.state import TrainState

Tree = Any
RUNS = "runs"  # bool [blocks] beside the players' weights: which blocks run


@dataclasses.dataclass(frozen=True)
class BlockDroppingConfig(FlowMatchingConfig):
    """Robust training. The other fields are those of `flow_matching`.

    Attributes:
        drop: probability p at the beginning that a block is left out.
        final_drop: the same at the end of the run; it grows evenly.
        moved: of an evolved network that starts from the one it evolved from (`init_from`): where the weights of a
            block come from, as (path among the parameters, path in the earlier network), such as
            ("mid_more_transformers/block_00", "mid_transformer"). The other blocks keep their places, and blocks that
            are no longer there are left behind.
    """

    drop: float = 0.1
    final_drop: float = 0.2
    moved: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, drop=within(0, 0.9), final_drop=within(0, 0.9))


class BlockDropping(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`.

    Attributes:
        blocks: names of those that may be left out.
    """

    Config = BlockDroppingConfig

    def __init__(self, config: BlockDroppingConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the network names no blocks.
        """
        super().__init__(config, platform)
        network = self.denoiser.network.config
        if not isinstance(network, Evolving):
            raise ConfigError(
                f"a network of the kind {network.kind!r} names no blocks that may be left out; set network.kind to "
                "'unet' or 'sd_unet'"
            )
        self.blocks: tuple[str, ...] = network.droppable_blocks()

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks, and which blocks run where that is said."""
        said = {RUNS: params[RUNS]} if RUNS in params else {}
        return {**super().weights(params, frozen), **said}

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """From an earlier stage; also from one whose network has other blocks, by `config.moved`."""
        model = dict(earlier.get("model", {}))
        if self.role in model:
            _, spec = build(self.denoiser.network.config)
            model[self.role] = moved_weights(spec, model[self.role], self.config.moved)
        return super().warm_start(state, {**earlier, "model": model})

    # --- training ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As for flow matching, and `runs` bool `[B, blocks]`, the same of all examples: which blocks run."""
        drawn = super().draw(networks, batch, key, step)
        if not self.drops:
            return drawn
        config = self.config
        rate = config.drop + (config.final_drop - config.drop) * step / config.train_steps
        runs = ~jax.random.bernoulli(jax.random.fold_in(key, 10), rate, (len(self.blocks),))
        return {**drawn, "runs": jnp.broadcast_to(runs, (*drawn["x_0"].shape[:1], len(self.blocks)))}

    @property
    def drops(self) -> bool:
        """Whether training leaves anything out; without, it is that of flow matching."""
        return bool(self.blocks) and max(self.config.drop, self.config.final_drop) > 0

    def reuse(self, runs: jax.Array) -> Mapping[str, Reuse]:
        """What takes the place of blocks that do not run, by `runs` bool `[blocks]`: what enters them."""
        return {name: Reuse(None, runs[i]) for i, name in enumerate(self.blocks)}

    def predict(self, networks: Tree, drawn: Tree, taps: Sequence[str] = ()) -> tuple[Point, dict[str, jax.Array]]:
        """As for flow matching, with the drawn blocks."""
        if not self.drops:
            return super().predict(networks, drawn, taps)
        condition = self.inputs.condition(networks, drawn["condition"])
        x_t, reuse = self.start(networks, drawn, condition), self.reuse(drawn["runs"][0])
        v, features = self.denoiser(networks[self.role], x_t, drawn["level"], condition, taps=taps, reuse=reuse)
        return Point(x_t, v, condition), features

    def examine(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree, Point]:
        """As for flow matching, and the share of the blocks that ran."""
        losses, aux, point = super().examine(networks, drawn, extra)
        return losses, {**aux, "ran": jnp.mean(drawn["runs"])} if self.drops else aux, point

    def report(self, extra: Tree, aux: Tree) -> tuple[Tree, Metrics]:
        """The share of the blocks that ran."""
        return extra, aux

    # --- use ---

    def denoise(
        self, networks: Tree, x_t: jax.Array, level: Level, i: jax.Array, carry: Any, condition: Any, options: Any
    ) -> tuple[jax.Array, Any]:
        """One call while sampling, with all blocks, or with those that `RUNS` among the weights says."""
        if RUNS not in networks:
            return super().denoise(networks, x_t, level, i, carry, condition, options)
        reuse = self.reuse(networks[RUNS])
        return self.denoiser(networks[self.role], x_t, level, condition, reuse=reuse)[0], carry

    def ablated(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array, masks: np.ndarray) -> jax.Array:
        """The squared error of the velocity with some blocks left out, the mean of the times of validation.

        Args:
            params, frozen, batch, key: as for `validation_loss`.
            masks: bool `[M, blocks]`, which blocks run. One program serves them all.

        Returns:
            `[M, B]`.
        """
        networks, levels = self.weights(params, frozen), self.validation_levels
        x_0 = self.inputs.clean(networks, batch)
        told = self.inputs.draw_condition(networks, batch, jax.random.fold_in(key, 1), {})
        eps, condition = jax.random.normal(key, x_0.shape), self.inputs.condition(networks, told)

        def at(which: tuple[jax.Array, Level]) -> jax.Array:
            runs, level = which
            level = Level(*(jnp.full(x_0.shape[:1], value) for value in level))
            x_t = interpolate(x_0, eps, level.t)
            v = self.denoiser(networks[self.role], x_t, level, condition, reuse=self.reuse(runs))[0]
            return flow_matching_loss(v, velocity(x_0, eps))

        def of(runs: jax.Array) -> jax.Array:
            each = jax.tree.map(jnp.asarray, levels)
            return jax.lax.map(lambda level: at((runs, level)), each).mean(axis=0)

        return jax.lax.map(of, jnp.asarray(masks))

    def validation_loss(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """As for flow matching; and by how much the loss is higher without each block, "without.NAME", and in their
        mean, "without.one"."""
        numbers = super().validation_loss(params, frozen, batch, key)
        if not self.blocks:
            return numbers
        found = self.ablated(params, frozen, batch, key, ablations(len(self.blocks))) - numbers["mean"]
        each = {f"without.{name}": found[i] for i, name in enumerate(self.blocks)}
        return {**numbers, "without.one": found.mean(axis=0), **each}


def ablations(blocks: int) -> np.ndarray:
    """bool `[blocks, blocks]`: each row leaves one of so many blocks out."""
    return ~np.eye(blocks, dtype=bool)


RECIPE = BlockDropping
