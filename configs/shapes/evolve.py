"""SnapFusion in the shapes world, from nothing to a bundle: robust training, two rounds of evolution, and eight steps.

    snapgen chain --config=configs/shapes/evolve.py --workdir=evolve
    snapgen chain --config=configs/shapes/evolve.py --workdir=evolve --config.evolve_1.table=phone.json \
        --config.evolve_2.table=phone.json

A round measures what each block is worth, takes out the worst until the budget is met and repeats the best, and goes on
training. `WORKDIR/evolve_1/items.jsonl` has every value and every action, `WORKDIR/released/bundle` the bundle of
the eight steps, which its `verify.py` has accepted. The budget is a share of the time of the first network by a table
that was measured before, here on two CPU cores; of its multiply-adds, where `table` is empty.
`docs/snapfusion.md` says more.
Machine: two CPU cores for two hours; `quick`, one hour. Metric: the table at the end.
"""

from ml_collections import ConfigDict

TABLE = "benchmarks/results/latency_table-cpu2.json"


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: None; "quick", single objects in half the updates; or "runlocal" for the whole chain in small."""
    if arg not in (None, "quick", "runlocal"):
        raise ValueError(f"unknown argument {arg!r}; the argument is quick, runlocal, or nothing")
    form = f":{arg}" if arg else ""
    budgets = (0.9, 0.85) if arg == "runlocal" else (0.85, 0.7)  # the smallest network is not much more than its rest
    single = ("single_object", "colours")
    options = {
        "copies": 1,
        "table": "" if arg == "runlocal" else TABLE,
        "metric": "loss" if arg == "runlocal" else "score",
        "per_category": 32,
        "categories": single,
    }
    # What stands in for a result until there is one.
    example = {
        "network": {"blocks": [["mid_transformer", 2]]},
        "moved": [["unet", "unet"]],
        "cost": 1.0,
        "budget": 1.0,
        "actions": ["remove mid_transformer"],
    }

    def searched(name: str, earlier: str, budget: float) -> dict:
        return {
            "name": name,
            "derive": "snapgen_jax.derivations.evolution:evolve",
            "earlier": {"from": earlier, "origin": "robust"},
            "options": {**options, "budget": budget},
            "example": example,
        }

    def trained(name: str, earlier: str, search: str, label: str, against: str) -> dict:
        return {
            "name": name,
            "config": f"robust.py{form}",
            "earlier": {"init_from": earlier},
            "filled": {"network.blocks": f"{search}.network.blocks", "moved": f"{search}.moved"},
            "rows": ({"label": label, "against": against},),
        }

    blocks = "evolve_2.network.blocks"
    eight = {
        "name": "eight",
        "config": f"steps.py{form}",
        "earlier": dict.fromkeys(("inputs.text_workdir", "teacher.workdir", "init_from"), "evolved_2"),
        "filled": {"network.blocks": blocks, "teacher.network.blocks": blocks},
        "rows": ({"label": "eight steps", "against": "evolved twice"},),
    }
    released = {
        "name": "released",
        "derive": "snapgen_jax.chain_command:run",
        "earlier": {"eight": "eight"},
        "options": {"commands": ("export --workdir={eight} --out={here}/bundle", "python {here}/bundle/verify.py")},
        "example": {"bundle": "a folder"},
    }
    return ConfigDict(
        {
            "stages": (
                {"name": "robust", "config": f"robust.py{form}", "rows": ({"label": "all blocks"},)},
                searched("evolve_1", "robust", budgets[0]),
                trained("evolved_1", "robust", "evolve_1", "evolved once", "all blocks"),
                searched("evolve_2", "evolved_1", budgets[1]),
                trained("evolved_2", "evolved_1", "evolve_2", "evolved twice", "evolved once"),
                eight,
                released,
            ),
            "scores": ("compositional", "frechet", "diversity"),
            "per_category": {None: 64, "quick": 32, "runlocal": 2}[arg],
            **({"categories": single} if arg == "quick" else {}),
            "examples": {None: 512, "quick": 128, "runlocal": 8}[arg],
        }
    )
