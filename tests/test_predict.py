"""Prediction on one's own files, read as training read them.

Any subset, one or many, in tables, from the command line, and as an exported graph.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import POINTER, ROOT

from mla_nb import export as X
from mla_nb.cli import main as mla
from mla_nb.core import InputError, UnknownName, discover, rules
from mla_nb.data.cremad import cremad_rows, prepare_cremad
from mla_nb.data.decode import encode_image
from mla_nb.data.digits import prepare_digits, read_archive
from mla_nb.data.iemocap import iemocap_rows, prepare_iemocap
from mla_nb.data.miniature import miniature
from mla_nb.data.mvsa import mvsa_rows, prepare_mvsa
from mla_nb.data.own import (
    kinetics_rows,
    own_example,
    prepare_kinetics,
    prepare_own,
    read_table,
)
from mla_nb.encoders.base import Encoder
from mla_nb.evaluation import TemperatureScaled
from mla_nb.export import check_export, export_onnx, export_program
from mla_nb.heads import make_net
from mla_nb.methods.fusion import FixedWeights, make_rule
from mla_nb.predict import Classifier, load
from mla_nb.predict_table import predict_table
from mla_nb.runs.run import Run, make_dataset, run
from mla_nb.train.checkpoints import load_pred

TINY = {
    "dataset_args": {"n_train": 64, "n_valid": 32, "n_test": 48},
    "epochs": 1,
    "progress": False,
}
MEDIA = {"audio": "log_mel", "seconds": 1.0, "size": 24, "progress": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def moods(root):
    "A run on the synthetic data, and its test split"
    cfg = Run(**TINY, root=str(root / "runs"), name="moods")
    run(cfg)
    return cfg.folder, make_dataset(cfg)


@pytest.fixture(scope="module")
def p(moods):
    return load(moods[0])


@pytest.fixture(scope="module")
def s(moods):
    return moods[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def files(here, s):
    "A voice, a face and a table of six of them"
    rows = []
    for i in range(6):
        sf.write(f"{i}.wav", s.test.x["audio"][i].numpy(), 8000, subtype="FLOAT")
        Path(f"{i}.png").write_bytes(encode_image(s.test.x["visual"][i]))
        rows.append(
            {
                "id": f"s{i}",
                "audio": f"{i}.wav",
                "visual": f"{i}.png",
                "text": s.test.x["text"][i],
                "label": s.classes[s.test.y[i]],
            }
        )
    table(rows)
    return rows


def table(rows, name="t.csv"):
    with open(name, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader(), out.writerows(rows)


def answers(path):
    "What was written, row by row"
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def says(*argv):
    "What `mla predict` ends with"
    with pytest.raises(SystemExit) as e:
        mla(["predict", *map(str, argv)])
    assert str(e.value).startswith("mla predict: ") and "\n" not in str(e.value)
    return str(e.value)


# ---- the same items as in training ----


def rows_of(name, raw):
    "Sources per sample of a miniature, as the preparation names them"
    rows = {
        "cremad": cremad_rows,
        "kinetics": kinetics_rows,
        "mvsa": mvsa_rows,
        "iemocap": iemocap_rows,
    }.get(name, read_table)(raw)
    out = {}
    for r in rows:
        one = {m: r[m] for m in ("audio", "image", "text") if r.get(m) is not None}
        if r.get("text_file"):
            one["text"] = Path(r["text_file"])
        if r.get("video"):
            one["video"] = (
                {"path": r["video"], "span": r["span"], "crop": r["crop"]}
                if r.get("span")
                else r["video"]
            )
        out[r["id"]] = one
    return out


@pytest.mark.parametrize("name", ["cremad", "kinetics", "mvsa", "iemocap", "own"])
def test_a_raw_file_becomes_the_prepared_item(name, root):
    """Bit by bit the items of the prepared dataset, hence the run's own predictions.

    Frames, JPEG, float16 and cuts are included.
    """
    data = root / "data"
    if name == "own":
        raw = own_example(root / "raw/own", 72)
    else:
        raw = miniature(name, root / f"raw/{name}", 60)
    {
        "cremad": prepare_cremad,
        "kinetics": prepare_kinetics,
        "mvsa": prepare_mvsa,
        "iemocap": prepare_iemocap,
    }.get(name, lambda *a, **k: prepare_own(*a, "mine", **k))(raw, data=data, **MEDIA)
    cfg = Run(
        dataset=name,
        dataset_args={"variant": "mine"} if name == "own" else {},
        data=str(data),
        root=str(root / "runs"),
        name=name,
        encoder="small",
        epochs=1,
        batch_size=16,
        lr=0.05,
        progress=False,
    )
    run(cfg)
    p, test, sources = (
        load(cfg.folder),
        make_dataset(cfg).test,
        rows_of(name, raw),
    )
    ids = test.ids[:6]
    for i, k in enumerate(ids):
        found, stored = p.read(sources[k], k), test[i]["x"]
        for m in p.modalities:
            assert (found[m] is None) == (stored[m] is None)
            assert (
                found[m] == stored[m]
                if isinstance(stored[m], str)
                else stored[m] is None or found[m].equal(stored[m])
            ), (k, m)
    lists = {m: [sources[k].get(m) for k in ids] for m in p.modalities}
    kept = load_pred(cfg.folder)
    assert torch.allclose(
        p.explain(ids=ids, **lists).pred.fused,
        kept.fused[[int((kept.idx == i).nonzero()) for i in range(len(ids))]],
        atol=1e-4,
    )
    if name == "kinetics":
        clip = sources[ids[0]]["video"]
        assert p.explain(video=clip, audio=clip).ids == [
            Path(clip).stem
        ]  # picture and sound of one file
    if name == "iemocap":
        one = sources[ids[0]]["video"]
        side = "left" if one["crop"][0] == 0 else "right"
        assert p.read({"video": {**one, "crop": side}})["video"].equal(
            test[0]["x"]["video"]
        )
        with pytest.raises(UnknownName, match="did you mean 'left'"):
            p.explain(video={**one, "crop": "lef"})
        with pytest.raises(InputError, match="cannot be given here"):
            p.explain(audio={"path": sources[ids[0]]["audio"], "crop": "left"})
        with pytest.raises(InputError, match="the start first"):
            p.explain(video={**one, "span": (3, 2)})


def test_pixels_and_pictures_in_memory_for_media(root):
    from PIL import Image

    if not (root / "runs/mvsa").exists():
        pytest.skip("made by the test before")
    p = load(root / "runs/mvsa")
    big = torch.randint(256, (3, 50, 40), dtype=torch.uint8)
    a, b = (
        p.read({"image": big}),
        p.read({"image": Image.fromarray(big.permute(1, 2, 0).numpy())}),
    )
    assert a["image"].equal(b["image"]) and a["image"].shape == (3, 24, 24)
    small = torch.randint(256, (3, 24, 24), dtype=torch.uint8)
    assert p.read({"image": small})["image"].equal(small)  # an item is taken as it is


@pytest.fixture(scope="module")
def digits(root, tones):
    prepare_digits(read_archive(tones), root / "data", progress=False)
    cfg = Run(
        dataset="digits",
        data=str(root / "data"),
        root=str(root / "runs"),
        name="digits",
        epochs=3,
        progress=False,
    )
    run(cfg)
    return cfg.folder, make_dataset(cfg), read_archive(tones)


def test_digits_from_recordings_and_pictures(digits, here):
    folder, s, recordings = digits
    p = load(folder)
    for i in (0, 7, 20):
        k, x = s.test.ids[i], s.test[i]["x"]
        Path(f"{k}.wav").write_bytes(recordings[f"{k}.wav"])
        Path(f"{k}.png").write_bytes(encode_image(x["image"]))
        found = p.read({"audio": f"{k}.wav", "image": f"{k}.png"})
        assert found["audio"].equal(x["audio"]) and found["image"].equal(x["image"])
    wave, rate = sf.read(f"{k}.wav")
    sf.write("fast.wav", np.repeat(wave, 2), 16000)  # another rate is resampled
    assert (p.read({"audio": "fast.wav"})["audio"] - x["audio"]).abs().median() < 1
    assert p.read({"image": torch.zeros(90, 70, dtype=torch.uint8)})["image"].shape == (
        3,
        16,
        16,
    )
    with pytest.raises(InputError, match="no such recording"):
        p.explain(audio="gone.wav")
    with pytest.raises(InputError, match="no such image"):
        p.explain(image="gone.png")
    with pytest.raises(InputError, match="cannot be given"):
        p.explain(audio={"path": "fast.wav", "span": (0, 1)})
    sf.write("nan.wav", np.full(8000, np.nan, "f4"), 8000, subtype="FLOAT")
    with pytest.raises(InputError, match="NaN or infinity"):
        p.explain(audio="nan.wav")


def test_names_the_digit_of_a_real_recording(real_archive, here, capsys):
    "Trained on the real recordings, asked from the command line about other files"
    recordings = read_archive(real_archive)
    prepare_digits(recordings, "data", n_train=600, progress=False)
    run(
        Run(
            dataset="digits",
            dataset_args={"n_train": 600},
            epochs=24,
            progress=False,
            name="fsdd",
        )
    )
    asked = [
        f"{d}_{who}_{k}"
        for d in range(10)
        for who in ("jackson", "theo")
        for k in (0, 3)
    ]
    right = []
    for name in asked:
        Path(f"{name}.wav").write_bytes(recordings[f"{name}.wav"])
    p = load("runs/fsdd")
    right = [
        n == name[0]
        for n, name in zip(p.explain(audio=[f"{n}.wav" for n in asked]).names, asked)
    ]
    assert np.mean(right) > 0.8
    name = asked[right.index(True)]
    mla(["predict", "runs/fsdd", "--audio", f"{name}.wav", "--json"])
    assert json.loads(capsys.readouterr().out)["answer"] == name[0]


# ---- answers ----


def test_answers_are_the_runs_own(moods, p, s):
    a = p.explain(**{m: list(s.test.x[m]) for m in s.modalities}, batch_size=7)
    kept = load_pred(moods[0])
    assert torch.allclose(a.pred.fused, kept.fused, atol=1e-4) and torch.allclose(
        a.pred.weights, kept.weights, atol=1e-4
    )
    assert a[2:4].ids == ["sample 2", "sample 3"] and a[2:4].many and not a[2].many
    assert len(a) == 48 and a[-1].ids == ["sample 47"] and len(list(a)) == 48
    assert torch.allclose(a.probs.sum(1), torch.ones(48), atol=1e-5)


@pytest.mark.parametrize(
    "sub", [("audio",), ("visual", "text"), ("audio", "visual", "text")]
)
def test_any_subset_and_what_is_said_about_it(p, s, sub):
    a = p.explain(**{m: s.test.x[m][0] for m in sub})
    d = json.loads(a.json())
    assert (
        set(d["modalities"]) == set(sub)
        and abs(sum(v["weight"] for v in d["modalities"].values()) - 1) < 1e-4
    )
    assert (
        d["answer"] == a.names[0] == max(d["probabilities"], key=d["probabilities"].get)
        and len(a.to_dict(top=2)["probabilities"]) == 2
    )
    for m in s.modalities:
        assert bool(a.uni[m].isnan().all()) == (m not in sub) and (
            m in sub or float(a.weights[m]) == 0
        )
        assert (f"{m}" in str(a)) and (m in sub or "absent" in str(a))


def test_ragged_samples(p, s):
    x = s.test.x
    a = p.explain(
        audio=[x["audio"][0], None, x["audio"][2]],
        text=[None, x["text"][1], x["text"][2]],
        ids=["a", "b", "c"],
    )
    assert (
        a.ids == ["a", "b", "c"]
        and isinstance(a.to_dict(), list)
        and isinstance(a[0].to_dict(), dict)
    )
    assert torch.allclose(
        a[1].pred.fused, p.explain(text=x["text"][1]).pred.fused, atol=1e-5
    )
    assert torch.allclose(
        a[2].pred.fused,
        p.explain(audio=x["audio"][2], text=x["text"][2]).pred.fused,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "at least one of audio, visual, text"),
        ({"audio": None}, "at least one of"),
        ({"adio": "x.wav"}, "did you mean 'audio'"),
        ({"video": "x.flv"}, "Allowed: audio, text, visual"),
        ({"audio": []}, "the lists are empty"),
        ({"text": ["a", "b"], "audio": ["x.wav"]}, "text has 2, audio has 1"),
        ({"text": ["a", None]}, "sample 1 has none"),
        ({"text": 5}, "no text"),
        ({"audio": torch.zeros(2, 8000)}, "no waveform"),
        ({"audio": torch.full((8000,), float("nan"))}, "NaN or infinity"),
        ({"audio": object()}, "nothing that can be read"),
        ({"visual": torch.rand(3, 32, 32)}, "0 to 255"),
        ({"visual": torch.zeros(4, 32, 32, dtype=torch.uint8)}, "no picture"),
        ({"audio": {"span": (0, 1)}}, "no 'path'"),
        ({"audio": {"path": "x.wav", "crp": "left"}}, "did you mean 'crop'"),
        ({"text": "a", "ids": ["x", "y"]}, "2 ids for 1"),
        ({"text": "a", "batch_size": 0}, "at least 1"),
        ({"text": Path("gone.txt")}, "no such text"),
    ],
)
def test_wrong_inputs_are_one_sentence(p, given, said):
    with pytest.raises(InputError, match=said) as e:
        p.explain(**given)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"not a recording", POINTER])
def test_broken_files_are_one_sentence(p, here, content):
    for name, m in (("x.wav", "audio"), ("x.png", "visual")):
        Path(name).write_bytes(content)
        with pytest.raises(InputError, match=name) as e:
            p.explain(**{m: name})
        assert "\n" not in str(e.value)


def test_the_head_may_decide(root, s):
    run(cfg := Run(**TINY, method="concat", root=str(root / "runs"), name="concat"))
    a = load(cfg.folder).explain(text="he felt glad")
    assert a.weights is None and "weight" not in a.json() and "weight" not in str(a)
    a.plot().clear()


# ---- a folder to give away ----


def test_fit_in_memory_then_save_and_load(here):
    from mla_nb import fit
    from mla_nb.data.arrays import splits_from_arrays

    torch.manual_seed(0)
    y = torch.randint(2, (120,))
    words = ["the word is " + ("no", "yes")[k] for k in y]
    x = {"left": torch.randn(120, 16, 16) + y.view(-1, 1, 1), "right": words}
    fitted = fit(splits_from_arrays(x, y), method="mla", epochs=1)
    fitted.save("fitted")
    again = load("fitted")
    for sample in ({"left": x["left"][0], "right": words[0]}, {"right": words[0]}):
        same = again.predict_proba(**sample).equal(fitted.predict_proba(**sample))
        assert same, f"{list(sample)}: another answer after loading"


def test_save_is_small_and_whole(moods, p, here):
    p.save("mine")
    assert sorted(f.name for f in Path("mine").iterdir()) == [
        "README.md",
        "config.json",
        "files.json",
        "model.safetensors",
        "preprocessors.json",
        "result.json",
    ]
    assert (
        load("mine")
        .explain(text="glad")
        .pred.fused.equal(p.explain(text="glad").pred.fused)
    )
    text = Path("mine/README.md").read_text()
    assert "mla on synthetic" in text and "happy, sly" in text and "load" in text
    with pytest.raises(InputError, match="not empty"):
        p.save("mine")


def spoil(name, change):
    return lambda: Path(f"mine/{name}").write_text(
        change(Path(f"mine/{name}").read_text())
    )


def flip():
    data = bytearray(Path("mine/model.safetensors").read_bytes())
    data[-3] ^= 1
    Path("mine/model.safetensors").write_bytes(data)


def other_net():
    "Whole and signed, but of another shape"
    from safetensors.torch import load_file, save_file

    state = load_file("mine/model.safetensors")
    state["head.out.weight"] = state["head.out.weight"][:5].contiguous()
    save_file(state, "mine/model.safetensors")
    Path("mine/files.json").unlink()


@pytest.mark.parametrize(
    "damage, said",
    [
        (flip, "checksum is wrong"),
        (
            spoil("config.json", lambda t: t.replace("happy", "merry")),
            "checksum is wrong",
        ),
        (spoil("files.json", lambda t: t[:20]), "cannot be read"),
        (spoil("files.json", lambda t: '{"../x": "0"}'), "incomplete"),
        (lambda: Path("mine/preprocessors.json").unlink(), "incomplete"),
        (other_net, "another architecture: head.out.weight has shape"),
    ],
)
def test_a_damaged_copy_is_one_sentence(p, here, damage, said):
    p.save("mine")
    damage()
    with pytest.raises(InputError, match=said) as e:
        load("mine")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, key",
    [("config", "classes"), ("result", "weights"), ("preprocessors", "text")],
)
def test_a_run_folder_with_gaps_is_one_sentence(moods, here, name, key):
    shutil.copytree(moods[0], "r")
    found = json.loads(Path(f"r/{name}.json").read_text())
    del found[key]
    Path(f"r/{name}.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match=f"{key}|checksum"):
        load("r")  # whichever is seen first


def test_not_a_run(here):
    Path("empty").mkdir()
    with pytest.raises(InputError, match="no such folder"):
        load("gone")
    with pytest.raises(InputError, match="not the folder of a finished run"):
        load("empty")


# ---- tables ----


def test_a_table(p, files, s):
    files[2]["audio"] = "gone.wav"
    files[3]["visual"] = files[3]["text"] = ""
    files[4] |= {"audio": "", "visual": "", "text": ""}
    Path("5.png").write_bytes(b"junk")
    table(files)
    r = predict_table(p, "t.csv", "out.csv", batch_size=2, progress=False)
    rows = answers("out.csv")
    assert (
        [x["id"] for x in rows] == [f"s{i}" for i in range(6)]
        and r["answered"] == r["labeled"] == 3
        and r["rows"] == 6
    )
    assert (
        "no such recording" in rows[2]["reason"]
        and "none of" in rows[4]["reason"]
        and "not a readable image" in rows[5]["reason"]
    )
    one = p.explain(audio="0.wav", visual="0.png", text=s.test.x["text"][0])
    assert (
        rows[0]["answer"] == one.names[0]
        and abs(float(rows[0]["probability"]) - float(one.probs.max())) < 1e-4
    )
    assert rows[3]["weight_text"] == "" and float(rows[3]["weight_audio"]) == 1
    assert abs(sum(float(rows[0][f"p({c})"]) for c in p.classes) - 1) < 1e-4
    assert r["accuracy"] == np.mean(
        [x["answer"] == x["label"] for x in rows if not x["reason"]]
    )
    assert not Path("out.csv.partial").exists()


def test_answers_belong_to_files_as_they_were(p, files):
    "A row is mended, or a recording replaced: the old answers are not given out for it"
    files[2]["audio"] = "later.wav"
    table(files)
    assert predict_table(p, "t.csv", "out.csv", progress=False)["answered"] == 5
    Path("later.wav").write_bytes(Path("1.wav").read_bytes())
    with pytest.raises(
        InputError, match="files that have changed since; choose another --out"
    ):
        predict_table(p, "t.csv", "out.csv", progress=False)
    assert predict_table(p, "t.csv", "new.csv", progress=False)["answered"] == 6


def test_no_row_is_answered_twice(p, files, monkeypatch):
    "Stopped between two batches; the same call does the rest"
    asked, real = [], Classifier.predict_items

    def answer(self, items):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(items)
        return real(self, items)

    monkeypatch.setattr(Classifier, "predict_items", answer)
    with pytest.raises(KeyboardInterrupt):
        predict_table(p, "t.csv", "out.csv", batch_size=2, progress=False)
    assert not Path("out.csv").exists() and len(asked) == 4
    monkeypatch.setattr(
        Classifier,
        "predict_items",
        lambda self, items: (asked.extend(items), real(self, items))[1],
    )
    r = predict_table(p, "t.csv", "out.csv", batch_size=5, progress=False)
    assert len(asked) == 6 and r["rows"] == 6
    before = Path("out.csv").stat().st_mtime_ns
    assert (
        predict_table(p, "t.csv", "out.csv", progress=False) == r
        and len(asked) == 6
        and Path("out.csv").stat().st_mtime_ns == before
    )


def test_killed_for_real(moods, files):
    "SIGKILL in the middle; the same command goes on, and its output is the same"
    table([dict(files[i % 6], id=f"r{i}") for i in range(60)])
    code = (
        "import os; from pathlib import Path; from mla_nb import predict_table as P; "
        "real = P.predict_rows\n"
        "def dies(*a): len(list(Path('.').glob('out.csv.partial/0*.json'))) < 3 or "
        "os.kill(os.getpid(), 9); return real(*a)\n"
        "P.predict_rows = dies; from mla_nb.cli import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "predict",
        str(moods[0]),
        "--csv",
        "t.csv",
        "--out",
        "out.csv",
        "--batch_size",
        "2",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.run(command, env=env, capture_output=True, text=True)
    assert job.returncode == -signal.SIGKILL, job.stderr[-3000:]
    assert (
        not Path("out.csv").exists()
        and len(list(Path("out.csv.partial").glob("0*.json"))) == 3
    )
    mla(["predict", str(moods[0]), "--csv", "t.csv", "--out", "out.csv"])
    mla(["predict", str(moods[0]), "--csv", "t.csv", "--out", "whole.csv"])
    got, want = (answers(f) for f in ("out.csv", "whole.csv"))
    assert [r["id"] for r in got] == [f"r{i}" for i in range(60)]
    for a, b in zip(got, want):
        assert (
            a["answer"] == b["answer"]
            and abs(float(a["probability"]) - float(b["probability"])) < 1e-4
        )


def test_somebody_elses_answers_are_never_lost(moods, p, files):
    Path("out.csv").write_text("mine\n")
    with pytest.raises(InputError, match="another run or table"):
        predict_table(p, "t.csv", "out.csv", progress=False)
    assert Path("out.csv").read_text() == "mine\n"
    predict_table(p, "t.csv", "a.csv", progress=False)
    table(files[:3])
    with pytest.raises(InputError, match="another run or table"):
        predict_table(p, "t.csv", "a.csv", progress=False)
    Path("b.csv.partial").mkdir()
    Path("b.csv.partial/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="another run or table"):
        predict_table(p, "t.csv", "b.csv", progress=False)
    with pytest.raises(InputError, match="no such folder"):
        predict_table(p, "t.csv", "gone/b.csv", progress=False)
    Path("c.csv.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="another run or table"):
        predict_table(p, "t.csv", "c.csv", progress=False)
    assert (
        Path("c.csv.json").read_text() == '{"mine": 1}'
        and not Path("c.csv.partial").exists()
    )
    Path("a.csv").unlink()
    Path("d.csv.partial").mkdir()  # killed before anything was written
    assert (
        predict_table(p, "t.csv", "a.csv", progress=False)["rows"]
        == predict_table(p, "t.csv", "d.csv", progress=False)["rows"]
        == 3
    )
    assert Path("b.csv.partial/notes.txt").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("id,audio\n", "empty"),
        ("id,sound\na,x.wav\n", "no column for any of"),
        ("id,adio\na,x.wav\n", "did you mean 'audio'"),
        ("id,video\na,x.flv\n", "no column for any of"),
        ("id,label\na,happy\n", "no column for any of"),
        ("id,text\na,hm\na,ha\n", "'a' occurs more than once"),
        ("id,text\na,hm\n,ha\n", "line 3: there is no id"),
        ("id,text,text\na,hm,hm\n", "more than once"),
        ("id,text\na,hm,ha\n", "line 2: 3 cells"),
        ('id,text\na,"hm\n', "never closed"),
        ("id,text,label\na,hm,hapy\n", "did you mean 'happy'"),
        ("id,text,label\na,hm,Mars\n", "for this model 'Mars'"),
        ("id,text\na,hm\n".encode("utf-16-le"), "UTF-16 without a mark"),
    ],
)
def test_wrong_tables_are_one_sentence(p, here, text, said):
    Path("t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said) as e:
        predict_table(p, "t.csv", "out.csv", progress=False)
    assert "\n" not in str(e.value) and not Path("out.csv.partial").exists()


def test_tables_as_spreadsheets_write_them(p, here):
    """Semicolons, a byte-order mark, no ids, empty lines, a text that lies in a file.

    Paths start at the table's folder.
    """
    Path("sub").mkdir()
    Path("sub/note.txt").write_text("he felt glad")
    Path("sub/t.csv").write_text(
        "\ufeffText;Text_file\nshe felt sad;\n\n;note.txt\n", encoding="utf-8"
    )
    r = predict_table(p, "sub/t.csv", "out.csv", progress=False)
    rows = answers("out.csv")
    assert (
        [x["id"] for x in rows] == ["1", "2"]
        and r["answered"] == 2
        and r["accuracy"] is None
    )
    assert rows[1]["answer"] == p.explain(text="he felt glad").names[0]


# ---- the command ----


def test_command(moods, files, capsys):
    mla(
        [
            "predict",
            str(moods[0]),
            "--audio",
            "0.wav",
            "--visual",
            "0.png",
            "--text",
            "glad",
            "--top",
            "2",
            "--plot",
            "why.png",
        ]
    )
    assert (
        "visual" in capsys.readouterr().out
        and Path("why.png").read_bytes()[:4] == b"\x89PNG"
    )
    mla(["predict", str(moods[0]), "--text=-- so glad", "--json", "--top", "1"])
    assert len(json.loads(capsys.readouterr().out)["probabilities"]) == 1
    mla(["predict", str(moods[0]), "--csv", "t.csv", "--out", "out.csv"])
    assert "6 of 6 rows answered, accuracy" in capsys.readouterr().out
    mla(["predict", str(moods[0]), "--save", "copy"])
    mla(["predict", "copy", "--text", "glad"])
    capsys.readouterr()
    mla(["predict", "--help"])
    assert "--video" in capsys.readouterr().out
    mla(["predict", str(moods[0]), "--help"])
    assert "--visual FILE" in capsys.readouterr().out  # the modalities of this run


def test_command_mistakes(moods, files):
    r = moods[0]
    assert "at least one of audio, visual, text" in says(r)
    assert "no such recording" in says(r, "--audio", "gone.wav")
    assert "did you mean 'audio'" in says(r, "--adio", "0.wav")
    assert "unknown modality 'video'" in says(r, "--video", "v.flv")
    assert "comes first" in says("--audio", "0.wav", r) and "comes first" in says()
    assert "stands alone" in says(r, "0.wav")
    assert "expected one argument" in says(r, "--audio")
    assert "no such folder" in says("gone", "--text", "x")
    assert "not the folder of a finished run" in says(".", "--text", "x")
    assert "--out FILE" in says(r, "--csv", "t.csv") and "--out FILE" in says(
        r, "--csv", "t.csv", "--out", "o.csv", "--text", "x"
    )
    assert "about one sample" in says(r, "--csv", "t.csv", "--out", "o.csv", "--json")
    assert "--out goes with --csv" in says(r, "--text", "x", "--out", "o.csv")
    assert says(r, "--text", "x", "--batch_size", "0").startswith(
        "mla predict: --batch_size=0: must be a whole number, at least 1"
    )
    assert "kind of picture" in says(r, "--text", "x", "--plot", "why.docx")
    with pytest.raises(SystemExit, match="kind of export"):
        mla(["export", str(r), "m.pth"])
    assert "at least 1" in says(
        r, "--text", "x", "--top", "0"
    ) and "valid integer" in says(r, "--text", "x", "--top", "x")
    assert "cannot read or write" in says(r, "--text", "x", "--plot", "gone/why.png")


# ---- export ----


def with_rule(p, rule):
    return Classifier(p.net, replace(p.method, rule=rule), p.about, p.result)


def same(program, p):
    with torch.no_grad():
        check_export(p, program)


@pytest.mark.parametrize("rule", sorted(set(discover() and rules)))
def test_every_rule_exports(p, rule):
    "torch.export's own graph, for batches of other sizes, with NaN in the absent rows"
    made = (
        TemperatureScaled("entropy", (1.5, 0.7, 2.0))
        if rule == "calibrated"
        else FixedWeights((0.2, 0.5, 0.3))
        if rule == "fixed"
        else make_rule(rule)
    )
    q = with_rule(p, made)
    same(X.traced(q).module(), q)


@pytest.mark.parametrize(
    "method", ["ensemble", "concat", "sum", "film", "gated", "mla_released"]
)
def test_every_head_exports(p, s, method, here):
    from mla_nb.runs.run import make_method

    m = make_method(Run(method=method, **TINY))
    q = Classifier(make_net(m.head, dict(p.net.encoders), 6), m, p.about, p.result)
    same(X.traced(q).module(), q)
    if method == "concat":  # mla's is written below
        for lib in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(lib)
        export_onnx(q, "m.onnx")
        same(X.run_onnx("m.onnx"), q)


def test_export_files_say_what_they_are(p, here):
    export_program(p, "m.pt2")
    same(torch.export.load("m.pt2").module(), p)
    for lib in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(lib)
    import onnx

    main_says = export_onnx(p, "m.onnx")
    meta = {m.key: m.value for m in onnx.load(str(main_says)).metadata_props}
    note = json.loads(Path("m.onnx.json").read_text())
    assert (
        json.loads(meta["mla_nb"]) == note == json.loads(Path("m.pt2.json").read_text())
    )
    assert (
        note["classes"] == p.classes
        and set(note["inputs"])
        == {"audio", "visual", "text.ids", "text.mask", "present"}
        and note["outputs"] == ["fused", "logits", "weights"]
    )
    assert sorted(f.name for f in here.iterdir()) == [
        "m.onnx",
        "m.onnx.json",
        "m.pt2",
        "m.pt2.json",
    ]  # one file, no weights beside it


def test_resnet18_exports(p, s, here):
    for lib in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(lib)
    from mla_nb.core import encoders

    encs = {
        m: encoders["resnet18_audio" if m == "audio" else "resnet18_image"](
            s.modalities[m], s.train.column(m)[:8]
        )
        for m in ("audio", "visual")
    }
    about = {
        **p.about,
        "modalities": {m: p.about["modalities"][m] for m in encs},
        "encoders": {m: {"name": "resnet18", "options": {}} for m in encs},
    }
    q = Classifier(make_net(p.method.head, encs, 6), p.method, about, p.result)
    export_onnx(q, "m.onnx")
    same(X.run_onnx("m.onnx"), q)


def test_what_cannot_be_exported_is_one_sentence(p, here):
    class Odd(Encoder):
        def forward(self, x):
            return x.flatten(1)[:, :64] * (2.0 if float(x.sum()) > 0 else 1.0)

    q = Classifier(
        make_net(
            p.method.head,
            {**p.net.encoders, "audio": Odd(64, p.net.encoders["audio"].preprocessor)},
            6,
        ),
        p.method,
        p.about,
        p.result,
    )
    with pytest.raises(InputError, match="cannot be exported") as e:
        export_program(q, "m.pt2")
    assert "\n" not in str(e.value) and not list(here.iterdir())
    with pytest.raises(InputError, match="must end in .onnx"):
        export_onnx(p, "m.pt2")
    with pytest.raises(InputError, match="no such folder"):
        export_program(p, "gone/m.pt2")


def test_onnx_is_optional(p, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install 'mla_nb\[export\]'"):
        export_onnx(p, "m.onnx")


def test_a_wrong_graph_is_not_kept(p, here, monkeypatch):
    monkeypatch.setattr(
        X, "traced", lambda q, real=X.traced: real(with_rule(p, make_rule("mean")))
    )
    with pytest.raises(InputError, match="answers otherwise"):
        export_program(p, "m.pt2")
    assert not list(here.iterdir())
