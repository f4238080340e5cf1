"""Few steps, turn by turn: who steps when and against what draw, which teacher is asked what, and at which times."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.bounds import FieldError
from snapgen_jax.diffusion.path import interpolate, x0_from_velocity
from snapgen_jax.diffusion.schedules import FlowSchedule, VPSchedule
from snapgen_jax.losses.distribution_matching import distribution_matching_loss
from snapgen_jax.networks.discriminator import DiscriminatorConfig
from snapgen_jax.recipes._sampling import SamplingConfig, sampling_grid
from snapgen_jax.recipes.adversarial import Adversarial, AdversarialConfig
from snapgen_jax.recipes.distillation import Distillation, DistillationConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.step import guards, make_step
from tests.recipes_for_tests import greys, random_like, state_away_from_zero, train_and_read
from tests.students_for_tests import CAPTIONS, GREYS, MMDIT, STUDENT, TEACHER

TURBO = (1.0, 0.858, 0.602, 0.009)
EVEN = SamplingConfig(steps=4, guidance=1.0, method="renoise", shift=3.0)
UNSHIFTED = dataclasses.replace(EVEN, shift=1.0)
HEADS = DiscriminatorConfig.preset("smoke", taps=("block_00",), channels=(16,), time_width=16)
AT_TURBO = SamplingConfig(steps=4, guidance=1.0, method="renoise", times=TURBO)
SMALL = dataclasses.replace(MMDIT, depth=1)
FULL = dataclasses.replace(TEACHER, network=SMALL)
FEW = dataclasses.replace(FULL, few_step_times=TURBO)
GUIDED = dataclasses.replace(FULL, guidance=4.0)
BY_TWO = {
    **STUDENT,
    "network": SMALL,
    "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="linear", warmup_steps=0),
}
KDMD = AdversarialConfig(
    **BY_TWO,
    teacher=FEW,
    score_teacher=GUIDED,
    sampling=AT_TURBO,
    adversarial_weight=0.0,
    critic_weight=1.0,
    generator_every=5,
)


def recipe(**changes):
    return Adversarial(dataclasses.replace(KDMD, **changes), "cpu")


def watched(made):
    """The calls of a recipe's networks as they run, by name: lists of times `[B]`."""
    calls = {"generator": [], "critic": [], "teacher": [], "score_teacher": []}

    def watching(name, denoiser, of=lambda params: True):
        class Watching(type(denoiser)):
            def __call__(self, params, x_t, level, context, **options):
                t = level if not hasattr(level, "t") else level.t
                jax.debug.callback(lambda t: calls[name].append(np.asarray(t)), t)
                return super().__call__(params, x_t, level, context, **options)

        return Watching(denoiser.network, denoiser.prediction, denoiser.schedule)

    made.denoiser = watching("generator", made.denoiser)
    made.opponents["critic"].denoiser = watching("critic", made.opponents["critic"].denoiser)
    made.teacher.denoiser = watching("teacher", made.teacher.denoiser)
    made.score.denoiser = watching("score_teacher", made.score.denoiser)
    return made, calls


@pytest.fixture(scope="module")
def five():
    """A recipe whose generator steps in every fifth update; its states before, between and after six updates, their
    metrics, and how often each network was called in each."""
    made, calls = watched(recipe())
    frozen, state = random_like(made.frozen_spec()), state_away_from_zero(made)
    step = jax.jit(make_step(made, 0))
    states, metrics, counts = [state], [], []
    for i in range(6):
        before = {name: len(times) for name, times in calls.items()}
        state, found = step(states[-1], frozen, greys(i))
        jax.block_until_ready(state)
        jax.effects_barrier()
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
        counts.append({name: len(times) - before[name] for name, times in calls.items()})
    return made, frozen, states, metrics, counts, calls


# --- cadence ---


def moved(before, after, player):
    a, b = (jax.tree.leaves(state.players[player].params) for state in (before, after))
    return any(np.any(x != y) for x, y in zip(a, b, strict=True))


def test_the_critic_steps_in_each_update_and_the_generator_in_the_fifth(five):
    _, _, states, *_ = five
    turns = [(moved(a, b, "critic"), moved(a, b, "model")) for a, b in itertools.pairwise(states)]
    assert turns == [(True, False)] * 4 + [(True, True), (True, False)]


def test_what_the_generators_step_needs_is_not_computed_in_the_others(five):
    *_, counts, _ = five
    waiting = {"generator": 1, "critic": 1, "teacher": 0, "score_teacher": 0}
    assert [*counts[:4], counts[5]] == [waiting] * 5
    assert counts[4] == {"generator": 2, "critic": 2, "teacher": 1, "score_teacher": 2}  # guided: with and without text


def test_its_schedule_and_average_go_by_its_own_steps(five):
    made, _, states, metrics, *_ = five
    counts = {
        name: {int(x) for x in jax.tree.leaves(player.opt_state) if x.dtype == jnp.int32}
        for name, player in states[-1].players.items()
    }
    assert counts == {"model": {1}, "critic": {6}}
    assert float(made.learning_rate(4)) == pytest.approx(0.005)  # of the eight that 40 updates are
    assert metrics[4]["learning_rate"] == pytest.approx(0.01)  # its first
    before, after = (state.players["model"] for state in (states[4], states[5]))
    jax.tree.map(
        lambda e, p, new: np.testing.assert_allclose(new, e + 0.9 * (p - e), rtol=1e-5, atol=1e-6),  # decay 1 / 10
        before.ema,
        after.params,
        after.ema,
    )


def test_in_between_its_metrics_stay_those_of_its_latest_step(five):
    made, _, states, metrics, *_ = five
    assert all(np.isfinite(list(found.values())).all() and found["finite"] for found in metrics)
    own = [[found[name] for name in made._generator_metrics] for found in metrics]
    assert own[:4] == [[0.0] * len(own[0])] * 4 and all(value > 0 for value in own[4][2:]) and own[5] == own[4]
    found = {name: jnp.float32(value) for name, value in metrics[5].items() if name != "finite"}
    assert len(guards(found, states[5])) == len(found), "or the loop would look through all that is new"


@pytest.mark.parametrize("changes", [{}, {"output_weight": 0.0, "generator_every": 2}])
def test_what_the_generators_step_reports_is_known_before_it_steps(changes):
    made = recipe(**changes)
    state = state_away_from_zero(made)

    def report(frozen, batch, key):
        drawn = made.draw(made.current(state, frozen), batch, key)
        return made.step_generator(state, frozen, drawn)[1]

    (spec,) = made.batch_specs().values()
    assert set(jax.eval_shape(report, made.frozen_spec(), spec, jax.random.key(0))) == set(made._generator_metrics)


def test_the_loop_carries_turns_of_unequal_length(tmp_path):
    train_and_read(FlowMatching(FlowMatchingConfig(**BY_TWO), "cpu"), GREYS, tmp_path / "before", 1)
    teacher = dataclasses.replace(FULL, workdir=str(tmp_path / "before"))
    made = recipe(teacher=teacher, score_teacher=None, sampling=EVEN, generator_every=2)
    state, lines = train_and_read(made, GREYS, tmp_path / "run", 4)
    assert all(line["finite"] for line in lines)
    losses = [line["loss"] for line in lines]
    assert losses[0] == 0 < losses[1] == losses[2] != losses[3]
    assert set(state.extra) == {"means", "generator"}


# --- draws ---


def test_the_critic_is_asked_at_another_draw_than_it_was_just_trained_at(five):
    *_, calls = five
    trained, asked = calls["critic"][-2:]
    assert not np.isin(asked, trained).any()
    made = recipe(adversarial_weight=0.1, own_samples=0.5, trunk="teacher", discriminator=HEADS, output_weight=0.0)
    opponents, generator = (made.draw_turn(jax.random.fold_in(jax.random.key(0), i), (8, 4, 4, 12)) for i in (101, 100))
    for name in ("eps", "own_noise", "critic", "discriminator"):
        same = jax.tree.map(np.array_equal, opponents[name], generator[name])
        assert not any(jax.tree.leaves(same)), name


@pytest.mark.parametrize("schedule", [FlowSchedule(std=6.0), VPSchedule.preset("sd15")], ids=["flow", "vp"])
def test_the_critics_times_are_those_of_the_density_within_bounds(schedule):
    fields = {"schedule": schedule, "prediction": "v", "sampling": UNSHIFTED, "teacher": FULL}
    assert recipe(**fields).opponents["critic"].times == (0.02, 0.98)  # those of DMD2
    critic = recipe(**fields, critic_times=(0.1, 0.9)).opponents["critic"]
    level = schedule.draw(jax.random.key(0), (2000,))
    bounded = critic.draw(jax.random.key(1), (2000, 1), level.t, level)["level"]
    np.testing.assert_allclose(bounded.t, np.clip(level.t, 0.1, 0.9), rtol=1e-6)
    inside = (level.t >= 0.1) & (level.t <= 0.9)
    assert 0 < inside.mean() < 1
    for a, b in zip(level, bounded, strict=True):
        np.testing.assert_array_equal(a[inside], b[inside])


# --- teachers ---


def test_two_teachers_that_differ_in_their_question_alone_are_held_once():
    made = recipe(teacher=FULL, sampling=EVEN)
    assert set(made.frozen_spec()) == {"teacher/mmdit"} and made.score.places == {"mmdit": "teacher/mmdit"}
    assert set(recipe().frozen_spec()) == {"teacher/mmdit", "score_teacher/mmdit"}, "a few-step teacher is another"
    alone = recipe(output_weight=0.0, teacher=FEW)
    assert set(alone.frozen_spec()) == {"score_teacher/mmdit"}, "nothing asks the other"
    assert set(recipe(output_weight=0.0, teacher=FULL, score_teacher=None).frozen_spec()) == {"teacher/mmdit"}


def test_what_both_are_fed_is_held_and_drawn_once(tmp_path):
    text = dataclasses.replace(CAPTIONS, text_workdir="runs/clip")
    fed = {"inputs": text}
    made = recipe(teacher=dataclasses.replace(FEW, **fed), score_teacher=dataclasses.replace(GUIDED, **fed))
    assert set(made.frozen_spec()) == {"teacher/mmdit", "teacher/text", "score_teacher/mmdit"}
    networks = made.current(state_away_from_zero(made), random_like(made.frozen_spec()))
    drawn = jax.jit(made.draw)(networks, greys(), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, drawn["teacher"], drawn["score_teacher"])
    own = dataclasses.replace(GUIDED, workdir="runs/other", inputs=CAPTIONS)  # a text encoder of its own run
    apart = recipe(teacher=dataclasses.replace(FEW, **fed), score_teacher=own)
    assert {"teacher/text", "score_teacher/text"} <= set(apart.frozen_spec())
    assert set(apart.tokenizers()) == {"tokens"} and apart.batch_specs() == made.batch_specs()
    split = recipe(shard_student=False)
    assert any("score_teacher" in pattern for pattern, _ in split.rules())


def test_weights_that_both_have_are_read_once(tmp_path, monkeypatch):
    train_and_read(FlowMatching(FlowMatchingConfig(**STUDENT), "cpu"), GREYS, tmp_path / "run", 1)
    read, load_run = [], __import__("snapgen_jax.recipes._teacher", fromlist=["load_run"]).load_run
    monkeypatch.setattr(
        "snapgen_jax.recipes._teacher.load_run", lambda *a, **k: read.append(set(a[1])) or load_run(*a, **k)
    )
    held = {"workdir": str(tmp_path / "run")}
    teacher, score = (dataclasses.replace(t, **held) for t in (FULL, GUIDED))
    frozen = recipe(teacher=teacher, score_teacher=score, sampling=EVEN).load_frozen(None)
    assert read == [{"mmdit"}] and set(frozen) == {"teacher/mmdit"}
    with pytest.raises(ConfigError, match=r"no score_teacher: set score_teacher\.workdir"):
        recipe(teacher=teacher, sampling=EVEN).load_frozen(None)


def test_the_critic_is_compared_with_the_guided_score_and_not_with_the_few_step_teacher(five):
    made, frozen, states, *_ = five
    networks = made.current(states[0], frozen)
    drawn = jax.jit(made.draw)(networks, greys(), jax.random.key(1))
    plain = Adversarial(made.config, "cpu")

    @jax.jit
    def both(networks):
        x_0, condition = plain.generated(networks, drawn)
        level = drawn["critic"]["level"]
        x_t = interpolate(x_0, drawn["critic"]["eps"], level.t)
        null = jax.tree.map(lambda e, c: jnp.broadcast_to(e, c.shape), made.inputs.null_condition(networks), condition)

        def end(role, told):
            return x0_from_velocity(x_t, plain.denoiser(networks[role], x_t, level, told)[0], level.t)

        without, with_text = end("score_teacher/mmdit", null), end("score_teacher/mmdit", condition)
        expected = distribution_matching_loss(x_0, end("critic/mmdit", condition), without + 4 * (with_text - without))
        return plain.opponents["critic"].generator_loss(networks, drawn, x_0, condition), expected

    found, expected = both(networks)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_without_a_loss_of_the_data_the_teachers_terms_stand_as_they_are():
    """The scaling by which a config says K-DMD: L_DMD + L_out, and nothing of the task."""
    bare = dataclasses.replace(KDMD.scaling, alpha="constant", constant=0.0, alpha_bounds=(0.0, 1.0), ratio="none")
    made = recipe(scaling=bare)
    state, frozen = state_away_from_zero(made), random_like(made.frozen_spec())
    drawn = jax.jit(made.draw)(made.current(state, frozen), greys(), jax.random.key(0))
    total, aux = jax.jit(made.loss)(made.current(state, frozen), drawn, state.extra)
    np.testing.assert_allclose(total, aux["metrics"]["loss/output"] + aux["metrics"]["loss/matching"], rtol=1e-5)


# --- times ---


def test_given_times_are_those_of_training_validation_and_sampling(five):
    made, _, states, *_, calls = five
    np.testing.assert_array_equal(made.levels.t, np.float32(TURBO))
    assert {float(t) for times in calls["generator"] for t in times} <= {float(t) for t in np.float32(TURBO)}
    losses = jax.eval_shape(
        made.validation_loss,
        {"model": states[0].players["model"].params},
        made.frozen_spec(),
        greys(),
        jax.random.key(0),
    )
    assert set(losses) == {"mean", "t=1.00", "t=0.86", "t=0.60", "t=0.01"}
    grid = sampling_grid(FlowSchedule(), AT_TURBO)
    even = FlowSchedule().grid(4, 3.0)
    jax.tree.map(np.testing.assert_array_equal, FlowSchedule().grid_at(even.t[:-1].tolist()), even)
    np.testing.assert_array_equal(grid.t, np.float32([*TURBO, 0.0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 8}, "set steps to their number"),
        ({"shift": 3.0}, "shift to 1"),
        ({"times": (1.0, 0.5, 0.5, 0.1)}, "times that fall"),
        ({"times": (1.0, 0.5, 0.2, 0.0)}, "the last above 0"),
        ({"times": (1.5, 0.5, 0.2, 0.1)}, "the first at most 1"),
        ({"times": (0.9, 0.5, 0.2, 0.1)}, "a flow begins with noise alone"),
    ],
)
def test_times_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(FlowMatchingConfig(sampling=dataclasses.replace(AT_TURBO, **options)), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_teacher": None}, r"teacher\.few_step_times=.*no score.*set score_teacher to a full-step one"),
        ({"score_teacher": FEW}, r"score_teacher\.few_step_times=.*no score"),
        ({"score_teacher": dataclasses.replace(FULL, rollout_steps=4)}, r"score_teacher\.rollout_steps=4"),
        (
            {"teacher": dataclasses.replace(FEW, rollout_steps=4)},
            "follows a flow, which a few-step teacher has none of",
        ),
        ({"sampling": EVEN}, r"knows the times .* would be asked at 0\.900, 0\.750, 0\.500; use .*sampling\.times"),
        ({"critic_times": (0.5, 0.5)}, "critic_times"),
        (
            {
                "teacher": dataclasses.replace(FEW, weights="a"),
                "score_teacher": dataclasses.replace(GUIDED, weights="a"),
            },
            r"score_teacher\.weights and teacher\.weights are both 'a', which .* take for two networks",
        ),
        ({"own_samples": 0.5}, "scaling.ratio='running' takes the task's loss"),
        (
            {"score_teacher": dataclasses.replace(FULL, inputs=CAPTIONS, takes=("latent",))},
            r"leave 'latent' out of score_teacher\.takes",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


@pytest.mark.parametrize("changes", [{"generator_every": 0}, {"own_samples": 1.5}, {"critic_times": (0.0, 2.0)}])
def test_numbers_that_nobody_can_mean_are_refused_by_name(changes):
    (name,) = changes
    with pytest.raises(FieldError, match=rf"^{name} is .*; give "):
        recipe(**changes)


def test_a_few_step_teacher_cannot_teach_at_all_times():
    with pytest.raises(ConfigError, match="would be asked at any time; use recipe 'adversarial'"):
        Distillation(DistillationConfig(**STUDENT, teacher=FEW, feature_weight=0.0), "cpu")


@pytest.mark.parametrize(
    ("sampling", "said", "message"),
    [
        (
            {"steps": 4, "shift": 3.0},
            (),
            r"few-step generator of the times \(1.0, 0.9.*score_teacher\.few_step_times is \(\)",
        ),
        (
            {"steps": 4, "shift": 1.0, "times": TURBO},
            (),
            r"set it to \(1.0, 0.858, 0.602, 0.009\), which a score cannot",
        ),
        ({"steps": 4, "shift": 3.0}, TURBO, r"set it to \(1.0, 0.9, 0.75, 0.5\)"),
        (None, TURBO, r"is a full-step network, and .* set it to \(\)"),
    ],
)
def test_a_run_tells_whether_it_is_a_few_step_teacher(tmp_path, sampling, said, message):
    run = {"recipe": "flow_matching"} if sampling is None else {"recipe": "adversarial", "sampling": sampling}
    (tmp_path / "config.json").write_text(json.dumps(run))
    teacher = dataclasses.replace(FULL, workdir=str(tmp_path), few_step_times=said)
    made = recipe(teacher=teacher) if said else recipe(score_teacher=teacher, output_weight=0.0)
    with pytest.raises(ConfigError, match=message):
        made.load_frozen(None)
