"""SnapGen's decoder (Hu et al. 2025, section 3.2): a tiny decoder learns to decode what a frozen encoder encodes.

    L = (x - D(z))^2 + LPIPS(x, D(z)) + a L_G(D(z)),   z = E(x)

x is the image, or what the frozen large decoder makes of z, and then z may also come from a trained generator. There is
no divergence: the latents are given. It learns on random crops of latent and image.

SnapFusion (Li et al. 2023, section 3.3) has the squared error alone, latents of its generator alone, and for a decoder
the large one with half of its channels (`networks/pruned.py`), which starts from weights of the large one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec, prefixed, subtree
from snapgen_jax.networks.codec import CodecConfig, build_codec, from_uint8
from snapgen_jax.networks.module import Network, Platform, apply, build, flatten, for_platform
from snapgen_jax.networks.pruned import PrunedDecoderConfig, pruned
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.networks.tiny_decoder import TinyDecoderCodec, TinyDecoderConfig
from snapgen_jax.recipes._assembly import Specs, merged_specs, specs_of
from snapgen_jax.recipes._reconstruction import Reconstruction, ReconstructionConfig
from snapgen_jax.recipes._run import check_output, run_config
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Use
from snapgen_jax.training.state import TrainState
from snapgen_jax.weights.frozen import check_weights, load_run

Tree = Any
ROLE, GENERATOR, WHOLE = "decoder", "generator", "autoencoder"


@dataclasses.dataclass(frozen=True)
class DecoderDistillationConfig(ReconstructionConfig):
    """Training of a tiny decoder; the common fields are those of `ReconstructionConfig`. The codec of its `inputs` is
    the frozen autoencoder whose latents it decodes.

    Attributes:
        decoder: the network: a tiny one, or the large one with fewer channels. The latter, whose `autoencoder` is that
            of the codec, takes its first weights from a run of the recipe `autoencoder` that `init_from` names.
        target: what it should make: the "image" itself, or what the "large" decoder makes of the latent.
        crop: side in pixels of the random crops that it learns on; 0 for whole images.
        generator_workdir: a run of `flow_matching`, or of a method built on it, on latents of this codec: some of the
            latents are then drawn by it from conditions of the batch. They have no image, so `target` must be "large".
        generator: that run's network, inputs and sampler; image sizes and codec are taken from the decoder's inputs.
        generated_share: of a batch, the latents that the generator draws.
    """

    inputs: ImagesConfig = ImagesConfig(codec=CodecConfig("autoencoder"))
    decoder: TinyDecoderConfig | PrunedDecoderConfig = TinyDecoderConfig.preset("shapes")
    target: Literal["image", "large"] = "image"
    crop: int = 0
    generator_workdir: str = ""
    generator: FlowMatchingConfig = FlowMatchingConfig()
    generated_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, crop=at_least(0), generated_share=SHARE)


class DecoderDistillation(Reconstruction):
    """See the top of this file. Implements `training.recipe.Recipe`; the model is `{"decoder"}`."""

    Config = DecoderDistillationConfig
    last_layer = (ROLE, "conv_out", "kernel")

    def __init__(self, config: DecoderDistillationConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the codec is none that a tiny decoder can decode, or a size or the generator does not fit.
        """
        self.decoder, _ = build(for_platform(config.decoder, platform))
        self.model = {ROLE: self.decoder}
        super().__init__(config, platform)
        codec, sizes = config.inputs.codec, config.inputs.image_sizes
        if (codec.kind, codec.decoder) != ("autoencoder", "autoencoder"):
            raise ConfigError(
                f"inputs.codec.kind={codec.kind!r} with decoder={codec.decoder!r}: a tiny decoder learns from an "
                "autoencoder with a decoder of its own; set both to 'autoencoder'"
            )
        both = dataclasses.replace(codec, decoder="tiny", tiny_decoder=config.decoder)
        build_codec(both, platform)  # raises where the two decoders do not take the same latents
        if isinstance(config.decoder, PrunedDecoderConfig) and config.decoder.autoencoder != codec.autoencoder:
            raise ConfigError(
                "decoder.autoencoder differs from inputs.codec.autoencoder, whose decoder it prunes: make them equal"
            )
        for size in sizes:
            if config.crop > min(size):
                raise ConfigError(f"crop={config.crop} is larger than an image of {size[0]} x {size[1]} px; change one")
        if config.crop:
            self.inputs.latent_shape((config.crop, config.crop))
        self.generator, self.generated = None, round(config.generated_share * config.batch_size)
        if config.generator_workdir:
            self._check_generator()
            inputs = dataclasses.replace(config.generator.inputs, image_sizes=sizes, codec=codec)
            generator = dataclasses.replace(config.generator, inputs=inputs, batch_size=config.batch_size)
            self.generator = FlowMatching(generator, platform)

    def _check_generator(self) -> None:
        config = self.config
        if config.target != "large":
            raise ConfigError(
                "a generated latent has no image that it came from; with generator_workdir set target='large'"
            )
        if (kind := config.generator.inputs.kind) in ("stored", "stored_clip_captions", "stored_encodings"):
            raise ConfigError(f"the generator draws from conditions of the batch; its inputs cannot be {kind!r}")
        if not 0 < self.generated <= config.batch_size:
            raise ConfigError(
                f"generated_share={config.generated_share} of a batch of {config.batch_size} is {self.generated} "
                "latents; choose a share between 0 and 1 that makes at least one, or leave generator_workdir out"
            )

    # --- networks and shapes ---

    def networks(self) -> dict[str, Network]:
        """As for every decoder, and the generator's; it decodes nothing."""
        return {**super().networks(), **prefixed(GENERATOR, self._drawing())}

    def _drawing(self) -> dict[str, Network]:
        """The generator's networks, without a codec."""
        if self.generator is None:
            return {}
        codec = self.inputs.networks()
        return {role: network for role, network in self.generator.networks().items() if role not in codec}

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Reads the autoencoder, the perceptual distance and, to train, the generator."""
        frozen = super().load_frozen(mesh, use)
        if self.generator is None or use == "generate":
            return frozen
        return {**frozen, **prefixed(GENERATOR, self._load_generator(self.generator, mesh))}

    def _load_generator(self, generator: FlowMatching, mesh: Mesh | None) -> Tree:
        """The weights of the generator's run, and its frozen text encoder where it has one."""
        config, networks = generator.config, self._drawing()
        workdir = self.config.generator_workdir
        check_output(workdir, run_config(workdir), config.prediction, config.schedule, "generator.")
        elsewhere = tuple(role for role in generator.inputs.pretrained() if role in networks)
        spec = specs_of(networks, [role for role in networks if role not in elsewhere])
        held = load_run(workdir, spec, mesh=mesh, rules=rules_of(networks))
        return {**held, **generator.inputs.load(elsewhere, mesh)}

    def batch_specs(self) -> Specs:
        """Those of the inputs, and of the generator's conditions."""
        own = super().batch_specs()
        return own if self.generator is None else merged_specs(own, self.generator.batch_specs())

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """The generator's, which goes with its run."""
        if self.generator is None:
            return super().tokenizers()
        specs = self.generator.tokenizers().items()
        return {name: dataclasses.replace(spec, workdir=self.config.generator_workdir) for name, spec in specs}

    # --- training ---

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """From an earlier run of the same decoder; a pruned one also from the autoencoder that it prunes."""
        config, model = self.config.decoder, earlier.get("model", {})
        if not isinstance(config, PrunedDecoderConfig) or WHOLE not in model:
            return super().warm_start(state, earlier)
        check_weights("the run in init_from", flatten(build(config.autoencoder)[1]), flatten(model[WHOLE]))
        return super().warm_start(state, {"model": {ROLE: pruned(config, model[WHOLE])}})

    def draw(self, networks: Tree, batch: Tree, key: jax.Array) -> Tree:
        """Latents and the images to be made of them, cropped alike; no gradient passes here."""
        codec, images = self.inputs.codec(networks), from_uint8(batch["image"])
        if self.generator is None:
            latents = codec.encode(images)
        else:
            latents = self._generate(self.generator, networks, batch, jax.random.fold_in(key, 1))
            if self.generated < self.config.batch_size:
                latents = jnp.concatenate([latents, codec.encode(images[self.generated :])])
        if self.config.crop:
            images, latents = self._crops(images, latents, key)
        target = images if self.config.target == "image" else codec.decode(latents)
        return {"latent": latents, "image": target}

    def _generate(self, generator: FlowMatching, networks: Tree, batch: Tree, key: jax.Array) -> jax.Array:
        """Latents of the first conditions of a batch."""
        conditions = {name: batch[name][: self.generated] for name in generator.conditions()}
        keys = jax.random.split(key, self.generated)
        options = dataclasses.replace(generator.options, image_size=batch["image"].shape[1:3])
        drawing = subtree(networks, GENERATOR)
        params = {"model": {role: drawing[role] for role in generator.trains["model"]}}
        frozen = {**drawing, **{role: networks[role] for role in self.inputs.networks()}}
        return generator.generate(params, frozen, conditions, keys, options)["latent"]

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

    def make(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, dict[str, tuple[float, jax.Array]], Tree]:
        """The decoded latents."""
        return apply(self.decoder, networks[ROLE], drawn["latent"]), {}, ()

    def decoders(self, networks: Tree, images: jax.Array) -> dict[str, jax.Array]:
        """The large decoder and the tiny one, on the same latents."""
        codec = self.inputs.codec(networks)
        latents = codec.encode(images)
        return {"large": codec.decode(latents), "tiny": apply(self.decoder, networks[ROLE], latents)}

    def codec(self, params: Tree, frozen: Tree) -> TinyDecoderCodec:
        """Encodes as the frozen encoder does, and decodes as the tiny decoder does."""
        networks = self.weights(params, frozen)
        return TinyDecoderCodec(self.decoder, networks[ROLE], self.inputs.codec(networks))


RECIPE = DecoderDistillation
