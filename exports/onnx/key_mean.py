"""The rotating mean of keys (kernels/key_mean.py) as ONNX nodes: taken off keys that are written,
given back to logits.

Complex tensors are pairs of names, (real, imaginary); pairs of channels stand with the fastest
first. A turn e^{jω(start + unit·n)} is the product of two looked-up ones: cosines of many thousand
radians are wrong in float32, and not all runtimes have float64.
"""

import numpy as np
import torch
from torch import Tensor

from kvfold.exports.onnx.graph import FLOAT, Graph
from kvfold.kernels.key_mean import SPAN, STEP, TurnTables

REACH = 1 << 22  # tokens that the tables cover
FINE = 256  # entries of the finer table

Complex = tuple[str, str]


def product(g: Graph, a: Complex, b: Complex) -> Complex:
    """a·b, broadcast."""
    real = g.op("Sub", g.op("Mul", a[0], b[0]), g.op("Mul", a[1], b[1]))
    return real, g.op("Add", g.op("Mul", a[0], b[1]), g.op("Mul", a[1], b[0]))


def _table(g: Graph, angles: Tensor) -> Complex:
    """e^{j·angles}, constant: float64 [n, pairs] → float32."""
    return g.array(angles.cos().numpy()), g.array(angles.sin().numpy())


def _channels(g: Graph, x: str, index: Tensor) -> str:
    """x[..., index], by a slice where the channels follow each other."""
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return g.op("Slice", x, g.ints(first), g.ints(first + count), g.ints(-1))
    return g.op("Gather", x, g.array(index.numpy(), np.int64), axis=-1)


class TurningMean:
    """Writes the nodes of all layers of one graph that share their frequencies.

    What depends on positions alone is written with the first layer that asks, and read by the
    others.

    Args:
        tables: of these frequencies, on the CPU.
    """

    def __init__(self, tables: TurnTables) -> None:
        self.tables = tables
        self.new: Complex | None = None
        self.cached: str | None = None

    def subtract(self, g: Graph, key: str, offset: Tensor, positions: str) -> str:
        """k − m_t.

        Args:
            key: float32 [B, Hkv, T, D].
            offset: float32 [Hkv, D], the mean of keys before RoPE.
            positions: int64 [T] of the keys, the same for every layer.
        """
        t = self.tables
        self.new = self.new or self._turns(g, positions)
        real, imaginary = product(g, self._mean(g, offset), self.new)
        mean = _channels(
            g, g.concat([real, imaginary], 2), torch.cat((t.first, t.second)).argsort()
        )
        return g.op("Sub", key, mean)

    def logits(self, g: Graph, query: str, offset: Tensor, positions: str) -> str:
        """q·m_t.

        Args:
            query: float32 [B, Hkv, Q, D], after RoPE; whatever factor it has, the result has.
            offset: as above.
            positions: int64 [N] of keys, in any order, the same for every layer.
        Returns:
            float32 [B, Hkv, Q, N].
        """
        t = self.tables
        if self.cached is None:
            real, imaginary = self._turns(g, positions)
            self.cached = g.transpose(g.concat([real, g.op("Neg", imaginary)], 1), 1, 0)  # [D, N]
        conjugate = _channels(g, query, t.first), g.op("Neg", _channels(g, query, t.second))
        return g.op(
            "MatMul", g.concat(list(product(g, conjugate, self._mean(g, offset))), 3), self.cached
        )

    def _mean(self, g: Graph, offset: Tensor) -> Complex:
        """b as constants [Hkv, 1, D/2]."""
        t = self.tables
        return g.array(offset[:, None, t.first].numpy()), g.array(offset[:, None, t.second].numpy())

    def _look_up(self, g: Graph, omega: Tensor, start: float, unit: int, index: str) -> Complex:
        """e^{jω(start + unit·index)}: int64 [n], below REACH / unit → [n, pairs]."""
        fine = torch.arange(FINE, dtype=torch.float64)[:, None]
        coarse = torch.arange(REACH // unit // FINE, dtype=torch.float64)[:, None]
        tables = _table(g, (start + unit * fine) * omega), _table(g, unit * FINE * coarse * omega)
        at = g.op("Mod", index, g.ints(FINE)), g.op("Div", index, g.ints(FINE))
        low, high = [
            (g.op("Gather", table[0], i, axis=0), g.op("Gather", table[1], i, axis=0))
            for table, i in zip(tables, at, strict=True)
        ]
        return product(g, low, high)

    def _turns(self, g: Graph, positions: str) -> Complex:
        """Turns of each position, 0 for sinks: [T, D/2]."""
        t = self.tables
        u = g.op("Max", g.op("Sub", positions, g.ints(t.sinks)), g.ints(0))
        span = self._look_up(g, t.omega[: t.fast], t.sinks, SPAN, g.op("Div", u, g.ints(SPAN)))
        place = g.op("Mod", u, g.ints(SPAN))
        within = [
            g.op("Gather", g.array(x.numpy()), place, axis=0)
            for x in (t.within.real, t.within.imag)
        ]
        fast = product(g, span, (within[0], within[1]))
        slow = self._look_up(
            g, t.omega[t.fast :], t.sinks + STEP // 2, STEP, g.op("Div", u, g.ints(STEP))
        )
        behind = g.cast(g.op("GreaterOrEqual", positions, g.ints(t.sinks)), FLOAT)
        behind = g.op("Unsqueeze", behind, g.ints(1))
        real, imaginary = (
            g.op("Mul", g.concat([a, b], 1), behind) for a, b in zip(fast, slow, strict=True)
        )
        return real, imaginary
