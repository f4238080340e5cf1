"""`snapgen prepare`: its steps, their options, and what each of them runs."""

from __future__ import annotations

import argparse
import pathlib
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


def _add_photographs(steps: Any) -> None:
    text = "Captioned photographs to try the rest on, from those that scikit-image and scikit-learn ship."
    photographs = steps.add_parser("photographs", help=text, description=text)
    photographs.add_argument("--out", required=True, help="local folder")
    photographs.add_argument("--count", type=int, default=64, help="how many (default: %(default)s)")


def _photographs(options: argparse.Namespace) -> None:
    from snapgen_jax.data.photographs import write_photographs

    write_photographs(pathlib.Path(options.out), options.count)
    print(f"{options.out}: {options.count} photographs, each with a caption beside it")


def _add_encode(steps: Any) -> None:
    text = (
        "Shards of images to what a training config reads: latents, and text states or token ids, by frozen encoders."
    )
    encode = steps.add_parser("encode", help=text, description=text)
    encode.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARG]",
        help="config of the run that is to read the shards; --config.inputs.text=tokens stores ids, "
        "--config.inputs.encoders.KEY=VALUE names the encoders",
    )
    encode.add_argument("--images", help="folder of `snapgen prepare collect`")
    encode.add_argument("--out", help="folder of the shards, local or gs://")
    encode.add_argument("--batch_per_device", type=int, default=8, help="images at once (default: %(default)s)")
    encode.add_argument(
        "--dry-run", action="store_true", help="say how many bytes and chip-hours it takes, and write nothing"
    )
    encode.add_argument("--topology", default="v5e:4x4", help="of --dry-run (default: %(default)s)")
    encode.add_argument("--examples", type=int, help="of --dry-run: how many images (default: those of --images)")
    encode.add_argument("--captions", type=float, default=1.0, help="of --dry-run: an image (default: %(default)s)")
    encode.add_argument("--json", metavar="FILE", help="of --dry-run: also write all figures there")
    add_cluster(encode)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """The options of a command that several processes run together."""
    parser.add_argument("--processes", type=int, help="how many processes the run has (default: what the cluster says)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no cluster says it")
    parser.add_argument("--index", type=int, help="of this process, with --coordinator")
    parser.add_argument(
        "--start_timeout_seconds", type=int, default=1800, help="how long to wait for the others (default: %(default)s)"
    )


def start_cluster(options: argparse.Namespace) -> None:
    """Forms the cluster that the options of `add_cluster` describe.

    Raises:
        ConfigError: it is not the one that was asked for.
    """
    from snapgen_jax.parallel import hosts
    from snapgen_jax.training.exits import ConfigError

    try:
        hosts.start(options.processes, options.coordinator, options.index, options.start_timeout_seconds)
    except hosts.ClusterError as error:
        raise ConfigError(str(error)) from error


def _encode(options: argparse.Namespace) -> None:
    from snapgen_jax.config import load_experiment
    from snapgen_jax.training.exits import ConfigError

    resolved = load_experiment(options.config, options.overrides)
    if options.dry_run:
        _dry_run(options, resolved)
        return
    if not options.images or not options.out:
        raise ConfigError("give --images, the folder of `snapgen prepare collect`, and --out, the folder to write")
    start_cluster(options)
    import jax

    from snapgen_jax.preparation.encode import encode
    from snapgen_jax.preparation.stored import Encoding

    platform: Any = jax.default_backend()
    recipe = resolved.build(platform)
    encoding = Encoding.of(resolved.recipe, recipe.batch_specs(), recipe.inputs.config.image_sizes, platform)
    made = encode(
        encoding,
        options.images,
        options.out,
        batch_per_device=options.batch_per_device,
        max_unreadable_share=resolved.experiment.data.max_unreadable_share,
        say=lambda line: print(line, flush=True),
    )
    size = sum(shard.bytes for shard in made.shards)
    each = ", ".join(f"{made.examples(bucket):,} of {bucket}" for bucket in made.buckets())
    print(f"{options.out}: {made.examples():,} examples ({each}), {size / 1e6:,.1f} MB in {len(made.shards)} shards")


def _dry_run(options: argparse.Namespace, resolved: Any) -> None:
    import dataclasses
    import json

    from etils import epath

    from snapgen_jax.parallel.plan import topology
    from snapgen_jax.preparation.encode import read_collected
    from snapgen_jax.preparation.estimate import estimate, with_text
    from snapgen_jax.preparation.stored import Encoding
    from snapgen_jax.training.exits import ConfigError

    if not options.images and not options.examples:
        raise ConfigError("give --images, the folder of `snapgen prepare collect`, or --examples, how many images")
    count = options.examples or read_collected(options.images).examples()
    try:
        where = topology(options.topology)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    found = []
    for form in ("states", "tokens"):
        given = dataclasses.replace(resolved, recipe=with_text(resolved.recipe, form))
        recipe = given.build("tpu")
        encoding = Encoding.of(given.recipe, recipe.batch_specs(), recipe.inputs.config.image_sizes, "tpu")
        captions = round(count * options.captions)
        found.append(estimate(encoding, form, where, count, captions, options.batch_per_device))
        print(found[-1].line(), flush=True)
    if options.json:
        epath.Path(options.json).write_text(json.dumps([one.to_json() for one in found], indent=2) + "\n")


_STEPS: dict[str, Callable[[Any], None]] = {
    "photographs": _add_photographs,
    "collect": _add_collect,
    "encode": _add_encode,
}
_RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "photographs": _photographs,
    "collect": _collect,
    "encode": _encode,
}
