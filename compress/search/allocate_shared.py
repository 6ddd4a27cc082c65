"""The allocation with a limit on how many different kinds of choices all groups use together:
kernels are compiled for each kind.

A group is a layer, a kind a pair of formats (or one format for both), and its bytes and losses are
the two sides' sums. With y[g, p] whether group g takes kind p, and u[p] whether p is used at all:

    min Σ loss·y,   Σ_p y[g, p] = 1,   y[g, p] ≤ u[p],   Σ_p u[p] ≤ limit,   Σ bytes·y ≤ budget

that is a k-median problem with a knapsack. Given prices v[g] of groups and λ of a byte, its
Lagrangian bound is

    Σ_g v[g] − λ·budget + Σ of the `limit` least ρ[p],   ρ[p] = Σ_g min(0, loss[g, p] + λ·bytes[g,
    p] − v[g])

as tight as the linear program's and a matrix operation each. Subgradient steps raise it; an
exchange of kinds finds a good allocation; kinds that the bound shows to be in no better one are
dropped (hundreds go, some tens stay), and the integer program settles the rest. Nothing depends on
time or chance, so a result is the same on any machine.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from kvfold.compress.search.allocate import GAP, Choice, allocate
from kvfold.errors import KvfoldError

STEPS = 600  # of the subgradient
PATIENCE = 20  # steps without a better bound after which they get shorter
LEAST_STEP = 1e-4  # of the first one, at which it is enough
EXCHANGES = 50  # of one kind at the most
HALVINGS = 60  # of the interval that λ lies in
MOST_CELLS = 4000  # of y in the integer program: more are left to the exchange's best and the bound
NODES = 100  # of its search


def allocate_shared(
    groups: Sequence[Sequence[Choice]], kinds: Sequence[Sequence[Hashable]], budget: int, limit: int
) -> list[int]:
    """Chooses one candidate a group, of at most `limit` kinds in all.

    Args:
        groups: candidates of each group.
        kinds: what each candidate is; two of one kind need the same kernels.
        budget: bytes that the chosen candidates may take together.
        limit: kinds that may be used, 1 or more.
    Returns:
        The index of the chosen candidate in each group.
    Raises:
        KvfoldError: no choice of so few kinds fits the budget.
    """
    names = list(dict.fromkeys(kind for row in kinds for kind in row))
    place = {name: i for i, name in enumerate(names)}
    shape = len(groups), len(names)
    nbytes, loss, index = np.full(shape, np.inf), np.full(shape, np.inf), np.full(shape, -1)
    for g, (group, row) in enumerate(zip(groups, kinds, strict=True)):
        for c, (choice, kind) in enumerate(zip(group, row, strict=True)):
            p = place[kind]
            if (choice.loss, choice.nbytes) < (
                loss[g, p],
                nbytes[g, p],
            ):  # two of one kind: the better one
                nbytes[g, p], loss[g, p], index[g, p] = choice.nbytes, choice.loss, c
    kept = _undominated(nbytes, loss)
    found = _solve(_Problem(nbytes[:, kept], loss[:, kept], budget, min(limit, len(kept))))
    return [int(index[g, kept[p]]) for g, p in enumerate(found)]


def _undominated(nbytes: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Kinds that no other one beats in bytes and loss of every group: int [n], in their order."""
    order = np.lexsort((np.arange(nbytes.shape[1]), loss.sum(0), nbytes.sum(0)))
    kept: list[int] = []
    for p in order:
        before = np.array(kept, int)
        worse = (nbytes[:, before] <= nbytes[:, [p]]) & (loss[:, before] <= loss[:, [p]])
        if not worse.all(0).any():
            kept.append(int(p))
    return np.sort(kept)


class _Problem:
    """Bytes and losses [groups, kinds], infinite where a group has not the kind, near 1 and losses
    over the largest."""

    def __init__(self, nbytes: np.ndarray, loss: np.ndarray, budget: int, limit: int) -> None:
        self.exact, self.budget, self.limit = nbytes, budget, limit
        self.unit = max(nbytes[np.isfinite(nbytes)].max(), 1.0)
        weight = max(loss[np.isfinite(loss)].max(), 1e-30)
        self.nbytes, self.loss, self.room = nbytes / self.unit, loss / weight, budget / self.unit
        self.rows = np.arange(len(loss))

    def priced(self, price: float) -> np.ndarray:
        return self.loss + price * self.nbytes if price else self.loss

    def fits(self, found: np.ndarray) -> bool:
        taken = self.exact[self.rows, found]
        return bool(np.isfinite(taken).all() and taken.sum() <= self.budget)

    def cost(self, found: np.ndarray) -> float:
        return float(self.loss[self.rows, found].sum())

    def within(self, used: np.ndarray) -> tuple[np.ndarray | None, float]:
        """(kind of each group, λ): the least loss of `used` kinds at the smallest price of a byte
        whose choice fits; None if even the smallest does not, or a group has none of them."""

        def at(price: float) -> np.ndarray:
            cells = self.priced(price)[:, used]
            return used[np.lexsort((self.nbytes[:, used], cells), axis=1)[:, 0]]

        least = used[np.lexsort((self.loss[:, used], self.nbytes[:, used]), axis=1)[:, 0]]
        if not self.fits(least):
            return None, 0.0
        if self.fits(at(0.0)):
            return at(0.0), 0.0
        best, low, high = least, 0.0, 1.0
        while not self.fits(at(high)) and high < 1e12:
            high *= 4
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = at(middle)
            if self.fits(found):
                best, high = found, middle
            else:
                low = middle
        return self._filled(best, used), high

    def _filled(self, found: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Spends what is left of the budget, best loss per byte first."""
        found = found.copy()
        while True:
            taken = self.exact[self.rows, found]
            more = self.exact[:, used] - taken[:, None]
            gain = np.maximum(self.loss[self.rows, found][:, None] - self.loss[:, used], 0)
            worth = np.where(more <= self.budget - taken.sum(), gain / np.maximum(more, 1e-9), 0.0)
            g, c = np.unravel_index(worth.argmax(), worth.shape)
            if worth[g, c] <= 0:
                return found
            found[g] = used[c]

    def exchanged(self, used: np.ndarray) -> tuple[np.ndarray | None, float]:
        """(allocation, its loss) after swaps of one kind for another for as long as they help; None
        if nothing fits."""
        found, price = self.within(used)
        loss = np.inf if found is None else self.cost(found)
        for _ in range(EXCHANGES):
            cells = (
                np.minimum(self.priced(price), 1e9)
                if found is not None
                else np.minimum(self.nbytes, 1e9)
            )
            best, swap = cells[:, used].min(1).sum() * (1 - 1e-9), None
            for i in range(len(used)):
                rest = np.delete(used, i)
                base = cells[:, rest].min(1) if len(rest) else np.full(len(cells), np.inf)
                scores = np.minimum(cells, base[:, None]).sum(0)
                if scores.min() < best:
                    best, swap = scores.min(), np.append(rest, scores.argmin())
            if swap is None:
                break
            trial, price = self.within(swap)
            if trial is not None and self.cost(trial) >= loss:
                break
            used, found, loss = swap, trial, np.inf if trial is None else self.cost(trial)
        return found, loss


@dataclass(frozen=True)
class _Bound:
    """A Lagrangian bound on the loss, and what it says of kinds and cells.

    Attributes:
        value: no allocation has less loss.
        kinds: [n], no allocation that uses the kind has less.
        cells: [groups, n], no allocation in which the group takes the kind has less.
    """

    value: float
    kinds: np.ndarray
    cells: np.ndarray


def _bound(problem: _Problem, prices: np.ndarray, price: float) -> tuple[_Bound, np.ndarray, float]:
    """The bound at these prices, and its slope in them."""
    excess = problem.priced(price) - prices[:, None]
    gaps = np.minimum(excess, 0)
    rho = gaps.sum(0)
    order = np.argsort(rho, kind="stable")
    taken = order[: problem.limit]
    value = float(prices.sum() - price * problem.room + rho[taken].sum())
    kinds = np.full(len(rho), value)
    kinds[order[problem.limit :]] += rho[order[problem.limit :]] - rho[taken[-1]]
    inside = gaps[:, taken] < 0
    slope = 1.0 - inside.sum(1)
    return (
        _Bound(value, kinds, kinds + np.maximum(excess, 0)),
        slope,
        float(np.where(inside, problem.nbytes[:, taken], 0).sum() - problem.room),
    )


def _solve(problem: _Problem) -> np.ndarray:
    """The kind of each group."""
    everything, price = problem.within(np.arange(problem.loss.shape[1]))
    if everything is None:
        raise _out_of_reach(problem)
    prices = problem.priced(price).min(1)
    best, upper = None, np.inf
    top, slope, slope_price = _bound(problem, prices, price)
    tried: set[tuple[int, ...]] = set()
    since, length = -1, 1.0
    for _ in range(STEPS):
        now, slope, slope_price = _bound(problem, prices, price)
        since = 0 if now.value > top.value + GAP * abs(top.value) else since + 1
        top = max(top, now, key=lambda bound: bound.value)
        start = tuple(np.sort(np.argsort(now.kinds, kind="stable")[: problem.limit]).tolist())
        if since % PATIENCE == 0 and start not in tried:
            tried.add(start)
            found, loss = problem.exchanged(np.array(start))
            if loss < upper:
                best, upper = found, loss
        if since and since % PATIENCE == 0:
            length /= 2
        if (np.isfinite(upper) and upper - top.value <= GAP * upper) or length < LEAST_STEP:
            break
        goal = upper if np.isfinite(upper) else top.value + 0.1 * max(abs(top.value), 1e-3)
        step = (
            length
            * max(goal - now.value, 0.0)
            / max(float((slope**2).sum() + slope_price**2), 1e-12)
        )
        prices, price = prices + step * slope, max(0.0, price + step * slope_price)
    return _settled(problem, best, upper, top)


def _settled(problem: _Problem, best: np.ndarray | None, upper: float, bound: _Bound) -> np.ndarray:
    """The best allocation, from a good one and a bound."""
    used = None if best is None else np.unique(best)
    if best is None or upper - bound.value > GAP * upper:
        cells = np.isfinite(problem.loss) & (bound.cells < upper)
        if cells.sum() > MOST_CELLS:
            cells &= bound.cells <= np.sort(bound.cells[cells])[MOST_CELLS]
        found = _milp(problem, cells)
        if found is not None and (best is None or problem.cost(found) < upper):
            used = np.unique(found)
    if used is None:
        raise _out_of_reach(problem)
    # what the tolerance of a solver let through, or an exchange left over, is settled among few
    # kinds exactly
    finite = [used[np.isfinite(row[used])] for row in problem.loss]
    groups = [
        [Choice(int(problem.exact[g, p]), float(problem.loss[g, p])) for p in own]
        for g, own in enumerate(finite)
    ]
    found = np.array(
        [own[c] for own, c in zip(finite, allocate(groups, problem.budget), strict=True)]
    )
    return best if best is not None and upper <= problem.cost(found) else found


def _milp(problem: _Problem, cells: np.ndarray) -> np.ndarray | None:
    """The integer program over the given cells of y: kind of each group; None if it finds
    nothing."""
    group, kind = np.nonzero(cells)
    names, kind = np.unique(kind, return_inverse=True)
    y, u, groups = len(group), len(names), len(cells)
    if not cells.any(1).all():
        return None
    one_each = csr_matrix((np.ones(y), (group, np.arange(y))), (groups, y + u))
    paid = csr_matrix((problem.nbytes[cells], (np.zeros(y, int), np.arange(y))), (1, y + u))
    few = csr_matrix((np.ones(u), (np.zeros(u, int), y + np.arange(u))), (1, y + u))
    rows = np.arange(y)
    linked = csr_matrix(
        (
            np.repeat([1.0, -1.0], y),
            (np.concatenate([rows, rows]), np.concatenate([rows, y + kind])),
        ),
        (y, y + u),
    )
    result = milp(
        np.concatenate([problem.loss[cells], np.zeros(u)]),
        integrality=np.ones(y + u),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(paid, -np.inf, problem.room),
            LinearConstraint(few, 0, problem.limit),
            LinearConstraint(linked, -np.inf, 0),
        ],
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    if result.x is None:
        return None
    found = np.zeros(groups, int)
    for cell in np.flatnonzero(result.x[:y] > 0.5):
        found[group[cell]] = names[kind[cell]]
    return found


def _out_of_reach(problem: _Problem) -> KvfoldError:
    return KvfoldError(
        f"No allocation of at most {problem.limit} different pairs of formats fits {problem.budget} bytes; raise the "
        "recipe's pairs (0: no limit) or give a larger budget."
    )
