"""A chain of runs: what it refuses before it trains, and that a chain that was stopped goes on where it was."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from snapgen_jax import chain as chains
from snapgen_jax import quickstart
from snapgen_jax.chain import ChainConfig, RowConfig, StageConfig, changes, load_chain, run_chain, table, with_earlier
from snapgen_jax.config import build, load_config, recipe_class, to_json
from snapgen_jax.quickstart import Stages
from snapgen_jax.training.exits import ConfigError, PreemptedError

pytestmark = pytest.mark.usefixtures("quick_to_compile")
SHAPES = pathlib.Path(__file__).parents[1] / "configs" / "shapes"


@pytest.mark.parametrize("arg", ["", ":quick", ":runlocal"])
def test_every_stage_of_the_shapes_chain_has_a_config_that_takes_the_workdirs_before_it(arg):
    chain, overrides = load_chain(f"{SHAPES}/chain.py{arg}", ["student.train_steps=7"])
    assert overrides["student"] == ["train_steps=7"]
    for stage in chain.stages:
        earlier = [f"{key}=/runs/{name}" for key, name in stage.earlier.items()]
        config = load_config(stage.config, earlier)
        assert '"runs/' not in json.dumps(config.to_dict()), "every workdir of another run is that of a stage before"
        cls = recipe_class(config.recipe)
        cls(build(cls.Config, config), "cpu")  # its networks fit each other


def test_what_is_not_in_the_chain_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="no stage 'studnet'; did you mean 'student'"):
        load_chain(f"{SHAPES}/chain.py", ["studnet.train_steps=7"])
    bad = tmp_path / "bad.py"
    stages = [{"name": "b", "config": "b.py", "earlier": {"init_from": "a"}}, {"name": "a", "config": "a.py"}]
    bad.write_text(f"def get_config(arg=None):\n    return {{'stages': {stages!r}}}\n")
    with pytest.raises(ConfigError, match="stage 'b' starts from a"):
        load_chain(str(bad))
    rows = [{"label": "phone", "decoder": "tiny"}]
    bad.write_text(
        f"def get_config(arg=None):\n    return {{'stages': [{{'name': 'a', 'config': 'a.py', 'rows': {rows!r}}}]}}\n"
    )
    with pytest.raises(ConfigError, match="stage 'a' starts from tiny"):
        load_chain(str(bad))
    with pytest.raises(ConfigError, match="snapgen chain"):
        load_config(f"{SHAPES}/chain.py")


def test_the_table_sets_a_row_beside_the_one_it_is_to_better():
    rows = (RowConfig("student"), RowConfig("distilled", against="student"))
    chain = ChainConfig(stages=(StageConfig("x", rows=rows),))
    numbers = {
        "student": {"params": 1000, "score.overall": 0.5},
        "distilled": {"params": 1000, "score.overall": 0.625},
    }
    text = table(chain, numbers)
    assert "| distilled, against student | 1,000      | 0.625 (+0.125) |" in text


@pytest.mark.slow
def test_two_stages_train_score_and_are_done_again_only_where_they_changed(tmp_path, monkeypatch, capsys):
    chain, overrides = load_chain(f"{SHAPES}/chain.py:runlocal", ["student.sampling.steps=1"])
    first = dataclasses.replace(chain, stages=(chain.stages[0], chain.stages[2]), examples=2)
    rows = run_chain(first, overrides, tmp_path)
    assert set(rows) == {"clip", "student"} and rows["student"]["images_seen"] == 6 * 8
    assert 0 <= rows["clip"]["validation_loss.accuracy"] <= 1 and "frechet.distance" in rows["student"]
    assert -1 <= rows["student"]["clip.score"] <= 1
    assert (tmp_path / "student" / "tokenizer.json").read_bytes() == (tmp_path / "clip" / "tokenizer.json").read_bytes()
    assert "student" in (tmp_path / "chain.md").read_text()

    def never(*args, **options):
        raise AssertionError(f"done anew: {args[-1]}")

    with monkeypatch.context() as patched:
        patched.setattr(chains, "Experiment", never)
        patched.setattr(chains.experiments, "evaluate", never)
        assert run_chain(first, overrides, tmp_path) == rows
        shutil.move(tmp_path / "clip", tmp_path / "kept")
        assert run_chain(first, overrides, tmp_path) == rows, "nothing needs its folder"
        changed = {"student": [*overrides["student"], "optimizer.learning_rate=0.1"]}
        for _ in range(2):  # the second time as after a stop, when the folder is there again
            with pytest.raises(AssertionError, match=f"done anew: {tmp_path}/clip"):
                run_chain(first, changed, tmp_path)
        shutil.rmtree(tmp_path / "clip")
        shutil.move(tmp_path / "kept", tmp_path / "clip")

    new = run_chain(first, changed, tmp_path)  # CLIP, which does not start from the student, is as it was
    loss = "validation_loss.mean"
    assert new["clip"] == rows["clip"] and new["student"][loss] != rows["student"][loss]
    assert "student.optimizer.learning_rate was" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"clip", "student", "student.1"}


def test_a_stage_goes_on_with_what_learns_the_same_and_with_nothing_else(tmp_path):
    chain, _ = load_chain(f"{SHAPES}/chain.py:runlocal")

    def configs(folder, *changed, of="clip"):
        return {
            stage.name: load_config(
                stage.config,
                [
                    *(f"{key}={folder}/{name}" for key, name in stage.earlier.items()),
                    *(changed if stage.name == of else ()),
                ],
            )
            for stage in chain.stages
        }

    began = {name: to_json(config) for name, config in configs("/runs").items()}

    def changed(name, now):
        return changes(chain, name, began, now)

    assert changed("student", configs("/moved", "log_every_steps=3", "checkpoint.keep_every_steps=3")) == ""
    assert changed("student", configs("/runs", "train_steps=7")) == "clip.train_steps was 6, is now 7"
    assert changed("teacher", configs("/runs", "train_steps=7", of="student")) == ""


def test_a_part_is_done_anew_when_what_it_depends_on_has_changed_and_the_others_are_not(tmp_path):
    def parts_done(teacher):
        done = []
        stages = Stages(tmp_path / "chain.json")
        for name, config in (("clip", {"steps": 1}), ("teacher", {"steps": teacher})):
            assert stages.run(name, config, lambda name=name: done.append(name) or {"n": 1.0}) == {"n": 1.0}
        return done

    assert [parts_done(2), parts_done(2), parts_done(3)] == [["clip", "teacher"], [], ["teacher"]]


def test_the_minutes_of_a_part_that_was_stopped_count(tmp_path, monkeypatch):
    now = iter([0.0, 60.0, 100.0, 160.0, 220.0])
    monkeypatch.setattr(quickstart.time, "monotonic", lambda: next(now))

    def stopped():
        raise PreemptedError("SIGTERM")

    with pytest.raises(PreemptedError):
        Stages(tmp_path / "chain.json").run("teacher", {}, stopped)
    stages = Stages(tmp_path / "chain.json")
    assert stages.run("teacher", {}, lambda: {"n": 1.0}) == {"n": 1.0}
    assert stages.minutes() == 3.0


def test_a_stage_depends_on_all_that_it_starts_from():
    stages = (
        StageConfig("autoencoder"),
        StageConfig("tiny", earlier={"codec.workdir": "autoencoder"}),
        StageConfig("clip"),
        StageConfig("teacher", earlier={"text_workdir": "clip", "codec.workdir": "autoencoder"}),
        StageConfig("student", earlier={"teacher.workdir": "teacher"}),
    )
    chain = ChainConfig(stages=stages)
    assert with_earlier(chain, "student") == ["student", "teacher", "clip", "autoencoder"]
    assert with_earlier(chain, "clip") == ["clip"]
    assert with_earlier(chain, "") == []
