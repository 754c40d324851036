"""One book: the same parts in every chapter, references that lead somewhere, and a
glossary whose names exist."""

import json
import re

import pytest
from conftest import ROOT

CHAPTERS = sorted(
    p
    for p in (ROOT / "nbs").glob("[0-9]*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
PARTS = [
    "**What you will build.**",
    "**What you need.**",
    "**Running time.**",
    "## Recap",
    "## Exercises",
    "## Further reading",
]


def number(path):
    return path.name.split("_")[0]


def whole(path):
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(
        "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
    )


def plain(n):
    return n.lstrip("0") or "0"


def sections():
    "Numbers of all sections: 0.1, 0.2, ..."
    return {h for p in CHAPTERS for h in re.findall(r"^## (\d+\.\d+) ", whole(p), re.M)}


def test_numbers_have_no_gaps_and_no_letters():
    "The order of the files is the order of reading"
    found = [number(p) for p in CHAPTERS]
    assert all(re.fullmatch(r"\d\d", n) for n in found), found
    wanted = {f"{k:02}" for k in range(int(found[-1]) + 1)}
    assert set(found) == wanted and len(found) == len(set(found))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_chapter_has_the_same_parts(path):
    text = whole(path)
    assert re.match(r"# .+\n\n> .+", text), "a title and a promise come first"
    missing = [p for p in PARTS if p not in text]
    assert not missing, f"{path.name} has no {missing}"
    assert [text.index(p) for p in PARTS] == sorted(text.index(p) for p in PARTS)
    section = text.split("## Exercises")[1].split("\n## ")[0]
    exercises = re.findall(r"^\d+\. .+", section, re.M)
    assert 3 <= len(exercises) <= 5, f"{path.name}: {len(exercises)} exercises"
    assert "(one cell)" in exercises[0], f"{path.name}: the first exercise is one cell"
    assert any("harder" in e for e in exercises), f"{path.name}: none is harder"
    assert "**Solutions**" in text, f"{path.name} has no solutions"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_references_lead_somewhere(path):
    text, known = whole(path), {plain(number(p)) for p in CHAPTERS}
    several = r"\b[Cc]hapters? (\d+)((?:(?:, | and | to |–)\d+)*)"
    for m in re.finditer(several, text):
        for n in [m[1], *re.findall(r"\d+", m[2])]:
            assert plain(n) in known, f"{path.name}: {m[0]!r}: there is no chapter {n}"
    headings = sections()
    for m in re.finditer(r"\b[Ss]ections? (\d+\.\d+)", text):
        near = text[max(0, m.start() - 60) : m.end() + 30]
        outside = "arXiv" in near or "paper" in near
        assert m[1] in headings or outside, f"{path.name}: there is no section {m[1]}"


def test_teaching_refers_to_sections_that_exist():
    "Every N.M is a section, but for code, formulas and numbers with a unit"
    text = (ROOT / "teaching.md").read_text()
    text = re.sub(r"```.*?```|`[^`\n]*`|\$[^$\n]*\$", "", text, flags=re.S)
    found = re.findall(r"\b(\d+\.\d+)\b(?!%| points| MiB)", text)
    assert len(found) > 50
    lost = sorted(set(found) - sections())
    assert not lost, f"teaching.md: there is no section {', '.join(lost)}"
    known = {plain(number(p)) for p in CHAPTERS}
    named = re.findall(r"\b[Cc]hapters? (\d+)((?:(?:, | and | to )\d+)*)", text)
    named = [
        plain(n) for first, more in named for n in [first, *re.findall(r"\d+", more)]
    ]
    lost = [n for n in named if n not in known]
    assert named and not lost, f"teaching.md: there is no chapter {', '.join(lost)}"


def test_sections_are_numbered_in_order():
    for path in CHAPTERS:
        found = re.findall(r"^## (\d+)\.(\d+) ", whole(path), re.M)
        order = list(range(1, len(found) + 1))
        assert [int(k) for _, k in found] == order, f"{path.name}: {found}"
        assert {n for n, _ in found} <= {plain(number(path))}, f"{path.name}: {found}"


def test_glossary_is_used():
    "What the glossary of chapter 00 names in code is a name in the chapters"
    [path] = [p for p in CHAPTERS if number(p) == "00"]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([^`]+)` \|", whole(path), re.M)
    code = "\n".join(
        "".join(c["source"])
        for p in CHAPTERS
        for c in json.loads(p.read_text())["cells"]
        if c["cell_type"] == "code"
    )
    assert len(rows) >= 12
    for word, name in rows:
        first = re.split(r"[^A-Za-z_]", name)[0]
        assert re.search(rf"\b{re.escape(first)}\b", code), f"{word}: {name} is nowhere"
