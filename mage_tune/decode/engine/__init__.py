"""The decode engine: the same blocks as `decode.generate`, written by kernels and CUDA graphs.

    weights     a transformers model's weights, merged; or random ones of a published shape
    forward     the forward pass around attention
    cache       preallocated keys and values; the few that sparse steps see
    kernels     exact attention by several kernels behind one protocol
    attention   what each kind of step sees
    choice      rules that choose once per block
    blocks      tokens of the blocks in work, and acceptance, all on the device
    graphs      capture and replay
    engine      prefill, steps, commit
    generate    prompts in, `Generation` out

Arrows: generate -> engine -> choice -> attention -> kernels -> cache -> weights; blocks and forward beside them. The
plain decoder (`decode.writer` and below) is its oracle: same settings, same tokens.
"""
