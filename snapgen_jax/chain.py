"""A chain of runs, each of which starts from earlier ones: its config, and what can be wrong with it.

A chain is a config file whose `get_config` names stages. A stage is a run or derives.

A run has a config of its own, in whose keys the workdirs of earlier stages are filled in:

    {"name": "student", "config": "student.py", "earlier": {"teacher.workdir": "teacher"}}

A stage that derives has a function in place of a config (see `chain_derive`). It trains, evaluates or counts what it
needs, and returns JSON; later runs take values of it for keys of their configs:

    {"name": "search", "derive": "my_package.search:depth", "earlier": {"teacher": "teacher"},
     "options": {"depths": (2, 4, 8)}, "example": {"depth": 4}}
    {"name": "student", "config": "student.py", "filled": {"network.depth": "search.depth"}}

`example` is what the result will look like. Its values stand in for the derived ones when the chain starts, so that
every config is checked before anything is trained; the result is checked against it when it is there.

`chain_run` trains, resumes and scores a chain; `chain_table` sets its rows side by side.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from snapgen_jax.bookkeeping import as_json
from snapgen_jax.bounds import at_least, check
from snapgen_jax.chain_derive import function_of, taken
from snapgen_jax.config import build_dataclass
from snapgen_jax.config_file import read
from snapgen_jax.data.prompts import CATEGORIES
from snapgen_jax.overrides import parse_override
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.typed import closest


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """One row of the table: a trained stage, drawn from in one way.

    Attributes:
        label: its name.
        options: of the generator, such as `steps` and `guidance`; the stage's own otherwise.
        decoder: an earlier stage whose tiny decoder takes the place of the codec's; "" for the codec's own.
        against: label of its baseline.
    """

    label: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoder: str = ""
    against: str = ""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a chain: a run, which has a `config`, or one that derives, which has a `derive`.

    Attributes:
        name: of the stage, and of its workdir under the chain's.
        config: a run: its config file, beside the chain's, with ":arg" where it takes one.
        derive: "module.path:function" of `derive(stages, workdir, options)`.
        earlier: a run: {config key: name of the earlier stage whose workdir is filled in}. One that derives: {name that
            its function knows a workdir by: name of the earlier stage}.
        filled: a run: {config key: "STAGE.dotted.path" of a value that an earlier stage derives}.
        rows: a run: how it is drawn from; none for a run that draws nothing.
        options: one that derives: of its function.
        example: one that derives: a result with the keys and the types of what it will return, whose values later
            configs accept.
    """

    name: str = ""
    config: str = ""
    derive: str = ""
    earlier: Mapping[str, str] = dataclasses.field(default_factory=dict)
    filled: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: tuple[RowConfig, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def sources(self) -> dict[str, tuple[str, str]]:
        """`{config key: (stage, dotted path)}` of what is filled in."""
        return {key: (source.partition(".")[0], source.partition(".")[2]) for key, source in self.filled.items()}

    def needs(self) -> tuple[str, ...]:
        """The earlier stages that it starts from or takes values of."""
        return tuple(dict.fromkeys([*self.earlier.values(), *(name for name, _ in self.sources().values())]))


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

    def __post_init__(self) -> None:
        check(self, examples=at_least(2))


def load_chain(spec: str, overrides: Sequence[str] = ()) -> tuple[ChainConfig, dict[str, list[str]]]:
    """Reads a chain's config "path/to/file.py:arg".

    Args:
        spec: the config file.
        overrides: "STAGE.key=value", each for the config of a run, or for the options of a stage that derives.

    Returns:
        The chain, with paths of configs as they are from here, and the overrides of each run.

    Raises:
        ConfigError: a key, a stage, a file or a function that is named is not there, or the file describes no chain.
    """
    partial = read(spec)
    if "stages" not in partial:
        raise ConfigError(
            f"{spec} describes no chain, for it has no stages; train it with `snapgen train --config={spec}`"
        )
    chain: ChainConfig = build_dataclass(ChainConfig, partial)
    names = [stage.name for stage in chain.stages]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two stages are called {', '.join(map(repr, sorted(repeated)))}; each needs its own name")
    of_stage: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        name, _, rest = override.partition(".")
        if name not in of_stage:
            raise ConfigError(f"--config.{override}: the chain has no stage {name!r}{closest(name, names)}")
        of_stage[name].append(rest)
    folder = pathlib.Path(spec.partition(":")[0]).parent
    stages: list[StageConfig] = []
    for stage in chain.stages:
        _check(stage, {earlier.name: earlier for earlier in stages})
        if stage.derive:
            stages.append(_with_options(stage, of_stage.pop(stage.name)))
        else:
            _refuse_filled(stage, of_stage[stage.name])
            stages.append(dataclasses.replace(stage, config=str(folder / stage.config)))
    return dataclasses.replace(chain, stages=tuple(stages)), of_stage


def with_earlier(chain: ChainConfig, name: str) -> list[str]:
    """A stage, and all that it starts from or takes values of, directly or not; nothing for ""."""
    if not name:
        return []
    needs = next(stage.needs() for stage in chain.stages if stage.name == name)
    return list(dict.fromkeys([name, *(more for other in needs for more in with_earlier(chain, other))]))


def _check(stage: StageConfig, earlier: Mapping[str, StageConfig]) -> None:
    """Raises ConfigError where a stage is at odds with itself or with the stages before it."""
    where = f"stage {stage.name!r}"
    if bool(stage.config) == bool(stage.derive):
        raise ConfigError(f"{where} has config={stage.config!r} and derive={stage.derive!r}; give it one of the two")
    of_others = ("filled", "rows") if stage.derive else ("options", "example")
    if wrong := [name for name in of_others if getattr(stage, name)]:
        kind, other = ("derives", "is a run") if stage.derive else ("is a run", "derives")
        raise ConfigError(f"{where} {kind}, and {', '.join(wrong)} is for a stage that {other}; leave it out")
    decoders = [row.decoder for row in stage.rows if row.decoder]
    if unknown := [name for name in (*stage.needs(), *decoders) if name not in earlier]:
        raise ConfigError(f"{where} starts from {', '.join(unknown)}; before it there are {', '.join(earlier)}")
    if wrong := [name for name in decoders if earlier[name].derive]:
        raise ConfigError(f"{where} draws with the decoder of {', '.join(wrong)}, which derives and is not a run")
    if twice := sorted(set(stage.earlier) & set(stage.filled)):
        raise ConfigError(f"{where}: {', '.join(twice)} is in `earlier` and in `filled`; leave one of them out")
    for key, (name, path) in stage.sources().items():
        if not earlier[name].derive:
            raise ConfigError(
                f"{where} fills {key!r} from {name!r}, which is a run and derives nothing; "
                "`earlier` fills in the workdir of a run"
            )
        try:
            taken(as_json(earlier[name].example, f"the example of stage {name!r}"), path)
        except KeyError as error:
            raise ConfigError(
                f"{where} fills {key!r} from '{name}.{path}', and the example of stage {name!r} has {error.args[0]}"
            ) from error
    if stage.derive:
        function_of(stage.name, stage.derive)


def _refuse_filled(stage: StageConfig, overrides: Sequence[str]) -> None:
    """Raises ConfigError for an override of what the chain itself fills in, or of the section that holds it."""
    filled = {**{key: f"the workdir of {name}" for key, name in stage.earlier.items()}, **stage.filled}
    for text in overrides:
        path, _ = parse_override(text, f"--config.{stage.name}.")
        for key, source in filled.items():
            length = min(len(path), len(parts := key.split(".")))
            if path[:length] == parts[:length]:
                raise ConfigError(
                    f"--config.{stage.name}.{text}: the chain fills {key!r} of stage {stage.name!r} with {source}; "
                    "leave the override out, or take the key out of the stage's `earlier` or `filled`"
                )


def _with_options(stage: StageConfig, overrides: Sequence[str]) -> StageConfig:
    """A stage that derives, with overrides of its options, and with options and example as JSON has them."""
    options: Any = as_json(stage.options, f"options of stage {stage.name!r}")
    for text in overrides:
        path, value = parse_override(text, f"--config.{stage.name}.")
        node = options
        for i, part in enumerate(path):
            if not isinstance(node, dict) or part not in node:
                known = closest(part, node) if isinstance(node, dict) else ""
                raise ConfigError(f"stage {stage.name!r} has no option {'.'.join(path[: i + 1])!r}{known}")
            if i + 1 < len(path):
                node = node[part]
        value = value.of(str) if isinstance(node[path[-1]], str) else value.literal
        node[path[-1]] = as_json(value, f"--config.{stage.name}.{text}")
    example = as_json(stage.example, f"the example of stage {stage.name!r}")
    return dataclasses.replace(stage, options=options, example=example)
