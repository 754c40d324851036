"""The preset `paper` of each dataset, and the table in its chapter."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT

from mla_nb.compare import plan
from mla_nb.core import InputError, datasets, discover
from mla_nb.data.miniature import miniature
from mla_nb.encoders.image import IMAGENET
from mla_nb.predict import card, load
from mla_nb.runs.config import PRESET, Run, preset_text
from mla_nb.runs.run import build, make_dataset, run, settled

discover()
CHAPTERS = {
    "cremad": "35_cremad",
    "food101": "36_food101",
    "mvsa": "37_mvsa",
    "iemocap": "38_iemocap",
    "kinetics": "39_own",
}


HEAD = "| setting | paper | released code | preset `paper` | why it differs |"
ABOVE = {"food101": "cremad", "mvsa": "food101", "iemocap": "cremad"}
ABOVE["kinetics"] = "cremad"  # whose chapter has the rows that are alike
ALIKE = [
    "epochs",
    "batch_size",
    "lr",
    "optimizer",
    "momentum",
    "weight_decay",
    "schedule",
    "precision",
]


def table_of(name):
    "setting -> cell of the column of the preset, of the chapter's table"
    nb = json.loads((ROOT / f"nbs/{CHAPTERS[name]}.ipynb").read_text(encoding="utf-8"))
    text = "\n".join(
        "".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "markdown"
    )
    above = table_of(ABOVE[name]) if name in ABOVE else {}
    if HEAD not in text:  # the chapter says whose settings it has
        assert name == "mvsa" and "section 36.6" in text
        return above
    assert text.count(HEAD) == 1
    rows = text.split(HEAD)[1].split("\n\n")[0].strip().splitlines()[1:]
    cells = [[c.strip() for c in r.strip("|").split("|")] for r in rows]
    assert all(len(c) == 5 and c[2] for c in cells)  # released is never empty
    own = {c[0]: c[3] for c in cells}
    assert name == "cremad" or (
        "section 35.5" in text and not {f"`{k}`" for k in ALIKE} & {*own}
    )
    return {k: v for k, v in above.items() if k.strip("`") in ALIKE} | own


def test_every_dataset_with_published_settings_has_a_chapter():
    assert {n for n, s in datasets.items() if "paper" in s.presets} == set(CHAPTERS)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_preset_is_what_its_chapters_table_says(name):
    spec, told = datasets[name], table_of(name)
    wanted = {**spec.presets["paper"], **spec.stored["paper"]}
    named = {k.strip("`"): v for k, v in told.items() if re.fullmatch(r"`\w+`", k)}
    assert set(named) == set(wanted)
    for k, v in wanted.items():
        assert named[k] == f"`{v}`", k
        here = "no" if k == "precision" else str(v)  # auto, on a CPU
        assert k in spec.stored["paper"] or str(getattr(paper(name), k)) == here


def paper(name, **more):
    return Run(dataset=name, preset="paper", **more)


def test_small_is_the_default_and_what_is_named_wins():
    for name in CHAPTERS:
        assert Run(dataset=name) == Run(dataset=name, preset="small")
        assert {k: getattr(Run(dataset=name), k) for k in PRESET} == PRESET
    cfg = paper("cremad", lr=0.5, augment="")
    assert (cfg.lr, cfg.augment, cfg.epochs) == (0.5, "", 100)
    assert "here augment=, " not in preset_text(cfg)


def test_the_preset_does_not_name_a_run_but_its_fields_do():
    told = {**PRESET, **datasets["cremad"].presets["paper"]}
    spelled = Run(dataset="cremad", **told)
    assert spelled.id == paper("cremad").id != Run(dataset="cremad").id


def test_a_preset_that_is_not_there():
    with pytest.raises(InputError, match="did you mean 'paper'"):
        Run(dataset="cremad", preset="papr")
    with pytest.raises(InputError, match="Allowed: small"):
        Run(dataset="digits", preset="paper")


def test_one_line_says_which_preset_runs():
    line = preset_text(paper("mvsa", lr=0.01))
    assert line.startswith("preset paper of mvsa: ") and "\n" not in line
    assert "lr=0.001" in line and line.endswith("; here lr=0.01, precision=no")
    assert "--preset paper" in preset_text(Run(dataset="mvsa"))
    assert "--preset" not in preset_text(Run())


def test_auto_precision_is_decided_by_the_device(monkeypatch):
    cfg = paper("cremad")
    assert cfg.precision == settled(cfg).precision == "no"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert paper("cremad").precision == "bf16"
    assert paper("cremad", device="cpu").precision == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert paper("cremad").precision == "no"
    assert paper("cremad", precision="bf16").precision == "bf16"
    monkeypatch.delitem(sys.modules, "torch")
    unsettled = paper("cremad")
    assert unsettled.precision == "auto"
    monkeypatch.undo()
    assert settled(unsettled).precision == "no"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "The miniature of CREMA-D, prepared by the preset `paper`"
    work = tmp_path_factory.mktemp("paper")
    root, where = miniature("cremad", work / "raw", 72), ["--data", str(work)]
    small = ["--size", "48", "--store", "64", "--workers", "0"]
    datasets["cremad"].prepare(
        ["--root", str(root), "--preset", "paper", *where, *small]
    )
    return work


def test_the_paper_path_on_the_miniature(clips, capsys):
    "Proportions kept, frames as released, crops in training, squashed at test"
    cfg = paper("cremad", data=str(clips), workers=0)
    s = make_dataset(cfg)
    item = s.train[0]["x"]
    assert tuple(item["audio"].shape) == (1024, 128)
    h, w = item["video"].shape[-2:]
    assert item["video"].shape[:2] == (3, 3) and min(h, w) == 64 < max(h, w)
    assert s.info["pick"] == "starts" and s.info["store"] == 64
    learn = build(cfg.replace(batch_size=8), s)
    pixels = learn.net.encoders["video"].preprocessor
    assert torch.allclose(pixels.mean, torch.tensor(IMAGENET[0]))
    batch, tested = next(iter(learn.dls.train)), next(iter(learn.dls.test))
    assert batch.x["video"].shape == (8, 3, 3, 48, 48)
    assert tested.x["video"][0].equal(pixels.encode(s.test[0]["x"]["video"]))


def test_the_paper_preset_runs_and_says_how_the_data_differ(clips, tmp_path, capsys):
    told = {"encoder": "small", "epochs": 1, "progress": False, "workers": 0}
    where = {"data": str(clips), "root": str(tmp_path)}
    cfg = paper("cremad", **told, **where)
    r, r_folder = run(cfg), settled(cfg).folder
    said = capsys.readouterr().out
    assert 0 <= r["test"]["accuracy"]["fused"] <= 1
    assert "prepared with size=48, store=64, where the preset has size=224" in said
    assert "miniature: made, not recorded), split random;" in card(load(r_folder))


def test_without_weights_it_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = str(miniature("mvsa", tmp_path / "raw", 40))
    datasets["mvsa"].prepare(
        ["--root", root, "--data", "data", "--size", "32", "--workers", "0"]
    )
    with pytest.raises(
        InputError, match="weights/m3ae_base.pkl: there is no such"
    ) as e:
        run(paper("mvsa", progress=False))
    assert "github.com/young-geng/m3ae_public" in str(e.value)
    assert not (tmp_path / "runs").exists()


def test_plan_takes_presets():
    (one,) = plan("cremad", "mla", "0", preset="paper", epochs=2)
    assert (one.preset, one.lr, one.epochs) == ("paper", 0.001, 2)
    assert one.precision == "no"  # decided
