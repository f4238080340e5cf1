"""Blocks that are skipped, taken out or repeated: what stays, what runs, and where weights come from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks import sd_blocks, unet_blocks
from snapgen_jax.networks.counting import size
from snapgen_jax.networks.evolved import architecture, changed, composed, moved_weights, unet_path
from snapgen_jax.networks.module import apply, build, flatten, for_platform
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.taps import Reuse
from snapgen_jax.networks.unet import UNetConfig
from tests.networks.tiny import drawn, inputs

pytestmark = pytest.mark.usefixtures("quick_to_compile")
UNET = for_platform(UNetConfig.preset("smoke", first_stage="res", mid="rar", up_depth=(1, 1)), "cpu")
SD = for_platform(SDUNetConfig.preset("smoke", down=(("ra",), ("ra", "r")), depth=(1, 1)), "cpu")
CONFIGS = {"unet": UNET, "sd_unet": SD}
BLOCKS = {"unet": "mid_transformer", "sd_unet": "mid_1"}


ARGS = {kind: inputs(config) for kind, config in CONFIGS.items()}
PARAMS = {kind: drawn(build(config)[0]) for kind, config in CONFIGS.items()}


def args(kind):
    return ARGS[kind]


def params(kind):
    return PARAMS[kind]


def output(config, params, args, reuse=None):
    network, _ = build(config)
    return jax.jit(lambda p, a, reuse: apply(network, p, *a, reuse=reuse)[0])(params, args, reuse)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_blocks_that_may_be_skipped_are_those_of_one_shape(kind):
    """All are skipped at once; the others, which begin a stage or take a skip of the way down, change the width."""
    config = CONFIGS[kind]
    network, spec = build(config)
    every = list(config.base_blocks() if kind == "unet" else config.block_names())
    skipped = {block: Reuse(None) for block in config.droppable_blocks()}
    jax.eval_shape(lambda p: apply(network, p, *args(kind), reuse=skipped)[0], spec)
    others = {
        "unet": [
            "down_1_0_residual_block",
            "up_1_0_residual_block",
            "up_1_1_residual_block",
            "up_0_0_residual_block",
            "up_0_1_residual_block",
        ],
        "sd_unet": ["down_1_0_0", "up_1_0_0", "up_1_1_0", "up_1_2_0", "up_0_0_0", "up_0_1_0"],
    }[kind]
    assert [block for block in every if block not in others] == [*skipped]


def test_a_block_that_changes_the_width_cannot_be_replaced_by_its_input():
    network, spec = build(SD)
    with pytest.raises(ValueError, match=r"down_1_0_0 has shape .*; give a value"):
        jax.eval_shape(lambda p: apply(network, p, *args("sd_unet"), reuse={"down_1_0_0": Reuse(None)})[0], spec)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_network_without_a_block_is_the_one_that_skips_it_and_a_copy_runs_its_weights_twice(kind):
    config, block = CONFIGS[kind], BLOCKS[kind]
    whole = output(config, params(kind), args(kind))
    skipped = output(config, params(kind), args(kind), {block: Reuse(None)})
    less, moved = changed(config, block, "remove")
    without = moved_weights(build(less)[1], params(kind), moved)
    close(output(less, without, args(kind)), skipped)
    assert np.abs(skipped - whole).max() > 1e-3

    more, moved = changed(config, block, "copy")
    twice = moved_weights(build(more)[1], params(kind), moved)
    grown = {path: leaf for path, leaf in flatten(twice).items() if path not in flatten(params(kind))}
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (twice, params(kind), without)]
    assert grown and sizes[0] - sizes[1] == sizes[1] - sizes[2] > 0
    copy = f"{block}.1" if kind == "unet" else "mid_2"
    close(output(more, twice, args(kind), {copy: Reuse(None)}), whole)  # the copy skipped
    assert np.abs(output(more, twice, args(kind)) - whole).max() > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_block_can_be_taken_out_and_repeated_and_each_weight_has_its_origin(kind):
    config = CONFIGS[kind]
    old = {path: i for i, path in enumerate(flatten(params(kind)))}
    numbered = build(config)[1]
    numbered = jax.tree.unflatten(jax.tree.structure(numbered), range(len(old)))
    assert config.droppable_blocks()
    for block in config.droppable_blocks():
        less, moved = changed(config, block, "remove")
        kept = flatten(moved_weights(build(less)[1], numbered, moved))
        assert kept.keys() == flatten(build(less)[1]).keys()
        more, moved = changed(config, block, "copy")
        grown = flatten(moved_weights(build(more)[1], numbered, moved))
        assert grown.keys() == flatten(build(more)[1]).keys()
        counts = np.bincount(list(grown.values()), minlength=len(old))
        gone = sorted(set(range(len(old))) - set(kept.values()))
        assert gone and sorted(np.flatnonzero(counts == 2)) == gone and counts.max() == 2 and counts.min() == 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_actions_compose_and_the_architecture_says_what_they_made(kind):
    start, origin = CONFIGS[kind], ()
    now, path = start, [(BLOCKS[kind], "copy"), (BLOCKS[kind], "copy"), (start.droppable_blocks()[0], "remove")]
    stepwise = params(kind)
    for block, action in path:
        now, moved = changed(now, block, action)
        origin = composed(origin, moved)
        stepwise = moved_weights(build(now)[1], stepwise, moved)
    at_once = moved_weights(build(now)[1], params(kind), origin)
    jax.tree.map(np.testing.assert_array_equal, at_once, stepwise)
    described = architecture(now)
    assert described == (
        {"blocks": [["down_0_0_residual_block", 0], ["mid_transformer", 3]]}
        if kind == "unet"
        else {"down": [["a"], ["ra", "r"]], "mid": "raaar", "up": [["ra", "ra"], ["r", "ra", "ra"]]}
    )


@pytest.mark.parametrize(("kind", "module"), [("unet", unet_blocks), ("sd_unet", sd_blocks)])
def test_a_block_that_is_skipped_does_not_run(kind, module, monkeypatch):
    calls = []

    def counts(block):
        run = block.__call__

        def call(self, x, *args, **kwargs):
            jax.debug.callback(lambda: calls.append(block.__name__))
            return run(self, x, *args, **kwargs)

        monkeypatch.setattr(block, "__call__", call)

    counts(module.Transformer)
    counts(module.ResidualBlock)
    network, _ = build(CONFIGS[kind])
    blocks = CONFIGS[kind].droppable_blocks()

    def run(runs):
        reuse = {name: Reuse(None, runs[i]) for i, name in enumerate(blocks)}
        return apply(network, params(kind), *args(kind), reuse=reuse)[0]

    program, found = jax.jit(run), []
    for skipped in (0, 1, len(blocks)):
        calls.clear()
        jax.block_until_ready(program(jnp.arange(len(blocks)) >= skipped))
        jax.effects_barrier()
        found.append(len(calls))
    assert found == [found[0], found[0] - 1, found[0] - len(blocks)] and found[0] > len(blocks)


def test_gradients_pass_around_a_block_that_is_skipped():
    network = build(UNET)[0]

    def loss(params, runs):
        reuse = {"mid_transformer": Reuse(None, runs)}
        return jnp.mean(jnp.square(apply(network, params, *args("unet"), reuse=reuse)[0]))

    gradient = jax.jit(jax.grad(loss))
    for runs in (False, True):
        grads = gradient(params("unet"), jnp.array(runs))
        assert any(np.any(leaf) for leaf in jax.tree.leaves(grads["mid_transformer"])) == runs
        assert np.any(grads["conv_in"]["kernel"])


def test_what_is_no_such_block_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'up_0_0_residual_block' is no block .*; these are down_0_0_residual_block"):
        changed(UNET, "up_0_0_residual_block", "remove")
    with pytest.raises(ValueError, match=r"UNetConfig.blocks: 'mid' is no block"):
        dataclasses.replace(UNET, blocks=(("mid", 0),))
    with pytest.raises(ValueError, match="cannot stand -1 times"):
        dataclasses.replace(UNET, blocks=(("mid_transformer", -1),))
    assert unet_path("down_1_0_residual_block", 2) == "down/block_01/block_00/more_residuals/block_01"


def test_the_network_of_snapfusion_has_the_blocks_of_its_table():
    """Table 3 of arXiv 2306.00980: transformers and residual blocks at each resolution on each way. The paper's 848M
    parameters belong to another network than its table describes."""
    config = SDUNetConfig.preset("snapfusion")

    def count(layers):
        return tuple("".join(layers).count(block) for block in "ar")

    assert [count(layers) for layers in config.down[:3]] == [(0, 2), (2, 2), (2, 1)]
    assert count((*config.down[3], config.mid, *config.up[3])) == (1, 4)
    assert [count(layers) for layers in config.up[2::-1]] == [(6, 2), (3, 3), (0, 3)]
    assert abs(size(config)[0] - 759e6) < 1e6
    assert size(SDUNetConfig.preset("sd15"))[0] == 859_520_964
