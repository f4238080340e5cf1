"""Images with a class label, whose embedding is trained beside the network (Peebles and Xie 2023, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.diffusion.guidance import draw_kept, keep
from snapgen_jax.inputs._export import label_unit
from snapgen_jax.inputs._images import ImageCodec, OfImages, Size, image_specs
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree, is_kept
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform
from snapgen_jax.networks.text import TextContext
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import InputsExport

LABEL = "label"


@dataclasses.dataclass(frozen=True)
class ClassLabelsConfig:
    """Images with class labels.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        codec: between images and latents.
        label: the embedding; `label.classes` is how many classes there are.
        label_dropout: share of labels replaced by none in training.
    """

    kind: Literal["class_labels"] = "class_labels"
    image_sizes: tuple[Size, ...] = ((32, 32),)
    codec: CodecConfig = CodecConfig()
    label: LabelEmbeddingConfig = LabelEmbeddingConfig()
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1), label_dropout=SHARE)

    def build(self, batch_size: int, platform: Platform) -> ClassLabels:
        """Raises `ValueError` where an image size does not divide as the codec needs."""
        return ClassLabels(self, batch_size, platform)


class ClassLabels(OfImages):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: ClassLabelsConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.images = ImageCodec(config.codec, platform, config.image_sizes)
        self.embedding = build(for_platform(config.label, platform))[0]

    # --- shapes and networks ---

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`, `label` int32 `[B]`."""
        label = jax.ShapeDtypeStruct((self.batch_size,), jnp.int32)
        return image_specs(self.batch_size, self.config.image_sizes, {"label": label})

    def conditions(self) -> tuple[str, ...]:
        """The label."""
        return ("label",)

    def networks(self) -> dict[str, Network]:
        """ "label", and "codec" where that is a network."""
        return {LABEL: self.embedding, **self.images.networks()}

    def pretrained(self) -> tuple[str, ...]:
        """The codec."""
        return tuple(self.images.networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the codec, where it is asked for."""
        return self.load_codec(roles, mesh)

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """None: no text is read."""
        return {}

    def integer_bounds(self) -> dict[str, int]:
        """The classes."""
        return {LABEL: self.config.label.classes}

    # --- examples and conditions ---

    def unconditional_share(self) -> float:
        """`label_dropout`."""
        return self.config.label_dropout

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{"label": bool [B]}`, false with probability `label_dropout`."""
        return {LABEL: draw_kept(key, batch_size, self.config.label_dropout)}

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """The labels, that of none where the label is not kept."""
        del networks, key
        drawn, rows = {"label": batch["label"]}, is_kept(kept, LABEL)
        return drawn if rows is None else keep(rows, drawn, {"label": jnp.int32(self.config.label.classes)})

    def condition(self, networks: Networks, drawn: Tree) -> TextContext:
        """The states of the labels."""
        return apply(self.embedding, networks[LABEL], drawn["label"])

    def null_condition(self, networks: Networks) -> TextContext:
        """The state of none, `[1, ...]`."""
        return self.condition(networks, {"label": jnp.full((1,), self.config.label.classes, jnp.int32)})

    # --- out again ---

    def check_batch(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises `ConfigError` where a label is no class: the embedding would read another row in its place."""
        labels, classes = np.asarray(arrays.get(LABEL, ())), self.config.label.classes
        if (wrong := labels[(labels < 0) | (labels >= classes)]).size:
            raise ConfigError(
                f"label {wrong[0]} is no class: there are {classes}, from 0 to {classes - 1}; give another label, or "
                f"set inputs.label.classes to the number of classes in the data"
            )

    def exports(self) -> InputsExport:
        """The embedding, which takes the place of a text encoder, and the decoder where the codec is a network."""
        classes = self.config.label.classes
        return InputsExport(
            [label_unit(LABEL, self.config.label)],
            {"label": np.asarray(classes, np.int32)},
            self.images.describe(),
            self.images.export_unit(),
            golden={"label": np.arange(min(2, classes), dtype=np.int32)},
        )
