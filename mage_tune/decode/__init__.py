"""Decoding: the prefix cache, selection rules, samplers, and block-wise generation.

`cache` <- `attention` <- `rules` <- `steps` <- `generate` <- `chat`; `sampler` stands beside them.
"""
