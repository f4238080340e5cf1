"""A chain of runs: what it refuses before it trains, that a chain that was stopped goes on, and stages that derive."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import types

import pytest

from snapgen_jax import chain_run
from snapgen_jax.chain import ChainConfig, RowConfig, StageConfig, load_chain, with_earlier
from snapgen_jax.chain_derive import check_like
from snapgen_jax.chain_run import changes, run_chain
from snapgen_jax.chain_table import table
from snapgen_jax.config import build, load_config, recipe_class, to_json
from snapgen_jax.training.exits import ConfigError
from tests import derive_for_tests

pytestmark = pytest.mark.usefixtures("quick_to_compile")
SHAPES = pathlib.Path(__file__).parents[1] / "configs" / "shapes"


def stage_folders(folder):
    """Names of the folders beside a chain's config, whose bytecode Python may keep there."""
    return {path.name for path in folder.iterdir() if path.is_dir()} - {"__pycache__"}


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
    with pytest.raises(ConfigError, match="describes no chain, for it has no stages; train"):
        load_chain(f"{SHAPES}/student.py")
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


@pytest.mark.parametrize(
    ("override", "key", "source"),
    [
        ("init_from=/runs/other", "init_from", "the workdir of a"),
        ("network.depth=2", "network.depth", "search.depth"),
        ("network.depth.x=2", "network.depth", "search.depth"),
        ("network={'depth': 2}", "network.depth", "search.depth"),
    ],
)
def test_an_override_of_what_the_chain_fills_in_is_refused_with_both(override, key, source, tmp_path):
    search = {"name": "search", "derive": "tests.derive_for_tests:count", "example": {"depth": 2}}
    filled = {"earlier": {"init_from": "a"}, "filled": {"network.depth": "search.depth"}}
    stages = [{"name": "a", "config": "a.py"}, search, {"name": "b", "config": "b.py", **filled}]
    said = f"--config.b.{override}: the chain fills {key!r} of stage 'b' with {source}; leave the override out"
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(tmp_path, *stages, overrides=[f"b.{override}"])
    others = ["network.width=3", "train_steps=2", "init=1"]
    assert load(tmp_path, *stages, overrides=[f"b.{other}" for other in others])[1]["b"] == others


def test_the_table_sets_a_row_beside_the_one_it_is_to_better():
    rows = (RowConfig("student"), RowConfig("distilled", against="student"))
    chain = ChainConfig(stages=(StageConfig("x", rows=rows),))
    numbers = {
        "student": {"params": 1000, "score.chance": 0.066, "score.overall": 0.5},
        "distilled": {"params": 1000, "score.chance": 0.066, "score.overall": 0.625},
    }
    text = table(chain, numbers)
    assert "| distilled, against student | 1,000      | 0.066  | 0.625 (+0.125) |" in text


@pytest.mark.parametrize("arg", ["", ":quick", ":runlocal"])
def test_what_a_teacher_adds_is_seen_beside_as_many_updates_without_one(arg):
    """Both start from the student, see as many images, and differ in the recipe and what belongs to it alone."""
    chain, _ = load_chain(f"{SHAPES}/chain.py{arg}")
    stages = {stage.name: stage for stage in chain.stages}
    (row,) = stages["student_further"].rows
    distilled = next(row for row in stages["student_distilled"].rows if row.label == "distilled")
    assert distilled.against == row.label
    taught, alone = (
        load_config(stage.config, [f"{key}=/runs/{name}" for key, name in stage.earlier.items()]).to_dict()
        for stage in (stages["student_distilled"], stages["student_further"])
    )
    assert alone["init_from"] == taught["init_from"] == "/runs/student"
    assert {key for key in alone if alone[key] != taught[key]} == {"recipe"}


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
        patched.setattr(chain_run, "Experiment", never)
        patched.setattr(chain_run, "evaluate", never)
        assert run_chain(first, overrides, tmp_path) == rows
        shutil.move(tmp_path / "clip", tmp_path / "kept")
        assert run_chain(first, overrides, tmp_path) == rows, "nothing needs its folder"
        changed = {"student": [*overrides["student"], "optimizer.learning_rate=0.1"]}
        with pytest.raises(AssertionError, match=f"done anew: {tmp_path}/clip"):
            run_chain(first, changed, tmp_path)
        assert not (tmp_path / "clip").exists(), "nothing is written before a run may begin"
        (tmp_path / "clip").mkdir()  # as after a stop
        with pytest.raises(AssertionError, match=f"done anew: {tmp_path}/clip"):
            run_chain(first, changed, tmp_path)
        shutil.rmtree(tmp_path / "clip")
        shutil.move(tmp_path / "kept", tmp_path / "clip")

    new = run_chain(first, changed, tmp_path)  # CLIP, which does not start from the student, is as it was
    loss = "validation_loss.mean"
    assert new["clip"] == rows["clip"] and new["student"][loss] != rows["student"][loss]
    assert "student.optimizer.learning_rate was" in capsys.readouterr().out
    assert stage_folders(tmp_path) == {"clip", "student", "student.1"}


def test_a_stage_goes_on_with_what_learns_the_same_and_with_nothing_else(tmp_path):
    chain, _ = load_chain(f"{SHAPES}/chain.py:runlocal")

    def configs(folder, *changed, of="clip"):
        return {
            stage.name: to_json(
                load_config(
                    stage.config,
                    [
                        *(f"{key}={folder}/{name}" for key, name in stage.earlier.items()),
                        *(changed if stage.name == of else ()),
                    ],
                )
            )
            for stage in chain.stages
        }

    began = configs("/runs")

    def changed(name, now):
        return changes(chain, name, began, now)

    assert changed("student", configs("/moved", "log_every_steps=3", "checkpoint.keep_every_steps=3")) == ""
    assert changed("teacher", configs("/runs", "network.attention=whole", of="teacher")) == "", (
        "all kernels learn alike"
    )
    assert changed("student", configs("/runs", "train_steps=7")) == "clip.train_steps was 6, is now 7"
    assert changed("teacher", configs("/runs", "train_steps=7", of="student")) == ""


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


def test_a_stage_depends_on_what_it_takes_values_of():
    search = StageConfig("search", derive="m:f", earlier={"teacher": "teacher"})
    student = StageConfig("student", config="s.py", filled={"network.depth": "search.a.depth"})
    chain = ChainConfig(stages=(StageConfig("teacher", config="t.py"), search, student))
    assert student.sources() == {"network.depth": ("search", "a.depth")}
    assert with_earlier(chain, "student") == ["student", "search", "teacher"]


CLIP = f"{SHAPES}/clip.py:runlocal"
COUNT = {
    "name": "search",
    "derive": "tests.derive_for_tests:count",
    "earlier": {"text": "clip"},
    "options": {"rounds": ("one", "three")},
    "example": {"schedule": {"steps": 5}},
}
FILLED = {"name": "student", "config": CLIP, "filled": {"train_steps": "search.schedule.steps"}}
LAST = {"name": "last", "config": CLIP, "earlier": {"init_from": "student"}}


def load(folder, *stages, overrides=()):
    file = folder / "chain.py"
    file.write_text(f"def get_config(arg=None):\n    return {{'stages': {list(stages)!r}}}\n")
    return load_chain(str(file), overrides)


@pytest.fixture
def trained(monkeypatch):
    """Runs that train at once and learn nothing; the list of them, as (stage, steps)."""
    runs = []

    class Quick:
        def __init__(self, resolved, workdir):
            self.config, self.workdir = resolved.experiment, workdir

        def check(self):
            pass

        def train(self, accepted=lambda: None):
            accepted()
            runs.append((self.workdir.name, self.config.train_steps))
            return types.SimpleNamespace(
                step=self.config.train_steps, players={"model": types.SimpleNamespace(params={})}
            )

    monkeypatch.setattr(chain_run, "Experiment", Quick)
    for name in ("calls", "stop_before"):
        monkeypatch.setattr(derive_for_tests, name, [])
    monkeypatch.setattr(derive_for_tests, "result", {})
    return runs


def test_what_a_stage_derives_fills_the_config_of_a_later_one(tmp_path, trained):
    chain, overrides = load(tmp_path, {"name": "clip", "config": CLIP}, COUNT, FILLED)
    rows = run_chain(chain, overrides, tmp_path)
    assert trained == [("clip", 6), ("student", 8)] and set(rows) == {"clip", "student"}
    assert json.loads((tmp_path / "search" / "derived.json").read_text()) == {
        "schedule": {"steps": 8, "started_from": ["text"]}
    }
    assert run_chain(chain, overrides, tmp_path) == rows and len(trained) == 2
    shutil.rmtree(tmp_path / "search")
    assert run_chain(chain, overrides, tmp_path) == rows and len(trained) == 2, "nothing needs its folder"
    assert derive_for_tests.calls == ["one", "three"]


def test_a_stage_that_derives_and_was_stopped_repeats_no_finished_item(tmp_path, trained):
    chain, overrides = load(tmp_path, {"name": "clip", "config": CLIP}, COUNT, FILLED)
    derive_for_tests.stop_before.append("three")
    with pytest.raises(KeyboardInterrupt):
        run_chain(chain, overrides, tmp_path)
    assert not (tmp_path / "search" / "derived.json").exists() and trained == [("clip", 6)]
    derive_for_tests.stop_before.clear()
    run_chain(chain, overrides, tmp_path)
    assert derive_for_tests.calls == ["one", "three"] and trained == [("clip", 6), ("student", 8)]


def test_other_options_derive_beside_and_what_comes_after_is_trained_beside(tmp_path, trained, capsys):
    stages = {"name": "clip", "config": CLIP}, COUNT, FILLED, LAST
    run_chain(*load(tmp_path, *stages), tmp_path)
    run_chain(*load(tmp_path, *stages, overrides=["search.rounds=('one',)"]), tmp_path)
    assert trained == [("clip", 6), ("student", 8), ("last", 6), ("student", 3), ("last", 6)]
    assert stage_folders(tmp_path) == {"clip", "search", "search.1", "student", "student.1", "last", "last.1"}
    assert json.loads((tmp_path / "search.1" / "derived.json").read_text())["schedule"]["steps"] == 8
    said = capsys.readouterr().out
    assert "search is derived anew (search.options.rounds was ['one', 'three'], is now ['one'])" in said
    assert "student.train_steps was 8, is now 3" in said


def test_another_derived_result_trains_what_comes_after_it_anew(tmp_path, trained, capsys):
    chain, overrides = load(tmp_path, {"name": "clip", "config": CLIP}, COUNT, FILLED, LAST)
    run_chain(chain, overrides, tmp_path)
    derived = tmp_path / "search" / "derived.json"
    derived.write_text(json.dumps({**json.loads(derived.read_text()), "more": 1}))  # of no config, and yet what it is
    run_chain(chain, overrides, tmp_path)
    assert trained == [("clip", 6), ("student", 8), ("last", 6), ("student", 8), ("last", 6)]
    assert "last is trained anew (search.derived.more was None, is now 1)" in capsys.readouterr().out
    derived.unlink()
    run_chain(chain, overrides, tmp_path)
    assert trained[5:] == [("student", 8), ("last", 6)] and derive_for_tests.calls == ["one", "three"]


def test_a_result_unlike_the_example_is_refused_and_nothing_of_it_is_kept(tmp_path, trained):
    stages = {"name": "clip", "config": CLIP}, COUNT, FILLED
    derive_for_tests.result["schedule"] = {"steps": "eight"}
    with pytest.raises(ConfigError, match=r"'search' .*derived 'eight' \(str\) as 'schedule.steps'.* has 5 \(int\)"):
        run_chain(*load(tmp_path, *stages), tmp_path)
    derive_for_tests.result["schedule"] = {"speed": 1}
    with pytest.raises(ConfigError, match=r"\(tests.derive_for_tests:count\) derived no 'schedule.steps'"):
        run_chain(*load(tmp_path, *stages), tmp_path)
    derive_for_tests.result["schedule"] = {"steps": float("nan")}
    with pytest.raises(ConfigError, match="is not JSON"):
        run_chain(*load(tmp_path, *stages), tmp_path)
    assert not (tmp_path / "search" / "derived.json").exists()
    del derive_for_tests.result["schedule"]
    run_chain(*load(tmp_path, *stages), tmp_path)
    assert derive_for_tests.calls == ["one", "three"] and trained == [("clip", 6), ("student", 8)]
    other = {**COUNT, "example": {"schedule": {"steps": 5, "batch": 2}}}
    with pytest.raises(ConfigError, match=r"derived no 'schedule.batch'.*delete .*search/derived.json"):
        run_chain(*load(tmp_path, stages[0], other, FILLED), tmp_path)


@pytest.mark.parametrize(
    ("search", "student", "message"),
    [
        ({"derive": "tests.derive_for_tests"}, {}, r'no name of a function; write "module.path:function"'),
        ({"derive": "print(1):f"}, {}, "no name of a function"),
        ({"derive": "tests.derive_for_test:count"}, {}, "cannot be imported: No module named 'tests.derive_for_test'"),
        ({"derive": "tests.derive_for_tests:coutn"}, {}, "has no function 'coutn'; did you mean 'count'"),
        ({"derive": "tests.derive_for_tests:not_a_function"}, {}, "has no function 'not_a_function'"),
        ({"derive": "tests.derive_for_tests:of_two"}, {}, r"must take \(stages, workdir, options\): too many"),
        ({"config": CLIP}, {}, "'search' has config=.* and derive=.*; give it one of the two"),
        ({"derive": ""}, {}, "'search' has config='' and derive=''"),
        ({"rows": ({"label": "x"},)}, {}, "'search' derives, and rows is for a stage that is a run"),
        ({}, {"options": {"a": 1}}, "'student' is a run, and options is for a stage that derives"),
        ({"earlier": {"text": "student"}}, {}, "'search' starts from student; before it there are clip"),
        ({}, {"filled": {"train_steps": "clip.steps"}}, "fills 'train_steps' from 'clip', which is a run"),
        (
            {},
            {"filled": {"seed": "search.schedule.step"}},
            "search.schedule.step.* has no 'step'; did you mean 'steps'",
        ),
        ({}, {"filled": {"seed": "search.schedule.steps.x"}}, "no 'x' in 5"),
        ({}, {"earlier": {"train_steps": "clip"}}, "train_steps is in `earlier` and in `filled`"),
        ({}, {"rows": ({"label": "x", "decoder": "search"},)}, "the decoder of search, which derives"),
        ({"name": "clip"}, {}, "two stages are called 'clip'"),
        ({"example": {"schedule": {"steps": {1}}}}, {}, "the example of stage 'search' is not JSON"),
    ],
)
def test_a_stage_that_cannot_derive_or_be_filled_is_refused_when_the_chain_is_read(tmp_path, search, student, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {"name": "clip", "config": CLIP}, {**COUNT, **search}, {**FILLED, **student})


def test_a_config_that_refuses_the_example_is_refused_before_anything_is_trained(tmp_path, trained):
    student = {**FILLED, "filled": {"text.heads": "search.schedule"}}
    chain, overrides = load(tmp_path, {"name": "clip", "config": CLIP}, COUNT, student)
    with pytest.raises(
        ConfigError, match=r"stage 'student', filled with text.heads=\{'steps': 5\} \(search.schedule\)"
    ):
        run_chain(chain, overrides, tmp_path)
    assert trained == [] and derive_for_tests.calls == []


def test_a_config_that_refuses_what_was_derived_is_refused_with_what_it_was_filled_with(tmp_path, trained):
    search = {**COUNT, "example": {"curve": "cosine"}}
    student = {**FILLED, "filled": {"optimizer.schedule": "search.curve"}}
    chain, overrides = load(tmp_path, {"name": "clip", "config": CLIP}, search, student)
    derive_for_tests.result["curve"] = "cosin"
    with pytest.raises(
        ConfigError, match=r"'student', filled with optimizer.schedule='cosin' \(search.curve\): .*choose"
    ):
        run_chain(chain, overrides, tmp_path)
    assert trained == [("clip", 6)]


@pytest.mark.parametrize(
    ("example", "value", "error"),
    [
        ({"a": [1, "x"]}, {"a": [2, "y", "z"], "more": None}, ""),
        ({"a": []}, {"a": [None, 1]}, ""),
        ({"a": 0.5}, {"a": 1}, ""),
        ({"a": 1}, {"a": 0.5}, r"0.5 \(float\) as 'a', and the example has 1 \(int\)"),
        ({"a": 1}, {"a": True}, r"True \(bool\) as 'a'"),
        ({"a": [{"b": 1}]}, {"a": [{"b": 1}, {}]}, r"no 'a\[1\].b'"),
        ({}, [1], r"\[1\] \(list\) as its result"),
    ],
)
def test_a_result_is_like_its_example_in_keys_and_types(example, value, error):
    with pytest.raises(ConfigError, match=error) if error else contextlib.nullcontext():
        check_like(example, value, "stage 'search'")


def test_an_override_reaches_an_option_of_a_stage_that_derives(tmp_path):
    stages = {"name": "clip", "config": CLIP}, COUNT
    chain, overrides = load(tmp_path, *stages, overrides=["search.rounds=('two',)", "clip.train_steps=7"])
    assert chain.stages[1].options == {"rounds": ["two"]} and overrides == {"clip": ["train_steps=7"]}
    with pytest.raises(ConfigError, match="stage 'search' has no option 'round'; did you mean 'rounds'"):
        load(tmp_path, *stages, overrides=["search.round=1"])


@pytest.mark.slow
def test_a_stage_trains_through_the_loop_and_its_result_shapes_the_next_run(tmp_path):
    search = {
        "name": "search",
        "derive": "tests.derive_for_tests:shortest",
        "earlier": {"from": "clip"},
        "options": {"config": CLIP, "steps": (3, 2)},
        "example": {"steps": 1},
    }
    filled = {"name": "student", "config": CLIP, "filled": {"train_steps": "search.steps"}}
    rows = run_chain(*load(tmp_path, {"name": "clip", "config": CLIP}, search, filled), tmp_path)
    assert rows["clip"]["images_seen"] == 6 * 8 and rows["student"]["images_seen"] == 2 * 8
    names = [json.loads(line)["name"] for line in (tmp_path / "search" / "items.jsonl").read_text().splitlines()]
    assert names == ["train 3", "train 2"] and (tmp_path / "search" / "steps_3" / "checkpoints").exists()
