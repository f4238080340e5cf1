"""Where a run stands, read from its workdir alone."""

from __future__ import annotations

import json
import time
from typing import Any

from etils import epath

from snapgen_jax.training.checkpoint import Checkpointer, complete_steps
from snapgen_jax.training.exits import ConfigError, DamagedError
from snapgen_jax.training.lifetime import PHASES
from snapgen_jax.training.metrics import read_lines
from snapgen_jax.training.progress import duration


def status(workdir: epath.Path) -> str:
    """A few lines: last step, last checkpoint, last loss, where the time went, and the next action.

    Raises:
        ConfigError: the folder is no workdir, or its config is damaged.
    """
    config_path = workdir / "config.json"
    if not config_path.exists():
        raise ConfigError(f"{workdir} is not a workdir: it has no config.json")
    config = _config(config_path)
    total = config["train_steps"]
    steps = read_lines(workdir / "metrics" / "train.jsonl")
    perf = read_lines(workdir / "metrics" / "perf.jsonl")
    saved = complete_steps(workdir)
    last = steps[-1]["step"] if steps else 0
    lines = [f"step        {last:,} of {total:,} ({100 * last / total:.1f}%)"]
    damage = _damage(workdir, saved[-1]) if saved else ""
    lines += [f"checkpoint  {saved[-1]:,}{' (damaged)' if damage else ''}" if saved else "checkpoint  none yet"]
    if steps:
        shown = ", ".join(f"{k} {v:.4g}" for k, v in steps[-1].items() if isinstance(v, float))
        lines += [f"metrics     {shown}", f"skipped     {sum(not s['finite'] for s in steps)} updates were not finite"]
    if perf:
        ago = duration(max(0.0, time.time() - perf[-1]["time"]))
        lines += [f"speed       {perf[-1]['examples_per_second']:,.0f} examples/s, last written {ago} ago"]
    goodput_path = workdir / "metrics" / "goodput.json"
    if goodput_path.exists():
        seconds = json.loads(goodput_path.read_text())
        whole = sum(seconds[name] for name in (*PHASES, "lost"))
        parts = ", ".join(f"{name} {duration(seconds[name])}" for name in (*PHASES, "lost") if seconds[name] >= 0.5)
        lines += [f"time        {duration(whole)}: {parts}; goodput {100 * seconds['step'] / max(whole, 1e-9):.0f}%"]
    if damage:
        action = damage
    elif "schema" not in config:
        action = f"an earlier version wrote this workdir; rewrite it once with `snapgen upgrade {workdir}`"
    elif saved and saved[-1] >= total:
        action = f"finished: snapgen sample --workdir={workdir} --prompt=..., or snapgen export --workdir={workdir}"
    else:
        action = "go on with the command in run.json" + (f"; it resumes at step {saved[-1]:,}" if saved else "")
    return "\n".join([*lines, f"next        {action}"])


def _config(path: epath.Path) -> dict[str, Any]:
    """The config of a run, with at least its `train_steps`."""
    try:
        config = json.loads(path.read_text())
        if config["train_steps"] > 0:
            return config
        reason = "its train_steps is not above 0"
    except json.JSONDecodeError as error:
        reason = f"it is no JSON: {error}"
    except (KeyError, TypeError):
        reason = "it has no train_steps"
    raise ConfigError(f"{path} is no config of a run: {reason}; restore it from a copy")


def _damage(workdir: epath.Path, step: int) -> str:
    """What is wrong with a checkpoint, as far as it shows without its arrays; "" for nothing."""
    checkpointer = Checkpointer(workdir)
    try:
        checkpointer.look(step)
    except DamagedError as error:
        return str(error)
    finally:
        checkpointer.close()
    return ""
