"""Triton kernels of mage_tune, one folder per operation; they know nothing of mage_tune.

Every folder is a family: `__init__.py` holds the public function (meaning, layout, limits), `reference.py` the same in
plain PyTorch, slow and obvious, and `triton.py` the kernel. Import an operation from its folder:

    from mage_kernels.exact_attention import exact_attention

The layout they share. A block of B positions has no causal mask inside, so the G query heads of a KV head form
R = G * B packed rows: queries are (batch, KV heads, R, D). The prefix cache of a layer is (batch, KV heads, capacity,
D) for keys and the same for values; `lengths` (batch,) int32 says how many of its keys are valid, and stays on the
device, so that a CUDA graph captured once is right for every length. Operations that run once per block take a leading
dimension of layers, (layers, batch, KV heads, ...), and do all layers in one launch. What lies beyond a length is never
read into a result, even if it is NaN.

`impl` is "triton", "reference", or "auto", which takes Triton where it can run and says so in the log.
"""
