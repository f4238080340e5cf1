"""What limits the quickstart's score, and what it owes to each of its ingredients: its config with one thing changed.

    python -m benchmarks.quickstart_limits --change=images       # four times the images
    python -m benchmarks.quickstart_limits --change=width        # twice the width
    python -m benchmarks.quickstart_limits --change=layout       # the truth about every object instead of a caption
    python -m benchmarks.quickstart_limits --change=neighbours   # text states that do not know their neighbours
    python -m benchmarks.quickstart_limits --change=dense        # no captions that say where everything is
    python -m benchmarks.quickstart_limits --change=positions    # the network is not told positions
    python -m benchmarks.quickstart_limits --change=times        # training times of one mean throughout

Each run keeps its workdir under --workdir and resumes; its numbers go to `results/quickstart_limits_<change>.json`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.measuring import machine
from snapgen_jax.config import load_experiment
from snapgen_jax.data.prompts import CATEGORIES, make_prompts_with_scenes
from snapgen_jax.data.shapes_captions import layout
from snapgen_jax.evaluation.compositional import PER_CATEGORY, CompositionalScore
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.process import prepare

QUICKSTART = "configs/shapes/quickstart.py"
RESULTS = pathlib.Path(__file__).parent / "results"
WITHOUT = {
    "neighbours": ["inputs.text.neighbours=0", "inputs.text.attention=causal"],
    "dense": ["data.shapes.dense_share=0.0"],
    "positions": ["network.absolute_positions=False"],
    "times": ["schedule.mean=1.05", "schedule.final_mean=None"],
}
CHANGES = ("none", "images", "width", "layout", *WITHOUT)


class LayoutGenerator:
    """Draws a fixed prompt from the layout of a scene that meets it."""

    def __init__(self, generator: Any):
        self._generator = generator
        self._layouts: dict[str, str] = {}
        for category in CATEGORIES:
            for heldout in (False, True):
                for prompt, scene in make_prompts_with_scenes(category, heldout, PER_CATEGORY // 2):
                    self._layouts[prompt.prompt] = layout(scene)

    def generate(self, prompts: Sequence[str], **options: Any) -> np.ndarray:
        """As `Generator.generate`."""
        return self._generator.generate([self._layouts[prompt] for prompt in prompts], **options)


def overrides(change: str) -> list[str]:
    """What differs from the quickstart's config."""
    base: Any = load_experiment(QUICKSTART).config
    match change:
        case "none":
            return []
        case "images":
            return [f"train_steps={4 * base.train_steps}"]
        case "width":
            wide = {name: 2 * base.network[name] for name in ("head_dim", "embedding_width")}
            channels = tuple(2 * c for c in base.network.channels)
            return [f"network.channels={channels}", *(f"network.{name}={value}" for name, value in wide.items())]
        case "layout":
            return ["data.shapes.captions=layout", "inputs.text.max_tokens=48"]
        case _:
            return WITHOUT[change]


def main() -> None:
    """Trains, scores and records one change."""
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--change", choices=CHANGES, required=True)
    parser.add_argument("--workdir", default="runs/quickstart_limits")
    arguments = parser.parse_args()
    workdir = pathlib.Path(arguments.workdir) / arguments.change
    resolved = load_experiment(QUICKSTART, overrides(arguments.change))
    config: Any = resolved.config
    experiment = Experiment(resolved, workdir)
    state = experiment.train()
    generator: Any = load(workdir)
    score = CompositionalScore()(LayoutGenerator(generator) if arguments.change == "layout" else generator).numbers
    run = json.loads((workdir / "run.json").read_text())
    record = {
        "change": arguments.change,
        "overrides": overrides(arguments.change),
        "images_seen": config.train_steps * config.batch_size,
        "params": count_parameters(state.players["model"].params),
        "score": {name: value for name, value in score.items() if name.startswith("score.")},
        "machine": machine(),
        "commit": run["commit"],
        "packages": run["packages"],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"quickstart_limits_{arguments.change}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
