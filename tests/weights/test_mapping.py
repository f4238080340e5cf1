"""Weight maps: plain data that says which tensors make which parameter."""

import jax
import pytest

from snapgen_jax.weights.mapping import (
    Rule,
    WeightMap,
    at,
    conv,
    count_reference,
    linear,
    norm,
    one,
    reference_shapes,
    stack,
    stacked,
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


def test_no_parameter_and_no_tensor_stands_in_two_rules():
    with pytest.raises(ValueError, match="parameter may stand in one rule only; in several: a"):
        WeightMap((one("a", "x"), one("a", "y")))
    with pytest.raises(ValueError, match="tensor may stand in one rule only; in several: x"):
        WeightMap((one("a", "x"), one("b", "x")))
    with pytest.raises(ValueError, match="takes one tensor"):
        Rule("a", ("x", "y"))
