"""What an artifact costs in quality: loss, KL and agreement against the 16-bit cache,
teacher-forced through the packed cache."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.compress.models import load_model, resolve_model
from kvfold.compress.progress import progress
from kvfold.compress.text import HELD_OUT, prefix_ids, read_documents, tokenize
from kvfold.errors import KvfoldError
from kvfold.exports.account import cache_nbytes, effective_bits
from kvfold.exports.architectures import logits_of, text_of
from kvfold.pretrained import tokenizer_from_pretrained
from kvfold.runtime.load import load_pretrained, plain_cache, resolve_artifact

LOGIT_BLOCK = 128  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class Evaluation:
    """Figures of one artifact on one text. Losses in nats per token; `dnll_se` and `kl_se` are
    standard errors over windows, None for one."""

    model: str
    artifact: str
    text: str
    windows: int
    first_window: int
    seq_len: int
    effective_bits: float  # at seq_len, everything resident counted
    payload_bits: float
    nll_16bit: float
    nll: float
    dnll: float
    dnll_se: float | None
    ppl_16bit: float
    ppl: float
    kl: float
    kl_se: float | None
    top1_agreement: float

    def to_dict(self) -> dict:
        return asdict(self)


def windows_of(
    tokenizer: Any, text: str, seq_len: int, first: int, count: int, name: str
) -> list[Tensor]:
    """`count` windows of seq_len tokens that do not overlap, from window `first` on, int64 [1,
    seq_len] each.

    A tokenizer that begins texts with a BOS token begins every window with it.
    """
    prefix = prefix_ids(tokenizer)
    size = seq_len - len(prefix)
    ids = tokenize(tokenizer, text)
    found = [
        torch.tensor([prefix + ids[i * size : (i + 1) * size]])
        for i in range(first, min(first + count, len(ids) // size))
    ]
    if not found:
        raise KvfoldError(
            f"Text '{name}' has {len(ids)} tokens, too few for window {first} of {seq_len}; give a longer text or a "
            "smaller --seq-len."
        )
    return found


def compare(base_model: Any, model: Any, base: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions: [nll 16-bit, nll, KL, agreements], float64; hidden states [T,
    hidden_size], targets [T]."""
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(targets), LOGIT_BLOCK):
        rows = slice(start, start + LOGIT_BLOCK)
        p = logits_of(base_model, base[rows]).log_softmax(-1)
        q = logits_of(model, other[rows]).log_softmax(-1)
        wanted = targets[rows, None]
        sums[0] -= p.gather(1, wanted).sum().cpu()
        sums[1] -= q.gather(1, wanted).sum().cpu()
        sums[2] += (p.exp() * (p - q)).sum().cpu()
        sums[3] += (p.argmax(-1) == q.argmax(-1)).sum().cpu()
    return sums


def figures(rows: list[Tensor]) -> dict[str, Any]:
    """The losses of an Evaluation from one tensor [nll 16-bit, nll, KL, agreement] a window, each a
    mean over its tokens."""
    table = torch.stack(rows)
    mean = table.mean(0)
    errors: list[float | None] = [None, None]
    if len(rows) > 1:
        errors = [
            x.std().item() / len(rows) ** 0.5 for x in (table[:, 1] - table[:, 0], table[:, 2])
        ]
    return {
        "nll_16bit": mean[0].item(),
        "nll": mean[1].item(),
        "dnll": (mean[1] - mean[0]).item(),
        "dnll_se": errors[0],
        "ppl_16bit": mean[0].exp().item(),
        "ppl": mean[1].exp().item(),
        "kl": mean[2].item(),
        "kl_se": errors[1],
        "top1_agreement": mean[3].item(),
    }


def evaluate(
    artifact: str,
    *,
    against: str | None = None,
    text: str | None = None,
    windows: int = 3,
    first_window: int = 0,
    seq_len: int = 2048,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
) -> Evaluation:
    """Measures an artifact.

    Args:
        artifact: folder or Hub id.
        against: the model whose plain cache is the reference; default: the artifact's own weights.
            That cache has the type that the model computes in, so on a CPU, by default, it is
            float32: a stricter reference than 16 bits.
        text: file or datasets id; default: the held-out text that the package ships.
        windows, first_window, seq_len: how the text is cut.
        device, dtype, attention: as in load_pretrained.
    """
    path = resolve_artifact(artifact)
    model: Any = load_pretrained(path, device=device, dtype=dtype, attention=attention)
    metadata = model.kv_artifact.metadata
    most = text_of(model.config).max_position_embeddings
    if seq_len > most or seq_len < 2:
        raise KvfoldError(
            f"--seq-len {seq_len} is not between 2 and the model's maximum of {most}."
        )
    tokenizer = tokenizer_from_pretrained(path)
    name, documents = read_documents(text, default=(HELD_OUT,))
    batches = windows_of(tokenizer, "\n\n".join(documents), seq_len, first_window, windows, name)
    place, kind = next(model.parameters()).device, next(model.parameters()).dtype
    base: Any = model if against is None else load_model(resolve_model(against).path, kind, place)
    rows = []
    with torch.inference_mode():
        for ids in progress(batches, "evaluate", "window"):
            ids = ids.to(place)
            if against is None:
                with plain_cache(model):
                    reference = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
            else:
                reference = base.base_model(input_ids=ids).last_hidden_state[0, :-1]
            packed = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
            rows.append(compare(base, model, reference, packed, ids[0, 1:]) / (ids.shape[1] - 1))
    geometry, formats = metadata.geometry, metadata.formats
    nbytes = cache_nbytes(geometry, formats, seq_len)
    return Evaluation(
        model=against or metadata.provenance.model,
        artifact=Path(artifact).name,
        text=name,
        windows=len(rows),
        first_window=first_window,
        seq_len=seq_len,
        effective_bits=effective_bits(geometry, nbytes, [seq_len], len(formats)),
        payload_bits=metadata.account.payload_bits,
        **figures(rows),
    )
