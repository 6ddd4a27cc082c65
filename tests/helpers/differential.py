"""Sessions of calls on one cache, drawn by hypothesis and run on several models side by side:
transformers' own 16-bit cache says what is right, as long as everything stays within the 16-bit
window."""

import copy
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.architectures import sliding_windows_of
from kvfold.exports.reader import Artifact
from kvfold.exports.spec import KeySpec, LayerSpec, ValueSpec
from kvfold.kernels.formats import Format, uniform
from kvfold.runtime.load import attach

DIM, VOCAB, WINDOW, SLIDING = 16, 24, 61, 9
# of logits' deviation, what rounding may take: 0.0003 to 0.016 were seen, faults take 0.3 and more
MOST = {
    ("reference", "llama"): 0.03,
    ("reference", "gemma2"): 0.003,
    ("kernels", "llama"): 0.05,
    ("kernels", "gemma2"): 0.05,
}
LOWEST = torch.finfo(torch.float32).min
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": DIM, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FULL, SLIDES = "full_attention", "sliding_attention"
CONFIGS = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**SHAPE, num_hidden_layers=1)),
    "gemma2": (
        Gemma2ForCausalLM,
        lambda: Gemma2Config(
            **SHAPE, num_hidden_layers=2, sliding_window=SLIDING, layer_types=[FULL, SLIDES], query_pre_attn_scalar=16,
            attn_logit_softcapping=4.0, final_logit_softcapping=20.0, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip
GENERATOR = torch.Generator().manual_seed(3)
SPEC = LayerSpec(
    KeySpec(
        Format(((8, 64), (8, 16))),
        ("whiten",),
        torch.linalg.qr(torch.randn(1, DIM, DIM, generator=GENERATOR))[0].contiguous(),
        torch.randn(1, DIM, generator=GENERATOR),
        frequencies=tuple(0.3**i for i in range(DIM // 2)),
    ),
    ValueSpec(uniform(DIM, 16), ("whiten", "scale")),
)

# norms behind Gemma's attention and MLP make much of a rounding: there keys and values are rounded
# in the model's own basis
PLAIN = LayerSpec(KeySpec(uniform(DIM, 16)), ValueSpec(uniform(DIM, 16), ("scale",)))
SPECS = {"llama": SPEC, "gemma2": PLAIN}


def stock_model(family):
    """A random model whose heads look at few tokens, as transformers has it."""
    kind, config = CONFIGS[family]
    torch.manual_seed(1)
    model = kind._from_config(
        config(), dtype=torch.float32, attn_implementation="eager" if family == "gemma2" else "sdpa"
    )
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.uniform_(0.5, 1.0) if "norm" in name else parameter.normal_(0, 0.5)
    return model.eval()


def packed_model(family, triton=False, spec=None, window=WINDOW, **options):
    """The same on a packed cache whose window holds a whole session."""
    model, spec = stock_model(family), spec or SPECS[family]
    geometry = Geometry(
        1, DIM, sinks=3, window=window, page_tokens=8, sliding=sliding_windows_of(model.config)
    )
    calibration = SimpleNamespace(covered_positions=10**6)
    formats = [(spec.key.format, spec.value.format)] * model.config.num_hidden_layers
    metadata = SimpleNamespace(
        calibration=calibration, digest="differential", geometry=geometry, formats=formats
    )
    artifact = Artifact(Path("tiny"), metadata, [spec] * model.config.num_hidden_layers)
    return attach(model, artifact, triton=triton, **options)


class HalfCache(DynamicCache):
    """transformers' cache, of numbers rounded to float16 as the window rounds them."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        return super().update(
            keys.half().float(), values.half().float(), layer_idx, *args, **kwargs
        )


# What is drawn: small numbers and names, which a session reads as its state allows.
SUPPORTED = (
    "none",
    "2d",
    "2d",
    "hole",
    "hole",
    "wide",
    "short",
    "4d",
    "additive",
    "documents",
    "random",
)
REFUSED = (
    "bias",
    "ahead",
    "heads",
    "integers",
    "rows",
    "shows padding",
    "behind the window",
    "batch",
    "dropped dimension",
)
MODES = (
    "no_grad",
    "no_grad",
    "no_grad",
    "inference",
    "inference",
    "grad",
    "grad",
    "bfloat16",
    "bfloat16",
    "autocast",
)
CHANGES = ("deepcopy", "copied before", "fork", "reorder", "select", "repeat", "crop")
calls = st.tuples(
    st.sampled_from((*SUPPORTED, *SUPPORTED, *REFUSED)),
    st.sampled_from((1, 1, 2, 5)),
    st.sampled_from(MODES),
    st.integers(0, 99),
)
changes = st.tuples(st.sampled_from(CHANGES), st.integers(0, 99))
sessions = st.fixed_dictionaries(
    {
        "batch": st.sampled_from((1, 2, 2, 3)),
        "first": st.tuples(
            st.sampled_from(
                ("none", "2d", "left", "left", "right", "hole", "documents", "additive")
            ),
            st.integers(3, 9),
        ),
        "mode": st.sampled_from(MODES),
        "positions": st.sampled_from(("none", "count", "shift")),
        "steps": st.lists(st.one_of(calls, calls, changes), min_size=1, max_size=5),
        "seed": st.integers(0, 999),
    }
)


@contextmanager
def ambient(mode):
    """One of PyTorch's modes."""
    with ExitStack() as stack:
        if mode == "no_grad" or mode == "autocast" or mode == "bfloat16":
            stack.enter_context(torch.no_grad())
        if mode == "inference":
            stack.enter_context(torch.inference_mode())
        if mode == "autocast":
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if mode == "bfloat16":
            torch.set_default_dtype(torch.bfloat16)
            stack.callback(torch.set_default_dtype, torch.float32)
        yield


class Session:
    """A conversation with transformers' own model and with packed ones.

    Attributes:
        hidden: bool [B, columns], columns that 2-D masks hide from now on.
        pads: columns of left padding that the packed caches know of.
        count: comparisons that were made.
        rounded: autocast has rounded what is cached.
    """

    def __init__(self, family, stock, packed, drawn):
        self.family, self.stock, self.packed, self.drawn = family, stock, packed, drawn
        self.random = torch.Generator().manual_seed(drawn["seed"])
        self.caches = [HalfCache(), *(None for _ in packed)]
        self.batch, self.count, self.rounded = drawn["batch"], 0, False
        self.hidden, self.pads = torch.zeros(self.batch, 0, dtype=torch.bool), [0] * self.batch

    @property
    def seen(self):
        return self.hidden.shape[1]

    def below(self, n):
        return int(torch.randint(0, n, (), generator=self.random))

    def run(self):
        kind, tokens = self.drawn["first"]
        self.call(kind, tokens, self.drawn["mode"])
        for step in self.drawn["steps"]:
            if len(step) == 2:
                self.change(*step)
            else:
                kind, tokens, mode, _ = step
                self.call(kind, tokens, mode)
        return self.count

    # -- masks -------------------------------------------------------------------------------------

    def visible(self, tokens):
        """bool [B, columns] that are not hidden, with `tokens` new ones that are visible."""
        return torch.cat((~self.hidden, torch.ones(self.batch, tokens, dtype=torch.bool)), 1)

    def squares(self, visible, tokens):
        """bool [B, 1, T, columns], causal."""
        width = visible.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()[-tokens:]
        return causal & visible[:, None, None]

    def mask(self, kind, tokens):
        """(attention_mask, visible columns [B, columns] from now on, whether it must be
        refused)."""
        visible = self.visible(tokens)
        width, real = visible.shape[1], [pad + 1 for pad in self.pads]
        if kind == "left":
            for b in range(self.batch):
                visible[b, : self.below(tokens - 1)] = False
        if kind == "right":
            for b in range(self.batch):
                visible[b, tokens - self.below(tokens - 1) :] = False
        if kind == "hole":
            for b in range(self.batch):
                for _ in range(self.below(3)):
                    place = real[b] + self.below(width)
                    visible[b, place : place + 1] = False
        if kind == "none" and any(
            self.pads
        ):  # without a mask padding stays hidden, which transformers can't know
            kind = "2d"
        if kind == "none":
            return None, visible, False
        if kind in ("2d", "left", "right", "hole", "wide", "short"):
            mask = visible.long()
            if kind == "wide":
                mask = torch.nn.functional.pad(mask, (0, 2), value=1)
            if kind == "short" and self.seen > max(real):
                mask = mask[:, :-1]
            return mask, visible, False
        if kind == "rows":
            return torch.ones(self.batch + 1, width, dtype=torch.long), visible, True
        if kind == "shows padding":
            return torch.ones_like(visible).long(), visible, any(self.pads)
        mask = self.squares(visible, tokens)
        own = torch.eye(width, dtype=torch.bool)[-tokens:]
        if kind == "documents":
            cut = self.below(width)
            document = (torch.arange(width) >= cut).long()
            mask = mask & (document == document[-tokens:, None])
        if kind == "random":
            mask = mask & (torch.rand(mask.shape, generator=self.random) < 0.7)
        mask = mask | (own & (torch.arange(width) >= torch.tensor(self.pads)[:, None, None, None]))
        if kind in ("batch", "dropped dimension"):
            return (mask[:, 0] if kind == "dropped dimension" else None), visible, True
        if kind == "heads":
            return mask.expand(-1, 2, -1, -1), visible, True
        if kind == "integers":
            return mask.long(), visible, True
        if kind == "ahead":
            if tokens == 1:
                return mask, visible, False
            mask = mask.clone()
            mask[:, :, -2, -1] = True
            return mask, visible, True
        if kind == "bias":
            bias = torch.randn(mask.shape, generator=self.random)
            return bias.masked_fill(~mask, LOWEST), visible, True
        if kind == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, LOWEST)
        return mask, visible, False

    def windows(self, kind, mask, tokens):
        """A mask of four dimensions as a model with a sliding window takes it: (mask, whether it
        must be refused)."""
        if self.family != "gemma2" or mask is None or mask.dim() != 4 or mask.dtype == torch.long:
            return mask, False
        width = mask.shape[-1]
        query, column = torch.arange(width - tokens, width)[:, None], torch.arange(width)
        near = column > query - SLIDING
        shown = mask if mask.dtype == torch.bool else mask == 0
        real = query >= torch.tensor(self.pads)[:, None, None, None]
        if kind == "behind the window":
            return mask, bool((shown & ~near & real).any())
        narrow = mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, LOWEST)
        return {FULL: mask, SLIDES: narrow}, False

    # -- calls -------------------------------------------------------------------------------------

    def call(self, kind, tokens, mode):
        """One call on all models: the same logits, or a refusal by all packed ones."""
        if self.seen + tokens > WINDOW:
            return
        mask, visible, refused = self.mask(kind, tokens)
        mask, more = self.windows(kind, mask, tokens)
        refused = refused or more
        batch = self.batch + 1 if kind == "batch" else self.batch
        ids = torch.randint(1, VOCAB, (batch, tokens), generator=self.random)
        options = {"attention_mask": mask}
        if kind == "batch" and not self.seen:
            return
        if self.drawn["positions"] == "count":
            options["position_ids"] = (
                (visible.long().cumsum(-1) - 1).clamp_min(0)[:, -tokens:].expand(self.batch, -1)
            )
        elif self.drawn["positions"] == "shift":
            options["position_ids"] = (torch.arange(tokens) + self.seen + 7)[None]
        if kind == "batch":
            options = {}
        if refused:
            for model, cache in zip(self.packed, self.caches[1:], strict=True):
                before = None if cache is None else cache.get_seq_length()
                try:
                    with ambient(mode):
                        model(ids, past_key_values=cache, **options)
                except KvfoldError:
                    assert cache is None or cache.get_seq_length() == before
                    self.count += 1
                else:
                    raise AssertionError(f"{kind} was not refused")
            return
        self.learn(kind, visible)
        places = torch.arange(self.seen - tokens, self.seen) - torch.tensor(self.pads)[:, None]
        found = []
        for i, (model, cache) in enumerate(
            zip([self.stock, *self.packed], self.caches, strict=True)
        ):
            with ambient("no_grad" if i == 0 and mode != "autocast" else mode):
                own = (
                    options
                    if i
                    else {
                        "position_ids": places.clamp_min(0),
                        **options,
                        "attention_mask": self.added(mask),
                    }
                )
                out = model(ids, past_key_values=cache, **own)
            found.append(out.logits.detach().float())
            self.caches[i] = out.past_key_values
        self.compare(kind, mode, found, places >= 0)

    def added(self, mask):
        """A mask of four dimensions as transformers' eager attention takes it, which adds it to
        logits."""
        if isinstance(mask, dict):
            return {kind: self.added(part) for kind, part in mask.items()}
        if self.family == "llama" or mask is None or mask.dim() != 4 or mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape).masked_fill(~mask, LOWEST)

    def learn(self, kind, visible):
        first = not self.seen
        if first and (kind in ("left", "2d", "hole", "right")):
            self.pads = visible.long().cumsum(-1).eq(0).sum(-1).tolist()
        self.hidden = ~visible

    def compare(self, kind, mode, found, real):
        self.rounded = self.rounded or mode == "autocast"
        want = found[0][real]
        scale = float(want.std())
        for model, got in zip(self.packed, found[1:], strict=True):
            off = float((got[real] - want).abs().max()) / scale if len(want) else 0.0
            path = "kernels" if model.kv_triton else "reference"
            most = 0.25 if self.rounded else MOST[path, self.family]
            assert off < most, f"{path} off by {off:.3f} of logits' deviation: {kind}, {mode}"
            self.count += 1
        if len(found) == 3:
            off = float((found[1][real] - found[2][real]).abs().max()) / scale
            assert off < (0.25 if self.rounded else MOST["kernels", self.family]), (
                f"kernels off the reference by {off:.3f}: {kind}, {mode}"
            )

    def change(self, name, number):
        """Something that is done to the cache between calls."""
        if name in ("deepcopy", "copied before", "fork"):
            copies = [copy.deepcopy(self.caches[0])]
            copies += [
                x.fork(1)[0] if name == "fork" else copy.deepcopy(x) for x in self.caches[1:]
            ]
            kept = (self.hidden, list(self.pads))
            if name == "copied before":
                self.caches, copies = copies, self.caches
            if self.seen + 3 <= WINDOW:
                self.call("2d", 2, "no_grad")  # another request, served by the other one
            self.caches = copies
            self.hidden, self.pads = kept
        elif name == "crop":
            count = min(number % 9, self.seen - max(self.pads) - 1)
            for cache in self.caches:
                cache.crop(-count)
            self.hidden = self.hidden[:, : self.seen - count]
        else:
            rows = list(range(self.batch))
            if name == "reorder":
                chosen = [rows[(b * 2 + number) % self.batch] for b in rows]
            elif name == "select":
                chosen = [b for b in rows if (b + number) % 3] or [0]
            else:
                chosen = [b for b in rows for _ in range(2)] if self.batch < 3 else rows
            for cache in self.caches:
                if name == "reorder":
                    cache.reorder_cache(torch.tensor(chosen))
                elif name == "repeat" and self.batch < 3:
                    cache.batch_repeat_interleave(2)
                elif name == "select":
                    cache.batch_select_indices(torch.tensor(chosen))
            self.batch, self.hidden, self.pads = (
                len(chosen),
                self.hidden[chosen],
                [self.pads[b] for b in chosen],
            )
