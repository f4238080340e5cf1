"""What the oracles of the text encoders share."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from tests.oracles.saving import drop_versions


def tokens_and_mask(vocab: int, lengths: tuple[int, ...], padded: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens `[B, L]` int64 with zeros as padding on the right, and their mask `[B, L]` int64."""
    mask = (np.arange(padded) < np.array(lengths)[:, None]).astype(np.int64)
    return np.random.default_rng(seed).integers(1, vocab, mask.shape) * mask, mask


@contextlib.contextmanager
def record(layers: Iterable[torch.nn.Module]) -> Iterator[dict[str, np.ndarray]]:
    """Gathers what each layer returns, as `layer_00`, `layer_01` ..., while the context is open."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str, out: object) -> None:
        found[name] = (out[0] if isinstance(out, tuple) else out).detach().numpy()

    hooks = [
        layer.register_forward_hook(lambda _module, _args, out, name=f"layer_{i:02d}": keep(name, out))
        for i, layer in enumerate(layers)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def write_checkpoint(
    folder: pathlib.Path, model: PreTrainedModel, cases: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Saves a model in bfloat16 as its library does, and the arrays of each case beside it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    drop_versions(folder / "config.json")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for case, arrays in cases.items():
        np.savez_compressed(folder / f"{case}.npz", **arrays)
