"""Decoding: a step's host part, captured steps, compiled operations, drafts, and kernels compiled
ahead."""
