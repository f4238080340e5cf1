"""Rewards on tiny CLIPs of transformers, with the references' preprocessing in torch, and their gradients."""

from __future__ import annotations

import itertools
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from tests.oracles.randomise import randomise
from tests.oracles.text import write_checkpoint

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
    "bos_token_id": 48,
    "eos_token_id": 2,  # the old files': the end token is the last of the vocabulary
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 104,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
HIDDEN = (12, 10, 8, 6)
# (batch, height, width): smaller both ways, an odd rest to crop, larger, and the very size
CASES = {"wide": (2, 38, 53), "tall": (1, 47, 32), "small": (2, 17, 20), "same": (1, 28, 28)}
REWARDS = ("cosine", "pickscore", "hpsv2", "aesthetic")
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make(seed: int = 0, activation: str = "gelu") -> tuple[CLIPModel, torch.nn.Module]:
    """A CLIP, and the layers of an aesthetic predictor, with random parameters."""
    text, vision = {**TEXT, "hidden_act": activation}, {**VISION, "hidden_act": activation}
    clip = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)), seed)
    with torch.no_grad():
        clip.logit_scale.fill_(3.25)  # which bfloat16 holds
    widths = (20, *HIDDEN, 1)
    layers = [torch.nn.Linear(before, after) for before, after in itertools.pairwise(widths)]
    for place in (1, 3, 5):
        layers.insert(place, torch.nn.Dropout(0.2))
    predictor = torch.nn.Module()
    predictor.layers = torch.nn.Sequential(*layers)
    return clip, randomise(predictor, seed + 1)


def resize(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


def preprocess(images: torch.Tensor, size: int, form: str) -> torch.Tensor:
    """NCHW images in [0, 1], as torchvision's `Resize` and `CenterCrop` (or transformers' crop, or HPSv2's border) make
    them."""
    height, width = images.shape[2:]
    if form == "hpsv2":
        factor = size / float(max(height, width))
        images = resize(images, round(height * factor), round(width * factor))
        high, wide = (size - side for side in images.shape[2:])
        images = torch.nn.functional.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
    else:
        short, long = sorted((height, width))
        longer = int(size * long / short)
        resized = (size, longer) if height <= width else (longer, size)
        images = resize(images, height, resized[1]).clamp(0, 1)  # as Pillow: of 8 bits after either axis
        images = resize(images, *resized).clamp(0, 1)
        rest = [side - size for side in images.shape[2:]]
        top, left = (round(n / 2.0) if form == "torchvision" else n // 2 for n in rest)
        images = images[:, :, top : top + size, left : left + size]
    mean, deviation = (torch.tensor(values)[None, :, None, None] for values in (MEAN, DEVIATION))
    return (images - mean) / deviation


def features(clip: CLIPModel, name: str, **inputs: torch.Tensor) -> torch.Tensor:
    found = getattr(clip, f"get_{name}_features")(**inputs)
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    return found / found.norm(dim=-1, keepdim=True)


def reward(
    clip: CLIPModel, predictor: torch.nn.Module, name: str, images: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    form = {"hpsv2": "hpsv2", "aesthetic": "torchvision"}.get(name, "transformers")
    size = clip.config.vision_config.image_size
    image = features(clip, "image", pixel_values=preprocess(images, size, form))
    if name == "aesthetic":
        return predictor.layers(image)[:, 0]
    cosine = (image * features(clip, "text", input_ids=tokens)).sum(-1)
    return clip.logit_scale.exp() * cosine if name == "pickscore" else cosine


def run(
    clip: CLIPModel, predictor: torch.nn.Module, batch: int, height: int, width: int, seed: int = 1
) -> dict[str, np.ndarray]:
    """Every reward of random images and texts, and the gradient of its sum by the images; arrays in our layout."""
    random = np.random.default_rng(seed)
    images = random.uniform(0, 1, (batch, height, width, 3)).astype(np.float32)
    top = images[:, : height // 2]
    images[:, : height // 2] = 0.04 * top + 0.96 * np.round(top)  # hard edges, so that the resizing overshoots
    tokens = random.integers(1, 48, (batch, 9))
    tokens[:, 0], tokens[:, 6:] = 48, 49
    arrays = {"images": images, "tokens": tokens}
    for name in REWARDS:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).clone().requires_grad_()
        value = reward(clip, predictor, name, x, torch.from_numpy(tokens))
        value.sum().backward()
        arrays |= {name: value.detach().numpy(), f"{name}_gradient": x.grad.permute(0, 2, 3, 1).numpy()}
    return arrays


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/rewards/`: the CLIP as transformers saves it, in bfloat16, a file of arrays a case, and in `head/`
    the predictor."""
    clip, predictor = make()
    cases = {case: run(clip, predictor, *sizes) for case, sizes in CASES.items()}
    write_checkpoint(folder / "rewards", clip, cases)
    (folder / "rewards" / "head").mkdir(exist_ok=True)
    state = {name: value.bfloat16() for name, value in predictor.state_dict().items()}
    save_file(state, folder / "rewards" / "head" / "predictor.safetensors")
