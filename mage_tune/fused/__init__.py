"""Decoder layers of a training pass with less memory traffic: the same mathematics as transformers' and PEFT's modules.

Between the matrix products a layer mostly moves bytes: PEFT adds each adapter's output in passes of its own, norms and
activations run one operation at a time in float32, and autograd keeps every intermediate. `fuse` gives the layers of a
Llama, Qwen2 or Qwen3 with plain LoRA another training pass:

- an adapter costs its layer no pass over memory: the input x is widened to [x, A x], the weight to [W, s B], and one
  product gives W x + s B A x. Likewise backward: the gradient g of the outputs is widened to [g, s B' g], and one
  product with W above A gives that of x; or, where that is slower, the transpose of [W, s B] gives those of x and of
  A x together. Layers that share an input (q, k, v; gate, up) share the widened one, and lie in one matrix. Small
  models, whose steps wait for the host, keep such matrices, and adapters are written into them once a pass. Ranks are
  padded with zeros to multiples of 8, which products of 16-bit numbers need to be fast;
- norms, rotary positions (with head norms where there are any) and SwiGLU are one kernel each, forward and backward
  (compiled on a GPU, plain torch else); what attention adds to the residual is added in the norm after it, the
  gradient of the residual in the gradient of that norm;
- autograd keeps the residual stream, q, k, v, the attention's output, gate and up; the rest is made again in passing.
  That is about half of what the modules keep, which often lets a GPU do without recomputing products.

Parameters, names, saved adapters and decoding are untouched: only calls with `attend` (see `mage_tune.backbone`) take
this way. What is recomputed in the backward pass is chosen by `Recompute`.
"""

from mage_tune.fused.layers import KEPT_BYTES, Recompute, fuse
from mage_tune.fused.product import padded
from mage_tune.fused.recompute import offloaded_checkpoint

__all__ = ["KEPT_BYTES", "Recompute", "fuse", "offloaded_checkpoint", "padded"]
