"""Fast-dLLM v2 (NVIDIA, arXiv 2509.26328): Qwen2.5-Instruct turned into a 32-token block-diffusion LM.

Facts read in the published modeling.py and checked against its outputs (tests/fixtures/fast_dllm_v2.*).
"""

from mage_tune.families.family import Family, Noise

FAST_DLLM_V2 = Family(
    name="fast_dllm_v2",
    architecture="Qwen2ForCausalLM",
    model_types=("Fast_dLLM_Qwen",),
    block_size=32,
    mask_id=151665,
    stop_ids=(151645,),
    pad_id=151643,
    token_shift=True,
    noise=Noise(per="block"),
    complementary_views=True,
    seed_token=True,
    fill="mask",
    fill_supervised=False,
    sub_block=8,
)
