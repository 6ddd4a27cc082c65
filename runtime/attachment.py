"""What makes every forward pass of one model read a packed cache, and how to take it off again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvfold.exports.architectures import keeps_states
from kvfold.exports.reader import Artifact
from kvfold.runtime.backends.choose import backend_of
from kvfold.runtime.backends.reference import REFERENCE
from kvfold.runtime.backends.transformers import NAME
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.calls.gate import refuse_batching
from kvfold.runtime.calls.hooks import Calls
from kvfold.runtime.calls.owner import Bound, Owner
from kvfold.runtime.generate.assisted import get_candidate_generator
from kvfold.runtime.generate.graph import Decoding, DecodingStep
from kvfold.runtime.private_names import GENERATION, check
from kvfold.runtime.save import save_artifact

if TYPE_CHECKING:  # transformers' models take seconds to import: kernels are compiled meanwhile
    from transformers import PreTrainedModel


def set_attention(model: Any, name: str) -> None:
    """Makes a model attend by the function of transformers' interface called `name`."""
    if model.config.model_type == "falcon":
        from kvfold.exports import falcon

        falcon.set_attention(model, name)
    else:
        model.set_attn_implementation(name)


class Absent:
    """In place of what an attribute was before: it was not there. A class, as a copy of a model
    must find the same."""


class Attachment:
    """The attributes and hooks that kvfold puts on one model; `model.kv_attachment`.

    What of transformers' own is replaced by name is listed in runtime/private_names.py.

    Args:
        model: a causal language model with the artifact's weights.
        artifact: what it was loaded from.
        calls: the hooks around its calls.
        ladders: of the progressive policy, if that is its policy.
    """

    def __init__(
        self, model: Any, artifact: Artifact, calls: Calls, ladders: Ladders | None
    ) -> None:
        self.owner, self.artifact, self.calls, self.ladders = Owner(model), artifact, calls, ladders
        self.attention = model.config._attn_implementation  # before
        self._before: dict[
            tuple[bool, str], Any
        ] = {}  # (of the base model, name) → what an attribute was
        self._hooks: list[Any] = []

    def attach(self, cuda_graph: bool | str) -> Any:
        """Puts everything on the model; `cuda_graph` as in load_pretrained. Returns the model.

        Raises:
            KvfoldError: this transformers has not the methods that are replaced.
        """
        check(GENERATION)
        model, calls = self.owner(), self.calls
        model.eval()
        set_attention(model, NAME)
        for name, method in (
            ("_prepare_cache_for_generation", calls.prepare_cache),
            ("_update_model_kwargs_for_generation", calls.update_kwargs),
            ("_get_candidate_generator", get_candidate_generator),
            ("named_modules", calls.named_modules),
            ("new_kv_cache", calls.new_cache),
            ("save_pretrained", save_artifact),
        ):
            self._put(name, Bound(method, model))
        for name in ("init_continuous_batching", "generate_batch"):
            self._put(name, refuse_batching)
        if model.config.model_type == "falcon":  # transformers' own changes nothing there
            self._put("set_attn_implementation", Bound(set_attention, model))
        for name, value in (
            ("kv_attachment", self),
            ("kv_gate", calls.gate),
            ("kv_artifact", self.artifact),
            ("kv_triton", calls.backend is not REFERENCE),
            ("kv_policy", self.ladders),
        ):
            self._put(name, value)
        if cuda_graph and self._replays(model):
            self.decode_by(Decoding(model, cuda_graph is True, calls.note_length))
        base = model.base_model
        self._put("kv_packed", True, on_base=True)
        self._hooks = [
            base.register_forward_pre_hook(Bound(calls.before, model), with_kwargs=True),
            base.register_forward_hook(calls.after, with_kwargs=True),
        ]
        return model

    def _replays(self, model: Any) -> bool:
        """Whether steps of the model can be captured at all."""
        return (
            model.kv_triton
            and not self.calls.offload
            and not keeps_states(model.config)  # a step that is captured runs more than once
            and not self.calls.geometry.shared  # whose handles are read more than once
            and not self.calls.geometry.chunked  # whose code counts tokens on the host
            and model.device.type in DecodingStep.devices
        )

    def decode_by(self, decoding: Decoding) -> None:
        """Makes calls of the model go through `decoding`. A copy of the model goes through its
        own."""
        self._put("kv_decoding", decoding)
        self._put("forward", decoding.as_forward())

    def detach(self) -> Any:
        """Takes everything off: the model is transformers' own again, with the artifact's weights.
        Returns it."""
        model = self.owner()
        for hook in self._hooks:
            hook.remove()
        for (on_base, name), value in reversed(self._before.items()):
            target = model.base_model if on_base else model
            if value is Absent:
                delattr(target, name)
            else:
                setattr(target, name, value)
        self._before.clear()
        set_attention(model, self.attention)
        return model

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Plain forward passes of the model keep transformers' own unquantised cache while this
        lasts."""
        self._put("kv_packed", False, on_base=True)
        try:
            yield
        finally:
            self._put("kv_packed", True, on_base=True)

    def _put(self, name: str, value: Any, on_base: bool = False) -> None:
        """Gives the model, or its base model, an attribute."""
        model = self.owner()
        target = model.base_model if on_base else model
        self._before.setdefault((on_base, name), vars(target).get(name, Absent))
        setattr(target, name, value)


def attach(
    model: Any,
    artifact: Artifact,
    budget: int | None = None,
    triton: bool = False,
    cuda_graph: bool | str = "auto",
    rollback: int | None = None,
    batch_invariant: bool = False,
    policy: Ladders | None = None,
    offload: bool = False,
) -> "PreTrainedModel":
    """Makes every forward pass of `model`, which has the artifact's weights, read a packed cache;
    see load_pretrained.

    Args:
        triton: by the Triton kernels.
        policy: the ladders of the progressive policy; None for floor.
    """
    calls = Calls(artifact, budget, backend_of(triton), rollback, batch_invariant, policy, offload)
    calls.learn_states(model.config, model.dtype)
    return Attachment(model, artifact, calls, policy).attach(cuda_graph)
