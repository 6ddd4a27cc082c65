"""Trellis-coded classes as a kind of code: what benchmarks/trellis.py reads pages with.

A trellis code of k bits a symbol and L bits of state stores a ring of symbols b_0 … b_{n−1}. Number t
comes back as table[s_t], where s_t is the window of L bits of the bit stream that begins with b_t:

    s_t = b_t | b_{t+1} << k | b_{t+2} << 2k | …  (mod 2^L), b_n = b_0

(the bit-shift trellis of QTIP, 2406.11235). A ring has no start state to store: it takes k bits a
symbol, all told. The Viterbi search runs against the stream, from b_{n−1} down, so that the newest
symbol is the state's lowest; its first state is that which a search over the ring's seam alone finds.

A ring is the symbols of one channel in a page, as its words hold them (kernels/kinds/bits.py): the
eight tokens of row 0, those of row 1 and so on. The planes hold the symbols where they held codes,
so that a page keeps its bytes, and words can be loaded as they are today.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from kvfold.kernels.formats import Format
from kvfold.kernels.kinds.interface import CodeKind, Layout
from kvfold.kernels.kinds.params import TINY, load_param, store_param
from kvfold.kernels.kinds.storage import FIELDS
from kvfold.kernels.kinds.symmetric import ALONG, FACTORS, Symmetric

SEAM = 24  # symbols on both sides of a ring's seam that decide the state there
RINGS = 512  # searched at a time: costs of 256 states stay in a core's cache
# of a computed code: multiplier and addend, the best of 24 drawn for 256 states of two bits
HASH = 236996814, 3570525885


@dataclass(frozen=True, eq=False)
class Code:
    """One trellis: 2^L numbers, one a state, for a source of unit variance."""

    bits: int  # k, of a symbol
    table: Tensor  # float32 [2^L]

    @property
    def state_bits(self) -> int:
        return len(self.table).bit_length() - 1

    def windows(self, symbols: Tensor) -> Tensor:
        """Symbols of rings [..., n] → the state at each, int64 of the same shape."""
        found = symbols.long()
        for j in range(1, -(-self.state_bits // self.bits)):
            found = found | symbols.long().roll(-j, -1) << self.bits * j
        return found & (len(self.table) - 1)


def _search(y: Tensor, w: Tensor, code: Code, state: Tensor | None) -> Tensor:
    """Viterbi: the symbols with the least Σ w·(y − table[state])².

    Args:
        y, w: float32 [n, N], in the order in which the state shifts.
        state: int64 [N], before the first symbol and after the last; None: any.
    Returns:
        states, int64 [n, N].
    """
    (n, rings), states = y.shape, len(code.table)
    choices = 2**code.bits
    groups = states // choices
    coder = torch.stack((code.table.square(), -2 * code.table), 1)  # [S, 2]
    facts = torch.stack((w, w * y), 1)  # [n, 2, N]
    cost = torch.zeros(states, rings)
    if state is not None:
        cost.fill_(torch.inf).scatter_(0, state[None], 0.0)
    back = torch.empty(n, groups, rings, dtype=torch.uint8)
    for t in range(n):
        # the states that lead to group q differ in their top symbol alone
        best, which = _least(cost.view(choices, groups, rings))
        back[t] = which
        cost = torch.addmm(best.repeat_interleave(choices, 0), coder, facts[t])
    last = cost.argmin(0) if state is None else state
    found = torch.empty(n, rings, dtype=torch.int64)
    for t in range(n - 1, -1, -1):
        found[t] = last
        group = last >> code.bits
        last = back[t].gather(0, group[None])[0].long() * groups + group
    return found


def _least(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Least of the first dimension, of 2^k entries, and which that is: by halves, which is several
    times as fast as `min`."""
    which = None
    while len(cost) > 1:
        low, high = cost.chunk(2)
        better = high < low
        cost = torch.minimum(low, high)
        if which is None:
            which = better.to(torch.uint8) * len(low)
        else:
            a, b = which.chunk(2)
            which = torch.where(better, b + len(low), a)
    assert which is not None
    return cost[0], which[0]


def states_of(y: Tensor, w: Tensor, code: Code) -> Tensor:
    """The states of rings, int64 [..., n], with the least Σ w·(y − table[state])²; y, w: float32 [...,
    n]. Their lowest k bits are the symbols."""
    found, rows = [], (x.flatten(0, -2).split(RINGS) for x in (y, w))
    for part_y, part_w in zip(*rows, strict=True):
        flow_y, flow_w = part_y.flip(-1).T.contiguous(), part_w.flip(-1).T.contiguous()
        around = torch.arange(-SEAM, SEAM) % len(flow_y)
        first = _search(flow_y[around], flow_w[around], code, None)[SEAM - 1]
        found.append(_search(flow_y, flow_w, code, first).T.flip(-1))
    return torch.cat(found).view(y.shape)


def gaussian(rings: int, n: int, seed: int) -> Tensor:
    """Unit Gaussians float32 [rings, n]."""
    return torch.randn(rings, n, generator=torch.Generator().manual_seed(seed))


@cache
def error_of(code: Code, n: int = 32, rings: int = 2000) -> float:
    """Mean squared error on Gaussians, in rings of n symbols."""
    y = gaussian(rings, n, 1 << 20)
    states = states_of(y, torch.ones_like(y), code)
    return float((y - code.table[states]).square().mean())


def trained(bits: int, state_bits: int, n: int = 32, rounds: int = 20) -> Code:
    """A code whose table is fitted to Gaussians: of each state the mean of what was coded with it."""
    code = Code(bits, gaussian(1, 2**state_bits, 0)[0])
    for i in range(rounds):
        y = gaussian(512, n, 1 + i)
        states = states_of(y, torch.ones_like(y), code).flatten()
        count = torch.zeros(2**state_bits).scatter_add_(0, states, torch.ones(len(states)))
        total = torch.zeros(2**state_bits).scatter_add_(0, states, y.flatten())
        code = Code(bits, torch.where(count > 0, total / count.clamp_min(1), code.table))
    return code


def hashed(bits: int, state_bits: int, multiplier: int, addend: int) -> Code:
    """A code without a table, QTIP's "3INST": signs, low exponent bits and mantissas of two float16
    come from state · multiplier + addend; their sum is the number, times what brings it to unit
    variance."""
    mixed = torch.arange(2**state_bits) * multiplier + addend
    pair = (mixed & 0x8FFF8FFF ^ 0x3B603B60) & 0xFFFFFFFF
    halves = torch.stack((pair & 0xFFFF, pair >> 16))
    signed = torch.where(halves >= 1 << 15, halves - (1 << 16), halves).to(torch.int16)
    total = signed.view(torch.float16).float().sum(0)
    return Code(bits, total / total.std())


class Trellised(Symmetric):
    """Symmetric codes, of which classes of some numbers of levels are trellis-coded. The token's
    scale is that of scalar codes, or fitted anew.

    Args:
        codes: levels of the classes → their code.
        by_scale: tokens weigh by the square of their scale, which minimises the squared error; else
            alike, whatever their scale.
        refit: each token then takes the best of FACTORS times its scale, by the rule of
            kinds/symmetric.py, while the trellises' states stay and scalar codes follow.
    """

    def __init__(self, codes: Mapping[int, Code], refit: bool, by_scale: bool = False) -> None:
        self.codes, self.refit, self.by_scale = codes, refit, by_scale
        # levels → [squared error of scalar codes, of these], summed over all that was coded; 0: of all
        # channels
        self.errors = {levels: [0.0, 0.0] for levels in (0, *codes)}

    def _classes(self, fmt: Layout) -> list[tuple[slice, Code]]:
        found, start = [], 0
        for channels, levels in fmt.classes:
            if levels in self.codes:
                found.append((slice(start, start + channels), self.codes[levels]))
            start += channels
        return found

    def encode(self, x: Tensor, fmt: Layout, clip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As in `CodeKind`."""
        codes, params = super().encode(x, fmt, clip)
        assert params is not None
        self._note(
            0, x, Symmetric.decode(self, codes, load_param(params, fmt.param_dtype), fmt), fmt
        )
        scale = load_param(params, fmt.param_dtype)
        states = [self._states(x[..., own], scale, code) for own, code in self._classes(fmt)]
        if self.refit:
            params = self._refitted(x, states, scale, fmt)
            scale = load_param(params, fmt.param_dtype)
            codes = self._scalar(x, scale, fmt)
        for (channels, code), own in zip(self._classes(fmt), states, strict=True):
            codes[..., channels] = _tokens(own & 2**code.bits - 1).to(torch.uint8)
        self._note(1, x, self.decode(codes, scale, fmt), fmt)
        return codes, params

    def _states(self, x: Tensor, scale: Tensor, code: Code) -> Tensor:
        """States of the rings of a class [..., T, channels] at scales [..., T, 1]."""
        scale = scale.clamp_min(TINY)
        weights = _rings((scale * scale if self.by_scale else torch.ones_like(scale)).expand_as(x))
        unit = weights.amax(-1, keepdim=True)  # so that small numbers keep their digits
        return states_of(_rings(x / scale), weights / unit, code)

    def _note(self, which: int, x: Tensor, decoded: Tensor, fmt: Layout) -> None:
        errors, start = (decoded - x).square().sum(tuple(range(x.ndim - 1))), 0
        self.errors[0][which] += float(errors.sum())
        for channels, levels in fmt.classes:
            if levels in self.codes:
                self.errors[levels][which] += float(errors[start : start + channels].sum())
            start += channels

    def decode(self, codes: Tensor, params: Tensor, fmt: Layout) -> Tensor:
        """As in `CodeKind`."""
        found = super().decode(codes, params, fmt)
        for channels, code in self._classes(fmt):
            own = codes[..., channels]
            found[..., channels] = _tokens(code.table[code.windows(_rings(own))]) * params
        return found

    def _scalar(self, x: Tensor, scale: Tensor, fmt: Layout) -> Tensor:
        """The nearest scalar codes at a given scale."""
        codes, start = torch.zeros(x.shape, dtype=torch.uint8), 0
        for channels, levels in fmt.classes:
            if levels:
                own = slice(start, start + channels)
                u = x[..., own] / (scale.clamp_min(TINY) * self.step(levels)) + levels / 2
                codes[..., own] = u.floor().clamp(0, levels - 1).to(torch.uint8)
            start += channels
        return codes

    def _refitted(self, x: Tensor, states: list[Tensor], scale: Tensor, fmt: Layout) -> Tensor:
        """Bytes of the scales with the least cost while trellises' states stay, [..., T, size]."""
        levels = torch.tensor([n for size, n in fmt.classes for _ in range(size)])
        weights = torch.tensor([self.weight(int(n)) for n in levels])
        for channels, code in self._classes(fmt):
            weights[channels] *= self.error(int(levels[channels][0])) / error_of(code)
        size = (weights * x * x).sum(-1, keepdim=True).clamp_min(TINY)
        best, params = torch.full_like(scale, torch.inf), store_param(scale, fmt.param_dtype)[0]
        for factor in FACTORS:
            tried, own = store_param(scale * factor, fmt.param_dtype)
            d = x - super().decode(self._scalar(x, own, fmt), own, fmt)
            for (channels, code), held in zip(self._classes(fmt), states, strict=True):
                d[..., channels] = x[..., channels] - _tokens(code.table[held]) * own
            cost = (weights * d * d).sum(-1, keepdim=True)
            cost += ALONG * (weights * d * x).sum(-1, keepdim=True).square() / size
            better = cost < best
            best, params = torch.where(better, cost, best), torch.where(better, tried, params)
        return params


def _rings(x: Tensor) -> Tensor:
    """[..., T, channels] → [..., channels, T], tokens in their words' order."""
    return x.unflatten(-2, (FIELDS, -1)).movedim(-3, -1).transpose(-3, -2).flatten(-2)


def _tokens(rings: Tensor) -> Tensor:
    """Inverse of `_rings`."""
    return rings.unflatten(-1, (-1, FIELDS)).transpose(-3, -2).movedim(-1, -3).flatten(-3, -2)


@dataclass(frozen=True)
class TrellisFormat(Format):
    """A format whose codes are of another kind, of the same bytes."""

    coded: CodeKind = field(default_factory=Symmetric)

    @property
    def kind(self) -> CodeKind:
        return self.coded


def with_trellis(fmt: Format, coded: Trellised) -> Format:
    """`fmt` with trellis-coded classes; itself where it has none of those that are to be."""
    held = {levels for _, levels in fmt.classes}
    if not fmt.kind.symmetric or (coded.codes and held.isdisjoint(coded.codes)):
        return fmt
    return TrellisFormat(fmt.classes, fmt.params, fmt.param_dtype, fmt.group_size, coded)
