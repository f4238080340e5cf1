"""Networks whose blocks are taken out or repeated one by one: configs to configs, and trees to trees.

SnapFusion (arXiv 2306.00980, section 3.2) evolves a UNet by such actions. A copy begins as its original:

    config, moved = changed(config, "mid_transformer", "copy")      # the config of another network
    params = moved_weights(build(config)[1], params, moved)         # its parameters
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from snapgen_jax.networks.module import flatten, part_name, unflatten
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.unet import UNetConfig

Tree = Any
Action = Literal["remove", "copy"]
Moved = tuple[tuple[str, str], ...]
"""(path of a block among the parameters, path in the earlier network that it comes from); others stay in place."""
Evolving = UNetConfig | SDUNetConfig
_ARCHITECTURE = {"unet": ("blocks",), "sd_unet": ("down", "mid", "up")}


def architecture(config: Evolving) -> dict[str, Any]:
    """The fields of a network's config that actions change, as JSON has them."""
    return {name: _lists(getattr(config, name)) for name in _ARCHITECTURE[config.kind]}


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def changed(config: Evolving, block: str, action: Action) -> tuple[Evolving, Moved]:
    """The network without a block, or with a copy behind it, and where its blocks come from.

    Args:
        config: of the network.
        block: one of `config.droppable_blocks()`. Of a UNet's block that stands several times the last is meant.
        action: what is done.

    Raises:
        ValueError: the network has no such block.
    """
    if block not in config.droppable_blocks():
        known = ", ".join(config.droppable_blocks())
        raise ValueError(f"{block!r} is no block that may be taken out or repeated; these are {known}")
    if isinstance(config, UNetConfig):
        return _of_unet(config, block.partition(".")[0], action)
    return _of_sd_unet(config, block, action)


def _of_unet(config: UNetConfig, block: str, action: Action) -> tuple[UNetConfig, Moved]:
    count = config.count(block)
    counts = {**dict(config.blocks), block: count + (1 if action == "copy" else -1)}
    counts = tuple((name, counts[name]) for name in config.base_blocks() if counts.get(name, 1) != 1)
    moved = ((unet_path(block, count), unet_path(block, count - 1)),) if action == "copy" else ()
    return dataclasses.replace(config, blocks=counts), moved


def unet_path(block: str, i: int = 0) -> str:
    """Where the i-th of the blocks that stand in one place of a UNet is among its parameters."""
    way, *where = block.split("_")
    if way == "mid":
        place = {"mid_residual_block": "residual", "mid_second_residual_block": "residual_2"}.get(block, where[0])
        kind, _, tail = place.partition("_")
        more = f"mid_more_{kind}s" + (f"_{tail}" if tail else "")
        return f"{more}/{part_name(i - 1)}" if i else f"mid_{place}"
    stage, unit, kind, *_ = where
    unit_path = f"{way}/{part_name(int(stage))}/{part_name(int(unit))}"
    return f"{unit_path}/more_{kind}s/{part_name(i - 1)}" if i else f"{unit_path}/{kind}"


def _of_sd_unet(config: SDUNetConfig, block: str, action: Action) -> tuple[SDUNetConfig, Moved]:
    way, *numbers = block.split("_")
    *where, position = map(int, numbers)
    layer = config.mid if way == "mid" else getattr(config, way)[where[0]][where[1]]
    old = [*range(len(layer))]  # which of the old blocks each of the new ones is
    new = [*old[: position + 1], *old[position:]] if action == "copy" else [*old[:position], *old[position + 1 :]]
    blocks = "".join(layer[i] for i in new)
    prefix = "/".join([way, *map(part_name, where)])
    moved = tuple((f"{prefix}/{part_name(i)}", f"{prefix}/{part_name(j)}") for i, j in enumerate(new) if i != j)
    if way == "mid":
        return dataclasses.replace(config, mid=blocks), moved
    stage, number = where
    stages = [list(layers) for layers in getattr(config, way)]
    stages[stage][number] = blocks
    return dataclasses.replace(config, **{way: tuple(map(tuple, stages))}), moved


def block_path(config: Evolving, block: str) -> str:
    """Where a block of `config.droppable_blocks()` is among the parameters."""
    if isinstance(config, UNetConfig):
        place, _, i = block.partition(".")
        return unet_path(place, int(i or 0))
    way, *numbers = block.split("_")
    return "/".join([way, *(part_name(int(number)) for number in numbers)])


def kind(config: Evolving, block: str) -> str:
    """What blocks of equal cost have in common: the place of a UNet's block; way, stage and letter of the other's."""
    if isinstance(config, UNetConfig):
        return block.partition(".")[0]
    way, *numbers = block.split("_")
    *where, position = map(int, numbers)
    layer = config.mid if way == "mid" else getattr(config, way)[where[0]][where[1]]
    return "_".join([way, *map(str, where[:1]), layer[position]])


def kinds(config: Evolving) -> tuple[str, ...]:
    """The kinds of a network's blocks, in the order in which they run."""
    return tuple(dict.fromkeys(kind(config, block) for block in config.droppable_blocks()))


def candidates(config: Evolving) -> tuple[str, ...]:
    """The blocks that one action may take out or repeat: of a UNet's that stand in one place the last."""
    if isinstance(config, UNetConfig):
        return tuple({kind(config, block): block for block in config.droppable_blocks()}.values())
    return config.droppable_blocks()


def renamed(config: Evolving, moved: Moved, block: str, before: Evolving) -> str:
    """What a block is called after a change that did not take it out.

    Args:
        config, moved: of `changed`.
        block: its name before.
        before: the config before.
    """
    path, names = block_path(before, block), {block_path(config, name): name for name in config.droppable_blocks()}
    if path in names and path not in dict(moved):
        return block
    return next(names[new] for new, old in moved if old == path)


def composed(first: Iterable[Sequence[str]], then: Iterable[Sequence[str]]) -> Moved:
    """Where blocks come from after two changes: `then` is of what `first` left."""
    before, after = _sources(first), _sources(then)
    found = {**before, **{path: before.get(source, source) for path, source in after.items()}}
    return tuple((path, source) for path, source in sorted(found.items()) if path != source)


def _sources(moved: Iterable[Sequence[str]]) -> dict[str, str]:
    return {path: source for path, source in moved}  # noqa: C416  # of lists too, as JSON has them


def moved_weights(spec: Tree, old: Tree, moved: Iterable[Sequence[str]]) -> Tree:
    """The parameters of a changed network from those of the one before.

    Args:
        spec: nested dict of `ShapeDtypeStruct`, of the changed network.
        old: nested dict of arrays, of the one before. What the changed network has not is left behind.
        moved: of `changed` or `composed`.

    Returns:
        A tree of the paths of `spec`, without those that `old` holds nothing for.
    """
    sources = _sources(moved)
    held, found = {"/".join(path): leaf for path, leaf in flatten(old).items()}, {}
    for path in flatten(spec):
        name = "/".join(path)
        for i in range(len(path), 0, -1):
            if (prefix := "/".join(path[:i])) in sources:
                name = sources[prefix] + name[len(prefix) :]
                break
        if name in held:
            found[path] = held[name]
    return unflatten(found)
