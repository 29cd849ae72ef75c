"""The benchmark's page: its numbers, what it says of losses and gaps, and that it needs nothing."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import geometric_mean, median

import pytest

from rnn_fused.bench import charts, findings, page, plot, words
from rnn_fused.bench.memory import MemoryRow
from rnn_fused.bench.problems import GATES, Problem
from rnn_fused.bench.records import Environment, Row, write_csv

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
COMMITTED = RESULTS / "2026-11-28-zen4-avx2-gru-2-threads.csv"
MEMORY = RESULTS / "2026-11-23-zen4-memory.csv"
VOID = {"meta", "link", "br", "img", "hr", "input"}  # elements without an end

WHERE = Environment(
    "Some CPU", "cpu", "", False, 2, "2.13", "0.1", "3.11", "abc", "2026-01-02T03:04:05+00:00", 0.5
)


def row(provider: str, p50: float, ratio: float | None, **other: object) -> Row:
    values = {
        "section": "grid", "cell": "lstm", "T": 10, "B": 4, "I": 32, "H": 32, "layers": 1,
        "layout": "dense", "dtype": "float32", "pass_": "training", "repeats": 5, "calls": 1,
        "gflops": 8.0 / p50, "us_per_step": p50 * 100, **other,
    }  # fmt: skip
    times = {"p20_ms": p50 * 0.9, "p50_ms": p50, "p80_ms": p50 * 1.1}
    return Row(provider=provider, ratio=ratio, **times, **values)  # type: ignore[arg-type]


def pair(ratio: float, **other: object) -> list[Row]:
    """torch.nn in 1 ms, and ours."""
    return [row("torch.nn", 1.0, 1.0, **other), row("rnn_fused", 1 / ratio, ratio, **other)]


def located(rows: list[Row], where: Environment = WHERE) -> list[tuple[Row, Environment]]:
    return [(r, where) for r in rows]


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str


class Page(HTMLParser):
    """Every element with all the text inside it; elements must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.open: list[Element] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), "")
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def all(self, tag: str, class_: str = "") -> Iterator[Element]:
        for element in self.elements:
            if element.tag == tag and class_ in (element.attributes.get("class") or ""):
                yield element

    @property
    def text(self) -> str:
        return " ".join(next(self.all("main")).text.split())


def written(path: Path, rows: list[tuple[Row, Environment]], **more: object) -> Page:
    pytest.importorskip("matplotlib")
    files = page.write_page(path / "report.html", rows, **more)  # type: ignore[arg-type]
    assert files[0] == path / "report.html"
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])
    return Page(files[0])


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of rows and of memory, both from files that come with the project."""
    pytest.importorskip("matplotlib")
    output = tmp_path_factory.mktemp("page")
    assert page.main([str(COMMITTED), str(MEMORY), "--output", str(output)]) == 0
    names = {file.name for file in output.iterdir()}
    charts = ("ratios", "heat", "steps", "roofline")
    assert names == {"report.html", "2-memory.png", *(f"1-{name}.png" for name in charts)}
    return Page(output / "report.html")


def test_the_page_needs_nothing_from_elsewhere(committed: Page) -> None:
    namespaces = r'xmlns(:\w+)?="http://www\.w3\.org/[^"]*"'
    assert not re.search("https?:|//[a-z]+[.]", re.sub(namespaces, "", committed.source))
    for element in committed.elements:
        assert not element.attributes.get("src")
        for name in ("href", "xlink:href"):
            assert (element.attributes.get(name) or "#").startswith("#")
    assert len(committed.source) < 2e6


def test_identifiers_are_unique_and_references_lead_somewhere(committed: Page) -> None:
    ids = Counter(e.attributes["id"] for e in committed.elements if "id" in e.attributes)
    assert len(ids) > 10
    assert set(ids.values()) == {1}
    wanted = set(re.findall(r'(?:url\(|href=")#([^")]+)', committed.source))
    wanted |= set(re.findall(r'aria-labelledby="([^"]+)"', committed.source))
    assert wanted
    assert wanted <= set(ids)


def test_pictures_say_what_they_show(committed: Page) -> None:
    pictures = list(committed.all("svg"))
    assert len(pictures) == len(list(committed.all("figure"))) > 8
    for picture in pictures:
        assert picture.attributes["role"] == "img"
        assert re.search(r"\d", picture.attributes["aria-label"] or "")


def test_the_summary_is_that_of_the_rows(committed: Page) -> None:
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    onnx: dict[str, list[float]] = defaultdict(list)
    ratio: dict[tuple[str, ...], float] = {}
    with COMMITTED.open() as file:
        lines = list(csv.DictReader(file))
    case = ("cell", "T", "B", "I", "H", "dtype", "pass")
    for line in lines:
        ratio[(line["provider"], *(line[name] for name in case))] = float(line["ratio"])
        if line["provider"] == "rnn_fused":
            ratios[f"{line['dtype']} {line['pass']}"].append(float(line["ratio"]))
    for (provider, *key), theirs in ratio.items():
        if provider == "onnxruntime":
            for ours in ("rnn_fused", "rnn_fused frozen"):
                onnx[ours].append(ratio[(ours, *key)] / theirs)

    cards = {next(iter(card.text.split("\n"))): card.text for card in committed.all("article")}
    assert set(cards) == set(ratios)
    for name, values in ratios.items():
        text = " ".join(cards[name].split())
        lost = sum(value < 1 for value in values)
        assert f"{words.times(geometric_mean(values))} times as fast" in text
        assert f"lost {lost} of {len(values)}" in text.replace("lost", "lost ").replace("  ", " ")
        assert words.times(min(values)) in text
        assert words.times(max(values)) in text
    table = next(t for t in committed.all("table") if "Time of the other over ours" in t.text)
    for ours, values in onnx.items():
        line = re.search(rf"{ours}onnxruntime.*", table.text)
        assert line
        assert words.times(geometric_mean(values)) in line[0]
        assert words.times(min(values)) in line[0]


def test_every_lost_row_is_listed(tmp_path: Path) -> None:
    rows = pair(0.9) + pair(0.999, T=20) + pair(1.0, T=30) + pair(3.0, T=40)
    rows += [row("naive", 0.5, 2.0, T=40)]  # 1.5 times as slow as ours; the frozen one loses
    rows += [row("rnn_fused frozen", 1.0, 1.0, T=40)]
    table = next(written(tmp_path, located(rows)).all("table", "sortable")).text
    assert [*re.findall(r"(0\.\d+)(torch\.nn|naive)(LSTM T=\d+)", table)] == [
        ("0.90", "torch.nn", "LSTM T=10"),
        ("0.999", "torch.nn", "LSTM T=20"),
        ("0.50", "naive", "LSTM T=40"),
    ]


def test_a_slower_library_is_called_slower() -> None:
    rows = pair(0.5) + pair(0.5, dtype="float64")
    assert words.verdict(findings.against_stock(rows)).startswith(
        "rnn_fused is slower than torch.nn in the mean: 0.50 times as fast. "
        "Of 2 rows it wins 0 and loses 2; the worst is 0.50 (LSTM T=10 B=4 H=32,"
    )
    rows += pair(2.0, pass_="inference")
    assert "in the mean of 1 of 3 groups of rows: 0.50 to 2.00 times as fast." in words.verdict(
        findings.against_stock(rows)
    )


def test_standings() -> None:
    rows = pair(4.0) + pair(1.0, T=20) + pair(0.5, T=5, cell="gru") + pair(9.0, layout="packed")
    rows += [row("rnn_fused", 1.0, None, T=99), row("rnn_fused on the CPU", 9.0, 0.1, T=5)]
    dense, packed = findings.against_stock(rows)
    assert (dense.name, packed.name) == ("float32 training", "float32 training, packed")
    assert dense.mean == pytest.approx(2 ** (1 / 3))
    assert {cell.name: cell.mean for cell in dense.cells} == {"LSTM": 2.0, "GRU": 0.5}
    assert [c.ratio for c in dense.ordered] == [0.5, 1.0, 4.0]
    assert [c.ratio for c in dense.lost] == [0.5]
    assert packed.mean == 9.0


def test_one_device_beside_another_is_no_rival() -> None:
    rows = pair(2.0, section="devices")
    rows += [row(f"{p} on the CPU", 10, 0.1, section="devices") for p in ("torch.nn", "rnn_fused")]
    assert findings.against_rivals(rows) == []
    (standing,) = findings.against_stock(rows)
    assert standing.name == "float32 training, devices"
    assert page.panels(findings.Part(rows=rows))["ratios"] == []


def test_heat_map() -> None:
    rows = pair(4.0) + pair(0.25, T=20) + pair(0.9, T=40) + pair(3.0, B=8, H=64, I=64)
    (standing,) = findings.against_stock(rows)
    sizes = findings.by_size(standing.comparisons)
    assert {place: size.mean for place, size in sizes.items()} == pytest.approx(
        {(32, 4): 0.9 ** (1 / 3), (64, 8): 3.0}
    )
    assert [size.steps for size in sizes.values()] == ["3 cases", "T 10"]
    assert [size.lost for size in sizes.values()] == [2, 0]
    assert "4 ratios from 0.25 to 4.00, 2 below 1" in charts.heat_panel(standing).alt


def test_heat_map_shows_its_numbers(tmp_path: Path) -> None:
    rows = pair(4.0) + pair(1.0, T=20) + pair(0.998, H=64)
    picture = next(p for p in written(tmp_path, located(rows)).all("svg") if "H and B" in str(p))
    assert picture.text.split() == ["32", "64", "hidden", "size", "H", "4", "batch", "B",
                                    "2.00", "T", "10,", "20", "0.998", "T", "10"]  # fmt: skip


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize(("layers", "directions"), [(1, 1), (3, 1), (2, 2)])
def test_intensity(cell: str, layers: int, directions: int) -> None:
    """Against a count of torch.nn's own tensors."""
    from rnn_fused.bench.providers import layer_from

    problem = Problem(cell, T=7, B=3, I=5, H=4, layers=layers, directions=directions)
    module = layer_from(__import__("torch").nn, problem)
    weights = sum(p.numel() for p in module.parameters())
    values = 7 * 3 * (5 + layers * directions * 4)
    flops = problem.flops("inference")
    sizes = {"T": 7, "B": 3, "I": 5, "H": 4, "layers": layers, "directions": directions}
    timed = row("rnn_fused", 2.0, 1.0, cell=cell, gflops=flops / 2e6, **sizes)
    trained = replace(timed, gflops=3 * timed.gflops, dtype="bfloat16")
    assert findings.intensity(trained) == pytest.approx(3 * flops / (4 * (weights + values)))
    inferred = replace(timed, pass_="inference")
    assert findings.intensity(inferred) == pytest.approx(flops / (4 * (weights + values)))


def test_roof() -> None:
    shares = [row("rnn_fused", 1.0, 1.0, gflops=g, share=s) for g, s in ((50, 0.5), (90, 1.0))]
    assert findings.roof([*shares, row("rnn_fused", 1.0, 1.0)]) == median([100, 90])
    assert findings.roof([row("rnn_fused", 1.0, 1.0)]) is None


def test_memory_of_both_kinds() -> None:
    rows = [replace(r, peak_mb=mb) for r, mb in zip(pair(2.0), (10.0, 4.0), strict=True)]
    rows += [replace(r, peak_mb=5.0) for r in pair(2.0, T=9)[1:]]  # of which torch.nn's is unknown
    sizes = {"cell": "gru", "T": 1, "B": 2, "I": 3, "H": 3, "layers": 2}
    what = {**sizes, "dtype": "bfloat16", "pass_": "training", "kept_mb": 0.0}
    taken = [
        MemoryRow(provider=p, peak_mb=mb, counted_mb=None, predicted_mb=None, ratio=None, **what)  # type: ignore[arg-type]
        for p, mb in (("torch.nn", 100.0), ("rnn_fused recompute", 20.0))
    ]
    assert findings.memory_bars(findings.Part(rows=rows, memory=taken)) == {
        "float32 training": {"LSTM T=10 B=4 H=32": {"torch.nn": 10.0, "rnn_fused": 4.0}},
        "bfloat16 training": {
            "GRU T=1 B=2 H=3 2 layers": {"torch.nn": 100.0, "rnn_fused recompute": 20.0}
        },
    }


FORECASTER = {
    "losses": {"torch.nn": [4.0, 2.0, 1.0, 3.0], "rnn_fused": [4.0, 1.5, 1.5, 1.2]},
    "seconds": {"torch.nn": [2.0, 2.0, 2.0, 2.0], "rnn_fused": [1.0, 1.5, 1.0, 1.0]},
}


def test_time_to_the_same_loss() -> None:
    found = findings.learning({"forecaster": FORECASTER})
    assert found is not None
    assert found.target == 1.2  # the best of rnn_fused, which torch.nn passes in its third step
    assert found.seconds["rnn_fused"] == [1.0, 2.5, 3.5, 4.5]
    assert (found.reached("torch.nn"), found.reached("rnn_fused")) == (6.0, 4.5)
    assert findings.learning({"forecaster": {"losses": FORECASTER["losses"]}}) is None
    assert findings.learning({}) is None


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    found = written(tmp_path, located(pair(2.0)))
    for sentence in (
        "Nobody but torch.nn was timed.",
        "no roof is drawn",
        "Memory was not measured in this run",
        "No training was timed step by step",
        "No rows of these cells: GRU, RNN (tanh), RNN (ReLU).",
        "No rows of these passes: inference.",
        "Not measured: stacks of layers, bidirectional layers, packed sequences, resets, memory,",
        "Every row that is lost None.",
        "Of 1 rows it wins 1 and loses 0",
    ):
        assert sentence in found.text
    titles = {caption.text for caption in found.all("figcaption")}
    assert titles == {"float32 training", "LSTM, float32 training"}


def test_resets_are_a_group_of_their_own_beside_what_is_compared() -> None:
    """torch.nn runs them by a loop in Python: no row to boast of."""
    with_resets = replace(pair(9.0)[1], section="resets", layout="resets")
    assert findings.group(with_resets) == "float32 training, resets"
    assert with_resets.section not in findings.COMPARED


def test_what_is_there_is_shown(tmp_path: Path) -> None:
    stock, ours = (replace(r, peak_mb=8.0) for r in pair(2.0))
    rows = [stock, replace(ours, share=0.5)]
    rows += [row("naive", 3.0, 1 / 3, directions=2), *pair(2.0, directions=2)]
    content = {
        "grid": {
            "name": "tiny",
            "refused": [{"provider": "jax", "reason": "not installed", "cases": 3}],
            "out_of_time": ["gru T=1", "gru T=2"],
        },
        "failures": ["[rnn_fused] wrong"],
        "forecaster": FORECASTER,
    }
    found = written(tmp_path, located(rows), contents=[(content, WHERE)])
    for sentence in (
        "jax was not timed on 3 cases: not installed.",
        "Out of time: 2 cases, gru T=1 first.",
        "Failed: [rnn_fused] wrong",
        "To a loss of 1.2 torch.nn took 6 s and rnn_fused 4.5 s.",
        "The line is the rate of a large square torch.mm",
        "LSTM, bidirectional",
    ):
        assert sentence in found.text
    assert "Not measured: stacks of layers, packed sequences, resets, a GPU." in found.text
    assert "Memory was not measured" not in found.text
    labels = [svg.attributes["aria-label"] or "" for svg in found.all("svg")]
    assert any("rnn_fused takes 1.00 to 1.00 times torch.nn's" in label for label in labels)
    assert any("torch.nn took 6 s and rnn_fused 4.5 s" in label for label in labels)
    assert any(label.endswith("a large product 32") for label in labels)  # 16 at a share of 0.5
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "ratios.png", "heat.png", "steps.png", "roofline.png", "memory.png", "learning.png"
    }  # fmt: skip


def test_odd_strings_stay_text(tmp_path: Path) -> None:
    odd = "<script>alert('1')</script>&\"$\\x$"
    where = replace(WHERE, processor=odd, commit=odd, torch="2.13 $y_")
    rows = pair(2.0, cell=odd, section=odd) + pair(0.5, dtype=odd)
    rows += [row(odd, 2.0, 0.5, dtype=odd)]
    found = written(tmp_path, located(rows, where), contents=[({"failures": [odd]}, where)])
    assert len(list(found.all("script"))) == 1  # the page's own
    assert odd in next(found.all("h2")).text
    assert f"Failed: {odd}" in found.text
    assert "alert('1')</script" not in found.source


def test_nothing_and_little(tmp_path: Path) -> None:
    assert "There are no rows to show." in written(tmp_path, []).text
    (tmp_path / "one").mkdir()
    alone = written(tmp_path / "one", located([row("rnn_fused", 1.0, None)]))
    assert "No row compares rnn_fused with torch.nn." in alone.text
    assert list((tmp_path / "one").iterdir()) == [tmp_path / "one" / "report.html"]


def test_the_table_of_all_rows() -> None:
    found = words.table([*pair(0.999), row("naive", 0.0123456, None, share=0.25)])
    lines = [dict(zip(found["names"], line, strict=True)) for line in found["rows"]]
    assert [line["ratio"] for line in lines] == ["1.00", "0.999", ""]
    assert lines[2]["p50 ms"] == "0.01235"
    assert [line["share"] for line in lines] == ["", "", "0.25"]
    assert not {"layers", "directions", "layout", "peak MB"} & set(found["names"])
    assert {"layers", "layout"} <= set(words.table(pair(1, layers=2, layout="packed"))["names"])


def test_environments_never_mix() -> None:
    same_day = replace(WHERE, date="2026-01-02T09:00:00+00:00", load=3.0)
    others = [
        replace(WHERE, **change)
        for change in ({"threads": 1}, {"commit": "def"}, {"date": "2026-01-03T00:00:00+00:00"})
    ]
    rows = located(pair(2.0)) + located(pair(3.0, T=20), same_day)
    rows += [found for where in others for found in located(pair(4.0, T=30), where)]
    parts = findings.parts(rows)
    assert sorted(len(part.rows) for part in parts) == [2, 2, 2, 4]
    assert parts[0].runs[0].date > parts[-1].runs[0].date  # the newest first
    # The same case twice: which of the two would a picture show?
    again = findings.parts(located(pair(2.0)) + located(pair(3.0), same_day))
    assert [[r.ratio for r in part.rows] for part in again] == [[1.0, 3.0], [1.0, 2.0]]


def test_folders_are_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = located(pair(2.0))
    write_csv(tmp_path / "rows.csv", rows)
    lines = [
        json.dumps({n.removesuffix("_"): v for n, v in (asdict(r) | asdict(w)).items()}) + "\n"
        for r, w in [*rows, *located(pair(2.0, T=20))]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    (tmp_path / "bench.json").write_text(json.dumps({"environment": asdict(WHERE), "failures": []}))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "memory.csv").write_bytes(MEMORY.read_bytes())
    results = page.read([tmp_path, tmp_path / "rows.jsonl"])
    assert len(results.rows) == 4  # those of the JSON lines
    assert len(results.memory) == 53
    assert [where for _, where in results.contents] == [WHERE]
    assert ["notes.csv" in reason for reason in results.unreadable] == [True]
    (tmp_path / "empty").mkdir()
    output = ["--output", str(tmp_path / "out")]
    assert page.main([str(tmp_path / "empty"), *output]) == 1
    assert page.main([str(tmp_path / "nowhere.csv"), *output]) == 1
    assert "no rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_mean_does_not_round_a_loss_away() -> None:
    assert [words.times(r) for r in (0.994, 0.9951, 0.9999, 1.0, 12.346)] == [
        "0.99", "0.995", "0.9999", "1.00", "12.35"
    ]  # fmt: skip


def test_rivals_may_lack_cases(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = pair(2.0) + pair(0.5, T=20) + [row("naive", 3.0, 1 / 3, T=20)]  # not run at T=10
    path = tmp_path / "ratios.png"
    plot.to_png(path, charts.ratios_chart(findings.against_stock(rows), rows))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert math.isclose(findings.against_rivals(rows)[0].mean, 1.5)
