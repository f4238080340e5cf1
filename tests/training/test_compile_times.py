"""A run says what it compiles, how long that took the last time in this workdir, and how long it took now."""

import json
import re
from typing import Any

import jax
import pytest
from etils import epath

from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training.checkpoint import CheckpointConfig
from snapgen_jax.training.compile_times import CompileTimes
from snapgen_jax.training.loop import LoopConfig, train
from tests.recipes_for_tests import Sequences, TwoPlayers


def run(workdir, steps, **options):
    config = LoopConfig(train_steps=steps, tensorboard=False, checkpoint=CheckpointConfig(every_steps=100))
    recipe: Any = TwoPlayers()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return train(recipe, Sequences(recipe), config, workdir=workdir, mesh=mesh, **options)


def test_a_run_and_its_resume_say_what_they_compile_and_for_how_long(tmp_path, capsys):
    path = tmp_path / "metrics" / "compile.json"
    run(tmp_path, 2)
    said = capsys.readouterr().out
    buckets = list(TwoPlayers().batch_specs())
    for bucket in buckets:
        assert re.search(rf"compiling the step of bucket '{bucket}' \.\.\.\ncompiled .* '{bucket}' in \d+s\n", said)
    kept = json.loads(path.read_text())
    assert list(kept) == buckets and all(0 < seconds < 600 for seconds in kept.values())

    path.write_text(json.dumps(dict.fromkeys(kept, 252.4)))
    run(tmp_path, 4)
    assert f"compiling the step of bucket '{buckets[0]}' (4m12s last time) ..." in capsys.readouterr().out
    assert json.loads(path.read_text())[buckets[0]] < 252

    before = path.read_bytes()
    run(tmp_path, 4)  # finished: nothing is compiled
    assert "compiling" not in capsys.readouterr().out and path.read_bytes() == before


def test_a_quiet_run_and_one_in_memory_keep_silent(capsys):
    run(None, 1, quiet=True)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "long"}'])
def test_a_damaged_file_is_no_reason_to_stop(text, tmp_path):
    (tmp_path / "compile.json").write_text(text)
    said = []
    with CompileTimes(epath.Path(tmp_path) / "compile.json").timed("a", said.append):
        pass
    assert said == ["compiling the step of bucket 'a' ...", "compiled the step of bucket 'a' in 0s"]
    assert list(json.loads((tmp_path / "compile.json").read_text())) == ["a"]
