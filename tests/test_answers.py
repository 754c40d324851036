"""What people need to know without asking: majority, best single modality, useless
modalities, thin classes, other rules for a finished run, and tables that say why."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mla_nb.cli import main, summary
from mla_nb.compare import evaluate_run, table, table_notes
from mla_nb.core import Batch
from mla_nb.data.own import own_example, prepare_own
from mla_nb.data.prepared import class_counts, thin_classes
from mla_nb.evaluation import (
    appraise,
    contributions,
    findings,
    gap_to_single,
    metrics,
    right_by_subset,
)
from mla_nb.heads import Net
from mla_nb.methods.base import Pred, concat, predict, scores
from mla_nb.methods.mla import mla
from mla_nb.predict import load, read_item
from mla_nb.predict_table import predict_table
from mla_nb.reliability import doctor
from mla_nb.runs.config import Run
from mla_nb.runs.run import make_dataset, run
from mla_nb.tools import InputError
from mla_nb.train.checkpoints import load_pred

TINY = {"dataset_args": "n_train=64,n_valid=48,n_test=60", "epochs": 1}
QUIET = {"progress": False, "threads": 1}


# numbers and sentences ----------------------------------------------------------------


def drawn(skills, n=400, classes=4, weights=None):
    "A `Pred` whose modalities, and fusion ('fused'), are right that often"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes

    def answers(skill):
        right = torch.rand(n, generator=g) < skill
        k = torch.where(right, y, (y + 1) % classes)
        return 5.0 * torch.nn.functional.one_hot(k, classes).float()

    mods = [m for m in skills if m != "fused"]
    logits = torch.stack([answers(skills[m]) for m in mods])
    w = None if weights is None else torch.tensor(weights)[:, None].expand(-1, n)
    present = torch.ones(len(mods), n, dtype=torch.bool)
    fused = answers(skills["fused"])
    return Pred(mods, logits, fused, w, present, y, torch.arange(n))


def told(p, right):
    r = appraise(p, scores(p)["accuracy"], right) | {"n_test": len(p.y)}
    return r, findings(r)


def subsets(n, **shares):
    "Which of n samples each subset has right; 'ab' is the subset of a and b"
    rows = torch.arange(n)
    return {tuple(k.strip("_")): rows < v * n for k, v in shares.items()}


def test_a_fusion_that_loses_is_said_with_the_weight_of_the_useless_half():
    p = drawn({"a": 0.9, "b": 0.25, "fused": 0.6}, weights=[0.5, 0.5])
    right = subsets(400, _=0.25, a=0.9, b=0.25, ab=0.6)
    r, said = told(p, right)
    assert r["single"]["modality"] == "a" and r["single"]["high"] < -0.15
    assert any(t.startswith("The fusion loses to a alone: ") for t in said)
    assert any("b contributes nothing" in t and "weight is 0.50" in t for t in said)
    assert not any(t.startswith(("a ", "No contribution of a")) for t in said)
    acc, alone = (scores(p)["accuracy"][k] for k in ("fused", "a"))
    assert any(f"{100 * acc:.1f}% against {100 * alone:.1f}%" in t for t in said)


def test_where_nothing_is_wrong_nothing_is_said():
    p = drawn({"a": 0.6, "b": 0.6, "fused": 0.9})
    r, said = told(p, subsets(400, _=0.25, a=0.6, b=0.6, ab=0.9))
    assert said == [] and r["mean_weights"] is None
    assert abs(sum(v["mean"] for v in r["contributions"].values()) - 0.65) < 1e-9


def test_one_that_is_no_better_than_a_class():
    p = drawn({"a": 0.2, "b": 0.2, "fused": 0.2})
    p = replace(p, y=torch.where(torch.arange(400) < 300, 0, p.y))
    p = replace(p, fused=torch.eye(4)[torch.full((400,), 1)])
    _, said = told(p, subsets(400, _=0.75, a=0.2, b=0.2, ab=0.2))
    assert any("always naming the most frequent class" in t for t in said)


def test_one_modality_has_nothing_to_lose_to():
    p = drawn({"a": 0.8, "fused": 0.8})
    r, said = told(p, {(): torch.ones(4).bool(), ("a",): torch.ones(4).bool()})
    assert r["single"] is None and r["contributions"] == {} and said == []


def test_balanced_accuracy_is_the_mean_recall_of_the_classes_that_are_there():
    p = drawn({"a": 0.7, "b": 0.4, "fused": 0.5}, n=60, classes=5)
    p = replace(p, y=torch.where(p.y == 4, 0, p.y))  # class 4 has no sample
    guess, found = p.fused.argmax(1), metrics(p)["fused"]["balanced"]
    recall = [(guess[p.y == k] == k).double().mean() for k in range(4)]
    assert abs(found - sum(recall) / 4) < 1e-9
    broken = replace(p, fused=p.fused * torch.nan)
    assert 0 <= metrics(broken)["fused"]["map"] <= 1  # NaN is no traceback


class Passed(torch.nn.Module):
    "An encoder whose features are its inputs"

    num_features = 3

    def preprocessor(self, x):
        return x

    preprocessor.normalize = lambda x: x

    def forward(self, x):
        return x


@pytest.mark.parametrize("method", [concat(), mla()], ids=["concat", "mla"])
def test_subsets_are_what_prediction_says_without_the_others(method):
    torch.manual_seed(0)
    mods = {m: Passed() for m in "abc"}
    net = Net(mods, method.head(dict.fromkeys(mods, 3), 4))
    present = {m: torch.rand(40) < 0.7 for m in mods}
    present["a"] |= ~(present["b"] | present["c"])
    x = {m: torch.randn(40, 3) * present[m][:, None] for m in mods}
    b = Batch(x, torch.randint(4, (40,)), present, torch.arange(40))
    found = right_by_subset(net, method, [b])
    assert len(found) == 8
    most = b.y.bincount().argmax()
    for sub, right in found.items():
        here = torch.stack([present[m] for m in sub]).any(0) if sub else b.y < 0
        assert torch.equal(right[~here], (b.y == most)[~here])
        if here.any():
            part = predict(net, method, b.only(sub))
            assert torch.equal(right[here], part.fused.argmax(1) == part.y)
    parts = contributions(found)
    total = found[tuple("abc")].double().mean() - found[()].double().mean()
    assert abs(sum(v["mean"] for v in parts.values()) - total) < 1e-9


# a run and its table ------------------------------------------------------------------


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers")
    cfg = Run(**TINY, **QUIET, root=str(root / "runs"), name="moods")
    return cfg, run(cfg)


def test_a_run_stores_its_answers(moods):
    cfg, r = moods
    p = load_pred(cfg.folder)
    assert r["metrics"] == metrics(p)
    assert r["majority"]["accuracy"] == p.y.bincount().max().item() / len(p.y)
    assert r["single"] == gap_to_single(p, r["valid"]["accuracy"])
    assert list(r["contributions"]) == p.mods == list(r["mean_weights"])
    assert r["findings"] == findings(r)
    assert r["thin_classes"] == thin_classes(class_counts(make_dataset(cfg)))
    lines = summary(r).splitlines()
    assert (
        f"| *most frequent class* | {100 * r['majority']['accuracy']:.1f} |"
        in (lines[5][:36])
    )
    assert [t for t in r["findings"] if t not in lines] == []


def test_tables_hold_the_answers_and_older_results_stay_readable(moods, capsys):
    cfg, r = moods
    root = Path(cfg.root)
    main(["table", str(root)])
    said = capsys.readouterr().out
    balanced = 100 * r["metrics"]["fused"]["balanced"]
    assert f"| {balanced:.1f} |" in said and "*most frequent class*" in said
    assert f"| {r['single']['modality']} |\n" in said
    assert all(t in said for t in r["findings"])
    new = "metrics", "majority", "single", "contributions", "mean_weights", "findings"
    old = {k: v for k, v in r.items() if k not in new}
    assert "| – | – |" in table([old]) and table_notes([old]) == []
    assert "balanced accuracy" not in summary(old)
    many = table_notes([r, {**r, "run": {**r["run"], "seed": 1}}])
    assert all("mean of 2 seeds" in text for text in many)


# the same run under other rules -------------------------------------------------------


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_finished_run_answers_again(moods):
    cfg, r = moods
    before = files_of(cfg.folder)
    e = evaluate_run(cfg.folder, "entropy,fixed,mean", probe=True)
    assert list(e["rules"]) == ["entropy", "fixed", "mean"]
    entropy, fixed, mean = e["rules"].values()
    for m, v in r["metrics"].items():  # the run's own rule
        assert entropy["metrics"][m] == pytest.approx(v, abs=1e-3)
    p = load_pred(cfg.folder)
    guess = p.logits.mean(0).argmax(1)
    right = (guess == p.y).double().mean().item()
    assert mean["metrics"]["fused"]["accuracy"] == pytest.approx(right)
    assert sum(fixed["weights"].values()) == pytest.approx(1, abs=1e-3)
    assert fixed["valid"]["fused"] >= mean["valid"]["fused"]  # it was fitted there
    assert set(e["probe"]) == set(p.mods) == set(e["modalities"])
    assert files_of(cfg.folder) == before
    own = evaluate_run(cfg.folder)["rules"]["own"]["metrics"]["fused"]["accuracy"]
    assert own == pytest.approx(r["test"]["accuracy"]["fused"])


def test_temperatures_and_validation(moods):
    cfg, r = moods
    e = evaluate_run(cfg.folder, temperature="validation", split="valid")
    assert e["n"] == 48 and e["temperature"] == "validation"
    assert e["modalities"]["audio"]["accuracy"] == pytest.approx(
        r["valid"]["accuracy"]["audio"]
    )
    with pytest.raises(InputError, match="did you mean 'test'"):
        evaluate_run(cfg.folder, split="tset")
    with pytest.raises(InputError, match="does not look"):
        evaluate_run(cfg.folder, "mean", "validation")
    with pytest.raises(InputError, match="not the folder of a finished run"):
        evaluate_run(Path(cfg.root))


def test_the_command(moods, capsys):
    cfg, _ = moods
    main(["evaluate", str(cfg.folder), "--rule", "mean,fixed(steps=4)"])
    said = capsys.readouterr().out
    assert "| mean |" in said and "| fixed(steps=4) |" in said and "balanced" in said
    main(["evaluate", str(cfg.folder), "--json"])
    assert "own" in json.loads(capsys.readouterr().out)["rules"]
    with pytest.raises(SystemExit, match="did you mean 'entropy'"):
        main(["evaluate", str(cfg.folder), "--rule", "entrpy"])
    with pytest.raises(SystemExit, match="no such folder"):
        main(["evaluate", "nowhere"])


# a table of one's own -----------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A prepared table whose rare class has no test sample, and a run on it"
    root = tmp_path_factory.mktemp("study")
    path = own_example(root / "raw", 60)
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    for k, row in enumerate(rows):
        row["split"] = ("train", "train", "test", "train", "valid")[k % 5]
        if row["split"] != "train" and row["label"] == "tense":
            row["label"] = "low"
    write(path, rows)
    small = {"audio": "log_mel", "seconds": 1.0, "size": 24, "progress": False}
    prepare_own(path, "tux", data=str(root / "data"), **small)
    cfg = Run(
        dataset="own",
        dataset_args="variant=tux",
        epochs=1,
        batch_size=16,
        data=str(root / "data"),
        root=str(root / "runs"),
        name="tux",
        workers=0,
        **QUIET,
    )
    return cfg, run(cfg), path, rows


def write(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)


def read(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_class_without_a_test_sample_is_named_after_training_and_by_the_doctor(study):
    cfg, r, path, _ = study
    want = "The test split has no sample of 'tense': no number measures it."
    assert want in r["thin_classes"] and want in summary(r)
    folder = Path(cfg.data) / "own-tux"
    [classes] = [f for f in doctor([folder]) if f.what.endswith(" classes")]
    counts = class_counts(make_dataset(cfg))
    assert classes.ok and want in classes.says
    assert f"tense {counts['train']['tense']}" in classes.says
    assert "test calm" in classes.says


@pytest.mark.parametrize("name", ["tux", "own-tux"])
@pytest.mark.parametrize("command", ["train", "grid"])
def test_a_folder_in_place_of_a_dataset(study, name, command):
    cfg = study[0]
    with pytest.raises(SystemExit, match=r"its name is own\(variant=tux\)"):
        main([command, "--dataset", name, "--data", cfg.data])


def test_options_in_the_name_of_the_dataset(study, capsys):
    "The same run, so it is finished already"
    cfg, r, *_ = study
    words = ["--epochs", "1", "--batch_size", "16", "--name", "tux"]
    words += ["--data", cfg.data, "--root", cfg.root, "--threads", "1"]
    main(["train", "--dataset", "own(variant=tux)", *words])
    said = capsys.readouterr().out
    assert "own(variant=tux)" in said and str(r["best_epoch"]) in said


def test_rows_of_a_table(study, tmp_path):
    "An unknown label, a blank text, and rows that the model was trained on"
    cfg, _, path, rows = study
    p = load(cfg.folder)
    some = [dict(r) for r in rows[:20]]
    for r in some:
        r.pop("split"), r.pop("group")
    some[3]["label"] = "tens"
    (path.parent / "blank.txt").write_bytes(b"\xef\xbb\xbf\r\n")
    some = [{**r, "text_file": ""} for r in some]
    some[4] = {
        **some[4],
        "audio": "",
        "image": "",
        "text": "",
        "text_file": "blank.txt",
    }
    table = path.with_name("some.csv")
    write(table, some)
    out = tmp_path / "out.csv"
    done = predict_table(p, table, out, progress=False, data=cfg.data)
    found = read(out)
    assert done["answered"] == 19 and done["labeled"] == 18 and done["reasons"] == 2
    assert "did you mean 'tense'" in found[3]["reason"] and found[3]["answer"]
    assert "has none of" in found[4]["reason"] and not found[4]["answer"]
    assert [r["split"] for r in found] == [r["split"] for r in rows[:20]]
    assert done["trained"] == sum(r["split"] == "train" for r in rows[:20])
    new = [r for k, r in enumerate(found) if r["split"] != "train" and k not in (3, 4)]
    right = sum(r["answer"] == r["label"] for r in new)
    assert done["new"] == len(new) and done["accuracy_new"] == right / len(new)
    elsewhere = predict_table(p, table, tmp_path / "b.csv", 32, False, "nowhere")
    assert elsewhere["trained"] == 0 and elsewhere["answered"] == 19


def test_the_command_says_so_and_fails_where_no_row_is_answered(study, capsys):
    cfg, _, path, rows = study
    folder, data = str(cfg.folder), ["--data", cfg.data]
    out = str(path.with_name("out.csv"))
    write(
        path.with_name("few.csv"), [{k: r[k] for k in ("id", "text")} for r in rows[:3]]
    )
    main(
        [
            "predict",
            folder,
            "--csv",
            str(path.with_name("few.csv")),
            "--out",
            out,
            *data,
        ]
    )
    assert "2 of these rows have the id of a training sample" in capsys.readouterr().out
    path.with_name("gone.csv").write_text("id,audio\na,gone.wav\nb,lost.wav\n")
    gone = str(path.with_name("gone.csv")), "--out", out + "2"
    with pytest.raises(SystemExit, match="no row was answered") as e:
        main(["predict", folder, "--csv", *gone, *data])
    assert e.value.code != 0 and "2 rows have a reason" in capsys.readouterr().out


def test_a_run_on_features_says_what_made_them():
    about = {
        "modalities": {"audio": {"kind": "audio", "form": "vector", "info": {}}},
        "items": {"audio": [4]},
        "run": {"dataset": "cremad"},
        "dataset": {
            "encoder": "hf:some/encoder",
            "weights": {"audio": {"source": "hub"}},
            "source": {"features_of": "cremad"},
        },
    }
    said = r"shape \(4,\), made by hf:some/encoder \(weights: hub\) as for cremad, or"
    with pytest.raises(InputError, match=said):
        read_item("audio", "a.wav", about)
    about["dataset"] = {"encoder": "", "run": "mla-7"}
    with pytest.raises(InputError, match="made by the run mla-7, or train on"):
        read_item("audio", "a.wav", about)
