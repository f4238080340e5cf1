"""Writes the golden tensors again, in an environment with the `oracle` extra:

    python -m tests.oracles.make_goldens            # of every network
    python -m tests.oracles.make_goldens mmdit      # of those named

A network is one file beside this one, with a function `write_goldens(folder)` that lets the reference library make tiny
random checkpoints and records what it computes with them. The default tests compare with these files without torch.
"""

from __future__ import annotations

import importlib
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
GOLDENS = HERE.parent / "goldens"


def main(names: list[str]) -> None:
    networks = sorted(path.stem for path in HERE.glob("*.py") if "\ndef write_goldens(" in path.read_text())
    if unknown := set(names) - set(networks):
        raise SystemExit(f"no such network: {', '.join(sorted(unknown))}; there are {', '.join(networks)}")
    for name in names or networks:
        importlib.import_module(f"tests.oracles.{name}").write_goldens(GOLDENS)
        print(f"{name}: written to {GOLDENS}")


if __name__ == "__main__":
    main(sys.argv[1:])
