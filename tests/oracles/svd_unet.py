"""Tiny UNets of Stable Video Diffusion, made, run and saved by diffusers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from diffusers import UNetSpatioTemporalConditionModel

from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_shapes
from tests.oracles.sd_unet import hooked

# Its normalisations have 32 groups, whatever the config says.
COMMON = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12,
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "num_attention_heads": (2, 4),
}
CASES = {"wide": (2, 3, 4, 8), "tall": (1, 1, 6, 2)}  # (clips, frames, height, width)


def make(seed: int = 0, **changes: object) -> UNetSpatioTemporalConditionModel:
    """A UNet with random parameters."""
    return randomise(UNetSpatioTemporalConditionModel(**{**COMMON, **changes}), seed)


def run(
    model: UNetSpatioTemporalConditionModel, clips: int, frames: int, height: int, width: int, seed: int = 1
) -> dict[str, np.ndarray]:
    """Runs a UNet on random inputs and taps every block; arrays in our layout."""
    random, config = np.random.default_rng(seed), model.config
    x = random.standard_normal((clips, frames, height, width, config.in_channels), dtype=np.float32)
    states = random.standard_normal((clips, 1, config.cross_attention_dim), dtype=np.float32)
    step = random.uniform(-1.5, 1.6, clips).astype(np.float32)  # log(sigma) / 4
    numbers = random.uniform(0, 127, (clips, 3)).astype(np.float32)
    found: dict[str, np.ndarray] = {}
    handles = hooked(model, found)
    with torch.no_grad():
        output = model(
            torch.from_numpy(x).permute(0, 1, 4, 2, 3),
            torch.from_numpy(step),
            encoder_hidden_states=torch.from_numpy(states),
            added_time_ids=torch.from_numpy(numbers),
        ).sample
    for handle in handles:
        handle.remove()
    output = output.permute(0, 1, 3, 4, 2).numpy()
    return {"x": x, "step": step, "sequence": states, "numbers": numbers, "output": output, **found}


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/svd_unet/`: the checkpoint as diffusers saves it, in bfloat16, and a file of arrays for each case.
    Also the names and shapes of the published tensors."""
    with torch.device("meta"):
        save_shapes(folder, "svd_unet", UNetSpatioTemporalConditionModel(num_attention_heads=(5, 10, 20, 20)))
    model, place = make(), folder / "svd_unet"
    arrays = {case: run(model, *sizes) for case, sizes in CASES.items()}
    model.to(torch.bfloat16).save_pretrained(place)
    drop_versions(place / "config.json")
    for case in CASES:
        np.savez_compressed(place / f"{case}.npz", **arrays[case])
