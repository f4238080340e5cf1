"""Any TFDS image data set: built here on the spot, then read by name, from labels and from captions."""

import dataclasses
import pathlib
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.images import decode
from snapgen_jax.data.pipeline import Pipeline
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tokenizer import train
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.sources.interfaces import build_source as build_collected
from tests.data.conftest import specs

# TFDS needs TensorFlow to write a data set, and not to read one: another process writes it.
_BUILD = """
import sys

import numpy as np
import tensorflow_datasets as tfds

IMAGE = tfds.features.Image(shape=(None, None, 3))


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.FEATURES))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(12), "validation": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": np.full((10, 14, 3), 20 * i, np.uint8), **self.words(i)}


class TinyLabels(Tiny):
    FEATURES = {
        "image": IMAGE,
        "file_name": tfds.features.Text(),
        "fine": tfds.features.ClassLabel(num_classes=12),
        "label": tfds.features.ClassLabel(names=["apple", "fire_truck"]),
    }

    def words(self, i):
        return {"file_name": f"{i}.png", "fine": i, "label": i % 2}


class TinyCaptions(Tiny):
    FEATURES = {
        "image": IMAGE,
        "image/filename": tfds.features.Text(),
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }

    def words(self, i):
        texts = [f"picture {i}, first", f"picture {i}, second"] if i != 5 else []
        return {"image/filename": "x", "captions": [{"id": n, "text": text} for n, text in enumerate(texts)]}


for builder in (TinyLabels, TinyCaptions):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tfds")
    script = folder / "build.py"
    script.write_text(_BUILD)
    subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def labels(data_dir: pathlib.Path) -> DataConfig:
    return DataConfig(source="tfds", name="tiny_labels", path=str(data_dir))


@pytest.fixture
def captions(data_dir: pathlib.Path) -> DataConfig:
    return DataConfig(source="tfds", name="tiny_captions", path=str(data_dir))


def _draw() -> np.random.Generator:
    return np.random.default_rng(0)


def test_class_labels_become_captions_of_their_own_images(labels: DataConfig) -> None:
    source = build_source(labels)
    assert len(source) == 12 and len(build_source(labels, "validation")) == 3
    for index in range(12):
        example = source.example(index, _draw())
        assert example["image"].shape == (10, 14, 3)
        number = int(example["image"][0, 0, 0]) // 20
        assert example["caption"] == ("a photo of an apple", "a photo of a fire truck")[number % 2]
        assert example["label"] == number % 2 and example["label"].dtype == np.int32
    assert source.name(3) == "tiny_labels train record 3"


def test_names_in_a_file_replace_codes(labels: DataConfig, tmp_path: pathlib.Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {i}\n" for i in range(12)))
    config = dataclasses.replace(labels, caption_feature="fine", class_names=str(names))
    example = build_source(config).example(4, _draw())
    number = example["image"][0, 0, 0] // 20
    assert example["caption"] == f"a photo of a thing {number}" and example["label"] == number
    with pytest.raises(DataError, match="12 names for the 2 classes"):
        build_source(dataclasses.replace(config, caption_feature="label"))


def test_a_class_label_stands_beside_a_caption_of_the_data_sets_own(labels: DataConfig) -> None:
    source = build_source(dataclasses.replace(labels, caption_feature="file_name"))
    example = source.example(4, _draw())
    number = int(example["image"][0, 0, 0]) // 20
    assert example["caption"] == f"{number}.png" and example["label"] == number % 2


def test_labels_fill_the_batches_of_a_run_on_classes(labels: DataConfig) -> None:
    wanted = {"image": specs(12, 8, 8)["image"], "label": jax.ShapeDtypeStruct((12,), np.int32)}
    batches = Pipeline(labels, {"8x8": wanted}).batches()
    batch = next(batches)
    batches.close()
    np.testing.assert_array_equal(batch.arrays["label"], batch.arrays["image"][:, 4, 4, 0] // 20 % 2)


def test_of_nested_captions_each_draw_takes_one(captions: DataConfig) -> None:
    source = build_source(captions)
    numbers = [len(source.record(i)["captions"]["text"]) for i in range(12)]
    index = numbers.index(2)
    said = {source.example(index, np.random.default_rng(i))["caption"] for i in range(20)}
    assert len(said) == 2 and all(text.startswith("picture ") for text in said)
    assert set(source.spec()) == {"image", "caption"}, "a data set without classes has no label"
    with pytest.raises(UnreadableExampleError, match="no caption"):
        source.example(numbers.index(0), _draw())


def test_a_source_travels_to_a_worker_and_opens_its_files_there(labels: DataConfig) -> None:
    source = build_source(labels)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy.example(3, _draw())["image"], source.example(3, _draw())["image"])


def test_batches_and_reading_needs_no_tensorflow(captions: DataConfig) -> None:
    code = (
        "import sys; from tests.data.test_tfds_source import DataConfig, _read; "
        f"_read(DataConfig(source='tfds', name='tiny_captions', path={captions.path!r})); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])


def _read(config: DataConfig) -> None:
    config = dataclasses.replace(config, max_unreadable_share=0.5)
    batches = Pipeline(config, {"8x8": specs(12, 8, 8)}, train(["picture 1, first"], 300)).batches()
    batch = next(batches)
    batches.close()
    assert batch.arrays["image"].shape == (12, 8, 8, 3)
    assert (~batch.valid).sum() == 1


def test_what_cannot_be_read_is_said_with_the_way_to_mend_it(labels: DataConfig) -> None:
    with pytest.raises(DataError, match=r"needs data\.name"):
        build_source(DataConfig(source="tfds"))
    with pytest.raises(DataError, match=r"'test'.*\['train', 'validation'\]"):
        build_source(dataclasses.replace(labels, train_split="test"))
    with pytest.raises(DataError, match=r"(?s)coco_caption'.*Perhaps you mean coco_captions.*tfds build"):
        build_source(dataclasses.replace(labels, name="coco_caption"))
    with pytest.raises(DataError, match=r"caption_feature to one of its features: .*fine.*label"):
        build_source(dataclasses.replace(labels, caption_feature="caption"))
    with pytest.raises(DataError, match="no image feature 'picture'; it has image"):
        build_source(dataclasses.replace(labels, image_feature="picture"))


def test_a_split_that_serves_both_purposes_is_not_held_out(labels: DataConfig) -> None:
    assert build_source(labels, "validation").held_out
    assert not build_source(dataclasses.replace(labels, validation_split="train"), "validation").held_out


def test_a_data_set_is_collected_with_all_captions_of_an_image(data_dir: pathlib.Path) -> None:
    source = build_collected(CollectConfig(source="tfds", name="tiny_captions", path=str(data_dir)))
    examples = [example for unit in source.units() for example in pickle.loads(pickle.dumps(source)).read(unit)]
    assert len(examples) == 12 and len({example.id for example in examples}) == 12
    for example in examples:
        number = int(decode(example.image)[0, 0, 0]) // 20
        said = [(f"picture {number}, {which}", 0.5) for which in ("first", "second")]
        assert example.captions == (tuple(said) if number != 5 else ())


def test_a_data_set_is_collected_with_class_labels_and_columns(data_dir: pathlib.Path) -> None:
    config = CollectConfig(source="tfds", name="tiny_labels", path=str(data_dir), split="validation")
    config = dataclasses.replace(config, captions={"label": 3.0}, numbers=("fine",), texts=("file_name",))
    source = build_collected(config)
    for example in source.read(source.units()[0]):
        number = int(decode(example.image)[0, 0, 0]) // 20
        assert example.captions == ((("a photo of an apple", "a photo of a fire truck")[number % 2], 3.0),)
        assert example.columns == {"fine": number, "file_name": f"{number}.png"}
    with pytest.raises(DataError, match=r"has no feature 'colour'; its columns are .*fine"):
        build_collected(dataclasses.replace(config, texts=("colour",)))
    with pytest.raises(DataError, match="not numeric"):
        source = build_collected(dataclasses.replace(config, texts=(), numbers=("file_name",)))
        list(source.read(source.units()[0]))
