"""A teacher whose products are of eight bits: what a recipe holds of it, what it teaches, and what is refused."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.config import load_experiment
from snapgen_jax.networks.module import flatten
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from tests.recipes_for_tests import greys, state_away_from_zero, train_and_read
from tests.students_for_tests import GREYS, STUDENT, TEACHER

TAPS = {"student_taps": ("block_00",), "teacher_taps": ("block_01",)}
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def recipe(precision="int8", platform="cpu", **changes):
    teacher = dataclasses.replace(TEACHER, random=True, precision=precision, **changes)
    return Distillation(DistillationConfig(**STUDENT, teacher=teacher, **TAPS), platform)


def eight(tree):
    """The paths of the leaves of eight bits."""
    return {path for path, leaf in flatten(tree).items() if leaf.dtype.itemsize == 1}


@pytest.fixture(scope="module")
def held():
    """A recipe and its frozen networks, in the compute dtype and in eight bits."""
    return {precision: (made := recipe(precision), made.load_frozen(None)) for precision in ("compute", "int8")}


def test_it_is_loaded_as_the_specs_promise_and_its_fingerprint_is_another(held):
    made, frozen = held["int8"]
    loaded, promised = ({p: (x.shape, x.dtype) for p, x in flatten(t).items()} for t in (frozen, made.frozen_spec()))
    assert loaded == promised
    # Six kernels of a stream, of the last text stream the three that are read.
    assert len(eight(frozen)) == 3 * 6 + 3 and not eight(held["compute"][1])
    prints = [fingerprint(tree) for tree in (frozen, recipe().load_frozen(None), held["compute"][1])]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint(recipe("fp8").load_frozen(None)) not in prints


def test_student_and_projectors_learn_from_it_and_it_stays_as_it_is(held):
    gradients, losses = {}, {}
    for precision, (made, frozen) in held.items():
        state = state_away_from_zero(made)

        def loss(params, made=made, frozen=frozen, extra=state.extra):
            networks = made.weights({"model": params}, frozen)
            drawn = made.draw(networks, greys(), jax.random.key(0), 0)
            total, aux, _ = made.examine(networks, drawn, extra)
            return jnp.mean(total), aux["metrics"]

        (_, losses[precision]), gradients[precision] = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            state.players["model"].params
        )
    assert {path[0] for path in flatten(gradients["int8"])} == {"mmdit", "text", "projector_0"}
    for name, value in losses["compute"].items():
        assert np.isclose(losses["int8"][name], value, rtol=0.02, atol=0), name
    assert losses["int8"]["loss/task"] == losses["compute"]["loss/task"]
    assert losses["int8"]["loss/output"] != losses["compute"]["loss/output"]
    near, exact = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradients[p])]) for p in ("int8", "compute"))
    assert 0 < np.linalg.norm(near - exact) < 0.02 * np.linalg.norm(exact)


def test_a_run_does_not_go_on_with_a_teacher_of_another_precision(tmp_path):
    _, lines = train_and_read(recipe(), GREYS, tmp_path, 1)
    assert lines[-1]["loss/feature"] > 0
    with pytest.raises(ConfigError, match=r"frozen of this workdir is .*the weights and the precision of each frozen"):
        train_and_read(recipe("compute"), GREYS, tmp_path, 2)


def test_what_cannot_be_is_refused_before_a_weight_is_read():
    with pytest.raises(
        ConfigError, match=r"teacher.precision='fp8' is for NVIDIA GPUs .* Set teacher.precision to 'int8'"
    ):
        recipe("fp8", platform="tpu")
    unet = SDUNetConfig.preset("smoke")
    with pytest.raises(ConfigError, match=r"teacher.precision='int8' .* of the kind 'sd_unet' names none"):
        recipe(network=unet)
    recipe(platform="tpu"), recipe("fp8", platform="gpu")


@pytest.mark.parametrize(("capability", "fits"), [("8.0", False), ("8.9", True), ("9.0", True)])
def test_a_gpu_before_ada_does_not_multiply_e4m3(capability, fits):
    teacher = recipe("fp8", platform="gpu").teacher
    device = types.SimpleNamespace(compute_capability=capability, device_kind="NVIDIA Made Up")
    mesh = types.SimpleNamespace(devices=np.array([device], dtype=object))
    if fits:
        teacher._check_devices(mesh)
        return
    with pytest.raises(ConfigError, match=r"NVIDIA Made Up has 8.0; set teacher.precision to 'int8'"):
        teacher._check_devices(mesh)


def test_the_teacher_of_the_pods_takes_the_option():
    """Two thirds of Stable Diffusion 3.5 Large are kernels of tokens; of the rest most is modulation, which stays."""
    made = load_experiment(f"{CONFIGS}/distill/t2i_512_sd35l.py", ["teacher.precision=int8"]).build("tpu")
    flat = flatten(made.frozen_spec()["teacher/mmdit"])
    size = {width: sum(x.size for x in flat.values() if x.dtype.itemsize == width) for width in (1, 2, 4)}
    block = 2 * (4 + 8) * 2432**2  # two streams: around attention, and to a width four times theirs and back
    assert size[1] == 38 * block - 9 * 2432**2  # of the last text stream three kernels are read
    assert size[2] == 8_056_627_520 + 192**2 * 2432 - size[1]
    assert {path[-1] for path, leaf in flat.items() if leaf.dtype == jnp.float32} == {"kernel_scale"}
