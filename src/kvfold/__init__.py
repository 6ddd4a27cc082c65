"""kvfold: checkpoints whose KV cache is small. `from kvfold import runtime;
runtime.load_pretrained(path)`.

Importing it changes nothing in transformers; `kvfold.register()` does, and `kvfold.unregister()`
takes it back.
"""

from kvfold.autoclass import register, unregister
from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.pretrained import stock_from_pretrained
from kvfold.version import __version__

__all__ = [
    "KVBudgetExceeded",
    "KvfoldError",
    "__version__",
    "register",
    "stock_from_pretrained",
    "unregister",
]
