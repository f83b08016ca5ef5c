"""The report in a real browser: what is seen, what the keyboard reaches, what a screen reader is told, what prints."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import browser

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome here; `apt-get install chromium`")
TAB, ENTER = ("Tab", 9), ("Enter", 13)
MOST_STOPS = 120


@pytest.fixture(scope="module")
def page(tmp_path_factory, report: Path):
    found = browser.Browser(PROGRAM, tmp_path_factory.mktemp("browser") / "profile")
    found.open(report)
    yield found
    found.close()


def seen(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("L"), dtype=float)


def test_the_screenshot_shows_a_page(page, tmp_path: Path):
    """Dark text on white at the top; no part of the page is an empty screen, and pictures are really drawn."""
    page.resize(1280, 900)
    height = page.run("document.documentElement.scrollHeight")
    page.resize(1280, height)
    png = page.picture()
    (tmp_path / "page.png").write_bytes(png)
    picture = seen(png)
    assert picture.shape == (height, 1280) and np.median(picture) == 255
    screens = [picture[y : y + 900] for y in range(0, height - 900, 900)]
    assert min((screen < 128).mean() for screen in screens) > 0.002, "a screen without ink"
    assert page.run("[...document.images].every(i => i.complete && i.naturalWidth > 100)")


def test_what_a_table_is_stands_before_its_caption(page):
    """A word for each kind, and in a joined table upright or slanted letters for measured and published rows."""
    for kind in ("measured", "published", "modelled", "joined"):
        style = f"getComputedStyle(document.querySelector('div.{kind} caption'), '::before')"
        assert page.run(f"{style}.content") == f'"{kind.upper()}"'
    letters = "getComputedStyle(document.querySelector('div.joined tr.{} td'))"
    kinds = {
        k: page.run(f"[{letters.format(k)}.fontStyle, {letters.format(k)}.fontWeight].join()")
        for k in ("measured", "published", "modelled")
    }
    assert kinds == {"measured": "normal,600", "published": "italic,400", "modelled": "normal,400"}


def test_the_page_fits_its_window_wide_or_narrow(page):
    """Only tables scroll sideways, each in a region of its own; the page itself never does."""
    for width in (1280, 360):
        page.resize(width, 800)
        assert page.run("document.documentElement.scrollWidth") <= width
    page.resize(1280, 900)


def test_every_link_and_table_is_reached_by_keyboard(page):
    """Tab goes first to the skip link, then through sections, tables and details in the order of the page."""
    page.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    stops = []
    for _ in range(MOST_STOPS):
        page.press(*TAB)
        stops.append(page.run("(e => e.className || e.getAttribute('href') || e.tagName)(document.activeElement)"))
        if stops[-1] == "BODY":
            break
    assert stops[0] == "skip"
    assert stops[1:9] == [
        f"#{name}"
        for name in (
            "measured",
            "figures",
            "joined",
            "modelled",
            "published",
            "contradictions",
            "problems-section",
            "provenance",
        )
    ]
    reachable = page.run("[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility()).length")
    assert stops.count("scroll") == reachable > 8
    assert stops.count("SUMMARY") == page.run("document.querySelectorAll('summary').length") > 12
    page.run("document.querySelector('.skip').focus()")
    assert page.run("document.querySelector('.skip').getBoundingClientRect().left") > 0, "seen while it has the focus"
    page.press(*ENTER)
    assert page.run("document.activeElement.id") == "content"


def test_focus_can_be_seen(page):
    page.run("document.querySelector('nav a').focus()")
    page.press(*TAB)
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_what_a_screen_reader_is_told(page):
    names = page.names()
    roles = [role for role, _ in names]
    assert roles.count("main") == roles.count("banner") == roles.count("navigation") == roles.count("contentinfo") == 1
    headings = [name for role, name in names if role == "heading"]
    assert headings[0].startswith("Experiment report") and "Measured beside published and modelled" in headings
    for role in ("table", "figure", "image", "region"):
        said = [name for kind, name in names if kind == role]
        assert said and all(said), f"a {role} without a name"
    tables = [name for role, name in names if role == "table"]
    assert any("Comparison of the measured runs" in name for name in tables)
    assert any("published, measured, modelled" in name for name in tables)
    assert roles.count("rowheader") > 50 and roles.count("columnheader") > 50


def test_text_stands_out_from_its_ground(page):
    """WCAG AA: 4.5 to 1 for every text on the page."""
    worst = page.run(
        """(() => {
      const part = c => { c /= 255; return c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; };
      const light = t => { const [r, g, b] = t.match(/[\\d.]+/g).map(Number);
                           return .2126 * part(r) + .7152 * part(g) + .0722 * part(b); };
      const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                            if (!/, 0\\)$|transparent/.test(c)) return light(c); } return 1; };
      let worst = 99;
      for (const e of document.querySelectorAll('h1,h2,p,a,td,th,caption,figcaption,li,dt,dd,summary')) {
        const pair = [light(getComputedStyle(e).color), ground(e)].sort((x, y) => y - x);
        worst = Math.min(worst, (pair[0] + .05) / (pair[1] + .05)); }
      return worst; })()"""
    )
    assert 4.5 <= worst < 21


def test_the_page_prints_as_pdf(page, tmp_path: Path):
    """A4 landscape, everything on it: folded tables and links to sections are for screens."""
    data = page.pdf()
    (tmp_path / "page.pdf").write_bytes(data)
    assert data[:5] == b"%PDF-" and len(data) > 200_000
    pages = int(max(re.findall(rb"/Count (\d+)", data), key=int))
    assert 15 <= pages <= 80, "folded tables are printed too"
    boxes = {tuple(map(float, box.split())) for box in re.findall(rb"/MediaBox \[([\d. ]+)\]", data)}
    assert all(abs(w - 842) < 2 and abs(h - 595) < 2 for _, _, w, h in boxes) and boxes
