"""kvfold: checkpoints whose KV cache is small. `from kvfold import runtime; runtime.load_pretrained(path)`."""

from kvfold import autoclass
from kvfold.errors import KVBudgetExceeded, KvfoldError

__version__ = "0.1.0"
__all__ = ["KVBudgetExceeded", "KvfoldError", "__version__"]

autoclass.install()
