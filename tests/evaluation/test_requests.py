"""What evaluators ask runs and bundles to draw, and where it comes from."""

import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.evaluation.outputs import draw, read_images
from snapgen_jax.evaluation.requests import Requests, examples, requests
from snapgen_jax.generation import Generator
from tests.generators_for_tests import READABLE, Greys, Validation, by_edit, by_label, by_prompt, spec


class Bundle:
    """Has `generate` alone."""

    def generate(self, prompts, *, seed=0, indices=None, **options):
        self.asked = prompts, seed, indices, options
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)


def from_states():
    """Draws from stored text states."""
    return Generator(Greys({"8x8": {"states": spec(1, dtype=np.float32)}}), jnp.int32(0), jnp.int32(0), None)


def test_examples_are_the_first_readable_ones_of_one_bucket_each_once():
    arrays, indices = examples(Validation(), ["image", "label"], 100)
    assert indices == READABLE and arrays["label"].tolist() == [10 * n for n in READABLE]
    assert arrays["image"][:, 0, 0, 0].tolist() == READABLE
    assert examples(Validation(), ["label"], 3)[1] == [0, 2, 3]


def test_a_split_without_the_array_or_without_readable_examples_is_refused():
    with pytest.raises(ValueError, match="no array 'depth'; it has 'image', 'source', 'label', 'states'"):
        examples(Validation(), ["depth"], 3)

    class Unreadable(Validation):
        def __iter__(self):
            for batch in super().__iter__():
                batch.valid = np.zeros(4, bool)
                yield batch

    with pytest.raises(ValueError, match="no readable example"):
        examples(Unreadable(), ["label"], 3)


def test_a_bundle_is_asked_for_images_of_prompts():
    bundle = Bundle()
    wanted = requests(bundle, (), 2, Validation(), 0)
    outputs = draw(bundle, wanted, seed=3, indices=[4, 5], options={"steps": 2})
    assert bundle.asked == (["0", "1"], 3, [4, 5], {"steps": 2})
    assert read_images(outputs, "image").shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match="draws from prompts alone"):
        draw(bundle, Requests(["label 1"], None, {"label": np.array([1])}))


def test_requests_are_titled_by_prompt_by_label_or_by_example():
    assert requests(by_prompt(), ("a",), 9, None, 0).titles == ["a"]
    assert requests(by_label(), (), 2, Validation(), 0).titles == ["label 0", "label 20"]
    assert requests(from_states(), (), 2, Validation(), 0).titles == ["example 0", "example 2"]
    edit = requests(by_edit(), (), 2, Validation(), 0)
    assert (edit.titles, edit.prompts, list(edit.conditions)) == (["0", "2"], ["0", "2"], ["source"])


def test_an_unconditional_run_draws_as_many_as_are_counted():
    made = Generator(Greys({"8x8": {"image": spec(8, 8, 3, dtype=np.uint8)}}, ()), jnp.int32(5), jnp.int32(0), None)
    outputs = draw(made, requests(made, (), 3, None, 0), seed=1)
    assert outputs["image"][:, 0, 0, 0].tolist() == [5, 5, 5] and len(set(outputs["draw"].tolist())) == 3


def test_repeated_requests_stand_side_by_side():
    twice = requests(by_edit(), (), 2, Validation(), 0).repeated(2)
    assert twice.prompts == ["0", "0", "2", "2"]
    assert twice.conditions["source"][:, 0, 0, 0].tolist() == [0, 0, 4, 4]
