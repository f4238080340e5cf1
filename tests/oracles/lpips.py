"""LPIPS on a VGG-16 written layer by layer in torch, with random weights, saved by the published names."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

CASES = {"wide": (2, 16, 24), "tall": (1, 28, 12)}  # (batch, height, width) of the images
SMALL = {"channels": (4, 8, 8), "layers": (2, 1, 2)}
VGG16 = {"channels": (64, 128, 256, 512, 512), "layers": (2, 2, 3, 3, 3)}


def make(channels: tuple[int, ...], layers: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """The state: `features.<n>` with torchvision's numbers, `lin<i>.model.1.weight` with the names of lpips."""
    generator = torch.Generator().manual_seed(seed)
    state, number, width = {}, 0, 3
    for i, (wider, count) in enumerate(zip(channels, layers, strict=True)):
        for _ in range(count):
            weight = torch.randn((wider, width, 3, 3), generator=generator) * (2 / (9 * width)) ** 0.5
            state[f"features.{number}.weight"] = weight.bfloat16().float()
            state[f"features.{number}.bias"] = (0.1 * torch.randn(wider, generator=generator)).bfloat16().float()
            number, width = number + 2, wider
        number += 1
        state[f"lin{i}.model.1.weight"] = torch.rand((1, wider, 1, 1), generator=generator).bfloat16().float()
    return state


def distance(state: dict[str, torch.Tensor], layers: tuple[int, ...], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """LPIPS of NCHW images, as in the lpips package."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, y = (x - shift) / scale, (y - shift) / scale
    total, number = torch.zeros(len(x)), 0
    for i, count in enumerate(layers):
        if i:
            x, y = (torch.nn.functional.max_pool2d(z, 2, 2) for z in (x, y))
        for _ in range(count):
            weight, bias = state[f"features.{number}.weight"], state[f"features.{number}.bias"]
            x, y = (torch.relu(torch.nn.functional.conv2d(z, weight, bias, padding=1)) for z in (x, y))
            number += 2
        number += 1
        unit_x, unit_y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        weighted = torch.nn.functional.conv2d((unit_x - unit_y).square(), state[f"lin{i}.model.1.weight"])
        total = total + weighted.mean((1, 2, 3))
    return total


def run(state: dict[str, torch.Tensor], layers: tuple[int, ...], batch: int, height: int, width: int, seed: int = 1):
    """Distances of random images, arrays in our layout."""
    random = np.random.default_rng(seed)
    images, others = random.uniform(-1, 1, (2, batch, height, width, 3)).astype(np.float32)
    pair = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in (images, others))
    with torch.no_grad():
        return {"images": images, "others": others, "distance": distance(state, layers, *pair).numpy()}


def write_goldens(folder: pathlib.Path) -> None:
    """`<folder>/lpips/`: the weights, in bfloat16, and the arrays of each case."""
    folder = folder / "lpips"
    folder.mkdir(exist_ok=True)
    state = make(**SMALL)
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "lpips.safetensors")
    for case, sizes in CASES.items():
        np.savez_compressed(folder / f"{case}.npz", **run(state, SMALL["layers"], *sizes))
