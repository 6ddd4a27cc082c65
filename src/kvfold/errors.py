"""Errors that a user can cause. The command line prints each as one line and exits with 2."""


class KvfoldError(ValueError):
    """Wrong usage or input. The message is one sentence naming the value, the rule and the fix.

    It is one line, also where it quotes another library's error, which may have many.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(filter(None, map(str.strip, str(message).splitlines()))))


class KVBudgetExceeded(KvfoldError, RuntimeError):
    """The cache would grow past its byte budget. Raised before anything is stored, so the cache
    stays usable."""
