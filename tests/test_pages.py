"""Pages of the web site in Chromium, at two widths and in both modes: `make browser`.

MLA_SHOTS=FOLDER keeps the screenshots.
"""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_browser import CHROMIUM, chromium, shot

pytest.importorskip("sphinx")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium"),
]
SCRIPT = ROOT / "tools/site.py"
WIDTHS = {1280: 900, 390: 844}
CUT = """() => [...document.querySelectorAll("pre, .table-wrapper, .formula")]
    .filter(e => e.scrollWidth > e.clientWidth + 6)
    .map(e => e.innerText.slice(0, 80))"""
OPEN = "() => document.querySelectorAll('details').forEach(d => d.open = true)"
BOX = "e => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.top] }"
# chapters that are looked at, beside the first page and one of the API
NAMES = ["idea", "projection", "joint_heads", "missing"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "html"
    for what in ("build", "pdf"):
        subprocess.run([sys.executable, str(SCRIPT), what, str(out)], check=True)
    return out


@pytest.fixture(scope="module")
def pages(site):
    "Files of the pages that are looked at"
    spec = importlib.util.spec_from_file_location("site_tool", SCRIPT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    stems = {p.stem[3:]: p.stem for p in tool.chapters().values()}
    return ["index", *(stems[n] for n in NAMES), "api/core", "part-1"]


browser = pytest.fixture(scope="module")(chromium)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_and_nothing_is_cut_off(site, pages, browser, width, mode, tmp_path):
    page = browser.new_page(
        viewport={"width": width, "height": WIDTHS[width]}, color_scheme=mode
    )
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    for name in pages:
        page.goto((site / f"{name}.html").as_uri())
        shot(page, f"site-{name.replace('/', '-')}-{width}-{mode}", tmp_path)
        page.evaluate(OPEN)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{name} is {wide} pixels wide"
        assert page.locator(".katex-error").count() == 0
        assert page.locator(".formula:not(:has(.katex))").count() == 0
        if width == 1280:
            assert page.evaluate(CUT) == [], name
    assert all(re.match("(file|data):", url) for url in asked)
    page.close()


def test_contents_stand_beside_the_text_and_the_sidebar_follows(site, pages, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    for name in pages[1:-1]:
        page.goto((site / f"{name}.html").as_uri())
        text = page.locator("article").evaluate(BOX)
        contents = page.locator(".toc-drawer").evaluate(BOX)
        assert text[1] <= contents[0] and contents[1] <= 1280
        left, right, top = page.locator(".sidebar-tree .current-page").last.evaluate(
            BOX
        )
        assert 100 < top < 800 and 0 <= left < right <= text[0]
    page.close()


def test_search_finds_a_word(site, browser):
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + "?q=Sherman")
    found = page.locator("#search-results li a")
    found.first.wait_for()
    assert "projection" in " ".join(a.get_attribute("href") or "" for a in found.all())
    page.close()


def test_panels_stack_on_a_phone(site, pages, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((site / f"{pages[1]}.html").as_uri())
    shown = [e for e in page.locator(".panel").all() if e.is_visible()]
    assert len(shown) >= 4
    assert all(e.evaluate(BOX)[1] <= 390 for e in shown)
    assert not any(e.is_visible() for e in page.locator("img.whole").all())
    page.set_viewport_size({"width": 1280, "height": 900})
    assert not any(e.is_visible() for e in page.locator(".panel").all())
    page.close()


def test_part_one_is_printed(site):
    assert (site / "part-1.pdf").read_bytes().startswith(b"%PDF")
    assert 'href="part-1.pdf"' in (site / "part-1.html").read_text()
