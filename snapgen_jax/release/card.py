"""The model card of a folder of weights: `README.md` as the Hugging Face hub shows it, from what the run wrote down."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from snapgen_jax.release.layouts import Counterpart
from snapgen_jax.training.metrics import read_lines
from snapgen_jax.weights.folder import Manifest
from snapgen_jax.weights.frozen import is_published
from snapgen_jax.weights.sources import SOURCES, Source, autoencoder_name

# Fields of a config that name published weights.
PUBLISHED = {
    "clip_l_folder": "clip_l",
    "clip_g_folder": "clip_g",
    "language_folder": "gemma2_2b",
    "perceptual_weights": "lpips",
    "weights": "sd35_large",
}


@dataclasses.dataclass(frozen=True)
class Licence:
    """The licence fields of a model card.

    Attributes:
        identifier: as the hub knows it ("apache-2.0", "cc-by-4.0"), "other", or "unknown" where none was chosen.
        name, link: of a licence that is "other".
    """

    identifier: str = "unknown"
    name: str = ""
    link: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.identifier):
            raise ValueError(
                f"the licence is {self.identifier!r}; give the hub's identifier, such as apache-2.0, or 'other'"
            )
        if (self.identifier == "other") != bool(self.name):
            raise ValueError("a licence called 'other' has a name, and only that one; give or leave out its name")
        if self.link and not self.name:
            raise ValueError("a link belongs to a licence called 'other', with a name")

    def fields(self) -> dict[str, str]:
        """`license`, `license_name` and `license_link`, as far as they say something."""
        found = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {name: value for name, value in found.items() if value}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        config: of the run.
        manifest: of the folder.
        counts: `{"player/role": number of parameters}`.
        counterparts: its networks in other libraries.
        pictures: names in `samples/`.
        draws: whether it makes pictures of prompts.
        run: `run.json`; {} where it is not there.
        last: the last line of the training metrics at or before the step.
        scores: `{evaluator: its numbers}`, the newest at or before the step, with their step.
    """

    config: Mapping[str, Any]
    manifest: Manifest
    counts: Mapping[str, int]
    counterparts: Sequence[Counterpart]
    pictures: Sequence[str]
    draws: bool
    run: Mapping[str, Any]
    last: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        workdir: epath.Path,
        config: Mapping[str, Any],
        manifest: Manifest,
        counts: Mapping[str, int],
        counterparts: Sequence[Counterpart],
        pictures: Sequence[str],
        *,
        draws: bool,
    ) -> Facts:
        """With what a workdir has on record."""
        path = workdir / "run.json"
        run = json.loads(path.read_text()) if path.exists() else {}
        lines, evaluations = (
            [line for line in read_lines(workdir / "metrics" / f"{name}.jsonl") if line["step"] <= manifest.step]
            for name in ("train", "evaluation")
        )
        scores = {line["evaluator"]: line for line in evaluations}
        return cls(config, manifest, counts, counterparts, pictures, draws, run, lines[-1] if lines else {}, scores)


def model_card(title: str, facts: Facts, licence: Licence) -> str:
    """The text of `README.md`; whatever comes from outside is escaped."""
    parts = [
        _front_matter(facts, licence),
        f"# {_text(title)}\n",
        _use(facts),
        _pictures(facts),
        _table("Scores", ("evaluator", "step", "number", "value"), _scores(facts)),
        _table("Training", ("what", ""), _training(facts)),
        _table("Networks", ("network", "parameters"), [(_code(n), f"{c:,}") for n, c in facts.counts.items()]),
        _counterparts(facts),
        _terms(facts, licence),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(facts: Facts, licence: Licence) -> str:
    """YAML, in which every JSON value is one."""
    values: dict[str, Any] = {"library_name": "snapgen-jax", **licence.fields()}
    if facts.draws:
        values["pipeline_tag"] = "text-to-image"
    values["tags"] = ["jax", "snapgen", str(facts.config["recipe"])]
    bases = sorted({source.repo for source in _published(facts.config) if source.host == "huggingface.co"})
    if bases:
        values["base_model"] = bases
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items()), "---\n"])


def _use(facts: Facts) -> str:
    call = '.generate(["a red circle"], seed=0)  # uint8 [1, H, W, 3]' if facts.draws else ""
    which = "averaged" if facts.manifest.kept == "ema" else "trained"
    return (
        f"The {which} weights of a run of the recipe `{facts.config['recipe']}` after {facts.manifest.step:,} updates, "
        "by snapgen-jax. They are safetensors; nothing in this folder is executed.\n\n"
        f'```python\nimport snapgen_jax\n\nmodel = snapgen_jax.load("FOLDER"){call}\n```\n\n'
        "Training goes on from the folder with `--config.init_from=FOLDER`, and learns from it with "
        "`--config.teacher.workdir=FOLDER`.\n"
    )


def _pictures(facts: Facts) -> str:
    shown = [f"![{_text(name)}](samples/{urllib.parse.quote(name)})" for name in facts.pictures]
    return "\n".join(["## Samples\n", *shown, ""]) if shown else ""


def _scores(facts: Facts) -> Iterator[tuple[str, ...]]:
    for evaluator, line in facts.scores.items():
        for name, value in line.items():
            if name not in ("step", "evaluator") and isinstance(value, int | float):
                yield _code(evaluator), f"{line['step']:,}", _code(name), f"{value:.4g}"


def _training(facts: Facts) -> Iterator[tuple[str, str]]:
    config, run = facts.config, facts.run
    yield "updates", f"{facts.manifest.step:,} of {config['train_steps']:,}"
    if size := config.get("batch_size"):
        yield "examples seen", f"{facts.manifest.step * size:,} ({size:,} an update)"
    source = config["data"]["source"]
    yield "data", _code(" ".join(filter(None, (source, config["data"].get("name", "")))))
    yield "seed", str(config["seed"])
    optimizer = config.get("optimizer", {})
    if optimizer:
        yield "optimizer", _code(f"{optimizer.get('name', 'adamw')}, learning rate {optimizer['learning_rate']:g}")
    if run.get("machine"):
        yield "machine", _code(f"{run['machine']}, {run.get('hosts', 1)} hosts")
    if run.get("commit"):
        yield "commit", _code(run["commit"])
    if run.get("packages"):
        yield "packages", _code(", ".join(f"{name} {version}" for name, version in run["packages"].items() if version))
    for name, value in facts.last.items():
        if name != "step" and isinstance(value, float):
            yield f"last {_code(name)}", f"{value:.4g}"


def _counterparts(facts: Facts) -> str:
    lines = [
        f"- `{part.folder}/` is {_code(part.role)} for {part.reader}: "
        f'`{part.loader}.from_pretrained("FOLDER/{part.folder}")`' + (f" ({part.note})" if part.note else "")
        if part.folder
        else f"- {_code(part.role)} has no counterpart in {part.reader}: {_text(part.note)}"
        for part in facts.counterparts
    ]
    return "\n".join(["## In other libraries\n", *lines, ""]) if lines else ""


def _terms(facts: Facts, licence: Licence) -> str:
    chosen = {"unknown": "None was chosen.", "other": f"{_text(licence.name)} {_text(licence.link)}".strip()}
    lines = ["## Licence\n", chosen.get(licence.identifier, _text(licence.identifier)), ""]
    sources = list(_published(facts.config))
    if sources:
        lines += ["The run used published weights, which are not part of this folder and whose terms may bind it:\n"]
        lines += [f"- {source.title}: {source.address} ({source.licence})" for source in sources]
        lines += [""]
    return "\n".join(lines)


def _published(config: Any) -> Iterator[Source]:
    """The published weights that a config names."""
    names = set(_published_names(config))
    return (source for name, source in SOURCES.items() if name in names)


def _published_names(section: Any) -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _published_names(value)
        elif name in PUBLISHED and value and isinstance(value, str):
            yield PUBLISHED[name]
        elif name == "workdir" and value and "autoencoder" in section and is_published(epath.Path(value)):
            yield autoencoder_name(section["autoencoder"].get("scale", 0.0))


def _table(title: str, header: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"## {title}\n", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *lines, ""])


def _code(text: Any) -> str:
    """Text as it is, in a code span of one line."""
    plain = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


def _text(text: Any) -> str:
    """Text without the meaning that HTML and Markdown would give it."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
