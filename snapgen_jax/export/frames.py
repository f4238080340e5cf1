"""How a tokenizer's file stands in a bundle: what it frames a text by, and what of a text it may take for its own."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any


def framed(program: Mapping[str, Any], files: Mapping[str, pathlib.Path]) -> dict[str, Any]:
    """The program with every entry of its tokenizers whole: those without "begin" are framed as their file says.

    Args:
        program: of an export plan.
        files: `{name in the bundle: the file}`.

    Raises:
        ValueError: a file is not given, or adds nothing by which a text could be framed.
    """
    if not program.get("tokenizers"):
        return dict(program)
    entries = []
    for entry in program["tokenizers"]:
        if "begin" not in entry:
            if entry["file"] not in files:
                raise ValueError(f"the program takes prompts: its bundle needs a tokenizer for {entry['file']}")
            entry = {**entry, **frame_of(files[entry["file"]])}
        entries.append(entry)
    return {**program, "tokenizers": entries}


def frame_of(path: pathlib.Path) -> dict[str, Any]:
    """`{"begin", "end", "pad", "kind"}` of a file of the `tokenizers` library that names its padding."""
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(path))
    if model.padding is None:
        raise ValueError(f"{path} names no padding token; save it with one")
    plain, whole = (model.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    if not plain or not starts:
        raise ValueError(f"{path} writes {whole} for the text 'a', whose ids are {plain}; ids were expected in a frame")
    begin = starts[-1]
    return {
        "begin": whole[:begin],
        "end": whole[begin + len(plain) :],
        "pad": model.padding["pad_id"],
        "kind": json.loads(model.to_str())["model"]["type"],
    }


def spelled_out(text: str) -> str:
    """The contents of a run's own tokenizer.json for its bundle. The run reads a prompt that spells "<eos>" letter by
    letter; so must every client, and it does where the file lists no special strings to look for."""
    return json.dumps({**json.loads(text), "added_tokens": []}, ensure_ascii=False, indent=1) + "\n"
