"""The report in a real browser: Debian's Chromium, driven by Playwright; without network, from disk."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from studies import make_study, warn, write_profile, write_traces
from test_report import Runner, hostile_study, report  # noqa: F401  (a fixture)

from normbench.report import __main__ as door

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and not os.environ.get("CI"):
    pytest.skip("Debian's chromium is not installed", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api") if not os.environ.get("CI") else None
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
VISIBLE = """() => [...document.querySelectorAll("figure")].map((figure) => {
  const shown = [...figure.querySelectorAll("svg")].filter((svg) => svg.getClientRects().length);
  const box = shown.length ? shown[0].getBoundingClientRect() : { width: 0, height: 0 };
  return [shown.length, box.width, box.height, shown.length ? shown[0].getAttribute("aria-label") : ""];
})"""
OVERLAPS = """() => [...document.querySelectorAll("figure")].flatMap((figure) => {
  const svg = [...figure.querySelectorAll("svg")].find((each) => each.getClientRects().length);
  const boxed = (each) => [each.textContent, each.getBoundingClientRect()];
  const texts = [...svg.querySelectorAll("text")].map(boxed);
  const around = [...figure.querySelectorAll("h3, figcaption")].map(boxed);
  const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  return texts.flatMap(([text, a], i) => [...texts.slice(i + 1), ...around]
    .filter(([, b]) => over(a, b)).map(([other]) => [figure.id, text, other]));
})"""
COLOURS = """() => [...document.body.innerHTML.matchAll(/var[(](--c[0-9a-f]{6})[)]/g)]
  .map((found) => found[1])
  .filter((name) => !getComputedStyle(document.documentElement).getPropertyValue(name))"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
CELLS = """(column) => [...document.querySelector("#comparison table").tBodies[0].rows]
  .map((row) => row.cells[column].textContent.trim())"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "CI needs Debian's chromium: .ci/run installs it"
    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study with everything in it."""
    arms = {"obn": 0, "mbn-stride2": 0.0005, "gn": -0.01}
    study = make_study(tmp_path_factory.mktemp("full"), arms, 10, question="Is it so?")
    for session in study.glob("*/s0"):
        write_traces(session)
    warn(next(study.glob("gn-*/s0")), "never moved: layer1.gate")
    write_profile(study / "profile" / "one", list(arms), layers=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", str(study), "--margin", "test_acc=0.005"])
        door.main()
    return study / "report.html"


def opened(browser: Browser, file: Path, width: int = 1440, scheme: str = "light") -> tuple[Page, list[str]]:
    """The page as a person opens it from disk, and everything that it should not do."""
    wrongs: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    page.on("console", lambda message: wrongs.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: wrongs.append(str(error)))
    page.on("dialog", lambda dialog: (wrongs.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: request.url == file.as_uri() or wrongs.append(request.url)
            if not request.url.startswith("data:") else None)  # fmt: skip
    page.goto(file.as_uri())
    return page, wrongs


@pytest.mark.slow
def test_a_browser_shows_all_of_it(browser: Browser, full: Path) -> None:
    for width in (390, 1440):
        page, wrongs = opened(browser, full, width)
        assert page.evaluate(OVERFLOW) <= 0
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        figures = page.evaluate(VISIBLE)
        assert len(figures) >= 20 and page.evaluate(OVERLAPS) == page.evaluate(COLOURS) == []
        for shown, wide, high, alt in figures:
            assert shown == 1 and 200 < wide <= width and high > 100 and len(alt) > 20
        assert page.evaluate(OVERFLOW) <= 0 and wrongs == []
        page.close()


@pytest.mark.slow
def test_tables_sort_by_pointer_and_keyboard(browser: Browser, full: Path) -> None:
    page, wrongs = opened(browser, full)
    heads = page.locator("#comparison table").first.locator("th")
    named = {heads.nth(i).inner_text().strip(" ↕↑↓"): i for i in range(heads.count())}
    mean = heads.nth(named["mean"])
    assert page.evaluate(CELLS, 0) == ["obn", "gn", "mbn-stride2"] and mean.get_attribute("aria-sort") is None
    mean.locator("button").click()
    up = [float(text) for text in page.evaluate(CELLS, named["mean"])]
    assert up == sorted(up) and mean.get_attribute("aria-sort") == "ascending"
    mean.locator("button").press("Enter")
    down = [float(text) for text in page.evaluate(CELLS, named["mean"])]
    assert down == up[::-1] and mean.get_attribute("aria-sort") == "descending"
    heads.nth(named["diff"]).locator("button").click()  # the baseline has none, and stays last
    assert page.evaluate(CELLS, 0) == ["gn", "mbn-stride2", "obn"]
    assert mean.get_attribute("aria-sort") is None and wrongs == []
    page.close()


@pytest.mark.slow
def test_every_kind_of_cell_has_its_place(browser: Browser, full: Path) -> None:
    page, _ = opened(browser, full)
    sorted_ = """(cells) => {
      const table = document.querySelector("#comparison table"), body = table.tBodies[0];
      const row = body.rows[0].cloneNode(true);
      body.replaceChildren(...cells.map((text) => {
        const made = row.cloneNode(true);
        made.cells[1].textContent = text;
        return made;
      }));
      table.tHead.rows[0].cells[1].removeAttribute("aria-sort");
      table.tHead.rows[0].cells[1].querySelector("button").click();
      return [...body.rows].map((row) => row.cells[1].textContent);
    }"""
    for order in (["−0.2", "-0.01", "<1e-6", "1e-06", "+0.3", "12", "1,234", "not comparable", ""],
                  ["-0.2 to +0.9", "-0.1 to +0.1", "+0.0 to +0.1"],
                  ["45 s", "12 min", "3 h 20 min", "2 d 4 h", "?"],
                  ["2026-11-09T10:00:00Z", "2026-11-21T09:00:00Z"], ["4x8x8", "4x16x8"],
                  ["2x-arm", "10x-arm", "gn", "obn"]):  # fmt: skip
        assert page.evaluate(sorted_, order[::-1]) == order
    page.close()


@pytest.mark.slow
def test_dark_light_and_print(browser: Browser, full: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page, _ = opened(browser, full, scheme=scheme)
        ink = "getComputedStyle(document.querySelector('figure svg.wide text')).fill"
        seen[scheme] = (page.evaluate("getComputedStyle(document.body).backgroundColor"), page.evaluate(ink))
        if scheme == "dark":
            page.emulate_media(media="print", color_scheme="dark")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            assert page.locator("nav").is_hidden()
            page.set_viewport_size({"width": 680, "height": 900})  # A4 within its margins
            page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            assert page.evaluate(OVERFLOW) <= 0
            page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = false; })")
            assert page.pdf(format="A4").startswith(b"%PDF")
            assert page.evaluate("[...document.querySelectorAll('details')].every((each) => each.open)")
        page.close()
    assert seen["light"][0] != seen["dark"][0] and seen["light"][1] != seen["dark"][1]


@pytest.mark.slow
def test_hostile_names_do_nothing_in_a_browser(browser: Browser, report: Runner) -> None:  # noqa: F811
    study = hostile_study()
    report(study, "--metric", "test_acc")
    for width in (390, 1440):
        page, wrongs = opened(browser, (study / "report.html").resolve(), width)
        assert wrongs == [] and page.locator("img").count() == 0 and page.locator("script").count() == 1
        assert "<script>alert" in page.locator("h1").inner_text()
        assert "onerror" in page.locator("#comparison").inner_text() and page.evaluate(OVERFLOW) <= 0
        page.close()


@pytest.mark.slow
def test_only_a_watched_page_loads_itself_anew(browser: Browser, full: Path) -> None:
    text, file = full.read_text(), Path("report.html").resolve()
    file.write_text(text.replace('<html lang="en">', '<html lang="en" data-reload="0.2">'))
    page, wrongs = opened(browser, file)
    file.write_text(text.replace("Is it so?", "It is so."))
    page.locator("h1", has_text="It is so.").wait_for(timeout=20_000)  # the page allows no eval
    page.evaluate("window.kept = true")
    page.wait_for_timeout(600)
    assert page.evaluate("window.kept") and wrongs == []
    page.close()
