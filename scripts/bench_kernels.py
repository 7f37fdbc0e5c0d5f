"""Time the kernels against their peers on one GPU, at the shapes of real models; write results/attention_h100.json.

    python scripts/bench_kernels.py --seconds 240 --out results/attention_h100.json
    python scripts/bench_kernels.py --kernels mage mage+scores --out results/scores_h100.json

One layer's exact attention of a block of 32 over a long prefix (what an exact step does once per layer), and what MAGE
adds once per block or once per sparse step. "mage+scores" is the exact pass that keeps every row's log masses of tiles
in memory of its own, as the engine has it for all layers; what it keeps is averaged over the rows by one launch for all
layers, which "select_keys" includes. Until bd13d5e a launch per layer was part of "mage+scores": cost has moved from
there to "select_keys". Every kernel is checked against float64 before it is timed; one that cannot run is named with
its reason. Times are medians of CUDA-graph replays of several calls over different inputs, so that neither launches nor
the L2 cache flatter anyone (FlashInfer is timed without a graph too). Kernels of a corner are timed in turn, round
after round: whoever came first would else have the card before it reaches its power limit. The most important rows come
first, and measuring stops when the seconds are over. Floors: bytes at 3.0 TB/s or arithmetic at 790 TFLOP/s,
whichever takes longer (docs/performance.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from mage_kernels.compact import compact  # noqa: E402
from mage_kernels.confidence import confidence  # noqa: E402
from mage_kernels.exact_attention import best_tile, exact_attention  # noqa: E402
from mage_kernels.gather_attention import gather_attention  # noqa: E402
from mage_kernels.key_scores import mean_logit, mean_probability, tile_mass  # noqa: E402
from mage_kernels.page_scores import FORMS, page_scores  # noqa: E402
from mage_kernels.select_keys import select_keys  # noqa: E402
from mage_kernels.small_attention import small_attention  # noqa: E402
from mage_kernels.testing import check_error, eager_attention  # noqa: E402
from mage_kernels.top_k import top_k  # noqa: E402
from mage_tune.bench.clock import sm_mhz  # noqa: E402
from mage_tune.environment import environment  # noqa: E402

BYTES_PER_MS, FLOPS_PER_MS = 3.0e9, 790e9
BLOCK, BUDGET, PAGE, VOCABULARY = 32, 512, 16, 152064
WARM_UP_SECONDS, REPEATS, ROUNDS = 0.02, 8, 5
PEERS_FAIL_BY = (AssertionError, ImportError, RuntimeError, ValueError, TypeError)
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Attention heads of a model."""

    name: str
    query_heads: int
    kv_heads: int
    layers: int
    head_dim: int = 128

    @property
    def rows(self) -> int:
        """Packed rows of a KV head."""
        return self.query_heads // self.kv_heads * BLOCK


SHAPES = {s.name: s for s in (Shape("1.5B", 12, 2, 28), Shape("7B", 28, 4, 28), Shape("SDAR-8B", 32, 8, 36))}
CASES = [(131072, 8), (131072, 1), (32768, 8), (32768, 1), (8192, 1), (8192, 8)]


@dataclass
class Row:
    """One measurement."""

    shape: str
    query_heads: int
    kv_heads: int
    head_dim: int
    context: int
    batch: int
    kernel: str
    ms: float | None
    floor_ms: float
    note: str | None = None
    sm_mhz: float | None = None
    """The card's clock after its turns: kernels compare at the same one."""


class Inputs:
    """Queries and a prefix cache of one layer with the block's own keys behind the prefix."""

    def __init__(self, shape: Shape, context: int, batch: int, seed: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", generator=generator, dtype=torch.float32).bfloat16()

        heads = (batch, shape.kv_heads)
        self.shape, self.context, self.batch = shape, context, batch
        self.scale = shape.head_dim**-0.5
        self.query = normal(*heads, shape.rows, shape.head_dim)
        self.key = torch.stack([normal(shape.kv_heads, context + BLOCK, shape.head_dim) for _ in range(batch)])
        self.value = torch.stack([normal(shape.kv_heads, context + BLOCK, shape.head_dim) for _ in range(batch)])
        self.own = {"own_key": self.key[:, :, context:].clone(), "own_value": self.value[:, :, context:].clone()}
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")

    def nbytes(self) -> int:
        """Of the keys and values."""
        return 2 * self.key.numel() * 2

    def floor_ms(self) -> float:
        """Keys and values read once, or the products of every row with every key, whichever takes longer."""
        flops = 4 * self.shape.head_dim * self.shape.rows * self.key[..., 0].numel()
        return max(self.nbytes() / BYTES_PER_MS, flops / FLOPS_PER_MS)


def ours(inputs: Inputs) -> Call:
    """Our exact attention."""
    i = inputs
    return lambda: exact_attention(i.query, i.key, i.value, i.lengths, i.scale, **i.own, impl="triton").out


def ours_with_scores(inputs: Inputs) -> Call:
    """The same, and every row's log mass of every tile kept, which selection starts from."""
    i, tile = inputs, best_tile(inputs.query)
    given: dict[str, Any] = {**i.own, "tile": tile, "masses": memory_for_masses(i.query, i.key, tile), "impl": "triton"}
    return lambda: exact_attention(i.query, i.key, i.value, i.lengths, i.scale, **given).out


def memory_for_masses(query: Tensor, key: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """For `exact_attention`: ([layers,] batch, KV heads, T, R) and ([layers,] batch, KV heads, R)."""
    prefix = torch.empty(query.shape[:-1], device=query.device)
    tiles = -(-key.shape[-2] // tile)
    return prefix.new_empty(*prefix.shape[:-1], tiles, prefix.shape[-1]), prefix


def sdpa(inputs: Inputs, backend: SDPBackend) -> Call:
    """PyTorch's attention with the packed rows as its queries."""
    i = inputs

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(i.query, i.key, i.value, scale=i.scale)

    return run


def flashinfer(inputs: Inputs, backend: str, in_graph: bool = True) -> Call:
    """FlashInfer's batched prefill over a paged cache; "auto" is what its users get: fa3 on Hopper.

    Its plan splits a prefix between pages, never inside one, so pages must be small for fa2 to split at all; keys and
    values are copied to pages of 16, its usual size. Its plans for a graph and for single launches differ: both run.
    """
    library: Any = import_module("flashinfer")  # a peer to be compared with, no requirement of ours
    i, shape = inputs, inputs.shape
    pages = (i.context + BLOCK) // PAGE
    total = i.batch * pages
    sizes = (i.batch + 1, i.batch + 1, total, i.batch)
    names = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
    buffers = {n: torch.empty(size, dtype=torch.int32, device="cuda") for n, size in zip(names, sizes, strict=True)}
    space = torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda")
    options: dict[str, Any] = {"use_cuda_graph": True, **buffers} if in_graph else {}
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(space, kv_layout="HND", backend=backend, **options)
    starts = torch.arange(i.batch + 1, dtype=torch.int32)
    page_list, last_page = torch.arange(total, dtype=torch.int32), torch.full((i.batch,), PAGE, dtype=torch.int32)
    heads = (shape.query_heads, shape.kv_heads, shape.head_dim)
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(starts * BLOCK, starts * pages, page_list, last_page, *heads, PAGE, causal=False, **dtypes)
    by_token = i.query.unflatten(2, (-1, BLOCK)).flatten(1, 2).transpose(1, 2).flatten(0, 1).contiguous()
    paged = tuple(x.unflatten(2, (pages, PAGE)).transpose(1, 2).flatten(0, 1).contiguous() for x in (i.key, i.value))

    def run() -> Tensor:
        return wrapper.run(by_token, paged)

    return run


def unpacked(out: Tensor, shape: Shape, batch: int) -> Tensor:
    """FlashInfer's (batch * B, query heads, D) as packed rows."""
    by_head = out.view(batch, BLOCK, shape.query_heads, shape.head_dim).transpose(1, 2)
    return by_head.reshape(batch, shape.kv_heads, shape.rows, shape.head_dim)


KERNELS: dict[str, Callable[[Inputs], Call]] = {
    "mage": ours,
    "mage+scores": ours_with_scores,
    "flash-sdpa-packed": lambda i: sdpa(i, SDPBackend.FLASH_ATTENTION),
    "cudnn-sdpa-packed": lambda i: sdpa(i, SDPBackend.CUDNN_ATTENTION),
    "flashinfer-fa2": lambda i: flashinfer(i, "fa2"),
    "flashinfer-auto": lambda i: flashinfer(i, "auto"),
    "flashinfer-fa2, no graph": lambda i: flashinfer(i, "fa2", in_graph=False),
    "flashinfer-auto, no graph": lambda i: flashinfer(i, "auto", in_graph=False),
}


def check(out: Tensor, inputs: Inputs) -> None:
    """Compare the last batch row's last KV head with float64; raises AssertionError over the error budget."""
    out = out if out.dim() == 4 else unpacked(out, inputs.shape, inputs.batch)
    query, key, value = (x[-1, -1] for x in (inputs.query, inputs.key, inputs.value))
    exact = (query.double() @ key.double().T * inputs.scale).softmax(-1) @ value.double()
    check_error(out[-1, -1], exact, eager_attention(query, key, value, inputs.scale))


@contextmanager
def captured(calls: list[Call]) -> Iterator[torch.cuda.CUDAGraph]:
    """All calls, once each, as one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    yield graph
    graph.reset()


def some_ms(work: Callable[[], object]) -> list[float]:
    """Milliseconds of `work`, REPEATS times; after a warm-up, as the first kernel may find low clocks."""
    started = time.monotonic()
    while time.monotonic() - started < WARM_UP_SECONDS:
        work()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


@dataclass
class Timed:
    """Medians of one kernel's turns."""

    ms: float
    sm_mhz: float


def in_turn(works: dict[str, Callable[[], object]]) -> dict[str, Timed]:
    """Of each, over ROUNDS in which every one has its turn."""
    times: dict[str, list[float]] = defaultdict(list)
    clocks: dict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name] += some_ms(work)
            clock = sm_mhz()
            assert clock is not None  # `main` asks for a GPU
            clocks[name].append(clock)
    return {name: Timed(statistics.median(times[name]), statistics.median(clocks[name])) for name in works}


def graph_ms(calls: list[Call]) -> float:
    """Median milliseconds of one call when a graph of all of them is replayed."""
    with captured(calls) as graph:
        return in_turn({"": graph.replay})[""].ms / len(calls)


def measure_attention(shape: Shape, context: int, batch: int, kernels: Sequence[str]) -> Iterator[Row]:
    """The kernels on one corner, on the same inputs; those launched without a graph show their launches."""
    first = Inputs(shape, context, batch, 0)
    copies = max(1, min(8, int(2.0e8 // first.nbytes()) + 1))  # together larger than the L2 cache
    sets = [first, *(Inputs(shape, context, batch, seed) for seed in range(1, copies))]
    works: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    with ExitStack() as held:
        for name in kernels:
            try:
                calls = [KERNELS[name](inputs) for inputs in sets]
                check(calls[0](), first)
                if name.endswith("no graph"):
                    works[name] = lambda calls=calls: [call() for call in calls]
                else:
                    works[name] = held.enter_context(captured(calls)).replay
            except PEERS_FAIL_BY as error:
                failed[name] = f"{type(error).__name__}: {error}"[:200]
        measured = in_turn(works)
    facts = (shape.name, shape.query_heads, shape.kv_heads, shape.head_dim, context, batch)
    for name in kernels:
        floor = round(first.floor_ms(), 5)
        if name in failed:
            yield Row(*facts, name, None, floor, failed[name])
        else:
            yield Row(*facts, name, round(measured[name].ms / len(sets), 5), floor, sm_mhz=measured[name].sm_mhz)


class Block:
    """What one block of a model at a long context leaves for selection: all layers' queries, keys, masses."""

    def __init__(self, shape: Shape, context: int) -> None:
        self.shape, self.context, self.scale = shape, context, shape.head_dim**-0.5
        self.lengths = torch.full((1,), context, dtype=torch.int32, device="cuda")
        sizes = (shape.layers, 1, shape.kv_heads)
        self.query = torch.randn(*sizes, shape.rows, shape.head_dim, device="cuda").bfloat16()
        self.key, self.value = (
            torch.randn(*sizes, context, shape.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        self.tile = best_tile(self.query[0])
        self.tile_log_mass, self.log_mass = memory_for_masses(self.query, self.key, self.tile)
        for layer in range(shape.layers):
            query, key, value = (x[layer] for x in (self.query, self.key, self.value))
            masses = self.tile_log_mass[layer], self.log_mass[layer]
            exact_attention(query, key, value, self.lengths, self.scale, tile=self.tile, masses=masses, impl="triton")
        self.chosen = self.select()
        slots = (*sizes, BUDGET + BLOCK, shape.head_dim)
        self.front_key, self.front_value = (torch.randn(slots, device="cuda").bfloat16() for _ in range(2))

    def mass(self) -> Tensor:
        """Of the tiles of all layers."""
        return tile_mass(self.tile_log_mass, self.log_mass, self.lengths, self.tile, impl="triton")

    def select(self) -> Any:
        """The keys of all layers, from the log masses that their exact passes kept."""
        facts = (self.query, self.key, self.log_mass, self.mass(), self.lengths, self.scale, BUDGET)
        return select_keys(*facts, tile=self.tile, impl="triton")

    def operations(self) -> Iterator[tuple[str, list[Call], float]]:
        """(name, calls to time, bytes that must move); one call is all layers, or one layer where the name says so."""
        shape, chosen, n = self.shape, self.chosen, self.lengths
        lists, row = shape.layers * shape.kv_heads, 2 * shape.head_dim
        score = torch.rand(shape.layers, 1, shape.kv_heads, self.context, device="cuda")
        layers = range(shape.layers)
        own = [(self.front_key[i, :, :, BUDGET:], self.front_value[i, :, :, BUDGET:]) for i in layers]
        q, k, v = self.query, self.key, self.value
        fronts = (self.front_key, self.front_value)
        per_layer = shape.kv_heads * (2 * (BUDGET + BLOCK) + 2 * shape.rows) * row
        prefix = shape.kv_heads * self.context * row
        kept = self.tile_log_mass.numel() * 4

        yield "select_keys, all layers", [self.select], lists * 8 * BUDGET * row + kept
        yield "tile_mass, all layers", [self.mass], kept
        yield "top_k of all keys, all layers", [lambda: top_k(score, BUDGET, n, impl="triton")], score.numel() * 4
        yield "torch.topk of all keys, all layers", [lambda: score.flatten(0, 2).topk(BUDGET)], score.numel() * 4
        yield (
            "compact, all layers",
            [lambda: compact(k, v, chosen.index, chosen.count, *fronts, impl="triton")],
            lists * BUDGET * row * 4,
        )
        yield (
            "small_attention, one layer",
            [
                lambda i=i: small_attention(
                    q[i], fronts[0][i], fronts[1][i], chosen.count[i], self.scale, own=BLOCK, impl="triton"
                )
                for i in layers
            ],
            per_layer,
        )
        yield (
            "flash-sdpa on compacted keys, one layer",
            [lambda i=i: F.scaled_dot_product_attention(q[i], fronts[0][i], fronts[1][i]) for i in layers],
            per_layer,
        )
        yield (
            "gather_attention, one layer",
            [
                lambda i=i: gather_attention(
                    q[i],
                    k[i],
                    v[i],
                    chosen.index[i],
                    chosen.count[i],
                    self.scale,
                    own_key=own[i][0],
                    own_value=own[i][1],
                    impl="triton",
                )
                for i in layers
            ],
            per_layer,
        )
        yield (
            "mean_probability of all keys, one layer",
            [lambda i=i: mean_probability(q[i], k[i], self.log_mass[i], n, self.scale, impl="triton") for i in layers],
            prefix,
        )
        yield (
            "mean_logit of all keys, one layer",
            [lambda i=i: mean_logit(q[i], k[i], n, self.scale, impl="triton") for i in layers],
            prefix,
        )
        pages = torch.randn(2, shape.layers, 1, shape.kv_heads, self.context // 16, shape.head_dim, device="cuda")
        low, high = pages.bfloat16()
        for form in FORMS:
            calls = [
                lambda i=i, form=form: page_scores(q[i], low[i], high[i], n, page=16, form=form, impl="triton")
                for i in layers
            ]
            yield f"page_scores ({form}), one layer", calls, prefix / 8
        logits = torch.randn(BLOCK, VOCABULARY, device="cuda").bfloat16()
        yield "confidence of one block", [lambda: confidence(logits, exclude=5, impl="triton")] * 4, logits.numel() * 2


NOTES = {"select_keys, all layers": "with tile_mass of all layers, which was part of mage+scores until bd13d5e"}


def measure_operations(shape: Shape, context: int) -> Iterator[Row]:
    """What MAGE adds around attention; times of one call."""
    facts = (shape.name, shape.query_heads, shape.kv_heads, shape.head_dim, context, 1)
    for name, calls, moved in Block(shape, context).operations():
        yield Row(*facts, name, round(graph_ms(calls), 5), round(moved / BYTES_PER_MS, 5), NOTES.get(name))


def show(row: Row) -> None:
    """One line of the table."""
    figures = f"{row.ms:9.4f} ms  {row.ms / row.floor_ms:6.2f} x floor" if row.ms is not None else row.note
    clock = f"  at {row.sm_mhz:.0f} MHz" if row.sm_mhz else ""
    print(f"{row.shape:8} {row.context:7} b={row.batch}  {row.kernel:40} {figures}{clock}", flush=True)


def main() -> None:
    """Measure until the time is over; write what there is after every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="stop starting new cases after this many seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "attention_h100.json")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="exact attention alone, by these; all by default")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    started = time.monotonic()
    shapes = [SHAPES[name] for name in args.shapes]
    cases: list[Callable[[], Iterator[Row]]] = []
    kernels: list[str] = args.kernels or list(KERNELS)
    for context, batch in CASES:
        cases += [lambda s=s, c=context, b=batch: measure_attention(s, c, b, kernels) for s in shapes]
        if (context, batch) == (131072, 1) and args.kernels is None:
            cases += [lambda s=s: measure_operations(s, 131072) for s in shapes if s.name != "SDAR-8B"]
    rows: list[Row] = []
    facts = environment()
    header = {"device": facts["device"], "versions": facts, "commit": facts["commit"], "command": " ".join(sys.argv)}
    for number, case in enumerate(cases):
        if time.monotonic() - started > args.seconds:
            print(f"out of time: {len(cases) - number} of {len(cases)} cases not measured")
            break
        for row in case():
            rows.append(row)
            show(row)
        torch.cuda.empty_cache()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(header | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
