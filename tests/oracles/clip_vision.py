"""Tiny CLIP image encoders, made, run and saved by transformers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.oracles.randomise import randomise
from tests.oracles.saving import save_shapes
from tests.oracles.text import record, write_checkpoint

COMMON = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 20,
}
CONFIGS = {
    "clip_vision_l": {"hidden_act": "quick_gelu", "intermediate_size": 96},
    "clip_vision_g": {"hidden_act": "gelu", "intermediate_size": 104},  # 4.3637 times, rounded down
}
L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "projection_dim": 768}
# What the published config.json say of both halves; the sizes are OpenCLIP's too.
VISION = {
    "l_14": L,
    "l_14_336": {**L, "image_size": 336},
    "h_14": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1024},
    "g_14": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 40, "projection_dim": 1024},
    "big_g_14": {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "projection_dim": 1280},
}
H_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
# (width, layers) of the text halves.
TEXT = {"l_14": (768, 12), "l_14_336": (768, 12), "h_14": (1024, 24), "g_14": (1024, 24), "big_g_14": (1280, 32)}


def make(name: str, seed: int = 0, **changes: object) -> CLIPVisionModelWithProjection:
    """An encoder with random parameters."""
    return randomise(CLIPVisionModelWithProjection(CLIPVisionConfig(**{**COMMON, **CONFIGS[name], **changes})), seed)


def run(model: CLIPVisionModelWithProjection, batch: int = 2, seed: int = 1) -> dict[str, np.ndarray]:
    """Embeds random images, and what leaves each layer as if it were the last."""
    size = model.config.image_size
    images = np.random.default_rng(seed).standard_normal((batch, size, size, 3), dtype=np.float32)
    inner = model.vision_model
    with record(inner.encoder.layers) as layers, torch.no_grad():
        embedding = model(torch.from_numpy(images).permute(0, 3, 1, 2)).image_embeds
    with torch.no_grad():
        early = {
            name: model.visual_projection(inner.post_layernorm(torch.from_numpy(states)[:, 0])).numpy()
            for name, states in layers.items()
        }
    return {"images": images, "embedding": embedding.numpy(), **early}


def openclip(name: str) -> torch.nn.Module:
    """A whole CLIP of the published sizes with OpenCLIP's names, as far as torch's own layers give them: a module that
    holds tensors and computes nothing."""
    nn, vision, (width, layers) = torch.nn, VISION[name], TEXT[name]
    size, projection = vision["hidden_size"], vision["projection_dim"]
    places = (vision.get("image_size", 224) // 14) ** 2 + 1

    def holding(**tensors: object) -> torch.nn.Module:
        module = nn.Module()
        for key, value in tensors.items():
            setattr(module, key, value if isinstance(value, nn.Module) else nn.Parameter(torch.empty(value)))
        return module

    def transformer(width: int, layers: int, hidden: int) -> torch.nn.Module:
        blocks = [
            holding(
                ln_1=nn.LayerNorm(width),
                attn=nn.MultiheadAttention(width, 1),
                ln_2=nn.LayerNorm(width),
                mlp=holding(c_fc=nn.Linear(width, hidden), c_proj=nn.Linear(hidden, width)),
            )
            for _ in range(layers)
        ]
        return holding(resblocks=nn.ModuleList(blocks))

    visual = holding(
        class_embedding=(size,),
        positional_embedding=(places, size),
        proj=(size, projection),
        conv1=nn.Conv2d(3, size, 14, 14, bias=False),
        ln_pre=nn.LayerNorm(size),
        transformer=transformer(size, vision["num_hidden_layers"], vision["intermediate_size"]),
        ln_post=nn.LayerNorm(size),
    )
    return holding(
        positional_embedding=(77, width),
        text_projection=(width, projection),
        logit_scale=(),
        visual=visual,
        transformer=transformer(width, layers, 4 * width),
        token_embedding=nn.Embedding(49408, width),
        ln_final=nn.LayerNorm(width),
    )


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/<name>/`: the checkpoint as transformers saves it, in bfloat16, and a file of arrays; and the names and
    shapes of the published encoders."""
    for name, values in VISION.items():
        with torch.device("meta"):
            config = CLIPVisionConfig(**{"patch_size": 14, "image_size": 224, "num_attention_heads": 16, **values})
            save_shapes(folder, f"clip_vision_{name}", CLIPVisionModelWithProjection(config))
            save_shapes(folder, f"openclip_{name}", openclip(name))
    with torch.device("meta"):
        text = CLIPTextModelWithProjection(CLIPTextConfig(**H_TEXT, projection_dim=1024, hidden_act="gelu"))
        save_shapes(folder, "clip_h", text)
    for name in CONFIGS:
        model = make(name)
        write_checkpoint(folder / name, model, {"images": run(model)})
