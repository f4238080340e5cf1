"""SnapGen's decoder beside Stable Diffusion 3's: size, compute, time and memory as TFLite, and what it learns.

    python -m benchmarks.decoder --latency              # counts, and both as TFLite on this CPU, in one run
    python -m benchmarks.decoder --train --budget=ci    # the shapes world: large, tiny, and tiny without this or that
    python -m benchmarks.decoder --train                # the same at length
    python -m benchmarks.decoder --photographs          # large and tiny on real photographs, scored on others

Each part writes its figures into `results/decoder.json`. Latency is that of drawn weights, which cost what trained ones
cost; the two take turns, and the fastest round of each counts, because other work on the machine can only add.
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
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.measuring import by_turns, machine
from benchmarks.memory import memory
from snapgen_jax.config import load_experiment
from snapgen_jax.experiment import Experiment
from snapgen_jax.export.client import litert_unit
from snapgen_jax.export.convert import to_tflite
from snapgen_jax.generation import load_weights
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.counting import count_macs
from snapgen_jax.networks.module import apply, build, count_parameters, init
from snapgen_jax.networks.tiny_decoder import TinyDecoderConfig
from snapgen_jax.training.loop import inference_weights

RESULT = pathlib.Path(__file__).parent / "results" / "decoder.json"
PUBLISHED_SPEEDUP = 54  # Hu et al. 2025: on an iPhone 16 Pro Max, at 1024 px
LATENT_CHANNELS, REDUCTION = 16, 8
BUDGETS = {"ci": 40, "full": 1_500}  # updates
VARIANTS = {
    "tiny": [],
    "no_group_norm": ["decoder.norm=none"],
    "no_adversarial_term": ["loss.adversarial=0.0"],
    "ordinary_convolutions": ["decoder.convolution=ordinary"],
}


# --- size and compute ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder as a function of its parameters and normalised latents, in float32."""

    name: str
    config: Any
    method: str

    def __call__(self, params: Any, *, latent: jax.Array) -> dict[str, jax.Array]:
        network, _ = build(self.config)
        return {"image": apply(network, params, latent, method=self.method)}

    def spec(self) -> Any:
        """Shapes of all parameters; the encoder's, of the large one, are not used."""
        return build(self.config)[1]

    def params(self) -> Any:
        """Drawn."""
        return jax.jit(lambda key: init(build(self.config)[0], key))(jax.random.key(0))


def decoders() -> tuple[Decoder, Decoder]:
    """The large one and the tiny one."""
    large = AutoencoderConfig.preset("sd3", dtype="float32")
    tiny = TinyDecoderConfig.preset("sd3", dtype="float32", depthwise="grouped")
    return Decoder("large", large, "decode"), Decoder("tiny", tiny, "__call__")


def latent(pixels: int) -> jax.ShapeDtypeStruct:
    """Of a square image."""
    side = pixels // REDUCTION
    return jax.ShapeDtypeStruct((1, side, side, LATENT_CHANNELS), np.float32)


def counts(pixels: int = 1024) -> dict[str, Any]:
    """Parameters and multiply-adds of both at 1024 px, and their ratios."""
    found: dict[str, Any] = {}
    for decoder in decoders():
        spec = decoder.spec()
        macs = count_macs(lambda p, x, decoder=decoder: decoder(p, latent=x), spec, latent(pixels))
        found[decoder.name] = {"parameters": count_parameters(spec.get("decoder", spec)), "gmac": macs / 1e9}
    ratio = {name: found["large"][name] / found["tiny"][name] for name in ("parameters", "gmac")}
    return {"pixels": pixels, **found, "ratio": ratio}


# --- time and memory as TFLite ---------------------------------------------------------------------------------------


def latency(pixels: int, rounds: int, threads: int) -> dict[str, Any]:
    """Milliseconds and peak memory of both at a size that both can do."""
    x = np.random.default_rng(0).standard_normal(latent(pixels).shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as scratch:
        files = {}
        for decoder in decoders():
            path = pathlib.Path(scratch) / f"{decoder.name}.tflite"
            files[decoder.name] = to_tflite(decoder, decoder.params(), {"latent": latent(pixels)}, "decoder", path)
        units = {name: litert_unit(path, "decoder", threads) for name, path in files.items()}
        times = by_turns({name: functools.partial(unit, latent=x) for name, unit in units.items()}, rounds)
        del units
        memory = {name: _peak_memory(path, pixels) for name, path in files.items()}
        megabytes = {name: path.stat().st_size / 1e6 for name, path in files.items()}
    milliseconds = {name: 1e3 * min(values) for name, values in times.items()}
    return {
        "pixels": pixels,
        "threads": threads,
        "rounds": rounds,
        "milliseconds": milliseconds,
        "median_milliseconds": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "speedup": milliseconds["large"] / milliseconds["tiny"],
        "published_speedup": PUBLISHED_SPEEDUP,
        "peak_megabytes": memory,
        "file_megabytes": megabytes,
    }


def _peak_memory(path: pathlib.Path, pixels: int) -> float:
    """Megabytes that a fresh process needs to load a file and run it, over what it needs to start."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.decoder", f"--measure={path}", f"--pixels={pixels}"],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def measure(path: str, pixels: int) -> None:
    """Prints the megabytes of `_peak_memory`, in this process."""
    import ai_edge_litert.interpreter  # noqa: F401  # its own size is not the decoder's

    x = np.zeros(latent(pixels).shape, np.float32)
    before = memory("VmHWM")
    litert_unit(pathlib.Path(path), "decoder", 1)(latent=x)
    print((memory("VmHWM") - before) / 1e6)


# --- what they learn -------------------------------------------------------------------------------------------------


def train(budget: str, root: pathlib.Path) -> dict[str, Any]:
    """The autoencoder of the shapes world, then each variant of the tiny decoder on its latents.

    Returns:
        `{variant: reconstruction.* of its "tiny" decoder}`, "large" for the autoencoder's own, parameters and seconds.
    """
    steps = BUDGETS[budget]
    common = _common(steps)
    _run("autoencoder", root / "autoencoder", common)
    found: dict[str, Any] = {"budget": budget, "steps": steps, "batch": 16, "seeds": 1}
    for name, changes in VARIANTS.items():
        numbers, seconds = _run(
            "tiny_decoder", root / name, [*common, f"inputs.codec.workdir={root / 'autoencoder'}", *changes]
        )
        config = TinyDecoderConfig.preset("shapes", **_fields(changes))
        found[name] = {**_of("tiny", numbers), "parameters": count_parameters(build(config)[1]), "seconds": seconds}
        found["large"] = _of("large", numbers)
    large = build(AutoencoderConfig.preset("shapes"))[1]["decoder"]
    found["large"]["parameters"] = count_parameters(large)
    return found


def _fields(changes: list[str]) -> dict[str, Any]:
    """`["decoder.norm=none"]` -> `{"norm": "none"}`."""
    pairs = (change.removeprefix("decoder.").split("=") for change in changes if change.startswith("decoder."))
    return dict(pairs)


def _of(decoder: str, numbers: dict[str, float]) -> dict[str, float]:
    prefix = f"reconstruction.{decoder}."
    return {name.removeprefix(prefix): value for name, value in numbers.items() if name.startswith(prefix)}


# --- photographs -----------------------------------------------------------------------------------------------------

TRAINED_ON = ("astronaut", "coffee", "rocket", "china")
HELD_OUT = ("chelsea", "flower")
TILE, STRIDE, SIDE = 64, 32, 32


def photographs(budget: str, root: pathlib.Path) -> dict[str, Any]:
    """The networks of the shapes world on tiles of photographs that scikit-image and scikit-learn ship, and how they do
    on tiles of photographs that they have not seen.

    Returns:
        `{decoder: reconstruction.*}` for "large" and "tiny", and what was trained.
    """
    for split, names in (("train", TRAINED_ON), ("held_out", HELD_OUT)):
        write_tiles(names, root / split)
    steps = BUDGETS[budget]
    source = ["data.source=folder", "data.captions=none", "data.flip=random", f"data.path={root / 'train'}"]
    common = [*_common(steps), *source]
    _run("autoencoder", root / "autoencoder", common)
    codec = f"inputs.codec.workdir={root / 'autoencoder'}"
    _run("tiny_decoder", root / "tiny", [*common, codec])
    apart = [f"data.path={root / 'held_out'}", "data.validation_share=0.9"]
    experiment = Experiment(load_experiment("configs/shapes/tiny_decoder.py", [*common, codec, *apart]), root / "tiny")
    (evaluator,) = experiment.evaluators()
    weights = load_weights(root / "tiny", experiment.recipe)
    numbers = evaluator.run(weights, experiment.recipe.load_frozen(None)).numbers
    return {
        "budget": budget,
        "steps": steps,
        "pixels": SIDE,
        "trained_on": TRAINED_ON,
        "held_out": HELD_OUT,
        **{decoder: _of(decoder, numbers) for decoder in ("large", "tiny")},
    }


def write_tiles(names: Sequence[str], folder: pathlib.Path) -> None:
    """Writes overlapping tiles of `SIDE` pixels of some photographs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        photo = Image.fromarray(_photograph(name))
        for y in range(0, photo.height - TILE + 1, STRIDE):
            for x in range(0, photo.width - TILE + 1, STRIDE):
                tile = photo.crop((x, y, x + TILE, y + TILE)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                tile.save(folder / f"{name}_{y:04d}_{x:04d}.png")


def _photograph(name: str) -> np.ndarray:
    return load_sample_image(f"{name}.jpg") if name in ("china", "flower") else getattr(skimage.data, name)()


# --- runs ------------------------------------------------------------------------------------------------------------


def _common(steps: int) -> list[str]:
    return [
        f"train_steps={steps}",
        f"loss.adversarial_from_steps={steps // 2}",
        "evaluation.every_steps=0",
        "tensorboard=False",
        f"log_every_steps={max(1, steps // 10)}",
    ]


def _run(name: str, workdir: pathlib.Path, overrides: list[str]) -> tuple[dict[str, float], float]:
    """Trains a config, or finds it trained; returns the last reconstruction's numbers, and seconds of training."""
    resolved = load_experiment(f"configs/shapes/{name}.py", overrides)
    begin = time.perf_counter()
    experiment = Experiment(resolved, workdir)
    state = experiment.train()
    seconds = time.perf_counter() - begin
    (evaluator,) = experiment.evaluators()
    return evaluator.run(inference_weights(state), experiment.recipe.load_frozen(None)).numbers, seconds


def main() -> None:
    """Measures what is asked for, prints it, and stores it beside what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", action="store_true", help="counts, and time and memory as TFLite")
    parser.add_argument("--train", action="store_true", help="the shapes world")
    parser.add_argument("--photographs", action="store_true", help="real photographs, split by photograph")
    parser.add_argument("--budget", choices=tuple(BUDGETS), default="full")
    parser.add_argument("--workdir", help="where the runs are kept (default: a temporary folder)")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.pixels)
        return
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.latency:
        record["counts"] = counts()
        record["latency"] = {"machine": machine(), **latency(options.pixels, options.rounds, options.threads)}
    if options.train:
        with tempfile.TemporaryDirectory() as scratch:
            record["shapes"] = {"machine": machine(), **train(options.budget, pathlib.Path(options.workdir or scratch))}
    if options.photographs:
        with tempfile.TemporaryDirectory() as scratch:
            root = pathlib.Path(options.workdir or scratch) / "photographs"
            record["photographs"] = {"machine": machine(), **photographs(options.budget, root)}
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
