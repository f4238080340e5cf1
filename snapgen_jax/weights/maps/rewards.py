"""Rewards: a CLIP in transformers' layout (PickScore) or in OpenCLIP's (HPSv2), and the aesthetic predictor's layers.

HPSv2 and the aesthetic predictor are published as pickles, which this package does not read; make safetensors files of
them once (`docs/networks.md`).
"""

from __future__ import annotations

from snapgen_jax.networks.rewards import RewardConfig
from snapgen_jax.weights.mapping import WeightMap, at, linear, one
from snapgen_jax.weights.maps import clip, clip_vision
from snapgen_jax.weights.maps.clip import Layout, layout_of

__all__ = ["Layout", "head_map", "layout_of", "weight_map"]

_HEAD = (0, 2, 4, 6, 7)  # the layers between are dropout, which is nothing here


def weight_map(config: RewardConfig, layout: Layout = "transformers") -> WeightMap:
    """The tensors of a `Reward` in the files of a whole CLIP: all but those of its `head`."""
    image = clip_vision.weight_map(config.vision, layout)
    rules, ignored = at("vision", image.rules), image.ignored
    if config.text is not None:
        text = clip.weight_map(config.text, layout)
        rules += at("text", text.rules)
        ignored = tuple(pattern for pattern in image.ignored if pattern in text.ignored or pattern.endswith("_ids"))
        ignored += tuple(pattern for pattern in text.ignored if pattern.endswith("_ids"))
    if config.score == "scaled":
        rules += (one("logit_scale", "logit_scale"),)
    return WeightMap(rules, ignored=ignored)


def head_map(config: RewardConfig) -> WeightMap:
    """The layers of the aesthetic predictor.

    Raises:
        ValueError: there are not as many as that has.
    """
    if len(config.hidden) != len(_HEAD) - 1:
        raise ValueError(f"hidden={config.hidden}: the published predictor has {len(_HEAD) - 1} hidden widths")
    return WeightMap(tuple(rule for i, n in enumerate(_HEAD) for rule in linear(f"head/block_{i:02d}", f"layers.{n}")))
