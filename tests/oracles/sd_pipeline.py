"""Tiny pipelines of Stable Diffusion 1.5, 2.1 and XL with tokenizers trained on the spot, made, run and saved by
diffusers."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests import tiny_tokenizers
from tests.oracles import sd_unet
from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_parts

PROMPT = "a photo of two red circles left of a green star"
SIZE = (48, 64)  # pixels
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DDIM = {**BETAS, "clip_sample": False, "set_alpha_to_one": True}
EULER = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
# name -> (UNet, scheduler, steps, guidance)
CASES = {
    "sd15": ("sd15", DDIMScheduler(**DDIM), 10, 7.5),
    "sd21": ("sd21", DDIMScheduler(**DDIM, prediction_type="v_prediction"), 10, 5.0),
    "sdxl": ("sdxl", EULER, 6, 5.0),
}


def make(folder: pathlib.Path, name: str, seed: int = 0):
    """Writes a pipeline with random parameters in the reference layout, and reads it back as the reference does."""
    unet_name, scheduler, _, _ = CASES[name]
    widths = (12,) if unet_name != "sdxl" else (8, 16)
    parts = {}
    for i, width in enumerate(widths):
        suffix = "" if i == 0 else "_2"
        where = tiny_tokenizers.write_clip(folder / f"tokenizer{suffix}", "<|endoftext|>" if i == 0 else "!")
        vocab = len(AutoTokenizer.from_pretrained(where))
        config = CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=vocab - 2,
            eos_token_id=vocab - 1,
            projection_dim=width,
            hidden_act="gelu" if unet_name == "sd21" or i else "quick_gelu",
        )
        kind = CLIPTextModelWithProjection if i else CLIPTextModel
        parts[f"text_encoder{suffix}"] = randomise(kind(config), seed + 1 + i)
        parts[f"tokenizer{suffix}"] = AutoTokenizer.from_pretrained(where)
    more = {"cross_attention_dim": sum(widths)}
    if unet_name == "sdxl":
        more["projection_class_embeddings_input_dim"] = 6 * 4 + widths[1]
    parts["unet"] = sd_unet.make(unet_name, seed + 4, **more)
    parts["vae"] = randomise(
        AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.13025 if unet_name == "sdxl" else 0.18215,
        ),
        seed + 5,
    )
    save_parts(folder, {name: part for name, part in parts.items() if not name.startswith("tokenizer")})
    scheduler.save_pretrained(folder / "scheduler")
    drop_versions(folder / "scheduler" / "scheduler_config.json")
    index = {"force_zeros_for_empty_prompt": unet_name == "sdxl"}
    (folder / "model_index.json").write_text(json.dumps(index) + "\n")
    if unet_name == "sdxl":
        return StableDiffusionXLPipeline(**parts, scheduler=scheduler, add_watermarker=False)
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, scheduler=scheduler, **extra)


def noise(seed: int = 9) -> np.ndarray:
    """Initial noise `[1, h, w, c]` of an image of `SIZE`."""
    return np.random.default_rng(seed).standard_normal((1, SIZE[0] // 2, SIZE[1] // 2, 4), np.float32)


def run(pipeline, name: str, negative_prompt: str | None = None, steps: int | None = None) -> np.ndarray:
    """The image of `PROMPT` as float32 `[1, H, W, 3]` in [0, 1]."""
    _, _, known, guidance = CASES[name]
    steps = steps or known
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        PROMPT,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt=negative_prompt,
        latents=torch.from_numpy(noise().transpose(0, 3, 1, 2)),
        output_type="np",
    )
    return np.asarray(out.images, np.float32)


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/pipeline_<name>/`: the pipeline in its layout, and `images.npz` with the noise and the image."""
    for name in CASES:
        place = folder / f"pipeline_{name}"
        shutil.rmtree(place, ignore_errors=True)
        pipeline = make(place, name)
        images = {"image": run(pipeline, name), "negative": run(pipeline, name, "blue squares")}
        if name != "sd21":  # over sigma: the same noise, the same times
            pipeline.scheduler = EULER
            images["euler"] = run(pipeline, name, steps=7)
        np.savez_compressed(place / "images.npz", noise=noise(), **images)
