"""The notebook that compares runs: like with like, and whatever lies in the folder."""

import ast
import contextlib
import csv
import io
import json
import shutil

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT

from mla_nb.compare import (
    best_single,
    compared,
    comparison_table,
    difference,
    grid,
    plan,
    plot_compared,
    plot_curves,
    read_runs,
    results,
    run_findings,
    with_details,
)
from mla_nb.intervals import as_share, crossed_interval
from mla_nb.methods.base import Pred, scores
from mla_nb.runs.config import Run
from mla_nb.train.checkpoints import load_pred, save_pred

NOTEBOOK = ROOT / "nbs/experiments/compare.ipynb"
MODS = "audio", "visual", "text"
matplotlib.use("Agg")


# runs that take no time: the files of a finished run, with predictions drawn by chance


def predictions(seed, skill, n=40, mods=MODS, test_set=0):
    "A `Pred` that is right on a share `skill` of the test samples `test_set`"
    y = torch.randint(4, (n,), generator=torch.Generator().manual_seed(test_set))
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(mods) + 1, n, 4, generator=g)
    right = torch.rand(len(mods) + 1, n, generator=g) < skill
    logits += 9.0 * right[..., None] * torch.nn.functional.one_hot(y, 4)
    present = torch.ones(len(mods), n, dtype=torch.bool)
    return Pred(list(mods), logits[1:], logits[0], None, present, y, torch.arange(n))


def fake(root, name, skill=0.6, n=40, mods=MODS, test_set=0, data=None, **fields):
    "A folder like that of a finished run"
    cfg = Run(epochs=fields.pop("epochs", 3), **fields)
    p = predictions(hash_of(name), skill, n, mods, test_set)
    folder = root / name
    folder.mkdir(parents=True)
    row = {"train": {"loss": {}, "grad": {}}, "valid": scores(p), "seconds": 0.5}
    rows = [{**row, "epoch": k, "memory": 100} for k in range(cfg.epochs)]
    result = {
        "id": name,
        "run": cfg.what,
        "best_epoch": 1,
        "valid": scores(p),
        "test": scores(p),
        "n_test": n,
        "split": None,
        "bayes": None,
        "params": 1000,
        "seconds": 1.0,
        "environment": {"mla_nb": "0.1.0", "device": "cpu"},
    }
    config = {"run": cfg.what, "data": data, "dataset": {"source": {"name": "real"}}}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    save_pred(p, folder / "predictions.safetensors")
    return folder


def hash_of(name):
    return sum(ord(c) * 31**k for k, c in enumerate(name)) % 10_000


def change(path, **new):
    "Other values in the result of a run; `run` is merged"
    r = json.loads((path / "result.json").read_text())
    r["run"] |= new.pop("run", {})
    (path / "result.json").write_text(json.dumps(r | new))


@pytest.fixture
def root(tmp_path):
    "Two methods with two seeds"
    for method, skill in (("concat", 0.4), ("mla", 0.8)):
        for seed in (0, 1):
            fake(tmp_path / "runs", f"{method}{seed}", skill, method=method, seed=seed)
    return tmp_path / "runs"


def report(root, **given):
    "What the notebook shows, as text; its cells are executed in this process"
    shown, scope = [], {}

    def display(x):
        shown.append(x.data)

    cells = json.loads(NOTEBOOK.read_text())["cells"]
    for c in (c for c in cells if c["cell_type"] == "code"):
        tree = ast.parse("".join(c["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), scope)
        if "parameters" in c["metadata"].get("tags", []):
            scope |= {"root": str(root), **given}
        scope["display"] = display  # the notebook imports it
        if last:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), scope)
            shown += [value.data] if hasattr(value, "data") else []
    plt.close("all")
    return "\n\n".join(shown)


# like with like -----------------------------------------------------------------------


def test_runs_of_other_epochs_are_another_group(root):
    "The trial that failed: 3 and 10 epochs, with other seeds"
    for seed in (0, 1, 2):
        fake(root, f"long{seed}", method="mla", seed=seed, epochs=10)
    said = report(root)
    assert "### synthetic, epochs=3" in said and "### synthetic, epochs=10" in said
    groups = compared(root)
    assert {h: {k: len(v) for k, v in g.items()} for h, g in groups.items()} == {
        "synthetic, epochs=3": {"concat": 2, "mla": 2},
        "synthetic, epochs=10": {"mla": 3},
    }
    assert "7 finished runs" in said and "in 2 groups" in said


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 8},
        {"schedule": "cosine"},
        {"encoder": "resnet18"},
        {"precision": "bf16"},
        {"missing": "0.3"},
        {"weight_decay": 0.1},
        {"dataset_args": "family=balanced"},
    ],
    ids=str,
)
def test_any_other_setting_is_another_group(root, other):
    fake(root, "other", method="mla", seed=0, **other)
    groups = compared(root)
    assert sorted(sum(map(len, g.values())) for g in groups.values()) == [1, 4]
    [name] = other
    told = "family=balanced" if name == "dataset_args" else f"{name}={other[name]}"
    [heading] = [h for h in groups if told in h]
    assert len(groups[heading]["mla"]) == 1
    assert not [h for h in groups if "weight_decay" in h and name != "weight_decay"]


def test_another_split_and_another_version_of_the_data_are_other_groups(root):
    change(root / "mla1", split="ogm")
    fake(root, "newer", method="mla", seed=5, data="abcdef0123456789")
    headings = list(compared(root))
    assert len(headings) == 3
    assert "synthetic, split ogm, data version=" in headings
    assert "synthetic, data version=abcdef01" in headings


def test_runs_with_other_test_samples_are_not_paired(root):
    fake(root, "fewer", method="concat", seed=7, n=30)
    assert len(compared(root)) == 2
    groups, _ = with_details(compared(root))
    fake(root.parent / "x", "mla9", method="mla", seed=0, test_set=1)
    [other] = with_details(compared(root.parent / "x"))[0].values()
    [group] = [g for g in groups.values() if "mla" in g]
    assert difference(other["mla"], group["concat"]) is None
    assert difference(group["mla"], group["concat"])["n"] == 2
    assert "### synthetic, test samples=30" in report(root)


def test_rates_may_differ_between_methods_and_never_within_a_row(root):
    for seed in (0, 1):
        fake(root, f"ogm{seed}", method="ogm", seed=seed, lr=0.3)
    [group] = compared(root).values()
    assert list(group) == ["concat", "mla", "ogm"]
    assert "| ogm | 2 | 0.3 |" in report(root)
    fake(root, "mla-slow", method="mla", seed=0, lr=0.01)
    fake(root, "concat-slow", method="concat", seed=0, lr=0.01)
    [group] = compared(root).values()
    assert {k: len(v) for k, v in group.items()} == {
        "concat lr=0.01": 1,
        "concat lr=0.1": 2,
        "mla lr=0.01": 1,
        "mla lr=0.1": 2,
        "ogm": 2,
    }
    said = report(root)
    assert "| mla lr=0.01 | concat lr=0.01 |" in said
    assert "| mla lr=0.1 | concat lr=0.1 |" in said


def test_a_copy_of_a_run_counts_once_and_the_one_with_predictions_counts(root):
    shutil.copytree(root / "mla1", root / "a-copy")
    (root / "a-copy/predictions.safetensors").unlink()
    [group] = compared(root).values()
    assert [r["run"]["seed"] for r in group["mla"]] == [0, 1]
    assert group["mla"][1]["folder"] == str(root / "mla1")
    assert "| mla | 2 |" in report(root)


# what is shown ------------------------------------------------------------------------


def test_the_best_single_modality_comes_first_and_validation_chooses_it(root):
    for m, skill in (("audio", 0.9), ("text", 0.5)):
        args = {"method": "unimodal", "method_args": f"modality={m}"}
        fake(root, f"u{m}", skill, mods=[m], seed=0, **args)
    change(root / "utext", test={"accuracy": {"fused": 1.0, "text": 1.0}, "loss": {}})
    groups, _ = with_details(compared(root))
    [group] = groups.values()
    assert best_single(group) == ("audio", "unimodal(modality=audio)")
    first = comparison_table(group).splitlines()[2]
    assert first.startswith("| *best single: audio* | 1 |")
    said = report(root)
    assert "The best single modality is audio (in `unimodal(modality=audio)`" in said
    assert "Compared with `concat`, more accurate: `mla`" in said
    assert "some rows have only 1 seed" in said.lower()


def test_the_table_holds_scores_intervals_rates_and_costs(root):
    said = report(root)
    head = "| method | n | learning rate | fused, % | macro F1, % | balanced, % |"
    assert f"{head} mAP, % | audio, % | visual, % | text, % |" in said
    [group] = with_details(compared(root))[0].values()
    p = [load_pred(root / f"mla{k}") for k in (0, 1)]
    right = [(q.fused.argmax(1) == q.y).double().numpy() for q in p]
    d = as_share(crossed_interval(right), len(right[0]))  # one test set, two seeds
    text = " ".join(f"{100 * d[k]:.1f}" for k in ("mean", "low", "high"))
    assert "| mla | 2 | 0.1 | {} ({}–{}) |".format(*text.split()) in said
    assert "| mla | cpu | 0.50 | 2 s | 100 | 1,000 |" in said
    assert "| mla | concat | +" in said and "n = 2)" in said


def test_one_seed_has_the_interval_of_its_test_samples(tmp_path):
    fake(tmp_path / "runs", "only", method="mla")
    said = report(tmp_path / "runs")
    assert "1 finished run below" in said
    assert "No method named 'concat'" in said or "| mla | – |" in said
    [r] = results(tmp_path / "runs")
    from mla_nb.compare import wilson

    low, high = wilson(round(40 * r["test"]["accuracy"]["fused"]), 40)
    assert f"({100 * low:.1f}–{100 * high:.1f})" in said


def test_chosen_rates_are_told(root):
    assert "There is no `sweep.json` here" in report(root)
    row = {"dataset": "synthetic", "method": "mla", "method_args": {}, "n": 3}
    rows = [row | {"lr": v, "chosen": v == 0.3} for v in (0.03, 0.1, 0.3)]
    (root / "sweep.json").write_text(json.dumps(rows))
    said = report(root)
    assert "3 learning rates were tried (0.03, 0.1, 0.3) with 3 seeds" in said
    assert "At the edge of the rates: `mla`" in said
    (root / "sweep.json").write_text("[{}]")
    assert "sweep.json` cannot be read" in report(root)


def test_published_numbers_stand_beside_the_same_method_and_dataset_only(root):
    for name in ("mla0", "mla1", "concat0", "concat1"):
        change(root / name, run={"dataset": "cremad", "dataset_args": {}})
    with (ROOT / "results/published.csv").open() as f:
        rows = [r for r in csv.DictReader(f) if r["dataset"] == "cremad"]
    numbers = {r["method"]: r["value"] for r in rows}
    path = str(ROOT / "results/published.csv")
    said = report(root, published=path)
    assert "*published, % (not run here)*" in said
    assert f"{numbers['MLA']} ([" in said and f"{numbers['joint training']} ([" in said
    assert numbers["QMF"] not in said
    assert "published, %" not in report(root, published=str(root / "none.csv"))
    for name in ("mla0", "mla1"):  # another method than the published one
        change(root / name, run={"method_args": {"projection": False}})
    said = report(root, published=path)
    assert numbers["MLA"] not in said and numbers["joint training"] in said
    made = {"run": {}, "data": None, "dataset": {"source": "(miniature: made, not…)"}}
    for name in ("concat0", "concat1"):
        (root / name / "config.json").write_text(json.dumps(made))
    assert "published, %" not in report(root, published=path)


def test_long_paths_and_many_modalities_keep_the_layout(tmp_path):
    long = "audio=hf:" + "/a/long/path" * 20 + "/one,visual=small"
    mods = [f"m{k}" for k in range(6)]
    for k, encoder in enumerate((long, long.replace("one", "two"))):
        args = {"option" * 12: "value" * 12}
        for method in ("concat", "mla"):
            folder = fake(tmp_path, f"{method}{k}", mods=mods, seed=0, method=method)
            change(folder, run={"encoder": encoder, "method_args": args})
    groups, wrong = with_details(compared(tmp_path))
    assert not wrong and len(groups) == 2
    assert all("…" in h and len(h) < 100 for h in groups)
    for heading, group in groups.items():
        fig = plot_compared(heading, group)
        axs = [ax for ax in fig.axes if ax.axison]
        assert fig.get_figwidth() == 8 and len(axs) == 7
        assert len({ax.get_position().x0 for ax in fig.axes}) == 4  # four in a row
        fig.canvas.draw()
        for label in [t for ax in axs[:1] for t in ax.get_yticklabels()]:
            assert max(map(len, label.get_text().splitlines())) <= 28
        assert axs[0].get_position().width > 0.1  # labels leave room to the panels
        ends = [t.get_text() for t in plot_curves(heading, group).texts]
        assert len(ends) == 2 and max(map(len, ends)) <= 30
    said = report(tmp_path)
    assert "/a/long/path" * 10 not in said
    plt.close("all")


# whatever lies there ------------------------------------------------------------------

DAMAGE = {
    "not JSON": ("result.json", "{bad", "result.json cannot be read"),
    "a list": ("result.json", "[]", "is damaged"),
    "no run": (
        "result.json",
        json.dumps({"id": 1, "run": None, "test": {}, "valid": {}, "bayes": None}),
        "is not the result of a run",
    ),
    "text for a number": (
        "result.json",
        json.dumps(
            {
                "id": "x",
                "run": {"dataset": "synthetic", "method": "mla", "seed": "0"},
                "test": {"accuracy": {"fused": 0.5}},
                "valid": {"accuracy": {"fused": 0.5}},
                "bayes": None,
            }
        ),
        "is not the result of a run",
    ),
    "no predictions": ("predictions.safetensors", None, "no macro F1, mAP or interval"),
    "torn predictions": (
        "predictions.safetensors",
        "x",
        "no macro F1, mAP or interval",
    ),
    "no epochs": ("metrics.jsonl", None, "no curve and no time per epoch"),
    "torn epochs": ("metrics.jsonl", '{"epoch": 0', "no curve and no time per epoch"),
    "other epochs": ("metrics.jsonl", '{"epoch": 0}\n', "no curve and no time"),
    "torn config": ("config.json", "{", "data version=not known"),
    "no config": ("config.json", None, "data version=not known"),
    "torn checksums": ("checksums.json", "{", "do not trust them"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_ends_in_no_error_and_is_named(root, case):
    name, text, says = DAMAGE[case]
    path = root / "mla1" / name
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    said = report(root)
    assert says in said and "| concat | 2 | 0.1 |" in said
    assert ("mla1" in said) or "config" in case


def test_predictions_of_another_run_are_refused(root):
    shutil.copy(root / "concat0/predictions.safetensors", root / "mla1")
    assert "the predictions are not those of result.json" in report(root)
    save_pred(predictions(0, 0.8, mods=["x"]), root / "mla0/predictions.safetensors")
    assert report(root).count("not those of result.json") == 2


def test_all_runs_without_predictions_or_epochs(root):
    for path in (*root.rglob("predictions.safetensors"), *root.rglob("metrics.jsonl")):
        path.unlink()
    said = report(root)
    assert "| mla | 2 | 0.1 |" in said and "| – | – |" in said
    assert "No method named 'concat' here to compare with, on the same seeds" in said


@pytest.mark.parametrize("kind", ["empty", "missing", "unfinished", "strange", "typo"])
def test_nothing_to_compare_is_one_sentence_that_says_what_to_do(tmp_path, kind):
    where, given = tmp_path / "runs", {}
    if kind != "missing":
        where.mkdir()
    if kind == "unfinished":
        (where / "one").mkdir()
        (where / "one/config.json").write_text("{}")
    if kind == "strange":
        (where / "result.json").mkdir()
        (where / "note.txt").write_text("hello")
    if kind == "typo":
        fake(where, "one", method="mla")
        given["dataset"] = "synthetik"
    said = report(where, **given)
    assert "There is no finished run" in said and "mla grid --method" in said
    assert ("Not finished, and not shown: 1." in said) == (kind == "unfinished")
    assert ("result.json cannot be read" in said) == (kind == "strange")


def test_runs_of_other_versions(root):
    "One has a field that we do not know, one lacks fields and keys that came later"
    newer = root / "mla1"
    change(newer, environment={"mla_nb": "9.0"}, run={"warmup": 5}, extra=[1])
    path = root / "concat0/result.json"
    r = json.loads(path.read_text())
    for k in ("split", "n_test", "params", "seconds", "environment", "best_epoch"):
        del r[k]
    for k in ("missing", "tf32", "processes", "augment"):
        del r["run"][k]
    path.write_text(json.dumps(r))
    said = report(root)
    assert "warmup=5" in said and "mla_nb 9.0" in said and "of unknown version" in said
    assert "4 finished runs" in said


def test_a_dataset_and_a_method_that_we_do_not_know(root):
    change(root / "mla1", run={"dataset": "theirs", "method": "newest"})
    said = report(root)
    assert "### theirs" in said and "| newest | 1 |" in said


def test_runs_with_missing_modalities_and_scores(root):
    test = {"accuracy": {"fused": 0.5, "audio": None}, "loss": {}}
    change(root / "mla1", test=test)
    said = report(root)
    assert "| mla | 2 |" in said and "not those of result.json" in said


def test_results_warns_of_what_is_left_out(root):
    (root / "mla1/result.json").write_text("{bad")
    with pytest.warns(UserWarning, match="mla1/result.json cannot be read"):
        assert len(results(root)) == 3
    found, wrong = read_runs(root)
    assert len(found) == 3 and len(wrong) == 1


def test_what_a_run_of_one_modality_says():
    p = predictions(0, 0.9, mods=["audio"])
    r = {"test": scores(p), "valid": scores(p), "run": {"epochs": 3}, "best_epoch": 1}
    said = run_findings(r, p)
    assert "There is one modality" in said and "more epochs" not in said
    p = predictions(0, 0.9)
    r = {"test": scores(p), "valid": scores(p), "run": {"epochs": 3}, "best_epoch": 3}
    said = run_findings(r, p)
    assert "paired over test samples" in said and "more epochs may help" in said


# by papermill -------------------------------------------------------------------------


def test_compare_by_papermill(tmp_path):
    "Real runs, beside damaged ones"
    pm = pytest.importorskip("papermill")
    runs = plan(
        "synthetic(n_train=96,n_valid=32,n_test=32)",
        "concat,mla",
        "0:2",
        epochs=2,
        root=str(tmp_path / "runs/below"),
    )
    with contextlib.redirect_stderr(io.StringIO()):
        grid(runs, label="")  # found below folders too
    fake(tmp_path / "runs", "torn", method="mla")
    (tmp_path / "runs/torn/result.json").write_text("{")
    out = tmp_path / "out.ipynb"
    for _ in range(2):  # an executed notebook can be executed again
        pm.execute_notebook(
            NOTEBOOK if not out.exists() else out,
            out,
            {"root": str(tmp_path / "runs")},
            kernel_name="python3",
            progress_bar=False,
        )
    said = json.dumps(json.loads(out.read_text())["cells"])
    for what in ("95% interval", "seconds per epoch", "image/png", "torn/result.json"):
        assert what in said
    assert said.count("| mla |") >= 3 and "stderr" not in said
