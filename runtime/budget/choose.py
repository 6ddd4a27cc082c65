"""Which policy a cache has, and which choices exclude each other."""

from kvfold.errors import KvfoldError
from kvfold.runtime.budget.base import Policy
from kvfold.runtime.budget.floor import Floor
from kvfold.runtime.budget.ladder import Ladders
from kvfold.runtime.budget.offload import Offload
from kvfold.runtime.budget.progressive import Progressive
from kvfold.runtime.cache.pager import Pager


def check_choice(has_budget: bool, progressive: bool, offload: bool) -> None:
    """Refuses choices that exclude each other.

    Raises:
        KvfoldError: progressive or offload without a budget, or both.
    """
    if progressive and not has_budget:
        raise KvfoldError(
            "policy='progressive' lowers pages as kv_budget fills, but there is none; give kv_budget='1GiB'."
        )
    if offload and not has_budget:
        raise KvfoldError(
            "offload=True moves pages to host memory as kv_budget fills, but there is none; give kv_budget='1GiB'."
        )
    if offload and progressive:
        raise KvfoldError(
            "offload=True moves pages that stay as they are, but policy='progressive' lowers "
            "them; leave one of them out."
        )


def choose(
    budget: int | None, ladders: Ladders | None = None, pager: Pager | None = None
) -> Policy:
    """The policy of one cache: progressive with `ladders`, offload with `pager`, else floor.

    Raises:
        KvfoldError: the choices exclude each other.
    """
    check_choice(budget is not None, ladders is not None, pager is not None)
    if budget is not None and ladders is not None:
        return Progressive(budget, ladders)
    if budget is not None and pager is not None:
        return Offload(budget, pager)
    return Floor(budget)
