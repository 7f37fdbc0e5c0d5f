"""Tables of docs/performance.md, from results/*_h100.json; `scripts/fill_tables.py` puts them there.

Predictions and bars are constants of this file; whatever was measured is read from the results.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
LONG, STEPS = 131072, 32
SHAPES = ("1.5B", "7B", "SDAR-8B")
CORNERS = [(shape, context, batch) for shape in SHAPES for context in (8192, 32768, LONG) for batch in (1, 8)]
PEERS = {
    "flash SDPA": "flash-sdpa-packed",
    "cuDNN SDPA": "cudnn-sdpa-packed",
    "FlashInfer fa2": "flashinfer-fa2",
    "FlashInfer auto": "flashinfer-auto",
}
"""Exact attention of others; queries packed for SDPA, all captured in a CUDA graph."""

Corner = tuple[str, int, int]


def read(name: str) -> dict[str, Any]:
    """A file of results/."""
    return json.loads((RESULTS / name).read_text())


def markdown(head: list[str], rows: Iterable[list[str]], words: int = 0) -> str:
    """A table of figures behind a first column of words; the last `words` columns hold words too."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1 - words) + "---|" * words]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def name_of(corner: Corner) -> str:
    """`7B 128K b=8`."""
    return f"{corner[0]} {corner[1] // 1024}K b={corner[2]}"


def made_with(record: dict[str, Any]) -> str:
    """Device, versions and commit."""
    versions = record["versions"]
    return f"{record['device']}, torch {versions['torch']}, triton {versions['triton']}"


class Attention:
    """results/attention_h100.json: milliseconds by corner and kernel; what scores add is in scores_h100.json."""

    def __init__(self, file: str = "attention_h100.json") -> None:
        self.record = read(file)
        self.rows = {(r["shape"], r["context"], r["batch"], r["kernel"]): r for r in self.record["rows"]}

    def ms(self, corner: Corner, kernel: str = "mage") -> float:
        """Of one kernel, which must have run."""
        return self.rows[*corner, kernel]["ms"]

    def of_floor(self, corner: Corner) -> float:
        """Ours as a multiple of the floor."""
        return self.ms(corner) / self.rows[*corner, "mage"]["floor_ms"]

    def scores(self, corner: Corner) -> float:
        """What tile masses add, as a share; both passes were timed in turn."""
        return self.ms(corner, "mage+scores") / self.ms(corner) - 1

    def best_peer(self, corner: Corner) -> tuple[str, float]:
        """The fastest of the others, and its time over ours."""
        name = min(PEERS, key=lambda name: self.ms(corner, PEERS[name]))
        return name, self.ms(corner, PEERS[name]) / self.ms(corner)


def attention() -> str:
    """Every corner: ours, with scores, peers."""
    found, scores = Attention(), Attention("scores_h100.json")
    rows = []
    for corner in CORNERS:
        name, ratio = found.best_peer(corner)
        peers = [f"**{found.ms(corner, kernel):.4f}**" if label == name else f"{found.ms(corner, kernel):.4f}"
                 for label, kernel in PEERS.items()]  # fmt: skip
        cells = [f"{found.rows[*corner, 'mage']['floor_ms']:.4f}", f"{found.ms(corner):.4f}"]
        cells += [f"{found.of_floor(corner):.2f}", f"{scores.scores(corner):+.1%}", *peers, f"{ratio:.2f}"]
        rows.append([name_of(corner), *cells])
    head = ["", "floor", "ours", "x floor", "scores add", *PEERS, "best peer / ours"]
    later = {(corner[:2], found.rows[*corner, "mage"].get("commit")) for corner in CORNERS}
    remeasured = "".join(f"; {shape} {n // 1024}K: {commit}" for (shape, n), commit in sorted(later, key=str) if commit)
    return (
        f"{markdown(head, rows)}\n\nOne layer, bf16, milliseconds, medians of CUDA-graph replays; "
        f"{made_with(found.record)}, commit {found.record['commit']}{remeasured}; what scores add: "
        f"{' and '.join(sorted({row['commit'] for row in scores.record['rows']}))}, with and without in turn."
    )


EXPECTED: list[tuple[str, str, Corner, str, str, str, str]] = [
    ("exact", "mage", ("7B", LONG, 8), "0.96", "0.833", "", "660 TFLOP/s on the padded rows"),
    ("exact", "mage", ("1.5B", LONG, 8), "0.41", "0.374", "", "192 rows in three warp groups: nothing padded"),
    ("exact", "mage", ("SDAR-8B", LONG, 8), "1.50", "1.416", "", "bound by bytes, as said"),
    ("exact", "mage", ("7B", LONG, 1), "0.13", "0.124", "", ""),
    ("exact", "mage", ("7B", 8192, 1), "0.013", "0.025", "0.019",
     "missed twice: the pass over the prefix alone took 14 us at c992747, 7 of them around its tiles"),
    ("exact", "mage", ("1.5B", 8192, 1), "", "0.048", "0.019", "fewer parts, merged 16 at a time"),
    ("exact", "mage", ("1.5B", 32768, 1), "", "0.058", "0.037", "the same"),
    ("exact", "mage", ("1.5B", LONG, 1), "", "0.102", "0.075", "the same"),
    ("select_keys, 28 layers", "select_keys, all layers", ("7B", LONG, 1), "0.13", "0.224", "0.13",
     "rows are summed once, at the end, no longer every 64"),
    ("top_k of all keys, 28 layers", "top_k of all keys, all layers", ("7B", LONG, 1), "0.055", "0.072", "", ""),
    ("compact, 28 layers", "compact, all layers", ("7B", LONG, 1), "0.030", "0.027", "", ""),
    ("small_attention, one layer", "small_attention, one layer", ("7B", LONG, 1), "0.006", "0.0115", "0.009",
     "missed twice: halving the barriers was not what it waited for"),
    ("confidence, 32 rows", "confidence of one block", ("7B", LONG, 1), "0.008", "0.0092", "", ""),
    ("mean_logit, one layer", "mean_logit of all keys, one layer", ("7B", LONG, 1), "0.050", "0.057", "", ""),
    ("mean_probability, one layer", "mean_probability of all keys, one layer", ("7B", LONG, 1), "0.080", "0.157", "",
     "rows summed once, as in select_keys"),
    ("page_scores by the mean query", "page_scores (mean), one layer", ("7B", LONG, 1), "", "0.030", "0.012",
     "the mean query is computed once; missed"),
]  # fmt: skip
"""What, its row, predicted before any measurement, measured at c992747, predicted after the changes since, why."""


def predictions() -> str:
    """What was predicted, what came out, twice."""
    found = Attention()
    rows = []
    for what, kernel, corner, first, came, second, reading in EXPECTED:
        where = name_of(corner) if kernel == "mage" else corner[0]
        row = found.rows[*corner, kernel]
        now = f"{row['ms']:.4f}" + (f" ({row['commit']})" if "commit" in row else "")
        rows.append([f"{what}, {where}", f"{row['floor_ms']:.4f}", first, came, second, now, reading])
    peers = ("torch.topk of all keys, all layers", "flash-sdpa on compacted keys, one layer")
    topk, flash = (found.ms(("7B", LONG, 1), name) for name in peers)
    head = ["ms", "floor", "predicted", "c992747", "then predicted", found.record["commit"], "why"]
    return (
        f"{markdown(head, rows, words=1)}\n\nIn the same run: `torch.topk` in place of top_k {topk:.3f}, flash SDPA "
        f"in place of small_attention {flash:.4f}."
    )


class Blocks:
    """results/decode_h100.json: blocks at 128K of 32 steps, in CUDA graphs, unless said."""

    def __init__(self, rows: str = "rows") -> None:
        """`rows`: "earlier" for those of earlier commits that were measured beside one another."""
        self.record = read("decode_h100.json")
        self.rows: list[dict[str, Any]] = self.record[rows]

    def find(self, model: str, batch: int, rule: str, kernel: str = "ours", dense: int = 0,
             context: int = LONG, steps: int = STEPS, graph: bool = True, fused: bool = False,
             commit: str | None = None) -> dict[str, Any] | None:  # fmt: skip
        """The row of a case, None where it was not measured."""
        keys = ("model", "batch", "rule", "exact_kernel", "dense_layers", "context", "steps", "graph")
        wanted = (model, batch, rule, kernel, dense, context, steps, graph)
        rows = [row for row in self.rows if tuple(row[key] for key in keys) == wanted]
        # Rows of earlier commits do not say whether they fused; threshold decoding may end after as many steps.
        rows = [row for row in rows if row.get("fused", False) == fused and row["acceptance"] == "static"]
        rows = [row for row in rows if commit in (None, row["commit"])]
        assert len(rows) <= 1, wanted
        return rows[0] if rows else None

    def row(self, *case: Any, **more: Any) -> dict[str, Any]:
        """The row of a case that was measured."""
        found = self.find(*case, **more)
        assert found is not None, case
        return found

    def times(self, model: str, batch: int, rule: str, kernel: str = "ours", dense: int = 0) -> float:
        """How many times slower than mage's its block is."""
        return self.row(model, batch, rule, kernel, dense)["block_ms"] / self.row(model, batch, "mage")["block_ms"]


CASES = [("7B", 1), ("1.5B", 1), ("SDAR-8B", 1), ("7B", 8), ("1.5B", 8)]
ARMS: dict[str, tuple[str, str, int]] = {
    "**MAGE**": ("mage", "ours", 0),
    "MAGE, 2 dense layers": ("mage", "ours", 2),
    "exact, ours": ("exact", "ours", 0),
    "exact, flash SDPA on packed rows": ("exact", "sdpa", 0),
    "exact, FlashInfer 0.6 fa2": ("exact", "flashinfer-fa2", 0),
    "exact, FlashInfer 0.6 auto (fa3)": ("exact", "flashinfer-auto", 0),
    "Quest, scores as published, 2 dense": ("quest", "ours", 2),
    "Quest, scores as a product, 2 dense": ("quest-gemm", "ours", 2),
    "Quest, by the mean query, 2 dense": ("quest-mean", "ours", 2),
    "SparseD, 20 % dense, 30 % kept": ("sparsed", "ours", 0),
    "SparseD, equal budget": ("sparsed-budget", "ours", 0),
    "TidalDecode, 2 dense": ("tidal", "ours", 2),
    "Sparse-dLLM, equal budget": ("sparse-dllm", "ours", 0),
}


def blocks() -> str:
    """Milliseconds per block of every rule and exact kernel; then the steps of mage's blocks."""
    found = Blocks()
    mage = {case: found.row(*case, "mage") for case in CASES}
    commits = {case: {row["commit"] for row in found.rows
                      if (row["model"], row["batch"], row["context"], row["steps"]) == (*case, LONG, STEPS)}
               for case in CASES}  # fmt: skip
    assert all(len(of) == 1 for of in commits.values()), "a column mixes commits"
    head = ["ms per block", *(f"{model} b={batch} ({', '.join(commits[model, batch])})" for model, batch in CASES)]
    rows = []
    for label, arm in ARMS.items():
        cells = []
        for model, batch in CASES:
            row = found.find(model, batch, *arm)
            ratio = (
                ""
                if label == "**MAGE**" or row is None
                else f" ({row['block_ms'] / mage[model, batch]['block_ms']:.2f})"
            )
            cells.append(f"{row['block_ms']:.1f}{ratio}" if row else "")
        rows.append([label, *cells])
    no_graph = [found.find(*case, "mage", graph=False) for case in CASES]
    rows.append(["MAGE without graphs", *(f"{row['block_ms']:.0f}" if row else "" for row in no_graph)])
    rows.append(["floor of MAGE's block", *(f"{mage[case]['floor_ms']:.1f}" for case in CASES)])
    for label, key in (("scoring step", "exact_ms"), ("choice", "select_ms"), ("commit", "commit_ms")):
        rows.append([f"MAGE's {label}", *(f"{mage[case][key]:.2f}" for case in CASES)])
    sparse = ((row["sparse_ms"], row["sparse_floor_ms"]) for row in mage.values())
    rows.append(["**MAGE's sparse step**", *(f"{ms:.2f} ({ms / floor:.2f} x floor)" for ms, floor in sparse)])
    return f"{markdown(head, rows)}\n\n{made_with(found.record)}, FlashInfer {found.record['versions']['flashinfer']}."


def steps() -> str:
    """Every context and batch: mage against our own exact kernel and the packed flash SDPA; then with fewer steps."""
    found, rows = Blocks(), []
    for model, context, batch in itertools.product(SHAPES, (8192, 32768, LONG), (1, 4, 8)):
        by_steps = [
            [found.find(model, batch, rule, context=context, steps=count) for rule in ("exact", "mage")]
            for count in (STEPS, 16, 8)
        ]
        exact, mage = by_steps[0]
        if exact is None or mage is None:
            continue
        sdpa = found.find(model, batch, "exact", "sdpa", context=context)
        ratios = [f"{e['block_ms'] / m['block_ms']:.2f}" if e and m else "" for e, m in by_steps]
        commits = dict.fromkeys(row["commit"] for pair in [*by_steps, [sdpa]] for row in pair if row)
        cells = [f"{row['block_ms']:.1f}" if row else "" for row in (mage, exact, sdpa)]
        cells += [*ratios, f"{mage['sparse_ms']:.2f}", ", ".join(commits)]
        rows.append([name_of((model, context, batch)), *cells])
    head = ["ms per block", "MAGE", "exact, ours", "exact, SDPA", f"exact / MAGE, S = {STEPS}", "S = 16", "S = 8",
            "sparse step", "commit"]  # fmt: skip
    return markdown(head, rows, words=1)


def variants() -> str:
    """MAGE's blocks with something changed, beside those without."""
    found, earlier = Blocks(), Blocks("earlier")
    pairs = []
    for model, batch in CASES:
        uneven = earlier.find(model, batch, "mage-uneven")
        if uneven:
            what = f"{name_of((model, LONG, batch))}, S = {STEPS}: uneven keys per layer"
            pairs.append((what, earlier.row(model, batch, "mage", commit=uneven["commit"]), uneven))
    for count in (STEPS, 8):
        plain, fused = (found.row("SDAR-8B", 1, "mage", steps=count, fused=fused) for fused in (False, True))
        what = f"{name_of(('SDAR-8B', LONG, 1))}, S = {count}: commit fused with the next first step"
        pairs.append((what, plain, fused))
    rows = []
    for what, plain, changed in pairs:
        blocks, choices = ([f"{row[key]:.{n}f}" for row in (plain, changed)]
                           for key, n in (("block_ms", 1), ("select_ms", 2)))  # fmt: skip
        rows.append([what, *blocks, f"{changed['block_ms'] / plain['block_ms'] - 1:+.1%}", *choices, changed["commit"]])
    return markdown(["ms per block", "MAGE", "changed", "", "its choice", "changed", "commit"], rows)


GROUPS: dict[str, tuple[str, ...]] = {
    "products by cuBLAS": ("nvjet", "void cublasLt"),
    "gate and up with SiLU, few_rows": ("gate_up_kernel",),
    "other products, few_rows": ("linear_kernel", "add_linear_kernel", "project_append_kernel"),
    "attention": ("attend_kernel", "hopper_split_kernel", "merge_kernel", "split_kernel"),
    "norms and sums of parts": ("add_norm_kernel",),
    "rope and append": ("rope_append_kernel",),
    "heads copied back to tokens": ("void at::native::elementwise_kernel<128, 4",),
    "SiLU and product": ("silu_mul_kernel",),
}


def profile() -> str:
    """Where the milliseconds of a step go; kernels that overlap sum to more than it, which counts as a gap below 0."""
    found = read("profile_h100.json")["steps"]
    columns = [
        ("7B b=1 exact (0a45180)", "7B-131072-b1-mage-0a45180", "exact"),
        ("**7B b=1 exact (b28470f)**", "7B-131072-b1-mage-b28470f", "exact"),
        ("7B b=1 sparse (0a45180)", "7B-131072-b1-mage-0a45180", "sparse"),
        ("**7B b=1 sparse (b28470f)**", "7B-131072-b1-mage-b28470f", "sparse"),
        ("1.5B b=1 sparse (2bfb2d6)", "1.5B-131072-b1-mage-2bfb2d6", "sparse"),
        ("**1.5B b=1 sparse (b28470f)**", "1.5B-131072-b1-mage-b28470f", "sparse"),
        ("7B b=8 sparse (3c09c66)", "7B-131072-b8-mage", "sparse"),
        ("1.5B b=8 sparse (3c09c66)", "1.5B-131072-b8-mage", "sparse"),
    ]
    totals = [dict.fromkeys([*GROUPS, "all else", "gaps between kernels", "**step**"], 0.0) for _ in columns]
    for total, (_, case, kind) in zip(totals, columns, strict=True):
        step = found[case][kind]
        for kernel in step["kernels"]:
            group = next((name for name, starts in GROUPS.items() if kernel["name"].startswith(starts)), "all else")
            total[group] += kernel["ms"]
        total["all else"] += step["busy_ms"] - sum(kernel["ms"] for kernel in step["kernels"])  # too short to be listed
        total["gaps between kernels"], total["**step**"] = step["ms"] - step["busy_ms"], step["ms"]
    rows = ([name, *(f"{total[name]:.2f}" if total[name] else "" for total in totals)] for name in totals[0])
    return markdown(["ms", *(name for name, _, _ in columns)], rows)


def verdict(met: bool) -> str:
    """Bold where missed."""
    return "met" if met else "**missed**"


def bars() -> str:
    """What was asked of the kernels and the engine, and what they do."""
    kernels, engine = Attention(), Blocks()
    rows = [*attention_bars(kernels, Attention("scores_h100.json")), *engine_bars(engine)]
    return "\n".join(["| asked | found | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def attention_bars(found: Attention, scores: Attention) -> list[list[str]]:
    """Of one layer's operations."""
    lost = {c: found.best_peer(c) for c in CORNERS if found.best_peer(c)[1] < 1}
    shown = "; ".join(
        f"{name_of(c)}: {peer} {found.ms(c, PEERS[peer]):.5f}, ours {found.ms(c):.5f}" for c, (peer, _) in lost.items()
    )
    rows = [
        [
            "exact attention not slower than the fastest peer at any corner",
            f"{len(CORNERS) - len(lost)} of {len(CORNERS)}" + (f" ({shown})" if shown else ""),
            verdict(not lost),
        ]
    ]
    for shape, allowed in (("1.5B", 1.4), ("7B", 1.6), ("SDAR-8B", 1.1)):
        x = found.of_floor((shape, LONG, 8))
        rows.append([f"{shape}, 128K, b=8 within {allowed} x floor", f"{x:.2f}", verdict(x <= allowed)])
    cheap = [scores.scores(c) for c in CORNERS if scores.scores(c) <= 0.05]
    dear = [f"{name_of(c)} {scores.scores(c):+.2%}" for c in CORNERS if scores.scores(c) > 0.05]
    rows.append(
        [
            "scores add at most 5 %",
            f"{len(cheap)} of {len(CORNERS)} corners within ({min(cheap):+.1%} to {max(cheap):+.1%})"
            + (f"; not {', '.join(dear)}" if dear else ""),
            verdict(not dear),
        ]
    )
    for what, kernel, allowed in (
        ("keys of 28 layers chosen (7B, 128K)", "select_keys, all layers", 0.25),
        ("their compaction", "compact, all layers", 0.1),
    ):
        ms = found.ms(("7B", LONG, 1), kernel)
        rows.append([f"{what} within {allowed} ms", f"{ms:.4f}", verdict(ms <= allowed)])
    return rows


WEIGHTS_MS = {"7B": (28 * (4608 + 3584 + 37888 + 18944) + 152064) * 3584 * 2 / 3.0e9,
              "1.5B": (28 * (2048 + 1536 + 17920 + 8960) + 151936) * 1536 * 2 / 3.0e9}  # fmt: skip
"""Every matrix of a forward pass read once at 3.0 TB/s."""


def engine_bars(found: Blocks) -> list[list[str]]:
    """Of steps and blocks."""
    rows = []
    for model, allowed in (("7B", 1.25), ("1.5B", 1.5)):
        ms = found.row(model, 1, "mage")["sparse_ms"]
        x = ms / WEIGHTS_MS[model]
        asked = f"sparse step, {model} b=1, within {allowed} x its weights' reading"
        rows.append([asked, f"{ms:.2f} ms over {WEIGHTS_MS[model]:.2f}: {x:.3f}", verdict(x <= allowed)])
    changes = {}
    for model, rows_of, commit in (("7B", found, None), ("1.5B", Blocks("earlier"), "bd13d5e")):
        long, short = (rows_of.row(model, 1, "mage", context=n, commit=commit) for n in (LONG, 8192))
        assert long["commit"] == short["commit"]
        changes[f"{model} ({long['commit']})"] = long["sparse_ms"] / short["sparse_ms"] - 1
    rows.append(
        [
            "sparse step at 128K within 3 % of 8K (b=1)",
            ", ".join(f"{model} {change:+.1%}" for model, change in changes.items()),
            verdict(all(abs(change) <= 0.03 for change in changes.values())),
        ]
    )
    times = found.times("7B", 1, "exact", "flashinfer-auto")
    rows.append(["7B b=1 at least 8 x faster than FlashInfer auto", f"{times:.2f}", verdict(times >= 8)])
    for model, least in (("1.5B", 6.0), ("7B", 4.5)):
        ours, sdpa = found.times(model, 8, "exact"), found.times(model, 8, "exact", "sdpa")
        assert ours < sdpa
        asked = f"{model} b=8 at least {least} x faster than the strongest exact kernel"
        rows.append([asked, f"{ours:.2f}; ours is the strongest, over flash SDPA {sdpa:.2f}", verdict(ours >= least)])
    for label, rule, dense, least in (
        ("faithful Quest", "quest", 2, 3.35),
        ("SparseD (20 %, 30 %)", "sparsed", 0, 2.28),
    ):
        there = [case for case in CASES if found.find(*case, rule, "ours", dense)]
        ratios = {f"{case[0]} b={case[1]}": found.times(*case, rule, "ours", dense) for case in there}
        met = [name for name, ratio in ratios.items() if ratio >= least]
        shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        says = verdict(len(met) == len(ratios)) + (f"; met by {', '.join(met)}" if 0 < len(met) < len(ratios) else "")
        rows.append([f"at least {least} x faster than {label}", shown, says])
    return rows


def further() -> str:
    """Quality and speed of what goes further."""
    from study_further import tables  # needs torch

    return tables(RESULTS / "further_h100.json")


TABLES = {
    "attention": attention,
    "predictions": predictions,
    "blocks": blocks,
    "steps": steps,
    "variants": variants,
    "profile": profile,
    "bars": bars,
    "further": further,
}
