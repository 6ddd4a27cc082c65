"""Private names of other libraries: each is listed once, is there, and nothing uses another one."""

import ast
from pathlib import Path

import pytest
from test_layout import FILES, ROOT, parse, relative

from kvfold.errors import KvfoldError
from kvfold.runtime import private_names
from kvfold.runtime.private_names import (
    GENERATION,
    PRIVATE_NAMES,
    VLLM_NAMES,
    PrivateName,
    check,
    is_there,
    report,
)

RUNTIME = [file for file in FILES if relative(file).startswith("runtime/")]
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}  # public by the standard library's word
ACCELERATE = {"_hf_hook"}  # asked for with hasattr, so that nothing depends on it


@pytest.mark.parametrize("name", PRIVATE_NAMES, ids=lambda name: f"{name.owner}.{name.name}")
def test_a_private_name_is_still_there(name):
    assert is_there(name), report(name)


def test_a_name_that_is_gone_is_told_with_what_it_was_for():
    gone = PrivateName(
        "transformers.generation.utils.GenerationMixin",
        "_was_renamed",
        "generate gets a packed cache",
    )
    assert not is_there(gone)
    assert report(gone).startswith(
        "transformers.generation.utils.GenerationMixin has no '_was_renamed'"
    )
    assert "by which generate gets a packed cache" in report(gone) and "pin transformers" in report(
        gone
    )
    assert not is_there(PrivateName("transformers.no_such_module", "_x", "nothing"))
    assert not is_there(
        PrivateName("transformers.generation.utils", "_no_such_word_at_all", "nothing", True)
    )


def test_a_model_is_not_attached_where_a_method_is_gone(monkeypatch):
    gone = PrivateName(GENERATION, "_was_renamed", "generate gets a packed cache")
    monkeypatch.setattr(private_names, "PRIVATE_NAMES", (*PRIVATE_NAMES, gone))
    with pytest.raises(
        KvfoldError,
        match=r"has no '_was_renamed' .*; find what took its place, or pin transformers",
    ):
        check(GENERATION)


def private_names_in(file: Path) -> set[str]:
    """Private attributes that a file reads or writes, and strings that are such names."""
    found = set()
    for node in ast.walk(parse(file)):
        name = (
            node.attr
            if isinstance(node, ast.Attribute)
            else node.value
            if isinstance(node, ast.Constant)
            else ""
        )
        if (
            isinstance(name, str)
            and name.startswith("_")
            and not name.startswith("__")
            and name[1:].isidentifier()
        ):
            found.add(name)
    return found


def own_names() -> set[str]:
    """Private names that the product itself defines: functions, methods, attributes, slots."""
    found = set()
    for file in FILES:
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                found |= {node.attr} if own else set()
    return found


def test_no_other_private_name_is_used():
    listed = {name.name for name in (*PRIVATE_NAMES, *VLLM_NAMES)}
    known = listed | own_names() | NAMED_TUPLE | ACCELERATE
    used = {
        relative(file): private_names_in(file) - known
        for file in RUNTIME
        if file != ROOT / "runtime" / "private_names.py"
    }
    assert {name: names for name, names in used.items() if names} == {}
