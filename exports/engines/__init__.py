"""Plain checkpoints with quantised KV caches that other engines know."""
