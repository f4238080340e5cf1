"""`networks.unet.UNet` in PyTorch: the same parameters by the same names, images as `[B, C, H, W]` in channels_last.

It is what our UNet is timed beside, and an oracle: with the weights of `state_dict_of` its output and all gradients are
ours (`make oracle`). Under `torch.autocast` convolutions and products run in bfloat16, norms take their statistics in
float32, and attention is `scaled_dot_product_attention`, whose single key head is expanded without a copy. It imports
neither JAX nor this project, so that it runs where torch alone is installed.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

EPSILON = 1e-5
MASKED = -1e4
FIXED = {"convolution": "separable", "expand_base": "out", "qk_norm": True, "rope": True}  # the port has no other form
Fields = types.SimpleNamespace
Tensor = Any  # `torch.Tensor`: types are checked where there is no torch
Table = tuple[Tensor, Tensor]


def fields_of(config: Mapping[str, Any]) -> Fields:
    """The fields of a `UNetConfig`, as `dataclasses.asdict` gives them or as JSON holds them.

    Raises:
        ValueError: the port does not have that form of the network.
    """
    for name, value in FIXED.items():
        if config[name] != value:
            raise ValueError(f"the PyTorch port has {name}={value!r} only, not {config[name]!r}")
    return Fields(**config)


class GroupNorm(nn.GroupNorm):
    """Statistics in float32, output in the dtype of the input."""

    def __init__(self, width: int, groups: int):
        super().__init__(groups, width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Statistics in float32, output in the dtype of the input."""

    def __init__(self, width: int):
        super().__init__(width, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class RMSNorm(nn.Module):
    """Statistics in float32, output in the dtype of the input."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPSILON) * self.weight.float()).to(x.dtype)


class SeparableConv(nn.Module):
    """Depthwise 3x3 with a bias, then pointwise without one."""

    def __init__(self, in_width: int, out_width: int, stride: int = 1):
        super().__init__()
        self.depthwise = nn.Conv2d(in_width, in_width, 3, stride=stride, padding=1, groups=in_width)
        self.pointwise = nn.Conv2d(in_width, out_width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class ResidualBlock(nn.Module):
    """`[B, in, H, W] -> [B, out, H, W]`; the embedding `[B, E]` is activated already."""

    def __init__(self, config: Fields, in_width: int, out_width: int):
        super().__init__()
        middle = out_width * config.expand_ratio
        self.norm_1 = GroupNorm(in_width, config.groups)
        self.conv_1 = SeparableConv(in_width, middle)
        self.embedding = nn.Linear(config.embedding_width, middle)
        self.norm_2 = GroupNorm(middle, config.groups)
        self.conv_2 = SeparableConv(middle, out_width)
        self.skip = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.embedding(embedding)[:, :, None, None]
        h = self.conv_2(F.silu(self.norm_2(h)))
        return h + (x if self.skip is None else self.skip(x))


def rope_table(height: int, width: int, dim: int, theta: float) -> Table:
    """Cosines and sines of 2-D rotary positions, each `[H*W, dim / 2]` float32."""
    frequencies = theta ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, table: Table) -> Tensor:
    """`[B, H, L, D]` turned by tables `[L, D/2]`, in float32."""
    cos, sin = table
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """From `[B, L, width]` to a context `[B, M, C]`, or to itself."""

    def __init__(self, config: Fields, width: int, context_width: int | None = None):
        super().__init__()
        self.heads, self.head_dim = width // config.head_dim, config.head_dim
        self.kv_heads = config.kv_heads or self.heads
        source = context_width or width
        self.query = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.key = nn.Linear(source, self.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(source, self.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, width)
        self.query_norm, self.key_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None, rope: Table | None = None
    ) -> Tensor:
        source, (b, length, _) = x if context is None else context, x.shape
        q = self.query_norm(self._split(self.query(x), self.heads))
        k = self.key_norm(self._split(self.key(source), self.kv_heads))
        v = self._split(self.value(source), self.kv_heads)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        mask = None if bias is None else bias.to(q.dtype).expand(b, 1, length, -1)
        y = F.scaled_dot_product_attention(q, self._shared(k), self._shared(v), attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, length, self.heads * self.head_dim))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head_dim).transpose(1, 2)  # [B, heads, L, D]

    def _shared(self, x: Tensor) -> Tensor:
        if self.kv_heads == 1:
            return x.expand(-1, self.heads, -1, -1)
        return x.repeat_interleave(self.heads // self.kv_heads, dim=1)


class GEGLU(nn.Module):
    """Gated feed-forward network with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, dim=-1)
        return self.outer(value * F.gelu(gate, approximate="tanh"))


class TransformerBlock(nn.Module):
    """`[B, L, width]`, the text's states `[B, M, C]` and its bias `[B, 1, 1, M]`."""

    def __init__(self, config: Fields, width: int, self_attention: bool, cross_attention: bool):
        super().__init__()
        self.self_norm = LayerNorm(width) if self_attention else None
        self.self_attention = Attention(config, width) if self_attention else None
        self.cross_norm = LayerNorm(width) if cross_attention else None
        self.cross_attention = Attention(config, width, config.context_width) if cross_attention else None
        self.ffn_norm = LayerNorm(width)
        self.ffn = GEGLU(width, config.ffn_ratio * width)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor, rope: Table | None) -> Tensor:
        if self.self_attention is not None and self.self_norm is not None:
            x = x + self.self_attention(self.self_norm(x), rope=rope)
        if self.cross_attention is not None and self.cross_norm is not None:
            x = x + self.cross_attention(self.cross_norm(x), context, bias=bias)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of `[B, C, H, W]`; `positions` is `[H*W, C]` where the network has them."""

    def __init__(self, config: Fields, stage: int, depth: int):
        super().__init__()
        width, flags = config.channels[stage], (config.self_attention[stage], config.cross_attention[stage])
        self.norm = GroupNorm(width, config.groups)
        self.project_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList([TransformerBlock(config, width, *flags) for _ in range(depth)])
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor, rope: Table | None, positions: Tensor | None) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.project_in(self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        if positions is not None:
            tokens = tokens + positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, context, bias, rope)
        return x + self.project_out(tokens).view(b, h, w, c).permute(0, 3, 1, 2)


class Unit(nn.Module):
    """A residual block, a transformer, or the one and then the other."""

    def __init__(self, config: Fields, stage: int, in_width: int, depth: int, residual: bool):
        super().__init__()
        self.residual = ResidualBlock(config, in_width, config.channels[stage]) if residual else None
        self.transformer = Transformer(config, stage, depth) if depth else None

    def forward(self, x: Tensor, embedding: Tensor, *text_and_places: Any) -> Tensor:
        if self.residual is not None:
            x = self.residual(x, embedding)
        return x if self.transformer is None else self.transformer(x, *text_and_places)


class Sampler(nn.Module):
    """The convolution that halves the resolution, or that follows its doubling."""

    def __init__(self, config: Fields, width: int, stride: int):
        super().__init__()
        separable = config.sampler == "sep"
        self.double = stride == 1
        self.conv = (
            SeparableConv(width, width, stride) if separable else nn.Conv2d(width, width, 3, stride=stride, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.double else x)


class EmbeddingMLP(nn.Module):
    """`[B, in] -> [B, width]`."""

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(in_width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.inner(x)))


class UNet(nn.Module):
    """Velocity of a noisy latent. Call `place` with the size of the latent first."""

    def __init__(self, config: Fields):
        super().__init__()
        self.config = config
        self.places: list[tuple[Table | None, Tensor | None]] = []
        channels, last = config.channels, len(config.channels) - 1
        self.time = EmbeddingMLP(config.time_width, config.embedding_width)
        self.pooled = EmbeddingMLP(config.pooled_width, config.embedding_width) if config.pooled_width else None
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        width, skips = channels[0], [channels[0]]
        self.down, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for stage, channel in enumerate(channels):
            residual = stage > 0 or config.first_stage != "tf"
            depth = 0 if stage == 0 and config.first_stage == "res" else config.down_depth[stage]
            units = nn.ModuleList()
            for _ in range(config.units):
                units.append(Unit(config, stage, width, depth, residual))
                width = channel
                skips.append(width)
            self.down.append(units)
            if stage < last:
                self.downsamplers.append(Sampler(config, width, 2))
                skips.append(width)
        self.mid_residual = ResidualBlock(config, width, width)
        self.mid_transformer = Transformer(config, last, config.mid_depth) if config.mid_depth else None
        self.mid_residual_2 = ResidualBlock(config, width, width) if config.mid == "rar" else None
        up: list[nn.ModuleList] = []
        upsamplers: list[Sampler] = []
        for stage in reversed(range(len(channels))):
            units = nn.ModuleList()
            for _ in range(config.units + 1):
                units.append(Unit(config, stage, width + skips.pop(), config.up_depth[stage], True))
                width = channels[stage]
            up.insert(0, units)
            if stage:
                upsamplers.insert(0, Sampler(config, width, 1))
        self.up, self.upsamplers = nn.ModuleList(up), nn.ModuleList(upsamplers)
        self.norm_out = GroupNorm(width, config.groups)
        self.conv_out = nn.Conv2d(width, config.latent_channels, 3, padding=1)

    def place(self, height: int, width: int) -> UNet:
        """Makes the tables of positions for latents of that size, where the parameters lie."""
        config, device = self.config, self.conv_in.weight.device

        def table(dim: int, theta: float, stage: int) -> Table:
            cos, sin = rope_table(height >> stage, width >> stage, dim, theta)
            return cos.to(device), sin.to(device)

        self.places = [
            (
                table(config.head_dim, config.rope_theta, stage) if config.self_attention[stage] else None,
                torch.cat(table(channel, 100.0, stage), dim=-1) if config.absolute_positions else None,
            )
            for stage, channel in enumerate(config.channels)
        ]
        return self

    def forward(self, x: Tensor, time: Tensor, sequence: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
        """The velocity `[B, C, H, W]` float32.

        Args:
            x: `[B, C, H, W]` in channels_last.
            time: `[B, time_width]` from `time_features`.
            sequence, mask, pooled: `[B, L, D]`, `[B, L]`, `[B, P]`, as `networks.text.TextContext` has them.
        """
        stages = len(self.config.channels)
        embedding = self.time(time)
        if self.pooled is not None:
            embedding = embedding + self.pooled(pooled)
        embedding = F.silu(embedding)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.conv_in.weight.dtype
        text = sequence.to(dtype), ((1.0 - mask.float()) * MASKED)[:, None, None, :].to(dtype)
        h = self.conv_in(x)
        skips = [h]
        for stage, units in enumerate(self.down):
            for unit in units:
                h = unit(h, embedding, *text, *self.places[stage])
                skips.append(h)
            if stage < stages - 1:
                h = self.downsamplers[stage](h)
                skips.append(h)
        h = self.mid_residual(h, embedding)
        if self.mid_transformer is not None:
            h = self.mid_transformer(h, *text, *self.places[-1])
        if self.mid_residual_2 is not None:
            h = self.mid_residual_2(h, embedding)
        for stage in reversed(range(stages)):
            for unit in self.up[stage]:
                h = unit(torch.cat([h, skips.pop()], dim=1), embedding, *text, *self.places[stage])
            if stage:
                h = self.upsamplers[stage - 1](h)
        return self.conv_out(F.silu(self.norm_out(h))).float()


def time_features(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of `1000 t` at `dim / 2` frequencies: `[B] -> [B, dim]` float32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = (1000.0 * t.float())[:, None] * torch.exp(-math.log(10_000.0) / half * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def state_dict_of(flat: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, Tensor]:
    """The state dict of our parameters, as `networks.module.flatten` gives them."""
    return {torch_name(path): torch.from_numpy(_in_order(path, np.asarray(array))) for path, array in flat.items()}


def torch_name(path: tuple[str, ...]) -> str:
    """The port's name of one of our parameters."""
    *parents, leaf = (str(int(p[6:])) if p.startswith("block_") else p for p in path)
    return ".".join([*parents, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The port's shape of one of our parameters."""
    return tuple(shape[axis] for axis in _axes(path, len(shape)))


def _in_order(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return np.array(array.transpose(_axes(path, array.ndim)), order="C")


def _axes(path: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """Of our array, in the port's order: a kernel's outputs come first there."""
    if path[-1] == "kernel":
        return {2: (1, 0), 4: (3, 2, 0, 1)}[rank]
    return tuple(range(rank))


@torch.no_grad()
def randomise(module: nn.Module, std: float = 0.02) -> None:
    """Numbers in place of trained weights: nothing stays zero, and the gains of norms stay near one."""
    for name, parameter in module.named_parameters():
        parameter.normal_(0, std)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
