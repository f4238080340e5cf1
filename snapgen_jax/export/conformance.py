"""golden/conformance.json: small cases with exact answers, by which a client in another language checks itself.

The cases do not depend on the bundle, except for those of its tokenizers. `TOLERANCES` says how close a client must
come. SPEC.md says what each section holds.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.export import client, conformance_runs, sampler
from snapgen_jax.export.program import Program, Tokenizer

SCHEMA = 1
TOLERANCES = {
    "noise": {"abs": 1e-6},
    "time_features": {"abs": 1e-4},  # the last bit of a frequency turns an angle of 1000 by 6e-5
    "tokenizer": {"abs": 0},
    "codec": {"abs": 0},  # no pixel of these cases is near the middle between two grey levels
    "rounding": {"abs": 0},
    "runs": {"inputs_rel_l2": 1e-5, "time_abs": 1e-4, "latents_rel_l2": 1e-5, "outputs_rel_l2": 1e-5, "grey_abs": 0},
}
NOISE = ((0, 0, (4, 4, 3)), (7, 3, (2, 3, 2, 5)), (2**32 - 1, 2**31, (5,)), (20, 1, (1024,)))
FEATURES = ((16, 1000.0, 10_000.0), (6, 1.0, 100.0), (256, 1000.0, 10_000.0))
TIMES = (0.0, 0.0625, 0.3, 0.9371, 1.0)
CODECS: Mapping[str, Mapping[str, Any]] = {
    "identity": {"kind": "identity", "scale": 2.0, "shift": 0.1},
    "patch of 2, uneven": {
        "kind": "patch", "patch": 2, "scale": 1.5, "shift": -0.2, "frequency_scale": [1.0, 1.5, 2.5, 0.5],
    },
    "patch of 4": {"kind": "patch", "patch": 4, "scale": 0.7, "shift": 0.0, "frequency_scale": [1.0] * 16},
}  # fmt: skip
# What a port of a tokenizer gets wrong: letters whose lower case depends on their place or is two, white space that
# is no ASCII, characters outside the first plane, marks that combine, control characters.
PROMPTS = (
    "", " ", "a red circle left of a blue square", "  A RED   Circle,two;(STARS)!!  ", "don't it's we'll I'm they've",
    "12345 3.14 50% #7 a1b2", "ΟΔΥΣΣΕΥΣ ΣΑΣ ΑΣ. ΑΣΑ", "İstanbul ISPARTA ı", "Straße STRASSE ẞ ﬁ ½ Ⅷ",
    "na\u00efve e\u0301 \u00e9 \u00c5 A\u030a", "q\u0307\u0323 \u0301", "二つの赤い円と青い四角。", "빨간 원 두 개",
    "دائرة حمراء", "лЁд И мОре", "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "\U0001d4b3\U00010400", "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u1680g", "zero\u200bwidth\ufeffjoined\u2060up",
    "tab\tline\nreturn\r\nend", "control\x00\x1c\x1f\x7fend", "a red circle and " * 60, "x" * 300,
    "a <eos> b <|endoftext|><pad>",
)  # fmt: skip


def conformance(program: Program, file: Callable[[str], pathlib.Path]) -> dict[str, Any]:
    """All cases, as plain data. `file` is where a tokenizer's file of a name lies."""
    return {
        "schema": SCHEMA,
        "tolerances": TOLERANCES,
        "noise": [_noise(*case) for case in NOISE],
        "time_features": [_features(*case, t) for case in FEATURES for t in TIMES],
        "tokenizer": [case for entry in program.tokenizers for case in _tokenizer(program, entry, file(entry.file))],
        "codec": [_codec(codec) for codec in CODECS.values()],
        "rounding": [_rounding()],
        "runs": [conformance_runs.record(run) for run in conformance_runs.RUNS],
    }


def write(path: pathlib.Path, data: Mapping[str, Any]) -> None:
    """Writes the cases, each on a line of its own."""
    sections = []
    for name, value in data.items():
        if isinstance(value, list):
            lines = ",\n  ".join(json.dumps(case, allow_nan=False) for case in value)
            sections.append(f' "{name}": [\n  {lines}\n ]' if value else f' "{name}": []')
        else:
            sections.append(f' "{name}": {json.dumps(value)}')
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n", "utf-8")


def _noise(seed: int, index: int, shape: Sequence[int]) -> dict[str, Any]:
    return {"seed": seed, "index": index, **conformance_runs.plain(draw_noise(seed, index, shape))}


def _features(dim: int, scale: float, max_period: float, t: float) -> dict[str, Any]:
    time = {"dim": dim, "scale": scale, "max_period": max_period, "order": "cos,sin"}
    (values,) = sampler.time_features(np.array([t], np.float32), time)
    return {"time": time, "t": t, "values": conformance_runs.numbers(values)}


def special_strings(path: pathlib.Path) -> list[str]:
    """What a tokenizer's file holds as a whole, outside its model: "<|endoftext|>" and its like."""
    return [entry["content"] for entry in json.loads(path.read_text("utf-8")).get("added_tokens", [])]


def _tokenizer(program: Program, entry: Tokenizer, path: pathlib.Path) -> list[dict[str, Any]]:
    """Cases of one tokenizer of the program."""
    import tokenizers

    special = special_strings(path)[:4]
    around = [f"a {text}{text.upper()}b{text}" for text in special] + special + [text[:-1] for text in special]
    prompts = [*PROMPTS, *around, " ".join(reversed(special))]
    (length,) = program.inputs[entry.tokens].shape
    tokens, mask = client.tokenize(path, prompts, entry, length)
    model = tokenizers.Tokenizer.from_file(str(path))
    frame = {"file": entry.file, "begin": list(entry.begin), "end": list(entry.end), "pad": entry.pad, "length": length}
    return [
        {
            **frame,
            "prompt": prompt,
            "ids": model.encode(prompt, add_special_tokens=False).ids,
            "tokens": tokens[i].tolist(),
            "mask": conformance_runs.numbers(mask[i]),
        }
        for i, prompt in enumerate(prompts)
    ]


def _codec(codec: Mapping[str, Any]) -> dict[str, Any]:
    """Latents that leave [-1, 1] here and there, and their pictures."""
    channels = 3 * codec.get("patch", 1) ** 2
    latent = np.random.default_rng(1).normal(0, 1.2, (2, 3, channels)).astype(np.float32)
    image = sampler.decode(latent, codec)
    return {"decoder": dict(codec), "latent": conformance_runs.plain(latent), "image": conformance_runs.plain(image)}


def _rounding() -> dict[str, Any]:
    """Pixels in the middle between two grey levels, where the even one is taken, and outside [-1, 1]."""
    middle = (np.arange(-127, 128, dtype=np.float32) / np.float32(127.5)).astype(np.float32)
    pixels = np.concatenate([middle, np.array([-1, 1, -1.004, 1.004, -7, 7, 1e30, -1e30, 1e-8, -1e-8], np.float32)])
    return {"pixels": conformance_runs.numbers(pixels), "grey": sampler.grey_levels(pixels).tolist()}
