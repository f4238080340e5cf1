"""The adapter of the paper in the tests, which learns to reverse clips."""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: none."""
    c = base.get_config()
    c.train_steps = 150
    c.base_workdir = "base"
    return c
