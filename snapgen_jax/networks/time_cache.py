"""Layers of a network that are told the time alone, whose results a table can hold for a fixed grid of times.

BitsFusion (Sui et al. 2024, arXiv 2406.04333, section 4.3): of S steps of a sampler, the embedding of the time and its
projection in each residual block take S values each.
"""

from __future__ import annotations

from snapgen_jax.networks.module import NetworkConfig, Path

TIME, PROJECTION = "time", "embedding"


def depends_on_time_alone(config: NetworkConfig, path: Path) -> bool:
    """Whether a parameter serves only what is computed of the time.

    In a network that adds pooled text to the embedding of the time, the projections in its blocks see both.
    """
    if path[0] == TIME:
        return True
    return PROJECTION in path and not getattr(config, "pooled_width", None) and config.kind in ("unet", "sd_unet")
