"""Rivals: small, honest implementations of what a user would pick instead. A new one is a short file and a row here."""

from .base import Rival
from .kivi import KIVI, KIVI32
from .kvarn import KVarN
from .nqkv import NQKV
from .oscar import OSCAR
from .pmkvq import PMKVQ
from .rtn import RTN
from .skvq import SKVQ
from .transformers_cache import HQQ, Quanto
from .turboquant import TurboQuant

RIVALS: dict[str, type[Rival]] = {
    "rtn": RTN,
    "kivi": KIVI,
    "kivi-g32": KIVI32,
    "skvq": SKVQ,
    "pm-kvq": PMKVQ,
    "turboquant": TurboQuant,
    "oscar": OSCAR,
    "kvarn": KVarN,
    "nqkv": NQKV,
    "quanto": Quanto,
    "hqq": HQQ,
}
