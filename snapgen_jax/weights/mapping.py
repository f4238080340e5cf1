"""Which tensors of a published checkpoint make which of our parameters, as plain data.

A `WeightMap` is a list of rules; a rule names one of our parameters (its path as "blocks/attention/query/kernel"), the
tensors it is made of, and how the axes of each are permuted. A tensor may be cut into equal parts, each a parameter.
Because nothing else is done to a tensor, any slice of one of our arrays is made of slices of theirs, so that a host can
read just the part that its devices hold.

    WeightMap((
        one("embedding/embedding", "embed_tokens.weight"),
        stack("blocks/query/kernel", "layers.{}.self_attn.q_proj.weight", range(26), "linear"),
        stack("blocks/norm/scale", "layers.{}.input_layernorm.weight", range(26)),
        *fused(("query/kernel", "key/kernel", "value/kernel"), "attn.qkv.weight", "linear"),
    ))
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from snapgen_jax.networks.module import flatten

Tree = Any
Shape = tuple[int, ...]
Transform = Literal["copy", "linear", "conv", "conv3d"]

# Position k of our array's axes is position PERMUTATIONS[transform][k] of the reference tensor's axes.
PERMUTATIONS: dict[str, tuple[int, ...] | None] = {
    "copy": None,  # the same axes
    "linear": (1, 0),  # [out, in] -> [in, out]
    "conv": (2, 3, 1, 0),  # [out, in, h, w] -> [h, w, in, out]
    "conv3d": (2, 3, 4, 1, 0),  # [out, in, f, h, w] -> [f, h, w, in, out]
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensors it is made of.

    Attributes:
        path: our parameter, its keys joined by "/".
        names: reference tensors. One, unless `stack`.
        transform: permutation of the axes of each tensor.
        stack: the tensors, in order, are the items of a new leading axis (blocks that run under one scan).
        part: (index, number) of the equal parts into which the first axis of each tensor is cut; the rule takes one.
    """

    path: str
    names: tuple[str, ...]
    transform: Transform = "copy"
    stack: bool = False
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not self.names or (len(self.names) > 1 and not self.stack):
            raise ValueError(f"{self.path}: a rule takes one tensor, or with stack=True one or more; got {self.names}")
        if not 0 <= self.part[0] < self.part[1]:
            raise ValueError(f"{self.path}: there is no part {self.part[0]} of {self.part[1]}; count from 0")


def one(path: str, name: str, transform: Transform = "copy") -> Rule:
    """The parameter at `path` is the tensor `name`."""
    return Rule(path, (name,), transform)


def stack(path: str, pattern: str, layers: Iterable[int], transform: Transform = "copy") -> Rule:
    """The parameter at `path` stacks the tensors that `pattern` names with each layer number in place of its `{}`."""
    return Rule(path, tuple(pattern.format(layer) for layer in layers), transform, stack=True)


def fused(paths: Sequence[str], name: str, transform: Transform = "copy") -> tuple[Rule, ...]:
    """The parameters at `paths` are, in order, equal parts of the first axis of the tensor `name`: queries, keys and
    values that a published layout holds in one."""
    return tuple(Rule(path, (name,), transform, part=(i, len(paths))) for i, path in enumerate(paths))


def linear(path: str, name: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of an `nnx.Linear` at `path` from a torch linear called `name`."""
    rules = (one(f"{path}/kernel", f"{name}.weight", "linear"),)
    return (*rules, one(f"{path}/bias", f"{name}.bias")) if bias else rules


def conv(path: str, name: str) -> tuple[Rule, ...]:
    """The rules of an `nnx.Conv` with bias at `path` from a torch convolution called `name`."""
    return one(f"{path}/kernel", f"{name}.weight", "conv"), one(f"{path}/bias", f"{name}.bias")


def conv3d(path: str, name: str) -> tuple[Rule, ...]:
    """The rules of a `svd_blocks.TemporalConv` at `path` from a torch convolution over frames called `name`."""
    return one(f"{path}/kernel", f"{name}.weight", "conv3d"), one(f"{path}/bias", f"{name}.bias")


def norm(path: str, name: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """The rules of a layer norm or group norm at `path` (with `bias=False` of an RMS norm) from a torch one."""
    rules = (one(f"{path}/scale", f"{name}.weight"),)
    return (*rules, one(f"{path}/bias", f"{name}.bias")) if bias else rules


def stacked(rules: Iterable[Rule], layers: Iterable[int]) -> tuple[Rule, ...]:
    """Rules of one block, whose tensor names hold `{}` for the layer number -> rules of the stack of all blocks."""
    layers = tuple(layers)
    return tuple(
        dataclasses.replace(rule, names=tuple(rule.names[0].format(layer) for layer in layers), stack=True)
        for rule in rules
    )


def at(prefix: str, rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a part -> the rules of a whole that holds the part at path `prefix`. Tensor names stay."""
    return tuple(dataclasses.replace(rule, path=f"{prefix}/{rule.path}") for rule in rules)


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """All rules of a network, and what else its published files may hold.

    Attributes:
        rules: one for each of our parameters.
        aliases: `(alias, name)`: tied tensors. A file may hold the tensor as `name`, as `alias`, or as both.
        ignored: regular expressions of tensors that files may hold and this network does not have (the vision half of a
            CLIP checkpoint). Matched against the full name. Every other tensor must be consumed.
        prefixes: beginnings that a file may put before every name ("model." where the whole language model was saved).
    """

    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        parts = collections.defaultdict(list)
        for rule in self.rules:
            for name in rule.names:
                parts[name].append(rule.part)
        paths = collections.Counter(rule.path for rule in self.rules)
        whole = [name for name, taken in parts.items() if len(taken) > 1 and (0, 1) in taken]
        for what, twice in (("parameter", [path for path, count in paths.items() if count > 1]), ("tensor", whole)):
            if twice:
                raise ValueError(f"a {what} may stand in one rule only; in several: {', '.join(twice)}")
        for name, taken in parts.items():
            number = taken[0][1]
            if sorted(taken) != [(i, number) for i in range(number)]:
                listed = ", ".join(f"{index} of {of}" for index, of in sorted(taken))
                raise ValueError(
                    f"each part of a tensor must stand in one rule; of {name} there are the parts {listed}"
                )

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor may stand in a file without being consumed."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def reference_shape(rule: Rule, shape: Shape) -> Shape:
    """Shape of our parameter -> shape of each tensor it is made of.

    Raises:
        ValueError: the rule cannot make an array of this shape (another rank, or another number of stacked tensors).
    """
    if rule.stack and (not shape or shape[0] != len(rule.names)):
        raise ValueError(f"{rule.path} has shape {shape}, but its rule stacks {len(rule.names)} tensors")
    inner = shape[1:] if rule.stack else shape
    permutation = PERMUTATIONS[rule.transform] or tuple(range(len(inner)))
    if len(permutation) != len(inner):
        raise ValueError(
            f"{rule.path} has shape {shape}, but {rule.transform!r} makes arrays of rank {len(permutation)}"
        )
    of_part = tuple(inner[permutation.index(axis)] for axis in range(len(inner)))
    if rule.part[1] == 1:
        return of_part
    if not of_part:
        raise ValueError(f"{rule.path} is a scalar, which is no part of a tensor")
    return (rule.part[1] * of_part[0], *of_part[1:])


def reference_shapes(weight_map: WeightMap, spec: Tree) -> dict[str, Shape]:
    """The checkpoint that a network expects: {tensor name: shape}, in the order of the rules.

    Args:
        spec: nested dict of arrays or `ShapeDtypeStruct`, as `networks.module.build` gives it.

    Raises:
        ValueError: names every parameter without a rule, every rule without a parameter, and every rule that does not
            fit its parameter's shape.
    """
    shapes = {"/".join(path): tuple(leaf.shape) for path, leaf in flatten(spec).items()}
    paths = {rule.path for rule in weight_map.rules}
    problems = [f"parameter without a rule: {path}" for path in shapes if path not in paths]
    problems += [f"rule without a parameter: {rule.path}" for rule in weight_map.rules if rule.path not in shapes]
    expected: dict[str, Shape] = {}
    for rule in weight_map.rules:
        if rule.path in shapes:
            try:
                shape = reference_shape(rule, shapes[rule.path])
            except ValueError as error:
                problems.append(str(error))
                continue
            problems += [
                f"{rule.path} is one of {rule.part[1]} equal parts of {name}, but its shape differs from another's"
                for name in rule.names
                if expected.setdefault(name, shape) != shape
            ]
    if problems:
        raise ValueError("the weight map does not fit the network:\n  " + "\n  ".join(problems))
    return expected


def count_reference(weight_map: WeightMap, spec: Tree) -> int:
    """Number of scalars in the checkpoint that a network expects, tied tensors once."""
    return sum(math.prod(shape) for shape in reference_shapes(weight_map, spec).values())


def to_reference(weight_map: WeightMap, params: Tree) -> dict[str, np.ndarray]:
    """The checkpoint that parameters make, `{tensor name: array}`: what `loader.load` reads back as they were.

    Raises:
        ValueError: the map does not fit the parameters.
    """
    reference_shapes(weight_map, params)
    flat = {"/".join(path): leaf for path, leaf in flatten(params).items()}
    tensors: dict[str, list[np.ndarray]] = {}
    for rule in sorted(weight_map.rules, key=lambda rule: rule.part):
        array = np.asarray(flat[rule.path])
        for name, item in zip(rule.names, array if rule.stack else [array], strict=True):
            permutation = PERMUTATIONS[rule.transform]
            part = item if permutation is None else item.transpose(np.argsort(permutation))
            tensors.setdefault(name, []).append(part)
    return {name: parts[0] if len(parts) == 1 else np.concatenate(parts) for name, parts in tensors.items()}
