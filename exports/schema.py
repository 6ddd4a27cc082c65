"""kv_cache.json: its fields and the rules they obey. FORMAT.md is this file in prose."""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from kvfold.errors import KvfoldError
from kvfold.exports.account import Geometry
from kvfold.exports.cache_model import (
    HEADS_VERSION,
    CacheModel,
    Count,
    Positive,
    Strict,
)
from kvfold.kernels.formats import Format
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
METADATA_NAME = "kv_cache.json"
TENSORS_NAME = "kv_cache.safetensors"

MOST_SEED = 1 << 63  # seeds are below, as torch takes them
Bits = Annotated[float, Field(ge=0, le=64)]
Loss = Annotated[float, Field(ge=0, le=1e9)]


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
        self.cache.check_heads(self.format_version)
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

    @property
    def geometry(self) -> Geometry:
        return self.cache.geometry

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
