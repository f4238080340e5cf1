"""Evaluators on a trained run: what `snapgen evaluate`, chains and benchmarks call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from snapgen_jax.config import resolve
from snapgen_jax.evaluation import registry
from snapgen_jax.evaluation.interfaces import EvaluationResult, EvaluatorSpec
from snapgen_jax.evaluation.pictures import png_bytes
from snapgen_jax.experiment import Experiment, judge
from snapgen_jax.generation import Generator, load, load_config, load_recipe
from snapgen_jax.training.exits import ConfigError


def configured(workdir: epath.PathLike) -> list[str]:
    """The evaluators of a run, by the names in its config.

    Raises:
        ConfigError: the folder is no workdir, or its config names none.
    """
    names = [spec.name for spec in load_recipe(workdir).evaluators()]
    if not names:
        raise ConfigError(
            f"{workdir}: its config names no evaluators, in `evaluation.during` or `evaluation.final`; choose some by "
            f"--names, of {', '.join(registry.EVALUATORS)}"
        )
    return names


def evaluate(
    workdir: epath.PathLike, names: Sequence[str], step: int | None = None, **choices: Any
) -> dict[str, float]:
    """The numbers of evaluators run on a trained run, see `measure`."""
    return measure(workdir, names, step, **choices).numbers


def measure(
    workdir: epath.PathLike,
    names: Sequence[str],
    step: int | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    decoder: epath.PathLike | None = None,
    generator: Generator | None = None,
) -> EvaluationResult:
    """Runs evaluators on a trained run; their pictures go to `samples/`.

    Args:
        workdir: the run.
        names: evaluators, whether or not the run's config names them.
        step: which checkpoint; the newest by default.
        generation: options of the generator, such as `steps` and `guidance`, for the evaluators that draw.
        options: further options of evaluators, by name.
        decoder: a run of a tiny decoder that takes the place of the codec's decoder.
        generator: the run's, where it is loaded already; in place of `step` and `decoder`.

    Returns:
        What all of them found.

    Raises:
        ConfigError: an evaluator is unknown, or does not take an option; `generation` is for none of them, since none
            draws.
    """
    generator = generator or load(workdir, step, decoder=decoder)
    experiment = Experiment(resolve(_asked_for(load_config(workdir), names)), workdir)
    stored = experiment.stored_generator(generator)
    known = {spec.name: spec for spec in generator.recipe.evaluators()}
    known |= {spec.name: spec for spec in experiment.recipe.evaluators() if spec.function is not None}
    reads = {name: name in known and known[name].function is not None for name in names}
    told = [name for name in generation or () if name != "batch_size"]  # which changes no number
    if told and all(reads.values()):
        raise ConfigError(
            f"{', '.join(told)}: said of drawing, and {', '.join(names)} reads the data and draws nothing; leave it "
            "out, or name an evaluator that draws"
        )
    found = EvaluationResult({}, {}, {})
    try:  # all of them before the first draws
        specs = {name: _with_options(known.get(name, EvaluatorSpec(name)), generation, options) for name in names}
        evaluators = {name: registry.create(spec) for name, spec in specs.items()}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for name, evaluator in evaluators.items():
        result = judge(experiment, name, evaluator, stored if reads[name] else generator)
        found.numbers.update(result.numbers)
        found.pictures.update(result.pictures)
        found.values.update(result.values)
    folder = epath.Path(workdir) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for title, picture in found.pictures.items():
        (folder / f"{title}.png").write_bytes(png_bytes(picture))
    return found


def _asked_for(config: Any, names: Sequence[str]) -> Any:
    """A run's config that also names the evaluators which measure through a function of the recipe."""
    if "evaluation" in config:
        when = config.evaluation
        named = (*when.during, *when.final)
        when.final = (*when.final, *(name for name in names if name not in named and registry.takes_function(name)))
    return config


def _with_options(
    spec: EvaluatorSpec, generation: Mapping[str, Any] | None, options: Mapping[str, Mapping[str, Any]] | None
) -> EvaluatorSpec:
    chosen = {**spec.options, **(options or {}).get(spec.name, {})}
    if generation and spec.function is None:
        chosen["options"] = {**chosen.get("options", {}), **generation}
    return dataclasses.replace(spec, options=chosen)
