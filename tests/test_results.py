"""The files of results/ that hold facts from elsewhere: split lists, published numbers.

No chapter types a number that stands in them.
"""

import csv
import json
import re
import sys

import pytest
from conftest import ROOT

from mla_nb.core import datasets, discover
from mla_nb.data.media import KNOWN_SPLITS

PUBLISHED = ROOT / "results/published.csv"
CHAPTERS = "35_cremad", "36_food101", "37_mvsa", "38_iemocap", "39_own"


def rows(path):
    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def prose(path):
    cells = json.loads(path.read_text())["cells"]
    return "\n".join(
        "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
    )


@pytest.mark.parametrize("row", rows(PUBLISHED), ids=lambda r: f"{r['dataset']}")
def test_a_published_number_has_its_source(row):
    discover()
    assert row["dataset"] in datasets
    assert 0 < float(row["value"]) < 100
    assert not row["sd"] or float(row["sd"]) > 0
    assert row["metric"] == "accuracy" and row["method"] and row["source"]
    assert row["url"].startswith("https://")
    assert row["read"] in ("first", "second") and row["where_read"]
    assert row["split"] in ("", *KNOWN_SPLITS.values())


def test_no_published_number_is_typed_in_a_chapter():
    for name in CHAPTERS:
        text = prose(ROOT / f"nbs/{name}.ipynb")
        for r in rows(PUBLISHED):
            if "." in r["value"]:
                found = re.search(rf"(?<![\d.]){re.escape(r['value'])}(?!\d)", text)
                assert not found, f"{name}: {r['value']} is typed"


def test_known_splits_are_those_of_the_table():
    found = {
        (r["ids"], r["first"].split()[0]) for r in rows(ROOT / "results/splits.csv")
    }
    known = set(KNOWN_SPLITS.items())
    assert {pair for pair in found if pair[0]} == {k for k in known if k[1] != "qmf"}


def test_the_table_of_splits_is_what_its_script_writes(real_lists, monkeypatch):
    [file] = real_lists("cremad_ogm_train.csv")
    monkeypatch.syspath_prepend(ROOT / "results")
    sys.modules.pop("splits", None)
    import splits

    made = [{k: str(v) for k, v in r.items()} for r in splits.audited(file.parent)]
    assert made == rows(ROOT / "results/splits.csv")
