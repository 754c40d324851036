"""The chapter budget, counted in the syntax tree: cells are short, functions too.

`pytest tests/test_budget.py -s` prints the table. Lines are not counted: ruff lays the
code out, and a budget of lines rewards crowded ones.
"""

import ast
import json
import re
from statistics import median

import pytest
from conftest import ROOT

CHAPTERS = sorted(
    p
    for p in (ROOT / "nbs").glob("[0-9]*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
LEAST = {"cells": 20, "plots": 2, "asserted": 0.6, "demonstrated": 1.0}
MOST = {"cells": 60, "median": 4, "longest": 15, "function": 30}
EXCEPTIONS = {  # chapter -> limit -> (how far it may be broken, why); it only shrinks
    "44": {
        "plots": (1, "a chapter about names and checks has one picture to show"),
    },
}
EXPORT = re.compile(r"^#\|\s*exports?(\s+[\w.]+)?\s*$", re.M)
ALT = re.compile(r"^#\|\s*fig-alt:\s*(\S.*)$", re.M)
CHECKS = re.compile(r"\b(assert|test_\w+|expect_fail|check_\w+)\b")
NEAR = 6  # cells that export nothing, after its own, in which a definition is asserted


def number(path):
    return path.name.split("_")[0]


def cells(path, kind="code"):
    found = json.loads(path.read_text())["cells"]
    return [
        {**c, "source": "".join(c["source"])} for c in found if c["cell_type"] == kind
    ]


def parse(source):
    "The syntax tree of a cell, without the lines that only a notebook understands"
    lines = source.splitlines()
    return ast.parse(
        "\n".join("" if s.lstrip().startswith(("%", "!")) else s for s in lines)
    )


def statements(tree):
    return sum(isinstance(n, ast.stmt) for n in ast.walk(tree))


def functions(tree):
    "Statements in the body of every function and method, the outermost only"
    for n in tree.body:
        if isinstance(n, ast.FunctionDef):
            yield n.name, statements(n) - 1
        elif isinstance(n, ast.ClassDef):
            yield from ((f"{n.name}.{name}", k) for name, k in functions(n))


def pictures(cell):
    "Figures of a cell: stored ones, or those that have an alternative text"
    stored = sum("image/png" in o.get("data", {}) for o in cell["outputs"])
    return max(stored, len(ALT.findall(cell["source"])))


def defined(tree):
    "Public functions and classes of an exported cell"
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_"]


def mentions(name, source):
    return re.search(rf"\b{name}\b", source) is not None


def later(code, k):
    "The cells after k that export nothing"
    return [c["source"] for c in code[k + 1 :] if not EXPORT.search(c["source"])]


def measured(path):
    "One row of the table"
    code = cells(path)
    trees = [parse(c["source"]) for c in code]
    exported = [k for k, c in enumerate(code) if EXPORT.search(c["source"])]
    plain = [statements(t) for k, t in enumerate(trees) if k not in exported]
    where = [(k, name) for k in exported for name in defined(trees[k])]
    shown = [n for k, n in where if any(mentions(n, s) for s in later(code, k))]
    sure = [
        n
        for k, n in where
        if any(mentions(n, s) and CHECKS.search(s) for s in later(code, k)[:NEAR])
    ]
    longs = [(n, k) for t in trees for n, k in functions(t) if k > MOST["function"]]
    prose = (c["source"].split("**Solutions**")[0] for c in cells(path, "markdown"))
    return {
        "cells": sum(bool(c["source"].strip()) for c in code),
        "words": sum(len(s.split()) for s in prose),
        "median": median(plain),
        "longest": max(plain),
        "function": max((k for t in trees for _, k in functions(t)), default=0),
        "plots": sum(map(pictures, code)),
        "asserted": len(sure) / len(where) if where else 1.0,
        "demonstrated": len(shown) / len(where) if where else 1.0,
        "hidden": sorted({n for _, n in where} - set(shown)),
        "unsure": sorted({n for _, n in where} - set(sure)),
        "longs": longs,
    }


def over(row, excused=()):
    "The limits that a chapter breaks"
    most = dict(MOST)
    least = dict(LEAST)
    for k in excused:
        value = excused[k][0]
        (most if k in most and value > most[k] else least)[k] = value
    return [f"{k}: {row[k]:g} > {v}" for k, v in most.items() if row[k] > v] + [
        f"{k}: {row[k]:g} < {v}" for k, v in least.items() if row[k] < v
    ]


@pytest.fixture(scope="module")
def table():
    rows = {number(p): measured(p) for p in CHAPTERS}
    names = [
        k for k in next(iter(rows.values())) if k not in ("hidden", "unsure", "longs")
    ]
    print("\nchapter  " + "  ".join(names))
    for n, r in rows.items():
        print(f"{n:>7}  " + "  ".join(f"{r[k]:{len(k)}.3g}" for k in names))
    return rows


@pytest.mark.parametrize("n", [number(p) for p in CHAPTERS])
def test_budget(table, n):
    row = table[n]
    wrong = over(row, EXCEPTIONS.get(n, {}))
    assert not wrong, (
        f"chapter {n}: {wrong}; never shown: {row['hidden']}; "
        f"not asserted nearby: {row['unsure']}; long functions: {row['longs']}"
    )


def test_exceptions_are_needed(table):
    for n, excused in EXCEPTIONS.items():
        broken = [b.split(":")[0] for b in over(table[n])]
        for k, (_, why) in excused.items():
            assert k in broken, f"chapter {n} keeps to {k}: remove its exception"
            assert len(why.split()) > 4, f"chapter {n}, {k}: give the reason"


def test_part_one_is_read_in_an_evening(table):
    "Chapters 00 to 11: at most 420 code cells and 15,000 words"
    part = [r for n, r in table.items() if int(n) <= 11]
    assert len(part) == 12
    assert sum(r["cells"] for r in part) <= 420
    assert sum(r["words"] for r in part) <= 15000


def test_the_budget_can_be_broken(tmp_path):
    "A chapter with one long function that no cell shows breaks these limits"
    body = "\n".join(f"    x{k} = {k}" for k in range(40))
    long = {"cell_type": "code", "source": [f"#| export\ndef lonely():\n{body}"]}
    plain = {"cell_type": "code", "source": ["\n".join(f"y = {k}" for k in range(16))]}
    path = tmp_path / "99_bad.ipynb"
    path.write_text(
        json.dumps({"cells": [{**c, "outputs": []} for c in (long, plain)]})
    )
    row = measured(path)
    broken = [b.split(":")[0] for b in over(row)]
    assert broken == ["median", "longest", "function", *LEAST]
    assert row["hidden"] == row["unsure"] == ["lonely"]
    assert row["longs"] == [("lonely", 40)]


@pytest.mark.parametrize(
    "path", [*CHAPTERS, ROOT / "nbs/index.ipynb"], ids=lambda p: p.stem
)
def test_every_figure_says_what_is_seen(path):
    "For readers who cannot see it, and for those whose figure was not loaded"
    for k, c in enumerate(cells(path)):
        if not any("image/png" in o.get("data", {}) for o in c["outputs"]):
            continue
        alt = ALT.search(c["source"])
        assert alt, f"{path.name}, code cell {k}: a figure without `#| fig-alt:`"
        assert 5 < len(alt[1].split()) < 60, f"{path.name}, code cell {k}: {alt[1]!r}"
