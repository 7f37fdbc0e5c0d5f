"""Training rows: sources of token ids with per-token loss weights, mixed deterministically."""
