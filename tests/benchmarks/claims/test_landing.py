"""Finished seeds are files, read as rows, and joined with those of other machines."""

import dataclasses

import pytest

from benchmarks.claims import landing
from benchmarks.claims.landing import Landed, groups, join, read_all
from tests.benchmarks.claims.rows import SMALL, landed


def write(out, *files, budget="night"):
    for one in files:
        one.write(out / "small" / budget)
    return out


def test_a_file_is_read_as_it_was_written_and_has_a_line_a_field(tmp_path):
    one = landed("method", 2, **{"": 0.6, "few": 0.5, "blind": 0.1})
    one.write(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "method-2.json" and Landed.read(path) == one
    assert len(path.read_text().splitlines()) == len(dataclasses.fields(Landed)) + 2


@pytest.mark.parametrize("text", ["{", "{}", '{"trial": "alone", "colour": 1}'])
def test_a_file_that_is_none_of_these_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "alone-0.json").write_text(text)
    with pytest.raises(ValueError, match=r"alone-0\.json: .*must be a file that `python -m benchmarks\.claims` wrote"):
        read_all(tmp_path)


def test_a_file_under_the_name_of_another_is_refused(tmp_path):
    landed("alone", 0).write(tmp_path)
    (tmp_path / "alone-0.json").rename(tmp_path / "alone-1.json")
    with pytest.raises(ValueError, match=r"it holds alone-0\.json"):
        read_all(tmp_path)


def test_the_longest_budget_comes_first_and_folders_that_are_no_budgets_last(tmp_path):
    assert groups(tmp_path, "small") == []
    for budget in ("short", "earlier", "gpu", "another"):
        write(tmp_path, landed("alone"), budget=budget)
    assert groups(tmp_path, "small") == ["gpu", "short", "another", "earlier"]


def test_rows_have_the_seeds_that_are_there_and_what_all_seeds_share_stands_in_each():
    costs = Landed("costs", 0, {"alone": {"milliseconds": 2.5}}, "", "m", "c")
    files = [costs, landed("teacher"), landed("alone", 0), landed("alone", 2), landed("method", 0, few=0.4)]
    rows = landing.rows(files, SMALL)
    assert {name: sorted(seeds) for name, seeds in rows.items()} == {
        "alone": ["0", "2"],
        "method, few": ["0"],
        "teacher": ["0", "2"],
    }
    assert all(one["milliseconds"] == 2.5 for one in rows["alone"].values()), "a measurement holds for every seed"
    assert "milliseconds" not in rows["teacher"]["0"]
    assert landing.rows([landed("teacher")], SMALL)["teacher"].keys() == {"0"}


def test_the_seeds_of_another_machine_count_as_further_ones(tmp_path):
    out = write(tmp_path / "here", landed("teacher", machine="m"), landed("alone", 0))
    other = write(tmp_path / "there", landed("teacher", machine="n"), landed("alone", 1, machine="n"))
    write(other, landed("alone", 2), budget="short")
    joined = join([other], out, [SMALL], "night")
    assert [one.file_name() for one in joined] == ["alone-1.json"]
    known = {one.file_name(): one.machine for one in read_all(out / "small" / "night")}
    assert known == {"alone-0.json": "m", "alone-1.json": "n", "teacher-0.json": "m"}, "one teacher, its own"
    assert not (out / "small" / "short").exists()


def test_what_cannot_be_joined_is_refused_with_the_reason_and_nothing_is_copied(tmp_path):
    out = write(tmp_path / "here", landed("alone", 0))
    with pytest.raises(ValueError, match=r"no results of the budget 'night'; there must be files in .*small/night"):
        join([tmp_path / "nothing"], out, [SMALL], "night")
    other = write(tmp_path / "there", landed("alone", 0), landed("method", 1))
    with pytest.raises(ValueError, match=r"the seed of alone-0\.json is known from .*here; leave it out"):
        join([other], out, [SMALL], "night")
    third, fourth = (write(tmp_path / name, landed("alone", 1)) for name in ("third", "fourth"))
    with pytest.raises(ValueError, match=r"fourth: the seed of alone-1\.json is known from .*third"):
        join([third, fourth], out, [SMALL], "night")
    longer = write(tmp_path / "longer", landed("alone", 1, updates=9_000))
    with pytest.raises(ValueError, match=r"alone-1\.json has 9000 updates, and this budget 4000"):
        join([longer], out, [SMALL], "night")
    assert [one.file_name() for one in read_all(out / "small" / "night")] == ["alone-0.json"]
