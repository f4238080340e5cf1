"""What a student learns from a teacher, and how much of it at which time (SnapGen, arXiv 2412.09619, section 3.3).

    S(L_task, L_kd) = E_t[ a_t L_task^t + (1 - a_t) sg(|L_task^t| / |L_kd^t|) L_kd^t ]

The ratio makes the teacher's term as large as the task's at every time, so that a_t alone sets the mix: the data teach
in the middle of the path, where a_t is large, and the teacher at its ends. Of several losses L_kd is the weighted sum,
and so there is one ratio (SnapGen++, arXiv 2601.08303, equation 8). It is taken from running means of the losses in
bins of time, which are arrays that the caller keeps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from snapgen_jax.bounds import FINITE, above, at_least, below, check

Losses = Mapping[str, jax.Array]
Means = dict[str, dict[str, jax.Array]]
TASK = "task"
FADED = 1e-20  # a bin of no more than this count was not seen for so long that it tells nothing


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """The operator S, and the other readings of it.

    Attributes:
        alpha: a_t is the logit-normal (0, 1) density of t over its maximum ("density"), the standard normal
            distribution function of that density ("cdf"), the same at all times ("constant"), or there is no operator
            and the losses are added by their weights ("none").
        constant: the value of "constant".
        alpha_bounds: a_t is clipped to these.
        ratio: |L_task| / |L_kd| of the running means of the example's bin of time ("running"), of the batch at hand
            ("batch"), or 1 ("none").
        ratio_bounds: the ratio is clipped to these.
        terms: S of the task and the weighted sum of the teacher's losses ("one", as in SnapGen++, equation 8), whose
            weights share out the teacher's part among them; or one S of the task and each of them, added ("each", as
            SnapGen prints it), which counts the task's loss again for each, and each teacher's loss by its own weight.
        bins: of time, equally wide.
        decay: of the running means, for each update, whether it has examples in the bin or not.
    """

    alpha: Literal["density", "cdf", "constant", "none"] = "density"
    constant: float = 0.5
    alpha_bounds: tuple[float, float] = (0.02, 0.98)
    ratio: Literal["running", "batch", "none"] = "running"
    ratio_bounds: tuple[float, float] = (1e-2, 1e2)
    terms: Literal["one", "each"] = "one"
    bins: int = 32
    decay: float = 0.99

    def __post_init__(self) -> None:
        check(self, constant=FINITE, alpha_bounds=FINITE, ratio_bounds=above(0), bins=at_least(1), decay=below(1))


def task_share(t: jax.Array, config: ScalingConfig) -> jax.Array:
    """a_t of times `[B]`: the share of the task's loss, `[B]` float32 within `alpha_bounds`.

        rho(t) = exp(-logit(t)^2 / 2) / (sqrt(2 pi) t (1 - t)),   at most 4 / sqrt(2 pi), at t = 1/2

    Raises:
        ValueError: `config.alpha` is "none", which has no share.
    """
    inside = (t > 0) & (t < 1)
    safe = jnp.where(inside, t, 0.5).astype(jnp.float32)
    over_maximum = jnp.exp(-0.5 * jnp.square(jnp.log(safe) - jnp.log1p(-safe))) / (4 * safe * (1 - safe))
    over_maximum = jnp.where(inside, over_maximum, 0.0)
    match config.alpha:
        case "density":
            alpha = over_maximum
        case "cdf":
            alpha = jax.scipy.stats.norm.cdf(over_maximum * 4 / math.sqrt(2 * math.pi))
        case "constant":
            alpha = jnp.full_like(over_maximum, config.constant)
        case other:
            raise ValueError(f"alpha={other!r} has no share; expected 'density', 'cdf' or 'constant'")
    return jnp.clip(alpha, *config.alpha_bounds)


def new_means(names: tuple[str, ...], config: ScalingConfig) -> Means:
    """Running means of the task's loss and of the named ones before any was seen: `total` and `count` `[bins]` each."""
    zeros = jnp.zeros(config.bins, jnp.float32)
    return {name: {"total": zeros, "count": zeros} for name in (TASK, *names)}


def bin_sums(losses: Losses, t: jax.Array, config: ScalingConfig) -> Means:
    """What a batch adds to the running means: sums and counts `[bins]` of each loss `[B]`. No gradient passes."""
    index = _bin(t, config)

    def summed(values: jax.Array) -> jax.Array:
        return jnp.zeros(config.bins, jnp.float32).at[index].add(jax.lax.stop_gradient(values))

    count = summed(jnp.ones(t.shape, jnp.float32))
    return {name: {"total": summed(loss), "count": count} for name, loss in losses.items()}


def update_means(means: Means, sums: Means, config: ScalingConfig) -> Means:
    """The running means after a batch. What a bin without examples holds fades too: its mean stays, and counts for less
    beside the next example, so that all bins look back over as many updates."""
    return jax.tree.map(lambda mean, found: config.decay * mean + (1 - config.decay) * found, means, sums)


def scaled(
    losses: Losses, weights: Mapping[str, float], t: jax.Array, means: Means, config: ScalingConfig
) -> jax.Array:
    """S of the task's loss and the teacher's.

    Args:
        losses: `{"task": [B], name: [B] ...}`.
        weights: factor of each of the teacher's losses, by name.
        t: `[B]` times.
        means: the running means; a bin that has seen nothing yet takes the ratio of the example itself.
        config: which reading.

    Returns:
        `[B]` float32. No gradient passes through the ratio.
    """
    task = losses[TASK]
    if config.alpha == "none":
        return task + sum(weight * losses[name] for name, weight in weights.items())
    alpha = task_share(t, config)
    sizes = _sizes({name: losses[name] for name in (TASK, *weights)}, t, means, config)

    def as_large(loss: jax.Array, size: jax.Array) -> jax.Array:
        """A loss times the ratio."""
        if config.ratio == "none":
            return loss
        return jnp.clip(sizes[TASK] / jnp.maximum(size, 1e-12), *config.ratio_bounds) * loss

    if config.terms == "one":
        together, size = (
            sum((weight * of[name] for name, weight in weights.items()), jnp.zeros_like(task)) for of in (losses, sizes)
        )
        return alpha * task + (1 - alpha) * as_large(together, size)
    terms = (weight * as_large(losses[name], sizes[name]) for name, weight in weights.items())
    return sum((alpha * task + (1 - alpha) * term for term in terms), jnp.zeros_like(task))


def _sizes(losses: Losses, t: jax.Array, means: Means, config: ScalingConfig) -> dict[str, jax.Array]:
    """The size of each loss `[B]` that ratios are taken of: the mean of the example's bin, or of the batch."""
    losses = jax.lax.stop_gradient(losses)
    if config.ratio != "running":
        return {name: jnp.full_like(loss, jnp.mean(loss)) for name, loss in losses.items()}
    index = _bin(t, config)

    def size(loss: jax.Array, mean: Mapping[str, jax.Array]) -> jax.Array:
        total, count = mean["total"][index], mean["count"][index]
        return jnp.where(count > FADED, total / jnp.maximum(count, FADED), loss)

    return {name: size(loss, means[name]) for name, loss in losses.items()}


def _bin(t: jax.Array, config: ScalingConfig) -> jax.Array:
    return jnp.clip((t * config.bins).astype(jnp.int32), 0, config.bins - 1)


def feature_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Squared distance of projected student features to a teacher's, a mean over all axes but the first.

        L_feat = || phi(f_student) - LN(f_teacher) ||^2

    SnapGen++ (arXiv 2601.08303), eq. 7. LN normalises each of the teacher's vectors to mean 0 and variance 1, since the
    channels of a deep residual stream differ in size by orders of magnitude.

    Args:
        student: `[B, h, w, D]` features behind the projector.
        teacher: `[B, h, w, D]` features; no gradient passes.

    Returns:
        `[B]` float32.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the projected student features have shape {student.shape} and the teacher's {teacher.shape}; "
            "they must be equal"
        )
    target = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    target = (target - target.mean(-1, keepdims=True)) * jax.lax.rsqrt(target.var(-1, keepdims=True) + 1e-6)
    return jnp.mean(jnp.square(student.astype(jnp.float32) - target), axis=tuple(range(1, target.ndim)))
