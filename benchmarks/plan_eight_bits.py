"""Plans blocks of Stable Diffusion 3.5 Large in bfloat16 and in int8, without a TPU, and what follows for distillation.

    python -m benchmarks.plan_eight_bits                    # two blocks on v5e:2x2 at both sizes, some minutes
    python -m benchmarks.plan_eight_bits --ratios           # from stored plans alone, no compilation

The first writes `results/plan/eight_bits_blocks-v5e_2x2.json`: memory, arithmetic and traffic of one forward pass of a
joint and a last block at full width, embeddings and output with them, the parameters split over four chips, an image on
each. The second reads the stored plans of `configs/distill/*` and of their teachers, takes the multiply-adds of the
whole teacher by dtype, and writes `results/eight_bits_ratios.json`: the arithmetic of a step, with what is int8 at
the chip's rate for it. No TPU has measured any of it: a time at the peaks is a lower bound.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from typing import Any

import jax

from snapgen_jax.networks.counting import count_macs_by_dtype
from snapgen_jax.networks.eight_bit_network import in_precision
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import apply, build, for_platform, frozen_spec
from snapgen_jax.parallel.chips import chip_of
from snapgen_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from snapgen_jax.parallel.plan import plan_step, topology
from snapgen_jax.parallel.sharding import tree_shardings

TOPOLOGY = "v5e:2x2"
RESULTS = pathlib.Path(__file__).parent / "results" / "plan"
BLOCKS, RATIOS = RESULTS / "eight_bits_blocks-v5e_2x2.json", RESULTS.parent / "eight_bits_ratios.json"
SIZES = {"512x512": 64, "1024x1024": 128}  # of an image in pixels; side of its latent
PRECISIONS = ("compute", "int8")
STEPS = {"512x512": "distill_t2i_512_sd35l-v5p_4x4x4-b2048", "1024x1024": "distill_t2i_1024_sd35l-v5p_4x4x4-b2048"}


def blocks(precision: str, bucket: str) -> dict[str, Any]:
    """The plan of two blocks, as plain data."""
    where = topology(TOPOLOGY)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), where.devices)
    config = MMDiTConfig.preset("sd35_large", depth=2, attention="flash")
    chosen: Any = precision
    network, _ = build(in_precision(for_platform(config, "tpu"), chosen))
    spec, batch = frozen_spec(network), len(where.devices)
    inputs = config.input_spec(batch, SIZES[bucket], SIZES[bucket])
    places = (tree_shardings(spec, network.config.rules(), mesh), *[batch_sharding(mesh)] * len(inputs))
    with jax.set_mesh(mesh):
        lowered = jax.jit(functools.partial(apply, network), in_shardings=places).lower(spec, *inputs)
        found = plan_step(
            lowered, where, mesh, bucket=bucket, global_batch=batch, state=spec, train_steps=1, part="forward"
        )
    return {"precision": precision, **found.to_json()}


def teacher_macs(precision: str, bucket: str) -> dict[str, int]:
    """Multiply-adds of the whole teacher for one image, by dtype. Attention is counted in its plain form: a kernel
    shows none."""
    config, chosen = MMDiTConfig.preset("sd35_large"), precision
    network, _ = build(in_precision(for_platform(config, "tpu"), chosen))  # type: ignore[arg-type]
    inputs = config.input_spec(1, SIZES[bucket], SIZES[bucket])
    return dict(count_macs_by_dtype(functools.partial(apply, network), frozen_spec(network), *inputs))


def ratio(bucket: str) -> dict[str, Any]:
    """What int8 saves of the arithmetic of one planned step of distillation, at the peaks of its chip; beside it, the
    time of its memory traffic in bfloat16."""
    (step,) = json.loads((RESULTS / f"{STEPS[bucket]}.json").read_text())
    (teacher,) = json.loads((RESULTS / f"{STEPS[bucket]}-teacher.json").read_text())
    chip, macs = chip_of(step["chip"]), teacher_macs("int8", bucket)
    int8_flops = 2 * macs["int8"] * step["global_batch"] / step["chips"]
    saved = int8_flops * (1 / chip.flops - 1 / chip.int8_flops)
    before, of_teacher = step["compute_seconds"], teacher["compute_seconds"]
    return {
        "bucket": bucket,
        "topology": step["topology"],
        "global_batch": step["global_batch"],
        "teacher_macs": teacher_macs("compute", bucket),
        "teacher_macs_int8": macs,
        "teacher_compute_seconds": of_teacher,
        "teacher_compute_seconds_int8": of_teacher - saved,
        "teacher_ratio": of_teacher / (of_teacher - saved),
        "step_compute_seconds": before,
        "step_compute_seconds_int8": before - saved,
        "step_ratio": before / (before - saved),
        "step_hbm_seconds": step["hbm_seconds"],
        "measured_on_a_tpu": False,
    }


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def main() -> None:
    """Plans, or computes, and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", action="store_true", help="from stored plans, without compiling")
    if parser.parse_args().ratios:
        found = [ratio(bucket) for bucket in SIZES]
        RATIOS.write_text(json.dumps(found, indent=2) + "\n")
        for one in found:
            for what in ("teacher", "step"):
                before, after = (_milliseconds(one[f"{what}_compute_seconds{form}"]) for form in ("", "_int8"))
                print(f"{one['bucket']}, {what}: {before} -> {after}, {one[f'{what}_ratio']:.2f} times less arithmetic")
        return
    planned = []
    for bucket in SIZES:
        for precision in PRECISIONS:
            one = blocks(precision, bucket)
            planned.append(one)
            BLOCKS.write_text(json.dumps(planned, indent=2) + "\n")
            print(
                f"{bucket} {precision}: {one['flops'] / 1e12:.3f} TFLOP, {one['int8_flops'] / 1e12:.3f} of it int8; "
                f"compute {_milliseconds(one['compute_seconds'])}, HBM {_milliseconds(one['hbm_seconds'])}, links "
                f"{_milliseconds(one['link_seconds'])}, arguments {one['argument_bytes'] / 1e6:.0f} MB"
            )


if __name__ == "__main__":
    main()
