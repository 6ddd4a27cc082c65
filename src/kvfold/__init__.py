"""kvfold: checkpoints whose KV cache is small. `from kvfold import runtime; runtime.load_pretrained(path)`."""

from kvfold import autoclass
from kvfold.errors import KVBudgetExceeded, KvfoldError
from kvfold.version import __version__

__all__ = ["KVBudgetExceeded", "KvfoldError", "__version__"]

autoclass.install()
