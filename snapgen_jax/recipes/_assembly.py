"""What a recipe says of its networks, from `{role: network}` and who trains which."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from snapgen_jax.inputs._images import CODEC
from snapgen_jax.inputs.interfaces import Inputs, TokenizerSpec
from snapgen_jax.networks.module import Network, build, flatten, frozen_spec, init
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.frozen import check_weights

log = logging.getLogger(__name__)

Tree = Any
Specs = dict[str, dict[str, jax.ShapeDtypeStruct]]


def trained_roles(inputs: Inputs) -> tuple[str, ...]:
    """The networks of an `Inputs` that come from nowhere, and so are trained beside the recipe's own."""
    return tuple(role for role in inputs.networks() if role not in inputs.pretrained())


def init_roles(networks: Mapping[str, Network], roles: Iterable[str], key: jax.Array) -> dict[str, Tree]:
    """Draws networks, number i from `fold_in(key, i)`."""
    return {role: init(networks[role], jax.random.fold_in(key, i)) for i, role in enumerate(roles)}


def frozen_roles(networks: Mapping[str, Network], trains: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The networks that no player trains."""
    trained = {role for roles in trains.values() for role in roles}
    return tuple(role for role in networks if role not in trained)


def specs_of(networks: Mapping[str, Network], roles: Iterable[str]) -> dict[str, Tree]:
    """`{role: shapes}` of frozen networks, in the dtypes in which they compute."""
    return {role: frozen_spec(networks[role]) for role in roles}


def check_context(network: Any, inputs: Inputs) -> None:
    """Compares what a network attends to with what its inputs give. Traces their text encoder, no more.

    Args:
        network: config of the network.
        inputs: of the recipe that holds it.

    Raises:
        ValueError: the text states or the pooled text have another width, or there is no condition.
    """
    specs = {role: build(brought.config)[1] for role, brought in inputs.networks().items()}
    given = jax.eval_shape(inputs.null_condition, specs)
    if given is None:
        raise ValueError(f"inputs of the kind {inputs.config.kind!r} give no condition, which the network attends to")
    fields = {field.name for field in dataclasses.fields(inputs.config)}
    encoders = [role for role in inputs.networks() if role in fields and role != CODEC]
    for what, states, name in (
        ("the context", given.sequence, "context_width"),
        ("the pooled text", given.pooled, "pooled_width"),
    ):
        width = getattr(network, name)
        if width and width != states.shape[-1]:  # a network without a pooled width reads no pooled text
            of = " or ".join(f"inputs.{field}" for field in ([name] if name in fields else encoders))
            raise ValueError(
                f"{what} is {states.shape[-1]} wide, but network.{name} is {width}; make them equal: set network.{name}"
                + (f", or change {of}" if of else "")
            )


def warn_of_unused_dropout(inputs: Inputs, sampling: Any) -> None:
    """Says so where conditions are dropped in training for a guidance that sampling, which jumps to the data, never
    asks for: those examples teach what is not drawn.

    Args:
        inputs: of the recipe.
        sampling: its `SamplingConfig`.
    """
    share = inputs.unconditional_share()
    if sampling.method == "renoise" and sampling.guidance == 1 and share > 0 and jax.process_index() == 0:
        log.warning(
            "%.3g of the examples are trained without a condition, for guidance, and sampling by 'renoise' has none; "
            "set caption_dropout (or label_dropout) of the inputs to 0",
            share,
        )


def merged_specs(*parts: Specs) -> Specs:
    """The batch specs of several inputs that read one batch.

    Raises:
        ConfigError: they have other buckets, or disagree on an array.
    """
    first, *others = parts
    merged = {bucket: dict(specs) for bucket, specs in first.items()}
    for other in others:
        if other.keys() != merged.keys():
            raise ConfigError(
                f"inputs of one batch have the buckets {', '.join(merged)} and {', '.join(other)}; make their "
                "image_sizes equal"
            )
        for bucket, specs in other.items():
            for name, spec in specs.items():
                known = merged[bucket].setdefault(name, spec)
                if (known.shape, known.dtype) != (spec.shape, spec.dtype):
                    raise ConfigError(
                        f"two inputs of one batch read {name!r} as {known.shape} {known.dtype} and as {spec.shape} "
                        f"{spec.dtype}; make them equal, or give one of them a prefix"
                    )
    return merged


def merged_tokenizers(*parts: Mapping[str, TokenizerSpec]) -> dict[str, TokenizerSpec]:
    """The tokenizers of several inputs that read one batch. Where one names a run and another would train anew, the run
    is taken."""
    merged: dict[str, TokenizerSpec] = {}
    for part in parts:
        for name, spec in part.items():
            known = merged.setdefault(name, spec)
            if not known.workdir and spec.workdir:
                merged[name] = spec
    return merged


def taken_from(new: Tree, old: Tree) -> Tree:
    """Weights of an earlier stage in the dtypes of the new ones. What the earlier stage trained beside them is left
    behind, and the first process says so.

    Args:
        new: `{role: parameters}` that this stage trains.
        old: those that the earlier stage trained.

    Raises:
        ConfigError: the earlier stage does not hold these weights, so that some would begin anew beside a network that
            knows others; names those that differ.
    """
    check_weights("the run that init_from names", flatten(new), flatten(old))
    left = {role: sum(leaf.size for leaf in jax.tree.leaves(old[role])) for role in old if role not in new}
    if left and jax.process_index() == 0:
        log.warning(
            "init_from: the earlier stage also trained %s, which this stage does not train and leaves behind; where "
            "%s is read through it, set `inputs` as in that run's config.json to keep it",
            ", ".join(f"{role} ({size:,} parameters)" for role, size in left.items()),
            "what the network attends to",
        )
    chosen = {name: old[name] for name in new}
    return jax.tree.map(lambda a, b: b.astype(jnp.asarray(a).dtype), new, chosen)
