"""Noise from a seed is one specification, whichever library computes it."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.special import ndtri

from snapgen_jax.diffusion.noise import PLACE, draw_noise, normal, standard_normal, threefry2x32, word
from snapgen_jax.recipes._sampling import initial_noise
from snapgen_jax.training.keys import example_keys

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "noise.md"
LARGEST = 2**32 - 1


def words(*values):
    return tuple(np.array([value], np.uint32) for value in values)


def bits(seed, index, count, xp=np):
    """The bits of the first elements."""
    counter = xp.full(count, PLACE, xp.uint32), xp.arange(count, dtype=xp.uint32)
    return threefry2x32(words(seed, index), counter)[0]


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((LARGEST, LARGEST), (LARGEST, LARGEST), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(key, counter, expected):
    assert threefry2x32(words(*key), words(*counter)) == words(*expected)


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (1, 2), (2**31, 5), (LARGEST, LARGEST)])
def test_the_bits_are_the_same_in_numpy_in_jax_and_by_jaxs_own_threefry(seed, index):
    count = 5000
    by_numpy = bits(seed, index, count)
    np.testing.assert_array_equal(by_numpy, jax.jit(lambda: bits(seed, index, count, jnp))())
    counters = jnp.concatenate([jnp.full(count, PLACE, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)])
    np.testing.assert_array_equal(by_numpy, threefry_2x32(jnp.uint32([seed, index]), counters)[:count])


def test_every_possible_normal_is_that_of_jax_and_the_exact_one_to_one_in_a_million():
    all_bits = np.arange(2**24, dtype=np.uint32) << np.uint32(8)
    by_numpy = normal(all_bits)
    by_jax = np.asarray(jax.jit(lambda b: normal(b, jnp))(all_bits))
    exact = ndtri((2 * np.arange(2**24) + 1) / 2**25)
    assert by_numpy.dtype == by_jax.dtype == np.float32
    for one, other in ((by_numpy, by_jax), (by_numpy, exact), (by_jax, exact)):
        assert np.abs(one - other).max() <= 1e-6
    np.testing.assert_array_equal(by_numpy, -by_numpy[::-1])
    assert (np.diff(by_numpy[::64]) > 0).all()


def test_the_noise_is_standard_normal_and_independent_of_its_neighbours():
    n = 2**20
    drawn = np.stack([draw_noise(seed, index, (n,)) for seed, index in ((0, 0), (0, 1), (1, 0))]).astype(np.float64)
    for power, moment in enumerate((0, 1, 0, 3), start=1):
        spread = math.sqrt((1, 2, 15, 96)[power - 1] / n)  # of the mean of x^power over n draws
        np.testing.assert_allclose((drawn**power).mean(axis=1), moment, atol=5 * spread)
    related = [a * b for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[0, 1:], drawn[0, :-1]))]
    np.testing.assert_allclose([product.mean() for product in related], 0, atol=5 / math.sqrt(n))


def test_the_page_of_the_specification_holds_numbers_that_are_right():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([0-9a-f, ]+) \| ([-0-9., ]+) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 5
    for seed, index, in_hex, noise in rows:
        pair = int(seed), int(index)
        np.testing.assert_array_equal(bits(*pair, 4), [int(text, 16) for text in in_hex.split(", ")])
        expected = [float(text) for text in noise.split(", ")]
        np.testing.assert_allclose(draw_noise(*pair, (4,)), expected, rtol=0, atol=1e-6)
        by_jax = initial_noise(example_keys(pair[0], jnp.uint32([pair[1]])), (4,))
        np.testing.assert_allclose(by_jax[0], expected, rtol=0, atol=1e-6)
    given, named = re.search(r"The bits ([0-9a-f, ]+) give ([-0-9., ]+):", PAGE.read_text("utf-8")).groups()
    ends = normal(np.array([int(text, 16) for text in given.split(", ")], np.uint32))
    np.testing.assert_allclose(ends, [float(text) for text in named.split(", ")], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 6, 2)])
def test_places_are_counted_over_the_whole_array_in_c_order(shape):
    np.testing.assert_array_equal(draw_noise(3, 4, shape).ravel(), draw_noise(3, 4, (math.prod(shape),)))
    together = standard_normal(np.uint32([3, 3]), np.uint32([9, 4]), shape)
    np.testing.assert_array_equal(together[1], draw_noise(3, 4, shape))


def test_noise_split_over_devices_is_that_of_one():
    """Each device computes its part of the batch and of the picture: nothing is gathered."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    split = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    shape = (128, 128, 16)

    def draw(seed, indices):
        return initial_noise(example_keys(seed, indices), shape)

    compiled = jax.jit(draw, out_shardings=split).lower(np.uint32(LARGEST), np.arange(4, dtype=np.uint32)).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    drawn = compiled(np.uint32(LARGEST), np.arange(4, dtype=np.uint32))
    assert drawn.sharding.is_equivalent_to(split, 4)
    for index in (0, 3):
        np.testing.assert_allclose(drawn[index], draw_noise(LARGEST, index, shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_other_keys_give_noise_of_their_own_each(implementation):
    keys = jax.random.split(jax.random.key(0, impl=implementation), 3)
    drawn = initial_noise(keys, (1000,))
    assert drawn.shape == (3, 1000) and np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.2
    np.testing.assert_array_equal(drawn[1:2], initial_noise(keys[1:2], (1000,)))


@pytest.mark.parametrize("value", [-1, 2**32, 1.0, "1", None])
def test_a_seed_or_an_index_that_is_no_word_is_named(value):
    with pytest.raises(ValueError, match=f"the seed is {value}; it must be a whole number from 0 to 4294967295"):
        draw_noise(value, 0, (2,))
    with pytest.raises(ValueError, match=f"the index is {value}; it must"):
        draw_noise(0, value, (2,))
    assert word("seed", np.int64(LARGEST)) == LARGEST
