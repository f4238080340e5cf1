"""The fence around nnx: the only file that splits or merges a module.

Outside this file parameters are a plain nested dict with string keys; the items of a list are named `block_00`,
`block_01` ... A network is *built* once from its config (shapes only), *initialised* from a key, and *applied* to such
a dict. Inside a jitted step only arrays and hashable descriptions travel, which costs less per call than any nnx
container (see the design notes in the README).

    network, spec = build(UNetConfig.preset("shapes"))   # hashable description, tree of ShapeDtypeStruct
    params = init(network, jax.random.key(0))            # nested dict of arrays, pure and shape-evaluable
    v, taps = apply(network, params, x_t, time, context)
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks import attention_table
from snapgen_jax.networks.eight_bits import SCALE
from snapgen_jax.networks.taps import NO_TAPS, Taps

Tree = Any
Platform = Literal["cpu", "gpu", "tpu"]
Path = tuple[str, ...]
Rules = Sequence[tuple[str, PartitionSpec]]


class NetworkConfig(Protocol):
    """A frozen dataclass that describes a network: all that the rest of the package needs to know about it."""

    @property
    def kind(self) -> str:
        """Tells the configs of a union apart: a field `kind: Literal["unet"] = "unet"`, the first of the dataclass."""
        ...

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the module with freshly drawn parameters."""
        ...

    def rules(self) -> Rules:
        """Where the parameters lie on a mesh: `(pattern of the path, PartitionSpec)`; the first match wins."""
        ...

    def input_spec(self, batch: int = 1) -> tuple[Any, ...]:
        """`ShapeDtypeStruct`s of the module's positional arguments; further arguments set sizes, each with a default.

        A denoiser's is `input_spec(batch, height, width, tokens)`: latent, time features and `TextContext`.
        """
        ...

    def tap_names(self) -> tuple[str, ...]:
        """Names of the intermediates that the module returns and replaces (see `networks/taps.py`)."""
        ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A built network: its config and the static part of its module. Hashable, holds no array."""

    config: Any
    graphdef: nnx.GraphDef
    paths: tuple[Path, ...]  # in the order in which the graphdef expects its leaves


class ParameterMismatchError(ValueError):
    """The parameter tree given to a network is not the tree that the network has."""


ConfigT = TypeVar("ConfigT")


def for_platform(config: ConfigT, platform: Platform) -> ConfigT:
    """Fixes the platform choices of a config, and of the configs inside it.

    `dtype` becomes bfloat16 on TPU and GPU and float32 on CPU; `depthwise` becomes the form that is fastest there (nine
    shifted multiply-adds on CPU, where XLA's grouped convolution is about a hundred times slower; the grouped
    convolution elsewhere, on GPU with its own rule for the gradient); `attention` becomes the kernel that
    `attention_table` chooses there, also if it names one that does not run; `separable_block` becomes "composed" where
    there is no kernel. Other fields whose value is not "auto" are left alone, and a config without such fields is
    returned unchanged.
    """
    if not dataclasses.is_dataclass(config):
        return config
    choice = {
        "dtype": attention_table.AUTO_DTYPE[platform],
        "depthwise": {"cpu": "shifted", "gpu": "flipped", "tpu": "grouped"}[platform],
    }
    changes = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == "auto" and field.name in choice:
            changes[field.name] = choice[field.name]
        elif field.name == "separable_block" and platform != "tpu":
            changes[field.name] = "composed"
        elif dataclasses.is_dataclass(value):
            changes[field.name] = for_platform(value, platform)
        elif field.name == "attention":
            dtype = getattr(config, "dtype", "auto")
            dtype = choice["dtype"] if dtype == "auto" else dtype
            changes[field.name] = attention_table.fixed(value, platform, dtype)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def compute_dtype(config: Any) -> jnp.dtype:
    """The dtype in which a network computes: `config.dtype`, where "auto" reads as float32."""
    return jnp.dtype("float32" if config.dtype == "auto" else config.dtype)


def part_name(part: Any) -> str:
    """A part of a path in nnx, a name or an index, as our trees name it."""
    return f"block_{part:02d}" if isinstance(part, int) else part


def unflatten(flat: Mapping[Path, Any]) -> Tree:
    """{path: leaf} -> nested dict. The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def flatten(tree: Tree, prefix: Path = ()) -> dict[Path, Any]:
    """Nested dict -> {path: leaf}, in the dict's own order. The inverse is `unflatten`."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {path: leaf for key, node in tree.items() for path, leaf in flatten(node, (*prefix, key)).items()}


def _named_leaves(module: nnx.Module) -> tuple[nnx.GraphDef, dict[Path, Any]]:
    graphdef, state = nnx.split(module)
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.Param):
            raise TypeError(
                f"{'/'.join(map(part_name, path))} is a {type(variable).__name__}; a network may hold nnx.Param only"
            )
        flat[tuple(map(part_name, path))] = variable.get_value()
    return graphdef, flat


class _Keys:
    """The keys of `nnx.Rngs(key).params()`, counted in Python: `nnx.Rngs` counts in a traced variable, and building a
    network of a thousand parameters took five times as long for it."""

    def __init__(self, key: jax.Array):
        self.key, self.count = key, 0

    def params(self) -> jax.Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


class _NoKeys(_Keys):
    """For a trace of which the shapes alone are read: with it `draw` draws nothing, which takes a third of the time."""

    def __init__(self, key: jax.Array):
        super().__init__(key)
        self.zeros = functools.cache(lambda shape: jnp.zeros(shape, jnp.float32))


def draw(rngs: nnx.Rngs, initializer: Callable[..., jax.Array], shape: tuple[int, ...]) -> nnx.Param:
    """A float32 parameter of that shape, drawn by an initializer of `nnx.initializers` from the next key of `rngs`."""
    if isinstance(rngs, _NoKeys):
        return nnx.Param(rngs.zeros(shape))
    return nnx.Param(initializer(rngs.params(), shape, jnp.float32))


def rngs_of(key: jax.Array, like: nnx.Rngs) -> nnx.Rngs:
    """Keys from `key` for a part of a network; none are drawn where `like`, those of the whole, draws none."""
    return cast(nnx.Rngs, _NoKeys(key) if isinstance(like, _NoKeys) else _Keys(key))


@functools.lru_cache(maxsize=256)
def build(config: NetworkConfig) -> tuple[Network, Tree]:
    """Builds a network from its config without drawing a parameter.

    Returns:
        network: hashable description, the first argument of `init` and `apply`.
        spec: nested dict of `jax.ShapeDtypeStruct`, the tree that `apply` expects.
    """
    graphdef, flat = _named_leaves(nnx.eval_shape(lambda: config.module(cast(nnx.Rngs, _NoKeys(jax.random.key(0))))))
    return Network(config, graphdef, tuple(flat)), unflatten(flat)


def init(network: Network, key: jax.Array) -> Tree:
    """Draws the parameters of a network from a key. Pure: jit it, vmap it or `eval_shape` it."""
    _, flat = _named_leaves(network.config.module(cast(nnx.Rngs, _Keys(key))))
    return unflatten(flat)


def stand_in(network: Network, seed: int) -> Tree:
    """Parameters that stand for trained ones: matrices and filters are even noise whose outputs keep the variance of
    their inputs, all else is as it is initialised. A program of elementwise operations alone, which compiles in a
    hundredth of the time of `init`."""
    _, flat = _named_leaves(network.config.module(cast(nnx.Rngs, _NoKeys(jax.random.key(0)))))
    return unflatten(
        {path: leaf + _even_noise(leaf.shape, seed + 7919 * i) for i, (path, leaf) in enumerate(flat.items())}
    )


def _even_noise(shape: tuple[int, ...], seed: int) -> jax.Array:
    """float32 from -sqrt(3 / fan_in) to sqrt(3 / fan_in): the finalizer of MurmurHash3 of each element's number; zeros
    for a vector."""
    if len(shape) < 2:
        return jnp.zeros(shape)
    mixed = jnp.uint32(seed * 2_654_435_761 % 2**32)
    for axis in range(len(shape)):
        mixed = mixed * jnp.uint32(shape[axis] + 1) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    fan_in = math.prod(shape[-4:-1]) if len(shape) >= 4 else shape[-2]
    return (mixed.astype(jnp.float32) / 2.0**31 - 1) * math.sqrt(3 / fan_in)


def apply(network: Network, params: Tree, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
    """Runs a network on a parameter tree.

    `nnx.merge` matches leaves by order and not by name, so a renamed or permuted tree would be accepted in silence;
    here the paths are compared first.

    Raises:
        ParameterMismatchError: names every missing and every surplus parameter.
    """
    flat = flatten(params)
    if flat.keys() != set(network.paths):
        raise ParameterMismatchError(_difference(network, flat))
    state = nnx.from_flat_state(
        [(_native(path), nnx.Param(flat[path])) for path in network.paths],
    )
    module = nnx.merge(network.graphdef, state)
    return getattr(module, method)(*args, **kwargs)


def _native(path: Path) -> tuple[str | int, ...]:
    return tuple(int(p[6:]) if p.startswith("block_") and p[6:].isdigit() else p for p in path)


def _difference(network: Network, given: Mapping[Path, Any]) -> str:
    expected = {"/".join(path) for path in network.paths}
    names = {"/".join(path) for path in given}
    lines = [f"{type(network.config).__name__}: the parameter tree does not fit the network."]
    for name in sorted(expected - names):
        close = difflib.get_close_matches(name, names - expected, n=1)
        lines.append(f"  missing: {name}" + (f" (given instead: {close[0]}?)" if close else ""))
    lines += [f"  surplus: {name}" for name in sorted(names - expected)]
    return "\n".join(lines)


def frozen_spec(network: Network) -> Tree:
    """Shapes of the parameters of a network that is used and not trained: in the dtype in which it computes. Kernels in
    eight bits and their scales keep their own."""
    _, spec = build(network.config)

    def kept(path: Path, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = path[-1] == SCALE or leaf.dtype != jnp.float32
        return leaf if own else jax.ShapeDtypeStruct(leaf.shape, compute_dtype(network.config))

    return unflatten({path: kept(path, leaf) for path, leaf in flatten(spec).items()})


def narrowed(network: Network, params: Tree) -> Tree:
    """Parameters of a network that is only used: every `kernel` in the dtype in which it computes.

    A layer would cast it to that at every call, so its output is the same, bit for bit, and half the bytes are kept and
    read. All else stays as it is: norms read their gains in float32.
    """
    dtype = compute_dtype(network.config)
    return unflatten(
        {path: leaf.astype(dtype) if path[-1] == "kernel" else leaf for path, leaf in flatten(params).items()}
    )


def take_apart(module: nnx.Module) -> tuple[Callable[[Tree], nnx.Module], Tree]:
    """Splits a module into its parameters, as a pytree for jax transformations, and the function that joins them again.

    For code inside a network that scans or maps over the parameters of a part of itself (see `networks/depth.py`).
    """
    graphdef, state = nnx.split(module)
    return functools.partial(nnx.merge, graphdef), state


class _TracedOnce(nnx.Module):
    """A module, called through `jax.jit`, which traces once what is equal in structure and in shapes."""

    def __init__(self, module: nnx.Module):
        self.graphdef, state = nnx.split(module)
        self.state = nnx.data(state)

    def __call__(self, *args: Any) -> Any:
        # A number of frames is a shape, and a sketch returns and replaces nothing inside.
        fixed = {i: NO_TAPS if isinstance(x, Taps) else x for i, x in enumerate(args) if isinstance(x, int | Taps)}
        return _traced_once(
            self.graphdef, tuple(fixed.items()), self.state, [x for i, x in enumerate(args) if i not in fixed]
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced_once(graphdef: nnx.GraphDef, fixed: tuple[tuple[int, Any], ...], state: Any, args: list[Any]) -> Any:
    for i, value in fixed:
        args.insert(i, value)
    return cast(Callable, nnx.merge(graphdef, state))(*args)


def sketch(config: NetworkConfig) -> tuple[Callable, int]:
    """The module of a config and its number of parameters, for a trace of which the shapes alone are read.

    The parameters are zeros, and the equal blocks of a list are traced once: this is several times as fast as `build`
    and `apply`. Call it inside the trace; the module is called as often as you like.
    """
    module = config.module(cast(nnx.Rngs, _NoKeys(jax.random.key(0))))
    nodes = [node for _, node in nnx.iter_graph(module)]
    for blocks in nodes:
        if isinstance(blocks, nnx.List):
            blocks[:] = [_TracedOnce(b) if isinstance(b, nnx.Module) and callable(b) else b for b in blocks]
    return cast(Callable, module), sum(node.size for node in nodes if isinstance(node, nnx.Param))


def count_parameters(tree: Tree) -> int:
    """Number of scalars in a tree of arrays or `ShapeDtypeStruct`."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))


# --- activation sharding ---------------------------------------------------------------------------------------------

BATCH_AXES = ("data", "fsdp")


def batch_axes() -> tuple[str, ...]:
    """Axes of the current mesh that a batch is split over; none outside a mesh."""
    return tuple(axis for axis in BATCH_AXES if axis in jax.sharding.get_abstract_mesh().axis_names)


def shard(x: jax.Array, kind: Literal["tokens", "image", "vector"] = "tokens") -> jax.Array:
    """Constrains an activation to be split over the batch axes of the current mesh; the identity outside a mesh.

    Args:
        x: `[B, ...]`.
        kind: what it is ("tokens" `[B, L, D]`, "image" `[B, H, W, C]`, "vector" `[B, D]`), so that a later mesh may
            split more than the batch without a change in any network.
    """
    del kind
    if not (axes := batch_axes()):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *([None] * (x.ndim - 1))))


class Preset:
    """Base of the network configs: named presets, and no taps unless a network says which it has.

    Class attributes: `PRESETS` maps a preset's name to field values. `EIGHT_BITS` is a pattern of the paths of the
    linear layers that may compute in eight bits where the network is frozen; "" for none.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    EIGHT_BITS: ClassVar[str] = ""

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The preset called `name`, with fields replaced. An unknown name raises with the list of the known ones."""
        if name not in cls.PRESETS:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; the presets are {', '.join(cls.PRESETS)}")
        return cls(**{**cls.PRESETS[name], **changes})

    def tap_names(self) -> tuple[str, ...]:
        """This network has no named intermediates."""
        return ()
