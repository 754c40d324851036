"""Things to touch, without a browser.

The widgets hold PNG pictures and WAV sounds: a test can turn a knob and look.
"""

import io
import json
import shutil
import wave

import numpy as np
import pytest
import torch

pytest.importorskip("ipywidgets")
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from mla_nb.compare import browse_runs, facts, plot_runs, side_by_side
from mla_nb.core import InputError, Modality, Samples, Splits, discover, encoders
from mla_nb.data.synthetic import (
    Knobs,
    bounds,
    play_knobs,
    plot_knobs,
    synthetic,
    turn_knobs,
)
from mla_nb.heads import SharedHead, make_net
from mla_nb.methods.base import Callback, Method, concat
from mla_nb.methods.fusion import four_answers, play_fusion, plot_fusion
from mla_nb.methods.projection import play_projection, plot_projection, remember, unit
from mla_nb.missing import (
    asker,
    browse_samples,
    draw_item,
    opinions,
    plot_sample,
    sonify,
    sound,
    wav,
)
from mla_nb.runs.run import Run, run
from mla_nb.train.learner import Learner, Recorder, _toy
from mla_nb.train.loaders import Loaders, Shuffle
from mla_nb.train.watching import LiveView, plot_live
from mla_nb.widgets import play, png, slider

discover()


@pytest.fixture(autouse=True)
def nothing_stays_open():
    "Widgets leave no figure behind; what a test itself drew is closed here"
    yield
    plt.close("all")


def parts(box):
    "Controls by description, the sentence, the picture of what `play` made"
    controls, note, picture = box.children
    return {c.description: c for c in controls.children}, note, picture


def turn(box, label, value):
    "Turn a knob; the picture must follow, and no figure may stay open"
    knobs, note, picture = parts(box)
    old, here = picture.value, plt.get_fignums()
    knobs[label].value = value
    assert picture.value != old, f"{label} moves nothing"
    assert (
        bytes(picture.value).startswith(b"\x89PNG")
        and not note.value
        and plt.get_fignums() == here
    )


# core: what all of them are made of ---------------------------------------------------


def dots(n):
    plt.figure(figsize=(2, 1))
    plt.plot(range(n), "o")


def test_png_closes_its_own_figures_only_also_when_drawing_fails():
    plt.close("all")  # those of other tests
    mine = plt.figure()
    assert png(dots, n=3) != png(dots, n=4)

    def breaks():
        plt.figure()
        raise InputError("no")

    with pytest.raises(InputError):
        png(breaks)
    assert plt.get_fignums() == [mine.number]


def test_png_is_not_interrupted_by_jupyter(monkeypatch):
    """While we draw, both of Jupyter's hooks are off, and on again afterwards.

    A click in another thread would make it show every open figure.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib_inline.backend_inline import flush_figures

    shell = InteractiveShell.instance()
    try:
        shell.events.register("post_execute", flush_figures)
        plt.ion()

        def on():
            return sorted(
                f.__name__
                for f in shell.events.callbacks["post_execute"]
                if f.__name__ in ("flush_figures", "_draw_all_if_interactive")
            )

        seen = []
        before = on()
        png(lambda: (dots(2), seen.extend(on())))
        assert "flush_figures" in before and seen == [] and on() == before
    finally:
        plt.ioff()
        shell.events.unregister("post_execute", flush_figures)
        InteractiveShell.clear_instance()


def test_sliders_speak_when_let_go():
    a, b = slider("a", 0.5, 0.0, 1.0), slider("b", 2, 0, 9, 1)
    assert not a.continuous_update and not b.continuous_update
    assert type(a.value) is float and type(b.value) is int and a.description == "a"


def test_nonsense_is_answered_in_one_escaped_sentence_and_the_picture_stays():
    def draw(n):
        if n > 3:
            raise InputError("<n> must be at most 3.")
        dots(n)

    box = play(draw, n=slider("n", 2, 0, 9, 1))
    turn(box, "n", 3)
    knobs, note, picture = parts(box)
    old = picture.value
    knobs["n"].value = 5
    assert (
        "&lt;n&gt; must be at most 3." in note.value
        and "<n>" not in note.value
        and picture.value == old
    )
    knobs["n"].value = 1
    assert not note.value and picture.value != old


def test_errors_of_ours_are_not_hidden():
    def draw(n):
        return 1 / n

    with pytest.raises(ZeroDivisionError):
        play(draw, n=slider("n", 0, 0, 9, 1))


def test_two_widgets_do_not_know_each_other():
    one, two = play_projection(), play_projection()
    old = parts(two)[2].value
    turn(one, "turns", 5)
    assert parts(two)[2].value == old


# 01: what modalities say, and the bound -----------------------------------------------


def test_every_knob_moves_the_bound():
    box = play_knobs()
    for m in ("audio", "visual", "text"):
        turn(box, f"{m}, expressed", 0.4)
        turn(box, f"{m}, blank", 0.5)
    knobs, note, picture = parts(box)
    old = picture.value
    knobs["audio, blank"].value = 1.0
    assert "at most 1" in note.value and picture.value == old
    with pytest.raises(InputError, match="did you mean 'lazy'"):
        play_knobs("lasy")


def test_knobs_are_drawn_as_they_are():
    k = turn_knobs("lazy", text_expressed=0.3, text_blank=0.65)
    says, bound = plot_knobs(k)
    assert np.allclose(
        [p.get_width() for p in says.patches],
        [0.75, 0.20, 0.05, 0.80, 0.15, 0.05, 0.30, 0.65, 0.05],
    )
    assert np.allclose([p.get_width() for p in bound.patches], list(bounds(k).values()))
    assert np.allclose(
        [line.get_xdata()[0] for line in bound.lines], list(bounds(Knobs()).values())
    )  # ticks: as it was
    assert bounds(k)["text"] == pytest.approx(0.3 + 0.65 / 6) and len(bounds(k)) == 7


# 10: the plane ------------------------------------------------------------------------


def test_every_knob_moves_the_projection():
    box = play_projection()
    for label, value in (
        ("audio, degrees", -40.0),
        ("gradient, degrees", 10.0),
        ("λ", 1.0),
        ("turns", 4),
        ("visual, degrees", 0.0),
    ):
        turn(box, label, value)


def drawn(ax):
    return {
        q.get_label(): np.array([q.U, q.V]).ravel()
        for q in ax.collections
        if hasattr(q, "U")
    }


def test_the_arrows_are_where_they_should_be():
    a = drawn(plot_projection(audio=0.0, visual=90.0, gradient=45.0, lam=1e-4, turns=1))
    assert (
        np.allclose(a["g P"], [0, 0.5**0.5], atol=1e-3)
        and np.allclose(a["g"], [0.5**0.5, 0.5**0.5])
        and "visual (no turn yet)" in a
    )
    b = drawn(plot_projection(audio=0.0, visual=90.0, gradient=45.0, lam=1e-4, turns=2))
    assert np.abs(b["g P"]).max() < 1e-3 and "visual" in b
    c = drawn(plot_projection(turns=0))
    assert np.allclose(c["g P"], c["g"])
    assert torch.allclose(
        remember([unit(0), unit(90)], 2, 1.0), torch.eye(2) / 2, atol=1e-6
    )


@pytest.mark.parametrize(
    "kw", [{"lam": 0.0}, {"lam": -1.0}, {"turns": -1}, {"turns": 1.5}]
)
def test_the_plane_refuses_nonsense(kw):
    with pytest.raises(InputError, match=f"{next(iter(kw))}=") as e:
        plot_projection(**kw)
    assert str(e.value).count("\n") == 0


# 11: four rules -----------------------------------------------------------------------


@pytest.mark.parametrize("mods", [("audio", "visual"), ("audio", "visual", "text")])
def test_every_knob_moves_the_fusion(mods):
    box = play_fusion(mods)
    for m in mods:
        for c in "ABC":
            turn(box, f"{m}, {c}", -1.5)
        turn(box, f"{m} is there", False)  # in the end nobody is there
    assert len(parts(box)[0]) == 4 * len(mods)


def test_four_answers_by_hand():
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
    four = four_answers(logits)
    H = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(four["entropy"][0], (-H).softmax(0)) and torch.allclose(
        four["mean"][1], logits.mean(0).softmax(0)
    )
    assert list(four) == ["mean", "fixed", "entropy", "energy"]
    for w, p in four.values():
        assert w.sum() == pytest.approx(1, abs=1e-5) and p.sum() == pytest.approx(
            1, abs=1e-5
        )
    for w, p in four_answers(logits, [False, False]).values():
        assert not w.any() and torch.allclose(p, torch.full((3,), 1 / 3))


def test_fusion_is_drawn_as_it_is():
    answers, rules = plot_fusion([[2.0, 0, 0], [0, 1, 0]], [True, False])
    assert [t.get_text() for t in answers.get_legend().get_texts()] == [
        "audio, entropy 0.67",
        "visual, absent",
    ]
    assert [p.get_width() for p in rules.patches] == [1, 0] * 4 and all(
        t.get_text().startswith("A") for t in rules.texts
    )
    assert [
        t.get_text() for t in plot_fusion(torch.zeros(2, 3), [False, False])[1].texts
    ] == ["nobody"] * 4


@pytest.mark.parametrize("n", [1, 4])
def test_fusion_wants_two_or_three(n):
    with pytest.raises(InputError, match="2 or 3"):
        play_fusion("abcd"[:n])
    with pytest.raises(InputError, match=f"for {n} modalities"):
        four_answers(torch.zeros(n, 3))


# 06: watching and stopping ------------------------------------------------------------


class Press(Callback):
    "Presses Stop (or sets the flag) in a batch of an epoch"

    order = 50

    def __init__(self, epoch, step):
        self.at = epoch, step

    def after_batch(self, learn):
        if (learn.epoch, learn.step) != self.at:
            return
        views = [c for c in learn.callbacks if isinstance(c, LiveView)]
        views[0].button.click() if views else setattr(learn, "stop", True)


def toy(*cbs, batches=4, method=None):
    b, encs = _toy(("audio", "visual"), 24, 0)
    torch.manual_seed(0)
    method = method or concat()
    return Learner(
        make_net(method.head, encs, 3),
        Loaders([b] * batches, [b], [b], Shuffle(24)),
        method,
        callbacks=cbs,
    )


def test_stop_keeps_what_was_learned_and_counts_whole_epochs_only():
    class Steps(Callback):
        n = 0

        def after_step(self, learn, turn):
            Steps.n += 1

    learn = toy(Steps(), Press(2, 1)).fit(6)
    assert (learn.epoch, len(learn.history), learn.stop, Steps.n) == (
        2,
        2,
        True,
        2 * 4 + 2,
    )
    same = toy().fit(2)
    assert any(
        not p.equal(q) for p, q in zip(learn.net.parameters(), same.net.parameters())
    )  # two more steps are in it
    learn.callbacks = []
    assert learn.fit(6).epoch == 6 and not learn.stop  # and on it goes


def test_stop_in_the_last_batch_of_an_epoch_loses_nothing():
    learn = toy(Recorder(1), Press(1, 3)).fit(6)
    assert (learn.epoch, len(learn.history)) == (2, 2)


def test_stop_after_an_epoch():
    class Enough(Callback):
        def after_epoch(self, learn):
            learn.stop = learn.epoch == 2

    assert toy(Enough()).fit(9).epoch == 3


def test_without_stop_nothing_is_different():
    a, b = toy().fit(3), toy(Press(9, 9)).fit(3)
    for p, q in zip(a.net.parameters(), b.net.parameters()):
        assert p.equal(q)


def test_live_view_draws_after_every_epoch_and_its_button_stops(capsys):
    pictures = []

    class Look(Callback):
        order = 45

        def after_epoch(self, learn):
            pictures.append(bytes(view.picture.value))

    view = LiveView({("audio",): 0.9})
    learn = toy(Recorder(1), view, Look(), Press(2, 0)).fit(5)
    assert (
        learn.epoch == 2
        and len(set(pictures)) == 2
        and pictures[0].startswith(b"\x89PNG")
    )
    assert (
        view.button.disabled
        and view.note.value == "stopped after 2 of 5 epochs"
        and view.bar.value == 9
        and view.bar.max == 20
    )
    learn.callbacks = [c for c in learn.callbacks if not isinstance(c, Press)]
    learn.fit(5)
    assert (
        view.note.value == "done after 5 of 5 epochs"
        and view.bar.value == 20
        and not plt.get_fignums()
    )


def test_live_view_wants_a_recorder():
    with pytest.raises(InputError, match=r"put a Recorder\(\)"):
        toy(LiveView()).fit(1)


def test_live_picture_shows_the_last_epoch():
    learn = toy(Recorder(1)).fit(3)
    now, curves, grads = plot_live(learn.history, {("audio",): 0.9})
    assert [b.get_height() for b in now.patches] == list(
        learn.history[-1]["valid"]["accuracy"].values()
    ) and now.get_title() == "epoch 3"
    assert (
        len(curves.lines) == 3 + 1
        and len(grads.lines) == 2
        and len(curves.lines[0].get_xdata()) == 3
    )


# 13: samples --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s():
    return synthetic(n_train=40, n_valid=10, n_test=12)


@pytest.fixture(scope="module")
def ask(s):
    torch.manual_seed(0)
    method = Method(
        SharedHead, rule=lambda logits, present: present / present.sum(0).clamp(min=1)
    )
    encs = {
        m: encoders[f"small_{mod.kind}"](mod, s.train.column(m))
        for m, mod in s.modalities.items()
    }
    return asker(make_net(SharedHead, encs, 6).eval(), method)


def heard(data):
    with wave.open(io.BytesIO(data)) as f:
        return (
            f.getframerate(),
            f.getnframes(),
            np.frombuffer(f.readframes(f.getnframes()), "<i2"),
        )


def test_samples_are_seen_heard_hidden_and_asked_about(s, ask):
    box = browse_samples(s, ask)
    top, ear = box.children
    assert heard(ear.value)[:2] == (8000, 4800) and not ear.autoplay and not ear.loop
    old = ear.value
    turn(top, "sample", 3)
    assert ear.value != old
    turn(top, "split", "train")
    for m in s.modalities:
        turn(top, f"show {m}", False)  # in the end nothing is shown
    assert ear.layout.display == "none"
    turn(top, "show audio", True)
    assert ear.layout.display == "" and heard(ear.value)[0] == 8000


def test_browsing_needs_no_net_and_a_split_that_exists(s):
    turn(
        browse_samples(s).children[0], "sample", 39
    )  # of 12 test samples: counted round
    with pytest.raises(InputError, match="did you mean 'valid'"):
        browse_samples(s, split="valdi")


def test_what_is_hidden_is_not_heard_by_the_net(s, ask):
    item = s.test[0]

    def hidden(*gone):
        return {
            **item,
            "x": {m: None if m in gone else v for m, v in item["x"].items()},
        }

    said = opinions(ask(hidden("audio")), s.classes)
    assert (
        said["audio"] is None
        and said["fused"][0] in s.classes
        and 0 < said["fused"][1] <= 1
    )
    assert said["visual"] == opinions(ask(item), s.classes)["visual"]
    assert set(opinions(ask(hidden(*s.modalities)), s.classes).values()) == {None}
    axs = plot_sample(hidden("audio"), s, ask(hidden("audio")))
    assert [t.get_text() for t in axs[0].texts] == ["absent"] and axs[-1].texts[
        0
    ].get_text() == "–"
    assert len(plot_sample(item, s)) == 3


STORED = {
    "log_mel": ((32, 20), 1.0),
    "spectrogram": ((129, 50), 2.0),
    "fbank": ((98, 64), 0.98),
}


@pytest.mark.parametrize("feature", STORED)
def test_stored_features_and_frames_can_be_browsed(feature):
    "What prepared media hold: no waveform any more, several frames, gaps"
    shape, seconds = STORED[feature]
    mods = {
        "audio": Modality(
            "audio",
            "features",
            {
                "shape": list(shape),
                "feature": feature,
                "rate": 8000,
                "seconds": 2.0 if feature == "spectrogram" else 1.0,
            },
        ),
        "video": Modality("video", "frames"),
        "text": Modality("text", "text"),
    }
    g = torch.Generator().manual_seed(0)
    part = Samples(
        {
            "audio": [torch.randn(shape, generator=g), None],
            "video": [
                None,
                torch.randint(255, (3, 3, 16, 16), generator=g, dtype=torch.uint8),
            ],
            "text": ["a " * 200, ""],
        },
        [0, 1],
    )
    box = browse_samples(Splits("made", ["a", "b"], mods, part, part, part))
    top, ear = box.children
    rate, n, x = heard(ear.value)
    assert rate == 8000 and n == pytest.approx(seconds * rate, abs=1) and x.std() > 100
    turn(top, "sample", 1)
    assert ear.layout.display == "none"  # absent: nothing to hear


@pytest.mark.parametrize("mel", [True, False])
def test_a_loud_row_is_heard_at_its_frequency(mel):
    x = torch.full((24, 30), -12.0)
    x[15] = 0
    w = sonify(x, 1.0, 8000, mel)
    mels = 2595 * np.log10(1 + 4000 / 700) * 16 / 25
    assert np.abs(np.fft.rfft(w)).argmax() == pytest.approx(
        700 * (10 ** (mels / 2595) - 1) if mel else 4000 * 16 / 25, abs=2
    )
    x[:] = -12
    x[15, :15] = 0  # loud in the first half only
    w = sonify(x, 1.0, 8000, mel)
    assert np.abs(w[:3000]).max() > 20 * np.abs(w[5000:]).max()


def test_only_sound_is_heard_and_silence_is_no_error(s):
    assert (
        sound("a", s.modalities["text"]) is None
        and sound(None, s.modalities["audio"]) is None
    )
    assert not heard(wav(torch.zeros(100), 8000))[2].any()
    assert np.abs(heard(wav([0.0, -5.0, 2.0], 8000))[2]).max() == 30000  # any scale


def test_items_are_drawn(s):
    for form, item, drawn in (
        (Modality("image", "image"), s.test[0]["x"]["visual"], "images"),
        (s.modalities["audio"], s.test[0]["x"]["audio"], "images"),
        (s.modalities["text"], "hello", "texts"),
        (s.modalities["text"], None, "texts"),
    ):
        ax = plt.figure().add_subplot()
        draw_item(ax, item, form)
        assert len(getattr(ax, drawn)) == 1


# 15: runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for method in ("concat", "mla"):
        run(
            Run(
                dataset_args="n_train=48,n_valid=20,n_test=24",
                method=method,
                epochs=2,
                root=str(root),
                progress=False,
                device="cpu",
                threads=1,
            )
        )
    return root


def folders(runs):
    return sorted(p.parent for p in runs.rglob("result.json"))


def test_runs_are_browsed(runs):
    box = browse_runs(runs)
    top, about = box.children
    names = dict(parts(top)[0]["run"].options)
    assert list(names.values()) == [str(f) for f in folders(runs)]
    assert "<b>" not in about.value and "concat" in about.value
    turn(top, "run", str(folders(runs)[1]))
    assert "mla" in about.value and "concat" not in about.value
    turn(top, "beside", str(folders(runs)[0]))
    assert "<b>method" in about.value and "concat" in about.value
    turn(top, "show", "samples")


def test_two_runs_side_by_side(runs):
    axs = plot_runs(folders(runs))
    assert axs.shape == (2, 4) and axs[0, 1].get_ylim() == axs[1, 1].get_ylim()
    told = facts(folders(runs)[0])
    assert (
        told["method"] == "concat"
        and told["dataset_args"] == "n_train=48, n_valid=20, n_test=24"
        and 0 <= told["test fused"] <= 1
    )
    html = side_by_side(folders(runs))
    assert html.index("<b>method") < html.index("<td>dataset<") and html.count(
        "<tr>"
    ) == len(told)


def test_names_in_a_table_are_escaped(runs, tmp_path):
    bad = shutil.copytree(folders(runs)[0], tmp_path / "bad")
    about = json.loads((bad / "config.json").read_text())
    about["run"]["dataset_args"] = {"preset": "<script>alert(1)</script>"}
    (bad / "config.json").write_text(json.dumps(about))
    assert "<script>" not in side_by_side([bad])


def test_a_run_that_cannot_be_drawn_is_named(runs, tmp_path):
    with pytest.raises(
        InputError, match="no finished run there; make some with mla train"
    ):
        browse_runs(tmp_path)
    for lost in ("metrics.jsonl", "predictions.safetensors"):
        bad = shutil.copytree(folders(runs)[0], tmp_path / lost / "bad")
        (bad / lost).unlink()
        with pytest.raises(InputError, match=f"bad: {lost} is missing"):
            plot_runs([bad])
        assert (
            f"{lost} is missing"
            in parts(browse_runs(tmp_path / lost).children[0])[1].value
        )  # in the widget: a sentence
    (bad / "config.json").write_text("{")
    with pytest.raises(InputError, match="choose another run"):
        facts(bad)


def test_samples_of_a_dataset_that_is_gone(runs, tmp_path):
    "The folder's pictures are still there; its samples are not, and a sentence says so"
    bad = shutil.copytree(folders(runs)[0], tmp_path / "runs/bad")
    about = json.loads((bad / "config.json").read_text())
    about["run"].update(dataset="digits", dataset_args={})
    (bad / "config.json").write_text(json.dumps(about))
    box = browse_runs(tmp_path / "runs", data=tmp_path / "nothing")
    knobs, note, picture = parts(box.children[0])
    old = picture.value
    knobs["show"].value = "samples"
    assert (
        note.value.startswith("<b>") and "digits" in note.value and picture.value == old
    )
