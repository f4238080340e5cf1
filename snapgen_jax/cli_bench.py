"""`snapgen bench`: its options, and what it runs."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from snapgen_jax.bounds import FieldError
from snapgen_jax.training.exits import ConfigError


def add_bench(commands: Any) -> None:
    """Adds `bench` to the commands of the parser."""
    text = "How fast an exported bundle loads and runs on this machine, and how much memory it takes."
    parser = commands.add_parser("bench", help=text, description=text)
    parser.add_argument("--bundle", required=True, help="folder that `snapgen export` wrote")
    parser.add_argument("--precisions", help="of the bundle, with commas (default: all)")
    parser.add_argument("--units", help="of the bundle, with commas (default: all)")
    parser.add_argument("--size", metavar="HxW", help="of the images, where the bundle has several (default: its own)")
    parser.add_argument(
        "--cache", metavar="FOLDER", help="where packed networks are unpacked (default: BUNDLE.unpacked)"
    )
    parser.add_argument("--accelerators", default="cpu", help="of cpu and gpu, with commas (default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="of the CPU's kernels, with commas (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=50, help="calls of a measurement, at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures there")
    parser.add_argument("--picture", metavar="FILE", help="also draw them there, as .png")


def run_bench(options: argparse.Namespace) -> None:
    """Measures, prints the table, and writes what was asked for.

    Raises:
        ConfigError: the folder is no bundle, or does not have what is to be measured; a file cannot be written.
    """
    from snapgen_jax.export.bench import Asked, BenchError, bench, table
    from snapgen_jax.export.bench_picture import draw
    from snapgen_jax.export.program import BundleError
    from snapgen_jax.export.run import image_size

    def names(text: str | None) -> list[str] | None:
        return text.split(",") if text else None

    try:
        threads = [int(n) for n in options.threads.split(",")]
    except ValueError as error:
        raise ConfigError(f"--threads={options.threads}: give whole numbers with commas, such as 1,2") from error
    if options.picture and not options.picture.lower().endswith(".png"):
        raise ConfigError(f"--picture={options.picture}: the picture is a .png; end the name so")
    for path in filter(None, (options.json, options.picture)):
        if not pathlib.Path(path).absolute().parent.is_dir():
            raise ConfigError(f"{path} would lie in a folder that is not there; make it first")
    accelerators: Any = names(options.accelerators) or ["cpu"]
    try:
        asked = Asked(
            names(options.precisions),
            names(options.units),
            accelerators,
            threads,
            options.runs,
            options.rounds,
            image_size(options.size),
        )
        found = bench(options.bundle, asked, lambda line: print(line, file=sys.stderr, flush=True), options.cache)
    except FieldError as error:
        raise ConfigError(f"--{error.field} {error.reason}") from error
    except (BenchError, BundleError) as error:
        raise ConfigError(str(error)) from error
    print(table(found))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if options.picture:
        draw(found).save(options.picture)
