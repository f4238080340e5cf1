"""Tiny networks with drawn parameters, and what the sweeps over them share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.networks.module import Network, build, flatten, unflatten
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig


def drawn(network: Network, seed: int = 0):
    """Parameters away from every start value, zero or one, so that no branch is switched off."""
    _, spec = build(network.config)
    generator, flat = np.random.default_rng(seed), {}
    for path, leaf in flatten(spec).items():
        noise = generator.normal(size=leaf.shape)
        fan_in = max(1, leaf.size // leaf.shape[-1]) if leaf.ndim else 1
        value = noise * fan_in**-0.5 if leaf.ndim > 1 else 0.3 * noise + (path[-1] == "scale")
        flat[path] = jnp.asarray(value, jnp.float32)
    return unflatten(flat)


def inputs(config: UNetConfig, batch: int = 2, height: int = 8, width: int = 8, tokens: int = 5):
    """Random inputs of a UNet; the last token of every text is padding."""
    specs, tree = jax.tree.flatten(config.input_spec(batch, height, width, tokens))
    generator = np.random.default_rng(0)
    arrays = [jnp.asarray(generator.normal(size=spec.shape), jnp.float32) for spec in specs]
    x, time, context = jax.tree.unflatten(tree, arrays)
    mask = jnp.ones((batch, tokens)).at[:, -1].set(0)
    return x, time, TextContext(context.sequence, mask, context.pooled)


def outputs_without_each_leaf(output: Callable[[dict], jax.Array], params: dict) -> dict[str, jax.Array]:
    """{parameter name: output with that parameter set to zero}, all from one compilation."""
    flat = flatten(params)

    def without(index: jax.Array) -> jax.Array:
        return output(unflatten({path: leaf * (index != i) for i, (path, leaf) in enumerate(flat.items())}))

    outputs = jax.jit(lambda indices: jax.lax.map(without, indices))(jnp.arange(len(flat)))
    return {"/".join(path): outputs[i] for i, path in enumerate(flat)}
