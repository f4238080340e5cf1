"""SnapGen in JAX: networks, training recipes and export of a text-to-image model for phones.

Nothing heavy is imported here; `snapgen_jax.load` and `snapgen_jax.train` import what they need.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snapgen_jax.generation import load
    from snapgen_jax.in_memory import train
    from snapgen_jax.training.loop import inference_weights

__all__ = ["inference_weights", "load", "train"]

_HOME = {
    "load": "snapgen_jax.generation",
    "train": "snapgen_jax.in_memory",
    "inference_weights": "snapgen_jax.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'snapgen_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
