"""Gates that decide whether a module of a network runs or its last output is used again: see `lazy_gates`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.networks.module import Network, apply, build

Gates = Mapping[str, Mapping[str, jax.Array]]
"""`{module: {"kernel": [T, D], "mean": [T]}}` for T sampling steps: the gate's weights, and the running mean of its
logit."""
Kind = Literal["attention", "ffn", "residual"]
ROLE = "gates"
MEAN_DECAY = 0.9
RUNS, REUSED = "1", "0"


def input_of(module: str) -> str:
    """The name of the intermediate that enters a module."""
    return f"{module}_input"


def gated_modules(network: Network, kinds: Sequence[Kind] = ("attention", "ffn")) -> tuple[str, ...]:
    """The modules of which a network names both what enters and what leaves, in the order in which they run.

    Args:
        network: whose.
        kinds: of them, which end their names.

    Raises:
        ValueError: there is none, or none of a kind.
    """
    names = network.config.tap_names()
    modules = [name for name in names if input_of(name) in names]
    kind = network.config.kind
    if not modules:
        raise ValueError(
            f"network.kind={kind!r} does not name what enters its modules, so that no gate can read it; "
            "use network.kind='dit', 'mmdit' or 'unet'"
        )
    there = {name.rsplit("_", 1)[-1] for name in modules}
    if missing := [name for name in kinds if name not in there]:
        raise ValueError(
            f"gate={tuple(kinds)}: network.kind={kind!r} has no {missing[0]} modules, only {', '.join(sorted(there))}; "
            "leave it out"
        )
    return tuple(name for name in modules if name.rsplit("_", 1)[-1] in kinds)


def new_gates(network: Network, modules: Sequence[str], steps: int) -> Gates:
    """Gates with logit 0, under which every module runs."""
    spec, args = build(network.config)[1], network.config.input_spec(1)
    _, entering = jax.eval_shape(lambda p, a: apply(network, p, *a, taps=[input_of(m) for m in modules]), spec, args)
    widths = {module: entering[input_of(module)].shape[-1] for module in modules}
    return {module: {"kernel": jnp.zeros((steps, d)), "mean": jnp.zeros(steps)} for module, d in widths.items()}


def logit(kernel: jax.Array, entering: jax.Array) -> jax.Array:
    """A gate's logit, float32 `[B]`: `sum_n Z_n . W`, over all tokens n. Positive where the module should run.

    Args:
        kernel: W, `[D]`, or one for each example `[B, D]`.
        entering: Z, the modulated input of the module, `[B, ..., D]`.
    """
    tokens = tuple(range(1, entering.ndim - 1))
    return jnp.sum(jnp.sum(entering.astype(jnp.float32), axis=tokens) * kernel, axis=-1)


def calls_to_skip(share: float, may_skip: np.ndarray, modules: int) -> int:
    """How many module calls make up a share of all `T * modules`.

    Raises:
        ValueError: more than there are at the steps that may skip.
    """
    count, most = round(share * len(may_skip) * modules), int(may_skip.sum()) * modules
    if count > most:
        raise ValueError(
            f"lazy={share}: of these {len(may_skip)} steps {int(may_skip.sum())} may skip, at most "
            f"{may_skip.mean():.2g} of the module calls; lower it"
        )
    return count


def threshold(gates: Gates, modules: Sequence[str], may_skip: np.ndarray, share: float | None) -> jax.Array:
    """The logit, a scalar, below which a module is skipped.

    Args:
        gates: of all modules.
        modules: their names.
        may_skip: bool `[T]`, the steps at which a module may be skipped.
        share: of all module calls that should be skipped: those whose mean logit in training was lowest; None for 0,
            the threshold of training.
    """
    if share is None:
        return jnp.float32(0)
    count = calls_to_skip(share, may_skip, len(modules))
    ordered = jnp.sort(jnp.stack([gates[module]["mean"] for module in modules], axis=1)[may_skip], axis=None)
    return jnp.append(ordered, jnp.inf)[count]


def with_means(gates: Gates, step: jax.Array, logits: Mapping[str, jax.Array]) -> Gates:
    """Gates whose running means at a sampling step have moved towards the mean logits of a batch."""

    def moved(mean: jax.Array, value: jax.Array) -> jax.Array:
        return mean.at[step].set(MEAN_DECAY * mean[step] + (1 - MEAN_DECAY) * value)

    return {name: {**gate, "mean": moved(gate["mean"], logits[name])} for name, gate in gates.items()}


def masks_of(schedule: str, modules: int | None = None) -> np.ndarray:
    """A static schedule as bool `[T, modules]`, true where a module runs.

    Args:
        schedule: such as "111,010" of two steps and three modules.
        modules: how many it must have; None for any number.

    Raises:
        ValueError: it is no schedule, is of another number of modules, or skips at the first step.
    """
    rows = schedule.split(",")
    count = len(rows[0]) if modules is None else modules
    if not count or any(len(row) != count or set(row) - {RUNS, REUSED} for row in rows):
        wanted = "as many digits" if modules is None else f"{modules} digits"
        raise ValueError(f"schedule={schedule!r}; give {wanted} 1 (runs) or 0 (reused) for each step, with commas")
    if REUSED in rows[0]:
        raise ValueError(f"schedule={schedule!r}: the first step has nothing to use again; let all its digits be 1")
    return np.array([[digit == RUNS for digit in row] for row in rows])


def majority_schedule(ran: np.ndarray) -> str:
    """The static schedule that most of the given samples agree with, for the option `schedule`. A tie runs.

    Args:
        ran: bool `[N, halves, T, modules]`, the output "ran" of samples that were drawn with gates.
    """
    runs = np.mean(ran, axis=(0, 1)) >= 0.5
    return ",".join("".join(RUNS if run else REUSED for run in row) for row in runs)
