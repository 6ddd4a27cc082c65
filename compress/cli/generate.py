"""`kvfold generate`: a continuation through the packed cache, and what the cache took."""

import sys
from typing import Any

import torch
from transformers import TextStreamer

from kvfold.errors import KvfoldError
from kvfold.exports.units import format_nbytes
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.load import load_pretrained, resolve_artifact


def generate(
    artifact: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    chat: bool,
    seed: int,
    device: torch.device,
) -> None:
    """Prints the continuation to stdout as it is made, and one line on the cache to stderr."""
    path = resolve_artifact(artifact)
    model: Any = load_pretrained(path, device=device)
    tokenizer: Any = tokenizer_from_pretrained(path)
    if chat:
        if not tokenizer.chat_template:
            raise KvfoldError(f"The tokenizer of '{artifact}' has no chat template; drop --chat.")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise KvfoldError(
            "The prompt is empty and the tokenizer adds nothing to it; give some text."
        )
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    out = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
        **sampling,
    )
    cache = out.past_key_values
    tokens = cache.get_seq_length()
    elements = cache.geometry.elements(tokens, len(cache.layers))
    print(
        f"kvfold: {tokens} tokens in a cache of {format_nbytes(cache.nbytes)}, "
        f"{8 * (cache.nbytes - cache.states.nbytes) / elements:.2f} bits per element",
        file=sys.stderr,
    )
