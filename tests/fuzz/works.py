"""Work folders of interrupted runs: --resume ends with the same artifact, to the byte, or refuses
the folder."""

import hashlib
import shutil
from pathlib import Path
from random import Random
from typing import Any

from conftest import TINY_RECIPE, save_tiny

from fuzz.mutate import corrupt, replace_file
from kvfold.compress import search
from kvfold.compress.pipeline import compress
from kvfold.compress.recipe import load_recipe
from kvfold.compress.work import MARK

CHAT = "{% for m in messages %}{{ m.content[:300] }}{% endfor %}"
WORDS = "the cache of a long sequence holds keys and values for every token that was read before "


class Works:
    """Cases from one run that ended just before it would have chosen."""

    name = "work"

    def __init__(self, scratch: Path) -> None:
        self.model = save_tiny(scratch / "model")
        (self.model / "chat_template.jinja").write_text(CHAT)
        self.text, recipe = scratch / "text.txt", scratch / "recipe.yaml"
        self.text.write_text("".join(WORDS[i % 40 :] for i in range(60)))
        recipe.write_text(TINY_RECIPE)
        self.recipe: Any = load_recipe(recipe)
        whole, self.good = scratch / "whole" / "tiny", scratch / "good" / "tiny.work"
        self.compress(whole, resume=False)
        self.sums = sums(whole)
        choose = search.choose
        search.choose = _stop  # type: ignore[assignment]
        try:
            self.compress(self.good.with_name("tiny"), resume=False)
        except Stopped:
            pass
        finally:
            search.choose = choose
        self.names = sorted(p.name for p in self.good.iterdir())
        assert {MARK, "conversations.safetensors", "fisher.json", "stats_002.safetensors"} <= set(
            self.names
        )

    def compress(self, out: Path, resume: bool) -> None:
        compress(
            str(self.model), "4.0", out, calib=str(self.text), recipe=self.recipe, resume=resume
        )

    def make(self, folder: Path, rng: Random) -> tuple[str, None]:
        work = shutil.copytree(self.good, folder / "tiny.work")
        done = []
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            file = work / rng.choice(self.names)
            how = "bytes"
            if not file.is_file() or rng.random() < 0.3:
                how = replace_file(file, rng) if file.is_file() else "gone before"
            else:
                file.write_bytes(corrupt(file.read_bytes(), rng))
            done.append(f"{file.name} {how}")
        return ", ".join(done), None

    def check(self, folder: Path, made: None, rng: Random) -> str:
        out = folder / "tiny"
        self.compress(out, resume=True)
        assert sums(out) == self.sums
        assert [p.name for p in folder.iterdir()] == ["tiny"]
        return "same"


class Stopped(Exception):
    """Where the run ended."""


def _stop(*args: Any, **options: Any) -> None:
    raise Stopped


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file of an artifact."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
