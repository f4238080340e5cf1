"""Stable Diffusion 1, 2 (Rombach et al. 2022, arXiv 2112.10752) and XL (Podell et al. 2023, arXiv 2307.01952).

The folder is that of the Hugging Face repository; which of them it holds is read from its `config.json`s, and how it
was trained from `scheduler/scheduler_config.json`:

    unet/  vae/  scheduler/  text_encoder/  tokenizer/  and of XL text_encoder_2/  tokenizer_2/

There is one sampler: a DDIM step, and an Euler step over sigma, is the Euler step of the straight path (see
`diffusion.schedules`). The grid ends in the data.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import FINITE, at_least, check
from snapgen_jax.diffusion.guidance import ALL_TIMES, check_interval, guided_times, with_guidance
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.stages import Stages
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.module import Platform, apply
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.parallel.mesh import MeshConfig
from snapgen_jax.systems.denoiser import Denoiser
from snapgen_jax.systems.published import (
    NetworkConfigs,
    Part,
    System,
    Training,
    check_size,
    read_parts,
    read_training,
)
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.maps import clip as clip_map
from snapgen_jax.weights.maps import sd3_autoencoder, sd_unet

Tree = Any


def _read_text_encoder(values: Mapping[str, Any], **changes: Any) -> ClipTextConfig:
    """The config of a text encoder. One alone has no projection; its states are the last, after the final norm."""
    found = clip_map.read_config(values, **changes)
    projected = "CLIPTextModelWithProjection" in values.get("architectures", ())
    return found if projected else dataclasses.replace(found, projection=None)


_TEXT: Any = SimpleNamespace(read_config=_read_text_encoder, weight_map=clip_map.read_map)
PARTS = {
    "unet": Part("unet", sd_unet, "sd15"),
    "autoencoder": Part("vae", sd3_autoencoder, "sd15"),
    "clip": Part("text_encoder", _TEXT, "sd15"),
    "clip_g": Part("text_encoder_2", _TEXT, "sdxl", optional=True),
}
# The fields of a UNet that tell the sizes apart.
TELLING = ("channels", "down", "depth", "context_width", "pooled_width", "latent_channels")
TOKENIZERS = {"clip": "tokenizer", "clip_g": "tokenizer_2"}


@dataclasses.dataclass(frozen=True)
class SDConfig:
    """How to use a Stable Diffusion.

    Attributes:
        size: which of the published ones; the weights of another size are refused.
        image_size: (height, width) in pixels.
        steps, guidance: of the sampler. Guidance of 1 or less is none.
        guidance_interval: (t_low, t_high): the times at which to guide; (0, 1) for all.
        empty_is_zero: without a negative prompt guidance leads away from states of zeros, as XL was trained, and not
            from those of an empty text; "auto" is what the folder says.
        dtype: of the parameters and the arithmetic; "auto" is bfloat16 on accelerators and float32 on CPU.
        mesh: how the parameters are split.
    """

    system: Literal["sd"] = "sd"
    size: Literal["sd15", "sd21", "sdxl", "any"] = "sd15"
    image_size: tuple[int, int] = (512, 512)
    steps: int = 30
    guidance: float = 7.5
    guidance_interval: tuple[float, float] = ALL_TIMES
    empty_is_zero: Literal["auto", "yes", "no"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)

    def __post_init__(self) -> None:
        check(self, image_size=at_least(1), steps=at_least(1), guidance=FINITE)
        check_interval(self.guidance_interval)


def published_configs(size: str) -> NetworkConfigs:
    """The configs of the networks of a published size, without a file."""
    scale = 0.13025 if size == "sdxl" else 0.18215
    networks: NetworkConfigs = {
        "unet": SDUNetConfig.preset(size),
        "autoencoder": AutoencoderConfig.preset("sd1", scale=scale),
    }
    match size:
        case "sd15":
            networks["clip"] = ClipTextConfig.preset("sd15")
        case "sd21":  # OpenCLIP-H without its last layer
            changes = {"width": 1024, "heads": 16, "layers": 23, "activation": "gelu", "pad_id": 0}
            networks["clip"] = ClipTextConfig.preset("sd15", **changes)
        case _:
            networks["clip"] = ClipTextConfig.preset("clip_l", projection=None)
            networks["clip_g"] = ClipTextConfig.preset("clip_g")
    return networks


def published_training(size: str) -> Training:
    """How a published size was trained."""
    return Training(prediction="v" if size == "sd21" else "eps", empty_is_zero=size == "sdxl")


def read_configs(folder: pathlib.Path, size: str = "any") -> NetworkConfigs:
    """The configs of the networks in a folder; `size` is the published one that a message advises.

    Raises:
        WeightsError: a part is missing, or is of a kind that our networks are not.
    """
    configs = read_parts(folder, PARTS, "Stable Diffusion 1, 2 or XL", "" if size == "any" else size)
    if "clip_g" not in configs:
        configs["clip"] = dataclasses.replace(configs["clip"], output="last")
    widths = sum(configs[name].width for name in TOKENIZERS if name in configs)
    if widths != configs["unet"].context_width:
        raise WeightsError(
            f"{folder}: the UNet takes text states of width {configs['unet'].context_width}, and the text encoders "
            f"make {widths}; is a folder missing, or from another repository?"
        )
    return configs


class SD(System):
    """The system without its parameters, which are an argument everywhere: `{part: tree}`; "clip_g" is XL's alone."""

    Config = SDConfig
    PARTS = PARTS
    TOKENIZERS = TOKENIZERS

    def __init__(
        self,
        config: SDConfig,
        networks: NetworkConfigs | None = None,
        training: Training | None = None,
        platform: Platform = "cpu",
    ):
        """`networks`, `training`: by default those of the published size."""
        if networks is None:
            if config.size == "any":
                raise ValueError("size='any' takes its networks from a folder; give a published size, or --weights")
            networks = published_configs(config.size)
        elif config.size != "any":
            expected = SDUNetConfig.preset(config.size)
            check_size("UNet", config.size, networks["unet"], expected, TELLING)
        super().__init__(config, networks, platform)
        self.training = training or published_training(config.size)
        self.denoiser = Denoiser(self.networks["unet"], self.training.prediction, self.training.schedule)

    @classmethod
    def from_folder(cls, config: SDConfig, folder: pathlib.Path, platform: Platform) -> SD:
        """The system of the networks that a folder describes."""
        networks, training = read_configs(folder, config.size), read_training(folder)
        training.schedule.grid(config.steps)  # raises ValueError where there are not so many steps
        return cls(config, networks, training, platform)

    def _source(self, name: str) -> str:
        return "sdxl" if "clip_g" in self.networks else "sd15" if self.config.size == "any" else self.config.size

    def unit(self) -> int:
        """As `System.unit`: the autoencoder's reduction times the UNet's."""
        return self.networks["autoencoder"].config.reduction * self.networks["unet"].config.reduction

    def encode_text(self, params: Tree, tokens: dict[str, jax.Array]) -> TextContext:
        """`{encoder: [B, L] int32}` -> what the UNet attends to.

        Of XL the states of both encoders stand side by side, and the pooled vector is that of the second, followed by
        the features of six numbers: the size of the original, the corner of the crop and the size asked for (Podell et
        al. 2023, section 2.2), here of a picture that was neither scaled nor cropped.
        """
        return self._with_sizes(*self._states(params, tokens))

    def null_context(self, params: Tree, null: dict[str, jax.Array]) -> TextContext:
        """What guidance leads away from: the negative prompt, `{encoder: [1, L] int32}`, or zeros for an empty one."""
        states = self._states(params, null)
        if {"yes": True, "no": False, "auto": self.training.empty_is_zero}[self.config.empty_is_zero]:
            # Nothing stands between the begin and the end of an empty text.
            ends = [ids[0, 1] == self.networks[name].config.eos_id for name, ids in null.items()]
            states = tuple(jnp.where(jnp.stack(ends).all(), 0.0, array) for array in states)
        return self._with_sizes(*states)

    def _states(self, params: Tree, tokens: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """States `[B, L, D]` and pooled vectors `[B, P]` of texts; P is 0 but for XL."""
        texts = {
            name: apply(self.networks[name], params[name], ids, jnp.ones(ids.shape)) for name, ids in tokens.items()
        }
        states = texts["clip"].sequence
        if "clip_g" not in texts:
            return states, jnp.zeros((len(states), 0))
        second = texts["clip_g"]
        return jnp.concatenate([states, second.sequence], axis=-1), second.pooled

    def _with_sizes(self, states: jax.Array, pooled: jax.Array) -> TextContext:
        features = self.networks["unet"].config.pooled_width - pooled.shape[-1]
        if features:
            height, width = self.config.image_size
            numbers = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
            sizes = time_features(numbers, features // len(numbers), 1.0).reshape(1, -1)
            pooled = jnp.concatenate([pooled, jnp.broadcast_to(sizes, (len(pooled), features))], axis=-1)
        return TextContext(states, jnp.ones(states.shape[:2]), pooled)

    def stages(self) -> Stages:
        """As `System.stages`."""
        config, schedule = self.config, self.training.schedule
        grid = schedule.grid(config.steps)
        # As in the reference, where a scale of 1 or less means no guidance.
        scale = config.guidance if config.guidance > 1 else 1
        when = None if scale == 1 else guided_times(np.asarray(grid.t), config.guidance_interval)

        def encoders(params: Tree, given: Tree) -> Tree:
            context = self.encode_text(params, given["tokens"])
            null = self.null_context(params, given["null"]) if scale != 1 else context
            return {"noise": given["noise"], "context": context, "null": null}

        def steps(params: Tree, given: Tree) -> jax.Array:
            def denoise(
                x_t: jax.Array, t: jax.Array, i: jax.Array, carry: Any, c: TextContext
            ) -> tuple[jax.Array, Any]:
                del t
                return self.denoiser(params["unet"], x_t, grid.at(i, x_t.shape[0]), c)[0], carry

            guided = with_guidance(denoise, given["context"], given["null"], scale, when)
            return sample(guided, schedule.initial(given["noise"], grid), grid.t)[0]

        return {"encoders": encoders, "steps": steps, "decoder": self.decoder}


SYSTEM = SD
