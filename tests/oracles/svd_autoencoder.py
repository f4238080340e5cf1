"""Tiny autoencoders of Stable Video Diffusion, made, run and saved by diffusers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from diffusers import AutoencoderKLTemporalDecoder

from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_shapes

COMMON = {
    "block_out_channels": (32, 64),  # its normalisations have 32 groups
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "layers_per_block": 2,
    "latent_channels": 4,
}
PUBLISHED = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CASES = {"wide": (2, 3, 4, 8), "tall": (1, 1, 12, 4)}  # (clips, frames, height, width) of the images


def make(seed: int = 0, **changes: object) -> AutoencoderKLTemporalDecoder:
    """An autoencoder with random parameters."""
    return randomise(AutoencoderKLTemporalDecoder(**{**COMMON, **changes}), seed)


def run(model: AutoencoderKLTemporalDecoder, clips: int, frames: int, height: int, width: int, seed: int = 1) -> dict:
    """Encodes random images, and decodes random latents of the same size; arrays in our layout."""
    random = np.random.default_rng(seed)
    images = random.uniform(-1, 1, (clips, frames, height, width, 3)).astype(np.float32)
    reduction = 2 ** (len(model.config.block_out_channels) - 1)
    shape = (clips, frames, height // reduction, width // reduction, 4)
    latents = random.standard_normal(shape, dtype=np.float32)

    def nchw(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.reshape(-1, *array.shape[2:])).permute(0, 3, 1, 2)

    with torch.no_grad():
        mean = model.encode(nchw(images)).latent_dist.mode() * model.config.scaling_factor
        decoded = model.decode(nchw(latents) / model.config.scaling_factor, num_frames=frames).sample
    return {
        "images": images,
        "encoded": mean.permute(0, 2, 3, 1).numpy().reshape(shape),
        "latents": latents,
        "decoded": decoded.permute(0, 2, 3, 1).numpy().reshape(images.shape),
    }


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/svd_autoencoder/`: the checkpoint as diffusers saves it, in bfloat16, and a file of arrays for each
    case. Also the names and shapes of the published tensors."""
    with torch.device("meta"):
        save_shapes(folder, "svd_autoencoder", AutoencoderKLTemporalDecoder(**PUBLISHED))
    model, place = make(), folder / "svd_autoencoder"
    arrays = {case: run(model, *sizes) for case, sizes in CASES.items()}
    model.to(torch.bfloat16).save_pretrained(place)
    drop_versions(place / "config.json")
    for case in CASES:
        np.savez_compressed(place / f"{case}.npz", **arrays[case])
