"""Checkpoints: {state, ema, data, meta} in one directory per step, committed atomically by Orbax.

The tree of a state is stored by name, so that a difference can be named before a byte is read, and so that any number
of devices can read it. The averaged weights are an item of their own: inference needs nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from snapgen_jax.bounds import at_least, check
from snapgen_jax.training.exits import ConfigError, DamagedError
from snapgen_jax.training.files import on_object_store
from snapgen_jax.training.fingerprint import seal
from snapgen_jax.training.state import TrainState

Tree = Any
_REMEDY = "point --workdir at an empty folder to start a new run, or restore the config of this one"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
        every_steps: cadence of saves; a save also precedes every evaluation and follows the last step.
        keep_last: number of newest checkpoints to keep.
        keep_every_steps: checkpoints at multiples of this are kept for good; 0 keeps none.
        fallback: what to do where the newest checkpoint is damaged: "refuse" to start, or go on from the newest intact
            one, the "previous". What is damaged is moved to `damaged/` in the workdir.
    """

    every_steps: int = 1000
    keep_last: int = 2
    keep_every_steps: int = 0
    fallback: Literal["refuse", "previous"] = "refuse"

    def __post_init__(self) -> None:
        rarely = "a number above train_steps saves before evaluations and after the last step alone"
        check(self, every_steps=at_least(1, rarely), keep_last=at_least(1), keep_every_steps=at_least(0))


def complete_steps(workdir: epath.PathLike) -> list[int]:
    """Steps of the checkpoints of a workdir that are whole, in order."""
    return sorted(ocp.utils.checkpoint_steps(epath.Path(workdir) / "checkpoints"))


class Checkpointer:
    """Saves and restores the states of one workdir. Saving is asynchronous; `wait` blocks until it is on disk."""

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig | None = None):
        root = epath.Path(workdir)
        # orbax wants absolute paths, and epath takes one in an object store for a relative one.
        self.directory = (root if on_object_store(root) else root.absolute()) / "checkpoints"
        config = config or CheckpointConfig()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep_last,
                keep_period=config.keep_every_steps or None,
                create=False,
                enable_async_checkpointing=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint, or None. A torn one is never offered."""
        return self._manager.latest_step()

    def save(self, state: TrainState, position: int, meta: Mapping[str, Any]) -> None:
        """Starts to save a state at its step; does nothing if that step is saved already.

        Args:
            state: the state; its arrays are copied before this returns, so that they may be donated afterwards.
            position: number of global batches drawn.
            meta: JSON-able facts that a resumed run must agree with.
        """
        step = int(state.step)
        if step == self.latest_step():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        stored = _stored(state)
        facts = {
            **json.loads(json.dumps(meta)),
            "step": step,
            "shapes": _shapes(stored),
            "position": position,
            "seals": {item: seal(tree) for item, tree in stored.items()},
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(stored["state"]),
                ema=ocp.args.StandardSave(stored["ema"]),
                data=ocp.args.JsonSave({"position": position}),
                meta=ocp.args.JsonSave({**facts, "digest": _digest(facts)}),
            ),
        )

    def wait(self) -> None:
        """Blocks until the save under way, if any, is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the background threads."""
        self._manager.close()

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was told about the run at that step.

        Raises:
            DamagedError: it is not there, or not as it was saved.
        """
        with self._damage(step, "meta"):
            found = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            digest = found.pop("digest", None)
            if digest is None and "seals" not in found:  # of an earlier version
                found["shapes"].items()
                return found
            if digest != _digest(found):
                raise ValueError("it was altered")
            return found

    def look(self, step: int) -> None:
        """Reads what can be read of a checkpoint without its arrays.

        Raises:
            DamagedError: a part of it is missing or damaged.
        """
        self.meta(step)
        with self._damage(step, "data"):
            self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]["position"]
        for item in ("state", "ema"):
            with self._damage(step, item), ocp.StandardCheckpointer() as reader:
                jax.tree.leaves(reader.metadata(self.directory / str(step) / item).item_metadata.tree)

    def set_aside(self, steps: Sequence[int]) -> None:
        """Moves checkpoints to `damaged/` of the workdir, beside what is there already."""
        folder = self.directory.parent / "damaged"
        for step in steps:
            folder.mkdir(parents=True, exist_ok=True)
            names = (f"{step}" if i == 0 else f"{step}.{i}" for i in itertools.count())
            (self.directory / str(step)).rename(next(path for name in names if not (path := folder / name).exists()))
        self._manager.reload()

    def reload(self) -> None:
        """Looks anew which checkpoints there are."""
        self._manager.reload()

    @contextlib.contextmanager
    def _damage(self, step: int, item: str) -> Iterator[None]:
        """Turns what goes wrong while an item is read into one error that says what to do."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            if _is_passing(error):
                raise
            said = str(error).strip().splitlines() or [repr(error)]
            reason = said[0] if len(said[0]) < 200 else said[0][:200] + " ..."
            earlier = [s for s in complete_steps(self.directory.parent) if s < step]
            remedy = (
                f"the one of step {earlier[-1]} stands before it: --config.checkpoint.fallback=previous trains on from "
                "the newest intact one, and moves this one to `damaged/`"
                if earlier
                else "there is none before it: restore this one from a copy, or start in a new workdir"
            )
            raise DamagedError(
                f"checkpoint {self.directory / str(step)} of step {step} is damaged ({item}: {reason}); {remedy}"
            ) from error

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, int]:
        """Restores a state and the data position.

        Args:
            abstract: the state's tree of `ShapeDtypeStruct` with shardings: where each array is to go.
            step: which checkpoint.

        Raises:
            ConfigError: names every leaf that differs in presence, shape or dtype; nothing has been read then.
            DamagedError: a part of the checkpoint is missing, or not what was saved.
        """
        stored, meta = _stored(abstract), self.meta(step)
        self._compare(_shapes(stored), meta["shapes"], step)
        with self._damage(step, "data"):
            data = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]
            position = data["position"]
            if position != meta.get("position", position):
                raise ValueError(f"its position is {position}, and {meta['position']} was saved")
        with self._damage(step, "arrays"):
            loaded = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(stored["state"]), ema=ocp.args.StandardRestore(stored["ema"])
                ),
            )
        items = {"state": loaded["state"], "ema": loaded["ema"]}
        for item, tree in items.items():
            self._check_seal(meta, item, tree, step)
        return _restored(abstract, items), position

    def restore_weights(self, spec: Tree, step: int) -> Tree:
        """The weights for inference, `{player: tree}`: averages where they are kept, else parameters.

        Reads the `ema` item alone and puts it on the first device, whatever mesh wrote it.

        Args:
            spec: `{player: tree of ShapeDtypeStruct}`.
            step: which checkpoint.

        Raises:
            ConfigError: the checkpoint holds other shapes.
            DamagedError: it is not what was saved.
        """
        meta = self.meta(step)
        saved = {k: v for k, v in meta["shapes"].items() if k.startswith("ema/")}
        self._compare(_shapes({"ema": spec}), saved, step)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), spec)
        with self._damage(step, "ema"):
            weights = self._manager.restore(step, args=ocp.args.Composite(ema=ocp.args.StandardRestore(abstract)))[
                "ema"
            ]
        self._check_seal(meta, "ema", weights, step)
        return weights

    def _check_seal(self, meta: Mapping[str, Any], item: str, tree: Tree, step: int) -> None:
        with self._damage(step, item):
            if "seals" in meta and meta["seals"][item] != seal(tree):
                raise ValueError("its arrays are not those that were saved")

    def _compare(self, expected: Mapping[str, Any], saved: Mapping[str, Any], step: int) -> None:
        lines = []
        for name in sorted(expected.keys() | saved.keys()):
            have, want = saved.get(name), expected.get(name)
            if have is None:
                lines.append(f"  {name}: not in the checkpoint, the config asks for {_show(want)}")
            elif want is None:
                lines.append(f"  {name}: {_show(have)} in the checkpoint, unknown to the config")
            elif list(have) != list(want):
                lines.append(f"  {name}: {_show(have)} in the checkpoint, {_show(want)} in the config")
        if lines:
            more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
            raise ConfigError(
                "\n".join(
                    [
                        f"checkpoint {self.directory / str(step)} does not fit the config; {_REMEDY}:",
                        *lines[:20],
                        *more,
                    ]
                )
            )


def _is_passing(error: Exception) -> bool:
    """Whether an error says that a file system or a device failed, which tells nothing of the checkpoint."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    passing = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in passing)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _show(entry: Any) -> str:
    shape, dtype = entry
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _part(entry: Any) -> str:
    """The name of one step of a tree path: dict key, list index or attribute."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _named(tree: Tree) -> dict[str, Any]:
    """Any pytree as a nested dict of named leaves (optimizer states are tuples of named tuples)."""
    out: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        node = out
        parts = [_part(entry) for entry in path] or ["value"]
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = leaf
    return out


def _stored(state: TrainState) -> dict[str, Any]:
    """The two array items of a checkpoint. The average is kept out of `state`, and stands in for nothing there."""
    players = {
        name: _named({"params": player.params, "opt_state": player.opt_state}) for name, player in state.players.items()
    }
    return {
        "state": {"step": state.step, "skipped": state.skipped, "players": players, **_optional("extra", state.extra)},
        "ema": {name: p.params if p.ema is None else p.ema for name, p in state.players.items()},
    }


def _optional(name: str, tree: Tree) -> dict[str, Any]:
    return {name: _named(tree)} if jax.tree.leaves(tree) else {}


def _restored(abstract: TrainState, stored: Mapping[str, Any]) -> TrainState:
    state = stored["state"]

    def fill(tree: Tree, named: Mapping[str, Any]) -> Tree:
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
        return jax.tree.unflatten(treedef, [_lookup(named, path) for path, _ in paths])

    players = {}
    for name, player in abstract.players.items():
        whole = fill({"params": player.params, "opt_state": player.opt_state}, state["players"][name])
        ema = None if player.ema is None else fill(player.ema, stored["ema"][name])
        players[name] = player.replace(params=whole["params"], opt_state=whole["opt_state"], ema=ema)
    extra = fill(abstract.extra, state["extra"]) if "extra" in state else abstract.extra
    return TrainState(state["step"], state["skipped"], players, extra)


def _lookup(named: Mapping[str, Any], path: Any) -> Any:
    node: Any = named
    for part in [_part(entry) for entry in path] or ["value"]:
        node = node[part]
    return node


def _shapes(stored: Mapping[str, Any]) -> dict[str, list[Any]]:
    flat = jax.tree_util.tree_flatten_with_path(stored)[0]
    return {
        "/".join(_part(entry) for entry in path): [list(leaf.shape), str(np.dtype(leaf.dtype))] for path, leaf in flat
    }
