"""Images without a condition: what autoencoders and decoders learn from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
from jax.sharding import Mesh

from snapgen_jax.bounds import at_least, check
from snapgen_jax.inputs._images import ImageCodec, OfImages, Size, image_specs
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree
from snapgen_jax.networks.codec import CodecConfig
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import InputsExport


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Images alone.

    Attributes:
        image_sizes: (height, width) of each aspect bucket, in pixels.
        codec: between images and latents; "identity" where the method itself is one.
    """

    kind: Literal["images"] = "images"
    image_sizes: tuple[Size, ...] = ((32, 32),)
    codec: CodecConfig = CodecConfig("identity", scale=1.0, shift=0.0)

    def __post_init__(self) -> None:
        check(self, image_sizes=at_least(1))

    def build(self, batch_size: int, platform: Platform) -> Images:
        """Raises `ValueError` where an image size does not divide as the codec needs."""
        return Images(self, batch_size, platform)


class Images(OfImages):
    """See the top of this file. Implements `inputs.interfaces.Inputs`."""

    def __init__(self, config: ImagesConfig, batch_size: int, platform: Platform):
        self.config, self.batch_size = config, batch_size
        self.images = ImageCodec(config.codec, platform, config.image_sizes)

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`."""
        return image_specs(self.batch_size, self.config.image_sizes, {})

    def conditions(self) -> tuple[str, ...]:
        """None."""
        return ()

    def networks(self) -> dict[str, Network]:
        """ "codec", where that is a network."""
        return self.images.networks()

    def pretrained(self) -> tuple[str, ...]:
        """The codec."""
        return tuple(self.images.networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the codec, where it is asked for."""
        return self.load_codec(roles, mesh)

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """None: no text is read."""
        return {}

    def unconditional_share(self) -> float:
        """0: there is nothing to drop."""
        return 0.0

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """Nothing is dropped."""
        del key, batch_size
        return {}

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """There is none."""
        del networks, batch, key, kept
        return {}

    def condition(self, networks: Networks, drawn: Tree) -> None:
        """There is none."""
        del networks, drawn

    def null_condition(self, networks: Networks) -> None:
        """There is none."""
        del networks

    def exports(self) -> InputsExport:
        """Nothing draws from images alone.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError("inputs of the kind 'images' hold no condition to draw from; export a run of a generator")
