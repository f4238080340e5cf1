"""Tiny autoencoders of Stable Diffusion 3's kind and of its predecessors', made, run and saved by diffusers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKL

from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_shapes

COMMON = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
EARLIER = {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": 0.18215, "shift_factor": 0.0}
KINDS = {"autoencoder": {}, "autoencoder_sd1": EARLIER}
# Stable Diffusion 1, 2 and XL; the last differs in its scale alone.
PUBLISHED = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CASES = {"wide": (2, 16, 24), "tall": (1, 28, 12)}  # (batch, height, width) of the images


def make(seed: int = 0, **changes: object) -> AutoencoderKL:
    """An autoencoder with random parameters."""
    return randomise(AutoencoderKL(**{**COMMON, **changes}), seed)


def run(model: AutoencoderKL, batch: int, height: int, width: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Encodes random images, and decodes random latents of the same size; arrays in our layout.

    `latents` is normalised, and `decoded` undoes the normalisation first, as the pipeline does.
    """
    random = np.random.default_rng(seed)
    images = random.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    reduction = 2 ** (len(model.config.block_out_channels) - 1)
    shape = (batch, height // reduction, width // reduction, model.config.latent_channels)
    latents = random.standard_normal(shape, dtype=np.float32)
    scale, shift = model.config.scaling_factor, model.config.shift_factor
    with torch.no_grad():
        posterior = model.encode(_to_torch(images)).latent_dist
        decoded = model.decode(_to_torch(latents) / scale + shift).sample
    return {
        "images": images,
        "mean": _to_numpy(posterior.mean),
        "logvar": _to_numpy(posterior.logvar),
        "encoded": _to_numpy((posterior.mean - shift) * scale),
        "latents": latents,
        "decoded": _to_numpy(decoded),
    }


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/autoencoder/` and `<folder>/autoencoder_sd1/`: what diffusers saves, in bfloat16, and the arrays of
    each case; and the tensors of the published ones of four channels."""
    with torch.device("meta"):
        save_shapes(folder, "autoencoder_4_channels", AutoencoderKL(**PUBLISHED))
    for kind, changes in KINDS.items():
        model = make(**changes)
        arrays = {case: run(model, *sizes) for case, sizes in CASES.items()}
        model.to(torch.bfloat16).save_pretrained(folder / kind)
        drop_versions(folder / kind / "config.json")
        for case in CASES:
            np.savez_compressed(folder / kind / f"{case}.npz", **arrays[case])


def _to_torch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _to_numpy(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()
