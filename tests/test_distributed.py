"""Two processes are one process with the doubled batch; a turn in pieces is the turn. The two processes are started once, and train everything.

torchrun --nproc_per_node 2 tests/test_distributed.py FOLDER        is what they do
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, together, torchrun
from torch import nn
from torch.utils.data import DataLoader

from mla_nb.core import (
    Batch,
    InputError,
    Modality,
    Samples,
    Splits,
    collate,
    discover,
    methods,
)
from mla_nb.heads import make_net
from mla_nb.methods.base import Callback
from mla_nb.tools import set_seed
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import Loaders, ShardShuffle, Shuffle, loaders
from mla_nb.train.runtime import (
    Accelerate,
    Share,
    backward_in_pieces,
    gradient_buckets,
    part_of,
)
from mla_nb.train.watching import StopOnNaN

MODS, CLASSES = ("audio", "visual", "text"), 4
discover()


def rows(n, seed, missing=0.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=g)
    here = torch.rand(3, n, generator=g) >= missing
    here[torch.arange(n) % 3, torch.arange(n)] = True  # everybody has something
    x = {m: torch.randn(n, 5, generator=g) + nn.functional.one_hot(y, 5) for m in MODS}
    return x, y, dict(zip(MODS, here))


def batch(n, seed, missing=0.0, lacks=()):
    "`lacks`: (modality, slice) pairs: rows that have none of it"
    x, y, here = rows(n, seed, missing)
    for m, where in lacks:
        here[m][where] = False
    return Batch(
        {m: v for m, v in x.items() if here[m].any()},
        y,
        here,
        torch.arange(n) + 7 * seed % 50,
    )


def encoder(width=6, norm=False):
    e = nn.Sequential(
        nn.Linear(5, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh()
    )
    e.num_features = width
    return e


FIRST, SECOND = slice(0, 8), slice(8, 16)
DATA = {
    "all": lambda: [batch(16, k) for k in range(4)],
    "missing": lambda: [batch(16, k, 0.5) for k in range(4)],
    "one_sided": lambda: [
        batch(16, 0, 0.0, [("audio", SECOND)]),
        batch(16, 1, 0.0, [("text", FIRST), ("visual", SECOND)]),
        batch(16, 2, 0.3, [("audio", slice(0, 16))]),
        batch(16, 3),
    ],
    "ragged": lambda: [batch(16, 0), batch(5, 1, 0.5), batch(2, 2), batch(1, 3)],
}  # in the last one the second process has no row
METHODS = {
    "concat": {},
    "sum": {},
    "film": {},
    "gated": {},
    "ogm": {},
    "qmf": {},
    "qmf m3ae": {"branch": "m3ae"},
    "ensemble": {},
    "mla": {},
    "mla rank": {"rank": 40},
    "mla update_first": {"when": "update_first"},
    "mla_fixed": {},
    "mla_released": {},
}
CORE = "concat", "ogm", "qmf", "ensemble", "mla"
CASES = [
    (m, d) for m in METHODS for d in DATA if m in CORE or d in ("one_sided", "ragged")
]
NORMED = [
    (m, d)
    for m in METHODS
    for d in DATA
    if m in ("concat", "mla")
    or d == "one_sided"
    or (m, d) in (("qmf", "ragged"), ("ogm", "missing"))
]  # with batch norm
DRAWN = ["ogm_ge", "ensemble"]  # what is drawn is the same for all processes


def trained(
    name,
    data,
    callbacks=(),
    pieces=0,
    options=None,
    epochs=2,
    dls=None,
    lr=0.05,
    norm=False,
):
    method = methods[name.split()[0]](
        **(METHODS.get(name, {}) if options is None else options)
    )
    set_seed(0)
    net = make_net(
        method.head,
        {m: encoder(6 + 2 * k, norm and m != "text") for k, m in enumerate(MODS)},
        CLASSES,
    )
    b = dls or Loaders(data, data[:3], data[:1], Shuffle(60))
    learn = Learner(
        net,
        b,
        method,
        lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-3),
        [*cbs, StopOnNaN(), Recorder(1)],
    )
    if pieces:
        learn.backward = partial(backward_in_pieces, learn, pieces)
    return learn.fit(epochs)


def found(learn):
    "Everything that must be the same"
    out = {f"net.{k}": v for k, v in learn.net.state_dict().items()}
    for c in learn.method.grad_transforms:
        out |= {
            f"edit.{k}": v
            for k, v in c.state_dict().items()
            if isinstance(v, torch.Tensor)
        }
    for r in learn.history:
        for k, v in r["train"]["loss"].items():
            out[f"loss.{r['epoch']}.{k}"] = torch.tensor(v)
        for k, v in r["train"]["grad"].items():
            out[f"grad.{r['epoch']}.{k}"] = torch.tensor(v)
        for k, v in r["valid"]["accuracy"].items():
            out[f"accuracy.{r['epoch']}.{k}"] = torch.tensor(v)
        for k, v in r["valid"]["loss"].items():
            out[f"valid.{r['epoch']}.{k}"] = torch.tensor(v)
    return out


def equal(a, b, eps=1e-6):
    assert a.keys() == b.keys()
    for k in a:
        assert a[k].shape == b[k].shape and torch.allclose(
            a[k].double(),
            b[k].double(),
            rtol=eps,
            atol=eps * (10 if k == "edit.P" else 1),
        ), (k, (a[k] - b[k]).abs().max())


def split(n=61, missing=0.3):
    x, y, here = rows(n, 5, missing)

    def part(s):
        return Samples(
            {m: [v if h else None for v, h in zip(x[m][s], here[m][s])] for m in MODS},
            y[s],
        )

    s = Splits(
        "toy",
        list("abcd"),
        dict.fromkeys(MODS, Modality("audio", "features")),
        part(slice(0, n)),
        part(slice(0, 19)),
        part(slice(0, 7)),
    )
    s.train.shards = [10] * 6 + [1]
    return s


def loaded(batch_size, shuffle="all", ready=2**30):
    return loaders(split(), None, batch_size, seed=3, shuffle=shuffle, ready=ready)


def child(folder):
    "What each of the two processes does"
    import torch.distributed as dist
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    out = {}
    for name, data in CASES:
        out[f"{name}|{data}"] = trained(name, DATA[data](), [Accelerate("cpu")])
    for name, data in NORMED:
        out[f"{name}|{data} normed"] = trained(
            name, DATA[data](), [Accelerate("cpu")], norm=True
        )
    for name in DRAWN:
        out[f"{name}|drawn"] = trained(
            name,
            DATA["missing"](),
            [Accelerate("cpu")],
            options={"order": "random"} if name == "ensemble" else {},
            epochs=3,
        )
    for shuffle in ("all", "shards"):
        for ready in (2**30, 0):
            out[f"mla|{shuffle} {ready}"] = trained(
                "mla", None, [Accelerate("cpu")], dls=loaded(8, shuffle, ready)
            )
    out["mla|twice"] = trained(
        "mla", DATA["missing"](), [Accelerate("cpu")], epochs=1
    ).fit(2)
    for name in ("mla", "qmf"):
        out[f"{name}|pieces"] = trained(
            name, DATA["missing"](), [Accelerate("cpu", piece=3)]
        )
    try:
        trained("mla", DATA["all"](), [Accelerate("cpu")], lr=1e30)
        said = "nothing"
    except InputError as e:
        said = str(e)
    Path(folder, f"said{dist.get_rank()}").write_text(said)
    flat = {
        f"{k}|{n}": v.contiguous() for k, l in out.items() for n, v in found(l).items()
    }
    save_file(flat, Path(folder, f"{dist.get_rank()}.safetensors"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("two")
    p = subprocess.run(
        together(__file__, folder),
        capture_output=True,
        text=True,
        timeout=240,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert p.returncode == 0, p.stderr[-4000:]
    both = [load_file(folder / f"{r}.safetensors") for r in (0, 1)]

    def of(rank, case):
        return {
            k.removeprefix(case + "|"): v
            for k, v in both[rank].items()
            if k.startswith(case + "|")
        }

    of.said = [(folder / f"said{r}").read_text() for r in (0, 1)]
    return of


@pytest.mark.parametrize("name,data", CASES)
def test_two_processes_are_one_with_the_doubled_batch(two, name, data):
    one = found(trained(name, DATA[data]()))
    assert one and all(v.isfinite().all() for v in one.values())
    for rank in (0, 1):
        equal(two(rank, f"{name}|{data}"), one)


@pytest.mark.parametrize("name,data", NORMED)
def test_batch_norm_looks_at_everybodys_rows(two, name, data):
    "Also where one process has no row of a modality, or the whole turn has only one"
    one = found(trained(name, DATA[data](), norm=True))
    for rank in (0, 1):
        equal(two(rank, f"{name}|{data} normed"), one, 3e-6)


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_drawn_is_the_same_for_all(two, name):
    a, b = (two(r, f"{name}|drawn") for r in (0, 1))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("ready", [2**30, 0])
def test_data_loaders_deal_out_the_doubled_batch(two, ready):
    "61 samples: the last row of the doubled batch would be alone, and is left out by both"
    one = found(trained("mla", None, dls=loaded(16, ready=ready)))
    for rank in (0, 1):
        equal(two(rank, f"mla|all {ready}"), one)


def test_shards_train_and_agree(two):
    a, b = (two(r, "mla|shards 0") for r in (0, 1))
    assert all(a[k].equal(b[k]) for k in a) and not all(
        torch.allclose(a[k], two(0, "mla|all 0")[k]) for k in a if k.startswith("net")
    )
    equal(a, two(0, f"mla|shards {2**30}"))


@pytest.mark.parametrize("name", ["mla", "qmf"])
def test_pieces_on_two_processes(two, name):
    equal(two(0, f"{name}|pieces"), found(trained(name, DATA["missing"]())), 2e-6)


def test_training_that_goes_on(two):
    equal(two(1, "mla|twice"), found(trained("mla", DATA["missing"]())))


def test_a_loss_that_breaks_down_stops_all_processes(two):
    a, b = (
        said.split("samples")[0] for said in two.said
    )  # each names samples of its own
    assert a == b and all("learning rate below 1e+30" in said for said in two.said)


def test_the_command_itself(tmp_path):
    "Weights, predictions and result are those of one process, batch norm included; few steps, because rounding grows (chapter 44)"
    import json

    from safetensors.torch import load_file

    from mla_nb.runs.run import Run, run
    from mla_nb.train.checkpoints import load_pred

    size, common = (
        "n_train=65,n_valid=45,n_test=50",
        ["--epochs", "1", "--progress", "false", "--lr", "0.01"],
    )
    said = torchrun(
        "--dataset_args",
        size,
        "--batch_size",
        "16",
        "--name",
        "two",
        *common,
        cwd=tmp_path,
    )
    assert said.count("best epoch") == 1
    one = run(
        Run(
            dataset_args=size,
            batch_size=32,
            name="one",
            epochs=1,
            progress=False,
            lr=0.01,
            root=str(tmp_path / "runs"),
        )
    )
    a, b = (load_file(tmp_path / f"runs/{n}/model.safetensors") for n in ("one", "two"))
    equal(a, b, 1e-5)
    p, q = (load_pred(tmp_path / f"runs/{n}") for n in ("one", "two"))
    assert torch.allclose(p.fused, q.fused, atol=1e-4) and p.idx.equal(q.idx)
    two = json.loads((tmp_path / "runs/two/result.json").read_text())
    assert (
        two["test"]["accuracy"] == one["test"]["accuracy"]
        and two["valid"]["accuracy"] == one["valid"]["accuracy"]
        and two["best_epoch"] == one["best_epoch"]
    )


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    class Lonely:
        device, num_processes = torch.device("cpu"), 1

        def __init__(self, **kw):
            pass

    monkeypatch.setattr("accelerate.Accelerator", Lonely)
    with pytest.raises(
        InputError, match="2 processes were started, but they have not found each other"
    ):
        trained("mla", DATA["all"](), [Accelerate()])


def test_the_command_with_gaps_and_shares_of_everything(tmp_path):
    "Missing modalities, pieces, batch norm and a weighted rule: it trains, and resumes"
    flags = [
        "--dataset_args",
        "n_train=97,n_valid=40,n_test=40",
        "--method",
        "mla_fixed",
        "--missing",
        ".5",
        "--accumulate",
        "2",
        "--augment",
        "flip",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        "--progress",
        "false",
    ]
    first = torchrun(*flags, "--epochs", "2", cwd=tmp_path)
    assert first.count("best epoch") == 1 and first == torchrun(
        *flags, "--epochs", "2", cwd=tmp_path
    )


# accumulation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize(
    "name,data", [(m, d) for m in METHODS for d in ("missing", "ragged")]
)
def test_a_turn_in_pieces_is_the_turn(name, data, rows):
    equal(
        found(trained(name, DATA[data](), pieces=rows)),
        found(trained(name, DATA[data]())),
        2e-6,
    )


def test_pieces_step_once_per_turn_and_bound_what_is_encoded_at_once():
    seen, steps = [], []

    class Spy(Callback):
        def after_step(self, learn, turn):
            steps.append(list(learn.turn.x))

    learn = trained("mla", DATA["all"](), [Spy()], pieces=5, epochs=0)

    def look(m, out):
        if learn.net.training:
            seen.append((m, len(out)))

    for m, e in learn.net.encoders.items():
        e.register_forward_hook(lambda mod, i, out, m=m: look(m, out))
    learn.fit(1)
    assert steps == [[m] for _ in range(4) for m in MODS]
    assert seen == [(m, n) for _ in range(4) for m in MODS for n in (5, 5, 5, 1)]


def test_accumulate_through_run(tmp_path):
    "The order of samples is that of the larger batch, and so is the number of steps"
    from mla_nb.runs.run import Run, build, make_dataset

    cfg = Run(
        dataset_args="n_train=96,n_valid=32,n_test=32",
        batch_size=16,
        accumulate=3,
        root=str(tmp_path),
    )
    s = make_dataset(cfg)
    [acc] = [c for c in build(cfg, s).cbs if isinstance(c, Accelerate)]
    assert acc.piece == 16 and [len(b) for b in build(cfg, s).dls.train] == [48, 48]
    assert (
        replace(cfg, accumulate=1).id != cfg.id
        and Run().id == Run(accumulate=1, shuffle="all", augment="").id
    )


# parts ----------------------------------------------------------------------------------------------------------------


class FakeTeam:
    def __init__(self, n, rank):
        self.n, self.rank, self.kept = n, rank, {}


@pytest.mark.parametrize(
    "n_rows,n,size", [(61, 2, 8), (64, 3, 8), (7, 4, 1), (33, 2, 16), (5, 5, 2)]
)
def test_every_row_once(n_rows, n, size):
    sampler = Shuffle(n_rows, 3)
    shares = [list(Share(sampler, size, FakeTeam(n, r))) for r in range(n)]
    dealt = sorted(i for s in shares for b in s for i in b)
    assert (
        len(set(dealt)) == len(dealt) >= n_rows - 1
        and len({len(Share(sampler, size, FakeTeam(n, r))) for r in range(n)}) == 1
    )
    whole = torch.tensor(list(sampler)).split(size * n)
    for k, chunk in enumerate(whole[:-1]):
        assert [
            i for s in shares for i in s[k]
        ] == chunk.tolist()  # in the order of the larger batch


@pytest.mark.parametrize("n_rows,n,size", [(61, 2, 256), (3, 4, 256), (20, 3, 2)])
def test_predictions_are_divided_exactly(n_rows, n, size):
    dl = DataLoader(
        Samples(
            {"audio": list(torch.randn(n_rows, 5))},
            torch.zeros(n_rows, dtype=torch.long),
        ),
        batch_size=size,
        collate_fn=collate,
    )
    assert [
        int(i) for r in range(n) for b in part_of(dl, FakeTeam(n, r)) for i in b.idx
    ] == list(range(n_rows))


def test_shards_keep_neighbors_together_and_change_with_the_epoch():
    s = ShardShuffle([10] * 20, seed=1, buffer=2)
    first = list(s)
    assert sorted(first) == list(range(200)) and len({i // 10 for i in first[:20]}) == 2
    s.epoch = 1
    assert list(s) != first and len({i // 10 for i in list(s)[20:40]}) == 2
    streams = s.streams(3)
    assert not {i // 10 for i in streams[0].tolist()} & {
        i // 10 for i in streams[1].tolist()
    }  # shards of its own
    with pytest.raises(
        InputError, match="lies in 20 shards; start no more processes than that"
    ):
        s.streams(21)


def test_buckets():
    params = [torch.zeros(n) for n in (3, 3, 10, 1, 1)]
    assert [[len(p) for p in b] for b in gradient_buckets(params, 6)] == [
        [3, 3],
        [10],
        [1, 1],
    ] and gradient_buckets([]) == [[]]


@pytest.mark.parametrize(
    "kw,says",
    [
        ({"accumulate": 0}, "accumulate=0: must be a whole number of at least 1"),
        ({"shuffle": "shard"}, "must be 'all' or 'shards'"),
        ({"augment": "zoom"}, "'crop', 'flip' or 'crop,flip'"),
        ({"acumulate": 2}, "did you mean 'accumulate'"),
    ],
)
def test_wrong_options_are_one_sentence(kw, says):
    from mla_nb.runs.run import Run

    with pytest.raises(InputError, match=says):
        Run(**kw)


def test_shuffle_by_shards_needs_shards():
    with pytest.raises(InputError, match="has no shards"):
        loaders(
            Splits("t", ["a"], {}, *[Samples({"audio": [torch.zeros(1)]}, [0])] * 3),
            None,
            shuffle="shards",
        )


if __name__ == "__main__":
    child(sys.argv[1])
