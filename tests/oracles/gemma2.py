"""Tiny Gemma 2 language models, made, run and saved by transformers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.oracles.randomise import randomise
from tests.oracles.text import record, tokens_and_mask, write_checkpoint

COMMON = {
    "vocab_size": 50,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 1.5,  # low, so that the scores reach it
    "sliding_window": 5,
    "attn_implementation": "eager",  # the only one with a soft cap
}
# (lengths of the texts in a batch, length they are padded to): the second is longer than the sliding window.
CASES = {"short": ((4, 4), 4), "long": ((19, 11), 19)}


def make(seed: int = 0, **changes: object) -> Gemma2ForCausalLM:
    """A language model with random parameters; its body is the encoder."""
    return randomise(Gemma2ForCausalLM(Gemma2Config(**{**COMMON, **changes})), seed)


def run(model: Gemma2ForCausalLM, lengths: tuple[int, ...], padded: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Runs the body of a language model on random tokens, padded on the right."""
    tokens, mask = tokens_and_mask(model.config.vocab_size, lengths, padded, seed)
    with record(model.model.layers) as layers, torch.no_grad():
        states = model.model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state
    return {"tokens": tokens, "mask": mask, "states": states.numpy(), **layers}


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/gemma2/`: the checkpoint as transformers saves it, in bfloat16, and a file of arrays for each case."""
    model = make()
    write_checkpoint(folder / "gemma2", model, {case: run(model, *sizes) for case, sizes in CASES.items()})
