"""The plugin for vLLM: `vllm serve ARTIFACT` keeps the artifact's packed cache in vLLM's own pool
of blocks. docs/serving.md says how it is used.

blocks.py, layer.py and torch_attention.py know no engine; the other files are what ties them to
vLLM's.
"""
