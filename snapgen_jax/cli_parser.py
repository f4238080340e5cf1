"""What may stand on the command line of `snapgen`: commands, their options, and the help that each of them has."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from snapgen_jax.cli_adapters import add_adapters
from snapgen_jax.cli_apps import add_app
from snapgen_jax.cli_bench import add_bench
from snapgen_jax.cli_precisions import add_precisions
from snapgen_jax.cli_prepare import add_cluster, add_prepare
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.typed import Written


def build_parser() -> argparse.ArgumentParser:
    """The parser of `snapgen`."""
    parser = argparse.ArgumentParser(
        prog="snapgen", description="SnapGen in JAX: train, sample, score and export text-to-image models for phones."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    quickstart = add("quickstart", "From nothing to a running phone model on a laptop, in about ten minutes.")
    _workdir(quickstart)
    _config(quickstart, default="configs/shapes/quickstart.py")
    quickstart.add_argument(
        "--chain", action="store_true", help="the whole method in twenty minutes: configs/shapes/chain.py:quick"
    )

    chain = add("chain", "Train, or go on training, several stages that start from each other; score them.")
    _workdir(chain)
    _config(chain, default="configs/shapes/chain.py")

    train = add("train", "Train, or go on training, to the end of a config.")
    _workdir(train)
    _config(train)
    add_cluster(train)

    config = add("config", "Print a config with every default filled in.")
    _config(config)

    sample = add("sample", "Images from prompts or class labels, by a trained run or by an exported bundle.")
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
    sample.add_argument("--seed", type=int, default=0, help="of the noise, from 0 to 4294967295 (default: %(default)s)")
    sample.add_argument("--decoder", help="a run of a tiny decoder, in place of the run's own; with --workdir")
    _adapters(sample)
    sample.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="NAME=WORKDIR",
        help="of a run of reward_tuning: the text encoder of another, mixed in by --encoder_mix; repeat for more",
    )
    sample.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="in which a run's networks compute (default: float32 on a CPU, else bfloat16)",
    )
    sample.add_argument("--time", action="store_true", help="also say how many milliseconds each part of drawing takes")
    sample.add_argument("--loop", action="store_true", help="draw each line of standard input as it comes")
    sample.add_argument("--precision", help="of a bundle's networks: f32 (the default), f16, or another that it has")
    sample.add_argument("--size", metavar="HxW", help="of a bundle's images, where it has several (default: its own)")
    sample.add_argument(
        "--cache", metavar="FOLDER", help="where a bundle's packed networks are unpacked (default: BUNDLE.unpacked)"
    )
    sample.add_argument(
        "--accelerator",
        choices=("cpu", "gpu", "auto"),
        help="where a bundle's networks run on LiteRT's CompiledModel, as on phones; auto: the GPU, where it is right",
    )
    sample.add_argument(
        "--out",
        default="samples.png",
        help="one sheet of all images; or a folder, with / at its end, or a name with {index} or %%03d for one file an "
        "image; .png, .jpg, .jpeg or .webp (default: %(default)s)",
    )

    draw = add("draw", "Many images of a trained run, a file each, over all hosts: 50,000 for a FID. Resumes.")
    _workdir(draw)
    draw.add_argument("--out", required=True, help="folder for 000000.png, 000001.png ...; local or gs://")
    draw.add_argument("--count", type=int, help="how many images (default: one for each line of --prompts)")
    told = draw.add_mutually_exclusive_group()
    told.add_argument(
        "--classes",
        metavar="uniform|FILE",
        help="every class as often, by label or by its name, which FILE has one a line in place of the run's own",
    )
    told.add_argument("--prompts", metavar="FILE", help="one prompt a line, taken in turn")
    _generation(draw)
    draw.add_argument("--seed", type=int, default=0, help="of the noise, from 0 to 4294967295 (default: %(default)s)")
    draw.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    draw.add_argument("--decoder", help="a run of a tiny decoder, in place of the run's own")
    draw.add_argument("--batch_size", type=int, default=32, help="images on a device at a time (default: %(default)s)")
    draw.add_argument("--npz", metavar="FILE", help="also all images as one array, which ADM's evaluation reads")
    add_cluster(draw)

    evaluate = add("evaluate", "Score a trained run.")
    _workdir(evaluate)
    evaluate.add_argument("--names", help="evaluators, separated by commas (default: those of the run's config)")
    evaluate.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    _generation(evaluate)
    evaluate.add_argument("--decoder", help="a run of a tiny decoder, in place of the run's own")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="NAME.OPTION=VALUE", help="an evaluator's: frechet.examples=2048"
    )

    export = add("export", "Write a TFLite bundle of a trained run, checked against JAX, or an app around one.")
    add_app(export)
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
    export.add_argument(
        "--decoder",
        help="a run of a tiny decoder, in place of the run's own; of a run on latents also "
        "a run of an autoencoder, or a folder of a published one",
    )
    add_precisions(export)
    export.add_argument(
        "--sizes",
        metavar="HxW,HxW",
        help="further image sizes of the bundle, height by width, whose files share the weights: 64x64,96x64",
    )
    export.add_argument(
        "--calibration",
        type=int,
        default=64,
        metavar="N",
        help="of a run of gates without --schedule: the bundle has the schedule that most of N samples agree with "
        "(default: %(default)s)",
    )
    export.add_argument(
        "--adaptive",
        action="store_true",
        help="of a run of gates: let them decide on the phone; on its CPU only, and with --backend=jax2tf",
    )
    export.add_argument("--title", default="", help="name of the model that apps show (default: the workdir's)")
    export.add_argument("--license", default="", help="of the weights, as the hub calls it: apache-2.0, cc-by-4.0")
    export.add_argument(
        "--encoders",
        help="published text encoders that the bundle of a run on latents carries, of "
        "clip_l, clip_g and language, separated by commas (default: those with a folder); the others are left out",
    )
    for name in ("clip_l", "clip_g", "language"):
        export.add_argument(f"--{name}", metavar="FOLDER", help="local folder of its weights, and of its tokenizer")
        export.add_argument(f"--{name}_tokenizer", metavar="FOLDER", help="of its tokenizer, where that is another")
    _adapters(export)
    _generation(export)
    add_bench(commands)
    add_adapters(commands)

    encode = add("encode", "Image files to latents, by a trained run or by published weights.")
    _codec(encode)
    encode.add_argument("images", nargs="+", help="image files")
    encode.add_argument("--out", default="latents.safetensors", help="file to write (default: %(default)s)")

    decode = add("decode", "Latents to image files, by a trained run or by published weights.")
    _codec(decode)
    decode.add_argument("latents", help="file that `snapgen encode` wrote")
    decode.add_argument("--out", default="decoded", help="folder for the PNG files (default: %(default)s)")

    weights = add("weights", "The weights of a trained run as a folder of their own; to and from the Hugging Face hub.")
    _weights(weights)

    data = add("data", "Draw batches and train on none: how fast the input is.")
    _workdir(data)
    _config(data)
    data.add_argument("--batches", type=int, default=100, help="how many (default: %(default)s)")

    add_prepare(commands)

    plan = add("plan", "Whether a config fits TPUs that are not here, and what it will cost.")
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

    status = add("status", "Where a run stands, and what to do next.")
    _workdir(status)

    upgrade = add("upgrade", "Rewrite the configs of a workdir that an earlier version wrote.")
    upgrade.add_argument("workdir", help="folder of a run, or of a chain of runs")

    count = add("count", "Parameters and compute of networks, from shapes alone.")
    which = count.add_mutually_exclusive_group(required=True)
    which.add_argument("--ladder", action="store_true", help="the design steps A to G beside the published changes")
    which.add_argument("--all", action="store_true", help="every network and preset")
    return parser


def _workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, help="folder of the run, local or gs://")


def _adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapters", help="folder of peft's files, one folder a network, to merge; with --workdir")


def _generation(parser: argparse.ArgumentParser) -> None:
    """The options of generation: the usual ones by name, and every other field of the run's options as it is."""
    group = parser.add_argument_group("options of the generator, by default the run's own; any other as --method=heun")
    group.add_argument("--steps", type=int, help="sampling steps")
    group.add_argument("--guidance", type=float, help="guidance scale; 1 is none")
    group.add_argument(
        "--guidance_interval",
        type=Written,
        metavar="T_LOW,T_HIGH",
        help="the times at which to guide, from 0 (data) to 1 (noise): 0.1,0.8; one call of the network at the others",
    )
    parser.set_defaults(takes_options=True)


def _codec(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", help="a run of an autoencoder, of a tiny decoder, or of a generator")
    source.add_argument("--weights", help="folder of a published autoencoder, such as vae/ of Stable Diffusion 3")
    parser.add_argument("--decoder", help="a run of a tiny decoder, in place of a generator's own; with --workdir")


def _weights(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text)

    export = add("export", "Write safetensors, config and model card of a run; `snapgen_jax.load` reads the folder.")
    _workdir(export)
    export.add_argument("--out", required=True, help="folder to write; must be new or empty")
    export.add_argument(
        "--kept",
        choices=("ema", "trained"),
        default="ema",
        help="the averaged weights, where the run keeps an average, or the weights themselves (default: %(default)s)",
    )
    export.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    export.add_argument("--shard_mb", type=int, default=5000, help="greatest size of a file (default: %(default)s)")
    export.add_argument("--title", default="", help="of the model card (default: the folder's name)")
    export.add_argument(
        "--license", default="unknown", help="as the hub calls it: apache-2.0, cc-by-4.0, other (default: %(default)s)"
    )
    export.add_argument("--license_name", default="", help="of a licence that is `other`")
    export.add_argument("--license_link", default="", help="to the text of a licence that is `other`")

    push = add("push", "Upload such a folder with huggingface_hub, as you are logged in there.")
    push.add_argument("--folder", required=True, help="what `snapgen weights export` wrote")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made, private, where it is not there")
    push.add_argument("--public", action="store_true", help="make a new repository public")

    pull = add("pull", "Download such a folder with huggingface_hub.")
    pull.add_argument("--repo", required=True, metavar="OWNER/NAME")
    pull.add_argument("--out", required=True, help="folder to write; must be new or empty")
    pull.add_argument("--revision", help="branch, tag or commit (default: the newest)")


def _config(parser: Any, default: str | None = None, required: bool = True) -> None:
    parser.add_argument(
        "--config",
        required=required and default is None,
        default=default,
        metavar="FILE[:ARG]",
        help="config file, and the argument of its get_config; override any key with --config.KEY=VALUE"
        + (f" (default: {default})" if default else ""),
    )


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.a.b=value` from the other arguments; returns the others, and `a.b=value` of each."""
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    return [a for a in arguments if not a.startswith("--config.")], overrides


def split_beam(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates Apache Beam's options from those of `snapgen prepare`: `--beam.NAME=VALUE`, and all that follows `--`.

    Other commands have none. Returns the others, and Beam's as Beam takes them, `--NAME=VALUE`.
    """
    if arguments[:1] != ["prepare"]:
        return arguments, []
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, passed = arguments[:end], arguments[end + 1 :]
    named = [f"--{a.removeprefix('--beam.')}" for a in own if a.startswith("--beam.")]
    return [a for a in own if not a.startswith("--beam.")], [*named, *passed]


def generation_options(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """`{option: value}` of the generator: those that are named, and "--NAME=VALUE" or "--NAME", "VALUE" of others.

    Raises:
        ConfigError: an argument is none of these.
    """
    from snapgen_jax.overrides import parse_override

    named = ("steps", "guidance", "guidance_interval")
    chosen = {name: value for name in named if (value := getattr(options, name)) is not None}
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
