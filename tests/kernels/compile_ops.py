"""Compiles for an H100 every kernel that the operations launch on the published shapes, on a machine without a GPU.

The interpreter runs kernels as Python and lets pass what the compiler refuses (a name that changes its type in a
branch, say). Here launches stop after compilation.

    python tests/kernels/compile_ops.py            # all shapes
    python tests/kernels/compile_ops.py 1.5B       # this one, as test_compiles_for_hopper.py does
"""

import re
import sys
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import mage_kernels.choice
import mage_kernels.exact_attention.triton
import mage_kernels.overlap
from mage_kernels.add_norm import add_norm
from mage_kernels.compact import compact
from mage_kernels.confidence import confidence
from mage_kernels.exact_attention import exact_attention
from mage_kernels.few_rows import add_linear, gate_up, linear, linear_parts, new_arrivals
from mage_kernels.fill_block import fill_block
from mage_kernels.gather_attention import gather_attention
from mage_kernels.key_scores import mean_logit, mean_probability, tile_mass
from mage_kernels.overlap import overlapping
from mage_kernels.page_scores import FORMS, page_scores, update_pages
from mage_kernels.rope_append import project_append, rope_append
from mage_kernels.select_keys import select_keys
from mage_kernels.silu_mul import silu_mul
from mage_kernels.small_attention import small_attention
from mage_kernels.top_k import top_k

H100 = GPUTarget("cuda", 90, 32)
BLOCK, CONTEXT, KEYS = 32, 1024, 512
SHAPES = {"1.5B": (12, 2, 128), "7B": (28, 4, 128), "SDAR-8B": (32, 8, 128), "small": (9, 3, 64)}
"""Name -> query heads, KV heads, head_dim."""

launched: dict[str, set[str]] = {}
overlapped: set[str] = set()
readers: set[str] = set()


def compile_instead(run):
    """JITFunction.run that stops before the launch."""

    def compiled(self, *args, **options):
        kernel = run(self, *args, **{**options, "warmup": True})
        launched.setdefault(self.fn.__name__, set()).add(kernel.hash)
        if options.get("OVERLAP"):
            check_what_comes_before_its_wait(kernel)
            overlapped.add(self.fn.__name__)
        return kernel

    return compiled


READ_EARLY = {"weight_ptr", "bias_ptr", "gain_ptr", "positions_ptr", "slots_ptr", "key", "value", "count"}
"""Pointers of what no overlapping kernel writes: weights, where a block lies, and the front keys."""


def check_what_comes_before_its_wait(kernel) -> None:
    """What `mage_kernels.overlap` promises: only READ_EARLY is read, nothing is written, no branch avoids the wait."""
    ptx = kernel.asm["ptx"]
    body = re.sub(r"//.*", "", ptx[ptx.index(".entry") :])
    before, wait, after = body[body.index("{") :].partition("griddepcontrol.wait")
    assert wait and "griddepcontrol.launch_dependents" in after and "griddepcontrol" not in before
    others = re.sub(r"cp\.async\.bulk\.prefetch\.L2|ld\.param|ld\.global|st\.shared", "", before)
    found = re.search(r"\b(ld|st|atom|red|cp|bra|ret|exit)\.?\b.*", others)
    assert found is None, f"before its wait: {found and found[0]}"
    read = pointers_read(kernel, before)
    assert read <= READ_EARLY, f"read before its wait: {read - READ_EARLY}"
    if read:
        readers.add(kernel.src.fn.__name__)


def pointers_read(kernel, code: str) -> set[str]:
    """Names of the pointers whose memory straight-line PTX loads from."""
    types = {name: kind for name, kind in kernel.src.signature.items() if kind != "constexpr"}
    params = [name for name, kind in types.items() for _ in (kind if isinstance(kind, tuple) else [kind])]
    come_from: dict[str, set[str]] = {}
    read: set[str] = set()
    for line in code.splitlines():
        registers = re.findall(r"%\w+", line)
        if param := re.search(r"ld\.param\S+\s+(%\w+), \[\w+_param_(\d+)\]", line):
            come_from[param[1]] = {params[int(param[2])]} if int(param[2]) < len(params) else set()
        elif "ld.global" in line:
            address = re.search(r"\[\s*(%\w+)", line)[1]
            found = {name for name in come_from.get(address, ()) if str(types[name]).startswith("*")}
            assert found, f"of no known pointer: {line}"
            read |= found
        elif registers:
            target, *sources = [name for name in registers if not line.lstrip().startswith(f"@{name}")]
            come_from[target] = set().union(*(come_from.get(name, set()) for name in sources))
    return read


def pretend_to_be_an_h100() -> None:
    """Triton compiles for it, and the operations believe that Triton can run."""
    stub = SimpleNamespace(
        get_current_target=lambda: H100,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    driver.set_active(stub)
    JITFunction.run = compile_instead(JITFunction.run)
    mage_kernels.choice._why_not_here = lambda *_: None
    mage_kernels.exact_attention.triton.num_slots = lambda _: 132
    mage_kernels.overlap.is_possible = lambda: True


def compile_attention(heads: int, kv_heads: int, dim: int, batch: int, dtype: torch.dtype) -> None:
    """What attention and selection of a model launch; the numbers themselves are never computed."""
    rows, given = heads // kv_heads * BLOCK, {"impl": "triton"}
    query = torch.zeros(batch, kv_heads, rows, dim, dtype=dtype)
    key, own = (torch.zeros(batch, kv_heads, n, dim, dtype=dtype) for n in (CONTEXT, BLOCK))
    lengths = torch.full((batch,), CONTEXT, dtype=torch.int32)
    scale = dim**-0.5
    count = torch.full((batch, kv_heads), KEYS, dtype=torch.int32)
    index = torch.zeros(batch, kv_heads, KEYS, dtype=torch.int32)
    for tile in (None, 64, 128):
        out = exact_attention(query, key, key, lengths, scale, own_key=own, own_value=own, tile=tile, **given)
        if tile:
            mass = tile_mass(out.tile_log_mass, out.log_mass, lengths, tile, **given)
            for most in (None, count):
                select_keys(query, key, out.log_mass, mass, lengths, scale, KEYS, tile=tile, most=most, **given)
    exact_attention(query, key, key, lengths, scale, block=BLOCK, **given)
    both = torch.cat([query, query], dim=2)  # a finished block and the next one
    heads_of = (batch, kv_heads)
    tiles = torch.zeros(*heads_of, CONTEXT // 64, rows)
    masses = {"tile": 64, "masses": (tiles, torch.zeros(*heads_of, rows))}
    exact_attention(both, key, key, lengths, scale, own_key=own, own_value=own, own_from=rows, **masses, **given)
    tile_mass(tiles, masses["masses"][1], lengths, 64, **given)
    mean_probability(query, key, out.log_mass, lengths, scale, **given)
    mean_logit(query, key, lengths, scale, **given)
    for length in (CONTEXT, 131072):
        top_k(torch.zeros(batch, kv_heads, length), KEYS, lengths, sinks=4, recent=64, **given)
    kept = torch.zeros(batch, kv_heads, KEYS + BLOCK, dim, dtype=dtype)
    compact(key, key, index, count, kept, kept.clone(), **given)
    for arrivals in (None, new_arrivals(query.device)):
        small_attention(query, kept, kept, count, scale, own=BLOCK, block=BLOCK, arrivals=arrivals, **given)
    gather_attention(query, key, key, index, count, scale, own_key=own, own_value=own, **given)
    low, high = (torch.zeros(batch, kv_heads, CONTEXT // 16, dim, dtype=dtype) for _ in range(2))
    update_pages(low, high, key, lengths, page=16, added=BLOCK, **given)
    for form in FORMS:
        page_scores(query, low, high, lengths, page=16, form=form, **given)


def compile_layers(heads: int, kv_heads: int, dim: int, batch: int, dtype: torch.dtype) -> None:
    """What the rest of a forward pass launches."""
    given, tokens, hidden = {"impl": "triton"}, batch * BLOCK, heads * dim
    residual = torch.zeros(tokens, hidden, dtype=dtype)
    add_norm(residual, residual.clone(), torch.ones(hidden, dtype=dtype), 1e-6, **given)
    add_norm(residual, None, torch.ones(hidden, dtype=dtype), 1e-6, **given)
    silu_mul(torch.zeros(tokens, 2 * 8960, dtype=dtype), **given)
    few, gain, arrivals = residual[:BLOCK], torch.ones(hidden, dtype=dtype), new_arrivals(residual.device)
    linear(few, torch.zeros(4096, hidden, dtype=dtype), **given)
    gate_up(few, torch.zeros(2 * 8960, hidden, dtype=dtype), **given)
    linear(few[:1], torch.zeros(4096, hidden, dtype=dtype), **given)
    for inputs in (hidden, 8960):
        x, weight = torch.zeros(BLOCK, inputs, dtype=dtype), torch.zeros(hidden, inputs, dtype=dtype)
        add_norm(few, linear_parts(x, weight, **given), gain, 1e-6, **given)
        _, squares = add_linear(few, x, weight, gain, arrivals, **given)
    gate_up(few, torch.zeros(2 * 8960, hidden, dtype=dtype), squares=squares, eps=1e-6, **given)
    table = torch.zeros(CONTEXT, dim // 2)
    cache = torch.zeros(batch, kv_heads, CONTEXT, dim, dtype=dtype)
    position = torch.zeros(batch, dtype=torch.int64)
    width = (heads + 2 * kv_heads) * dim
    weight, bias = torch.zeros(width, hidden, dtype=dtype), torch.zeros(width, dtype=dtype)
    projected = (torch.zeros(tokens, width, dtype=dtype), linear_parts(few, weight, bias, squares=squares, **given))
    of_cache = table, table, position, cache, cache.clone(), position
    for sums in (None, squares):
        project_append(few, weight, bias, *of_cache, arrivals, squares=sums, **given)
    norm = torch.ones(dim, dtype=dtype)
    for qkv, norms in product(projected, ((None, None), (norm, norm))):
        rope_append(qkv, *of_cache, *norms, **given)
    confidence(torch.zeros(BLOCK, 4096, dtype=dtype), exclude=3, **given)
    ids, progress, left = (torch.zeros(batch, *size, dtype=torch.int64) for size in ((BLOCK,), (3,), ()))
    quotas = torch.ones(BLOCK, dtype=torch.int64)
    for threshold in (None, 0.9):
        drawn, rule = (ids, torch.zeros(batch, BLOCK)), {"mask_id": 0, "window": BLOCK, "shift": 0}
        fill_block(ids, *drawn, progress, left, quotas, threshold=threshold, **rule, **given)


def main(names: list[str]) -> None:
    """The shapes named, all by default: one row and eight in bf16; the small one in fp16 too."""
    pretend_to_be_an_h100()
    for name, how in product(names or SHAPES, (nullcontext, overlapping)):
        with how():
            for batch in (1, 8) if not names else (1,):
                compile_attention(*SHAPES[name], batch, torch.bfloat16)
            compile_layers(*SHAPES[name], 1, torch.bfloat16)
    if not names:
        compile_attention(*SHAPES["small"], 1, torch.float16)
    for kernel, variants in sorted(launched.items()):
        print(f"compiled {kernel} {len(variants)}")
    print("overlapped", *sorted(overlapped))
    print("read early", *sorted(readers))
    print("triton", triton.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
