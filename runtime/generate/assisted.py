"""Assisted and prompt-lookup decoding: the cache learns how many drafted tokens may be taken back
before they come."""

import weakref
from typing import Any

from kvfold.errors import KvfoldError
from kvfold.runtime.cache.cache import QuantizedKVCache

LOOKBEHIND = 16  # tokens beyond its drafts that an assistant takes back where tokenizers differ


def get_candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of generate's own `_get_candidate_generator`: every draft that the model checks
    lengthens its cache's 16-bit ring first.

    A crop of what was rejected then leaves no trace, so that the text is that of greedy decoding.
    transformers 5.23 gives an assisted model the whole text at first, also where its cache holds a
    part; that is refused, and not read twice in silence.
    """
    generator = type(model)._get_candidate_generator(model, *args, **kwargs)
    cache = kwargs["model_kwargs"].get("past_key_values")
    draft, owner = (
        type(generator).get_candidates,
        weakref.ref(generator),
    )  # no cycle, which would keep the cache
    if isinstance(cache, QuantizedKVCache):
        cache.states.refuse(
            "Assisted decoding", "leave assistant_model and prompt_lookup_num_tokens out"
        )
    if isinstance(cache, QuantizedKVCache) and cache.tokens:
        raise KvfoldError(
            f"Assisted decoding cannot go on with a cache that holds tokens ({cache.tokens}): "
            "transformers would give it the "
            "whole text once more; leave past_key_values out, or assistant_model and prompt_lookup_num_tokens."
        )

    def get_candidates(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        candidates, logits = draft(owner(), input_ids, *args, **kwargs)
        if isinstance(cache, QuantizedKVCache):
            cache.extend_rollback(candidates.shape[1] - input_ids.shape[1])
        return candidates, logits

    generator.get_candidates = get_candidates
    return generator


def own_drafts(generation_config: Any) -> int:
    """Tokens that a model which drafts for another may have to take back from its own cache."""
    return 2 * (generation_config.max_new_tokens or 0) + LOOKBEHIND
