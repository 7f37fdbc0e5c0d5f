"""Tables, plots and the page: every number is there, in words that say which way it went."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mage_tune.evals import report
from mage_tune.evals.plots import LIGHT, depth_bins, found_by_depth, png, score_plot, training_curves
from mage_tune.evals.report import (
    headline,
    html,
    print_tables,
    rows_by_key,
    samples,
    sections,
    sentence,
    summary,
    training_log,
    write_report,
)
from mage_tune.evals.stats import Estimate

ARMS = [("base",), ("base", "adapter")]


def row(change: float, low: float, high: float, *, n: int = 12, higher: bool = True) -> report.Row:
    arms = {"base": Estimate(0.5, 0.4, 0.6, n), "adapter": Estimate(0.5 + change, 0.4, 0.6, n)}
    return report.Row("key", "label", "Recall@32", "windows", higher, arms, Estimate(change, low, high, n))


def write_log(path, steps: int) -> None:
    """A metrics.jsonl as the trainer writes it."""
    lines = [
        {"step": s, "loss": 4.0 - 0.01 * s, "diffusion": 3.5, "query_alignment": 0.5 * 0.9**s, "grad_norm": 1.0}
        for s in range(1, steps + 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (row(0.03, 0.02, 0.04), "better"),
        (row(0.03, 0.02, 0.04, higher=False), "worse"),
        (row(-0.03, -0.04, -0.02), "worse"),
        (row(-0.03, -0.04, -0.02, higher=False), "better"),
        (row(0.03, -0.01, 0.07), "unclear"),
        (row(0.0, 0.0, 0.0), "unclear"),
        (row(0.03, 0.02, 0.04, n=5), "too few"),
    ],
)
def test_a_change_counts_only_when_its_interval_excludes_zero(found, verdict):
    assert found.verdict == verdict


def test_sentences_say_what_happened():
    risen = sentence(row(0.03, 0.02, 0.04))
    assert risen == "Recall@32 rose from 0.500 to 0.530 (+0.030, 95 % interval +0.020 to +0.040, 12 windows)."
    assert sentence(row(-0.03, -0.04, -0.02)).startswith("Recall@32 fell from 0.500 to 0.470 (-0.030")
    assert "shows no clear change: from 0.500 to 0.500 (+0.000" in sentence(row(-1e-5, -0.02, 0.04))
    assert sentence(row(0.03, 0.02, 0.04, n=3)).endswith("3 windows: too few to tell).")


@pytest.mark.parametrize("arms", ARMS)
def test_every_number_of_the_result_has_a_row(make_result, arms):
    result = make_result(arms)
    rows = rows_by_key(result)
    assert rows.keys() == result["arms"]["base"].keys()
    assert all(list(r.arms) == list(arms) for r in rows.values())
    assert all((r.difference is None) == (len(arms) == 1) for r in rows.values())


@pytest.mark.parametrize("arms", ARMS)
def test_results_read_back_from_json_give_the_same_page(make_result, arms):
    result = make_result(arms)
    again = json.loads(json.dumps(result))
    assert html(again, []) == html(result, [])
    assert headline(again) == headline(result)


def test_a_better_adapter_is_called_better(make_result):
    result = make_result(lift=0.05)
    rows = rows_by_key(result)
    assert {rows[key].verdict for key in ("recall@16", "recall@64", "ce_gap@16", "ce_mask@64", "multi_mage")} == {
        "better"
    }
    assert {rows[key].verdict for key in ("ce_exact", "query_cosine", "single_exact")} == {"unclear"}
    assert headline(result).startswith("Recall@64 rose from 0.699 to 0.749 (+0.050")
    assert "The CE gap at k = 64 (mask-k less exact, in nats) fell from" in " ".join(
        words for _, words in summary(result)
    )
    worse = rows_by_key(make_result(lift=-0.05))
    assert worse["recall@16"].verdict == worse["ce_gap@16"].verdict == "worse"


@pytest.mark.parametrize("arms", ARMS)
def test_tables_fit_eighty_columns(make_result, arms, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    result = make_result(arms)
    print_tables(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "…" not in text  # nothing is cut
    for section in sections(result):
        for found in section.rows:
            means = [f"{estimate.mean:z.3f}" for estimate in found.arms.values()]
            label = f"{found.label} {found.direction}"
            assert any(label in line and all(mean in line for mean in means) for line in lines)
    assert ("✔ better" in text) == (len(arms) == 2)
    assert " ".join(lines[-3:]).endswith("windows).")


def test_answers_show_the_interval_of_every_arm(make_result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_tables(make_result())
    assert "0.81-1.00" in capsys.readouterr().out  # Wilson's, of 16 out of 16


@pytest.mark.parametrize("arms", ARMS)
def test_the_page_holds_everything_and_needs_nothing(make_result, arms, tmp_path):
    out = tmp_path / "run" / "eval"
    out.mkdir(parents=True)
    write_log(out.parent / "metrics.jsonl", 60)
    result = make_result(arms)
    write_report(result, out, out.parent / "metrics.jsonl")
    page = (out / "report.html").read_text()
    words = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert "http" not in words
    assert not re.search(r"<script|<link|@import|url\(", words)
    assert set(re.findall(r'(?:src|srcset|href)="([^"]*)"', words)) == {""}
    assert 'name="viewport"' in words
    assert "prefers-color-scheme: dark" in words
    for found in rows_by_key(result).values():
        assert found.label in words
        for estimate in found.arms.values():
            assert f"{estimate.mean:z.3f}" in words
    for fact in ("models/base", "0" * 64, result["environment"]["torch"], headline(result)):
        assert fact in words
    assert words.index(headline(result)) < words.index("<table") < words.index("<figure") < words.index("<pre>")
    assert words.index("<pre>") < words.index("Settings and versions")
    assert ('class="verdict better"' in words) == (len(arms) == 2)


def test_answers_are_shown_as_text_never_as_markup(make_result):
    page = html(make_result(), [])
    assert "&lt;b&gt;question 4&lt;/b&gt; &amp;" in page
    assert "<b>" not in page


def test_plots_are_small_pictures_in_both_themes(make_result, tmp_path):
    out = tmp_path / "run" / "eval"
    out.mkdir(parents=True)
    write_log(out.parent / "metrics.jsonl", 40)
    write_report(make_result(), out, out.parent / "metrics.jsonl")
    names = ["ce_gap", "needles", "recall_by_layer", "training"]
    assert sorted(p.name for p in out.glob("*.png")) == sorted(f"{n}{end}.png" for n in names for end in ("", "-dark"))
    page = (out / "report.html").read_text()
    for name in names:
        light, dark = ((out / f"{name}{end}.png").read_bytes() for end in ("", "-dark"))
        assert all(base64.b64encode(picture).decode() in page for picture in (light, dark))
        assert len(light) < 100_000
        brightness = [np.asarray(Image.open(io.BytesIO(p)).convert("L")).mean() for p in (light, dark)]
        assert brightness[0] > 180 > 100 > brightness[1]
    (out.parent / "metrics.jsonl").unlink()
    fresh = tmp_path / "model" / "eval"
    fresh.mkdir(parents=True)
    write_report(make_result(("base",), needles=False), fresh)
    assert sorted(p.name for p in fresh.glob("*[!k].png")) == ["ce_gap.png", "recall_by_layer.png"]


@pytest.mark.parametrize("steps", [1, 2, 29, 31])
def test_a_training_log_of_any_length_is_drawn(tmp_path, steps):
    write_log(tmp_path / "metrics.jsonl", steps)
    figure = training_curves(training_log(tmp_path / "metrics.jsonl"), LIGHT)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "diffusion (nats)", "query alignment"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log" if steps > 29 else "linear"]
    assert png(figure).startswith(b"\x89PNG")


def test_a_log_line_that_an_interrupted_run_left_unfinished_is_no_obstacle(tmp_path):
    write_log(tmp_path / "metrics.jsonl", 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in training_log(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_without_needles_the_page_says_nothing_of_them(make_result):
    result = make_result(needles=False)
    page = html(result, [])
    assert "Sample answers" not in page
    assert [section.title for section in sections(result)] == ["Held-out text"]


def test_samples_show_first_where_the_arms_differ(make_result):
    found = list(samples(make_result(questions=16)))
    multi = [sample for sample in found if sample.task == "multi"]
    assert [sample.number for sample in multi] == [5, 6, 7, 8, 9, 10]  # the base got the first four right as well
    assert multi[0].attention == "mage k=16"
    assert len(multi[0].expected) == 3
    assert (multi[0].answers["base"]["is_right"], multi[0].answers["adapter"]["is_right"]) == (False, True)
    alone = [sample for sample in samples(make_result(("base",))) if sample.task == "multi"]
    assert [sample.number for sample in alone] == [1, 2, 3, 4, 5, 6]


# Suites


@pytest.mark.parametrize("arms", ARMS)
def test_a_suite_of_every_kind_makes_a_whole_page(make_suite_result, arms, tmp_path):
    result = json.loads(json.dumps(make_suite_result(arms)))
    write_report(result, tmp_path)
    page = (tmp_path / "report.html").read_text()
    words = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert "http" not in words and "<script" not in words
    titles = ["Held-out text", "Layers: cost of foresight", "Held-out text, rule by rule: CE", "Needles: right answers"]
    assert [title for title in titles if f"<h3>{title}</h3>" in words] == titles
    assert {p.stem for p in tmp_path.glob("*[!k].png")} == {
        "ce_gap", "recall_by_layer", "layers", "rules", "needles", "needles_multi_query",
    }  # fmt: skip
    for found in rows_by_key(result).values():
        assert found.label in words
        assert all(f"{estimate.mean:z.3f}" in words for estimate in found.arms.values())
    assert words.index("<table") < words.index("Sparse against exact") < words.index("<figure")
    assert words.index("<figure") < words.index("<pre>") < words.index("<h2>Time</h2>") < words.index("Settings and")
    assert "50 % of its steps were sparse" in words
    assert ("won / tied / lost" in words) and ("6 / 2 / 0" in words) == (len(arms) == 2)  # of eight questions


def test_sparse_costs_are_paired_with_exact_attention(make_suite_result):
    result = make_suite_result()
    costs = {(cost.side, cost.label): cost for cost in report.sparse_costs(result)}
    cost = costs["base", "needles_multi_query: right answers, mage k=16"]
    assert (cost.exact, cost.sparse) == (1.0, 0.25)
    assert (cost.change.wins, cost.change.ties, cost.change.losses) == (0, 2, 6)
    key = "rules.ce@quest 16"
    difference = np.mean(np.array(result["values"]["base"][key]) - result["values"]["base"]["rules.ce@exact"])
    assert costs["base", "rules: CE, quest k=16"].change.mean == pytest.approx(difference)
    assert not any("forwards" in label for _, label in costs)


def test_heatmaps_count_values_where_they_stand():
    bins = depth_bins([0.1, 0.5, 0.9])
    assert bins.tolist() == pytest.approx([0.0, 0.3, 0.7, 1.0])
    records = [
        {"facts": {"length": 256, "depths": [0.1, 0.6], "found": [True, False]}},
        {"facts": {"length": 256, "depths": [0.2, 1.0], "found": [False, True]}},
        {"facts": {"length": 512, "depths": [0.9], "found": [True]}},
    ]
    share = found_by_depth(records, [256, 512], bins)
    np.testing.assert_array_equal(share, [[0.5, np.nan], [0.0, np.nan], [1.0, 1.0]])


def test_results_of_an_older_version_are_refused(make_result):
    result = make_result()
    del result["metrics"]
    for read in (headline, sections):
        with pytest.raises(ValueError, match="older mage_tune; run mage-tune eval again"):
            read(result)


def test_a_sparse_arm_that_never_was_sparse_is_told(make_suite_result):
    result = make_suite_result()
    assert not any("Hardly any step" in words for _, words in summary(result))
    result["tasks"]["needles_multi_query"]["sparse_share"]["quest 16"] = 0.02
    (told,) = [words for _, words in summary(result) if "Hardly any step" in words]
    assert told.startswith("Hardly any step of needles_multi_query was sparse (2 % under quest 16)")


def test_a_suite_of_many_benchmarks_stays_readable(make_suite_result):
    result = make_suite_result()
    copied = {key: info for key, info in result["metrics"].items() if info["task"] == "needles_multi_query"}
    for number in range(16):
        name = f"ruler_{number}"
        result["tasks"][name] = result["tasks"]["needles_multi_query"] | {"kind": "ruler"}
        for key, info in copied.items():
            new = key.replace("needles_multi_query", name)
            result["metrics"][new] = info | {"task": name, "kind": "ruler"}
            result["paired"][new] = result["paired"][key]
            for side in result["arms"]:
                for part in ("arms", "values", "against_exact"):
                    if key in result[part][side]:
                        result[part][side][new] = result[part][side][key]
        for side in result["records"]:
            result["records"][side][name] = result["records"][side]["needles_multi_query"]
    words = summary(result)
    assert len(words) <= 16
    assert "more numbers under sparse attention are in the tables" in words[-1][1]
    plot = score_plot(result, "scores_ruler", "RULER", "score", [name for name in result["tasks"] if "ruler" in name])
    bars = Image.open(io.BytesIO(plot.light))
    assert bars.height < 8 * bars.width
    page = html(result, [plot])
    assert "Of 3 arms these two" in page
    assert "RULER: right answers" in page
    assert len(page) < 1_500_000
