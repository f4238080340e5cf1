"""Traces of chosen updates, and the line that tells how well the device is used."""

import pytest

from snapgen_jax.parallel.chips import Chip, Roofline
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.loop import LoopConfig, train
from snapgen_jax.training.progress import Reporter
from tests.recipes_for_tests import Sequences, TwoPlayers

CHIP = Chip("made up", 100e12, 10e9, 1e12, 100e9, 1, ("Made Up",), "https://example.org")


def test_the_updates_asked_for_are_traced(tmp_path, capsys):
    recipe = TwoPlayers()
    config = LoopConfig(train_steps=6, log_every_steps=2, profile_steps="2:4", tensorboard=False)
    train(recipe, Sequences(recipe), config, workdir=tmp_path)
    assert len(list((tmp_path / "profiles").rglob("*.xplane.pb"))) == 1
    assert "trace of updates 2 to 3" in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["100", "5:5", "0:3", "a:b"])
def test_what_is_no_range_of_steps_is_refused(steps, tmp_path):
    recipe = TwoPlayers()
    with pytest.raises(ConfigError, match="100:110 say"):
        train(recipe, Sequences(recipe), LoopConfig(profile_steps=steps), workdir=tmp_path)


def test_a_trace_needs_a_place_to_go():
    recipe = TwoPlayers()
    with pytest.raises(ConfigError, match="needs a workdir"):
        train(recipe, Sequences(recipe), LoopConfig(profile_steps="2:4"))


def test_the_progress_line_states_use_and_its_denominator(capsys):
    reporter, roofline = Reporter(10, 0, quiet=False), Roofline(CHIP, 20e12, 0.4e12)
    reporter.peaks([roofline])
    stated = capsys.readouterr().out
    assert "100 TFLOP/s (dense bfloat16, one made up chip)" in stated
    assert "1000 GB/s" in stated
    assert "bound by hbm" in stated
    for _ in range(2):
        reporter.count(4, roofline)
    line, perf = reporter.interval(2, {}, {"step": 1.5, "data": 0.5}, -1)
    assert perf["mfu"] == pytest.approx(2 * 0.2 / 2.0)
    assert perf["roofline_share"] == pytest.approx(2 * 0.4 / 2.0)
    assert "MFU 20% roof 40%" in line


def test_devices_without_known_peaks_say_nothing_of_use(capsys):
    reporter = Reporter(10, 0, quiet=False)
    reporter.peaks([None])
    reporter.count(4, None)
    assert "MFU" not in capsys.readouterr().out + reporter.interval(1, {}, {"step": 1.0, "data": 0.0}, -1)[0]
