"""Runs on extracted features answer files: with the encoders that made the features.

Moved, damaged and saved encoders, parts that stay raw, exports, and what is said.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import script
from test_hub import SMALL, tokenizer

from mla_nb import cli
from mla_nb.compare import results, run_settings, table_notes
from mla_nb.core import InputError
from mla_nb.data.own import prepare_own
from mla_nb.data.prepared import load_prepared
from mla_nb.export import run_onnx, with_encoders
from mla_nb.features import FrozenEncoders, extract, frozen_of, text_windows
from mla_nb.predict import RawItem, fit, load
from mla_nb.runs.run import Run, run

timm, tf = pytest.importorskip("timm"), pytest.importorskip("transformers")
SPEC = "image=timm:models/eye,text=hf:models/bert"


def trained(variant, encoder="features", **more):
    cfg = Run(
        dataset="mvsa",
        dataset_args=f"variant={variant}",
        encoder=encoder,
        epochs=1,
        batch_size=16,
        lr=0.05,
        progress=False,
        threads=1,
        name=variant,
        **more,
    )
    run(cfg)
    return cfg.folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with models, a prepared miniature, its features, and a run on them"
    root = tmp_path_factory.mktemp("frozen")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(root)
        torch.manual_seed(0)
        bert = tf.BertConfig(**SMALL, vocab_size=60, max_position_embeddings=32)
        tf.BertModel(bert).save_pretrained("models/bert")
        tokenizer().save_pretrained("models/bert")
        for name in ("eye", "other"):
            net = timm.create_model("test_resnet", num_classes=3)
            timm.models.save_for_hf(net, f"models/{name}", safe_serialization=True)
        script("mvsa", "--miniature", "--size", "32")
        extract("data/mvsa-miniature", SPEC, progress=False)
        trained("miniature-features")
        Path("models").rename("away")  # the full path that was noted leads nowhere
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    "The same in a folder of its own"
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))
    Path("away").rename("models")
    return Path("runs/miniature-features")


def sample(k=0):
    "Sources of a test sample, and the features that are stored of it"
    stored = load_prepared("data/mvsa-miniature-features").test
    name = stored.ids[k]
    files = Path("data/raw/mvsa-miniature/data")
    words = load_prepared("data/mvsa-miniature").test[k]["x"]["text"]
    return {"image": str(files / f"{name}.jpg"), "text": words}, stored[k]["x"]


def mla(*args):
    try:
        cli.main([str(a) for a in args])
    except SystemExit as e:
        return e.code
    return None


def test_files_give_what_the_stored_features_give(here):
    p = load(here)
    for k in range(3):
        files, features = sample(k)
        a, b = p.explain(**files), p.explain(**features)
        assert torch.allclose(a.probs, b.probs, atol=2e-3)
        assert isinstance(a.items[0]["image"], RawItem) and a.note == ""
        assert torch.is_tensor(b.items[0]["image"])
    mixed = p.explain(image=files["image"], text=features["text"])
    assert torch.allclose(mixed.probs, a.probs, atol=2e-3)
    many = p.explain(image=[files["image"], None], text=[None, features["text"]])
    assert many.pred.present.tolist() == [[True, False], [False, True]]
    pixels = load_prepared("data/mvsa-miniature").test[2]["x"]["image"]
    assert torch.allclose(p.explain(image=pixels).uni["image"], a.uni["image"])
    assert len(p.explain(image=torch.stack([pixels, pixels]))) == 2
    assert len(a.plot().axes) == 6  # a picture, and not its features
    with pytest.raises(InputError, match=r"no such image file"):
        p.explain(image="gone.jpg")


def test_commands_and_tables_answer_files(here, capsys):
    files, _ = sample()
    assert mla("predict", here, "--image", files["image"], "--text", "good day") is None
    assert "image  weight" in capsys.readouterr().out
    rows = f"image,text\n{files['image']},a day\ngone.jpg,\n,good\n"
    Path("ask.csv").write_text(rows)
    assert mla("predict", here, "--csv", "ask.csv", "--out", "said.csv") is None
    assert "said.csv: 2 of 3 rows answered" in capsys.readouterr().out
    assert mla("predict", here, "--text", "a", "--encoders", "text") == (
        "mla predict: --encoders text: 'text' has no place; write MODALITY=DIR, e.g. "
        "--encoders image=DIR,text=DIR."
    )


def test_moved_weights_are_named_and_can_be_shown(here):
    files, features = sample()
    before = load(here).explain(**files).probs
    Path("models/eye").rename("eye")
    p = load(here)
    with pytest.raises(
        InputError,
        match=(
            r"image: its features were made by timm_image \(weights: models/eye\), and "
            r"that encoder cannot be had .* --encoders image=DIR\), or give a "
        ),
    ):
        p.explain(image=files["image"])
    p.explain(image=features["image"], text=files["text"])  # needs it not
    other = {"image": "models/other"}
    with pytest.raises(InputError, match="the checksum of what is there is another"):
        load(here, encoders=other).explain(image=files["image"])
    with pytest.raises(InputError, match="unknown modality with a frozen encoder 'im'"):
        load(here, encoders={"im": "eye"})
    again = load(here, encoders={"image": "eye"})
    assert again.explain(**files).probs.equal(before)


def test_a_saved_classifier_answers_files_elsewhere(here, tmp_path, capsys):
    files, features = sample()
    p = load(here)
    before = p.explain(**files).probs
    p.save(tmp_path / "saved")
    card = (tmp_path / "saved/README.md").read_text()
    assert "frozen encoders of image, text are in frozen.safetensors" in card
    shutil.rmtree("models")
    assert load(tmp_path / "saved").explain(**files).probs.equal(before)
    with pytest.raises(InputError, match="is not needed, since the weights of image"):
        load(tmp_path / "saved", encoders={"image": "eye"})
    load(here).save("poor")  # without the weights it still answers vectors
    assert "The encoder that made the features of image" in capsys.readouterr().out
    card = Path("poor/README.md").read_text()
    assert "is not in this folder: give its place with load('.'" in card
    load("poor").explain(**features)
    file = tmp_path / "saved/frozen.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(InputError, match="frozen.safetensors is damaged"):
        load(tmp_path / "saved")


def test_what_is_kept_beside_features_is_checked(here):
    folder = Path("data/mvsa-miniature-features")
    note = json.loads((folder / "frozen.json").read_text())
    assert not (folder / "frozen.safetensors").exists()  # the models have names
    assert frozen_of(folder) and not frozen_of("data/mvsa-miniature")
    note["encoders"]["image"]["item"] = [3, 1, 1]
    (folder / "frozen.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match="frozen.json is damaged"):
        FrozenEncoders(folder)
    extract("data/mvsa-miniature", SPEC, progress=False)  # mends it
    assert FrozenEncoders(folder).about["image"]["item"] == [3, 32, 32]
    load(here)  # a run has its own copy


def test_trained_and_random_encoders_are_kept(here, capsys):
    source = trained("miniature", "small")
    extract("data/mvsa-miniature", run=source, out="data/mvsa-own", progress=False)
    mine = trained("own")
    files, _ = sample()
    a = load(source).explain(**files)
    shutil.rmtree("data/mvsa-own")
    shutil.rmtree(source)
    b = load(mine)
    assert b.frozen.encode("text", ["a good day"]).shape == (1, 64) and b.note == ""
    assert b.explain(**files).pred.present.equal(a.pred.present)
    r = json.loads((mine / "result.json").read_text())
    assert r["features"]["image"]["weights"] == "run miniature"


def test_random_features_are_said_to_be_random(here, capsys):
    args = ["--dataset", "mvsa", "--variant", "miniature", "--encoder", "small"]
    mla("features", *args, "--out", "data/mvsa-blind", "--device", "cpu")
    assert "image, text have RANDOM weights" in capsys.readouterr().out
    folder = trained("blind")
    said = "The features of image, text were computed by encoders with random weights"
    r = json.loads((folder / "result.json").read_text())
    assert any(said in text for text in r["findings"])
    notes = [n for n in table_notes(results("runs")) if said in n]
    assert len(notes) == 1 and "computed: image by small (weights: random)" in notes[0]
    assert mla("predict", folder, "--text", "a good day") is None
    assert f"note: {said}" in capsys.readouterr().out
    assert said in load(folder).explain(text="a").to_dict()["note"]
    assert mla("table", "runs") is None
    out = capsys.readouterr().out
    assert "models/eye" in out and "models/bert" in out
    assert "models/eye" in run_settings(here)


def test_some_modalities_stay_as_they_are(here, capsys):
    args = ["--dataset", "mvsa", "--variant", "miniature", "--device", "cpu"]
    mla("features", *args, "--encoder", "text=hf:models/bert", "--out", "data/mvsa-a")
    assert "kept as they are, without an encoder: image" in capsys.readouterr().out
    extract("data/mvsa-miniature", SPEC, out="b", modalities="text", progress=False)
    raw, a, b = map(load_prepared, ("data/mvsa-miniature", "data/mvsa-a", "b"))
    assert [m.form for m in a.modalities.values()] == ["image", "vector"]
    for x, y, z in zip(raw.test, a.test, b.test):
        assert x["x"]["image"].equal(y["x"]["image"])
        assert y["x"]["text"].equal(z["x"]["text"])
    folder = trained("a", "image=small,text=features")
    p, (files, _) = load(folder), sample()
    assert p.explain(**files).pred.present.all() and list(p.frozen.about) == ["text"]
    with pytest.raises(InputError, match="names none for image"):
        extract("data/mvsa-miniature", "text=small", modalities="image", out="c")
    with pytest.raises(InputError, match="holds extracted features already"):
        extract("data/mvsa-a", "image=small", out="c")


def test_vectors_of_its_own_pass_through(here):
    "A column of numbers (chapter 31) stays what it is beside extracted sentences"
    words = ["a good day", "day day", "good good", "a a day"]
    lines = ["label,text,size,kind"]
    for k in range(60):
        lines.append(f"{'xy'[k % 2]},{words[k % 4]},{k % 7}.5,{'red' if k % 3 else ''}")
    Path("t.csv").write_text("\n".join(lines))
    kinds = ["--columns", "facts=size+kind:vector,text=text:text"]
    script("own", "--table", "t.csv", "--name", "t", *kinds)
    extract("data/own-t", "hf:models/bert", progress=False)
    a, b = load_prepared("data/own-t"), load_prepared("data/own-t-features")
    assert {m: v.form for m, v in b.modalities.items()} == {
        "facts": "row",
        "text": "vector",
    }
    assert [i["x"]["facts"] for i in a.train] == [i["x"]["facts"] for i in b.train]
    cfg = {"epochs": 1, "progress": False, "threads": 1, "name": "t"}
    spec = "facts=small,text=features"
    run(Run(dataset="own", dataset_args="variant=t-features", encoder=spec, **cfg))
    Path("ask.csv").write_text("text,size,kind\na day,2.5,red\n,,red\n")
    assert mla("predict", "runs/t", "--csv", "ask.csv", "--out", "s.csv") is None
    assert "reason\n" in Path("s.csv").read_text()
    p = load("runs/t")
    assert p.explain(text=["a good day"], facts=[[1.5, "red"]]).pred.present.all()
    # named, they are extracted too, and a table is still asked by its own columns
    extract("data/own-t", "facts=small", out="data/own-u", progress=False)
    cfg |= {"name": "u", "dataset_args": "variant=u"}
    run(Run(dataset="own", encoder="facts=features,text=small", **cfg))
    done = mla("predict", "runs/u", "--csv", "ask.csv", "--out", "u.csv")
    said = [r.split(",")[5] for r in Path("u.csv").read_text().splitlines()]
    assert done is None and said[0] == "weight_facts" and all(said)


def test_features_in_memory_are_answered_too(here):
    s = load_prepared("data/mvsa-miniature-features")
    p = fit(s, epochs=1, batch_size=16, lr=0.05)
    files, features = sample()
    a, b = p.explain(**files), p.explain(**features)
    assert torch.allclose(a.probs, b.probs, atol=2e-3)
    p.save("saved")
    assert load("saved").explain(**files).probs.equal(a.probs)


def test_the_graph_reads_what_the_encoders_read(here, capsys):
    for lib in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(lib)
    p, (files, _) = load(here), sample()
    assert p.export("m.onnx").exists() and "note:" not in capsys.readouterr().out
    told = json.loads(Path("m.onnx.json").read_text())
    assert set(told["inputs"]) == {"image", "text.ids", "text.mask", "present"}
    assert told["features"] == {} and "models/eye" in told["encoders"]["image"]
    q = with_encoders(p)
    x = {
        m: q.net.encoders[m].preprocessor([p.read({m: files[m]})[m].item])
        for m in q.modalities
    }
    fused = run_onnx("m.onnx")(x, torch.ones(1, 2, dtype=torch.bool))[0]
    probs = torch.tensor(fused).softmax(-1)
    assert torch.allclose(probs, p.explain(**files).probs, atol=1e-4)
    shutil.rmtree("models")
    load(here).export("head.pt2")
    assert "Its inputs are features: image by timm_image" in capsys.readouterr().out
    told = json.loads(Path("head.pt2.json").read_text())
    assert set(told["inputs"]) == {"image", "text", "present"}
    assert "models/eye" in told["features"]["image"]


def test_a_long_text_is_read_in_windows_in_extraction_and_prediction(here, capsys):
    "The mean over windows of as many tokens as the encoder reads; short ones as before"
    rows = ["id,text,label"]
    words = [3 + k % 2 if k % 30 else 19 for k in range(90)]
    rows += [f"{k},{'ab ' * n}cd,{'xy'[k % 2]}" for k, n in enumerate(words)]
    Path("table.csv").write_text("\n".join(rows) + "\n")
    prepare_own("table.csv", "notes", workers=1, progress=False)
    how = {"encoder": "text=hf:models/bert", "progress": False}
    extract("data/own-notes", out="data/own-once", **how)
    extract("data/own-notes", out="data/own-wide", windows=3, **how)
    raw, once, wide = (
        load_prepared(f"data/own-{k}") for k in ("notes", "once", "wide")
    )
    frozen = frozen_of("data/own-wide")
    e, seen = frozen.encoder("text"), 0
    for part in raw.parts:
        texts = raw.parts[part].column("text")
        for i, text in enumerate(texts):
            found = text_windows(e.preprocessor, text, 3)
            z = frozen.encode("text", [text])[0]
            with torch.no_grad():
                x = e.preprocessor(found)
                by_hand = e(e.preprocessor.normalize(x)).mean(0)
            kept, plain = (
                torch.as_tensor(s.parts[part][i]["x"]["text"]).float()
                for s in (wide, once)
            )
            assert torch.allclose(by_hand, z, atol=1e-5)
            assert torch.allclose(kept, z, atol=0.01)  # stored in 16 bits
            assert (len(found) > 1) == (len(text.split()) > 9)
            assert len(found) > 1 or kept.equal(plain)
            seen += len(found) > 1
    assert seen == 3
    cfg = Run(dataset="own", dataset_args="variant=wide", encoder="features", epochs=1)
    run(cfg.replace(name="wide", progress=False, threads=1, method="concat"))
    load("runs/wide").export("wide.onnx")
    assert "reads the first window only" in capsys.readouterr().out
    with pytest.raises(InputError, match="windows=0"):
        extract("data/own-notes", out="x", windows=0, **how)
