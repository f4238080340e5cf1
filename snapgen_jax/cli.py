"""The command line: `snapgen <command> --help`. Effects live here: exit codes, prints, files asked for by name.

Exit codes: 0 done; 69 infrastructure failed, submit again; 70 diverged; 75 preempted with nothing lost, submit again;
78 the config, the data or the workdir is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.process import prepare
from snapgen_jax.training.exits import ConfigError, ExitCode, RunError


def build_parser() -> argparse.ArgumentParser:
    """The parser of `snapgen`."""
    parser = argparse.ArgumentParser(
        prog="snapgen", description="SnapGen in JAX: train, sample, score and export text-to-image models for phones."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    quickstart = add(
        "quickstart", _quickstart, "From nothing to a running phone model on a laptop, in about ten minutes."
    )
    _workdir(quickstart)
    _config(quickstart, default="configs/shapes/quickstart.py")

    train = add("train", _train, "Train, or go on training, to the end of a config.")
    _workdir(train)
    _config(train)

    config = add("config", _show_config, "Print a config with every default filled in.")
    _config(config)

    sample = add("sample", _sample, "Images from prompts, by a trained run or by an exported bundle.")
    source = sample.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a trained run")
    source.add_argument("--bundle", help="an exported bundle; runs on LiteRT")
    source.add_argument("--weights", help="folder of a published system's weights; goes with --config")
    _config(sample, default="configs/teacher/sd35_large.py")
    sample.add_argument("--prompt", action="append", required=True, help="text; repeat for several images")
    sample.add_argument("--steps", type=int, help="sampling steps (default: the run's)")
    sample.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the run's)")
    sample.add_argument("--seed", type=int, default=0, help="of the noise")
    sample.add_argument("--out", default="samples.png", help="PNG file to write (default: %(default)s)")

    evaluate = add("evaluate", _evaluate, "Score a trained run.")
    _workdir(evaluate)
    evaluate.add_argument(
        "--names", default="compositional", help="evaluators, separated by commas (default: %(default)s)"
    )
    evaluate.add_argument("--step", type=int, help="checkpoint (default: the newest)")

    export = add("export", _export, "Write a TFLite bundle of a trained run, checked against JAX.")
    _workdir(export)
    export.add_argument("--out", help="folder to write (default: WORKDIR/export/bundle)")
    export.add_argument(
        "--backend", choices=("jax2tf", "litert"), default="jax2tf", help="converter (default: %(default)s)"
    )

    status = add("status", _status, "Where a run stands, and what to do next.")
    _workdir(status)

    count = add("count", _count, "Parameters and compute of networks, from shapes alone.")
    which = count.add_mutually_exclusive_group(required=True)
    which.add_argument("--ladder", action="store_true", help="the design steps A to G beside the published changes")
    which.add_argument("--all", action="store_true", help="every network and preset")
    return parser


def _workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of the run, local or gs://")


def _config(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--config",
        required=default is None,
        default=default,
        metavar="FILE[:ARG]",
        help="config file, and the argument of its get_config; override any key with --config.KEY=VALUE"
        + (f" (default: {default})" if default else ""),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv))
    parser = build_parser()
    options = parser.parse_args(arguments)
    if overrides and not hasattr(options, "config"):
        parser.error(f"`snapgen {options.command}` takes no --config overrides (given: {', '.join(overrides)})")
    options.overrides = overrides
    _keep_compiled_programs()
    try:
        options.run(options)
    except RunError as error:
        print(f"snapgen {options.command}: {error}", file=sys.stderr)
        return int(error.code)
    except DataError as error:
        print(f"snapgen {options.command}: {error}", file=sys.stderr)
        return int(ExitCode.BAD_CONFIG)
    except KeyboardInterrupt:
        print(f"snapgen {options.command}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        traceback.print_exc()
        print(f"snapgen {options.command}: {error}", file=sys.stderr)
        return int(ExitCode.INFRASTRUCTURE)
    return int(ExitCode.DONE)


def _keep_compiled_programs() -> None:
    """Lets a resumed run, and the parts of one command, find what was compiled before."""
    cache = epath.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "snapgen_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.a.b=value` from the other arguments; returns the others, and `a.b=value` of each."""
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    return [a for a in arguments if not a.startswith("--config.")], overrides


def _load(options: argparse.Namespace) -> Any:
    from snapgen_jax.config import load_config

    return load_config(options.config, options.overrides)


def _load_experiment(options: argparse.Namespace) -> Any:
    config = _load(options)
    if "system" in config:
        raise ConfigError(f"{options.config} describes a published system, which is not trained; see `snapgen sample`")
    return config


def _quickstart(options: argparse.Namespace) -> None:
    from snapgen_jax.quickstart import quickstart

    quickstart(_load_experiment(options), options.workdir)


def _train(options: argparse.Namespace) -> None:
    from snapgen_jax.experiment import Experiment, prepare_workdir

    config = _load_experiment(options)
    experiment = Experiment(config, options.workdir)
    prepare_workdir(config, options.workdir)
    experiment.train()


def _show_config(options: argparse.Namespace) -> None:
    from snapgen_jax.config import to_json

    print(to_json(_load(options)), end="")


def _sample(options: argparse.Namespace) -> None:
    from snapgen_jax.evaluation.pictures import grid, png_bytes

    chosen = {k: v for k in ("steps", "guidance") if (v := getattr(options, k)) is not None}
    if options.overrides and not options.weights:
        raise ConfigError("--config overrides go with --weights; a run or a bundle is sampled as it was configured")
    if options.bundle:
        from snapgen_jax.export.client import LiteRTGenerator

        generator: Any = LiteRTGenerator(options.bundle)
    elif options.weights:
        from snapgen_jax.generation import load_system

        options.overrides += [f"{name}={value}" for name, value in chosen.items()]
        generator, chosen = load_system(_load(options), options.weights), {}
    else:
        from snapgen_jax.generation import load

        generator = load(options.workdir)
    images = generator.generate(options.prompt, seed=options.seed, **chosen)
    out = epath.Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(png_bytes(grid(images, options.prompt)))
    print(f"wrote {len(images)} image{'s' * (len(images) > 1)} of {images.shape[2]} x {images.shape[1]} px to {out}")


def _evaluate(options: argparse.Namespace) -> None:
    from snapgen_jax.experiment import evaluate

    numbers = evaluate(options.workdir, options.names.split(","), step=options.step)
    print(json.dumps(numbers, indent=2))


def _export(options: argparse.Namespace) -> None:
    from snapgen_jax.experiment import export

    out = options.out or str(epath.Path(options.workdir) / "export" / "bundle")
    report = export(options.workdir, out, backend=options.backend)
    print(json.dumps(report, indent=2))


def _status(options: argparse.Namespace) -> None:
    from snapgen_jax.training.status import status

    print(status(epath.Path(options.workdir)))


def _count(options: argparse.Namespace) -> None:
    from snapgen_jax.networks.counting import all_counts_table, ladder_table

    print(ladder_table() if options.ladder else all_counts_table())


def entry() -> int:
    """What the `snapgen` program calls: prepares the process for its machine, then runs the command."""
    prepare()
    return main()


if __name__ == "__main__":
    sys.exit(entry())
