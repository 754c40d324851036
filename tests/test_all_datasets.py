"""Every method on every dataset's miniature, with and without gaps.

Parameter files for papermill are what the presets say.
"""

import sys
from importlib import import_module

import pytest
import yaml
from conftest import ROOT

from mla_nb.core import check_dataset, datasets, discover, methods
from mla_nb.data.miniature import MINIATURES, miniature
from mla_nb.runs.run import Run, run

sys.path.insert(0, str(ROOT / "tools"))
from params import MODALITIES, OUT, files  # noqa: E402

discover()
TINY = {"audio": "log_mel", "seconds": 1.0, "size": 16, "frames": 2, "progress": False}


@pytest.fixture(scope="module", params=sorted(MINIATURES))
def prepared(request, tmp_path_factory):
    "A folder of prepared datasets, and the name of the one in it"
    name, work = request.param, tmp_path_factory.mktemp(request.param)
    module = import_module("mla_nb.data." + ("own" if name == "kinetics" else name))
    root = miniature(name, work / "raw", 72)
    getattr(module, f"prepare_{name}")(root, data=work / "data", **TINY)
    return name, work


def test_every_dataset_keeps_the_contract(prepared):
    name, work = prepared
    s = datasets[name](data=str(work / "data"))
    check_dataset(s)
    assert set(s.modalities) == set(MODALITIES[name])


# every method with half of the inputs missing, these with all of them, too;
# tests/test_contracts.py trains the others with all
COMPLETE = (
    "concat",
    "ensemble",
    "gated",
    "mla",
    "mla_fixed",
    "ogm_ge",
    "qmf",
    "unimodal",
)
HOW = [(m, r) for m in sorted(methods) for r in ("", "0.5") if r or m in COMPLETE]


@pytest.mark.parametrize("method, rate", HOW)
def test_every_method_on_every_dataset(prepared, method, rate):
    name, work = prepared
    mods = list(datasets[name](data=str(work / "data")).modalities)
    args = f"modality={mods[-1]}" if method == "unimodal" else ""
    r = run(
        Run(
            dataset=name,
            method=method,
            method_args=args,
            encoder="small",
            epochs=1,
            batch_size=16,
            lr=0.05,
            missing=rate,
            missing_test=rate,
            data=str(work / "data"),
            root=str(work / "runs"),
            progress=False,
            threads=1,
        )
    )
    assert (
        set(r["test"]["accuracy"])
        == {"fused", *(mods[-1:] if method == "unimodal" else mods)}
        and 0 <= r["test"]["accuracy"]["fused"] <= 1
    )


def test_parameter_files_are_in_step_and_complete():
    made = files()
    assert {p.name: p.read_text() for p in OUT.glob("*.yaml")} == made, (
        "run `make params`"
    )
    for text in made.values():
        Run(**yaml.safe_load(text))
    assert (
        set(MODALITIES) == set(MINIATURES) | {"synthetic", "digits"}
        and len(made) == 7 + 5  # `small` everywhere, `paper` where it is published
    )
