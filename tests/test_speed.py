"""What is done for speed keeps its promises. No timings here.

No waiting inside a step, nothing allocated twice, the same results.
"""

import subprocess
import sys
from functools import partial
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mla_nb.core import Batch, InputError, discover, methods
from mla_nb.encoders.base import ModuleEncoder
from mla_nb.encoders.image import Pixels
from mla_nb.heads import make_net
from mla_nb.methods.base import predictions
from mla_nb.methods.mla import mla
from mla_nb.methods.projection import (
    GradProjection,
    check_projection,
    project,
    project_factor,
    update_factor,
    update_projection,
)
from mla_nb.runs.run import Run, build, fused_sgd, make_dataset, make_opt, run
from mla_nb.tools import set_seed
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import Loaders, Shuffle
from mla_nb.train.runtime import compile_encoders, tensors

MODS, TINY = (
    ("audio", "visual"),
    {
        "dataset_args": "n_train=64,n_valid=24,n_test=24",
        "epochs": 1,
        "batch_size": 16,
        "progress": False,
    },
)
discover()


def batch(n=12, missing=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    present = {m: torch.rand(n, generator=g) >= missing for m in MODS}
    return Batch(
        {m: torch.randn(n, 5, generator=g) for m in MODS},
        torch.randint(3, (n,), generator=g),
        present,
        torch.arange(n),
    )


def learner(method, batches, **kw):
    set_seed(0)
    encs = {
        m: ModuleEncoder(nn.Sequential(nn.Linear(5, 8), nn.Tanh()), 8) for m in MODS
    }
    return Learner(
        make_net(method.head, encs, 3),
        Loaders(batches, batches, batches, Shuffle(40)),
        method,
        **kw,
    )


# no waiting ---------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Fails where the CPU would have to wait for a GPU.

    That is: numbers read from floats, rows chosen by flags on its side.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "_local_scalar_dense" in name:
            assert not args[0].is_floating_point(), f"a number is read: {name}"
        if (
            name.startswith(("aten.index.Tensor", "aten.index_put"))
            and args[0].is_floating_point()
        ):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), (
                f"rows are chosen by flags: {name}"
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("missing", [0.0, 0.5])
@pytest.mark.parametrize("name", sorted(set(methods) - {"unimodal"}))
def test_a_step_never_waits(name, missing):
    learn = learner(
        methods[name](), [batch(missing=missing)] * 3, callbacks=[Recorder(1)]
    )
    learn.fit(1)  # everything exists
    learn.epochs, learn.step = 2, 1
    with NoWaiting():
        learn.batch = batch(missing=missing, seed=1)
        learn.one_batch()


def test_the_check_can_fail():
    learn = learner(methods["concat"](), [batch()])
    learn.epochs, learn.step, learn.batch = 1, 0, batch()
    learn.callbacks.append(
        type(
            "Reads",
            (Recorder,),
            {
                "after_step": lambda self, learn, turn: turn.loss.item(),
                "after_backward": lambda *_: None,
            },
        )()
    )
    with pytest.raises(AssertionError, match="a number is read"), NoWaiting():
        learn.one_batch()


# the projection -----------------------------------------------------------------------


def test_the_projection_is_updated_in_place():
    learn = learner(mla(), [batch()] * 4)
    learn.fit(1)
    P = learn.method.grad_transforms[0].P
    where, before = P.data_ptr(), P.clone()
    learn.fit(2)
    assert learn.method.grad_transforms[0].P.data_ptr() == where and not P.equal(before)


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"norm": True},
        {"denominator": "elementwise"},
        {"denominator": "elementwise", "norm": True},
    ],
)
def test_in_place_is_the_same(kw):
    P, r = torch.eye(7) + 0.1 * torch.randn(7, 7), torch.randn(7)
    new, old = update_projection(P, r, 0.3, **kw), P.clone()
    assert P.equal(old)  # without `out` nothing is touched
    assert update_projection(P, r, 0.3, out=P, **kw) is P and torch.allclose(
        P, new, atol=1e-6
    )


@pytest.mark.parametrize(
    "D,n,rank", [(6, 20, 10), (32, 12, 12), (64, 30, 16), (8, 1, 1)]
)
def test_the_factor_is_the_matrix_while_it_grows(D, n, rank):
    P, U, g = (
        torch.eye(D, dtype=torch.double),
        torch.zeros(D, 0, dtype=torch.double),
        torch.randn(3, D, dtype=torch.double),
    )
    for k in range(n):
        r, lam = torch.randn(D, dtype=torch.double), 0.01 + 0.1 * k
        P, U = update_projection(P, r, lam), update_factor(U, r, lam, rank)
    assert torch.allclose(
        torch.eye(D, dtype=torch.double) - U @ U.T, P, atol=1e-9
    ) and torch.allclose(project_factor(g, U), project(g, P), atol=1e-9)


def test_truncation_protects_less_and_never_more():
    U = torch.zeros(16, 0, dtype=torch.double)
    for _ in range(100):
        longer = update_factor(U, torch.randn(16, dtype=torch.double), 0.1, 99)
        U = update_factor(U, torch.randn(16, dtype=torch.double), 0.1, 3)
        assert (
            U.shape[1] <= 6 and torch.linalg.eigvalsh(U @ U.T).max() < 1 + 1e-9
        )  # a projection never lengthens
    small = torch.linalg.eigvalsh(
        longer @ longer.T
        - update_factor(longer, torch.zeros(16, dtype=torch.double), 0.1, 2)
        @ update_factor(longer, torch.zeros(16, dtype=torch.double), 0.1, 2).T
    )
    assert small.min() > -1e-9  # what is left out was there: P only grows


def test_a_run_with_a_factor_is_the_run_with_the_matrix():
    a, b = (
        learner(mla(rank=r), [batch(missing=0.3, seed=k) for k in range(4)]).fit(3)
        for r in (0, 24)
    )
    for p, q in zip(a.net.parameters(), b.net.parameters()):
        assert torch.allclose(p, q, atol=1e-5)
    U = b.method.grad_transforms[0].P
    assert U.shape == (8, 24) and torch.allclose(
        torch.eye(8) - U @ U.T, a.method.grad_transforms[0].P, atol=1e-4
    )


@pytest.mark.parametrize(
    "kw,says",
    [
        ({"rank": 4, "norm": True}, "leave out rank"),
        ({"rank": 4, "denominator": "elementwise"}, "leave out rank"),
        ({"rank": -1}, "at least 0"),
        ({"rank": 2.5}, "a whole number"),
    ],
)
def test_wrong_ranks(kw, says):
    with pytest.raises(InputError, match=says):
        GradProjection(**kw)


def test_the_contract_holds_for_a_factor():
    [check_projection(rank=r) for r in (4, 8, 64)]


# optimizer, layout, precision ---------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_is_the_same_although_turns_begin_one_after_the_other(optimizer):
    "Plain fused SGD fails: the shared head has momentum, the second encoder has none"
    a, b = (
        learner(
            mla(),
            [batch(missing=0.3, seed=k) for k in range(3)],
            opt_func=make_opt(Run(optimizer=optimizer, lr=0.01, fused=f)),
        ).fit(2)
        for f in (False, True)
    )
    for p, q in zip(a.net.parameters(), b.net.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_plain_fused_sgd_still_fails_and_ours_leaves_idle_parameters_alone():
    with pytest.raises((TypeError, RuntimeError)):
        learner(
            mla(),
            [batch()],
            opt_func=partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
        ).fit(1)
    idle, busy = (nn.Parameter(torch.ones(3)) for _ in "ab")
    opt = fused_sgd([idle, busy], lr=0.1, momentum=0.9, weight_decay=0.1)
    busy.grad = torch.ones(3)
    opt.step()
    assert idle.equal(torch.ones(3)) and not busy.equal(torch.ones(3))


def test_channels_last_changes_the_layout_and_nothing_else():
    cfg = Run(**TINY, method="concat")
    s = make_dataset(cfg)
    a, b = (build(cfg.replace(channels_last=c), s) for c in (False, True))
    for learn in (a, b):
        learn.callbacks = [c for c in learn.callbacks if isinstance(c, Recorder)]
        learn.fit(1)
    assert all(
        p.is_contiguous(memory_format=torch.channels_last)
        for p in b.net.parameters()
        if p.dim() == 4
    )
    assert (
        abs(
            list(a.history[0]["train"]["loss"].values())[0]
            - list(b.history[0]["train"]["loss"].values())[0]
        )
        < 1e-2
    )


def test_compiled_falls_back_with_one_sentence(capsys):
    net = learner(mla(), [batch()]).net
    with patch("torch.compile", side_effect=RuntimeError("no compiler")):
        assert compile_encoders(net, torch.device("cpu")) is False
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "goes on without" in said
    assert predictions(net, mla(), [batch()]).fused.isfinite().all()


def test_options_that_came_later_leave_the_names_of_runs_alone():
    plain = Run()
    for k, v in {
        "accumulation_steps": 1,
        "shuffle": "all",
        "augment": "",
        "channels_last": False,
        "compiled": False,
        "tf32": False,
        "deterministic": False,
        "fused": False,
    }.items():
        assert plain.replace(**{k: v}).id == plain.id
    for k, v in {
        "accumulation_steps": 2,
        "shuffle": "shards",
        "augment": "flip",
        "channels_last": True,
        "compiled": True,
        "tf32": True,
        "deterministic": True,
        "fused": True,
    }.items():
        assert plain.replace(**{k: v}).id != plain.id


# prediction ---------------------------------------------------------------------------


def test_predictions_can_be_learned_from():
    "They are made in inference mode, which autograd refuses; plain ones come out"
    p = predictions(learner(mla(), [batch()]).net, mla(), [batch(), batch(seed=1)])
    for v in (p.logits, p.fused, p.weights):
        assert not v.is_inference()
    w = torch.ones(3, requires_grad=True)
    (p.logits * w).sum().backward()
    assert w.grad is not None


# variation of pictures ----------------------------------------------------------------


def pictures(**kw):
    cfg = Run(**{**TINY, **kw})
    s = make_dataset(cfg)
    learn = build(cfg, s)
    learn.epochs, learn.epoch = 1, 0
    learn.runtime.prepare(learn)
    return learn


def test_pictures_vary_by_seed_epoch_and_sample_only():
    def of(learn):
        return {
            int(i): v for b in learn.dls.train for i, v in zip(b.idx, b.x["visual"])
        }

    plain, one, again, small, seeded = (
        of(pictures(**kw))
        for kw in (
            {},
            {"augment": "crop,flip"},
            {"augment": "crop,flip"},
            {"augment": "crop,flip", "batch_size": 7},
            {"augment": "crop,flip", "seed": 1},
        )
    )
    assert sum(not plain[i].equal(one[i]) for i in one) > 50
    for i in small:
        assert one[i].equal(again[i]) and one[i].equal(small[i])
    learn = pictures(augment="crop,flip")
    learn.dls.sampler.epoch = 1
    assert sum(not one[i].equal(v) for i, v in of(learn).items()) > 50
    assert sum(not one[i].equal(seeded[i]) for i in one if i in seeded) > 50


def test_only_training_pictures_vary():
    a, b = pictures(), pictures(augment="flip")
    for part in ("valid", "test"):
        for p, q in zip(getattr(a.dls, part), getattr(b.dls, part)):
            assert all(v.equal(w) for v, w in zip(tensors(p.x), tensors(q.x)))
    x, y = next(iter(a.dls.train)).x, next(iter(b.dls.train)).x
    assert x["audio"].equal(y["audio"]) and not x["visual"].equal(y["visual"])


def test_all_frames_of_a_clip_alike():
    frame = torch.randint(0, 255, (3, 24, 24), dtype=torch.uint8)
    for seed in range(20):
        clip = Pixels(24).augment(torch.stack([frame] * 3), seed)
        assert (
            clip.dtype == torch.uint8
            and clip[0].equal(clip[1])
            and clip[0].equal(clip[2])
            and clip[0].equal(Pixels(24).augment(frame, seed))
        )


def test_the_callers_chance_is_left_alone():
    torch.manual_seed(3)
    a = torch.rand(1)
    torch.manual_seed(3)
    Pixels(8).augment(torch.zeros(3, 8, 8), 1)
    assert torch.rand(1).equal(a)


def test_what_cannot_be_varied():
    with pytest.raises(InputError, match="words of resized, crop, flip, color, each"):
        Run(augment="flop")
    with pytest.raises(InputError, match="words of resized"):
        Run(augment="each")  # alone it would do nothing
    assert Run(augment="flip, crop").augment == "crop,flip"
    with pytest.raises(InputError, match="only pictures can be varied"):
        pictures(method="unimodal", method_args="modality=audio", augment="flip")


def test_a_run_with_everything_on(tmp_path):
    r = run(
        Run(
            **TINY,
            augment="crop,flip",
            accumulation_steps=2,
            channels_last=True,
            fused=True,
            precision="bf16",
            root=str(tmp_path),
        )
    )
    assert (
        0 <= r["test"]["accuracy"]["fused"] <= 1
        and run(
            Run(
                **TINY,
                augment="crop,flip",
                accumulation_steps=2,
                channels_last=True,
                fused=True,
                precision="bf16",
                root=str(tmp_path),
            )
        )
        == r
    )


def test_shards_want_a_prepared_dataset(tmp_path):
    with pytest.raises(InputError, match="has no shards"):
        run(Run(**TINY, shuffle="shards", root=str(tmp_path)))
    assert not list(tmp_path.rglob("last.pt"))


# benchmarks, at shapes that take no time ----------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import parts

    monkeypatch.setattr(parts, "AUDIO", (33, 40))
    return parts


def test_profile_has_every_part(bench):
    took = bench.measure(2, 1, 32)
    text, encoders, rest = bench.table(took, 2)
    for part in (
        "data: read and decode",
        "audio: encoder forward",
        "video: encoder backward",
        "head",
        "projection",
        "optimizer",
        "recorder",
    ):
        assert part in text
    assert encoders > 0 and rest > 0 and all(v >= 0 for v in took.values())


def test_gpu_steps_work_on_a_cpu(bench):
    import gpu_speed

    found = {
        "transformer": gpu_speed.measure(
            "transformer", torch.device("cpu"), 1, tiny=True
        )
    }
    ways = found["transformer"]["ways"]
    assert (
        set(ways) == {"released", "fp32", "bf16", "bf16+channels_last"}
        and ways["released"]["over_released"] == 1.0
        and ways["fp32"]["encoder_share"] > 0
    )
    assert gpu_speed.table(found).count("\n") == 5


def test_the_released_step_trains(bench):
    import gpu_speed

    make, shapes, B = gpu_speed.setting("transformer", True)
    step, net = gpu_speed.released(make, gpu_speed.data(shapes, B), torch.device("cpu"))
    first = step()
    assert [step() for _ in range(5)][-1] < first + 0.1 and first > 0


def test_a_benchmark_called_profile_does_not_hide_the_standard_one():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import cProfile, profile; "
        "print(profile.Profile.__name__, profile.run.__doc__ is not None)"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    ).stdout.split() == ["Profile", "True"]


# evaluation batches that do not fit ---------------------------------------------------


@pytest.mark.parametrize("missing", ["", "0.6"])
def test_an_evaluation_batch_that_does_not_fit_is_halved(missing, capsys):
    learn = pictures(missing=missing, missing_test=missing, encoder="small")
    whole = learn.predictions(learn.dls.test)
    encoder, seen = learn.net.encoders["visual"], []
    forward = encoder.forward

    def small_memory(x):
        if len(x) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(x))
        return forward(x)

    encoder.forward = small_memory
    halved = learn.predictions(learn.dls.test)
    assert torch.allclose(halved.fused, whole.fused, atol=1e-5) and max(seen) <= 7
    assert halved.present.equal(whole.present) and halved.idx.equal(whole.idx)
    said = capsys.readouterr().out.count("too many to evaluate at once")
    learn.predictions(learn.dls.test)  # what fits is known by now
    assert said and "too many" not in capsys.readouterr().out
    encoder.forward = lambda x: small_memory(x.repeat(8, *[1] * (x.dim() - 1)))
    with pytest.raises(torch.OutOfMemoryError):  # a single row does not fit
        learn.predictions(learn.dls.test)


def test_a_training_batch_that_does_not_fit_is_an_error():
    "Halving it would change what is learned"
    learn = pictures(encoder="small")
    learn.net.encoders["visual"].forward = Mock(side_effect=torch.OutOfMemoryError("x"))
    with pytest.raises(torch.OutOfMemoryError):
        learn.fit(1)
