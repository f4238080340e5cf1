"""Tiny CLIP text encoders, made, run and saved by transformers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.oracles.randomise import randomise
from tests.oracles.text import record, tokens_and_mask, write_checkpoint

COMMON = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "projection_dim": 20,
}
# As in Stable Diffusion 3.5, whose files say 2 for an end token that is the last of the vocabulary; and as later.
CONFIGS = {
    "clip_l": {"hidden_act": "quick_gelu", "eos_token_id": 2},
    "clip_g": {"hidden_act": "gelu", "eos_token_id": 40},
}
CASES = {"full": ((12, 5), 12), "short": ((6, 4, 2), 6)}


def make(name: str, seed: int = 0, **changes: object) -> CLIPTextModelWithProjection:
    """An encoder with random parameters."""
    return randomise(CLIPTextModelWithProjection(CLIPTextConfig(**{**COMMON, **CONFIGS[name], **changes})), seed)


def run(
    model: CLIPTextModelWithProjection, lengths: tuple[int, ...], padded: int, seed: int = 1
) -> dict[str, np.ndarray]:
    """Runs an encoder on random tokens between a beginning and an end, padded with the end token."""
    config = model.config
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    # Ids above the end token tell the two kinds of pooling apart.
    tokens, mask = tokens_and_mask(
        config.vocab_size - (2 if end == config.vocab_size - 1 else 0), lengths, padded, seed
    )
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1 :] = config.bos_token_id, end
    with record(model.text_model.encoder.layers) as layers, torch.no_grad():
        out = model(torch.from_numpy(tokens))
    arrays = {"states": out.last_hidden_state.numpy(), "pooled": out.text_embeds.numpy()}
    return {"tokens": tokens, "mask": mask, **arrays, **layers}


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/<name>/`: the checkpoint as transformers saves it, in bfloat16, and a file of arrays for each case."""
    for name in CONFIGS:
        model = make(name)
        write_checkpoint(folder / name, model, {case: run(model, *sizes) for case, sizes in CASES.items()})
