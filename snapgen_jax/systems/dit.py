"""DiT (Peebles and Xie 2023, arXiv 2212.09748): class labels, a diffusion transformer and an autoencoder.

The folder is that of `facebook/DiT-XL-2-256` on the Hugging Face hub:

    transformer/  vae/  scheduler/  model_index.json (the names of the classes)

A prompt is a class: its number, or one of its names where the folder has them.
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
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.diffusion.stages import Stages
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.label import LabelEmbeddingConfig
from snapgen_jax.networks.module import Platform, apply
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.parallel.mesh import MeshConfig
from snapgen_jax.systems.published import (
    NetworkConfigs,
    Part,
    System,
    Training,
    check_size,
    read_parts,
    read_training,
)
from snapgen_jax.typed import closest
from snapgen_jax.weights.maps import dit as dit_map
from snapgen_jax.weights.maps import sd3_autoencoder
from snapgen_jax.weights.published import read_json

Tree = Any
_LABELS: Any = SimpleNamespace(read_config=dit_map.read_label_config, weight_map=dit_map.label_map)
PARTS = {
    "transformer": Part("transformer", dit_map, "dit_xl_2"),
    "labels": Part("transformer", _LABELS, "dit_xl_2"),
    "autoencoder": Part("vae", sd3_autoencoder, "dit_xl_2"),
}
_TELLING = ("depth", "heads", "head_dim", "patch", "latent_channels")


@dataclasses.dataclass(frozen=True)
class DiTSystemConfig:
    """How to use a DiT.

    Attributes:
        size: "xl_2", the published one, whose weights alone are taken; or "any".
        image_size: (height, width) in pixels.
        steps, guidance: of the sampler. Guidance of 1 or less is none.
        guided_channels: of the latent, which guidance moves; the others follow the class. The original guides three of
            four, and its tables are made so; 0 for all, as diffusers.
        guidance_interval: (t_low, t_high): the times at which to guide; (0, 1) for all.
        frequency_shift: of the time features: 0 as the weights were trained, 1 as diffusers asks them.
        dtype: of the parameters and the arithmetic; "auto" is bfloat16 on accelerators and float32 on CPU.
        mesh: how the parameters are split.
    """

    system: Literal["dit"] = "dit"
    size: Literal["xl_2", "any"] = "xl_2"
    image_size: tuple[int, int] = (256, 256)
    steps: int = 50
    guidance: float = 4.0
    guided_channels: int = 3
    guidance_interval: tuple[float, float] = ALL_TIMES
    frequency_shift: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)

    def __post_init__(self) -> None:
        check(self, image_size=at_least(1), steps=at_least(1), guidance=FINITE, guided_channels=at_least(0))
        check_interval(self.guidance_interval)


class DiTSystem(System):
    """The system without its parameters, which are an argument everywhere: `{part: tree}`."""

    Config = DiTSystemConfig
    PARTS = PARTS
    TOKENIZERS: Mapping[str, str] = {}

    def __init__(
        self,
        config: DiTSystemConfig,
        networks: NetworkConfigs | None = None,
        training: Training | None = None,
        names: Mapping[str, int] | None = None,
        platform: Platform = "cpu",
    ):
        """`networks`, `training`: by default the published ones. `names`: {name of a class: its number}."""
        if networks is None:
            networks = {
                "transformer": DiTConfig.preset("xl_2"),
                "labels": LabelEmbeddingConfig(width=1152),
                "autoencoder": AutoencoderConfig.preset("sd1"),
            }
        elif config.size == "xl_2":
            expected = DiTConfig.preset("xl_2")
            check_size("transformer", "DiT-XL/2", networks["transformer"], expected, _TELLING)
        super().__init__(config, networks, platform)
        self.training = training or Training.preset("dit")
        self.names = dict(names or {})

    @classmethod
    def from_folder(cls, config: DiTSystemConfig, folder: pathlib.Path, platform: Platform) -> DiTSystem:
        """The system of the networks that a folder describes."""
        networks, training = read_parts(folder, PARTS, "DiT"), read_training(folder)
        training.schedule.grid(config.steps)  # raises ValueError where there are not so many steps
        index, names = folder / "model_index.json", {}
        if index.is_file():
            for number, text in read_json(index).get("id2label", {}).items():
                names |= {name.strip().lower(): int(number) for name in str(text).split(",")}
        return cls(config, networks, training, names, platform)

    def unit(self) -> int:
        """As `System.unit`: the autoencoder's reduction times the patch."""
        return self.networks["autoencoder"].config.reduction * self.networks["transformer"].config.patch

    def tokens(self, prompts: list[str], tokenizers: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """`{"labels": [N] int32}`: of each prompt the number of its class, of an empty one that of none.

        Raises:
            ValueError: a prompt is no class.
        """
        del tokenizers
        classes = self.networks["labels"].config.classes
        return {"labels": np.asarray([self._label(prompt.strip().lower(), classes) for prompt in prompts], np.int32)}

    def _label(self, prompt: str, classes: int) -> int:
        if not prompt:
            return classes
        if prompt.isdecimal() and int(prompt) < classes:
            return int(prompt)
        if prompt in self.names:
            return self.names[prompt]
        known = "or a name of one" if self.names else "and this folder has no names of them"
        near = closest(prompt, self.names)
        raise ValueError(f"{prompt!r} is no class: a prompt is a number from 0 to {classes - 1}, {known}{near}")

    def stages(self) -> Stages:
        """As `System.stages`, of labels `[B]`."""
        config, schedule, network = self.config, self.training.schedule, self.networks["transformer"]
        grid = schedule.grid(config.steps)
        scale, when = 1, None
        if config.guidance > 1:
            channels = np.arange(network.config.latent_channels)
            guided = channels < (config.guided_channels or len(channels))
            scale = np.where(guided, config.guidance, 1.0).astype(np.float32).reshape(1, 1, 1, -1)
            when = guided_times(np.asarray(grid.t), config.guidance_interval)

        def encoders(params: Tree, given: Tree) -> Tree:
            contexts = {
                name: apply(self.networks["labels"], params["labels"], given[name]["labels"])
                for name in ("tokens", "null")
            }
            return {"noise": given["noise"], **contexts}

        def velocity(params: Tree, x_t: jax.Array, level: Level, c: TextContext) -> jax.Array:
            time = jnp.asarray(level.time)
            features = time_features(time, network.config.time_width, 1.0, shift=config.frequency_shift)
            z = schedule.network_input(x_t, level)
            output, _ = apply(network, params["transformer"], z, features, c)
            return schedule.velocity(output, x_t, level, self.training.prediction)

        def steps(params: Tree, given: Tree) -> jax.Array:
            def denoise(
                x_t: jax.Array, t: jax.Array, i: jax.Array, carry: Any, c: TextContext
            ) -> tuple[jax.Array, Any]:
                del t
                return velocity(params, x_t, grid.at(i, x_t.shape[0]), c), carry

            walk = with_guidance(denoise, given["tokens"], given["null"], scale, when)
            return sample(walk, schedule.initial(given["noise"], grid), grid.t)[0]

        return {"encoders": encoders, "steps": steps, "decoder": self.decoder}


SYSTEM = DiTSystem
