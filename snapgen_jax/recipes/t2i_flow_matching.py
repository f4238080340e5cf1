"""Flow matching from images and captions, which frozen encoders read inside the step: the autoencoder of Stable
Diffusion 3, CLIP-L, CLIP-bigG and Gemma-2-2b (SnapGen, arXiv 2412.09619, section 3.1).

The loss is that of `flow_matching`. One player, "model", holds the `unet` and the `conditioner`, which joins the three
encodings of a caption; the encoders are arguments of the step, in the dtype in which they compute, and split over the
`fsdp` axis of the mesh. Each is left out of an example now and then, independently, so that the UNet draws from any of
them, and without guidance from none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.diffusion.timesteps import TimestepConfig
from snapgen_jax.evaluation.interfaces import EvaluationConfig
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig, build_codec
from snapgen_jax.networks.context import ENCODERS, ConditionerConfig, draw_kept
from snapgen_jax.networks.gemma2 import Gemma2Config
from snapgen_jax.networks.module import Platform, apply, build, for_platform, init
from snapgen_jax.networks.module import frozen_spec as spec_of
from snapgen_jax.networks.rules import within
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, SamplingConfig
from snapgen_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from snapgen_jax.training.recipe import ExportPlan
from snapgen_jax.training.state import TrainState
from snapgen_jax.weights.frozen import draw_stand_ins, load_codec, load_text_encoder

Tree = Any
PUBLISHED = {"clip_l": "clip_l", "clip_g": "clip_g", "language": "gemma2_2b"}  # encoder -> whose weights it has


@dataclasses.dataclass(frozen=True)
class EncodersConfig:
    """The text encoders, and where their published weights are.

    Attributes:
        clip_l, clip_g, language: the networks.
        clip_l_folder, clip_g_folder, language_folder: local folders of their safetensors files.
        clip_l_tokenizer, clip_g_tokenizer, language_tokenizer: local folders of their tokenizers.
        language_tokens: length of a caption for the language model.
        stand_ins: draws the encoders and the autoencoder instead of reading them. A run then shows speed and memory,
            and trains nothing of use.
    """

    clip_l: ClipTextConfig = ClipTextConfig.preset("clip_l")
    clip_g: ClipTextConfig = ClipTextConfig.preset("clip_g")
    language: Gemma2Config = Gemma2Config.preset("gemma2_2b")
    clip_l_folder: str = ""
    clip_g_folder: str = ""
    language_folder: str = ""
    clip_l_tokenizer: str = ""
    clip_g_tokenizer: str = ""
    language_tokenizer: str = ""
    language_tokens: int = 128
    stand_ins: bool = False


@dataclasses.dataclass(frozen=True)
class T2IFlowMatchingConfig:
    """Flow matching of a text-conditional UNet on images, with frozen encoders.

    Attributes:
        batch_size, microbatches, train_steps, image_sizes: as for `flow_matching`.
        unet, timesteps, optimizer, ema_decay, sampling, evaluation: as for `flow_matching`.
        encoders: of captions.
        conditioner: joins what they say.
        codec: the autoencoder; `codec.workdir` names the folder of its weights.
        encoder_dropout: share of examples from which an encoder is left out; three at 0.464 leave one example in ten
            without any (Esser et al. 2024, section 5.3.3).
    """

    batch_size: int = 256
    microbatches: int = 1
    train_steps: int = 100_000
    image_sizes: tuple[tuple[int, int], ...] = ((256, 256),)
    unet: UNetConfig = UNetConfig.preset("t2i")
    encoders: EncodersConfig = EncodersConfig()
    conditioner: ConditionerConfig = ConditionerConfig.preset("t2i")
    codec: CodecConfig = CodecConfig(kind="autoencoder", autoencoder=AutoencoderConfig.preset("sd3"))
    timesteps: TimestepConfig = TimestepConfig()
    encoder_dropout: float = 0.464
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.9999
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


class T2IFlowMatching(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`; what it shares with pixels it inherits."""

    Config = T2IFlowMatchingConfig

    def __init__(self, config: T2IFlowMatchingConfig, platform: Platform):
        """`platform` is the one compiled for; it fixes compute dtype and form of the depthwise convolution.

        Raises:
            ValueError: the widths of the networks do not fit each other, or an image size the autoencoder.
        """
        self.config: Any = config
        _check_widths(config)
        self.codec: Any = build_codec(config.codec, platform)
        self.network_name, self.network_config, self.text_workdir = "unet", config.unet, ""
        self.network, self.network_spec = build(for_platform(config.unet, platform))
        self.conditioner, _ = build(for_platform(config.conditioner, platform))
        self.encoders = {name: build(for_platform(getattr(config.encoders, name), platform))[0] for name in ENCODERS}
        self.optimizer: optax.GradientTransformation = make_optimizer(config.optimizer, config.train_steps)
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)
        self.prediction, self.full_from = "velocity", 0.0
        self.batch_specs()  # an image size that does not divide is refused here

    # --- shapes ---

    def batch_specs(self) -> dict[str, Tree]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`; token ids int32 `clip_l` and `clip_g` `[B, 77]` and
        `language` `[B, M]`, each by the tokenizer of its encoder; `language_mask` float32 `[B, M]`."""
        config, b = self.config, self.config.batch_size
        encoders = config.encoders
        lengths = (encoders.clip_l.max_tokens, encoders.clip_g.max_tokens, encoders.language_tokens)
        tokens = {name: jax.ShapeDtypeStruct((b, n), jnp.int32) for name, n in zip(ENCODERS, lengths, strict=True)}
        mask = jax.ShapeDtypeStruct((b, encoders.language_tokens), jnp.float32)
        specs = {}
        for h, w in config.image_sizes:
            self.codec.latent_shape((h, w))
            specs[f"{h}x{w}"] = {
                "image": jax.ShapeDtypeStruct((b, h, w, 3), jnp.uint8),
                **tokens,
                "language_mask": mask,
            }
        return specs

    @property
    def tokenizer_folders(self) -> dict[str, str]:
        """{array of a batch: folder of the tokenizer that makes it}, of `config.encoders`."""
        return {name: getattr(self.config.encoders, f"{name}_tokenizer") for name in ENCODERS}

    @property
    def vocab_sizes(self) -> dict[str, int]:
        """{array of a batch: how many token ids its encoder knows}."""
        return {name: getattr(self.config.encoders, name).vocab_size for name in ENCODERS}

    def init(self, key: jax.Array) -> TrainState:
        """Draws the UNet and the conditioner."""
        unet_key, conditioner_key = jax.random.split(key)
        params = {"unet": init(self.network, unet_key), "conditioner": init(self.conditioner, conditioner_key)}
        return TrainState(jnp.int32(0), jnp.int32(0), {"model": self._new_player(params)}, {})

    def frozen_spec(self) -> Tree:
        """`{"clip_l", "clip_g", "language", "codec"}`, in the dtypes in which they compute."""
        return {**{name: spec_of(network) for name, network in self.encoders.items()}, "codec": self.codec.spec()}

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Reads the encoders of `config.encoders` and the autoencoder of `config.codec` onto the mesh, slice by slice.

        Raises:
            ValueError: a folder is not named, or holds another network.
        """
        encoders = self.config.encoders
        if encoders.stand_ins:
            return draw_stand_ins({**self.encoders, "codec": self.codec.network}, self.rules(), mesh)
        frozen = {
            name: load_text_encoder(network, PUBLISHED[name], getattr(encoders, f"{name}_folder"), mesh)
            for name, network in self.encoders.items()
        }
        return {**frozen, "codec": load_codec(self.config.codec, self.codec, mesh)}

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the networks."""
        return [
            *within("unet", self.network_config.rules()),
            *within("conditioner", self.conditioner.config.rules()),
            *(rule for name, network in self.encoders.items() for rule in within(name, network.config.rules())),
            *within("codec", self.codec.network.config.rules()),
        ]

    # --- training ---

    def encode(self, frozen: Tree, batch: Tree) -> dict[str, TextContext]:
        """What each encoder makes of its tokens. Every position of a CLIP counts: it was trained to see 77."""
        masks = {name: jnp.ones(batch[name].shape, jnp.float32) for name in ("clip_l", "clip_g")}
        masks["language"] = batch["language_mask"]
        return {name: apply(network, frozen[name], batch[name], masks[name]) for name, network in self.encoders.items()}

    def condition(self, params: Tree, drawn: Tree) -> TextContext:
        """What the UNet attends to, of encoded captions."""
        encoded = (drawn[name] for name in ENCODERS)
        return apply(self.conditioner, params["conditioner"], *encoded, kept=drawn.get("kept"))

    def clean_latents(self, frozen: Tree, batch: Tree) -> jax.Array:
        """What the autoencoder makes of the images."""
        return super().clean_latents(frozen, batch).astype(jnp.float32)

    def draw_condition(self, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        """What the encoders make of the captions, and which of them each example keeps."""
        kept = draw_kept(key, len(batch["image"]), self.config.encoder_dropout)
        return {"kept": kept, **self.encode(frozen, batch)}

    def validation_batch(self, frozen: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
        """The clean latents `[B, h, w, c]` of a batch, and its encoded captions."""
        return self.clean_latents(frozen, batch), self.encode(frozen, batch)

    # --- use ---

    def contexts(self, params: Tree, conditions: Tree) -> tuple[TextContext, TextContext]:
        """What the UNet attends to of B captions, the token ids and mask of `batch_specs`, and of one from which all
        encoders are left out."""
        encoded = self.encode(params, conditions)
        first = jax.tree.map(lambda x: x[:1], encoded)
        none = {name: jnp.zeros(1) for name in ENCODERS}
        return self.condition(params, encoded), self.condition(params, {**first, "kept": none})

    def exports(self) -> ExportPlan:
        """A phone does not hold encoders of this size.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError(
            "the text encoders of this run are too large for a bundle; export a run of `flow_matching`, which trains a "
            "small one"
        )


def _check_widths(config: T2IFlowMatchingConfig) -> None:
    encoders, conditioner, network = config.encoders, config.conditioner, config.unet
    clips = encoders.clip_l, encoders.clip_g
    states, pooled = (sum(widths) for widths in zip(*((c.width, c.projection or c.width) for c in clips), strict=True))
    for what, expected, given, name in (
        ("the CLIP states together", states, conditioner.width, "conditioner.width"),
        ("the pooled CLIP texts", pooled, network.pooled_width, "unet.pooled_width"),
        ("Gemma's states", encoders.language.width, conditioner.language_width, "conditioner.language_width"),
        ("the context", conditioner.width, network.context_width, "unet.context_width"),
    ):
        if expected != given:
            raise ValueError(f"{what} are {expected} wide, but {name} is {given}; make them equal")
    if config.codec.kind != "autoencoder":
        raise ValueError(f"codec.kind is {config.codec.kind!r}; this recipe encodes images by an 'autoencoder'")
    channels = build_codec(config.codec).latent_shape(config.image_sizes[0])[-1]
    if channels != config.unet.latent_channels:
        raise ValueError(
            f"the codec gives {channels} latent channels and unet.latent_channels is {config.unet.latent_channels}; "
            "make them equal"
        )


RECIPE = T2IFlowMatching
