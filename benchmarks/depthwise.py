"""Times the two forms of the depthwise convolution, forward and backward, all in one run.

    python -m benchmarks.depthwise                     # the sizes of the shapes world and of its larger siblings
    python -m benchmarks.depthwise --shape 64,32,32,32 --rounds 40

The columns are milliseconds, each the smallest of interleaved rounds, because other work on the machine can only add:
the forward pass of the shifted form and of the grouped one; the whole backward pass of the shifted form by its own
rule, and by autodiff of the same sums; and the two ratios that the rule is there for.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import jax

from benchmarks.measuring import fastest, machine
from snapgen_jax.networks.depthwise import depthwise_grouped, depthwise_shifted, shifted_sum

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((64, 32, 32, 32), (64, 16, 16, 64), (32, 16, 16, 128), (32, 8, 8, 128), (32, 4, 4, 256))


def measure(shape: Shape, stride: int = 1, rounds: int = 20, grouped: bool = False) -> dict[str, float]:
    """Milliseconds of the passes at one shape `[B, H, W, C]`; the grouped form only where asked, for it is slow."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (3, 3, 1, shape[-1]))
    dy = jax.random.normal(keys[2], jax.eval_shape(lambda: depthwise_grouped(x, kernel, stride)).shape)

    def backward(form: Callable) -> Callable:
        return jax.jit(lambda x, kernel, dy: jax.vjp(lambda x, k: form(x, k, stride), x, kernel)[1](dy))

    def forward(form: Callable) -> Callable:
        return jax.jit(lambda x, kernel, dy: form(x, kernel, stride))

    functions = {
        "forward": forward(depthwise_shifted),
        "backward": backward(depthwise_shifted),
        "autodiff": backward(shifted_sum),
    }
    if grouped:
        functions["grouped"] = forward(depthwise_grouped)
    calls = {name: functools.partial(function, x, kernel, dy) for name, function in functions.items()}
    return {name: 1e3 * seconds for name, seconds in fastest(calls, rounds).items()}


def main() -> None:
    """Prints one row a shape and stride."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=lambda text: tuple(map(int, text.split(","))), help="B,H,W,C")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(machine())
    header = (
        "B,H,W,C",
        "stride",
        "forward",
        "grouped",
        "backward",
        "autodiff",
        "backward/forward",
        "autodiff/backward",
    )
    print("  ".join(f"{name:>{max(len(name), 8)}}" for name in header))
    for shape in options.shape or SHAPES:
        for stride in (1, 2):
            ms = measure(shape, stride, options.rounds, grouped=True)
            cells = [",".join(map(str, shape)), str(stride)]
            cells += [f"{ms[name]:.2f}" for name in ("forward", "grouped", "backward", "autodiff")]
            cells += [f"{ms['backward'] / ms['forward']:.2f}", f"{ms['autodiff'] / ms['backward']:.2f}"]
            print(
                "  ".join(f"{cell:>{max(len(name), 8)}}" for cell, name in zip(cells, header, strict=True)), flush=True
            )


if __name__ == "__main__":
    main()
