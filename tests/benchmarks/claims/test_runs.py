"""What is trained for claims: in which order, in how many processes, on what, and what is kept of it."""

import dataclasses
import math
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks.claims import runs as runs_module
from benchmarks.claims import scores
from benchmarks.claims.batches import KeptBatches
from benchmarks.claims.landing import Landed, read_all
from benchmarks.claims.runs import Runs, fix_platform
from benchmarks.claims.trials import BASES, BUDGETS, Derivation, Draw, Effort, Paper, Trial, paper
from benchmarks.jobs import Job, make_all
from snapgen_jax.config import resolve, to_json
from snapgen_jax.evaluation.interfaces import EvaluationResult
from snapgen_jax.training.loop import PlainBatch
from tests import derive_for_tests
from tests.benchmarks.claims.rows import SMALL
from tests.generators_for_tests import by_prompt
from tests.recipes_for_tests import greys

SNAPGEN = paper("snapgen")
WAYS = pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])


def with_efforts(of, **updates):
    """The paper, whose ci has these numbers of updates, and two seeds of students and few-step students."""

    def effort(name, trial):
        if "ci" not in trial.effort:
            return trial
        seeds = 2 if not trial.shared and trial.effort.get("night", Effort()).seeds > 1 else 1
        return dataclasses.replace(trial, effort={"ci": Effort(updates.get(trial.config), seeds)} | {"gpu": Effort()})

    trials = {name: effort(name, trial) for name, trial in of.trials.items()}
    return dataclasses.replace(of, trials=trials, claims=())


QUICK = with_efforts(SNAPGEN, clip=9, teacher=9, student_few_step=7)
QUICK = dataclasses.replace(QUICK, measures=SMALL.measures)


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
        def __init__(self, resolved, folder):
            self.trial, self.seed = folder.name.rpartition("-")[0].replace("_", " "), resolved.config.seed
            self.data = Stream(self.seed)

        def train(self):
            return train_together([self], None)[0]

    def train_together(experiments, workdir):
        told.programs.append([(e.trial, e.seed, e.data) for e in experiments])
        return [None] * len(experiments)

    def measure(folder, names, **options):
        told.scored.append(folder.name)
        return EvaluationResult({"score.overall": 0.5}, values={"score.overall": np.array([0.0, 1.0])})

    generator = types.SimpleNamespace(params=None, frozen=None, recipe=None)
    generator.with_weights = lambda params, frozen: generator
    monkeypatch.setattr(runs_module, "Experiment", Untrained)
    monkeypatch.setattr(runs_module, "parameters", lambda state: 7)
    monkeypatch.setattr(runs_module, "load", lambda folder: generator)
    monkeypatch.setattr(runs_module, "train_together", train_together)
    monkeypatch.setattr(scores, "measure", measure)
    return told


def new(root, of=QUICK, budget="ci", **options):
    return Runs(of, budget, root / "runs", root / "out", **options)


def trained(made):
    return [(trial, seed) for program in made.programs for trial, seed, _ in program]


# --- what there is to do ---------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_job_is_listed_once_and_after_those_that_it_needs(budget, together, tmp_path):
    runs = new(tmp_path, SNAPGEN, budget, together=together)
    jobs = runs.jobs()
    assert len(set(jobs)) == len(jobs)
    for place, job in enumerate(jobs):
        assert set(runs.needs(job)) <= set(jobs[:place]), job
    listed = {(job.what, job.name, seed) for job in jobs for seed in job.seeds}
    scored = [name for name, trial in SNAPGEN.trials.items() if trial.draws]
    assert listed >= {(what, name, seed) for name in scored for seed in runs.seeds(name) for what in ("train", "score")}
    assert ("train", "clip", 0) in listed and ("score", "clip", 0) not in listed
    assert (("measure", "ladder costs", 0) in listed) == (budget != "short")
    last = tuple(runs.seeds("four steps")) if together else (0,)
    needed = runs.needs(Job("train", "four steps", last))
    assert {Job("train", "distilled", last), Job("train", "teacher", (0,))} <= set(needed)


def test_a_whole_seed_comes_before_the_next_and_what_has_a_single_seed_last(tmp_path):
    runs = new(tmp_path, SNAPGEN, "night")
    jobs = [job for job in runs.jobs() if job.what != "measure"]
    single = [not SNAPGEN.trials[job.name].shared and len(runs.seeds(job.name)) == 1 for job in jobs]
    order = [(last, *(() if last else job.seeds)) for last, job in zip(single, jobs, strict=True)]
    assert order == sorted(order) and set(order) == {(False, 0), (False, 1), (False, 2), (True,)}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_trial_of_a_budget_has_a_config_and_a_folder_of_its_own(budget, tmp_path):
    runs = new(tmp_path, SNAPGEN, budget)
    trials = [(name, seed) for name in SNAPGEN.trials for seed in runs.seeds(name)]
    folders = {runs.workdir(*trial) for trial in trials}
    assert len(folders) == len(trials)
    moved = new(tmp_path / "elsewhere", SNAPGEN, budget)
    assert {folder.name for folder in folders} == {moved.workdir(*trial).name for trial in trials}
    clip = dataclasses.replace(SNAPGEN.trials["clip"], effort=dict.fromkeys(BUDGETS, Effort(77)))
    later = new(tmp_path, dataclasses.replace(SNAPGEN, trials={**SNAPGEN.trials, "clip": clip}), budget)
    assert not folders & {later.workdir(*trial) for trial in trials}, "all begin with the text encoder"


def test_a_choice_for_the_platform_changes_fields_that_are_auto_at_any_depth_and_no_other():
    networks = {"network": {"dtype": "auto", "depthwise": "auto", "inner": {"dtype": "auto", "steps": 2}}}
    config = ConfigDict({**networks, "text": {"dtype": "bfloat16", "attention": "auto"}, "seed": 3})
    config.lock()
    fix_platform(config, dtype="float32", depthwise="shifted")
    fixed = {"network": {"dtype": "float32", "depthwise": "shifted", "inner": {"dtype": "float32", "steps": 2}}}
    assert config.to_dict() == {**fixed, "text": {"dtype": "bfloat16", "attention": "auto"}, "seed": 3}


def test_all_trials_compute_in_float32_but_the_one_in_bfloat16(tmp_path):
    runs = new(tmp_path, SNAPGEN, "gpu")

    def formats(config):
        sections = (formats(value) for value in config.values() if isinstance(value, ConfigDict))
        return {config.dtype}.union(*sections) if "dtype" in config else set().union(*sections)

    found = {name: formats(runs.config(name)) for name, trial in SNAPGEN.trials.items() if "gpu" in trial.effort}
    assert found.pop("alone in bfloat16") == {"bfloat16"} and all(each == {"float32"} for each in found.values())


# --- making it -------------------------------------------------------------------------------------------------------


@WAYS
def test_what_is_landed_is_not_made_again_and_a_lost_file_is_scored_anew(together, tmp_path, made):
    make_all(new(tmp_path, together=together), math.inf, say=quiet)
    runs = new(tmp_path, together=together)
    assert sorted(trained(made)) == sorted((name, seed) for name in QUICK.trials for seed in runs.seeds(name))
    files = {one.file_name(): one for one in read_all(runs.landed)}
    scored = {name for name, trial in QUICK.trials.items() if trial.draws}
    assert len(files) == sum(len(runs.seeds(name)) for name in scored) + 1, "and the measurement"
    one = files["distilled-1.json"]
    assert one.rows["distilled, 4 steps"] == {
        "parameters": 7,
        "score.overall": 0.5,
        "score.overall.each": [0.0, 1.0],
    }
    assert (one.trial, one.seed, one.updates) == ("distilled", 1, 6) and one.minutes == pytest.approx(0, abs=0.1)
    assert files["costs-0.json"].rows == {"alone": {"milliseconds": 2.5}}
    made.programs.clear()
    made.scored.clear()
    assert new(tmp_path, together=together).jobs() == [Job("measure", "costs", (0,))] and runs.done(runs.jobs()[-1])
    (runs.landed / "output_only-1.json").unlink()
    score, *_ = runs.workdir("output only", 1).glob("score-*.json")
    score.unlink()
    make_all(new(tmp_path, together=together), math.inf, say=quiet)
    assert not made.programs and made.scored == [score.parent.name] and score.exists()


@WAYS
def test_on_a_machine_without_the_runs_only_what_something_missing_starts_from_is_trained(together, tmp_path, made):
    make_all(new(tmp_path, together=together), math.inf, say=quiet)
    landed = new(tmp_path).landed
    fresh = tmp_path / "another"
    fresh.mkdir()
    landed.parent.parent.rename(fresh / "out")
    (new(fresh).landed / "four_steps-1.json").unlink()
    made.programs.clear()
    make_all(new(fresh, together=together), math.inf, say=quiet)
    assert sorted(trained(made)) == [("clip", 0), ("distilled", 1), ("four steps", 1), ("teacher", 0)]


def test_a_row_whose_setting_changed_is_run_again(tmp_path, made):
    make_all(new(tmp_path), math.inf, say=quiet)
    trial = dataclasses.replace(QUICK.trials["with ratio"], changes=("scaling.ratio=none",))
    changed = dataclasses.replace(QUICK, trials={**QUICK.trials, "with ratio": trial})
    before = Landed.read(new(tmp_path).landed / "with_ratio-0.json").setting
    made.programs.clear()
    make_all(new(tmp_path, changed), math.inf, say=quiet)
    assert "with ratio" in {job.name for job in new(tmp_path, QUICK).jobs()}, "landed with another setting"
    assert Landed.read(new(tmp_path).landed / "with_ratio-0.json").setting != before


@WAYS
def test_processes_that_have_a_seed_each_make_that_alone_and_find_what_all_seeds_share(together, tmp_path, made):
    def trained_by(seed):
        made.programs.clear()
        make_all(new(tmp_path, together=together, only=[seed]), math.inf, say=quiet)
        return set(trained(made))

    shared = {name for name, trial in QUICK.trials.items() if trial.shared}
    counts = {name: len(QUICK.seeds(name, "ci")) for name in set(QUICK.trials) - shared}
    trials = {name for name, count in counts.items() if count == 2}
    assert trained_by(1) == {(name, 1) for name in trials} | {(name, 0) for name in shared}
    assert {one.seed for one in read_all(new(tmp_path).landed) if one.trial in trials} == {1}
    assert trained_by(0) == {(name, 0) for name, count in counts.items() if count}
    assert {one.seed for one in read_all(new(tmp_path).landed) if one.trial == "alone"} == {0, 1}


def test_a_budget_that_trains_together_gives_all_seeds_of_a_trial_to_one_program(tmp_path, made):
    make_all(new(tmp_path, together=True), math.inf, say=quiet)
    programs = [[(trial, seed) for trial, seed, _ in program] for program in made.programs]
    assert programs[0] == [("clip", 0)] and [("teacher", 0)] in programs
    assert [("four steps", 0), ("four steps", 1)] in programs and [("ladder A", 0)] in programs
    assert len(programs) == sum(1 for name in QUICK.trials if QUICK.seeds(name, "ci"))
    made.programs.clear()
    make_all(new(tmp_path / "apart"), math.inf, say=quiet)
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
    make_all(new(tmp_path, together=True), math.inf, say=quiet)
    learnt = [run for program in made.programs for run in program]
    assert {trial for trial, _, data in learnt if not isinstance(data, KeptBatches)} == {"clip", "teacher"}
    for seed in (0, 1):
        (kept,) = {data for _, of, data in learnt if of == seed and isinstance(data, KeptBatches)}
        longest = first(7, Stream(seed).batches(0))  # of those that share them
        assert_same_batches(kept.batches(0), [dataclasses.replace(batch, bucket="32x32") for batch in longest])
    made.programs.clear()
    make_all(new(tmp_path / "apart"), math.inf, say=quiet)
    assert not any(isinstance(data, KeptBatches) for program in made.programs for _, _, data in program)


def test_the_trials_of_a_seed_would_each_draw_the_same_batches_by_itself(tmp_path):
    runs, drawn = new(tmp_path, SNAPGEN, "gpu", together=True), {}
    for name in [name for name, trial in SNAPGEN.trials.items() if not trial.shared and "gpu" in trial.effort]:
        config = runs.config(name, seed=2)
        recipe = resolve(config).build("cpu")
        drawn[name] = (to_json(config.data), config.seed, recipe.batch_specs(), recipe.tokenizers())
    assert all(same == drawn["alone"] for same in drawn.values())
    assert list(drawn["alone"][2]) == [runs._kept_batches("alone", 2).bucket]


# --- scores ----------------------------------------------------------------------------------------------------------


def test_the_seeds_of_a_trial_are_scored_by_one_compiled_generator_each_with_its_own_weights(tmp_path, monkeypatch):
    two = {"": Draw(), "short": Draw({"guidance": 1.0, "steps": 6})}
    alone = dataclasses.replace(SNAPGEN.trials["alone"], draws=two)
    runs = new(tmp_path, dataclasses.replace(SNAPGEN, claims=(), trials={**SNAPGEN.trials, "alone": alone}), "night")
    job = Job("score", "alone", tuple(runs.seeds("alone")))
    weights = {runs.workdir("alone", seed): 2 + seed for seed in job.seeds}
    for folder in weights:
        folder.mkdir(parents=True)
        (folder / "trained.json").write_text('{"parameters": 7, "seconds": 60}')
    one = by_prompt()

    def measure(folder, names, *, generation, options, generator):
        drawn = float(generator.generate(["1"], **generation)[0, 0, 0, 0])
        return EvaluationResult({"score.overall": drawn} if "compositional" in names else {})

    monkeypatch.setattr(runs_module, "load", lambda folder: one.with_weights(weights[folder], 10 * weights[folder]))
    monkeypatch.setattr(scores, "measure", measure)
    runs.do(job)
    files = {landed.seed: landed for landed in read_all(runs.landed)}
    assert {seed: landed.minutes for seed, landed in files.items()} == {0: 1.0, 1: 1.0, 2: 1.0}
    for row, of_steps in (("alone", 0), ("alone, short", 20)):
        found = [files[seed].rows[row]["score.overall"] for seed in job.seeds]
        assert found == [1.0 + 11 * w + of_steps for w in weights.values()]
    assert one.recipe.traced == len(two)


def test_a_stored_base_is_not_trained_and_is_scored_in_a_copy_where_the_configs_form_is_its_own(tmp_path, made):
    stored = dataclasses.replace(
        SMALL.trials["base"], draws={"": Draw({"steps": 3}, ("compositional",))}, stored="shapes_dit"
    )
    of = dataclasses.replace(SMALL, trials={**SMALL.trials, "base": stored}, claims=())
    before = sorted(BASES.rglob("*"))
    runs = new(tmp_path, of, "short")
    assert runs.config("alone").inputs.text_workdir == str(BASES / "shapes_dit")
    runs.do(Job("score", "base", (0,)))
    assert not made.programs and set(made.scored) == {"shapes_dit"} and sorted(BASES.rglob("*")) == before
    (found,) = read_all(tmp_path / "out" / "small" / "short")
    assert found.rows["base"]["parameters"] == 2_159_792 and found.minutes == 0
    assert new(tmp_path, of, "ci").workdir("base").parent == tmp_path / "runs"  # which is of another world


def test_the_options_of_a_draw_may_depend_on_the_seed(tmp_path, made):
    draw = Draw(lambda arg, seed: {"schedule": f"{arg}{seed}"}, reference={"lazy": 0.0})
    assert (
        draw.of("quick", 2).options == {"schedule": "quick2"}
        and Draw({"steps": 3}).of("quick", 2).options["steps"] == 3
    )
    trials = {"one": Trial("clip", {"ci": Effort(1, 2)}, draws={"": draw})}
    runs = new(tmp_path, Paper("one", (), trials))
    assert runs._setting("one", 0) != runs._setting("one", 1)


def test_a_trial_may_be_what_a_stage_derives_and_later_ones_are_given_its_output(tmp_path):
    effort, rounds = {"ci": Effort()}, ["one", "two"]
    derivation = Derivation("tests.derive_for_tests:count", lambda arg: {"rounds": rounds}, "counted")
    trials = {
        "base": Trial("clip", effort, draws={}, shared=True),
        "made": Trial("", effort, earlier={"from": "base"}, draws={}, shared=True, derivation=derivation),
        "after": Trial("student", effort, earlier={"init_from": "made"}),
    }
    runs = Runs(Paper("small", (), trials), "ci", tmp_path / "runs", tmp_path / "out")
    job, folder = Job("train", "made", (0,)), runs.workdir("made")
    assert runs.config("after").init_from == str(folder / "counted") and not runs.done(job)
    derive_for_tests.calls.clear()
    runs.do(job)
    assert runs.done(job) and derive_for_tests.calls == rounds and (folder / "items.jsonl").exists()
    rounds.append("three")
    assert Runs(runs.paper, "ci", tmp_path / "runs", tmp_path / "out").workdir("made") != folder, "other options"
