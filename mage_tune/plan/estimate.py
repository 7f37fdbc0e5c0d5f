"""Bytes and FLOP of a training step, counted from the sizes of the model and the streams of a row.

**Memory.** Activations are counted tensor by tensor: what autograd keeps of one decoder layer for its backward pass,
times tokens of all streams, times layers (or, with checkpointing, the layer's input times layers plus one whole
layer). The peak is where the loss starts its backward pass, or where the first layer is recomputed. No constant is
fitted. Against runs on one H100 (torch 2.11, transformers 5.17, peak_gib of the caching allocator):

    rows x streams x tokens, rank                                     measured   predicted then
    SmolLM2-135M, plain layers
    16 x 2 x 2048, 36, mask embedding (conversion)                    44.8 GiB   44.7 (-0.4 %)
    8 x 3 x 2048, 32, query and attention alignment                   38.8 GiB   38.0 (-2.2 %)
    4 x 4 x 2048, 32, the same and sparse cross-entropy, budget 128   28.2 GiB   27.6 (-2.0 %)
    16 x 2 x 2048, 36, frozen weights in float32                      51.6 GiB   51.5 (-0.2 %)
    fused layers
    conversion                                                        24.9 GiB   24.8 (-0.4 %)
    recipes/smollm2-135m.yaml, 8 x 4 x 2048                           34.0 GiB   32.8 (-3.5 %)
    1.5B, 1 x 3.25 x 4096 (recipe) and 2 x 3.25 x 4096          27.5, 51.4 GiB   27.6, 50.1 (+0.5, -2.6 %)
    7B, 1 x 3.25 x 4096 (recipe)                                63.5 - 64.0 GiB   62.9 (-0.9 to -1.7 %)

Those were at their peak in the loss, when a logit of a chunk took 12 bytes, and without the KL. A logit takes 2 now,
its gradient in the same place; with every term (bd13d5e):

    recipes/smollm2-135m.yaml, 16 x 4 x 2048                          60.7 GiB   62.7 (+3.3 %)
    conversion                                                        23.8 GiB   23.7 (-0.6 %)
    1.5B, 2 x 3.25 x 4096                                             45.0 GiB   45.1 (+0.3 %)
    7B, 1 x 3.25 x 4096 (recipe)                                      60.3 GiB   60.7 (+0.6 %)
    layers recomputed: 7B, 1 x 3.25 x 32768                           62.4 GiB   66.3 (+6.2 %)
    1.5B, 1 x 3.25 x 65536                                            46.1 GiB   49.2 (+6.7 %)
    7B in 4 bits, with offload, 1 x 3.25 x 65536                      64.4 GiB   68.5 (+6.4 %)

**Several GPUs.** Each holds one row's activations as one GPU does; an engine divides the rest. DDP holds the adapter's
gradients once more, in the buckets that it adds up. FSDP2 leaves a GPU its share of weights, adapter, gradients and
optimizer, and holds two layers whole: the one at work and the one gathered ahead. ZeRO-3 does likewise, lets 1e9
gathered parameters live (DeepSpeed's stage3_max_live_parameters) and has the output head whole (`callbacks.HoldHead`).
Against the fullest GPU of results/engines_h100.json (7B, 1 x 3.25 x 4096; bd13d5e):

    ddp, 2 and 4 GPUs, fused                                    60.9, 60.6 GiB   61.0 (+0.1, +0.6 %)
    fsdp2, 2 GPUs, fused                                              53.6 GiB   53.8 (+0.4 %)
    zero3, 2 GPUs, plain layers recomputed                            18.2 GiB   17.8 (-2.3 %)

GPUs share out the micro-steps of an optimizer step; adding up an adapter's gradients costs DDP next to nothing (7.2 and
3.6 s predicted, 7.7 and 3.8 measured). What FSDP2's gathering adds is one number fitted to one measurement, on NVLink
(`GATHER_RATE`), and what ZeRO-3's adds is not predicted: its 22.8 s were half as long again as its layers alone.

**Time.** A roofline: linear layers at the GEMM rate measured on an H100 (the same share of the peak is assumed of
other cards), attention at FlexAttention's rates, everything between them as memory traffic at the rates of kernels
profiled there (results/training_h100.json), the terms as bytes of their operators, and the host's launches, which hide
behind the device's work only in part. What the profiles tell is a constant with its source, and so is `LAUNCH_S`: the
host needs 0.144 s for conversion's 30 layers. It was 0.0075 a layer while the loss waited for the device (before
efaba03), and the next three were fitted to steps of SmolLM2 then: `TRAFFIC` to conversion with plain layers and 16 rows
(0.541 s), `LAUNCH_PER_TERM` to the third line above (0.47 s a micro-step), `OVERLAP` to conversion with fused layers as
they were (0.331 s). `FLEX_GAIN`, the passes of scores and those of cuts are fitted to steps of bd13d5e, whose
times are met within 5 % (SmolLM2's recipe, whose loss waited for the device: 0.711 s for 0.60).

FLOP of the model are two per multiply-add, forward and input gradient, over all streams; work that repeats or measures
(recompute, weight gradients of the adapter, sparse scoring, the teacher's pass) takes time and does not count for
utilisation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mage_tune.blocks import TILE, round_up
from mage_tune.data.collate import Collator
from mage_tune.families import Family
from mage_tune.fused import KEPT_BYTES, padded
from mage_tune.launcher import micro_steps_per_process
from mage_tune.plan.shape import Shape
from mage_tune.recipe import Recipe
from mage_tune.recipe_schema import TERMS
from mage_tune.stream_loss import StreamLoss

GIB = 2**30
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear layers of a decoder layer by the input that they share."""
STACKED = GROUPS[0], GROUPS[3]
"""Those whose input's gradient is one product in fused layers, with every W above every A."""
CHUNK = 4096
"""Rows projected to logits at once (`objectives.cross_entropy_sum`)."""
SCORED_BLOCKS = 16
"""Blocks scored at once for sparse distillation (`selection.choose_keys`)."""
GEMM_SHARE = 737 / 989
"""Highest rate of a matrix product over the card's peak, as measured on an H100."""
FLEX_SHARE = (307 / 989, 193 / 989)
"""FlexAttention's forward and backward rate over the peak, as profiled in 7B's micro-step of rows of 4096 tokens."""
FLEX_GAIN, FLEX_LONG = 1.4, 32768
"""How much faster it is in rows of FLEX_LONG tokens and more than in rows of 4096; fitted to steps of 32K and 64K."""
BANDWIDTH_SHARE = 0.8
"""Bandwidth of elementwise kernels over the data sheet's; SwiGLU's two are profiled at 0.76 and 0.87."""
LORA_SHARE = 2.13 / 3.35
"""The same of fused layers' adapter products, which wait for memory: profiled at 2.13 (7B) and 2.11 TB/s (1.5B) for
rank 32."""
LOGIT_PASSES, KL_PASSES = 5, 6
"""Times that a 16-bit logit is read or written: projected, read, turned into its gradient, read for the input's (the
kernel's further reads of a row come from its cache). KL to a teacher: the same, and the teacher's, written and read."""
TRAFFIC = 22.3
"""Times a kept byte is read or written in forward and backward; fitted, see the module's docstring."""
LAUNCH_S, LAUNCH_PER_TERM = 0.0048, 1 / 6
"""Seconds the host needs per layer and micro-step, measured, and what each auxiliary term adds to it, fitted."""
OVERLAP = 3
"""Power of the mean that host and device take together: the host is ahead in long kernels and late in short ones."""
ALIGNMENT_PASSES, SCORING_PASSES = 16, 6
"""Times that attention alignment (on either side) and sparse scoring read or write a 16-bit score. Counted, 8 and 3;
the two kernels that do it take twice the time of these bytes (their profile in smollm2-tune, training_h100.json)."""
CUT_PASSES = {"alignment": 15, "sparse": 18}
"""Times that queries and keys of a row are read or written to cut them for alignment and for the sparse stream.
Counted, 5 and 6; copies of heads out of their strides take three times as long (the same profile)."""
GATHER_RATE = 206e9
"""Bytes a second at which FSDP2 gathers weights in the forward and in the backward pass, where that is not hidden
behind the work: what fsdp2-2 of engines_h100.json takes longer than ddp-2, 0.074 s a micro-step."""
ZERO3_LIVE = 10**9
"""Gathered parameters that DeepSpeed lets live: its stage3_max_live_parameters by default."""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: GiB, dense bfloat16 TFLOP/s, TB/s of memory."""

    gib: float
    tflops: float
    tb_per_s: float


CARDS = {
    "h100": Card(79.1, 989, 3.35),
    "h200": Card(139.8, 989, 4.8),
    "b200": Card(178.0, 2250, 8.0),
    "a100": Card(79.1, 312, 2.0),
    "a100-40gb": Card(39.4, 312, 1.55),
    "l40s": Card(44.4, 362, 0.86),
    "rtx4090": Card(23.5, 165, 1.0),
}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: the bits, a byte of scale for 64 weights, and a float32 for 256 such bytes."""


@dataclass(frozen=True)
class Launch:
    """How many GPUs train together, and the engine (of `mage_tune.engines`) that divides the work."""

    engine: str = "ddp"
    gpus: int = 1

    @property
    def weight_shares(self) -> int:
        """Parts that weights, adapter, gradients and optimizer are split into."""
        return 1 if self.engine == "ddp" else self.gpus


@dataclass(frozen=True)
class Item:
    """One line of a plan: how much, and what it is made of."""

    name: str
    amount: float
    made_of: str


class Estimate:
    """Bytes of a micro-step, FLOP and seconds of an optimizer step, on one GPU; see the module's docstring."""

    def __init__(self, recipe: Recipe, shape: Shape, family: Family, launch: Launch | None = None) -> None:
        self.recipe, self.shape, self.family = recipe, shape, family
        self.launch = launch or Launch()
        self.micro_steps = micro_steps_per_process(recipe.train, self.launch.gpus)
        needs = StreamLoss(recipe.objective).collator_needs()
        collator = Collator(family, recipe.seed, **needs)
        length = round_up(recipe.data.length, max(TILE, family.block_size))
        self.row = collator.streams(length)
        self.rows = recipe.train.rows
        self.tokens = self.rows * self.row.total
        self.is_fused = recipe.train.kernels == "fused"
        self.is_mlp_recomputed = recipe.train.checkpointing == "mlp"
        self.is_recomputed = recipe.train.checkpointing in ("non_reentrant", "reentrant")
        self.is_quantised = recipe.model.quantise == "nf4"
        # A plan is for a GPU, where "auto" is bfloat16.
        self.compute_bytes = 4 if recipe.train.precision == "float32" else 2
        self.weight_bytes = 4 if recipe.model.dtype == "float32" else 2
        self.residual_bytes = max(self.weight_bytes, self.compute_bytes)

    # --- parameters ---------------------------------------------------------------------------------------------------

    @property
    def adapter_parameters(self) -> int:
        """Trained parameters."""
        shape, adapter = self.shape, self.recipe.adapter
        sizes = [shape.linears[name] for name in self._targets]
        per_layer = sum(self._rank * (inputs + outputs) + outputs * adapter.dora for inputs, outputs in sizes)
        return shape.num_layers * per_layer + shape.hidden_size * adapter.train_mask_embedding

    @property
    def _targets(self) -> list[str]:
        named = self._initial.get("target_modules") or self.recipe.adapter.targets or self.family.lora_targets
        unknown = set(named) - set(self.shape.linears)
        if unknown:
            raise ValueError(f"adapter.targets: cannot plan for {', '.join(sorted(unknown))}")
        return sorted(named)

    @property
    def _rank(self) -> int:
        return int(self._initial.get("r") or self.recipe.adapter.rank)

    @property
    def _initial(self) -> dict[str, Any]:
        start = self.recipe.adapter.init_from
        file = Path(start or "") / "adapter_config.json"
        return json.loads(file.read_text()) if start and file.is_file() else {}

    @property
    def stream_names(self) -> str:
        """Streams of a row in words."""
        row = self.row
        part = "" if row.student_blocks is None else f" ({row.sparse_length / row.length:.0%})"
        names = [f"sparse{part}"] * row.sparse + ["all-mask"] * row.mask + ["noisy"] * row.noisy + ["clean"]
        return " + ".join(names)

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory(self) -> Iterator[Item]:
        """Components of the peak, in GiB."""
        shape, adapter, parts = self.shape, self.adapter_parameters, self.launch.weight_shares
        held = "" if parts == 1 else f", 1/{parts} of it here"
        kind = {2: "bfloat16", 4: "float32"}[self.weight_bytes]

        def item(name: str, size: float, made_of: str) -> Item:
            return Item(name, size / GIB, made_of)

        if self.is_quantised:
            size = NF4_BYTES * shape.linear_parameters
            size += self.weight_bytes * (shape.parameters - shape.linear_parameters)
            yield item("weights", size, f"{shape.parameters / 1e9:.3f} G, linear layers in NF4, the rest in {kind}")
            largest_weight = max(inputs * outputs for inputs, outputs in shape.linears.values())
            yield item("unpacked weight", self.compute_bytes * largest_weight, "the largest, for its product")
        else:
            size = self.weight_bytes * shape.parameters / parts
            yield item("weights", size, f"{shape.parameters / 1e9:.3f} G in {kind}{held}")
        if self.weight_bytes > self.compute_bytes and not (self.is_recomputed or self.is_fused or self.is_quantised):
            size = self.compute_bytes * shape.linear_parameters
            yield item("cast weights", size, "linear layers once more in bfloat16, kept for their input gradients")
        if self.keeps_wide_weights:
            yield item("wide weights", self._wide_bytes(), "linear layers once more, with their adapters beside them")
        yield item("adapter", 4 * adapter / parts, f"{adapter / 1e6:.2f} M in float32{held}")
        yield item("gradients", 4 * adapter / parts, f"of the adapter, float32{held}")
        yield item("optimizer", 8 * adapter / parts, f"two AdamW moments, float32{held}")
        if self.launch.gpus > 1:
            yield self._gathered()
        kept = self.layer_bytes()
        if self.is_recomputed:
            kept = float(self.residual_bytes * shape.hidden_size * self.tokens)
        what = f"{self.tokens:,} tokens x {shape.num_layers} layers x {kept / self.tokens / 1024:.1f} KiB"
        name, note = ("checkpoints", ", each layer's input") if self.is_recomputed else ("activations", "")
        if self.recipe.train.offload:
            yield item(name, 0.0, f"{what}: {kept * shape.num_layers / GIB:.1f} GiB of host memory")
        else:
            yield item(name, kept * shape.num_layers, what + note)
        yield item("terms", self._terms_bytes(), "kept per layer by alignment and the sparse stream")
        yield item("last hidden", self._last_bytes(), "final norm and its output")
        tiles = self.row.exact.total // TILE
        yield item("flex mask", self._mask_bytes(), f"FlexAttention's lists of {tiles} x {tiles} tiles")
        phases = dict(self._phases())
        largest = max(phases, key=lambda name: phases[name])
        yield item(f"at the peak: {largest}", phases[largest], "the most that is held for a moment only")

    def _gathered(self) -> Item:
        """What a GPU holds for the others' sake."""
        shape = self.shape
        if self.launch.engine == "ddp":
            return Item(
                "gradient buckets", 4 * self.adapter_parameters / GIB, "the adapter's gradients, to be added up"
            )
        layer = shape.linear_parameters // shape.num_layers
        if self.launch.engine == "fsdp2":
            return Item("gathered weights", 2 * self.weight_bytes * layer / GIB, "the layer at work and the next one")
        live = min(ZERO3_LIVE, shape.linear_parameters)
        head = shape.vocab_size * shape.hidden_size
        made_of = f"{ZERO3_LIVE / 1e9:.0f} G parameters that may live, and the output head"
        return Item("gathered weights", self.weight_bytes * (live + head) / GIB, made_of)

    @property
    def keeps_wide_weights(self) -> bool:
        """Whether fused layers keep what they make of weights and adapters: those of small models do."""
        held = self.weight_bytes * self.shape.linear_parameters
        return self.is_fused and not self.is_quantised and held <= KEPT_BYTES

    def _wide_bytes(self) -> float:
        """Matrices of `fused.Product`: layers that share an input, beside their adapters' B; every A, some below W."""
        shape, targets, size = self.shape, set(self._targets), 0
        for group in GROUPS:
            inner = padded(self._rank) * len(targets & set(group))
            inputs, outputs = shape.linears[group[0]][0], sum(shape.linears[name][1] for name in group)
            matrices = 2 if group in STACKED else 1
            size += (outputs * (matrices * inputs + inner) + inner * inputs) * bool(inner)
        return float(self.compute_bytes * size * shape.num_layers)

    def layer_bytes(self) -> float:
        """What autograd keeps of one decoder layer, sparse stream and alignment apart.

        Per token: float32 input of both norms; their output where adapters read it; q, k, v, attention output and
        log-sum-exp; gate, silu, up and, where an adapter reads it, their product; the adapters' inner vectors. Fused
        layers keep the inputs of both norms as they are, q, k, v, attention output, gate, up and inner vectors, padded.
        """
        if self.is_fused:
            return self._fused_bytes(gate_and_up=not self.is_mlp_recomputed)
        shape, size, targets = self.shape, self.compute_bytes, set(self._targets)
        readers = [len(targets & group) for group in ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})]
        if self.residual_bytes == size:  # a float32 residual is cast for every adapter on its own
            readers = [min(count, 1) for count in readers]
        norms = 2 * 4 * shape.hidden_size + sum(readers) * size * shape.hidden_size
        attention = size * (2 * shape.query_size + 2 * shape.key_size) + 4 * shape.num_heads
        feed_forward = (3 + ("down_proj" in targets)) * size * shape.intermediate_size
        inner = size * self._rank * len(targets)
        return float(self.tokens * (norms + attention + feed_forward + inner + self._head_norm_bytes))

    @property
    def _head_norm_bytes(self) -> int:
        """Float32 queries and keys that norms of heads keep, per token."""
        return 4 * (self.shape.query_size + self.shape.key_size) * self.shape.head_norms

    def _fused_bytes(self, *, gate_and_up: bool) -> float:
        shape, size, targets = self.shape, self.compute_bytes, set(self._targets)
        attention = size * (2 * shape.query_size + 2 * shape.key_size) + 4 * shape.num_heads
        kept = 2 * self.residual_bytes * shape.hidden_size + attention
        kept += size * (shape.query_size + shape.key_size) * shape.head_norms  # queries and keys before their norms
        kept += 2 * size * shape.intermediate_size * gate_and_up
        kept += size * padded(self._rank) * len(targets if gate_and_up else targets - {"gate_proj", "up_proj"})
        return float(self.tokens * kept)

    def _terms_bytes(self) -> float:
        """Kept by alignment and the sparse stream; with recompute only one layer's at a time."""
        layers = 1 if self.is_recomputed else self.shape.num_layers
        terms = self.recipe.objective
        alignment, sparse = terms.attention_alignment, terms.sparse_distillation
        total = 0.0
        if alignment.weight > 0:
            seen = max(layers - alignment.skip_layers, 1)
            total += seen * 4 * self._alignment_pairs() * (1 + alignment.symmetric)  # probabilities, float32
        if sparse.weight > 0:
            seen = max(layers - sparse.dense_layers, 1)
            total += seen * self._sparse_bytes()
        return total

    def _alignment_pairs(self) -> float:
        """Probabilities of one layer's sampled blocks: rows x heads x positions x clean keys."""
        blocks = min(self.recipe.objective.attention_alignment.blocks, self.row.length // self.row.block_size)
        return self.rows * self.shape.num_heads * blocks * self.row.block_size * self.row.length

    def _sparse_bytes(self) -> float:
        """One layer: packed queries and output, chosen and own keys and values with indices, flex's own output."""
        shape, size, row = self.shape, self.compute_bytes, self.row
        budget = self.recipe.objective.sparse_distillation.budget or 0
        slots = (budget + row.block_size) / row.block_size  # chosen and own keys for one position of a block
        per_token = 2 * size * shape.query_size + 2 * size * slots * shape.key_size
        per_token += 8 * shape.num_kv_heads * budget / row.block_size
        exact = size * shape.query_size * row.exact.total
        return self.rows * (row.sparse_length * per_token + exact)

    def _last_bytes(self) -> float:
        return self.tokens * self.shape.hidden_size * (4 + self.residual_bytes)

    def _mask_bytes(self) -> float:
        return 4 * 4 * (self.row.exact.total / TILE) ** 2  # full and partial lists, by row and by column, int32

    def _phases(self) -> Iterator[tuple[str, float]]:
        """Moments that may be the peak, and what each holds beside all the above."""
        shape, size = self.shape, self.compute_bytes
        sparse = self.recipe.objective.sparse_distillation
        logits = min(CHUNK, max(self._predictions(), 1.0)) * shape.vocab_size
        student = min(CHUNK, max(self._masked_share() * self.rows * self.row.sparse_length, 1.0)) * shape.vocab_size
        # Its gradient takes the place of the logits; KL holds the teacher's beside them. A tied head whose mask row is
        # trained holds its merged weight and the gradients of both.
        trained = 3 * self.weight_bytes * shape.vocab_size * shape.hidden_size * self._trains_head
        yield "cross-entropy of a chunk", size * logits + trained
        if sparse.weight > 0:
            if sparse.kl_weight > 0:
                yield "KL of a chunk", 2 * size * student + trained
            keys = self.row.length * SCORED_BLOCKS * self.row.block_size
            yield "sparse scoring", self.rows * shape.num_heads * keys * (8 + size)
        # in the feed-forward: gradients by way of weight and adapter, and their sum; the residual's on either side.
        # Fused: gradients of product, gate and up, and the product itself; gate and up too where they are recomputed.
        wide = (4 + 2 * self.is_mlp_recomputed) if self.is_fused else 3
        backward = self.tokens * (wide * size * shape.intermediate_size + 2 * self.residual_bytes * shape.hidden_size)
        yield "backward of a layer", backward + (self.layer_bytes() if self.is_recomputed else 0.0)

    @property
    def _trains_head(self) -> bool:
        return self.recipe.adapter.train_mask_embedding and self.shape.tie_embeddings

    def _predictions(self) -> float:
        """Rows projected to logits in a micro-step, about: the masked share of the noisy streams."""
        share = self._masked_share()
        noisy = 1.0 if self.row.noisy == 2 else share * self.row.noisy
        return self.rows * (self.row.length * noisy + self.row.sparse_length * share)

    def _masked_share(self) -> float:
        """Of a noisy stream's tokens, on average."""
        noise = self.family.noise
        return noise.all_mask_share + (1 - noise.all_mask_share) * (noise.low + noise.high) / 2

    # --- time ---------------------------------------------------------------------------------------------------------

    def model_flop(self) -> float:
        """FLOP of an optimizer step that count for utilisation."""
        forward, backward = self._attention_flop()
        linear = 4 * (self.shape.linear_parameters + self.adapter_parameters) * self.tokens
        return self.micro_steps * (linear + self._head_flop(4) + forward + backward)

    def _head_flop(self, per_weight: int) -> float:
        return per_weight * self.shape.vocab_size * self.shape.hidden_size * self._predictions()

    def _attention_flop(self) -> tuple[float, float]:
        """(forward, input gradient) of exact and sparse attention, all layers."""
        shape, row = self.shape, self.row
        blocks, size = row.length // row.block_size, row.block_size
        pairs = (row.exact.total // row.length) * size * size * blocks * (blocks + 1) / 2
        if row.sparse:
            budget = self.recipe.objective.sparse_distillation.budget or 0
            pairs += row.sparse_length * (min(budget, row.length) + size)
        forward = 4 * shape.query_size * pairs * self.rows * shape.num_layers
        return forward, 2 * forward

    def time(self, card: Card) -> Iterator[Item]:
        """Parts of an optimizer step, in seconds."""
        parts = list(self._device_time(card))
        yield from parts
        terms = sum(getattr(self.recipe.objective, name).weight > 0 for name in TERMS[1:])
        launches = LAUNCH_S * (1 + LAUNCH_PER_TERM * terms) * (4 / 3 if self.is_recomputed else 1)
        host = self.micro_steps * self.shape.num_layers * launches
        device = sum(part.amount for part in parts)
        waiting = (device**OVERLAP + host**OVERLAP) ** (1 / OVERLAP) - device
        made_of = f"of {host:.2f} s of launching kernels, what the GPU's work does not hide"
        yield Item("waiting for the CPU", waiting, made_of)
        if self.launch.engine == "fsdp2" and self.launch.gpus > 1:
            others = 1 - 1 / self.launch.gpus  # share of the weights that comes from them, forward and backward
            moved = self.micro_steps * 2 * self.weight_bytes * self.shape.parameters * others
            made_of = f"{moved / 1e9:.0f} GB from the other GPUs, what the work hides left out"
            yield Item("gathering weights", moved / GATHER_RATE, made_of)

    def _device_time(self, card: Card) -> Iterator[Item]:
        steps, shape, peak = self.micro_steps, self.shape, card.tflops * 1e12
        passes = 6 if self.is_recomputed else 4
        # Their weights have gradients too. Those of fused layers wait for memory and are counted there.
        adapter_passes = 0 if self.is_fused else passes + 2
        linear: float = (passes * shape.linear_parameters + adapter_passes * self.adapter_parameters) * self.tokens
        feed_forward = shape.num_layers * shape.hidden_size * shape.intermediate_size
        if self.is_mlp_recomputed:
            linear += 2 * 2 * feed_forward * self.tokens  # gate and up once more
        elif self.is_fused and self.is_recomputed:
            linear -= 2 * feed_forward * self.tokens  # all but down
        linear += self._head_flop(4 + 2 * self._trains_head)
        rate = GEMM_SHARE * peak
        recomputes = self.is_recomputed or self.is_mlp_recomputed
        what = "forward, recompute, input gradient" if recomputes else "forward, input gradient"
        yield Item(
            "linear layers",
            steps * linear / rate,
            f"{steps * linear / 1e12:.0f} TFLOP ({what}) at {rate / 1e12:.0f} TFLOP/s",
        )
        forward, backward = self._attention_flop()
        forward *= 2.0 if self.is_recomputed else 1.0
        long = math.log(self.row.length / 4096) / math.log(FLEX_LONG / 4096)
        gain = 1 + (FLEX_GAIN - 1) * min(max(long, 0.0), 1.0)
        at_forward, at_backward = (share * gain * card.tflops for share in FLEX_SHARE)
        seconds = (forward / at_forward + backward * 1.25 / at_backward) / 1e12  # scores once more
        rates = f"{at_forward:.0f} TFLOP/s forward, {at_backward:.0f} backward"
        yield Item("attention", steps * seconds, f"{steps * (forward + backward) / 1e12:.0f} TFLOP at {rates}")
        moved = self._fused_traffic() if self.is_fused else self.layer_bytes() * TRAFFIC
        again = shape.num_layers * (4 / 3 if self.is_recomputed else 1)
        moved *= again
        if self.is_quantised:
            linear_passes = 3 if recomputes else 2
            moved += linear_passes * shape.linear_parameters * (NF4_BYTES + 2 * self.compute_bytes)
        logits = shape.vocab_size * self._predictions()
        moved += (LOGIT_PASSES + self._trains_head) * self.compute_bytes * logits
        bandwidth = BANDWIDTH_SHARE * card.tb_per_s * 1e12
        yield Item(
            "memory traffic", steps * moved / bandwidth, f"{steps * moved / 1e12:.1f} TB at {bandwidth / 1e12:.1f} TB/s"
        )
        if self.is_fused:
            adapters, speed = again * self._adapter_traffic(), LORA_SHARE * card.tb_per_s * 1e12
            yield Item(
                "adapters", steps * adapters / speed, f"{steps * adapters / 1e12:.1f} TB at {speed / 1e12:.1f} TB/s"
            )
        yield from self._term_time(rate, bandwidth)

    def _fused_traffic(self) -> float:
        """Bytes that one fused layer moves between its products, forward and backward, with nothing recomputed.

        Per token: norms, with one of two additions to the residual and with its gradient, read and write 16 times the
        hidden size, the other addition 3, the copy of its gradient 2; SwiGLU 9 times its own size. Two products of four
        add to the gradient of their input. Rotary positions and the layout of heads take 10 passes over queries and
        keys, norms of heads one more.
        """
        shape, size = self.shape, self.compute_bytes
        hidden, wide = shape.hidden_size, shape.intermediate_size
        per_token = size * (9 * wide + 8 * hidden + (10 + shape.head_norms) * (shape.query_size + shape.key_size))
        return float(self.tokens * (per_token + 19 * self.residual_bytes * hidden))

    def _adapter_traffic(self) -> float:
        """Bytes that the adapters of one fused layer move, likewise.

        Their products read the input twice and the output's gradient once. Then they read that once more, where the
        gradient of the input is one product, and add to the latter where it is not. What the attention put out is
        copied to be widened. Weights are widened in both passes, but where that is kept.
        """
        shape, targets = self.shape, set(self._targets)
        moved = 2 * shape.query_size * ("o_proj" in targets)
        for group in GROUPS:
            of_inputs, of_outputs = (2, 2) if group in STACKED else (4, 1)
            moved += of_inputs * shape.linears[group[0]][0] * bool(targets & set(group))
            moved += of_outputs * sum(shape.linears[name][1] for name in targets & set(group))
        passes = 0 if self.keeps_wide_weights else 4
        weights = passes * sum(math.prod(shape.linears[name]) for name in targets)
        return float(self.compute_bytes * (self.tokens * moved + weights))

    def _term_time(self, rate: float, bandwidth: float) -> Iterator[Item]:
        """Extra work of the auxiliary terms: bytes of the operators of one layer's attention, counted at 7B's sizes.

        Beside what they compute, terms cut queries and keys into streams, pack them by blocks, and add up gradients.
        """
        steps, shape, terms = self.micro_steps, self.shape, self.recipe.objective
        alignment, sparse = terms.attention_alignment, terms.sparse_distillation
        moved: float
        passes = CUT_PASSES["alignment"] * (alignment.weight > 0 or terms.query_alignment.weight > 0)
        passes += CUT_PASSES["sparse"] * (sparse.weight > 0)
        if passes:
            moved = shape.num_layers * self.tokens * self.compute_bytes * (shape.query_size + shape.key_size) * passes
            yield Item(
                "cutting streams",
                steps * moved / bandwidth,
                f"{steps * moved / 1e12:.1f} TB: queries and keys, {passes} times",
            )
        if alignment.weight > 0:
            layers = max(shape.num_layers - alignment.skip_layers, 0)
            moved = layers * self._alignment_pairs() * self.compute_bytes * 2 * ALIGNMENT_PASSES
            yield Item(
                "attention alignment", steps * moved / bandwidth, f"{steps * moved / 1e12:.1f} TB of probabilities"
            )
        if sparse.weight > 0:
            layers = max(shape.num_layers - sparse.dense_layers, 0)
            pairs = self.rows * shape.num_heads * self.row.length * self.row.sparse_length
            moved = layers * pairs * self.compute_bytes * SCORING_PASSES
            yield Item(
                "sparse scoring", steps * moved / bandwidth, f"{steps * moved / 1e12:.1f} TB: a score for every key"
            )
            if sparse.kl_weight > 0:
                rows = steps * self.rows * self._masked_share() * self.row.sparse_length
                moved = rows * shape.vocab_size * self.compute_bytes * KL_PASSES
                flop = rows * shape.vocab_size * shape.hidden_size * (6 + 2 * self._trains_head)
                yield Item(
                    "KL to the teacher", moved / bandwidth + flop / rate, f"{moved / 1e12:.2f} TB: logits of both sides"
                )
            if sparse.kl_weight > 0 and sparse.teacher == "adapters_off":
                flop = 2 * shape.linear_parameters * self.rows * 2 * self.row.length
                yield Item("teacher", steps * flop / rate, f"{steps * flop / 1e12:.0f} TFLOP, forward of two streams")
