"""Decoding: write text block by block, exactly or with sparse attention to the prefix.

    cache       memory of clean keys and values; prefixes of it, as forward passes see them
    attention   the two forward passes: extend the cache, peek at a block (exact, or sparse under a selection)
    rules       who picks the keys of sparse steps
    steps       the forwards of one block, under a rule and its levers
    sampler     from logits to accepted tokens
    generate    the function behind `lm.generate`; settings, prompts, writer and result are its parts
    chat        a conversation on a terminal or a pipe
    context     rope scaling, on request
    engine/     the fast path: the same blocks from static buffers, kernels and CUDA graphs

Arrows: chat -> generate -> writer -> steps -> rules -> attention -> cache. Everything beside `engine` is plain PyTorch
and the oracle of the kernels.
"""
