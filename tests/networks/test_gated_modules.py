"""What enters and leaves the modules inside blocks has a name, in a scan as in a loop: what gates stand on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.networks.dit import DiTConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import apply, build, for_platform
from snapgen_jax.networks.taps import Blend, Reuse
from snapgen_jax.networks.unet import UNetConfig
from tests.networks.tiny import drawn, inputs

pytestmark = pytest.mark.usefixtures("quick_to_compile")
B = 2
CONFIGS = {
    "unet": for_platform(UNetConfig.preset("smoke", first_stage="res+tf", mid="rar"), "cpu"),
    "mmdit": MMDiTConfig.preset("smoke", depth=4, dual=1),
    "dit": DiTConfig.preset("smoke"),
}
# Of an MMDiT, in a stack of one layer, in one of two, and the last block, which is no part of a scan.
MODULES = {
    "unet": (
        "down_0_0_residual",
        "down_1_0_block_0_self_attention",
        "mid_block_0_ffn",
        "up_1_1_block_0_cross_attention",
    ),
    "mmdit": ("block_00_self_attention", "block_01_attention", "block_02_text_ffn", "block_03_attention"),
    "dit": ("block_00_attention", "block_00_ffn", "block_01_attention", "block_01_ffn"),
}


class Case:
    """A network with drawn parameters, all that enters and leaves its modules, and programs with decisions inside."""

    def __init__(self, name):
        self.network, _ = build(CONFIGS[name])
        self.params, self.args = drawn(self.network), inputs(CONFIGS[name], B)
        names = CONFIGS[name].tap_names()
        self.modules = tuple(name for name in names if f"{name}_input" in names)
        self.some = MODULES[name]
        self.v, self.own = jax.jit(lambda: self.call(taps=[n for m in self.modules for n in (f"{m}_input", m)]))()
        self.other = {m: self.own[m] + jax.random.normal(jax.random.key(1), self.own[m].shape) for m in self.modules}

    def call(self, reuse=None, taps=()):
        return apply(self.network, self.params, *self.args, taps=taps, reuse=reuse)

    @functools.cached_property
    def by_share(self):
        """`shares [modules] -> v`, as in training: each share is told by a function of what enters the module."""
        return jax.jit(self._by_share)

    def _by_share(self, shares):
        reuse = {m: Blend(self.other[m], lambda z, i=i: shares[i] + 0 * z.mean()) for i, m in enumerate(self.modules)}
        return self.call(reuse)[0]

    @functools.cached_property
    def by_row(self):
        """`runs [modules, B] -> v`, as in sampling: told by functions of what enters the modules."""

        def run(runs):
            reuse = {m: Reuse(self.other[m], lambda z, i=i: runs[i] & (z.size > 0)) for i, m in enumerate(self.modules)}
            return self.call(reuse)[0]

        return jax.jit(run)

    def without(self, *modules):
        """Shares that leave these out."""
        return jnp.array([float(m not in modules) for m in self.modules])


@functools.cache
def case_of(name):
    return Case(name)


@pytest.fixture(params=CONFIGS)
def case(request):
    return case_of(request.param)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_every_module_is_named_with_what_enters_it():
    blocks = {"joint": ("attention", "ffn", "text_ffn"), "last": ("attention", "ffn")}
    blocks["dual"] = ("attention", "self_attention", "ffn", "text_ffn")
    kinds = ("dual", "joint", "joint", "last")
    of_mmdit = case_of("mmdit")
    assert of_mmdit.modules == tuple(f"block_{i:02d}_{m}" for i, kind in enumerate(kinds) for m in blocks[kind])
    image, text, width = 16, 5, CONFIGS["mmdit"].width
    for name, tokens in (("attention", image + text), ("ffn", image), ("text_ffn", text)):
        assert of_mmdit.own[f"block_01_{name}"].shape == (B, tokens, width)
        assert of_mmdit.own[f"block_01_{name}_input"].shape == (B, tokens, width)
    assert of_mmdit.own["block_03_attention_input"].shape[1] == image + text  # the text is read there, and ends
    assert of_mmdit.own["block_03_attention"].shape[1] == image
    unet = case_of("unet")
    inner = [f"mid_block_0_{name}" for name in ("self_attention", "cross_attention", "ffn")]
    assert [m for m in unet.modules if m.startswith("mid_")] == ["mid_residual", *inner, "mid_second_residual"]
    assert unet.own["mid_residual_input"].shape == (B, 4, 4, 16) and unet.own["mid_block_0_ffn"].shape == (B, 16, 16)


def test_a_module_that_runs_in_full_changes_nothing_and_each_one_counts(case):
    ones = jnp.ones(len(case.modules))
    close(case.by_share(ones), case.v)
    gradient = jax.jit(jax.grad(lambda shares: jnp.sum(jnp.square(case._by_share(shares)))))(0.5 * ones)
    assert gradient.shape == ones.shape and jnp.isfinite(gradient).all() and (gradient != 0).all()


def test_a_value_in_place_of_some_modules_is_a_share_of_nothing(case):
    replaced = jax.jit(lambda: case.call({m: Reuse(case.other[m]) for m in case.some}, taps=case.some))()
    close(replaced[0], case.by_share(case.without(*case.some)))
    for module in case.some:
        np.testing.assert_array_equal(replaced[1][module], case.other[module])
        assert jnp.abs(case.by_share(case.without(module)) - case.v).max() > 1e-3, module


def test_examples_decide_for_themselves(case):
    runs = np.random.default_rng(0).random((len(case.modules), B)) < 0.5
    rows = [case.by_share(jnp.asarray(runs[:, b], jnp.float32))[b] for b in range(B)]
    close(case.by_row(jnp.asarray(runs)), jnp.stack(rows))
    close(case.by_row(jnp.ones_like(runs)), case.v)


def test_what_enters_decides_alone_and_beside_decisions_made_before(case):
    """Functions, arrays and constants among the layers of one scan; what a function reads is what a tap returns."""
    first, second, third, last = case.some
    size = float(jnp.sum(case.own[f"{second}_input"]))
    told = {
        first: Reuse(case.other[first], True),
        second: Reuse(case.other[second], lambda z: jnp.abs(jnp.sum(z) - size) < 1e-2 * abs(size)),
        third: Reuse(case.other[third], jnp.array([True, False])),
        last: Reuse(case.other[last], lambda z: jnp.array(False)),
    }
    v = jax.jit(lambda: case.call(told)[0])()
    kept = case.by_share(case.without(last)), case.by_share(case.without(third, last))
    close(v, jnp.stack([kept[0][0], kept[1][1]]))


def recomputed(name, remat):
    """The gradient by shares of what a network gives and taps, as a function, where the backward pass recomputes."""
    case = case_of(name)
    network, _ = build(dataclasses.replace(CONFIGS[name], remat=remat))

    def loss(shares):
        gated = {m: Blend(case.other[m], lambda z, i=i: shares[i] + 0 * z.mean()) for i, m in enumerate(case.modules)}
        taps = [f"{m}_input" for m in case.modules]
        v, found = apply(network, case.params, *case.args, taps=taps, reuse=gated)
        return jnp.mean(jnp.square(v)) + sum(jnp.mean(jnp.sin(x)) for x in found.values())

    return jax.grad(loss), jnp.linspace(0.2, 0.9, len(case.modules))


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_what_is_found_leaves_a_block_that_is_recomputed(name):
    for remat in {"unet": ("products", "blocks"), "dit": ("block",)}[name]:
        gradient, shares = recomputed(name, remat)
        assert jax.eval_shape(gradient, shares).shape == shares.shape


def test_recomputing_layers_of_a_scan_changes_no_gradient_of_a_share():
    (expected, shares), (given, _) = recomputed("mmdit", "none"), recomputed("mmdit", "block")
    np.testing.assert_allclose(jax.jit(given)(shares), jax.jit(expected)(shares), rtol=1e-3, atol=1e-5)


def test_the_program_is_as_long_for_gates_in_many_blocks_as_in_few():
    def lines(depth):
        config = MMDiTConfig.preset("smoke", depth=depth, dual=0)
        network, spec = build(config)
        args = config.input_spec(B, 8, 8, 5)
        value = jax.ShapeDtypeStruct((B, 16, config.width), jnp.float32)
        values = {f"block_{i:02d}_ffn": value for i in range(depth - 1)}

        def v(params, args, values):
            reuse = {name: Reuse(x, lambda z: z.sum() > 0) for name, x in values.items()}
            return apply(network, params, *args, reuse=reuse, taps=[f"{name}_input" for name in values])

        return str(jax.make_jaxpr(v)(spec, args, values)).count("\n")

    # What grows are the decisions, and handing values in and out: a few lines of one operation each.
    few, many = lines(4), lines(24)
    assert many - few < 20 * 20 and many < 2.5 * few


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        ({"block_01_ffn": jnp.zeros((B, 3, 16))}, r"intermediate ffn has shape \(2, 16, 16\)"),
        (
            {"block_01_ffn": jnp.zeros((B, 16, 16)), "block_02_ffn": Blend(jnp.zeros((B, 16, 16)))},
            "ffn of blocks that are one scan: give all values in one shape and as one kind of Reuse",
        ),
        ({"block_01": Blend(jnp.zeros((B, 4, 4, 16)))}, "layer 0 is given a Blend; layers of a scan run or do not"),
        ({"block_03_text_ffn": jnp.zeros(1)}, "unknown intermediate block_03_text_ffn"),
        ({"block_01_ffn": Reuse(jnp.zeros((B, 16, 16)), jnp.zeros(3, bool))}, "ffn: whether it runs is bool.3."),
    ],
)
def test_a_replacement_inside_a_scan_that_does_not_fit_is_refused(reuse, message):
    network, spec = build(CONFIGS["mmdit"])
    args = CONFIGS["mmdit"].input_spec(B, 8, 8, 5)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, a: apply(network, p, *a, reuse=reuse), spec, args)
