"""The entropy-coded form of a layer in a saved cache: raw DEFLATE streams (RFC 1951) of Huffman codes
alone, over bytes that are regrouped so that each table sees numbers of one distribution. zlib finds
the tables. What comes back is the same to the bit.

A stream is sections, one behind the other; zlib begins a new table with each. Of keys and of values,
float16 [num_kv_heads, R, head_dim], they are

    the low bytes of all numbers, then the high bytes          [num_kv_heads, R, head_dim] each

and of pages, for each run of 4096 tokens' pages (the last one shorter), P pages of T tokens, of the
keys, then of the values:

    each class of n channels, B bits a code                    [num_kv_heads, n, P, T / k]
        k = 8 // B codes to a byte: of one channel, of consecutive tokens, the first in the low bits
    each class whose planes hold no bits of codes (ternary)    [num_kv_heads, P, plane bytes]
    each byte of each number of raw 16-bit channels            [num_kv_heads, P, T·head_dim]
    each byte of each parameter                                [num_kv_heads, P, T], in pages' order

Bits of one code that stand in two planes meet again here: only together are they worth less than
they take. Neighbouring tokens are alike in slow channels, so that they share a byte.
"""

import math
import zlib
from collections.abc import Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor

from kvfold.exports.account import Geometry
from kvfold.kernels.formats import Format, Plane

RUN_TOKENS = 4096  # whose pages are regrouped at a time
MOST_RATIO = 8  # a Huffman code has one bit at the least
PIECE = 1 << 16  # bytes that zlib is given at a time: it copies what it leaves over
NAMES = ("keys", "values", "pages")


def code_layer(
    found: Mapping[str, Tensor], geometry: Geometry, formats: tuple[Format, Format]
) -> dict[str, Tensor]:
    """The streams of one layer.

    Args:
        found: `keys` and `values`, float16 [num_kv_heads, R, head_dim]; `pages`, uint8 [pages,
            page_nbytes]; on the CPU.
        geometry: of the layer.
        formats: of its keys and of its values in pages.
    Returns:
        Of each, uint8 [bytes].
    """
    return {
        "keys": deflate(row_sections(found["keys"])),
        "values": deflate(row_sections(found["values"])),
        "pages": deflate(x for _, x in page_sections(found["pages"], geometry, formats)),
    }


def decode_layer(
    stored: Mapping[str, Tensor],
    rows: int,
    pages: int,
    geometry: Geometry,
    formats: tuple[Format, Format],
) -> dict[str, Tensor]:
    """Inverse of `code_layer`. No memory is taken for more than eight times what is stored.

    Args:
        stored: streams by name, uint8 [bytes] each.
        rows, pages: R, and how many pages.
    Raises:
        ValueError: a stream is none, or of other sizes; what is said begins with its name.
    """
    shape = (geometry.num_kv_heads, rows, geometry.head_dim)
    size = geometry.pair_nbytes(*formats)
    streams = {
        name: _Inflate(name, stored[name], nbytes)
        for name, nbytes in zip(NAMES, (2 * math.prod(shape),) * 2 + (pages * size,), strict=True)
    }
    found = {}
    for name in NAMES[:2]:
        found[name] = torch.empty(shape, dtype=torch.float16)
        for part in row_sections(found[name]):
            part.copy_(streams[name].take(part.numel()).view(part.shape))
    found["pages"] = torch.empty(pages, size, dtype=torch.uint8)
    for fmt, part in _sides(found["pages"], geometry, formats):
        for planes, view in _sections(part, fmt, geometry.page_tokens):
            if planes:
                tokens = geometry.page_tokens
                view.copy_(_split(streams["pages"], view, planes, tokens))
            else:
                view.copy_(streams["pages"].take(view.numel()).view(view.shape))
    for stream in streams.values():
        stream.end()
    return found


def row_sections(rows: Tensor) -> Iterator[Tensor]:
    """Views of the low and of the high bytes of float16 numbers [..., n], uint8 [..., n] each."""
    yield from rows.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)


def page_sections(
    pages: Tensor, geometry: Geometry, formats: tuple[Format, Format]
) -> Iterator[tuple[tuple[Plane, ...], Tensor]]:
    """The sections of pages, uint8 [pages, page_nbytes]: planes of codes of a class with the codes,
    uint8 [num_kv_heads, n, P, T / k]; or no planes and other bytes, uint8 [num_kv_heads, P, bytes].
    """
    for fmt, part in _sides(pages, geometry, formats):
        for planes, view in _sections(part, fmt, geometry.page_tokens):
            yield planes, _joined(view, planes, geometry.page_tokens) if planes else view


def _sides(
    pages: Tensor, geometry: Geometry, formats: tuple[Format, Format]
) -> Iterator[tuple[Format, Tensor]]:
    """Keys and values of each run of pages, as views: the format, and uint8 [num_kv_heads, P, bytes
    of a head's block]."""
    key, value = (geometry.page_nbytes(fmt) for fmt in formats)
    for run in pages.split(max(1, RUN_TOKENS // geometry.page_tokens)):
        for fmt, part in zip(formats, run.split((key, value), 1), strict=True):
            yield fmt, part.unflatten(1, (geometry.num_kv_heads, -1)).transpose(0, 1)


def _sections(side: Tensor, fmt: Format, tokens: int) -> Iterator[tuple[tuple[Plane, ...], Tensor]]:
    """The sections of uint8 [num_kv_heads, P, block], as views of it: those of codes with their
    planes, the rest, which are bytes as they lie, without."""
    start = 0
    for _, group in groupby(fmt.planes, lambda plane: plane.start):
        planes = tuple(group)
        size = sum(plane.nbytes(tokens) for plane in planes)
        view, start = side[..., start : start + size], start + size
        if planes[0].storage.binary:
            yield planes, view
        else:
            for byte in view.unflatten(-1, (-1, 2 if fmt.raw else 1)).unbind(-1):
                yield (), byte
    if fmt.num_params:
        shape = (fmt.num_params, tokens, fmt.param_nbytes)
        for param in side[..., start:].unflatten(-1, shape).unbind(-3):
            for byte in param.unbind(-1):
                yield (), byte


def _joined(view: Tensor, planes: tuple[Plane, ...], tokens: int) -> Tensor:
    """Codes of a class from its planes, uint8 [num_kv_heads, P, bytes], k to a byte: uint8
    [num_kv_heads, n, P, T / k]."""
    codes = None
    parts = view.split([plane.nbytes(tokens) for plane in planes], -1)
    for plane, part in zip(planes, parts, strict=True):
        bits = plane.storage.unpack(part, tokens, plane.channels) << plane.shift
        codes = bits if codes is None else codes.bitwise_or_(bits)
    assert codes is not None
    width, count = packing(planes)
    groups = codes.movedim(-1, 1).unflatten(-1, (-1, count)).unbind(-1)
    found = groups[0].clone(memory_format=torch.contiguous_format)
    for place, group in enumerate(groups[1:], 1):
        found |= group << width * place
    return found


def _split(stream: "_Inflate", view: Tensor, planes: tuple[Plane, ...], tokens: int) -> Tensor:
    """Inverse of `_joined`: planes of the shape of `view` from a stream."""
    width, count = packing(planes)
    shape = (view.shape[0], planes[0].channels, view.shape[1], tokens // count)
    joined = stream.take(math.prod(shape)).view(shape)
    mask = 2**width - 1
    codes = torch.stack([(joined >> width * place) & mask for place in range(count)], -1)
    codes = codes.flatten(-2).movedim(1, -1)  # [num_kv_heads, P, T, n]
    return torch.cat(
        [plane.storage.pack((codes >> plane.shift) & (2**plane.width - 1)) for plane in planes], -1
    )


def packing(planes: tuple[Plane, ...]) -> tuple[int, int]:
    """Bits of a code, and how many codes share a byte: 1, 2, 4 or 8."""
    width = sum(plane.width for plane in planes)
    return width, 8 // width


def deflate(sections: Iterator[Tensor]) -> Tensor:
    """One stream, uint8 [bytes], of uint8 sections [...]."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 8, zlib.Z_HUFFMAN_ONLY)
    found = bytearray()
    for section in sections:
        found += coder.compress(section.contiguous().numpy().tobytes())
        found += coder.flush(zlib.Z_BLOCK)  # the next section has a table of its own
    found += coder.flush()
    return torch.frombuffer(found, dtype=torch.uint8)


class _Inflate:
    """Reads a stream, uint8 [bytes], of which it is known that it decodes to `size` bytes."""

    def __init__(self, name: str, stored: Tensor, size: int) -> None:
        self.name, self.size = name, size
        if stored.dtype != torch.uint8 or stored.dim() != 1:
            raise ValueError(f"{name} is no stream of bytes")
        if size > MOST_RATIO * len(stored):
            raise ValueError(
                f"{name} has {len(stored)} bytes for {size}, but a coded byte holds {MOST_RATIO} at the most"
            )
        self.coder = zlib.decompressobj(-15)
        self.pieces = iter(stored.split(PIECE))

    def take(self, count: int) -> Tensor:
        """The next bytes, uint8 [count]."""
        found = bytearray()
        while len(found) < count:
            piece = self.coder.unconsumed_tail or self._piece()
            more = self._decode(piece, count - len(found))
            if not more and (self.coder.eof or not len(piece)):
                raise ValueError(f"{self.name} decodes to fewer than {self.size} bytes")
            found += more
        return (
            torch.frombuffer(found, dtype=torch.uint8)
            if count
            else torch.empty(0, dtype=torch.uint8)
        )

    def end(self) -> None:
        """Checks that nothing is left."""
        while not self.coder.eof:
            piece = self.coder.unconsumed_tail or self._piece()
            if self._decode(piece, 1):
                raise ValueError(f"{self.name} decodes to more than {self.size} bytes")
            if not len(piece) and not self.coder.eof:
                raise ValueError(f"{self.name} has no end")
        if self.coder.unused_data or len(self._piece()):
            raise ValueError(f"{self.name} has bytes behind its end")

    def _piece(self) -> bytes:
        piece = next(self.pieces, None)
        return b"" if piece is None else piece.numpy().tobytes()

    def _decode(self, piece: bytes, most: int) -> bytes:
        try:
            return self.coder.decompress(piece, most)
        except zlib.error as error:
            raise ValueError(f"{self.name} is no stream of DEFLATE ({error})") from None
