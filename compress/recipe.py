"""A recipe: every choice of the pipeline as data. `recipe.yaml` in an artifact is the resolved
recipe.

Recipes that ship are the YAML files of compress/recipes; a name stands for its file, and absent
keys take the values of `best`. A side that offers a single format is fixed: then nothing is
searched, and the budget only has to be large enough.
"""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kvfold.compress.recipe_yaml import Loader, nearest, refuse_conversion
from kvfold.compress.transforms import KEY_TRANSFORMS, VALUE_TRANSFORMS, Transform
from kvfold.errors import KvfoldError
from kvfold.exports.cache_model import MOST_TOKENS
from kvfold.exports.schema import MOST_SEED
from kvfold.kernels.catalogue import KEY_BITS, VALUE_BITS, key_formats, mixed_between, value_formats
from kvfold.kernels.formats import Format, raw16
from kvfold.kernels.kinds import KINDS, stores
from kvfold.kernels.kinds.levels import PLANE_WIDTHS, RAW

DEFAULT = "best"
LEVELS = (3, 4, 8, 16, 32, 64, 256, RAW)
Text = Literal["recall", "drama", "maths", "prose", "code"]
TEXTS: tuple[Text, ...] = ("recall", "drama", "code", "maths", "prose")  # of the package
MOST_SEQUENCES = 4096  # what is computed of each is held for all of them
MOST_PAIRS = 10_000
MOST_CHOICES = 64  # of a list
DEFAULT_PAIRS = 8  # benchmarks/LOG.md has what fewer and more cost
# tokens, of a window that the budget decides: SKVQ's (2405.06219) and most others'
LEAST_WINDOW = 128
MEAN_FACTORS = (1.0, 0.75, 0.5)
MANY_LEVELS = (64, 256, RAW)  # beyond 5 bits nothing is won by mixing


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: object, info: ValidationInfo) -> object:
        refuse_conversion(value, cls.model_fields[info.field_name or ""].annotation is bool)
        return value


class _Side(_Strict):
    """What keys and values have in common.

    Attributes:
        transform: a name of the side's table in transforms.
        bits: mean code bits of the mixed formats that are offered; only for transforms that have
            some.
        levels: of the formats with one class that are offered; 65536 is 16 bits.
        params: their kinds of code (kernels/kinds/): "scale" (symmetric) or "scale_min"; both may
            be offered.
        param_dtype: type of their parameters; "auto": e4m3 for few levels, fp16 for many, both at
            16 levels.
        group_size: channels that share (minimum, scale); 0, or more than a head has, is the whole
            head.
        clip: search factors on (minimum, maximum).
        without: parts of transform "whiten" that are left out.
    """

    _table: ClassVar[dict[str, Transform]]
    _offered: ClassVar[
        dict[str, tuple]
    ]  # where a transform with mixed formats is asked for without saying what to offer

    transform: str
    bits: (
        Annotated[tuple[Annotated[float, Field(gt=0, le=6)], ...], Field(max_length=MOST_CHOICES)]
        | None
    ) = None
    levels: Annotated[tuple[int, ...], Field(max_length=MOST_CHOICES)] | None = None
    params: Annotated[tuple[str, ...], Field(max_length=MOST_CHOICES)] = ("scale_min",)
    param_dtype: Literal["auto", "e4m3", "fp16"] = "auto"
    group_size: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    clip: bool = True
    without: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _resolved(cls, data: object) -> object:
        """What is offered where the recipe does not say: it depends on the transform."""
        if not isinstance(data, dict):
            return data
        row = cls._table.get(data.get("transform", cls.model_fields["transform"].default))
        offered = (
            cls._offered
            if row is not None and row.mixed is not None
            else {"bits": (), "levels": LEVELS}
        )
        return offered | {name: value for name, value in data.items() if value is not None}

    @field_validator("transform")
    @classmethod
    def _known_transform(cls, value: str) -> str:
        if value not in cls._table:
            raise ValueError(f"transform must be one of {', '.join(cls._table)}")
        return value

    @field_validator("params")
    @classmethod
    def _known_params(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        offered = [name for name, kind in KINDS.items() if not kind.raw]
        if set(value) - set(offered):
            raise ValueError(f"params must be some of {', '.join(offered)}")
        return value

    @field_validator("levels")
    @classmethod
    def _known_levels(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        allowed = sorted(set(PLANE_WIDTHS) - {0})
        if value is not None and set(value) - set(allowed):
            raise ValueError(f"levels must be some of {allowed}")
        return value

    @model_validator(mode="after")
    def _parts(self) -> Self:
        if self.without and self.transform != "whiten":
            raise ValueError(f"without ({', '.join(self.without)}) goes with transform whiten")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.bits and self._table[self.transform].mixed is None:
            raise ValueError(
                f"bits goes with mixed formats, which transform {self.transform} has not"
            )
        if not self.bits and not self.levels:
            raise ValueError("bits and levels are both empty, so there is nothing to choose from")
        return self

    def group(self, head_dim: int) -> int:
        """Channels of a group in a head of head_dim channels; 0 for the whole head."""
        return 0 if self.group_size >= head_dim else self.group_size

    def uniform_formats(self, head_dim: int) -> list[Format]:
        """The formats of one class that are offered, 16 bits last."""
        size = self.group(head_dim)
        found = []
        for levels in sorted(set(self.levels or ()) - {RAW}):
            dtypes = [self.param_dtype] if self.param_dtype != "auto" else _param_dtypes(levels)
            for dtype in dtypes:
                for name in sorted(set(self.params), key=list(KINDS).index):
                    kind = KINDS[name]
                    if stores(name, levels, head_dim):
                        own = size if kind.grouped and size != head_dim else 0
                        found.append(Format(((head_dim, levels),), name, dtype, own))
        return [*found, raw16(head_dim)] if RAW in (self.levels or ()) else found

    def known_formats(self, head_dim: int) -> tuple[Format, ...]:
        """All of the catalogue's formats for this side; empty for a head_dim that it does not
        have."""
        raise NotImplementedError

    def shared_formats(self, head_dim: int) -> tuple[Format, ...]:
        """The catalogue's mixed formats from the least of `bits` to the most; empty where it has
        none."""
        return (
            mixed_between(self.known_formats(head_dim), min(self.bits), max(self.bits))
            if self.bits
            else ()
        )

    def least_format(self, head_dim: int, catalogue: bool = False) -> Format:
        """The smallest format that is offered, or one of the same size; `catalogue`: as in
        Recipe."""
        found = self.uniform_formats(head_dim)
        shared = self.shared_formats(head_dim) if catalogue else ()
        if shared:
            found += shared
        elif self.bits:
            coded = max(8, int(min(self.bits) * head_dim) // 8 * 8)
            whole, rest = divmod(coded, head_dim)
            if whole:  # a bit or more each: any format of that many code bits has the same size
                found.append(Format(((head_dim, {1: 2, 2: 4, 3: 8}.get(whole, 16)),)))
            else:
                found.append(Format(((rest, 2), (head_dim - rest, 0))))
        return min(found, key=lambda f: f.nbytes(32))


def _param_dtypes(levels: int) -> tuple:
    """Few levels can't use a scale of 16 bits, many can't live with 8."""
    return ("e4m3",) if levels < 16 else ("e4m3", "fp16") if levels == 16 else ("fp16",)


class KeyRecipe(_Side):
    """Keys.

    Attributes:
        mean_factors: parts of the rotating mean that may be taken off, of which each head gets the
            one with the least measured loss (search/mean_factors.py); with one, or where
            sensitivities are first-order, all heads get the first.
    """

    _table = KEY_TRANSFORMS
    _offered: ClassVar = {"bits": KEY_BITS, "levels": MANY_LEVELS}

    transform: str = "whiten"
    without: tuple[Literal["metric", "mixing", "attention", "rotation", "offset"], ...] = ()
    mean_factors: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1, max_length=16)
    ] = MEAN_FACTORS

    def known_formats(self, head_dim: int) -> tuple[Format, ...]:
        return key_formats(head_dim)


class ValueRecipe(_Side):
    """Values; their transform is the basis fused into v_proj and o_proj."""

    _table = VALUE_TRANSFORMS
    _offered: ClassVar = {"bits": VALUE_BITS, "levels": LEVELS}

    transform: str = "whiten"
    clip: bool = False
    without: tuple[Literal["attention"], ...] = ()

    def known_formats(self, head_dim: int) -> tuple[Format, ...]:
        return value_formats(head_dim)


class CalibrationRecipe(_Strict):
    """Calibration text.

    Attributes:
        num_sequences, seq_len: sequences and tokens of each.
        texts: the built-in text's documents; sequences, and so probes, are taken from them in turn.
        general: where a text is given, take every second sequence from the built-in text all the
            same, so that a narrow text does not make a cache that is poor at everything else.
        spread: the step between positions; 0 covers the budget's context.
        graded: the sequences' steps rise geometrically from 1 to `spread`, so that short contexts
            count as well as long ones; else every sequence has that step, as in PM-KVQ.
        sample_tokens: tokens kept whole, of all sequences together.
    """

    num_sequences: Annotated[int, Field(gt=0, le=MOST_SEQUENCES)] = 5
    texts: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_CHOICES)] = TEXTS
    general: bool = True
    seq_len: Annotated[int, Field(ge=64, le=MOST_TOKENS)] = 2048
    spread: Annotated[int, Field(ge=0, le=1 << 32)] = 0
    graded: bool = True
    sample_tokens: Annotated[int, Field(ge=64, le=MOST_TOKENS)] = 512


class SensitivityRecipe(_Strict):
    """How a choice's loss is found.

    Attributes:
        method: "kl", measured by a forward pass for each probe (search/sensitivity.py); "fisher",
            the same to second
            order, by backward passes for all probes together (search/fisher.py); "first-order", Σ|g·Δ|
            (search/first_order.py).
        num_sequences, seq_len: of the probes.
        stride: every how many positions the KL is taken.
        directions: backward passes of each sequence, for "fisher".
        probes: formats of a side that are measured.
        conversations: questions about the calibration text, the model's answers to which are probed
            too (conversations.py); where the tokenizer has a chat template.
    """

    method: Literal["kl", "fisher", "first-order"] = "fisher"
    directions: Annotated[int, Field(gt=0, le=256)] = 4
    probes: Annotated[int, Field(gt=0, le=64)] = 2
    num_sequences: Annotated[int, Field(gt=0, le=MOST_SEQUENCES)] = 3
    seq_len: Annotated[int, Field(ge=64, le=MOST_TOKENS)] = 1024
    stride: Annotated[int, Field(gt=0, le=MOST_TOKENS)] = 4
    conversations: Annotated[int, Field(ge=0, le=256)] = 2


class Recipe(_Strict):
    """All choices. Tokens are counted in `sinks`, `window`, `page_tokens` and `rollback`; `tied`: K
    and V of a layer get one format.

    A window of "auto" is as long as an eighth of the budget pays for (plan.py): next words hang on
    the last few hundred tokens most. A rollback of "auto" is a page, or 0 where the budget has no room
    for its 16-bit rows.

    Attributes:
        catalogue: take mixed formats from kernels/catalogue.py, where it has the head_dim, so that
            one set of kernels serves all artifacts; else every layer makes its own cuts.
        pairs: different (key format, value format) pairs that the layers may have together, each of
            which needs kernels of its own; 0 for no limit. It binds where all layers choose from
            the same formats, not where they make their own cuts. With a limit they come from the
            catalogue's list, where a recipe offers all of it.
    """

    sinks: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 64
    window: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | Literal["auto"] = "auto"
    page_tokens: Annotated[int, Field(gt=0, le=1024)] = 32
    rollback: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | Literal["auto"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=MOST_SEED)] = 0
    tied: bool = False
    catalogue: bool = True
    pairs: Annotated[int, Field(ge=0, le=MOST_PAIRS)] = DEFAULT_PAIRS
    key: KeyRecipe = Field(default_factory=lambda: KeyRecipe.model_validate({}))
    value: ValueRecipe = Field(default_factory=lambda: ValueRecipe.model_validate({}))
    calibration: CalibrationRecipe = CalibrationRecipe()
    sensitivity: SensitivityRecipe = SensitivityRecipe()

    @field_validator("page_tokens")
    @classmethod
    def _whole_blocks(cls, value: int) -> int:
        if value % 8:
            raise ValueError("page_tokens must be a multiple of 8")
        return value

    @model_validator(mode="after")
    def _tied_alike(self) -> "Recipe":
        same = all(
            getattr(self.key, x) == getattr(self.value, x)
            for x in ("levels", "params", "param_dtype", "group_size")
        )
        if self.tied and (self.key.bits or self.value.bits or not same):
            raise ValueError(
                "tied needs no bits, and keys with the values' levels, params, param_dtype and group_size"
            )
        return self

    @property
    def least_window(self) -> int:
        """Tokens of the window, or the fewest that it may have."""
        return LEAST_WINDOW if self.window == "auto" else self.window

    @property
    def most_rollback(self) -> int:
        """Tokens of the rollback, or the most that it may have."""
        return self.page_tokens if self.rollback == "auto" else self.rollback

    def dump(self) -> str:
        """recipe.yaml's text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship."""
    return sorted(
        p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml")
    )


def _folder():
    return files("kvfold.compress").joinpath("recipes")


def load_recipe(recipe: str | Path | None = None, seed: int | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        recipe: name of one that ships, or the path of a YAML file; None for the default. Absent
            keys keep their defaults.
        seed: overrides the recipe's.
    Raises:
        KvfoldError: no such recipe, not YAML, an unknown key or a value out of range.
    """
    name = DEFAULT if recipe is None else str(recipe)
    try:
        source = _folder().joinpath(f"{name}.yaml") if name in shipped_recipes() else Path(name)
        data = yaml.load(source.read_text(encoding="utf-8"), Loader)
        data = {} if data is None else data
    except OSError:
        raise KvfoldError(
            f"Recipe '{name}' cannot be read; give {', '.join(shipped_recipes())} or the path of a YAML file."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" (line {mark.line + 1}: {problem})" if mark and problem else ""
        raise KvfoldError(
            f"Recipe '{name}' is not YAML{where}; see recipe.yaml in any artifact for the form."
        ) from None
    if not isinstance(data, dict):
        raise KvfoldError(
            f"Recipe '{name}' is not a mapping of options; see recipe.yaml in any artifact for the form."
        )
    if seed is not None:
        data = {**data, "seed": seed}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            reason = f"there is no such option{nearest(Recipe, first['loc'])}"
        raise KvfoldError(
            f"Recipe '{name}' is not valid at '{place}': {reason}; see recipe.yaml in any artifact."
        ) from None
