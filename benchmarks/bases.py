"""Trained runs that the claims of several papers start from, kept in half precision: `benchmarks/bases/NAME`.

    snapgen train --config=configs/shapes/lazy_base.py:quick --workdir=runs/dit
    python -m benchmarks.bases --store=shapes_dit --workdir=runs/dit --config=configs/shapes/lazy_base.py:quick
    snapgen train --config=configs/shapes/detection.py:quick --workdir=runs/detection
    python -m benchmarks.bases --store=shapes_detection --workdir=runs/detection \
        --config=configs/shapes/detection.py:quick --score=matching.accuracy
    python -m benchmarks.bases                             # what is there

A base is what `snapgen weights export` writes, with weights in float16, and `base.json`: the command that trained it,
machine, commit, updates and score. `snapgen_jax.load` and every `base`, `init_from` and `teacher.workdir` take it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.claims.trials import BASES, SINGLE
from benchmarks.measuring import commit, machine
from snapgen_jax.release.writer import export_weights
from snapgen_jax.scoring import evaluate

FILES = ("model.safetensors", "config.json", "tokenizer.json", "weights.json")
SINGLE_OBJECTS = "score.overall of single objects"
EVALUATORS = {"score": "compositional", "matching": "matching", "reward": "rewards"}  # by the first word of a number


def names() -> list[str]:
    """The bases that are there."""
    return sorted(path.parent.name for path in BASES.glob("*/base.json"))


def halved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors in float16, those of other types than float32 as they are.

    Raises:
        ValueError: a value is too large for float16; names its tensor.
    """
    with np.errstate(over="ignore"):
        half = {name: x.astype(np.float16) if x.dtype == np.float32 else x for name, x in tensors.items()}
    if lost := [name for name, x in half.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{', '.join(lost)}: values beyond those of float16; store another run")
    return half


def store(name: str, workdir: pathlib.Path, config: str, number: str = SINGLE_OBJECTS) -> dict[str, Any]:
    """Keeps a trained run as a base, and returns its record. Its score is of the weights that are kept.

    Args:
        name: of the base.
        workdir: of the run.
        config: "path/to/file.py:arg" that trains it, and what else stands in the command.
        number: that it is scored by, such as "matching.accuracy" or "reward.detection".
    """
    with tempfile.TemporaryDirectory() as temporary:
        whole = pathlib.Path(temporary) / name
        export_weights(workdir, whole)
        BASES.mkdir(exist_ok=True)
        folder = BASES / name
        folder.mkdir()
        for file in FILES:
            if (whole / file).exists():
                shutil.copyfile(whole / file, folder / file)
        save_file(halved(load_file(whole / FILES[0])), folder / FILES[0], {"format": "np"})
    run = json.loads((workdir / "run.json").read_text())
    updates = json.loads((folder / "config.json").read_text())["train_steps"]
    with tempfile.TemporaryDirectory() as temporary:  # pictures go beside what is scored
        copy = shutil.copytree(folder, pathlib.Path(temporary) / name)
        evaluator = EVALUATORS[number.split(".")[0]]
        score = evaluate(copy, [evaluator], options={"compositional": {"categories": SINGLE}})
    record = {
        "command": f"snapgen train --config={config} --workdir={workdir}",
        "trained_at": run["commit"],
        "machine": machine(),
        "commit": commit(),
        "updates": updates,
        "parameters": sum(x.size for x in load_file(folder / FILES[0]).values()),
        number: score[number.split()[0]],
    }
    (folder / "base.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="NAME", help="keep a run under this name")
    parser.add_argument("--workdir", type=pathlib.Path, help="of the run")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="that trains it, and further flags of the command")
    parser.add_argument("--score", metavar="NUMBER", default=SINGLE_OBJECTS, help="that it is scored by")
    options = parser.parse_args()
    if len({bool(options.store), bool(options.workdir), bool(options.config)}) > 1:
        parser.error("--store, --workdir and --config go together")
    if options.store:
        if options.store in names():
            parser.error(f"there is a base {options.store!r}; delete {BASES / options.store} to make it anew")
        store(options.store, options.workdir, options.config, options.score)
    for name in names():
        print(name, json.loads((BASES / name / "base.json").read_text()))


if __name__ == "__main__":
    main()
