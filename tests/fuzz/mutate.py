"""What a seeded generator does to bytes, to JSON, to safetensors files and to a file's place."""

import json
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 8, 16, 64, 127, 1000, 10**7, 2**31, 2**40, 10**12, 2**63 - 1, 2**63, 2**70, 10**30, 0.5, 1.5,
    -0.0, 1e308, float("nan"), float("inf"), True, False, None, "", "x", "0", "4", "none", "scale", "scale_min", "e4m3",
    "llama", "gemma3_text", "mixtral", "nosuch", "a/b", "../../etc/passwd", "A" * 300, "A" * 5000, "\ud800", "\x00",
    "\x1b]0;x\x07", "[/bold]", [], {}, [0], [[8, 4]], [[16, 65536]], ["matrix", "matrix"], {"a": 1},
)  # fmt: skip
TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "U8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F4",
    "NOPE",
    "",
    3,
    None,
)


def corrupt(data: bytes, rng: Random, most: int | None = None) -> bytes:
    """Bytes with something flipped, cut, put in, taken out, or blanked; `most`: places lie before
    that byte."""
    found, size = bytearray(data), min(len(data), most or len(data))
    if not size:
        return b"x"
    place = rng.randrange(size)
    how = rng.choice(
        (
            "flip",
            "flip",
            "flip",
            "flips",
            "cut",
            "empty",
            "insert",
            "delete",
            "blank",
            "append",
            "set",
        )
    )
    if how == "flip":
        found[place] ^= 1 << rng.randrange(8)
    elif how == "flips":
        for _ in range(rng.randrange(2, 40)):
            found[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del found[place:]
    elif how == "empty":
        found.clear()
    elif how == "insert":
        found[place:place] = rng.randbytes(rng.randrange(1, 9))
    elif how == "delete":
        del found[place : place + rng.randrange(1, 9)]
    elif how == "blank":
        found[place : place + 64] = bytes(len(found[place : place + 64]))
    elif how == "append":
        found += rng.randbytes(9)
    else:
        found[place : place + 8] = rng.choice(
            (b"\xff" * 8, struct.pack("<Q", 1 << rng.randrange(64)), bytes(8))
        )
    return bytes(found)


def places(value: Any, place: tuple = ()) -> list[tuple]:
    """Paths of what is in nested lists and dicts, ten deep at the most, without the whole."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    if len(place) == 10:
        return []
    return [path for key, inner in items for path in ((*place, key), *places(inner, (*place, key)))]


def tamper(value: Any, rng: Random) -> str:
    """Changes one place of a JSON object, and says which."""
    path = rng.choice(places(value) or [()])
    if not path:
        return "nothing to change"
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    key, how = (
        path[-1],
        rng.choice(
            ("odd", "odd", "odd", "odd", "near", "delete", "rename", "twice", "deep", "long")
        ),
    )
    if how == "delete":
        del inner[key]
    elif how == "near" and isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
        inner[key] += rng.choice((-8, -1, 1, 8))
    elif how == "rename" and isinstance(inner, dict):
        inner[rng.choice((f"{key}2", "", "auto_map", "\ud800", "0", "9" * 30))] = inner.pop(key)
    elif how == "twice" and isinstance(inner, list):
        inner.insert(key, inner[key])
    elif how == "deep":
        inner[key] = json.loads("[" * 500 + "]" * 500)
    elif how == "long":
        inner[key] = [inner[key]] * 1000
    else:
        inner[key] = rng.choice(ODD)
    return f"{'.'.join(map(str, path))} {how} {str(inner[key] if how == 'odd' else '')[:40]!a}"


def text_bomb(text: str, rng: Random) -> str:
    """A JSON text that is costly or ambiguous to read, in a way that no object of Python could
    write."""
    place = text.find(": ", rng.randrange(max(1, len(text) - 2))) + 2
    return rng.choice((
        lambda: "[" * 100_000,
        lambda: '{"a":' * 100_000 + "1" + "}" * 100_000,
        lambda: text[:place] + "[" * 50_000 + text[place:],
        lambda: text[:place] + "9" * 5000 + "," + text[place:],
        lambda: text[:place] + "1e999999999," + text[place:],
        lambda: text[:place] + "NaN," + text[place:],
        lambda: text.replace("{", '{"files": {},', 1),
        lambda: "\ufeff" + text,
        lambda: text + " {}",
        lambda: text + "\x00",
        lambda: " " * (17 << 20) + text,
    ))()  # fmt: skip


def dump(value: Any) -> bytes:
    """JSON as a careless writer has it: NaN, infinities and halves of surrogate pairs included."""
    return json.dumps(value).encode()


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and the bytes behind it."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(header: Any, body: bytes, size: int | None = None) -> bytes:
    """A safetensors file; `size`: what it says of the header's length."""
    text = dump(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def tamper_tensors(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A safetensors file with another header, or with other numbers in a tensor."""
    header, body = read_header(data)
    name = rng.choice([name for name in header if name != "__metadata__"] or ["__metadata__"])
    entry, size, how = header[name], None, rng.choice(("json", "json", "type", "shape", "rename", "drop", "swap",
                                                       "numbers", "numbers", "size", "bytes", "add"))  # fmt: skip
    if how == "json":
        how = tamper(header, rng)
    elif how == "type":
        entry["dtype"] = rng.choice(TYPES)
    elif how == "shape" and "shape" in entry:
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            ([], [0], [-1], [2**62, 4], [1, *shape], shape[::-1], ["a"], [1.5])
        )
    elif how == "rename":
        header[rng.choice((name + " ", "a\0b", "x" * 300, "\u202e", "layers.99.key.matrix"))] = (
            header.pop(name)
        )
    elif how == "drop":
        del header[name]
    elif how == "swap":
        other = rng.choice(list(header))
        header[name], header[other] = header[other], header[name]
    elif how == "numbers" and body:
        place = rng.randrange(len(body)) // 4 * 4
        number = rng.choice((0.0, -1.0, 2.0, 1e-40, 3e38, float("nan"), float("inf")))
        count = rng.choice((1, 1, 16, 256))
        body = body[:place] + struct.pack("<f", number) * count + body[place + 4 * count :]
        body = body[: len(data)]
    elif how == "size":
        size = rng.choice((0, 1, 2**63, 2**64 - 1, 10**8, len(data)))
    elif how == "add":
        header["more"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += bytes(4)
    else:
        body = corrupt(body, rng)
    return write_header(header, body, size), f"{name[:60]!a} {how}"


def replace_file(file: Path, rng: Random) -> str:
    """Puts something else in a file's place."""
    how = rng.choice(
        ("gone", "folder", "fifo", "zero", "null", "nowhere", "circle", "sparse", "empty")
    )
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "fifo":
        os.mkfifo(file)
    elif how in ("zero", "null", "nowhere"):
        file.symlink_to({"zero": "/dev/zero", "null": "/dev/null", "nowhere": "nowhere"}[how])
    elif how == "circle":
        file.symlink_to(file.name)
    elif how != "gone":
        file.write_bytes(b"")
        if how == "sparse":
            os.truncate(file, 2 << 30)
    return how
