"""Our networks beside PyTorch on one NVIDIA GPU, in one run.

    python -m benchmarks.gpu                                  # all rows, the most valuable first; about 40 minutes
    python -m benchmarks.gpu --rows=train_256,sd35_b1         # some
    python -m benchmarks.gpu --seconds=800                    # what fits, in order of value
    python -m benchmarks.gpu --table                          # the table of the last run on this card
    python -m benchmarks.gpu --tiny                           # the same on a few pixels, on a CPU too

Each result is a line of JSON in `benchmarks/results/gpu-CARD.jsonl` as soon as it is made, labelled with card, commit
and versions; at the end a table in Markdown follows. JAX and PyTorch run one after another, each in processes of its
own that hold the GPU alone. A row that fails costs itself: its line says why. PyTorch is that of `make oracle`, unless
`--torch` names another Python that has torch and diffusers.

Every process begins with empty caches of compiled programs: "cold" is the compilation that fills them, "warm" one that
finds them filled. TFLOP are counted (`networks.counting`, a training step three times its forward), the same for both.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks.gpu.rows import TOKENS, Framework, Row, chosen, jobs, that_fit
from benchmarks.gpu.side import MARK
from benchmarks.gpu.summary import read, table
from benchmarks.measuring import commit
from snapgen_jax.networks.counting import macs
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.unet import UNetConfig

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Line = dict[str, Any]
Write = Callable[[Line], None]


def task_of(rows: Sequence[Row], tiny: bool) -> Line:
    """What a process is told: the rows with their arithmetic in TFLOP, and the networks."""
    unet, mmdit = UNetConfig.preset("smoke" if tiny else "t2i"), MMDiTConfig.preset("smoke" if tiny else "sd35_large")
    tokens = {name: 13 if tiny else count for name, count in TOKENS.items()}

    def tflop(row: Row) -> float:
        if row.kind == "operation":
            return 0.0
        network = mmdit if row.kind == "mmdit" else unet
        side, length = row.side // 8, tokens["mmdit" if row.kind == "mmdit" else "unet"]
        one = macs(network, network.input_spec(batch=1, height=side, width=side, tokens=length))
        return 2e-12 * row.batch * one * {"train": 3, "sample": 4}.get(row.kind, 1)

    return {
        "rows": [{**row.as_dict(), "tflop": tflop(row)} for row in rows],
        "unet": "smoke" if tiny else "t2i",
        "unet_fields": dataclasses.asdict(unet),
        "mmdit": "smoke" if tiny else "sd35_large",
        "mmdit_fields": _of_diffusers(mmdit),
        "tokens": tokens,
        "matmul": 256 if tiny else 8192,
        "seconds": 0.02 if tiny else 1.0,
    }


def _of_diffusers(config: MMDiTConfig) -> Line:
    return {
        "num_layers": config.depth,
        "dual_attention_layers": list(range(config.dual)),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.position_size,
    }


def measure(
    command: Sequence[str], framework: Framework, rows: Sequence[Row], tiny: bool, until: float, write: Write
) -> None:
    """Measures rows in a process, and in another one what a process left when it ended early.

    Args:
        command: that starts the process.
        rows: that share a process.
        until: when it must have ended, on the clock of `time.monotonic`.
        write: takes each line of results.
    """
    left = list(rows)
    while left and time.monotonic() < until:
        with tempfile.TemporaryDirectory() as caches:
            done, why = _run(command, caches, task_of(left, tiny), until, write)
        if done < len(left):
            write({"row": left[done].name, "framework": framework, "error": why})
        left = left[done + 1 :]
    for row in left:
        write({"row": row.name, "framework": framework, "skipped": "the time was up"})


def _run(command: Sequence[str], caches: str, task: Line, until: float, write: Write) -> tuple[int, str]:
    """Runs a process to its end; returns how many rows it came to the end of, and how it ended itself."""
    done = 0
    environment = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": f"{caches}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
    }
    with (pathlib.Path(caches) / "stderr").open("w+") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(min(until - time.monotonic(), threading.TIMEOUT_MAX), stop)
        timer.start()
        try:
            try:
                with process.stdin as file:
                    json.dump(task, file)
            except BrokenPipeError:
                pass  # how it ended tells why
            for text in process.stdout:
                line = json.loads(text.removeprefix(MARK)) if text.startswith(MARK) else {}
                if "finished" in line:
                    done += 1
                elif line:
                    write(line)
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        last = (said.read().strip().splitlines() or [""])[-1]
    return done, "the time was up" if late.is_set() else f"the process ended with {process.returncode}: {last}"[:600]


def card() -> str:
    """Name of the first NVIDIA GPU, "" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def torch_python(given: str) -> str:
    """The Python that runs torch: the one given, that of `make oracle`, or this one; "" for none."""
    if given:
        return "" if given == "none" else given
    oracle = ROOT / ".venv-oracle" / "bin" / "python"
    if oracle.exists():
        return str(oracle)
    return sys.executable if importlib.util.find_spec("torch") else ""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names with commas, see rows.py; all by default")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="in all; a row that does not fit is left out"
    )
    parser.add_argument("--torch", default="", metavar="PYTHON", help="that has torch; 'none' for our rows alone")
    parser.add_argument("--tiny", action="store_true", help="a few pixels, which any machine computes")
    parser.add_argument("--out", type=pathlib.Path, help="file of the lines")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the table of the last run")
    options = parser.parse_args(argv)
    try:
        options.rows = chosen(options.rows)
    except ValueError as error:
        parser.error(f"--rows: {error}")
    options.card = f"{card() or 'CPU'}, tiny" if options.tiny else card()
    if not options.card and not (options.table and options.out):
        parser.error("nvidia-smi lists no GPU here; run this on a machine with one, or with --tiny")
    if options.out is None:
        word = re.sub(r"^nvidia[ -]", "", options.card.lower()).replace(" ", "-")
        options.out = (
            pathlib.Path(tempfile.gettempdir()) / "gpu-tiny.jsonl" if options.tiny else RESULTS / f"gpu-{word}.jsonl"
        )
    if options.table and not options.out.exists():
        parser.error(f"{options.out} does not exist; measure first, or name a file with --out")
    options.torch = torch_python(options.torch)
    if not options.torch and not options.table:
        print("no torch here: our rows alone. `make oracle`, or name a Python with --torch", file=sys.stderr)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, stores and prints. Returns 1 where a row failed."""
    options = arguments(argv)
    if options.table:
        print(table(read(options.out)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no process is left behind
    jax.config.update("jax_platforms", "cpu")  # this process counts; the GPU is for those that it starts
    start = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about, failed = {"card": options.card, "commit": commit(), "run": start}, []
    until = time.monotonic() + options.seconds
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write(line: Line) -> None:
        text = json.dumps({**about, **line})
        print(text, flush=True)
        with options.out.open("a") as file:
            file.write(text + "\n")
        if "error" in line:
            failed.append(line["row"])

    pythons: dict[Framework, str] = {"jax": sys.executable, "torch": options.torch}
    for job in jobs(options.rows):
        for framework, python in pythons.items():
            if not python:
                continue
            rows = that_fit(job, framework, until - time.monotonic())
            for row in job:
                if row not in rows:
                    left = max(0, round(until - time.monotonic()))
                    write({"row": row.name, "framework": framework, "skipped": f"{left} s left were too few"})
            small = [row.in_small() if options.tiny else row for row in rows]
            command = [python, "-m", f"benchmarks.gpu.{framework}_side"]
            measure(command, framework, small, options.tiny, until, write)
    print("\n" + table(read(options.out, start)))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
