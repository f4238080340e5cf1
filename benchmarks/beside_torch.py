"""Our networks on a CPU beside the same ones in PyTorch, in one run.

    python -m benchmarks.beside_torch update            # an update of the quickstart's UNet, beside its port
    python -m benchmarks.beside_torch sd_unet           # a UNet of Stable Diffusion 1.5, a quarter as wide
    python -m benchmarks.beside_torch update --compile  # torch.compile too, which takes minutes

Both take turns, each with all cores, several calls a turn; times are medians over the turns, and the ratio is that of
PyTorch's fastest form to ours. PyTorch runs in a process of its own, by the Python of `make oracle` or the one that
`--torch` names. `--save=NAME` adds the line to `benchmarks/results/beside_torch-NAME.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax

from benchmarks.gpu.__main__ import torch_python
from benchmarks.measuring import append, by_turns, commit, machine, random_like
from snapgen_jax.config import load_config, resolve
from snapgen_jax.diffusion.path import T_MIN
from snapgen_jax.diffusion.schedules import FlowSchedule
from snapgen_jax.inputs.stored import StoredConfig
from snapgen_jax.networks.module import apply, build, for_platform, init
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.process import prepare
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.keys import key
from snapgen_jax.training.ravel import gather
from snapgen_jax.training.recipe import Recipe
from snapgen_jax.training.step import make_step

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = "configs/shapes/quickstart.py"
TOKENS, SIDE = 20, 8  # of a caption, and of a latent in cells
Call = Callable[[], Any]


class Worker:
    """The process that runs PyTorch's half."""

    def __init__(self, python: str, task: Mapping[str, Any]):
        """Starts it and lets it build.

        Raises:
            RuntimeError: it ended.
        """
        command = [python, "-m", "benchmarks.torch_worker"]
        self._process = subprocess.Popen(command, text=True, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.about = self._ask(task)

    def run(self, form: str, calls: int) -> None:
        """Calls one of its forms so many times, and waits."""
        self._ask({"form": form, "calls": calls})

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise RuntimeError(f"PyTorch's process ended with {self._process.wait()}; what it said stands above")
        return json.loads(answer)


def update(config: str = QUICKSTART) -> tuple[dict[str, Call], dict[str, Any]]:
    """Updates of the quickstart's UNet on states of captions that are given, and of the quickstart itself, which trains
    its text encoder beside it; and what the worker is told."""
    recipe = resolve(load_config(config)).build("cpu")
    whole: FlowMatchingConfig = recipe.config
    network, schedule = cast(UNetConfig, whole.network), cast(FlowSchedule, whole.schedule)
    stored = StoredConfig(
        image_sizes=whole.inputs.image_sizes,
        reduction=whole.inputs.image_sizes[0][0] // SIDE,
        latent_channels=network.latent_channels,
        dtype="float32",
        context_tokens=TOKENS,
        context_width=network.context_width,
        pooled_width=network.pooled_width or 0,
    )
    alone: Any = FlowMatching(dataclasses.replace(whole, inputs=stored), "cpu")
    rule = {
        "learning_rate": whole.optimizer.learning_rate,
        "weight_decay": whole.optimizer.weight_decay,
        "clip_norm": whole.optimizer.clip_norm,
        "ema_decay": whole.ema_decay,
        "full_from": whole.loss_full_from,
        "t_min": T_MIN,
        "mean": schedule.mean,
        "std": schedule.std,
    }
    sizes = {"batch": whole.batch_size, "side": SIDE, "tokens": TOKENS}
    task = {"what": "update", "unet": dataclasses.asdict(network), "rule": rule, **sizes}
    return {"ours": _steps(alone), "ours, with the text encoder": _steps(recipe)}, task


def _steps(recipe: Recipe) -> Call:
    batch = random_like(next(iter(recipe.batch_specs().values())))
    box = [gather(jax.jit(recipe.init)(key(0, 0, "init")))]
    step = jax.jit(make_step(recipe, 0), donate_argnums=0)

    def call() -> Any:
        box[0], metrics = step(box[0], {}, batch)
        return metrics

    return call


def sd_unet(width: int = 80, side: int = 64) -> tuple[dict[str, Call], dict[str, Any]]:
    """The forward pass at 512 px, one image; and what the worker is told."""
    channels, groups, tokens = (width, 2 * width, 4 * width, 4 * width), 16, 77
    config = SDUNetConfig.preset("sd15", channels=channels, time_width=width, groups=groups)
    network, _ = build(for_platform(config, "cpu"))
    params = jax.jit(functools.partial(init, network))(jax.random.key(0))
    inputs = random_like(config.input_spec(batch=1, height=side, width=side, tokens=tokens))
    run = jax.jit(lambda params, inputs: apply(network, params, *inputs)[0])
    theirs = {
        "sample_size": side,
        "block_out_channels": channels,
        "norm_num_groups": groups,
        "cross_attention_dim": config.context_width,
        "attention_head_dim": config.heads[0],
    }
    task = {"what": "sd_unet", "config": theirs, "batch": 1, "side": side, "tokens": tokens}
    return {"ours": lambda: run(params, inputs)}, task


def compare(ours: Mapping[str, Call], task: Mapping[str, Any], python: str, calls: int, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds of each of ours and of each of PyTorch's forms, and PyTorch's fastest over "ours"."""
    worker = Worker(python, task)
    turns: dict[str, Call] = {}
    for name, call in ours.items():
        turns[name] = functools.partial(_several, call, calls)
    for form in worker.about["forms"]:
        turns[f"torch, {form}"] = functools.partial(worker.run, form, calls)
    try:
        times = by_turns(turns, rounds)
    finally:
        worker.close()
    medians = {name: 1e3 * statistics.median(seconds) / calls for name, seconds in times.items()}
    fastest = min(ms for name, ms in medians.items() if name.startswith("torch"))
    return {"ms": medians, "torch_over_ours": fastest / medians["ours"], "torch": worker.about["torch"]}


def _several(call: Call, calls: int) -> Any:
    for _ in range(calls - 1):
        call()
    return call()


def main() -> None:
    """Measures, prints and stores."""
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("update", "sd_unet"))
    parser.add_argument("--calls", type=int, default=5, help="in a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch; ours takes all cores")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; needs a C++ compiler")
    parser.add_argument("--torch", default="", metavar="PYTHON", help="that has torch and diffusers")
    parser.add_argument("--save", default="", metavar="NAME", help="of the machine, for benchmarks/results/")
    options = parser.parse_args()
    python = torch_python(options.torch)
    if not python:
        parser.error("no torch here: `make oracle`, or name a Python that has it with --torch")
    ours, task = {"update": update, "sd_unet": sd_unet}[options.what]()
    task = {**task, "threads": options.threads, "compile": options.compile}
    found = compare(ours, task, python, options.calls, options.rounds)
    about = {"calls": options.calls, "rounds": options.rounds, "threads": options.threads}
    append(
        {"what": options.what, **found, **about, "machine": machine(), "commit": commit()}, "beside_torch", options.save
    )


if __name__ == "__main__":
    main()
