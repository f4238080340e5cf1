"""The whole path on a laptop: train, sample, score, export, run the export, report, and a page that draws.

Each part leaves its result in the workdir, so a quickstart that was stopped goes on where it was.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from etils import epath

from snapgen_jax.bookkeeping import Stages
from snapgen_jax.config import Resolved, to_json
from snapgen_jax.evaluation.pictures import grid, png_bytes
from snapgen_jax.evaluation.report import write_report
from snapgen_jax.experiment import Experiment
from snapgen_jax.export.run import export_run
from snapgen_jax.generation import load
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.scoring import evaluate
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.metrics import read_lines

Numbers = dict[str, float]


def quickstart(resolved: Resolved, workdir: epath.PathLike) -> dict[str, float | None]:
    """Trains what the config says, then samples, scores, exports and reports.

    Args:
        resolved: the config of a recipe that makes images of the shapes world.
        workdir: where everything goes; `report.html` and `report.json` come last.

    Returns:
        The numbers of `report.json`.
    """
    workdir = epath.Path(workdir)
    experiment = Experiment(resolved, workdir)
    stages = Stages(workdir / "quickstart.json")
    parts: dict[str, Callable[[], Numbers]] = {
        "train": lambda: _train(experiment, workdir),
        "sample": lambda: _sample(experiment, workdir),
        "score": lambda: evaluate(workdir, ("compositional", "frechet", "diversity")),
        "export": lambda: export_run(workdir, workdir / "export" / "bundle"),
        "run the export": lambda: _run_bundle(experiment, workdir),
    }
    numbers: dict[str, float] = {}
    text = to_json(resolved.config)
    for name, part in parts.items():
        numbers |= stages.run(name, text, part)
    numbers["minutes"] = stages.minutes()
    in_browser = _write_page(workdir)
    report = write_report(workdir, numbers, title="SnapGen quickstart", prompts=experiment.recipe.config.sample_prompts)
    print(_closing(workdir, numbers, in_browser))
    return report


def _train(experiment: Experiment, workdir: epath.Path) -> Numbers:
    state = experiment.train()
    perf = read_lines(workdir / "metrics" / "perf.jsonl")
    batch = jax.tree.leaves(next(iter(experiment.recipe.batch_specs().values())))[0].shape[0]
    params = {name: player.params for name, player in state.players.items()}
    return {
        "images_seen": int(state.step) * batch,
        "images_per_second": float(np.median([p["examples_per_second"] for p in perf])),
        "params": count_parameters(params),
    }


def _sample(experiment: Experiment, workdir: epath.Path) -> Numbers:
    prompts = list(experiment.recipe.config.sample_prompts)
    begin = time.monotonic()
    images = load(workdir).generate(prompts, seed=1)
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    (workdir / "samples" / "prompts.png").write_bytes(png_bytes(grid(images, prompts)))
    return {"sample.seconds": time.monotonic() - begin}


def _run_bundle(experiment: Experiment, workdir: epath.Path) -> Numbers:
    """Checks the bundle with its own program, in a process of its own, and draws with LiteRT."""
    from snapgen_jax.export.client import LiteRTGenerator

    bundle = workdir / "export" / "bundle"
    subprocess.run([sys.executable, str(bundle / "verify.py")], check=True)
    prompts = list(experiment.recipe.config.sample_prompts)[:8]
    begin = time.monotonic()
    images = LiteRTGenerator(str(bundle)).generate(prompts)
    seconds = (time.monotonic() - begin) / len(prompts)
    (workdir / "samples" / "bundle.png").write_bytes(png_bytes(grid(images, prompts)))
    return {"export.seconds_per_image": seconds}


def _write_page(workdir: epath.Path) -> bool:
    """Writes the browser app beside the bundle, where LiteRT.js can be had; says why where it cannot."""
    from snapgen_jax.export.apps import write_app
    from snapgen_jax.export.apps.litertjs import UnavailableError

    try:
        write_app("web", str(workdir / "export" / "bundle"), str(workdir / "export" / "web"))
    except (UnavailableError, ConfigError, OSError) as error:
        print(f"no browser app was written: {error}")
        return False
    return True


def _closing(workdir: epath.Path, numbers: Mapping[str, float], in_browser: bool) -> str:
    lines = [
        f"\nfinished in {numbers['minutes']:.1f} minutes; overall score {numbers['score.overall']:.2f}",
        f"  report   {workdir}/report.html",
        f'  sample   snapgen sample --workdir={workdir} --prompt="a red circle left of a blue square"',
        f'  phone    snapgen sample --bundle={workdir}/export/bundle --prompt="two green stars"',
    ]
    if in_browser:
        lines.append(f"  browser  python3 {workdir}/export/web/serve.py    (then open the address that it prints)")
    return "\n".join(lines)
