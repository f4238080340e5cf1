"""What all benchmarks measure by."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import by_turns, fastest, machine, random_like


def test_calls_take_turns_and_the_first_of_each_does_not_count():
    turns = []

    def call(name, *seconds):
        left = list(seconds)

        def one():
            turns.append(name)
            time.sleep(left.pop(0))

        return one

    found = fastest({"a": call("a", 0, 0.5, 0.02), "b": call("b", 0, 0.05, 0.5)}, rounds=2)
    assert [sorted(turns[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
    assert 0.02 <= found["a"] < 0.5 and 0.05 <= found["b"] < 0.5


def test_the_order_of_turns_changes():
    turns = []
    by_turns({name: functools.partial(turns.append, name) for name in "abcd"}, rounds=9)
    orders = ["".join(turns[i : i + 4]) for i in range(0, 40, 4)]
    assert len(orders) == 10 and {*map("".join, map(sorted, orders))} == {"abcd"} and len({*orders}) > 5


def test_numbers_stand_where_a_tree_of_shapes_says():
    spec = {"kernel": jax.ShapeDtypeStruct((30, 40), jnp.float32), "ids": jax.ShapeDtypeStruct((2,), jnp.int32)}
    drawn = random_like(spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda s: (s.shape, s.dtype), spec)
    assert 0.019 < float(jnp.std(drawn["kernel"])) < 0.021 and np.array_equal(drawn["ids"], [1, 1])
    assert random_like(spec, jnp.bfloat16)["kernel"].dtype == jnp.bfloat16


def test_a_machine_is_told_by_its_processor_devices_and_jax():
    assert jax.__version__ in machine() and f"{jax.device_count()} x cpu" in machine() and "CPU cores" in machine()
