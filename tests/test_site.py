"""The web site: every chapter and every module has a page.

No warning, no link that leads nowhere.
"""

import importlib.util
import re
import subprocess
import sys

import pytest
from conftest import ROOT

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
    ours = {name: (min(r), max(r)) for name, r in tool.PARTS if name != "Reference"}
    assert ours == told and len(told) == 5
    named = [n for _, r in tool.PARTS for n in r]
    assert named == sorted(int(n) for n in tool.chapters())
    assert all(p.parent.name == "nbs" for p in tool.chapters().values())


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


def test_pages_show_what_a_reader_needs(site):
    chapter = (site / "10_fusion.html").read_text()
    assert (
        "<math" in chapter
        and "_images/" in chapter
        and "#| " not in chapter
        and "default_exp" not in chapter
    )
    assert (
        "copybutton" in chapter and 'src="http' not in chapter
    )  # nothing from elsewhere
    page = (site / "api/methods.fusion.html").read_text()
    assert "entropy_rule" in page and "(M,B) bool" in page


def test_badges_wait_for_a_repository(tool, monkeypatch):
    path = tool.chapters()["10"]
    assert tool.badges(path) == ""  # settings.ini names none yet
    monkeypatch.setattr(
        tool,
        "settings",
        lambda: {"git_url": "https://github.com/me/mla_nb", "branch": "main"},
    )
    assert (
        "colab.research.google.com/github/me/mla_nb/blob/main/nbs/10_fusion.ipynb"
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
