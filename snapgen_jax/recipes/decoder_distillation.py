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
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.weights.frozen import load_codec, load_run

Tree = Any


@dataclasses.dataclass(frozen=True)
class DecoderDistillationConfig(ReconstructionConfig):
    """Training of a tiny decoder; the common fields are those of `ReconstructionConfig`.

    Attributes:
        decoder: the network.
        codec: the frozen autoencoder whose latents it decodes.
        target: what it should make: the "image" itself, or what the "large" decoder makes of the latent.
        crop: side in pixels of the random crops that it learns on; 0 for whole images.
        generator_workdir: a run of `flow_matching`, or of a method built on it, on latents of this codec: some of the
            latents are then drawn by it from captions of the batch. They have no image, so `target` must be "large".
        generator: that run's networks, text encoder and sampler.
        generated_share: of a batch, the latents that the generator draws.
    """

    decoder: TinyDecoderConfig = TinyDecoderConfig.preset("shapes")
    codec: CodecConfig = CodecConfig("autoencoder")
    target: Literal["image", "large"] = "image"
    crop: int = 0
    generator_workdir: str = ""
    generator: FlowMatchingConfig = FlowMatchingConfig()
    generated_share: float = 0.5


class DecoderDistillation(Reconstruction):
    """See the top of this file. Implements `training.recipe.Recipe`; the model is `{"decoder"}`."""

    Config = DecoderDistillationConfig
    last_layer = ("decoder", "conv_out", "kernel")

    def __init__(self, config: DecoderDistillationConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the codec is none that a tiny decoder can decode, or a size or the generator does not fit.
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
        self.generator, self.generated = None, round(config.generated_share * config.batch_size)
        if config.generator_workdir:
            self._check_generator()
            shared = {name: getattr(config, name) for name in ("codec", "image_sizes", "batch_size")}
            self.generator = FlowMatching(dataclasses.replace(config.generator, **shared), platform)

    def _check_generator(self) -> None:
        config = self.config
        if config.target != "large":
            raise ValueError(
                "a generated latent has no image that it came from; with generator_workdir set target='large'"
            )
        if not 0 < self.generated <= config.batch_size:
            raise ValueError(
                f"generated_share={config.generated_share} of a batch of {config.batch_size} is {self.generated} "
                "latents; choose a share between 0 and 1 that makes at least one, or leave generator_workdir out"
            )

    @property
    def tokenizer_workdir(self) -> str:
        """The generator's run, whose tokenizer makes the tokens of a batch."""
        return self.config.generator_workdir

    @property
    def vocab_size(self) -> int:
        """Token ids must be below this."""
        return self.config.generator.text.vocab_size

    def batch_specs(self) -> dict[str, Tree]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`; with a generator `tokens` and `mask` `[B, L]`."""
        return (super() if self.generator is None else self.generator).batch_specs()

    def new_params(self, key: jax.Array) -> Tree:
        """The tiny decoder, drawn."""
        return {"decoder": init(self.decoder, key)}

    def frozen_spec(self) -> Tree:
        """`{"codec"}`, the autoencoder, and, where they are used, `{"perceptual"}` and `{"generator"}`."""
        frozen = {**super().frozen_spec(), "codec": self.codec.spec()}
        return frozen if self.generator is None else {**frozen, "generator": self._generator_spec(self.generator)}

    @staticmethod
    def _generator_spec(generator: FlowMatching) -> Tree:
        trained = jax.eval_shape(generator.init, jax.random.key(0)).players["model"].params
        return {**{name: spec for name, spec in generator.frozen_spec().items() if name != "codec"}, **trained}

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Reads the autoencoder that `config.codec` names, the perceptual distance, and the generator."""
        frozen = {**super().load_frozen(mesh), "codec": load_codec(self.config.codec, self.codec, mesh)}
        return frozen if self.generator is None else {**frozen, "generator": self.load_generator(self.generator, mesh)}

    def load_generator(self, generator: FlowMatching, mesh: Mesh | None) -> Tree:
        """The weights of the generator's run, and its frozen text encoder where it has one."""
        spec, rules = self._generator_spec(generator), generator.rules()
        frozen = {"text": spec.pop("text")} if generator.text_workdir else {}
        held = load_run(self.config.generator_workdir, spec, mesh=mesh, rules=rules)
        return {**held, **(load_run(generator.text_workdir, frozen, mesh=mesh, rules=rules) if frozen else {})}

    def draw(self, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        """Latents and the images to be made of them, cropped alike; no gradient passes here."""
        codec, images = self.codec.bind(frozen["codec"]), from_uint8(batch["image"])
        if self.generator is None:
            latents = codec.encode(images)
        else:
            generated = self._generate(self.generator, frozen, batch, jax.random.fold_in(key, 1))
            latents = jnp.concatenate([generated, codec.encode(images[self.generated :])])
        if self.config.crop:
            images, latents = self._crops(images, latents, key)
        target = images if self.config.target == "image" else codec.decode(latents)
        return {"latent": latents, "image": target}

    def _generate(self, generator: FlowMatching, frozen: Tree, batch: Tree, key: jax.Array) -> jax.Array:
        """Latents of the first captions of a batch."""
        captions = {name: batch[name][: self.generated] for name in ("tokens", "mask")}
        keys = jax.random.split(key, self.generated)
        size = batch["image"].shape[1:3]
        weights = {"model": frozen["generator"]}
        return generator.generate(weights, {"codec": frozen["codec"]}, captions, keys, image_size=size)["latent"]

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
