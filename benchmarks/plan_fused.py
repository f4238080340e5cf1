"""What the fused separable block moves in the t2i UNet's forward pass, by plan: no TPU has timed it.

    python -m benchmarks.plan_fused            # six sizes and chips, composed and fused: some twenty minutes
    python -m benchmarks.plan_fused v5e:4x4-1024

Writes `results/plan/fused_forward.json`, two plans of each: XLA's own operations, and one kernel for norm, SiLU and
separable convolution (`snapgen_jax/networks/fused_separable.py`).
"""

from __future__ import annotations

import json
import pathlib

from benchmarks.plan_published import Case, chosen, plan
from snapgen_jax.networks.unet import UNetConfig

RESULT = pathlib.Path(__file__).parent / "results" / "plan" / "fused_forward.json"
BATCHES = {256: 256, 512: 128, 1024: 64}
CASES = {f"{place}-{size}": (place, size) for size in BATCHES for place in ("v5e:4x4", "v6e:4x4")}


def main() -> None:
    """Plans and stores what is asked for."""
    for name in chosen(CASES, "case", __doc__):
        place, size = CASES[name]
        side, found = size // 8, {}
        for form in ("composed", "fused"):
            config = UNetConfig.preset("t2i", separable_block=form)
            case = Case(config, BATCHES[size], {"height": side, "width": side}, f"{size}x{size}")
            found[form] = plan(case, place)
        known = json.loads(RESULT.read_text()) if RESULT.exists() else []
        made = [{"case": name, "form": form, **one} for form, one in found.items()]
        RESULT.write_text(json.dumps([one for one in known if one["case"] != name] + made, indent=1) + "\n")
        ms = {form: [1e3 * one[f"{part}_seconds"] for part in ("compute", "hbm")] for form, one in found.items()}
        print(f"{name}: compute and HBM, ms: {ms}", flush=True)


if __name__ == "__main__":
    main()
