"""The files of a report and the command that writes them: all formats say what the data model says."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import PARAMETERS, measurement, out_of_memory, step, write_run, write_training
from typer.testing import CliRunner

from toolkit import cli
from toolkit.records.categories import MEANING
from toolkit.records.memory import LargeTensor, Span, Timeline, measured_name, write_record
from toolkit.report import Report, build_report, render, report_paths, svg
from toolkit.report.data import Peak
from toolkit.report.elements import Chart, Table
from toolkit.report.markdown import to_markdown
from toolkit.report.outline import outline
from toolkit.report.words import number, peak_sentence, signed, size

STYLE = Path(svg.__file__).parent / "templates" / "style.css"
HOSTILE = 'x <script>alert("1")</script> & `|*_ ünï'


@pytest.fixture
def two(tmp_path: Path) -> Report:
    first = write_run(tmp_path / "adamw", "AdamW")
    second = write_run(tmp_path / "amcs", better=0.3)
    write_record(second, "rank1-out-of-memory.json", out_of_memory())
    return build_report([first, second])


def cells(markdown: str, first: str) -> list[list[str]]:
    """Rows of all Markdown tables whose first cell is `first`, unescaped."""
    split = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines()]
    rows = [
        [re.sub(r"\\(.)", r"\1", cell.strip().removeprefix("**").removesuffix("**")) for cell in row] for row in split
    ]
    return [row for row in rows if row and row[0] == first]


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text, tags and table rows."""

    EMPTY = frozenset({"meta", "link", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)
        given = dict(attrs)
        self.links += [given[key] or "" for key in ("href", "src") if key in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()


# Formats


def test_the_json_is_the_data_model(two: Report) -> None:
    assert Report.model_validate_json(render(two, "json")) == two


def test_markdown_and_html_hold_the_numbers_of_the_data_model(two: Report) -> None:
    markdown, page = render(two, "markdown"), Page(render(two, "html"))
    for method in two.methods:
        [row] = [row for row in cells(markdown, method.optimizer or "") if method.run in row]
        assert number(method.loss, 4) in row and number(method.per_parameter) in row
        assert f"{(method.memory or 0) / 1e9:.2f}" in row
        assert row in page.rows
    for run in two.runs:
        for comparison in run.comparisons:
            for pair in [*comparison.categories, comparison.total]:
                row = [pair.name, size(pair.predicted), size(pair.measured), signed(pair.error, 1, " %")]
                assert row in cells(markdown, pair.name) and row in page.rows
        for category in run.per_parameter:
            rows = cells(markdown, category.category)
            assert any(row[1:3] == [number(category.peak_per_parameter, 3), size(category.peak)] for row in rows)
        for block in run.blocks:
            count = run.blocks.count(block)
            times = f"× {count}" if count > 1 else ""
            row = [size(block.bytes), times, block.category, block.what, block.where, block.phase]
            assert row in cells(markdown, size(block.bytes)) and row in page.rows
        for change in run.changes:
            row = [change.change, size(change.saves), size(change.peak)]
            assert row in cells(markdown, change.change) and row in page.rows
        assert run.headline in re.sub(r"\\(.)", r"\1", markdown)
    assert "you tried to allocate 131072000 bytes" in markdown


def test_the_page_needs_nothing_but_itself(two: Report) -> None:
    text = render(two, "html")
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags
    outside = [link for link in page.links if not link.startswith("#") and link != "data:,"]
    assert outside == [] and "url(" not in text and "@import" not in text and "http" not in text
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_bars_come_before_the_table_of_methods_and_all_curves_after_it(two: Report) -> None:
    page = outline(two)
    methods, curves = page.comparison
    kinds = [type(item) for item in methods.items]
    assert kinds.index(Chart) < kinds.index(Table)
    captions = [item.caption.split(" over ")[0] for item in curves.items if isinstance(item, Chart)]
    assert captions[0] == "Training loss"
    assert captions[2:] == ["Learning rate", "Norm of the gradient", "Tokens per second"]


def test_a_summary_on_a_cpu_begins_with_what_the_model_holds(tmp_path: Path) -> None:
    resident = {"weights": 2 * PARAMETERS, "v": PARAMETERS, "other": 5}
    of = {"peak": None, "peak_phase": None, "phases": [], "resident": resident, "timeline": None, "blocks": []}
    write_record(tmp_path / "run", measured_name(0), measurement(ranks=1, level="summary", **of))
    [run] = build_report([tmp_path / "run"]).runs
    assert run.held_by == {"weights": 2 * PARAMETERS, "v": PARAMETERS} and run.held == 3 * PARAMETERS
    assert run.headline.startswith("The model holds 402.32 MB between steps: 3.00 bytes for each of 134,107,392")
    assert "resident set" not in run.headline


def test_ten_tensors_are_seen_and_the_others_unfolded(tmp_path: Path) -> None:
    tensors = [
        LargeTensor(bytes=1000 - number, category="weights", what=f"w{number}", where="", phase="init")
        for number in range(13)
    ]
    write_record(tmp_path / "run", measured_name(0), measurement(ranks=1, blocks=tensors))
    report = build_report([tmp_path / "run"])
    shown, _, folded = render(report, "html").partition("<details>")
    assert [f">w{number}<" in shown for number in range(13)] == [True] * 10 + [False] * 3
    assert "<summary>3 more</summary>" in folded and ">w12<" in folded
    assert "3 more are not shown here." in render(report, "markdown")


def test_every_drawing_is_xml_with_a_title_and_a_description(two: Report) -> None:
    drawings = re.findall(
        r'<svg class="chart.*?</svg>(?=\s*(?:<figcaption>|</figure>))', render(two, "html"), re.DOTALL
    )
    assert len(drawings) > 8
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img" and root.findtext("title") and root.findtext("desc")


def test_names_from_outside_are_text_and_no_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x <script>alert(1)", data=HOSTILE, model=HOSTILE)
    (folder / "memory" / "rank0-out-of-memory.md").write_text(HOSTILE + "\n```\n</pre><script>")
    report = build_report([folder])
    text = render(report, "html")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert ["data", HOSTILE] in page.rows
    markdown = render(report, "markdown")
    prose = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not any(re.search(r"(?<!\\)<", line) for line in prose)
    assert ["data", HOSTILE] in cells(markdown, "data")


# Charts


def test_layers_stack_to_the_total_and_the_peak_is_marked() -> None:
    timeline, _ = step("AMCS", 2)
    drawing = ElementTree.fromstring(svg.timeline(timeline, svg.colours(timeline.held), "title", None))
    layers = [element for element in drawing.iter("polygon")]
    assert len(layers) == sum(any(values) for values in timeline.held.values())
    totals = [sum(values) for values in zip(*timeline.held.values(), strict=True)]
    # The outline of the uppermost layer is the total, upside down and on a scale of its own; a staircase, so that from
    # the second one on every sample has two corners.
    corners = [float(point.split(",")[1]) for point in (layers[-1].get("points") or "").split()]
    top = [corners[0], *corners[2 : 2 * len(totals) - 1 : 2]]
    scale = (1000 - top[0]) / totals[0]
    assert top == pytest.approx([1000 - scale * total for total in totals], abs=0.3)
    assert f"peak {size(max(totals))}" in [element.text for element in drawing.iter("text")]


SIZES = st.integers(0, 10**15)


@given(st.data())
def test_any_consistent_timeline_can_be_drawn(data: st.DataObject) -> None:
    samples = data.draw(st.integers(1, 6))
    names = data.draw(st.sets(st.sampled_from([*MEANING, "v", "<m>"]), min_size=1))
    held = {name: data.draw(st.lists(SIZES, min_size=samples, max_size=samples)) for name in names}
    held["weights"] = [1 + size for size in held.get("weights", [0] * samples)]
    times = sorted(data.draw(st.lists(st.floats(0, 1e6), min_size=samples, max_size=samples)))
    spans = data.draw(st.lists(st.builds(Span, name=st.text(), start=st.integers(-2, 9), stop=st.integers(-2, 9))))
    spans = [Span(name="".join(filter(str.isprintable, span.name)), start=span.start, stop=span.stop) for span in spans]
    timeline = Timeline(milliseconds=data.draw(st.sampled_from([None, times])), spans=spans, held=held)
    predicted = data.draw(st.none() | SIZES)
    ElementTree.fromstring(svg.timeline(timeline, svg.colours(held), "t", predicted))


@given(st.lists(st.none() | st.floats(-1e30, 1e30), max_size=40), st.booleans())
def test_any_curve_can_be_drawn(losses: list[float | None], zero: bool) -> None:
    drawing = svg.lines([svg.Series("loss", range(len(losses)), losses, 0)], "t", "about", zero=zero)
    if any(loss is not None for loss in losses):
        ElementTree.fromstring(drawing)
    else:
        assert drawing == ""


def test_a_long_curve_is_thinned_but_keeps_its_spikes() -> None:
    losses = [1.0] * 20_000
    losses[7_777] = 9.0
    drawing = ElementTree.fromstring(svg.lines([svg.Series("loss", range(20_000), losses, 0)], "t", "about"))
    [line] = drawing.iter("polyline")
    points = [float(point.split(",")[1]) for point in (line.get("points") or "").split()]
    assert len(points) <= 700 and min(points) < 100 and sum(point < 500 for point in points) == 1


def test_every_category_has_a_colour_that_stands_out_in_light_and_dark() -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        darker, lighter = sorted([luminance(one), luminance(other)])
        return (lighter + 0.05) / (darker + 0.05)

    css = STYLE.read_text()
    schemes = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    light, dark = (dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})\b", scheme)) for scheme in schemes)
    states = [f"state {index}" for index in range(8)]
    used = [*svg.colours([*MEANING, *states]).values(), *map(svg.series_colour, range(6))]
    for scheme in (light, dark):
        for colour in used:
            name = colour.removeprefix("var(").removesuffix(")")
            # WCAG 2.2: 3 for graphics, 4.5 for text.
            assert contrast(scheme[name], scheme["--paper"]) >= 3, name
        for name in ("--ink", "--quiet", "--warn", "--link"):
            assert contrast(scheme[name], scheme["--paper"]) >= 4.5, name


# The command


def test_the_command_writes_three_files_and_says_where(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    result = CliRunner().invoke(cli.app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    for name in ("report.html", "report.md", "report.json"):
        assert (folder / name).is_file() and f"written: {folder / name}" in result.stdout
    assert result.stdout.startswith("The peak is 1.38 GB")
    # A report in the folder is no part of the run: a second one is the same.
    before = (folder / "report.json").read_text()
    assert CliRunner().invoke(cli.app, ["report", str(folder)]).exit_code == 0
    assert (folder / "report.json").read_text() == before


def test_formats_and_places(tmp_path: Path) -> None:
    write_training(tmp_path / "run")
    run, out = str(tmp_path / "run"), tmp_path / "new" / "place"
    line = ["report", run, "--out", str(out), "--format", "json", "--format", "markdown"]
    assert CliRunner().invoke(cli.app, line).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]
    page = tmp_path / "page.html"
    assert CliRunner().invoke(cli.app, ["report", run, "--out", str(page)]).exit_code == 0
    assert page.read_text().startswith("<!doctype html>") and not list(Path(run).glob("report.*"))
    assert len(report_paths([tmp_path], None, ["json"])) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no run folder nowhere"),
        (["."], "the folder . holds no run; expected are run.json and metrics.jsonl, or memory/*.json."),
        (["run", "--out", "x.html", "--format", "json"], "--out x.html is a file for html, but --format asks for json"),
        (["run", "--out", "run/run.json/deep"], "the report run/run.json/deep/report.html cannot be written"),
        (["run", "run"], "given twice"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    write_training(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toolkit", "report", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and said in printed.err and printed.err.count("\n") == 1


def test_the_wheel_holds_the_templates(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    line = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(line, cwd=repository, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(next(tmp_path.glob("*.whl")))], capture_output=True, text=True
    ).stdout
    for path in STYLE.parent.iterdir():
        assert f"toolkit/report/templates/{path.name}" in names


def test_the_json_of_a_crashed_run_is_strict(tmp_path: Path) -> None:
    write_training(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text('{"peak_memory_bytes": Infinity}')

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads(render(build_report([tmp_path / "run"]), "json"), parse_constant=refuse)


def test_speed_and_waiting_are_shown_where_the_steps_have_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    older = build_report([folder]).runs[0].training
    assert older is not None and (older.flops_per_s, older.mfu, older.waiting) == (None, None, None)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for index, line in enumerate(lines):
        line |= {"flops_per_s": 2e12 + index, "data_seconds": line["step_time_s"] / 400}
    lines[-1]["mfu"] = 0.375
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = build_report([folder])
    training = report.runs[0].training
    assert training is not None and training.mfu == 0.375 and training.waiting == pytest.approx(1 / 400)
    assert training.flops_per_s == statistics.median(line["flops_per_s"] for line in lines)
    page = to_markdown(report)
    assert "2.00 TFLOP/s of the model's own arithmetic, 37.5% of what the devices can do" in page
    assert "Waiting for data took 0.25% of the steps' time." in page


def test_a_resident_set_is_told_apart_from_what_is_predicted() -> None:
    peak = Peak(bytes=829_000_000, kind="resident set", source="resident set", rank=1)
    assert peak_sentence(peak, None).endswith("829.00 MB on rank 1: the whole process, libraries included.")
    peak.before = 551_000_000
    assert peak_sentence(peak, None).endswith(
        "551.00 MB of it were there before the model; the 278.00 MB since then are the model and its steps, libraries "
        "that load later, and freed memory that the C library keeps."
    )


def test_a_summary_that_is_missing_after_all_steps_is_no_crash(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    [with_it] = build_report([folder]).runs
    (folder / "summary.json").unlink()
    [run] = build_report([folder]).runs
    assert run.training == with_it.training and run.training is not None and run.training.complete
    [said] = [problem.sentence for problem in run.problems if "summary.json" in problem.sentence]
    assert said == (
        f"There is no summary.json, and all {run.training.steps} steps are in metrics.jsonl: what it alone has, such "
        "as which rank is the slowest, is not known."
    )


def test_memory_of_small_models_is_in_a_unit_that_tells_them_apart(two: Report) -> None:
    for largest, unit in ((5e9, "GB"), (5e6, "MB")):
        for place, method in enumerate(two.methods):
            method.memory = int(largest / (1 + place))
        text = to_markdown(two)
        assert [found in text for found in ("Memory (GB)", "Memory (MB)")] == [unit == "GB", unit == "MB"]
        assert "| 5.00 |" in text and "| 2.50 |" in text
