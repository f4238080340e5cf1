"""Adapters of tiny networks, made, run and saved by peft."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPTextModelWithProjection

from tests.oracles import clip, mmdit

# Linear, embedding and convolution; one module of another rank, and one of another alpha.
CONFIGS = {
    "clip_l": LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "fc2", "token_embedding"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"layers.0.mlp.fc2": 9},
    ),
    "mmdit_medium": LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "add_v_proj", "pos_embed.proj"]),
}
LIBRARIES = {"clip_l": CLIPTextModelWithProjection, "mmdit_medium": SD3Transformer2DModel}


def load(goldens: pathlib.Path, name: str) -> torch.nn.Module:
    """A tiny checkpoint as its library reads it, in float32."""
    return LIBRARIES[name].from_pretrained(goldens / name, torch_dtype=torch.float32).eval()


def run(model: torch.nn.Module, name: str) -> np.ndarray:
    """What a network, adapted or not, makes of the inputs of a golden case: the pooled text, or the velocity."""
    with torch.no_grad():
        if name == "clip_l":
            return clip.run(model, *clip.CASES["full"])["pooled"]
        return mmdit.run(model, *mmdit.CASES["tall"]).v


def read(goldens: pathlib.Path, name: str, folder: pathlib.Path) -> torch.nn.Module:
    """A tiny checkpoint with the adapters of a folder."""
    return PeftModel.from_pretrained(load(goldens, name), folder).eval().base_model.model


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/peft/<name>/`: the files of peft, with random matrices, and `out.npy`, by the unmerged adapters."""
    for name, config in CONFIGS.items():
        model = get_peft_model(load(folder, name), config).eval()
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key:
                    value.copy_(0.2 * torch.randn(value.shape, generator=random))
        out = folder / "peft" / name
        model.save_pretrained(out)
        (out / "README.md").unlink(missing_ok=True)
        path = out / "adapter_config.json"
        values = {k: v for k, v in json.loads(path.read_text()).items() if k != "peft_version"}
        values["target_modules"] = sorted(values["target_modules"])
        path.write_text(json.dumps({**values, "base_model_name_or_path": None}, indent=2, sort_keys=True) + "\n")
        np.save(out / "out.npy", run(model.base_model.model, name))
