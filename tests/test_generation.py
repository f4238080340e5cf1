"""Drawing from a trained run."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax import scoring
from snapgen_jax.conditions import chosen_options
from snapgen_jax.config import load_config
from snapgen_jax.generation import Generator
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.workdir import prepare_workdir
from tests.generators_for_tests import Greys, Options, by_edit, by_label, by_prompt, spec


def greys(images):
    """The grey of each image."""
    return images[:, 0, 0, 0].tolist()


def images(*values, side=8):
    return np.stack([np.full((side, side, 3), value, np.uint8) for value in values])


def test_a_generator_with_other_weights_draws_with_them_and_compiles_nothing_new():
    made = by_prompt(2, 10)
    other = made.with_weights(jnp.int32(3), jnp.int32(20))
    assert greys(made.generate(["1", "2"])) == [13, 14]
    assert greys(other.generate(["1", "2"])) == [24, 25]
    assert greys(made.generate(["1", "2"])) == [13, 14] and made.recipe.traced == 1


def test_a_run_is_evaluated_with_the_generator_that_is_given(tmp_path):
    class Draws:
        recipe = types.SimpleNamespace(evaluators=list)

        def generate(self, prompts, **options):
            self.asked = prompts, options
            return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    prepare_workdir(load_config("configs/shapes/quickstart.py:runlocal", ["data.source=synthetic"]), tmp_path)
    given, asked = Draws(), {"sample_grid": {"prompts": ("a ring",)}}
    options = {"generation": {"steps": 4}, "options": asked}
    scoring.evaluate(tmp_path, ["sample_grid"], **options, generator=given)  # type: ignore[arg-type]
    assert given.asked == (["a ring"], {"seed": 0, "steps": 4}) and (tmp_path / "samples" / "samples.png").exists()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        scoring.evaluate(tmp_path, ["sample_grid"], **options)


# --- conditions ------------------------------------------------------------------------------------------------------


def test_labels_images_and_prompts_are_conditions_alone_or_together():
    assert greys(by_label().run(conditions={"label": [3, 7]})["image"]) == [3, 7]
    assert greys(by_prompt().run(["3", "7"])["image"]) == [3, 7]
    assert greys(by_edit().run(["3", "7"], conditions={"source": images(10, 20)})["image"]) == [13, 27]
    tokens = np.array([[3], [7]], np.int32)
    assert greys(by_edit().run(conditions={"source": images(10, 20), "tokens": tokens})["image"]) == [13, 27]


def test_a_run_says_what_it_takes():
    assert (by_label().takes_prompts, by_label().condition_names) == (False, ("label",))
    assert (by_prompt().takes_prompts, by_prompt().condition_names) == (True, ())
    assert (by_edit().takes_prompts, by_edit().condition_names) == (True, ("source",))


def test_all_outputs_have_a_row_for_each_example_however_many_are_computed_together():
    labels = {"label": np.arange(7)}
    whole, parts = by_label().run(conditions=labels), by_label().run(conditions=labels, batch_size=3)
    assert {name: x.shape for name, x in whole.items()} == {
        "image": (7, 8, 8, 3),
        "clip": (7, 12, 8, 8, 3),
        "depth": (7, 8, 8, 1),
        "draw": (7,),
    }
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])


def test_noise_comes_from_seed_and_index_alone():
    run = by_label().run
    whole = run(conditions={"label": [0, 0, 0]}, seed=5)["draw"]
    assert len(set(whole.tolist())) == 3
    np.testing.assert_array_equal(run(conditions={"label": [9]}, seed=5, indices=[2])["draw"], whole[2:])
    assert run(conditions={"label": [0]}, seed=6)["draw"] != whole[0]


def test_noise_is_a_condition_of_every_run():
    assert greys(by_label().run(conditions={"label": [3], "noise": np.full((1, 4, 4), 5.0)})["image"]) == [8]


def test_every_bucket_is_a_shape_that_a_condition_may_have():
    large = by_edit().run(["1"], conditions={"source": images(2, side=16)})
    assert greys(large["image"]) == [3]


def test_an_unconditional_run_takes_the_number_from_the_indices():
    made = Generator(Greys({"8x8": {"image": spec(8, 8, 3, dtype=np.uint8)}}, ()), jnp.int32(5), jnp.int32(1), None)
    assert greys(made.run(indices=range(3))["image"]) == [6, 6, 6]
    with pytest.raises(ValueError, match=r"unconditional; call `run\(indices=range\(n\)\)`"):
        made.run()


@pytest.mark.parametrize(
    ("make", "prompts", "conditions", "message"),
    [
        (by_prompt, None, None, r"needs 'tokens': give `prompts`$"),
        (by_label, None, None, r"needs 'label': give `conditions` \(--condition\) with label int32 \[N\]$"),
        (by_label, ["a"], None, r"takes no prompts: it holds no text encoder .* with label int32 \[N\]$"),
        (by_edit, ["1"], None, r"needs 'source': .*source uint8 \[N, 8, 8, 3\] or \[N, 16, 16, 3\]$"),
        (by_prompt, "a ring", None, r"give a list of texts, \['a ring'\]"),
        (by_prompt, [], None, "prompts is empty"),
        (by_label, None, {"labl": [1]}, "unknown condition 'labl'; did you mean 'label'"),
        (by_label, None, {"xyz": [1]}, "unknown condition 'xyz'; known: image, label, noise"),
        (by_label, None, {"label": 3}, r"is int32 \[\]; expected label int32 \[N\]"),
        (by_label, None, {"label": [[3]]}, r"is int32 \[1, 1\]; expected label int32 \[N\]"),
        (by_label, None, {"label": [3.0]}, r"is float64 \[1\]; expected label int32 \[N\]"),
        (by_label, None, {"label": [2**40]}, r"is int64 \[1\]; expected label int32 \[N\]"),
        (by_label, None, {"label": ["cat"]}, r"expected label int32 \[N\]"),
        (by_label, None, {"label": [3], "noise": [1]}, r"\['noise'\] is int64 \[1\]; expected noise float32"),
        (by_edit, ["1"], {"source": images(1) / 255}, r"is float64 \[1, 8, 8, 3\]; expected source uint8"),
        (by_edit, ["1"], {"source": images(1, side=9)}, r"expected source uint8 \[N, 8, 8, 3\] or \[N, 16, 16, 3\]"),
        (by_edit, ["1"], {"source": images(1), "tokens": [[1]]}, "both the prompts and conditions.'tokens'. give"),
        (by_edit, ["1", "2"], {"source": images(1)}, r"prompts has length 2 and conditions\['source'\] has 1"),
    ],
)
def test_conditions_that_do_not_fit_are_named_with_what_is_expected(make, prompts, conditions, message):
    with pytest.raises(ValueError, match=message):
        make().run(prompts, conditions=conditions)


def test_conditions_of_two_buckets_are_refused():
    specs = {f"{side}": {"a": spec(side), "b": spec(side)} for side in (2, 3)}
    made = Generator(Greys(specs), jnp.int32(0), jnp.int32(0), None)
    assert greys(made.run(conditions={"a": [[1, 1]], "b": [[2, 2]]})["image"]) == [3]
    with pytest.raises(ValueError, match=r"no bucket holds conditions of the shapes.*take all from one of 2, 3"):
        made.run(conditions={"a": [[1, 1]], "b": [[2, 2, 2]]})


def test_indices_and_the_batch_size_are_checked():
    with pytest.raises(ValueError, match="prompts has length 2 and indices has 1"):
        by_prompt().run(["1", "2"], indices=[0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        by_prompt().run(["1"], batch_size=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "the seed is -1; it must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "the seed is 4294967296; it must"),
        ({"seed": 1.0}, "the seed is 1.0; it must"),
        ({"indices": [-1]}, "the index is -1; it must"),
        ({"indices": [2**32]}, "the index is 4294967296; it must"),
        ({"indices": [0.5]}, "the index is 0.5; it must"),
    ],
)
def test_a_seed_or_an_index_out_of_bounds_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        by_prompt().run(["1"], **options)


def test_the_largest_seed_and_index_are_drawn_from():
    run, largest = by_label().run, 2**32 - 1
    drawn = [
        run(conditions={"label": [0]}, seed=seed, indices=[index])["draw"][0]
        for seed, index in ((largest, largest), (largest, 0), (0, largest), (2**31 - 1, 2**31 - 1))
    ]
    assert len(set(drawn)) == 4


def test_a_run_without_images_says_which_outputs_it_has():
    made = by_label(outputs=("clip", "depth"))
    assert set(made.run(conditions={"label": [1]})) == {"clip", "depth"}
    with pytest.raises(ValueError, match="gives no 'image' but 'clip', 'depth'"):
        made.generate(conditions={"label": [1]})


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_change_what_is_drawn_and_equal_ones_share_a_program():
    made = by_prompt()
    assert greys(made.generate(["1"], steps=6)) == [21] and greys(made.generate(["1"])) == [1]
    made.generate(["1"], steps=4, guidance=1, interval=[0, 1])  # the defaults, written otherwise
    assert made.recipe.traced == 2


def test_options_are_those_of_the_recipe_in_their_types():
    chosen = chosen_options(Options(), {"guidance": 3, "interval": [0, 0.5], "steps": np.int64(8)})
    assert chosen == Options(steps=8, guidance=3.0, interval=(0.0, 0.5))
    assert type(chosen.guidance) is float and type(chosen.steps) is int and chosen.interval == (0.0, 0.5)
    assert hash(chosen) == hash(chosen_options(chosen, {}))


def test_a_recipe_may_have_no_options():
    nothing = dataclasses.make_dataclass("NoOptions", [], frozen=True)()
    assert chosen_options(nothing, {}) == nothing
    with pytest.raises(ValueError, match="unknown option 'steps' of this run's generator; it has none"):
        chosen_options(nothing, {"steps": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 4}, "^unknown option 'stepz' of this run's generator; did you mean 'steps'\\?$"),
        ({"temperature": 1.0}, "unknown option 'temperature'.*known: guidance, interval, method, steps"),
        ({"steps": 4.5}, "option of this run's generator 'steps' is 4.5 .*expected int"),
        ({"method": "ddim"}, "choose one of 'euler', 'heun'"),
        ({"guidance": float("nan")}, "'guidance' is nan; give a finite number"),
        ({"interval": (0, float("inf"))}, "'interval' is .*inf.*give a finite number"),
        ({"steps": 0}, "steps is 0; give 1 or more"),
    ],
)
def test_mistaken_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        chosen_options(Options(), changes)
    with pytest.raises(ValueError, match=message):
        by_prompt().generate(["1"], **changes)
