"""`snapgen prepare`: its steps, their options, and what each of them runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


def add_prepare(commands: Any) -> None:
    """Adds `prepare` and its steps to the commands of the parser."""
    text = "Training data at scale, step by step: `snapgen prepare collect --help`."
    prepare = commands.add_parser("prepare", help=text, description=text)
    steps = prepare.add_subparsers(dest="step", required=True, metavar="STEP")
    for add in _STEPS.values():
        add(steps)


def run_prepare(options: argparse.Namespace) -> None:
    """Runs the step that was asked for."""
    _RUN[options.step](options)


def _add_collect(steps: Any) -> None:
    text = "Images and captions, from a folder, tars, tables or a data set, to filtered shards without duplicates."
    collect = steps.add_parser("collect", help=text, description=text)
    collect.add_argument(
        "--config",
        default="",
        metavar="FILE[:ARG]",
        help="file whose get_config returns fields of CollectConfig; override any field with --config.KEY=VALUE",
    )
    collect.add_argument("--source", help="folder (the default), tar, parquet, huggingface, tfds or shards")
    collect.add_argument("--path", help="the folder, the file or files, or TFDS's data directory")
    collect.add_argument("--out", required=True, help="folder of the shards, local or gs://")
    collect.add_argument(
        "--beam.NAME=VALUE",
        dest="beam_options",
        action="append",
        default=[],
        help="an option of Apache Beam, as --beam.runner=DataflowRunner; all that follows -- is given to it unchanged",
    )


def collect_config(options: argparse.Namespace) -> Any:
    """The `CollectConfig` of a config file, its overrides, and the options that have names of their own.

    Raises:
        ConfigError: a field is unknown, or a value is one that nobody can mean.
    """
    from snapgen_jax import overrides
    from snapgen_jax.config import build_dataclass
    from snapgen_jax.config_file import read
    from snapgen_jax.preparation.collect_config import CollectConfig

    values = dict(read(options.config)) if options.config else {}
    changes = [overrides.parse_override(text) for text in options.overrides]
    overrides.apply(values, changes, (CollectConfig,))
    values |= {name: value for name in ("source", "path") if (value := getattr(options, name)) is not None}
    return build_dataclass(CollectConfig, values)


def _collect(options: argparse.Namespace) -> None:
    from snapgen_jax.preparation.collect import collect, listed

    config = collect_config(options)
    print(f"collecting {config.path or config.name} into {options.out} ...", file=sys.stderr, flush=True)
    outcome = collect(config, options.out, options.beam)
    size = sum(shard.bytes for shard in outcome.shards)
    print(
        f"kept {outcome.kept:,} of {sum(outcome.counts.values()):,} images, {size / 1e6:,.1f} MB in "
        f"{len(outcome.shards)} shards; rejected: {listed(outcome.rejected)}; see {options.out}/report.html"
    )


_STEPS: dict[str, Callable[[Any], None]] = {"collect": _add_collect}
_RUN: dict[str, Callable[[argparse.Namespace], None]] = {"collect": _collect}
