"""SDAR (Shanghai AI Lab / JetAstra, arXiv 2510.06303) and TraDo: Qwen3-Base turned into a block-diffusion LM.

Facts read in the training modeling_sdar.py and generate.py and checked against their outputs (tests/fixtures/sdar.*).
The published block size is 4 unless the repository's name ends in -b8, -b16, ...; hub configs often omit it.
"""

from mage_tune.families.family import Family, Noise

SDAR = Family(
    name="sdar",
    architecture="Qwen3ForCausalLM",
    model_types=("sdar",),
    block_size=4,
    mask_id=151669,
    stop_ids=(151645, 151643),
    pad_id=151643,
    token_shift=False,
    noise=Noise(per="sample", at_least_one=True),
    loss_weight="inverse_p",
    fill="pad",
    fill_supervised=True,
    threshold=0.85,
)
