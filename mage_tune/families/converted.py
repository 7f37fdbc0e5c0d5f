"""An autoregressive Llama or Qwen checkpoint turned into a block-diffusion LM with token shift (our own recipe).

The first position of a block stays a real token in training, as it is in decoding, and is predicted with a small
weight from the clean token before it; a share of the blocks is fully masked, because that is the state whose attention
chooses the keys. A converted checkpoint's config.json carries `mage_tune: {family, block_size, mask_id, stop_ids}`.
"""

from mage_tune.families.family import Family, Noise

CONVERTED = Family(
    name="converted",
    architecture=None,
    model_types=(),
    block_size=32,
    mask_id=None,
    stop_ids=(),
    pad_id=None,
    token_shift=True,
    noise=Noise(per="block", floor=0.0, all_mask_share=0.15),
    seed_token=True,
    seed_loss_weight=0.1,
    fill="stop",
    fill_supervised=True,
)
