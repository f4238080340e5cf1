"""SnapGen's decoder (Hu et al. 2025, section 3.2): a tiny decoder learns to decode what a frozen encoder encodes.

    L = (x - D(z))^2 + LPIPS(x, D(z)) + a L_G(D(z)),   z = E(x)

x is the image, or what the frozen large decoder makes of z (as in SnapFusion, Li et al. 2023, section 3.2), and then z
may also come from a trained generator. There is no divergence: the latents are given. It learns on random crops of
latent and image.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.networks.codec import CodecConfig, build_codec, from_uint8
from snapgen_jax.networks.module import Platform, apply, build, for_platform, init
from snapgen_jax.networks.tiny_decoder import TinyDecoderCodec, TinyDecoderConfig
from snapgen_jax.recipes._reconstruction import Reconstruction, ReconstructionConfig
from snapgen_jax.weights.frozen import load_codec

Tree = Any


@dataclasses.dataclass(frozen=True)
class DecoderDistillationConfig(ReconstructionConfig):
    """Training of a tiny decoder; the common fields are those of `ReconstructionConfig`.

    Attributes:
        decoder: the network.
        codec: the frozen autoencoder whose latents it decodes.
        target: what it should make: the "image" itself, or what the "large" decoder makes of the latent.
        crop: side in pixels of the random crops that it learns on; 0 for whole images.
    """

    decoder: TinyDecoderConfig = TinyDecoderConfig.preset("shapes")
    codec: CodecConfig = CodecConfig("autoencoder")
    target: Literal["image", "large"] = "image"
    crop: int = 0


class DecoderDistillation(Reconstruction):
    """See the top of this file. Implements `training.recipe.Recipe`; the model is `{"decoder"}`."""

    Config = DecoderDistillationConfig
    last_layer = ("decoder", "conv_out", "kernel")

    def __init__(self, config: DecoderDistillationConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the codec is none that a tiny decoder can decode, or a size does not fit.
        """
        super().__init__(config, platform)
        if (config.codec.kind, config.codec.decoder) != ("autoencoder", "autoencoder"):
            raise ValueError(
                f"codec.kind={config.codec.kind!r} with codec.decoder={config.codec.decoder!r}: a tiny decoder learns "
                "from an autoencoder with a decoder of its own; set both to 'autoencoder'"
            )
        both = dataclasses.replace(config.codec, decoder="tiny", tiny_decoder=config.decoder)
        build_codec(both, platform)  # raises where the two decoders do not take the same latents
        self.codec = build_codec(config.codec, platform)
        self.decoder, _ = build(for_platform(config.decoder, platform))
        for size in config.image_sizes:
            self.codec.latent_shape(size)
            if config.crop > min(size):
                raise ValueError(f"crop={config.crop} is larger than an image of {size[0]} x {size[1]} px; change one")
        if config.crop:
            self.codec.latent_shape(config.crop)

    def new_params(self, key: jax.Array) -> Tree:
        """The tiny decoder, drawn."""
        return {"decoder": init(self.decoder, key)}

    def frozen_spec(self) -> Tree:
        """`{"codec"}`, the autoencoder, and `{"perceptual"}` where that term counts."""
        return {**super().frozen_spec(), "codec": self.codec.spec()}

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Reads the autoencoder that `config.codec` names, and the perceptual distance."""
        return {**super().load_frozen(mesh), "codec": load_codec(self.config.codec, self.codec, mesh)}

    def draw(self, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        """Latents and the images to be made of them, cropped alike; no gradient passes here."""
        codec, images = self.codec.bind(frozen["codec"]), from_uint8(batch["image"])
        latents = codec.encode(images)
        if self.config.crop:
            images, latents = self._crops(images, latents, key)
        target = images if self.config.target == "image" else codec.decode(latents)
        return {"latent": latents, "image": target}

    def _crops(self, images: jax.Array, latents: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A crop of each example at a place of its own, `[B, crop, crop, 3]` and `[B, crop / f, crop / f, c]`."""
        f = images.shape[1] // latents.shape[1]
        side = self.config.crop // f
        b, h, w, _ = latents.shape
        places = jax.random.randint(key, (b, 2), 0, jnp.array([h - side + 1, w - side + 1]))

        def crop(x: jax.Array, place: jax.Array, size: int) -> jax.Array:
            return jax.lax.dynamic_slice(x, (place[0], place[1], jnp.int32(0)), (size, size, x.shape[-1]))

        cut = jax.vmap(crop, in_axes=(0, 0, None))
        return cut(images, places * f, side * f), cut(latents, places, side)

    def make(self, params: Tree, drawn: Tree) -> tuple[jax.Array, dict[str, tuple[float, jax.Array]], Tree]:
        """The decoded latents."""
        return apply(self.decoder, params["decoder"], drawn["latent"]), {}, ()

    def decoders(self, params: Tree, frozen: Tree, images: jax.Array) -> dict[str, jax.Array]:
        """The large decoder and the tiny one, on the same latents."""
        codec = self.codec.bind(frozen["codec"])
        latents = codec.encode(images)
        return {"large": codec.decode(latents), "tiny": apply(self.decoder, params["decoder"], latents)}

    def trained_codec(self, params: Tree, frozen: Tree) -> TinyDecoderCodec:
        """Encodes as the frozen encoder does, and decodes as the tiny decoder does."""
        return TinyDecoderCodec(self.decoder, params["model"]["decoder"], self.codec.bind(frozen["codec"]))


RECIPE = DecoderDistillation
