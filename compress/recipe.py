"""A recipe: every choice of the pipeline as data. `recipe.yaml` in an artifact is the resolved recipe."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvfold.errors import KvfoldError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyRecipe(_Strict):
    """Keys: the transform, and for "whiten" the mean code bits of the mixed formats to choose from."""

    transform: Literal["none", "smooth", "reorder", "whiten"] = "whiten"
    bits: tuple[float, ...] = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0)
    group_size: Annotated[int, Field(ge=0)] = 0


class ValueRecipe(_Strict):
    """Values: the basis fused into v_proj and o_proj, and the channels that share a scale (0: the whole head)."""

    transform: Literal["none", "reorder", "rotate", "balance"] = "rotate"
    group_size: Annotated[int, Field(ge=0)] = 0


class CalibrationRecipe(_Strict):
    """Calibration text: sequences × tokens. `spread` is the step between positions; 0 covers the budget's context."""

    num_sequences: Annotated[int, Field(gt=0)] = 4
    seq_len: Annotated[int, Field(ge=64)] = 2048
    spread: Annotated[int, Field(ge=0)] = 0
    sample_tokens: Annotated[int, Field(ge=64)] = 512


class SensitivityRecipe(_Strict):
    """Probes: sequences × tokens, and the KL taken at every `stride`-th position."""

    num_sequences: Annotated[int, Field(gt=0)] = 2
    seq_len: Annotated[int, Field(ge=64)] = 1024
    stride: Annotated[int, Field(gt=0)] = 4


class Recipe(_Strict):
    """All choices. Tokens are counted in `sinks`, `window` and `page_tokens`."""

    sinks: Annotated[int, Field(ge=0)] = 5
    window: Annotated[int, Field(ge=0)] = 128
    page_tokens: Annotated[int, Field(gt=0, le=1024)] = 32
    seed: Annotated[int, Field(ge=0)] = 0
    key: KeyRecipe = KeyRecipe()
    value: ValueRecipe = ValueRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    sensitivity: SensitivityRecipe = SensitivityRecipe()

    @field_validator("page_tokens")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % 8:
            raise ValueError("page_tokens must be a multiple of 8")
        return value

    def dump(self) -> str:
        """recipe.yaml's text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(path: Path | None, seed: int | None = None) -> Recipe:
    """Reads a recipe; absent keys keep their defaults, `seed` overrides.

    Raises:
        KvfoldError: no such file, not YAML, an unknown key or a value out of range.
    """
    data: object = {}
    if path is not None:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError:
            raise KvfoldError(f"Recipe '{path}' cannot be read; give the path of a YAML file.") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise KvfoldError(f"Recipe '{path}' is not YAML; see recipe.yaml in any artifact for the form.") from None
    if not isinstance(data, dict):
        raise KvfoldError(f"Recipe '{path}' is not a mapping of options; see recipe.yaml in any artifact for the form.")
    if seed is not None:
        data = {**data, "seed": seed}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise KvfoldError(
            f"Recipe '{path}' is not valid at '{place}': {first['msg']}; see recipe.yaml in any artifact."
        ) from None
