"""What the UNets of Stable Diffusion are made of, and the names of their blocks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from jax.sharding import PartitionSpec

from snapgen_jax.networks.attention_table import AttentionChoice
from snapgen_jax.networks.module import Preset, Rules

# First match wins. Kernels are split over their outputs, or over their inputs where the outputs are the residual
# stream; vectors are small and stay whole.
_RULES: Rules = [
    (r"conv_out/kernel$", PartitionSpec(None, None, "fsdp", None)),
    (r"(conv|conv_in|conv_1|conv_2|skip)/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"(key|value|query|inner|embedding|project_in)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(out|outer|project_out)/kernel$", PartitionSpec("tensor", "fsdp")),
]


_CONVOLUTIONS: Rules = [(r"project_(in|out)/kernel$", PartitionSpec(None, None, None, "fsdp"))]
Stages = tuple[tuple[str, ...], ...]
WITH, WITHOUT = ("ra", "ra"), ("r", "r")  # layers of a stage with and without transformers


@dataclasses.dataclass(frozen=True)
class SDUNetArchitecture(Preset):
    """What a UNet of Stable Diffusion is made of. The defaults are those of version 1.5.

    Attributes:
        latent_channels: of the input.
        out_channels: of the output.
        channels: width of each stage; stage 0 has the highest resolution, and each further one half of it.
        down: for each stage its layers on the way down, each a string of blocks: "r" a residual block, "a" a
            transformer. A layer that changes the width begins with an "r"; what leaves it is a skip of the way up.
        mid: the blocks of the lowest resolution between both ways.
        up: for each stage its layers on the way up, one more than on the way down; each takes a skip, and so begins
            with an "r".
        heads: of the attention of each stage.
        depth: transformer blocks in a transformer of each stage; the middle has those of the last.
        context_width: of the text states.
        pooled_width: of the pooled vector, which Stable Diffusion XL adds to the time's embedding; 0 for none.
        time_width: of the time features.
        groups: of the group normalisation.
        projection: form of the projections around a transformer's blocks; the published weights have either.
        exact_gelu: as the published weights; without, the approximation that phones have an operator for.
        text_mask: "attend" leaves out what the mask says is padding; "ignore" attends to it, as the reference does.
        attention: kernel of the attention, a platform choice, see `attention_table`.
        attention_chunk: queries at a time, "chunked" only.
        remat: "blocks" keeps only what enters each block for the backward pass.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: str = ""  # of the network, which each of them fixes
    latent_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down: Stages = (WITH, WITH, WITH, WITHOUT)
    mid: str = "rar"
    up: Stages = (("ra",) * 3, ("ra",) * 3, ("ra",) * 3, ("r",) * 3)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    depth: tuple[int, ...] = (1, 1, 1, 1)
    context_width: int = 768
    pooled_width: int = 0
    time_width: int = 320
    groups: int = 32
    projection: Literal["conv", "linear"] = "conv"
    exact_gelu: bool = True
    text_mask: Literal["attend", "ignore"] = "ignore"
    attention: AttentionChoice = "auto"
    attention_chunk: int = 512
    remat: Literal["none", "blocks"] = "none"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ValueError(f"{type(self).__name__}: {problem}")

    def _problem(self) -> str:
        stages = len(self.channels)
        for name in ("down", "up", "heads", "depth"):
            if len(getattr(self, name)) != stages:
                return f"{name} has {len(getattr(self, name))} stages and channels {stages}"
        for name, _, _, layer, changes in self._layers():
            if not re.fullmatch("r[ra]*" if changes else "[ra]*", layer):
                first = "a residual block 'r', which changes the width, followed by " if changes else ""
                return f"the layer {layer!r} of {name} is not made of {first}blocks 'r' and transformers 'a'"
        if not re.fullmatch("[ra]*", self.mid):
            return f"mid={self.mid!r} is not made of 'r' and 'a'"
        for i, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            if len(up) != len(down) + 1:
                return (
                    f"stage {i} has {len(down)} layers on the way down and {len(up)} on the way up; the way up takes a "
                    "skip in each of its layers, and needs one layer more"
                )
        for heads, width in zip(self.heads, self.channels, strict=True):
            if width % heads or width % self.groups:
                return (
                    f"a stage of {width} channels with {heads} heads and {self.groups} groups; both must divide the "
                    "channels"
                )
        return ""

    def _layers(self) -> Iterator[tuple[str, int, int, str, bool]]:
        """Of each layer of both ways: the way, its stage and number, its blocks, and whether it changes the width."""
        width = self.channels[0]
        for stage, layers in enumerate(self.down):
            for i, layer in enumerate(layers):
                yield "down", stage, i, layer, width != self.channels[stage]
                width = self.channels[stage]
        for stage, layers in reversed([*enumerate(self.up)]):
            yield from (("up", stage, i, layer, True) for i, layer in enumerate(layers))

    @property
    def embedding_width(self) -> int:
        """Width of the embedding of the time."""
        return 4 * self.channels[0]

    @property
    def reduction(self) -> int:
        """Sides of a latent are multiples of this."""
        return 2 ** (len(self.channels) - 1)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return [*(_CONVOLUTIONS if self.projection == "conv" else ()), *_RULES]

    def block_names(self) -> tuple[str, ...]:
        """Of every block, in the order in which they run: `down_1_0_2` is block 2 of layer 0 of stage 1, `mid_0` the
        first of the middle."""
        return tuple(name for name in self.tap_names() if re.fullmatch(r"(down|up)_\d+_\d+_\d+|mid_\d+", name))

    def droppable_blocks(self) -> tuple[str, ...]:
        """The blocks whose input may stand in for their output: all but those that begin a layer which changes the
        width."""
        firsts = {f"{way}_{stage}_{i}_0" for way, stage, i, _, changes in self._layers() if changes}
        return tuple(name for name in self.block_names() if name not in firsts)

    def tap_names(self) -> tuple[str, ...]:
        """Names of the intermediates in the order in which they are computed.

        Beside the blocks (`block_names`): `down_1_0` is the output of layer 0 of stage 1 on the way down, `down_1` that
        of its last layer; stage 0 has the highest resolution on both ways.
        """
        names, last = ["conv_in"], len(self.channels) - 1
        for stage, layers in enumerate(self.down):
            names += [*_layer_names("down", stage, layers), f"down_{stage}"]
            names += [f"downsample_{stage}"] if stage < last else []
        names += [*(f"mid_{i}" for i in range(len(self.mid))), "mid"]
        for stage, layers in reversed([*enumerate(self.up)]):
            names += [*_layer_names("up", stage, layers), f"up_{stage}"]
            names += [f"upsample_{stage}"] if stage else []
        return tuple(names)


def _layer_names(way: str, stage: int, layers: Sequence[str]) -> list[str]:
    names = []
    for i, layer in enumerate(layers):
        names += [*(f"{way}_{stage}_{i}_{j}" for j in range(len(layer))), f"{way}_{stage}_{i}"]
    return names
