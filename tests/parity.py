"""What the comparisons of our networks with their references share."""

import gzip
import json
import math
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from snapgen_jax.networks.module import Network, build
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import to_reference

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def relative_error(given, expected) -> float:
    """|given - expected| / |expected|, of the whole arrays."""
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


def load_checkpoint(folder: pathlib.Path, maps: ModuleType, **changes) -> tuple[Network, dict]:
    """A network and its float32 parameters from a folder of the reference library and its file of `weights.maps`."""
    config = maps.read_config(json.loads((folder / "config.json").read_text()), **changes)
    network, spec = build(config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return network, load(folder, maps.weight_map(config), spec, here, dtype=jnp.float32)


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a full-size checkpoint."""
    own = GOLDENS / "shapes" / f"{name}.json.gz"  # as `tests/oracles/saving.py:save_shapes` writes it
    if own.is_file():
        return {tensor: tuple(shape) for tensor, shape in json.loads(gzip.decompress(own.read_bytes())).items()}
    shapes = json.loads(gzip.decompress((GOLDENS / "state_dict_shapes.json.gz").read_bytes()))[name]
    return {tensor: tuple(shape) for tensor, shape in shapes.items()}


def draw(random: np.random.Generator, spec):
    """Parameters, none at its initial zero or one: matrices and filters keep the variance of their inputs."""

    def leaf(s):
        fan_in = math.prod(s.shape[:-1]) if len(s.shape) > 1 else 0
        return jnp.asarray((fan_in**-0.5 if fan_in else 0.3) * random.standard_normal(s.shape), s.dtype)

    return jax.tree.map(leaf, spec)


def assert_written_as_read(folder: pathlib.Path, maps: ModuleType) -> None:
    """What a checkpoint's parameters make again are its very tensors."""
    network, params = load_checkpoint(folder, maps)
    held = load_file(folder / "diffusion_pytorch_model.safetensors")
    written = to_reference(maps.weight_map(network.config), params)
    assert written.keys() == held.keys()
    assert all(np.array_equal(written[name], held[name].astype(np.float32)) for name in held)
