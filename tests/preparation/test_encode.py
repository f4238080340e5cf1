"""Frozen encoders over shards: what is stored, what trains on it, and what is refused."""

import io
import json
import pathlib
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from snapgen_jax.config import Resolved, load_experiment
from snapgen_jax.data import shards
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.records import unpack
from snapgen_jax.experiment import Experiment, ValidationBatches
from snapgen_jax.networks.module import flatten
from snapgen_jax.parallel import hosts
from snapgen_jax.preparation import encode as encoding_of
from snapgen_jax.preparation.encode import encode
from snapgen_jax.preparation.stored import Encoding
from snapgen_jax.training.exits import ConfigError, PreemptedError
from snapgen_jax.training.keys import key
from snapgen_jax.training.lifetime import Lifetime
from tests.recipes_for_tests import ONE_STAGE

COUNT, SHARDS = 14, 4
SIZES = "inputs.image_sizes=((32,32),(32,48))"


def write_images(folder, captions=2):
    """Pictures of waves, square and wide, with two captions each."""
    rng = np.random.default_rng(0)

    def example(n):
        size = (40, 44) if n % 3 else (36, 60)
        pixels = rng.integers(0, 256, (4, 5, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize(size[::-1]).save(file, "png")
        return {
            "id": f"picture {n}",
            "image": file.getvalue(),
            "captions": [f"picture {n} said in way {c}" for c in range(captions)],
            "caption_weights": np.ones(captions, np.float32),
            "height": size[0],
            "width": size[1],
        }

    parts = np.array_split(np.arange(COUNT), SHARDS)
    written = [
        shards.write_shard(folder, shards.shard_name("images", k, SHARDS), map(example, map(int, part)))
        for k, part in enumerate(parts)
    ]
    arrays = {"image": shards.StoredArray("bytes"), "captions": shards.StoredArray("text", captions=True)}
    shards.Manifest("images", arrays, tuple(written)).write(folder)
    return folder


def resolved(*overrides, config="pretrain/t2i_256"):
    fast = ["batch_size=8", "tensorboard=False", "log_every_steps=1", "data.validation_share=0.3"]
    network = [f"network.{name}={value!r}" for name, value in ONE_STAGE.items()]
    return load_experiment(f"configs/{config}.py:runlocal", [*fast, *network, *overrides])


def encoding(given: Resolved):
    recipe = given.build("cpu")
    return Encoding.of(given.recipe, recipe.batch_specs(), recipe.inputs.config.image_sizes, "cpu")


def contents(folder):
    """`{file: bytes}` of the shards, and the manifest without where it stands."""
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def two_sizes():
    return encoding(resolved(SIZES))


@pytest.fixture(scope="module")
def stored(images, two_sizes, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored")
    encode(two_sizes, images, out, batch_per_device=1)
    return out


def test_every_image_is_stored_once_in_the_nearest_size_with_all_its_captions(images, stored):
    manifest = shards.read_manifest(stored)
    assert manifest.kind == "encoded" and manifest.buckets() == ("32x32", "32x48")
    assert (manifest.examples("32x32"), manifest.examples("32x48")) == (9, 5)
    assert manifest.arrays["latent"] == shards.StoredArray("bfloat16", (None, None, 16))
    assert manifest.arrays["language_states"] == shards.StoredArray("bfloat16", (5, 12), captions=True)
    found = []
    for bucket in manifest.buckets():
        records = shards.Records(stored, [shard for shard in manifest.shards if shard.bucket == bucket])
        for record in (unpack(records[i]) for i in range(len(records))):
            found.append(record["id"])
            wide = int(record["id"].split()[1]) % 3 == 0
            assert record["latent"].shape == ((4, 6, 16) if wide else (4, 4, 16)) and wide == (bucket == "32x48")
            assert record["clip_l_states"].shape == (2, 7, 6) and len(record["captions"]) == 2
            assert (record["clip_l_states"][0] != record["clip_l_states"][1]).any()
    assert sorted(found) == sorted(f"picture {n}" for n in range(COUNT))
    facts = manifest.facts
    assert (facts["examples"], facts["captions"], facts["unreadable"]) == (COUNT, 2 * COUNT, 0)
    assert set(facts["encoders"]) == {f"student/{role}" for role in ("clip_l", "clip_g", "language", "codec")}
    assert facts["inputs"]["student"]["latent"]["scale"] == 1.5305
    assert set(facts["tokenizers"]) >= {"clip_l", "language", "language_mask"}


def test_a_stopped_encoding_goes_on_and_ends_with_the_same_bytes(images, stored, two_sizes, tmp_path, monkeypatch):
    asked = []

    class Told(Lifetime):
        """Is told to stop when it is asked the fourth time."""

        @property
        def stopping(self):
            if threading.current_thread() is not threading.main_thread():
                return False  # the cluster's thread looks too
            asked.append(1)
            return len(asked) == 4

        @stopping.setter
        def stopping(self, value):
            pass

    with monkeypatch.context() as patched:
        patched.setattr(encoding_of, "Lifetime", Told)
        with pytest.raises(PreemptedError, match="run the same command"):
            encode(two_sizes, images, tmp_path, batch_per_device=1)
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob(".writing-*"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.array_record")}
    assert 0 < len(before) < len(list(stored.glob("*.array_record")))
    encode(two_sizes, images, tmp_path, batch_per_device=1)
    assert contents(tmp_path) == contents(stored)
    done = json.loads((tmp_path / "progress" / "00000.json").read_text())["shards"]
    for shard in done:
        assert before[tmp_path / shard["file"]] == (tmp_path / shard["file"]).stat().st_mtime_ns, "kept"


def test_two_hosts_write_what_one_writes_and_a_lost_shard_is_made_again(images, stored, two_sizes, tmp_path):
    class Host(hosts.Cluster):
        """One of two hosts, of which the second comes first and does not wait."""

        def __init__(self, index):
            super().__init__(index, 2)

        def notes(self):
            return {}

        def barrier(self, name, timeout_seconds=0.0):
            if name == "encoded" and self.index == 1:
                raise RuntimeError("the first host is not done")

    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "job.json").write_text((stored / "progress" / "job.json").read_text())
    with pytest.raises(RuntimeError, match="not done"):
        encode(two_sizes, images, tmp_path, batch_per_device=1, cluster=Host(1))
    assert {path.name for path in (tmp_path / "progress").iterdir()} == {"job.json", "00001.json", "00003.json"}
    encode(two_sizes, images, tmp_path, batch_per_device=1, cluster=Host(0))
    assert contents(tmp_path) == contents(stored)
    victim = tmp_path / "32x32-00002-of-00004.array_record"
    victim.unlink()
    encode(two_sizes, images, tmp_path, batch_per_device=1)
    assert contents(tmp_path) == contents(stored)


def test_photographs_that_were_not_collected_are_refused_with_the_command(two_sizes, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    with pytest.raises(DataError, match=r"run `snapgen prepare collect --path=PHOTOGRAPHS --out=COLLECTED` first"):
        encode(two_sizes, tmp_path, tmp_path / "out")


def test_a_folder_of_other_files_is_refused_and_left_alone(images, two_sizes, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"did not make, notes.txt for one; give another --out"):
        encode(two_sizes, images, tmp_path, batch_per_device=1)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_another_encoding_in_the_same_folder_is_refused_by_what_differs(images, stored, two_sizes):
    before = contents(stored)
    with pytest.raises(DataError, match=r"holds an encoding(.|\n)*computed.rows is 16 by the config, and 8 there"):
        encode(two_sizes, images, stored, batch_per_device=2)
    with pytest.raises(DataError, match="holds what was encoded already"):
        encode(two_sizes, stored, stored)
    assert contents(stored) == before


def test_a_full_disk_leaves_whole_shards_and_nothing_half_written(images, stored, two_sizes, tmp_path, monkeypatch):
    real, written = shards.ArrayRecordWriter, []

    class Full:
        def __init__(self, *arguments):
            self.writer = real(*arguments)

        def write(self, record):
            written.append(1)
            if len(written) > 5:
                raise OSError(28, "No space left on device")
            self.writer.write(record)

        def close(self):
            self.writer.close()

    with monkeypatch.context() as patched:
        patched.setattr(shards, "ArrayRecordWriter", Full)
        with pytest.raises(DataError, match=r"cannot be written: (.|\n)*No space left(.|\n)*nothing of it is left"):
            encode(two_sizes, images, tmp_path, batch_per_device=1)
    whole = contents(stored)
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob(".writing-*"))
    for name, data in contents(tmp_path).items():
        assert whole[name] == data
    encode(two_sizes, images, tmp_path, batch_per_device=1)
    assert contents(tmp_path) == whole


# --- training on it --------------------------------------------------------------------------------------------------

ONE_SIZE = "inputs.image_sizes=((32,32),)"
EXACT = ("inputs.dtype=float32", "inputs.encoder_dropout=0.3", ONE_SIZE)


@pytest.fixture(scope="module")
def exact(images, tmp_path_factory):
    """The images in float32, as states and as token ids."""
    folders = {}
    for form in ("states", "tokens"):
        folders[form] = tmp_path_factory.mktemp(form)
        encode(encoding(resolved(*EXACT, f"inputs.text={form}")), images, folders[form], batch_per_device=1)
    return folders


def losses(given, workdir, updates=3):
    """The loss of each of the first updates, and the parameters after them."""
    experiment = Experiment(given, workdir)
    recipe, losses = experiment.recipe, []
    state, frozen = jax.jit(recipe.init)(key(0, 0, "init")), recipe.load_frozen(None)
    update, stream = jax.jit(recipe.update), experiment.data.batches(0)
    for step in range(updates):
        state, metrics = update(state, frozen, next(stream).arrays, key(0, step, "update"))
        losses.append(float(metrics["loss"]))
    stream.close()
    return losses, flatten(state.players["model"].params)


READING = (*EXACT, "data.crop=centre", "optimizer.learning_rate=0.001", "optimizer.warmup_steps=0")


@pytest.fixture(scope="module")
def in_the_step(images, tmp_path_factory):
    """The same with the encoders inside the step."""
    given = resolved(*READING, f"data.path={images}").drawing()
    assert given.recipe.inputs.kind == "encoders"
    return losses(given, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("form", ["states", "tokens"])
def test_training_on_what_is_stored_is_training_with_the_encoders_in_the_step(in_the_step, exact, form, tmp_path):
    expected, params = in_the_step
    found, again = losses(resolved(*READING, f"data.path={exact[form]}", f"inputs.text={form}"), tmp_path)
    assert found == pytest.approx(expected, rel=1e-6) and len(set(found)) == 3
    for path, leaf in params.items():
        np.testing.assert_allclose(again[path], leaf, atol=1e-6, err_msg="/".join(path))


def test_a_run_on_stored_data_draws_from_prompts_and_has_pictures_to_be_scored_on(exact, tmp_path):
    given = resolved(*EXACT, "sampling.steps=1", "evaluation.final=('sample_grid',)", f"data.path={exact['states']}")
    experiment = Experiment(given, tmp_path)
    (grid,) = (evaluator for evaluator in experiment.evaluators() if evaluator.name == "sample_grid")
    weights = {"model": jax.jit(experiment.recipe.init)(key(0, 0, "init")).players["model"].params}
    picture = grid.run(weights, {}).pictures["samples"]
    assert picture.ndim == 3 and picture.std() > 1
    batch = next(iter(ValidationBatches(experiment, experiment.drawing)))
    assert batch.arrays["image"].shape == (8, 32, 32, 3) and batch.arrays["image"].std() > 1


def test_without_the_folders_of_the_encoders_there_is_the_validation_loss_alone(exact, tmp_path, caplog):
    given = resolved(*EXACT, "inputs.encoders.stand_ins=False", f"data.path={exact['states']}")
    with caplog.at_level("WARNING"):
        evaluators = Experiment(given, tmp_path).evaluators()
    assert [evaluator.name for evaluator in evaluators] == ["validation_loss"]
    assert "sample_grid left out" in caplog.text and "inputs.encoders" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("inputs.encoders.codec.autoencoder.scale=0.5", r"student.latent.scale is 0.5 by the config, and 1.5305 there"),
        ("inputs.encoders.language.layers=2", r"student.encoders.language.layers is 2 by the config, and 3 there"),
        ("inputs.dtype=bfloat16", r"student.dtype is 'bfloat16' by the config, and 'float32' there"),
        ("inputs.text=tokens", r"student.text is 'tokens' by the config, and 'states' there"),
    ],
)
def test_what_other_encoders_made_is_refused_by_name(exact, change, message, tmp_path):
    given = resolved(*EXACT, change, f"data.path={exact['states']}")
    with pytest.raises(DataError, match=message):
        _ = Experiment(given, tmp_path).data


def test_other_weights_and_another_tokenizer_are_refused(exact, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in exact["states"].glob("*.array_record"):
        (folder / path.name).symlink_to(path)
    for fact, name, message in (
        ("encoders", "student/clip_g", r"made by other weights than this config names, of student/clip_g"),
        ("tokenizers", "language", r"made with other tokenizers than this config names, of language"),
    ):
        manifest = json.loads((exact["states"] / "manifest.json").read_text())
        manifest["facts"][fact][name] = "0" * 32
        (folder / "manifest.json").write_text(json.dumps(manifest))
        given = resolved(*EXACT, f"data.path={folder}")
        with pytest.raises(DataError, match=message):
            Experiment(given, tmp_path / "run").check()


def test_a_config_that_stores_nothing_is_refused():
    given = load_experiment("configs/pretrain/t2i_256_images.py:runlocal")
    with pytest.raises(ConfigError, match="hold image, clip_l, clip_g, language, language_mask, which are not stored"):
        encoding(given)


def test_a_teacher_s_states_are_stored_beside_the_student_s(images, tmp_path):
    given = resolved(ONE_SIZE, config="distill/t2i_512_sd35l")
    made = encode(encoding(given), images, tmp_path / "shards", batch_per_device=2)
    assert made.arrays["teacher_sequence"] == shards.StoredArray("bfloat16", (12, 16), captions=True)
    assert set(made.facts["inputs"]) == {"student", "teacher"}
    reading = resolved(ONE_SIZE, f"data.path={tmp_path / 'shards'}", config="distill/t2i_512_sd35l")
    batch = next(Experiment(reading, tmp_path / "run").data.batches(0))
    assert batch.arrays["teacher_pooled"].shape == (8, 16) and np.abs(batch.arrays["teacher_pooled"]).max() > 0
