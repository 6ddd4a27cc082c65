"""A backend of its own, in one file: a decoding step in plain torch, which sees what kernels see
and nothing else."""

import ctypes

import torch

from kvfold.kernels import pages
from kvfold.kernels.quantizer import to_float16
from kvfold.runtime.backends.reference import Reference, pack, unpack
from kvfold.runtime.backends.triton import LABELS
from kvfold.runtime.cache.window import slots_of


class PlainSteps(Reference):
    """The reference, with the step of `plain_decode`."""

    reads_masks = False
    reads_addresses = True

    def append_and_attend(self, layer, keys, values, query, scaling, options):
        return plain_decode(layer, keys, values, query, scaling)

    def attend(self, layer, rows, query, scaling, options, mask):
        return Reference.attend(self, layer, rows, query, scaling, options, None)

    write_pages, lower_pages = Reference.write_pages, Reference.lower_pages


def at_address(address, nbytes):
    """The bytes that a block table's entry leads to."""
    start = address * 16 + pages.anchor(torch.device("cpu")).data_ptr()
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(start), dtype=torch.uint8)


_read: dict[tuple, tuple] = {}


def read_page(data, rung, heads, page_tokens):
    """`unpack` of one page; the same bytes are decoded once."""
    key = (bytes(data.numpy()), id(rung), heads, page_tokens)
    if key not in _read:
        if len(_read) > 5000:
            _read.clear()
        _read[key] = rung, unpack(data[None], rung, heads, page_tokens)
    return _read[key][1]


def plain_decode(layer, keys, values, query, scaling):
    """A step of one layer as the kernels do it, reading and writing what lies on the device alone:
    state, tables, segments."""
    g, spec, marked = layer.geometry, layer.spec, layer.marks
    sliding = g.sliding_of(layer.layer_idx)

    def slots(start, end):
        return slots_of(g, torch.arange(start, max(start, end)))

    queries, out = spec.key.apply_query(query), []
    rows = (
        to_float16(spec.key.apply(keys, layer.state[:, :1].long(), g.sinks)),
        to_float16(values.float()),
    )
    for b, (length, count) in enumerate(layer.state.tolist()):
        slot = slots(length, length + 1)
        for label, (raw, row, given) in enumerate(
            zip((layer.raw_keys, layer.raw_values), rows, (keys, values), strict=True)
        ):
            raw[b, :, slot] = row[b]
            if not given[b].isfinite().all():
                marked[b] = min(int(marked[b]), length * LABELS.value + 2 * layer.layer_idx + label)
        if g.num_pages(length + 1) > count:
            rung = layer.rungs[-1 if layer.next_rungs is None else int(layer.next_rungs[b])]
            first = g.sinks + count * g.page_tokens % g.ring
            part = slice(first, first + g.page_tokens)
            data = pack(
                layer.raw_keys[b][:, part], layer.raw_values[b][:, part], rung, g.page_tokens
            )[0]
            at_address(int(layer.block_table[b, count]), len(data)).copy_(data)
            count += 1
        sinks = min(g.sinks, length + 1)
        raw = torch.cat((slots(0, sinks), slots(g.sinks + count * g.page_tokens, length + 1)))
        parts = [(layer.raw_keys[b][:, raw].float(), layer.raw_values[b][:, raw].float())]
        for i in range(
            max(0, length + 1 - sliding - g.sinks) // g.page_tokens if sliding else 0, count
        ):
            rung = 0
            if len(layer.rungs) > 1:
                rung = sum(start <= i for start in layer.segments[b, 1:-1].tolist())
            data = at_address(int(layer.block_table[b, i]), layer.pages.sizes[rung])
            parts.append(read_page(data, layer.rungs[rung], g.num_kv_heads, g.page_tokens))
        k, v = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        k, v = (x.repeat_interleave(queries.shape[1] // len(x), 0) for x in (k, v))
        weights = (queries[b].float() @ k.mT * scaling).softmax(-1)
        out.append(weights @ v)
        layer.state[b] = torch.tensor([length + 1, count])
    return torch.stack(out).to(query.dtype)
