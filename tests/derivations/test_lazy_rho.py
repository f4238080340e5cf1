"""The price at which gates skip a wanted share is found by bisection on its logarithm."""

import json

import pytest
from etils import epath

from snapgen_jax.chain import load_chain
from snapgen_jax.config import load_experiment
from snapgen_jax.derivations import lazy_rho
from snapgen_jax.derivations.lazy_rho import Search, bisect, find
from snapgen_jax.experiment import Experiment
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.typed import build

CONFIG = "configs/shapes/lazy.py:runlocal"
SMALL = ("tensorboard=False", "evaluation.final=()", "evaluation.during=()")


def test_the_price_of_the_wanted_share_is_found():
    tried = []

    def share_at(rho):
        tried.append(rho)
        return min(0.5, 0.5 * rho / 1e-3)

    rho, share = bisect(share_at, Search("c", 0.2, low=1e-6, high=1.0, trainings=20, tolerance=0.002))
    assert rho == pytest.approx(4e-4, rel=0.02) and share == pytest.approx(0.2, abs=0.002)
    assert tried[0] == pytest.approx(1e-3) and len(tried) < 12  # halves of the logarithm


def test_the_nearest_of_all_that_were_tried_is_taken():
    rho, share = bisect(lambda rho: 0.5 if rho > 1e-4 else 0.1, Search("c", 0.25, trainings=4))
    assert share == 0.1 and rho < 1e-4


@pytest.mark.parametrize("arg", [None, "quick", "runlocal"])
def test_a_chain_leads_from_nothing_to_gates_of_a_wanted_share(arg):
    chain, _ = load_chain(f"configs/shapes/lazy_chain.py{f':{arg}' if arg else ''}", ["rho.share=0.2"])
    base, search, gates = chain.stages
    assert build(Search, search.options).share == 0.2
    paths = ["base=/runs/dit", "rho_attention=0.01", "rho_ffn=0.01"]
    of_base, of_gates = load_experiment(base.config).recipe, load_experiment(gates.config, paths).recipe
    assert {*gates.earlier, *gates.filled} == {path.partition("=")[0] for path in paths}
    assert of_gates.network == of_base.network and of_gates.inputs == of_base.inputs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two updates."""
    workdir = tmp_path_factory.mktemp("base")
    changes = ("train_steps=2", "checkpoint.every_steps=2", *SMALL)
    Experiment(load_experiment("configs/shapes/lazy_base.py:runlocal", changes), workdir).train()
    return epath.Path(workdir)


def test_gates_are_trained_for_each_price_and_none_twice(base, tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path)
    options = {"config": CONFIG, "share": 0.3, "low": 1.0, "high": 100.0, "trainings": 1}
    found = find({"base": base}, workdir, options)
    assert found == {"rho": pytest.approx(10), "share": 0.5}  # where running costs that much, all is skipped
    recorded = json.loads((workdir / "rho_10" / "config.json").read_text())
    assert recorded["rho_attention"] == recorded["rho_ffn"] == pytest.approx(10)
    monkeypatch.setattr(lazy_rho, "Experiment", None)  # which a finished item does not need
    assert find({"base": base}, workdir, options) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": CONFIG, "share": 0.7}, "at most 0.5"),
        ({"config": CONFIG, "share": 0.3, "low": 1.0, "high": 0.1}, "must exceed"),
        ({"config": CONFIG, "share": 0.3, "trials": 3}, "trials"),
        ({"config": "configs/shapes/lazy_base.py:runlocal", "share": 0.3}, "rho_attention"),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_anything_is_trained(base, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        find({"base": base}, epath.Path(tmp_path), options)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
