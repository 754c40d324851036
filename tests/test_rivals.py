"""The rivals, number by number against the public code of their authors.

The arrays lie in the folder that MLA_RIVALS names (default: rivals beside the
checkout's shared folder). Any folder of that layout must pass.
"""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from mla_nb.core import Batch
from mla_nb.encoders.base import ModuleEncoder
from mla_nb.heads import ConcatHead, Head, SeparateHead, make_net
from mla_nb.methods.agm import AGM, agm
from mla_nb.methods.base import Callback, Method, Turn
from mla_nb.methods.coupling import LFM, PMR, fitted_alpha, prototype_logits
from mla_nb.methods.dropping import OPM, drop_rates
from mla_nb.methods.objectives import (
    AuxHead,
    MMPareto,
    aux_losses,
    min_norm_weights,
    pareto_weights,
)
from mla_nb.methods.restarts import move_back, purity, reset_strength, scaled
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
        for m, n in ((A, "audio"), (V, "visual")):
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
