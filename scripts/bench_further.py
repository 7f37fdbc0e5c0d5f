"""What going further than MAGE would save per output block, on one GPU; adds "speed" to results/further_h100.json.

    python scripts/bench_further.py results/further_h100.json --seconds 34

Times of one layer, bf16, block of 32, prefix of 131,072, as medians of CUDA-graph replays; a saving per block is
derived from them: times layers, nothing else of the engine is run. Four changes (quality: scripts/study_further.py):

    keys-only       instead of the exact first step with its scores: tile masses from the keys alone (the kernel below),
                    choice in every layer, and attention to the chosen keys
    fp8             the same with the tile masses from an e4m3 copy of the keys, their scales folded into the queries
    fused commit    exact attention of twice the rows, and matrix products of twice the tokens, instead of two passes of
                    each. Twice the rows run without the mask that hides the next block from the finished one, and with
                    the scores of all rows where those of half would do. Models of these shapes seed their blocks, and
                    families that do cannot have it: the next block's first token is what the commit predicts
    large budget    no dense layers and more keys in every sparse step, instead of two dense layers
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="misc"

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_kernels import BLOCK, BUDGET, Call, Inputs, Shape, graph_ms

from mage_kernels.compact import compact
from mage_kernels.exact_attention import best_tile, exact_attention
from mage_kernels.key_scores import mean_logit, tile_mass
from mage_kernels.online_softmax import LOG2_E
from mage_kernels.select_keys import select_keys
from mage_kernels.small_attention import small_attention
from mage_tune.environment import environment
from mage_tune.evals.store import write_whole

CONTEXT, TILE, STEPS = 131072, 128, 32
BUDGETS = (128, 512, 1024)
FP8 = torch.float8_e4m3fn
SHAPES = {"7B": (Shape("7B", 28, 4, 28), 3584, 18944), "1.5B": (Shape("1.5B", 12, 2, 28), 1536, 8960)}
"""Name -> (attention heads and layers, hidden size, width of the MLP)."""
CASES = [("7B", 1), ("7B", 8), ("1.5B", 8), ("1.5B", 1)]
PREDICTIONS = {
    "keys-only": "half the bytes of the exact step's attention, but one choice per layer instead of one for all: saves "
    "0 to 1 ms per block at 7B b=1 (under 0.5 %), 8 ms at 7B b=8 (2.5 %)",
    "fp8": "bound by arithmetic and the softmax, not by bytes: at most 10 % faster than keys-only in bf16",
    "large budget": "1,024 keys for two dense layers with 512 keep 80 % of what dropping these layers saves at b=8 "
    "(58 ms of 399 for 7B) and about nothing at b=1",
    "fused commit": "7B b=1: 5.5 ms of 211 (one reading of the weights, little of attention, whose twice as many rows "
    "are bound by arithmetic); 7B b=8: 5 to 10 ms; 1.5B b=8: 5 ms",
}


@triton.jit
def tile_log_mass_kernel(
    query,  # [rows of batch * heads, R, D]
    key,  # bf16, or e4m3
    lengths,
    tile_log_mass,  # [batch * heads, T, R] float32
    qk_scale,
    num_rows,
    num_tiles,
    num_heads,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_row,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of keys of one KV head: the log-sum-exp of every row over it."""
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_row // num_heads, i_row % num_heads
    length = tl.load(lengths + i_b)
    o_n, o_d = i_tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    m_n = o_n < length
    p_k = key + i_b * k_batch + i_h * k_head + o_n.to(tl.int64)[:, None] * k_row + o_d[None, :]
    b_k = tl.trans(tl.load(p_k, mask=m_n[:, None], other=0.0).to(query.dtype.element_ty))  # [D, BLOCK_N]
    for i_m in range(0, num_rows, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < num_rows
        p_q = query + i_b * q_batch + i_h * q_head + o_m[:, None] * D + o_d[None, :]
        b_s = tl.dot(tl.load(p_q, mask=m_m[:, None], other=0.0), b_k) * qk_scale  # [BLOCK_M, BLOCK_N]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_max = tl.max(b_s, 1)
        b_base = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_mass = b_base + tl.log2(tl.sum(tl.exp2(b_s - b_base[:, None]), 1))
        tl.store(tile_log_mass + (i_row * num_tiles + i_tile) * num_rows + o_m, b_mass / LOG2_E, mask=m_m)


def tile_log_masses(query: Tensor, key: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """(batch, KV heads, ceil(capacity / TILE), R) float32 from queries and keys alone; -inf for tiles past the length.

    Args:
        query: (batch, KV heads, R, D) contiguous; key: (batch, KV heads, capacity, D), in the queries' dtype or e4m3.
    """
    batch, heads, rows, dim = query.shape
    tiles = triton.cdiv(key.shape[2], TILE)
    out = torch.empty(batch, heads, tiles, rows, dtype=torch.float32, device=query.device)
    tile_log_mass_kernel[(tiles, batch * heads)](
        query,
        key,
        lengths,
        out,
        scale * LOG2_E.value,
        rows,
        tiles,
        heads,
        *query.stride()[:2],
        *key.stride()[:3],
        D=dim,
        BLOCK_M=64,
        BLOCK_N=TILE,
        num_warps=4,
        num_stages=3,
    )
    return out


class Layer:
    """One layer's queries and cache, the copy in 8 bits, and room for what is chosen."""

    def __init__(self, shape: Shape, batch: int, seed: int) -> None:
        self.inputs = Inputs(shape, CONTEXT, batch, seed)
        i = self.inputs
        self.twice = torch.cat([i.query, i.query.flip(2)], dim=2).contiguous()
        largest = i.key.abs().amax(dim=2, keepdim=True)  # of each channel
        steps = largest.float() / torch.finfo(FP8).max
        # Batch row by batch row: a copy in float32 of all of them would not fit beside the rest.
        bits = [(k / s).clamp(-448, 448).to(FP8).view(torch.uint8) for k, s in zip(i.key, steps, strict=True)]
        self.shadow = torch.stack(bits).view(FP8)
        self.scaled_query = (i.query * steps).bfloat16()
        slots = (batch, shape.kv_heads, BUDGET + BLOCK, shape.head_dim)
        self.front = torch.randn(slots, device="cuda").bfloat16(), torch.randn(slots, device="cuda").bfloat16()

    def exact(self, *, twice: bool = False, scores: bool = True) -> Tensor:
        """An exact pass; with scores, it keeps the tiles' log masses: all layers' are averaged at once, later."""
        i, query = self.inputs, self.twice if twice else self.inputs.query
        tile = best_tile(query) if scores else None
        return exact_attention(query, i.key, i.value, i.lengths, i.scale, **i.own, tile=tile, impl="triton").out

    def masses(self, *, fp8: bool) -> Tensor:
        """Tile log masses from the keys alone."""
        i = self.inputs
        query, key = (self.scaled_query, self.shadow) if fp8 else (i.query, i.key)
        return tile_log_masses(query, key, i.lengths, i.scale)

    def choose(self, log_masses: Tensor) -> Any:
        """The keys of this layer; the shortlist is scored from the keys themselves."""
        i = self.inputs
        log_mass = log_masses.logsumexp(2)
        mass = tile_mass(log_masses, log_mass, i.lengths, TILE, impl="triton")
        return select_keys(i.query, i.key, log_mass, mass, i.lengths, i.scale, BUDGET, tile=TILE, impl="triton")

    def attend(self, chosen: Any) -> Tensor:
        """Compaction and attention to the chosen keys."""
        i = self.inputs
        compact(i.key, i.value, chosen.index, chosen.count, *self.front, impl="triton")
        return small_attention(i.query, *self.front, chosen.count, i.scale, own=BLOCK, impl="triton")[0]

    def attend_budget(self, budget: int) -> Call:
        """Attention to so many keys, compacted earlier: a layer of a sparse step."""
        i = self.inputs
        slots = (i.batch, i.shape.kv_heads, budget + BLOCK, i.shape.head_dim)
        key, value = torch.randn(slots, device="cuda").bfloat16(), torch.randn(slots, device="cuda").bfloat16()
        count = torch.full(slots[:2], budget, dtype=torch.int32, device="cuda")
        return lambda: small_attention(i.query, key, value, count, i.scale, own=BLOCK, impl="triton")

    def keys_only(self, *, fp8: bool) -> Tensor:
        """All of it: masses, choice, attention."""
        return self.attend(self.choose(self.masses(fp8=fp8)))


def check(layer: Layer) -> dict[str, float]:
    """Tile masses of the kernel above against the packaged exact pass; raises AssertionError when they differ."""
    i, tiles = layer.inputs, CONTEXT // TILE
    seen = exact_attention(i.query, i.key, i.value, i.lengths, i.scale, tile=TILE, impl="triton")
    assert seen.tile_log_mass is not None
    far = {}
    # Three bits of mantissa shift a logit by some hundredths, of which a tile's sum averages most out.
    for name, fp8, limit in (("bf16", False, 0.02), ("fp8", True, 0.2)):
        masses = layer.masses(fp8=fp8)[:, :, :tiles]
        far[name] = float((masses - seen.tile_log_mass[:, :, :tiles]).abs().max())
        assert far[name] < limit, f"tile log masses from {name} keys are {far[name]} apart"
        count = layer.choose(layer.masses(fp8=fp8)).count
        assert bool((count == BUDGET).all()), f"{count.tolist()} keys chosen instead of {BUDGET}"
    return {f"tile_log_mass_error_{name}": error for name, error in far.items()}


def product_calls(shape: Shape, hidden: int, width: int, tokens: int) -> list[Call]:
    """The matrix products of one layer on so many tokens, on two sets of weights, larger than the L2 cache."""
    heads = shape.query_heads * shape.head_dim
    sizes = [
        (heads + 2 * shape.kv_heads * shape.head_dim, hidden),
        (hidden, heads),
        (2 * width, hidden),
        (hidden, width),
    ]

    def call() -> Call:
        pairs = [
            (torch.randn(tokens, n, device="cuda").bfloat16(), torch.randn(m, n, device="cuda").bfloat16())
            for m, n in sizes
        ]
        return lambda: [F.linear(x, w) for x, w in pairs]

    return [call() for _ in range(2)]


def measure(name: str, batch: int) -> dict[str, Any]:
    """One case: parts in ms of one layer, and what follows from them for all layers."""
    shape, hidden, width = SHAPES[name]
    bytes_kept = 4 * batch * shape.kv_heads * CONTEXT * shape.head_dim
    layers = [Layer(shape, batch, seed) for seed in range(max(1, min(6, int(8e8 // bytes_kept))))]
    checked = check(layers[0])
    chosen = [layer.choose(layer.masses(fp8=False)) for layer in layers]
    masses = [layer.masses(fp8=False) for layer in layers]
    of_all: dict[str, list[Call]] = {
        "exact": [lambda y=y: y.exact(scores=False) for y in layers],
        "exact, scores": [lambda y=y: y.exact() for y in layers],
        "exact, twice the rows, scores": [lambda y=y: y.exact(twice=True) for y in layers],
        "tile masses from keys": [lambda y=y: y.masses(fp8=False) for y in layers],
        "tile masses from fp8 keys": [lambda y=y: y.masses(fp8=True) for y in layers],
        "choice in one layer": [lambda y=y, m=m: y.choose(m) for y, m in zip(layers, masses, strict=True)],
        "compaction and sparse attention": [lambda y=y, c=c: y.attend(c) for y, c in zip(layers, chosen, strict=True)],
        "keys-only": [lambda y=y: y.keys_only(fp8=False) for y in layers],
        "keys-only, fp8": [lambda y=y: y.keys_only(fp8=True) for y in layers],
        "mean-query scores": [
            lambda i=y.inputs: mean_logit(i.query, i.key, i.lengths, i.scale, impl="triton") for y in layers
        ],
    }
    of_all |= {sparse_part(k): [layer.attend_budget(k) for layer in layers] for k in BUDGETS}
    for times, what in ((1, "products"), (2, "products, twice the tokens")):
        of_all[what] = product_calls(shape, hidden, width, times * batch * BLOCK)
    parts: dict[str, float] = {}
    failed: dict[str, str] = {}
    for what, calls in of_all.items():
        try:
            parts[what] = round(graph_ms(calls), 5)
        except (RuntimeError, ValueError) as error:  # one part less must not cost the rest of a lent GPU's time
            failed[what] = f"{type(error).__name__}: {error}"[:300]
    return {
        "checks": checked,
        "layer_ms": parts,
        "failed": failed,
        "saved_ms_per_block": savings(parts, shape.layers),
    }


def sparse_part(budget: int) -> str:
    """Name of a sparse step's attention in one layer."""
    return f"sparse attention, {budget} keys"


def savings(parts: dict[str, float], layers: int) -> dict[str, float]:
    """Derived: what each change saves per output block, in ms; negative where it costs; left out if a part failed.

    Keys-only contains its choice; MAGE's own, made for all layers at once, is no part of this (select_ms in
    results/decode_h100.json) and comes on top.
    """
    per_block = {
        "keys-only": {"exact, scores": layers, "keys-only": -layers},
        "keys-only, fp8": {"exact, scores": layers, "keys-only, fp8": -layers},
        "fused commit, attention": {"exact": layers, "exact, scores": layers, "exact, twice the rows, scores": -layers},
        "fused commit, products": {"products": 2 * layers, "products, twice the tokens": -layers},
    }
    sparse = STEPS - 1
    for few, many in ((128, 512), (512, 1024)):
        per_block[f"{many} keys instead of {few} and 2 dense layers"] = {
            "exact": 2 * sparse,
            sparse_part(few): (layers - 2) * sparse,
            sparse_part(many): -layers * sparse,
        }
    return {
        what: round(sum(times * parts[part] for part, times in terms.items()), 4)
        for what, terms in per_block.items()
        if terms.keys() <= parts.keys()
    }


def main() -> None:
    """Measure case by case until the time is over, adding to what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=34, help="stop starting new cases after this many seconds")
    parser.add_argument("--commit", help="the toolkit's commit, where the run is made on a copy without its history")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    facts = environment() | ({"commit": arguments.commit} if arguments.commit else {})
    about = {"environment": facts, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    about |= {"predictions": PREDICTIONS, "measured": "layer_ms", "derived": "saved_ms_per_block"}
    for name, batch in CASES:
        if time.monotonic() - started > arguments.seconds:
            print(f"out of time before {name} b={batch}")
            break
        row = {"shape": name, "batch": batch, "context": CONTEXT, "budget": BUDGET, "layers": SHAPES[name][0].layers}
        try:
            row |= measure(name, batch)
        except (AssertionError, RuntimeError, ValueError) as error:  # the other cases may still run
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
        result = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.out, json.dumps(result | {"speed": about | {"rows": rows}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
