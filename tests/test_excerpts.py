"""Inputs longer than a net reads: excerpts of sounds, and texts whose ends are cut."""

import csv
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import script

from mla_nb.core import InputError, Modality, discover, encoders
from mla_nb.data.media import audio_features, media_options
from mla_nb.data.own import own, prepare_own
from mla_nb.data.prepared import load_prepared
from mla_nb.encoders.base import check_encoder
from mla_nb.encoders.excerpts import Excerpts, OverExcerpts, over_excerpts
from mla_nb.encoders.hub import HubTokens
from mla_nb.encoders.text import Tokens, train_tokenizer
from mla_nb.features import extract
from mla_nb.missing import draw_item
from mla_nb.predict import load
from mla_nb.reliability import doctor
from mla_nb.runs.run import Run, build, cut_texts, make_dataset, run

torch.set_num_threads(1)
TINY = {"audio": "log_mel", "seconds": 0.5}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Two seconds of noise with a tone somewhere, and words, of which some have many"
    folder, rng, rows = tmp_path_factory.mktemp("long"), np.random.default_rng(0), []
    for k in range(60):
        tone = 0.4 * np.sin(np.arange(32000) * (0.1 + 0.2 * (k % 2)))
        tone[: rng.integers(1, 16000)] = 0
        sf.write(folder / f"{k}.wav", tone + 0.01 * rng.standard_normal(32000), 16000)
        words = " ".join(["good", "bad"][k % 2] for _ in range(40 if k == 8 else 3))
        part = "test" if k > 45 else "valid" if k > 39 else "train"
        row = {"id": f"s{k}", "label": "ab"[k % 2], "audio": f"{k}.wav"}
        rows.append(row | {"text": words, "split": part})
    with open(folder / "long.csv", "w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader(), out.writerows(rows)
    return folder / "long.csv"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("audio", ["spectrogram", "log_mel", "fbank"])
def test_excerpts_go_from_the_first_to_the_last_second(audio):
    o = media_options(audio=audio, seconds=1.0, excerpts=3)
    n = 400 + 1023 * 160 if audio == "fbank" else 16000
    wave = torch.randn(n + 40000, generator=torch.Generator().manual_seed(0)) / 5
    found, one = audio_features(wave, o), {k: o[k] for k in o if k != "excerpts"}
    assert len(found) == 3
    for x, start in zip(found, (0, 20000, 40000)):
        assert x.equal(audio_features(wave[start : start + n], one))
    short = audio_features(wave[:8000], o)
    assert short[0].equal(short[2])
    assert short[0].equal(audio_features(wave[:8000], one))


def test_without_the_option_nothing_is_stored_otherwise():
    assert "excerpts" not in media_options()
    assert "excerpts" not in media_options(excerpts=1)
    for bad in (0, 33):
        with pytest.raises(InputError, match="excerpts"):
            media_options(excerpts=bad)


def test_excerpts_of_no_sound_are_refused(table, here):
    with pytest.raises(InputError, match="excerpts=2: there is no sound"):
        prepare_own(table, "no", columns="text:text", excerpts=2, progress=False)


def config(variant, **more):
    return Run(
        dataset="own", dataset_args=f"variant={variant}", epochs=2, lr=0.003,
        optimizer="adamw", **{"batch_size": 8, "progress": False, "workers": 0, **more},
    )  # fmt: skip


def test_from_a_long_recording_to_a_prediction(table, here):
    flags = ["--audio", "log_mel", "--seconds", 0.5, "--excerpts", 4]
    script("own", "--table", table, *flags)
    s = own(variant="long")
    assert s.modalities["audio"].info["shape"] == [4, 64, 128]
    learn = build(config("long"), s)
    train, test = next(iter(learn.dls.train)), next(iter(learn.dls.test))
    assert train.x["audio"].shape == (8, 1, 64, 128)
    assert test.x["audio"].shape == (14, 4, 64, 128)
    made = run(config("long"))
    p = load(f"runs/{made['id']}")
    enc = p.net.encoders["audio"]
    assert isinstance(enc, OverExcerpts) and isinstance(enc.preprocessor, Excerpts)
    path, item = table.parent / "46.wav", s.test[0]["x"]["audio"]
    assert p.read({"audio": path}, "s46")["audio"].equal(item)
    with torch.inference_mode():
        whole = enc(enc.preprocessor.inputs([item]))[0]
        each = enc.net(enc.net.preprocessor.inputs(list(item)))
    assert whole.allclose(each.mean(0), atol=1e-5)
    paths = [str(table.parent / f"{k}.wav") for k in range(46, 50)]
    alone = torch.stack([p.predict_proba(audio=q) for q in paths])
    assert p.predict_proba(audio=paths).allclose(alone, atol=1e-5)
    extract("data/own-long", run=f"runs/{made['id']}", out="vectors")
    stored = load_prepared("vectors").test[0]["x"]["audio"]
    assert stored.allclose(whole, atol=1e-2)  # 16 bits


def test_every_epoch_draws_by_seed_epoch_and_sample(table, here):
    prepare_own(table, "long", **TINY, excerpts=4, progress=False)
    s = own(variant="long")

    def heard(epoch, batch_size, workers=0):
        learn = build(config("long", batch_size=batch_size, workers=workers), s)
        learn.dls.sampler.epoch, out = epoch, {}
        for b in learn.dls.train:
            out |= dict(zip(b.idx.tolist(), b.x["audio"]))
        return torch.stack([out[i] for i in sorted(out)])

    assert heard(0, 8).equal(heard(0, 20))
    assert heard(0, 8).equal(heard(0, 8, workers=2))
    assert not heard(0, 8).equal(heard(1, 8))
    stored = torch.stack([s.train[i]["x"]["audio"] for i in range(40)])
    drawn = [(stored == heard(k, 8)).all(-1).all(-1).float().argmax(1) for k in (0, 1)]
    assert set(torch.cat(drawn).tolist()) == {0, 1, 2, 3}
    assert 0.1 < (drawn[0] == drawn[1]).float().mean() < 0.45


@pytest.mark.parametrize("name", ["small_audio", "resnet18_audio"])
def test_encoders_over_excerpts_keep_the_contract(name):
    discover()
    mod = Modality("audio", "features", {"shape": [3, 64, 64], "excerpts": 3})
    items = list(torch.randn(6, 3, 64, 64))
    enc = over_excerpts(encoders[name], mod, items)
    check_encoder(enc.eval(), items[:3])
    stored = json.loads(json.dumps(enc.preprocessor.config()))
    again = over_excerpts(encoders[name], mod, preprocessor=stored).eval()
    again.load_state_dict(enc.state_dict())
    x = enc.preprocessor.inputs(items)
    assert again(again.preprocessor.inputs(items)).equal(enc(x))


@pytest.mark.parametrize("feature", ["log_mel", "fbank"])
def test_excerpts_are_drawn_side_by_side(feature):
    shape = [3, 64, 20] if feature == "log_mel" else [3, 20, 64]
    mod = Modality("audio", "features", {"shape": shape, "feature": feature})
    fig, ax = plt.subplots()
    draw_item(ax, torch.randn(shape), mod)
    assert ax.images[0].get_array().shape == (64, 60)
    plt.close(fig)


# texts --------------------------------------------------------------------------------


def test_a_run_says_how_many_texts_it_cuts(table, here, capsys):
    prepare_own(table, "long", **TINY, progress=False)
    made = run(config("long", method="mla", progress=True))
    length = cut_length(made)
    said = f"text: 1 of 40 training samples are longer than {length} tokens"
    assert made["cut_texts"] == [f"{said}; their ends are cut."]
    assert said in capsys.readouterr().out
    assert any(said in f.says for f in doctor([f"runs/{made['id']}"]))


def cut_length(made):
    stored = json.loads(Path(f"runs/{made['id']}/preprocessors.json").read_text())
    return stored["text"]["length"]


def test_only_texts_that_are_longer_count(table, here):
    prepare_own(table, "long", **TINY, progress=False)
    s = make_dataset(config("long"))
    tokens = Tokens().fit(s.train.column("text"))
    for length, n in ((2, 40), (3, 1), (39, 1), (40, 0)):
        tokens.length = length
        found = cut_texts({"text": tokens}, s)
        assert len(found) == (n > 0)
        assert not n or found[0].startswith(f"text: {n} of 40")
    tokens.length = 2
    assert cut_texts({"text": tokens}, s, 10)[0].startswith("text: 10 of 10")


def test_tokenizers_of_the_hub_cut_by_themselves_and_are_asked(table, here):
    prepare_own(table, "long", **TINY, progress=False)
    s = make_dataset(config("long"))
    words = train_tokenizer(s.train.column("text"))
    for length, n in ((2, 40), (3, 1), (40, 0)):
        found = cut_texts({"text": HubTokens(words, length)}, s)
        assert [f.split(" of ")[0] for f in found] == [f"text: {n}"] * (n > 0)
