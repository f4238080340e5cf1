"""Tables of discrete variance-preserving schedules, in float64: alpha of every step, and which steps are sampled."""

from __future__ import annotations

from typing import Literal

import numpy as np

Betas = Literal["scaled_linear", "linear", "cosine"]
Spacing = Literal["leading", "trailing", "linspace"]


def alphas(betas: Betas, beta_start: float, beta_end: float, steps: int, zero_terminal_snr: bool) -> np.ndarray:
    """`alpha[n] = sqrt(prod_{m <= n} (1 - beta[m]))`, float64 `[steps]`.

    Args:
        betas: "linear" in beta (Ho et al. 2020, section 4); "scaled_linear", linear in sqrt(beta), as in Stable
            Diffusion; "cosine" (Nichol & Dhariwal 2021, eq. 17, with s = 0.008 and beta at most 0.999).
        beta_start, beta_end: the first and the last beta; "cosine" has none.
        steps: native steps.
        zero_terminal_snr: alpha is moved and scaled so that the last is exactly 0 and the first is unchanged (Lin et
            al. 2024, algorithm 1).
    """
    match betas:
        case "linear":
            beta = np.linspace(beta_start, beta_end, steps)
        case "scaled_linear":
            beta = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
        case "cosine":
            bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
            beta = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        case other:
            raise ValueError(f"unknown betas {other!r}; choose 'scaled_linear', 'linear' or 'cosine'")
    alpha = np.sqrt(np.cumprod(1 - beta))
    if zero_terminal_snr:
        first, last = alpha[0], alpha[-1]
        alpha = (alpha - last) * (first / (first - last))
        alpha[0] = first
    return alpha


def sampled_steps(spacing: Spacing, offset: int, steps: int, native_steps: int) -> np.ndarray:
    """Native steps of inference, integers `[steps]` from noisy to clean, as the public schedulers space them.

    Args:
        spacing: "leading", multiples of `native_steps // steps` from 0; "trailing", equal steps down from the last;
            "linspace", the first, the last and evenly between (Lin et al. 2024, table 2).
        offset: added to "leading" steps; Stable Diffusion 1.5 has 1.
        steps: how many.
        native_steps: how many there are.

    Raises:
        ValueError: there are not so many steps, or a single one would begin next to the data.
    """
    if not 1 <= steps <= native_steps:
        raise ValueError(f"a grid needs between 1 and {native_steps} steps, the native steps there are; got {steps}")
    if steps == 1 and spacing != "trailing":
        raise ValueError(f"with spacing {spacing!r} one step would begin next to the data; choose spacing 'trailing'")
    match spacing:
        case "leading":
            n = np.arange(steps)[::-1] * (native_steps // steps) + offset
        case "trailing":
            n = np.round(np.arange(native_steps, 0, -native_steps / steps))[:steps].astype(int) - 1
        case "linspace":
            n = np.round(np.linspace(0, native_steps - 1, steps)).astype(int)[::-1]
        case other:
            raise ValueError(f"unknown spacing {other!r}; choose 'leading', 'trailing' or 'linspace'")
    if n[0] >= native_steps:
        raise ValueError(
            f"{steps} leading steps with offset {offset} begin at step {n[0]}, and the last is {native_steps - 1}; "
            "take fewer steps, or offset 0"
        )
    return n
