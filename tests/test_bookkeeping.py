"""What is done is on record: parts of a chain or of the quickstart, and items of a stage that derives."""

import pytest

from snapgen_jax import bookkeeping
from snapgen_jax.bookkeeping import Items, Stages
from snapgen_jax.training.exits import ConfigError, PreemptedError


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
    monkeypatch.setattr(bookkeeping.time, "monotonic", lambda: next(now))

    def stopped():
        raise PreemptedError("SIGTERM")

    with pytest.raises(PreemptedError):
        Stages(tmp_path / "chain.json").run("teacher", {}, stopped)
    stages = Stages(tmp_path / "chain.json")
    assert stages.run("teacher", {}, lambda: {"n": 1.0}) == {"n": 1.0}
    assert stages.minutes() == 3.0


def test_a_finished_item_is_not_done_again_and_its_value_is_what_json_has(tmp_path):
    first = Items(tmp_path)
    assert first.run("a", lambda: {"depths": (1, 2)}) == {"depths": [1, 2]} and first.run("b", lambda: None) is None
    again = Items(tmp_path)
    assert again.names == ("a", "b")
    assert again.run("a", lambda: pytest.fail("done again")) == {"depths": [1, 2]}
    assert again.run("b", lambda: pytest.fail("done again")) is None


def test_an_item_that_fails_is_not_finished_and_those_before_it_are(tmp_path):
    def stopped():
        raise PreemptedError("SIGTERM")

    items = Items(tmp_path / "new")
    items.run("a", lambda: 1)
    with pytest.raises(PreemptedError):
        items.run("b", stopped)
    with pytest.raises(ConfigError, match="item 'b' is not JSON"):
        items.run("b", lambda: float("nan"))
    assert Items(tmp_path / "new").names == ("a",)


def test_a_last_line_that_was_cut_is_dropped_and_its_item_is_done_again(tmp_path):
    items = Items(tmp_path)
    for name in ("a", "b"):
        items.run(name, lambda: 1)
    file = tmp_path / "items.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-3])
    again = Items(tmp_path)
    assert again.names == ("a",) and again.run("b", lambda: 1) == 1
    assert file.read_text() == whole


def test_a_whole_line_that_is_no_item_is_refused_with_its_number(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"name": "a", "value": 1}\n{"name": "b"}\n')
    with pytest.raises(ConfigError, match=r"items.jsonl, line 2 is not an item: KeyError\('value'\)"):
        Items(tmp_path)
