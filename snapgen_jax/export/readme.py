"""The page that explains a bundle to the person who loads it on a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snapgen_jax.export.client import Scheduler

PAGE = """\
# Export bundle

Check it: `pip install numpy ai-edge-litert`, then `python verify.py`. Run it: `client.py` is a complete client in
numpy. Its first lines define `scheduler.json`, and its functions are short enough to port.

An image is: token ids -> **{encoder}**, once for the prompt and once for the empty prompt -> noise -> {steps} steps of
**{denoiser}** (method {method}, guidance {guidance:g}) -> `decode`. Every call has batch 1; guidance is two calls. The
noise, the time features and the sampler loop are the client's, in float32.

{units}
`golden/` holds `.npy` arrays (little-endian, C order): token ids, noise, text states, the latent after each step, the
image. `golden/golden.json` holds their prompts, and says how close a client must come: what the accepted error of one
call adds up to over the steps of this sampler.

In float16 files the weights are float16, and inputs and outputs stay float32. Float16 arithmetic ends at 65504; the
largest number inside a unit is given above, so that a GPU driver's rounding can be judged.
"""

UNIT = """\
## {name}

Files: {files}. Signature: `{signature}`. Largest number inside: {largest:.3g}. Relative L2 error against JAX: {errors}.

| tensor | | shape | dtype | layout | seen range |
|---|---|---|---|---|---|
{rows}
"""


def readme(manifest: Mapping[str, Any], scheduler: Scheduler) -> str:
    """Markdown from the contents of manifest.json and scheduler.json."""
    return PAGE.format(
        encoder=scheduler.units["text_encoder"],
        denoiser=scheduler.units["denoiser"],
        steps=len(scheduler.times) - 1,
        method=scheduler.method,
        guidance=scheduler.guidance,
        units="\n".join(_unit(name, unit) for name, unit in manifest["units"].items()),
    )


def _unit(name: str, unit: Mapping[str, Any]) -> str:
    rows = [
        f"| `{tensor}` | {kind} | {details['shape']} | {details['dtype']} | {details['layout']} "
        f"| {details['range'][0]:.3g} to {details['range'][1]:.3g} |"
        for kind in ("inputs", "outputs")
        for tensor, details in unit[kind].items()
    ]
    errors = ", ".join(f"{max(cases.values()):.1e} ({precision})" for precision, cases in unit["rel_l2"].items())
    return UNIT.format(
        name=name,
        files=", ".join(f"`{file}`" for file in unit["files"].values()),
        signature=unit["signature"],
        largest=unit["max_activation"]["value"],
        errors=errors,
        rows="\n".join(rows),
    )
