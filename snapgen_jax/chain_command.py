"""A stage of a chain that runs commands: data that are prepared, weights that are written, a bundle that is verified.

    {"name": "shards", "derive": "snapgen_jax.chain_command:run", "earlier": {"photographs": "photographs"},
     "options": {"commands": ("prepare collect --path={photographs} --out={here}/images",)}}

`{here}` is the stage's own folder, and `{name}` that of the stage that `earlier` calls so. A command is one of
`snapgen`, or begins with "python" and runs a file. What a stage writes is named by later stages through its result:
`{"images": "CHAIN/shards/images"}`, of each file and folder that lies in it.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from snapgen_jax.bookkeeping import Items, Json
from snapgen_jax.training.exits import ConfigError, ExitCode, PreemptedError

_OURS = ("began.json", "derived.json", "items.jsonl")


def run(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> Json:
    """Runs the commands that have not ended yet, in order.

    Args:
        stages: workdirs of earlier stages.
        workdir: of this one.
        options: `commands`; and `fresh`, names within this stage's folder that the command that writes them (`--out=`)
            wants not to be there, and that one that was stopped may have left.

    Returns:
        `{name: path}` of what lies in the folder afterwards.

    Raises:
        ConfigError: an option or a placeholder is unknown, or a command is refused.
        PreemptedError: a command was told to stop; the stage goes on with it the next time.
    """
    if unknown := sorted(options.keys() - {"commands", "fresh"}):
        raise ConfigError(f"a stage of commands has no option {', '.join(unknown)}; it has commands and fresh")
    places = {**{name: str(folder) for name, folder in stages.items()}, "here": str(workdir)}
    commands = [_filled(command, places) for command in options["commands"]]
    workdir.mkdir(parents=True, exist_ok=True)
    done = Items(workdir)
    for number, command in enumerate(commands, 1):
        if f"{number}" not in done.names:
            for name in options.get("fresh", ()):
                if f"--out={workdir / name}" in command:
                    _remove(workdir / name)
        done.run(f"{number}", lambda command=command: _run(command))
    return {path.name: str(path) for path in sorted(workdir.iterdir()) if path.name not in _OURS}


def _filled(command: str, places: Mapping[str, str]) -> list[str]:
    try:
        return [word.format_map(places) for word in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join("{" + name + "}" for name in places)
        raise ConfigError(f"the command {command!r} cannot be filled in ({error!r}); it may name {known}") from error


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _run(command: Sequence[str]) -> str:
    shown = shlex.join(command if command[0] == "python" else ["snapgen", *command])
    print(f"$ {shown}", flush=True)
    if command[0] == "python":
        code = subprocess.run([sys.executable, *command[1:]], check=False).returncode
    else:
        from snapgen_jax.cli import main  # which imports chains

        code = main(command)
    if code == ExitCode.PREEMPTED:
        raise PreemptedError(f"stopped in `{shown}`; run the same command to go on")
    if code:
        raise ConfigError(f"`{shown}` ended with {code}; what it says is above")
    return shown
