"""The operator S at its limits, its running means, and the feature loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from snapgen_jax.losses.distillation import (
    ScalingConfig,
    bin_sums,
    feature_loss,
    new_means,
    scaled,
    task_share,
    update_means,
)

T = jnp.array([0.05, 0.3, 0.5, 0.8, 0.97])
TASK = jnp.array([2.0, 1.0, 0.5, 1.0, 3.0])
OUTPUT = jnp.array([0.2, 0.1, 0.1, 0.3, 0.6])
LOSSES = {"task": TASK, "output": OUTPUT}
WEIGHTS = {"output": 1.0}
FREE = ScalingConfig(alpha_bounds=(0.0, 1.0))


def s(config, losses=LOSSES, weights=WEIGHTS, means=None):
    return scaled(losses, weights, T, means or new_means(tuple(weights), config), config)


def test_the_task_share_is_the_logit_normal_density_over_its_maximum():
    z = np.log(T / (1 - T))
    density = stats.norm.pdf(z) / (T * (1 - T))
    np.testing.assert_allclose(task_share(T, FREE), density / (4 / np.sqrt(2 * np.pi)), rtol=1e-5)
    assert task_share(jnp.array([0.5]), FREE) == 1
    assert task_share(jnp.array([0.0, 1.0]), ScalingConfig()) == pytest.approx(0.02)
    cdf = task_share(T, dataclasses.replace(FREE, alpha="cdf"))
    np.testing.assert_allclose(cdf, stats.norm.cdf(density), rtol=1e-5)


def test_a_share_of_one_is_the_task_alone_and_of_none_the_teacher_alone():
    at = {a: dataclasses.replace(FREE, alpha="constant", constant=a, ratio="none") for a in (0.0, 0.25, 1.0)}
    np.testing.assert_allclose(s(at[1.0]), TASK)
    np.testing.assert_allclose(s(at[0.0]), OUTPUT)
    np.testing.assert_allclose(s(at[0.25]), 0.25 * TASK + 0.75 * OUTPUT, rtol=1e-6)


@pytest.mark.parametrize("alpha", ["density", "cdf", "constant"])
def test_the_ratio_makes_the_teachers_term_as_large_as_the_tasks_so_s_is_the_tasks_value(alpha):
    np.testing.assert_allclose(s(ScalingConfig(alpha=alpha)), TASK, rtol=1e-5)


def test_without_scaling_the_losses_are_added_by_their_weights():
    np.testing.assert_allclose(s(ScalingConfig(alpha="none"), weights={"output": 0.5}), TASK + 0.5 * OUTPUT)


TWO = LOSSES | {"feature": 30 * TASK}
UNEVEN = {"output": 1.0, "feature": 0.05}


def test_of_several_losses_there_is_one_ratio_over_their_weighted_sum():
    """SnapGen++, equation 8: a L_task + (1 - a) r sum_k w_k L_k with r = m_task / sum_k w_k m_k."""
    means = new_means(tuple(UNEVEN), ScalingConfig())
    a, r = task_share(T, ScalingConfig()), TASK / (OUTPUT + 0.05 * TWO["feature"])
    expected = a * TASK + (1 - a) * r * (OUTPUT + 0.05 * TWO["feature"])
    np.testing.assert_allclose(s(ScalingConfig(), TWO, UNEVEN, means), expected, rtol=1e-5)
    np.testing.assert_allclose(expected, TASK, rtol=1e-5)  # so the teacher counts once, however many losses it has

    half = dataclasses.replace(FREE, alpha="constant", constant=0.5)
    by_output = jax.grad(lambda x: jnp.sum(s(half, TWO | {"output": x}, UNEVEN, means)))(OUTPUT)
    np.testing.assert_allclose(by_output, 0.5 * r, rtol=1e-5)
    by_feature = jax.grad(lambda x: jnp.sum(s(half, TWO | {"feature": x}, UNEVEN, means)))(TWO["feature"])
    np.testing.assert_allclose(by_feature, 0.5 * 0.05 * r, rtol=1e-5)


@pytest.mark.parametrize("ratio", ["running", "batch"])
def test_all_weights_times_ten_change_nothing(ratio):
    config = ScalingConfig(ratio=ratio)
    once, tenfold = (s(config, TWO, {name: k * w for name, w in UNEVEN.items()}) for k in (1, 10))
    np.testing.assert_allclose(once, tenfold, rtol=1e-5)


def test_an_operator_for_each_loss_counts_the_task_and_the_teacher_again_for_each():
    each = s(ScalingConfig(terms="each"), TWO, {"output": 1.0, "feature": 1.0})
    np.testing.assert_allclose(each, 2 * TASK, rtol=1e-5)
    halved = s(dataclasses.replace(FREE, terms="each", alpha="constant", constant=0.0), TWO, {"output": 0.5})
    np.testing.assert_allclose(halved, 0.5 * TASK, rtol=1e-5)


def test_the_gradient_passes_both_losses_and_not_the_ratio():
    config = dataclasses.replace(FREE, alpha="constant", constant=0.5)
    by_task, by_output = jax.grad(
        lambda task, output: jnp.sum(s(config, {"task": task, "output": output})), argnums=(0, 1)
    )(TASK, OUTPUT)
    np.testing.assert_allclose(by_task, 0.5)
    np.testing.assert_allclose(by_output, 0.5 * TASK / OUTPUT, rtol=1e-5)


def test_running_means_hold_the_ratio_of_their_bin_of_time():
    config = ScalingConfig(bins=4, decay=0.5)
    t = jnp.array([0.1, 0.2, 0.9])
    means = new_means(("output",), config)
    for output in (1.0, 3.0):
        losses = {"task": jnp.array([4.0, 8.0, 1.0]), "output": jnp.full(3, output)}
        means = update_means(means, bin_sums(losses, t, config), config)
    mean = {name: part["total"] / part["count"] for name, part in means.items()}
    np.testing.assert_allclose(mean["task"][jnp.array([0, 3])], [6.0, 1.0])
    np.testing.assert_allclose(mean["output"][0], (0.25 * 1 + 0.5 * 3) / 0.75)  # the newer counts twice as much
    np.testing.assert_array_equal(means["task"]["count"][1:3], 0)

    alpha_0 = dataclasses.replace(config, alpha="constant", constant=0.0, alpha_bounds=(0.0, 1.0))
    value = scaled({"task": jnp.ones(1), "output": jnp.ones(1)}, WEIGHTS, jnp.array([0.1]), means, alpha_0)
    np.testing.assert_allclose(value, 6.0 / mean["output"][0], rtol=1e-6)


def test_all_bins_forget_by_updates_and_not_by_sightings():
    """After so many updates elsewhere that a bin's history has faded to a hundredth, one example outweighs it."""
    config = ScalingConfig(bins=2, decay=0.9)
    means = new_means(("output",), config)

    def seen(means, t, task):
        losses = {"task": jnp.array([task]), "output": jnp.ones(1)}
        return update_means(means, bin_sums(losses, jnp.array([t]), config), config)

    def ratio(means):
        teacher_alone = dataclasses.replace(config, alpha="constant", constant=0.0, alpha_bounds=(0.0, 1.0))
        return scaled({"task": jnp.ones(1), "output": jnp.ones(1)}, WEIGHTS, jnp.array([0.1]), means, teacher_alone)

    for _ in range(100):
        means = seen(means, 0.1, 8.0)
    for _ in range(44):  # 0.9^44 = 0.0097
        means = seen(means, 0.9, 1.0)
    np.testing.assert_allclose(ratio(means), 8.0, rtol=1e-5)  # what fades keeps its mean
    faded = 0.9**45 * (1 - 0.9**100)
    np.testing.assert_allclose(ratio(seen(means, 0.1, 2.0)), (8 * faded + 0.1 * 2) / (faded + 0.1), rtol=1e-5)
    for _ in range(500):  # nothing is left of it: the example at hand speaks for itself
        means = seen(means, 0.9, 1.0)
    np.testing.assert_allclose(ratio(means), 1.0, rtol=1e-5)


def test_one_batch_ratio_and_the_bounds_are_the_other_readings():
    config = dataclasses.replace(FREE, alpha="constant", constant=0.0, ratio="batch")
    np.testing.assert_allclose(s(config), OUTPUT * TASK.mean() / OUTPUT.mean(), rtol=1e-6)
    np.testing.assert_allclose(s(dataclasses.replace(config, ratio_bounds=(0.01, 2.0))), 2 * OUTPUT)


def test_features_are_compared_with_the_teachers_normalised_and_no_gradient_reaches_him():
    teacher = 100 + 50 * jax.random.normal(jax.random.key(0), (2, 4, 4, 32))
    normal = (teacher - teacher.mean(-1, keepdims=True)) / teacher.std(-1, keepdims=True)
    np.testing.assert_allclose(feature_loss(normal, teacher), 0.0, atol=1e-6)
    np.testing.assert_allclose(feature_loss(normal + 2.0, teacher), 4.0, rtol=1e-4)
    by_student, by_teacher = jax.grad(lambda *f: feature_loss(*f).sum(), argnums=(0, 1))(normal + 1, teacher)
    assert jnp.all(by_teacher == 0) and jnp.any(by_student != 0)
    with pytest.raises(ValueError, match="must be equal"):
        feature_loss(normal[..., :16], teacher)
