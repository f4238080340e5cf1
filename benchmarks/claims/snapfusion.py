"""SnapFusion (arXiv 2306.00980): blocks that can be missed, a network evolved under a budget, eight guided steps.

One base network, trained once and shared with `adapters.py`, is what all of it starts from, as Stable Diffusion 1.5 is
in the paper. SnapGen's adversarial steps are trained on it anew: those of `snapgen.py` stand on another network. The
architectures that are compared stand in `benchmarks/results/evolution.json`, which `python -m benchmarks.evolution`
makes of a run of "robust"; without that file their rows are not there.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.claims.adapters import BASE
from benchmarks.claims.claim import DIVERSITY, FRECHET, SCORE, Claim, Metric, better, no_worse
from benchmarks.claims.trials import SINGLE, Draw, Effort, Measure, Trial
from benchmarks.evolution import OUT, SEARCHED
from snapgen_jax.data.prompts import make_prompts_with_scenes
from snapgen_jax.data.shapes import COLOURS, KINDS, render
from snapgen_jax.diffusion.schedules import FlowSchedule
from snapgen_jax.generation import load
from snapgen_jax.networks.pruned import pruned

SHIFT = 3.0  # of the base's times
WITHOUT = "validation_loss.without.one"
TO_TEACHER, TO_WHOLE = "teacher.mse", "decoder.mse"
LONG = Effort(3_000, 3)  # of distillation
NOISY, CLEAR = "step.noisy", "step.clear"
METRICS = {
    WITHOUT: Metric("loss without a block", smaller=True, digits=4),
    TO_TEACHER: Metric("MSE to 16 steps", smaller=True, digits=4),
    f"{TO_TEACHER}.1": Metric("unguided", smaller=True, digits=4),
    f"{TO_TEACHER}.4": Metric("guided by 4", smaller=True, digits=4),
    NOISY: Metric("error of a step, t >= 0.9", smaller=True, digits=5),
    CLEAR: Metric("error of a step, t < 0.9", smaller=True, digits=5),
    TO_WHOLE: Metric("MSE to the whole decoder", smaller=True, digits=5),
}


def effort(seeds: int, updates: int = 600, more: Effort | None = None) -> dict[str, Effort]:
    """Of a trial that starts from the base; `more` in budgets that have the time."""
    short = Effort(updates, seeds)
    return {"ci": Effort(), "short": short, **dict.fromkeys(("night", "gpu", "world"), more or short)}


def guided(*scales: float) -> dict[str, Draw]:
    """As the run's config says, and at other scales of guidance: the curve of score against Frechet."""
    return {"": Draw(), **{f"guidance {w:g}": Draw(options={"guidance": w}) for w in scales}}


def twice_the_steps(arg: str) -> tuple[str, ...]:
    """Of the student that has the config's own."""
    return (f"sampling.steps={4 if arg == 'runlocal' else 16}",)


def halves() -> dict[str, Draw]:
    """Of the base in the times of eight steps, those of one half as in sixteen."""
    coarse, fine = (tuple(map(float, FlowSchedule().grid(steps, SHIFT).t[:-1])) for steps in (8, 16))
    split = {"first half of 16": fine[:8] + coarse[4:], "last half of 16": coarse[:4] + fine[8:]}
    return {name: Draw(options={"times": times, "steps": len(times), "shift": 1.0}) for name, times in split.items()}


ABLATED = {"": Draw(evaluators=("compositional", "validation_loss"))}
CURVE = (1.0, 3.0, 4.0)
FROM_BASE = {"inputs.text_workdir": "base", "teacher.workdir": "base", "init_from": "base"}
FROM_SIXTEEN = {**FROM_BASE, "teacher.workdir": "sixteen", "init_from": "sixteen"}
ON_BASE = {**FROM_BASE, "trunk_workdir": "base"}
DECODER = {"inputs.codec.workdir": "autoencoder", "init_from": "autoencoder", "generator_workdir": "generator"}
DRAWS_LATENTS = {"quick": "quick_generator", "runlocal": "runlocal_generator"}
TRIALS = {
    "base": Trial(
        "adapters_base",
        BASE,
        draws={**{f"{n} steps": Draw(options={"steps": n}) for n in (32, 16, 8)}, **halves()},
        shared=True,
        stored="shapes_unet",
    ),
    "sixteen": Trial("steps", effort(1, more=Effort(3_000)), twice_the_steps, FROM_BASE, shared=True),
    "eight": Trial("steps", effort(3, more=LONG), earlier=FROM_SIXTEEN, draws=guided(*CURVE)),
    "eight, vanilla": Trial("steps", effort(3, more=LONG), ("guided_share=0.0",), FROM_SIXTEEN, guided(*CURVE)),
    "eight, distilled alone": Trial(
        "steps", effort(1, more=LONG), ("guided_share=0.0", "original_weight=0.0"), FROM_SIXTEEN, guided(*CURVE)
    ),
    "eight, guided alone": Trial("steps", effort(1, more=LONG), ("guided_share=1.0",), FROM_SIXTEEN, guided(*CURVE)),
    "eight, higher guidance": Trial(
        "steps", effort(1, more=LONG), ("guidance_range=(2.0, 6.0)",), FROM_SIXTEEN, guided(*CURVE)
    ),
    "four, adversarial": Trial("steps_adversarial", effort(3, more=LONG), earlier=ON_BASE),
    "eight, adversarial": Trial("steps_adversarial", effort(3, more=LONG), ("sampling.steps=8",), ON_BASE),
    "autoencoder": Trial("autoencoder", effort(1, 1_500), draws={}, shared=True, args={"quick": ""}),
    "generator": Trial(
        "pruned_decoder",
        effort(1, 1_500),
        earlier={"inputs.codec.workdir": "autoencoder"},
        draws={},
        shared=True,
        args=DRAWS_LATENTS,
    ),
    "pruned decoder": Trial("pruned_decoder", effort(1, 300), earlier=DECODER, draws={}, shared=True),
    "robust": Trial("robust", effort(3), (), {"init_from": "base"}, ABLATED),
    "plain": Trial("robust", effort(3), ("drop=0.0", "final_drop=0.0"), {"init_from": "base"}, ABLATED),
}
DISTANCE = {"eight": 8, "eight, vanilla": 8, "base": 8}  # trials, and the steps of each
SCALES = (1.0, 2.0, 4.0)


def distances(arg: str, workdirs: Mapping[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    """How far images of eight steps are from the teacher's of sixteen, from the same noise at the same guidance: the
    mean square of colours from 0 to 1, over all kinds in all colours; in "SCALE" the same at that guidance."""
    prompts = [f"a {colour} {kind}" for colour in COLOURS for kind in KINDS][: 4 if arg == "runlocal" else None]

    def images(name: str, steps: int, guidance: float) -> np.ndarray:
        drawn = generators[name].generate(prompts, steps=steps, guidance=guidance)
        return drawn.reshape(len(prompts), -1) / 255.0

    generators = {name: load(workdirs[name]) for name in ("sixteen", *DISTANCE)}
    rows: dict[str, dict[str, Any]] = {row: {} for row in DISTANCE_ROWS}
    for scale in SCALES:
        reference = images("sixteen", 16, scale)
        for name, row in zip(DISTANCE, DISTANCE_ROWS, strict=True):
            each = np.square(images(name, DISTANCE[name], scale) - reference).mean(axis=1)
            key = TO_TEACHER if scale == 2.0 else f"{TO_TEACHER}.{scale:g}"
            rows[row] |= {key: float(each.mean()), f"{key}.each": each.round(6).tolist()}
    return rows


def step_errors(arg: str, workdirs: Mapping[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    """L_dstl of distilled networks, and of the base in their place, unguided, on the same noised renders: at the steps
    from t = 0.9 up, where what is drawn is decided, and at those below."""
    count, batches = (2, 1) if arg == "runlocal" else (64, 16)
    scenes = [pair for category in SINGLE for pair in make_prompts_with_scenes(category, False, count)]
    rows: dict[str, dict[str, Any]] = {}
    base = load(workdirs["base"])
    for name, first in STEP_ROWS.items():
        run: Any = load(workdirs[name])
        recipe, frozen = run.recipe, run.recipe.load_frozen(None, "train")
        specs = next(iter(recipe.batch_specs().values()))
        size, length = specs["tokens"].shape

        @jax.jit
        def errors(params: Any, batch: Any, key: Any, recipe: Any = recipe, frozen: Any = frozen) -> Any:
            networks = recipe.weights(params, frozen)
            drawn = recipe.draw(networks, batch, key)
            return drawn["level"].t, recipe.distance(networks, drawn, recipe.predict(networks, drawn)[0])

        begun = {"model": {role: base.params["model"][role] for role in run.params["model"]}}
        for row, params in ((name, run.params), (first, begun)):
            found = []
            for i in range(batches):
                few = [scenes[j % len(scenes)] for j in range(i * size, (i + 1) * size)]
                tokens, mask = run.tokenizer.encode([prompt.prompt for prompt, _ in few], length)
                images = np.stack([render(scene, specs["image"].shape[1]) for _, scene in few])
                found.append(errors(params, {"image": images, "tokens": tokens, "mask": mask}, jax.random.key(i)))
            t, error = (np.concatenate(values) for values in zip(*found, strict=True))
            rows[row] = {}
            for key, chosen in ((NOISY, t >= 0.899), (CLEAR, t < 0.899)):
                each = error[chosen]
                rows[row] |= {key: float(each.mean()), f"{key}.each": each.round(7).tolist()}
    return rows


def decoded(arg: str, workdirs: Mapping[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
    """How far images of a decoder with half of the channels are from those of the whole one, trained and not, on drawn
    latents that it has not seen: the mean square of colours from 0 to 1."""
    prompts = [f"a {colour} {kind}" for colour in COLOURS for kind in KINDS][: 4 if arg == "runlocal" else None]
    latents = load(workdirs["generator"]).run(prompts, seed=2**31)["latent"]
    run: Any = load(workdirs["pruned decoder"])
    whole = run.recipe.inputs.codec(run.recipe.weights(run.params, run.frozen))
    begun = {"model": {"decoder": pruned(run.recipe.config.decoder, run.frozen["codec"])}}

    def images(codec: Any) -> np.ndarray:
        return np.clip(np.asarray(codec.decode(latents)) / 2 + 0.5, 0, 1).reshape(len(prompts), -1)

    rows, reference = {}, images(whole)
    for row, params in zip(DECODER_ROWS, (run.params, begun), strict=True):
        each = np.square(images(run.recipe.codec(params, run.frozen)) - reference).mean(axis=1)
        rows[row] = {TO_WHOLE: float(each.mean()), f"{TO_WHOLE}.each": each.round(7).tolist()}
    return rows


DECODER_ROWS = ("pruned decoder", "pruned decoder, untrained")
STEP_ROWS = {"sixteen": "base, 16 steps", "eight": "base, 8 steps", "eight, distilled alone": "base, 8 steps"}
DISTANCE_ROWS = ("eight", "eight, vanilla", "base, 8 steps")
MEASURES = {
    "distance to the teacher": Measure(
        distances,
        DISTANCE_ROWS,
        (TO_TEACHER, f"{TO_TEACHER}.1", f"{TO_TEACHER}.4"),
        ("ci", "short", "night", "gpu", "world"),
        ("sixteen", *DISTANCE),
    ),
    "errors of a step": Measure(
        step_errors,
        tuple(dict.fromkeys((*STEP_ROWS, *STEP_ROWS.values()))),
        (NOISY, CLEAR),
        ("ci", "short", "night", "gpu", "world"),
        ("base", *STEP_ROWS),
    ),
    "drawn latents, decoded": Measure(
        decoded,
        DECODER_ROWS,
        (TO_WHOLE,),
        ("ci", "short", "night", "gpu", "world"),
        ("generator", "pruned decoder"),
    ),
}
FOUND = json.loads(OUT.read_text())["architectures"] if OUT.exists() else {}
for _name, _made in FOUND.items():
    TRIALS[_name] = Trial(
        "robust",
        effort(1, more=Effort(600, 3)),
        (f"network.blocks={_made['network']['blocks']!r}", f"moved={_made['moved']!r}"),
        {"init_from": "robust"},
    )

CLAIMS = (
    Claim(
        "robust training: a block is missed less than by the network that went on as it was",
        (better("robust", "plain", WITHOUT),),
    ),
    Claim(
        "eight distilled steps reach nineteen twentieths of the score of 32",
        (no_worse("eight", "base, 32 steps", SCORE, 0.95),),
    ),
    Claim("eight distilled steps are better than eight of the base", (better("eight", "base, 8 steps"),)),
    Claim(
        "of what eight steps of the base lose, either half of the times loses a part",
        tuple(better(f"base, {half} half of 16", "base, 8 steps") for half in ("first", "last")),
    ),
    Claim(
        "without guidance and the loss on data in training, eight steps score better",
        (better("eight, distilled alone", "eight"),),
    ),
    Claim(
        "from the same noise eight distilled steps lead nearer to the teacher's sixteen, guided and not",
        tuple(better("eight", "base, 8 steps", key) for key in (TO_TEACHER, f"{TO_TEACHER}.1")),
    ),
    Claim(
        "at much noise a distilled step lies nearer to its teacher's two",
        (better("sixteen", "base, 16 steps", NOISY), better("eight", "base, 8 steps", NOISY)),
    ),
    Claim(
        "and at less noise",
        (better("sixteen", "base, 16 steps", CLEAR), better("eight", "base, 8 steps", CLEAR)),
    ),
    Claim(
        "with guidance in the loss they lead nearer at the highest guidance of training",
        (better("eight", "eight, vanilla", f"{TO_TEACHER}.4"),),
    ),
    Claim(
        "with guidance in the loss eight steps score better at the guidance of sampling",
        (better("eight", "eight, vanilla"),),
    ),
    Claim(
        "and at the highest guidance of training, where they are no less diverse",
        (
            better("eight, guidance 4", "eight, vanilla, guidance 4"),
            no_worse("eight, guidance 4", "eight, vanilla, guidance 4", DIVERSITY),
        ),
    ),
    Claim(
        "without guidance in the loss eight steps lie as near to the data",
        (no_worse("eight, vanilla", "eight", FRECHET),),
    ),
    Claim(
        "SnapGen's adversarial steps, trained as long on this base, score better in four and in eight",
        (better("four, adversarial", "eight"), better("eight, adversarial", "eight")),
    ),
    Claim(
        "eight distilled steps are more diverse than eight adversarial ones",
        (better("eight", "eight, adversarial", DIVERSITY),),
    ),
    Claim(
        "a decoder with half of the channels learns to decode drawn latents: a tenth of the error that pruning makes",
        (better("pruned decoder", "pruned decoder, untrained", TO_WHOLE, share=0.1),),
    ),
    *(
        Claim(f"evolution beats {name} at one budget of the table of times", (better(SEARCHED, name),))
        for name in FOUND
        if name != SEARCHED
    ),
    Claim(
        "a network that was trained to miss blocks misses them more",
        (better("plain", "robust", WITHOUT),),
        control=True,
    ),
)
