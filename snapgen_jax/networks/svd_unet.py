"""The UNet of Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127): Stable Diffusion's, over clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.module import compute_dtype, shard
from snapgen_jax.networks.sd_blocks import Conditions
from snapgen_jax.networks.sd_unet import SDUNet, Way, check_inputs
from snapgen_jax.networks.sd_unet_config import SDUNetArchitecture
from snapgen_jax.networks.svd_blocks import SpaceTimeResidualBlock, SpaceTimeTransformer
from snapgen_jax.networks.taps import Reuse, Taps
from snapgen_jax.networks.text import TextContext, denoiser_spec

__all__ = ["SVDUNet", "SVDUNetConfig"]


@dataclasses.dataclass(frozen=True)
class SVDUNetConfig(SDUNetArchitecture):
    """Architecture of an `SVDUNet`; `sd_unet_config.SDUNetArchitecture` says what each field is.

    The defaults are the published ones. The input has the noisy latent and that of the first frame, one after the
    other; `context_width` is that of an image's embedding, and the pooled vector holds the features of frame rate,
    amount of motion and strength of the noise on the first frame.
    """

    latent_channels: int = 8
    heads: tuple[int, ...] = (5, 10, 20, 20)
    context_width: int = 1024
    pooled_width: int = 768
    projection: Literal["conv", "linear"] = "linear"
    kind: Literal["svd_unet"] = "svd_unet"

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "svd": {},
        "smoke": {
            "channels": (16, 32),
            "down": (("ra",), ("r",)),
            "up": (("ra", "ra"), ("r", "r")),
            "heads": (2, 2),
            "depth": (1, 1),
            "context_width": 24,
            "pooled_width": 12,
            "time_width": 16,
            "groups": 4,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection != "linear" or self.text_mask != "ignore":
            raise ValueError("SVDUNetConfig: the projections of this UNet are linear, and its context has no mask")

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the UNet with freshly drawn parameters."""
        return SVDUNet(self, rngs)

    def input_spec(
        self, batch: int = 1, height: int = 72, width: int = 128, tokens: int = 1, frames: int = 14
    ) -> tuple[Any, Any, TextContext]:
        """`ShapeDtypeStruct`s of the positional arguments: latents, time features, context. `height` and `width` are
        the latent's."""
        return denoiser_spec(self, batch, (frames, height, width), tokens)


class SVDUNet(SDUNet):
    """What a video diffusion model predicts of a noisy clip. Build it through `networks.module.build`.

    It is entered in parts as an `SDUNet` is, with the frames folded into the batch.
    """

    def _residual(self, in_width: int, width: int, way: Way, attends: bool, rngs: nnx.Rngs) -> nnx.Module:
        config = self.config
        epsilon = 1e-6 if way == "up" or (way == "down" and attends) else 1e-5  # as the weights were trained
        return SpaceTimeResidualBlock(
            in_width, width, config.embedding_width, groups=config.groups, epsilon=epsilon,
            dtype=compute_dtype(config), rngs=rngs,
        )  # fmt: skip

    def _transformer(self, stage: int, rngs: nnx.Rngs) -> nnx.Module:
        config = self.config
        return SpaceTimeTransformer(config, config.channels[stage], config.heads[stage], config.depth[stage], rngs)

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        context: TextContext,
        *,
        taps: Sequence[str] = (),
        reuse: Mapping[str, Reuse | jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Predicts what the network was trained to, for every frame.

        Args:
            x: `[B, F, H, W, latent_channels]`; H and W multiples of `config.reduction`.
            time: `[B, time_width]` from `time_features` of the native time.
            context: sequence `[B, L, context_width]`, mask `[B, L]`, pooled `[B, pooled_width]`, of the whole clip.
            taps: names of intermediates to return; `config.tap_names()` lists them.
            reuse: intermediates to use in place of the network's own, always or where `Reuse.run` says.

        Returns:
            output: `[B, F, H, W, out_channels]` float32.
            intermediates: `{name: [B * F, h, w, c]}` in the compute dtype.

        Raises:
            ValueError: a shape does not fit the config, or a name is unknown.
        """
        check_inputs(self.config, x, time, context)
        clips, frames = x.shape[:2]
        tap = Taps(self.config.tap_names(), taps, reuse)
        conditions = self.for_frames(self.condition(time, context), frames)
        folded = x.reshape(clips * frames, *x.shape[2:])
        output, found = self._predict(folded, conditions, tap)
        return output.reshape(clips, frames, *output.shape[1:]), found

    def for_frames(self, conditions: Conditions, frames: int) -> Conditions:
        """The conditions of clips as those of their frames, one after the other."""
        return Conditions(
            shard(jnp.repeat(conditions.embedding, frames, axis=0), "vector"),
            shard(jnp.repeat(conditions.states, frames, axis=0), "tokens"),
            frames=frames,
        )
