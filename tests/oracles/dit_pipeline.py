"""A tiny DiT pipeline, made, run and saved by diffusers."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from tests.oracles import dit
from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_parts

LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "7": "cock"}
STEPS, GUIDANCE, SIDE = 9, 4.0, 16  # pixels


def make(folder: pathlib.Path, seed: int = 0) -> DiTPipeline:
    """Writes a pipeline with random parameters in the reference layout."""
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    parts = {"transformer": dit.make(seed), "vae": randomise(autoencoder, seed + 1)}
    save_parts(folder, parts)
    scheduler.save_pretrained(folder / "scheduler")
    drop_versions(folder / "scheduler" / "scheduler_config.json")
    (folder / "model_index.json").write_text(json.dumps({"id2label": LABELS}) + "\n")
    return DiTPipeline(**parts, scheduler=scheduler)


def noise(seed: int = 9) -> np.ndarray:
    """Initial noise `[1, h, w, c]`."""
    return np.random.default_rng(seed).standard_normal((1, SIDE // 2, SIDE // 2, 4), np.float32)


def run(pipeline: DiTPipeline, label: int, channels: int) -> np.ndarray:
    """The picture of a class as float32 `[1, H, W, 3]` in [0, 1], guided in the first channels of the latent: three as
    in facebookresearch/DiT, or four as in `DiTPipeline`, whose steps these are."""
    model, scheduler = pipeline.transformer, pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(noise().transpose(0, 3, 1, 2))
    classes = torch.tensor([label, model.config.num_embeds_ada_norm])
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model(x.repeat(2, 1, 1, 1), timestep=t.repeat(2), class_labels=classes).sample[:, :4]
            eps = out[:1].clone()
            eps[:, :channels] = out[1:, :channels] + GUIDANCE * (out[:1, :channels] - out[1:, :channels])
            x = scheduler.step(eps, t, x).prev_sample
        image = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/pipeline_dit/`: the pipeline in its layout, and `images.npz` with the noise and the images."""
    place = folder / "pipeline_dit"
    shutil.rmtree(place, ignore_errors=True)
    pipeline = make(place)
    images = {"three": run(pipeline, 7, 3), "four": run(pipeline, 7, 4)}
    np.savez_compressed(place / "images.npz", noise=noise(), **images)
