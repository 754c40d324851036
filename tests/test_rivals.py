"""The rivals, number by number against the public code of their authors.

The arrays lie in the folder that MLA_RIVALS names (default: rivals beside the
checkout's shared folder). Any folder of that layout must pass.
"""

import copy
import os
from itertools import permutations
from math import pi, sin
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from mla_nb.core import Batch
from mla_nb.encoders.base import ModuleEncoder
from mla_nb.heads import ConcatHead, Head, SeparateHead, make_net
from mla_nb.methods.base import Callback, Method, Turn
from mla_nb.methods.coupling import (
    LFM,
    PMR,
    arl,
    cml,
    distillation,
    fitted_alpha,
    lfm,
    mbsd,
    pmr,
    prototype_logits,
)
from mla_nb.methods.dropping import (
    OPM,
    AMCo,
    Valuation,
    drop_rates,
    dropout,
    dropout_turn,
    valuation,
    valuations,
)
from mla_nb.methods.ensemble import ensemble
from mla_nb.methods.objectives import (
    CGGM,
    AuxHead,
    GBlending,
    MMPareto,
    aux_losses,
    min_norm_weights,
    pareto_weights,
)
from mla_nb.methods.rates import AGM
from mla_nb.methods.restarts import (
    BoostHead,
    InfoReg,
    ReconBoost,
    Relearning,
    inforeg,
    move_back,
    purity,
    reconboost,
    relative_rise,
    reset_strength,
    scaled,
)
from mla_nb.methods.teachers import (
    CosineHead,
    Teachers,
    distances,
    g2d,
    mmcosine,
    present_mean,
    umt,
)
from mla_nb.train.learner import Learner, Loaders, Shuffle

RIVALS = Path(os.environ.get("MLA_RIVALS", ROOT.parent / "shared" / "rivals"))
A, V = "audio", "visual"


def arrays(name):
    "One group of arrays as tensors"
    path = RIVALS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no {path}: these arrays do not come with the project")
    found = np.load(path, allow_pickle=False)
    return {
        k: torch.as_tensor(found[k])
        for k in found.files
        if found[k].dtype != "U" and found[k].dtype.kind != "U"
    }


def group(d, prefix):
    return {k.removeprefix(prefix): v for k, v in d.items() if k.startswith(prefix)}


def cases(d):
    return sorted({k.split("_")[0] for k in d if k.startswith("case")} - {"cases"})


def close(a, b, eps=1e-9):
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.allclose(a.double(), b.double(), rtol=eps, atol=eps), (
        (a - b).abs().max()
    )


class Tanh(ModuleEncoder):
    def __init__(self, w, b):
        layer = nn.Linear(w.shape[1], w.shape[0]).double()
        layer.load_state_dict({"weight": w, "bias": b})
        super().__init__(nn.Sequential(layer, nn.Tanh()), w.shape[0])


def net_of(d, head_class, prefix="", classes=None):
    "audio_net.fc, visual_net.fc and a head"
    encs = {
        m: Tanh(d[f"{prefix}{n}.fc.weight"], d[f"{prefix}{n}.fc.bias"])
        for m, n in ((A, "audio_net"), (V, "visual_net"))
    }
    return make_net(head_class, encs, classes).double()


def set_head(layer, d, name):
    layer.load_state_dict({"weight": d[f"{name}.weight"], "bias": d[f"{name}.bias"]})


def batch_of(a, v, y, number=0):
    here = torch.ones(len(y), dtype=torch.bool)
    idx = torch.arange(len(y)) + number * len(y)
    return Batch({A: a.double(), V: v.double()}, y, {A: here, V: here}, idx)


class Grads(Callback):
    "Gradients as the optimizer sees them, and parameters after each step"

    order = 5

    def __init__(self):
        self.grads, self.params = [], []

    def after_backward(self, learn, turn):
        self.grads.append(
            {
                k: p.grad.clone()
                for k, p in learn.net.named_parameters()
                if p.grad is not None
            }
        )

    def after_step(self, learn, turn):
        self.params.append(
            {k: p.detach().clone() for k, p in learn.net.named_parameters()}
        )


class InOrder(Shuffle):
    def rows(self):
        return torch.arange(self.n)


def train(net, method, epochs, lr, momentum=0.0, decay=0.0, callbacks=()):
    "Batches as they are given, one list per epoch"
    watch = Grads()
    opt = lambda p: torch.optim.SGD(p, lr, momentum=momentum, weight_decay=decay)  # noqa: E731
    for k, batches in enumerate(epochs):
        if k == 0:
            dls = Loaders(
                batches, batches[:1], batches[:1], InOrder(sum(map(len, batches)))
            )
            learn = Learner(net, dls, method, opt, [watch, *callbacks])
        learn.dls.train = batches
        learn.fit(k + 1)
    return learn, watch


NAMES = {
    "net.audio_net.fc.weight": "encoders.audio.net.0.weight",
    "net.audio_net.fc.bias": "encoders.audio.net.0.bias",
    "net.visual_net.fc.weight": "encoders.visual.net.0.weight",
    "net.visual_net.fc.bias": "encoders.visual.net.0.bias",
    "net.fusion_module.fc_out.weight": "head.out.weight",
    "net.fusion_module.fc_out.bias": "head.out.bias",
}


def test_mmpareto():
    d = arrays("mmpareto")
    assert len(cases(d)) == int(d["cases"])
    for case in cases(d):
        c = group(d, f"{case}_")
        p = group(c, "param_")
        net = net_of(p, AuxHead, classes=4)
        set_head(net.head.out, p, "head")
        set_head(net.head.own[A], p, "head_audio")
        set_head(net.head.own[V], p, "head_video")
        transform = MMPareto(float(d["gamma"]), "released")
        method = Method(AuxHead, loss=aux_losses, grad_transforms=[transform])
        b = batch_of(c["x_a"], c["x_v"], c["labels"])
        _, watch = train(net, method, [[b]], 0.0)
        g = watch.grads[0]
        pairs = [
            ("head", "head.out"),
            ("head_audio", "head.own.audio"),
            ("head_video", "head.own.visual"),
            ("audio_net.fc", "encoders.audio.net.0"),
            ("visual_net.fc", "encoders.visual.net.0"),
        ]
        for theirs, ours in pairs:
            for what in ("weight", "bias"):
                close(g[f"{ours}.{what}"], c[f"grad_final_{theirs}.{what}"])
        for n in ("audio", "visual"):
            both = [
                torch.cat(
                    [
                        c[f"grad_{k}_{n}_net.fc.{w}"].flatten()
                        for w in ("weight", "bias")
                    ]
                )
                for k in ("joint", "own")
            ]
            close(pareto_weights(*both), c[f"weights_{n}"])


def test_the_shortest_mean_of_gradients():
    d = arrays("mmpareto")
    for k in range(6):
        v = d[f"solver{k}_vectors"]
        w = min_norm_weights(v @ v.T)
        close(w, d[f"solver{k}_weights"], 1e-9 if len(v) == 2 else 1e-3)
        eps = 1e-9 if len(v) == 2 else 1e-3
        assert float((w @ v).square().sum()) <= float(d[f"solver{k}_norm2"]) * (1 + eps)


def test_agm():
    d = arrays("agm")
    for case in cases(d):
        c = group(d, f"{case}_")
        init = group(c, "init_")
        net = net_of(init, ConcatHead, "net.", 6)
        set_head(net.head.out, init, "net.fusion_module.fc_out")
        loss = AGM(float(c["alpha"]), "paper")
        method = Method(
            ConcatHead, loss=loss, grad_transforms=[loss], compares_rows=True
        )
        epochs = [
            [batch_of(*xy) for xy in zip(c["x_a"][e], c["x_v"][e], c["labels"][e])]
            for e in range(2)
        ]
        learn, watch = train(net, method, epochs, float(c["lr"]), 0.9, 1e-4)
        for theirs, ours in NAMES.items():
            close(
                torch.stack([g[ours] for g in watch.grads]),
                c[f"grad_at_step_{theirs}"],
                1e-6,
            )
            close(
                torch.stack([g[ours] for g in watch.params]),
                c[f"param_after_step_{theirs}"],
                1e-6,
            )
        scores = torch.stack([loss.running[m] for m in (A, V)])
        close(scores, c["running_scores_after_epoch"][1], 1e-6)
        norms = [sum(v.square().sum() for v in g.values()).sqrt() for g in watch.grads]
        close((torch.stack(norms) - 1).abs() < 1e-4, c["clipped"])


def test_opm_rates():
    d = arrays("opm")
    for p, (base, lam), q in zip(d["performance"], d["q_base_lambda"], d["q"]):
        found = drop_rates({A: p[0], V: p[1]}, float(base), float(lam))
        close(torch.stack([found[A], found[V]]), q)


def test_opm_drops():
    d = arrays("opm")
    for k in range(6):
        c = group(d, f"drop{k}_")
        z = {
            m: c[f"feat_{n}"].clone().requires_grad_() for m, n in ((A, "a"), (V, "v"))
        }
        if not c["executed"]:
            assert (
                "out_a" not in c
            )  # nothing is dropped, so there is nothing to compare
            continue
        b = batch_of(
            z[A].detach(), z[V].detach(), torch.zeros(len(z[A]), dtype=torch.long)
        )
        head = ConcatHead({A: int(c["d"][0]), V: int(c["d"][1])}, 2)
        turn = Turn(b, nn.Module(), features=dict(z))
        turn.net.head = head
        keep = {A: c["keep_mask"][0].bool(), V: c["keep_mask"][1].bool()}
        OPM().drop(turn, keep, {A: float(c["q"][0]), V: float(c["q"][1])})
        kept = c["row_kept"].bool()
        assert turn.batch.idx.equal(kept.nonzero()[:, 0])
        total = 0
        for i, (m, n) in enumerate(((A, "a"), (V, "v"))):
            close(turn.features[m], c[f"out_{n}"])
            total = total + (turn.features[m] * c["upstream"][i]).sum()
        total.backward()
        for m, n in ((A, "a"), (V, "v")):
            close(z[m].grad, c[f"grad_{n}"])


class Prototypes(Callback):
    order = 30

    def __init__(self, loss):
        self.loss, self.found = loss, []

    def after_epoch(self, learn):
        self.found.append(torch.stack([self.loss.prototypes[m] for m in (A, V)]))


def test_pmr():
    d = arrays("pmr")
    for case in cases(d):
        c = group(d, f"{case}_")
        init = group(c, "init_")
        net = net_of(init, ConcatHead, "", 6)
        set_head(net.head.out, init, "fusion_module.fc_out")
        loss = PMR(float(c["alpha"]), float(c["momentum"]))
        kept = Prototypes(loss)
        method = Method(
            ConcatHead, loss=loss, grad_transforms=[loss], compares_rows=True
        )
        batches = [
            batch_of(*xy, k)
            for k, xy in enumerate(zip(c["x_a"], c["x_v"], c["labels"]))
        ]
        learn, watch = train(
            net, method, [batches] * 2, float(c["lr"]), callbacks=[kept]
        )
        close(torch.stack(kept.found), c["prototypes"])
        for theirs, ours in NAMES.items():
            theirs = theirs.removeprefix("net.")
            close(watch.grads[0][ours], c[f"grad_first_step_{theirs}"])
            close(watch.grads[-1][ours], c[f"grad_last_step_{theirs}"])
            after = torch.stack([watch.params[k - 1][ours] for k in (1, 2, 20, 40)])
            close(after, c[f"param_after_step_{theirs}"])
        z = net.features(batches[0])
        for m, n in ((A, "a"), (V, "v")):
            close(z[m], c[f"final_feat_{n}"])
            close(-prototype_logits(z[m], loss.prototypes[m]), c[f"final_dist_{n}"])


def test_lfm_loss():
    d = arrays("lfm")
    for e, alpha in zip(d["epochs"].tolist(), d["fitted_alpha"]):
        close(torch.tensor(fitted_alpha(e)).double(), alpha[0], 1e-7)
    for case in cases(d):
        c = group(d, f"{case}_")
        z = {
            m: c[f"logits_{n}"].clone().requires_grad_()
            for m, n in ((A, "a"), (V, "v"))
        }
        turn = Turn(
            batch_of(z[A].detach(), z[V].detach(), c["onehot"].argmax(1)),
            nn.Module(),
            features=z,
        )
        turn.net.head = Plain({A: 6, V: 6}, 6)
        loss = LFM(float(c["alpha"][0]))
        ce, agree = loss.parts(turn)
        close(ce, c["ce"])
        close(agree, c["alignment"])
        total = loss(turn)
        close(total, c["loss"])
        total.backward()
        close(z[A].grad, c["grad_a"])
        close(z[V].grad, c["grad_v"])


class Plain(Head):
    "A head whose logits are the features"

    def unimodal_logits(self, m, z):
        return z


def test_lfm_learns_its_weight():
    d = arrays("lfm")
    p = group(d, "learn_param_")
    net = net_of(p, SeparateHead, "", 6)
    set_head(net.head.out[A], p, "fc_a")
    set_head(net.head.out[V], p, "fc_v")
    half = len(d["learn_onehot"]) // 2
    b = batch_of(
        d["learn_x_a"][:half], d["learn_x_v"][:half], d["learn_onehot"][:half].argmax(1)
    )
    loss = LFM("learned", float(d["learn_lr_alpha_start"]))
    for epoch, a0, a1, lr in d["learn_trace"]:
        loss.step(int(epoch), Turn(b, net, features=net.features(b)))
        found = torch.tensor([loss.weight, 1 - loss.weight, loss.lr]).double()
        close(found, torch.stack([a0, a1, lr]), 1e-6)


def test_relearning():
    d = arrays("relearning")
    for case in cases(d):
        c = group(d, f"{case}_")
        for n in ("a", "v"):
            found = []
            for split in ("train", "valid"):
                pure = purity(c[f"cluster_{split}_{n}"], c[f"labels_{split}"])
                close(torch.tensor(pure).double(), c[f"purity_{split}_{n}"], 1e-6)
                close(scaled(c[f"feat_{split}_{n}"]), c[f"scaled_{split}_{n}"])
                found.append(pure)
            k = reset_strength(*found, float(c["lambda"]))
            close(torch.tensor(k).double(), c[f"weight_{n}"], 1e-6)
            name = {"a": "audio_net", "v": "visual_net"}[n]
            for what in ("weight", "bias"):
                p = c[f"before_{name}.{what}"].clone()
                move_back([p], [c[f"start_{name}.{what}"]], float(c[f"weight_{n}"]))
                close(p, c[f"after_{name}.{what}"])


# Several losses for one encoder: a net of three tanh encoders whose gradients are
# written out by hand, and SGD with momentum

THREE = (A, V, "text")


def toy_batches(count=3, rows=12, seed=0, gaps=False):
    "Rows of three modalities in float64; with gaps, each lacks one of them or none"
    g = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        y = torch.randint(4, (rows,), generator=g)
        x = {
            m: torch.randn(rows, 6, generator=g).double()
            + 2 * nn.functional.one_hot(y, 6)
            for m in THREE
        }
        lacks = (
            torch.randint(4, (rows,), generator=g) if gaps else torch.full((rows,), 3)
        )
        here = {m: lacks != i for i, m in enumerate(THREE)}
        found.append(Batch(x, y, here, torch.arange(rows) + k * rows))
    return found


def toy_learner(method, batches, lr=0.2):
    "A learner on these batches, in order; validation is another batch"
    torch.manual_seed(1)
    encs = {
        m: Tanh(torch.randn(5, 6).double() / 2, torch.randn(5).double()) for m in THREE
    }
    net = make_net(AuxHead, encs, 4).double()
    valid = toy_batches(1, seed=9)
    dls = Loaders(batches, valid, valid, InOrder(sum(map(len, batches))))
    watch = Grads()
    opt = lambda p: torch.optim.SGD(p, lr, momentum=0.9)  # noqa: E731
    return Learner(net, dls, method, opt, [watch]), watch


def enc(m, what="weight"):
    return f"encoders.{m}.net.0.{what}"


def out_blocks(p):
    return dict(zip(THREE, p["head.out.weight"].split(5, 1)))


def toy_losses(p, b):
    "Values and gradients of the joint and the own losses: name -> number, name -> dict"
    onehot, n = nn.functional.one_hot(b.y, 4).double(), len(b)
    here = {m: b.present[m].double()[:, None] for m in THREE}
    z = {m: (b.x[m] @ p[enc(m)].T + p[enc(m, "bias")]).tanh() * here[m] for m in THREE}
    blocks = out_blocks(p)
    values, grads = {}, {"joint": {}}

    def ce(logits, weight):
        log_p = logits.log_softmax(1)
        value = -(log_p * onehot).sum(1, keepdim=True) * weight
        return value.sum() / n, (log_p.exp() - onehot) * weight / n

    def encoder(m, arriving):
        a = arriving * (1 - z[m].square()) * here[m]
        return {enc(m): a.T @ b.x[m], enc(m, "bias"): a.sum(0)}

    joint = sum(z[m] @ blocks[m].T for m in THREE) + p["head.out.bias"]
    values["joint"], d = ce(joint, torch.ones(n, 1).double())
    grads["joint"]["head.out.weight"] = torch.cat([d.T @ z[m] for m in THREE], 1)
    grads["joint"]["head.out.bias"] = d.sum(0)
    for m in THREE:
        grads["joint"] |= encoder(m, d @ blocks[m])
    for m in THREE:
        w, c = p[f"head.own.{m}.weight"], p[f"head.own.{m}.bias"]
        values[m], d = ce(z[m] @ w.T + c, here[m])
        grads[m] = encoder(m, d @ w)
        grads[m] |= {f"head.own.{m}.weight": d.T @ z[m], f"head.own.{m}.bias": d.sum(0)}
    return values, grads


def added(grads, weights=None):
    "The sum of the gradients of several losses"
    total = {}
    for name, one in grads.items():
        k = 1 if weights is None else weights[name]
        for key, g in one.items():
            total[key] = total.get(key, 0) + k * g
    return total


class Momentum:
    "SGD with momentum, on a dict of parameters"

    def __init__(self, p, lr=0.2):
        self.p, self.v, self.lr = {k: t.clone() for k, t in p.items()}, {}, lr

    def step(self, grads):
        for k, g in grads.items():
            self.v[k] = 0.9 * self.v.get(k, 0) + g
            self.p[k] = self.p[k] - self.lr * self.v[k]


def start_of(learn):
    return {k: p.detach().clone() for k, p in learn.net.named_parameters()}


def same_steps(watch, path, eps=1e-8):
    assert len(watch.params) == len(path)
    for found, wanted in zip(watch.params, path):
        for k, v in wanted.items():
            close(found[k], v, eps)


def test_aux_adds_the_losses():
    batches = toy_batches(gaps=True)
    learn, watch = toy_learner(Method(AuxHead, loss=aux_losses), batches)
    sgd, path = Momentum(start_of(learn)), []
    for b in batches * 2:
        sgd.step(added(toy_losses(sgd.p, b)[1]))
        path.append(dict(sgd.p))
    learn.fit(2)
    same_steps(watch, path)


def test_mmpareto_is_the_sum_lengthened_and_turned_in_a_conflict():
    batches = toy_batches(4, seed=3)
    transform = MMPareto(1.5)
    method = Method(AuxHead, loss=aux_losses, grad_transforms=[transform])
    learn, watch = toy_learner(method, batches, 0.5)
    sgd, path, agree = Momentum(start_of(learn), 0.5), [], []
    for b in batches * 3:
        grads = toy_losses(sgd.p, b)[1]
        new = added(grads)
        for m in THREE:
            keys = [enc(m), enc(m, "bias")]
            j, o = (
                torch.cat([grads[n][k].flatten() for k in keys]) for n in ("joint", m)
            )
            agree.append(bool(j @ o > 0))
            w = torch.linspace(0, 1, 200_001).double()  # the shortest mean, by search
            length = w**2 * (j @ j) + (1 - w) ** 2 * (o @ o) + 2 * w * (1 - w) * (j @ o)
            w = w[length.argmin()]
            mixed = j + o if agree[-1] else w * j + (1 - w) * o
            mixed = 1.5 * mixed * (j + o).norm() / mixed.norm()
            parts = mixed.split([grads[m][k].numel() for k in keys])
            new |= {k: v.view_as(new[k]) for k, v in zip(keys, parts)}
        sgd.step(new)
        path.append(dict(sgd.p))
    learn.fit(3)
    same_steps(watch, path, 1e-4)
    assert 0 < sum(agree) < len(agree)


def test_gblending_measures_copies_that_train_on_one_loss():
    batches = toy_batches(seed=2)
    loss = GBlending(every=2)
    method = Method(AuxHead, loss=loss, grad_transforms=[loss])
    learn, watch = toy_learner(method, batches)
    sgd, path = Momentum(start_of(learn)), []

    def measured(p):
        rows = Batch(
            {m: torch.cat([b.x[m] for b in batches]) for m in THREE},
            torch.cat([b.y for b in batches]),
            {m: torch.cat([b.present[m] for b in batches]) for m in THREE},
            torch.cat([b.idx for b in batches]),
        )
        return [toy_losses(p, b)[0] for b in (rows, *learn.dls.valid)]

    for epoch in range(4):
        if epoch % 2 == 0:
            weights = {}
            train, valid = measured(sgd.p)
            for name in ("joint", *THREE):
                copy = Momentum(sgd.p)
                for b in batches * 2:
                    copy.step(toy_losses(copy.p, b)[1][name])
                t, v = measured(copy.p)
                rise = (v[name] - t[name]) - (valid[name] - train[name])
                weights[name] = (valid[name] - v[name]).abs() / rise.square()
            weights = {k: w / sum(weights.values()) for k, w in weights.items()}
        for b in batches:
            sgd.step(added(toy_losses(sgd.p, b)[1], weights))
            path.append(dict(sgd.p))
        learn.fit(epoch + 1)
        for k, w in weights.items():
            close(torch.tensor(loss.weights[k]).double(), w, 1e-7)
    same_steps(watch, path, 1e-7)


def test_gblending_can_measure_the_run_itself():
    batches = toy_batches(seed=2)
    loss = GBlending(every=2, form="running")
    method = Method(AuxHead, loss=loss, grad_transforms=[loss])
    learn, _ = toy_learner(method, batches)
    assert not learn.fit(2).method.loss.weights
    first, now = dict(loss.before), loss.measure(learn)
    learn.fit(3)
    weights = {
        k: abs(now[k][1] - first[k][1])
        / ((now[k][1] - now[k][0]) - (first[k][1] - first[k][0])) ** 2
        for k in now
    }
    for k, w in weights.items():
        assert abs(loss.weights[k] - w / sum(weights.values())) < 1e-9


def classifier_scores(p, b, released):
    found = {}
    for m in THREE:
        z = (b.x[m] @ p[enc(m)].T + p[enc(m, "bias")]).tanh()
        logits = z @ p[f"head.own.{m}.weight"].T + p[f"head.own.{m}.bias"]
        right = logits.softmax(1)[torch.arange(len(b)), b.y]
        found[m] = (logits.argmax(1) == b.y).double() if released else right
    return {m: float(v.mean()) for m, v in found.items()}


def shares_of(score, old):
    rise = {m: score[m] - old.get(m, 0.0) for m in THREE}
    total = sum(rise.values())
    total = 1e-8 if abs(total) < 1e-6 else total
    return {m: (total - r) / total for m, r in rise.items()}


def test_cggm_scales_and_turns():
    "The gradient is that of finite differences of the loss, with the shares fixed"
    batches = toy_batches(2, rows=10, seed=1)
    loss = CGGM(1.3, 0.7)
    options = {"loss": loss, "grad_transforms": [loss], "compares_rows": True}
    learn, watch = toy_learner(Method(AuxHead, **options), batches, 0.1)
    sgd, path, old, bounded = Momentum(start_of(learn), 0.1), [], {}, 0

    def total(p, base, b, share):
        values, grads = toy_losses(p, b)
        fixed, far = toy_losses(base, b)[1], 0
        turned = dict(zip(THREE, grads["joint"]["head.out.weight"].split(5, 1)))
        for m in THREE:
            own = fixed[m][f"head.own.{m}.weight"].flatten()
            cosine = torch.cosine_similarity(turned[m].flatten(), own, 0)
            far = far + abs(share[m]) - share[m] * cosine
        return values["joint"] + 0.7 * far / 3

    for b in batches * 2:
        score = classifier_scores(sgd.p, b, False)
        raw, old = shares_of(score, old), score
        share = {m: min(max(s, 0.0), 2.0) for m, s in raw.items()}
        bounded += share != raw
        new = {k: g for m in THREE for k, g in toy_losses(sgd.p, b)[1][m].items()}
        new = {k: g for k, g in new.items() if k.startswith("head.own")}
        for k in [k for k in sgd.p if not k.startswith("head.own")]:
            new[k] = torch.zeros_like(sgd.p[k])
            for i in range(sgd.p[k].numel()):
                step = torch.zeros(sgd.p[k].numel()).double()
                step[i] = 1e-5
                step = step.view_as(sgd.p[k])
                up, down = (
                    total(sgd.p | {k: sgd.p[k] + s}, sgd.p, b, share)
                    for s in (step, -step)
                )
                new[k].view(-1)[i] = (up - down) / 2e-5
        for m in THREE:
            for what in ("weight", "bias"):
                new[enc(m, what)] *= 1.3 * share[m]
        sgd.step(new)
        path.append(dict(sgd.p))
    learn.fit(2)
    same_steps(watch, path, 1e-6)
    assert bounded


def test_cggm_as_released():
    batches = toy_batches(rows=10, seed=5)
    loss = CGGM(1.3, 0.7, "released")
    options = {"loss": loss, "grad_transforms": [loss], "compares_rows": True}
    learn, watch = toy_learner(Method(AuxHead, **options), batches, 0.1)
    sgd, path, old, late = Momentum(start_of(learn), 0.1), [], {}, None
    for b in batches * 2:
        score = classifier_scores(sgd.p, b, True)
        share, old = shares_of(score, old), score
        grads = toy_losses(sgd.p, b)[1]
        new = grads["joint"]
        for m in THREE:
            for what in ("weight", "bias"):
                new[enc(m, what)] = new[enc(m, what)] * 1.3 * share[m]
        if late is not None:
            new["head.out.weight"] = new["head.out.weight"] + 0.7 * late
        norm = torch.stack([g.norm() for g in new.values()]).norm()
        new = {k: g * min(1.0, 0.8 / float(norm + 1e-6)) for k, g in new.items()}
        late = []
        for m, w in out_blocks(sgd.p).items():
            v = sgd.p[f"head.own.{m}.weight"]
            cosine = (v * w).sum() / (v.norm() * w.norm())
            slope = v / (v.norm() * w.norm()) - cosine * w / w.square().sum()
            late.append(-share[m] * slope / 3)
        late = torch.cat(late, 1)
        new |= {
            k: g for m in THREE for k, g in grads[m].items() if k.startswith("head.own")
        }
        sgd.step(new)
        path.append(dict(sgd.p))
    learn.fit(2)
    same_steps(watch, path, 1e-6)


# coupling: formulas written out row by row, followed over several steps ---------------

T = "text"


def rows_of_numbers(n, number, mods=(A, V, T), missing=0.0):
    "A batch of Gaussian inputs that tell something about four classes"
    g = torch.Generator().manual_seed(number)
    y = torch.randint(4, (n,), generator=g)
    x = {m: torch.randn(n, 5, generator=g).double() for m in mods}
    for v in x.values():
        v[torch.arange(n), y] += 1
    here = {m: torch.rand(n, generator=g) >= missing for m in mods}
    here[mods[0]] |= ~torch.stack(list(here.values())).any(0)  # no row has nothing
    return Batch(x, y, here, torch.arange(n) + n * number)


def small(head_class, mods=(A, V, T)):
    torch.manual_seed(0)
    encs = {m: Tanh(torch.randn(3, 5).double(), torch.randn(3).double()) for m in mods}
    return make_net(head_class, encs, 4).double()


def followed(method, naive, mods=(A, V, T), missing=0.0, scale=None, epochs=2):
    "Train; every gradient must be that of `naive`(net, batch, epoch, step), scaled"
    net = small(method.head, mods)
    twin = small(method.head, mods)
    batches = [rows_of_numbers(9, k, mods, missing) for k in range(3)]
    _, watch = train(net, method, [batches] * epochs, 0.2)
    seen = []
    for k, (grads, params) in enumerate(zip(watch.grads, watch.params)):
        epoch, step = divmod(k, len(batches))
        loss = naive(twin, batches[step], epoch, step)
        names = dict(twin.named_parameters())
        options = loss if isinstance(loss, list) else [loss]
        found = [
            torch.autograd.grad(v, names.values(), retain_graph=True) for v in options
        ]
        factor = scale(twin, batches[step], epoch) if scale else {}
        fits = []
        for one in found:
            wanted = {
                name: v * factor.get(name.split(".")[1], 1.0)
                for name, v in zip(names, one)
            }
            fits.append(all(torch.allclose(grads[n], v) for n, v in wanted.items()))
        assert any(fits), f"step {k}: no gradient fits"
        seen.append(fits.index(True))
        twin.load_state_dict(params)
    return seen


def own_part(net, batch, m, share=True):
    "(B,C) logits from one modality's columns, with its part of the bias or all of it"
    widths = list(net.head.widths)
    first = 3 * widths.index(m)
    bias = net.head.out.bias / (len(widths) if share else 1)
    z = net.encoders[m](batch.x[m])
    return z @ net.head.out.weight[:, first : first + 3].T + bias


def from_subset(net, batch, mods):
    "(B,C) logits of the joint head with the other modalities at zero"
    rows = []
    parts = {m: own_part(net, batch, m, False) - net.head.out.bias for m in mods}
    for i in range(len(batch)):
        there = [v[i] for m, v in parts.items() if batch.present[m][i]]
        rows.append(sum(there) + net.head.out.bias if there else net.head.out.bias)
    return torch.stack(rows)


def naive_ce(logits, y, rows=None):
    "Minus the mean logarithm of the true class's probability"
    rows = range(len(y)) if rows is None else rows
    found = [-logits[i].softmax(0)[y[i]].log() for i in rows]
    return sum(found) / len(found)


@pytest.mark.parametrize("form", ["symmetric", "released"])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_mbsd_follows_its_formula(form, missing):
    def naive(net, b, epoch, step):
        n, y = len(b), b.y
        loss = naive_ce(from_subset(net, b, [A, V, T]), y)
        parts = {m: own_part(net, b, m) for m in (A, V, T)}
        for m, v in parts.items():
            has = b.present[m].nonzero()[:, 0].tolist()
            loss = loss + (naive_ce(v, y, has) * len(has) / n if has else 0)
        for one, two in ((A, V), (A, T), (V, T)):
            for i in range(n):
                if not (b.present[one][i] and b.present[two][i]):
                    continue
                a, v = parts[one][i], parts[two][i]
                p, q = a.softmax(0), v.softmax(0)
                if y[i] not in (a.argmax(), v.argmax()):
                    continue
                strong, weak = max(p[y[i]], q[y[i]]), min(p[y[i]], q[y[i]])
                far = sum((a[c] - v[c]) ** 2 for c in range(4)) / 4
                if form == "released":
                    w, kl = strong - weak, weak * (weak.log() - strong)
                else:
                    w = (strong - weak).detach()
                    kl = sum(p * (p / q).log()) / 2 + sum(q * (q / p).log()) / 2
                loss = loss + w * (far + kl) / n / 3
        return loss

    followed(mbsd(form), naive, missing=missing)


@pytest.mark.parametrize("form", ["symmetric", "released"])
def test_distillation_by_finite_differences(form):
    "The gradient at fixed weight, and with that of the weight"
    g = torch.Generator().manual_seed(1)
    y = torch.arange(4).repeat(3)
    a, v = (3 * torch.randn(2, 12, 4, generator=g)).double()
    p, q = (k.softmax(1).gather(1, y[:, None])[:, 0] for k in (a, v))
    right = (a.argmax(1) == y) | (v.argmax(1) == y)
    assert 2 < int(right.sum()) < 12
    weight = (p - q).abs() * right
    at = a.clone().requires_grad_()
    distillation(at, v, y, form).sum().backward()
    for i in range(12):
        for c in range(4):
            step = torch.zeros_like(a)
            step[i, c] = 1e-6
            up, down = (distillation(a + s, v, y, form)[i] for s in (step, -step))
            if form == "symmetric" and right[i]:  # undo the change of the weight
                moved = [(a + s).softmax(1)[i, y[i]] for s in (step, -step)]
                up, down = (
                    value / (m - q[i]).abs() * weight[i]
                    for value, m in zip((up, down), moved)
                )
            found = (up - down) / 2e-6
            assert abs(float(found - at.grad[i, c])) < 1e-5 * (1 + abs(float(found)))


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("mods", [(A, V), (A, V, T)])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_cml_follows_its_formula_in_every_order(form, mods, missing):
    orders = list(permutations(mods))

    def in_order(net, b, order):
        logits = [from_subset(net, b, order[k:]) for k in range(len(order))]
        ce, penalty = [naive_ce(logits[0], b.y)], 0.0
        for k in range(1, len(order)):
            rises = []
            for i in range(len(b)):
                others = any(b.present[m][i] for m in order[k:])
                if b.present[order[k - 1]][i] and others:
                    old, new = (v[i].softmax(0).max() for v in logits[k - 1 : k + 1])
                    rises.append((i, new - old))
            if not rises:
                continue
            ce.append(naive_ce(logits[k], b.y, [i for i, _ in rises]))
            values = [r for _, r in rises]
            if form == "released":
                penalty = penalty + max(sum(values), 0 * values[0])
            else:
                penalty = penalty + sum(max(r, 0 * r) for r in values) / len(values)
        return sum(ce) / len(ce) + 0.7 * penalty

    def naive(net, b, epoch, step):
        return [in_order(net, b, order) for order in orders]

    seen = followed(cml(0.7, form), naive, mods, missing, epochs=4)
    assert len(set(seen)) > 1  # not always the same order


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("mods", [(A, V), (A, V, T)])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_arl_follows_its_formula(form, mods, missing):
    def naive(net, b, epoch, step):
        loss = naive_ce(from_subset(net, b, mods), b.y)
        for m in mods:
            has = b.present[m].nonzero()[:, 0].tolist()
            own = naive_ce(own_part(net, b, m, False), b.y, has)
            loss = loss + (4.0 if epoch >= 1 else 1.0) * own * len(has) / len(b)
        return loss

    def scale(net, b, epoch):
        if epoch < 1:
            return {}
        if form == "released":
            return {m: 1 + 1 / len(mods) for m in mods}
        size, spread = {}, {}
        for m in mods:
            has = b.present[m].nonzero()[:, 0].tolist()
            logits = own_part(net, b, m, False).detach()
            size[m] = sum(float(logits[i].abs().sum()) for i in has) / len(has)
            p = logits.softmax(1)
            spread[m] = -sum(float((p[i] * p[i].log()).sum()) for i in has) / len(has)
        least = 0.6 / len(mods)
        inverse = {m: 1 / max(spread[m] / sum(spread.values()), least) for m in mods}
        raised = {}
        for m in mods:
            others = [size[o] / sum(size.values()) for o in mods if o != m]
            certain = inverse[m] / sum(inverse.values())
            raised[m] = np.exp(8.0 * sum(others) / len(others) * certain)
        return {m: 1 + v / sum(raised.values()) for m, v in raised.items()}

    followed(arl(4.0, 8.0, 1, form), naive, mods, missing, scale)


def test_pmr_as_the_paper_is_read():
    "Weights clip(others / own - 1, 0, 1), and an entropy in the first epochs"
    method = pmr(form="paper")
    loss, kept = method.loss, []
    before = loss.before_epoch
    loss.early, loss.share = 1, 1.0

    def noting(learn):
        before(learn)
        kept.append({m: v.clone() for m, v in loss.prototypes.items()})

    loss.before_epoch = noting

    def naive(net, b, epoch, step):
        total, near, P = naive_ce(from_subset(net, b, [A, V]), b.y), {}, {}
        for m in (A, V):
            z, c = net.encoders[m](b.x[m]), kept[epoch][m]
            near[m] = torch.stack(
                [torch.stack([-(r - k).norm() for k in c]) for r in z]
            )
            P[m] = near[m].detach().softmax(1)[range(len(b)), b.y].mean()
        for m, o in ((A, V), (V, A)):
            behind, ahead = ((P[k] / P[j] - 1).clamp(0, 1) for k, j in ((o, m), (m, o)))
            p = near[m].softmax(1)
            entropy = -(p * p.log()).sum(1).mean()
            total = total + behind * naive_ce(near[m], b.y)
            total = total - (0.01 if epoch == 0 else 0.0) * ahead * entropy
        return total

    followed(method, naive, (A, V))


def test_lfm_learns_with_attention():
    "Fused attention has no second derivative; a learned weight needs one"

    class Attention(ModuleEncoder):
        def __init__(self):
            super().__init__(nn.Linear(1, 4), 4)

        def forward(self, x):
            z = self.net(x[:, None, :, None])
            return nn.functional.scaled_dot_product_attention(z, z, z).mean((1, 2))

    method = lfm("learned", 1.0)
    net = make_net(method.head, {m: Attention() for m in (A, V)}, 4)
    batches = [rows_of_numbers(9, k, (A, V)) for k in range(2)]
    for b in batches:
        b.x = {m: v.float() for m, v in b.x.items()}
    train(net, method, [batches], 0.1)
    assert method.loss.weight != 0.5


def linear_net(head_class, classes=4):
    "Two linear encoders, and batches for several epochs"
    torch.manual_seed(0)
    encs = {m: ModuleEncoder(nn.Linear(5, d), d) for m, d in ((A, 3), (V, 6))}
    net = make_net(head_class, encs, classes).double()
    g = torch.Generator().manual_seed(1)
    xs = torch.randn(2, 3, 7, 5, generator=g)
    ys = torch.randint(classes, (3, 7), generator=g)
    batches = [batch_of(xs[0, k], xs[1, k], ys[k], k) for k in range(3)]
    return net, batches


def before_each(net, watch):
    "Parameters before each step that `watch` has seen"
    return [dict(net), *watch.params[:-1]]


def softmax_gradient(p, g):
    "Gradient for logits, from the gradient for their softmax"
    return p * (g - (p * g).sum(1, keepdim=True))


def boosting_gradients(w, b, one, other, agree):
    "Closed form: gradients of `one`'s stage for its encoder and its layer"

    def logits(m):
        z = b.x[m] @ w[f"encoders.{m}.net.weight"].T + w[f"encoders.{m}.net.bias"]
        return z, z @ w[f"head.out.{m}.weight"].T + w[f"head.out.{m}.bias"]

    (z, own), (_, fixed) = logits(one), logits(other)
    p, q = own.softmax(1), fixed.softmax(1)
    n, c = p.shape
    target = nn.functional.one_hot(b.y, c)
    sure = (q * target).sum(1, keepdim=True)
    d = (5 - sure) / c * (p - target) / n
    d = d + agree * softmax_gradient(p, 2 * (p - q) / (n * c))
    dz = d @ w[f"head.out.{one}.weight"]
    return {
        f"head.out.{one}.weight": d.T @ z,
        f"head.out.{one}.bias": d.sum(0),
        f"encoders.{one}.net.weight": dz.T @ b.x[one],
        f"encoders.{one}.net.bias": dz.sum(0),
    }


@pytest.mark.parametrize("form", ["paper", "released"])
def test_reconboost_in_closed_form(form):
    "Epochs of audio, all, visual, all, audio; three steps each"
    net, batches = linear_net(BoostHead)
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    _, watch = train(net, reconboost(form=form), [batches] * 5, 0.1)
    weights = before_each(start, watch)
    for epoch, one in enumerate([A, None, V, None, A]):
        agree = 0.5 if form == "paper" and epoch else 0.0
        for k, b in enumerate(batches):
            g, w = watch.grads[3 * epoch + k], weights[3 * epoch + k]
            if one is None:
                assert g.keys() == start.keys()
                both = {k: p.clone().requires_grad_() for k, p in w.items()}
                logits = torch.func.functional_call(net, both, (b,))
                nn.functional.cross_entropy(logits, b.y).backward()
                expected = {k: p.grad for k, p in both.items()}
            else:
                expected = boosting_gradients(w, b, one, V if one == A else A, agree)
            assert g.keys() == expected.keys()
            for name, value in expected.items():
                close(g[name], value)


def test_reconboost_takes_only_rows_that_have_the_modality():
    _, [b, *_] = linear_net(BoostHead)
    b.present[A] = torch.arange(7) < 3
    loss = ReconBoost()
    assert [len(t) for t in loss.turns(b)] == [7]
    loss.one = A
    [t] = loss.turns(b)
    assert t.idx.equal(b.idx[:3])
    b.present[A][:] = False
    gone = batch_of(b.x[A], b.x[V], b.y)
    gone.present[A][:] = False
    assert not list(loss.turns(gone))


def test_inforeg_in_closed_form():
    "The gradient is that of the losses, and for the leader a multiple of its way"
    net, batches = linear_net(ConcatHead)
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    _, watch = train(net, inforeg(window=1, least=-99.0), [batches] * 2, 0.1)
    weights, leaders = before_each(start, watch), set()
    for step, (g, w) in enumerate(zip(watch.grads, weights)):
        b, first = batches[step % 3], weights[step - step % 3]
        both = {k: p.clone().requires_grad_() for k, p in w.items()}
        z = {
            m: b.x[m] @ both[f"encoders.{m}.net.weight"].T
            + both[f"encoders.{m}.net.bias"]
            for m in (A, V)
        }
        blocks = dict(zip((A, V), both["head.out.weight"].split([3, 6], 1)))
        own = {m: z[m] @ blocks[m].T + both["head.out.bias"] / 2 for m in (A, V)}
        losses = [nn.functional.cross_entropy(v, b.y) for v in own.values()]
        joint = nn.functional.cross_entropy(own[A] + own[V], b.y)
        (joint + sum(losses)).backward()
        s = {m: v.softmax(1).gather(1, b.y[:, None]).sum() for m, v in own.items()}
        leader, gap = (A if s[A] > s[V] else V), (s[A] - s[V]).abs()
        leaders.add(leader)
        k = 0.95 * gap.tanh().exp()
        for name, value in g.items():
            expected = both[name].grad
            if name.startswith(f"encoders.{leader}."):
                expected = expected + k * (w[name] - first[name])
            close(value, expected)
    assert leaders == {A, V}  # both were pulled


def test_the_window_of_inforeg():
    "The public code begins with ten zeros and compares sums of ten traces"
    traces = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    for n in range(1, 31):
        padded = [0.0] * 10 + traces[:n]
        now, before = sum(padded[-10:]) / 10, sum(padded[-11:-1]) / 10
        found = relative_rise(traces[:n], 10)
        assert abs(found - (now - before) / now) < 1e-12
    net, batches = linear_net(ConcatHead)
    method = inforeg(beta=0.0, window=2)
    _, watch = train(net, method, [batches] * 3, 0.1)
    trace = method.grad_transforms[0].trace[A]
    for epoch, value in enumerate(trace):
        steps = watch.grads[3 * epoch : 3 * epoch + 3]
        square = [
            sum(
                v.square().sum() for k, v in g.items() if k.startswith("encoders.audio")
            )
            for g in steps
        ]
        close(torch.tensor(value).double(), sum(square) / 3, 1e-6)
    resumed = InfoReg(window=2)
    resumed.load_state_dict(method.grad_transforms[0].state_dict())
    assert resumed.trace[A] == trace and resumed.start.keys() == {A, V}


class Around(Callback):
    "Weights before and after what callbacks of order 0 do at the start of an epoch"

    def __init__(self, order, found):
        self.order, self.found = order, found

    def before_epoch(self, learn):
        now = {k: p.detach().clone() for k, p in learn.net.named_parameters()}
        self.found.append(now)


def test_relearning_resets_encoders_and_nothing_else():
    net, batches = linear_net(ConcatHead)
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    transform, old, new = Relearning(every=2, times=1), [], []
    method = Method(ConcatHead, grad_transforms=[transform])
    around = [Around(-1, old), Around(1, new)]
    train(net, method, [batches] * 5, 0.5, callbacks=around)
    assert transform.strength[A] > 0 or transform.strength[V] > 0
    for epoch in range(5):
        for name, value in new[epoch].items():
            m = name.split(".")[1]
            k = transform.strength.get(m, 0.0) if epoch == 2 else 0.0
            close(value, k * start[name] + (1 - k) * old[epoch][name])


# dropping: dropout, AMCo, valuation ---------------------------------------------------
T = "text"


def toy(n, seed, mods=(A, V, T), missing=0.0):
    "n rows of three classes, some without some modalities"
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=g)
    here = {m: torch.rand(n, generator=g) >= missing for m in mods}
    here[mods[0]] = here[mods[0]] | ~torch.stack([*here.values()]).any(0)
    x = {m: torch.randn(n, 4, generator=g).double() for m in mods}
    return Batch(x, y, here, torch.arange(n))


def toy_net(mods=(A, V, T)):
    torch.manual_seed(0)
    encs = {}
    for k, m in enumerate(mods):
        w = torch.randn(3 + k, 4).double()
        encs[m] = Tanh(w, torch.zeros(3 + k).double())
    return make_net(ConcatHead, encs, 3).double()


def by_hand(net, b):
    "(B,M,C) logits of each modality with its part of the bias, from the weights alone"
    at, terms = 0, []
    for e in net.encoders.values():
        layer = e.net[0]
        x = b.x[list(net.encoders)[len(terms)]]
        z = (x @ layer.weight.T + layer.bias).tanh()
        w = net.head.out.weight[:, at : at + z.shape[1]]
        terms.append(z @ w.T + net.head.out.bias / len(net.encoders))
        at += z.shape[1]
    return torch.stack(terms, 1)


def mean_ce(logits, y):
    return (
        -(logits.exp() / logits.exp().sum(1, keepdim=True))
        .log()[torch.arange(len(y)), y]
        .mean()
    )


def follow(net, step, lr):
    "Plain SGD on a loss; gradients by name"
    params = dict(net.named_parameters())
    found = torch.autograd.grad(step(net), params.values(), allow_unused=True)
    with torch.no_grad():
        for p, g in zip(params.values(), found):
            if g is not None:
                p -= lr * g


def same_net(a, b, eps=1e-9):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        close(p, q, eps)


class Turns(Callback):
    "What each step was about"

    order = 1

    def __init__(self):
        self.seen = []

    def after_backward(self, learn, turn):
        mask = getattr(learn.method.loss, "mask", None)
        self.seen.append((learn.epoch, learn.step, turn.batch, mask))


def test_dropout_patterns():
    "Each pattern of flags comes as often as the formula says"
    n, p = 20_000, 0.4
    b = toy(n, 0)
    torch.manual_seed(0)
    [turn] = dropout_turn(p)(b)
    assert turn.idx.equal(b.idx)
    kept = torch.stack([turn.present[m] for m in b.x], 1)
    for code in range(1, 8):
        flags = torch.tensor([bool(code >> k & 1) for k in range(3)])
        k = int(flags.sum())
        chance = p ** (3 - k) * (1 - p) ** k + (p**3 if k == 3 else 0)
        share = (kept == flags).all(1).double().mean()
        assert abs(share - chance) < 4 * (chance * (1 - chance) / n) ** 0.5
    [turn] = dropout_turn(0.9)(toy(200, 1, missing=0.5))  # what is absent stays absent
    for m, here in toy(200, 1, missing=0.5).present.items():
        assert not (turn.present[m] & ~here).any()


def test_dropout_steps():
    "Several steps are those of a head that adds the terms of what is kept"
    batches = [toy(9, k, missing=0.2) for k in range(4)]
    net, other, watch = toy_net(), toy_net(), Turns()
    train(net, dropout(0.5), [batches] * 2, 0.1, callbacks=[watch])
    assert len(watch.seen) == 8
    for _, _, b, _ in watch.seen:
        kept = torch.stack([b.present[m] for m in b.x], 1)[..., None]
        assert kept.any(1).all() and not kept.all()

        def loss(net, b=b, kept=kept):
            absent = net.head.out.bias / 3
            logits = torch.where(kept, by_hand(net, b), absent).sum(1)
            return mean_ce(logits, b.y)

        follow(other, loss, 0.1)
    same_net(net, other)


def amco_loss(net, b, mask):
    "Cross-entropy of the sum of masked logits, and of each modality's"
    here = torch.stack([b.present[m] for m in b.x], 1)
    terms = by_hand(net, b)
    masked = torch.where(here[..., None], terms * mask, net.head.out.bias / 3)
    loss = mean_ce(masked.sum(1), b.y)
    for k in range(3):
        rows = here[:, k]
        if rows.any():
            own = mean_ce((terms[rows, k] * mask[k]), b.y[rows])
            loss = loss + own * rows.double().mean()
    return loss


def test_amco_steps():
    "Shares, masks and steps from the formulas; one gradient by finite differences"
    batches = [toy(9, k, missing=0.2) for k in range(4)]
    net, other, watch = toy_net(), toy_net(), Turns()
    loss = AMCo(sigma=0.36, eps=0.3, start=0)
    method = Method(ConcatHead, loss=loss, grad_transforms=[loss])
    learn, _ = train(net, method, [batches] * 4, 0.1, callbacks=[watch])
    sizes = set()
    for epoch, k, b, found in watch.seen:
        here = torch.stack([b.present[m] for m in b.x], 1)
        raw = by_hand(other, b).exp() * here[..., None]
        shares = (raw / raw.sum((1, 2), keepdim=True)).sum(2)
        ahead = shares[here.sum(1) > 1].mean(0) > 0.36
        n = int(sin(pi / 2 * min(1, k * epoch / 10 / 0.3)) * 3)
        mask = torch.stack([found[m] for m in b.x])
        assert ((mask == 0).sum(1) == torch.where(ahead, n, 0)).all()
        sizes |= set((mask == 0).sum(1).tolist())
        follow(other, lambda net, b=b, mask=mask: amco_loss(net, b, mask), 0.1)
    same_net(net, other)
    assert {0, 3} <= sizes and sizes & {1, 2}  # nothing, a part and everything
    b, mask = watch.seen[-1][2:]
    mask = torch.stack([mask[m] for m in b.x])
    w = other.encoders[V].net[0].weight
    [exact] = torch.autograd.grad(amco_loss(other, b, mask), [w])
    with torch.no_grad():
        w[0, 0] += 1e-6
        up = amco_loss(other, b, mask)
        w[0, 0] -= 2e-6
        down = amco_loss(other, b, mask)
    close((up - down) / 2e-6, exact[0, 0], 1e-6)


def test_amco_without_masks_or_before_its_start():
    b = toy(9, 0)
    for loss, extra in ((AMCo(sigma=1.0, start=0), True), (AMCo(start=1), False)):
        net, other = toy_net(), toy_net()
        method = Method(ConcatHead, loss=loss, grad_transforms=[loss])
        train(net, method, [[b]], 0.1)

        def plain(net, extra=extra):
            if extra:
                return amco_loss(net, b, torch.ones(3, 3).double())
            return mean_ce(by_hand(net, b).sum(1), b.y)

        follow(other, plain, 0.1)
        same_net(net, other)


def test_valuations_are_means_over_orders():
    "Shapley values by enumeration of the orders in which modalities arrive"
    mods, n = (A, V, T), 60
    b, g = toy(n, 0, missing=0.4), torch.Generator().manual_seed(1)
    right = {}
    for code in range(1, 8):
        some = frozenset(m for k, m in enumerate(mods) if code >> k & 1)
        right[some] = torch.rand(n, generator=g) < 0.5
    found = valuations(right, b.present)

    def worth(some, i):
        has = sum(bool(b.present[m][i]) for m in some)
        return has if some and right[frozenset(some)][i] else 0

    for i in range(n):
        for m in mods:
            total = 0
            for order in permutations(mods):
                before = order[: order.index(m)]
                total += worth((*before, m), i) - worth(before, i)
            assert abs(float(found[m][i]) - total / 6) < 1e-12
    has = sum(p.double() for p in b.present.values())
    close(sum(found.values()), right[frozenset(mods)] * has)


def test_valuation_copies_of_two_modalities():
    "One copy at 0.5, two at 0, three at -0.5, none from 1 on, as public code has it"
    a, v, both = torch.cartesian_prod(*[torch.tensor([False, True])] * 3).T
    right = {frozenset([A]): a, frozenset([V]): v, frozenset([A, V]): both}
    ones = torch.ones(8).bool()
    for m, value in valuations(right, {A: ones, V: ones}).items():
        alone, other = (a, v) if m == A else (v, a)
        expected = (alone.double() + 2 * both.double() - other.double()) / 2
        close(value, expected)
        copies = {-0.5: 3, 0.0: 2, 0.5: 1, 1.0: 0, 1.5: 0}
        wanted = torch.tensor([copies[float(p)] for p in expected])
        assert (2 * (1 - value)).clamp(min=0).equal(wanted.double())


class Values(Callback):
    "The valuation of each epoch, and what it should be"

    order = 1

    def __init__(self, b):
        self.b, self.pairs = b, []

    def before_epoch(self, learn):
        terms = by_hand(learn.net, self.b).detach()
        here, bias = torch.stack([*self.b.present.values()], 1), learn.net.head.out.bias
        mods, right = list(self.b.x), {}
        for code in range(1, 8):
            on = torch.tensor([bool(code >> k & 1) for k in range(3)])
            use = (here & on)[..., None]
            logits = torch.where(use, terms, bias / 3).sum(1)
            some = frozenset(m for m, k in zip(mods, on) if k)
            right[some] = logits.argmax(1) == self.b.y
        value = valuations(right, self.b.present)
        wanted = {
            m: 2 * (1 - v).clamp(min=0) * self.b.present[m] for m, v in value.items()
        }
        self.pairs.append((learn.method.turns.copies, wanted))


def test_valuation_steps():
    "Each row once with what it has, and its copies with one modality, every epoch"
    b, n = toy(24, 0, missing=0.3), 24
    net, method = toy_net(), valuation(start=1)
    values, watch = Values(b), Turns()
    train(net, method, [[b]] * 4, 0.1, callbacks=[values, watch])
    for epoch, (copies, wanted) in enumerate(values.pairs):
        seen = [t for e, _, t, _ in watch.seen if e == epoch]
        assert abs(max(map(len, seen)) - min(map(len, seen))) <= 1
        idx = torch.cat([t.idx for t in seen])
        flags = torch.stack([torch.cat([t.present[m] for t in seen]) for m in b.x], 1)
        if epoch == 0:
            assert not copies and idx.sort()[0].equal(torch.arange(n))
            continue
        whole = torch.stack([*b.present.values()], 1)
        several = (whole.sum(1) > 1).nonzero()[:, 0].tolist()
        for i in several:
            mine = flags[idx == i]
            assert int((mine == whole[i]).all(1).sum()) == 1
            for k, m in enumerate(b.x):
                close(copies[m], wanted[m])
                count = int((mine[:, k] & (mine.sum(1) == 1)).sum())
                assert abs(count - float(copies[m][i])) < 1
        assert 1 <= len(seen) == -(-len(idx) // n)


def test_valuation_goes_on_from_a_checkpoint():
    first, second = Valuation(), Valuation()
    first.copies = {A: torch.rand(5).double(), V: torch.rand(5).double()}
    second.load_state_dict(first.state_dict())
    assert all(second.copies[m].equal(n) for m, n in first.copies.items())


# teachers: MMCosine, UMT, G2D ---------------------------------------------------------
class Until(Callback):
    "Ends a run after some epochs, as a kill does"

    def __init__(self, epochs):
        self.epochs = epochs

    def after_epoch(self, learn):
        learn.stop = learn.epoch + 1 >= self.epochs


class Started(Callback):
    "Note the net with which the teachers begin"

    def __init__(self, teachers):
        self.teachers, self.train = teachers, teachers.train
        teachers.train = self.noted

    def noted(self, learn):
        self.net = copy.deepcopy(self.teachers.net)
        self.train(learn)


def taught(method, callbacks=(), missing=0.0):
    "A learner on the same three batches every epoch"
    batches = [toy(9, k, missing=missing) for k in range(3)]
    dls = Loaders(batches, batches, batches, InOrder(27))
    net = make_net(method.head, dict(toy_net().encoders), 3)
    opt = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)  # noqa: E731
    torch.manual_seed(3)  # of the teachers' heads
    return Learner(net, dls, method, opt, callbacks)


@pytest.fixture
def in_float64():
    "New layers are made in float64: the teachers' heads, too"
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same_state(a, b):
    assert a.keys() == b.keys()
    assert all(v.equal(b[k]) for k, v in a.items())


def test_mmcosine_steps(in_float64):
    "Several steps are those of cosines made of sums and products"
    learn = taught(mmcosine(), missing=0.3)
    learn.opt = torch.optim.SGD(learn.net.parameters(), 0.05)
    other = copy.deepcopy(learn.net)

    def loss(net, b):
        logits = 0
        for m, e in net.encoders.items():
            z = (b.x[m] @ e.net[0].weight.T + e.net[0].bias).tanh()
            w = net.head.out[m].weight
            size = (z * z).sum(1, keepdim=True).sqrt() * (w * w).sum(1).sqrt()
            logits = logits + 15 * (z @ w.T) / size * b.present[m][:, None]
        return mean_ce(logits, b.y)

    learn.fit(2)
    for b in learn.dls.train * 2:
        follow(other, lambda net, b=b: loss(net, b), 0.05)
    same_net(learn.net, other)
    assert isinstance(learn.net.head, CosineHead)


def test_teachers_are_an_ensemble_and_stay_frozen(in_float64):
    method = umt(epochs=2)
    started = Started(method.loss)
    learn = taught(method, missing=0.3).fit(1)
    other = Learner(started.net, learn.dls, ensemble(), learn.opt_func).fit(2)
    same_state(other.net.state_dict(), method.loss.net.state_dict())
    learn.fit(3)
    same_state(other.net.state_dict(), method.loss.net.state_dict())
    assert not any(p.requires_grad for p in method.loss.net.parameters())


@pytest.mark.parametrize("factory", [umt, g2d])
def test_teachers_resume(factory, in_float64):
    "A run that goes on from a checkpoint ends where an undisturbed one does"
    whole = taught(factory(), missing=0.3).fit(4)
    first = taught(factory(), [Until(2)], missing=0.3).fit(4)
    assert first.epoch == 2
    second = taught(factory(), missing=0.3)
    loss, second.epoch = second.method.loss, first.epoch
    second.net.load_state_dict(first.net.state_dict())
    second.opt.load_state_dict(first.opt.state_dict())
    loss.load_state_dict(copy.deepcopy(first.method.loss.state_dict()))
    loss.train = None  # teachers from a checkpoint are not trained
    second.fit(4)
    for other in (first, whole):
        same_state(other.method.loss.net.state_dict(), loss.net.state_dict())
    same_net(whole.net, second.net, 0)


def test_umt_ignores_absent_rows(in_float64):
    "With half of the inputs missing, absent rows add nothing to the distance"
    b = toy(40, 0, missing=0.5)
    net, teachers = toy_net(), umt(scale=3.0).loss
    torch.manual_seed(5)
    teachers.net = make_net(SeparateHead, dict(copy.deepcopy(net.encoders)), 3)
    for p in teachers.net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    z = net.features(b)
    total = 0
    for m, v in z.items():
        layer = teachers.net.encoders[m].net[0]
        goal = (b.x[m] @ layer.weight.T + layer.bias).tanh()
        gap = ((v - goal) ** 2).mean(1)
        total = total + sum(gap[i] for i in range(40) if b.present[m][i]) / 40
    known, _ = teachers.answers(Turn(b, net, features=z))
    close(present_mean(distances(z, known), b), total)
    ce = nn.functional.cross_entropy(net.combine(z, b), b.y)
    close(teachers(Turn(b, net, features=z)), ce + 3 * total)
    [g] = torch.autograd.grad(present_mean(distances(z, known), b), [z[V]])
    assert not g[~b.present[V]].any() and g[b.present[V]].any()


@pytest.mark.parametrize("form", ["paper", "released"])
def test_g2d_loss_and_pauses(form, in_float64):
    "Losses, scores and pauses by hand, over several steps"
    loss = g2d(tau=2.0, feature=0.5, pause=2, form=form).loss
    method = Method(ConcatHead, loss=loss, grad_transforms=[loss])
    learn, at = taught(method, missing=0.3), []
    learn.opt = torch.optim.SGD(learn.net.parameters(), 0.05)
    other = copy.deepcopy(learn.net)
    learn.fit(4)

    def by_formula(net, b):
        z = net.features(b)
        joint = net.combine(z, b)
        value = mean_ce(joint, b.y)
        for m, e in loss.net.encoders.items():
            goal = (b.x[m] @ e.net[0].weight.T + e.net[0].bias).tanh()
            q = (loss.net.head.out[m](goal) / 2).softmax(1)
            p = (joint / 2).softmax(1)
            row = 4 * (q * (q / p).log()).sum(1)
            row = row + 0.5 * (z[m] - goal).square().mean(1)
            value = value + row[b.present[m]].sum() / len(b)
        return value

    def sure(m, b):
        e = loss.net.encoders[m].net[0]
        goal = (b.x[m] @ e.weight.T + e.bias).tanh()
        p = loss.net.head.out[m](goal).softmax(1)[torch.arange(len(b)), b.y]
        return p[b.present[m]].mean()

    for epoch in range(4):
        for b in learn.dls.train:
            order = sorted(b.x, key=lambda m: sure(m, b))
            stage = order[epoch : epoch + 1] if epoch < 2 else order
            active = stage if form == "paper" else order  # no weight has 4 dimensions
            at.append(tuple(active))
            kept = {k: p.detach().clone() for k, p in other.named_parameters()}
            follow(other, lambda net, b=b: by_formula(net, b), 0.05)
            for m, e in other.encoders.items():
                for k, p in e.named_parameters():
                    if m not in active:
                        p.data.copy_(kept[f"encoders.{m}.{k}"])
    same_net(learn.net, other)
    assert len(set(at)) > 1 or form == "released"


def test_g2d_released_pauses_weights_of_four_dimensions():
    "Of the best teacher's encoder, and of no other"

    class Conv(ModuleEncoder):
        def __init__(self):
            layers = nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(2, 3)
            super().__init__(nn.Sequential(*layers), 3)

        def forward(self, x):
            return super().forward(x.view(-1, 1, 2, 2))

    torch.manual_seed(0)
    loss = g2d(pause=1, form="released").loss
    net = make_net(ConcatHead, {m: Conv() for m in (A, V)}, 3)
    loss.scores = lambda turn: {A: torch.tensor(0.9), V: torch.tensor(0.2)}
    learn = Learner(net, Loaders([], [], [], InOrder(0)), Method(ConcatHead))
    learn.epochs = 2
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    b = toy(4, 0, mods=(A, V))
    loss.after_backward(learn, Turn(b, net))
    zero = {k for k, p in net.named_parameters() if not p.grad.any()}
    assert zero == {"encoders.audio.net.0.weight"}


def test_answers_are_computed_once_per_turn(in_float64):
    "One forward pass of the teachers for each step, also where gradients need it"
    learn, passes = taught(g2d(pause=9), missing=0.3), []
    learn.fit(1)
    learn.method.loss.net.encoders[A].register_forward_hook(
        lambda *found: passes.append(1)
    )
    learn.fit(3)
    assert len(passes) == 2 * len(learn.dls.train)
    assert isinstance(learn.method.loss, Teachers)
    assert learn.method.loss.found is None
