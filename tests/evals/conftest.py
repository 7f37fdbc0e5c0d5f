"""Invented evaluation results: every number of the report, without a model."""

import numpy as np
import pytest

from mage_tune.evals.needles import NeedleResult
from mage_tune.evals.probes import ProbedBlock
from mage_tune.evals.run import summarise
from mage_tune.recipe import Eval

BUDGETS = [16, 64]
LAYERS = 3


def invent_blocks(rng: np.random.Generator, windows: int, lift: float) -> list[ProbedBlock]:
    """Two blocks a window; `lift` is added to recall and taken off the CE gap."""
    blocks = []
    for window in range(windows):
        for block in (8, 12):
            noise = 0.01 * rng.standard_normal()
            recall = [0.6 + lift + noise, 0.7 + lift + noise]
            blocks.append(
                ProbedBlock(
                    window=window,
                    block=block,
                    ce_exact=3.5 + noise,
                    ce_mask=[3.9 + noise - lift, 3.8 + noise - lift],
                    ce_oracle=[3.7 + noise, 3.6 + noise],
                    recall=recall,
                    mass=[0.8 + noise, 0.9 + noise],
                    query_cosine=0.95 + noise,
                    recall_by_layer=[[share] * LAYERS for share in recall],
                )
            )
    return blocks


def invent_answers(asked: int, questions: int, right: int) -> list[NeedleResult]:
    """The first `right` answers have all values, the others all but one."""
    answers = []
    for i in range(questions):
        expected = tuple(str(100_000 + 10 * i + j) for j in range(asked))
        is_right = i < right
        said = expected if is_right else expected[1:]
        text = f"<b>question {i}</b> & " + ", ".join(said)
        answers.append(NeedleResult(expected, is_right, len(said) / asked, text, 3.0 + i % 2))
    return answers


@pytest.fixture
def make_result():
    """make_result(arms=, windows=, lift=, needles=) -> what eval/results.json holds, with an adapter that is better."""

    def make(arms=("base", "adapter"), *, windows=8, lift=0.05, needles=True, questions=16):
        records = {}
        for arm in arms:
            is_tuned = arm == "adapter"
            answered = {
                task: {
                    "exact": invent_answers(asked, questions, questions),
                    "mage": invent_answers(asked, questions, questions if is_tuned else questions // 4),
                }
                for task, asked in {"single": 1, "multi": 3}.items()
            }
            rng = np.random.default_rng(7)
            blocks = invent_blocks(rng, windows, lift if is_tuned else 0.0)
            records[arm] = {"text": blocks, "needles": answered if needles else {}}
        settings = Eval(budgets=BUDGETS, documents=windows, questions=questions, dense_layers=1)
        result = summarise(records, settings, "0" * 64)
        result["settings"] |= {"model": "models/base", "adapter": "runs/demo" if "adapter" in arms else None, "seed": 1}
        return result

    return make
