"""Tiny T5 encoders, made, run and saved by transformers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel

from tests.oracles.randomise import randomise
from tests.oracles.text import record, tokens_and_mask, write_checkpoint

COMMON = {
    "vocab_size": 50,
    "d_model": 20,
    "d_kv": 8,
    "d_ff": 28,
    "num_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "gated-gelu",
}
# (lengths of the texts in a batch, length they are padded to): 40 tokens reach past the last bucket.
CASES = {"whole": ((7, 7), 7), "padded": ((40, 3), 40)}


def make(seed: int = 0, **changes: object) -> T5EncoderModel:
    """An encoder with random parameters."""
    return randomise(T5EncoderModel(T5Config(**{**COMMON, **changes})), seed)


def run(model: T5EncoderModel, lengths: tuple[int, ...], padded: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Runs an encoder on random tokens, with a mask and, as `unmasked`, without."""
    tokens, mask = tokens_and_mask(model.config.vocab_size, lengths, padded, seed)
    with record(model.encoder.block) as layers, torch.no_grad():
        states = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state
    with torch.no_grad():
        unmasked = model(torch.from_numpy(tokens)).last_hidden_state
    return {"tokens": tokens, "mask": mask, "states": states.numpy(), "unmasked": unmasked.numpy(), **layers}


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/t5/`: the checkpoint as transformers saves it, in bfloat16, and a file of arrays for each case."""
    model = make()
    write_checkpoint(folder / "t5", model, {case: run(model, *sizes) for case, sizes in CASES.items()})
