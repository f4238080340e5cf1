"""The mixer of the paper in the tests, which learns to leave clips as they are."""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: none."""
    c = ConfigDict()
    c.recipe = "clip_adapter"
    c.train_steps = 60
    c.log_every_steps = 20
    c.tensorboard = False
    c.data = ConfigDict({"source": "synthetic"})
    return c
