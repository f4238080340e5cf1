"""What every launcher shares: the job, the chips it runs on, and commands that are printed before they run."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parent.parent
FLAGS = pathlib.Path(__file__).parent / "flags"
# Exit codes of `snapgen train` after which the same command goes on: infrastructure failed, preempted.
AGAIN = (69, 75)
# Those after which a person has to look: diverged, bad config.
HOPELESS = (70, 78)

_SECRET_NAME = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AIza[\w-]{30,}|sk-[\w-]{20,}|ya29\.[\w-]{20,}"
)
# Cloud TPU's name of a chip, and how many of its "accelerators" one chip counts for (cores before v5e, then chips).
_ACCELERATORS = {"v4": ("v4", 2), "v5e": ("v5litepod", 1), "v5p": ("v5p", 2), "v6e": ("v6e", 1)}


class LaunchError(ValueError):
    """A job that cannot be launched; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Chips:
    """The chips of a job, from a topology such as "v5e:4x4" as `snapgen plan` takes it.

    Attributes:
        kind: "v5e".
        shape: "4x4".
        slices: how many of these.
    """

    kind: str
    shape: str
    slices: int = 1

    @classmethod
    def parse(cls, topology: str) -> Chips:
        """Reads "v5e:4x4", or "2*v5e:4x4" for two slices."""
        match = re.fullmatch(r"(?:(\d+)\*)?(v4|v5e|v5p|v6e|tpu7x):(\d+(?:x\d+)+)", topology)
        if match is None:
            raise LaunchError(f"topology {topology!r} is not like v5e:4x4, v5p:2x2x2 or 2*v6e:16x16")
        return cls(match[2], match[3], int(match[1] or 1))

    @property
    def count(self) -> int:
        """Chips in one slice."""
        return math.prod(int(n) for n in self.shape.split("x"))

    @property
    def hosts(self) -> int:
        """Processes of the whole job: four chips a host; v5e and v6e have hosts of eight where one is enough."""
        one = 8 if self.kind in ("v5e", "v6e") else 4
        return self.slices * (1 if self.count <= one else self.count // 4)

    @property
    def accelerator(self) -> str:
        """What Cloud TPU and xpk call one slice: "v5litepod-16"."""
        if self.kind == "tpu7x":
            return f"tpu7x-{2 * self.count}"
        name, per_chip = _ACCELERATORS[self.kind]
        return f"{name}-{per_chip * self.count}"


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of `snapgen train`; or of `snapgen prepare encode`, where images are named.

    Attributes:
        name: lower-case letters, digits and dashes, at most 40 characters.
        config: as `--config` takes it.
        workdir: where every host can write. Encoding writes its shards there.
        overrides: "--config.a.b=value" and the like.
        images: the folder of collected images to encode; "" trains.
    """

    name: str
    config: str
    workdir: str
    overrides: tuple[str, ...] = ()
    images: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise LaunchError(
                f"job name {self.name!r}: use at most 40 lower-case letters, digits and dashes, a letter first"
            )
        for override in self.overrides:
            key, _, value = override.partition("=")
            if not key.startswith("--config."):
                raise LaunchError(f"unknown argument {override!r}; what the job takes is --config.KEY=VALUE")
            if _SECRET_NAME.search(key) or _SECRET_VALUE.search(value):
                raise LaunchError(
                    f"{key} looks like a secret, and a command line is seen by every user and log of the machine: keep "
                    "it in the platform's secret store and let the program read it there"
                )
        if _SECRET_VALUE.search(self.workdir):
            raise LaunchError("the workdir holds what looks like a secret; give the machine access to it instead")

    def command(self, processes: int | None = None) -> list[str]:
        """The command that every host runs."""
        expected = [] if processes is None else [f"--processes={processes}"]
        what = ["train", f"--config={self.config}", f"--workdir={self.workdir}"]
        if self.images:
            what = ["prepare", "encode", f"--config={self.config}", f"--images={self.images}", f"--out={self.workdir}"]
        return ["snapgen", *what, *expected, *self.overrides]


def flags(name: str) -> str:
    """The XLA and libtpu flags of a set under `launch/flags`; its comments say what each is for."""
    path = FLAGS / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FLAGS.glob("*.txt")))
        raise LaunchError(f"no flag set {name!r}; there are {known}, and none")
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return " ".join(line for line in lines if line)


class Shell:
    """Runs commands, each printed first; a dry run prints them and runs none."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def run(self, command: Sequence[str], what: str = "") -> None:
        """Runs one command; a failing one ends the launch."""
        if what:
            print(f"# {what}")
        print(shlex.join(command), flush=True)
        if not self.dry_run:
            subprocess.run(command, check=True, cwd=ROOT)

    def ask(self, command: Sequence[str], what: str = "", dry: str = "") -> str:
        """The output of a command, "" if it fails; `dry` in a dry run."""
        if what:
            print(f"# {what}")
        print(shlex.join(command), flush=True)
        if self.dry_run:
            return dry
        return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what every launcher takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    return made


def add_job(made: argparse.ArgumentParser) -> None:
    """The arguments that describe a job."""
    made.add_argument("--name", required=True, help="of the job")
    made.add_argument("--config", required=True, help="config file, as `snapgen train` takes it")
    made.add_argument("--workdir", required=True, help="where every host can write, gs://BUCKET/RUN")
    made.add_argument(
        "--images",
        default="",
        help="a folder of `snapgen prepare collect`: encodes it for the config, into --workdir, in place of training",
    )


def job_of(options: argparse.Namespace, rest: Sequence[str]) -> Job:
    """The job that parsed arguments describe; `rest` are those that the parser left over."""
    return Job(options.name, options.config, options.workdir, tuple(rest), options.images)


def job_in_bucket(options: argparse.Namespace, rest: Sequence[str]) -> Job:
    """As `job_of`, for hosts that share no disk."""
    if not options.workdir.startswith("gs://"):
        raise LaunchError(
            f"workdir {options.workdir!r} is on this machine; every host has to reach it: gs://BUCKET/RUN"
        )
    return job_of(options, rest)


def bucket_of(mount: str) -> str:
    """The name of a bucket to mount, from "BUCKET" or "gs://BUCKET"."""
    name = mount.removeprefix("gs://").rstrip("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name):
        raise LaunchError(
            f"--mount={mount!r} is no name of a bucket; give BUCKET, and name folders in --config.data.path"
        )
    return name


def main_of(run, argv: Sequence[str] | None = None) -> int:
    """Calls `run(argv)`; an impossible launch is one line and exit code 78, a failing command its own code."""
    try:
        run(list(sys.argv[1:] if argv is None else argv))
    except LaunchError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 78
    except subprocess.CalledProcessError as error:
        print(f"launch: `{shlex.join(error.cmd)}` ended with {error.returncode}", file=sys.stderr)
        return 69
    return 0
