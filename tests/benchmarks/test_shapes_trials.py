"""What is trained for the table of claims: in which order, in how many processes, on what, and what is kept of it."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import shapes_trials
from benchmarks.jobs import Job, make_all
from benchmarks.shapes_trials import (
    BUDGETS,
    SHARED,
    TRIALS,
    KeptBatches,
    Runs,
    fix_platform,
    ladder_networks,
    milliseconds,
    multiply_adds,
)
from snapgen_jax import experiment
from snapgen_jax.config import build, recipe_class, to_json
from snapgen_jax.evaluation.interfaces import EvaluationResult
from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.training.loop import PlainBatch
from tests.recipes_for_tests import Adds, adder, greys

SMALL = dataclasses.replace(
    BUDGETS["ci"],
    steps={**BUDGETS["ci"].steps, "clip": 9, "teacher": 9, "few-step": 7},
    seeds={"student": 2, "few-step": 2},
)
WAYS = pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])


class Stream:
    """Batches that tell seed and position apart."""

    def __init__(self, seed):
        self.seed = seed

    def batches(self, position):
        while True:
            index = np.arange(8) + 8 * position
            yield PlainBatch("8x8", greys(seed=1000 * self.seed + position), index)
            position += 1


def assert_same_batches(found, wanted):
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.bucket == b.bucket and set(a.arrays) == set(b.arrays)
        assert {name: x.dtype for name, x in a.arrays.items()} == {name: x.dtype for name, x in b.arrays.items()}
        jax.tree.map(np.testing.assert_array_equal, (a.arrays, a.source_index), (b.arrays, b.source_index))


def first(count, stream):
    return [batch for _, batch in zip(range(count), stream, strict=False)]


def quiet(text):
    pass


@pytest.fixture
def made(monkeypatch):
    """Trainings and scores take no time; `programs` are the former, each `[(trial, seed, its batches)]`, and `scored`
    the folders of the latter."""
    told = types.SimpleNamespace(programs=[], scored=[])

    class Untrained:
        def __init__(self, config, folder):
            self.trial, self.seed = folder.name.rpartition("-")[0].replace("_", " "), config.seed
            self.data = Stream(config.seed)

        def train(self):
            return train_together([self], None)[0]

    def train_together(experiments, workdir):
        told.programs.append([(e.trial, e.seed, e.data) for e in experiments])
        return [None] * len(experiments)

    def measure(folder, names, **options):
        told.scored.append(folder.name)
        return EvaluationResult({"score.overall": 0.5}, values={"score.overall": np.array([0.0, 1.0])})

    generator = types.SimpleNamespace(params=None, frozen=None, with_weights=lambda params, frozen: generator)
    monkeypatch.setattr(shapes_trials, "Experiment", Untrained)
    monkeypatch.setattr(
        shapes_trials, "prepare_workdir", lambda config, folder: folder.mkdir(parents=True, exist_ok=True)
    )
    monkeypatch.setattr(shapes_trials, "parameters", lambda state: 7)
    monkeypatch.setattr(shapes_trials, "load", lambda folder: generator)
    monkeypatch.setattr(experiment, "train_together", train_together)
    monkeypatch.setattr(experiment, "measure", measure)
    return told


# --- what there is to do ---------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_job_is_listed_once_and_after_those_that_it_needs(budget, together, tmp_path):
    runs = Runs(BUDGETS[budget], tmp_path, together=together)
    jobs = runs.jobs()
    assert len(set(jobs)) == len(jobs)
    for place, job in enumerate(jobs):
        assert set(runs.needs(job)) <= set(jobs[:place]), job
    made = {(job.what, job.name, seed) for job in jobs for seed in job.seeds}
    assert made >= {(what, name, seed) for name in TRIALS for seed in runs.seeds(name) for what in ("train", "score")}
    last = tuple(runs.seeds("four steps")) if together else (0,)
    needed = runs.needs(Job("train", "four steps", last))
    assert {Job("train", "distilled", last), Job("train", "teacher", (0,))} <= set(needed)


def test_a_whole_seed_comes_before_the_next_and_what_has_a_single_seed_last(tmp_path):
    runs = Runs(BUDGETS["night"], tmp_path)
    single = [name not in SHARED and len(runs.seeds(name)) == 1 for name in (job.name for job in runs.jobs())]
    order = [(last, *(() if last else job.seeds)) for last, job in zip(single, runs.jobs(), strict=True)]
    assert order == sorted(order) and set(order) == {(False, 0), (False, 1), (False, 2), (True,)}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_trial_of_a_budget_has_a_config_and_a_folder_of_its_own(budget, tmp_path):
    runs = Runs(BUDGETS[budget], tmp_path)
    trials = [(name, seed) for name in TRIALS for seed in runs.seeds(name)]
    folders = {runs.workdir(*trial) for trial in trials}
    assert len(folders) == len(trials)
    moved = Runs(BUDGETS[budget], tmp_path / "elsewhere")
    assert {folder.name for folder in folders} == {moved.workdir(*trial).name for trial in trials}
    longer = dataclasses.replace(BUDGETS[budget], steps={**BUDGETS[budget].steps, "clip": 77})
    later = Runs(longer, tmp_path)
    assert not folders & {later.workdir(*trial) for trial in trials}, "all begin with the text encoder"


def test_a_choice_for_the_platform_changes_fields_that_are_auto_at_any_depth_and_no_other():
    networks = {"unet": {"dtype": "auto", "depthwise": "auto", "inner": {"dtype": "auto", "steps": 2}}}
    config = ConfigDict({**networks, "text": {"dtype": "bfloat16", "attention": "auto"}, "seed": 3})
    config.lock()
    fix_platform(config, dtype="float32", depthwise="shifted")
    fixed = {"unet": {"dtype": "float32", "depthwise": "shifted", "inner": {"dtype": "float32", "steps": 2}}}
    assert config.to_dict() == {**fixed, "text": {"dtype": "bfloat16", "attention": "auto"}, "seed": 3}


def test_all_trials_compute_in_float32_but_the_one_in_bfloat16(tmp_path):
    runs = Runs(BUDGETS["gpu"], tmp_path)

    def formats(config):
        sections = (formats(value) for value in config.values() if isinstance(value, ConfigDict))
        return {config.dtype}.union(*sections) if "dtype" in config else set().union(*sections)

    found = {name: formats(runs.config(name)) for name in TRIALS}
    assert found.pop("alone in bfloat16") == {"bfloat16"} and all(each == {"float32"} for each in found.values())


# --- making it -------------------------------------------------------------------------------------------------------


@WAYS
def test_what_is_made_is_found_by_a_later_process_and_what_is_lost_is_made_anew(together, tmp_path, made):
    make_all(Runs(SMALL, tmp_path, together=together), math.inf, say=quiet)
    runs = Runs(SMALL, tmp_path, together=together)
    trained = [(trial, seed) for program in made.programs for trial, seed, _ in program]
    assert sorted(trained) == sorted((name, seed) for name in TRIALS for seed in runs.seeds(name))
    assert len(runs.rows()["alone"]) == len(runs.rows()["distilled, 4 steps"]) == 2 and "clip" not in runs.rows()
    assert runs.rows()["alone"]["1"] == {
        "parameters": 7,
        "seconds": pytest.approx(0, abs=5),
        "score.overall": 0.5,
        "score.overall.each": [0.0, 1.0],
    }
    made.programs.clear()
    made.scored.clear()
    lost = next(runs.workdir("output only", 1).glob("score-*.json"))
    lost.unlink()
    make_all(runs, math.inf, say=quiet)
    assert not made.programs and made.scored == [lost.parent.name] and lost.exists()
    (runs.workdir("alone", 1) / "trained.json").unlink()
    make_all(runs, math.inf, say=quiet)
    assert [[(trial, seed) for trial, seed, _ in program] for program in made.programs] == [[("alone", 1)]]


@WAYS
def test_processes_that_have_a_seed_each_make_that_alone_and_find_what_all_seeds_share(together, tmp_path, made):
    def trained_by(seed):
        made.programs.clear()
        make_all(Runs(SMALL, tmp_path, together=together, only=[seed]), math.inf, say=quiet)
        return {(trial, seed) for program in made.programs for trial, seed, _ in program}

    trials = {name for name in set(TRIALS) - SHARED if TRIALS[name].group in SMALL.seeds}
    assert trained_by(1) == {(name, 1) for name in trials} | {(name, 0) for name in SHARED}
    rows = Runs(SMALL, tmp_path, only=[1]).rows()
    assert rows["alone"].keys() == {"1"} and "1" in rows["teacher"] and "ladder A" not in rows
    single = {name for name in set(TRIALS) - SHARED if TRIALS[name].group in set(SMALL.steps) - set(SMALL.seeds)}
    assert trained_by(0) == {(name, 0) for name in trials | single}
    assert Runs(SMALL, tmp_path).rows()["alone"].keys() == {"0", "1"}


def test_a_budget_that_trains_together_gives_all_seeds_of_a_trial_to_one_program(tmp_path, made):
    make_all(Runs(SMALL, tmp_path, together=True), math.inf, say=quiet)
    programs = [[(trial, seed) for trial, seed, _ in program] for program in made.programs]
    assert programs[0] == [("clip", 0)] and [("teacher", 0)] in programs
    assert [("four steps", 0), ("four steps", 1)] in programs and [("ladder A", 0)] in programs
    assert len(programs) == sum(1 for trial in TRIALS.values() if trial.group in SMALL.steps)
    made.programs.clear()
    make_all(Runs(SMALL, tmp_path / "apart"), math.inf, say=quiet)
    assert {len(program) for program in made.programs} == {1}


# --- batches ---------------------------------------------------------------------------------------------------------


def test_kept_batches_are_given_back_from_any_position_bit_for_bit(tmp_path):
    kept = KeptBatches(tmp_path / "kept", "8x8")
    kept.draw(Stream(3).batches(0), 5)
    for position in (0, 2, 4):
        assert_same_batches(kept.batches(position), first(5 - position, Stream(3).batches(position)))


def test_batches_whose_drawing_breaks_off_are_not_there_and_can_be_drawn_again(tmp_path, monkeypatch):
    kept, save = KeptBatches(tmp_path / "kept", "8x8"), np.save

    def breaks(file, array):
        save(file, array)
        raise OSError("no room")

    monkeypatch.setattr(np, "save", breaks)
    with pytest.raises(OSError, match="no room"):
        kept.draw(Stream(3).batches(0), 2)
    assert not kept.folder.exists()
    monkeypatch.undo()
    kept.draw(Stream(3).batches(0), 2)
    assert_same_batches(kept.batches(0), first(2, Stream(3).batches(0)))


def test_together_the_trials_of_a_seed_learn_from_kept_batches_and_what_seeds_share_from_its_own(tmp_path, made):
    make_all(Runs(SMALL, tmp_path, together=True), math.inf, say=quiet)
    learnt = [run for program in made.programs for run in program]
    assert {trial for trial, _, data in learnt if not isinstance(data, KeptBatches)} == SHARED
    for seed in (0, 1):
        (kept,) = {data for trial, of, data in learnt if of == seed and trial not in SHARED}
        longest = first(7, Stream(seed).batches(0))  # of those that share them
        assert_same_batches(kept.batches(0), [dataclasses.replace(batch, bucket="32x32") for batch in longest])
    made.programs.clear()
    make_all(Runs(SMALL, tmp_path / "apart"), math.inf, say=quiet)
    assert not any(isinstance(data, KeptBatches) for program in made.programs for _, _, data in program)


def test_the_trials_of_a_seed_would_each_draw_the_same_batches_by_itself(tmp_path):
    runs, drawn = Runs(BUDGETS["gpu"], tmp_path, together=True), {}
    for name in set(TRIALS) - SHARED:
        config = runs.config(name, seed=2)
        cls = recipe_class(config.recipe)
        recipe = cls(build(cls.Config, config), "cpu")
        drawn[name] = (to_json(config.data), config.seed, recipe.batch_specs(), recipe.tokenizer_workdir)
    assert all(same == drawn["alone"] for same in drawn.values())
    assert list(drawn["alone"][2]) == [runs._kept_batches(2).bucket]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_the_seeds_of_a_trial_are_scored_by_one_compiled_generator_each_with_its_own_weights(tmp_path, monkeypatch):
    runs = Runs(BUDGETS["night"], tmp_path)
    job = Job("score", "alone", tuple(runs.seeds("alone")))
    weights = {runs.workdir("alone", seed): 2 + seed for seed in job.seeds}
    for folder in weights:
        folder.mkdir()
        (folder / "trained.json").write_text('{"parameters": 7}')

    def measure(folder, names, *, generation, options, generator):
        drawn = float(generator.generate(["1"], **generation)[0, 0])
        return EvaluationResult({"drawn": drawn, "guidance": generation.get("guidance")})

    monkeypatch.setattr(Adds, "traced", 0)
    monkeypatch.setattr(shapes_trials, "load", lambda folder: adder(weights[folder], 10 * weights[folder]))
    monkeypatch.setattr(experiment, "measure", measure)
    runs.do(job)
    for draw, guidance in (("", None), ("unguided", 1.0)):
        found = [runs.numbers("alone", draw, seed) for seed in job.seeds]
        assert found == [{"parameters": 7, "drawn": 11.0 * w, "guidance": guidance} for w in weights.values()]
    assert Adds.traced == len(TRIALS["alone"].draws)


def test_rows_have_the_seeds_that_are_there_and_what_all_seeds_share_stands_in_each(tmp_path, monkeypatch):
    seeds = {"teacher": (0,), "ladder A": (0,), "alone": (0, 1, 2), "distilled": (0, 2)}

    def numbers(self, name, draw, seed):
        return {"drawn": f"{name} {seed}"} if seed in seeds.get(name, ()) else None

    monkeypatch.setattr(Runs, "numbers", numbers)
    rows = Runs(BUDGETS["night"], tmp_path).rows()
    assert rows.pop("teacher") == {seed: {"drawn": "teacher 0"} for seed in "012"}
    names = {"alone", "alone, unguided", "distilled", "distilled, unguided", "distilled, 4 steps", "ladder A"}
    of = {name: name.split(",")[0] for name in names}
    assert rows == {name: {str(s): {"drawn": f"{of[name]} {s}"} for s in seeds[of[name]]} for name in names}


# --- the ladder ------------------------------------------------------------------------------------------------------


def test_the_ladder_of_the_shapes_world_has_eight_networks_and_ends_smaller_than_it_began(tmp_path):
    networks = ladder_networks("patches")
    assert len(set(networks.values())) == 8
    runs = Runs(BUDGETS["night"], tmp_path)
    trained = {step: build(UNetConfig, runs.config(f"ladder {step}").unet) for step in networks}
    assert trained == {step: dataclasses.replace(network, dtype="float32") for step, network in networks.items()}
    assert parameters(networks["G"]) < parameters(networks["A"])
    assert multiply_adds(networks["G"]) < multiply_adds(networks["A"])


def test_networks_are_timed_side_by_side(quick_to_compile):
    layout = {"down_depth": (0,), "mid_depth": 0, "up_depth": (0,), "convolution": "ordinary", "first_stage": "res"}
    layout |= {"self_attention": (False,), "cross_attention": (False,)}
    networks = {str(width): UNetConfig.preset("smoke", channels=(width,), **layout) for width in (8, 16)}
    times = milliseconds(networks, rounds=1, batch=1)
    assert set(times) == {"8", "16"} and all(ms > 0 for ms in times.values())
