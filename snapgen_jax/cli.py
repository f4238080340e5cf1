"""The command line: `snapgen <command> --help`. Effects live here: exit codes, prints, files asked for by name.

Exit codes: 0 done; 69 infrastructure failed, submit again; 70 diverged; 75 preempted with nothing lost, submit again;
78 the config, the data or the workdir is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.process import began, prepare
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
    quickstart.add_argument(
        "--chain", action="store_true", help="the whole method in twenty minutes: configs/shapes/chain.py:quick"
    )

    chain = add("chain", _chain, "Train, or go on training, several stages that start from each other; score them.")
    _workdir(chain)
    _config(chain, default="configs/shapes/chain.py")

    train = add("train", _train, "Train, or go on training, to the end of a config.")
    _workdir(train)
    _config(train)
    train.add_argument("--processes", type=int, help="how many processes the run has (default: what the cluster says)")
    train.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where no cluster says it")
    train.add_argument("--index", type=int, help="of this process, with --coordinator")
    train.add_argument(
        "--start_timeout_seconds", type=int, default=1800, help="how long to wait for the others (default: %(default)s)"
    )

    config = add("config", _show_config, "Print a config with every default filled in.")
    _config(config)

    sample = add("sample", _sample, "Images from prompts or class labels, by a trained run or by an exported bundle.")
    source = sample.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a trained run")
    source.add_argument("--bundle", help="an exported bundle; runs on LiteRT")
    source.add_argument("--weights", help="folder of a published system's weights; goes with --config")
    _config(sample, default="configs/teacher/sd35_large.py")
    sample.add_argument("--prompt", action="append", default=[], help="text; repeat for several images")
    sample.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="what a run is told beside prompts or in place of them, one value an image: label=[3,7]",
    )
    _generation(sample)
    sample.add_argument("--seed", type=int, default=0, help="of the noise")
    sample.add_argument("--decoder", help="a run of a tiny decoder, in place of the run's own; with --workdir")
    sample.add_argument("--out", default="samples.png", help="PNG file to write (default: %(default)s)")

    evaluate = add("evaluate", _evaluate, "Score a trained run.")
    _workdir(evaluate)
    evaluate.add_argument(
        "--names", default="compositional", help="evaluators, separated by commas (default: %(default)s)"
    )
    evaluate.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    _generation(evaluate)
    evaluate.add_argument("--decoder", help="a run of a tiny decoder, in place of the run's own")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="NAME.OPTION=VALUE", help="an evaluator's: frechet.examples=2048"
    )

    export = add("export", _export, "Write a TFLite bundle of a trained run, checked against JAX.")
    _workdir(export)
    export.add_argument("--out", help="folder to write (default: WORKDIR/export/bundle)")
    export.add_argument(
        "--backend", choices=("jax2tf", "litert"), default="jax2tf", help="converter (default: %(default)s)"
    )

    export.add_argument(
        "--gpu",
        choices=("check", "skip"),
        default="check",
        help="refuse what is wrong on LiteRT's GPU accelerator, where a Vulkan driver is found, or would overflow "
        "float16; or export it nevertheless (default: %(default)s)",
    )
    export.add_argument("--decoder", help="a run of a tiny decoder, in place of the run's own")

    encode = add("encode", _encode, "Image files to latents, by a trained run or by published weights.")
    _codec(encode)
    encode.add_argument("images", nargs="+", help="image files")
    encode.add_argument("--out", default="latents.safetensors", help="file to write (default: %(default)s)")

    decode = add("decode", _decode, "Latents to image files, by a trained run or by published weights.")
    _codec(decode)
    decode.add_argument("latents", help="file that `snapgen encode` wrote")
    decode.add_argument("--out", default="decoded", help="folder for the PNG files (default: %(default)s)")

    data = add("data", _data, "Draw batches and train on none: how fast the input is.")
    _workdir(data)
    _config(data)
    data.add_argument("--batches", type=int, default=100, help="how many (default: %(default)s)")

    plan = add("plan", _plan, "Whether a config fits TPUs that are not here, and what it will cost.")
    what = plan.add_mutually_exclusive_group(required=True)
    _config(what, required=False)
    what.add_argument("--from", dest="earlier", metavar="FILE", help="derive from this earlier --json, compile nothing")
    plan.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x2, v6e:16x16, 2*v5e:4x4 ...")
    plan.add_argument(
        "--part",
        default="",
        help="a piece of the step by itself: draw (frozen encoders), teacher, discriminator, generator",
    )
    plan.add_argument("--json", metavar="FILE", help="also write all figures there")

    status = add("status", _status, "Where a run stands, and what to do next.")
    _workdir(status)

    upgrade = add("upgrade", _upgrade, "Rewrite the configs of a workdir that an earlier version wrote.")
    upgrade.add_argument("workdir", help="folder of a run, or of a chain of runs")

    count = add("count", _count, "Parameters and compute of networks, from shapes alone.")
    which = count.add_mutually_exclusive_group(required=True)
    which.add_argument("--ladder", action="store_true", help="the design steps A to G beside the published changes")
    which.add_argument("--all", action="store_true", help="every network and preset")
    return parser


def _workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of the run, local or gs://")


def _generation(parser: argparse.ArgumentParser) -> None:
    """The options of generation: the usual ones by name, and every other field of the run's options as it is."""
    group = parser.add_argument_group("options of the generator, by default the run's own; any other as --method=heun")
    group.add_argument("--steps", type=int, help="sampling steps")
    group.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    parser.set_defaults(takes_options=True)


def _codec(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run of an autoencoder, of a tiny decoder, or of a generator")
    source.add_argument("--weights", help="folder of a published autoencoder, such as vae/ of Stable Diffusion 3")
    parser.add_argument("--decoder", help="a run of a tiny decoder, in place of a generator's own; with --workdir")


def _config(parser: Any, default: str | None = None, required: bool = True) -> None:
    parser.add_argument(
        "--config",
        required=required and default is None,
        default=default,
        metavar="FILE[:ARG]",
        help="config file, and the argument of its get_config; override any key with --config.KEY=VALUE"
        + (f" (default: {default})" if default else ""),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv))
    parser = build_parser()
    options, others = parser.parse_known_args(arguments)
    try:
        options.generation = _generation_options(options, others) if "takes_options" in options else {}
    except ConfigError as error:
        parser.error(str(error))
    if others and "takes_options" not in options:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if overrides and not hasattr(options, "config"):
        parser.error(f"`snapgen {options.command}` takes no --config overrides (given: {', '.join(overrides)})")
    options.overrides = overrides
    _expand_home(options)
    _keep_compiled_programs()
    return run_to_exit_code(options.command, lambda: options.run(options), lambda: _given(options))


def _expand_home(options: argparse.Namespace) -> None:
    """Puts the home folder in place of the "~" of every path: of `--workdir=~/run` a shell leaves it."""
    from snapgen_jax.typed import expand_home

    for name, value in vars(options).items():
        if name in ("prompt", "set", "overrides"):  # texts, and what the config's dataclasses read
            continue
        if isinstance(value, str):
            setattr(options, name, expand_home(value))
        elif isinstance(value, list):
            setattr(options, name, [expand_home(item) for item in value])


def run_to_exit_code(command: str, run: Callable[[], None], given: Callable[[], Sequence[str]] = lambda: ()) -> int:
    """Runs a command, says what went wrong if something did, and ends this process's part in a run of several.

    Args:
        command: its name, for messages.
        run: the command.
        given: the paths that the user gave, asked for where a file cannot be used.
    """
    try:
        run()
    except (RunError, DataError, KeyboardInterrupt, OSError) as error:
        return _leave(*_explain(command, error, given))
    except Exception as error:
        cluster = _cluster()
        if cluster is None:
            raise
        traceback.print_exc()
        if type(error).__name__ == "JaxRuntimeError":
            cluster.explain_lost_peer()
        return _leave(1, traceback.format_exc())
    return _leave(ExitCode.DONE)


def _cluster() -> Any:
    """The other processes of this run, if it has any."""
    hosts = sys.modules.get("snapgen_jax.parallel.hosts")
    return None if hosts is None or hosts.current().count == 1 else hosts.current()


# What is wrong with a path, rather than with the file system that it is on.
_OF_PATHS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
}


def _given(options: argparse.Namespace) -> list[str]:
    """Every text that the user gave and that may be a path: options, overrides, and values of the config."""
    values: list[Any] = [value for name, value in vars(options).items() if name not in ("run", "command")]
    if "config" in options and options.config:
        with contextlib.suppress(Exception):
            values.append(_load(options).to_dict())
    texts: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            texts.extend([value, value.partition("=")[2]])
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    collect(values)
    return [text for text in texts if text]


def _mistaken_path(error: OSError, given: Sequence[str]) -> str:
    """The path of an error, if it is one that the user gave, lies in it, or is a folder above it; else ""."""
    if error.errno not in _OF_PATHS:
        return ""
    for name in (error.filename, error.filename2):
        if not isinstance(name, str | os.PathLike):
            continue
        failed = pathlib.Path(os.path.abspath(name))
        for text in given:
            path = pathlib.Path(os.path.abspath(os.path.expanduser(text)))
            # A file that vanishes from a run is a file system's fault.
            inside = path in failed.parents and not (error.errno == errno.ENOENT and (path / "config.json").exists())
            if path == failed or inside or (failed in path.parents and os.sep in text):
                return str(name)
    return ""


def _explain(command: str, error: BaseException, given: Callable[[], Sequence[str]] = lambda: ()) -> tuple[int, str]:
    """Prints what an error means to the user; returns the exit code and what was printed."""
    code = error.code if isinstance(error, RunError) else ExitCode.INFRASTRUCTURE
    said = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    if isinstance(error, DataError):
        code = ExitCode.BAD_CONFIG
    elif isinstance(error, OSError):
        if name := _mistaken_path(error, given()):
            code = ExitCode.BAD_CONFIG
            said = f"{name!r} cannot be used: {error.strerror}; give a path that exists, and that you may read or write"
        else:
            traceback.print_exc()
    text = f"snapgen {command}: {said}"
    print(text, file=sys.stderr, flush=True)
    return 130 if isinstance(error, KeyboardInterrupt) else int(code), text


def _leave(code: int, text: str = "") -> int:
    """Ends this process's part in a run of several: with the others if it went well, else it ends them too."""
    cluster = _cluster()
    if cluster is None:
        return int(code)
    if code in (ExitCode.DONE, ExitCode.PREEMPTED):
        cluster.leave()
        return int(code)
    cluster.fail(int(code), text)
    sys.stdout.flush()
    os._exit(int(code))


def _keep_compiled_programs() -> None:
    """Lets a resumed run, and the parts of one command, find what was compiled before."""
    cache = epath.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "snapgen_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.a.b=value` from the other arguments; returns the others, and `a.b=value` of each."""
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    return [a for a in arguments if not a.startswith("--config.")], overrides


def _generation_options(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """`{option: value}` of the generator: those that are named, and "--NAME=VALUE" or "--NAME", "VALUE" of others.

    Raises:
        ConfigError: an argument is none of these.
    """
    from snapgen_jax.overrides import parse_override

    chosen = {name: value for name in ("steps", "guidance") if (value := getattr(options, name)) is not None}
    left = list(others)
    while left:
        text = left.pop(0)
        if not text.startswith("--"):
            raise ConfigError(f"unrecognized argument {text!r}; an option of the generator is --NAME=VALUE")
        if "=" not in text and left and not left[0].startswith("--"):
            text = f"{text}={left.pop(0)}"
        path, value = parse_override(text.removeprefix("--"), "--")
        chosen[".".join(path).replace("-", "_")] = value
    return chosen


def _load(options: argparse.Namespace) -> Any:
    from snapgen_jax.config import load_config

    return load_config(options.config, options.overrides)


def _load_experiment(options: argparse.Namespace) -> Any:
    from snapgen_jax.config import load_experiment

    return load_experiment(options.config, options.overrides)


def _quickstart(options: argparse.Namespace) -> None:
    from snapgen_jax.quickstart import quickstart

    if options.chain:
        options.config = "configs/shapes/chain.py:quick"
        _chain(options)
    else:
        quickstart(_load_experiment(options), options.workdir)


def _chain(options: argparse.Namespace) -> None:
    from snapgen_jax.chain import load_chain
    from snapgen_jax.chain_run import run_chain

    run_chain(*load_chain(options.config, options.overrides), options.workdir)


def _train(options: argparse.Namespace) -> None:
    from snapgen_jax.experiment import Experiment
    from snapgen_jax.parallel import hosts

    resolved = _load_experiment(options)
    try:
        hosts.start(options.processes, options.coordinator, options.index, options.start_timeout_seconds)
    except hosts.ClusterError as error:
        raise ConfigError(str(error)) from error
    Experiment(resolved, options.workdir).train(began())


def _data(options: argparse.Namespace) -> None:
    from snapgen_jax.experiment import Experiment

    numbers = Experiment(_load_experiment(options), options.workdir).read(options.batches)
    print(
        f"{numbers['examples_per_second']:,.1f} examples/s over {options.batches} batches; "
        f"the first took {numbers['first_batch_seconds']:.2f} s"
    )


def _plan(options: argparse.Namespace) -> None:
    from snapgen_jax.planning import derive, plan

    if options.earlier:
        if options.part:
            raise ConfigError("--part compiles, and --from compiles nothing; a derived plan is of what the file is of")
        asked, plans = derive(epath.Path(options.earlier), options.topology)
    else:
        asked = {"config": options.config, "overrides": options.overrides}
        plans = plan(_load_experiment(options), options.topology, options.part)
    print("\n\n".join(found.table() for found in plans))
    if options.json:
        epath.Path(options.json).write_text(
            json.dumps([{**asked, **found.to_json()} for found in plans], indent=2) + "\n"
        )


def _show_config(options: argparse.Namespace) -> None:
    from snapgen_jax.config import to_json

    print(to_json(_load(options)), end="")


def _sample(options: argparse.Namespace) -> None:
    from snapgen_jax.evaluation.pictures import grid, png_bytes

    if options.overrides and not options.weights:
        raise ConfigError("--config overrides go with --weights; a run or a bundle is sampled as it was configured")
    if options.decoder and not options.workdir:
        raise ConfigError("--decoder goes with --workdir; a bundle holds the decoder that it was exported with")
    if not (options.prompt or options.condition):
        raise ConfigError("there is nothing to draw; give --prompt, or --condition where the run takes no prompts")
    conditions = _conditions(options.condition)
    try:
        images = _draw(options, conditions)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    out = epath.Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(png_bytes(grid(images, options.prompt or _titles(conditions, len(images)))))
    print(f"wrote {len(images)} image{'s' * (len(images) > 1)} of {images.shape[2]} x {images.shape[1]} px to {out}")


def _conditions(assignments: Sequence[str]) -> dict[str, Any]:
    """`{name: values [N, ...]}` of "NAME=VALUES", in which one value may stand without brackets."""
    from snapgen_jax.overrides import parse_override

    found = {}
    for text in assignments:
        path, value = parse_override(text, "--condition ")
        literal = value.literal
        found[".".join(path)] = list(literal) if isinstance(literal, list | tuple) else [literal]
    return found


def _titles(conditions: dict[str, Any], count: int) -> list[str]:
    """What each image was told, where that are numbers."""
    plain = {
        name: values for name, values in conditions.items() if not any(isinstance(v, list | tuple) for v in values)
    }
    return [", ".join(f"{name} {values[i]}" for name, values in plain.items()) for i in range(count)]


def _draw(options: argparse.Namespace, conditions: dict[str, Any]) -> Any:
    """The images of the prompts and conditions, from whichever source was named."""
    chosen = options.generation
    if options.bundle:
        from snapgen_jax.export.client import LiteRTGenerator
        from snapgen_jax.typed import Written

        generator: Any = LiteRTGenerator(options.bundle)
        chosen = {name: value.literal if isinstance(value, Written) else value for name, value in chosen.items()}
        if conditions:
            return _draw_bundle(generator, options, conditions, chosen)
    elif options.weights:
        from snapgen_jax.generation import load_system

        if conditions:
            raise ConfigError("--condition goes with --workdir or --bundle; a published system draws from prompts")
        options.overrides += [f"{name}={value}" for name, value in chosen.items()]
        generator, chosen = load_system(_load(options), options.weights), {}
    else:
        from snapgen_jax.generation import load

        generator = load(options.workdir, decoder=options.decoder)
        chosen = {**chosen, "conditions": conditions}
    return generator.generate(options.prompt or None, seed=options.seed, **chosen)


def _draw_bundle(
    generator: Any, options: argparse.Namespace, conditions: dict[str, Any], chosen: dict[str, Any]
) -> Any:
    """The images that a bundle draws from named arrays, and from prompts where there are some."""
    import numpy as np

    inputs = {name: np.asarray(values) for name, values in conditions.items()}
    texts = generator.bundle.tokenize(options.prompt) if options.prompt else {}
    try:
        outputs = generator.run({**texts, **inputs}, seed=options.seed, **chosen)
    except RuntimeError as error:  # LiteRT's, for a number that stands for nothing
        raise ConfigError(f"the bundle does not run on {', '.join(options.condition)}: {error}") from error
    if "image" not in outputs:
        raise ConfigError(f"this bundle makes {', '.join(outputs)} and no image")
    return outputs["image"]


def _evaluate(options: argparse.Namespace) -> None:
    from snapgen_jax.scoring import evaluate

    names = options.names.split(",")
    of_evaluators = _evaluator_options(options.set, names)
    numbers = evaluate(
        options.workdir,
        names,
        options.step,
        generation=options.generation,
        options=of_evaluators,
        decoder=options.decoder,
    )
    print(json.dumps(numbers, indent=2))


def _evaluator_options(assignments: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`{evaluator: {option: value}}` of "NAME.OPTION=VALUE"; every name is one of `names`."""
    from snapgen_jax.overrides import parse_override
    from snapgen_jax.typed import closest

    found: dict[str, dict[str, Any]] = {}
    for text in assignments:
        path, value = parse_override(text, "--set ")
        if len(path) != 2:
            raise ConfigError(f"--set {text}: write --set NAME.OPTION=VALUE, such as frechet.examples=2048")
        if path[0] not in names:
            raise ConfigError(
                f"--set {text}: {path[0]!r} is not among --names={','.join(names)}{closest(path[0], names)}"
            )
        found.setdefault(path[0], {})[path[1]] = value
    return found


def _export(options: argparse.Namespace) -> None:
    from snapgen_jax.export.run import export_run

    out = options.out or str(epath.Path(options.workdir) / "export" / "bundle")
    report = export_run(options.workdir, out, backend=options.backend, decoder=options.decoder, gpu_check=options.gpu)
    print(json.dumps(report, indent=2))


def _load_codec(options: argparse.Namespace) -> Any:
    from snapgen_jax.coding import codec_of_run, codec_of_weights

    if options.weights:
        if options.decoder:
            raise ConfigError("--decoder goes with --workdir; a run of a tiny decoder is itself a --workdir")
        return codec_of_weights(options.weights)
    return codec_of_run(options.workdir, options.decoder)


def _encode(options: argparse.Namespace) -> None:
    from safetensors.numpy import save

    from snapgen_jax.coding import encode_files

    latents = encode_files(_load_codec(options), options.images)
    epath.Path(options.out).write_bytes(save(latents))
    shapes = ", ".join(f"{name} {'x'.join(map(str, latent.shape))}" for name, latent in latents.items())
    print(f"wrote {shapes} to {options.out}")


def _decode(options: argparse.Namespace) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from snapgen_jax.coding import decode_latents
    from snapgen_jax.evaluation.pictures import png_bytes

    try:
        latents = load(epath.Path(options.latents).read_bytes())
    except SafetensorError as error:
        raise ConfigError(f"{options.latents} is no file of `snapgen encode`: {error}") from error
    images = decode_latents(_load_codec(options), latents)
    out = epath.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        if pathlib.PurePath(name).name != name:
            raise ConfigError(f"{options.latents} names an image {name!r}, which would leave the folder {out}")
        (out / f"{name}.png").write_bytes(png_bytes(image))
    print(f"wrote {len(images)} image{'s' * (len(images) > 1)} to {out}")


def _status(options: argparse.Namespace) -> None:
    from snapgen_jax.training.status import status

    print(status(epath.Path(options.workdir)))


def _upgrade(options: argparse.Namespace) -> None:
    from snapgen_jax.upgrade import upgrade

    rewritten = upgrade(options.workdir)
    print("\n".join(f"rewrote {file}" for file in rewritten) or f"{options.workdir} is up to date")


def _count(options: argparse.Namespace) -> None:
    import gc

    gc.disable()  # this process lives for seconds, and spent a third of them in looking for garbage
    from snapgen_jax.networks.counting import all_counts_table, ladder_table

    print(ladder_table() if options.ladder else all_counts_table())


def entry() -> int:
    """What the `snapgen` program calls: prepares the process for its machine, then runs the command."""
    prepare()
    return main()


if __name__ == "__main__":
    sys.exit(entry())
