"""The web site: every chapter and every module has a page.

No warning, no link that leads nowhere.
"""

import base64
import importlib.util
import io
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_output
from PIL import Image

pytest.importorskip("sphinx")
SCRIPT = ROOT / "tools/site.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "html"
    p = subprocess.run(
        [sys.executable, str(SCRIPT), "build", str(out)], capture_output=True, text=True
    )
    assert p.returncode == 0, p.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("site_tool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chapter(tool, name):
    "The chapter of this name, whatever its number"
    return next(p for p in tool.chapters().values() if p.stem[3:] == name)


def test_every_chapter_and_module_has_a_page_and_links_resolve(site, tool):
    pages = {str(p.relative_to(site)) for p in site.rglob("*.html")}
    assert {
        str(p.relative_to(ROOT / "nbs").with_suffix(".html"))
        for p in tool.chapters().values()
    } <= pages
    assert {
        f"api/{'.'.join(p.relative_to(ROOT / 'mla_nb').with_suffix('').parts)}.html"
        for p in (ROOT / "mla_nb").rglob("*.py")
        if p.name[0] != "_"
    } <= pages
    assert tool.broken(site) == []


def test_the_parts_are_those_of_the_readme(tool):
    "The contents divide the book as README's table does, and name every chapter"
    rows = re.findall(
        r"^\| ([IV]+)\. ([^|]+) \|[^|]*?\[(\d\d)[^|]*?(?:\[(\d\d)[^|]*)?\|",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    told = {f"{n}. {name}": (int(a), int(z or a)) for n, name, a, z in rows}
    ours = {
        name: (int(found[0]), int(found[-1]))
        for name, _, found in tool.parts()
        if name != "Reference"
    }
    assert ours == told and len(told) == 5
    named = [n for *_, found in tool.parts() for n in found]
    assert named == sorted(tool.chapters())
    assert all(p.parent.name == "nbs" for p in tool.chapters().values())


def test_parts_follow_chapters_that_move(tool, monkeypatch):
    "PARTS names no number: a new chapter belongs to the part that it stands in"
    found = tool.chapters()
    last = max(found)
    moved = {n: p for n, p in found.items() if n != last} | {
        last: tool.ROOT / f"nbs/{last}_more.ipynb",
        f"{int(last) + 1}": tool.ROOT / f"nbs/{int(last) + 1}_{found[last].stem[3:]}",
    }
    before = tool.parts()
    monkeypatch.setattr(tool, "chapters", lambda: moved)
    after = tool.parts()
    assert after[-2][2] == [*before[-2][2], last]
    assert after[-1][2] == [f"{int(last) + 1}"]
    monkeypatch.setattr(tool, "chapters", lambda: {"00": tool.ROOT / "nbs/00_x.ipynb"})
    with pytest.raises(SystemExit, match="PARTS must name"):
        tool.parts()


def test_the_first_page_leads_to_every_chapter(tool):
    text = tool.landing(tool.chapters())
    assert "Start with chapter 00" in text and "$" not in text
    assert text.count('class="card"') == len(tool.PARTS)
    assert 'class="cover"' in text and 'alt="Cover"' not in text
    for p in tool.chapters().values():
        assert f'href="{p.stem}.html"' in text


@pytest.mark.parametrize(
    "source, later, prompt",
    [
        ("import a\nfrom b import c", "", "Imports"),
        ("import a\na.use('style')", "", "Imports"),
        ("import a\nx = 2", "", None),
        ("test_eq(f(2), 4)\nassert g", "", "Check"),
        ("with expect_fail(ValueError):\n    f(0)", "", "Check"),
        ("for k in (1, 2):\n    test_eq(f(k), k)", "", "Check"),
        ("x = f(2)\ntest_eq(x, 4)", "", "Check"),
        ("x = f(2)\ntest_eq(x, 4)", "plot(x)", None),
        ("def naive(x): return x\n\n\ntest_eq(naive(2), 2)", "", None),
        ("f(2)", "", None),
        ("#| export\ndef f(): pass\n\n\nclass G: pass", "", "Code: f, G"),
        ("#| export\n_x = 2", "", "Code: internals"),
        ("#| exports\ndef f(): pass", "", None),
        ("%pip install x", "", None),
    ],
)
def test_what_folds(tool, source, later, prompt):
    assert tool.fold(new_code_cell(source), later) == prompt


def test_a_check_that_shows_something_stays_open(tool):
    cell = new_code_cell("test_eq(f(2), 4)", outputs=[new_output("stream", text="x")])
    assert tool.fold(cell) is None


def figure(gap, width=400, scale=1):
    "A PNG of two dark panels with a white gap between them"
    a = np.full((60, width), 255, np.uint8)
    half = (width - gap) // 2
    a[:, :half] = a[:, width - half :] = 0
    out = io.BytesIO()
    Image.fromarray(a.repeat(scale, 0).repeat(scale, 1)).save(out, "png")
    return out.getvalue()


def test_figures_are_cut_between_panels(tool):
    assert tool.panels(figure(20), 400) == [0, 200, 400]
    assert tool.panels(figure(20, scale=2), 400) == [0, 200, 400]
    assert tool.panels(figure(2), 400) == [0, 400]  # no gap
    assert tool.panels(figure(20, width=250), 250) == [0, 250]  # too narrow


def test_a_figure_of_twice_the_resolution_keeps_its_width(tool):
    png = base64.b64encode(figure(20, scale=2)).decode()
    for about, width in (({"image/png": {"width": 400}}, 400), ({}, 800)):
        out = new_output("display_data", {"image/png": png}, metadata=about)
        [(_, found)] = tool.pictures(new_code_cell("plot()", outputs=[out]))
        assert found == width


def test_long_signatures_have_a_line_for_each_parameter(tool):
    def short(a, b: int = 2) -> int:
        pass

    def long(
        a_parameter_with_a_long_name: int,
        *,
        another_parameter: dict[str, int] | None = None,
        a_third: str = "text",
        **options,
    ) -> dict[str, int]:
        pass

    assert tool.signature("short", short) == "short(a, b: int = 2) -> int"
    text = tool.signature("long", long)
    assert [w.strip() for w in text.splitlines()] == [
        "long(",
        "a_parameter_with_a_long_name: int,",
        "*,",
        "another_parameter: dict[str, int] | None = None,",
        "a_third: str = 'text',",
        "**options,",
        ") -> dict[str, int]",
    ]


def test_names_are_found_in_the_chapter_that_builds_them(tool):
    from importlib import import_module

    where = tool.built()
    path, section, anchor = where["mla_nb.methods.fusion", "entropy_rule"]
    assert path == chapter(tool, "fusion") and anchor == "#build-entropy_rule"
    assert re.match(r"\d+\.\d+ ", section)
    for module in ("heads", "core", "train.learner"):
        m = import_module(f"mla_nb.{module}")
        ours = [n for n in m.__all__ if vars(m)[n].__class__.__name__ == "function"]
        lost = [n for n in ours if (vars(m)[n].__module__, n) not in where]
        assert ours and not lost, lost


def test_nothing_is_loaded_from_elsewhere():
    "Neither by our files nor by KaTeX, whose fonts are stored beside it"
    for p in (ROOT / "docs").rglob("*.*"):
        if p.suffix in (".css", ".js", ".svg", ".md"):
            found = re.findall(
                r"(?:url\(|src=|import\(|fetch\()[\"']?(?:https?:)?//", p.read_text()
            )
            assert not found, p
    katex = ROOT / "docs/static/katex"
    fonts = set(re.findall(r"url\(([^)]+)\)", (katex / "katex.min.css").read_text()))
    assert fonts and all((katex / f).exists() for f in fonts)
    assert (ROOT / "docs/static/site.css").stat().st_size < 8192  # kept small


def test_a_broken_link_is_found(tmp_path, tool):
    (tmp_path / "a.html").write_text(
        '<a href="b.html">x</a> <a href="#here">y</a> <p id="there">'
    )
    (tmp_path / "c.html").write_text(
        '<a href="a.html#there">x</a> <a href="https://example.org/z">y</a>'
    )
    assert sorted(tool.broken(tmp_path)) == [
        "a.html: #here (no such anchor)",
        "a.html: b.html",
    ]


def test_pages_show_what_a_reader_needs(site, tool):
    file = chapter(tool, "fusion").with_suffix(".html").name
    text = (site / file).read_text()
    assert "<math" in text and "data-tex=" in text and "_images/" in text
    assert "#| " not in text and "default_exp" not in text
    assert "copybutton" in text and "katex.min.js" in text
    assert '<details class="admonition hide' in text and 'id="build-entropy' in text
    assert f'href="notebooks/{chapter(tool, "fusion").name}"' in text
    page = (site / "api/methods.fusion.html").read_text()
    assert "entropy_rule" in page and "(M,B) bool" in page
    assert f'href="../{file}#build-entropy_rule"' in page
    whole = (site / "part-1.html").read_text()
    assert whole.count('<section class="chapter"') == len(tool.parts()[0][2])
    for p in site.rglob("*.html"):
        assert not re.search(
            r'<(script|img|link)[^>]*(src|href)="https?:', p.read_text()
        )


def test_badges_wait_for_a_repository(tool, monkeypatch):
    path = chapter(tool, "fusion")
    assert tool.badges(path) == ""  # settings.ini names none yet
    assert "Download this notebook" in tool.headed("# Title\n\ntext", path)
    monkeypatch.setattr(
        tool,
        "settings",
        lambda: {"git_url": "https://github.com/me/mla_nb", "branch": "main"},
    )
    assert (
        f"colab.research.google.com/github/me/mla_nb/blob/main/nbs/{path.name}"
        in tool.badges(path)
        and "mybinder.org/v2/gh/me/mla_nb/main" in tool.badges(path)
    )


def test_publish_puts_badges_and_an_install_cell_into_every_chapter(tmp_path):
    import json
    import shutil

    pytest.importorskip("nbdev")
    for n in ("settings.ini", "pyproject.toml", "README.md", "tools"):
        (shutil.copytree if (ROOT / n).is_dir() else shutil.copy)(
            ROOT / n, tmp_path / n
        )
    for n in ("10_fusion", "34_digits"):
        (tmp_path / f"nbs/{n}").parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / f"nbs/{n}.ipynb", tmp_path / f"nbs/{n}.ipynb")

    def call(url):
        return subprocess.run(
            [sys.executable, str(tmp_path / "tools/nbs.py"), "publish", url],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    bad = call("https://example.invalid/x")
    assert (
        bad.returncode and "expected https://github.com/NAME/REPOSITORY" in bad.stderr
    )
    first = None
    for url in (
        "https://github.com/you/old",
        "https://github.com/me/mla_nb.git",
        "https://github.com/me/mla_nb",
    ):
        done = call(url)
        assert done.returncode == 0, done.stderr
        texts = {p: p.read_text() for p in (tmp_path / "nbs").rglob("[0-9]*.ipynb")}
        if url.endswith("mla_nb"):
            assert texts == first  # twice is once
        first = texts
    assert len(texts) == 2
    for p, text in texts.items():
        head, install = ("".join(c["source"]) for c in json.loads(text)["cells"][:2])
        assert (
            f"github/me/mla_nb/blob/main/{p.relative_to(tmp_path)}" in head
            and "you/old" not in text
        )
        assert (
            head.count("colab-badge") == 1
            and head.startswith("# ")
            and 'git+https://github.com/me/mla_nb@main"' in install
            and "%pip" in install
        )
    assert (
        "git_url = https://github.com/me/mla_nb\n"
        in (tmp_path / "settings.ini").read_text()
    )
