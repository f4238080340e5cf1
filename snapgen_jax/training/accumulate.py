"""Gradient accumulation: one large batch as a scan over microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def split_microbatches(batch: Tree, microbatches: int) -> Tree:
    """`[B, ...] -> [M, B/M, ...]`. Microbatch m holds rows m, m+M, m+2M ..., so a batch that is split over devices in
    contiguous blocks stays split evenly in every microbatch, without communication.

    Raises:
        ValueError: the batch does not divide by the number of microbatches.
    """

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % microbatches:
            raise ValueError(
                f"a global batch of {x.shape[0]} does not divide into {microbatches} microbatches; "
                "change batch_size or microbatches"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def accumulate_gradients(
    loss_fn: Callable[[Tree, Tree], tuple[jax.Array, Tree]], params: Tree, batch: Tree, microbatches: int
) -> tuple[Tree, jax.Array, Tree]:
    """Mean gradient, mean loss and mean auxiliary values of `loss_fn(params, microbatch) -> (loss, aux)`.

    `loss_fn` must be a mean over examples. All random numbers must be in `batch`, drawn for the whole of it, so that
    the number of microbatches changes nothing but rounding.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (loss, aux), grads = gradient(params, batch)
        return grads, loss, aux

    def body(total: Tree, microbatch: Tree) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, gradient(params, microbatch)), None

    parts = split_microbatches(batch, microbatches)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, parts)
    (loss, aux), grads = jax.tree.map(lambda x: x / microbatches, total)
    return grads, loss, aux
