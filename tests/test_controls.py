"""Controls that the study needs: another step, another rule, another split"""

import numpy as np
import pytest
import torch
from torch import nn

from mla_nb.compare import reopen
from mla_nb.core import Batch, InputError
from mla_nb.data.digits import digits_options, split_rows
from mla_nb.data.synthetic import HEARD, bounds, draw_states, synthetic, turn_knobs
from mla_nb.encoders.base import ModuleEncoder
from mla_nb.evaluation import TemperatureScaled
from mla_nb.heads import make_net
from mla_nb.methods.base import Pred, Turn, answered_by, fuse, scores
from mla_nb.methods.fusion import FixedWeights, make_rule
from mla_nb.methods.mla import mla
from mla_nb.methods.objectives import own_losses, summed
from mla_nb.runs.config import Run
from mla_nb.runs.run import run
from mla_nb.train.checkpoints import epoch_rank
from mla_nb.train.learner import Learner, Loaders, Recorder, Shuffle


def toy(method, seed=0):
    "A net of two modalities, and batches for it"
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    here = torch.ones(12, dtype=torch.bool)
    batches = [
        Batch(
            {m: torch.randn(12, 5, generator=g) for m in ("audio", "text")},
            torch.randint(3, (12,), generator=g),
            {"audio": here, "text": here},
            torch.arange(12) + 12 * k,
        )
        for k in range(3)
    ]
    encs = {m: ModuleEncoder(nn.Linear(5, 6), 6) for m in ("audio", "text")}
    return make_net(method.head, encs, 3), batches


def trained(method, momentum=0.9, epochs=1):
    net, batches = toy(method)

    def sgd(p):
        return torch.optim.SGD(p, lr=0.1, momentum=momentum)

    dls = Loaders(batches, batches, batches, Shuffle(36))
    return Learner(net, dls, method, sgd, [Recorder()]).fit(epochs)


# the projected update ----------------------------------------------------------------


def moved(**options):
    "How far one text turn moves the mean logits of the audio turn before it"
    method = mla(**options)
    net, batches = toy(method)
    method.grad_transforms[0].lam = lambda step, steps: 1e-3
    opt = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    W, out = net.head.out.weight, []
    for m in ("audio", "text", "text"):
        turn = Turn(batches[0].only([m]), net, step=0, steps=3)
        turn.features = net.features(turn.batch)
        if m == "audio":
            mean = turn.features[m].detach().mean(0)
        opt.zero_grad()
        own_losses(turn)[m].backward()
        before = W.detach().clone()
        for t in method.grad_transforms:
            t.after_backward(None, turn)
        opt.step()
        for t in method.grad_transforms:
            t.after_step(None, turn)
        out.append(((W.detach() - before) @ mean).norm().item())
    return out[1:]  # of the text turns


def test_momentum_passes_a_projected_gradient_but_not_a_projected_update():
    gradient, update = moved(), moved(on="update")
    assert max(update) < 0.1 * max(gradient)


def test_the_update_is_projected_with_a_factor_as_with_a_matrix():
    assert moved(on="update") == pytest.approx(moved(on="update", rank=40), abs=1e-5)


@pytest.mark.parametrize("wrong", [{"rescale": True}, {"when": "update_first"}])
def test_an_update_cannot_be_stretched_or_remembered_first(wrong):
    with pytest.raises(InputError, match="leave them out"):
        mla(on="update", **wrong)
    with pytest.raises(InputError, match="did you mean 'update'"):
        mla(on="updates")


# the step without turns --------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_summed_takes_the_gradient_that_turns_would_add_up(shared):
    method = summed(shared=shared)
    net, [b, *_] = toy(method)
    turn = Turn(b, net, features=net.features(b))
    sum(own_losses(turn).values()).backward()
    whole = {k: p.grad.clone() for k, p in net.named_parameters()}
    net.zero_grad()
    for m in ("audio", "text"):
        part = Turn(b.only([m]), net)
        part.features = net.features(part.batch)
        own_losses(part)[m].backward()
    for k, p in net.named_parameters():
        assert torch.allclose(p.grad, whole[k], atol=1e-6), k
    assert trained(summed(shared=shared)).history[0]["valid"]["accuracy"]["fused"] > 0


# rules -------------------------------------------------------------------------------


def answers(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, n, 3, generator=g)
    here = torch.ones(2, n, dtype=torch.bool)
    y = torch.where(torch.arange(n) % 2 == 0, logits[0].argmax(1), logits[1].argmax(1))
    return Pred(["audio", "text"], logits, logits[0], None, here, y, torch.arange(n))


def test_a_rule_learns_from_one_half_of_validation_and_is_scored_on_the_other():
    "Even samples follow audio, odd ones text: what the even ones teach is wrong there"
    learn = trained(mla(rule=FixedWeights()))
    p = answers()
    learn.predictions = lambda dl: p
    seen = learn.validate()
    assert learn.method.rule.weights[0] > learn.method.rule.weights[1]
    assert seen.idx.tolist() == list(range(1, 40, 2))
    assert (seen.fused.argmax(1) == seen.y).double().mean() < 0.9
    everything = learn.fit_rule()
    assert len(everything.y) == 40


def test_a_single_validation_sample_cannot_be_halved():
    learn = trained(mla(rule=FixedWeights()))
    p = answers(1)
    learn.predictions = lambda dl: p
    assert len(learn.validate().y) == 1


def test_scaled_logits_are_what_is_summed():
    p, t = answers(), (3.0, 0.5)
    own = answered_by(TemperatureScaled("entropy", t), p)
    both = answered_by(TemperatureScaled("entropy", t, sums=True), p)
    scaled = p.logits / torch.tensor(t)[:, None, None]
    by_hand = fuse(scaled, own.weights)
    cosine = torch.cosine_similarity(by_hand, both.fused, 1)
    assert torch.allclose(cosine, torch.ones(40), atol=1e-5)
    assert not torch.allclose(own.weights, both.weights)
    with pytest.raises(InputError, match="temperature=sum"):
        TemperatureScaled("mean")
    fitted = TemperatureScaled("mean", sums=True).fit(p)
    assert fitted.sums and len(fitted.temperatures) == 2


def test_the_best_modality_is_chosen_on_what_the_rule_saw():
    p = answers()
    text = p.select_rows(p.idx % 2 == 1)
    assert make_rule("best").fit(text).weights == (0.0, 1.0)
    rule = make_rule("probabilities")
    gone = torch.tensor([[True], [False]]).expand(2, 40)
    alone = rule.combine(p.logits, rule(p.logits, gone))
    assert torch.allclose(alone.softmax(-1), p.logits[0].softmax(-1), atol=1e-6)
    nothing = torch.zeros(2, 40, dtype=torch.bool)
    assert not rule.combine(p.logits, rule(p.logits, nothing)).any()


# epochs and splits -------------------------------------------------------------------


def test_of_equal_epochs_the_later_one_is_better_whatever_its_loss():
    def row(epoch, loss):
        scores = {"accuracy": {"fused": 1.0}, "loss": {"fused": loss}}
        return {"epoch": epoch, "valid": scores}

    assert epoch_rank(row(7, 0.9)) > epoch_rank(row(3, 0.1))


@pytest.mark.parametrize("xor", [0.0, 0.3, 1.0])
def test_bayes_accuracy_of_moods_that_are_shown_together(xor):
    k, rng = turn_knobs("combined", xor=xor), np.random.default_rng(0)
    y = rng.integers(0, 6, 200_000)
    shown = k.shown(y, rng)
    states = {m: draw_states(shown[m], k.table(m), rng) for m in HEARD}
    n = 7
    both = k.tables(["audio", "visual"])
    together = both[0] if xor else (both[0][:, :, None] * both[1][:, None])
    together = together.reshape(6, n, n)[:, states["audio"], states["visual"]]
    right = (together.argmax(0) == y).mean()
    assert abs(right - bounds(k)["audio+visual"]) < 0.004
    if xor == 1:
        assert abs(bounds(k)["visual"] - 1 / 6) < 1e-9


def test_a_knob_of_zero_changes_no_sample():
    a, b = (synthetic(n_train=5, n_valid=2, n_test=5, **o) for o in ({}, {"xor": 0.0}))
    assert all(
        torch.equal(p, q) for p, q in zip(a.test.x["visual"], b.test.x["visual"])
    )


def test_one_speaker_tests_and_another_one_validates():
    rows = [
        (f"{d}_{s}_{i}.wav", d, s, i) for d in range(2) for s in "abc" for i in (0, 1)
    ]
    parts = split_rows(rows, "one_out", speaker="c")
    who = {k: {r[2] for r in v} for k, v in parts.items()}
    assert who == {"train": {"b"}, "valid": {"a"}, "test": {"c"}}
    for wrong in ({"split": "one_out"}, {"split": "speaker", "speaker": "c"}):
        with pytest.raises(InputError, match="one speaker"):
            digits_options(**wrong)


def test_a_finished_run_with_published_weights_answers(tmp_path):
    cfg = Run(
        dataset_args="n_train=48,n_valid=24,n_test=24",
        method="mla_released",
        method_args="fusion=fixed",
        epochs=1,
        root=str(tmp_path),
        progress=False,
    )
    r = run(cfg)
    assert r["weights"] == "published"
    learn, _ = reopen(cfg.folder, device="cpu")
    again = scores(learn.predictions(learn.dls.test))["accuracy"]
    assert again == r["test"]["accuracy"]
