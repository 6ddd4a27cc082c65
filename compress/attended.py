"""How much later queries attend to each token: the weights of its key and value in calibrated
moments.

In text a few tokens draw most of the attention of all that follows (line ends, for one), and their
keys lie apart from the others'. In a plain covariance they are a thousandth of the sum, so that
their channels get few bits and their codes are cut off, while it is their logits that decide. To
first order an error δ of the logit of query i and token t changes the attention's output by
p_it·δ·(v_t − o_i), and an error Δ of a value by p_it·Δ. So a token counts with

    key: √(Σ_i p_it²·‖v_t − o_i‖²_G),   value: √(Σ_i p_it²),

G the metric of o_proj, over queries i far enough behind t to read it from a page. The squares
themselves would be the loss's own weights, but then a handful of tokens outweighs all others, which
are what most of a text that calibration has not seen consists of: measured, the roots are better
(benchmarks/LOG.md).
"""

import torch
from torch import Tensor

FAR = 128  # tokens between a query and what it reads from pages, as the shortest usual window
QUERIES = 256  # of a sequence, drawn evenly


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    metric: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights of one sequence's tokens.

    Args:
        query: [H, T, D]; key, value: [Hkv, T, D]; after RoPE.
        metric: float64 [Hkv, D, D], G.
        scaling: factor on the logits.
        mask: bool [T, T] where attention is narrower than causal.
        softcap, sinks_logit: as in kernels.attention.attend.
    Returns:
        (of keys, of values), float64 [Hkv, T] each, not negative; 0 for tokens that no query is far
            enough behind.
    """
    heads, tokens, _ = key.shape
    far = min(FAR, tokens // 4)
    places = torch.arange(tokens, device=key.device)
    asked = torch.linspace(far, tokens - 1, min(QUERIES, tokens - far), device=key.device)
    asked = asked.round().long()
    seen = places <= asked[:, None]
    if mask is not None:
        seen = seen & mask[asked]
    late = places <= asked[:, None] - far
    grouped = query[:, asked].float().unflatten(0, (heads, -1))  # [Hkv, G, n, D]
    of_keys, of_values = [], []
    for h in range(heads):
        logits = grouped[h] @ key[h].float().mT * scaling  # [G, n, T]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~seen, float("-inf"))
        if sinks_logit is not None:
            sink = sinks_logit.float().view(heads, -1, 1, 1)[h].expand(-1, len(asked), 1)
            logits = torch.cat((logits, sink), -1)
        p = logits.softmax(-1)[..., :tokens]
        squares = torch.where(late, p.square(), 0)
        v, g = value[h].float(), metric[h].float()
        o = p @ v
        apart = ((v @ g) * v).sum(-1) - 2 * o @ (v @ g).mT + ((o @ g) * o).sum(-1, keepdim=True)
        of_keys.append((squares * apart.clamp_min(0)).sum((0, 1)))
        of_values.append(squares.sum((0, 1)))
    return torch.stack(of_keys).double().sqrt(), torch.stack(of_values).double().sqrt()
