"""Runs a chain: every stage trained or derived, resumed, scored and set side by side."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from snapgen_jax import chain_derive
from snapgen_jax.bookkeeping import Json, Stages
from snapgen_jax.chain import ChainConfig, RowConfig, StageConfig, with_earlier
from snapgen_jax.chain_table import Numbers, table
from snapgen_jax.config import Resolved, from_json, read_one, resolve, to_json
from snapgen_jax.experiment import Experiment
from snapgen_jax.networks.attention_table import KERNELS
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.scoring import evaluate
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.metrics import read_lines
from snapgen_jax.training.state import TrainState
from snapgen_jax.workdir import differences

BEGAN = "began.json"  # in the folder of a stage: what it was when it began

# How a run is watched and kept, and over which devices it is spread. Nor does it matter which kernel attention has.
LEARNS_THE_SAME = {f.name for f in dataclasses.fields(LoopConfig)} - {"seed", "train_steps", "microbatches"}
KERNEL_NAMES = {"auto", *KERNELS}


def run_chain(
    chain: ChainConfig, overrides: Mapping[str, Sequence[str]], workdir: epath.PathLike
) -> dict[str, Numbers]:
    """Trains or derives every stage, or goes on with it, and scores the rows that are not on record.

    A stage that began with another config, with other options or with another derived result, or that starts from one
    that did, is done anew; the folder of the old one gets a number. The folder of a stage on record may be deleted: it
    is done again where something still needs it.

    Args:
        chain, overrides: as from `load_chain`.
        workdir: the stages lie in it, each in a folder of its name; `chain.json` and the table `chain.md` too.

    Returns:
        {row: numbers}.

    Raises:
        ConfigError: a config is refused, filled with the examples of what is to be derived or with what was derived; a
            run is to start from one that neither the chain makes nor is there; or a derived result does not look like
            its example.
    """
    root = epath.Path(workdir)
    run = _Chain(chain, overrides, root)
    run.check_starts()
    rows: dict[str, Numbers] = {}
    for stage in chain.stages:
        numbers = run.done(stage)
        if not stage.derive and not stage.rows:
            rows[stage.name] = numbers
        for row in stage.rows:
            rows[row.label] = {**numbers, **run.scores(stage, row)}
    text = f"{table(chain, rows)}\n\n{run.parts.minutes():.1f} minutes in all\n"
    write_whole(root / "chain.md", text)
    print("\n" + text)
    return rows


class _Chain:
    """A chain in its workdir.

    Attributes:
        parts: what is done, and with what.
        configs: {run: its config}; where a derived value is not there yet, with that of the example.
        derived: {stage that derives: its result}, of those that are done.
    """

    def __init__(self, chain: ChainConfig, overrides: Mapping[str, Sequence[str]], root: epath.Path):
        self.chain, self.overrides, self.root = chain, overrides, root
        self.stages = {stage.name: stage for stage in chain.stages}
        self.derived: dict[str, Json] = {}
        # Read once: an edit while the chain runs belongs to its next start.
        self._read = {stage.name: read_one(stage.config) for stage in chain.stages if stage.config}
        self.configs = {name: self._config(self.stages[name]) for name in self._read}
        self.parts = Stages(root / "chain.json")

    def check_starts(self) -> None:
        """Raises where a run that is not on record starts from one that neither the chain makes nor is there."""
        made = {str(self.root / name) for name in self.stages}
        for name, resolved in self.configs.items():
            stage, start = self.stages[name], resolved.experiment.init_from
            there = not start or start in made or "init_from" in stage.filled or epath.Path(start).exists()
            if not there and not self.parts.has(_part(stage), self._label(stage)):
                raise ConfigError(
                    f"the stage {name!r} starts from {start!r}, which is not there; name a run: "
                    f"--config.{name}.init_from=RUN"
                )

    def done(self, stage: StageConfig) -> Json:
        """The numbers of a run, or the result of a stage that derives; computed now if they are not on record."""
        self._fill(stage)
        part, folder = _part(stage), self.root / stage.name
        file = folder / chain_derive.FILE
        if stage.derive and folder.exists() and not file.exists():
            self.parts.forget(part)
        if not self.parts.has(part, self._label(stage)):
            self._make_present(stage.earlier.values())
            self._fill(stage)  # what was derived again may be another result
        do = functools.partial(self._derive if stage.derive else self._train, stage)
        result = self.parts.run(part, self._label(stage), do)
        if stage.derive:
            if file.exists():  # an edit of it counts; where the whole folder is gone, the record does
                result = chain_derive.read(file, _what(stage), stage.example)
            self.derived[stage.name] = result
        return result

    def scores(self, stage: StageConfig, row: RowConfig) -> Numbers:
        """The scores of a row."""
        asked = {
            "compositional": {"per_category": self.chain.per_category, "categories": self.chain.categories},
            "frechet": {"examples": self.chain.examples},
        }

        def score() -> Numbers:
            self._make_present([stage.name, *([row.decoder] if row.decoder else [])])
            decoder = self.root / row.decoder if row.decoder else None
            return evaluate(
                self.root / stage.name, self.chain.scores, generation=row.options, options=asked, decoder=decoder
            )

        all_of_row = [
            *(self.depends(stage.name), self.depends(row.decoder), row.decoder, dict(row.options)),
            *(self.chain.scores, asked),
        ]
        return self.parts.run(f"score {row.label}", all_of_row, score)

    def depends(self, name: str) -> dict[str, str]:
        """`{stage: what it is, as JSON}` of a stage and of all that it starts from, see `describe`."""
        return {
            other: describe(
                self.stages[other], self.configs.get(other), self.derived.get(other) if other != name else None
            )
            for other in with_earlier(self.chain, name)
        }

    def _label(self, stage: StageConfig) -> Json:
        """All that a stage's result on record depends on; a derived one was checked against the example, too."""
        return [self.depends(stage.name), stage.example] if stage.derive else self.depends(stage.name)

    def _config(self, stage: StageConfig) -> Resolved:
        filled = {
            key: chain_derive.taken(self.derived.get(name, self.stages[name].example), path)
            for key, (name, path) in stage.sources().items()
        }
        changes = [
            *(f"{key}={self.root / name}" for key, name in stage.earlier.items()),
            *(f"{key}={value!r}" for key, value in filled.items()),
            *self.overrides.get(stage.name, ()),
        ]
        try:
            return resolve(self._read[stage.name], changes, stage.config)
        except ConfigError as error:
            if not filled:
                raise
            values = ", ".join(f"{key}={value!r} ({stage.filled[key]})" for key, value in filled.items())
            raise ConfigError(f"stage {stage.name!r}, filled with {values}: {error}") from error

    def _fill(self, stage: StageConfig) -> None:
        if stage.filled:
            self.configs[stage.name] = self._config(stage)

    def _make_present(self, names: Iterable[str]) -> None:
        """Does stages that are on record, and whose folders are gone, again."""
        wanted = set(names)
        for stage in self.chain.stages:
            if stage.name in wanted:
                if not (self.root / stage.name).exists():
                    self.parts.forget(_part(stage))
                self.done(stage)

    def _changed(self, stage: StageConfig) -> str:
        """What differs from what the stage in this folder began with, see `changes`; "" if it may go on."""
        began = self.root / stage.name / BEGAN
        if not began.exists():
            return ""
        return changes(self.chain, stage.name, json.loads(began.read_text()), self.depends(stage.name))

    def _set_aside(self, stage: StageConfig) -> epath.Path:
        """The folder of a stage that may go on in it, or one that is not there yet."""
        folder = self.root / stage.name
        if changed := self._changed(stage):
            aside = next(p for i in itertools.count(1) if not (p := self.root / f"{stage.name}.{i}").exists())
            folder.rename(aside)
            verb = "derived" if stage.derive else "trained"
            print(f"{stage.name} is {verb} anew ({changed}); the old one lies in {aside}", flush=True)
        return folder

    def _train(self, stage: StageConfig) -> Numbers:
        resolved = self.configs[stage.name]
        if self._changed(stage):  # what would be refused leaves the old run in its place
            Experiment(resolved, self.root / f"{stage.name}.new").check()
        folder = self._set_aside(stage)
        began = json.dumps(self.depends(stage.name))
        state = Experiment(resolved, folder).train(accepted=lambda: write_whole(folder / BEGAN, began))
        lines = read_lines(folder / "metrics" / "evaluation.jsonl")
        last = lines[-1] if lines and lines[-1]["step"] == int(state.step) else {}
        return {
            "params": parameters(state),
            "images_seen": int(state.step) * resolved.recipe.batch_size,
            **{k: v for k, v in last.items() if k.startswith("validation_loss.")},
        }

    def _derive(self, stage: StageConfig) -> Json:
        folder = self._set_aside(stage)
        write_whole(folder / BEGAN, json.dumps(self.depends(stage.name)))
        earlier = {key: self.root / name for key, name in stage.earlier.items()}
        function = chain_derive.function_of(stage.name, stage.derive)
        return chain_derive.derive(function, _what(stage), earlier, folder, stage.options, stage.example)


def describe(stage: StageConfig, resolved: Resolved | None, derived: Json = None) -> str:
    """What a stage is, as JSON: the config of a run; function, options and result of a stage that derives.

    Args:
        stage: the stage.
        resolved: config of a run.
        derived: the result, where the stage is described to one that starts from it.
    """
    if resolved is not None:
        return to_json(resolved.config)
    what = {"derive": stage.derive, "earlier": dict(stage.earlier), "options": stage.options}
    return json.dumps(what if derived is None else {**what, "derived": derived}, sort_keys=True)


def changes(chain: ChainConfig, name: str, began: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What a stage began with and is otherwise now, in it and in all that it starts from; "" if it may go on.

    Args:
        chain: that it is of.
        name: the stage.
        began: {stage: what it was, see `describe`}, of the stage and of all that it starts from.
        now: the same as it is now.
    """
    found, depends = [], with_earlier(chain, name)
    for stage in chain.stages:
        if stage.name in depends:
            old = _described(began[stage.name]) if stage.name in began else {}
            for key, (was, is_now) in differences(old, _described(now[stage.name])).items():
                kernels = key.endswith(".attention") and {was, is_now} <= KERNEL_NAMES
                same = kernels or key.partition(".")[0] in LEARNS_THE_SAME
                if stage.derive or (key not in stage.earlier and not same):
                    found.append(f"{stage.name}.{key} was {was}, is now {is_now}")
    return "; ".join(found)


def _described(text: str) -> Mapping[str, Any] | ConfigDict:
    values = json.loads(text)
    return values if "derive" in values else from_json(text)


def _part(stage: StageConfig) -> str:
    return f"{'derive' if stage.derive else 'train'} {stage.name}"


def _what(stage: StageConfig) -> str:
    return f"stage {stage.name!r} ({stage.derive})"


def parameters(state: TrainState) -> int:
    """Of the model, without the projectors that distillation drops."""
    params = state.players["model"].params
    return count_parameters({name: leaf for name, leaf in params.items() if "projector" not in name})
