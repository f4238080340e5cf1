"""A program or a plan that does not fit together is refused, with the name of what is wrong."""

import copy

import numpy as np
import pytest

from snapgen_jax.export.bundle import export_bundle
from snapgen_jax.export.program import BundleError, parse
from snapgen_jax.export.sampler import with_options
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs

from .conftest import PROMPTS, QUICK, ToyRecipe
from .toys import ClipRecipe, SketchRecipe, flow

ONE = {"shape": [1], "dtype": "float32"}


def test_steps_that_differ_allow_no_other_grid_and_no_other_method():
    program = parse(ClipRecipe().exports().program)
    with pytest.raises(ValueError, match="takes 4 steps and no other number; leave out `steps`"):
        with_options(program, steps=8)
    with pytest.raises(ValueError, match="the steps of this bundle differ, and so their method is fixed"):
        with_options(program, method="heun")
    with pytest.raises(ValueError, match=r"guidance of this bundle has the shape \(3,\); got \(\)"):
        with_options(program, guidance=2.0)
    same = with_options(program, steps=4, method="euler", guidance=[1.0, 1.0, 1.0])
    assert not any(step.guided for step in same.steps)


def test_another_guidance_leaves_the_steps_that_have_none():
    inputs = {"label": {**ONE, "null": 0}}
    program = parse(flow({"guidance": 3.0}, steps=[{"guidance": 1}, {}], inputs=inputs))
    program = with_options(program, guidance=5)
    assert [float(step.guidance) for step in program.steps] == [1, 5]
    program = parse(flow(inputs=inputs))
    program = with_options(program, guidance=5)
    assert [float(step.guidance) for step in program.steps] == [5, 5, 5]


def test_a_grid_of_its_own_allows_another_method_but_no_other_number():
    program = parse(flow())
    assert with_options(program, method="renoise").noise_shape() == (2, 2)
    with pytest.raises(ValueError, match="takes 2 steps"):
        with_options(program, steps=3)


IDS = {"file": "tokenizer.json", "tokens": "ids", "begin": [1], "end": [], "pad": 0}
STATE = {"shape": [1], "dtype": "float32", "initial": "zeros"}
FEATURES = {"kind": "features", "dim": 4, "scale": 1.0, "max_period": 9.0, "order": "sin,cos"}


@pytest.mark.parametrize(
    "data, message",
    [
        (flow(schema=4), "schema is 4; this client knows 3"),
        (flow(kind="ddpm"), "kind is 'ddpm'; this client knows flow, feed_forward"),
        (flow(sampler="euler"), "has sampler; this client knows schema, kind"),
        (flow(times=[1.0]), "`times` needs two entries"),
        (flow({"rule": "rk4"}), "step: rule is 'rk4'; this client knows euler, heun, renoise"),
        (flow({"guidanse": 2}), "step has guidanse"),
        (flow({"guidance_interval": [0.5]}), r"guidance_interval is \[0.5\]; two times"),
        (flow({"guidance_interval": [0.8, 0.1]}), "two times from 0 to 1, the lower one first"),
        (flow({"guidance": 2.0, "guidance_interval": [0.6, 0.9]}), "guidance_interval holds none of the times 1, 0.5"),
        (flow({"guidance": "strong"}), "step: guidance is 'strong'; numbers were expected"),
        (flow({"arrays": {"gates": [[1], [1, 2]]}}), "step: arrays.gates is .*; numbers were expected"),
        (flow({"prediction": {"kind": "eps"}}), "step: prediction is 'eps'"),
        (flow({"prediction": {"kind": "x_0"}}), "step: prediction lacks t_min"),
        (flow({"time": {"kind": "log"}}), "step: time is 'log'"),
        (flow({"time": {"kind": "index"}}), "step: time lacks size"),
        (flow({"time": FEATURES}), "time features in the order 'sin,cos'"),
        (flow({"context": "text"}), "a step has the context 'text'; there are"),
        (flow({"guidance": [1, 2, 3]}), r"guidance \(3,\) does not fit x, \(2,\)"),
        (flow({"guidance": 2.0}, inputs={"label": ONE}), "guidance needs the `null` of the inputs label"),
        (flow(steps=[{}]), "3 times need 2 steps, or one more; got 1"),
        (flow(steps=[{}, {"rule": "rk4"}]), r"steps\[1\]: rule is 'rk4'"),
        (flow(steps=[{}, 5]), r"steps\[1\] is 5; an object was expected"),
        (flow(steps=[{}, {"rule": "heun"}]), "the last rule is 'heun', which asks at the last time"),
        (flow({"rule": "renoise"}, times=[1.0, 0.1]), "'renoise', which ends at time 0, not 0.1"),
        (flow(shift=1.0, steps=[{}, {}]), "`shift` offers other grids, but the steps are made for this one"),
        (flow({"time": {"kind": "index", "size": 3}}, shift=1.0), "`shift` offers other grids"),
        (flow(inputs={"time": ONE}), "the input 'time' has the name of what the sampler gives"),
        (flow(inputs={"label": {**ONE, "dtype": "bfloat16"}}), "inputs.label: dtype is 'bfloat16'"),
        (
            flow(inputs={"label": {**ONE, "null": [1, 2]}}),
            r"inputs.label: the null \[1, 2\] is neither 'keep' nor fits",
        ),
        (flow(inputs={"ids": ONE}, tokenizers=[IDS]), r"tokenizers\[0\] makes 'ids', which is no input of int32"),
        (flow(inputs={"ids": {**ONE, "dtype": "int32"}}, tokenizers=[IDS]), "no token fits into 1"),
        (flow(inputs={"ids": ONE}, tokenizers=[{"tokens": "ids"}]), r"tokenizers\[0\] lacks file, begin, end, pad"),
        (flow(null_contexts={"text": {}}), "null_contexts has 'text'; the contexts are"),
        (flow(contexts={"text": []}, null_contexts={"text": {"x": ONE}}), "null_contexts.text.x needs a `null`"),
        (flow(inputs={"cache": ONE}, state={"cache": STATE}), "the state 'cache' has the name of an input"),
        (flow(state={"cache": ONE}), "state.cache: initial is None; this client knows zeros"),
        (flow(outputs={"image": ONE}), "without a decoder the outputs are"),
        (flow(decoder={"kind": "vae"}), "decoder is 'vae'; this client knows identity, patch, network"),
        (flow(decoder={"kind": "network"}), "the decoder is a network, and names no `unit`"),
        (flow(decoder={"kind": "network", "unit": "d", "chunk": 3}), "the decoder's chunk 3 does not divide 2"),
        (flow(decoder={"kind": "patch"}), "a decoder without a unit gives 'image'; outputs are"),
        ({"schema": 3, "kind": "feed_forward", "inputs": {}, "outputs": {}}, "lacks unit"),
    ],
)
def test_a_program_that_does_not_fit_together_is_refused(data, message):
    with pytest.raises(BundleError, match=message):
        parse(data)


class Changed(ToyRecipe):
    """The toy with another plan."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def exports(self):
        return self.change(super().exports())


def without_unit(plan):
    return ExportPlan(plan.units[:1], plan.program, plan.golden)


def another_name(plan):
    net = plan.units[0]
    program = copy.deepcopy(dict(plan.program))
    program["step"] |= {"unit": "../net"}
    return ExportPlan([ExportUnit("../net", net.function, net.roles, net.inputs), plan.units[1]], program, plan.golden)


def another_role(plan):
    net = plan.units[0]
    return ExportPlan(
        [ExportUnit("net", net.function, ("unet",), net.inputs), plan.units[1]], plan.program, plan.golden
    )


def arrays_in_program(plan):
    return ExportPlan(plan.units, {**plan.program, "times": np.float32([1, 0])}, plan.golden)


def with_golden(golden):
    return lambda plan: ExportPlan(plan.units, plan.program, golden)


@pytest.mark.parametrize(
    "change, message",
    [
        (without_unit, r"calls the units \['net', 'text'\]; the plan has \['net'\]"),
        (another_name, "'../net' is no name of a file"),
        (another_role, "the export unit 'net' needs the weights unet; the recipe has net, text"),
        (arrays_in_program, "the plan's program is no plain JSON"),
        (with_golden(GoldenInputs()), "a tokenizer and at least one golden prompt"),
        (
            with_golden(GoldenInputs(PROMPTS, {"label": np.ones(2)})),
            r"the golden inputs are \['label', 'mask', 'tokens'\]",
        ),
    ],
)
def test_a_plan_that_does_not_fit_together_is_refused_before_anything_is_converted(
    change, message, tokenizer_json, tmp_path
):
    recipe = Changed(change)
    with pytest.raises(ValueError, match=message):
        export_bundle(recipe, recipe.params(), {}, tokenizer_json, tmp_path / "bundle", backend=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_golden_examples_of_different_numbers_are_refused(tmp_path):
    recipe = SketchRecipe()
    with pytest.raises(ValueError, match=r"different numbers of examples, or none: \[0\]"):
        export_bundle(
            recipe,
            recipe.params(),
            {},
            None,
            tmp_path / "bundle",
            golden_inputs=GoldenInputs(arrays={"image": np.zeros((0, 8, 8, 3), np.uint8)}),
        )
