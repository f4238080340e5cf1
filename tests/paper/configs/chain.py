"""The chain of the paper in the tests: a mixer, the rank that its adapter needs, and the adapter."""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: none."""
    derived = {
        "name": "rank",
        "derive": "snapgen_jax.recipes.clip_adapter:rank_of",
        "earlier": {"base": "base"},
        "options": {"frames": 4, "ranks": (1, 2, 3, 4)},
        "example": {"adapter": {"rank": 1}},
    }
    adapted = {
        "name": "adapted",
        "config": "adapted.py",
        "earlier": {"base_workdir": "base"},
        "filled": {"rank": "rank.adapter.rank"},
    }
    return ConfigDict({"stages": ({"name": "base", "config": "base.py"}, derived, adapted), "scores": ()})
