"""Parameters and multiply-adds of networks, from abstract shapes: no parameter is drawn and nothing is compiled.

`snapgen count --all` counts every preset of every network in `networks/registry.py`. The ladder is the ablation of
SnapGen (arXiv 2412.09619, section 3.1): eight networks, each one design step from the one before.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from snapgen_jax.networks.attention_table import KERNELS
from snapgen_jax.networks.module import sketch
from snapgen_jax.networks.registry import CONFIGS
from snapgen_jax.networks.unet import UNetConfig

PIXELS_PER_LATENT = 8  # side, of the autoencoder that SnapGen works on
Macs = collections.Counter[str]  # multiply-adds by dtype


# --- counting --------------------------------------------------------------------------------------------------------


def size(config: Any, *inputs: Sequence[Any]) -> tuple[int, ...]:
    """Number of parameters of the network of a config, and multiply-adds of one call on each of several `inputs`.

    Attention counts as its two products, whichever kernel the config names.

    Args:
        inputs: `ShapeDtypeStruct`s of the network's positional arguments, such as `config.input_spec()`.
    """
    found: list[int] = []
    if getattr(config, "attention", "") in KERNELS:
        config = dataclasses.replace(config, attention="whole")

    def calls(*inputs: Sequence[Any]) -> list[Any]:
        network, count = sketch(config)
        found.append(count)
        return [network(*args) for args in inputs]

    jaxpr, outputs = jax.make_jaxpr(calls, return_shape=True)(*inputs)
    leaves = iter(jaxpr.jaxpr.outvars)
    return *found, *(_macs(jaxpr.jaxpr, [next(leaves) for _ in jax.tree.leaves(output)]).total() for output in outputs)


def parameters(config: Any) -> int:
    """Number of parameters of the network of a config."""
    return size(config)[0]


def macs(config: Any, inputs: Sequence[Any]) -> int:
    """Multiply-adds of one call of the network of a config on inputs of the given shapes (`ShapeDtypeStruct`s)."""
    return size(config, inputs)[1]


def count_macs(function: Callable, *args: Any) -> int:
    """Multiply-adds of the matrix products and convolutions in a function of arrays or `ShapeDtypeStruct`s.

    Loops are counted as often as they run, and what no output needs is not counted. The shifted form of the depthwise
    convolution counts as the convolution that it is. Elementwise work is not counted, and of a branch only the dearer
    side is.

    Raises:
        ValueError: there is a product inside a loop whose number of turns is not known, or a kernel, which hides its
            products.
    """
    return count_macs_by_dtype(function, *args).total()


def count_macs_by_dtype(function: Callable, *args: Any) -> Macs:
    """As `count_macs`, by the dtype of what is multiplied: `{"int8": ..., "bfloat16": ...}`."""
    return _all_macs(jax.make_jaxpr(function)(*args).jaxpr)


@functools.lru_cache(maxsize=256)  # equal blocks share a jaxpr
def _all_macs(jaxpr: Jaxpr) -> Macs:
    return _macs(jaxpr, jaxpr.outvars)


def _macs(jaxpr: Jaxpr, outputs: Sequence[Any]) -> Macs:
    needed, total = {v for v in outputs if isinstance(v, Var)}, Macs()
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed |= {v for v in equation.invars if isinstance(v, Var)}
            total += _equation_macs(equation)
    return total


def _equation_macs(equation: Any) -> Macs:
    name, params, size = equation.primitive.name, equation.params, sum(v.aval.size for v in equation.outvars)

    def of_operands(macs: int) -> Macs:
        return Macs({str(max((v.aval.dtype for v in equation.invars[:2]), key=lambda dtype: dtype.itemsize)): macs})

    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return of_operands(size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted))
    if name == "conv_general_dilated":
        _, inputs, *window = params["dimension_numbers"].rhs_spec
        kernel = equation.invars[1].aval.shape
        return of_operands(size * kernel[inputs] * math.prod(kernel[axis] for axis in window))
    if name == "jit" and params["name"] == "depthwise_shifted":
        return of_operands(size * 9)
    if name == "pallas_call" or name.startswith("dot_product_attention"):
        raise ValueError(f'multiply-adds inside a kernel ({name}) cannot be counted; count with attention="whole"')
    bodies = [_all_macs(jaxpr) for jaxpr in _subjaxprs(params)]
    if name == "cond":
        return max(bodies, key=Macs.total)
    total = sum(bodies, Macs())
    if name == "scan":
        return Macs({dtype: params["length"] * macs for dtype, macs in total.items()})
    if name == "while" and any(bodies):
        raise ValueError("multiply-adds inside a while loop cannot be counted; use lax.scan or a fixed number of turns")
    return total


def _subjaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _image(config: UNetConfig, pixels: int) -> Sequence[Any]:
    """Inputs of a UNet for a square image of that many pixels a side, with 77 text tokens."""
    side = pixels // PIXELS_PER_LATENT
    return config.input_spec(height=side, width=side)


# --- every network ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Count:
    """Size of one preset: exact parameters, and multiply-adds of one call on `inputs`, its `input_spec`."""

    network: str
    preset: str
    parameters: int
    macs: int
    inputs: str


def all_counts() -> list[Count]:
    """Every preset of every network."""
    counts = []
    for config_class in CONFIGS:
        for preset in config_class.PRESETS:
            config: Any = config_class.preset(preset)
            inputs = config.input_spec()
            shapes = " ".join("x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(inputs))
            parameters, macs = size(config, inputs)
            counts.append(Count(config.kind, preset, parameters, macs, shapes))
    return counts


def all_counts_table() -> str:
    """`all_counts` as a Markdown table."""
    rows = [(c.network, c.preset, f"{c.parameters:,}", f"{c.macs:,}", c.inputs) for c in all_counts()]
    return _table(("network", "preset", "parameters", "multiply-adds", "for inputs"), rows, right=(2, 3))


# --- the ladder ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One design step, and the published change of parameters and multiply-adds, in percent of step `against`."""

    name: str
    change: str
    against: str | None = None
    parameters: float | None = None
    macs: float | None = None


STEPS = (
    Step("A", "a thin and short SDXL UNet"),
    Step("B", "self-attention at the lowest resolution only", "A", macs=-17),
    Step("C1", "separable convolutions", "B", parameters=-24),
    Step("C2", "expanded twofold in the middle", "B", parameters=-15, macs=-27),
    Step("D", "feed-forward ratio 4 -> 3", "C2", parameters=-12, macs=-12),
    Step("E", "multi-query attention", "D", parameters=-16, macs=-6),
    Step("F", "conditioning from the first stage on", "E"),
    Step("G", "QK-RMSNorm and 2-D RoPE", "F"),
)


def ladder(final: UNetConfig | None = None) -> dict[str, UNetConfig]:
    """The networks of the design steps, `{"A": ..., ..., "G": final}`, by undoing one step after another.

    `final` is the network they lead to, the `imagenet` preset where none is given.
    """
    g = final or UNetConfig.preset("imagenet")
    f = dataclasses.replace(g, qk_norm=False, rope=False)
    e = dataclasses.replace(f, first_stage="res")
    d = dataclasses.replace(e, kv_heads=None)
    c2 = dataclasses.replace(d, ffn_ratio=4)
    c1 = dataclasses.replace(c2, expand_ratio=1, expand_base="out")
    b = dataclasses.replace(c1, convolution="ordinary", sampler="conv")
    a = dataclasses.replace(b, self_attention=(True,) * len(g.channels))
    return {"A": a, "B": b, "C1": c1, "C2": c2, "D": d, "E": e, "F": f, "G": g}


@dataclasses.dataclass(frozen=True)
class LadderRow:
    """Size of the network of one step, and its change in percent of the network of `step.against`."""

    step: Step
    parameters: int
    macs_256: int
    macs_1024: int
    parameters_change: float | None
    macs_256_change: float | None
    macs_1024_change: float | None


def ladder_rows(final: UNetConfig | None = None) -> list[LadderRow]:
    """The ladder, counted. Published compute was measured at 1024 pixels, and `macs_1024_change` stands beside it."""
    sizes = {name: size(config, _image(config, 256), _image(config, 1024)) for name, config in ladder(final).items()}

    def changes(step: Step) -> tuple[float | None, ...]:
        if step.against is None:
            return None, None, None
        return tuple(100 * (new / old - 1) for new, old in zip(sizes[step.name], sizes[step.against], strict=True))

    return [LadderRow(step, *sizes[step.name], *changes(step)) for step in STEPS]


def ladder_table(final: UNetConfig | None = None) -> str:
    """`ladder_rows` as a Markdown table: each change in percent, and the published one where there is one."""
    header = (
        "",
        "step",
        "M params",
        "change",
        "paper",
        "GMAC 256",
        "change",
        "GMAC 1024",
        "change",
        "paper",
        "against",
    )
    rows = [
        (
            row.step.name,
            row.step.change,
            f"{row.parameters / 1e6:.2f}",
            _percent(row.parameters_change),
            _percent(row.step.parameters, 0),
            f"{row.macs_256 / 1e9:.2f}",
            _percent(row.macs_256_change),
            f"{row.macs_1024 / 1e9:.1f}",
            _percent(row.macs_1024_change),
            _percent(row.step.macs, 0),
            row.step.against or "",
        )
        for row in ladder_rows(final)
    ]
    return _table(header, rows, right=range(2, 10))


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:+.{digits}f}%"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = [("-" * (w - 1) + ":") if i in right else "-" * w for i, w in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), line(rule), *map(line, rows)])
