"""`snapgen adapters`: its actions, their options, and what each of them runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_adapters(commands: Any) -> None:
    """Adds `adapters` and its actions to the commands of the parser."""
    text = "Adapters of a trained network: peft's files of a run, and images for the prior."
    adapters = commands.add_parser("adapters", help=text, description=text)
    actions = adapters.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "Write the adapters of a run as adapter_config.json and adapter_model.safetensors, a folder a network."
    export = actions.add_parser("export", help=text, description=text)
    export.add_argument("--workdir", required=True, help="run of the recipe adapters, local or gs://")
    export.add_argument("--out", required=True, help="folder to write")
    export.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    text = "Draw images by a trained run, with captions: a folder for data.mixture."
    prior = actions.add_parser("prior", help=text, description=text)
    prior.add_argument("--workdir", required=True, help="the run that is to be adapted, local or gs://")
    prior.add_argument("--out", required=True, help="folder to write")
    prior.add_argument("--count", type=int, default=200, help="images (default: %(default)s)")
    prior.add_argument("--prompt", action="append", default=[], help="texts, in turn (default: the run's own captions)")
    prior.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")


def run_adapters(options: argparse.Namespace) -> None:
    """Runs the action that was asked for."""
    from snapgen_jax.adapters import draw_prior, export_adapters

    if options.action == "export":
        print("\n".join(f"wrote {folder}" for folder in export_adapters(options.workdir, options.out, options.step)))
        return
    print("compiling the generator; a large run takes minutes, the first time ...", file=sys.stderr, flush=True)
    folder = draw_prior(options.workdir, options.out, options.count, options.prompt, options.seed)
    print(f"wrote {options.count} images with captions to {folder}")
