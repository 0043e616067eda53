"""Models: loading, presets, heads, adapters and the KV cache."""
