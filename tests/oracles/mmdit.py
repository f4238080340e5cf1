"""Tiny Stable Diffusion 3.5 transformers, made, run and saved by diffusers."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
from diffusers import SD3Transformer2DModel

from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions

# Large has no dual attention; Medium has it in its first blocks.
CONFIGS = {
    "mmdit_large": {"num_layers": 4},
    "mmdit_medium": {"num_layers": 4, "dual_attention_layers": (0, 1)},
}
COMMON = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 7,
    "qk_norm": "rms_norm",
}
# (batch, height, width, text tokens): sides that differ, and margins of the position table that do not halve.
CASES = {"wide": (2, 8, 12, 7), "tall": (1, 10, 4, 3)}


@dataclasses.dataclass(frozen=True)
class Example:
    """Inputs of a network and what the reference makes of them, as arrays in our layout."""

    x: np.ndarray
    t: np.ndarray
    sequence: np.ndarray
    pooled: np.ndarray
    v: np.ndarray
    taps: dict[str, np.ndarray]


def make(name: str, seed: int = 0, **changes: object) -> SD3Transformer2DModel:
    """A transformer with random parameters; its stored position table is rounded, so that it cannot be computed."""
    model = SD3Transformer2DModel(**{**COMMON, **CONFIGS[name], **changes})
    randomise(model, seed)
    model.pos_embed.pos_embed.copy_(model.pos_embed.pos_embed.to(torch.bfloat16))
    return model


def run(model: SD3Transformer2DModel, batch: int, height: int, width: int, tokens: int, seed: int = 1) -> Example:
    """Runs a transformer on random inputs and taps the image tokens after every block."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    config = model.config
    x = draw(batch, height, width, config.in_channels)
    sequence, pooled = draw(batch, tokens, config.joint_attention_dim), draw(batch, config.pooled_projection_dim)
    t = random.uniform(size=batch).astype(np.float32)

    found = {}
    hooks = [
        block.register_forward_hook(lambda _module, _args, out, i=i: found.update({f"block_{i:02d}": out[1].numpy()}))
        for i, block in enumerate(model.transformer_blocks)
    ]
    with torch.no_grad():
        v = model(
            hidden_states=torch.from_numpy(x).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.from_numpy(sequence),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(1000 * t),
        ).sample
    for hook in hooks:
        hook.remove()
    return Example(x, t, sequence, pooled, v.permute(0, 2, 3, 1).numpy(), found)


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/<name>/`: the checkpoint as diffusers saves it, in bfloat16, and a file of arrays for each case."""
    for name in CONFIGS:
        model = make(name)
        examples = {case: run(model, *sizes) for case, sizes in CASES.items()}
        model.to(torch.bfloat16).save_pretrained(folder / name)
        drop_versions(folder / name / "config.json")
        for case, example in examples.items():
            arrays = dataclasses.asdict(example)
            np.savez_compressed(folder / name / f"{case}.npz", **arrays.pop("taps"), **arrays)
