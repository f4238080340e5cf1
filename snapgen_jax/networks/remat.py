"""What the backward pass of a UNet finds computed, and what it computes again.

| remat | kept of the forward pass | computed again |
|---|---|---|
| none | all that a derivative reads: norms and softmax leave float32 copies | nothing |
| products | what matrix products, convolutions and attention made, in the compute dtype | norms, activations, scores |
| attention | what enters a unit, and what attention made | all products |
| blocks | what enters a unit | all products and attention |

"products" recomputes block by block, so that no more than one residual or transformer block is held whole at a time;
"attention" and "blocks" recompute unit by unit. The value of a network is the same program in all four.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from snapgen_jax.networks.layers import PRODUCT

Remat = Literal["none", "products", "attention", "blocks"]


def _keeping(*names: str) -> Callable[..., bool]:
    """A policy that keeps what has one of these names, and what cuDNN's attention made: beside its result the
    statistics of its softmax, which have no name and without which its backward kernel runs the forward one again."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def keeps(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
        return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *arguments, **parameters)

    return keeps


_UNIT = {"blocks": jax.checkpoint, "attention": functools.partial(jax.checkpoint, policy=_keeping("attention"))}
_BLOCK = {"products": functools.partial(jax.checkpoint, policy=_keeping("attention", PRODUCT))}


def unit(remat: Remat, function: Callable[..., Any]) -> Callable[..., Any]:
    """A unit of the network, or a transformer outside one, as "attention" and "blocks" remember it."""
    return _UNIT.get(remat, lambda function: function)(function)


def block(remat: Remat, function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a unit, or what stands between units, as "products" remembers it."""
    return _BLOCK.get(remat, lambda function: function)(function)
