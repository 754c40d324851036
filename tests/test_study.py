"""results/study.py makes rows, goes on where it was stopped, and drops old ones"""

import csv
import json
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from mla_nb.core import InputError
from mla_nb.study import (
    Study,
    bits_of,
    code_version,
    estimate,
    family,
    hex_of,
    leaderboard,
)

PLAN = """
[protocol]
rates = [0.1]
tuning_seeds = [100]
widen = 1
settings = {epochs = 1, batch_size = 32, encoder = "small"}
[data.small]
dataset = "synthetic(n_train=48,n_valid=24,n_test=40)"
modalities = ["text"]
design = "own"
seeds = 2
title = "small"
[data.same]
dataset = "synthetic(n_train=48,n_valid=24,n_test=40,seed=3)"
modalities = ["text"]
design = "shared"
seeds = 2
title = "one test set"
[family.first]
question = "Is mla better than concat?"
reference = "concat"
arms = ["mla momentum=0"]
data = ["small", "same"]
rule = "mean"
[rules]
nets = []
data = []
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    "A plan whose runs were made"
    folder = tmp_path_factory.mktemp("plan")
    (folder / "study.toml").write_text(PLAN)
    made = call(folder)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


def call(folder, *options):
    where = ["--plan", folder, "--runs", folder / "runs", "--jobs", "2"]
    return subprocess.run(
        [sys.executable, ROOT / "results/study.py", *where, *options],
        capture_output=True,
        text=True,
        cwd=folder,
    )


def rows(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def test_every_arm_is_tuned_and_tested_once(plan):
    study = Study(plan)
    arms = ["unimodal(modality=text)", "concat", "mla momentum=0"]
    for data in ("small", "same"):
        assert study.arms(data) == arms
        for arm in arms:
            assert list(study.tried(data, arm)) == [0.1]
            assert sorted(study.values(data, arm)) == [("", 0), ("", 1)]
    assert not list((plan / "runs").glob("*")), "folders are left behind"
    assert len(rows(plan / "runs.csv")) == 12
    again = call(plan)
    assert again.returncode == 0 and len(rows(plan / "runs.csv")) == 12


def test_rows_say_what_a_run_says(plan):
    "The command of a row comes to the numbers of the row"
    study = Study(plan)
    row = study.of("small", "mla momentum=0")[0]
    assert "--momentum 0" in row["command"] and row["version"] == code_version()
    from mla_nb.runs.run import run

    lr = float(row["lr"])
    more = {"root": str(plan / "again"), "threads": 1, "progress": False, "workers": 0}
    r = run(study.config("small", "mla momentum=0", int(row["seed"]), lr, "", more))
    test = r["test"]["accuracy"]
    assert abs(float(row["own"]) - test["fused"]) < 1e-4
    assert abs(float(row["audio"]) - test["audio"]) < 1e-4
    assert float(row["mean"]) <= 1 and float(row["f1"]) <= 1
    assert abs(float(row["valid entropy"]) - r["valid"]["accuracy"]["fused"]) < 1e-4
    assert len(json.dumps(row)) < 2000


def test_answers_are_kept_where_seeds_share_a_test_set(plan):
    study = Study(plan)
    assert {r["data"] for r in study.answers} == {"same"}
    right = study.right("same", "concat", "mean")
    means = study.values("same", "concat", "mean")
    assert right.keys() == means.keys()
    for k, v in right.items():
        assert len(v) == 40 and abs(v.mean() - means[k]) < 1e-4


def test_differences_are_paired(plan):
    study = Study(plan)
    found = family(study, "first")
    for data in ("small", "same"):
        a = study.values(data, "mla momentum=0", "mean")
        b = study.values(data, "concat", "mean")
        by_hand = sum(a[k] - b[k] for k in a) / len(a)
        assert abs(found["mla momentum=0", data]["mean"] - by_hand) < 1e-4
        assert estimate(study, data, "film") is None


def test_a_row_that_is_missing_is_made_again_and_old_rows_are_dropped(plan, tmp_path):
    (tmp_path / "study.toml").write_text(PLAN)
    for name in ("sweep.csv", "runs.csv", "answers.csv"):
        text = (plan / name).read_text()
        (tmp_path / name).write_text(text)
    lines = (plan / "runs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:-1]) + lines[-1][:30])  # torn
    made = call(tmp_path)
    assert made.returncode == 0
    key = ("data", "arm", "seed", "own", "mean")
    now = sorted(tuple(r[k] for k in key) for r in rows(tmp_path / "runs.csv"))
    assert now == sorted(tuple(r[k] for k in key) for r in rows(plan / "runs.csv"))
    text = (tmp_path / "sweep.csv").read_text().replace(code_version(), "0" * 12, 1)
    (tmp_path / "sweep.csv").write_text(text)
    said = call(tmp_path, "--status").stdout
    assert "small: 3 of 3 arms complete" in said
    fresh = call(tmp_path, "--fresh", "--only", "small")
    assert "1 rows of older code are dropped" in fresh.stdout
    assert {r["version"] for r in rows(tmp_path / "sweep.csv")} == {code_version()}


def test_rows_are_verified_by_making_them_again(plan, tmp_path):
    for name in ("study.toml", "sweep.csv", "runs.csv", "answers.csv"):
        (tmp_path / name).write_text((plan / name).read_text())
    same = call(tmp_path, "--verify", "3")
    assert same.returncode == 0 and "3 of 3 rows" in same.stdout
    found = rows(tmp_path / "runs.csv")
    for r in found:
        r["own"] = float(r["own"]) / 2 + 0.001
    with (tmp_path / "runs.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, list(found[0]))
        out.writeheader()
        out.writerows(found)
    other = call(tmp_path, "--verify", "2")
    assert other.returncode == 1 and "2 rows came out differently" in other.stderr
    assert "['own']" in other.stdout


def test_versions_that_make_the_same_numbers_are_kept(plan, tmp_path):
    for name in ("sweep.csv", "runs.csv", "answers.csv"):
        text = (plan / name).read_text().replace(code_version(), "0" * 12)
        (tmp_path / name).write_text(text)
    listed = f'versions = ["{"0" * 12}", "{code_version()}"]'
    text = PLAN.replace("widen = 1", f"widen = 1\n{listed}")
    (tmp_path / "study.toml").write_text(text)
    assert "dropped" not in call(tmp_path, "--fresh", "--only", "small").stdout
    assert len(rows(tmp_path / "runs.csv")) == 12


def test_a_wrong_name_is_one_sentence(plan):
    said = call(plan, "--only", "smal")
    assert said.returncode == 1 and "did you mean 'small'" in said.stderr
    assert "Traceback" not in said.stderr
    with pytest.raises(InputError, match="did you mean 'first'"):
        family(Study(plan), "fist")


def test_confidence_is_asked_of_the_runs_that_the_study_made(plan):
    "The accuracies of its rows; fusion keeps no more samples than there are"
    study = Study(plan)
    ask = runpy.run_path(str(ROOT / "results/confidence.py"))["answers"]
    found = ask(study, "small", "mla momentum=0", "", 0, {"data": "data"})
    row = study.of("small", "mla momentum=0")[0]
    assert found[0]["modality"] == "none"
    for r in found[1:]:
        assert abs(r["accuracy"] - float(row[r["modality"]])) < 1e-4
        assert 1 / 6 < r["confidence when wrong"] <= 1
        assert max(r["mean"], r["probabilities"], r["entropy"]) <= r["alone"] <= 40
    assert sum(r["alone"] for r in found) <= 40


def test_answers_survive_as_text():
    for n in (1, 7, 8, 9, 519):
        right = [k % 3 == 0 for k in range(n)]
        assert bits_of(hex_of(right)).tolist() == [float(v) for v in right]


def test_the_rows_in_the_repository_are_of_one_version():
    study = Study(ROOT / "results/study")
    kinds = (study.sweep, study.runs, study.answers)
    same = study.plan["protocol"]["versions"]  # verified: the same numbers
    assert {r["version"] for part in kinds for r in part} <= set(same)
    assert code_version() == same[-1], "verify the rows, and list the new version"
    assert not any("/" in r["note"] for r in study.sweep), "a path of one machine"


def test_the_plan_names_what_exists():
    "Every arm, dataset and setting of the real plan makes a Run"
    study = Study(ROOT / "results/study")
    for data in study.data:
        assert {"dataset", "design", "seeds", "title", "modalities"} <= set(
            study.about(data)
        )
        for arm in study.arms(data):
            study.config(data, arm, 0, 0.1, study.folds(data)[0])
    for f in study.families.values():
        assert f["reference"] not in f["arms"] and set(f["data"]) <= set(study.data)
    rates = study.plan["protocol"]["rates"]
    assert len(rates) >= 5 and max(rates) / min(rates) >= 99


def written(folder, rows):
    "A study of rows that are made up, on one dataset with fresh samples per seed"
    (folder / "study.toml").write_text(
        PLAN.replace('arms = ["mla momentum=0"]', 'arms = ["mla"]\njoint = ["mla"]')
    )
    with (folder / "runs.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return Study(folder)


def made_up(arm, seed, own, mean):
    key = {"data": "small", "fold": "", "arm": arm, "seed": seed, "n_test": 1000}
    return key | {"own": own, "mean": mean, "seconds": 2 if arm == "mla" else 1}


def test_a_joint_arm_answers_with_its_own_head(tmp_path):
    values = [0.80, 0.81, 0.79]
    rows = [made_up("mla", k, v, 0.1) for k, v in enumerate(values)]
    rows += [made_up("concat", k, 0.2, v - 0.1) for k, v in enumerate(values)]
    found = family(written(tmp_path, rows), "first")["mla", "small"]
    assert abs(found["mean"] - 0.1) < 1e-9


def test_a_leaderboard_marks_what_is_level_with_the_best(tmp_path):
    rows = []
    for k, noise in enumerate((-0.02, 0.01, 0.0, 0.02, -0.01)):
        rows.append(made_up("mla", k, 0.9 + noise, 0.9))
        rows.append(made_up("concat", k, 0.9 - noise, 0.9))  # level: ± 4 points
        rows.append(made_up("sum", k, 0.8 + noise, 0.9))  # 10 points less, always
    study = written(tmp_path, rows)
    board = leaderboard(study, ["mla", "concat", "sum", "film"], ["small"])
    cells = [line.split("|")[2:4] for line in board.splitlines()[2:]]
    assert ["*" in c[0] for c in cells] == [True, True, False, False]
    assert [c[1].strip() for c in cells] == ["2.0", "1.0", "1.0", "–"]
    assert cells[3][0].strip() == "–"
