"""Tiny diffusion transformers, made, run and saved by diffusers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_shapes

CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_embeds_ada_norm": 10,
}
SIZES = {"s": (12, 6, 64), "b": (12, 12, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}  # blocks, heads, head width
CASES = {"square": (2, 8, 8), "wide": (2, 8, 12), "tall": (1, 12, 4)}  # (batch, height, width)


def make(seed: int = 0, **changes: object) -> DiTTransformer2DModel:
    """A transformer with random parameters, in whose blocks the embeddings of time and class are the same."""
    model = randomise(DiTTransformer2DModel(**{**CONFIG, **changes}), seed)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def run(model: DiTTransformer2DModel, batch: int, height: int, width: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Runs a transformer on random inputs, also of sides that differ, which its own last lines refuse, and taps every
    block and module; arrays in our layout."""
    random, config = np.random.default_rng(seed), model.config
    x = random.standard_normal((batch, height, width, config.in_channels), dtype=np.float32)
    step = random.uniform(0, 1000, batch).astype(np.float32)
    label = random.integers(0, config.num_embeds_ada_norm + 1, batch)
    p, found = config.patch_size, {}
    h, w = height // p, width // p

    def watch(module: torch.nn.Module, name: str) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(
            lambda _module, _args, out: found.update({name: out.reshape(batch, h, w, -1).numpy()})
        )

    handles = []
    for i, block in enumerate(model.transformer_blocks):
        for module, name in ((block, ""), (block.attn1, "_attention"), (block.ff, "_ffn")):
            handles.append(watch(module, f"block_{i:02d}{name}"))
    latent, t, y = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(step), torch.from_numpy(label)
    with torch.no_grad():
        tokens = model.pos_embed(latent)
        for block in model.transformer_blocks:
            tokens = block(tokens, timestep=t, class_labels=y)
        embedding = model.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=tokens.dtype)
        shift, scale = model.proj_out_1(torch.nn.functional.silu(embedding)).chunk(2, dim=1)
        tokens = model.proj_out_2(model.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
        patches = tokens.reshape(batch, h, w, p, p, -1)
        output = torch.einsum("nhwpqc->nhpwqc", patches).reshape(batch, height, width, -1)
    for handle in handles:
        handle.remove()
    if height == width:
        with torch.no_grad():
            whole = model(latent, timestep=t, class_labels=y).sample
        assert torch.equal(whole.permute(0, 2, 3, 1), output)
    return {"x": x, "step": step, "label": label, "output": output.numpy(), **found}


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/dit/`: the checkpoint as diffusers saves it, in bfloat16, and a file of arrays for each case; and the
    tensors of the published sizes."""
    for size, (layers, heads, head_dim) in SIZES.items():
        for patch in (2, 4, 8):
            fields = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
            with torch.device("meta"):
                model = DiTTransformer2DModel(**fields, patch_size=patch, out_channels=8)
            save_shapes(folder, f"dit_{size}_{patch}", model)
    model = make()
    arrays = {case: run(model, *sizes) for case, sizes in CASES.items()}
    model.to(torch.bfloat16).save_pretrained(folder / "dit")
    drop_versions(folder / "dit" / "config.json")
    for case in CASES:
        np.savez_compressed(folder / "dit" / f"{case}.npz", **arrays[case])
