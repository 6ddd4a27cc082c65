"""Kernels as functions on tensors: attention, prompts, appending a step, writing and lowering
pages, merging, reading."""
