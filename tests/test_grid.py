"""Many runs: side by side, on a cluster, with runs that fail and processes that die."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mla_nb.cli import main
from mla_nb.compare import grid, plan, results, tune
from mla_nb.core import InputError
from mla_nb.runs.run import Run

DATA = "synthetic(n_train=96,n_valid=32,n_test=32)"


def runs(root, methods="concat,mla", seeds="0:2", **kw):
    return plan(DATA, methods, seeds, **{"epochs": 1, "root": str(root), **kw})


def test_side_by_side_equals_one_by_one(tmp_path):
    side, one = (
        grid(runs(tmp_path / "side"), jobs=2, label=""),
        grid(
            [Run(**{**dict(r), "threads": 1}) for r in runs(tmp_path / "one")], label=""
        ),
    )
    assert [r["test"] for r in side] == [r["test"] for r in one]


def test_a_failing_run_takes_no_other_down(tmp_path):
    mixed = [*runs(tmp_path, "concat"), *runs(tmp_path, "mla", lr=1e30)]
    found = grid(mixed, jobs=2, label="")
    assert ["error" in r for r in found] == [
        False,
        False,
        True,
        True,
    ] and "try a learning rate" in found[2]["error"]
    assert len(results(tmp_path)) == 2


def children():
    return [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit()
        and b"spawn_main" in _read(p / "cmdline")
        and f"PPid:\t{os.getpid()}\n".encode() in _read(p / "status")
    ]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="finds its child processes in /proc"
)
def test_a_process_that_dies_costs_nothing(tmp_path):
    "One worker is killed while it works; its run is made again"

    def killer():
        end = time.time() + 60
        while time.time() < end and not children():
            time.sleep(0.05)
        time.sleep(1.0)
        for pid in children()[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    killed = []
    t = threading.Thread(target=killer)
    t.start()
    found = grid(runs(tmp_path), jobs=2, label="")
    t.join()
    assert (
        killed
        and not [r for r in found if "error" in r]
        and len(results(tmp_path)) == 4
    )


def test_killed_and_started_again_it_redoes_nothing(tmp_path):
    args = [sys.executable, "-c", "from mla_nb.cli import main; main()", "grid"]
    args += [
        "--dataset",
        DATA,
        "--method",
        "concat,mla",
        "--seed",
        "0:2",
        "--epochs",
        "1",
        "--root",
        str(tmp_path),
        "--jobs",
        "1",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    p = subprocess.Popen(
        args, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.time() + 120
    while time.time() < end and not list(tmp_path.rglob("result.json")):
        time.sleep(0.02)
    p.kill()
    p.wait()
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("result.json")}
    out = subprocess.run(args, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert (
        before
        and all(f.stat().st_mtime_ns == t for f, t in before.items())
        and len(results(tmp_path)) == 4
    )
    assert out.stdout.count("| 2 |") == 2


def test_on_a_cluster(tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        found = grid(runs(tmp_path), scheduler=cluster.scheduler_address, label="")
    assert [r["run"]["seed"] for r in found] == [0, 1, 0, 1] and len(
        results(tmp_path)
    ) == 4
    with pytest.raises(InputError, match="cannot be reached"):
        grid(runs(tmp_path / "x"), scheduler="tcp://127.0.0.1:1", label="")


def test_tuning_looks_at_validation_only(tmp_path):
    tuned, rows = tune(runs(tmp_path, "concat"), [0.001, 0.1], label="")
    assert {r["lr"] for r in rows} == {0.001, 0.1} and len({r.lr for r in tuned}) == 1
    swept = [
        json.loads(f.read_text()) for f in (tmp_path / "sweep").rglob("result.json")
    ]
    best = max(
        swept,
        key=lambda r: (r["valid"]["accuracy"]["fused"], -r["valid"]["loss"]["fused"]),
    )
    assert tuned[0].lr == best["run"]["lr"] and {r["run"]["seed"] for r in swept} == {
        100
    }


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--method", "mlaa"], "did you mean 'mla'"),
        (["--seed", "0-5"], "a range such as 0:5"),
        (["--lr", "fast"], "must be numbers"),
        (["--method", "mla(norm=True"], "never closed"),
        (["--epoch", "1"], "did you mean '--epochs'"),
        (["--jobs", "x"], "must be numbers"),
        (["--method_args", "projection=False"], "write options in parentheses"),
        (["--dataset_args", "n_train=9"], "write options in parentheses"),
        (["--name", "one"], "leave names to us"),
    ],
    ids=str,
)
def test_wrong_input(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["grid", "--dataset", DATA, *flags])
    assert (
        says in str(e.value.code)
        and str(e.value.code).startswith("mla grid: ")
        and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize(
    "dataset, says",
    [
        ("synthetic(famly=lazy)", "did you mean 'family'"),
        ("synthetic(family=lzy)", "did you mean 'lazy'"),
        ("digits(splt=speaker)", "did you mean 'split'"),
        ("digits(split=speker)", "did you mean 'speaker'"),
    ],
)
def test_a_typing_error_in_a_datasets_option_is_found_before_anything_runs(
    dataset, says, tmp_path
):
    with pytest.raises(InputError, match=says):
        plan(dataset, "concat", "0:2", data=str(tmp_path), root=str(tmp_path / "runs"))
    assert not list(tmp_path.iterdir())
