"""A table in the place of the layers that are told the time alone, for a fixed grid of times.

BitsFusion (Sui et al. 2024, arXiv 2406.04333, section 4.3): in S steps of a sampler the embedding of the time, and its
projection in each residual block, take S values each. With a row for each step, the layers that made them are not
needed, and the grid is fixed.

    cached = TimeCachedConfig.of(config, steps)                 # another network
    params = with_table(config, params, features)               # of the features [S, time_width] of the grid
    apply(build(cached)[0], params, x, jax.nn.one_hot([i], steps), context)

In a network that adds pooled text to the embedding, the projections in its blocks see both and stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.module import (
    NetworkConfig,
    Path,
    Tree,
    apply,
    build,
    compute_dtype,
    flatten,
    unflatten,
)
from snapgen_jax.networks.wrapped import WrappedConfig

TIME, PROJECTION, TABLE = "time", "embedding", "table"


def _caches_projections(config: NetworkConfig) -> bool:
    """Whether the blocks of a network project an embedding of the time alone."""
    return config.kind in ("unet", "sd_unet") and not getattr(config, "pooled_width", None)


def depends_on_time_alone(config: NetworkConfig, path: Path) -> bool:
    """Whether a parameter serves only what is computed of the time."""
    return path[0] == TIME or (PROJECTION in path and _caches_projections(config))


class Rows(nnx.Module):
    """A row of a table for each step: `[B, S] -> [B, D]`, by a product, since a phone's GPU looks nothing up."""

    def __init__(self, steps: int, width: int, dtype: jnp.dtype):
        self.table = nnx.Param(jnp.zeros((steps, width), jnp.float32))
        self.dtype = dtype

    def __call__(self, step: jax.Array) -> jax.Array:
        return jnp.dot(step.astype(self.dtype), self.table[...].astype(self.dtype), precision="highest")


class Index(nnx.Module):
    """The step as it is, for tables further on."""

    def __call__(self, step: jax.Array) -> jax.Array:
        return step


@dataclasses.dataclass(frozen=True)
class TimeCachedConfig(WrappedConfig):
    """The config of a network with tables.

    Attributes:
        network: the config of the network, with as many time features as there are steps: what it takes is a row of
            zeros with a one at the step.
    """

    @classmethod
    def of(cls, config: NetworkConfig, steps: int) -> Self:
        """That of a network and a number of steps."""
        return cls(dataclasses.replace(config, time_width=steps))  # type: ignore[type-var]

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the network, with tables in the place of its layers of time."""
        module: Any = self.network.module(rngs)
        steps, dtype = self.network.time_width, compute_dtype(self.network)
        if not _caches_projections(self.network):
            module.time = Rows(steps, module.time.outer.kernel[...].shape[-1], dtype)
            return module
        for path, node in list(nnx.iter_graph(module)):
            if path and path[-1] == PROJECTION:
                holder = module
                for part in path[:-1]:
                    holder = holder[part] if isinstance(part, int) else getattr(holder, str(part))
                holder.embedding = Rows(steps, node.kernel[...].shape[-1], dtype)
        module.time, module.activation = Index(), _identity
        return module


def _identity(x: jax.Array) -> jax.Array:
    return x


def with_table(config: NetworkConfig, params: Tree, features: jax.Array) -> Tree:
    """The parameters of `TimeCachedConfig`.

    Args:
        config: of the network.
        params: its own.
        features: `[S, time_width]` of the grid's times, as it takes them.
    """
    embedding = apply(build(config)[0], params, features, method=TIME)
    flat = flatten(params)
    kept = {path: leaf for path, leaf in flat.items() if not depends_on_time_alone(config, path)}
    if not _caches_projections(config):
        kept[TIME, TABLE] = embedding.astype(jnp.float32)
        return unflatten(kept)
    embedding = jax.nn.silu(embedding)
    for path in flat:
        if PROJECTION in path and path[-1] == "kernel":
            kernel, bias = flat[path], flat[*path[:-1], "bias"]
            rows = jnp.dot(embedding, kernel.astype(embedding.dtype), precision="highest") + bias
            kept[*path[:-1], TABLE] = rows.astype(jnp.float32)
    return unflatten(kept)


def cached_values(config: NetworkConfig, steps: int) -> int:
    """How many numbers the tables hold."""
    flat = flatten(build(TimeCachedConfig.of(config, steps))[1])
    return sum(leaf.size for path, leaf in flat.items() if path[-1] == TABLE)
