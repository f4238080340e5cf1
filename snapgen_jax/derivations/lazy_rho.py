"""The price rho at which gates skip a wanted share of the module calls: bisection on log rho.

    {"name": "rho", "derive": "snapgen_jax.derivations.lazy_rho:find", "earlier": {"base": "base"},
     "options": {"config": "configs/shapes/lazy.py", "share": 0.3}, "example": {"rho": 1e-3}}

Which rho gives which share is published for no network, and depends on the size of the network and of its error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from snapgen_jax.bookkeeping import Items
from snapgen_jax.bounds import above, at_least, check
from snapgen_jax.config import load_experiment
from snapgen_jax.experiment import Experiment
from snapgen_jax.recipes.lazy_gates import LazyGates
from snapgen_jax.scoring import evaluate
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.typed import build


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched for, and where.

    Attributes:
        config: of the gates: "path/to/file.py" or "path/to/file.py:arg".
        share: of all module calls, to skip.
        low, high: the prices between which the wanted one lies.
        trainings: how many prices are tried, each by training gates for it.
        tolerance: a share as near to the wanted one ends the search.
    """

    config: str
    share: float
    low: float = 1e-6
    high: float = 1.0
    trainings: int = 8
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        check(self, share=above(0), low=above(0), trainings=at_least(1), tolerance=at_least(0))
        if self.high <= self.low:
            raise ValueError(f"high={self.high} must exceed low={self.low}")


def bisect(share_at: Callable[[float], float], search: Search) -> tuple[float, float]:
    """The price among those tried whose share is nearest to the wanted one, and that share.

    Args:
        share_at: the share that is skipped at a price; it grows with the price.
        search: where to look.
    """
    low, high = math.log(search.low), math.log(search.high)
    tried: dict[float, float] = {}
    for _ in range(search.trainings):
        rho = math.exp((low + high) / 2)
        tried[rho] = share_at(rho)
        if abs(tried[rho] - search.share) <= search.tolerance:
            break
        low, high = (math.log(rho), high) if tried[rho] < search.share else (low, math.log(rho))
    return min(tried.items(), key=lambda one: abs(one[1] - search.share))


def find(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """`{"rho", "share"}`: the price nearest to the wanted share, the same for attention and feed-forward networks.

    Args:
        stages: "base", the run that the gates are of.
        workdir: holds a run of gates for each price.
        options: see `Search`.

    Raises:
        ConfigError: an option is unknown or out of its bounds, the config is not of gates, or they may not skip as
            much.
    """
    try:
        search = build(Search, dict(options))
    except ValueError as error:
        raise ConfigError(f"options of the search for rho: {error}") from error
    items = Items(workdir)

    def train(rho: float) -> float:
        run = workdir / f"rho_{rho:.3g}"
        changes = [f"rho_attention={rho!r}", f"rho_ffn={rho!r}", f"base={stages['base']}"]
        experiment = Experiment(load_experiment(search.config, changes), run)
        gates = experiment.recipe
        if not isinstance(gates, LazyGates):
            raise ConfigError(f"{search.config} is not of the recipe lazy_gates; name a config of gates")
        most = float(gates.may_skip.mean())
        if search.share > most:
            raise ConfigError(
                f"share={search.share}: with refresh={gates.config.refresh!r} these gates skip at most {most:.2g} of "
                "the module calls; lower it"
            )
        experiment.train()
        return most * evaluate(run, ["validation_loss"])["validation_loss.skipped"]

    def share_at(rho: float) -> float:
        share = items.run(f"rho {rho:.6g}", lambda: train(rho))
        print(f"rho {rho:.3g}: {share:.3f} of the module calls are skipped", flush=True)
        return share

    rho, share = bisect(share_at, search)
    return {"rho": rho, "share": share}
