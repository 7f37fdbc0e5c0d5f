"""The recipe: what one run does, as data. This is the only reader of YAML.

A recipe is a YAML file read once into the frozen models below. A key that is not here, a duplicate key, a wrong type or
a contradiction stops the run before anything is loaded, with one line that names file, line and key.
Relative paths inside a recipe are resolved against the recipe's own folder; `output` against the current directory.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Weight = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


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


class Model(Section):
    """The block-diffusion model that is fine-tuned."""

    path: str | None = Field(None, description="Folder or Hub id of the checkpoint; left out with random_weights.")
    revision: str | None = Field(None, description="Hub revision of the checkpoint.")
    family: Literal["fast_dllm_v2", "sdar", "converted"] | None = Field(
        None, description="Block-diffusion family; guessed from the checkpoint's config when left out."
    )
    block_size: int | None = Field(None, ge=1, description="Tokens per block; the family's or checkpoint's by default.")
    mask_id: int | None = Field(None, ge=0, description="Id of the mask token; the family's or checkpoint's by default.")
    stop_ids: list[int] | None = Field(None, description="Ids that end an answer; the family's by default.")
    pad_id: int | None = Field(None, ge=0, description="Id that fills rows; never a stop id. The family's by default.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision the frozen weights are held in; auto is bfloat16 on a GPU, else float32."
    )
    random_weights: RandomWeights | None = Field(None, description="Train a random model of this shape instead.")


class TextSource(Section):
    """Plain text, cut into rows of whole length; documents are joined by the stop token."""

    kind: Literal["text"]
    path: str = Field(description="JSONL, Parquet or .txt file, a glob of them, an .npy file of token ids, or a Hub id.")
    share: float = Field(1.0, gt=0, description="Share of the training rows drawn from this source.")
    split: str = Field("train", description="Split, when the path is a Hub dataset id.")
    field: str = Field("text", description="Record field that holds the text.")
    streaming: bool = Field(False, description="Read sequentially without loading everything (large Hub datasets).")


class ChatSource(Section):
    """Conversations: `messages` records or prompt/completion pairs; only the answers are supervised."""

    kind: Literal["chat"]
    path: str = Field(description="JSONL or Parquet file, a glob of them, or a Hub dataset id.")
    share: float = Field(1.0, gt=0, description="Share of the training rows drawn from this source.")
    split: str = Field("train", description="Split, when the path is a Hub dataset id.")
    streaming: bool = Field(False, description="Read sequentially without loading everything (large Hub datasets).")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop", description="What happens to a conversation longer than data.length."
    )


class RetrievalSource(Section):
    """Synthetic retrieval: needles scattered in text, then chat turns asking for some of them."""

    kind: Literal["retrieval"]
    path: str = Field(description="Text the needles are scattered in; same forms as a text source.")
    share: float = Field(1.0, gt=0, description="Share of the training rows drawn from this source.")
    field: str = Field("text", description="Record field that holds the text.")
    seed: int = Field(0, ge=0, description="Seed of keys, values, depths and questions, apart from the run's seed.")
    needles: tuple[int, int] = Field((4, 24), description="Fewest and most needles in one row.")
    questions: tuple[int, int] = Field((1, 6), description="Fewest and most chat turns asking for needles.")
    answer_weight: Weight = Field(4.3, description="Loss weight of the tokens of the answers.")
    other_weight: Weight = Field(0.3, description="Loss weight of all other tokens of such a row.")


Source = Annotated[TextSource | ChatSource | RetrievalSource, Field(discriminator="kind")]


class Data(Section):
    """Where training rows come from."""

    length: int = Field(2048, ge=1, description="Tokens per row and stream; a whole number of blocks.")
    sources: list[Source] = Field(min_length=1, description="Mixed by their shares, row by row.")
    workers: int = Field(0, ge=0, description="Data-loading processes beside the trainer.")


class Adapter(Section):
    """The LoRA adapter that is trained."""

    rank: int = Field(32, ge=1, description="LoRA rank.")
    alpha: float = Field(64.0, gt=0, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    targets: list[str] | None = Field(None, description="Linear layers that get an adapter; the family's by default.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    dora: bool = Field(False, description="Weight-decomposed LoRA.")
    train_mask_embedding: bool = Field(False, description="Also train the mask token's embedding row (conversion).")
    init_from: str | None = Field(None, description="Adapter folder to start from instead of a fresh one.")


class DiffusionTerm(Section):
    """The family's own denoising loss on the noisy stream."""

    weight: Weight = Field(1.0, description="Weight of this term in the loss.")


class QueryAlignment(Section):
    """Block-average queries of the all-[MASK] stream are drawn to those of the later step."""

    weight: Weight = Field(0.0, description="Weight of this term in the loss.")
    distance: Literal["cosine", "squared"] = Field(
        "cosine", description="1 - cosine, or squared error relative to the target's squared norm."
    )
    skip_layers: int = Field(2, ge=0, description="First layers left out, as they stay dense in decoding.")


class AttentionAlignment(Section):
    """The all-[MASK] stream's mean attention over the prefix is drawn to that of the later step."""

    weight: Weight = Field(0.0, description="Weight of this term in the loss.")
    blocks: int = Field(8, ge=1, description="Blocks sampled per row and step.")
    direction: Literal["later_to_mask", "mask_to_later"] = Field(
        "later_to_mask", description="KL(later || all-mask), which covers the later step's keys, or the reverse."
    )
    skip_layers: int = Field(2, ge=0, description="First layers left out, as they stay dense in decoding.")


class SparseDistillation(Section):
    """MAGE v1's fine-tuning: the noisy stream sees only the keys chosen at the all-[MASK] step; exact teacher."""

    weight: Weight = Field(0.0, description="Weight of this term in the loss: cross-entropy + kl_weight * KL.")
    budget: int | None = Field(None, ge=1, description="Keys kept per KV head; required when the weight is not 0.")
    kl_weight: Weight = Field(1.0, description="Weight of the KL divergence beside the cross-entropy.")
    direction: Literal["teacher_to_student", "student_to_teacher"] = Field(
        "teacher_to_student", description="KL(teacher || student), or the reverse."
    )
    teacher: Literal["adapters_off", "adapters_on"] = Field(
        "adapters_off", description="Exact teacher: the untuned base, or the model as it is now (no gradient)."
    )
    dense_layers: int = Field(2, ge=0, description="First layers that stay exact.")


class Objective(Section):
    """The loss is the weighted sum of these terms; a term of weight 0 costs nothing."""

    diffusion: DiffusionTerm = Field(DiffusionTerm(), description="The family's own denoising loss.")
    query_alignment: QueryAlignment = Field(QueryAlignment(), description="Block-average query alignment.")
    attention_alignment: AttentionAlignment = Field(AttentionAlignment(), description="Prefix attention alignment.")
    sparse_distillation: SparseDistillation = Field(SparseDistillation(), description="Sparse student, exact teacher.")


class Train(Section):
    """The optimisation."""

    steps: int = Field(200, ge=1, description="Optimizer steps.")
    rows: int = Field(1, ge=1, description="Rows per device and micro-step.")
    accumulation: int = Field(1, ge=1, description="Micro-steps per optimizer step.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    final_lr_share: float = Field(0.1, ge=0, le=1, description="Share of the peak learning rate left at the end.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm at which gradients are clipped.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Autocast precision of the forward pass; auto is bfloat16 on a GPU, else float32."
    )
    checkpointing: Literal["off", "non_reentrant", "reentrant"] = Field(
        "off", description="Recompute activations in the backward pass; reentrant loses alignment gradients."
    )
    log_every: int = Field(1, ge=1, description="Steps between two lines of metrics.jsonl.")
    save_every: int = Field(50, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    resume: str = Field("auto", description="auto: go on where a run stopped; never: start afresh; or a checkpoint.")


class Eval(Section):
    """Defaults of `mage-tune eval` on this run."""

    text: str | None = Field(None, description="Held-out text; same forms as a text source. None skips text probes.")
    context: int = Field(2048, ge=1, description="Tokens of context of the text probes.")
    documents: int = Field(16, ge=1, description="Held-out windows probed.")
    blocks: int = Field(8, ge=1, description="Blocks probed per window, all in its second half.")
    budgets: list[int] = Field([16, 64, 128], min_length=1, description="Keys kept per KV head, one arm each.")
    dense_layers: int = Field(2, ge=0, description="First layers that stay exact.")
    needles: int = Field(13, ge=0, description="Needles in a haystack; 0 skips the needle tasks.")
    questions: int = Field(16, ge=1, description="Questions per needle task.")
    needle_budget: int = Field(16, ge=1, description="Keys kept per KV head in the sparse needle arm.")
    threshold: float = Field(0.9, gt=0, le=1, description="Confidence above which a decoded token is accepted.")


class Recipe(Section):
    """One run, whole."""

    name: str = Field(description="Name of the run.")
    output: str | None = Field(None, description="Run folder; runs/<name> when left out.")
    seed: int = Field(0, ge=0, description="Seed of adapter initialisation, data order and noise.")
    model: Model = Field(description="The model.")
    data: Data = Field(description="The data.")
    adapter: Adapter = Field(Adapter(), description="The adapter.")
    objective: Objective = Field(Objective(), description="The loss.")
    train: Train = Field(Train(), description="The optimisation.")
    eval: Eval = Field(Eval(), description="The evaluation.")
