"""Runs as users make them, and everything that can be done wrong.

Command line, papermill, kills. (Two processes: `test_distributed.py`.)
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from ends import end_of
from safetensors.torch import load_file, save_file

from mla_nb.cli import main
from mla_nb.compare import results, table
from mla_nb.core import InputError
from mla_nb.methods.fusion import entropy_rule, mean
from mla_nb.methods.qmf import energy
from mla_nb.runs.config import Run
from mla_nb.runs.run import load_run, run
from mla_nb.train.checkpoints import load_pred

SMALL = {
    "dataset_args": "n_train=128,n_valid=64,n_test=64",
    "epochs": 3,
    "progress": False,
    "threads": 1,
}
FLAGS = [
    "--dataset_args",
    SMALL["dataset_args"],
    "--epochs",
    "3",
    "--progress",
    "false",
    "--threads",
    "1",
]
MLA_TRAIN = [sys.executable, "-m", "mla_nb.cli", "train"]


def cli(*args, cwd, ok=True, **kw):
    out = subprocess.run(
        [*MLA_TRAIN, *map(str, args)], capture_output=True, text=True, cwd=cwd, **kw
    )
    assert (out.returncode == 0) == ok, out.stdout + out.stderr
    return out


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def unfinished(cfg):
    "A run that is trained, and ended before it is tested: its checkpoints are there"
    with (
        patch("mla_nb.runs.run._finish", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run(cfg)
    assert (cfg.folder / "last.pt").exists()


# the same run by other means ----------------------------------------------------------


def test_two_runs_of_one_seed_are_identical_and_seeds_differ(tmp_path):
    a, b, c = (
        run(Run(**SMALL, seed=s), root=tmp_path / r)
        for s, r in ((1, "a"), (1, "b"), (2, "a"))
    )
    assert a["test"] == b["test"] and same(
        weights(tmp_path / "a" / a["id"]), weights(tmp_path / "b" / b["id"])
    )
    assert not same(
        weights(tmp_path / "a" / a["id"]), weights(tmp_path / "a" / c["id"])
    )
    assert (
        table(tmp_path / "a").count("| 2 |") == 1 and len(results(tmp_path / "a")) == 2
    )


def test_command_line_and_papermill_give_the_same_result(tmp_path, caplog):
    pm = pytest.importorskip("papermill")
    out = cli(*FLAGS, "--method", "mla", "--seed", 1, "--root", "cli", cwd=tmp_path)
    assert "| synthetic" in out.stdout and "Bayes accuracy" in out.stdout
    pm.execute_notebook(
        ROOT / "nbs/experiments/run.ipynb",
        tmp_path / "out.ipynb",
        dict(SMALL, method="mla", seed=1, root="pm"),
        cwd=str(tmp_path),
        progress_bar=False,
    )
    assert not caplog.records, "papermill warns about the parameters"
    [a], [b] = results(tmp_path / "cli"), results(tmp_path / "pm")
    assert (
        a["test"] == b["test"]
        and a["valid"] == b["valid"]
        and a["best_epoch"] == b["best_epoch"]
    )
    nb = json.loads((tmp_path / "out.ipynb").read_text())
    images = [
        o
        for c in nb["cells"]
        for o in c.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert len(images) >= 4


@pytest.mark.parametrize(
    "notebook, wrong, near",
    [("run", "epoch", "epochs"), ("compare", "rot", "root")],
)
def test_our_papermill_refuses_unknown_parameters(tmp_path, notebook, wrong, near):
    "As `make demo` calls it; plain papermill only warns"
    pytest.importorskip("papermill")
    source = ROOT / f"nbs/experiments/{notebook}.ipynb"
    out = subprocess.run(
        [sys.executable, str(ROOT / "tools/nbs.py"), "papermill", str(source)]
        + [str(tmp_path / "out.ipynb"), "-k", "python3", "-p", wrong, "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert out.returncode and f"did you mean '{near}'" in out.stderr, out.stderr
    assert "unknown parameter" in out.stderr and not (tmp_path / "runs").exists()


def test_papermill_warns_about_what_run_does_not_have_and_refuses_wrong_values(
    tmp_path, caplog
):
    pm = pytest.importorskip("papermill")
    with pytest.raises(pm.PapermillExecutionError, match="must be a number above 0"):
        pm.execute_notebook(
            ROOT / "nbs/experiments/run.ipynb",
            tmp_path / "out.ipynb",
            dict(SMALL, epoch=1, lr=-1),
            cwd=str(tmp_path),
            progress_bar=False,
        )
    assert "epoch" in caplog.text  # papermill knows the parameters of the notebook
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", ["concat", "ensemble", "mla", "mla_fixed"])
def test_methods_run_and_load_again(tmp_path, method):
    r = run(Run(**SMALL, method=method), root=tmp_path)
    net, m, about = load_run(tmp_path / r["id"])
    assert about["run"]["method"] == method and set(net.encoders) == {
        "audio",
        "visual",
        "text",
    }
    assert (m.rule is None) == (method == "concat")
    if method == "mla_fixed":
        assert (
            m.rule.weights == tuple(r["weights"]) and abs(sum(r["weights"]) - 1) < 1e-6
        )


@pytest.mark.parametrize(
    "how",
    [
        {"rule": "calibrated"},
        {"temperature": "validation"},
        {"rule": "energy", "temperature": "validation"},
        {"temperature": "sum"},
        {"rule": "mean", "temperature": "sum"},
        {},
    ],
)
def test_temperatures_are_stored_with_a_run_and_used_where_asked(tmp_path, how):
    r = run(Run(**SMALL, method="mla", **how), root=tmp_path)
    net, m, about = load_run(tmp_path / r["id"])
    assert set(r["temperatures"]) == {"fused", *net.encoders}
    assert getattr(m.rule, "temperatures", None) == (
        tuple(r["temperatures"][k] for k in net.encoders) if how else None
    )
    inner = {"energy": energy, "mean": mean}.get(how.get("rule"), entropy_rule)
    assert not how or m.rule.rule is inner
    assert not how or m.rule.sums == (how.get("temperature") == "sum")
    p = load_pred(tmp_path / r["id"])
    assert torch.allclose(
        m.rule(p.logits, p.present), p.weights, atol=1e-6
    )  # what is loaded is what was tested


@pytest.mark.parametrize(
    "how",
    [{"rule": "mean"}, {"rule": "fixed"}, {"method": "concat"}, {"method": "ensemble"}],
)
def test_a_temperature_that_would_change_nothing_is_refused(tmp_path, how):
    with pytest.raises(InputError, match="does not look at that"):
        run(
            Run(**{**SMALL, "method": "mla", **how}, temperature="validation"),
            root=tmp_path,
        )
    assert not any(tmp_path.iterdir())


def test_unimodal_builds_one_encoder(tmp_path):
    r = run(Run(**SMALL, method="unimodal", method_args="modality=text"), root=tmp_path)
    assert (
        set(r["test"]["accuracy"]) == {"text", "fused"}
        and r["test"]["accuracy"]["text"] == r["test"]["accuracy"]["fused"]
    )
    with pytest.raises(InputError, match="unknown modality 'smell'"):
        run(
            Run(**SMALL, method="unimodal", method_args="modality=smell"), root=tmp_path
        )


def test_bf16_adamw_cosine_and_resnet18(tmp_path):
    cfg = Run(
        **{
            **SMALL,
            "epochs": 1,
            "dataset_args": "n_train=32,n_valid=16,n_test=16,modalities='audio,visual'",
        },
        encoder="resnet18",
        precision="bf16",
        optimizer="adamw",
        schedule="cosine",
        lr=1e-3,
        batch_size=16,
    )
    assert 0 <= run(cfg, root=tmp_path)["test"]["accuracy"]["fused"] <= 1


def test_init_starts_from_the_weights_of_another_run(tmp_path):
    first = run(Run(**SMALL), root=tmp_path)
    tiny = Run(
        **{**SMALL, "epochs": 1},
        seed=5,
        lr=1e-9,
        weight_decay=0,
        init=str(tmp_path / first["id"]),
    )
    again = run(tiny, root=tmp_path)
    a, b = weights(tmp_path / first["id"]), weights(tmp_path / again["id"])
    assert all(
        torch.allclose(a[k], b[k], atol=1e-5)
        for k in a
        if "running" not in k and "num_batches" not in k
    )


def test_workers_give_the_same_result(tmp_path):
    from functools import partial
    from unittest.mock import patch

    from mla_nb.train import loaders as batches

    a = run(Run(**SMALL), root=tmp_path / "a")
    with patch("mla_nb.runs.run.loaders", partial(batches.loaders, ready=0)):
        b = run(Run(**SMALL, workers=2), root=tmp_path / "b")
    assert same(weights(tmp_path / "a" / a["id"]), weights(tmp_path / "b" / b["id"]))


# kills --------------------------------------------------------------------------------

DIES = """
import os, signal
from mla_nb.train.learner import Learner
one_batch = Learner.one_batch
def dies(self):
    if (self.epoch, self.step) == (2, 5): os.kill(os.getpid(), signal.SIGKILL)
    one_batch(self)
Learner.one_batch = dies
from mla_nb.cli import main; main()
"""
TO_THE_END = """
from ends import keep_ends
from mla_nb.cli import main
with keep_ends(): main()
"""


def to_the_end(*args, cwd):
    "A command whose runs leave their last state beside their folders"
    where = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    subprocess.run(
        [sys.executable, "-c", TO_THE_END, "train", *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": where},
        check=True,
    )


def test_kill_9_in_the_middle_of_an_epoch(tmp_path):
    flags = [
        "--dataset_args",
        "n_train=400,n_valid=64,n_test=64",
        "--epochs",
        "4",
        "--progress",
        "false",
        "--threads",
        "1",
        "--seed",
        "3",
    ]
    to_the_end(*flags, "--root", "whole", cwd=tmp_path)
    p = subprocess.run(
        [sys.executable, "-c", DIES, "train", *flags, "--root", "cut"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert p.returncode == -signal.SIGKILL, p.stderr[-3000:]
    [folder] = tmp_path.glob("cut/[!.]*")
    assert (
        not (folder / "result.json").exists()
        and len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    )
    to_the_end(*flags, "--root", "cut", cwd=tmp_path)
    [whole] = tmp_path.glob("whole/[!.]*")
    assert same(weights(whole), weights(folder))
    last = [end_of(f) for f in (whole, folder)]
    assert (
        same(last[0]["net"], last[1]["net"])
        and last[0]["epoch"] == last[1]["epoch"] == 3
    )
    assert all(
        p0.equal(p1)
        for c0, c1 in zip(last[0]["callbacks"], last[1]["callbacks"])
        for p0, p1 in zip(c0.values(), c1.values())
        if isinstance(p0, torch.Tensor)
    )
    a, b = (json.loads((f / "result.json").read_text()) for f in (whole, folder))
    assert a["test"] == b["test"] and a["best_epoch"] == b["best_epoch"]


def test_killed_before_the_first_epoch_ended(tmp_path):
    cfg = Run(**SMALL, root=str(tmp_path))
    from unittest.mock import patch

    with (
        patch("mla_nb.train.learner.Learner.one_epoch", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run(cfg)
    assert (cfg.folder / "config.json").exists() and not (
        cfg.folder / "last.pt"
    ).exists()
    assert run(cfg)["test"] == run(cfg, root=tmp_path / "fresh")["test"]


# everything a user can do wrong -------------------------------------------------------

WRONG = [
    (
        ["--dataset", "sinthetic"],
        "unknown dataset 'sinthetic': did you mean 'synthetic'?",
    ),
    (["--method", "mal"], "unknown method 'mal': did you mean 'mla'?"),
    (["--encoder", "smal"], "did you mean 'small'?"),
    (["--encoder", "resnet18"], "unknown encoder of text"),
    (["--rule", "entrpy"], "unknown rule 'entrpy': did you mean 'entropy'?"),
    (["--epochs", "-1"], "epochs=-1: must be a whole number of at least 1"),
    (["--epochs", "many"], "epochs='many': must be a whole number"),
    (["--lr", "fast"], "lr='fast': must be a number"),
    (["--lr", "-0.1"], "lr=-0.1: must be a number above 0"),
    (["--epoch", "3"], "unknown option '--epoch': did you mean '--epochs'?"),
    (
        ["--dataset_args", "family=balance"],
        "unknown family 'balance': did you mean 'balanced'?",
    ),
    (
        ["--dataset_args", "nois=1"],
        "unknown option of synthetic 'nois': did you mean 'noise'?",
    ),
    (["--dataset_args", "n_test=0"], "n_test=0: must be a whole number, at least 1"),
    (["--dataset_args", "n_train=abc"], "n_train='abc': must be a whole number"),
    (["--dataset_args", "size=-3"], "size=-3: must be a whole number, at least 16"),
    (["--dataset_args", "modalities=5"], "modalities=5: must be text"),
    (
        ["--seed", "99999999999999999999"],
        "seed=99999999999999999999: must be a whole number from 0",
    ),
    (
        ["--method_args", "projection=banana"],
        "projection='banana': must be true or false",
    ),
    (["--method_args", "order=audio"], "never has a turn"),
    (["--dataset_args", "n_train=1"], "in no training sample"),
    (
        ["--method_args", "projektion=1"],
        "unknown option of mla 'projektion': did you mean 'projection'?",
    ),
    (
        ["--method", "mla_fixed", "--method_args", "weights=(.5,.5)"],
        "3 modalities need 3 weights",
    ),
    (
        ["--dataset", "digits", "--dataset_args", ""],
        (
            "there is no prepared dataset at data/digits; run: python "
            "data_scripts/prepare_digits.py"
        ),
    ),
    (["--init", "nowhere"], "there is no such checkpoint"),
    (
        ["--lr", "1e8", "--dataset_args", "n_train=128,n_valid=64,n_test=64"],
        "try a learning rate below 1e+08",
    ),
    (
        ["--lr", "1e30", "--batch_size", "1000", "--epochs", "1", "--method", "concat"],
        "the answers are not finite; try a learning rate below 1e+30",
    ),
]


@pytest.mark.parametrize(
    "flags,says", WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    flags, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["train", *FLAGS, *flags])
    assert (
        says in str(e.value.code)
        and str(e.value.code).startswith("mla train: ")
        and "\n" not in str(e.value.code)
    )
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= (
        {"nan.json"} if "--lr" in flags else set()
    )  # which samples it was stays written down


def test_exit_code_and_stderr(tmp_path):
    out = cli("--method", "mal", cwd=tmp_path, ok=False)
    assert (
        out.returncode == 1
        and out.stderr.strip().startswith("mla train: unknown method")
        and "Traceback" not in out.stderr
    )


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(SystemExit, match="^mla train: cannot read or write .*taken"):
        main(["train", *FLAGS, "--root", str(tmp_path / "taken")])


def test_a_failed_run_removes_only_its_own_files(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.keep").write_text("x")
    with pytest.raises(InputError, match="try a learning rate"):
        run(Run(**{**SMALL, "lr": 1e30}, name="mine"), root=tmp_path)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        ".keep",
        "nan.json",
    ]
    assert (
        run(Run(**SMALL, name="mine"), root=tmp_path)["id"] == "mine"
        and not (tmp_path / "mine/nan.json").exists()
    )


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "result.json",
        "preprocessors.json",
        "last.pt",
        "model.safetensors",
    ],
)
@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_damaged_files_of_a_run(tmp_path, name):
    cfg = Run(**SMALL, root=str(tmp_path))
    run(cfg) if name == "result.json" else unfinished(cfg)
    for p in [
        cfg.folder / name,
        *([cfg.folder / "last-1.pt"] if name == "last.pt" else []),
    ]:
        p.write_bytes(b"[]")
    if name == "model.safetensors":
        (cfg.folder / name).unlink()
    with pytest.raises(InputError, match="remove the folder"):
        run(cfg)


def test_a_damaged_result_hides_no_other(tmp_path):
    run(Run(**SMALL), root=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/result.json").write_text("{bad")
    with pytest.warns(UserWarning, match="other/result.json"):
        assert len(results(tmp_path)) == 1


def test_folder_of_another_configuration(tmp_path):
    run(Run(**SMALL, name="mine"), root=tmp_path)
    before = sorted(
        (p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()
    )
    with pytest.raises(
        InputError, match="belongs to another configuration: seed is 0 there and 1 here"
    ):
        run(Run(**SMALL, name="mine", seed=1), root=tmp_path)
    assert before == sorted(
        (p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()
    )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/draft.txt").write_text("chapter 2")
    with pytest.raises(InputError, match="not the folder of a run"):
        run(Run(**SMALL, name="thesis"), root=tmp_path)
    assert (tmp_path / "thesis/draft.txt").read_text() == "chapter 2"


def test_checkpoint_of_another_architecture(tmp_path):
    r = run(Run(**SMALL), root=tmp_path)
    with pytest.raises(
        InputError, match="another architecture: .*head.out.weight has shape"
    ):
        run(Run(**SMALL, method="concat", init=str(tmp_path / r["id"])), root=tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="another architecture"):
        run(Run(**SMALL, init=str(tmp_path / "odd.safetensors")), root=tmp_path)
    (tmp_path / "torn.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        run(Run(**SMALL, init=str(tmp_path / "torn.safetensors")), root=tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [r["id"]]


def test_resuming_with_the_state_of_another_architecture(tmp_path):
    a, b = (
        Run(**SMALL, name="a"),
        Run(**{**SMALL, "epochs": 1}, method="concat", name="b"),
    )
    for c in (a, b):
        unfinished(c.replace(root=str(tmp_path)))
    (tmp_path / "a/last.pt").write_bytes((tmp_path / "b/last.pt").read_bytes())
    with pytest.raises(
        InputError, match="last.pt holds the weights of another architecture"
    ):
        run(a, root=tmp_path)
    assert (tmp_path / "a/model.safetensors").exists()


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path):
    cfg = Run(**SMALL, name="a", root=str(tmp_path))
    unfinished(cfg)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    for n in ("last.pt", "last-1.pt"):
        torch.save({"net": Evil()}, tmp_path / "a" / n)
    with (
        pytest.warns(UserWarning, match="last.pt is damaged"),
        pytest.raises(InputError, match="last.pt"),
    ):
        run(cfg)
    assert not (tmp_path / "owned").exists()


def test_files_of_tensors_are_equal_byte_for_byte_and_for_others_to_read(tmp_path):
    from mla_nb.train.checkpoints import read_tensors, save_tensors

    for n in "ab":
        save_tensors(
            {"x": torch.ones(3), "y": torch.zeros(2)},
            tmp_path / n,
            mods="audio,text",
            more="1",
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_tensors(tmp_path / "a")[1] == {"mods": "audio,text", "more": "1"}
    (tmp_path / "c").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "c").stat().st_mode


# tables and pictures ------------------------------------------------------------------


def test_a_run_of_two_processes_is_not_one_of_one(tmp_path, monkeypatch):
    small = {**SMALL, "epochs": 1, "root": str(tmp_path)}
    cfg = Run(**small)
    run(cfg)
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = Run(**small)
    assert two.processes == 2 and two.id != cfg.id
    assert run(cfg)["id"] == cfg.id  # finished: nothing is trained
    with pytest.raises(InputError, match="processes is 1 there and 2 here"):
        run(two.replace(name=cfg.id))
    with pytest.raises(InputError, match="processes=1, but 2 are started; start 1"):
        run(cfg.replace(seed=3))
    assert [p.name for p in tmp_path.iterdir()] == [cfg.id]


def test_a_copy_of_a_run_is_no_second_seed_and_rows_say_all_that_differs(tmp_path):
    [r] = [run(Run(**{**SMALL, "epochs": 1}), root=tmp_path)]
    copies = [
        r,
        {**r, "folder": "elsewhere"},
        {**r, "run": {**r["run"], "seed": 1}},
        {**r, "run": {**r["run"], "processes": 2}},
        {**r, "run": {**r["run"], "accumulation_steps": 2}},
    ]
    *lines, most, bayes = table(copies).splitlines()[2:]
    assert "*most frequent class*" in most and "*Bayes accuracy*" in bayes
    rows = [line.split(" | ") for line in lines]
    assert [(row[1], row[2]) for row in rows] == [
        ("mla epochs=1", "2"),
        ("mla processes=2, epochs=1", "1"),
        ("mla epochs=1, accumulation_steps=2", "1"),
    ]


def test_accuracies_as_a_picture(tmp_path, capsys):
    run(Run(**{**SMALL, "epochs": 1}), root=tmp_path / "runs")
    main(["table", str(tmp_path / "runs"), "--plot", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes()[
        :4
    ] == b"\x89PNG" and "Bayes accuracy" in capsys.readouterr().out
    folder = next((tmp_path / "runs").iterdir())
    import shutil

    for k in range(12):
        shutil.copytree(folder, tmp_path / f"runs/copy{k}")
    with pytest.raises(SystemExit, match="13 runs below .* are too many"):
        main(["table", str(tmp_path / "runs"), "--plot", str(tmp_path / "b.png")])
    assert not (tmp_path / "b.png").exists()
