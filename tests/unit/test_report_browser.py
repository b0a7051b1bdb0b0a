"""The page of a report in a real browser: nothing to complain of, nothing asked of the network, nothing too wide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from report_runs import out_of_memory, write_run, write_training

from toolkit.records.memory import write_record
from toolkit.report import build_report, report_paths, write_report

PAGES = ("one", "several", "crashed")

# Elements that stick out of the page, but for what scrolls in a place of its own; the page itself must not scroll.
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') || e.matches('.scroll'))
  .filter(e => { const r = e.getBoundingClientRect(); return r.width && (r.right > innerWidth + 1 || r.left < -1) })
  .map(e => e.outerHTML.slice(0, 120))
"""
SMALL_TEXT = """
[...document.querySelectorAll('svg text')].filter(e => e.getClientRects().length)
  .map(e => [parseFloat(getComputedStyle(e).fontSize), e.textContent])
  .filter(([size]) => size < 11)
"""
OVERLAPPING_TICKS = """
[...document.querySelectorAll('svg.chart')].flatMap(chart => ['.up', '.across', 'text.phase'].flatMap(kind => {
  const boxes = [...chart.querySelectorAll(kind)].map(e => e.getBoundingClientRect()).filter(r => r.width);
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right
    && a.top + 2 < b.bottom && b.top + 2 < a.bottom)).map(() => kind) }))
"""

# Heads of columns that take more lines than they have words.
CUT_WORDS = """
[...document.querySelectorAll('thead th')].filter(e => {
  const text = document.createRange(); text.selectNodeContents(e)
  const lines = new Set([...text.getClientRects()].map(r => Math.round(r.top)))
  return lines.size > e.textContent.trim().split(/[\\s-]+/).length
}).map(e => e.textContent)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    if chromium.find() is None:
        pytest.skip("needs Chromium")
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    long = "a-name-that-goes-on-without-a-place-to-break-it-" * 2
    one = write_run(root / "amcs")
    others = [write_run(root / long, "AdamW", steps=300), write_run(root / "soam", "SOAM", ranks=4, seed=1)]
    write_training(root / "loop-only", model="/a/folder/with/a/long/name/" * 3, parameters=5_049_088)
    crashed = write_run(root / "crashed")
    write_record(crashed, "rank1-out-of-memory.json", out_of_memory())
    (crashed / "summary.json").unlink()
    (crashed / "memory" / "predicted.json").write_text("{")
    found = {}
    for name, runs in zip(PAGES, ([one], [one, *others, root / "loop-only"], [crashed]), strict=True):
        paths = report_paths(runs, root / "pages" / name, ["html"])
        write_report(build_report(runs), paths)
        found[name] = paths["html"]
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_clean(
    browser: chromium.Chromium, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    browser.open(pages[name], width=width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [pages[name].resolve().as_uri()]
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate(SMALL_TEXT) == []
    assert browser.evaluate(OVERLAPPING_TICKS) == []
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")


PHASES_WITHOUT_NAME = """
[...document.querySelectorAll('svg.chart')].filter(e => e.querySelector('rect.phase')).map(chart => {
  const shown = [...chart.querySelectorAll('text')].filter(e => e.getClientRects().length)
    .map(e => e.textContent).join(', ').split(', ')
  const phases = [...chart.querySelectorAll('rect.phase title')].map(e => e.textContent)
  return phases.filter(name => !shown.includes(name)) })
"""


@pytest.mark.parametrize("width", [400, 1280])
def test_every_phase_has_its_name(browser: chromium.Chromium, pages: dict[str, Path], width: int) -> None:
    browser.open(pages["one"], width=width, dark=False)
    assert browser.evaluate(PHASES_WITHOUT_NAME) == [[]]


def test_paper_is_light_and_holds_whole_tables(browser: chromium.Chromium, pages: dict[str, Path]) -> None:
    a4 = 673  # pixels between the margins
    browser.open(pages["several"], width=a4, dark=True)
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
    assert browser.evaluate(CUT_WORDS) == []
    for name in ("one", "several"):
        browser.open(pages[name], width=a4, dark=False)
        browser.send("Emulation.setEmulatedMedia", media="print")
        browser.pdf(pages[name].with_suffix(".pdf"))
        assert len(re.findall(rb"/Type\s*/Page[^s]", pages[name].with_suffix(".pdf").read_bytes())) <= 3, name
    # What the dark scheme gives must be taken back, colours of charts included.
    dark = browser.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--weights').trim()")
    browser.open(pages["several"], width=a4, dark=False)
    assert dark == browser.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--weights').trim()")
