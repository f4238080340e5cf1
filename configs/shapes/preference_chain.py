"""Diffusion-DPO from nothing: a network, pairs of its own images, judged by the exact detector, and what it learns.

    snapgen chain --config=configs/shapes/preference_chain.py --workdir=preference
    snapgen chain --config=configs/shapes/preference_chain.py --workdir=preference --config.pairs.prompts=512

Run it where this repository is. The prompts of the pairs are none of those that the score is of. Machine: two CPU
cores. Metric: the scores of the table at the end.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: as for `clip.py`."""
    if arg not in (None, "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are quick and runlocal, or nothing")
    form = f":{arg}" if arg else ""
    simple = {"categories": ("single_object", "colours")} if arg == "quick" else {}
    pairs = {"prompts": {None: 2_048, "quick": 768, "runlocal": 12}[arg], "images": 4, "shards": 8, **simple}
    if arg == "runlocal":
        # A network of twenty updates draws nothing that the detector accepts, so a run of `detection` judges here.
        pairs.update({"shards": 2, "least_difference": 0.0, "generation": {"steps": 2}})
    reward = ({"name": "reward", "config": f"detection.py{form}"},)
    return ConfigDict(
        {
            "stages": (
                {"name": "base", "config": f"adapters_base.py{form}", "rows": ({"label": "flow matching"},)},
                *(reward if arg == "runlocal" else ()),
                {
                    "name": "pairs",
                    "derive": "snapgen_jax.derivations.preference_pairs:derive",
                    "earlier": {"base": "base", **({"reward": "reward"} if arg == "runlocal" else {})},
                    "options": pairs,
                    "example": {"path": "pairs", "pairs": 1, "score": 1.0, "other_score": 0.0},
                },
                {
                    "name": "preference",
                    "config": f"preference.py{form}",
                    "earlier": {"base": "base"},
                    "filled": {"data.path": "pairs.path"},
                    "rows": ({"label": "with preferences", "against": "flow matching"},),
                },
            ),
            "scores": ("compositional", "diversity"),
            "per_category": 2 if arg == "runlocal" else 64,
            **simple,
        }
    )
