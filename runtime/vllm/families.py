"""The model families whose artifacts were served by vLLM and gave the tokens of kvfold's own
runtime, one by one (tests/serving/test_served_families.py). A family of exports/families.py that is
not here is refused: what vLLM computes around its attention was not compared."""

SERVED = {
    "apertus", "arcee", "cohere", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "gpt_oss", "granite",
    "granitemoe", "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "jais2",
    "llama", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "vaultgemma",
}  # fmt: skip
