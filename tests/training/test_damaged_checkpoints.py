"""A damaged checkpoint is one error that names the step; the intact one before it is taken where that is asked for; and
no flipped bit changes a weight in silence."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training import fingerprint as fingerprint_module
from snapgen_jax.training import loop
from snapgen_jax.training.checkpoint import CheckpointConfig, Checkpointer, complete_steps
from snapgen_jax.training.exits import DamagedError, ExitCode
from snapgen_jax.training.fingerprint import fingerprint, seal
from snapgen_jax.training.loop import LoopConfig
from snapgen_jax.training.status import status
from tests.recipes_for_tests import Sequences, TwoPlayers

ONE = make_mesh(MeshConfig(data=1), jax.devices()[:1])


def train(workdir, fallback="refuse", steps=4):
    kept = CheckpointConfig(every_steps=2, keep_last=5, fallback=fallback)
    config = LoopConfig(train_steps=steps, log_every_steps=1, tensorboard=False, checkpoint=kept)
    recipe = TwoPlayers()
    return loop.train(recipe, Sequences(recipe), config, workdir=workdir, mesh=ONE, quiet=True)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sound")
    state = train(workdir)
    (workdir / "config.json").write_text(json.dumps({"schema": 2, "train_steps": 4}))
    return workdir, fingerprint(state)


@pytest.fixture
def workdir(sound, tmp_path):
    shutil.copytree(sound[0], tmp_path / "run")
    return tmp_path / "run"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def meta_file(checkpoint):
    (found,) = [path for path in files(checkpoint / "meta") if path.name == "metadata"]
    return found


def alter(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def empty_all(folder):
    for path in files(folder):
        path.write_bytes(b"")


DAMAGE = {
    "meta is empty": lambda c: meta_file(c).write_text(""),
    "meta is cut": lambda c: meta_file(c).write_text(meta_file(c).read_text()[:40]),
    "meta is altered": lambda c: alter(meta_file(c), '"seed": 0', '"seed": 7'),
    "meta is other JSON": lambda c: meta_file(c).write_text("[1]"),
    "meta is missing": lambda c: shutil.rmtree(c / "meta"),
    "data is missing": lambda c: shutil.rmtree(c / "data"),
    "state is missing": lambda c: shutil.rmtree(c / "state"),
    "ema is missing": lambda c: shutil.rmtree(c / "ema"),
    "arrays are empty": lambda c: empty_all(c / "state"),
    "the tree is cut": lambda c: (c / "state" / "_METADATA").write_text("{"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_error_and_the_checkpoint_before_it_is_taken_by_a_flag(case, workdir, sound, capsys):
    DAMAGE[case](workdir / "checkpoints" / "4")
    before = {path: path.read_bytes() for path in files(workdir)}
    says = "step 4 is damaged .*the one of step 2 stands before it: --config.checkpoint.fallback=previous"
    with pytest.raises(DamagedError, match=says) as error:
        train(workdir)
    assert error.value.code == ExitCode.BAD_CONFIG
    assert {path: path.read_bytes() for path in files(workdir)} == before
    told = status(epath.Path(workdir))
    assert "4 (damaged)" in told and "finished" not in told and "fallback=previous" in told

    state = train(workdir, fallback="previous")
    assert "going on from the intact checkpoint of step 2" in capsys.readouterr().out
    assert fingerprint(state) == sound[1], "the steps after it are done again, to the same bits"
    assert complete_steps(workdir) == [2, 4] and (workdir / "damaged" / "4").exists()
    assert "finished" in status(epath.Path(workdir))


def test_an_altered_data_position_is_noticed(workdir):
    (path,) = [path for path in files(workdir / "checkpoints" / "4" / "data") if path.name == "metadata"]
    alter(path, '"position": 4', '"position": 9')
    with pytest.raises(DamagedError, match="its position is 9, and 4 was saved"):
        train(workdir)


def test_where_no_checkpoint_is_intact_that_is_said(workdir):
    for step in (2, 4):
        shutil.rmtree(workdir / "checkpoints" / str(step) / "meta")
    with pytest.raises(DamagedError, match=r"are damaged \(steps 4, 2\)"):
        train(workdir, fallback="previous")
    assert complete_steps(workdir) == [2, 4], "nothing was moved"


def read(workdir, spec):
    checkpointer = Checkpointer(workdir)
    try:
        return checkpointer.restore(spec, 4)[0]
    finally:
        checkpointer.close()


def test_of_many_flipped_bits_none_changes_a_weight_in_silence(sound, tmp_path):
    """Every flip is an error, or leaves every number as it was."""
    root = tmp_path / "run"
    shutil.copytree(sound[0] / "checkpoints" / "4", root / "checkpoints" / "4")
    recipe = TwoPlayers()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(recipe.init, jax.random.key(0))
    )
    rng, noticed = np.random.default_rng(0), 0
    whole_state = read(root, spec)
    # What `ocdbt.process_0` holds was merged into these, and is not read again.
    arrays = [path for item in ("state", "ema") for path in files(root / "checkpoints" / "4" / item / "d")]
    for n in range(30):
        path = arrays[n % len(arrays)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(damaged))
        try:
            jax.tree.map(np.testing.assert_array_equal, read(root, spec), whole_state)
        except DamagedError:
            noticed += 1
        path.write_bytes(whole)
    assert noticed >= 20


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.uint8])
def test_a_seal_knows_every_bit_of_every_element(dtype):
    x = np.arange(1, 8).astype(dtype)
    seals = {seal({"a": x})}
    for byte in range(x.nbytes):
        for bit in range(8):
            flipped = bytearray(x.tobytes())
            flipped[byte] ^= 1 << bit
            seals.add(seal({"a": np.frombuffer(bytes(flipped), dtype)}))
    assert len(seals) == 1 + 8 * x.nbytes


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.bool_])
def test_a_seal_is_the_same_from_the_host_and_from_a_device(dtype, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 7)) * 100, dtype)
    on_host = seal({"a": x, "b": x.reshape(-1)[0]})
    monkeypatch.setattr(fingerprint_module, "_SMALL", -1)
    assert seal({"a": x, "b": x.reshape(-1)[0]}) == on_host
