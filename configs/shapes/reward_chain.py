"""TextCraftor from nothing: a base, a detector that is the reward, a CLIP that is the constraint; then the text encoder
is tuned, and the network with it.

    snapgen chain --config=configs/shapes/reward_chain.py --workdir=reward
    snapgen chain --config=configs/shapes/reward_chain.py:quick --workdir=reward
    snapgen chain --config=configs/shapes/reward_chain.py:improve --workdir=reward \
        --config.clip.data.tokenizer=runs/base --config.text.init_from=runs/base

The last line improves a finished run of `adapters_base.py`; its network stays as it is.
Run it where this repository is. Machine: two CPU cores. Metric: the score of each row, by the exact detector, and
`diversity`, which falls where all prompts lead to one image.
"""

from ml_collections import ConfigDict

SOURCES = {"rewards.detection.workdir": "detection", "constraint.workdir": "clip"}


def improve() -> ConfigDict:
    """The stages that a finished run needs."""
    rows = (
        {"label": "before", "options": {"tuned_steps": 0}},
        {"label": "text encoder", "against": "before"},
    )
    stages = (
        {"name": "detection", "config": "detection.py"},
        {"name": "clip", "config": "clip.py"},
        {"name": "text", "config": "reward.py", "earlier": SOURCES, "rows": rows},
    )
    return ConfigDict({"stages": stages, "scores": ("compositional", "diversity"), "per_category": 64})


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "improve" for a run that is there, whose text encoder alone is tuned; "quick" for the simpler world
    of single objects; or "runlocal" for some minutes in which it shows only that everything works."""
    if arg not in (None, "improve", "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the arguments are improve, quick and runlocal, or nothing")
    if arg == "improve":
        return improve()
    form, network = (f":{arg}", f":{arg}_network") if arg else ("", ":network")
    few = {"steps": 8}
    tuned = {"init_from": "base", **SOURCES}
    return ConfigDict(
        {
            "stages": (
                {"name": "base", "config": f"adapters_base.py{form}", "rows": ({"label": "base", "options": few},)},
                {"name": "detection", "config": f"detection.py{form}"},
                {"name": "clip", "config": f"clip.py{form}", "earlier": {"data.tokenizer": "base"}},
                {
                    "name": "text",
                    "config": f"reward.py{form}",
                    "earlier": tuned,
                    "rows": ({"label": "text encoder", "against": "base"},),
                },
                {
                    "name": "network",
                    "config": f"reward.py{network}",
                    "earlier": {**tuned, "tuned_text": "text"},
                    "rows": ({"label": "text encoder, then network", "against": "text encoder"},),
                },
            ),
            "scores": ("compositional", "diversity"),
            "per_category": 2 if arg == "runlocal" else 64,
            **({"categories": ("single_object", "colours")} if arg == "quick" else {}),
        }
    )
