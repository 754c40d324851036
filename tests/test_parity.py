"""Our numbers against those of the paper's released code.

The fixtures are read from the folder MLA_FIXTURES (default: ../shared/fixtures); any
set of that layout will do, what differs between sets stands in its set.json. Every
array read by a check is ticked off, and the summary names, file by file, what was
checked and what is not covered yet.
"""

import json
import os
import re
import zlib
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from mla_nb.core import Batch
from mla_nb.encoders.base import Encoder, ModuleEncoder
from mla_nb.encoders.masked import M3AE, pooled, table
from mla_nb.encoders.weights import fill, renamed
from mla_nb.heads import (
    ConcatHead,
    Net,
    SharedHead,
    SumHead,
    make_net,
)
from mla_nb.methods.base import Callback, Method, Turn, fuse
from mla_nb.methods.ensemble import alternating
from mla_nb.methods.fusion import FixedWeights, entropy, entropy_rule, released_gate
from mla_nb.methods.joint import FilmHead, GatedHead
from mla_nb.methods.mla import mla_released
from mla_nb.methods.ogm import OGM, modulation_coefficients, true_class
from mla_nb.methods.projection import GradProjection
from mla_nb.methods.qmf import QMFLoss, confidence
from mla_nb.released import (
    HEADS,
    M3AE_NAMES,
    SLOTS,
    as_ours,
    load_released,
    released_shapes,
)
from mla_nb.signals import excerpt, fbank, log_spectrogram, tile
from mla_nb.train.learner import Learner
from mla_nb.train.loaders import Loaders, Shuffle

FIXTURES = Path(os.environ.get("MLA_FIXTURES", ROOT.parent / "shared/fixtures"))
if not FIXTURES.is_absolute():
    FIXTURES = (Path.cwd() / FIXTURES).resolve()
if not (FIXTURES / "set.json").exists():
    pytest.skip(
        f"no fixtures at {FIXTURES}; set MLA_FIXTURES to a folder of them",
        allow_module_level=True,
    )
SET = json.loads((FIXTURES / "set.json").read_text())
FILES = sorted(p.name for p in FIXTURES.glob("*.npz"))


class Ticked:
    "An npz file that remembers which of its arrays were read"

    def __init__(self, name):
        self.z, self.used = np.load(FIXTURES / name, allow_pickle=False), set()

    def __getitem__(self, k):
        self.used.add(k)
        return self.z[k]

    def t(self, k):
        return torch.from_numpy(np.asarray(self[k]))

    def names(self, pattern):
        return [k for k in self.z.files if re.fullmatch(pattern, k)]


@cache
def load(start):
    return Ticked(next(f for f in FILES if f.startswith(start + "_")))


def close(ours, theirs, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(
        np.asarray(ours, dtype=np.float64),
        np.asarray(theirs, dtype=np.float64),
        rtol=rtol,
        atol=atol,
    )


# the formulas of the fixtures' README -------------------------------------------------


def u(tag, n):
    "Fixed pseudo-random numbers in (-1, 1)"
    h, mask = zlib.crc32((SET["prefix"] + tag).encode()), 0xFFFFFFFF
    x = (np.arange(n, dtype=np.uint64) * 0x9E3779B1 + h) & mask
    x ^= x >> np.uint64(16)
    x = (x * 0x85EBCA6B) & mask
    x ^= x >> np.uint64(13)
    x = (x * 0xC2B2AE35) & mask
    x ^= x >> np.uint64(16)
    return (x + 0.5) / 2**31 - 1


def wave(tag, n, A):
    s, w = np.arange(n) / 16000, SET["w"]
    return (
        A * np.sin(2 * np.pi * 220 * (1 + w[0]) * s)
        + 0.6 * A * np.sin(2 * np.pi * 1375 * (1 + w[1]) * s + 0.7)
        + 0.5 * A * np.sin(2 * np.pi * (300 * s + 350 * s**2 * (0.5 + w[2] / 4)))
        + 0.02 * u(tag, n)
    ).astype(np.float32)


# a: projection ------------------------------------------------------------------------

PROJECTIONS = {
    "released": {"denominator": "elementwise", "norm": True},
    "elementwise_nonorm": {"denominator": "elementwise"},
    "rls": {},
    "rls_norm": {"norm": True},
}


def projected(z, kw):
    "Run the real callback over the fixture's turns; yields P and the edited gradients"
    d, C = int(z["d"]), int(z["C"])
    head = SharedHead({"m": d}, C).double()
    edit = GradProjection(when="update_first", skip=1, **kw)
    for i in range(len(z["exp_count"])):
        head.out.weight.grad, head.out.bias.grad = (
            z.t("grad_in")[i].clone(),
            z.t("grad_bias")[i].clone(),
        )
        batch = SimpleNamespace(rows=lambda m: None)  # every row is present
        turn = Turn(
            batch,
            SimpleNamespace(head=head),
            step=int(z["batch_index"][i]),
            steps=int(z["len_dataloader"]),
            features={"m": z.t(f"x{i}")},
        )
        edit.after_backward(None, turn)
        yield edit.P, head.out.weight.grad, head.out.bias.grad


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection(name):
    z = load("a")
    for i, (P, grad, bias) in enumerate(projected(z, PROJECTIONS[name])):
        close(P, z[f"{name}_P"][i], 1e-8)
        close(grad, z[f"{name}_grad_out"][i], 1e-8)
        close(bias, z["grad_bias"][i])
    assert int(z["exp_count"][0]) == 0 and len(z["batch_sizes"]) == i + 1 == len(
        [k for k in z.z.files if re.fullmatch(r"x\d+", k)]
    )


def test_a_lambda():
    from mla_nb.methods.projection import epoch_lambda

    z = load("a")
    close(
        [epoch_lambda(int(b), int(z["len_dataloader"])) for b in z["batch_index"]],
        z["alpha"],
    )


def test_a_denominator_stays_away_from_zero():
    z, smallest = load("a"), np.inf
    for i, (P, *_) in enumerate(projected(z, PROJECTIONS["released"])):
        if i + 1 < len(z["alpha"]):
            r = z.t(f"x{i + 1}").mean(0)
            smallest = min(
                smallest,
                (float(z["alpha"][i + 1]) + torch.outer(P @ r, r)).abs().min().item(),
            )
    close(smallest, z["min_abs_denominator"], 1e-6)


def test_a_balancebenchmark():
    "The raw gradient plus the released projection of it"
    z = load("a")
    for i, (_, grad, _) in enumerate(projected(z, PROJECTIONS["released"])):
        close(grad + (z.t("grad_in")[i] if i else 0), z["bb_grad_out"][i], 1e-8)


# b, c: fusion -------------------------------------------------------------------------


def stacked(z, M):
    return torch.stack([z.t(f"logits{m}") for m in range(M)])


def everyone(logits):
    return torch.ones(logits.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("M", [2, 3])
def test_b_entropy_per_sample(M):
    z = load("b")
    logits = stacked(z, M)
    weights = entropy_rule(logits, everyone(logits))
    close(entropy(logits).T, z[f"sample_entropy_{M}m"])
    close(weights.T, z[f"sample_weights_{M}m"])
    close(fuse(logits, weights), z[f"sample_fused_{M}m"])


@pytest.mark.parametrize("M", [2, 3])
def test_b_entropy_per_batch_as_released(M):
    z = load("b")
    logits = stacked(z, M)
    weights, H = released_gate(logits, everyone(logits), with_entropy=True)
    close(H, z[f"batch_entropy_{M}m"])
    close(weights[:, 0], z[f"batch_weights_{M}m"])
    close(fuse(logits, weights), z[f"batch_fused_{M}m"])
    close(
        released_gate(logits[:, :1], everyone(logits[:, :1]))[:, 0],
        z[f"batch_weights_single_{M}m"],
    )
    half = logits.shape[1] // 2
    halves = torch.cat(
        [
            fuse(part, released_gate(part, everyone(part)))
            for part in (logits[:, :half], logits[:, half:])
        ]
    )
    close(halves, z[f"batch_fused_two_halves_{M}m"])


def test_b_extreme_logits():
    z = load("b")
    logits = torch.stack([z.t("extreme_logits0"), z.t("logits1")])
    assert (
        np.isnan(z["extreme_batch_weights_nan"]).all()
        and released_gate(logits, everyone(logits)).isnan().all()
    )
    weights = entropy_rule(logits, everyone(logits))
    close(entropy(logits).T, z["extreme_sample_entropy"])
    close(weights.T, z["extreme_sample_weights"])
    close(fuse(logits, weights), z["extreme_sample_fused"])


def test_c_fixed():
    z = load("c")
    a, v, t = (z.t(f"logits_{m}") for m in "avt")
    alpha = float(z["av_alpha"])
    for logits, weights, out in (
        (torch.stack([a, v]), (alpha, 1 - alpha), "fused2"),
        (torch.stack([a, v, t]), tuple(z["weights3_a_v_t"].tolist()), "fused3"),
    ):
        close(fuse(logits, FixedWeights(weights)(logits, everyone(logits))), z[out])
    if (alpha, *z["weights3_a_v_t"]) == (0.55, 0.35, 0.25, 0.40):
        close(
            fuse(
                torch.stack([a, v, t]),
                FixedWeights("published")(
                    torch.stack([a, v, t]), everyone(torch.stack([a, v, t]))
                ),
            ),
            z["fused3"],
        )


# d: OGM -------------------------------------------------------------------------------


class Gain(Encoder):
    "An 'encoder' whose only parameter is the 4-D multiplier of the fixture"

    def __init__(self, n):
        super().__init__(n)
        self.gain = nn.Parameter(torch.ones(1, n, 1, 1, dtype=torch.double))

    def forward(self, x):
        return x * self.gain.flatten()


def ogm_case(z, M, case):
    "A learner in the middle of a step, with raw gradients, as the fixture has it"
    mods, pre = "avt"[:M], f"{M}m_case{case}_"
    x = {m: z.t(f"{pre}feat_{m}") for m in mods}
    n, y = x["a"].shape[1], z.t(f"{pre}labels").long()
    net = Net(
        {m: Gain(n) for m in mods},
        ConcatHead(dict.fromkeys(mods, n), len(z[f"b_{M}m"])).double(),
    )
    net.head.out.weight.data, net.head.out.bias.data = z.t(f"W_{M}m"), z.t(f"b_{M}m")
    here = torch.ones(len(y), dtype=torch.bool)
    batch = Batch(x, y, dict.fromkeys(mods, here), torch.arange(len(y)))
    learn = Learner(net, Loaders([batch], [], [], Shuffle(len(y))), Method(ConcatHead))
    learn.epochs, learn.step = 2, 0
    turn = learn.make_turn(batch)
    learn.runtime.backward(learn, turn)
    return learn, turn, pre


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("M", [2, 3])
def test_d_ogm(M, case, monkeypatch):
    z = load("d")
    learn, turn, pre = ogm_case(z, M, case)
    head, y, alpha = learn.net.head, turn.batch.y, float(z["alpha"])
    parts = {m: head.unimodal_logits(m, v) for m, v in turn.features.items()}
    close(learn.net(turn.batch).detach(), z[f"{pre}out_joint"])
    close(
        [
            turn.loss.item(),
            *(nn.functional.cross_entropy(part, y).item() for part in parts.values()),
        ],
        z[f"{pre}loss"],
    )
    for m, part in parts.items():
        close(part.detach(), z[f"{pre}out_{m}"])
        close(true_class(part, y).item() * len(y), z[f"{pre}score_{m}"])
    truth = {m: true_class(part.detach(), y) for m, part in parts.items()}
    k = modulation_coefficients(truth, alpha, "released")
    for m in parts:
        close(k[m], z[f"{pre}coeff_{m}"])
    if M == 2:
        assert k == modulation_coefficients(truth, alpha)
    raw = {m: e.gain.grad.clone() for m, e in learn.net.encoders.items()}
    edit = OGM(alpha, form="released")
    edit.before_fit(learn)
    edit.after_backward(learn, turn)
    for m, e in learn.net.encoders.items():
        close(raw[m], z[f"{pre}grad4d_raw_{m}"])
        close(e.gain.grad, z[f"{pre}grad4d_OGM_{m}"])
        e.gain.grad = raw[m].clone()
    monkeypatch.setattr(
        torch, "randn_like", torch.ones_like
    )  # noise of exactly one standard deviation
    noisy = OGM(alpha, noise=True, form="released")
    noisy.before_fit(learn)
    noisy.after_backward(learn, turn)
    for m, e in learn.net.encoders.items():
        close(
            e.gain.grad - z.t(f"{pre}grad4d_OGM_{m}") - 1e-8,
            np.broadcast_to(z[f"{pre}grad4d_std_{m}"], e.gain.shape),
            1e-7,
        )


# e: QMF -------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["base", "m3ae", "m3ae3"])
def test_e_qmf(branch):
    z, n = load("e"), int(load("e")["n_data"])
    calls, M, B, _ = z[f"{branch}_logits"].shape
    assert (B, calls) == (int(z["batch"]), int(z["epochs"]) * n // B)
    mods, labels = "avt"[:M], z.t(f"{branch}_labels").long()
    loss, kept = QMFLoss("av" if branch == "base" else "m3ae"), {}
    terms = loss.terms
    loss.terms = lambda *a: (
        kept.setdefault("terms", []).append(terms(*a)) or kept["terms"][-1]
    )
    learn = SimpleNamespace(
        net=SimpleNamespace(
            encoders=dict.fromkeys(mods), head=lambda one: next(iter(one.values()))
        ),
        dls=SimpleNamespace(sampler=Shuffle(n)),
        runtime=SimpleNamespace(device=torch.device("cpu")),
    )
    loss.before_fit(learn)
    for i in range(calls):
        idx = z.t(f"{branch}_idx")[i].long()
        logits = z.t(f"{branch}_logits")[i].clone().requires_grad_()
        features = dict(zip(mods, logits))
        here = dict.fromkeys(mods, torch.ones(B, dtype=torch.bool))
        batch = Batch(features, labels[idx], here, idx)
        total = loss(Turn(batch, learn.net, epoch=i * B // n, features=features))
        ces, ranks = kept["terms"][-1]
        conf = confidence(logits.detach())
        fused = (conf[..., None] * logits.detach()).sum(0)
        close(conf, z[f"{branch}_confidence"][i])
        close(fused, z[f"{branch}_fused"][i])
        close(
            [
                nn.functional.cross_entropy(fused, labels[idx]).item(),
                *(c.item() for c in ces.values()),
            ],
            z[f"{branch}_ce_fused_then_each"][i],
        )
        close(
            [r.item() for r in ranks.values()], z[f"{branch}_rank_loss"][i], 1e-6, 1e-6
        )  # its targets are float32
        close(total.item(), z[f"{branch}_total_loss"][i], 1e-6)
        close(
            torch.autograd.grad(total, logits)[0],
            z[f"{branch}_grad_logits"][i],
            1e-6,
            1e-7,
        )
        close(torch.stack(list(loss.history.values())), z[f"{branch}_history"][i])


# f: joint heads -----------------------------------------------------------------------


def test_f_joint_heads():
    z = load("f")
    x = {m: z.t(m).double() for m in "xyz"}
    xy, widths, C = (
        {m: x[m] for m in "xy"},
        dict.fromkeys("xy", x["x"].shape[1]),
        len(z["sum.fc_x.bias"]),
    )

    def fill(layer, name):
        layer.weight.data, layer.bias.data = (
            z.t(f"{name}.weight").double(),
            z.t(f"{name}.bias").double(),
        )

    head = SumHead(widths, C).double()
    for m in "xy":
        fill(head.out[m], f"sum.fc_{m}")
    close(head(xy).detach(), z["sum.out"])
    for name, mods in (("concat", xy), ("concat3", x)):
        head = ConcatHead(dict.fromkeys(mods, 8), C).double()
        fill(head.out, f"{name}.fc_out")
        close(head(mods).detach(), z[f"{name}.out"])
    for by, other in ("xy", "yx"):
        film, gated = (
            FilmHead(widths, C, by).double(),
            GatedHead(widths, C, by).double(),
        )
        fill(film.film[other], f"film_{by}.fc")
        fill(film.out, f"film_{by}.fc_out")
        close(film(xy).detach(), z[f"film_{by}.out"])
        fill(gated.gate, f"gated_{by}.fc_{by}")
        fill(gated.project[other], f"gated_{by}.fc_{other}")
        fill(gated.out, f"gated_{by}.fc_out")
        close(gated(xy).detach(), z[f"gated_{by}.out"])
        close(gated.gate(x[by]).detach(), z[f"gated_{by}.ret_{by}"])
        close(gated.project[other](x[other]).detach(), z[f"gated_{by}.ret_{other}"])


# g, h: encoders -----------------------------------------------------------------------


def plane(tag, B, P, Q):
    w, (b, p, q) = SET["w"], np.ogrid[:B, :P, :Q]
    return (
        (1 + 0.8 * b) * 1.5 * np.sin(w[0] * p * (1 + b) + w[1] * q)
        + 0.5 * np.sin(w[2] * p * q / 100)
        + 0.3 * u(tag, B * P * Q).reshape(B, P, Q)
    ).astype(np.float32)


def clip(tag, B, C, F, H, W):
    w, (b, c, f, h, x) = SET["w"], np.ogrid[:B, :C, :F, :H, :W]
    return (
        (1 + 0.8 * b)
        * 1.2
        * np.sin(w[3] * h * (1 + 0.5 * b) + w[4] * x * (1 + 0.25 * f) + c)
        + 0.3 * u(tag, B * C * F * H * W).reshape(B, C, F, H, W)
    ).astype(np.float32)


def picture(tag, B, H, W):
    return clip(tag, B, 3, 1, H, W)[:, :, 0]


def tokens(z, tag, at=""):
    "Ids and where words are; the padding of the fixture is checked on the way"
    pad, lens = z[f"{at}padding_mask"], (1 - z[f"{at}padding_mask"]).sum(1).astype(int)
    vocab = 30522 if at else int(z["config"][3])
    ids = np.floor((u(tag, pad.size).reshape(pad.shape) + 1) / 2 * vocab).astype(
        np.int64
    ) * (pad == 0)
    assert (ids == z[f"{at}tokens"]).all() and (at or (lens == z["lens"]).all())
    return {"ids": torch.from_numpy(ids), "mask": torch.from_numpy(pad == 0)}


def value(key, shape):
    "One entry of a state dict by the fixtures' rules, first match wins"
    last, n = key.rsplit(".", 1)[-1], int(np.prod(shape))
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    r = u(key, n)
    if last == "running_var":
        r = 1 + 0.5 * r
    elif last == "running_mean":
        r = 0.1 * r
    elif key.endswith("text_embedding.weight"):
        pass
    elif len(shape) == 1:
        r = 1 + 0.2 * r if last == "weight" else 0.05 * r
    elif len(shape) == 3:
        r = 0.3 * r
    else:
        r = r * np.sqrt(3 / np.prod(shape[1:]))
    return torch.from_numpy(r.astype(np.float32).reshape(shape))


def shapes(z, at=""):
    return {
        str(k): tuple(int(n) for n in str(s).split(",") if n)
        for k, s in zip(z[f"{at}keys"], z[f"{at}shapes"])
    }


def filled(z):
    "The state dict of a file, checked against its sums and first values"
    state = {k: value(k, s) for k, s in shapes(z).items()}
    close([v.double().sum() for v in state.values()], z["value_sum"], 1e-9, 1e-7)
    close([v.flatten()[0] for v in state.values()], z["value_first"], 1e-7)
    return {k.removeprefix("module."): v for k, v in state.items()}


def input_check(z, name, x):
    x = np.asarray(x, dtype=np.float64)
    close([x.sum(), (x**2).sum(), x.flat[0], x.flat[-1]], z[name], 1e-6, 1e-5)


def slot(state, model, m, heads=None, dtype=torch.double):
    "The encoder of a slot with its weights"
    part = {
        k.removeprefix(f"{SLOTS[model][m]}."): v
        for k, v in state.items()
        if k.startswith(f"{SLOTS[model][m]}.")
    }
    enc, names = as_ours(part, m, heads)
    return (
        fill(
            enc,
            {
                k: part[v].flatten(1) if k.endswith("patches.weight") else part[v]
                for k, v in names.items()
            },
            m,
        )
        .to(dtype)
        .eval()
    )


@torch.no_grad()
def features(z, state, encs, x, letters, rtol=1e-6):
    "Features and logits of the shared head: as recorded in float64; loosely in float32"
    W, b = (state[f"fusion_module.fc_out.{k}"] for k in ("weight", "bias"))
    found = {}
    for (m, e), letter in zip(encs.items(), letters):
        f = e(x[m] if isinstance(x[m], dict) else x[m].to(next(e.parameters()).dtype))
        found[f"feat_{letter}"], found[f"logits_{letter}"] = (
            f,
            f.double() @ W.double().T + b.double(),
        )
    for k, v in found.items():
        close(v, z[k], rtol, rtol)
    return found


def test_g_resnet18():
    z = load("g")
    state = filled(z)
    assert shapes(z) == released_shapes("av", "gs", 6)
    B, frames = 2, 3
    a, v = (
        torch.from_numpy(plane("audio", B, 257, 188))[:, None],
        torch.from_numpy(clip("visual", B, 3, frames, 224, 224)),
    )
    input_check(z, "audio_check", a)
    input_check(z, "visual_check", v)
    v = v.transpose(1, 2)  # ours: (B,frames,3,H,W)
    encs, stages = {m: slot(state, "av", m) for m in ("audio", "video")}, {}
    for name, net in (
        ("audio_net", encs["audio"].net),
        ("visual_net", encs["video"].net),
    ):
        for s in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
            getattr(net, s).register_forward_hook(
                lambda _, i, o, k=f"{name}.{s}": stages.__setitem__(k, o)
            )
    found = features(z, state, encs, {"audio": a, "video": v}, "av", 1e-9)
    half = features(
        {k: z[k] for k in found},
        state,
        {m: slot(state, "av", m, dtype=torch.float) for m in encs},
        {"audio": a, "video": v},
        "av",
        1e-4,
    )
    for k, limit in zip(
        ("feat_a", "feat_v", "logits_a", "logits_v"), z["max_abs_diff_float32_run"]
    ):
        assert (half[k] - found[k]).abs().max() < 20 * limit
    with torch.no_grad():
        for letter, m, x in (("a", "audio", a), ("v", "video", v)):
            close(encs[m].train()(x.double()), z[f"train_feat_{letter}"], 1e-9)
    # the recorded stages are those of the training pass (the page does not say so)
    close(
        [[stages[k].mean(), stages[k].std(unbiased=False)] for k in z["stage_names"]],
        z["stage_mean_std"],
        1e-8,
    )
    close(encs["audio"].net.bn1.running_mean, z["train_audio_bn1_running_mean_after"])
    close(encs["video"].net.bn1.running_var, z["train_visual_bn1_running_var_after"])


def loose(z, state, model, x, letters, heads, found):
    "The float32 run stays within what theirs does"
    single = features(
        {k: z[k] for k in found},
        state,
        {m: slot(state, model, m, heads, torch.float) for m in x},
        x,
        letters,
        1e-4,
    )
    for k, limit in zip(
        [f"{kind}_{c}" for kind in ("feat", "logits") for c in letters],
        z["max_abs_diff_float32_run"],
    ):
        assert (single[k] - found[k]).abs().max() < 20 * limit


def test_h_m3ae():
    z = load("h_m3ae")
    width, depth, heads, vocab, length, side = (int(n) for n in z["config"])
    state, x = (
        filled(z),
        {
            "text": tokens(z, "tokens"),
            "image": torch.from_numpy(picture("image", 3, side, side)),
        },
    )
    assert (
        z["tokens"].shape == (3, length)
        and len(state["mae_a.text_embedding.weight"]) == vocab
    )
    input_check(z, "image_check", x["image"])
    encs = {m: slot(state, "m3ae", m, heads) for m in x}
    found = features(z, state, encs, x, ("text", "image"))
    loose(z, state, "m3ae", x, ("text", "image"), heads, found)
    with torch.no_grad():
        close(
            encs["text"].net.hidden(text=x["text"])[0][:, 0],
            z["text_hidden_cls"],
            1e-6,
            1e-6,
        )
    close(table(width, len(z["pos1d_first_rows"])), z["pos1d_first_rows"], 1e-6, 1e-6)
    n = len(z["pos2d_first_rows"])
    close(table(width, side // 16, side // 16)[:n], z["pos2d_first_rows"], 1e-6, 1e-6)
    # both inputs through the image transformer, which needs its own words for that
    joint = M3AE(width, depth, heads, vocab=vocab, pool="all").double().eval()
    fill(
        joint,
        {
            renamed(k.removeprefix("mae_v."), M3AE_NAMES): v
            for k, v in state.items()
            if k.startswith("mae_v.")
        },
        "the image transformer",
    )
    with torch.no_grad():
        close(
            pooled(*joint.hidden(x["image"].double(), x["text"]), "all"),
            z["image_and_text_joint_pooled"],
            1e-6,
            1e-6,
        )


def test_h_cavmae():
    z = load("h_cavmae")
    width, own, heads, frames, side = (int(n) for n in z["config"])
    state, a, v = (
        filled(z),
        plane("fbank", 2, frames, 128),
        picture("cavimage", 2, side, side),
    )
    input_check(z, "fbank_check", a)
    input_check(z, "image_check", v)
    x = {
        "audio": torch.from_numpy(a).transpose(1, 2)[:, None],
        "video": torch.from_numpy(v),
    }
    encs = {m: slot(state, "cav", m, heads) for m in x}
    assert len(encs["audio"].net.body.blocks) == own + 1
    loose(z, state, "cav", x, "av", heads, features(z, state, encs, x, "av", 1e-9))
    for letter, grid in (("a", (8, frames // 16)), ("v", (side // 16, side // 16))):
        rows = z[f"init_pos_embed_{letter}_first_rows"]
        close(table(width, *grid)[: len(rows)], rows, 1e-6, 1e-6)


def test_h_modal3():
    z = load("h_modal3")
    heads, side, frames = int(z["config"][2]), int(z["config"][5]), int(z["config"][6])
    state, x = (
        filled(z),
        {
            "audio": torch.from_numpy(plane("fbank3", 3, frames, 128)).transpose(1, 2)[
                :, None
            ],
            "video": torch.from_numpy(picture("image", 3, side, side)),
            "text": tokens(z, "tokens"),
        },
    )
    input_check(z, "fbank_check", x["audio"].squeeze(1).transpose(1, 2))
    input_check(z, "image_check", x["video"])
    loose(
        z,
        state,
        "modal3",
        x,
        "avt",
        heads,
        features(z, state, {m: slot(state, "modal3", m, heads) for m in x}, x, "avt"),
    )


# k: full size -------------------------------------------------------------------------

FULL = [("av", h, 6, f"av_{h}") for h in HEADS] + [
    ("cav", "gs", 6, "cav_gs"),
    ("m3ae", "gs", 3, "m3ae_mvsa_gs"),
    ("m3ae", "qmf", 3, "m3ae_mvsa_qmf_nogs"),
    ("modal3", "gs", 4, "modal3_gs"),
    ("modal3", "qmf", 4, "modal3_qmf_nogs"),
]


@pytest.mark.parametrize("model,head,classes,name", FULL, ids=[f[-1] for f in FULL])
def test_k_names_and_shapes(model, head, classes, name):
    assert shapes(load("k"), f"{name}_") == released_shapes(model, head, classes)


@pytest.mark.slow
def test_k_full_size_checkpoint(tmp_path):
    "Written under the released names, read by load_released: it predicts as theirs"
    z, state = load("k"), {}
    for k, s in shapes(z, "m3ae_mvsa_gs_").items():
        state[k] = value(k, s)
    torch.save(state, tmp_path / "m3ae.pth")
    del state
    net, method, about = load_released(tmp_path / "m3ae.pth")
    (tmp_path / "m3ae.pth").unlink()
    assert (about["model"], about["head"], about["likely"]) == ("m3ae", "gs", "mvsa")
    image = picture("image-base", 2, 256, 256)
    input_check(z, "base_image_check", image)
    x = {"text": tokens(z, "tokens-base", "base_"), "image": torch.from_numpy(image)}
    with torch.no_grad():
        f = {m: e(x[m]) for m, e in net.encoders.items()}
    for m, v in f.items():
        close(v, z[f"base_feat_{m}_f32"], 1e-4, 1e-4)
        with torch.no_grad():
            close(net.head({m: v}), z[f"base_logits_{m}_f32"], 1e-4, 1e-4)


# i: features --------------------------------------------------------------------------


def check_input(z, name, w):
    close(
        [w.astype(np.float64).sum(), (w.astype(np.float64) ** 2).sum(), w[0], w[-1]],
        z[name],
        1e-6,
        1e-6,
    )


def spectrogram(z, name, w):
    "The float64 run within float32 rounding of the input, the float32 run within 1e-5"
    close(log_spectrogram(w.double())[:, ::16], z[f"{name}_f64_every16"], 1e-6, 1e-6)
    close(log_spectrogram(w)[:, ::16], z[f"{name}_every16"], 1e-5, 1e-3)


def test_i_spectrogram_direct():
    z, w = load("i"), wave("wave10s", 160000, 0.35)
    check_input(z, "wave10s_check", w)
    cut = excerpt(torch.from_numpy(w), 5 * 16000)
    assert log_spectrogram(cut).shape == tuple(z["spec_direct_shape"])
    spectrogram(z, "spec_direct", cut)


def test_i_spectrogram_tiled():
    z, w, start = load("i"), wave("wave2s3", 36800, 0.8), int(SET["tile_start"])
    check_input(z, "wave2s3_check", w)
    tiled = tile(torch.from_numpy(w), 10 * 16000)
    assert len(tiled) == int(z["spec_tiled_len"]) and start == int(
        z["spec_tiled_start"]
    )
    assert int((np.abs(w) > 1).sum()) == int(
        z["clipped_samples"]
    )  # of the wave itself, before tiling
    spectrogram(z, "spec_tiled", tiled[start : start + 80000].clamp(-1, 1))
    torch.testing.assert_close(
        excerpt(tiled, 80000, start),
        tiled[start : start + 80000].clamp(-1, 1),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name,n", [("fbank_pad", 40000), ("fbank_cut", 176000)])
def test_i_filter_bank(name, n):
    z, w = load("i"), wave(name.replace("fbank_", "fb"), n, 0.35)
    check_input(z, f"{name}_check", w)
    x = fbank(torch.from_numpy(w))
    assert len(fbank(torch.from_numpy(w), rows=None)) == int(z[f"{name}_frames"])
    close(x[::16], z[f"{name}_every16"], 1e-3, 1e-3)
    close(x.double().sum(), z[f"{name}_sum"], 1e-4)


def test_i_filter_bank_of_a_mixture():
    z, lam = load("i"), float(load("i")["fbank_mix_lambda"])
    a, b = (
        torch.from_numpy(wave(f"mix{k}", n, 0.35)) for k, n in ((1, 40000), (2, 24000))
    )
    a, b = a - a.mean(), b - b.mean()
    mixed = lam * a + (1 - lam) * torch.nn.functional.pad(b, (0, len(a) - len(b)))
    close(fbank(mixed)[::16], z["fbank_mix_every16"], 1e-3, 1e-3)


# j: the alternating loop --------------------------------------------------------------


class DropAfterBatch(Callback):
    "PyTorch before 2.0: gradients are zeroed between turns, gone after a batch"

    def after_step(self, learn, turn):
        learn.opt.zero_grad = lambda: torch.optim.SGD.zero_grad(
            learn.opt, set_to_none=False
        )

    def after_batch(self, learn):
        torch.optim.SGD.zero_grad(learn.opt, set_to_none=True)


class Watch(Callback):
    "Losses per epoch and modality, parameter norm per step, a rate that decays"

    order = 100

    def __init__(self, every, ratio):
        self.every, self.ratio, self.losses, self.norms = (
            every,
            ratio,
            [{"audio": [], "visual": []}],
            [],
        )

    def after_step(self, learn, turn):
        self.losses[-1][turn.modalities[0]].append(turn.loss.item())
        self.norms.append(
            torch.cat([p.detach().flatten() for p in learn.net.parameters()])
            .norm()
            .item()
        )

    def after_epoch(self, learn):
        self.losses.append({"audio": [], "visual": []})
        if (learn.epoch + 1) % self.every == 0:
            for g in learn.opt.param_groups:
                g["lr"] *= self.ratio


def toy(z):
    "The toy encoders and head, at the fixture's starting values"
    encs = {}
    for m, k in (("audio", "a"), ("visual", "v")):
        W, b = z.t(f"init_W{k}"), z.t(f"init_b{k}")
        layers = nn.Sequential(nn.Linear(W.shape[1], W.shape[0]), nn.ReLU()).double()
        layers[0].weight.data, layers[0].bias.data = W.clone(), b.clone()
        encs[m] = ModuleEncoder(layers, W.shape[0])
    net = make_net(SharedHead, encs, len(z["init_b"])).double()
    net.head.out.weight.data, net.head.out.bias.data = (
        z.t("init_W").clone(),
        z.t("init_b").clone(),
    )
    return net


RUNS = {
    "none": [],
    "released_plugin_filter_corrected": [{"denominator": "elementwise", "norm": True}],
    "rls": [{}],
}


@pytest.mark.parametrize("zero", ["setnone", "setzero"])
@pytest.mark.parametrize("projection", RUNS)
def test_j_alternating(projection, zero):
    z = load("j")
    xa, xv, y = z.t("x_a").double(), z.t("x_v").double(), z.t("labels")
    E, N, B = y.shape
    here = torch.ones(B, dtype=torch.bool)
    batches = [
        [
            Batch(
                {"audio": xa[e, i], "visual": xv[e, i]},
                y[e, i],
                {"audio": here, "visual": here},
                torch.arange(B),
            )
            for i in range(N)
        ]
        for e in range(E)
    ]
    grad_transforms = [
        GradProjection(when="update_first", skip=1, **kw) for kw in RUNS[projection]
    ]
    watch = Watch(int(z["lr_decay_step"]), float(z["lr_decay_ratio"]))

    def sgd(params):
        return torch.optim.SGD(
            params,
            lr=float(z["lr"]),
            momentum=float(z["momentum"]),
            weight_decay=float(z["weight_decay"]),
        )

    learn = Learner(
        toy(z),
        Loaders(batches[0], [], [], Shuffle(1)),
        Method(
            SharedHead, alternating("audio,visual"), grad_transforms=grad_transforms
        ),
        sgd,
        [watch, *([DropAfterBatch()] if zero == "setzero" else [])],
    )
    for e in range(E):
        learn.dls.train = batches[e]
        learn.fit(e + 1)
    key, alpha = f"{projection}__{zero}__", float(z["av_alpha"])
    for e in range(E):
        a, v = (np.mean(watch.losses[e][m]) for m in ("audio", "visual"))
        close([alpha * a + (1 - alpha) * v, a, v], z[key + "epoch_losses"][e])
    close(watch.norms, z[key + "params_after_each_step_norm"])
    close(learn.net.encoders["audio"].net[0].weight.detach(), z[key + "final_Wa"], 1e-8)
    close(
        learn.net.encoders["visual"].net[0].weight.detach(), z[key + "final_Wv"], 1e-8
    )
    close(learn.net.head.out.weight.detach(), z[key + "final_W"], 1e-8)
    close(learn.net.head.out.bias.detach(), z[key + "final_b"], 1e-8)
    assert len(z["param_order"]) == len(list(learn.net.parameters()))


# what is left -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_zz_coverage(name, record_property):
    "Every array of every file has been read by a check"
    start, arrays = (
        re.match(r"h_[^_]+|[a-z]", name)[0],
        set(np.load(FIXTURES / name, allow_pickle=False).files),
    )
    if not load(start).used:
        pytest.skip(
            "counts what the tests of this file have read; run them in one process "
            "(-n needs --dist loadfile)"
        )
    missed = sorted(arrays - load(start).used)
    groups = sorted({re.sub(r"\d+$", "*", k) for k in arrays - set(missed)})
    record_property(
        "parity",
        (
            f"checked: {name}: {len(arrays) - len(missed)} of {len(arrays)} arrays: "
            f"{', '.join(groups)}"
        )
        + (f"; not covered: {', '.join(missed)}" if missed else ""),
    )
    assert not missed, f"never read: {missed}"


def weights_of_audio(drift):
    "Before its turn, after it, and after the visual turn"
    torch.manual_seed(0)
    encs = {m: ModuleEncoder(nn.Linear(4, 3), 3) for m in ("audio", "visual")}
    here = {m: torch.ones(6, dtype=torch.bool) for m in encs}
    x = {m: torch.randn(6, 4) for m in encs}
    b = Batch(x, torch.arange(6) % 3, here, torch.arange(6))
    method = mla_released(drift=drift)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
    learn = Learner(
        make_net(method.head, encs, 3),
        Loaders([b], [b], [b], Shuffle(6)),
        method,
        sgd,
    )
    learn.epochs, learn.step = 1, 0
    weight, path = encs["audio"].net.weight, []
    for m in encs:
        path.append(weight.detach().clone())
        learn.one_turn(learn.make_turn(b.only([m])))
    return [*path, weight.detach()]


def test_idle_encoders_drift_as_with_zeroed_gradients():
    "Gradients of zeros: an idle encoder goes on by momentum and weight decay"
    _, own, after = weights_of_audio(False)
    assert after.equal(own)
    start, own, after = weights_of_audio(True)
    by_hand = own + 0.9 * (own - start) - 0.1 * 0.01 * own
    assert torch.allclose(after, by_hand, rtol=0, atol=1e-6)
    assert (after - own).norm() > 0.8 * (own - start).norm()  # nearly as far again


def test_the_gate_takes_the_rows_of_a_training_batch():
    "However many rows are predicted at once, `rows` of them share a weight"
    logits = torch.randn(2, 130, 6)
    here = torch.rand(2, 130) < 0.8
    ours = mla_released(rows=64).rule(logits, here)
    parts = zip(logits.split(64, 1), here.split(64, 1))
    theirs = torch.cat([released_gate(z, p) * p for z, p in parts], 1)
    assert ours.equal(theirs)
    fixed = mla_released("fixed").rule(logits, everyone(logits))
    assert torch.allclose(fixed, torch.tensor([[0.55], [0.45]]).expand(2, 130))
