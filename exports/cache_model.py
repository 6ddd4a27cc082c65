"""The part of kv_cache.json that says what the cache of a model is like: `cache`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from kvfold.exports.account import Geometry
from kvfold.kernels.key_mean import RopePairs

# version 5 and cache.heads, where layers have heads of several shapes, cache.shared, where layers read
# others' keys and values, or cache.chunked, where windows are chunks
HEADS_VERSION = 7
NEWEST = "heads", "shared", "chunked"  # fields of the cache that came with it
MOST_TOKENS = 1 << 24  # of sinks, window and rollback, which are allocated whole
MOST_PAGE_TOKENS = 1024
MOST_LAYERS = 1000
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
ITEM_NBYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
RawTokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
PageTokens = Annotated[int, Field(gt=0, le=MOST_PAGE_TOKENS)]


class Strict(BaseModel):
    """No unknown field, no silent conversion, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StatesModel(Strict):
    """States of fixed size that layers of a hybrid model keep of one sequence.

    `elements`: numbers of the type that the model computes in; `dtype`: that type, as the account
    takes it.
    `float32`: numbers that are float32 whatever the model computes in.
    """

    elements: Count
    float32: Count
    dtype: Literal["float64", "float32", "float16", "bfloat16"]

    def nbytes(self, dtype: str | None = None) -> int:
        """Bytes of one sequence's states where the model computes in `dtype`; None for its own."""
        return self.elements * ITEM_NBYTES[dtype or self.dtype] + self.float32 * 4


class CacheModel(Strict):
    """Shape of the model's cache and of its regions, in tokens.

    `sliding`: of each layer, 0 for none; from SLIDING_VERSION on, where one layer slides at least,
    else empty.
    `rope_pairs`: which channels RoPE turns together (kernels/key_mean.py); from PAIRS_VERSION on,
    where they are not the usual ones.
    `rollback`: tokens by which a cache may be cropped as if they had never come, unless a load asks
    for another number; from ROLLBACK_VERSION on, and None, which is 0, before.
    `states`: in STATES_VERSION, of a hybrid model, whose `num_layers` and `layers` are those that
    attend; else absent.
    `heads`: in HEADS_VERSION, [num_kv_heads, head_dim] of each layer where they differ, the first
    layer's being `num_kv_heads` and `head_dim`; else absent.
    `shared`: in HEADS_VERSION, numbers of the layers whose keys and values other layers of the model
    read too, which have none of their own and are not among `num_layers`; absent where there are none.
    `chunked`: in HEADS_VERSION, whether `sliding` has the lengths of chunks, within which a layer's
    queries see all that is not ahead; absent where not.
    """

    num_layers: Layers
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    sinks: RawTokens
    window: RawTokens
    page_tokens: PageTokens
    sliding: list[Count] = Field(default_factory=list)
    rope_pairs: RopePairs = "halves"
    rollback: RawTokens | None = None
    states: StatesModel | None = None
    heads: list[Annotated[list[Positive], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list
    )
    shared: list[Count] = Field(default_factory=list)
    chunked: bool = False

    @model_serializer(mode="wrap")
    def _fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = dump(self)
        if not self.sliding:
            del fields["sliding"]
        if self.rope_pairs == "halves":
            del fields["rope_pairs"]
        if self.rollback is None:
            del fields["rollback"]
        if self.states is None:
            del fields["states"]
        for name in NEWEST:
            if not fields[name]:
                del fields[name]
        return fields

    def heads_of(self, layer: int) -> tuple[int, int]:
        """num_kv_heads and head_dim of a layer."""
        kv_heads, dim = self.heads[layer] if self.heads else (self.num_kv_heads, self.head_dim)
        return kv_heads, dim

    def check_heads(self, version: int) -> None:
        """Raises ValueError if the fields of HEADS_VERSION, the numbers of heads and the artifact's
        format_version don't go together."""
        c = self
        stated = set(NEWEST) & c.model_fields_set
        if bool(stated) != (version == HEADS_VERSION) or not all(
            getattr(c, name) for name in stated
        ):
            raise ValueError(
                f"cache.heads, cache.shared or cache.chunked and format_version {HEADS_VERSION} go together"
            )
        if c.chunked and not any(c.sliding):
            raise ValueError("cache.chunked is of the windows in cache.sliding, but there are none")
        shapes = [tuple(x) for x in c.heads]
        if shapes and (
            len(shapes) != c.num_layers
            or len(set(shapes)) == 1
            or shapes[0] != (c.num_kv_heads, c.head_dim)
        ):
            raise ValueError(
                f"cache.heads must be of each of {c.num_layers} layers, which differ, the first having the "
                f"{c.num_kv_heads} KV heads and the head_dim {c.head_dim} that are stated besides"
            )
        if c.shared != sorted({i for i in c.shared if i < c.num_layers}):
            raise ValueError(
                f"cache.shared must have numbers of some of {c.num_layers} layers, rising"
            )
        if any(c.num_heads % c.heads_of(i)[0] for i in range(c.num_layers)):
            raise ValueError("num_heads is not a multiple of num_kv_heads")

    @property
    def geometry(self) -> Geometry:
        """What the size of the cache depends on besides the formats."""
        c = self
        shape = c.num_kv_heads, c.head_dim, c.sinks, c.window, c.page_tokens
        states = 0 if c.states is None else c.states.nbytes()
        heads = tuple(c.heads_of(i) for i in range(c.num_layers)) if c.heads else ()
        rest = c.rollback or 0, states, heads, tuple(c.shared), c.chunked
        return Geometry(*shape, tuple(c.sliding), *rest)
