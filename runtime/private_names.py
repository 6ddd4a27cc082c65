"""Every private name of other libraries that kvfold relies on, so that a release which renames one
is told of it by a test (tests/project/test_private_names.py) and not by a user."""

import importlib
import inspect
from typing import NamedTuple

from kvfold.errors import KvfoldError


class PrivateName(NamedTuple):
    """A name that its library promises nothing of.

    Attributes:
        owner: dotted path to the module or class that has it.
        name: an attribute of it; with `in_source`, a word in its source.
        why: what kvfold does with it.
        in_source: the owner only uses it, on objects that others make.
    """

    owner: str
    name: str
    why: str
    in_source: bool = False


GENERATION = "transformers.generation.utils.GenerationMixin"
PRIVATE_NAMES = (
    PrivateName(GENERATION, "_prepare_cache_for_generation", "generate gets a packed cache"),
    PrivateName(
        GENERATION,
        "_update_model_kwargs_for_generation",
        "the mask of the next step need not be read",
    ),
    PrivateName(
        GENERATION, "_get_candidate_generator", "drafts lengthen the 16-bit ring before they come"
    ),
    PrivateName(
        GENERATION, "_is_user_defined", "generate leaves a cache alone that it has not made", True
    ),
    PrivateName(
        "transformers.PreTrainedConfig",
        "_attn_implementation",
        "whether attention is still kvfold's",
    ),
    PrivateName("torch.nn.Module", "_forward_hooks", "a captured step would not call them", True),
    PrivateName(
        "torch.nn.Module", "_forward_pre_hooks", "a captured step would not call them", True
    ),
    PrivateName("torch.nn.Module", "_modules", "hooks are looked for in little time", True),
    PrivateName(
        "torch.nn.Module", "_parameters", "weights that moved are seen in little time", True
    ),
    PrivateName("torch.Tensor", "_version", "whether a mask was written since it was read"),
    PrivateName("torch", "_foreach_copy_", "small numbers reach the device in one copy"),
    PrivateName("torch", "_dynamo", "a failure to compile an operation is no error of a step"),
)

MANAGER = "vllm.v1.core.single_type_kv_cache_manager.SlidingWindowManager"
VLLM_NAMES = (  # asked for where vLLM is installed (tests/serving)
    PrivateName(
        MANAGER, "_remove_blocks_in_range", "blocks between sinks and window are given back"
    ),
    PrivateName(
        MANAGER, "_get_num_evictable_blocks", "blocks of sinks that a hit brings are counted"
    ),
    PrivateName(
        "vllm.v1.kv_cache_spec_registry.KVCacheSpecRegistry",
        "_ensure_registered",
        "vLLM's own specs are registered before ours",
    ),
)


def find(owner: str) -> object:
    """The module or class of a dotted path.

    Raises:
        ImportError, AttributeError: there is none.
    """
    parts = owner.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(owner)


def is_there(name: PrivateName) -> bool:
    """Whether the installed library still has a name."""
    try:
        owner = find(name.owner)
        if name.in_source:
            return name.name in inspect.getsource(owner)  # type: ignore[arg-type]
        return hasattr(owner, name.name)
    except (ImportError, AttributeError):
        return False


def check(owner: str) -> None:
    """Refuses a library that has not the names that kvfold replaces or calls there.

    Raises:
        KvfoldError: one is gone.
    """
    for name in PRIVATE_NAMES:
        if name.owner == owner and not name.in_source and not is_there(name):
            raise KvfoldError(report(name))


def report(name: PrivateName) -> str:
    """The sentence that says what a name's loss means."""
    library = name.owner.partition(".")[0]
    return (
        f"{name.owner} has no '{name.name}' in the installed {library}, by which {name.why}; find "
        "what took its place, or pin "
        f"{library} below this release."
    )
