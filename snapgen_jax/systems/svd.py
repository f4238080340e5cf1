"""Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127): a photograph to a clip that begins with it.

The folder is that of `stabilityai/stable-video-diffusion-img2vid` on the Hugging Face hub:

    unet/  vae/  image_encoder/ (CLIP-H)  scheduler/
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.bounds import FINITE, at_least, check
from snapgen_jax.diffusion.guidance import with_guidance
from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.schedules import EDMSchedule
from snapgen_jax.diffusion.stages import Staged, Stages, run_stages
from snapgen_jax.networks.clip_vision import ClipVisionConfig
from snapgen_jax.networks.module import Platform, apply
from snapgen_jax.networks.rewards import DEVIATION, MEAN
from snapgen_jax.networks.svd_unet import SVDUNetConfig
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.video_autoencoder import VideoAutoencoderConfig
from snapgen_jax.parallel.mesh import MeshConfig
from snapgen_jax.systems.published import Generator, NetworkConfigs, Part, System, check_size, drawn, read_parts
from snapgen_jax.systems.sd import TELLING
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.maps import clip_vision as clip_vision_map
from snapgen_jax.weights.maps import svd_autoencoder, svd_unet
from snapgen_jax.weights.published import given, read_json

Tree = Any
PARTS = {
    "unet": Part("unet", svd_unet, "svd"),
    "autoencoder": Part("vae", svd_autoencoder, "svd"),
    "image_encoder": Part("image_encoder", clip_vision_map, "svd"),
}
CUBIC = -0.75  # of torch's bicubic interpolation


@dataclasses.dataclass(frozen=True)
class SVDConfig:
    """How to use a Stable Video Diffusion.

    Attributes:
        size: "svd", the published one, whose weights alone are taken; or "any".
        image_size: (height, width) of the frames in pixels.
        frames: of a clip; the weights were trained on 14, those of its second release (XT) on 25.
        steps: of the sampler.
        first_guidance, guidance: scales of the first and the last frame; between them they rise evenly.
        frames_per_second, motion: what the clip is told of itself; more motion moves more.
        augmentation: standard deviation of the noise on the photograph that the frames are given.
        chunk: frames that are decoded together.
        dtype: of the parameters and the arithmetic; "auto" is bfloat16 on accelerators and float32 on CPU.
        mesh: how the parameters are split.
    """

    system: Literal["svd"] = "svd"
    size: Literal["svd", "any"] = "svd"
    image_size: tuple[int, int] = (576, 1024)
    frames: int = 14
    steps: int = 25
    first_guidance: float = 1.0
    guidance: float = 3.0
    frames_per_second: int = 7
    motion: int = 127
    augmentation: float = 0.02
    chunk: int = 7
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)

    def __post_init__(self) -> None:
        one = at_least(1)
        check(self, image_size=one, frames=one, steps=one, frames_per_second=one, chunk=one)
        check(self, guidance=FINITE, first_guidance=FINITE, augmentation=at_least(0), motion=at_least(0))


def read_schedule(folder: pathlib.Path) -> EDMSchedule:
    """The noise that the UNet of a folder was trained with.

    Raises:
        WeightsError: the file of the scheduler is missing, or describes another noise than that of Karras et al. 2022
            with the prediction v.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    values = given(read_json(file))
    for key, expected in (
        ("prediction_type", "v_prediction"),
        ("use_karras_sigmas", True),
        ("timestep_type", "continuous"),
    ):
        if values.get(key) != expected:
            raise WeightsError(f"{file} has {key} = {values.get(key)!r}; Stable Video Diffusion has {expected!r}")
    published = EDMSchedule.preset("svd")
    low, high = values.get("sigma_min", published.sigma_min), values.get("sigma_max", published.sigma_max)
    return dataclasses.replace(published, sigma_min=low, sigma_max=high)


class SVD(System):
    """The system without its parameters, which are an argument everywhere: `{part: tree}`."""

    Config = SVDConfig
    PARTS = PARTS
    TOKENIZERS: Mapping[str, str] = {}

    def __init__(
        self,
        config: SVDConfig,
        networks: NetworkConfigs | None = None,
        schedule: EDMSchedule | None = None,
        platform: Platform = "cpu",
    ):
        """`networks`, `schedule`: by default the published ones."""
        if networks is None:
            networks = {
                "unet": SVDUNetConfig.preset("svd"),
                "autoencoder": VideoAutoencoderConfig.preset("svd"),
                "image_encoder": ClipVisionConfig.preset("h_14"),
            }
        elif config.size == "svd":
            expected = SVDUNetConfig.preset("svd")
            check_size("UNet", "that of Stable Video Diffusion", networks["unet"], expected, TELLING)
        super().__init__(config, networks, platform)
        self.schedule = schedule or EDMSchedule.preset("svd")

    @classmethod
    def from_folder(cls, config: SVDConfig, folder: pathlib.Path, platform: Platform) -> SVD:
        """The system of the networks that a folder describes."""
        return cls(config, read_parts(folder, PARTS, "Stable Video Diffusion"), read_schedule(folder), platform)

    def generator(self, params: Tree, tokenizers: dict[str, Any], mesh: Mesh | None) -> Generator:
        """As `System.generator`."""
        return ClipGenerator(self, params, tokenizers, mesh)

    def unit(self) -> int:
        """As `System.unit`: the autoencoder's reduction times the UNet's."""
        return self.networks["autoencoder"].config.reduction * self.networks["unet"].config.reduction

    def latent_shape(self) -> tuple[int, ...]:
        """(frames, h, w, c) of the latents of a clip."""
        return (self.config.frames, *super().latent_shape())

    def clip(self, params: Tree, picture: jax.Array, small: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        """A clip from a photograph and noise. To be jitted.

        Args:
            params: `{part: tree}`.
            picture: `[1, H, W, 3]` in [-1, 1], of `image_size`, with its noise.
            small: `[1, S, S, 3]` in [-1, 1], as the image encoder takes it.
            noise: `[1, F, h, w, c]`.

        Returns:
            `image` uint8 `[F, H, W, 3]`, `pixels` float32 in [-1, 1] before rounding, and `latent` `[1, F, h, w, c]`.
        """
        return run_stages(self.stages(), params, {"picture": picture, "small": small, "noise": noise})

    def stages(self) -> Stages:
        """Those of `clip`, from `{"picture", "small", "noise"}`."""
        return {"encoders": self._encode, "steps": self._steps, "decoder": self._decode}

    def _encode(self, params: Tree, given: Tree) -> Tree:
        config, network, auto = self.config, self.networks["unet"], self.networks["autoencoder"]
        normal = (given["small"] / 2 + 0.5 - np.asarray(MEAN, np.float32)) / np.asarray(DEVIATION, np.float32)
        embedding = apply(self.networks["image_encoder"], params["image_encoder"], normal)[:, None]
        # The frames are given the mean as the encoder makes it, without the scale of the latents.
        first = apply(auto, params["autoencoder"], given["picture"], method="encode") / auto.config.scale
        first = jnp.broadcast_to(first[:, None], given["noise"].shape)
        numbers = jnp.asarray([config.frames_per_second - 1, config.motion, config.augmentation], jnp.float32)
        pooled = time_features(numbers, network.config.pooled_width // len(numbers), 1.0).reshape(1, -1)
        ones = jnp.ones(embedding.shape[:2])
        told = {"first": first, "context": TextContext(embedding, ones, pooled)}
        nothing = {"first": jnp.zeros_like(first), "context": TextContext(jnp.zeros_like(embedding), ones, pooled)}
        return {"noise": given["noise"], "told": told, "nothing": nothing}

    def _steps(self, params: Tree, given: Tree) -> jax.Array:
        config, schedule, network = self.config, self.schedule, self.networks["unet"]
        grid = schedule.grid(config.steps)

        def denoise(x_t: jax.Array, t: jax.Array, i: jax.Array, carry: Any, c: Any) -> tuple[jax.Array, Any]:
            del t
            level = grid.at(i, x_t.shape[0])
            features = time_features(jnp.asarray(level.time), network.config.time_width, schedule.time_scale)
            z = jnp.concatenate([schedule.network_input(x_t, level), c["first"]], axis=-1)
            output, _ = apply(network, params["unet"], z, features, c["context"])
            return schedule.velocity(output, x_t, level, "v"), carry

        scale = np.linspace(config.first_guidance, config.guidance, config.frames, dtype=np.float32)
        by_frame = scale.reshape(1, -1, 1, 1, 1) if (scale != 1).any() else 1
        walk = with_guidance(denoise, given["told"], given["nothing"], by_frame)
        return sample(walk, schedule.initial(given["noise"], grid), grid.t)[0]

    def _decode(self, params: Tree, latent: jax.Array) -> dict[str, jax.Array]:
        config, auto = self.config, self.networks["autoencoder"]
        chunks = jnp.split(latent, [*range(config.chunk, config.frames, config.chunk)], axis=1)
        decoded = [apply(auto, params["autoencoder"], chunk, method="decode") for chunk in chunks]
        return drawn(jnp.concatenate(decoded, axis=1)[0], latent)


class ClipGenerator(Generator):
    """A photograph to a clip: the system with its parameters."""

    system: SVD

    def __init__(self, system: SVD, params: Tree, tokenizers: dict[str, Any], mesh: Mesh | None = None):
        super().__init__(system, params, tokenizers, mesh)
        self._clip = jax.jit(system.clip)

    def animate(
        self, picture: np.ndarray, *, seed: int = 0, noise: Any = None, grain: Any = None
    ) -> dict[str, np.ndarray]:
        """Everything that `SVD.clip` returns.

        Args:
            picture: uint8 `[H, W, 3]` of any size; scaled to `image_size`.
            seed: of both kinds of noise, see `diffusion.noise`.
            noise: `[1, F, h, w, c]` in place of noise from the seed.
            grain: `[1, H, W, 3]` standard normal, for the photograph, in place of noise from the seed.
        """
        given = self._given(picture, seed, noise, grain)
        return jax.device_get(self._clip(self.params, **given))

    def staged(
        self, prompts: Sequence[str] | None = None, conditions: Mapping[str, Any] | None = None, seed: int = 0
    ) -> Staged:
        """As `Generator.staged`, of the photograph."""
        given = self._given(self._photograph(prompts, "", conditions), seed, None, None)
        return Staged(self.system.stages(), self.params, given, self.system.config.steps, 1)

    def _given(self, picture: np.ndarray, seed: int, noise: Any, grain: Any) -> dict[str, Any]:
        """The arrays that `SVD.clip` takes."""
        from PIL import Image

        config = self.system.config
        height, width = config.image_size
        whole = np.asarray(picture, np.float32) / 127.5 - 1
        side = self.system.networks["image_encoder"].config.image_size
        fitted = Image.fromarray(np.asarray(picture, np.uint8)).resize((width, height), Image.Resampling.LANCZOS)
        fitted = np.asarray(fitted, np.float32)[None] / 127.5 - 1
        noise = draw_noise(seed, 0, self.system.latent_shape())[None] if noise is None else noise
        grain = draw_noise(seed, 1, (height, width, 3))[None] if grain is None else grain
        small = shrink(whole, side)[None]
        fitted += np.float32(config.augmentation) * grain
        return self._placed({"picture": fitted, "small": small, "noise": noise})

    def generate(
        self,
        prompts: list[str] | None = None,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        negative_prompt: str = "",
        conditions: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """The frames uint8 `[F, H, W, 3]` of the photograph in the file `conditions["image"]`.

        Raises:
            ValueError: there is a prompt, or not one photograph that can be read.
        """
        del indices
        return self.animate(self._photograph(prompts, negative_prompt, conditions), seed=seed)["image"]

    @staticmethod
    def _photograph(
        prompts: Sequence[str] | None, negative_prompt: str, conditions: Mapping[str, Any] | None
    ) -> np.ndarray:
        """uint8 `[H, W, 3]` of the one file that is named."""
        from PIL import Image, UnidentifiedImageError

        files = list((conditions or {}).get("image", ()))
        if prompts or negative_prompt or len(files) != 1 or set(conditions or {}) != {"image"}:
            raise ValueError(
                "Stable Video Diffusion animates one photograph, and reads no text: give --condition=image=FILE and no "
                "--prompt"
            )
        try:
            with Image.open(files[0]) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{files[0]!r} is no picture that can be read: {error}") from error


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """`[H, W, 3]` to `[side, side, 3]`: a Gaussian blur of (factor - 1) / 2 pixels and bicubic interpolation whose
    corners are those of the image, as the published encoder is asked."""
    rows, columns = (_shrinking(length, side) for length in image.shape[:2])
    return np.einsum("rh,hwc,sw->rsc", rows, np.asarray(image, np.float64), columns).astype(np.float32)


def _shrinking(length: int, side: int) -> np.ndarray:
    """The matrix `[side, length]` of blur and interpolation along one axis."""
    sigma = max((length / side - 1) / 2, 0.001)
    size = int(max(4 * sigma, 3))
    size += size % 2 == 0
    offsets = np.arange(size) - size // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    blur = np.zeros((length, length))
    for offset, weight in zip(offsets, weights / weights.sum(), strict=True):
        places = np.abs(np.arange(length) + offset)  # mirrored at the first and the last pixel
        places = np.where(places >= length, 2 * (length - 1) - places, places)
        np.add.at(blur, (np.arange(length), places), weight)
    at = np.linspace(0, length - 1, side)
    before = np.floor(at).astype(int)
    cubic = np.zeros((side, length))
    for step in (-1, 0, 1, 2):
        d = np.abs(at - before - step)
        near = (CUBIC + 2) * d**3 - (CUBIC + 3) * d**2 + 1
        far = CUBIC * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(cubic, (np.arange(side), np.clip(before + step, 0, length - 1)), np.where(d <= 1, near, far))
    return cubic @ blur


SYSTEM = SVD
