"""The numbers of a trained run, by prompts."""

import dataclasses

import numpy as np
import pytest

from benchmarks.claims import scores
from benchmarks.claims.claim import METRICS
from benchmarks.claims.scores import PermutedCaptions, score
from benchmarks.claims.trials import BUDGETS, Draw
from snapgen_jax.evaluation.interfaces import EvaluationResult
from tests.generators_for_tests import by_prompt


def test_a_prompt_is_drawn_several_times_and_its_number_is_their_mean(monkeypatch, tmp_path):
    calls = []

    def measure(folder, names, *, generation, options, generator):
        seed = options["compositional"]["seed"]
        calls.append((tuple(names), seed, generation))
        each = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]][seed])
        numbers = {"score.overall": each.mean(), "score.seen": 0.3} | ({"frechet.distance": 0.1} if seed == 0 else {})
        return EvaluationResult(numbers, values={"score.overall": each})

    monkeypatch.setattr(scores, "measure", measure)
    budget = dataclasses.replace(BUDGETS["short"], images=2)
    found = score(tmp_path, Draw({"steps": 4}), budget, 16, None, METRICS)
    assert found == {
        "score.overall": pytest.approx(0.5),
        "score.overall.each": [0.5, 0.0, 1.0],
        "frechet.distance": 0.1,
    }
    asked = {"steps": 4, "batch_size": 16}
    assert calls == [(("compositional", "frechet", "diversity"), 0, asked), (("compositional",), 1, asked)]


def test_every_budget_that_is_recorded_draws_a_thousand_images_a_seed_for_the_score():
    images = {name: b.per_category * b.images * len(b.categories) for name, b in BUDGETS.items() if name != "ci"}
    assert set(images) == {"short", "night", "gpu", "world"} and all(count >= 1_024 for count in images.values())


def test_permuted_captions_draw_each_prompt_for_another_one():
    generator = by_prompt()
    plain = generator.generate(["1", "2", "3", "4"])[:, 0, 0, 0]
    permuted = PermutedCaptions(generator).generate(["1", "2", "3", "4"])[:, 0, 0, 0]
    assert plain.tolist() == [1, 2, 3, 4] and permuted.tolist() == [3, 4, 1, 2]
