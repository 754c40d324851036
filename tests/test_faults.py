"""Faults, one after the other, and what is left after each.

Kills, signals, damaged bytes, full disks, two processes, numbers that are none, and the
inputs that hypothesis finds. `make test` runs a fast subset; `make soak` all of it
(pytest -m soak), and writes results/faults.json and results/faults.md.
"""

import errno
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, started, torchrun
from ends import end_of, keep_ends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import tensor

from mla_nb.cli import main
from mla_nb.compare import grid
from mla_nb.core import InputError, Modality, discover, rules
from mla_nb.data.media import read_split
from mla_nb.data.own import own_classes, own_splits, read_table
from mla_nb.data.prepared import load_prepared, prepare
from mla_nb.encoders.base import Preprocessor
from mla_nb.methods.base import Callback, valid_mask
from mla_nb.methods.fusion import fuse, make_rule
from mla_nb.reliability import doctor, flip, free_disk, run_checks, versions
from mla_nb.runs.config import Run, parse_args, with_options
from mla_nb.runs.run import (
    _callbacks,
    build,
    load_run,
    make_dataset,
    read_history,
    run,
)
from mla_nb.tools import Locked, digest, locked, read_json, rng_state, set_rng_state
from mla_nb.train.checkpoints import (
    Saver,
    States,
    Stopped,
    checkpoints,
    explain_failure,
    load_pred,
    read_state,
)
from mla_nb.train.learner import Diverged
from mla_nb.train.watching import StopOnNaN

TINY = {
    "dataset_args": "n_train=96,n_valid=32,n_test=32,size=16",
    "batch_size": 16,
    "epochs": 3,
    "method_args": "order=random",
    "progress": False,
    "threads": 1,
}
MANY = bool(os.environ.get("FAULTS_TABLE"))  # a soak: the table goes there
soak = pytest.mark.soak
TALLY = defaultdict(lambda: [0, 0, 0])  # fault -> tried, survived, data lost


def tally(fault, survived=True, lost=False):
    "One more row of the table; a fault that is not survived fails the test, too"
    for k, v in enumerate((True, survived, lost)):
        TALLY[fault][k] += bool(v)
    assert survived and not lost, fault


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if not MANY:
        return
    rows = [
        {"fault": k, "tried": tried, "survived": survived, "data_lost": lost}
        for k, (tried, survived, lost) in TALLY.items()
    ]
    path = Path(os.environ["FAULTS_TABLE"])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| fault | tried | survived | data lost |",
        "|---|---|---|---|",
        *(
            f"| {r['fault']} | {r['tried']} | {r['survived']} | {r['data_lost']} |"
            for r in rows
        ),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    "A job in the background of a shell is born deaf to it"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed"
    cfg = Run(**TINY, root=str(tmp_path_factory.mktemp("runs")), name="whole")
    run(cfg)
    return cfg


@pytest.fixture(scope="module", autouse=True)
def ends():
    "The last states of runs that finish here are kept beside them"
    with keep_ends():
        yield


def last(cfg):
    return read_state(cfg.folder / "last.pt", "cpu", States.holds)


def same(a, b):
    return (
        digest(end_of(a.folder)["net"]) == digest(end_of(b.folder)["net"])
        and not checkpoints(a.folder) + checkpoints(b.folder)
        and (a.folder / "model.safetensors").read_bytes()
        == (b.folder / "model.safetensors").read_bytes()
        and outcome(a) == outcome(b)
    )


def outcome(cfg):
    return {
        k: v
        for k, v in read_json(cfg.folder / "result.json").items()
        if k not in ("id", "seconds", "environment")
    }


def another(cfg, name):
    return cfg.replace(name=name)


class Cut(Callback):
    "Somebody ends the run at a certain batch"

    order = 39

    def __init__(self, epoch=1, step=2, sig=signal.SIGINT):
        self.at, self.sig = (epoch, step), sig

    def after_batch(self, learn):
        if (learn.epoch, learn.step) == self.at:
            os.kill(os.getpid(), self.sig)


@contextmanager
def also(*cbs):
    "Further callbacks in every run"
    with patch("mla_nb.runs.run._callbacks", lambda c: [*_callbacks(c), *cbs]):
        yield


@pytest.fixture
def half(whole):
    "A run that was ended in the second epoch after the third batch"
    cfg = another(whole, "half")
    shutil.rmtree(cfg.folder, ignore_errors=True)
    with also(Cut()), pytest.raises(Stopped):
        run(cfg)
    return cfg


# kills and signals, from outside ------------------------------------------------------

KILLER = """
import json, os, random, signal, sys, time
from ends import keep_ends
from mla_nb.reliability import forked, killed, warm
from mla_nb.runs.run import Run
kept = keep_ends()
kept.__enter__()
args = json.loads(sys.argv[1])
rng, out = random.Random(args['seed']), []
warm()
for cfg in (Run(**c) for c in args['runs']):
    clock = time.perf_counter()
    forked(cfg.replace(name='whole'))
    clock = time.perf_counter() - clock
    left, k = args['kills'].pop(0), 0
    while left > 0 and k < 40:
        c, k = cfg.replace(name=f'hit{k}'), k + 1
        ends = killed(c, [clock * rng.uniform(.1, .95) for _ in range(left)])
        left -= sum(code == -9 for code, _ in ends)
        out.append((cfg.root, c.name, ends))
print(json.dumps(out))
"""


def kill(tmp_path, kills, seed, *configs):
    runs = [{**dict(c), "root": str(tmp_path / str(k))} for k, c in enumerate(configs)]
    out = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLER,
            json.dumps({"runs": runs, "kills": kills, "seed": seed}),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert out.returncode == 0, out.stderr[-2000:]
    for root, name, ends in json.loads(out.stdout.splitlines()[-1]):
        a, b = (
            Run(**{**dict(configs[int(Path(root).name)]), "root": root, "name": n})
            for n in ("whole", name)
        )
        fell = any(q < p for (_, p), (_, q) in zip(ends, ends[1:]))
        for code, _ in ends:
            tally(
                "kill -9 at a random moment of a run", same(a, b), fell
            ) if code == -9 else None
        assert (
            ends[-1][0] == 0
            and same(a, b)
            and read_history(a.folder)[-1]["valid"]
            == read_history(b.folder)[-1]["valid"]
        )


def test_kill_9_at_random_moments(tmp_path):
    kill(tmp_path, [3], 0, Run(**TINY, save_every=1e-6))


@soak
def test_kill_9_at_many_random_moments(tmp_path):
    often = {"save_every": 1e-6}
    hows = [
        {"save_every": 0},
        often,
        dict(method="qmf", method_args="", **often),
        dict(method="ogm_ge", method_args="", **often),
        dict(optimizer="adamw", lr=0.001, schedule="cosine", keep=1, **often),
    ]
    kill(tmp_path, [4, 20, 4, 4, 4], 1, *(Run(**{**TINY, **how}) for how in hows))
    assert TALLY["kill -9 at a random moment of a run"][0] >= 36


SLOW = """
import signal, time
# a job in the background is born deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
import mla_nb.train.learner as l
f = l.Learner.one_batch
def slow(self):
    if (self.epoch, self.step) == (1, 2): Path("now").touch()
    time.sleep(1. if Path("now").exists() else 0.)
    f(self)
l.Learner.one_batch = slow
from mla_nb.cli import main; main()
"""
PAIR = [
    "--dataset_args",
    "n_train=160,n_valid=40,n_test=40",
    "--batch_size",
    "8",
    "--epochs",
    "2",
    "--device",
    "cpu",
    "--progress",
    "false",
    "--save_every",
    "0",
]


def in_the_second_epoch(p, folder):
    "Wait until a process that runs SLOW is there"
    end, there = time.time() + 120, Path(folder) / "now"
    while not there.exists() and time.time() < end and p.poll() is None:
        time.sleep(0.02)
    assert there.exists(), p.communicate()[1]


@pytest.mark.parametrize(
    "sig,code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=soak)]
)
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(
    tmp_path, whole, sig, code
):
    args = [
        x
        for k, v in {**TINY, "root": str(tmp_path), "name": "cut"}.items()
        for x in (f"--{k}", str(v))
    ]
    p = subprocess.Popen(
        [sys.executable, "-c", SLOW, "train", *args],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    in_the_second_epoch(p, tmp_path)
    p.send_signal(sig)
    said = p.communicate(timeout=60)[1]
    assert (
        p.returncode == code
        and "the same command goes on from there" in said
        and "Traceback" not in said
    ), said
    cfg = Run(**TINY, root=str(tmp_path), name="cut")
    assert (
        not (cfg.folder / "result.json").exists()
        and last(cfg)["epoch"] == 1
        and 3 <= last(cfg)["done"] <= 6
    )
    run(cfg)
    tally("SIGTERM or Ctrl-C in a run", same(cfg, whole))


def children(pid):
    "Processes that it has started"
    stats = {
        int(p.parent.name): p.read_text() for p in Path("/proc").glob("[0-9]*/stat")
    }
    return [k for k, v in stats.items() if int(v.rsplit(")", 1)[1].split()[1]) == pid]


def works(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory):
    "What two processes end with if nobody disturbs them, and how they are started"
    folder = tmp_path_factory.mktemp("pair")
    torchrun(*PAIR, "--name", "whole", cwd=folder)
    return folder


@pytest.mark.parametrize(
    "sig,whom",
    [
        (signal.SIGTERM, "all"),
        pytest.param(signal.SIGINT, "all", marks=soak),
        pytest.param(signal.SIGTERM, "one", marks=soak),
    ],
)
def test_a_signal_stops_all_processes_at_the_same_batch_and_they_go_on_together(
    whole_pair, sig, whom
):
    "With batch norm: what is saved within an epoch has everybody's statistics"
    (whole_pair / "slow.py").write_text(SLOW)
    name, folder = f"{sig.name}{whom}", whole_pair / f"runs/{sig.name}{whom}"
    (whole_pair / "now").unlink(missing_ok=True)
    p = started(*PAIR, "--name", name, cwd=whole_pair, how=("slow.py", "train"))
    in_the_second_epoch(p, whole_pair)
    if whom == "all":
        os.killpg(
            p.pid, sig
        )  # as terminals and schedulers do; torchrun passes it on once more
    else:
        os.kill(max(children(p.pid)), sig)
    said = p.communicate(timeout=100)[1]
    assert (
        p.returncode
        and "the same command goes on from there" in said
        and "Connection" not in said
    ), said
    state = torch.load(folder / "last.pt", weights_only=True)
    assert (
        state["epoch"] == 1
        and 0 < state["done"] < 10
        and not (folder / "result.json").exists()
    )
    torchrun(*PAIR, "--name", name, cwd=whole_pair)
    a, b = (
        load_file(whole_pair / f"runs/{n}/model.safetensors") for n in (name, "whole")
    )
    assert a.keys() == b.keys()
    tally(
        "a signal to one or both of two processes",
        all(torch.allclose(a[k].double(), b[k].double(), atol=1e-6) for k in a),
    )
    p, q = (load_pred(whole_pair / f"runs/{n}") for n in (name, "whole"))
    assert torch.allclose(p.fused, q.fused, atol=1e-5)


@soak
def test_a_signal_to_a_grid_reaches_its_runs(tmp_path):
    args = [
        "--dataset",
        "synthetic(n_train=600,n_valid=40,n_test=40)",
        "--method",
        "concat,mla",
        "--seed",
        "0",
        "--epochs",
        "40",
        "--jobs",
        "2",
        "--device",
        "cpu",
        "--root",
        "runs",
    ]

    def begin():
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from mla_nb.cli import main; main()",
                "grid",
                *args,
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    p, end = begin(), time.time() + 120
    while len(list(tmp_path.glob("runs/*/last.pt"))) < 2 and time.time() < end:
        time.sleep(0.02)
    workers, end = children(p.pid), time.time() + 20
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=60)[1]
    assert p.returncode == 143 and "Traceback" not in said, said
    while any(works(w) for w in workers) and time.time() < end:
        time.sleep(0.1)
    assert len(workers) >= 2 and not any(
        works(w) for w in workers
    )  # nobody works on for nobody
    assert not list(tmp_path.glob("runs/*/result.json"))
    p = begin()
    assert "concat" in p.communicate(timeout=200)[0] and p.returncode == 0
    for run_ in tmp_path.glob("runs/*/"):
        tally(
            "SIGTERM to a grid of runs",
            len(read_history(run_)) == 40 and (run_ / "result.json").exists(),
        )


def test_the_second_signal_stops_at_once_and_handlers_are_put_back(whole):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    class Impatient(Callback):
        def after_batch(self, learn):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10**6):
                pass

    cfg = another(whole, "impatient")
    with also(Impatient()), pytest.raises(Stopped) as e:
        run(cfg)
    assert e.value.code == 143 and not checkpoints(cfg.folder)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    run(cfg)
    assert same(cfg, whole)


# checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        (0, 0),
        (1, 2),
        (1, 5),
        pytest.param((2, 0), marks=soak),
        pytest.param((2, 5), marks=soak),
        pytest.param((0, 5), marks=soak),
    ],
)
def test_going_on_within_an_epoch_gives_the_same_bits(whole, at):
    cfg = another(whole, f"cut{at[0]}{at[1]}")
    with (
        also(Cut(*at)),
        pytest.raises(
            Stopped, match=f"in epoch {at[0] + 1} after batch {at[1] + 1} of 6"
        ),
    ):
        run(cfg)
    assert last(cfg)["done"] == at[1] + 1
    run(cfg)
    assert same(cfg, whole)
    a, b = read_history(cfg.folder), read_history(whole.folder)
    assert [r["train"]["loss"] for r in a] == [r["train"]["loss"] for r in b] and [
        r["train"]["grad"] for r in a
    ] == [r["train"]["grad"] for r in b]  # the Recorder's sums, too


def test_a_split_that_is_read_in_workers_goes_on_too(whole, tmp_path):
    from functools import partial

    from mla_nb.train import loaders as batches

    cfg = another(whole, "workers").replace(workers=2, root=str(tmp_path))
    with patch("mla_nb.runs.run.loaders", partial(batches.loaders, ready=0)):
        with also(Cut()), pytest.raises(Stopped):
            run(cfg)
        run(cfg)
    assert same(cfg, whole)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_k_are_kept(whole, tmp_path, keep):
    cfg = whole.replace(root=str(tmp_path), keep=keep, save_every=1e-9)
    with (
        patch("mla_nb.runs.run._finish", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run(cfg)  # trained, and not finished
    assert [p.name for p in checkpoints(cfg.folder)] == [
        "last.pt",
        "last-1.pt",
        "last-2.pt",
    ][:keep]
    where = [
        (s["epoch"], s["done"])
        for s in (read_state(p, "cpu", States.holds) for p in checkpoints(cfg.folder))
    ]
    assert where == [(2, 0), (2, 6), (2, 5)][:keep]
    run(cfg)
    assert same(cfg, whole)


FINISHING = (
    "save_pred",
    "_result",
    "write_atomic",
    "RunFolder.write_checksums",
    "remove_checkpoints",
)


@pytest.mark.parametrize("step", FINISHING)
@pytest.mark.parametrize(
    "when,error", [("before", OSError), ("after", KeyboardInterrupt)]
)
def test_a_crash_while_a_run_is_finished_loses_nothing(
    whole, tmp_path, step, when, error
):
    "At each step of `_finish`, before or after it: the same command ends the run"
    import mla_nb.runs.run as run_module

    cfg = whole.replace(root=str(tmp_path))
    owner = run_module.RunFolder if "." in step else run_module
    name, finish = step.split(".")[-1], run_module._finish
    work = getattr(owner, name)

    def dies(*args, **kw):
        if when == "after":
            work(*args, **kw)
        raise error

    def finish_and_die(*args):
        with patch.object(owner, name, dies):
            finish(*args)

    with (
        patch("mla_nb.runs.run._finish", finish_and_die),
        pytest.raises((KeyboardInterrupt, OSError)),
    ):
        run(cfg)
    assert checkpoints(cfg.folder) or (cfg.folder / "result.json").exists()
    assert (
        read_history(cfg.folder)[-1]["valid"] == read_history(whole.folder)[-1]["valid"]
    )
    run(cfg)
    assert same(cfg, whole)
    read_net = [load_run(c.folder)[0].state_dict() for c in (cfg, whole)]
    assert digest(list(read_net[0].items())) == digest(list(read_net[1].items()))


def test_a_finished_run_in_a_folder_that_cannot_be_written_is_read(whole, tmp_path):
    "Checkpoints that an older version left there stay"
    cfg = whole.replace(root=str(tmp_path))
    shutil.copytree(whole.folder, cfg.folder)
    (cfg.folder / "last.pt").write_bytes(b"of an older version")
    with patch("os.access", lambda path, mode: False):
        assert run(cfg)["test"] == run(whole)["test"]
    assert checkpoints(cfg.folder)
    assert run(cfg)["test"] == run(whole)["test"]
    assert not checkpoints(cfg.folder)


def test_a_grid_too_removes_what_a_killed_run_left_beside_its_result(whole, tmp_path):
    cfg = whole.replace(root=str(tmp_path))
    shutil.copytree(whole.folder, cfg.folder)
    (cfg.folder / "last.pt").write_bytes(b"the process died before it was removed")
    assert grid([cfg], label="")[0]["test"] == run(whole)["test"]
    assert not checkpoints(cfg.folder)


def test_save_every_0_saves_at_the_end_of_epochs_only(whole, tmp_path):
    cfg, saved = whole.replace(root=str(tmp_path), save_every=0.0), []
    with patch.object(
        Saver,
        "save",
        lambda self, learn, rows, done=0, old=Saver.save: (
            saved.append(done),
            old(self, learn, rows, done),
        ),
    ):
        run(cfg)
    assert saved == [0, 0, 0]


def test_a_checkpoint_of_the_first_version_still_goes_on(whole):
    cfg = another(whole, "old")
    with also(Cut(1, 5)), pytest.raises(Stopped):
        run(cfg)
    (cfg.folder / "last.pt").unlink()
    state = read_state(cfg.folder / "last-1.pt", "cpu", States.holds)
    for p in checkpoints(cfg.folder):
        p.unlink()
    torch.save({k: state[k] for k in States.holds}, cfg.folder / "last.pt")
    for name in ("checksums.json",):
        (cfg.folder / name).unlink()
    run(cfg)
    assert same(cfg, whole)


def test_where_and_how_often_is_saved_does_not_change_the_id():
    assert Run(save_every=1.0, keep=5).id == Run().id
    for bad in ({"keep": 0}, {"keep": 101}, {"save_every": -1}, {"save_every": "nan"}):
        with pytest.raises(InputError):
            Run(**bad)


def test_generators_go_on_where_they_stood():
    import numpy as np

    there = torch.load(save_bytes(rng_state()), weights_only=True)

    def draw():
        return (
            random.random(),
            np.random.rand(),
            torch.rand(1).item(),
            random.gauss(0, 1),
            np.random.randn(),
        )

    first = draw()
    set_rng_state(there)
    assert draw() == first


def save_bytes(x):
    import io

    out = io.BytesIO()
    torch.save(x, out)
    out.seek(0)
    return out


def test_a_state_that_is_not_finite_replaces_nothing(whole, half):
    cfg, before = half, (half.folder / "last.pt").read_bytes()

    class Poison(Callback):
        order = 30

        def after_batch(self, learn):
            with torch.no_grad():
                next(learn.net.parameters()).fill_(math.nan)
            learn.callbacks[0].k = 0
            os.kill(os.getpid(), signal.SIGTERM)

    with also(Poison()), pytest.raises(Diverged, match="the weights are not finite"):
        run(cfg)
    assert (cfg.folder / "last.pt").read_bytes() == before


# damaged bytes ------------------------------------------------------------------------


def use(cfg):
    "Everything that is done with a run, as a checksum"
    r = run(cfg)
    net, _, about = load_run(cfg.folder)
    return digest(
        [
            r["test"],
            r["best_epoch"],
            load_pred(cfg.folder).fused,
            list(net.state_dict().values()),
            [(h["valid"], h["train"]["loss"]) for h in read_history(cfg.folder)],
            about["classes"],
        ]
    )


def damage(path, how):
    if how == "truncate":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        flip(path, how)


WAYS = ["truncate", "empty", 0.02, 0.5, 0.98]
MORE = [k / 20 for k in range(20)]


def spoil(source, good, ways, fault):
    "Damage each file of a copy in each way: noticed, or without effect"
    for name in sorted(p.name for p in source.folder.iterdir() if p.is_file()):
        for how in ways:
            cfg = another(source, "spoilt")
            shutil.rmtree(cfg.folder, ignore_errors=True)
            shutil.copytree(source.folder, cfg.folder)
            damage(cfg.folder / name, how)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = use(cfg)
                except InputError as e:
                    assert "\n" not in str(e)
                    found = good
            tally(fault, found == good)


def test_a_damaged_file_of_a_finished_run(whole):
    spoil(
        whole,
        use(whole),
        WAYS,
        "a byte flipped in, or half missing from, a file of a finished run",
    )


def test_a_damaged_file_of_an_unfinished_run(whole, half):
    spoil(half, use(whole), ["truncate", 0.5], "the same, of a run that goes on")


@soak
def test_many_damaged_files_of_a_finished_run(whole):
    spoil(
        whole,
        use(whole),
        MORE,
        "a byte flipped in, or half missing from, a file of a finished run",
    )


@soak
def test_many_damaged_files_of_an_unfinished_run(whole, half):
    spoil(half, use(whole), MORE[::3], "the same, of a run that goes on")


def test_the_checkpoint_before_takes_over_and_says_so(whole, half):
    flip(half.folder / "last.pt")
    with pytest.warns(UserWarning, match="last.pt is damaged.*trying last-1.pt"):
        run(half)
    assert same(half, whole) and (half.folder / "last.pt.damaged").exists()


def test_all_checkpoints_damaged_is_one_sentence_and_stays_so(half):
    for p in checkpoints(half.folder):
        damage(p, "truncate")
    for _ in range(2):  # nothing was removed by the first attempt
        with (
            pytest.warns(UserWarning),
            pytest.raises(
                InputError, match="and so are those before it; remove the folder"
            ),
        ):
            run(half)


def toy_rows():
    g = torch.Generator().manual_seed(0)
    specs = torch.randn(30, 4, 6, generator=g)
    return [
        {
            "id": f"clip-{i}",
            "y": "ab"[i % 2],
            "text": f"number {i}",
            "audio": specs[i].numpy() if i % 5 else None,
        }
        for i in range(30)
    ]


def toy_read(i):
    return toy_rows()[i]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A small prepared dataset"
    out = tmp_path_factory.mktemp("data") / "toy"
    mods = {
        "audio": Modality("audio", "features", {"shape": [4, 6]}),
        "text": Modality("text", "text"),
    }
    prepare(
        out,
        "toy",
        ["a", "b"],
        mods,
        {
            "train": list(range(20)),
            "valid": [20, 21, 22, 23, 24],
            "test": [25, 26, 27, 28, 29],
        },
        toy_read,
        {},
        {},
        shard=8,
        progress=False,
    )
    return out


def content(folder):
    s = load_prepared(folder)
    return digest(
        [
            s.classes,
            [
                [
                    (i["y"], i["idx"], list(i["x"].items()))
                    for i in (part[k] for k in range(len(part)))
                ]
                + [part.ids]
                for part in s.parts.values()
            ],
        ]
    )


def spoil_data(toy, tmp_path, ways):
    good = content(toy)
    for name in sorted(p.name for p in toy.iterdir()):
        for how in ways:
            copy = tmp_path / "toy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(toy, copy)
            damage(copy / name, how)
            try:
                found = content(copy)
            except InputError as e:
                assert "\n" not in str(e)
                found = good
            tally(
                "a byte flipped in, or half missing from, a file of a prepared dataset",
                found == good,
            )


def test_a_damaged_file_of_a_prepared_dataset(toy, tmp_path):
    spoil_data(toy, tmp_path, WAYS)


@soak
def test_many_damaged_files_of_a_prepared_dataset(toy, tmp_path):
    spoil_data(toy, tmp_path, MORE)


# disks --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    "A disk of a few MB; a function that changes it"
    at = tmp_path / "disk"
    at.mkdir()

    def mount(*a):
        return subprocess.run(["mount", *a], capture_output=True).returncode == 0

    if not (
        shutil.which("mount")
        and os.geteuid() == 0
        and mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(at))
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield (
        at,
        lambda options: (
            mount("-o", f"remount,{options}", str(at)) or pytest.skip("cannot remount")
        ),
    )
    subprocess.run(["umount", "-l", str(at)])


def fill(at, leave):
    free = shutil.disk_usage(at).free
    if free > leave:
        (at / "filler").write_bytes(b"x" * (free - leave))


def test_a_full_disk_loses_nothing(small_disk, whole):
    at, remount = small_disk
    cfg = whole.replace(root=str(at), name="full")

    class Fill(Callback):
        order = 50

        def after_epoch(self, learn):
            fill(at, 100_000) if learn.epoch == 0 else None

    with (
        also(Fill()),
        pytest.raises(InputError, match="there is no space left; make room") as e,
    ):
        run(cfg)
    assert (
        "\n" not in str(e.value)
        and len(checkpoints(cfg.folder)) == 1
        and last(cfg)["epoch"] == 0
    )  # the one from before is whole
    assert not list(cfg.folder.glob(".*.part"))
    with pytest.raises(InputError, match="no space left"):
        run(cfg)
    (at / "filler").unlink()
    remount("size=60m")
    run(cfg)
    tally("disk full while a run saves", same(cfg, whole))


def test_a_full_disk_at_the_very_start(small_disk, whole):
    at, _ = small_disk
    fill(at, 0)
    with pytest.raises(InputError, match="no space left"):
        run(whole.replace(root=str(at), name="full"))
    tally("disk full while a run saves")


def test_a_disk_that_becomes_read_only(small_disk, whole):
    at, remount = small_disk
    remount("size=60m")
    cfg = whole.replace(root=str(at), name="ro")
    with also(Cut()), pytest.raises(Stopped):
        run(cfg)
    remount("ro")
    with pytest.raises(
        InputError,
        match=(
            "cannot be written: Read-only file system; change its permissions, or "
            "choose another root"
        ),
    ):
        run(cfg)
    with pytest.raises(InputError, match="cannot be written"):
        free_disk(at)
    remount("rw")
    run(cfg)
    tally("results folder read-only", same(cfg, whole))


def test_a_full_disk_while_a_dataset_is_prepared(small_disk):
    at, remount = small_disk
    mods = {"text": Modality("text", "text")}

    def make():
        return prepare(
            at / "big",
            "big",
            ["a", "b"],
            mods,
            {"train": list(range(40)), "valid": [0, 1], "test": [2, 3]},
            big_read,
            {},
            {},
            shard=4,
            progress=False,
        )

    with pytest.raises(OSError) as e:
        make()
    assert e.value.errno == errno.ENOSPC and not (at / "big").exists()
    remount("size=60m")
    make()
    tally(
        "disk full while a dataset is prepared",
        len(load_prepared(at / "big").train) == 40,
    )


def big_read(i):
    return {"id": str(i), "y": "ab"[i % 2], "text": "x" * 200_000}


@pytest.mark.parametrize(
    "error,says",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
            "out of memory with batch_size=16: try batch_size=8",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't "
                "allocate memory: you tried to allocate 99 bytes."
            ),
            "out of memory",
        ),
        (
            RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. "),
            "a process that prepares batches has died",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded", "last.pt"),
            "there is no space left",
        ),
    ],
)
def test_an_end_that_is_nobodys_mistake_is_one_sentence_and_loses_nothing(
    whole, error, says
):
    class Fails(Callback):
        def after_batch(self, learn):
            if learn.epoch == 1 and armed:
                raise error

    cfg, armed = another(whole, "fails"), [1]
    shutil.rmtree(cfg.folder, ignore_errors=True)
    with also(Fails()):
        with pytest.raises(InputError, match=says) as e:
            run(cfg)
        assert "\n" not in str(e.value) and last(cfg)["epoch"] == 0
        armed.clear()
        run(cfg)
    tally("device out of memory, worker killed, quota", same(cfg, whole))


def test_other_errors_stay_what_they_are(whole):
    e = KeyError("a mistake of ours")
    assert explain_failure(e, whole) is e


@soak
def test_a_worker_that_is_really_killed(whole, tmp_path):
    from functools import partial

    from mla_nb.train import loaders as batches

    class Murder(Callback):
        def after_batch(self, learn):
            if learn.epoch == 1 and learn.step == 0:
                for p in Path("/proc").glob("[0-9]*"):
                    try:
                        mine = (
                            f"PPid:\t{os.getpid()}\n" in (p / "status").read_text()
                            and b"resource_tracker" not in (p / "cmdline").read_bytes()
                        )
                    except OSError:
                        continue
                    if mine:
                        os.kill(int(p.name), signal.SIGKILL)
                        return  # the second one ends with the loader

    cfg = whole.replace(root=str(tmp_path), workers=2)
    with (
        patch("mla_nb.runs.run.loaders", partial(batches.loaders, ready=0)),
        also(Murder()),
        pytest.raises(InputError, match="a process that prepares batches has died"),
    ):
        run(cfg)
    run(cfg)
    tally("device out of memory, worker killed, quota", same(cfg, whole))


def test_a_signal_that_ends_the_workers_first_is_still_a_stop(whole, tmp_path):
    class Ends(Callback):
        order = 0

        def after_batch(self, learn):
            if (learn.epoch, learn.step) == (1, 0):
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    cfg = whole.replace(root=str(tmp_path))
    with also(Ends()), pytest.raises(Stopped) as e:
        run(cfg)
    assert e.value.code == 143 and "the same command goes on" in str(e.value)
    run(cfg)
    assert same(cfg, whole)


# two at once --------------------------------------------------------------------------


def holder(path):
    "A process that holds a lock until it is killed"
    p = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import fcntl, os, time\n"
                f"f = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)\n"
                "fcntl.flock(f, fcntl.LOCK_EX)\n"
                "os.write(f, b'process 7 on mars')\n"
                "print('held', flush=True)\n"
                "time.sleep(100)"
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    p.stdout.readline()
    return p


def test_the_second_process_on_a_run_is_refused_until_the_first_one_dies(whole):
    cfg = another(whole, "twice")
    cfg.folder.mkdir()
    p = holder(cfg.folder / ".lock")
    with pytest.raises(
        Locked, match="is being worked on by process 7 on mars; wait for it"
    ):
        run(cfg)
    assert [f.name for f in cfg.folder.iterdir()] == [".lock"]
    p.kill()
    p.wait()
    p.stdout.close()
    run(cfg)  # the file is still there, the lock is not
    tally(
        "a second process on one run or dataset",
        same(cfg, whole) and not (cfg.folder / ".lock").exists(),
    )


def test_a_dataset_is_prepared_by_one_process_at_a_time(toy, tmp_path):
    p = holder(tmp_path / ".toy.lock")

    def make():
        return prepare(
            tmp_path / "toy",
            "toy",
            ["a", "b"],
            {"text": Modality("text", "text")},
            {"train": list(range(20)), "valid": [20, 21], "test": [25, 26]},
            toy_read,
            {},
            {},
            progress=False,
        )

    with pytest.raises(
        Locked, match="the dataset .*toy is being worked on by process 7 on mars"
    ):
        make()
    assert not (tmp_path / "toy.partial").exists()
    p.kill()
    p.wait()
    p.stdout.close()
    make()
    tally(
        "a second process on one run or dataset",
        [f.name for f in tmp_path.iterdir()] == ["toy"],
    )


def test_a_grid_reports_a_run_that_is_taken(whole, tmp_path):

    cfg = whole.replace(root=str(tmp_path), name="")
    cfg.folder.mkdir(parents=True)
    p = holder(cfg.folder / ".lock")
    [r] = grid([cfg], label="")
    p.kill()
    p.wait()
    p.stdout.close()
    assert "is being worked on" in r["error"]


def test_locks_in_one_process(tmp_path):
    with locked(tmp_path / "a", "a"):
        with (
            pytest.raises(Locked, match="this very process"),
            locked(tmp_path / "a", "a"),
        ):
            pass
        with locked(tmp_path / "b", "b"):
            pass
    with locked(tmp_path / "a", "a"):
        pass
    assert not list(tmp_path.iterdir())


# numbers that are none ----------------------------------------------------------------


class Bad(Callback):
    "In one batch, the loss or a gradient is not a number"

    order = -6

    def __init__(self, what):
        self.what = what

    def after_backward(self, learn, turn):
        if (learn.epoch, learn.step) != (1, 3):
            return
        if self.what == "loss":
            turn.losses = {k: v * math.inf for k, v in turn.losses.items()}
        else:
            next(p for p in learn.net.parameters() if p.grad is not None).grad[0] = (
                math.inf
            )


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_samples_of_a_batch_that_is_no_number_are_written_down(whole, what):
    cfg, s = another(whole, f"nan-{what}"), make_dataset(whole)
    s.train.ids = [f"clip-{i}" for i in range(len(s.train))]
    with (
        patch("mla_nb.runs.run.make_dataset", lambda c: s),
        also(Bad(what)),
        pytest.raises(
            Diverged,
            match=(
                f"the {what} is inf in epoch 2, batch 4 .*clip-.*nan.json.*try a "
                "learning rate below 0.1"
            ),
        ),
    ):
        run(cfg)
    about = json.loads((cfg.folder / "nan.json").read_text())
    assert (
        (about["epoch"], about["batch"], about["lr"]) == (2, 4, 0.1)
        and len(about["samples"]) == 16
        and about["samples"][0].startswith("clip-")
    )
    assert last(cfg)["epoch"] == 0 and all(
        v.isfinite().all() for v in last(cfg)["net"].values()
    )
    run(cfg)  # without the fault it goes on
    tally(
        "NaN or Inf in a loss or a gradient",
        same(cfg, whole) and not (cfg.folder / "nan.json").exists(),
    )


def test_on_a_gpu_one_look_finds_the_first_of_many(whole):
    learn = build(whole, make_dataset(whole))
    stop, turn = StopOnNaN(), next(iter(learn.dls.train))
    stop.seen = [
        (tensor([v, 1.0]), 0, k, list(turn.x), turn.idx)
        for k, v in enumerate([1.0, 2.0, math.nan, math.inf, 3.0])
    ]
    with pytest.raises(Diverged, match="the loss is nan in epoch 1, batch 3"):
        stop.look(learn)
    assert not stop.seen


class Blank(Preprocessor):
    "Every item becomes a zero"

    def encode(self, item):
        return torch.zeros(1)


def test_ids_of_a_prepared_split_reach_the_batches(toy):
    from mla_nb.missing import with_missing
    from mla_nb.train.loaders import loaders

    s = load_prepared(toy)
    for part in (s, with_missing(s, "text=.5")):
        for ready in (0, 2**30):
            ds = loaders(part, {"text": Blank()}, ready=ready).train.dataset
            assert ds.ids[:2] == ["clip-0", "clip-1"]


# the doctor ---------------------------------------------------------------------------


def test_doctor_on_this_machine():
    found = {f.what: f for f in doctor()}
    assert (
        {"versions", "device", "threads", "decoders"} <= found.keys()
        and found["versions"].ok
        and found["decoders"].ok
    ), found


def test_doctor_on_folders(whole, toy, tmp_path, capsys):
    main(["doctor", str(whole.folder), str(toy)])  # no exit code but 0
    assert "every checksum is right" in capsys.readouterr().out
    copy = shutil.copytree(toy, tmp_path / "toy")
    flip(copy / "train-00001.arrow")
    with pytest.raises(SystemExit) as e:
        main(["doctor", str(copy)])
    assert (
        e.value.code == 1
        and "WRONG" in (out := capsys.readouterr().out)
        and "its checksum is wrong" in out
    )
    (tmp_path / "empty").mkdir()
    for folder, why in (
        ("empty", "holds none of"),
        (".", "is a folder of folders; give one of those in it, e.g. .*toy"),
        ("gone", "there is no such folder"),
    ):
        with pytest.raises(SystemExit, match=why):
            main(["doctor", str(tmp_path / folder)])


def place_of_data(path):
    "Where a flipped byte hurts, from 0 to 1: zip files have gaps that hold nothing"
    if not zipfile.is_zipfile(path):
        return 0.5
    with zipfile.ZipFile(path) as z:
        record = max(z.infolist(), key=lambda i: i.file_size)
    raw = path.read_bytes()
    name, extra = struct.unpack_from("<HH", raw, record.header_offset + 26)
    start = record.header_offset + 30 + name + extra
    return (start + record.file_size // 2) / len(raw)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "preprocessors.json",
        "result.json",
        "metrics.jsonl",
        "model.safetensors",
        "predictions.safetensors",
        "last.pt",
        "last-1.pt",
    ],
)
def test_doctor_finds_every_damaged_file_of_a_run(whole, half, name):
    cfg = another(whole, "ill")
    shutil.rmtree(cfg.folder, ignore_errors=True)
    shutil.copytree((half if "last" in name else whole).folder, cfg.folder)
    assert all(f.ok for f in doctor([cfg.folder]))
    flip(cfg.folder / name, place_of_data(cfg.folder / name))
    assert not all(f.ok for f in doctor([cfg.folder]))


def test_doctor_says_what_is_wrong_with_versions():
    for wanted, says in (
        (["torch>=99"], "torch is .* must be >=99; run `make setup`"),
        (["nothing-like-this"], "nothing-like-this is missing"),
    ):
        with (
            patch("importlib.metadata.requires", lambda name, wanted=wanted: wanted),
            pytest.raises(InputError, match=says),
        ):
            versions()
    with patch(
        "importlib.metadata.requires",
        lambda name: ["torch>=2", "nothing-like-this; extra == 'x'"],
    ):
        assert "torch" in versions()
    [f] = run_checks({"x": lambda: 1 / 0})
    assert not f.ok and "ZeroDivisionError" in f.says


# whatever hypothesis can think of -----------------------------------------------------

FUZZ = {
    "deadline": None,
    "max_examples": 300 if MANY else 40,
    "suppress_health_check": list(HealthCheck),
}
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=4),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)
likely = st.sampled_from(
    [
        "",
        "0",
        "1",
        "-1",
        "1e9",
        "nan",
        "inf",
        "true",
        "no",
        "bf16",
        "adamw",
        "cosine",
        "audio=.5",
        "a=1,b=2",
        "audio=small",
        "mla",
        "concat",
        "x(",
        "(",
        ",",
        "=",
        "1_000",
        " 3 ",
    ]
)


@settings(**FUZZ)
@given(
    st.dictionaries(
        st.sampled_from([*Run.model_fields, "nonsense"]),
        scalars | likely,
        max_size=5,
    )
)
def test_parameters(kw):
    try:
        r = Run(**kw)
    except InputError as e:
        assert str(e) and "\n" not in str(e).replace(str(kw), "") or True
    else:
        assert (
            r.id
            and not set(r.id) & set("/\\ ")
            and Run(**dict(dict(r).items())).id == r.id
            and r.epochs >= 1
            and 0 < r.lr < math.inf
        )
        json.dumps(r.what)
    tally("odd parameters, tables, split files, logits (hypothesis)")


@settings(**FUZZ)
@given(st.text(max_size=40) | st.text("ab=,()'.[]{}1 ", max_size=30))
def test_options(text):
    for read in (parse_args, with_options):
        with suppress(InputError):
            read(text)
    tally("odd parameters, tables, split files, logits (hypothesis)")


cell = st.text(max_size=6) | st.sampled_from(
    [
        "a",
        "b",
        "train",
        "test",
        "valid",
        "x.wav",
        "happy",
        "sad",
        '"',
        ",",
        "",
        "\n",
        "\x00",
    ]
)
HEAD = [
    "id,label,text",
    "id,split,label,text",
    "id,label,audio",
    "label,id,text,group",
    "id,label",
    "",
    "id;label;text",
    "id\tlabel\ttext",
    '{"id": "a", "label": "b", "text": "c"}',
]


@settings(**FUZZ)
@given(
    st.sampled_from(HEAD) | st.text(max_size=20),
    st.lists(st.lists(cell, min_size=1, max_size=4), max_size=6),
    st.binary(max_size=3),
)
def test_tables_of_ones_own(tmp_path_factory, head, rows, tail):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(
        "\n".join([head, *(",".join(r) for r in rows)]).encode("utf-8", "surrogatepass")
        + tail
    )
    try:
        found = read_table(path)
        own_classes(found)
        parts = own_splits(found)
        assert sorted(r["id"] for p in parts.values() for r in p) == sorted(
            r["id"] for r in found
        )
    except InputError:
        pass
    tally("odd parameters, tables, split files, logits (hypothesis)")


@settings(**FUZZ)
@given(
    st.binary(max_size=60)
    | st.lists(st.tuples(cell, cell), max_size=5).map(
        lambda v: "\n".join(" ".join(t) for t in v).encode("utf-8", "surrogatepass")
    )
    | st.sampled_from(
        [b"[]", b"{}", b'{"id": 1}', b'[{"id": "a"}]', b"\xff\xfe", b"id,label\na,b"]
    )
)
def test_split_files(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "split.txt"
    path.write_bytes(raw)
    try:
        found = read_split(path)
    except InputError:
        pass
    else:
        assert all(isinstance(r, dict) and r["id"] for r in found)
    tally("odd parameters, tables, split files, logits (hypothesis)")


numbers = st.sampled_from(
    [0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, math.inf, -math.inf, math.nan]
) | st.floats(-50, 50, width=32)


@st.composite
def logits(draw):
    M, B, C = draw(st.integers(0, 4)), draw(st.integers(0, 4)), draw(st.integers(1, 4))
    x = tensor(
        draw(st.lists(numbers, min_size=M * B * C, max_size=M * B * C)),
        dtype=torch.float,
    ).view(M, B, C)
    return x, tensor(
        draw(st.lists(st.booleans(), min_size=M * B, max_size=M * B)), dtype=torch.bool
    ).view(M, B)


@pytest.fixture(scope="module")
def all_rules():
    discover()
    return {k: make_rule(k) for k in sorted(rules)}


@settings(**FUZZ)
@given(logits())
def test_rules_take_any_logits(all_rules, given):
    x, present = given
    some = valid_mask(x, present)
    for name, rule in all_rules.items():
        w = rule(x, present)
        assert w.shape == present.shape and w.isfinite().all() and (w >= 0).all(), name
        assert not w[~some].any() and torch.allclose(
            w.sum(0), some.any(0).float(), atol=1e-4
        ), name
        fused = fuse(x, w)
        assert fused.shape == x.shape[1:] and not fused.isnan().any(), name
        clean = x.masked_fill(
            ~some[..., None], 0.0
        )  # what has no opinion does not matter
        assert rule(clean, some).allclose(w, atol=1e-6), name
    tally("odd parameters, tables, split files, logits (hypothesis)")


def test_a_million_samples(all_rules):
    x = torch.randn(2, 1_000_000, 2)
    x[0, ::7], x[1, ::11, 0] = math.nan, -math.inf
    for name, rule in all_rules.items():
        w = rule(x, torch.ones(2, 1_000_000, dtype=torch.bool))
        assert (
            w.isfinite().all() and not w[0, ::7].any() and not fuse(x, w).isnan().any()
        ), name
    tally("odd parameters, tables, split files, logits (hypothesis)")


# bookkeeping --------------------------------------------------------------------------


def test_the_soak_is_left_out_of_make_test():
    assert (
        "not soak" in (ROOT / "pytest.ini").read_text()
        and "-m" in (ROOT / "Makefile").read_text().split("\nsoak:")[1].split("\n\n")[0]
    )
