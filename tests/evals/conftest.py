"""Invented evaluation results: every number of the report, without a model."""

from dataclasses import asdict

import numpy as np
import pytest

from mage_tune.environment import environment
from mage_tune.evals.needles import TASKS, NeedleTask, RecipeNeedles
from mage_tune.evals.probes import ProbedBlock
from mage_tune.evals.results import summarise
from mage_tune.evals.store import StoredArm
from mage_tune.evals.tasks import Arm, Defaults
from mage_tune.evals.text_tasks import LayersTask, RulesTask, TextTask

BUDGETS = [16, 64]
LAYERS = 3
DEFAULTS = Defaults(1234, 0.9, "heldout.jsonl")
WHEN = "2026-01-01T00:00:00+00:00"


def invent_text(rng: np.random.Generator, windows: int, lift: float) -> StoredArm:
    """Two blocks a window; `lift` is added to recall and taken off the CE gap."""
    metrics = {name: [] for name in ("ce_exact", "query_cosine")}
    records = []
    for window in range(windows):
        blocks = []
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
        metrics["ce_exact"].append(float(np.mean([b.ce_exact for b in blocks])))
        metrics["query_cosine"].append(float(np.mean([b.query_cosine for b in blocks])))
        for i, k in enumerate(BUDGETS):
            for name in ("recall", "mass", "ce_mask", "ce_oracle"):
                values = [getattr(b, name)[i] for b in blocks]
                metrics.setdefault(f"{name}@{k}", []).append(float(np.mean(values)))
            gap = metrics[f"ce_mask@{k}"][-1] - metrics["ce_exact"][-1]
            metrics.setdefault(f"ce_gap@{k}", []).append(gap)
        records.append(record(f"window {window}", facts={"blocks": [asdict(b) for b in blocks]}))
    return StoredArm(metrics, records, {}, [0.5] * windows, WHEN)


def record(sample, output="", forwards=None, facts=None):
    return {"sample": sample, "output": output, "forwards_per_block": forwards, "facts": facts or {}}


def invent_answers(asked: int, cells: list[dict], right: int) -> StoredArm:
    """The first `right` answers have all values, the others all but one; `cells`: facts of every question."""
    metrics = {"right": [], "found": [], "forwards": []}
    records = []
    for i, cell in enumerate(cells):
        expected = [str(100_000 + 10 * i + j) for j in range(asked)]
        said = expected if i < right else expected[1:]
        found = [value in said for value in expected]
        metrics["right"].append(i < right)
        metrics["found"].append(len(said) / asked)
        metrics["forwards"].append(3.0 + i % 2)
        facts = cell | {"expected": expected, "found": found, "is_right": i < right, "sparse_share": 0.5}
        records.append(record(f"question {i}", f"<b>question {i}</b> & " + ", ".join(said), 3.0 + i % 2, facts))
    return StoredArm(metrics, records, {"threshold": 0.9}, [0.25] * len(cells), WHEN)


def only(arm: StoredArm, task) -> StoredArm:
    """The metrics that the task has."""
    return StoredArm({m: v for m, v in arm.metrics.items() if m in task.measures}, arm.records, {}, arm.seconds, WHEN)


@pytest.fixture
def make_result():
    """make_result(arms=, windows=, lift=, needles=) -> what eval/results.json holds, with an adapter that is better."""

    def make(arms=("base", "adapter"), *, windows=8, lift=0.05, needles=True, questions=16):
        tasks = [
            TextTask(DEFAULTS, name="text", context=512, documents=windows, blocks=2, budgets=BUDGETS, dense_layers=1)
        ]
        options = {"context": 512, "needles": 13, "questions": questions, "filler": np.zeros(0)}
        if needles:
            tasks += [RecipeNeedles(DEFAULTS, name, **options) for name in TASKS]
        exact, mage = Arm(), Arm("base", "mage", 16)
        stored = {}
        for side in arms:
            is_tuned = side == "adapter"
            rng = np.random.default_rng(7)
            stored[side, "text", "exact"] = invent_text(rng, windows, lift if is_tuned else 0.0)
            for task in tasks[1:]:
                for arm, right in ((exact, questions), (mage, questions if is_tuned else questions // 4)):
                    answered = invent_answers(task.asked, [{}] * questions, right)
                    stored[side, task.name, arm.reading] = only(answered, task)
        return finish(stored, tasks, [exact, mage] if needles else [exact], arms, None)

    return make


@pytest.fixture
def make_suite_result():
    """make_suite_result(arms=) -> the result of a suite with every kind of own task."""

    def make(arms=("base", "adapter"), **changed):
        window = {"context": 512, "documents": 8, "blocks": 2, "dense_layers": 1}
        tasks = [
            TextTask(DEFAULTS, name="text", budgets=BUDGETS, **window),
            LayersTask(DEFAULTS, name="layers", budgets=[16], **window),
            RulesTask(DEFAULTS, name="rules", budgets=[16], **window),
            NeedleTask(
                DEFAULTS,
                "multi_query",
                name="needles_multi_query",
                **{"lengths": [256, 512], "depths": [0.1, 0.9], "needles": 4, "asked": 2, "questions": 2, "steps": None}
                | changed,
            ),
        ]
        readings = [Arm(), Arm("base", "mage", 16), Arm("base", "quest", 16)]
        needles = tasks[-1]
        cells = [{"length": n, "depth": d, "depths": [d, (d + 0.5) % 1]} for n, d, _ in needles.cells]
        stored = {}
        for side in arms:
            lift = 0.05 if side == "adapter" else 0.0
            rng = np.random.default_rng(7)
            stored[side, "text", "exact"] = invent_text(rng, 8, lift)
            gains = {"gain_by_layer": [0.1, 0.2 - lift, 0.0], "first_layer": 1}
            costs = {"foresight_cost": [0.3 - lift] * 8, "sum_of_layers": [0.3 - lift] * 8}
            windows = [record(f"window {i}", facts=gains) for i in range(8)]
            stored[side, "layers", "exact"] = StoredArm(costs, windows, {}, [1.0] * 8, WHEN)
            for number, arm in enumerate(readings):
                ce = {"ce": (3.5 + 0.1 * number + rng.random(8) - lift).tolist()}
                recall = {} if arm.rule == "exact" else {"recall": (0.5 + 0.1 * rng.random(8)).tolist()}
                stored[side, "rules", arm.reading] = StoredArm(ce | recall, [record("w")] * 8, {}, [1.0] * 8, WHEN)
                right = 8 if arm.rule == "exact" or side == "adapter" else 2
                stored[side, needles.name, arm.reading] = invent_answers(2, cells, right)
        return finish(stored, tasks, readings, arms, "invented")

    return make


def finish(stored, tasks, readings, arms, suite):
    result = summarise(
        stored,
        tasks,
        readings,
        sides=list(arms),
        suite=suite,
        settings={"text": "heldout.jsonl", "context": 512, "text_sha256": "0" * 64, "dtype": "torch.float32"},
        environment=environment(),
        skipped={},
        prompts={task.name: "f" * 64 for task in tasks},
    )
    result["settings"] |= {"model": "models/base", "adapter": "runs/demo" if "adapter" in arms else None, "seed": 1}
    return result
