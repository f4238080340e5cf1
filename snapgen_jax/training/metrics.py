"""What a run writes down: JSON lines as the record, TensorBoard as a mirror of them.

`train.jsonl` holds deterministic values only, one line a step, so that two runs can be compared byte for byte;
`perf.jsonl` holds times; `evaluation.jsonl` holds the numbers of evaluators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from snapgen_jax.training.files import on_object_store, write_whole


def _line(record: Mapping[str, Any]) -> str:
    """One JSON line; a number that is not finite becomes null, since JSON has no word for it."""
    return (
        json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}) + "\n"
    )


def read_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def evaluated(workdir: epath.PathLike, step: int) -> set[str]:
    """Evaluators whose numbers at `step` are on record in a workdir."""
    records = read_lines(epath.Path(workdir) / "metrics" / "evaluation.jsonl")
    return {record["evaluator"] for record in records if record["step"] == step}


class MetricWriter:
    """Writes the metrics of a workdir. `start_step` is the step restored: later lines belong to work that was lost."""

    def __init__(self, workdir: epath.PathLike, start_step: int, tensorboard: bool = True):
        self.workdir = epath.Path(workdir)
        self._metrics = self.workdir / "metrics"
        self._metrics.mkdir(parents=True, exist_ok=True)
        for name in ("train", "evaluation"):
            self._cut_back(self._metrics / f"{name}.jsonl", start_step)
        self._board = None
        if tensorboard and not on_object_store(self.workdir):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=start_step + 1)

    @staticmethod
    def _cut_back(path: epath.Path, step: int) -> None:
        records = read_lines(path)
        if path.exists():
            write_whole(path, "".join(_line(r) for r in records if r["step"] <= step))

    def _append(self, name: str, lines: str) -> None:
        path = self._metrics / f"{name}.jsonl"
        if on_object_store(path):  # where nothing can be appended
            path.write_text((path.read_text() if path.exists() else "") + lines)
        else:
            with path.open("a") as file:
                file.write(lines)

    def train(self, records: list[dict[str, Any]]) -> None:
        """Appends one record a step to `train.jsonl`, and their mean to TensorBoard."""
        self._append("train", "".join(map(_line, records)))
        if self._board is not None and records:
            for key in records[-1].keys() - {"step"}:
                values = [r[key] for r in records if isinstance(r.get(key), float) and math.isfinite(r[key])]
                if values:
                    self._board.add_scalar(f"train/{key}", float(np.mean(values)), records[-1]["step"])

    def perf(self, record: dict[str, Any]) -> None:
        """Appends to `perf.jsonl`."""
        self._append("perf", _line(record))
        if self._board is not None:
            for key in record.keys() - {"step"}:
                self._board.add_scalar(f"perf/{key}", record[key], record["step"])

    def evaluation(
        self, step: int, name: str, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Appends an evaluator's numbers and writes its pictures as `samples/<name>_<step>.png`."""
        folder = self.workdir / "samples"
        for title, picture in pictures.items():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{title}_{step:08d}.png").open("wb") as file:
                Image.fromarray(picture).save(file, format="PNG")
            if self._board is not None:
                self._board.add_image(title, picture, step, dataformats="HWC")
        self._append("evaluation", _line({"step": step, "evaluator": name, **numbers}))
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(f"evaluation/{key}", value, step)

    def close(self) -> None:
        """Flushes the mirror."""
        if self._board is not None:
            self._board.close()
