"""Optimizers, schedules and clipping, on plain parameter trees."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from snapgen_jax.bounds import above, at_least, below, check
from snapgen_jax.training.ema import update_ema
from snapgen_jax.training.ravel import Layout, RavelledPlayer
from snapgen_jax.training.state import Player

Tree = Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) and its learning rate over optimizer steps.

    Attributes:
        learning_rate: peak value.
        schedule: after the warm-up, "constant", "cosine" to `final_share` at the last step, or "linear" likewise.
        warmup_steps: linear ramp from 0.
        final_share: share of the peak that is left at the end of "cosine" and "linear".
        weight_decay: decoupled; biases and norm gains are exempt.
        clip_norm: bound of the joint gradient norm of all players that step together; 0 turns it off.
    """

    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 1000
    final_share: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check(self, learning_rate=at_least(0), warmup_steps=at_least(0), final_share=at_least(0), b1=below(1))
        check(self, b2=below(1), eps=above(0), weight_decay=at_least(0), clip_norm=at_least(0, "0 turns it off"))


def learning_rate_schedule(config: OptimizerConfig, train_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step; `train_steps` is where a decaying schedule ends."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(1, train_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_share),
        "linear": lambda: optax.linear_schedule(peak, peak * config.final_share, rest),
    }[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


class Elementwise(optax.GradientTransformation):
    """An optimizer that treats every number by itself, by the last key of its path at most: AdamW does, one that looks
    at a whole matrix does not. Its state may be kept as vectors, see `training.ravel`."""


def make_optimizer(config: OptimizerConfig, train_steps: int) -> Elementwise:
    """AdamW without clipping, which `step_player` does first."""
    return Elementwise(
        *optax.adamw(
            learning_rate_schedule(config, train_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=_decayed,
        )
    )


def _decayed(params: Tree) -> Tree:
    """True for the leaves that weight decay acts on: all but biases and norm gains."""
    exempt = ("bias", "scale")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in exempt, params)


def clip_by_joint_norm(grads: Tree, max_norm: float) -> tuple[Tree, jax.Array]:
    """Scales all gradients by one factor so that their joint L2 norm is at most `max_norm`; 0 leaves them alone.

    Returns:
        The gradients, and the norm before clipping (float32 scalar).
    """
    norm = optax.global_norm(grads)
    if not max_norm:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, grads), norm


def new_player(params: Tree, optimizer: optax.GradientTransformation, ema: bool) -> Player:
    """A player before its first update; its average starts as a copy of its parameters."""
    average = jax.tree.map(jnp.array, params) if ema else None
    return Player(params, optimizer.init(params), average, elementwise=isinstance(optimizer, Elementwise))


def step_player(
    player: Player,
    grads: Tree,
    optimizer: optax.GradientTransformation,
    step: jax.Array,
    *,
    clip_norm: float = 0.0,
    ema_decay: float = 0.0,
) -> tuple[Player, jax.Array]:
    """Clipping, one optimizer step and, where the player keeps an average, one step of it.

    Args:
        player: as it is.
        grads: of its parameters.
        optimizer: its own.
        step: int32 scalar, updates done before this one.
        clip_norm: bound of the gradient's norm; 0 where it was clipped before, jointly with that of other players.
        ema_decay: see `update_ema`.

    Returns:
        The next player, and the norm of the gradient before clipping (float32 scalar).
    """
    layout = Layout.of(player.params) if isinstance(player, RavelledPlayer) else None
    params: Tree = player.params
    if layout is not None:
        params, grads = layout.ravel(params), layout.ravel(grads)
    grads, norm = clip_by_joint_norm(grads, clip_norm)
    updates, opt_state = optimizer.update(grads, player.opt_state, params)
    params: Tree = optax.apply_updates(params, updates)
    ema = None if player.ema is None else update_ema(player.ema, params, step, ema_decay)
    if layout is not None:
        params = layout.unravel(params)
    return player.replace(params=params, opt_state=opt_state, ema=ema), norm
