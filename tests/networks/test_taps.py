"""Intermediates are replaced always, never, by a decision in the program, or row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.counting import count_macs
from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import apply, build, for_platform
from snapgen_jax.networks.taps import Blend, Reuse, Taps
from snapgen_jax.networks.unet import UNetConfig
from tests.networks.tiny import drawn, inputs

pytestmark = pytest.mark.usefixtures("quick_to_compile")
B = 2
DENOISERS = {
    "unet": for_platform(UNetConfig.preset("smoke"), "cpu"),
    "mmdit": MMDiTConfig.preset("smoke", depth=4, dual=2),
    "dit": DiTConfig.preset("smoke", depth=3),
}
# The first one enters the module that makes the second.
TAPS = {
    "unet": ("down_1_0", "mid", "up_0_1"),
    "mmdit": ("block_01", "block_02", "block_03"),
    "dit": ("block_00", "block_01", "block_02"),
}


class Case:
    """A denoiser with drawn parameters, and its own intermediates."""

    def __init__(self, name):
        self.taps = TAPS[name]
        self.network, _ = build(DENOISERS[name])
        self.params, self.args = drawn(self.network), inputs(DENOISERS[name], B)
        self.v, self.own = jax.jit(lambda: self.call(taps=self.taps))()
        self.other = {name: x + jax.random.normal(jax.random.key(1), x.shape) for name, x in self.own.items()}

    def call(self, reuse=None, taps=()):
        return apply(self.network, self.params, *self.args, taps=taps, reuse=reuse)

    def velocity(self, reuse):
        return jax.jit(lambda reuse: self.call(reuse)[0])(reuse)

    def replaced(self, name):
        return self.velocity({name: self.other[name]})


@pytest.fixture(scope="module", params=DENOISERS)
def case(request):
    return Case(request.param)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_value_replaces_the_intermediate_for_all_that_follows(case):
    for name in case.taps:
        reuse = {name: Reuse(case.other[name])}
        v, found = jax.jit(lambda reuse: case.call(reuse, taps=case.taps))(reuse)
        np.testing.assert_array_equal(found[name], case.other[name])
        for before in case.taps[: case.taps.index(name)]:
            close(found[before], case.own[before])
        assert jnp.abs(v - case.v).max() > 1e-3
        close(v, case.replaced(name))  # a bare array is Reuse(array)


def test_a_module_told_to_run_computes_what_it_does_without_reuse(case):
    for run in (True, jnp.array(True), jnp.ones(B, bool), lambda x: x.sum() < jnp.inf, lambda x: jnp.ones(B, bool)):
        v = jax.jit(lambda run=run: case.call({name: Reuse(case.other[name], run) for name in case.taps})[0])()
        close(v, case.v)


def test_a_traced_decision_takes_either_branch_of_one_program(case):
    name = case.taps[1]
    velocity = jax.jit(lambda run: case.call({name: Reuse(case.other[name], run)})[0])
    close(velocity(jnp.array(True)), case.v)
    close(velocity(jnp.array(False)), case.replaced(name))
    assert velocity._cache_size() == 1


def test_rows_are_taken_one_by_one(case):
    for name in case.taps:
        run = jnp.array([True, False])
        for given in (run, lambda x, run=run: run):
            v = jax.jit(lambda n=name, given=given: case.call({n: Reuse(case.other[n], given)})[0])()
            close(v, jnp.stack([case.v[0], case.replaced(name)[1]]))


def test_a_module_that_no_row_needs_does_not_run():
    calls = []

    def module(x):
        jax.debug.callback(lambda: calls.append(1))
        return 2 * x

    x = jnp.ones((B, 3))
    run = jax.jit(lambda rows: Reuse(5 * x, rows).instead_of(module, x))
    for rows in ([False, False], [False, True]):
        np.testing.assert_array_equal(run(jnp.array(rows)), jnp.where(jnp.array(rows)[:, None], 2 * x, 5 * x))
    jax.effects_barrier()
    assert len(calls) == 1


@pytest.mark.parametrize("share", [0.5, [1.0, 0.25]])
def test_a_blend_mixes_the_value_with_what_the_module_gives(share):
    case = Case("dit")
    name, rows = case.taps[1], jnp.broadcast_to(jnp.asarray(share), (B,))[:, None, None, None]
    mixed = case.velocity({name: rows * case.own[name] + (1 - rows) * case.other[name]})
    for given in (jnp.asarray(share), lambda x: jnp.asarray(share)):
        v = jax.jit(lambda given=given: case.call({name: Blend(case.other[name], given)})[0])()
        close(v, mixed)
    assert jnp.abs(mixed - case.v).max() > 1e-3


def test_a_function_decides_by_what_enters_the_module(case):
    before, name, _ = case.taps
    size = jnp.mean(jnp.square(case.own[before]))

    def velocity(threshold):
        def run(x):
            assert x.shape == case.own[before].shape  # a map [B, h, w, C], also for the tokens of an MMDiT
            return jnp.mean(jnp.square(x)) > threshold

        return case.velocity({name: Reuse(case.other[name], run)})

    close(velocity(0.99 * size), case.v)
    close(velocity(1.01 * size), case.replaced(name))


def test_several_decisions_of_every_kind_stand_beside_each_other(case):
    first, second, third = case.taps
    rows = jnp.array([False, True])
    mixed = {
        first: Reuse(case.other[first], lambda x: jnp.array(False)),
        second: Reuse(case.other[second], rows),
        third: Reuse(case.other[third], True),
    }
    v = jax.jit(lambda: case.call(mixed)[0])()
    kept = case.velocity({first: case.other[first]})
    both = case.velocity({first: case.other[first], second: case.other[second]})
    close(v, jnp.where(rows[:, None, None, None], kept, both))


@pytest.mark.parametrize("run", [False, "scalar", "rows"])
def test_gradients_pass_to_the_value_and_around_it(case, run):
    name = case.taps[1]
    run = {"scalar": jnp.array(False), "rows": jnp.array([False, True])}.get(run, run)

    def loss(scale):
        return jnp.sum(jnp.square(case.call({name: Reuse(scale * case.other[name], run)})[0]))

    gradient = jax.jit(jax.grad(loss))(1.0)
    step = 1e-2
    numeric = jax.jit(lambda: (loss(1 + step) - loss(1 - step)) / (2 * step))()
    assert gradient == pytest.approx(float(numeric), rel=2e-2) and gradient != 0


def test_a_module_that_never_runs_is_no_part_of_the_program_and_a_decision_is_a_branch():
    case = Case("unet")
    whole = count_macs(lambda: case.call()[0])

    def cost(run):
        return count_macs(lambda run: case.call({"up_0_1": Reuse(case.other["up_0_1"], run)})[0], run)

    unit = whole - count_macs(lambda: case.call({"up_0_1": case.other["up_0_1"]})[0])
    assert unit > 0.1 * whole
    assert cost(jnp.array(True)) == whole  # of a branch the dearer side is counted
    text = str(jax.make_jaxpr(lambda run: case.call({"up_0_1": Reuse(case.other["up_0_1"], run)}))(jnp.array(True)))
    assert text.count("cond[") == 1
    assert "cond[" not in str(jax.make_jaxpr(lambda: case.call({"up_0_1": case.other["up_0_1"]}))())


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_block_in_a_scan_is_a_branch_of_one_body_and_the_stack_stays_whole(remat):
    config = MMDiTConfig.preset("smoke", depth=6, dual=0, remat=remat)
    network, spec = build(config)
    args = config.input_spec(B, 8, 8, 5)
    value = jax.ShapeDtypeStruct((B, 4, 4, config.width), jnp.float32)

    def velocity(params, args, values):
        return apply(network, params, *args, reuse=values)[0]

    def program(count):
        values = {f"block_{i:02d}": Reuse(value) for i in range(count)}
        text = str(jax.make_jaxpr(velocity)(spec, args, values))
        return text.count("cond["), text.count("scan["), text.count("\n")

    branches, scans, length = program(1)
    assert (branches, scans) == (1, 1) and program(0)[:2] == (0, 1)
    assert program(4)[:2] == (1, 1) and program(4)[2] < length + 40


def test_the_text_of_a_skipped_block_passes_it_unchanged():
    """With both blocks before the last skipped, what the last block reads is the text as it came in."""
    config = MMDiTConfig.preset("smoke", depth=3, dual=0)
    network, _ = build(config)
    params, args = drawn(network), inputs(config, B)
    _, own = apply(network, params, *args, taps=("block_01",))
    zeros = jax.tree.map(jnp.zeros_like, params["joint_blocks"]["text"])
    changed = {**params, "joint_blocks": {**params["joint_blocks"], "text": zeros}}
    reuse = dict.fromkeys(("block_00", "block_01"), own["block_01"])
    skipped = [jax.jit(lambda p: apply(network, p, *args, reuse=reuse)[0])(p) for p in (params, changed)]
    np.testing.assert_array_equal(*skipped)
    last = {"block_01": own["block_01"]}
    one = [jax.jit(lambda p: apply(network, p, *args, reuse=last)[0])(p) for p in (params, changed)]
    assert jnp.abs(one[0] - one[1]).max() > 1e-4


def test_a_reuse_is_a_pytree_whose_bool_is_static():
    value = jnp.ones(3)
    for run, leaves in ((True, 1), (False, 1), (jnp.sum, 1), (jnp.array(True), 2)):
        reuse = Reuse(value, run)
        flat, tree = jax.tree.flatten(reuse)
        assert len(flat) == leaves
        again = jax.tree.unflatten(tree, flat)
        assert again.value is value and again.run is run


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        (Reuse(jnp.zeros((B, 3))), "intermediate mid has shape"),
        (Reuse(jnp.zeros((B, 4, 4, 16)), jnp.zeros(B + 1, bool)), r"mid: whether it runs is bool\[3\]; give one bool"),
        (Reuse(jnp.zeros((B, 4, 4, 16)), lambda x: x.sum()), r"mid: whether it runs is float32\[\]"),
        (Blend(jnp.zeros((B, 4, 4, 16)), jnp.array(True)), r"mid: its share is bool\[\]; give one float, or \[2\]"),
        (Blend(jnp.zeros((B, 4, 4, 16)), jnp.ones(3)), r"mid: its share is float32\[3\]"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(reuse, message):
    tap = Taps(("mid",), (), {"mid": reuse})
    with pytest.raises(ValueError, match=message):
        tap.module("mid", lambda x: 2 * x, jnp.ones((B, 4, 4, 16)))


def test_a_block_that_does_not_fit_is_refused_by_name():
    network, spec = build(DENOISERS["mmdit"])
    args = DENOISERS["mmdit"].input_spec(B, 8, 8, 5)
    for reuse, message in (
        ({"block_01": jnp.zeros((B, 16, 16))}, "intermediate block_01 has shape"),
        ({"block_9": jnp.zeros(1)}, "unknown intermediate block_9; the network has block_00"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, a, reuse=reuse: apply(network, p, *a, reuse=reuse), spec, args)
