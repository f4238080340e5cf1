"""What a run writes down: JSON lines as the record, and mirrors of them.

`train.jsonl` holds deterministic values only, one line a step, so that two runs can be compared byte for byte;
`perf.jsonl` holds times; `evaluation.jsonl` holds the numbers of evaluators. In an object store each is a row of
segments, see `appended`; `read_lines` reads either form.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from snapgen_jax.training.appended import AppendedFile, read_appended
from snapgen_jax.training.mirrors import NO_MIRROR, Mirror, MirrorConfig, TensorBoard, service


def _line(record: Mapping[str, Any]) -> str:
    """One JSON line; a number that is not finite becomes null, since JSON has no word for it."""
    return (
        json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}) + "\n"
    )


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The records of a JSON lines file, on a disk or in an object store, without a last line that a crash cut short.

    Raises:
        DamagedError: a segment is missing.
    """
    return [json.loads(line) for line in _whole_lines(read_appended(path)).splitlines()]


def evaluated(workdir: epath.PathLike, step: int) -> set[str]:
    """Evaluators whose numbers at `step` are on record in a workdir."""
    records = read_lines(epath.Path(workdir) / "metrics" / "evaluation.jsonl")
    return {record["evaluator"] for record in records if record["step"] == step}


class MetricWriter:
    """Writes the metrics of a workdir. `start_step` is the step restored: later lines belong to work that was lost."""

    def __init__(
        self,
        workdir: epath.PathLike,
        start_step: int,
        tensorboard: bool = True,
        mirror: MirrorConfig = NO_MIRROR,
    ):
        """Cuts `train.jsonl` and `evaluation.jsonl` back to `start_step`.

        Raises:
            DamagedError: a segment of a file is missing.
            ConfigError: the mirror's package is not installed.
        """
        self.workdir = epath.Path(workdir)
        folder = self.workdir / "metrics"
        self._files = {name: AppendedFile(folder / f"{name}.jsonl") for name in ("train", "perf", "evaluation")}
        for name in ("train", "evaluation"):
            self._cut_back(self._files[name], start_step)
        self._mirrors: list[Mirror] = [TensorBoard(self.workdir, start_step)] if tensorboard else []
        if mirror.kind != "none":
            self._mirrors.append(service(mirror, self.workdir))

    @staticmethod
    def _cut_back(file: AppendedFile, step: int) -> None:
        lines = _whole_lines(read_appended(file.path)).splitlines(keepends=True)
        file.cut(sum(len(line) for line in itertools.takewhile(lambda line: json.loads(line)["step"] <= step, lines)))

    def train(self, records: list[dict[str, Any]]) -> None:
        """Appends one record a step to `train.jsonl`, and their mean to the mirrors."""
        self._files["train"].append("".join(map(_line, records)).encode())
        means = {}
        for key in (records[-1].keys() - {"step"}) if records else ():
            values = [r[key] for r in records if isinstance(r.get(key), float) and math.isfinite(r[key])]
            if values:
                means[f"train/{key}"] = float(np.mean(values))
        if means:
            self._mirror(records[-1]["step"], means)

    def perf(self, record: dict[str, Any]) -> None:
        """Appends to `perf.jsonl`, and ends an interval: what the mirrors were given is shown."""
        self._files["perf"].append(_line(record).encode())
        self._mirror(record["step"], {f"perf/{key}": value for key, value in record.items() if key != "step"})
        for mirror in self._mirrors:
            mirror.flush()

    def evaluation(
        self, step: int, name: str, numbers: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Appends an evaluator's numbers and writes its pictures as `samples/<name>_<step>.png`."""
        folder = self.workdir / "samples"
        for title, picture in pictures.items():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{title}_{step:08d}.png").open("wb") as file:
                Image.fromarray(picture).save(file, format="PNG")
        self._files["evaluation"].append(_line({"step": step, "evaluator": name, **numbers}).encode())
        self._mirror(step, {f"evaluation/{key}": value for key, value in numbers.items()})
        for mirror in self._mirrors:
            mirror.pictures(step, pictures)
            mirror.flush()

    def _mirror(self, step: int, values: Mapping[str, float]) -> None:
        for mirror in self._mirrors:
            mirror.scalars(step, values)

    def close(self) -> None:
        """Ends the mirrors."""
        for mirror in self._mirrors:
            mirror.close()
