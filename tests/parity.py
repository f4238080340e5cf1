"""What the comparisons of our networks with their references share."""

import gzip
import json
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.networks.module import Network, build
from snapgen_jax.weights.loader import load

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
