"""SnapGen (arXiv 2412.09619): the ladder of its UNet, distillation from a larger teacher, and four steps.

Networks that all seeds share (CLIP, the teacher) are trained once. On a GPU all seeds of a trial are one program, whose
convolutions XLA tries for minutes unless XLA_FLAGS=--xla_gpu_autotune_level=0; four jobs at a time keep it busy.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.claims.claim import DIVERSITY, FRECHET, HELD_OUT, SCORE, Claim, Metric, better, fewer, no_worse
from benchmarks.claims.scores import PermutedCaptions
from benchmarks.claims.trials import CONFIGS, IMAGES, Draw, Effort, Measure, Trial
from benchmarks.measuring import fastest
from snapgen_jax.config import load_experiment
from snapgen_jax.networks.counting import STEPS, ladder, macs
from snapgen_jax.networks.module import apply, for_platform, init
from snapgen_jax.networks.module import build as build_network
from snapgen_jax.networks.unet import UNetConfig

LATENT = {"height": 8, "width": 8, "tokens": 20}  # of the shapes world
FIRST_STAGES = ("res", "res+tf")  # readings of the first stage on the way down beside that of the ladder's end, "tf"
LADDER = tuple(f"ladder {step.name}" for step in STEPS)


# --- the ladder ------------------------------------------------------------------------------------------------------


def ladder_networks(arg: str) -> dict[str, UNetConfig]:
    """The networks of the design steps that lead to the student's, as the paper leads to its own: attention at the
    lowest resolution, and a first stage that is conditioned."""
    student: Any = load_experiment(f"{CONFIGS / 'student'}.py:{arg}").recipe.network
    depth = tuple(max(1, d) for d in student.down_depth)
    final = dataclasses.replace(student, first_stage="tf", down_depth=depth, self_attention=(False, True))
    return ladder(final)


def ladder_changes(name: str, arg: str) -> list[str]:
    """Overrides that make of the student's network that of a step."""
    fields = dataclasses.asdict(ladder_networks(arg)[name])
    return [f"network.{field}={value}" for field, value in fields.items() if field != "kind"]


def first_stage_changes(reading: str, arg: str) -> list[str]:
    """The end of the ladder with another reading of its first stage. Alone under "tf", which the published counts fit
    best, that stage is told the time nowhere; "res+tf" tells it, at a residual block more for each unit."""
    return [change for change in ladder_changes("G", arg) if not change.startswith("network.first_stage=")] + [
        f"network.first_stage={reading}"
    ]


def multiply_adds(config: UNetConfig) -> float:
    """Of one call for one image of the shapes world, in millions."""
    return macs(config, config.input_spec(1, **LATENT)) / 1e6


def milliseconds(configs: Mapping[str, UNetConfig], rounds: int = 5, batch: int = 16) -> dict[str, float]:
    """Time on the CPU of a network's forward pass on a batch of 32 px, the fastest of some rounds in which all take
    turns."""
    calls: dict[str, Callable[[], Any]] = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for name, config in configs.items():
            network, _ = build_network(for_platform(config, "cpu"))
            params = jax.jit(lambda key, network=network: init(network, key))(jax.random.key(0))
            inputs = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), config.input_spec(batch, **LATENT))
            forward = jax.jit(lambda p, *x, network=network: apply(network, p, *x)[0])
            calls[name] = functools.partial(forward, params, *inputs)
        return {name: 1e3 * seconds for name, seconds in fastest(calls, rounds).items()}


def ladder_costs(arg: str, workdirs: Mapping[str, pathlib.Path]) -> dict[str, dict[str, float]]:
    """Multiply-adds and milliseconds of every network of the ladder, side by side on one machine."""
    networks = {f"ladder {name}": network for name, network in ladder_networks(arg).items()}
    times = milliseconds(networks)
    return {
        row: {"multiply_adds": multiply_adds(network), "milliseconds": times[row]} for row, network in networks.items()
    }


# --- what is trained -------------------------------------------------------------------------------------------------

CLIP = {"ci": Effort(), "short": Effort(1_000), "night": Effort(1_000), "gpu": Effort(1_000), "world": Effort(12_000)}
TEACHER = {
    "ci": Effort(),
    "short": Effort(7_000),
    "night": Effort(12_000),
    "gpu": Effort(12_000),
    "world": Effort(60_000),
}
STUDENT = {
    "ci": Effort(),
    "short": Effort(2_000),
    "night": Effort(4_000, 3),
    "gpu": Effort(4_000, 3),
    "world": Effort(34_400, 3),
}
FEW_STEP = {
    "ci": Effort(),
    "short": Effort(600),
    "night": Effort(1_000, 3),
    "gpu": Effort(1_000, 3),
    "world": Effort(12_000, 3),
}
# What the short budget has no room for.
LONG_STUDENT, LONG_FEW_STEP = ({k: e for k, e in efforts.items() if k != "short"} for efforts in (STUDENT, FEW_STEP))
# In the other budgets the teacher is a UNet, most of which is convolutions.
INT8 = {budget: effort for budget, effort in STUDENT.items() if budget in ("ci", "world")}
DESIGN_STEP = {"ci": Effort(), "night": Effort(4_000), "gpu": Effort(4_000, 3), "world": Effort(34_400, 3)}

UNGUIDED = {"guidance": 1.0}
JOINT, EXPOSURE = "joint_frechet.distance", "exposure.gap"
METRICS = {
    JOINT: Metric("joint Frechet", margin=0.006, smaller=True),
    EXPOSURE: Metric("exposure gap", smaller=True, digits=2),
}
BOTH = {  # what the paper sets beside four steps
    "": Draw(),
    "unguided": Draw({**UNGUIDED, "steps": 28}, evaluators=(*IMAGES, "joint_frechet")),
}
OF_DISTILLED = {
    **BOTH,
    "4 steps": Draw({**UNGUIDED, "steps": 4}),
    "permuted captions": Draw(evaluators=("compositional",), wrap=PermutedCaptions),
}
EXPOSED = {"": Draw(evaluators=(*IMAGES, "exposure"))}
TEXT = {"inputs.text_workdir": "clip"}
TAUGHT = {**TEXT, "teacher.workdir": "teacher"}
FROM_DISTILLED = {**TAUGHT, "init_from": "distilled", "trunk_workdir": "distilled"}
ROLLED_OUT = ("teacher.rollout_steps=8",)
OWN_SAMPLES = ("own_samples=0.5",)
TRIALS = {  # in the order in which they are made
    "clip": Trial("clip", CLIP, draws={}, shared=True),
    "teacher": Trial("teacher", TEACHER, earlier=TEXT, shared=True),
    "alone": Trial("student", STUDENT, earlier=TEXT, draws=BOTH),
    "distilled": Trial("student_distilled", STUDENT, earlier=TAUGHT, draws=OF_DISTILLED),
    "output only": Trial("student_distilled", STUDENT, ("feature_weight=0.0",), TAUGHT, BOTH),
    "fixed share": Trial("student_distilled", STUDENT, ("scaling.alpha=constant",), TAUGHT),
    "no scaling": Trial("student_distilled", STUDENT, ("scaling.alpha=none",), TAUGHT),
    "four steps": Trial("student_few_step", FEW_STEP, earlier=FROM_DISTILLED, draws=EXPOSED),
    "no adversary": Trial("student_few_step", FEW_STEP, ("adversarial_weight=0.0",), FROM_DISTILLED),
    "no teacher": Trial("student_few_step", FEW_STEP, ("output_weight=0.0",), FROM_DISTILLED),
    "eight steps": Trial(
        "student_few_step",
        {"ci": Effort(), "night": Effort(1_000), "gpu": Effort(1_000)},
        ("sampling.steps=8",),
        FROM_DISTILLED,
    ),
    # The teacher is a full-step one: its own grid is that of its flow, followed from each time of sampling to the data.
    "four steps, rolled out": Trial("student_few_step", LONG_FEW_STEP, ROLLED_OUT, FROM_DISTILLED),
    "eight steps, rolled out": Trial(
        "student_few_step", LONG_FEW_STEP, ("sampling.steps=8", *ROLLED_OUT), FROM_DISTILLED
    ),
    "four steps, own samples": Trial("student_few_step", LONG_FEW_STEP, OWN_SAMPLES, FROM_DISTILLED, EXPOSED),
    **{
        f"ladder {step.name}": Trial("student", DESIGN_STEP, functools.partial(ladder_changes, step.name), TEXT)
        for step in STEPS
    },
    **{
        f"first stage {reading}": Trial("student", DESIGN_STEP, functools.partial(first_stage_changes, reading), TEXT)
        for reading in FIRST_STAGES
    },
    "teacher in int8": Trial("student_distilled", INT8, ("teacher.precision=int8",), TAUGHT),
    "with ratio": Trial("student_distilled", LONG_STUDENT, ("scaling.ratio=running",), TAUGHT),
    "ratio of each": Trial("student_distilled", LONG_STUDENT, ("scaling.ratio=running", "scaling.terms=each"), TAUGHT),
    "alone in bfloat16": Trial("student", {"gpu": Effort(4_000, 3)}, earlier=TEXT, dtype="bfloat16"),
}
MEASURES = {"ladder costs": Measure(ladder_costs, LADDER, ("multiply_adds", "milliseconds"), tuple(DESIGN_STEP))}


# --- what is claimed -------------------------------------------------------------------------------------------------

CLAIMS = (
    Claim(
        "the ladder ends at a network that is smaller and faster, with an equal or better score",
        (
            no_worse("ladder G", "ladder A"),
            *(fewer("ladder G", "ladder A", cost) for cost in ("parameters", "multiply_adds", "milliseconds")),
        ),
    ),
    Claim(
        "a first stage that is told the time and the text is worth its residual blocks",
        (better("first stage res+tf", "ladder G"), better("first stage res+tf", "first stage res")),
    ),
    # Guidance trades the likeness of all images to the data for what each shows: likeness is compared without it.
    Claim(
        "distillation helps: output and features > output alone > no teacher",
        (
            better("distilled", "output only"),
            better("output only", "alone"),
            better("distilled", "alone", HELD_OUT),
            better("distilled, unguided", "alone, unguided", FRECHET),
        ),
    ),
    Claim(
        "the operator S: one ratio of losses (SnapGen++, equation 8) costs nothing, and none of each loss is better",
        (no_worse("with ratio", "distilled"), no_worse("with ratio", "ratio of each")),
    ),
    Claim(
        "a distilled student's pairs of image and caption are nearer to real ones than those of a student alone",
        (better("distilled, unguided", "alone, unguided", JOINT),),
    ),
    Claim(
        "timestep-aware scaling helps, against a fixed share and against none",
        (better("distilled", "fixed share"), better("distilled", "no scaling")),
    ),
    Claim(
        "the student comes near to a teacher several times its size",
        (no_worse("distilled", "teacher", share=0.95), fewer("distilled", "teacher", "parameters", 3.0)),
    ),
    Claim(
        "four steps are nearly enough, without guidance",
        (
            no_worse("four steps", "distilled, unguided", share=0.95),
            better("four steps", "distilled, unguided", DIVERSITY, share=0.8),
        ),
    ),
    Claim(
        "few-step distillation does it: undistilled, without adversary and without teacher are worse",
        (
            better("four steps", "distilled, 4 steps"),
            better("four steps", "no adversary"),
            better("four steps", "no teacher"),
        ),
    ),
    Claim(
        "a full-step teacher teaches more by its flow to the data than by one velocity, in four and in eight steps",
        (better("four steps, rolled out", "four steps"), no_worse("eight steps, rolled out", "four steps, rolled out")),
    ),
    Claim(
        "a generator trained on its own samples loses less on them, and no score",
        (
            better("four steps, own samples", "four steps", EXPOSURE),
            no_worse("four steps, own samples", "four steps"),
        ),
    ),
    Claim("a teacher in int8 teaches as much", (no_worse("teacher in int8", "distilled"),)),
    Claim("bfloat16 costs no score", (no_worse("alone in bfloat16", "alone"),)),
    Claim(
        "captions do not matter: another prompt's images score as well",
        (no_worse("distilled, permuted captions", "distilled", SCORE),),
        control=True,
    ),
)
