"""`mla grid --preset paper` and `make paper`: rates, estimate, protocol, a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from mla_nb import compare
from mla_nb.cli import main
from mla_nb.compare import protocol_text, rates_around, rates_chosen, tune
from mla_nb.core import InputError, discover
from mla_nb.estimate import estimate, estimate_text
from mla_nb.runs.config import Run
from mla_nb.runs.run import run

discover()
DATA = {"n_train": 60, "n_valid": 24, "n_test": 24}
SMALL = {"dataset_args": DATA, "epochs": 1, "progress": False}


def test_five_rates_over_two_decades():
    assert rates_around(0.001) == [0.0001, 0.0003, 0.001, 0.003, 0.01]
    assert rates_around(0.1) == [0.01, 0.03, 0.1, 0.3, 1]


@pytest.fixture
def scored(monkeypatch):
    "A grid whose validation accuracy is a function of the rate; the rates it tried"
    tried = []

    def of(score):
        def grid(runs, **how):
            tried.extend((r.lr, r.seed) for r in runs)
            return [{"valid": {"accuracy": {"fused": score(r)}}} for r in runs]

        monkeypatch.setattr(compare, "grid", grid)
        return tried

    return of


def test_the_best_mean_over_three_seeds_is_chosen(scored):
    "One lucky seed of a bad rate does not decide"
    luck = {(0.3, 100): 0.9}
    tried = scored(lambda r: luck.get((r.lr, r.seed), {0.1: 0.8}.get(r.lr, 0.5)))
    runs, rows = tune([Run(**SMALL)], [0.03, 0.1, 0.3], (100, 101, 102))
    assert runs[0].lr == 0.1 and len(tried) == 9
    assert [r["chosen"] for r in rows] == [False, True, False]
    assert rows[2]["valid"] == pytest.approx((0.9 + 0.5 + 0.5) / 3)


def test_of_equal_rates_the_smallest_is_chosen(scored):
    scored(lambda r: 0.7)
    assert tune([Run(**SMALL)], [0.3, 0.03, 0.1])[0][0].lr == 0.03


def test_the_rates_are_widened_until_the_best_is_inside(scored):
    tried = scored(lambda r: -abs(r.lr - 3))
    runs, rows = tune([Run(**SMALL)], [0.1, 0.3, 1], widen=3)
    assert runs[0].lr == 3 and [r["lr"] for r in rows] == [0.1, 0.3, 1, 3, 9]
    assert len(tried) == len(set(tried)) == 5  # nothing twice
    tried = scored(lambda r: r.lr)  # ever further: it ends all the same
    tried.clear()
    tune([Run(**SMALL)], [0.1, 0.3], widen=2)
    assert sorted({lr for lr, _ in tried}) == [0.1, 0.3, 0.9, 3.0]


def test_a_rate_that_fails_is_not_chosen(scored, monkeypatch):
    def grid(runs, **how):
        good = {"valid": {"accuracy": {"fused": 0.4}}}
        return [{"error": "NaN", "id": ""} if r.lr > 0.1 else good for r in runs]

    monkeypatch.setattr(compare, "grid", grid)
    assert tune([Run(**SMALL)], [0.1, 0.3])[0][0].lr == 0.1


def test_an_estimate_counts_what_is_left(tmp_path):
    runs = [Run(**SMALL, seed=k, root=str(tmp_path)) for k in range(3)]
    e = estimate(runs, trials=15, jobs=1, seconds=0.2)
    assert (e["runs"], e["trials"], e["jobs"]) == (3, 15, 1)
    assert 0 < e["hours"] < 0.2 and not any(tmp_path.iterdir())  # nothing is kept
    run(runs[0])
    again = estimate(runs, trials=0, jobs=1, seconds=0.2)
    assert (again["runs"], again["trials"]) == (2, 0)
    assert again["bytes"] < e["bytes"]
    text = estimate_text(e)
    assert "\n" not in text and "3 runs and 15 to tune the rates" in text
    with pytest.raises(InputError, match="choose a folder on another disk"):
        estimate_text({**e, "free": e["bytes"] - 1})


def test_a_method_that_cannot_be_measured_does_not_end_the_grid(tmp_path, monkeypatch):
    from mla_nb import estimate as module

    def measured(cfg, s, seconds):
        if cfg.method == "mla":
            raise RuntimeError("no memory")
        return {"epoch": 36.0, "net": 4}

    monkeypatch.setattr(module, "measured", measured)
    runs = [Run(**SMALL, method=m, root=str(tmp_path)) for m in ("concat", "mla")]
    e = estimate(runs, seconds=1)
    assert e["hours"] == pytest.approx(0.01) and set(e["failed"]) == {"mla"}
    assert estimate_text(e).endswith("; without mla (RuntimeError: no memory)")


def test_an_encoder_named_per_modality_serves_single_modalities(tmp_path):
    spec = "audio=small,visual=small,text=small"
    one = {"method": "unimodal", "method_args": "modality=text", "encoder": spec}
    r = run(Run(**SMALL, **one, root=str(tmp_path)))
    assert set(r["test"]["accuracy"]) == {"text", "fused"}
    with pytest.raises(InputError, match="unknown modality 'vidio'"):
        run(Run(**SMALL, **{**one, "encoder": spec + ",vidio=small"}))


def grid_command(root, *more):
    data = "synthetic(n_train=60,n_valid=24,n_test=24)"
    what = [
        "--dataset",
        data,
        "--method",
        "concat,mla",
        "--seed",
        "0:2",
        "--lr",
        "auto",
    ]
    how = ["--tune_seed", "100", "--epochs", "1", "--root", str(root), "--jobs", "1"]
    return [sys.executable, "-m", "mla_nb.cli", "grid", *what, *how, *more]


def test_a_killed_grid_goes_on_and_says_that_it_is_short(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    p = subprocess.Popen(
        grid_command(tmp_path, "--measure", "0"), env=env, cwd=tmp_path
    )
    for _ in range(1200):
        if len(list(tmp_path.rglob("result.json"))) >= 4 or p.poll() is not None:
            break
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    done = {f: f.read_bytes() for f in tmp_path.rglob("result.json")}
    assert 4 <= len(done) < 14  # it was killed in the middle
    out = subprocess.run(
        grid_command(tmp_path, "--measure", "0.2"),
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("preset small of synthetic: ")
    assert "estimate, from " in out.stdout
    assert all(f.read_bytes() == b for f, b in done.items())  # nothing again
    assert not list(tmp_path.rglob("last*.pt"))
    assert len(list((tmp_path / "sweep").rglob("result.json"))) >= 10
    said = protocol_text(tmp_path)
    assert "methods left out; 2 seeds instead of 5; tuned with 1 seed, not 3" in said
    assert "changed in the preset: epochs=1" in said
    assert "at least 5 learning rates were tried" in rates_chosen(tmp_path)


def test_a_grid_is_checked_before_anything_is_prepared(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # CREMA-D is not prepared here
    words = ["grid", "--dataset", "cremad", "--root", str(tmp_path / "runs"), "--check"]
    main([*words, "--method", "unimodal,mla", "--seed", "0:2", "--lr", "auto"])
    said = capsys.readouterr().out
    assert "6 runs; to choose each method's rate: 15 more for each" in said
    wrong = {
        "--method": ("mal", "did you mean 'mla'"),
        "--seed": ("5:0", "seed='5:0': must be numbers"),
        "--tune_seed": ("x", "tune_seed='x'"),
        "--jobs": ("-2", "must be numbers from 0 on"),
        "--lr": (".1,abc", "or --lr auto"),
    }
    for option, (value, told) in wrong.items():
        with pytest.raises(SystemExit) as e:
            main([*words, option, value])
        assert told in str(e.value), e.value
    with pytest.raises(SystemExit) as e:
        main([*words, "--lr", ".1,.2", "--seed", "0:2", "--tune_seed", "1"])
    assert "seed 1 stands in --seed and in --tune_seed" in str(e.value)
    assert not (tmp_path / "runs").exists()


def test_a_whole_protocol_is_called_so(tmp_path):
    whole = {"preset": "paper", "methods": ["mla"], "left_out": []}
    whole |= {"seeds": [0, 1, 2, 3, 4], "rates": [1, 2, 3, 4, 5]}
    whole |= {"tune_seeds": [100, 101, 102], "changed": []}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"calls": [whole]}))
    assert protocol_text(tmp_path).endswith("5 seeds, the whole protocol.")
    shorter = {**whole, "methods": ["ogm"], "seeds": [0], "rates": [0.1]}
    shorter["changed"] = ["epochs=2"]
    path.write_text(json.dumps({"calls": [whole, shorter]}))
    said = protocol_text(tmp_path)
    assert "2 methods, 1 to 5 seeds" in said and "rates of ogm not tuned" in said
    assert "changed in the preset: epochs=2" in said
    path.write_text("{}")
    assert "grid.json" in protocol_text(tmp_path)  # says what is wrong, and no more
