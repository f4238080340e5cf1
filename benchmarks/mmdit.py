"""Compile time and speed of the MMDiT.

    python -m benchmarks.mmdit compile      # forward and input gradient of 38 blocks at width 128, from shapes alone
    python -m benchmarks.mmdit torch        # forward against diffusers' module in one process (needs the oracle extra)
    python -m benchmarks.mmdit full         # bfloat16 forward of the full-size network, random weights (needs a GPU)
    python -m benchmarks.mmdit full --torch # and diffusers' module beside it in one process

Each prints one JSON line with the machine that gave it; `--out=FILE` appends the line to a file as well.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import fastest, machine, random_like
from snapgen_jax.networks.attention_table import AttentionKernel
from snapgen_jax.networks.counting import macs
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Tree, apply, build, count_parameters

SMALL = MMDiTConfig(depth=38, heads=2, head_dim=64, context_width=64, pooled_width=64, position_size=32, remat="none")


def measure_compile() -> dict[str, Any]:
    """Seconds to trace and lower, and to compile, without the compilation cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    network, params = build(SMALL)
    x, *rest = SMALL.input_spec(batch=1, height=32, width=32, tokens=77)

    def velocity(x: jax.Array, params: Tree, rest: Any) -> jax.Array:
        return apply(network, params, x, *rest)[0]

    result: dict[str, Any] = {"depth": SMALL.depth, "width": SMALL.width}
    for name, function in (("forward", velocity), ("gradient", jax.grad(lambda *args: jnp.sum(velocity(*args))))):
        start = time.perf_counter()
        lowered = jax.jit(function).lower(x, params, rest)
        middle = time.perf_counter()
        lowered.compile()
        result[f"{name}_lower_s"] = round(middle - start, 2)
        result[f"{name}_compile_s"] = round(time.perf_counter() - middle, 2)
        result[f"{name}_program_mb"] = round(len(lowered.as_text()) / 1e6, 2)
    return result


def measure_torch(threads: int) -> dict[str, Any]:
    """Float32 forward of 6 blocks at width 384 over 256 image and 77 text tokens, ours and diffusers'."""
    import torch  # pyright: ignore[reportMissingImports]

    config = MMDiTConfig(depth=6, heads=6, head_dim=64, context_width=512, pooled_width=256, position_size=32)
    network, spec = build(config)
    x, features, context = random_like(config.input_spec(batch=2, height=32, width=32, tokens=77))
    params, run = random_like(spec), jax.jit(functools.partial(apply, network))

    torch.set_num_threads(threads)
    module = torch_module(config)
    assert count_parameters(spec) == sum(t.numel() for t in module.state_dict().values())
    inputs = {
        "hidden_states": torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy()),
        "encoder_hidden_states": torch.from_numpy(np.asarray(context.sequence).copy()),
        "pooled_projections": torch.from_numpy(np.asarray(context.pooled).copy()),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    with torch.inference_mode():
        calls = {"ours": lambda: run(params, x, features, context)[0], "torch": lambda: module(**inputs).sample}
        times = fastest(calls, rounds=8)
    milliseconds = {f"{name}_ms": 1e3 * seconds for name, seconds in times.items()}
    return {**milliseconds, "torch_over_ours": times["torch"] / times["ours"], "torch_threads": threads}


def torch_module(config: MMDiTConfig) -> Any:
    """diffusers' network of a config, with random weights."""
    from diffusers import SD3Transformer2DModel  # pyright: ignore[reportMissingImports]

    return SD3Transformer2DModel(
        num_layers=config.depth,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        pos_embed_max_size=config.position_size,
        qk_norm="rms_norm",
    ).eval()


def measure_full_torch(config: MMDiTConfig, x: jax.Array, tokens: int, repeats: int) -> float:
    """Seconds of diffusers' bfloat16 forward on the GPU, on inputs of the shape of ours; attention is torch's own."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), torch.inference_mode():
        module = torch_module(config)
        batch, height, width, channels = x.shape
        inputs = {
            "hidden_states": torch.randn(batch, channels, height, width),
            "encoder_hidden_states": torch.randn(batch, tokens, config.context_width),
            "pooled_projections": torch.randn(batch, config.pooled_width),
            "timestep": torch.full((batch,), 500.0),
        }

        def call() -> None:
            module(**inputs)
            torch.cuda.synchronize()

        return fastest({"torch": call}, repeats)["torch"]


def measure_full(preset: str, side: int, batch: int, attention: AttentionKernel, torch: bool) -> dict[str, Any]:
    """Bfloat16 forward of a full-size network, and its share of the measured rate of an 8192^3 matrix product; with
    `torch`, diffusers' too."""
    config = MMDiTConfig.preset(preset, dtype="bfloat16", attention=attention)
    network, spec = build(config)
    shapes = config.input_spec(batch=batch, height=side // 8, width=side // 8)
    work = 2 * macs(config, shapes)
    params, inputs = random_like(spec, jnp.bfloat16), random_like(shapes)
    run = jax.jit(functools.partial(apply, network))
    time_s = fastest({"ours": lambda: run(params, *inputs)[0]}, rounds=10)["ours"]

    a, product = jnp.ones((8192, 8192), jnp.bfloat16), jax.jit(jnp.dot)
    rate = 2 * 8192**3 / fastest({"product": lambda: product(a, a)}, rounds=20)["product"]
    beside = {}
    if torch:
        del params
        x, _, context = inputs
        torch_s = measure_full_torch(config, x, context.sequence.shape[1], repeats=10)
        beside = {"torch_ms": 1e3 * torch_s, "torch_over_ours": torch_s / time_s}
    return {
        "preset": preset,
        "side_px": side,
        "batch": batch,
        "attention": attention,
        "ms": 1e3 * time_s,
        "tflop": work / 1e12,
        "tflop_s": work / time_s / 1e12,
        "matmul_tflop_s": rate / 1e12,
        "share_of_matmul": work / time_s / rate,
        **beside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "torch", "full"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--preset", default="sd35_large")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--attention", choices=("whole", "chunked", "cudnn"), default="cudnn")
    parser.add_argument("--torch", action="store_true", help="full: diffusers beside it")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines file to append to")
    args = parser.parse_args()
    match args.what:
        case "compile":
            result = measure_compile()
        case "torch":
            result = measure_torch(args.threads)
        case _:
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too
            result = measure_full(args.preset, args.side, args.batch, args.attention, args.torch)
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}
    line = json.dumps({"benchmark": f"mmdit {args.what}", "machine": machine(), **rounded})
    print(line)
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
