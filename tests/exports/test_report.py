"""report.html: the account's numbers, the same bytes twice, nothing from outside, nothing that a
name can inject."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from kvfold import KvfoldError
from kvfold.compress.cli import main
from kvfold.exports.account import cache_nbytes
from kvfold.exports.page.charts import layer_bars, linear_ticks, loss_points, memory_lines, short
from kvfold.exports.page.report import (
    Result,
    account_parts,
    code_row_nbytes,
    read_results,
    report_html,
    write_report,
)
from kvfold.exports.reader import read_artifact, read_metadata
from kvfold.exports.schema import Metadata
from kvfold.kernels.formats import Format, raw16, uniform

VOID = {"meta"}


class Page(HTMLParser):
    """The elements of a page; fails where tags don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def metadata(tiny_artifact) -> Metadata:
    return read_metadata(tiny_artifact)


def part_bytes(text: str) -> dict[str, int]:
    """Bytes in the page's table of parts."""
    return {
        name: int(n.replace(",", ""))
        for name, n in re.findall(r'data-part="(\w+)">([\d,]+)<', text)
    }


def test_it_is_in_the_artifact_and_not_hashed(tiny_artifact, metadata):
    text = (tiny_artifact / "report.html").read_text(encoding="utf-8")
    assert text == report_html(metadata)
    assert "report.html" not in metadata.files
    assert len(text.encode()) < 400_000


def test_parts_add_up_to_the_account(metadata):
    parts = {name: nbytes for name, _, nbytes in account_parts(metadata)}
    account, geometry = metadata.account, metadata.geometry
    assert (
        sum(parts.values()) == account.bytes == cache_nbytes(geometry, metadata.formats, account.at)
    )
    assert parts["codes"] + parts["params"] + parts["padding"] == account.page_bytes
    raw = [parts[name] for name in ("sinks", "window", "open", "rollback")]
    assert sum(raw) == account.raw_bytes and parts["rollback"] == parts["open"]
    assert parts["tables"] + parts["state"] == account.table_bytes
    assert min(parts.values()) >= 0 and parts["codes"] > parts["params"] > 0
    assert part_bytes(report_html(metadata)) == parts


@pytest.mark.parametrize(
    "fmt, codes",
    [
        (Format(((8, 64), (16, 4), (40, 0)), "scale"), 8 * 6 // 8 + 16 * 2 // 8),
        (uniform(64, 3), 13),
        (uniform(64, 3, group_size=32), 13),
        (uniform(64, 16, "fp16"), 32),
        (raw16(64), 128),
    ],
)
def test_codes_of_a_row(fmt, codes):
    assert code_row_nbytes(fmt) == codes


def test_numbers_of_every_layer_are_the_metadatas(metadata):
    text = report_html(metadata)
    body = text[
        text.index('<table class="sortable">') : text.index(
            "</table>", text.index('<table class="sortable">')
        )
    ]
    rows = body.split("<tr>")[2:]
    assert len(rows) == metadata.cache.num_layers
    for i, (row, layer) in enumerate(zip(rows, metadata.layers, strict=True)):
        values = [float(v) for v in re.findall(r'data-value="([^"]+)"', row)]
        k, v = layer.key, layer.value
        nbytes = sum(
            metadata.geometry.side_nbytes(side.format.build(), metadata.account.at)
            for side in (k, v)
        )
        assert values == [
            i,
            k.payload_bits,
            k.predicted_loss,
            v.payload_bits,
            v.predicted_loss,
            nbytes,
        ]


def test_structure(metadata):
    text = report_html(metadata)
    page = Page(text)
    assert (
        len(page.all("svg")) == 2 * 4 + 1
    )  # each chart for a desktop and for a phone, and the bar
    for attrs in page.all("svg"):
        x, y, width, height = map(float, attrs["viewbox"].split())
        assert (
            (x, y) == (0, 0)
            and width > 0
            and height > 0
            and attrs["role"] == "img"
            and attrs["aria-label"]
        )
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
        for element in ET.fromstring(svg):
            x, y = (float(element.get(name, element.get(f"c{name}", "0"))) for name in "xy")
            assert 0 <= x <= width and 0 <= y <= height, ET.tostring(element)
            assert x + float(element.get("width", "0")) <= width + 0.1
    heads = [attrs for attrs in page.all("th") if attrs.get("scope") == "col"]
    assert len(heads) == len(page.all("button")) == 10
    assert (
        "aria-sort" in text and "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    )


def test_nothing_comes_from_outside(metadata):
    text = report_html(metadata)
    page = Page(text)
    assert not [a for _, a in page.elements if {"src", "href", "srcset"} & a.keys()]
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "://" not in text and "@import" not in text and "url(" not in text


def test_the_same_twice_and_of_the_metadata_alone(metadata, tmp_path):
    assert report_html(metadata) == report_html(Metadata.model_validate(metadata.model_dump()))


def test_names_are_escaped(metadata):
    evil = "</title><script>alert(1)</script>\"'&"
    other = metadata.model_copy(
        update={
            "provenance": metadata.provenance.model_copy(update={"model": evil, "revision": evil}),
            "calibration": metadata.calibration.model_copy(update={"source": evil}),
            "budget": metadata.budget.model_copy(update={"request": evil}),
        }
    )
    rows = [Result(name=evil, payload_bits=2, kl=0.1, text=evil)]
    text = report_html(other, rows)
    page = Page(text)
    assert len(page.all("script")) == 1 and "<script>alert" not in text
    assert "".join(page.text).count(evil) >= 6


def test_a_deep_model_stays_small(metadata):
    layers = 80
    cache = metadata.cache.model_copy(update={"num_layers": layers})
    deep = metadata.model_copy(
        update={"layers": [metadata.layers[i % 3] for i in range(layers)], "cache": cache}
    )
    nbytes = cache_nbytes(deep.geometry, deep.formats, deep.account.at)
    deep = deep.model_copy(update={"account": deep.account.model_copy(update={"bytes": nbytes})})
    text = report_html(
        deep,
        [Result(name=f"row {i}", payload_bits=2 + i / 10, kl=0.1 / (i + 1)) for i in range(40)],
    )
    assert len(text.encode()) < 400_000
    assert sum(part_bytes(text).values()) == nbytes
    Page(text)


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def copy(artifact, tmp_path):
    import shutil

    return shutil.copytree(artifact, tmp_path / "copy")


def test_measured_rows(tmp_path, tiny_artifact, monkeypatch, capsys):
    folder = copy(tiny_artifact, tmp_path)
    ours = write(
        tmp_path / "eval.json",
        {
            "artifact": "tiny",
            "payload_bits": 2.5,
            "kl": 0.02,
            "kl_se": None,
            "text": "t.txt",
            "windows": 2,
            "seq_len": 64,
        },
    )
    others = write(
        tmp_path / "rivals.json",
        [{"name": "int4", "payload_bits": 4.25, "kl": 0.0, "effective_bits": 4.5}],
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["kvfold", "report", str(folder), "--results", str(ours), "--results", str(others)],
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == str(folder / "report.html")
    text = (folder / "report.html").read_text()
    assert (
        '<td class="text">tiny</td><td>2.500</td><td></td><td>0.02</td><td class="text">t.txt (2 × 64)</td>'
        in text
    )
    assert '<td class="text">int4</td><td>4.250</td><td>4.500</td><td>0</td>' in text
    assert (
        text.count('class="dot-kvfold"') == text.count('class="dot-other"') == 2
    )  # a desktop's and a phone's
    assert "2: int4, 0 nats at 4.250 bits" in text
    Page(text)
    read_artifact(folder)  # still valid
    write_report(folder)
    assert (folder / "report.html").read_bytes() == (tiny_artifact / "report.html").read_bytes()


def test_rows_of_a_benchmark_share_its_text(tmp_path):
    rows = [
        {"name": "ours 2", "kind": "artifact", "payload_bits": 2, "kl": 0.1},
        {"name": "b", "payload_bits": 2, "kl": 1},
    ]
    path = write(
        tmp_path / "q.json",
        {"text": "t", "windows": 3, "seq_len": 2048, "model": "m", "rows": rows},
    )
    first, second = read_results(path)
    assert (first.text, first.windows, first.seq_len, first.ours) == ("t", 3, 2048, True)
    assert (second.name, second.text, second.ours) == ("b", "t", False)


@pytest.mark.parametrize(
    "data, fault",
    [
        ("{", "is not JSON"),
        ("[]", "holds no row"),
        ("[1]", "Row 0 .* is not valid"),
        (
            '[{"name": "a", "payload_bits": 2, "kl": 0.1}, {"name": "b", "kl": 0.1}]',
            "Row 1 .*payload_bits",
        ),
        ('{"payload_bits": 2, "kl": 0.1}', "Row 0 .*name"),
        ('{"name": "a", "payload_bits": 2, "kl": -0.1}', "kl"),
        ('{"name": "a", "payload_bits": 2, "kl": NaN}', "kl"),
        ('{"name": "a", "payload_bits": 1e400, "kl": 1}', "payload_bits"),
        (None, "cannot be read"),
    ],
)
def test_bad_results(tmp_path, data, fault):
    path = tmp_path / "rows.json"
    if data is not None:
        path.write_text(data)
    with pytest.raises(KvfoldError, match=fault):
        read_results(path)


def test_a_folder_that_is_no_artifact(tmp_path):
    with pytest.raises(KvfoldError, match=r"holds no kv_cache\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "top, last", [(0, 1), (1e-9, 1e-9), (0.00031, 0.0004), (5.9, 6), (6, 6), (6.01, 8), (97, 100)]
)
def test_ticks_reach_the_top(top, last):
    ticks = linear_ticks(top)
    assert ticks[0] == 0 and ticks[-1] == pytest.approx(last) and 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    "value, label", [(0, "0"), (2, "2"), (0.0002, "0.0002"), (1e-6, "1e-6"), (0.001, "0.001")]
)
def test_short_numbers(value, label):
    assert short(value) == label


def test_bars_are_as_high_as_their_values():
    chart = layer_bars(340, {"K": [1.0, 4.0], "V": [2.0, 0.0]}, ["a", "b"], stacked=False)
    heights = {(m.series, m.tip): m.height for m in chart.marks}
    assert heights["K", "b"] == pytest.approx(4 * heights["K", "a"], abs=0.2)
    assert heights["V", "b"] == 0 and heights["V", "a"] == pytest.approx(
        2 * heights["K", "a"], abs=0.2
    )
    assert {m.y + m.height for m in chart.marks} == {chart.height - chart.bottom}
    stacked = layer_bars(340, {"K": [1.0], "V": [3.0]}, ["a"], stacked=True).marks
    assert stacked[1].y + stacked[1].height == pytest.approx(stacked[0].y, abs=0.11)


def test_points_stand_where_their_values_are():
    low, high = loss_points(340, [("a", 2.0, 0.01, "1", ""), ("b", 4.0, 0.1, "2", "")]).marks
    assert high.y < low.y and high.x > low.x
    zero = loss_points(340, [("a", 2.0, 0.0, "1", "")]).marks[0]
    assert zero.y == 240 - 34
    chart = memory_lines(
        340, {"a": [(512, 1024), (1024, 2048)], "b": [(512, 4096), (1024, 8192)]}, (1024, 2048)
    )
    assert chart.marks[-1].series == "budget" and (chart.marks[-1].x, chart.marks[-1].y) == (
        326,
        chart.marks[1].y,
    )
    rise = [chart.marks[i].y - chart.marks[i + 1].y for i in (0, 2)]
    assert rise[0] == pytest.approx(
        rise[1], abs=0.11
    )  # a doubling is the same height on both lines
