"""BitsFusion in the shapes world, from a trained network to a bundle: bits by layer, stage I, stage II, export.

    snapgen chain --config=configs/shapes/bits.py --workdir=bits
    snapgen chain --config=configs/shapes/bits.py --workdir=bits --config.bits.target_bits=1.8

The base is trained unless `bits/base` holds it: copy a run of `adapters_base.py` there. `bits/bits/bits.png` shows what
each layer was given, `bits/bundle/bundle` is what leaves for a phone, and `docs/bitsfusion.md` explains all of it.
Machine: two CPU cores. Time: half an hour; `quick`, in a simpler world, a quarter. Metric: the table at the end, in
which each stage stands beside the network that it is to equal.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick" for single objects in half the updates; or "runlocal" for the whole chain in a minute."""
    if arg not in (None, "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is quick, runlocal, or nothing")
    form = f":{arg}" if arg else ""
    categories = {"categories": ("single_object", "colours")} if arg == "quick" else {}

    def quantised(name: str, config: str, init_from: str, label: str, against: str) -> dict:
        return {
            "name": name,
            "config": config + form,
            "earlier": {"base": "base", "init_from": init_from},
            "filled": {"bits": "bits.bits"},
            "rows": ({"label": label, "against": against},),
        }

    measured = {
        "target_bits": 2.0,
        "per_category": {None: 8, "quick": 16, "runlocal": 1}[arg],
        "generation": {"steps": 1 if arg == "runlocal" else 8},
        **categories,
    }
    return ConfigDict(
        {
            "stages": (
                {"name": "base", "config": "adapters_base.py" + form, "rows": ({"label": "float"},)},
                {
                    "name": "bits",
                    "derive": "snapgen_jax.derivations.layer_bits:derive",
                    "earlier": {"base": "base"},
                    "options": measured,
                    "example": {"bits": {}, "average": 2.0, "stored": 2.3},
                },
                quantised("stage_one", "quantised.py", "base", "stage I", "float"),
                quantised("stage_two", "quantised_data.py", "stage_one", "stage II", "stage I"),
                {
                    "name": "bundle",
                    "derive": "snapgen_jax.derivations.layer_bits:bundle",
                    "earlier": {"run": "stage_two"},
                    "options": {"form": "packed", "precisions": ("int8",)},
                    "example": {"bundle": ""},
                },
            ),
            "scores": ("compositional",),
            "per_category": {None: 64, "quick": 32, "runlocal": 2}[arg],
            **categories,
        }
    )
