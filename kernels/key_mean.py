"""The rotating mean of keys: what is taken off a key before it is coded, and what that leaves out
of a logit.

Keys after RoPE are R(t)·(b + noise), with a mean b before RoPE that is large in every head and
largest where k_proj has a bias. A plain mean after RoPE is about zero in every channel that turns.
So the cache stores k − m_t, where m_t is b turned to the key's position, and a logit gets back
q·m_t, a function of the query and the position alone: it takes no bytes of the cache.

m_t need not be R(t)·b to the last bit; writer and reader only have to agree. So it is defined by
what a kernel can compute fast. With u = t − sinks, b_i the complex mean of pair i and ω_i its
angular frequency:

    m_t = 0                                                    for t < sinks pair i fast    b_i ·
    e^{jω(sinks + 128·⌊u/128⌋)} · T_i[u mod 128],   T_i[δ] = e^{jωδ}, both parts rounded to float16
    pair i slow    b_i · e^{jω(sinks + 32·⌊u/32⌋ + 16)}

The head_dim / 8 pairs of the highest frequencies are fast; the others hardly turn in 32 tokens.
Channels that RoPE does not rotate are pairs of frequency 0. `pair_channels` says which channels are
a pair. For a query with complex parts q_i, q·m_t = Re Σ conj(q_i)·b_i·(the turns above), whose
coefficients c_i = conj(q_i)·b_i belong to the query. In a kernel the fast pairs are one small
matrix product with T for each 128 tokens, the slow ones one number for each 32. Against
m_t = R(t)·b this costs 3 % of the keys' distortion (benchmarks/LOG.md).
"""

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SPAN = 128  # tokens that share the turn of the fast pairs: a tile of the attention kernel
STEP = 32  # tokens that share the whole of the slow pairs
FIRST_TOKENS = 1 << 15  # that the tables hold at first; they double from there


RopePairs = Literal["halves", "adjacent", "swapped"]


def pair_channels(rotated: int, pairs: RopePairs = "halves") -> tuple[Tensor, Tensor]:
    """The first and the second channel of each pair that RoPE turns, the real and the imaginary
    part, int64 [rotated].

    Args:
        rotated: pairs of the first 2·rotated channels of a head.
        pairs: "halves": channels i and i + rotated; "adjacent": 2i and 2i + 1; "swapped": i +
            rotated and i, which is turning the other way round.
    """
    i = torch.arange(rotated)
    if pairs == "adjacent":
        return 2 * i, 2 * i + 1
    return (i + rotated, i) if pairs == "swapped" else (i, i + rotated)


def split_pairs(x: Tensor, pairs: RopePairs) -> tuple[Tensor, Tensor]:
    """The first and the second channels of pairs, views: [..., 2n] → [..., n] twice; every channel
    has a partner."""
    if pairs == "adjacent":
        return x[..., 0::2], x[..., 1::2]
    low, high = x.chunk(2, -1)
    return (high, low) if pairs == "swapped" else (low, high)


def join_pairs(first: Tensor, second: Tensor, pairs: RopePairs) -> Tensor:
    """What `split_pairs` split."""
    if pairs == "adjacent":
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((second, first) if pairs == "swapped" else (first, second), -1)


def num_fast(head_dim: int) -> int:
    """Pairs that turn from token to token."""
    return head_dim // 8


def padded_fast(head_dim: int) -> int:
    """Rows that a kernel's matrix product has for the real parts of the fast pairs, and again for
    the imaginary ones."""
    return max(8, 1 << (num_fast(head_dim) - 1).bit_length())


class KernelTables(NamedTuple):
    """The tables as Triton kernels read them (gpu/device/mean.py); F is `padded_fast`.

    Attributes:
        within: float16 [SPAN, 2·F], real parts of T, then imaginary parts.
        spans: float32 [n, 2, 2·F], cosines and sines, each twice.
        steps: float32 [m, 2, slow], cosines and sines.
        pairs: int32 [2, head_dim / 2], channels of each pair, fastest first.
        channels: int32 [2, head_dim], of each channel its pair, and its partner, less head_dim
            where the channel comes first.
    """

    within: Tensor
    spans: Tensor
    steps: Tensor
    pairs: Tensor
    channels: Tensor


def pair_order(
    frequencies: tuple[float, ...], head_dim: int, pairs: RopePairs
) -> tuple[Tensor, Tensor, Tensor]:
    """(first, second, ω) of all pairs, fastest first: int64, int64 and float64 [head_dim / 2]."""
    rotated = len(frequencies)
    rest = head_dim // 2 - rotated
    turned, still = pair_channels(rotated, pairs), pair_channels(rest)
    first, second = (torch.cat((a, 2 * rotated + b)) for a, b in zip(turned, still, strict=True))
    omega = torch.cat(
        (torch.tensor(frequencies, dtype=torch.float64), torch.zeros(rest, dtype=torch.float64))
    )
    order = omega.argsort(descending=True, stable=True)
    return first[order], second[order], omega[order]


def mean_bases(
    frequencies: tuple[float, ...], pairs: RopePairs, offset: Tensor, matrix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What turns are multiplied with to give m_t in the basis that keys are stored in.

    Args:
        offset: float32 [Hkv, D]; matrix: float32 [Hkv, D, D], M, or None.
    Returns:
        float32 [Hkv, 2·F, D] and [Hkv, 2·slow, D]: rows of the fast pairs' cosines and of their
        sines, as in `KernelTables.within`; and the same of the slow pairs, as in `steps`.
    """
    heads, dim = offset.shape
    first, second, _ = (x.to(offset.device) for x in pair_order(frequencies, dim, pairs))
    number, fast = torch.arange(len(first), device=offset.device), num_fast(dim)
    real, imag = offset[:, first], offset[:, second]
    rows = offset.new_zeros(2, heads, len(first), dim)  # m_t = Σ cos·rows[0] + sin·rows[1]
    rows[0][:, number, first], rows[0][:, number, second] = real, imag
    rows[1][:, number, first], rows[1][:, number, second] = -imag, real
    if matrix is not None:
        rows = rows @ matrix.mT
    near = torch.nn.functional.pad(rows[:, :, :fast], (0, 0, 0, padded_fast(dim) - fast))
    cos, sin = near
    far_cos, far_sin = rows[:, :, fast:]
    return torch.cat((cos, sin), 1).contiguous(), torch.cat((far_cos, far_sin), 1).contiguous()


class TurnTables:
    """Turns of one set of frequencies on one device, for all layers and caches that have it; from
    `turn_tables`.

    Tables that were replaced by longer ones stay alive, because a captured CUDA graph may read
    them.

    Attributes:
        first, second: int64 [head_dim / 2], the two channels of each pair, fastest pair first.
        within: complex64 [SPAN, fast], T, its parts rounded to float16.
        spans: complex64 [n, fast], turns of the fast pairs at sinks + SPAN·n.
        steps: complex64 [m, slow], turns of the slow pairs at sinks + STEP·m + STEP / 2.
    """

    def __init__(
        self,
        frequencies: tuple[float, ...],
        head_dim: int,
        sinks: int,
        device: torch.device,
        pairs: RopePairs = "halves",
    ) -> None:
        first, second, self.omega = pair_order(frequencies, head_dim, pairs)
        self.first, self.second = first.to(device), second.to(device)
        self.fast, self.sinks, self.device = num_fast(head_dim), sinks, device
        angles = torch.arange(SPAN)[:, None] * self.omega[: self.fast]
        self.within = torch.complex(angles.cos().half().float(), angles.sin().half().float()).to(
            device
        )
        dim = head_dim
        pair, partner = torch.empty(dim, dtype=torch.int32), torch.empty(dim, dtype=torch.int32)
        pair[first] = pair[second] = torch.arange(dim // 2, dtype=torch.int32)
        partner[first], partner[second] = second.int() - dim, first.int()
        channels = torch.stack((first, second)).int()
        self._indices = channels.to(device), torch.stack((pair, partner)).to(device)
        self._old: list[KernelTables | tuple[Tensor, Tensor]] = []
        self.spans: Tensor
        self.steps: Tensor
        self.kernel_tables: KernelTables
        self.tokens = 0
        self.reach(FIRST_TOKENS)

    def reach(self, tokens: int) -> None:
        """Makes the tables cover positions below `tokens`."""
        if tokens <= self.tokens:
            return
        if self.tokens:
            self._old += [(self.spans, self.steps), self.kernel_tables]
        while self.tokens < tokens:
            self.tokens = max(FIRST_TOKENS, 2 * self.tokens)
        fast, slow = self.omega[: self.fast], self.omega[self.fast :]
        self.spans = self._turns(torch.arange(self.tokens // SPAN + 1) * SPAN, fast)
        self.steps = self._turns(torch.arange(self.tokens // STEP + 1) * STEP + STEP // 2, slow)
        padded = padded_fast(2 * len(self.omega))

        def rows(*parts: Tensor) -> Tensor:
            """[n, fast] each → [n, len(parts)·padded]."""
            return torch.cat(
                [torch.nn.functional.pad(part, (0, padded - self.fast)) for part in parts], -1
            )

        self.kernel_tables = KernelTables(
            rows(self.within.real, self.within.imag).half(),
            torch.stack([rows(x, x) for x in (self.spans.real, self.spans.imag)], 1).contiguous(),
            torch.stack((self.steps.real, self.steps.imag), 1).contiguous(),
            *self._indices,
        )

    def _turns(self, behind_sinks: Tensor, omega: Tensor) -> Tensor:
        angles = (behind_sinks + self.sinks)[:, None].double() * omega
        return torch.complex(angles.cos().float(), angles.sin().float()).to(self.device)

    def mean(self, offset: Tensor, positions: Tensor, end: int | None = None) -> Tensor:
        """m_t: offset float32 [Hkv, D], positions int64 [..., T] → float32 [..., Hkv, T, D].

        end: a number that all positions are below, where the host knows one; else it waits for the
        device to tell.
        """
        if not positions.numel():
            return offset.new_zeros(
                *positions.shape[:-1], offset.shape[0], positions.shape[-1], offset.shape[1]
            )
        self.reach(int(positions.max()) + 1 if end is None else end)
        u = (positions - self.sinks).clamp_min(0)
        fast = self.spans[u // SPAN] * self.within[u % SPAN]
        turns = (
            torch.cat((fast, self.steps[u // STEP]), -1) * (positions >= self.sinks)[..., None]
        )  # [..., T, D/2]
        return self._turned(offset, turns)

    def mean_at(self, offset: Tensor, positions: Tensor, places: Tensor) -> Tensor:
        """`mean` as if each position were place `places` of its STEP tokens, whatever its number
        is; for statistics.

        Args:
            offset: float32 [Hkv, D]; positions, places: int64 [T].
        """
        angles = positions[:, None].double() * self.omega.to(positions.device)
        angles[:, self.fast :] -= (places - STEP // 2)[:, None] * self.omega[self.fast :].to(
            positions.device
        )
        return self._turned(offset, torch.complex(angles.cos().float(), angles.sin().float()))

    def _turned(self, offset: Tensor, turns: Tensor) -> Tensor:
        """Means [Hkv, D] turned by complex64 [..., T, D/2], the fastest pair first → float32 [...,
        Hkv, T, D]."""
        b = torch.complex(offset[:, self.first], offset[:, self.second])
        m = b[:, None] * turns.unsqueeze(-3)
        out = torch.empty(*m.shape[:-1], offset.shape[1], dtype=torch.float32, device=offset.device)
        out[..., self.first], out[..., self.second] = m.real, m.imag
        return out

    def coefficients(self, offset: Tensor, query: Tensor) -> Tensor:
        """c_i = conj(q_i)·b_i, fastest pair first.

        Args:
            offset: float32 [Hkv, D], b.
            query: [..., H, T, D], after RoPE.
        Returns:
            complex64 [..., H, T, D/2].
        """
        q = query.float()
        q = torch.complex(q[..., self.first], q[..., self.second])
        b = torch.complex(offset[:, self.first], offset[:, self.second])
        return q.conj() * b.repeat_interleave(query.shape[-3] // len(offset), 0)[:, None]

    def logits(self, coefficients: Tensor, positions: Tensor) -> Tensor:
        """q·m_t: complex64 [H, T, D/2] of queries and int64 [n] positions of keys → float32 [H, T,
        n]."""
        inside = positions >= self.sinks
        if bool(inside.all()):
            return self._logits(coefficients, positions - self.sinks)
        out = coefficients.real.new_zeros(*coefficients.shape[:-1], len(positions))
        if bool(inside.any()):
            out[..., inside] = self._logits(coefficients, positions[inside] - self.sinks)
        return out

    def _logits(self, coefficients: Tensor, u: Tensor) -> Tensor:
        """The same of keys u ≥ 0 tokens behind the sinks."""
        low, high = int(u.min()), int(u.max())
        self.reach(high + self.sinks + 1)
        spans, steps = slice(low // SPAN, high // SPAN + 1), slice(low // STEP, high // STEP + 1)
        fast = coefficients[..., None, : self.fast] * self.spans[spans]  # [H, T, spans, fast]
        # Re(x·T) of all 128 places as one real product
        table = torch.cat((self.within.real, -self.within.imag), -1)  # [SPAN, 2·fast]
        near = (torch.cat((fast.real, fast.imag), -1) @ table.mT).flatten(-2)
        slow = coefficients[..., self.fast :]
        turn = self.steps[steps]
        far = (
            torch.cat((slow.real, -slow.imag), -1) @ torch.cat((turn.real, turn.imag), -1).mT
        )  # [H, T, steps]
        if high - low + 1 == len(u) and bool(
            (u.diff() == 1).all()
        ):  # a run, as most tiles are: no gathering
            first = low // SPAN * SPAN
            blocks = near[..., low // STEP * STEP - first :].unflatten(-1, (-1, STEP))[
                ..., : far.shape[-1], :
            ]
            return blocks.add_(far[..., None]).flatten(-2)[..., low % STEP : low % STEP + len(u)]
        return near[..., u - low // SPAN * SPAN] + far[..., u // STEP - low // STEP]


@cache
def turn_tables(
    frequencies: tuple[float, ...],
    head_dim: int,
    sinks: int,
    device: torch.device,
    pairs: RopePairs = "halves",
) -> TurnTables:
    """The tables of one set of frequencies: made once, and shared.

    Args:
        frequencies: ω of RoPE's pairs, radians a token.
        head_dim: even; channels that RoPE leaves alone come behind those that it turns.
        sinks: first positions, whose mean is 0.
        pairs: as in `pair_channels`.
    """
    with torch.inference_mode(False):  # they outlive the mode of whoever asks first
        return TurnTables(frequencies, head_dim, sinks, device, pairs)
