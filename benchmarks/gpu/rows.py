"""What is measured on a GPU, the most valuable first, with the seconds that each took on an H200."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

Kind = Literal["train", "forward", "sample", "mmdit", "operation"]
Framework = Literal["jax", "torch"]
START = 15  # seconds until a process has a GPU and its framework
TOKENS = {"unet": 205, "mmdit": 333}  # CLIP's 77, and 128 of Gemma or 256 of T5


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, made by both frameworks.

    Attributes:
        name: how `--rows` and the lines of results call it.
        title: in the table.
        kind: "train" a training step as `snapgen train` compiles it; "forward" and "sample" one and four calls of the
            same UNet; "mmdit" a call of Stable Diffusion 3.5 Large; "operation" a part of the UNet, forward and
            backward.
        batch: images.
        side: of the image in pixels; of an operation's feature map in cells.
        seconds: (JAX, PyTorch) from the start of a process, compilation of an empty cache included.
        microbatches: of our training step; PyTorch's autocast keeps less, and computes the batch at once.
        operation: which part of the UNet, see `jax_side.operation`.
        stage: of the operation.
    """

    name: str
    title: str
    kind: Kind
    batch: int
    side: int
    seconds: tuple[int, int]
    microbatches: int = 1
    operation: str = ""
    stage: int = 0

    @property
    def group(self) -> str:
        """Rows of a group share a process. All but the short ones have one of their own: what a compiler has learned
        from one of them would make the next one's compilation shorter."""
        return "operations" if self.kind == "operation" else self.name

    def in_small(self) -> Row:
        """The same on a few pixels, for a CPU."""
        side = 8 if self.kind == "operation" else 64
        return dataclasses.replace(self, batch=min(self.batch, 2), side=side, stage=min(self.stage, 1))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def _operation(name: str, title: str, operation: str, batch: int, side: int, stage: int) -> Row:
    return Row(name, title, "operation", batch, side, (8, 5), operation=operation, stage=stage)


ROWS = (
    Row("train_256", "UNet, training step, 256 px, batch 64", "train", 64, 256, (230, 270)),
    Row("forward_1024_b16", "UNet, forward, 1024 px, batch 16", "forward", 16, 1024, (60, 110)),
    Row("forward_1024_b1", "UNet, forward, 1024 px, batch 1", "forward", 1, 1024, (50, 110)),
    Row("sd35_b1", "SD 3.5 Large, forward, 1024 px, batch 1", "mmdit", 1, 1024, (60, 40)),
    Row("sample_b1", "UNet, four Euler steps, 1024 px, batch 1", "sample", 1, 1024, (50, 110)),
    Row("train_1024", "UNet, training step, 1024 px, batch 8", "train", 8, 1024, (230, 270), microbatches=2),
    Row("sd35_b2", "SD 3.5 Large, forward, 1024 px, batch 2", "mmdit", 2, 1024, (60, 40)),
    _operation("self_attention", "self-attention, last stage, 1024 px, batch 16", "self_attention", 16, 32, 2),
    _operation("cross_attention", "cross-attention, middle stage, 256 px, batch 256", "cross_attention", 256, 16, 1),
    _operation("transformer_0", "transformer block, first stage, 256 px, batch 64", "transformer", 64, 32, 0),
    _operation("transformer_1", "transformer block, middle stage, 256 px, batch 64", "transformer", 64, 16, 1),
    _operation("residual_0", "residual block, first stage, 256 px, batch 64", "residual", 64, 32, 0),
    _operation("residual_1", "residual block, middle stage, 256 px, batch 64", "residual", 64, 16, 1),
    _operation("residual_2", "residual block, last stage, 256 px, batch 64", "residual", 64, 8, 2),
    _operation("depthwise", "depthwise convolution, first stage, 256 px, batch 256", "depthwise", 256, 32, 0),
)


def chosen(names: str) -> list[Row]:
    """The rows of a list with commas, in order of their value; all of them for "".

    Raises:
        ValueError: a name is unknown.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := wanted - {row.name for row in ROWS}:
        raise ValueError(f"unknown rows {', '.join(sorted(unknown))}; the rows are {', '.join(r.name for r in ROWS)}")
    return [row for row in ROWS if not wanted or row.name in wanted]


def jobs(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that share a process, in order of value."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return list(groups.values())


def that_fit(rows: Sequence[Row], framework: Framework, seconds: float) -> list[Row]:
    """Those of one process that the seconds left are enough for, the valuable first."""
    fitting, left = [], seconds - START
    for row in rows:
        needed = row.seconds[0 if framework == "jax" else 1]
        if needed <= left:
            fitting.append(row)
            left -= needed
    return fitting
