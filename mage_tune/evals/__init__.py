"""Proof: what an adapter changed, measured on the same prompts with the same settings."""
