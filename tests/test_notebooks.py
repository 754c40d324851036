"""The notebooks are stored clean, executed, and in step with what is made from them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(
    p
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts and not p.name.startswith("_")
)
CHAPTERS = [p for p in NOTEBOOKS if p.parent == ROOT / "nbs"]


def cells(path, kind="code"):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def run(tmp_path, code):
    for n in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / n, tmp_path)
    shutil.copytree(
        ROOT / "nbs",
        tmp_path / "nbs",
        ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs", "data_"),
    )
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[:] = ['x']\n{code}"],
        cwd=tmp_path,
        check=True,
    )


def test_stored_clean(tmp_path):
    pytest.importorskip("nbdev")
    run(tmp_path, "from nbdev.clean import nbdev_clean; nbdev_clean()")
    bad = [
        p.name
        for p in NOTEBOOKS
        if p.read_text() != (tmp_path / p.relative_to(ROOT)).read_text()
    ]
    assert not bad, f"run `make clean`: {bad}"


def test_export_in_step(tmp_path):
    pytest.importorskip("nbdev")
    for p in (ROOT / "mla_nb").rglob("__init__.py"):  # written by hand
        (tmp_path / p.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, tmp_path / p.relative_to(ROOT))
    run(tmp_path, "from nbdev.doclinks import nbdev_export; nbdev_export()")
    new, old = (
        {p.relative_to(d) for p in (d / "mla_nb").rglob("*.py")}
        for d in (tmp_path, ROOT)
    )
    assert new == old - {Path("mla_nb/_index.py")}  # test_cli.py looks at it
    for p in sorted(new):
        assert (tmp_path / p).read_text() == (ROOT / p).read_text(), (
            f"{p}: run `make export`"
        )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_is_executed(path):
    """Readers on the web see results.

    Outputs are there, none is an error, no widget state, no path of a machine.
    """
    code = cells(path)
    outputs = [o for c in code for o in c["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    assert not re.search(r"/(home|root|work|tmp|Users)/", json.dumps(outputs))


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if "experiments" in p.parts], ids=lambda p: p.stem
)
def test_experiment_has_no_outputs(path):
    assert not [o for c in cells(path) for o in c["outputs"]]


def test_papermill_parameters_are_the_fields_of_run():
    from mla_nb.runs.config import Run

    [cell] = [
        c
        for c in cells(ROOT / "nbs/experiments/run.ipynb")
        if "parameters" in c["metadata"].get("tags", [])
    ]
    found = {}
    exec("".join(cell["source"]), {}, found)
    assert found == {k: f.default for k, f in Run.model_fields.items()}


def test_chapter_numbers_are_unique():
    numbers = [p.name.split("_")[0] for p in CHAPTERS if p.name[0].isdigit()]
    assert len(numbers) == len(set(numbers))
