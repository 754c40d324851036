"""One book: the same words for the same things, the same parts in every chapter, and references that lead somewhere."""

import json
import re

import pytest
from conftest import ROOT

CHAPTERS = sorted(
    p
    for p in (ROOT / "nbs").rglob("[0-9]*.ipynb")
    if "experiments" not in p.parts and ".ipynb_checkpoints" not in p.parts
)
WRONG = {  # what is not written -> what is
    r"(?:audio|visual|text|modality)[- ]streams?": "modality, or branch for a part of a net; streams are what a container file holds",
    r"(?:two|three|both|other|each|every) views?": "modality",
    r"mini-?batch(?:es)?": "batch",
    r"ground[- ]truth": "class, label or truth",
    r"data sets?": "dataset",
    r"(?:released|published|two|paper's) branch(?:es)?": "form or version; a branch is a part of a net",
    r"(?:color|behavior|optimiz|normaliz|generaliz|standardiz|initializ|regulariz)\w*": "British spelling",
    r"hyper-?parameters?": "option, or its name",
    r"state[- ]of[- ]the[- ]art|novel approach|significant(?:ly)?": "a number",
    r"ablate[sd]?": "take away, change back",
    r"late fusion|early fusion": "where the features or the logits meet: say which (titles of papers excepted)",
}
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


def prose(path):
    "What is written for people: no code, no formulas, no titles of papers"
    text = "\n\n".join(
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "markdown"
    )
    text = text.split("**Solutions**")[0]
    for pattern in (
        r"^```.*?^```",
        r"`[^`\n]*`",
        r"\$\$.*?\$\$",
        r"\$[^$\n]+\$",
        r"\[[^\]]*\]\([^)]*\)",
        r"(?<!\*)\*[^*\n]{3,}\*(?!\*)",
    ):
        text = re.sub(pattern, " … ", text, flags=re.S | re.M)
    return text


def whole(path):
    return "\n\n".join(
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "markdown"
    )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_one_name_for_one_thing(path):
    for wrong, right in WRONG.items():
        for m in re.finditer(rf"\b(?:{wrong})\b", prose(path), re.I):
            pytest.fail(
                f"{path.name}: {m[0]!r} in {prose(path)[max(0, m.start() - 40) : m.end() + 20]!r}; write: {right}"
            )


def test_a_wrong_word_is_found(tmp_path):
    (tmp_path / "99_bad.ipynb").write_text(
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "markdown",
                        "source": ["The audio stream is `optimized` for each view."],
                    }
                ]
            }
        )
    )
    text = prose(tmp_path / "99_bad.ipynb")
    assert [w for w in WRONG if re.search(rf"\b(?:{w})\b", text, re.I)] == list(WRONG)[
        :2
    ]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_chapter_has_the_same_parts(path):
    text = whole(path)
    assert re.match(r"# .+\n\n> .+", text), "a title and a promise come first"
    missing = [p for p in PARTS if p not in text]
    assert not missing, f"{path.name} has no {missing}"
    assert [text.index(p) for p in PARTS] == sorted(text.index(p) for p in PARTS)
    exercises = re.findall(
        r"^\d+\. .+", text.split("## Exercises")[1].split("\n## ")[0], re.M
    )
    assert (
        3 <= len(exercises) <= 5
        and "(one cell)" in exercises[0]
        and any("harder" in e for e in exercises)
    ), f"{path.name}: exercises are graded, the first is one cell"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_references_lead_somewhere(path):
    text, known = whole(path), {number(p).lstrip("0") or "0" for p in CHAPTERS}
    for m in re.finditer(
        r"\b[Cc]hapters? (\d+[a-e]?)((?:(?:, | and | to |–)\d+[a-e]?)*)", text
    ):
        for n in [m[1], *re.findall(r"\d+[a-e]?", m[2])]:
            assert (n.lstrip("0") or "0") in known, (
                f"{path.name}: {m[0]!r}: there is no chapter {n}"
            )
    headings = {
        h
        for p in CHAPTERS
        for h in re.findall(r"^## (\d+[a-e]?\.\d+) ", whole(p), re.M)
    }
    for m in re.finditer(r"\b[Ss]ections? (\d+[a-e]?\.\d+)", text):
        near = text[max(0, m.start() - 60) : m.end() + 30]
        assert m[1] in headings or "arXiv" in near or "paper" in near, (
            f"{path.name}: there is no section {m[1]}"
        )


def test_sections_are_numbered_in_order():
    for path in CHAPTERS:
        found = re.findall(r"^## (\d+[a-e]?)\.(\d+) ", whole(path), re.M)
        assert [int(k) for _, k in found] == list(range(1, len(found) + 1)), (
            f"{path.name}: {found}"
        )
        assert {n for n, _ in found} <= {number(path)[number(path)[0] == "0" :]}, (
            f"{path.name}: {found}"
        )


def test_glossary_is_used():
    "What the glossary names in code is a name in the package or in the chapters"
    [path] = [p for p in CHAPTERS if number(p) == "00"]
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| `([^`]+)` \|",
        whole(path).split("## 0.2")[1].split("\n## ")[0],
        re.M,
    )
    code = "\n".join(
        "".join(c["source"])
        for p in CHAPTERS
        for c in json.loads(p.read_text())["cells"]
        if c["cell_type"] == "code"
    )
    assert len(rows) >= 12
    for word, name in rows:
        assert re.search(rf"\b{re.escape(re.split(r'[^A-Za-z]', name)[0])}\b", code), (
            f"{word}: {name} is nowhere"
        )
