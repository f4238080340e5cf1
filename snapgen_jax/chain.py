"""Several runs in a row, each of which starts from earlier ones: trained, resumed, scored and set side by side.

A chain is a config file whose `get_config` names stages; each stage is a config of its own, in whose keys the workdirs
of earlier stages are filled in.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from snapgen_jax import experiment as experiments
from snapgen_jax.config import build_dataclass, from_json, load_config, to_json
from snapgen_jax.config_file import read
from snapgen_jax.data.prompts import CATEGORIES
from snapgen_jax.experiment import Experiment, differences
from snapgen_jax.networks.module import count_parameters
from snapgen_jax.quickstart import Stages
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.metrics import read_lines
from snapgen_jax.training.state import TrainState
from snapgen_jax.typed import closest

Numbers = dict[str, float]
COLUMNS = {
    "params": "parameters",
    "images_seen": "images seen",
    "score.overall": "score",
    "score.seen": "seen",
    "score.heldout": "held-out",
    "frechet.distance": "Frechet",
    "diversity.pairwise": "diversity",
    "clip.score": "CLIP",
    "validation_loss.accuracy": "accuracy",
}
# How a run is watched and kept, and over which devices it is spread.
LEARNS_THE_SAME = {f.name for f in dataclasses.fields(LoopConfig)} - {"seed", "train_steps", "microbatches"}


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """One row of the table: a trained stage, drawn from in one way.

    Attributes:
        label: its name.
        options: of the generator, such as `steps` and `guidance`; the stage's own otherwise.
        decoder: an earlier stage whose tiny decoder takes the place of the codec's; "" for the codec's own.
        against: label of the row that it is to better.
    """

    label: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoder: str = ""
    against: str = ""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One run of a chain.

    Attributes:
        name: of the stage, and of its workdir under the chain's.
        config: its config file, beside the chain's, with ":arg" where it takes one.
        earlier: {config key: name of the earlier stage whose workdir is filled in}.
        rows: how it is drawn from; none for a stage that draws nothing.
    """

    name: str = ""
    config: str = ""
    earlier: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: tuple[RowConfig, ...] = ()


@dataclasses.dataclass(frozen=True)
class ChainConfig:
    """A chain.

    Attributes:
        stages: in the order in which they are trained.
        scores: evaluators of every row.
        per_category: prompts of each category of the compositional score.
        categories: of that score.
        examples: images of the Frechet distance.
    """

    stages: tuple[StageConfig, ...] = ()
    scores: tuple[str, ...] = ("compositional", "frechet", "diversity")
    per_category: int = 64
    categories: tuple[str, ...] = CATEGORIES
    examples: int = 512


def load_chain(spec: str, overrides: Sequence[str] = ()) -> tuple[ChainConfig, dict[str, list[str]]]:
    """Reads a chain's config "path/to/file.py:arg".

    Args:
        spec: the config file.
        overrides: "STAGE.key=value", each for the config of a stage.

    Returns:
        The chain, with paths of configs as they are from here, and the overrides of each stage.

    Raises:
        ConfigError: a key, a stage or a file that is named is not there.
    """
    chain: ChainConfig = build_dataclass(ChainConfig, read(spec))
    names = [stage.name for stage in chain.stages]
    of_stage: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in of_stage:
            raise ConfigError(f"--config.{override}: the chain has no stage {name!r}{closest(name, names)}")
        of_stage[name].append(rest)
    folder = pathlib.Path(spec.partition(":")[0]).parent
    stages = []
    for i, stage in enumerate(chain.stages):
        needed = [*stage.earlier.values(), *(row.decoder for row in stage.rows if row.decoder)]
        if unknown := [name for name in needed if name not in names[:i]]:
            raise ConfigError(
                f"stage {stage.name!r} starts from {', '.join(unknown)}; before it there are {', '.join(names[:i])}"
            )
        stages.append(dataclasses.replace(stage, config=str(folder / stage.config)))
    return dataclasses.replace(chain, stages=tuple(stages)), of_stage


def run_chain(
    chain: ChainConfig, overrides: Mapping[str, Sequence[str]], workdir: epath.PathLike
) -> dict[str, Numbers]:
    """Trains every stage, or goes on with it, and scores the rows that are not on record.

    A stage that began with another config, or that starts from one that did, is trained anew; the folder of what was
    gets a number. That of a stage on record may be deleted: it is trained again where something still needs it.

    Args:
        chain, overrides: as from `load_chain`.
        workdir: the stages lie in it, each in a folder of its name; `chain.json` and the table `chain.md` too.

    Returns:
        {row: numbers}.
    """
    root = epath.Path(workdir)
    configs = {}
    for stage in chain.stages:
        earlier = [f"{key}={root / name}" for key, name in stage.earlier.items()]
        configs[stage.name] = load_config(stage.config, [*earlier, *overrides.get(stage.name, ())])
    asked = {
        "compositional": {"per_category": chain.per_category, "categories": chain.categories},
        "frechet": {"examples": chain.examples},
    }
    parts = Stages(root / "chain.json")
    stages = {stage.name: stage for stage in chain.stages}

    def train(name: str) -> Numbers:
        present(stages[name].earlier.values())
        folder, config = root / name, configs[name]
        began = folder / "began.json"
        if began.exists() and (changed := changes(chain, name, json.loads(began.read_text()), configs)):
            aside = next(path for i in itertools.count(1) if not (path := root / f"{name}.{i}").exists())
            folder.rename(aside)
            print(f"{name} is trained anew ({changed}); what it was lies in {aside}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(began, json.dumps(depends(name)))
        experiment = Experiment(config, folder)
        experiments.prepare_workdir(config, folder)
        state = experiment.train()
        seen = read_lines(folder / "metrics" / "evaluation.jsonl")
        last = seen[-1] if seen and seen[-1]["step"] == int(state.step) else {}
        return {
            "params": parameters(state),
            "images_seen": int(state.step) * int(config.batch_size),
            **{k: v for k, v in last.items() if k.startswith("validation_loss.")},
        }

    def depends(name: str) -> dict[str, str]:
        return {other: to_json(configs[other]) for other in with_earlier(chain, name)}

    def trained(name: str) -> Numbers:
        return parts.run(f"train {name}", depends(name), functools.partial(train, name))

    def present(names: Iterable[str]) -> None:
        """Trains a stage again whose numbers are on record, and whose folder is gone."""
        for name in names:
            if not (root / name).exists():
                parts.forget(f"train {name}")
            trained(name)

    def score(name: str, row: RowConfig) -> Numbers:
        present([name, *([row.decoder] if row.decoder else [])])
        decoder = root / row.decoder if row.decoder else None
        return experiments.evaluate(root / name, chain.scores, generation=row.options, options=asked, decoder=decoder)

    rows: dict[str, Numbers] = {}
    for name, stage in stages.items():
        numbers = trained(name)
        rows |= {} if stage.rows else {name: numbers}
        for row in stage.rows:
            all_of_row = [depends(name), depends(row.decoder), row.decoder, dict(row.options), chain.scores, asked]
            scores = parts.run(f"score {row.label}", all_of_row, functools.partial(score, name, row))
            rows[row.label] = {**numbers, **scores}
    text = f"{table(chain, rows)}\n\n{parts.minutes():.1f} minutes in all\n"
    write_whole(root / "chain.md", text)
    print("\n" + text)
    return rows


def with_earlier(chain: ChainConfig, name: str) -> list[str]:
    """A stage, and all that it starts from, directly or not; nothing for ""."""
    if not name:
        return []
    earlier = next(stage.earlier.values() for stage in chain.stages if stage.name == name)
    return list(dict.fromkeys([name, *(more for other in earlier for more in with_earlier(chain, other))]))


def changes(chain: ChainConfig, name: str, began: Mapping[str, str], configs: Mapping[str, Any]) -> str:
    """What a stage began with and is otherwise now, in it and in all that it starts from; "" if it may go on.

    Args:
        chain: that it is of.
        name: the stage.
        began: {stage: its config as JSON}, of the stage and of all that it starts from.
        configs: {stage: its config now}.
    """
    found, depends = [], with_earlier(chain, name)
    for stage in chain.stages:
        if stage.name in depends:
            old = from_json(began[stage.name], name) if stage.name in began else {}
            for key, (was, now) in differences(old, configs[stage.name]).items():
                if key not in stage.earlier and key.partition(".")[0] not in LEARNS_THE_SAME:
                    found.append(f"{stage.name}.{key} was {was}, is now {now}")
    return "; ".join(found)


def parameters(state: TrainState) -> int:
    """Of the model, without the projectors that distillation drops."""
    params = state.players["model"].params
    return count_parameters({name: leaf for name, leaf in params.items() if "projector" not in name})


def table(chain: ChainConfig, rows: Mapping[str, Numbers]) -> str:
    """The rows as Markdown; in a row that has another to better, differences stand in parentheses."""
    against = {row.label: row.against for stage in chain.stages for row in stage.rows}
    columns = {key: title for key, title in COLUMNS.items() if any(key in numbers for numbers in rows.values())}

    def cell(label: str, key: str) -> str:
        if key not in rows[label]:
            return ""
        value = rows[label][key]
        if key in ("params", "images_seen"):
            return f"{int(value):,}"
        other = rows.get(against.get(label, ""), {}).get(key)
        return f"{value:.3f}" + ("" if other is None else f" ({value - other:+.3f})")

    def name(label: str) -> str:
        return label + (f", against {against[label]}" if against.get(label) else "")

    lines = [["stage", *columns.values()], *[[name(label), *(cell(label, key) for key in columns)] for label in rows]]
    widths = np.max([[len(text) for text in line] for line in lines], axis=0)
    text = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])
