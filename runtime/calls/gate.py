"""The one gate before attention: what a call brings (mask, positions, batch, cache, options)
against what a packed cache computes.

Each call goes one of four ways, the same for the reference and for kernels: by the path that was
chosen, by the reference for this one call, with one warning, because kernels lack something; by a
cache of transformers' own, with one warning; or it is refused with KvfoldError, before anything is
stored. Never is something else computed in silence. docs/calls.md is the table of it.

Nothing here waits for the device in a decoding step of `generate`: its masks grow by visible
columns, and `grown` says so.
"""

import inspect
import logging
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import find_packed_sequence_indices

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import looks_both_ways
from kvfold.runtime.backends.base import NAME
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.calls.hybrid import check_continued, check_lone_padding, check_state_mask
from kvfold.runtime.calls.lora import check_adapters, moved_projections
from kvfold.runtime.calls.masks import Place, read_squares

log = logging.getLogger("kvfold")

HOW = "inside `with runtime.plain_cache(model):`"
MARK = (
    "kvfold_artifact"  # attribute of a cache that isn't packed: the artifact whose model fills it
)


# of tokens, not 0 where an image's are
TYPES = ("token_type_ids", "mm_token_type_ids")


class Gate:
    """The checks of one model's calls.

    Args:
        artifact: that it was loaded from.

    Attributes:
        told: words that were said, each of which is said once.
    """

    def __init__(self, artifact: Any) -> None:
        self.artifact = artifact
        self.digest: str = artifact.digest
        self.told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gate":
        return self  # a copy of the model is of the same artifact

    def tell(self, key: str, message: str, *args: Any) -> None:
        """Logs a warning, once."""
        if key not in self.told:
            self.told.add(key)
            log.warning(message, *args)

    def normal(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call of the base model by keywords, with no cache for an empty one, as pipelines of old
        pass it."""
        if args:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        if isinstance(cache, tuple | list) and not len(cache):
            kwargs = {**kwargs, "past_key_values": None}
        return kwargs

    def step(self, model: Any, cache: QuantizedKVCache, mask: Tensor | None, batch: int) -> bool:
        """The checks of a step that may be replayed, in which no hook is called: whether kernels
        read its mask [B, columns]."""
        self.check_model(model)
        self.check_cache(cache, batch)
        cache.note_padding(mask, batch, 1)
        return cache.shared.plain

    def check_model(self, model: Any) -> None:
        """What may have been done to a model since it was loaded.

        Raises:
            KvfoldError: another attention function, a mask that isn't causal, or adapters of
                another basis.
        """
        config = model.config
        if config._attn_implementation != NAME:
            raise KvfoldError(
                f"attn_implementation='{config._attn_implementation}' reads no packed cache; go back with "
                f"model.set_attn_implementation('{NAME}'), or run the call {HOW}."
            )
        both = getattr(config, "use_bidirectional_attention", False)
        if (
            (both and both != "vision")  # tokens of an image alone, see check_options
            or getattr(config, "is_causal", True) is False
        ):
            raise KvfoldError(
                "This model's config asks for attention that looks both ways, but a packed cache is causal; set "
                "use_bidirectional_attention to false and is_causal to true."
            )
        check_adapters(model, self.artifact)

    def check_cache(self, cache: QuantizedKVCache, batch: int) -> None:
        """Whether a packed cache is this model's and has as many sequences as the call.

        Raises:
            KvfoldError: it is another artifact's, or the batches differ.
        """
        if cache.artifact is not None and cache.artifact != self.digest:
            raise KvfoldError(
                f"past_key_values is a cache of another artifact ({cache.artifact[:12]}…, this "
                f"model's is {self.digest[:12]}…), "
                "whose keys and values stand in another basis; pass model.new_kv_cache()."
            )
        first = cache.layers[0]
        if first.is_initialized and first.batch_size != batch:
            raise KvfoldError(
                f"This call has {batch} sequence(s), but past_key_values holds "
                f"{first.batch_size}; make it as many with "
                f"cache.batch_repeat_interleave(n), or give each sequence a cache of its own with cache.fork(n)."
            )

    def other_cache(self, cache: Any, asked: bool = False) -> None:
        """A cache that isn't packed: 16 bits are what is measured then, which nobody should do
        unawares.

        Args:
            asked: it is what somebody wanted (runtime.plain_cache).

        Raises:
            KvfoldError: no cache of transformers, or one that holds what another model has
                computed.
        """
        if not isinstance(cache, Cache):
            raise KvfoldError(
                f"past_key_values is a {type(cache).__name__}, but must be a cache; pass "
                "model.new_kv_cache() or leave it out."
            )
        marked = getattr(cache, MARK, None)
        if marked is None and not cache.get_seq_length():
            setattr(cache, MARK, self.digest)
        elif marked != self.digest and not asked and moved_projections(self.artifact.specs):
            raise KvfoldError(
                f"past_key_values ({type(cache).__name__}) holds {cache.get_seq_length()} tokens "
                "that this model has not computed (prefix "
                "tuning, or another model's cache), but its keys and values stand in another "
                "basis; let this model read them."
            )
        if not asked:
            self.tell(
                "16 bits", "past_key_values is a %s of 16 bits: nothing of this call is packed; leave it out, or pass "
                "model.new_kv_cache()", type(cache).__name__,
            )  # fmt: skip

    def check_options(self, module: Any, kwargs: dict[str, Any]) -> None:
        """Options of a call that a packed cache doesn't serve.

        Raises:
            KvfoldError: attention weights, or documents packed in a row, are asked for.
        """
        if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise KvfoldError(
                "output_attentions=True asks for attention weights, which no packed cache forms; "
                "leave it out, or run the call "
                f"{HOW} after model.set_attn_implementation('eager')."
            )
        if looks_both_ways(module.config) and any(
            x is not None and (name.startswith("pixel_values") or bool(x.any()))
            for name, x in kwargs.items()
            if name.startswith("pixel_values") or name in TYPES
        ):
            raise KvfoldError(
                f"Tokens of an image look at later ones in a '{module.config.model_type}' model, but a packed cache is "
                f"causal; give text alone, or run the call {HOW}."
            )
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
            if kwargs.get(name) is not None:
                raise KvfoldError(
                    f"{name} packs documents in a row, but a packed cache holds one in each; give a row to each."
                )

    def check_positions(self, kwargs: dict[str, Any], batch: int) -> None:
        """Of a call without a cache and without a mask, where transformers takes positions that
        restart for documents.

        Raises:
            KvfoldError: they restart.
        """
        positions = kwargs.get("position_ids")
        if positions is None or positions.dim() != 2 or kwargs.get("attention_mask") is not None:
            return
        if find_packed_sequence_indices(positions.expand(batch, -1)) is not None:
            raise KvfoldError(
                "position_ids restart within a row, which packs several documents in it, but a "
                "packed cache holds one in each; give "
                "each document a row of its own, left-padded, or a mask of four dimensions that keeps them apart."
            )

    def admit(self, cache: QuantizedKVCache, kwargs: dict[str, Any], tokens: Tensor) -> None:
        """A call on a packed cache: learns padding, and decides which path reads its mask.

        Args:
            kwargs: of the call; a mask of four dimensions is replaced by its bool form, and
                positions are filled in.
            tokens: input_ids [B, T] or inputs_embeds [B, T, …].
        Raises:
            KvfoldError: the cache, the mask or the batch can't be computed as transformers would.
        """
        batch, count = tokens.shape[:2]
        self.check_cache(cache, batch)
        mask = kwargs.get("attention_mask")
        if cache.states:
            check_state_mask(mask)
            check_continued(cache.states.hybrid, cache.get_seq_length(), count)
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            cache.note_padding(mask, batch, count)
            if cache.states and count == 1:
                check_lone_padding(cache.shared.padding, cache.get_seq_length())
        else:
            cache.note_padding(None, batch, count)
            seen = cache.get_seq_length()
            pads = tuple(min(pad, seen) for pad in cache.shared.padding)
            windows = tuple(layer.sliding for layer in cache.layers)
            kwargs["attention_mask"], plain = read_squares(
                mask, Place(seen, count, pads, windows), tokens.device
            )
            cache.shared.set_plain(plain)
        cut = cache.geometry.chunked and any(layer.cut(count) for layer in cache.layers)
        if cut and not cache.layers[0].backend.reads_masks:
            self.tell(
                "chunks", "layers that attend in chunks have come to their second one, which the Triton kernels don't "
                "know; the plain-torch reference, which is slower, computes them"
            )  # fmt: skip
        if not cache.shared.plain and not cache.layers[0].backend.reads_masks:
            self.tell(
                "mask", "attention_mask hides more than left padding, which the Triton kernels "
                "don't read; the plain-torch reference, "
                "which is slower, computes such calls",
            )  # fmt: skip


def refuse_batching(*args: Any, **kwargs: Any) -> None:
    """In place of transformers' continuous batching, which brings a paged cache of its own.

    Raises:
        KvfoldError: always.
    """
    raise KvfoldError(
        "generate_batch brings a paged 16-bit cache of its own and reads no packed one; call "
        "model.generate with a left-padded batch."
    )
