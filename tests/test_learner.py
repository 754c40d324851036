"""What training promises.

Idle encoders, missing modalities, order, budgets, shapes of what comes out.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mla_nb.core import Batch, Samples, collate, discover, methods
from mla_nb.encoders.base import ModuleEncoder, Preprocessor
from mla_nb.heads import ConcatHead, SeparateHead, SharedHead, make_net
from mla_nb.methods.base import (
    Callback,
    GradTransform,
    Method,
    UpdateTransform,
    concat,
    predict,
    predictions,
    scores,
)
from mla_nb.methods.ensemble import alternating, ensemble
from mla_nb.methods.mla import mla
from mla_nb.tools import set_seed
from mla_nb.train.learner import Learner, Loaders, Recorder, Schedule, Shuffle
from mla_nb.train.loaders import loaders
from mla_nb.train.runtime import Runtime
from mla_nb.train.watching import Progress

discover()
MODS = ("audio", "video", "text")


def encs(mods=MODS, width=8, widths=None, norm=True):
    torch.manual_seed(0)

    def encoder(n):
        norm_layer = [nn.BatchNorm1d(n)] if norm else []
        return ModuleEncoder(nn.Sequential(nn.Linear(5, n), *norm_layer, nn.ReLU()), n)

    return {m: encoder((widths or {}).get(m, width)) for m in mods}


def batch(n=12, missing=0.0, seed=0, mods=MODS):
    g = torch.Generator().manual_seed(seed)
    present = {m: torch.rand(n, generator=g) >= missing for m in mods}
    present[mods[0]] |= ~torch.stack(list(present.values())).any(0)
    return Batch(
        {m: torch.randn(n, 5, generator=g) for m in mods},
        torch.randint(3, (n,), generator=g),
        present,
        torch.arange(n),
    )


def learner(method, batches, net=None, **kw):
    return Learner(
        net or make_net(method.head, encs(), 3),
        Loaders(batches, batches[:1], batches[:1], Shuffle(1)),
        method,
        **kw,
    )


def snapshot(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("make", [ensemble, mla])
def test_idle_encoders_are_bit_identical_even_with_momentum_and_weight_decay(make):
    class Check(Callback):
        def __init__(self):
            self.n = 0

        def after_backward(self, learn, turn):
            self.idle = {
                m: snapshot(e)
                for m, e in learn.net.encoders.items()
                if m not in turn.modalities
            }

        def after_step(self, learn, turn):
            for m, was in self.idle.items():
                for k, v in learn.net.encoders[m].state_dict().items():
                    assert v.equal(was[k]), f"{m}.{k} moved in {turn.modalities}"
            self.n += len(self.idle)

    check = Check()
    learner(
        make(),
        [batch(seed=k) for k in range(4)],
        opt_func=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        callbacks=[check],
    ).fit(3)
    assert check.n == 3 * 4 * 3 * 2


def test_training_with_missing_modalities_never_reads_what_is_absent():
    "NaN in absent rows changes nothing in training or prediction, not even statistics"
    for make in (concat, ensemble, mla):
        nets = []
        for fill in (0.0, float("nan")):
            bs = [batch(missing=0.5, seed=k) for k in range(5)]
            for b in bs:
                for m in b.x:
                    b.x[m][~b.present[m]] = fill
            learn = learner(make(), bs).fit(2)
            nets.append(learn)
            assert all(v.isfinite().all() for v in learn.net.state_dict().values())
        for (k, a), b in zip(
            nets[0].net.state_dict().items(), nets[1].net.state_dict().values()
        ):
            assert a.equal(b), (make.__name__, k)
        assert scores(predictions(nets[0].net, nets[0].method, bs))[
            "accuracy"
        ].keys() >= {"fused", "audio"}


def test_a_modality_that_a_whole_batch_lacks_takes_no_turn():
    b = batch()
    b.present["video"] = torch.zeros(12, dtype=torch.bool)
    assert [list(t.x) for t in alternating()(b)] == [["audio"], ["text"]]
    learn = learner(mla(), [b])
    before = snapshot(learn.net.encoders["video"])
    learn.fit(2)
    assert all(
        v.equal(before[k]) for k, v in learn.net.encoders["video"].state_dict().items()
    )


def test_collate_to_prediction_without_one_modality_in_the_whole_batch():
    s = Samples({"audio": [torch.randn(5)] * 4, "text": [None] * 4}, [0, 1, 2, 0])
    net = make_net(SharedHead, encs(("audio", "text")), 3)
    p = predict(net, mla(), collate([s[i] for i in range(4)]))
    assert (
        p.weights[1].eq(0).all()
        and p.weights[0].eq(1).all()
        and p.fused.isfinite().all()
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_any_number_of_modalities(n):
    mods = [f"m{k}" for k in range(n)]
    learn = Learner(
        make_net(SharedHead, encs(mods), 3),
        Loaders([batch(mods=mods)], [batch(mods=mods)], [], Shuffle(1)),
        mla(),
        callbacks=[Recorder()],
    ).fit(2)
    assert set(learn.history[-1]["valid"]["accuracy"]) == {*mods, "fused"} and set(
        learn.history[-1]["train"]["loss"]
    ) == set(mods)


def test_widths_that_differ_meet_the_shared_head_through_adapters():
    net = make_net(SharedHead, encs(widths={"audio": 4, "video": 16}), 3)
    assert set(net.adapters) == {"audio", "text"} and net.head.width == 16
    before = snapshot(net)
    learner(mla(), [batch()], net=net).fit(1)
    assert all(
        not v.equal(before[k]) for k, v in net.state_dict().items() if "weight" in k
    )


def test_order_of_turns_matters_with_a_shared_head_only():
    for head, same in ((SeparateHead, True), (SharedHead, False)):
        a, b = (
            learner(Method(head, alternating(o)), [batch()]).fit(2).net.state_dict()
            for o in ("audio,video,text", "text,video,audio")
        )
        assert all(v.equal(b[k]) for k, v in a.items()) is same


def test_prediction_ignores_batch_size_and_neighbors():
    learn = learner(mla(), [batch(40, 0.3)]).fit(3)
    b = batch(40, 0.3, seed=9)
    whole = predict(learn.net, learn.method, b)
    single = torch.cat(
        [
            predict(learn.net, learn.method, b.select_rows(torch.tensor([i]))).fused
            for i in range(40)
        ]
    )
    assert torch.allclose(whole.fused, single, atol=1e-5)


def test_predict_restores_training_mode():
    net = make_net(SharedHead, encs(), 3).train()
    predict(net, mla(), batch())
    assert net.training and net.encoders["audio"].training
    predict(net.eval(), mla(), batch())
    assert not net.training


def test_hooks_are_called_in_order_and_after_fit_also_after_an_error():
    calls = []

    class Spy(Callback):
        def __init__(self, name, order):
            self.name, self.order = name, order

        def __getattribute__(self, k):
            v = object.__getattribute__(self, k)
            if k in {
                "before_fit",
                "before_epoch",
                "after_backward",
                "after_step",
                "after_batch",
                "after_epoch",
                "after_fit",
            }:
                calls.append((self.name, k))
            return v

    learner(concat(), [batch()], callbacks=[Spy("late", 5), Spy("early", -5)]).fit(1)
    hooks = [k for n, k in calls if n == "early"]
    assert hooks == [
        "before_fit",
        "before_epoch",
        "after_backward",
        "after_step",
        "after_batch",
        "after_epoch",
        "after_fit",
    ]
    assert [n for n, _ in calls[:2]] == ["early", "late"]

    class Boom(Callback):
        def after_step(self, learn, turn):
            raise RuntimeError("boom")

    calls.clear()
    with pytest.raises(RuntimeError, match="boom"):
        learner(concat(), [batch()], callbacks=[Spy("x", 9), Boom()]).fit(1)
    assert calls[-1] == ("x", "after_fit")


def test_progress_bar_counts_every_batch(capsys):
    bs = [batch(seed=k) for k in range(3)]
    learner(concat(), bs, callbacks=[Recorder(), Progress("x")]).fit(2)
    err = capsys.readouterr().err
    assert "6/6" in err and "fused=" in err


def test_schedule_resumes_at_the_right_rate():
    learn = learner(concat(), [batch()], callbacks=[Schedule("cosine"), Recorder()])
    rates = [r["lr"] for r in learn.fit(6).history]
    again = learner(concat(), [batch()], callbacks=[Schedule("cosine"), Recorder()])
    again.epoch = 3
    assert [r["lr"] for r in again.fit(6).history] == rates[3:]


def test_equal_budgets(tmp_path):
    """Every method sees each sample once per epoch.

    A batch of one is dropped, because batch norm cannot train on it.
    """
    s = Samples({"audio": [torch.randn(5) for _ in range(33)]}, [0, 1, 2] * 11)
    from mla_nb.core import Modality, Splits

    sp = Splits("s", list("abc"), {"audio": Modality("audio", "wave")}, s, s, s)
    assert sorted(
        torch.cat(
            [b.idx for b in loaders(sp, {"audio": Preprocessor()}, 8).train]
        ).tolist()
    ) != list(range(33))
    assert sum(len(b) for b in loaders(sp, {"audio": Preprocessor()}, 8).train) == 32
    assert sum(len(b) for b in loaders(sp, {"audio": Preprocessor()}, 10).train) == 33


def test_runtime_on_cpu_changes_nothing_with_grad_transforms():
    plain, acc = (
        learner(mla(), [batch(seed=k) for k in range(4)], runtime=r).fit(1)
        for r in (None, Runtime("cpu"))
    )
    for a, b in zip(plain.net.state_dict().values(), acc.net.state_dict().values()):
        assert a.equal(b)


def each_loss(turn):
    "The loss of every modality by name, and that of the joint answer"
    logits = {m: turn.net.head({m: z}) for m, z in turn.features.items()}
    logits["fused"] = turn.net.combine(turn.features, turn.batch)
    return {m: F.cross_entropy(z, turn.batch.y) for m, z in logits.items()}


class EachGradient(GradTransform):
    "Keeps the gradients of the named losses, and what is in `.grad` then"

    per_loss = True

    def after_backward(self, learn, turn):
        self.each = turn.gradients
        self.total = {p: p.grad.clone() for p in learn.net.parameters()}


@pytest.mark.parametrize("rows", [0, 5])
def test_the_gradient_of_each_named_loss_and_their_sum(rows):
    transform, b = EachGradient(), batch()
    method = Method(SeparateHead, loss=each_loss, grad_transforms=[transform])
    net = make_net(SeparateHead, encs(norm=False), 3)
    learn = learner(method, [b], net, runtime=Runtime("cpu", micro_batch_size=rows))
    weights = list(learn.net.parameters())
    alone = {
        m: F.cross_entropy(net.head({m: net.encoders[m](b.x[m])}), b.y) for m in b.x
    }
    found = {
        m: torch.autograd.grad(loss, weights, allow_unused=True)
        for m, loss in alone.items()
    }
    learn.fit(1)
    assert list(transform.each) == [*MODS, "fused"]
    for m, grads in found.items():
        for p, g in zip(weights, grads):
            kept = transform.each[m].get(p)
            assert (g is None) == (kept is None)
            assert g is None or torch.allclose(g, kept, atol=1e-6)
    for p, total in transform.total.items():
        parts = [g[p] for g in transform.each.values() if p in g]
        assert torch.allclose(total, sum(parts), atol=1e-7)


def test_named_losses_are_trained_on_their_sum():
    def total(turn):
        return sum(each_loss(turn).values())

    a, b = (
        learner(Method(SeparateHead, loss=f), [batch(seed=k) for k in range(3)]).fit(2)
        for f in (each_loss, total)
    )
    for p, q in zip(a.net.parameters(), b.net.parameters()):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_single_row_trains_with_batch_norm():
    "One row has no batch statistics: the encoder uses those it has, and still learns"
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    enc = ModuleEncoder(layers, 8)
    net = make_net(SharedHead, {"audio": enc}, 3).train()
    b = Batch(
        {"audio": torch.randn(3, 4)},
        torch.arange(3),
        {"audio": torch.tensor([True, False, False])},
        torch.arange(3),
    )
    net(b.only(["audio"])).sum().backward()
    assert layers[0].weight.grad.abs().sum() > 0 and enc.training


@pytest.mark.parametrize("name", sorted(set(methods) - {"unimodal"}))
def test_a_batch_in_which_nobody_has_anything_is_passed_over(name):
    method = methods[name]()
    x = {m: torch.randn(4, 5) for m in ("audio", "visual")}
    nobody = Batch(
        x,
        torch.arange(4) % 3,
        {m: torch.zeros(4, dtype=torch.bool) for m in x},
        torch.arange(4),
    )
    assert not list(method.turns(nobody))


def test_a_changed_update_includes_momentum_and_weight_decay():
    "Half of every update is what half the learning rate gives, with SGD and momentum"

    class Half(UpdateTransform):
        def change(self, p, update):
            return update / 2

    def trained(lr, transforms):
        set_seed(0)
        method = Method(ConcatHead, grad_transforms=transforms)
        net = make_net(ConcatHead, encs(), 3)
        opt = partial(torch.optim.SGD, lr=lr, momentum=0.9)
        dls = Loaders([batch(), batch(seed=1)], [batch()], [batch()], Shuffle(12))
        return snapshot(Learner(net, dls, method, opt).fit(2).net)

    half, slow = trained(0.1, [Half()]), trained(0.05, [])
    for k, v in half.items():
        assert torch.allclose(v.double(), slow[k].double(), atol=1e-6), k


def test_a_turn_that_loses_all_its_rows_takes_no_step():
    class Nothing(GradTransform):
        def after_features(self, learn, turn):
            turn.drop({m: torch.ones(turn.count, dtype=bool) for m in turn.modalities})

    method = Method(ConcatHead, grad_transforms=[Nothing()])
    learn = learner(method, [batch()])
    before = snapshot(learn.net.head)
    learn.fit(1)
    assert all(v.equal(before[k]) for k, v in snapshot(learn.net.head).items())


def test_a_sibling_trains_another_net_on_the_same_batches():
    learn = learner(methods["concat"](), [batch(), batch(seed=1)])
    learn.fit(1)
    before = snapshot(learn.net)
    net = make_net(methods["ensemble"]().head, encs(), 3)
    first = snapshot(net)
    other = learn.sibling(net, methods["ensemble"]()).fit(1)
    assert any(not v.equal(first[k]) for k, v in snapshot(other.net).items())
    assert all(v.equal(before[k]) for k, v in snapshot(learn.net).items())
