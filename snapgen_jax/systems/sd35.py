"""Stable Diffusion 3.5 (Esser et al. 2024, arXiv 2403.03206): three text encoders, an MMDiT and an autoencoder.

The folder is that of the Hugging Face repository; which of the three sizes it holds is read from its `config.json`s:

    transformer/  vae/  text_encoder/ (CLIP-L)  text_encoder_2/ (CLIP-bigG)  text_encoder_3/ (T5-XXL)
    tokenizer/  tokenizer_2/  tokenizer_3/

T5 may be missing, as in the reference: its states are zeros then, and long prompts are followed less well.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import FINITE, above, at_least, check
from snapgen_jax.diffusion.guidance import ALL_TIMES, check_interval, guided_times, with_guidance
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.stages import Stages
from snapgen_jax.diffusion.timesteps import shift_time
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.context import sd3_context
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Platform, apply
from snapgen_jax.networks.t5 import T5Config
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.parallel.mesh import MeshConfig
from snapgen_jax.systems.published import NetworkConfigs, Part, System, check_size, read_parts
from snapgen_jax.weights.maps import clip as clip_map
from snapgen_jax.weights.maps import sd3_autoencoder, sd3_mmdit
from snapgen_jax.weights.maps import t5 as t5_map

Tree = Any
PARTS = {
    "transformer": Part("transformer", sd3_mmdit, "sd35_large"),
    "autoencoder": Part("vae", sd3_autoencoder, "sd3_vae"),
    "clip_l": Part("text_encoder", clip_map, "clip_l"),
    "clip_g": Part("text_encoder_2", clip_map, "clip_g"),
    "t5": Part("text_encoder_3", t5_map, "t5_xxl", optional=True),
}
# The fields of a transformer that tell the sizes apart.
_TELLING = ("depth", "dual", "heads", "head_dim", "latent_channels", "context_width")
TOKENIZERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}


@dataclasses.dataclass(frozen=True)
class SD35Config:
    """How to use a Stable Diffusion 3.5.

    Attributes:
        size: which of the published ones; the weights of another size are refused.
        image_size: (height, width) in pixels.
        steps, guidance, shift: of the sampler (Euler). Guidance of 1 or less is none.
        guidance_interval: (t_low, t_high): the times at which to guide; (0, 1) for all.
        t5_tokens: length of the texts for T5.
        dtype: of the parameters and the arithmetic; "auto" is bfloat16 on accelerators and float32 on CPU.
        mesh: how the parameters are split.
    """

    system: Literal["sd35"] = "sd35"
    size: Literal["sd35_large", "sd35_large_turbo", "sd35_medium", "any"] = "sd35_large"
    image_size: tuple[int, int] = (1024, 1024)
    steps: int = 28
    guidance: float = 3.5
    guidance_interval: tuple[float, float] = ALL_TIMES
    shift: float = 3.0
    t5_tokens: int = 256
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)

    def __post_init__(self) -> None:
        check(self, image_size=at_least(1), steps=at_least(1), guidance=FINITE, shift=above(0), t5_tokens=at_least(1))
        check_interval(self.guidance_interval)


def published_configs(size: str) -> NetworkConfigs:
    """The configs of the networks of a published size, without a file."""
    return {
        "transformer": MMDiTConfig.preset(size),
        "autoencoder": AutoencoderConfig.preset("sd3"),
        "clip_l": ClipTextConfig.preset("clip_l"),
        "clip_g": ClipTextConfig.preset("clip_g"),
        "t5": T5Config.preset("xxl"),
    }


def read_configs(folder: pathlib.Path) -> NetworkConfigs:
    """The configs of the networks in a folder; T5's is missing where its folder is.

    Raises:
        WeightsError: a part is missing, or is of a kind that our networks are not.
    """
    return read_parts(folder, PARTS, "Stable Diffusion 3.5")


def reference_times(steps: int, shift: float) -> np.ndarray:
    """Times `[steps + 1]` float32 of Stable Diffusion 3's Euler sampler, from 1 to 0.

    They differ from `time_grid` at the end: the reference spaces its times evenly down to the shifted 1/1000, shifts
    them (a second time), and then goes to 0.
    """
    last = shift_time(1e-3, shift)
    return np.append(shift_time(np.linspace(1.0, last, steps), shift), 0.0).astype(np.float32)


class SD35(System):
    """The system without its parameters, which are an argument everywhere: `{part: tree}`; "t5" may be missing."""

    Config = SD35Config
    PARTS = PARTS
    TOKENIZERS = TOKENIZERS

    def __init__(self, config: SD35Config, networks: NetworkConfigs | None = None, platform: Platform = "cpu"):
        """`networks`: their configs, by default those of the published size."""
        if networks is None:
            if config.size == "any":
                raise ValueError("size='any' takes its networks from a folder; give a published size, or --weights")
            networks = published_configs(config.size)
        elif config.size != "any":
            expected = MMDiTConfig.preset(config.size)
            check_size("transformer", config.size, networks["transformer"], expected, _TELLING)
        super().__init__(config, networks, platform)

    @classmethod
    def from_folder(cls, config: SD35Config, folder: pathlib.Path, platform: Platform) -> SD35:
        """The system of the networks that a folder describes."""
        return cls(config, read_configs(folder), platform)

    def lengths(self) -> dict[str, int]:
        """As `System.lengths`."""
        return {"t5": self.config.t5_tokens}

    def _source(self, name: str) -> str:
        return self.config.size if name == "transformer" and self.config.size != "any" else super()._source(name)

    def encode_text(self, params: Tree, tokens: dict[str, jax.Array]) -> TextContext:
        """`{encoder: [B, L] int32}` -> what the MMDiT attends to. Without T5 its states are zeros."""

        def encode(name: str) -> TextContext:
            # Without a mask: Stable Diffusion lets T5 attend to the padding, and CLIP is causal.
            return apply(self.networks[name], params[name], tokens[name], jnp.ones(tokens[name].shape))

        b = tokens["clip_l"].shape[0]
        if "t5" in self.networks:
            language = encode("t5")
        else:
            length, width = self.config.t5_tokens, self.networks["transformer"].config.context_width
            language = TextContext(jnp.zeros((b, length, width)), jnp.ones((b, length)), jnp.zeros((b, 0)))
        return sd3_context(encode("clip_l"), encode("clip_g"), language)

    def velocity(self, params: Tree, x_t: jax.Array, t: jax.Array, context: TextContext, **options: Any) -> Any:
        """Velocity `[B, h, w, c]` at `x_t` `[B, h, w, c]` and `t` `[B]`, and the taps asked for by `taps`."""
        network = self.networks["transformer"]
        features = time_features(t, network.config.time_width)
        return apply(network, params["transformer"], x_t, features, context, **options)

    def unit(self) -> int:
        """As `System.unit`: the autoencoder's reduction times the patch."""
        return self.networks["autoencoder"].config.reduction * self.networks["transformer"].config.patch

    def stages(self) -> Stages:
        """As `System.stages`."""
        config = self.config
        # As in the reference, where a scale of 1 or less means no guidance.
        scale = config.guidance if config.guidance > 1 else 1
        times = reference_times(config.steps, config.shift)
        when = None if scale == 1 else guided_times(times, config.guidance_interval)

        def encoders(params: Tree, given: Tree) -> Tree:
            context = self.encode_text(params, given["tokens"])
            null = self.encode_text(params, given["null"]) if scale != 1 else context
            return {"noise": given["noise"], "context": context, "null": null}

        def steps(params: Tree, given: Tree) -> jax.Array:
            def denoise(
                x_t: jax.Array, t: jax.Array, i: jax.Array, carry: Any, c: TextContext
            ) -> tuple[jax.Array, Any]:
                del i
                return self.velocity(params, x_t, t, c)[0], carry

            guided = with_guidance(denoise, given["context"], given["null"], scale, when)
            return sample(guided, given["noise"], times)[0]

        return {"encoders": encoders, "steps": steps, "decoder": self.decoder}


SYSTEM = SD35
