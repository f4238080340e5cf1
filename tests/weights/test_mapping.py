"""Weight maps: plain data that says which tensors make which parameter."""

import jax
import numpy as np
import pytest

from snapgen_jax.weights.mapping import (
    Rule,
    WeightMap,
    at,
    conv,
    count_reference,
    fused,
    linear,
    norm,
    one,
    reference_shapes,
    stack,
    stacked,
    to_reference,
)


def spec(**shapes):
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}


def test_a_network_tells_the_shapes_of_the_checkpoint_it_expects():
    weight_map = WeightMap(
        (
            one("table", "embed.weight"),
            one("kernel", "proj.weight", "linear"),
            one("conv", "conv.weight", "conv"),
            stack("blocks", "layers.{}.weight", range(2), "linear"),
        )
    )
    tree = spec(table=(7, 3), kernel=(3, 5), conv=(2, 2, 3, 5), blocks=(2, 3, 4))
    assert reference_shapes(weight_map, tree) == {
        "embed.weight": (7, 3),
        "proj.weight": (5, 3),
        "conv.weight": (5, 3, 2, 2),
        "layers.0.weight": (4, 3),
        "layers.1.weight": (4, 3),
    }
    assert count_reference(weight_map, tree) == sum(leaf.size for leaf in tree.values())


def test_rules_of_a_part_become_rules_of_the_whole():
    block = at("block", (*linear("inner", "h.{}.fc"), *norm("norm", "h.{}.ln", bias=False), *conv("conv", "h.{}.conv")))
    rules = stacked(at("trunk", block), (3, 5))
    assert rules[0] == Rule("trunk/block/inner/kernel", ("h.3.fc.weight", "h.5.fc.weight"), "linear", stack=True)
    assert [rule.path.removeprefix("trunk/block/") for rule in rules] == [
        "inner/kernel",
        "inner/bias",
        "norm/scale",
        "conv/kernel",
        "conv/bias",
    ]


def test_a_map_that_does_not_fit_its_network_names_every_difference():
    weight_map = WeightMap((one("a", "a"), one("b", "b", "linear"), stack("c", "c.{}", range(3)), one("old", "old")))
    with pytest.raises(ValueError) as error:
        reference_shapes(weight_map, spec(a=(1,), b=(1, 2, 3), c=(2, 4), new=(1,)))
    message = str(error.value)
    assert "parameter without a rule: new" in message
    assert "rule without a parameter: old" in message
    assert "b has shape (1, 2, 3), but 'linear' makes arrays of rank 2" in message
    assert "c has shape (2, 4), but its rule stacks 3 tensors" in message


QKV = fused(("q", "k", "v"), "qkv.{}", "linear")


def test_equal_parts_of_a_tensor_are_parameters_of_their_own():
    weight_map = WeightMap((*stacked(at("blocks", QKV), range(2)), *fused(("one", "two"), "both")))
    tree = {"blocks": spec(q=(2, 3, 4), k=(2, 3, 4), v=(2, 3, 4)), **spec(one=(5,), two=(5,))}
    assert reference_shapes(weight_map, tree) == {"qkv.0": (12, 3), "qkv.1": (12, 3), "both": (10,)}
    assert count_reference(weight_map, tree) == 2 * 3 * 12 + 10
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape), tree)
    written = to_reference(weight_map, params)
    blocks = params["blocks"]
    np.testing.assert_array_equal(written["qkv.1"], np.concatenate([blocks[name][1].T for name in ("q", "k", "v")]))
    np.testing.assert_array_equal(written["both"], np.concatenate([params["one"], params["two"]]))


def test_parts_that_do_not_make_a_whole_are_refused():
    with pytest.raises(ValueError, match="of x there are the parts 0 of 3, 2 of 3"):
        WeightMap((Rule("a", ("x",), part=(0, 3)), Rule("c", ("x",), part=(2, 3))))
    with pytest.raises(ValueError, match="of x there are the parts 0 of 2, 0 of 2"):
        WeightMap((Rule("a", ("x",), part=(0, 2)), Rule("b", ("x",), part=(0, 2))))
    with pytest.raises(ValueError, match="tensor may stand in one rule only; in several: x"):
        WeightMap((one("a", "x"), *fused(("b", "c"), "x")))
    with pytest.raises(ValueError, match="no part 3 of 3; count from 0"):
        Rule("a", ("x",), part=(3, 3))
    with pytest.raises(ValueError, match="c is one of 2 equal parts of x, but its shape differs"):
        reference_shapes(WeightMap(fused(("b", "c"), "x")), spec(b=(2, 3), c=(1, 3)))
    with pytest.raises(ValueError, match="b is a scalar"):
        reference_shapes(WeightMap(fused(("b", "c"), "x")), spec(b=(), c=(1,)))


def test_no_parameter_and_no_tensor_stands_in_two_rules():
    with pytest.raises(ValueError, match="parameter may stand in one rule only; in several: a"):
        WeightMap((one("a", "x"), one("a", "y")))
    with pytest.raises(ValueError, match="tensor may stand in one rule only; in several: x"):
        WeightMap((one("a", "x"), one("b", "x")))
    with pytest.raises(ValueError, match="takes one tensor"):
        Rule("a", ("x", "y"))
