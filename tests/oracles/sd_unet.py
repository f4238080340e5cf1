"""Tiny UNets of Stable Diffusion 1, 2 and XL, made, run and saved by diffusers."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_shapes

COMMON = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
CONFIGS = {
    "sd15": {},
    "sd21": {"attention_head_dim": (1, 2, 4), "use_linear_projection": True},
    "sdxl": {
        "attention_head_dim": (1, 2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 10,
    },
}
XL_SIZE = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# What the published `unet/config.json` say beyond diffusers' defaults.
PUBLISHED = {
    "sd15": {"cross_attention_dim": 768},
    "sd21": {**CONFIGS["sd21"], "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)},
    "sdxl": {**CONFIGS["sdxl"], **XL_SIZE},
}
CASES = {"wide": (2, 8, 12, 7), "tall": (1, 12, 4, 3)}  # (batch, height, width, text tokens)


def make(name: str, seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """A UNet with random parameters."""
    return randomise(UNet2DConditionModel(**{**COMMON, **CONFIGS[name], **changes}), seed)


def hooked(model: UNet2DConditionModel, found: dict[str, np.ndarray]) -> list:
    """Hooks that put every block's output into `found` under our names."""
    handles, last = [], len(model.down_blocks) - 1

    def watch(module: torch.nn.Module, *names: str) -> None:
        def keep(_module, _inputs, output):
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            found.update({name: output.permute(0, 2, 3, 1).numpy() for name in names})

        handles.append(module.register_forward_hook(keep))

    watch(model.conv_in, "conv_in")
    ways = [("down", stage, block) for stage, block in enumerate(model.down_blocks)]
    ways += [("up", last - i, block) for i, block in enumerate(model.up_blocks)]
    for way, stage, block in ways:
        attentions = getattr(block, "attentions", None)
        for i, residual in enumerate(block.resnets):
            layer = [f"{way}_{stage}_{i}", *([f"{way}_{stage}"] if i == len(block.resnets) - 1 else [])]
            watch(residual, f"{way}_{stage}_{i}_0", *([] if attentions else layer))
            if attentions:
                watch(attentions[i], f"{way}_{stage}_{i}_1", *layer)
        for sampler in getattr(block, f"{way}samplers") or []:
            watch(sampler, f"{way}sample_{stage}")
    for i, module in enumerate((model.mid_block.resnets[0], *model.mid_block.attentions, model.mid_block.resnets[1])):
        watch(module, f"mid_{i}")
    watch(model.mid_block, "mid")
    return handles


def run(
    model: UNet2DConditionModel, batch: int, height: int, width: int, tokens: int, seed: int = 1, control: bool = False
) -> dict[str, np.ndarray]:
    """Runs a UNet on random inputs and taps every block; arrays in our layout."""
    random, config = np.random.default_rng(seed), model.config

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    x, states = draw(batch, height, width, config.in_channels), draw(batch, tokens, config.cross_attention_dim)
    step = random.integers(0, 1000, batch)
    given, extra = {"x": x, "step": step.astype(np.float32), "sequence": states}, {}
    if config.addition_embed_type == "text_time":
        ids = random.integers(0, 64, (batch, 6)).astype(np.float32)
        text = draw(batch, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        given |= {"sizes": ids, "text": text}
        extra = {"added_cond_kwargs": {"text_embeds": torch.from_numpy(text), "time_ids": torch.from_numpy(ids)}}
    found: dict[str, np.ndarray] = {}
    handles = hooked(model, found)

    def call(**more: object) -> np.ndarray:
        with torch.no_grad():
            output = model(
                torch.from_numpy(x).permute(0, 3, 1, 2),
                torch.from_numpy(step),
                encoder_hidden_states=torch.from_numpy(states),
                **extra,
                **more,
            ).sample
        return output.permute(0, 2, 3, 1).numpy()

    output = call()
    for handle in handles:
        handle.remove()
    if control:
        layers = [name for name in found if name.startswith("down_") and name.count("_") == 2]
        order = ["conv_in"]
        for stage in range(len(model.down_blocks)):
            order += sorted(name for name in layers if name.startswith(f"down_{stage}_"))
            order += [f"downsample_{stage}"] if f"downsample_{stage}" in found else []
        skips = [draw(*found[name].shape) for name in order]
        mid = draw(*found["mid"].shape)

        def nchw(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).permute(0, 3, 1, 2)

        given |= {f"control_{i:02d}": skip for i, skip in enumerate(skips)}
        given["control_mid"] = mid
        given["controlled"] = call(
            down_block_additional_residuals=tuple(map(nchw, skips)), mid_block_additional_residual=nchw(mid)
        )
    return {**given, "output": output, **found}


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/unet_<name>/`: the checkpoint as diffusers saves it, in bfloat16, and a file of arrays for each case.
    Also the names and shapes of the published tensors."""
    for name, config in PUBLISHED.items():
        with torch.device("meta"):
            save_shapes(folder, f"unet_{name}", UNet2DConditionModel(**config))
    for name in CONFIGS:
        model, place = make(name), folder / f"unet_{name}"
        arrays = {case: run(model, *sizes, control=name == "sd15") for case, sizes in CASES.items()}
        model.to(torch.bfloat16).save_pretrained(place)
        drop_versions(place / "config.json")
        for case in CASES:
            np.savez_compressed(place / f"{case}.npz", **arrays[case])
