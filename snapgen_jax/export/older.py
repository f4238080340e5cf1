"""Programs of older bundles, as program.json of today. Copied into every bundle."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

if __package__:
    from snapgen_jax.export.program import SCHEMA, BundleError
else:  # beside its own copy, in a bundle
    sys.path.insert(0, str(pathlib.Path(__file__).absolute().parent))
    from program import SCHEMA, BundleError  # type: ignore[import-not-found]


def from_schema_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler.json, what bundles of one text encoder and one denoiser had at first, as program.json."""
    names = ("kind", "prediction", "method", "times", "shift", "guidance", "latent_shape", "image_shape")
    if missing := [n for n in (*names, "time_features", "codec", "text", "units") if n not in data]:
        raise BundleError(f"scheduler.json lacks {', '.join(missing)}")
    if (data.get("schema"), data["kind"]) != (1, "flow_matching"):
        raise BundleError(f"scheduler.json is {data['kind']!r} of schema {data.get('schema')!r}; 'flow_matching' of 1")
    text, units, codec = data["text"], data["units"], data["codec"]
    if codec.get("kind") == "network":
        if "decoder" not in units:
            raise BundleError("scheduler.json: the codec is a network, and `units` names no decoder")
        codec = {**codec, "unit": units["decoder"]}
    program = {
        "schema": 2,
        "kind": "flow",
        "inputs": {
            "tokens": {"shape": [text["length"]], "dtype": "int32", "null": text["null_tokens"]},
            "mask": {"shape": [text["length"]], "dtype": "float32", "null": text["null_mask"]},
        },
        "outputs": {"image": {"shape": data["image_shape"], "dtype": "uint8"}},
        "tokenizer": {"tokens": "tokens", "mask": "mask"},
        **{name: data[name] for name in ("latent_shape", "times", "shift")},
        "step": {
            "unit": units["denoiser"],
            "rule": data["method"],
            "time": {"kind": "features", **data["time_features"]},
            "prediction": data["prediction"],
            "context": "text",
            "guidance": data["guidance"],
        },
        "contexts": {"text": [units["text_encoder"]]},
        "decoder": codec,
    }
    return from_schema_2(program)


def from_schema_2(data: Mapping[str, Any]) -> dict[str, Any]:
    """program.json of schema 2, which had one tokenizer, framed as the null of its input, as schema 3."""
    if data.get("schema") != 2:
        raise BundleError(f"program.json has schema {data.get('schema')!r}, and the manifest 2")
    program = {name: value for name, value in data.items() if name != "tokenizer"}
    if names := data.get("tokenizer"):
        try:
            begin, end, *rest = data["inputs"][names["tokens"]]["null"]
            pad = rest[-1] if rest else end
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError("program.json: the tokenizer makes no input with a null of its own") from error
        entry = {"file": "tokenizer.json", **names, "begin": [begin], "end": [end], "pad": pad}
        program["tokenizers"] = [entry]
    return {**program, "schema": SCHEMA}
