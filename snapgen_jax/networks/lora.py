"""Low-rank adapters: a frozen weight W becomes W + s B A (Hu et al. 2021, "LoRA", section 4.1).

Adapters are a tree `{role: {... "kernel": {"lora_A": array, "lora_B": array}}}` beside the weights `{role: tree}`, and
are merged into them: the network that is applied is the same, and knows nothing of adapters. Both matrices lie as peft
stores them, r being the rank:

    weight        ours                 lora_A             lora_B
    linear        [in, out]            [r, in]            [out, r]
    stack of L    [L, in, out]         [L, r, in]         [L, out, r]
    convolution   [h, w, in, out]      [r, in, h, w]      [out, r, 1, 1]
    embedding     [V, D]               [r, V]             [D, r]
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from snapgen_jax.bounds import above, at_least, check, check_texts
from snapgen_jax.networks.module import flatten, unflatten

Tree = Any
Path = tuple[str, ...]
Kind = Literal["linear", "stack", "conv", "embedding"]
A, B = "lora_A", "lora_B"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights are adapted, and how.

    Attributes:
        rank: r of every adapter.
        alpha: the scale s is alpha / rank, as peft has it.
        targets: regular expressions, searched in "role/path/of/module", such as "unet/mid/attention/query" or
            "text/token_embedding". What any of them finds is adapted, if it is linear, a convolution or an embedding.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = (r"attention/(query|key|value|out|back)$",)

    def __post_init__(self) -> None:
        check(self, rank=at_least(1), alpha=above(0))
        check_texts(self, "targets")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"targets: {pattern!r} is no regular expression: {error}") from error

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / self.rank


def kind_of(path: Path, shape: tuple[int, ...]) -> Kind | None:
    """What a parameter is to an adapter; None for one that none fits: a norm, a bias, a depthwise convolution."""
    if path[-1] != "kernel":
        return "embedding" if path[-1].endswith("embedding") and len(shape) == 2 else None
    if len(shape) == 4:
        return "conv" if shape[2] > 1 else None
    return {2: "linear", 3: "stack"}.get(len(shape))  # type: ignore[return-value]


def module_of(path: Path) -> Path:
    """The module that holds a parameter."""
    return path[:-1] if path[-1] == "kernel" else path


def adapted(config: LoraConfig, spec: Mapping[str, Tree]) -> dict[str, dict[Path, tuple[int, ...]]]:
    """`{role: {path of a weight: its shape}}` of all that is adapted.

    Args:
        config: says which.
        spec: `{role: tree of shapes}`, the networks.

    Raises:
        ValueError: a target finds nothing; names some of what there is.
    """
    fitting = {
        (role, path): leaf.shape
        for role, tree in spec.items()
        for path, leaf in flatten(tree).items()
        if kind_of(path, leaf.shape)
    }
    names = {key: "/".join((key[0], *module_of(key[1]))) for key in fitting}
    found: dict[str, dict[Path, tuple[int, ...]]] = {}
    for pattern in config.targets:
        hits = [key for key, name in names.items() if re.search(pattern, name)]
        if not hits:
            some = ", ".join(sorted({re.sub(r"block_\d+", "block_00", name) for name in names.values()})[:12])
            raise ValueError(f"targets: {pattern!r} finds no weight that can be adapted; there are {some} ...")
        for role, path in hits:
            found.setdefault(role, {})[path] = fitting[role, path]
    return found


def init_adapters(config: LoraConfig, spec: Mapping[str, Tree], key: jax.Array) -> Tree:
    """Adapters that change nothing yet, float32: A as `torch.nn.Linear` draws a weight and B zero; of an embedding A
    zero and B normal. Number i is drawn from `fold_in(key, i)`."""
    weights = [(role, path, shape) for role, paths in adapted(config, spec).items() for path, shape in paths.items()]
    roles: dict[str, dict[Path, jax.Array]] = {}
    for i, (role, path, shape) in enumerate(sorted(weights)):
        for name, matrix in zip((A, B), _first(path, shape, config.rank, jax.random.fold_in(key, i)), strict=True):
            roles.setdefault(role, {})[*path, name] = matrix
    return {role: unflatten(flat) for role, flat in roles.items()}


def _first(path: Path, shape: tuple[int, ...], rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = adapter_shapes(path, shape, rank)
    if kind_of(path, shape) == "embedding":
        return jnp.zeros(a), jax.random.normal(key, b)
    bound = 1 / math.sqrt(math.prod(shape[:-1]) if len(shape) == 4 else shape[-2])  # of the inputs of one output
    return jax.random.uniform(key, a, minval=-bound, maxval=bound), jnp.zeros(b)


def adapter_shapes(path: Path, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `lora_A` and `lora_B` of a weight; see the table at the top of this file."""
    match kind_of(path, shape):
        case "conv":
            height, width, inputs, outputs = shape
            return (rank, inputs, height, width), (outputs, rank, 1, 1)
        case "stack":
            return (shape[0], rank, shape[1]), (shape[0], shape[2], rank)
        case "linear" | "embedding":
            return (rank, shape[0]), (shape[1], rank)
        case _:
            raise ValueError(f"{'/'.join(path)} of the shape {list(shape)} cannot be adapted")


def change(path: Path, shape: tuple[int, ...], a: jax.Array, b: jax.Array) -> jax.Array:
    """B A in the shape of the weight, float32."""
    match kind_of(path, shape):
        case "conv":
            return jnp.einsum("rihw,or->hwio", a, b[:, :, 0, 0], precision="highest")
        case "stack":
            return jnp.einsum("lri,lor->lio", a, b, precision="highest")
        case _:
            return jnp.einsum("ri,or->io", a, b, precision="highest")


def merge(weights: Mapping[str, Tree], adapters: Mapping[str, Tree], scale: float) -> dict[str, Tree]:
    """The weights `{role: tree}` with adapters merged. An adapted weight is float32 whatever it was: in bfloat16 the
    first changes would be rounded away. Roles and weights without an adapter are as they were.

    Raises:
        ValueError: an adapter is of a role or a weight that is not there, of another shape, or the weight is in eight
            bits.
    """
    merged = dict(weights)
    for role, tree in adapters.items():
        if role not in weights:
            raise ValueError(f"there are adapters of {role!r}, and the networks are {', '.join(weights)}")
        flat, small = flatten(weights[role]), flatten(tree)
        for path in {path[:-1] for path in small}:
            a, b = small[*path, A], small[*path, B]
            if path not in flat:
                raise ValueError(f"there is an adapter of {role}/{'/'.join(path)}, which the network does not have")
            w = flat[path]
            if w.dtype.itemsize == 1:
                raise ValueError(
                    f"{role}/{'/'.join(path)} is in eight bits, to which no adapter can be added; merge it into the "
                    "weights as they were trained, and round them after"
                )
            expected = adapter_shapes(path, w.shape, a.shape[1 if kind_of(path, w.shape) == "stack" else 0])
            if (a.shape, b.shape) != expected:
                raise ValueError(
                    f"the adapter of {role}/{'/'.join(path)} has the shapes {a.shape} and {b.shape}; a weight of "
                    f"{w.shape} takes {expected[0]} and {expected[1]}"
                )
            flat[path] = w.astype(jnp.float32) + scale * change(path, w.shape, a, b)
        merged[role] = unflatten(flat)
    return merged
