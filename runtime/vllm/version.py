"""Which versions of vLLM the plugin is for.

It replaces functions that vLLM promises nothing of (register.py lists them), and they move between
minor versions. So a version that was not tested is refused, and only when an artifact is loaded.
"""

from kvfold.errors import KvfoldError

LEAST, BELOW = (0, 32), (0, 33)  # tested: 0.32.0


def is_tested(version: str) -> bool:
    """Whether a version of vLLM, as its `__version__` states it, is in the tested range."""
    parts = version.split(".")
    try:
        return LEAST <= (int(parts[0]), int(parts[1])) < BELOW
    except (ValueError, IndexError):
        return False


def check_version(version: str) -> None:
    """Refuses a version that was not tested.

    Raises:
        KvfoldError: naming the range.
    """
    if not is_tested(version):
        least, below = (".".join(map(str, bound)) for bound in (LEAST, BELOW))
        raise KvfoldError(
            f"This is vLLM {version}, but kvfold serves artifacts with vLLM >={least},<{below}; "
            f"run pip install 'vllm>={least},<{below}'."
        )
