"""What a loaded model does around every call: brings a packed cache where none is given, and sends
the call through the gate."""

import logging
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import ModelOutput

from kvfold.errors import KvfoldError
from kvfold.exports.architectures import hybrid_of, keeps_states, row_of
from kvfold.exports.hybrids import Hybrid, check_transformers
from kvfold.runtime.backends.base import Backend
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.cache.cache import QuantizedKVCache
from kvfold.runtime.cache.pager import Pager
from kvfold.runtime.calls.gate import Gate
from kvfold.runtime.calls.hybrid import check_stated
from kvfold.runtime.calls.lora import check_adapters
from kvfold.runtime.calls.masks import grown
from kvfold.runtime.generate.assisted import own_drafts

log = logging.getLogger("kvfold")


class Calls:
    """The hooks of one model; each gets the model as an argument, so that none keeps it alive.

    Args:
        artifact, budget, rollback, batch_invariant, offload: as in attachment.attach.
        backend: of its caches.
        ladders: of the progressive policy; None for floor.
    """

    def __init__(
        self,
        artifact: Any,
        budget: int | None,
        backend: Backend,
        rollback: int | None,
        batch_invariant: bool,
        ladders: Ladders | None,
        offload: bool,
    ) -> None:
        self.artifact, self.budget, self.backend, self.ladders, self.offload = (
            artifact,
            budget,
            backend,
            ladders,
            offload,
        )
        self.batch_invariant = batch_invariant
        self.geometry = artifact.geometry
        if rollback is not None:
            self.geometry = replace(self.geometry, rollback=rollback)
        self.hybrid: Hybrid | None = None
        self.covered = artifact.metadata.calibration.covered_positions
        self.gate = Gate(artifact)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calls":
        return self  # a copy of the model is of the same artifact

    def learn_states(self, config: Any, dtype: torch.dtype) -> None:
        """Which layers of the model keep states, and their bytes where it computes in `dtype`.

        Raises:
            KvfoldError: the installed transformers is too old for hybrid models.
        """
        self.hybrid = hybrid_of(config)
        if keeps_states(config):
            check_transformers(row_of(config).model_type)
            states = self.artifact.metadata.cache.states
            nbytes = states.nbytes(str(dtype).removeprefix("torch."))
            self.geometry = replace(self.geometry, state_nbytes=nbytes)

    def new_cache(self, model: Any, ephemeral: bool = False) -> QuantizedKVCache:
        """An empty packed cache of this model; `ephemeral`: for one forward pass with
        use_cache=False, and not returned."""
        away = None
        if self.offload:
            buffers = 2 if next(model.parameters()).device.type == "cuda" else 1
            away = Pager(
                [
                    self.geometry.of_layer(i).pair_nbytes(*pair)
                    for i, pair in enumerate(self.artifact.formats)
                ],
                buffers=buffers,
            )
        return QuantizedKVCache(
            self.artifact.specs,
            self.geometry,
            self.budget,
            self.backend,
            self.ladders,
            away,
            batch_invariant=self.batch_invariant,
            artifact=self.gate.digest,
            ephemeral=ephemeral,
            tell=self.gate.tell,
            hybrid=self.hybrid,
        )

    def prepare_cache(
        self,
        model: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """In place of generate's own `_prepare_cache_for_generation`, which serves in
        `plain_cache`."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, tuple | list) and not len(cache):
            cache = None
        if cache is None and not model.base_model.kv_packed:
            model_kwargs.pop("past_key_values", None)
            type(model)._prepare_cache_for_generation(
                model, generation_config, model_kwargs, *args, **kwargs
            )
            return
        if cache is not None:
            if not isinstance(cache, QuantizedKVCache):
                self.gate.other_cache(cache, asked=not model.base_model.kv_packed)
            cache._is_user_defined = True  # to generate, which then hands it back
        else:
            wanted = generation_config.cache_implementation
            stated = (
                model.generation_config.cache_implementation
            )  # generation_config.json may be the base model's
            if wanted not in (None, "dynamic", stated):
                raise KvfoldError(
                    f"cache_implementation='{wanted}' names another cache, but this model brings its own packed one; "
                    "leave cache_implementation out, or pass past_key_values."
                )
            if generation_config.use_cache is not False:
                cache = model_kwargs["past_key_values"] = self.new_cache(model)
            else:
                model_kwargs.pop("past_key_values", None)
        if getattr(generation_config, "is_assistant", False) and isinstance(
            cache, QuantizedKVCache
        ):
            cache.states.refuse("Drafting for another model", "choose another assistant_model")
            cache.extend_rollback(own_drafts(generation_config))

    def update_kwargs(
        self, model: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """generate's own `_update_model_kwargs_for_generation`; the mask of the next step need not
        be read then."""
        old = model_kwargs.get("attention_mask")
        found = type(model)._update_model_kwargs_for_generation(
            model, outputs, model_kwargs, *args, **kwargs
        )
        new = found.get("attention_mask")
        if old is not None and new is not None and new is not old and new.dim() == 2:
            grown(old, new)
        return found

    def named_modules(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """nn.Module's own; an adapter that is merged into the weights before any call passes by
        here, and by nothing else."""
        check_adapters(model, self.artifact)
        return type(model).named_modules(model, *args, **kwargs)

    def note_length(self, tokens: int) -> None:
        """Says once that a text is longer than what the artifact was calibrated for."""
        if tokens > self.covered:
            self.gate.tell(
                "length",
                "this artifact was calibrated for positions up to %d; past that quality falls off",
                self.covered,
            )

    def before(
        self, model: Any, module: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Before the base model's forward pass. Without a cache it would make a stock one of 16
        bits, and perplexity would measure nothing."""
        kwargs = self.gate.normal(module, args, kwargs)
        cache, tokens = kwargs.get("past_key_values"), kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or (cache is None and not module.kv_packed):
            return (), kwargs
        if cache is None and module.training:
            self.gate.tell(
                "training",
                "in training mode the model keeps no packed cache; call model.eval() to measure one",
            )
            return (), kwargs
        if cache is not None and not isinstance(cache, QuantizedKVCache):
            self.gate.other_cache(cache, asked=not module.kv_packed)
            return (), kwargs
        if cache is not None and cache.shared.stepping:
            return (), kwargs
        self.gate.check_model(module if model is None else model)
        self.gate.check_options(module, kwargs)
        if cache is None:
            wanted = kwargs.get("use_cache")
            wanted = getattr(module.config, "use_cache", True) if wanted is None else wanted
            cache = kwargs["past_key_values"] = self.new_cache(module, ephemeral=not wanted)
            if cache.ephemeral:
                self.gate.check_positions(kwargs, tokens.shape[0])
        self.gate.admit(cache, kwargs, tokens)
        if cache.geometry.shared and kwargs.get("logits_to_keep"):
            # such a model would run its last layers for these tokens alone; what a handle has been
            # given is read by all of them
            kwargs["logits_to_keep"] = 0
        cache.policy.check(cache.layers, tokens.shape[0], tokens.shape[1])
        cache.states.begin()
        self.note_length(cache.get_seq_length() + tokens.shape[1])
        images = any(
            name.startswith("pixel_values") and x is not None for name, x in kwargs.items()
        )
        seen = (
            images and row_of(module.config).rope_axes > 1
        )  # such a model gives images rows and columns itself
        counted = any(cache.shared.padding) or bool(cache.states)
        if kwargs.get("position_ids") is None and counted and not seen:
            # generate counts positions from the first real token; a plain call must too, or a
            # padded row's keys are rotated, and so quantised, unlike the same row's alone; and
            # Bamba's own code would count each call from 0
            kwargs["position_ids"] = cache.positions(tokens.shape[1], tokens.device)
        return (), kwargs

    def after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Without use_cache nobody may go on with the cache: generate would feed it the whole text
        again."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, QuantizedKVCache):
            cache.finish_call()
            check_stated(cache)
            cache.states.end()
        if getattr(kwargs.get("past_key_values"), "ephemeral", False) and isinstance(
            output, ModelOutput
        ):
            return type(output)(**{**output, "past_key_values": None})
        return output
