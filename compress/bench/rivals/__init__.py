"""Rivals: small, honest implementations of what a user would pick instead. A new one is a short
file and a row here."""

from kvfold.compress.bench.rivals.base import Rival
from kvfold.compress.bench.rivals.kivi import KIVI, KIVI32
from kvfold.compress.bench.rivals.kvarn import KVarN
from kvfold.compress.bench.rivals.nqkv import NQKV
from kvfold.compress.bench.rivals.oscar import OSCAR
from kvfold.compress.bench.rivals.pmkvq import PMKVQ
from kvfold.compress.bench.rivals.rtn import RTN
from kvfold.compress.bench.rivals.skvq import SKVQ
from kvfold.compress.bench.rivals.transformers_cache import HQQ, Quanto
from kvfold.compress.bench.rivals.turboquant import TurboQuant

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
