"""A tiny Stable Diffusion 3.5 pipeline with tokenizers trained on the spot, made, run and saved by diffusers."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests import tiny_tokenizers
from tests.oracles import gemma2
from tests.oracles.randomise import randomise
from tests.oracles.saving import save_parts
from tests.oracles.text import write_checkpoint

PROMPT = "a photo of two red circles left of a green star"
SIZE = (48, 64)  # pixels
T5_TOKENS = 16
# name -> (steps, guidance)
CASES = {"four": (4, 1.0), "four_guided": (4, 3.5), "many": (28, 1.0), "many_guided": (28, 4.5)}


def make(folder: pathlib.Path, seed: int = 0, with_t5: bool = True) -> StableDiffusion3Pipeline:
    """Writes a pipeline with random parameters in the reference layout, and reads it back as the reference does."""
    clips = {}
    for name, pad, kind in (("tokenizer", "<|endoftext|>", "quick_gelu"), ("tokenizer_2", "!", "gelu")):
        where = tiny_tokenizers.write_clip(folder / name, pad)
        vocab = len(AutoTokenizer.from_pretrained(where))
        wide = name == "tokenizer_2"
        config = CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=16 if wide else 8,
            intermediate_size=64 if wide else 32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=vocab - 2,
            eos_token_id=vocab - 1,
            projection_dim=16 if wide else 8,
            hidden_act=kind,
        )
        clips[name] = randomise(CLIPTextModelWithProjection(config), seed + 1 + wide)
    t5 = None
    if with_t5:
        vocab = len(AutoTokenizer.from_pretrained(tiny_tokenizers.write_t5(folder / "tokenizer_3")))
        config = T5Config(
            vocab_size=vocab, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
        t5 = randomise(T5EncoderModel(config), seed + 3)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )
    autoencoder = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        sample_size=32,
    )
    parts: dict[str, Any] = {
        "transformer": randomise(transformer, seed + 4),
        "vae": randomise(autoencoder, seed + 5),
        "text_encoder": clips["tokenizer"],
        "text_encoder_2": clips["tokenizer_2"],
    }
    if t5 is not None:
        parts["text_encoder_3"] = t5
    save_parts(folder, parts)
    return StableDiffusion3Pipeline(
        **{"text_encoder_3": None, **parts},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=AutoTokenizer.from_pretrained(folder / "tokenizer_3") if with_t5 else None,
    )


def make_language_model(folder: pathlib.Path, seed: int = 6) -> None:
    """Writes the language model that SnapGen reads beside the two CLIPs, with its tokenizer, as `google/gemma-2-2b`."""
    vocab = len(AutoTokenizer.from_pretrained(tiny_tokenizers.write_gemma(folder)))
    write_checkpoint(folder, gemma2.make(seed, vocab_size=vocab, num_hidden_layers=2), {})


def noise(seed: int = 9) -> np.ndarray:
    """Initial noise `[1, h, w, c]` of an image of `SIZE`."""
    height, width = (side // 2 for side in SIZE)
    return np.random.default_rng(seed).standard_normal((1, height, width, 4), np.float32)


def run(pipeline: StableDiffusion3Pipeline, steps: int, guidance: float) -> np.ndarray:
    """The image of `PROMPT` as float32 `[1, H, W, 3]` in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        PROMPT,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(noise().transpose(0, 3, 1, 2)),
        max_sequence_length=T5_TOKENS,
        output_type="np",
    )
    return np.asarray(out.images, np.float32)


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/pipeline/`: the pipeline in its layout with `gemma/` beside it, and `images.npz` with the noise and the
    image of each case."""
    pipeline = make(folder / "pipeline")
    make_language_model(folder / "pipeline" / "gemma")
    images = {name: run(pipeline, *case) for name, case in CASES.items()}
    np.savez_compressed(folder / "pipeline" / "images.npz", noise=noise(), **images)
