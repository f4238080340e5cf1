"""Stages of a chain that run commands."""

import json

import pytest
from etils import epath

from snapgen_jax import cli
from snapgen_jax.chain_command import run
from snapgen_jax.training.exits import ConfigError, PreemptedError


@pytest.fixture
def commands(monkeypatch):
    """What was run; a command writes `--out`, and ends as `codes` says of it."""
    told = type("Told", (), {"ran": [], "codes": {}})()

    def main(words):
        told.ran.append(list(words))
        code = told.codes.get(words[0], 0)
        for word in words:
            if word.startswith("--out=") and not code:
                path = epath.Path(word.removeprefix("--out="))
                assert not path.exists(), "it wants a folder that is not there"
                path.mkdir(parents=True)
        return code

    monkeypatch.setattr(cli, "main", main)
    return told


def test_commands_run_in_order_with_their_folders_and_what_they_left_is_named(commands, tmp_path):
    here = tmp_path / "stage"
    options = {"commands": ["count --path={photos} --out={here}/a", "plan '--out={here}/b c'"]}
    made = run({"photos": epath.Path("/photos")}, epath.Path(here), options)
    assert commands.ran == [["count", "--path=/photos", f"--out={here}/a"], ["plan", f"--out={here}/b c"]]
    assert made == {"a": f"{here}/a", "b c": f"{here}/b c"}


def test_a_stopped_stage_goes_on_with_the_command_that_had_not_ended(commands, tmp_path):
    options = {"commands": ["count --out={here}/a", "plan --of={here}/a --out={here}/b"], "fresh": ["a", "b"]}
    commands.codes["plan"] = 75
    with pytest.raises(PreemptedError, match="stopped in `snapgen plan"):
        run({}, epath.Path(tmp_path), options)
    (tmp_path / "b").mkdir()
    commands.codes.clear()
    run({}, epath.Path(tmp_path), options)
    assert [words[0] for words in commands.ran] == ["count", "plan", "plan"]
    assert (tmp_path / "a").exists()


def test_a_command_that_is_refused_ends_the_stage(commands, tmp_path):
    commands.codes["plan"] = 78
    with pytest.raises(ConfigError, match="`snapgen plan` ended with 78"):
        run({}, epath.Path(tmp_path), {"commands": ["plan"]})


def test_python_runs_a_file_in_a_process_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, sys; json.dump(sys.argv[1:], open(sys.argv[2], 'w'))")
    out = tmp_path / "out"
    run({}, epath.Path(out), {"commands": [f"python {script} x {{here}}/y.json"]})
    assert json.loads((out / "y.json").read_text()) == ["x", f"{out}/y.json"]


def test_an_unknown_place_or_option_is_named(commands, tmp_path):
    with pytest.raises(ConfigError, match=r"\{photo\}.*it may name \{photos\}, \{here\}"):
        run({"photos": epath.Path("/photos")}, epath.Path(tmp_path), {"commands": ["count --path={photo}"]})
    with pytest.raises(ConfigError, match="no option command; it has commands and fresh"):
        run({}, epath.Path(tmp_path), {"command": ["count"], "commands": []})
    assert commands.ran == []
