"""The allocation: one format for each layer's keys and values, least predicted loss under a byte
budget, by MILP.

Variables x[g, c] ∈ {0, 1} choose candidate c in group g (a layer's keys or values); Σ_c x[g, c] = 1
for each g and Σ bytes[g, c]·x[g, c] ≤ budget; the objective is Σ loss[g, c]·x[g, c] (the integer
program of PM-KVQ, 2505.18610, with keys and values apart and every byte counted).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from kvfold.errors import KvfoldError

GAP = 1e-5  # relative optimality gap at which the solver may stop


@dataclass(frozen=True)
class Choice:
    """One candidate of one group: resident bytes at the budget's length, and predicted loss in
    nats."""

    nbytes: int
    loss: float


def least_nbytes(groups: list[list[Choice]]) -> int:
    """Bytes of the smallest allocation."""
    return sum(min(choice.nbytes for choice in group) for group in groups)


def allocate(groups: list[list[Choice]], budget: int) -> list[int]:
    """Chooses one candidate a group.

    Args:
        groups: candidates of each group.
        budget: bytes that the chosen candidates may take together.
    Returns:
        The index of the chosen candidate in each group.
    Raises:
        KvfoldError: the solver failed; a budget that nothing fits is the caller's to refuse.
    """
    sizes = [len(group) for group in groups]
    choices = [choice for group in groups for choice in group]
    nbytes = np.array([choice.nbytes for choice in choices], float)
    loss = np.array([choice.loss for choice in choices])
    unit = max(nbytes.max(), 1.0)  # the solver wants numbers near 1
    weight = max(loss.max(), 1e-30)
    owner = np.repeat(np.arange(len(groups)), sizes)
    one_each = csr_matrix((np.ones(len(choices)), (owner, np.arange(len(choices)))))
    result = milp(
        loss / weight,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(nbytes[None] / unit, -np.inf, budget / unit),
        ],
        options={
            "mip_rel_gap": GAP,
            "node_limit": 100_000,
        },  # a time limit would make the result depend on the machine's load
    )
    if result.x is None:
        raise KvfoldError(
            f"No allocation was found for {budget} bytes ({result.message}); give a larger budget."
        )
    starts = np.cumsum([0, *sizes[:-1]])
    chosen = [
        int(np.argmax(result.x[start : start + size]))
        for start, size in zip(starts, sizes, strict=True)
    ]
    total = sum(groups[g][c].nbytes for g, c in enumerate(chosen))
    if (
        total > budget
    ):  # the solver's tolerance let some bytes through: trade the cheapest loss for them
        chosen = _shrink(groups, chosen, total - budget)
    return chosen


def _shrink(groups: list[list[Choice]], chosen: list[int], excess: int) -> list[int]:
    """Replaces choices by smaller ones, least loss per byte first, until `excess` bytes are
    gone."""
    while excess > 0:
        moves = [
            ((other.loss - group[now].loss) / (group[now].nbytes - other.nbytes), g, c)
            for g, (group, now) in enumerate(zip(groups, chosen, strict=True))
            for c, other in enumerate(group)
            if other.nbytes < group[now].nbytes
        ]
        _, g, c = min(moves)
        excess -= groups[g][chosen[g]].nbytes - groups[g][c].nbytes
        chosen[g] = c
    return chosen
