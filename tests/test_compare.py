"""The notebook that compares runs, executed as its users do."""

import json

import pytest
from conftest import ROOT

from mla_nb.compare import grid, plan


def test_compare(tmp_path):
    pm = pytest.importorskip("papermill")
    grid(
        plan(
            "synthetic(n_train=96,n_valid=32,n_test=32)",
            "concat,mla",
            "0:2",
            epochs=2,
            root=str(tmp_path / "runs/below"),
        ),
        label="",
    )  # found below folders too
    out = tmp_path / "out.ipynb"
    pm.execute_notebook(
        ROOT / "nbs/experiments/compare.ipynb",
        out,
        {"root": str(tmp_path / "runs")},
        kernel_name="python3",
        progress_bar=False,
    )
    said = json.dumps(json.loads(out.read_text())["cells"])
    for what in ("Bayes accuracy", "95% interval", "seconds per epoch", "image/png"):
        assert what in said
    assert said.count("| mla |") >= 2
    for wrong, says in (({"root": str(tmp_path / "none")}, "make some with mla grid"),):
        with pytest.raises(pm.PapermillExecutionError, match=says):
            pm.execute_notebook(
                ROOT / "nbs/experiments/compare.ipynb",
                out,
                wrong,
                kernel_name="python3",
                progress_bar=False,
            )
