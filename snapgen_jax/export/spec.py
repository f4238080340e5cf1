"""SPEC.md and spec.json: what a client in any language must do, from the constants of the code that does it.

spec.md beside this file is the text; what stands in it as `{{name/name}}` is filled from `specification()`,
which is spec.json.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from snapgen_jax.diffusion import noise
from snapgen_jax.export import client, compare, conformance, golden, manifest, precision, program, verify

SCHEMA = 1
TEXT = pathlib.Path(__file__).with_name("spec.md")
# By the names of program.json. Each is an expression of the symbols that spec.md explains; all arithmetic is float32.
FORMULAS = {
    "grid": "shift * u / (1 + (shift - 1) * u)",
    "prediction": {"velocity": "out", "x_0": "(x - out) / max(t, t_min)", "linear": "a * x + b * out"},
    "guidance": "v_null + w * (v - v_null)",
    "rule": {
        "euler": {"x_s": "x + (s - t) * v(x, t)"},
        "heun": {"y": "x + (s - t) * v(x, t)", "x_s": "x + (s - t) * (v(x, t) + v(y, s)) / 2"},
        "renoise": {"x_0": "x - t * v(x, t)", "x_s": "(1 - s) * x_0 + s * fresh", "x_s at s = 0": "x_0"},
    },
    "time_features": {
        "frequency": "exp(-log(max_period) / (dim / 2) * k)",
        "cosine": "cos(scale * t * frequency)",
        "sine": "sin(scale * t * frequency)",
    },
    "codec": {
        "identity": "latent / scale + shift",
        "dct": "sqrt((1 if k == 0 else 2) / p) * cos(pi * (n + 0.5) * k / p)",
        "gain": "scale * frequency_scale[k * p + l]",
    },
    "picture": {"from_grey": "grey / 127.5 - 1", "to_grey": "round_half_even(clip(pixel * 127.5 + 127.5, 0, 255))"},
    "noise": {
        "u": "(2 * (bits >> 8) + 1 - 2**24) / 2**24",
        "w": "-log((1 - u) * (1 + u))",
        "centre": "w - 2.5",
        "tail": "sqrt(w) - 3",
        "normal": "sqrt(2) * u * p",
    },
    "metric": {
        "rel_l2": "norm(value - reference) / norm(reference)",
        "max_grey": "max(abs(value - reference))",
        "rms_grey": "sqrt(mean((value - reference)**2))",
    },
}


def specification() -> dict[str, Any]:
    """The contents of spec.json."""
    return {
        "schema": SCHEMA,
        "schemas": {
            "manifest": client.MANIFEST_SCHEMA,
            "program": program.SCHEMA,
            "conformance": conformance.SCHEMA,
        },
        "program": {
            "kinds": ["flow", "feed_forward"],
            "rules": list(program.RULES),
            "predictions": {name: list(keys) for name, keys in program.PREDICTIONS.items()},
            "times": {name: list(keys) for name, keys in program.TIMES.items()},
            "decoders": list(program.DECODERS),
            "dtypes": list(program.DTYPES),
            "step": {"needed": list(program.NEEDED), "optional": list(program.OPTIONAL)},
            "reserved_inputs": list(program.RESERVED),
        },
        "formulas": FORMULAS,
        "noise": {
            "generator": "Threefry-2x32",
            "rounds": 20,
            "counter_word": noise.PLACE,
            "parity": noise.PARITY,
            "rotations": [list(four) for four in noise.ROTATIONS],
            "shift_right": 8,
            "split": 5,
            "centre": list(noise.CENTRE),
            "tail": list(noise.TAIL),
        },
        "precisions": list(precision.PRECISIONS),
        "minimum_runtime": manifest.MINIMUM_RUNTIME,
        "tolerances": {
            "call_rel_l2": {"cpu": dict(compare.LIMITS), "gpu": dict(compare.GPU_LIMITS)},
            "self_test_rel_l2_beside_the_precisions_own": golden.SELF_TEST,
            "replay_rel_l2": verify.REPLAY,
            "conformance": conformance.TOLERANCES,
        },
        "golden": {"recorded_examples": golden.RECORDED, "safety": golden.SAFETY},
        "float16": {"largest_activation": compare.FLOAT16_HEADROOM},
    }


def page() -> str:
    """The contents of SPEC.md.

    Raises:
        KeyError: the text names what the specification does not hold.
    """
    data = specification()

    def value(match: re.Match[str]) -> str:
        found: Any = data
        for key in match[1].split("/"):
            found = found[key]
        return found if isinstance(found, str) else json.dumps(found)

    return re.sub(r"\{\{(.+?)\}\}", value, TEXT.read_text("utf-8"))


def write(folder: pathlib.Path) -> None:
    """Writes both into a bundle."""
    (folder / "SPEC.md").write_text(page(), "utf-8")
    manifest.write_json(folder / "spec.json", specification())
