"""Optimizers, schedules and clipping, on plain parameter trees."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from snapgen_jax.bounds import above, at_least, below, check
from snapgen_jax.training.ema import update_ema
from snapgen_jax.training.ravel import Layout, RavelledPlayer
from snapgen_jax.training.state import Player

Tree = Any


Name = Literal["adamw", "adafactor", "lion", "muon", "sm3", "sgd"]

# How the last key of a path ends where weight decay leaves a parameter alone, whatever its shape: of blocks under one
# scan a bias has two axes. "offset" is the gain of a norm less one; "factor" blends two results.
UNDECAYED = ("bias", "scale", "offset", "factor")
# AdamW's updates have about this root mean square (Liu et al. 2025, section 2.2), and Muon's are given it, so that the
# learning rate and the decay of one serve the other.
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer, and its learning rate over optimizer steps.

    Attributes:
        name: "adamw" (Loshchilov and Hutter 2019); "adafactor" (Shazeer and Stern 2018), whose second moments of large
            matrices are a row and a column, without its scaling by the size of a parameter; "lion" (Chen et al. 2023),
            which wants a learning rate a few times smaller and a decay as much larger; "muon" (Jordan 2024) for the
            kernels that map features to features, each as one matrix, with AdamW for all else; "sm3" (Anil et al.
            2019), whose second moments are one vector an axis; "sgd", with momentum.
        learning_rate: peak value.
        schedule: after the warm-up, "constant", "cosine" to `final_share` at the last step, or "linear" likewise.
        warmup_steps: linear ramp from 0.
        final_share: share of the peak that is left at the end of "cosine" and "linear".
        b1: decay of the first moment; 0 spares adafactor and sgd its memory.
        b2: decay of the second moment: of adamw, of lion's momentum (0.99 as published), and of what muon leaves to
            AdamW. The others do not read it.
        eps: beside the root of the second moment: of adamw, of sm3, and of muon.
        weight_decay: decoupled, in units of the learning rate; biases, scales and the gains of norms are exempt.
        clip_norm: bound of the joint gradient norm of all players that step together; 0 turns it off.
    """

    name: Name = "adamw"
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
    """An optimizer that treats every number by itself, by the last key of its path at most: AdamW, Lion and SGD do, one
    that looks at a whole matrix does not. Its state may be kept as vectors, see `training.ravel`."""


def make_optimizer(config: OptimizerConfig, train_steps: int) -> optax.GradientTransformation:
    """The optimizer of a config without clipping, which `step_player` does first; `Elementwise` where it is."""
    learning_rate, b1, b2, eps = learning_rate_schedule(config, train_steps), config.b1, config.b2, config.eps
    match config.name:
        case "adamw":
            return Elementwise(
                *optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=config.weight_decay, mask=decayed)
            )
        case "lion":
            steps: tuple[Any, ...] = (optax.scale_by_lion(b1, b2),)
        case "sgd":
            steps = (optax.trace(b1),) if b1 else ()
        case "sm3":
            steps = (optax.scale_by_sm3(b1, eps=eps),)
        case "adafactor":
            moment = (optax.ema(b1, debias=False),) if b1 else ()
            steps = (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *moment)
        case "muon":
            steps = (_muon(b1, b2, eps),)
    decay = optax.add_decayed_weights(config.weight_decay, decayed)
    whole = optax.chain(*steps, decay, optax.scale_by_learning_rate(learning_rate))
    return Elementwise(*whole) if config.name in ("lion", "sgd") else whole


def decayed(params: Tree) -> Tree:
    """True for the leaves that weight decay acts on: all but biases, scales and the gains of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not str(path[-1].key).endswith(UNDECAYED), params)


def _muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon's directions for the kernels, and Adam's for the rest."""
    axes = {
        2: MuonDimensionNumbers(0, 1),
        3: MuonDimensionNumbers(1, 2),  # blocks under one scan, each by itself
        4: MuonDimensionNumbers((0, 1, 2), 3),  # convolutions
    }

    def label(path: Any, x: jax.Array) -> str:
        # The kernel of a depthwise convolution, [h, w, 1, C], maps no features to others.
        maps = path[-1].key == "kernel" and x.ndim in axes and x.shape[-2] > 1
        return "kernels" if maps else "rest"

    def dimensions(kernels: Tree) -> Tree:
        return jax.tree.map(lambda x: axes[x.ndim], kernels)

    steps = optax.contrib.muon(1.0, beta=b1, eps=eps, consistent_rms=MUON_RMS, muon_weight_dimension_numbers=dimensions)
    return optax.partition(
        {"kernels": optax.chain(steps, optax.scale(-1.0)), "rest": optax.scale_by_adam(b1, b2, eps)},
        functools.partial(jax.tree_util.tree_map_with_path, label),
    )


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
