"""kv_cache.json: its fields and the rules they obey. FORMAT.md is this file in prose."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.kernels.formats import Format
from kvfold.kernels.key_mean import RopePairs
from kvfold.kernels.kinds import known
from kvfold.kernels.kinds.storage import FIELDS

FORMAT_VERSION = 1  # of an artifact without sliding-window layers; read, no longer written
SLIDING_VERSION = 2  # the same and cache.sliding; read, no longer written
MEAN_VERSION = (
    3  # a rotating mean of keys: `frequencies` beside `offset`; cache.sliding where a layer slides
)
PAIRS_VERSION = (
    4  # the same and cache.rope_pairs, where RoPE turns other pairs of channels than (i, i + n/2)
)
ROLLBACK_VERSION = 5  # cache.rollback, and cache.rope_pairs where RoPE turns other pairs
STATES_VERSION = 6  # the same and cache.states, of hybrid models alone: all others stay at 5
# version 5 and cache.heads, where layers have heads of several shapes, or cache.shared, where layers
# read others' keys and values
HEADS_VERSION = 7
METADATA_NAME = "kv_cache.json"
TENSORS_NAME = "kv_cache.safetensors"

MOST_TOKENS = 1 << 24  # of sinks, window and rollback, which are allocated whole
MOST_PAGE_TOKENS = 1024
MOST_LAYERS = 1000
MOST_SEED = 1 << 63  # seeds are below, as torch takes them
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
ITEM_NBYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
Layers = Annotated[int, Field(gt=0, le=MOST_LAYERS)]
RawTokens = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
PageTokens = Annotated[int, Field(gt=0, le=MOST_PAGE_TOKENS)]
Bits = Annotated[float, Field(ge=0, le=64)]
Loss = Annotated[float, Field(ge=0, le=1e9)]


class Strict(BaseModel):
    """No unknown field, no silent conversion, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FormatModel(Strict):
    """kernels.formats.Format as data."""

    classes: list[list[int]]
    params: Annotated[str, AfterValidator(known)]
    param_dtype: Literal["e4m3", "fp16"]
    group_size: Count

    def build(self) -> Format:
        return Format.from_dict(self.model_dump())


class SideModel(Strict):
    """Keys or values of one layer."""

    format: FormatModel
    transforms: list[str]
    tensors: list[Literal["matrix", "offset", "clip", "frequencies"]]
    payload_bits: Bits
    predicted_loss: Loss


class LayerModel(Strict):
    key: SideModel
    value: SideModel


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
        for name in ("heads", "shared"):
            if not fields[name]:
                del fields[name]
        return fields

    def heads_of(self, layer: int) -> tuple[int, int]:
        """num_kv_heads and head_dim of a layer."""
        kv_heads, dim = self.heads[layer] if self.heads else (self.num_kv_heads, self.head_dim)
        return kv_heads, dim


class AccountModel(Strict):
    """Bytes of one sequence of `at` tokens, everything resident counted (exports/account.py);
    `bytes_at`: of other lengths."""

    at: Positive
    bytes: Positive
    bytes_16bit: Positive
    page_bytes: Count
    raw_bytes: Count
    table_bytes: Count
    bytes_at: Annotated[dict[str, Positive], Field(max_length=64)]
    effective_bits: Loss  # of a short sequence, hundreds: the 16-bit rows are allocated whole
    payload_bits: Bits


class BudgetModel(Strict):
    request: str
    at: Positive
    bytes: Positive


class CalibrationModel(Strict):
    source: str
    num_sequences: Positive
    seq_len: Positive
    seed: Count
    spread: Positive
    covered_positions: Positive
    kl: Loss


class ProvenanceModel(Strict):
    model: str
    revision: str | None
    libraries: dict[str, str]
    rounding_kl: Loss
    fused_dtype: str


class Metadata(Strict):
    """The whole of kv_cache.json."""

    format_version: int
    cache: CacheModel
    layers: list[LayerModel]
    budget: BudgetModel
    account: AccountModel
    calibration: CalibrationModel
    provenance: ProvenanceModel
    files: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> "Metadata":
        if len(self.layers) != self.cache.num_layers:
            raise ValueError(
                f"{len(self.layers)} layers are listed, but num_layers is {self.cache.num_layers}"
            )
        if not all(
            n.isascii() and n.isdecimal() and len(n) < 19 and int(n) > 0
            for n in self.account.bytes_at
        ):
            raise ValueError("account.bytes_at has a key that is no number of tokens")
        if self.cache.page_tokens % FIELDS:
            raise ValueError(
                f"page_tokens is {self.cache.page_tokens}, but a page is a multiple of {FIELDS} tokens"
            )
        if self.format_version == FORMAT_VERSION and "sliding" in self.cache.model_fields_set:
            raise ValueError(f"cache.sliding is no field of format_version {FORMAT_VERSION}")
        if self.format_version == SLIDING_VERSION and (
            len(self.cache.sliding) != self.cache.num_layers or not any(self.cache.sliding)
        ):
            raise ValueError(
                f"format_version {SLIDING_VERSION} needs cache.sliding, "
                f"one window for each of {self.cache.num_layers} layers"
            )
        if (
            self.format_version >= MEAN_VERSION
            and self.cache.sliding
            and (len(self.cache.sliding) != self.cache.num_layers or not any(self.cache.sliding))
        ):
            raise ValueError(
                f"cache.sliding needs one window for each of {self.cache.num_layers} layers, or must be absent"
            )
        stated = "rope_pairs" in self.cache.model_fields_set
        usual = self.cache.rope_pairs == "halves"
        if (
            (self.format_version == PAIRS_VERSION and usual)
            or (self.format_version < PAIRS_VERSION and stated)
            or (stated and usual)
        ):
            raise ValueError(
                f"cache.rope_pairs, adjacent or swapped, goes with format_version {PAIRS_VERSION}, which needs it, "
                f"and {ROLLBACK_VERSION}"
            )
        if self.format_version < ROLLBACK_VERSION and "rollback" in self.cache.model_fields_set:
            raise ValueError(f"cache.rollback goes with format_version {ROLLBACK_VERSION}")
        stated = "states" in self.cache.model_fields_set
        if stated != (self.format_version == STATES_VERSION) or (stated and not self.cache.states):
            raise ValueError(f"cache.states and format_version {STATES_VERSION} go together")
        if self.cache.states is not None and self.cache.rollback:
            raise ValueError(
                "cache.rollback must be 0 where cache.states is, for no state goes back"
            )
        if self.format_version >= ROLLBACK_VERSION and self.cache.rollback is None:
            raise ValueError(
                f"format_version {self.format_version} needs cache.rollback, a number of tokens"
            )
        if self.format_version < MEAN_VERSION and any(
            "frequencies" in layer.key.tensors for layer in self.layers
        ):
            raise ValueError(f"frequencies of keys go with format_version {MEAN_VERSION}")
        self._check_heads()
        for i, layer in enumerate(self.layers):
            if "frequencies" in layer.key.tensors and "offset" not in layer.key.tensors:
                raise ValueError(
                    f"layer {i}: frequencies turn the offset of the keys, but there is none"
                )
            if set(layer.value.tensors) - {"clip"}:
                raise ValueError(
                    f"layer {i}: values have a clip at the most, their basis is in the weights"
                )
            for side in (layer.key, layer.value):
                if len(set(side.tensors)) != len(side.tensors):
                    raise ValueError(f"layer {i}: a tensor is listed twice")
                fmt = side.format.build()
                if fmt.head_dim != (dim := self.cache.heads_of(i)[1]):
                    raise ValueError(
                        f"layer {i}: a format covers {fmt.head_dim} channels, but head_dim is {dim}"
                    )
                if abs(fmt.payload_bits - side.payload_bits) > 1e-9:
                    raise ValueError(
                        f"layer {i}: payload_bits {side.payload_bits} does not fit its format ({fmt.payload_bits})"
                    )
        return self

    def _check_heads(self) -> None:
        """Raises ValueError if `heads`, `shared` and the numbers of heads don't go together."""
        c = self.cache
        stated = {"heads", "shared"} & c.model_fields_set
        if bool(stated) != (self.format_version == HEADS_VERSION) or not all(
            getattr(c, name) for name in stated
        ):
            raise ValueError(
                f"cache.heads or cache.shared and format_version {HEADS_VERSION} go together"
            )
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
        c = self.cache
        shape = c.num_kv_heads, c.head_dim, c.sinks, c.window, c.page_tokens
        states = 0 if c.states is None else c.states.nbytes()
        heads = tuple(c.heads_of(i) for i in range(c.num_layers)) if c.heads else ()
        rollback = c.rollback or 0
        return Geometry(*shape, tuple(c.sliding), rollback, states, heads, tuple(c.shared))

    @property
    def formats(self) -> list[tuple[Format, Format]]:
        return [(layer.key.format.build(), layer.value.format.build()) for layer in self.layers]

    @property
    def digest(self) -> str:
        """What kv_cache.json states as its digest: it names the artifact, all files included."""
        return _digest(self.model_dump())


def _digest(body: dict) -> str:
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def dump_metadata(metadata: Metadata) -> str:
    """kv_cache.json's text: the fields in order, and their digest last, so that a flipped byte
    anywhere shows."""
    body = metadata.model_dump()
    return json.dumps({**body, "digest": _digest(body)}, indent=1, ensure_ascii=False) + "\n"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"it states '{next(name for name in found if names.count(name) > 1)}' twice"
        )
    return found


def parse_metadata(text: str, name: str = METADATA_NAME) -> Metadata:
    """Reads kv_cache.json.

    Raises:
        KvfoldError: not JSON, another format_version, an unknown or missing field, a value out of
            range, a wrong digest.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
        json.dumps(
            data, ensure_ascii=False
        ).encode()  # half of a surrogate pair is no text: nothing could print it
    except (ValueError, RecursionError) as error:
        raise KvfoldError(
            f"{name} is not JSON ({error}); the artifact is damaged, write or download it again."
        ) from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if version not in range(FORMAT_VERSION, HEADS_VERSION + 1):
        raise KvfoldError(
            f"{name} has format_version {version!r}, but this kvfold reads {FORMAT_VERSION} to {HEADS_VERSION}; use "
            "the kvfold that wrote it."
        )
    digest = data.pop("digest", None)
    try:
        metadata = Metadata.model_validate(data)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise KvfoldError(
            f"{name} is not valid at {place}: {first['msg']}; write or download the artifact again."
        ) from None
    if digest != metadata.digest:
        raise KvfoldError(
            f"{name} does not match its own digest; the artifact is damaged, write or download it again."
        )
    return metadata
