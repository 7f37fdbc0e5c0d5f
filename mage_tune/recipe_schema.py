"""What a recipe may say: one frozen pydantic model per section, with a sentence under every field.

`mage_tune.recipe` reads YAML into these and turns their errors into one line for the person. A model validator refuses
what contradicts itself and names the key to change.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mage_tune.families import FAMILIES, PUBLISHED, Family

Weight = Annotated[float, Field(ge=0.0)]
TokenId = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0, strict=False)]
"""Key of a mapping, which JSON writes as text."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

PATH: dict[str, Any] = {"format": "path"}
"""Marks a field that may hold a local path (in the JSON schema too)."""

BYTE_VOCABULARY = 264
"""Random models with at least so many tokens read bytes and get their special tokens from the byte tokenizer."""


def _contradiction(key: str, reason: str) -> PydanticCustomError:
    """Error of a model validator. `key`, relative to the model that raises it, is what the reader should change."""
    return PydanticCustomError("contradiction", "key '{key}': {reason}", {"key": key, "reason": reason})


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, nothing is coerced, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RandomWeights(Section):
    """Shape of a randomly initialised model, for tests and measurements; every output says so."""

    architecture: Literal["llama", "qwen2", "qwen3"] = Field("llama", description="Native transformers architecture.")
    vocab_size: int = Field(256, ge=8, description="Size of the vocabulary in tokens.")
    hidden_size: int = Field(64, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(128, ge=8, description="Width of the feed-forward layer.")
    num_layers: int = Field(4, ge=1, description="Number of decoder layers.")
    num_heads: int = Field(4, ge=1, description="Number of query heads.")
    num_kv_heads: int = Field(2, ge=1, description="Number of key/value heads; must divide num_heads.")
    head_dim: int | None = Field(None, ge=2, description="Size of a head; hidden_size / num_heads when left out.")
    tie_embeddings: bool = Field(True, description="Whether the output head shares the embedding's weights.")
    max_positions: int = Field(32768, ge=32, description="Longest context in tokens.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise _contradiction(
                "num_kv_heads", f"{self.num_kv_heads} does not divide num_heads, {self.num_heads}; choose a divisor"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise _contradiction(
                "num_heads", f"{self.num_heads} does not divide hidden_size, {self.hidden_size}; add head_dim"
            )
        if (self.head_dim or self.hidden_size // self.num_heads) % 2:
            raise _contradiction("head_dim", "heads are of odd size, which rotary positions cannot be; make it even")
        return self


def _sizes_by_name(given: Any) -> Any:
    """The sizes of a published model in place of its name."""
    if not isinstance(given, str):
        return given
    if given not in PUBLISHED:
        raise PydanticCustomError(
            "literal_error", "no such shape", {"expected": ", ".join(f"'{name}'" for name in PUBLISHED)}
        )
    return PUBLISHED[given].sizes


_BY_NAME = BeforeValidator(_sizes_by_name, json_schema_input_type=RandomWeights | Literal[*PUBLISHED] | None)


class Model(Section):
    """The block-diffusion model that is fine-tuned."""

    path: str | None = Field(
        None, description="Folder or Hub id of the checkpoint; left out with random_weights.", json_schema_extra=PATH
    )
    revision: str | None = Field(None, description="Hub revision of the checkpoint.")
    family: Literal["fast_dllm_v2", "sdar", "converted"] | None = Field(
        None, description="Block-diffusion family; guessed from the checkpoint's config when left out."
    )
    block_size: int | None = Field(None, ge=1, description="Tokens per block; the family's or checkpoint's by default.")
    mask_id: int | None = Field(
        None, ge=0, description="Id of the mask token; the family's or checkpoint's by default."
    )
    stop_ids: list[TokenId] | None = Field(
        None, min_length=1, description="Ids that end an answer; the family's by default."
    )
    pad_id: int | None = Field(None, ge=0, description="Id that fills rows; never a stop id. The family's by default.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision the frozen weights are held in; auto is bfloat16 on a GPU, else float32."
    )
    quantise: Literal["none", "nf4"] = Field(
        "none",
        description="nf4 holds the linear layers in 4 bits (QLoRA; needs bitsandbytes): less memory, more time a step.",
    )
    random_weights: Annotated[RandomWeights | None, _BY_NAME] = Field(
        None,
        description="Train a random model of this shape instead. A name stands for sizes and family of a published "
        f"model: {', '.join(PUBLISHED)}.",
    )

    @property
    def record(self) -> Family | None:
        """The named family with the facts stated here; None when the checkpoint has to tell it."""
        if self.family is None:
            return None
        stops = None if self.stop_ids is None else tuple(self.stop_ids)
        return FAMILIES[self.family].with_overrides(
            block_size=self.block_size, mask_id=self.mask_id, stop_ids=stops, pad_id=self.pad_id
        )

    @model_validator(mode="before")
    @classmethod
    def _a_named_shape_has_a_family(cls, given: Any) -> Any:
        name = given.get("random_weights") if isinstance(given, dict) else None
        known = PUBLISHED.get(name) if isinstance(name, str) else None
        return given if known is None or given.get("family") else given | {"family": known.family}

    @model_validator(mode="after")
    def _weights_come_from_one_place(self) -> Self:
        if self.path is None and self.random_weights is None:
            raise _contradiction("path", "no model; add a folder or Hub id, or random_weights")
        if self.path is not None and self.random_weights is not None:
            raise _contradiction("path", "given together with random_weights; remove one of the two")
        if self.random_weights is not None and self.family is None:
            names = ", ".join(FAMILIES)
            raise _contradiction("family", f"random weights have no config to guess it from; add one of {names}")
        return self

    @model_validator(mode="after")
    def _ids_differ(self) -> Self:
        stops = self.stop_ids or (list(self.record.stop_ids) if self.record else [])
        usual_pad = FAMILIES[self.family].pad_id if self.family else None
        if self.pad_id is not None and self.pad_id in stops and self.pad_id != usual_pad:
            raise _contradiction(
                "pad_id", f"{self.pad_id} is a stop id too, so stopping would not be learnt; choose an unused token"
            )
        if self.mask_id is not None and self.mask_id in stops:
            raise _contradiction("mask_id", f"{self.mask_id} is a stop id too; choose an unused token")
        return self

    @model_validator(mode="after")
    def _ids_fit_random_weights(self) -> Self:
        if self.random_weights is None or self.record is None:
            return self
        size = self.random_weights.vocab_size
        # A vocabulary with room for bytes brings its own special tokens; the family's are then not used.
        facts = self.record if size < BYTE_VOCABULARY else self
        if facts.mask_id is None and size < BYTE_VOCABULARY:
            raise _contradiction("mask_id", f"needed, as family '{self.family}' has no mask token of its own; add it")
        ids = {"mask_id": [facts.mask_id], "stop_ids": facts.stop_ids or [], "pad_id": [facts.pad_id]}
        for key, tokens in ids.items():
            for token in tokens:
                if token is not None and token >= size:
                    raise _contradiction(
                        key, f"token {token} is outside random_weights.vocab_size, {size}; choose an id below it"
                    )
        return self


class TextSource(Section):
    """Plain text, cut into rows of whole length; documents are joined by the stop token."""

    kind: Literal["text"]
    path: str = Field(
        description="JSONL, Parquet or .txt file, a glob of them, an .npy file of token ids, or a Hub id.",
        json_schema_extra=PATH,
    )
    share: float = Field(1.0, gt=0, description="Share of the training rows drawn from this source.")
    split: str = Field("train", description="Split, when the path is a Hub dataset id.")
    field: str = Field("text", description="Record field that holds the text.")
    streaming: bool = Field(False, description="Read sequentially without loading everything (large Hub datasets).")


class ChatSource(Section):
    """Conversations: `messages` records or prompt/completion pairs; only the answers are supervised."""

    kind: Literal["chat"]
    path: str = Field(description="JSONL or Parquet file, a glob of them, or a Hub dataset id.", json_schema_extra=PATH)
    share: float = Field(1.0, gt=0, description="Share of the training rows drawn from this source.")
    split: str = Field("train", description="Split, when the path is a Hub dataset id.")
    streaming: bool = Field(False, description="Read sequentially without loading everything (large Hub datasets).")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop", description="What happens to a conversation longer than data.length."
    )


class RetrievalSource(Section):
    """Synthetic retrieval: needles scattered in text, then chat turns asking for some of them."""

    kind: Literal["retrieval"]
    path: str = Field(
        description="Text the needles are scattered in; same forms as a text source.", json_schema_extra=PATH
    )
    share: float = Field(1.0, gt=0, description="Share of the training rows drawn from this source.")
    field: str = Field("text", description="Record field that holds the text.")
    seed: int = Field(0, ge=0, description="Seed of keys, values, depths and questions, apart from the run's seed.")
    needles: tuple[Count, Count] = Field((4, 24), strict=False, description="Fewest and most needles in one row.")
    questions: tuple[Count, Count] = Field(
        (1, 6), strict=False, description="Fewest and most chat turns asking for needles."
    )
    answer_weight: Weight = Field(4.3, description="Loss weight of the tokens of the answers.")
    other_weight: Weight = Field(0.3, description="Loss weight of all other tokens of such a row.")

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        for key, (low, high) in {"needles": self.needles, "questions": self.questions}.items():
            if low > high:
                raise _contradiction(key, f"fewest, {low}, is more than most, {high}; write [{high}, {low}]")
        return self


Source = Annotated[TextSource | ChatSource | RetrievalSource, Field(discriminator="kind")]


class Data(Section):
    """Where training rows come from."""

    length: int = Field(2048, ge=1, description="Tokens per row and stream; a whole number of blocks.")
    sources: list[Source] = Field(min_length=1, description="Mixed by their shares, row by row.")
    workers: int = Field(0, ge=0, description="Data-loading processes beside the trainer.")
    packing: bool = Field(
        False,
        description="Lay a micro-step's rows side by side in as few of data.length as hold them, each seeing itself "
        "alone: less padding for short conversations, the same loss.",
    )


class Adapter(Section):
    """The LoRA adapter that is trained."""

    rank: int = Field(32, ge=1, description="LoRA rank.")
    alpha: float = Field(64.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: list[str] | None = Field(
        None, min_length=1, description="Linear layers that get an adapter; the family's by default."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    dora: bool = Field(False, description="Weight-decomposed LoRA.")
    train_mask_embedding: bool = Field(False, description="Also train the mask token's embedding row (conversion).")
    init_from: str | None = Field(
        None, description="Adapter folder to start from instead of a fresh one.", json_schema_extra=PATH
    )


class DiffusionTerm(Section):
    """The family's own denoising loss on the noisy stream."""

    weight: Weight = Field(1.0, description="Weight of this term in the loss.")
    views: Literal["family", "one"] = Field(
        "family",
        description="Noisy views of a row: as many as the family trains on (two that complement each other, in "
        "Fast-dLLM v2), or one, which costs a stream less.",
    )


class QueryAlignment(Section):
    """Block-average queries of the all-[MASK] stream are drawn to those of the later step."""

    weight: Weight = Field(0.0, description="Weight of this term in the loss.")
    distance: Literal["cosine", "squared"] = Field(
        "cosine", description="1 - cosine, or squared error relative to the target's squared norm."
    )
    average: Literal["group", "head"] = Field(
        "group", description="Queries are averaged over the block and the heads of a group, or over the block alone."
    )
    rotary: Literal["after", "before"] = Field(
        "after", description="Compare queries after rotary positions, as selection scores them, or before."
    )
    symmetric: bool = Field(False, description="Also draw the later step's queries to those of the all-[MASK] step.")
    skip_layers: int = Field(2, ge=0, description="First layers left out, as they stay dense in decoding.")


class AttentionAlignment(Section):
    """The all-[MASK] stream's mean attention over the prefix is drawn to that of the later step."""

    weight: Weight = Field(0.0, description="Weight of this term in the loss.")
    blocks: int = Field(8, ge=1, description="Blocks sampled per row and step; all of them where there are fewer.")
    direction: Literal["later_to_mask", "mask_to_later"] = Field(
        "later_to_mask", description="KL(later || all-mask), which covers the later step's keys, or the reverse."
    )
    top_k: int | None = Field(None, ge=1, description="Compare on the later step's own top keys alone, renormalised.")
    power: float = Field(
        1.0, gt=0, le=1, description="Compare probabilities raised to this power: below 1, rare keys count for more."
    )
    symmetric: bool = Field(False, description="Also draw the later step's attention to that of the all-[MASK] step.")
    skip_layers: int = Field(2, ge=0, description="First layers left out, as they stay dense in decoding.")


class SparseDistillation(Section):
    """MAGE v1's fine-tuning: the noisy stream sees only the keys chosen at the all-[MASK] step; exact teacher."""

    weight: Weight = Field(0.0, description="Weight of this term in the loss: cross-entropy + kl_weight * KL.")
    budget: int | None = Field(None, ge=1, description="Keys kept per KV head; required when the weight is not 0.")
    layer_budgets: dict[Layer, Count] = Field(
        {}, description="Layer -> keys kept there instead of `budget`; mage-tune budgets finds good ones."
    )
    kl_weight: Weight = Field(1.0, description="Weight of the KL divergence beside the cross-entropy.")
    direction: Literal["teacher_to_student", "student_to_teacher"] = Field(
        "teacher_to_student", description="KL(teacher || student), or the reverse."
    )
    teacher: Literal["adapters_off", "adapters_on"] = Field(
        "adapters_off", description="Exact teacher: the untuned base, or the model as it is now (no gradient)."
    )
    dense_layers: int = Field(2, ge=0, description="First layers that stay exact.")
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a row's blocks that the student reads, drawn anew for each row; the expected loss stays "
        "the same.",
    )

    @model_validator(mode="after")
    def _has_budget(self) -> Self:
        if self.weight > 0 and self.budget is None:
            raise _contradiction("budget", f"needed, as the weight is {self.weight:g}; add the keys kept per KV head")
        for layer in self.layer_budgets:
            if layer < self.dense_layers:
                raise _contradiction("layer_budgets", f"layer {layer} is one of the {self.dense_layers} dense layers")
        return self


class Objective(Section):
    """The loss is the weighted sum of these terms; a term of weight 0 costs nothing."""

    diffusion: DiffusionTerm = Field(DiffusionTerm(), description="The family's own denoising loss.")
    query_alignment: QueryAlignment = Field(QueryAlignment(), description="Block-average query alignment.")
    attention_alignment: AttentionAlignment = Field(AttentionAlignment(), description="Prefix attention alignment.")
    sparse_distillation: SparseDistillation = Field(SparseDistillation(), description="Sparse student, exact teacher.")

    @model_validator(mode="after")
    def _some_term_counts(self) -> Self:
        if not any(getattr(self, name).weight for name in type(self).model_fields):
            raise _contradiction("diffusion.weight", "every term has weight 0, so nothing would be learnt; raise one")
        return self


TERMS = tuple(Objective.model_fields)
"""Of the loss: the diffusion loss, then the auxiliary ones."""


class Train(Section):
    """The optimisation."""

    steps: int = Field(200, ge=1, description="Optimizer steps.")
    rows: int = Field(1, ge=1, description="Rows per device and micro-step.")
    accumulation: int = Field(1, ge=1, description="Micro-steps per optimizer step, shared out among the devices.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    final_lr_share: float = Field(0.1, ge=0, le=1, description="Share of the peak learning rate left at the end.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), strict=False, description="AdamW betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm at which gradients are clipped.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Autocast precision of the forward pass; auto is bfloat16 on a GPU, else float32."
    )
    kernels: Literal["plain", "fused"] = Field(
        "plain",
        description="Decoder layers as transformers and PEFT write them, or with less memory traffic.",
    )
    checkpointing: Literal["off", "mlp", "non_reentrant", "reentrant"] = Field(
        "off",
        description="What the backward pass recomputes: nothing, the feed-forward's first products (fused kernels "
        "only) or whole layers; reentrant loses alignment gradients.",
    )
    offload: bool = Field(False, description="Hold the inputs of recomputed layers in host memory (non_reentrant).")
    log_every: int = Field(1, ge=1, description="Steps between two lines of metrics.jsonl.")
    trackers: list[Literal["trackio", "tensorboard", "wandb"]] = Field(
        [], description="Where log lines go beside metrics.jsonl; one that fails warns, and training goes on."
    )
    sample_every: int = Field(
        0, ge=0, description="Steps between two samples of text and recall, printed while training; 0 never."
    )
    save_every: int = Field(50, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    resume: str = Field(
        "auto",
        description="auto: go on where a run stopped; never: refuse to touch a stopped run; or a checkpoint folder.",
    )

    @model_validator(mode="after")
    def _recomputation_fits(self) -> Self:
        if self.checkpointing == "mlp" and self.kernels != "fused":
            raise _contradiction("kernels", "plain, but checkpointing 'mlp' is a choice of fused layers; write fused")
        if self.checkpointing == "reentrant" and self.kernels == "fused":
            raise _contradiction("checkpointing", "fused layers are not recomputed that way; write non_reentrant")
        if self.offload and self.checkpointing != "non_reentrant":
            raise _contradiction(
                "offload",
                "only recomputed layers have inputs to hold; write checkpointing: non_reentrant, not "
                f"{self.checkpointing}",
            )
        return self


class Eval(Section):
    """Defaults of `mage-tune eval` on this run."""

    text: str | None = Field(
        None,
        description="Held-out text, which an evaluation needs; same forms as a text source.",
        json_schema_extra=PATH,
    )
    context: int = Field(2048, ge=1, description="Tokens of context of the text probes.")
    documents: int = Field(16, ge=1, description="Held-out windows probed.")
    blocks: int = Field(8, ge=1, description="Blocks probed per window, all in its second half.")
    budgets: list[Count] = Field([16, 64, 128], min_length=1, description="Keys kept per KV head, one arm each.")
    dense_layers: int = Field(2, ge=0, description="First layers that stay exact.")
    needles: int = Field(13, ge=0, description="Needles in a haystack; 0 skips the needle tasks.")
    questions: int = Field(16, ge=1, description="Questions per needle task.")
    needle_budget: int = Field(16, ge=1, description="Keys kept per KV head in the sparse needle arm.")
    threshold: float = Field(0.9, gt=0, le=1, description="Confidence above which a decoded token is accepted.")

    @model_validator(mode="after")
    def _budgets_ascend(self) -> Self:
        if self.budgets != sorted(set(self.budgets)):
            raise _contradiction("budgets", f"not ascending; write {sorted(set(self.budgets))}")
        return self


class RuleSpec(Section):
    """A selection rule of a suite: one arm for every budget."""

    rule: str = Field(description="Name of the rule: mage, quest, tidal, ...")
    budgets: list[Count] = Field(min_length=1, description="Keys kept per KV head, one arm each.")
    options: dict[str, Any] = Field({}, description="Further options of the rule: sinks, recent, refresh, ...")


class WindowSpec(Section):
    """What tasks on held-out text have in common."""

    context: int = Field(2048, ge=1, description="Tokens of a window; whole blocks.")
    documents: int = Field(16, ge=1, description="Windows, spread evenly over the text.")


class ProbeSpec(WindowSpec):
    """Probes of some blocks of every window."""

    blocks: int = Field(8, ge=1, description="Blocks probed per window, all in its second half.")


class TextSpec(ProbeSpec):
    """Recall, attention mass, query cosine and CE gap of MAGE's choice, all budgets in one pass."""

    kind: Literal["text"]
    name: str = Field("text", description="Name of the task in the results.")
    budgets: list[Count] = Field([16, 64, 128], min_length=1, description="Keys kept per KV head.")


class RulesSpec(ProbeSpec):
    """Cross-entropy and recall of held-out text under every arm of the suite."""

    kind: Literal["rules"]
    name: str = Field("rules", description="Name of the task in the results.")


class LayersSpec(ProbeSpec):
    """Which layers the cost of an early choice comes from."""

    kind: Literal["layers"]
    name: str = Field("layers", description="Name of the task in the results.")
    budget: int = Field(64, ge=1, description="Keys kept per KV head.")


class NeedlesSpec(Section):
    """Needles in a haystack over a grid of context lengths and depths; a task for each kind."""

    kind: Literal["needles"]
    name: str = Field("needles", description="Name of the tasks in the results, before the kind of needle.")
    needle_kinds: list[Literal["single", "multi_key", "multi_value", "multi_query"]] = Field(
        ["single", "multi_key", "multi_value", "multi_query"], min_length=1, description="What is asked."
    )
    lengths: list[Count] = Field([2048], min_length=1, description="Tokens of the prompts.")
    depths: list[Share] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1, description="Where the answer stands.")
    needles: int = Field(12, ge=2, description="Needles in a haystack, those asked for included.")
    asked: int = Field(3, ge=2, description="Values asked for by multi_value and multi_query.")
    questions: int = Field(2, ge=1, description="Questions per length and depth.")
    steps: int | None = Field(None, ge=1, description="Denoising steps per block; by the threshold when left out.")

    @model_validator(mode="after")
    def _some_are_asked_for(self) -> Self:
        if self.asked > self.needles:
            raise _contradiction("asked", f"{self.asked} of {self.needles} needles; ask for at most {self.needles}")
        return self


class CopySpec(WindowSpec):
    """Write on a passage that was seen before."""

    kind: Literal["copy"]
    name: str = Field("copy", description="Name of the task in the results.")
    steps: int | None = Field(8, ge=1, description="Denoising steps per block; by the threshold when null.")


class ContinueSpec(WindowSpec):
    """Write the next block of plain text."""

    kind: Literal["continue"]
    name: str = Field("continue", description="Name of the task in the results.")
    steps: int | None = Field(None, ge=1, description="Denoising steps per block; by the threshold when left out.")


class BenchmarkSpec(Section):
    """A public benchmark."""

    kind: Literal["lm_eval", "ruler", "longbench"]
    options: dict[str, Any] = Field({}, description="What the benchmark takes; see docs/evaluation.md.")


TaskSpec = Annotated[
    TextSpec | RulesSpec | LayersSpec | NeedlesSpec | CopySpec | ContinueSpec | BenchmarkSpec,
    Field(discriminator="kind"),
]


class Suite(Section):
    """A set of tasks and arms for `mage-tune eval --suite`."""

    description: str = Field("", description="One line about the suite.")
    text: str | None = Field(
        None, description="Held-out text; that of the run's recipe when left out.", json_schema_extra=PATH
    )
    seed: int = Field(1234, ge=0, description="Seed of windows, reveals, needles and passages.")
    threshold: float = Field(0.9, gt=0, le=1, description="Confidence above which a decoded token is accepted.")
    dense_layers: int = Field(2, ge=0, description="First layers that stay exact.")
    rules: list[RuleSpec] = Field([], description="Sparse arms; exact attention is always one.")
    tasks: list[TaskSpec] = Field(min_length=1, description="What is measured.")


class Recipe(Section):
    """One run, whole."""

    name: str = Field(
        pattern=r"^\w[\w.+-]*$",
        description="Name of the run: letters, digits, '.', '_', '+' and '-', as in a file name.",
    )
    output: str | None = Field(None, description="Run folder; runs/<name> when left out.")
    seed: int = Field(0, ge=0, description="Seed of adapter initialisation, data order and noise.")
    model: Model = Field(description="The model.")
    data: Data = Field(description="The data.")
    adapter: Adapter = Field(Adapter(), description="The adapter.")
    objective: Objective = Field(Objective(), description="The loss.")
    train: Train = Field(Train(), description="The optimisation.")
    eval: Eval = Field(Eval(), description="The evaluation.")

    @model_validator(mode="after")
    def _blocks_fill_rows(self) -> Self:
        record = self.model.record
        size = record.block_size if record else self.model.block_size
        if size and self.data.length % size:
            whole = max(self.data.length // size, 1) * size
            raise _contradiction(
                "data.length", f"{self.data.length} is no whole number of blocks of {size} tokens; write {whole}"
            )
        return self

    @model_validator(mode="after")
    def _fused_layers_know_the_adapter(self) -> Self:
        if self.train.kernels == "fused" and (self.adapter.dora or self.adapter.dropout):
            key, plain = ("dora", "false") if self.adapter.dora else ("dropout", "0")
            raise _contradiction(
                f"adapter.{key}", f"fused layers know plain LoRA only; write {plain}, or train.kernels: plain"
            )
        return self

    @model_validator(mode="after")
    def _auxiliary_terms_get_gradient(self) -> Self:
        active = [name for name in TERMS[1:] if getattr(self.objective, name).weight > 0]
        if active and self.train.checkpointing == "reentrant":
            raise _contradiction(
                "train.checkpointing",
                f"'reentrant' silently loses the gradient of {' and '.join(active)}; write 'non_reentrant'",
            )
        return self

    @model_validator(mode="after")
    def _budget_is_sparse(self) -> Self:
        sparse = self.objective.sparse_distillation
        if sparse.weight > 0 and sparse.budget is not None and sparse.budget >= self.data.length:
            raise _contradiction(
                "objective.sparse_distillation.budget",
                f"{sparse.budget} keys of at most {self.data.length} (data.length) is not sparse; write less",
            )
        return self

    @model_validator(mode="after")
    def _some_layer_is_left(self) -> Self:
        if self.model.random_weights is None:  # a checkpoint tells its depth only when it is loaded
            return self
        depth, terms = self.model.random_weights.num_layers, self.objective
        skipped = {"eval.dense_layers": self.eval.dense_layers}
        if terms.query_alignment.weight > 0:
            skipped["objective.query_alignment.skip_layers"] = terms.query_alignment.skip_layers
        if terms.attention_alignment.weight > 0:
            skipped["objective.attention_alignment.skip_layers"] = terms.attention_alignment.skip_layers
        if terms.sparse_distillation.weight > 0:
            skipped["objective.sparse_distillation.dense_layers"] = terms.sparse_distillation.dense_layers
        for key, layers in skipped.items():
            if layers >= depth:
                raise _contradiction(
                    key, f"{layers} leaves none of the model's {depth} layers; write less than {depth}"
                )
        return self
