"""The page that explains a bundle to the person who loads it on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.export.program import Flow, Program, Step

PAGE = """\
# {title}

{whose}Check it: `pip install numpy ai-edge-litert`, then `python verify.py`. Run it: `client.py` is a complete client.

To run it from another language, read `SPEC.md`: every formula, in words. `spec.json` has the same constants as data,
and `golden/` the numbers that your client must reproduce. You need to read no Python.

{story}{tokenizers}{sizes}

{memory}

{units}
`golden/` holds `.npy` arrays (little-endian, C order): `inputs/` and `outputs/` by name{flow}. Their first axis counts
examples. `golden/golden.json` says how close a client must come: what the accepted error of one call adds up to over
all calls. `golden/conformance.json` has small cases of every formula, and `golden/self_test/` a call of each unit to
try an accelerator with.

{precisions}Float16 arithmetic ends at 65504; the
largest number inside a unit is given above, so that a GPU driver's rounding can be judged. A GPU that computes garbage
may report success: call it once with `golden/self_test/` first.
"""

PRECISIONS = """\
Inputs and outputs are float32 in every file. Weights are float16 in files of `f16`; in those of `int8` they are eight
bits, and in those of `mixed` eight or four by layer, with a scale for each output channel. A CPU computes with integer
weights in integers, a GPU multiplies them out. Each precision drew the same prompts from the same noise as float32:

| precision | bytes | median picture | score, gained / lost | lower bound | judged by |
|---|---|---|---|---|---|
{rows}

"""

FLOW = """\
An example is: {inputs} -> {encoders}noise -> {steps} steps (rule {rules}) of {denoisers} -> {decoder}{outputs}. Every
call is for one example. Guidance ({guidance}) is two calls, the second with the null inputs. The noise, the time
features and the sampler loop are the client's, in float32. A port draws the pictures that JAX draws from a seed and an
index. `golden/noise.npy` is the noise of the seed in `golden/golden.json` and of the indices 0, 1 ..."""

CALL = "An example is one call: {inputs} -> **{unit}** -> {outputs}."

TOKENIZERS = """

Token ids, each int32 of its input's length: the ids before, those of the prompt by the file (of the `tokenizers`
library), the ids after, and padding. A prompt that is too long loses its last ids, not those after.

| file | kind | ids | mask | length | before | after | padding |
|---|---|---|---|---|---|---|---|
{rows}"""

SIZES = """

Image sizes, height by width: {names}. All that this page says is of {own}, the default. `sizes` in `manifest.json`
names the program, the golden data and the signatures of the others; the files are the same."""

MEMORY = """\
Memory: a process that loads and frees one unit after the other peaks at {in_turn}, one that holds all at {together},
of which Python, numpy and LiteRT are {process:.0f} MB (measured where the bundle was made, on the CPU)."""

UNIT = """\
## {name}

Files: {files}. Signature: `{signature}`. Largest number inside: {largest:.3g}. Relative L2 error against JAX: {errors};
{gpu}.{packed}

| tensor | | shape | dtype | layout | seen range |
|---|---|---|---|---|---|
{rows}
"""

PACKED = """ `{file}` is packed: {shipped} bytes become a `.tflite` file of {whole} bytes when a client first \
starts; `PACKING.md` says how."""


def readme(manifest: Mapping[str, Any], program: Program) -> str:
    """Markdown from the contents of manifest.json and program.json."""
    flow = (
        ", `noise`, `contexts/`, `null_contexts/`, `predictions` before guidance, and `latents` after each step"
        if isinstance(program, Flow)
        else ""
    )
    units = "\n".join(
        _unit(name, unit, manifest["measured"].get(f"export.{name}.bytes_packed"))
        for name, unit in manifest["units"].items()
    )
    licence = f"Licence of the weights: {manifest['licence']}. " if manifest["licence"] else ""
    return PAGE.format(
        title=manifest["model"] or "Export bundle",
        whose=licence,
        story=_story(program),
        tokenizers=_tokenizers(program),
        sizes=_sizes(manifest),
        memory=_memory(manifest),
        units=units,
        flow=flow,
        precisions=_precisions(manifest),
    )


def _precisions(manifest: Mapping[str, Any]) -> str:
    """The table of all precisions beside float32; empty where there is none."""
    rows = []
    for precision, found in manifest["variants"].items():
        size = manifest["measured"][f"export.bytes_{precision}"]
        score = found.get("paired")
        verdicts = f"{score['variant']:.3f}, {score['gained']} / {score['lost']} of {score['prompts']}" if score else ""
        low = f"{score['low']:.3f}" if score else ""
        rows.append(
            f"| `{precision}` | {size} | {found['median_db']:.1f} dB | {verdicts} | {low} | {found['judged_by']} |"
        )
    return PRECISIONS.format(rows="\n".join(rows)) if rows else ""


def _tokenizers(program: Program) -> str:
    rows = [
        f"| `{one.file}` | {one.kind or 'BPE'} | `{one.tokens}` | {f'`{one.mask}`' if one.mask else ''} "
        f"| {program.inputs[one.tokens].shape[0]} | {list(one.begin)} | {list(one.end)} | {one.pad} |"
        for one in program.tokenizers
    ]
    return TOKENIZERS.format(rows="\n".join(rows)) if rows else ""


def _sizes(manifest: Mapping[str, Any]) -> str:
    """What there is beside the bundle's own size; empty where there is nothing."""
    names = list(manifest.get("sizes", ()))
    return SIZES.format(names=", ".join(names), own=names[0]) if names else ""


def _memory(manifest: Mapping[str, Any]) -> str:
    held = manifest["memory"]

    def of(way: str) -> str:
        return ", ".join(f"{held[precision][way] / 1e6:.0f} MB ({precision})" for precision in manifest["precisions"])

    return MEMORY.format(in_turn=of("in_turn"), together=of("together"), process=held["process"] / 1e6)


def _story(program: Program) -> str:
    inputs, outputs = (", ".join(f"`{name}`" for name in ends) for ends in (program.inputs, program.outputs))
    if not isinstance(program, Flow):
        return CALL.format(inputs=inputs, unit=program.unit, outputs=outputs)
    steps = program.steps[: len(program.times) - 1]
    scales = {np.array2string(step.guidance, separator=", ") for step in steps}
    network = program.decoder is not None and program.decoder["kind"] == "network"
    return FLOW.format(
        inputs=inputs or "no input",
        encoders="".join(
            f"**{unit}** -> " for unit in dict.fromkeys(u for us in program.contexts.values() for u in us)
        ),
        steps=len(steps),
        rules=" and ".join(dict.fromkeys(step.rule for step in steps)),
        denoisers=" and ".join(f"**{unit}**" for unit in dict.fromkeys(step.unit for step in steps)),
        decoder=f"**{program.decoder['unit']}** -> " if program.decoder and network else "",
        outputs=outputs,
        guidance=(scales.pop() if len(scales) == 1 else "by step") + _where_guided(steps),
    )


def _where_guided(steps: Sequence[Step]) -> str:
    """The times of guidance, where those are not all."""
    bands = dict.fromkeys(step.guidance_interval for step in steps if step.guided)
    return "".join(f", where t is from {low:g} to {high:g}" for low, high in bands if (low, high) != (0, 1))


def _unit(name: str, unit: Mapping[str, Any], shipped: int | None) -> str:
    rows = [
        f"| `{tensor}` | {kind} | {details['shape']} | {details['dtype']} | {details['layout']} "
        f"| {details['range'][0]:.3g} to {details['range'][1]:.3g} |"
        for kind in ("inputs", "outputs")
        for tensor, details in unit[kind].items()
    ]
    packed = "".join(
        PACKED.format(file=unit["files"][precision], shipped=shipped, whole=whole["bytes"])
        for precision, whole in unit.get("packed", {}).items()
    )
    errors = ", ".join(f"{max(cases.values()):.1e} ({precision})" for precision, cases in unit["rel_l2"].items())
    return UNIT.format(
        name=name,
        files=", ".join(f"`{file}`" for file in unit["files"].values()),
        signature=unit["signature"],
        largest=unit["max_activation"]["value"],
        errors=errors,
        gpu=_on_gpu(unit["gpu"]),
        packed=packed,
        rows="\n".join(rows),
    )


def _on_gpu(found: Mapping[str, Any]) -> str:
    if not found["checked"]:
        return "not tried on a GPU accelerator"
    parts = []
    for precision, cases in found["rel_l2"].items():
        place = "" if found["fully_accelerated"][precision] else ", some operators on the CPU"
        parts.append(f"{max(cases.values()):.1e} ({precision}{place})")
    return f"on LiteRT's GPU accelerator {', '.join(parts)}"
