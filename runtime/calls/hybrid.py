"""What an artifact of a hybrid model can't be asked for: layers that keep states go forward only."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.exports.cache_model import CacheModel
from kvfold.exports.hybrids import Hybrid
from kvfold.runtime.cache.cache import QuantizedKVCache


def check_states(cache: CacheModel, rollback: int | None, cuda_graph: bool | str) -> None:
    """Refuses options of load_pretrained that layers with states, or layers that read others' keys
    and values, can't follow.

    Args:
        cache: of the artifact.
        rollback, cuda_graph: as there.
    Raises:
        KvfoldError: naming the option.
    """
    if cache.states is None:
        if cuda_graph is True and cache.shared:
            raise KvfoldError(
                "cuda_graph=True captures a step, in which each layer stores its token and attends at once, but layers "
                "of this model read the keys and values of others; leave cuda_graph out."
            )
        if cuda_graph is True and cache.chunked:
            raise KvfoldError(
                "cuda_graph=True captures a step with all that the host has counted, but the code of this model, whose "
                "layers attend in chunks, counts the tokens of each step there; leave cuda_graph out."
            )
        return
    if rollback:
        raise KvfoldError(
            f"rollback={rollback} is for tokens that are taken back, but layers of this model keep a state, which no "
            "token can be taken out of; leave rollback out."
        )
    if cuda_graph is True:
        raise KvfoldError(
            "cuda_graph=True captures a step by running it, which would change the states that layers of this model "
            "keep; leave cuda_graph out."
        )


def check_state_mask(mask: Any) -> None:
    """Refuses a mask that transformers takes for attention alone: states would have padding in them.

    Args:
        mask: of a call of a hybrid model.
    Raises:
        KvfoldError: it isn't [B, columns].
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return
    shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise KvfoldError(
        f"attention_mask is {shape}, which says nothing of padding to layers that keep states; give [B, columns], 0 "
        "where padded."
    )


def check_continued(hybrid: Hybrid | None, seen: int, tokens: int) -> None:
    """Refuses several tokens on states that the model's code would start anew for them.

    Args:
        hybrid: of the model.
        seen: columns in the cache.
        tokens: columns that come.
    Raises:
        KvfoldError: the family's code takes one token at a time from there on.
    """
    if hybrid is not None and not hybrid.continues and seen and tokens > 1:
        raise KvfoldError(
            f"A call of {tokens} tokens goes on from a cache of {seen}, where transformers' code of this family "
            "would start its states anew; bring tokens one by one, or the whole text at once into a new cache."
        )


def check_lone_padding(padding: Sequence[int], seen: int) -> None:
    """Refuses padding that comes alone: transformers takes a single token for a real one, and has
    layers with states read it.

    Args:
        padding: of each sequence, leading columns that are padding.
        seen: columns in the cache, before the one that comes.
    Raises:
        KvfoldError: the column is padding of some sequence.
    """
    for b, pad in enumerate(padding):
        if pad > seen:
            raise KvfoldError(
                f"A call of one token brings column {seen} of sequence {b}, which attention_mask says is padding, but "
                "layers that keep states would read it as a token; bring padding together with more tokens."
            )


def check_stated(cache: QuantizedKVCache) -> None:
    """Refuses states that are larger than the artifact says, where a budget is kept by what it says.

    Args:
        cache: after a call.
    Raises:
        KvfoldError: naming both numbers of bytes.
    """
    if cache.budget is None or not cache.states:
        return
    batch, stated = cache.layers[0].batch_size, cache.geometry.state_nbytes
    if cache.states.nbytes > batch * stated:
        raise KvfoldError(
            f"Layers of this model keep {cache.states.nbytes // batch} bytes of states a sequence, but kv_budget is "
            f"kept by the {stated} that the artifact states; load it without kv_budget, or compress the model anew."
        )
