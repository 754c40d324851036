"""Two processes are one with the doubled batch; a turn in micro-batches is the turn.

The two processes are started once, and train everything.

torchrun --nproc_per_node 2 tests/test_distributed.py FOLDER        is what they do
"""

import os
import subprocess
import sys
from functools import cache, partial
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
from mla_nb.encoders.base import Encoder, ModuleEncoder, Preprocessor
from mla_nb.heads import make_net
from mla_nb.methods.base import Callback, GradTransform, Method
from mla_nb.methods.ensemble import alternating
from mla_nb.tools import set_seed
from mla_nb.train.learner import Learner, Loaders, Recorder, Shuffle
from mla_nb.train.loaders import ShardShuffle, loaders
from mla_nb.train.runtime import DealtBatches, Runtime, part_of, reduced_gradients
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
    layers = nn.Linear(5, width), *([nn.BatchNorm1d(width)] if norm else []), nn.Tanh()
    return ModuleEncoder(nn.Sequential(*layers), width)


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
VARIANTS = {
    "qmf m3ae": {"branch": "m3ae"},
    "mla rank": {"rank": 40},
    "mla update_first": {"when": "update_first"},
    "agm features": {"form": "features"},
    "amco early": {"start": 0, "sigma": 0.3},
    "arl early": {"start": 0},
    "arl released": {"start": 0, "form": "released"},
    "cggm released": {"form": "released"},
    "cml released": {"form": "released"},
    "gblending often": {"every": 1, "form": "running"},
    "inforeg early": {"window": 1, "least": -9.0},
    "lfm learned": {"alpha": "learned", "lr": 0.1},
    "mbsd released": {"form": "released"},
    "mmpareto released": {"form": "released"},
    "mses early": {"patience": 1},
    "mslr fixed": {"rates": "audio=0.3,visual=2"},
    "mslr often": {"window": 2},
    "opm early": {"start": 0, "chance": 1.0},
    # from all rows: a prototype of one sample has distance 0 to it, and no direction
    "pmr": {"share": 1.0},
    "pmr paper": {"form": "paper", "share": 1.0},
    "relearning early": {"every": 1},
    "valuation early": {"start": 0, "strength": 1.0},
}  # what acts late or rarely acts at once

METHODS = list(
    dict.fromkeys([*sorted(methods), *VARIANTS])
)  # every registered method, and some variants
CORE = "concat", "ogm", "qmf", "ensemble", "mla"
SOME = ("one_sided", "ragged")
CASES = [(m, d) for m in sorted(methods) for d in (DATA if m in CORE else SOME)]
CASES += [(m, "one_sided") for m in VARIANTS if m not in methods]
# weights that are divided by a small squared difference of losses
SENSITIVE = {"gblending often": 1e-4}
MICRO = [
    (m, "missing") for m in (*sorted(methods), "gblending often", "pmr paper")
]  # the same in micro-batches of three rows


WEIGHTS = torch.tensor([0.2, 0.6, 1.2, 2.0])  # of the classes, in all losses


class EachGradient(GradTransform):
    "Takes half of the gradient of the first named loss"

    per_loss = True

    def after_backward(self, learn, turn):
        for p, g in next(iter(turn.gradients.values())).items():
            p.grad -= g / 2


def named(turn):
    "Two losses, both of them means over the rows of a turn"
    z, y = turn.features, turn.batch.y
    spread = sum(v.square().mean(1) for v in z.values()).mean()
    logits = turn.net.combine(z, turn.batch)
    return {"fit": nn.functional.cross_entropy(logits, y), "size": spread}


def per_loss():
    "A method whose transform asks for the gradient of each named loss"
    head = methods["ensemble"]().head
    return Method(head, alternating(), named, [EachGradient()])


class Dropping(GradTransform):
    "Takes modalities away after they were encoded, some by number and some by chance"

    def after_features(self, learn, turn):
        idx, chance = turn.rows.idx.cpu(), torch.rand(turn.count)
        gone = dict.fromkeys(turn.modalities, idx % 5 == 0)
        if "audio" in gone:
            gone["audio"] = gone["audio"] | (idx % 3 == 0)
        if "visual" in gone:
            gone["visual"] = gone["visual"] | (chance < 0.5)
        turn.drop(gone)


def dropping():
    "Joint training in which features are dropped between encoders and head"
    return Method(methods["concat"]().head, grad_transforms=[Dropping()])


class Unused(Encoder):
    "An encoder with a part that its output does not depend on, as hub encoders have"

    def __init__(self):
        super().__init__(6)
        self.used, self.pooler = nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.used(x).tanh()


class SameNoise(Callback):
    "What several processes draw in common, one process draws here as well"

    order = -1

    def before_fit(self, learn):
        turns = learn.method.turns

        def seeded(b):
            self.after_backward(learn)
            yield from list(turns(b))

        learn.method.turns = seeded

    def after_backward(self, learn, turn=None):
        n = learn.seed * 1_000_003 + learn.epoch * 7919 + learn.step
        torch.manual_seed(n * 1024)

    after_features = after_backward


def make(name, options=None):
    if name in ("per_loss", "dropping"):
        return {"per_loss": per_loss, "dropping": dropping}[name]()
    options = VARIANTS.get(name, {}) if options is None else options
    return methods[name.split()[0]](**options)


def trained(
    name,
    data,
    runtime=None,
    callbacks=(),
    options=None,
    epochs=2,
    dls=None,
    lr=0.05,
    norm=False,
    unused=False,
    weights=None,
):
    method = make(name, options)
    set_seed(0)
    mods = method.modalities or MODS
    encs = {m: encoder(6 + 2 * k, norm) for k, m in enumerate(MODS) if m in mods}
    if unused:
        encs = {m: Unused() for m in encs}
    net = make_net(method.head, encs, CLASSES)
    learn = Learner(
        net,
        dls or Loaders(data, data[:3], data[:1], Shuffle(60)),
        method,
        lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-3),
        [*callbacks, StopOnNaN(), Recorder(1)],
        runtime=runtime,
        class_weights=weights,
    )
    return learn.fit(epochs)


@cache
def alone(name, data, **options):
    "One process, with the noise that several would draw; trained once for all tests"
    return found(trained(name, DATA[data](), callbacks=[SameNoise()], **options))


def found(learn):
    "Everything that must be the same"
    out = {f"net.{k}": v.clone() for k, v in learn.net.state_dict().items()}
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
    plain = {m: Preprocessor() for m in MODS}
    return loaders(split(), plain, batch_size, seed=3, shuffle=shuffle, ready=ready)


class Wishes(Callback):
    "The second process wants to stop in the third batch; when does each hear of it?"

    order = 60

    def __init__(self):
        self.heard = []

    def after_batch(self, learn):
        wish = learn.runtime.rank == 1 and (learn.epoch, learn.step) == (0, 2)
        self.heard.append(float(learn.runtime.agree("stop", wish)))

    def after_epoch(self, learn):
        wish = learn.runtime.rank == 0 and learn.epoch == 1
        self.heard.append(float(learn.runtime.agree("stop", wish, now=True)))


def encoded(data, runtime=None):
    "Features of training samples 3 to 40 after an epoch"
    batches, dls = DATA["missing"](), None
    if data != "lists":
        dls = loaded(8 if runtime else 16, ready=0 if data == "workers" else 2**30)
    learn = trained("mla", batches, runtime, epochs=1, dls=dls)
    b = learn.encode_split(learn.training_rows(torch.arange(3, 41)))
    x = {m: v * b.present[m][:, None] for m, v in b.x.items()}
    return {"idx": b.idx, "y": b.y, **x}


def child(folder):
    "What each of the two processes does"
    import torch.distributed as dist
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    out, cpu = {}, partial(Runtime, "cpu")
    for name, data in CASES:
        out[f"{name}|{data}"] = found(trained(name, DATA[data](), cpu()))
    for name in sorted(methods):
        kept = trained(name, DATA["one_sided"](), cpu(), weights=WEIGHTS)
        out[f"{name}|weighted"] = found(kept)
    for name, data in MICRO:
        runtime = cpu(micro_batch_size=3)
        out[f"{name}|{data} micro"] = found(trained(name, DATA[data](), runtime))
    for data in DATA:
        out[f"per_loss|{data}"] = found(trained("per_loss", DATA[data](), cpu()))
        out[f"dropping|{data}"] = found(trained("dropping", DATA[data](), cpu()))
        runtime = cpu(micro_batch_size=3)
        out[f"dropping|{data} micro"] = found(
            trained("dropping", DATA[data](), runtime)
        )
        out[f"concat|{data} unused"] = found(
            trained("concat", DATA[data](), cpu(), unused=True)
        )
    out["ensemble|random"] = found(
        trained("ensemble", DATA["missing"](), cpu(), options={"order": "random"})
    )
    for shuffle in ("all", "shards"):
        for ready in (2**30, 0):
            dls = loaded(8, shuffle, ready)
            out[f"mla|{shuffle} {ready}"] = found(trained("mla", None, cpu(), dls=dls))
    later = trained("reconboost", DATA["one_sided"](), cpu(), epochs=5)
    out["reconboost|later"] = found(later)  # the third modality, which agrees
    twice = trained("mla", DATA["missing"](), cpu(), epochs=1).fit(2)
    out["mla|twice"] = found(twice)
    normed = trained("mla", DATA["missing"](), cpu(), norm=True)
    out["mla|normed"] = found(normed)
    for data in ("lists", "loaders", "workers"):
        out[f"encoded|{data}"] = encoded(data, cpu())
    wishes = Wishes()
    trained("mla", DATA["all"](), cpu(), [wishes])
    out["mla|wishes"] = {"heard": torch.tensor(wishes.heard)}
    try:
        trained("mla", DATA["all"](), cpu(), lr=1e30)
        said = "nothing"
    except InputError as e:
        said = str(e)
    Path(folder, f"said{dist.get_rank()}").write_text(said)
    flat = {f"{k}|{n}": v.contiguous() for k, f in out.items() for n, v in f.items()}
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
        timeout=480,
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
    one = alone(name, data)
    assert one and all(v.isfinite().all() for v in one.values())
    for rank in (0, 1):
        equal(two(rank, f"{name}|{data}"), one)


@pytest.mark.parametrize("name", sorted(methods))
def test_class_weights_are_the_same_on_two_processes(two, name):
    one = found(
        trained(name, DATA["one_sided"](), callbacks=[SameNoise()], weights=WEIGHTS)
    )
    assert all(v.isfinite().all() for v in one.values())
    plain = alone(name, "one_sided")
    assert any(not v.equal(one[k]) for k, v in plain.items() if k.startswith("net."))
    for rank in (0, 1):
        eps = SENSITIVE.get(name, SENSITIVE.get(f"{name} often", 1e-6))
        equal(two(rank, f"{name}|weighted"), one, eps)


def test_every_registered_method_is_tried_with_gaps_on_one_side():
    for data in ("one_sided", "ragged"):
        assert set(methods) <= {m for m, d in CASES if d == data}


@pytest.mark.parametrize("data", DATA)
def test_the_gradient_of_each_named_loss_is_that_of_all_rows(two, data):
    for rank in (0, 1):
        equal(two(rank, f"per_loss|{data}"), alone("per_loss", data))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("micro", ["", " micro"])
def test_what_is_dropped_after_the_encoders(two, data, micro):
    "Rows may leave a turn; the loss is the mean over those that stay, on all processes"
    one = alone("dropping", data)
    for rank in (0, 1):
        equal(two(rank, f"dropping|{data}{micro}"), one, 2e-6)


@pytest.mark.parametrize("data", ["lists", "loaders", "workers"])
def test_features_of_training_samples(two, data):
    "All of them once, in evaluation mode, in any order, on every process"
    one = encoded(data)
    assert sorted(one["idx"].tolist()) == sorted(set(one["idx"].tolist()))
    for rank in (0, 1):
        both = two(rank, f"encoded|{data}")
        order = both["idx"].argsort()
        assert both["idx"][order].equal(one["idx"].sort().values)
        for k, v in one.items():
            assert both[k][order].allclose(v[one["idx"].argsort()], atol=1e-6)


@pytest.mark.parametrize("data", DATA)
def test_what_no_process_uses_stays_put(two, data):
    "Without a gradient, neither momentum nor weight decay moves a parameter"
    one = alone("concat", data, unused=True)
    for rank in (0, 1):
        equal(two(rank, f"concat|{data} unused"), one)
    start = trained("concat", DATA[data](), unused=True, epochs=0).net.state_dict()
    for k, v in start.items():
        if "pooler" in k:
            assert v.equal(two(0, f"concat|{data} unused")[f"net.{k}"])


def test_batch_norm_is_local_on_a_cpu_and_both_end_with_one_net(two):
    "The statistics are those of a process's own rows; the running ones are averaged"
    a, b = (two(r, "mla|normed") for r in (0, 1))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a if "num_b" not in k)
    one = alone("mla", "missing", norm=True)
    weights = [k for k in one if k.startswith("net.") and "weight" in k]
    assert not all(torch.allclose(a[k], one[k], atol=1e-5) for k in weights)


def test_a_wish_of_one_process_is_granted_to_all_at_once(two):
    "With the next batch; at the end of an epoch at once"
    a, b = (two(r, "mla|wishes")["heard"].tolist() for r in (0, 1))
    assert a == b == [0, 0, 0, 1, 0, 0, 0, 0, 0, 1]


def test_what_is_drawn_is_the_same_for_all(two):
    a, b = (two(r, "ensemble|random") for r in (0, 1))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("ready", [2**30, 0])
def test_data_loaders_deal_out_the_doubled_batch(two, ready):
    "61 samples: the last row of the doubled batch would be alone; both leave it out"
    one = found(trained("mla", None, dls=loaded(16, ready=ready)))
    for rank in (0, 1):
        equal(two(rank, f"mla|all {ready}"), one)


def test_shards_train_and_agree(two):
    a, b = (two(r, "mla|shards 0") for r in (0, 1))
    assert all(a[k].equal(b[k]) for k in a) and not all(
        torch.allclose(a[k], two(0, "mla|all 0")[k]) for k in a if k.startswith("net")
    )
    equal(a, two(0, f"mla|shards {2**30}"))


@pytest.mark.parametrize("name,data", MICRO)
def test_micro_batches_on_two_processes(two, name, data):
    equal(two(0, f"{name}|{data} micro"), alone(name, data), 2e-6)


def test_training_that_goes_on(two):
    equal(two(1, "mla|twice"), found(trained("mla", DATA["missing"]())))


def test_a_modality_that_learns_alone_and_agrees_with_another(two):
    one = alone("reconboost", "one_sided", epochs=5)
    for rank in (0, 1):
        equal(two(rank, "reconboost|later"), one)


def test_a_loss_that_breaks_down_stops_all_processes(two):
    a, b = (
        said.split("samples")[0] for said in two.said
    )  # each names samples of its own
    assert a == b and all("learning rate below 1e+30" in said for said in two.said)


def test_the_command_itself(tmp_path):
    "Weights and result are the same for any process; the test split is predicted once"
    import json

    from safetensors.torch import load_file

    from mla_nb.compare import results
    from mla_nb.runs.run import Run, load_run, make_dataset
    from mla_nb.train.checkpoints import load_pred
    from mla_nb.train.learner import predictions

    size, common = (
        "n_train=65,n_valid=45,n_test=50",
        ["--epochs", "2", "--progress", "false", "--lr", "0.01"],
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
    [r] = results(tmp_path / "runs")  # one run, told once
    assert said.count("best epoch") == 1 and r["best_epoch"] in (1, 2)
    folder = tmp_path / "runs/two"
    (net, method, _), p = load_run(folder), load_pred(folder)
    s = make_dataset(Run(dataset_args=size))
    dls = loaders(s, {m: e.preprocessor for m, e in net.encoders.items()})
    q = predictions(net, method, dls.test)
    assert torch.allclose(p.fused, q.fused, atol=1e-5) and p.idx.equal(q.idx)
    assert json.loads((folder / "result.json").read_text())["n_test"] == 50
    assert all(
        v.isfinite().all() for v in load_file(folder / "model.safetensors").values()
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
        trained("mla", DATA["all"](), Runtime())


def test_the_command_with_gaps_and_shares_of_everything(tmp_path):
    "Missing modalities, pieces, batch norm and a weighted rule: it trains, and resumes"
    flags = [
        "--dataset_args",
        "n_train=97,n_valid=40,n_test=40",
        "--method",
        "mla_fixed",
        "--missing",
        ".5",
        "--accumulation_steps",
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


# micro-batches ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    "name,data",
    [(m, "missing") for m in METHODS] + [(m, "ragged") for m in sorted(methods)],
)
def test_a_turn_in_micro_batches_is_the_turn(name, data, rows):
    runtime = Runtime("cpu", micro_batch_size=rows)
    cut = found(trained(name, DATA[data](), runtime, [SameNoise()]))
    equal(cut, alone(name, data), SENSITIVE.get(name, 2e-6))


def test_micro_batches_step_once_per_turn_and_bound_what_is_encoded_at_once():
    seen, steps = [], []

    class Spy(Callback):
        def after_step(self, learn, turn):
            steps.append(turn.modalities)

    runtime = Runtime("cpu", micro_batch_size=5)
    learn = trained("mla", DATA["all"](), runtime, [Spy()], epochs=0)

    def look(m, out):
        if learn.net.training:
            seen.append((m, len(out)))

    for m, e in learn.net.encoders.items():
        e.register_forward_hook(lambda mod, i, out, m=m: look(m, out))
    learn.fit(1)
    assert steps == [[m] for _ in range(4) for m in MODS]
    assert seen == [(m, n) for _ in range(4) for m in MODS for n in (5, 5, 5, 1)]


def test_a_loss_that_compares_rows_has_no_gradient_per_loss_in_parts():
    method = methods["qmf"]()
    method.grad_transforms = [*method.grad_transforms, EachGradient()]
    net = make_net(method.head, {m: encoder() for m in MODS}, CLASSES)
    data = DATA["all"]()
    runtime = Runtime("cpu", micro_batch_size=5)
    dls = Loaders(data, data, data, Shuffle(60))
    with pytest.raises(InputError, match="leave out micro_batch_size"):
        Learner(net, dls, method, runtime=runtime).fit(1)


def test_accumulate_through_run(tmp_path):
    "The order of samples is that of the larger batch, and so is the number of steps"
    from mla_nb.runs.run import Run, build, make_dataset

    cfg = Run(
        dataset_args="n_train=96,n_valid=32,n_test=32",
        batch_size=16,
        accumulation_steps=3,
        root=str(tmp_path),
    )
    s = make_dataset(cfg)
    learn = build(cfg, s)
    assert learn.runtime.micro_batch_size == 16
    assert [len(b) for b in learn.dls.train] == [48, 48]
    assert (
        cfg.replace(accumulation_steps=1).id != cfg.id
        and Run().id == Run(accumulation_steps=1, shuffle="all", augment="").id
    )


# parts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n_rows,n,size", [(61, 2, 8), (64, 3, 8), (7, 4, 1), (33, 2, 16), (5, 5, 2)]
)
def test_every_row_once(n_rows, n, size):
    sampler = Shuffle(n_rows, 3)
    shares = [DealtBatches(sampler, size, n, r) for r in range(n)]
    dealt = sorted(i for s in shares for b in s for i in b)
    assert len(set(dealt)) == len(dealt) >= n_rows - 1
    assert len({len(s) for s in shares}) == 1
    whole = torch.tensor(list(sampler)).split(size * n)
    for k, chunk in enumerate(whole[:-1]):  # in the order of the larger batch
        assert [i for s in shares for i in list(s)[k]] == chunk.tolist()
        assert torch.cat(shares[0].rows()[k]).equal(chunk)


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
    parts = [b for r in range(n) for b in part_of(dl, n, r)]
    assert [int(i) for b in parts for i in b.idx] == list(range(n_rows))


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


class Twin:
    "An accelerator whose second process has sent the same"

    def reduce(self, x, how):
        return x + x


def test_one_sum_of_gradients_losses_and_what_was_used():
    params = [torch.zeros(2, 3), torch.zeros(4)]
    grads, sums = reduced_gradients(
        Twin(), params, [torch.ones(2, 3), None], torch.tensor([0.5, 1.0])
    )
    assert grads[0].equal(torch.full((2, 3), 2.0)) and grads[1] is None
    assert sums.equal(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "kw,says",
    [
        (
            {"accumulation_steps": 0},
            "accumulation_steps=0: must be a whole number of at least 1",
        ),
        ({"shuffle": "shard"}, "must be 'all' or 'shards'"),
        ({"augment": "zoom"}, "words of resized"),
        ({"acumulation_steps": 2}, "did you mean 'accumulation_steps'"),
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
