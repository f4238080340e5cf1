"""A tiny Stable Video Diffusion pipeline, made, run and saved by diffusers."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.oracles import svd_autoencoder, svd_unet
from tests.oracles.randomise import randomise
from tests.oracles.saving import drop_versions, save_parts

SIZE, FRAMES, STEPS = (16, 24), 3, 5
GUIDANCE = (1.0, 3.0)


def make(folder: pathlib.Path, seed: int = 0) -> StableVideoDiffusionPipeline:
    """Writes a pipeline with random parameters in the reference layout."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,  # which the pipeline takes for granted
        patch_size=56,
        projection_dim=12,
        hidden_act="gelu",
    )
    parts = {
        "unet": svd_unet.make(seed),
        "vae": svd_autoencoder.make(seed),
        "image_encoder": randomise(CLIPVisionModelWithProjection(vision), seed + 2),
    }
    save_parts(folder, parts)
    scheduler.save_pretrained(folder / "scheduler")
    drop_versions(folder / "scheduler" / "scheduler_config.json")
    return StableVideoDiffusionPipeline(**parts, scheduler=scheduler, feature_extractor=CLIPImageProcessor())


def photograph() -> np.ndarray:
    """uint8 `[H, W, 3]` of another size and shape than the clip."""
    rows, columns = np.meshgrid(np.linspace(0, 6, 250), np.linspace(0, 9, 310), indexing="ij")
    waves = np.stack([np.sin(rows * columns / 5), np.cos(rows), np.sin(columns + rows)], axis=-1)
    return np.round(127.5 + 120 * waves).astype(np.uint8)


def noise(seed: int = 9) -> np.ndarray:
    """Initial noise `[1, F, h, w, c]`."""
    return np.random.default_rng(seed).standard_normal((1, FRAMES, SIZE[0] // 2, SIZE[1] // 2, 4), np.float32)


def run(pipeline: StableVideoDiffusionPipeline) -> np.ndarray:
    """The frames of the photograph as float32 `[F, H, W, 3]` in [0, 1], without noise on the photograph."""
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        Image.fromarray(photograph()),
        height=SIZE[0],
        width=SIZE[1],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        min_guidance_scale=GUIDANCE[0],
        max_guidance_scale=GUIDANCE[1],
        noise_aug_strength=0.0,
        decode_chunk_size=2,
        latents=torch.from_numpy(noise().transpose(0, 1, 4, 2, 3)),
        output_type="np",
    ).frames
    return np.asarray(frames[0], np.float32)


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/pipeline_svd/`: the pipeline in its layout, and `frames.npz` with photograph, noise and frames. Its
    UNet and its autoencoder are those of `svd_unet/` and `svd_autoencoder/` beside it."""
    place = folder / "pipeline_svd"
    shutil.rmtree(place, ignore_errors=True)
    frames = run(make(place))
    shutil.rmtree(place / "unet")
    shutil.rmtree(place / "vae")
    np.savez_compressed(place / "frames.npz", photograph=photograph(), noise=noise(), frames=frames)
