"""The command line: `snapgen <command> --help`. Effects live here: prints, and files asked for by name.

`cli_parser` says which options there are, `cli_exit` how a command ends.

Exit codes: 0 done; 69 infrastructure failed, submit again; 70 diverged; 75 preempted with nothing lost, submit again;
78 the config, the data or the workdir is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from snapgen_jax.cli_adapters import run_adapters
from snapgen_jax.cli_apps import export_app
from snapgen_jax.cli_bench import run_bench
from snapgen_jax.cli_exit import run_to_exit_code
from snapgen_jax.cli_parser import build_parser, generation_options, split_beam, split_overrides
from snapgen_jax.cli_precisions import chosen_precisions
from snapgen_jax.cli_prepare import run_prepare, start_cluster
from snapgen_jax.cli_sample import run_sample, say_compiling
from snapgen_jax.process import began, prepare
from snapgen_jax.training.exits import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments, beam = split_beam(list(sys.argv[1:] if argv is None else argv))
    arguments, overrides = split_overrides(arguments)
    parser = build_parser()
    options, others = parser.parse_known_args(arguments)
    try:
        options.generation = generation_options(options, others) if "takes_options" in options else {}
    except ConfigError as error:
        parser.error(str(error))
    if others and "takes_options" not in options:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if overrides and not hasattr(options, "config"):
        parser.error(f"`snapgen {options.command}` takes no --config overrides (given: {', '.join(overrides)})")
    options.overrides, options.beam = overrides, beam
    _expand_home(options)
    _keep_compiled_programs()
    return run_to_exit_code(options.command, lambda: COMMANDS[options.command](options), lambda: _given(options))


def _expand_home(options: argparse.Namespace) -> None:
    """Puts the home folder in place of the "~" of every path: of `--workdir=~/run` a shell leaves it."""
    from snapgen_jax.typed import expand_home

    for name, value in vars(options).items():
        if name in ("prompt", "set", "overrides", "beam"):  # texts, and what the config's dataclasses read
            continue
        if isinstance(value, str):
            setattr(options, name, expand_home(value))
        elif isinstance(value, list):
            setattr(options, name, [expand_home(item) for item in value])


def _given(options: argparse.Namespace) -> list[str]:
    """Every text that the user gave and that may be a path: options, overrides, and values of the config."""
    values: list[Any] = [value for name, value in vars(options).items() if name != "command"]
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


def _keep_compiled_programs() -> None:
    """Lets a resumed run, and the parts of one command, find what was compiled before; and a changed program find what
    XLA measured on a GPU of the kernels that it shares with an earlier one, which is most of a compilation there."""
    cache = epath.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "snapgen_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "xla_gpu_per_fusion_autotune_cache_dir")


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

    resolved = _load_experiment(options)
    start_cluster(options)
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


def _draw_many(options: argparse.Namespace) -> None:
    from snapgen_jax.drawing import draw_run
    from snapgen_jax.generation import load_config

    start_cluster(options)
    load_config(options.workdir)  # a mistyped name is said before all else
    say_compiling("the generator")
    drawn, count = draw_run(
        options.workdir,
        options.out,
        options.count,
        classes=options.classes,
        prompts=options.prompts,
        step=options.step,
        decoder=options.decoder,
        seed=options.seed,
        batch_size=options.batch_size,
        options=options.generation,
        npz=options.npz,
    )
    print(f"drew {drawn:,} of {count:,} images to {options.out}; the others were there, or are other hosts'")


def _evaluate(options: argparse.Namespace) -> None:
    from snapgen_jax.generation import load_config
    from snapgen_jax.scoring import configured, evaluate

    names = configured(options.workdir) if options.names is None else options.names.split(",")
    of_evaluators = _evaluator_options(options.set, names)
    load_config(options.workdir)  # a mistyped name is said before all else
    say_compiling(f"what {', '.join(names)} {'needs' if len(names) == 1 else 'need'}")
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
    if options.app or options.bundle:
        report = export_app(options, lambda out: _export_bundle(options, out))
    else:
        report = _export_bundle(options, options.out or str(epath.Path(options.workdir) / "export" / "bundle"))
    if report:
        print(json.dumps(report, indent=2))


def _export_bundle(options: argparse.Namespace, out: str) -> dict[str, float]:
    from snapgen_jax.export.latents import Carried
    from snapgen_jax.export.run import check_ready, export_run, image_sizes
    from snapgen_jax.lazy_schedules import for_bundle

    precisions, limits, budget = chosen_precisions(options)
    check_ready(out, options.backend)
    chosen, found = for_bundle(options.workdir, options.generation, options.calibration, adaptive=options.adaptive)
    names = ("clip_l", "clip_g", "language")
    carried = Carried(
        tuple(options.encoders.split(",")) if options.encoders else None,
        {name: folder for name in names if (folder := getattr(options, name))},
        {name: folder for name in names if (folder := getattr(options, f"{name}_tokenizer"))},
    )
    report = export_run(
        options.workdir,
        out,
        options.backend,
        options.decoder,
        options.gpu,
        carried=carried,
        precisions=precisions,
        limits=limits,
        budget=budget,
        adapters=options.adapters,
        title=options.title,
        licence=options.license,
        sizes=image_sizes(options.sizes),
        form="packed" if options.packed else "plain",
        options=chosen,
        provenance=found,
        begins=lambda: say_compiling("the run's networks, converting them, and holding each file against JAX"),
    )
    schedule = found.get("schedule", {})
    return report | {f"schedule.{name}": value for name, value in schedule.items() if isinstance(value, float)}


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


def _weights(options: argparse.Namespace) -> None:
    if options.action == "export":
        from snapgen_jax.release.card import Licence
        from snapgen_jax.release.writer import export_weights

        try:
            licence = Licence(options.license, options.license_name, options.license_link)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        made = export_weights(
            options.workdir,
            options.out,
            kept=options.kept,
            step=options.step,
            shard_bytes=options.shard_mb * 10**6,
            licence=licence,
            title=options.title,
        )
        beside = f", with {', '.join(sorted(set(made.runs.values())))}" if made.runs else ""
        print(f"wrote the weights of step {made.step:,} to {options.out}{beside}")
        return
    from snapgen_jax.release import hub

    if options.action == "push":
        print(hub.push(options.folder, options.repo, private=not options.public))
    else:
        hub.pull(options.repo, options.out, revision=options.revision)
        print(f"wrote {options.repo} to {options.out}")


def _status(options: argparse.Namespace) -> None:
    from snapgen_jax.training.status import status
    from snapgen_jax.weights.folder import is_weights_folder

    if is_weights_folder(options.workdir):
        raise ConfigError(
            f"{options.workdir} is a folder of weights, whose README.md says what they are; name a workdir"
        )
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


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "quickstart": _quickstart,
    "chain": _chain,
    "train": _train,
    "config": _show_config,
    "sample": run_sample,
    "draw": _draw_many,
    "evaluate": _evaluate,
    "export": _export,
    "bench": run_bench,
    "adapters": run_adapters,
    "encode": _encode,
    "decode": _decode,
    "weights": _weights,
    "data": _data,
    "prepare": run_prepare,
    "plan": _plan,
    "status": _status,
    "upgrade": _upgrade,
    "count": _count,
}


def entry() -> int:
    """What the `snapgen` program calls: prepares the process for its machine, then runs the command."""
    prepare()
    return main()


if __name__ == "__main__":
    sys.exit(entry())
