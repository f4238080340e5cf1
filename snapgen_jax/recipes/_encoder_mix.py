"""Text encoders side by side: which share of a condition comes from which."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from snapgen_jax.inputs.captions import same_tokens
from snapgen_jax.networks.lora import LoraConfig, init_adapters, merge
from snapgen_jax.networks.text import TextContext
from snapgen_jax.recipes._run import run_config
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.frozen import load_run

Tree = Any
ORIGINAL, TUNED = "original", "tuned"
_ROUNDING = 1e-6


def shares_of(mix: float | str) -> dict[str, float]:
    """`{encoder: its share}` of an option `encoder_mix`, without those of none.

    Args:
        mix: w, the share of the tuned encoder, the rest being the original's; or "original:0.2,tuned:0.5,NAME:0.3".

    Raises:
        ValueError: a share is no number from 0 to 1, or they do not sum to one.
    """
    if isinstance(mix, str):
        parts = [part.partition(":") for part in mix.split(",")]
        try:
            named = [(name.strip(), float(share)) for name, _, share in parts]
        except ValueError:
            raise ValueError(
                f"encoder_mix={mix!r}; give the share of the tuned encoder, such as 0.5, or shares by name, such as "
                "'original:0.2,tuned:0.8'"
            ) from None
        shares = dict(named)
        if len(shares) < len(named):
            raise ValueError(f"encoder_mix={mix!r} names an encoder twice; give each one share")
    else:
        shares = {TUNED: mix, ORIGINAL: 1 - mix}
    if wrong := [share for share in shares.values() if not 0 <= share <= 1]:
        raise ValueError(f"encoder_mix={mix!r}: {wrong[0]:g} is no share; give numbers from 0 to 1")
    if not math.isclose(total := sum(shares.values()), 1, abs_tol=_ROUNDING):
        raise ValueError(f"encoder_mix={mix!r}: the shares sum to {total:g}; let them sum to 1")
    return {name: share for name, share in shares.items() if share}


def blended(parts: Mapping[str, Any], shares: Mapping[str, float]) -> Any:
    """sum_k w_k c_k of conditions; what they attend to is that of the first.

    Args:
        parts: `{encoder: condition}`, trees of arrays of equal shapes.
        shares: `{encoder: w_k}`.
    """
    if len(shares) == 1:
        return parts[next(iter(shares))]
    mixed = jax.tree.map(
        lambda *xs: sum(w * x for w, x in zip(shares.values(), xs, strict=True)), *(parts[name] for name in shares)
    )
    first = parts[next(iter(shares))]
    return dataclasses.replace(mixed, mask=first.mask) if isinstance(first, TextContext) else mixed


@dataclasses.dataclass(frozen=True)
class Original:
    """A text encoder before it was tuned.

    Attributes:
        weights: its parameters.
        workdir: the run whose encoder and tokenizer it is; "" for a published one.
    """

    weights: Tree
    workdir: str = ""


def load_tuned(workdir: str, role: str, spec: Tree, original: Original, mesh: Mesh | None, rules: Any) -> Tree:
    """The tuned text encoder of an earlier run of `reward_tuning`: its own parameters, or its adapters merged.

    It must have been tuned from `original`. What can be told of that is compared: the tokenizers of both runs; and the
    encoder that the earlier run began with, where that still is where its config says. Of a base that was moved, and of
    published encoders, it cannot be told.

    Args:
        workdir: of that run.
        role: of the encoder.
        spec: shapes of its parameters.
        original: the encoder of this run, beside which it is used.
        mesh, rules: where the parameters go.

    Raises:
        ConfigError: it is no such run, tuned another encoder, or knows another tokenizer.
    """
    run = run_config(workdir)
    trains = run.get("trains", "text")
    if run and (run.get("recipe") != "reward_tuning" or not trains.startswith("text")):
        what = f"trains={trains!r}" if run.get("recipe") == "reward_tuning" else f"recipe={run.get('recipe')!r}"
        raise ConfigError(f"{workdir!r} has no tuned text encoder: it is a run of {what}; name one of trains='text'")
    if original.workdir:
        _check_origin(workdir, run, original, functools.partial(load_run, spec={role: spec}, mesh=mesh, rules=rules))
    if trains == "text":
        return load_run(workdir, {role: spec}, mesh=mesh, rules=rules)[role]
    said = run["lora"]
    lora = LoraConfig(said["rank"], said["alpha"], tuple(said["targets"]))
    small = jax.eval_shape(lambda key: init_adapters(lora, {role: spec}, key), jax.random.key(0))
    adapters = load_run(workdir, {"adapters": small}, mesh=mesh)["adapters"]
    merged = jax.jit(lambda tree, adapters: merge({role: tree}, adapters, lora.scale)[role])(original.weights, adapters)
    return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), merged, spec)


def _check_origin(workdir: str, run: Mapping[str, Any], original: Original, load: Callable[..., Tree]) -> None:
    """Raises where an encoder was tuned from another than `original`; `load(base)` gives a base's, by role."""
    own = original.workdir
    if not same_tokens(workdir, own):
        raise ConfigError(
            f"the tuned text encoder of {workdir!r} knows another tokenizer than that of {own!r}, whose token ids it "
            f"would read; name a run that tuned the encoder of {own!r}"
        )
    base = run.get("inputs", {}).get("text_workdir") or run.get("base") or run.get("init_from") or ""
    copied_here = "://" in base and "://" not in own
    if not base or copied_here or epath.Path(base) == epath.Path(own):
        return
    try:
        (began_with,) = load(base).values()
    except ConfigError:  # it was moved
        return
    if not _are_equal(began_with, original.weights):
        raise ConfigError(
            f"the text encoder of {workdir!r} was tuned from that of {base!r}, and the one here is of {own!r} and has "
            f"other weights; name a run that tuned the encoder of {own!r}, or set base to {base!r}"
        )


def _are_equal(a: Tree, b: Tree) -> bool:
    """Whether weights are the same in bfloat16: a platform, or a folder of weights, chooses their dtype."""

    @jax.jit
    def equal(a: Tree, b: Tree) -> jax.Array:
        same = jax.tree.map(lambda x, y: jnp.all(x.astype(jnp.bfloat16) == y.astype(jnp.bfloat16)), a, b)
        return jnp.all(jnp.stack(jax.tree.leaves(same)))

    return bool(equal(a, b))
