"""The notebooks are stored clean, executed, and in step with what is made from them."""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
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


EXPERIMENTS = [p for p in NOTEBOOKS if "experiments" in p.parts]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_holds_the_outputs_of_a_small_run(path):
    """People see what they will get.

    Every cell that shows something has shown it: no error, no warning, no progress bar,
    no path of a machine, no parameters of papermill.
    """
    code = cells(path)
    outputs = [o for c in code for o in c["outputs"]]
    kinds = {k for o in outputs for k in o.get("data", {})}
    assert {"image/png", "text/markdown"} <= kinds
    assert not [o for o in outputs if o["output_type"] in ("error", "stream")]
    assert not re.search(r"/(home|root|work|tmp|Users)/", json.dumps(outputs))
    assert "papermill" not in json.loads(path.read_text())["metadata"]
    tags = [t for c in code for t in c["metadata"].get("tags", [])]
    assert tags == ["parameters"]
    silent = [c for c in code if not c["outputs"]]
    assert all(
        re.search(r"^(import|from|cfg =|#|\w+ = )", s) for s in map(first, silent)
    )
    assert len(silent) <= 3


def first(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_says_how_its_outputs_were_made(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from nbs import EXAMPLE_GRID, EXAMPLES

    [top] = [c for c in cells(path, "markdown") if "# " in "".join(c["source"])[:2]]
    text = "".join(top["source"])
    assert "python tools/nbs.py examples" in text
    if path.stem == "compare":
        assert f"mla grid {EXAMPLE_GRID}" in text
        return
    for k, v in EXAMPLES[path.stem].items():
        assert f" {k} {v}" in text or f" {k} '{v}'" in text, k


@pytest.mark.parametrize("name", ["run", "compare"])
def test_experiment_can_be_run_twice_and_out_of_order(tmp_path, monkeypatch, name):
    "Opened in a copy of the repository, as JupyterLab does it; each cell twice"
    import matplotlib

    (tmp_path / "nbs/experiments").mkdir(parents=True)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    path = tmp_path / f"nbs/experiments/{name}.ipynb"
    shutil.copy(ROOT / path.relative_to(tmp_path), path)
    monkeypatch.chdir(path.parent)
    matplotlib.use("Agg")
    small = {"epochs": 1, "progress": False, "threads": 1}
    small["dataset_args"] = "n_train=60,n_valid=20,n_test=20,size=16"
    scope = {}
    code = ["".join(c["source"]) for c in cells(path)]
    exec(code[0], scope)  # the parameters
    scope |= small if name == "run" else {}
    for again in (1, 2):
        for source in code[1:]:
            exec(source, scope)
            exec(source, scope)
        scope["plt"].close("all")
        runs = sorted(p.name for p in (tmp_path / "runs").glob("*"))
        assert len(runs) == (name == "run"), again
    assert Path.cwd() == tmp_path and not (path.parent / "runs").exists()


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


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nbs/reference").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_reference_lists_what_its_module_exports(path):
    "The stored list is that of the module as it is"
    found = cells(path)
    sources = "".join("".join(c["source"]) for c in found)
    [name] = re.findall(r"default_exp ([\w.]+)", sources)
    [out] = found[-1]["outputs"]
    told = "".join(out["text"]).split()
    assert told == import_module(f"mla_nb.{name}").__all__
