"""Golden examples: the numbers that a client on any device can hold its own against, and how close it must come."""

from __future__ import annotations

import numpy as np

from snapgen_jax.export.client import Arrays, Sampler, Scheduler, Unit, time_features
from snapgen_jax.export.compare import LIMITS
from snapgen_jax.export.precision import Precision
from snapgen_jax.export.verify import grey_levels, relative_l2

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
# A tolerance is the deviation that errors at the limit of one call add up to, times this.
SAFETY = 2.0
ROUNDING = 1e-6  # relative; what float32 alone loses over some tens of steps


def run(sampler: Sampler, tokens: np.ndarray, mask: np.ndarray, noise: np.ndarray) -> Arrays:
    """Runs N examples and keeps all that a client should see on the way.

    Returns:
        tokens int32 and mask `[N, L]`, noise `[N, *noise_shape]`, sequence `[N, L, D]`, pooled `[N, P]`, their null_*
        counterparts `[1, ...]`, latents `[N, S, h, w, c]` after each step, image uint8 `[N, H, W, 3]`.
    """
    null = sampler.encode_null()
    contexts = [sampler.encode(*pair) for pair in zip(tokens, mask, strict=True)]
    latents = np.stack([sampler.trajectory(x, c, null) for x, c in zip(noise, contexts, strict=True)])
    return {
        "tokens": tokens,
        "mask": mask,
        "noise": noise,
        **{name: np.concatenate([c[name] for c in contexts]) for name in ("sequence", "pooled")},
        **{f"null_{name}": null[name] for name in ("sequence", "pooled")},
        "latents": latents,
        "image": np.stack([sampler.decode(x[-1]) for x in latents]),
    }


def denoiser_cases(golden: Arrays, scheduler: Scheduler, example: int = 0) -> dict[str, Arrays]:
    """Inputs of the denoiser at each of `TIMES`, along a golden example's path `x_t = (1 - t) x_0 + t noise`."""
    x_0, noise = golden["latents"][example, -1], golden["noise"][example]
    noise = noise[0] if scheduler.method == "renoise" else noise
    text = {name: golden[name][example : example + 1] for name in ("sequence", "mask", "pooled")}
    return {
        f"t={t:g}": {
            "latent": ((1 - t) * x_0 + t * noise)[None].astype(np.float32),
            "time": time_features(np.array([t]), scheduler.time_features),
            **text,
        }
        for t in TIMES
    }


def text_cases(golden: Arrays) -> dict[str, Arrays]:
    """Inputs of the text encoder: each golden prompt."""
    pairs = zip(golden["tokens"], golden["mask"], strict=True)
    return {f"prompt {i}": {"tokens": tokens[None], "mask": mask[None]} for i, (tokens, mask) in enumerate(pairs)}


def decoder_cases(golden: Arrays) -> dict[str, Arrays]:
    """Inputs of a decoder that is a network: the last latent of each golden prompt."""
    return {f"prompt {i}": {"latent": latents[-1:]} for i, latents in enumerate(golden["latents"])}


def tolerances(sampler: Sampler, golden: Arrays, precision: Precision) -> dict[str, object]:
    """How far a client may be from the golden arrays.

    Each call of a unit may be off by the limit of its precision. Here every call is put off by exactly that much, in
    one direction throughout, so that the steps add up as badly as they can; guidance widens an error of the velocity by
    |w| + |w - 1|, with opposite signs in its two calls. The deviation that this leads to, measured on LiteRT and
    doubled, is the tolerance: it includes how much this sampler, with these weights, amplifies an error.

    Returns:
        text_encoder: relative L2; latents: relative L2 after each step; image_max_grey (float32: the one grey level
        that rounding may flip) or image_rms_grey (root mean square).
    """
    limit, scheduler = LIMITS[precision], sampler.scheduler
    widening = abs(scheduler.guidance) + abs(scheduler.guidance - 1)
    units = dict(sampler.units)
    denoiser = scheduler.units["denoiser"]
    units[denoiser] = _put_off(units[denoiser], limit * widening)
    for name in units.keys() - {denoiser}:
        units[name] = _put_off(units[name], limit)
    inputs = (golden["tokens"], golden["mask"], golden["noise"])
    exact, off = run(sampler, *inputs), run(Sampler(scheduler, units, sampler.inputs), *inputs)
    steps = range(golden["latents"].shape[1])
    deviation = [max(map(relative_l2, off["latents"][:, i], exact["latents"][:, i])) for i in steps]
    found: dict[str, object] = {"text_encoder": limit, "latents": [SAFETY * d + ROUNDING for d in deviation]}
    if precision == "f32":
        return {**found, "image_max_grey": 1}
    grey = max(np.sqrt(np.mean(grey_levels(a, b) ** 2)) for a, b in zip(off["image"], exact["image"], strict=True))
    return {**found, "image_rms_grey": SAFETY * float(grey) + 0.5}  # half a level for rounding


def _put_off(unit: Unit, amount: float) -> Unit:
    """The unit with every output moved by `amount` times its norm, in a direction that never changes."""

    def run(**inputs: np.ndarray) -> Arrays:
        moved = {}
        for name, array in unit(**inputs).items():
            direction = np.random.default_rng(0).standard_normal(array.shape)
            direction *= amount * np.linalg.norm(array) / np.linalg.norm(direction)
            moved[name] = (array + direction).astype(np.float32)
        return moved

    return run
