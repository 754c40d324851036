"""Feature datasets: what is extracted, and what is trained on it.

A kill loses nothing; what one can do wrong is answered.
"""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, killed_at_the_second_shard

from mla_nb.compare import show_samples
from mla_nb.core import (
    InputError,
    Modality,
    call,
    check_dataset,
    datasets,
    discover,
    encoders,
)
from mla_nb.data.decode import encode_image
from mla_nb.data.prepared import load_prepared, pack, prepare, unpack
from mla_nb.encoders.base import check_encoder
from mla_nb.features import (
    MLP,
    Extractor,
    Vectors,
    _parser,
    chosen,
    extract,
    extract_main,
    weights_of,
)
from mla_nb.runs.run import (
    Run,
    encoder_names,
    load_run,
    make_encoders,
    run,
)
from mla_nb.tools import set_seed
from mla_nb.train.checkpoints import load_pred

discover()
MODS = {
    "audio": Modality("audio", "features", {"shape": [8, 8]}),
    "video": Modality("video", "frames", {"size": 16, "use": 2}),
    "text": Modality("text", "text"),
}
CLASSES = ["angry", "sad", "neutral"]


def read(source):
    "A made sample; every fifth lacks its pictures, every seventh its words"
    rng, k = np.random.default_rng(source["row"]), source["row"]
    y, out = k % 3, {}
    out["audio"] = rng.normal(y, 1, (8, 8)) * (np.nan if source.get("spoiled") else 1)
    if k % 5:
        out["video"] = [
            encode_image(rng.integers(0, 255, (3, 16, 16), dtype=np.uint8))
            for _ in range(3)
        ]
    if k % 7:
        out["text"] = f"{CLASSES[y]} word{k % 4}"
    return dict(id=f"clip{k}", y=CLASSES[y], **out)


def made(out, train=70, spoiled=None):
    def rows(first, n):
        return [
            {"id": f"clip{k}", "row": k, "spoiled": k == spoiled}
            for k in range(first, first + n)
        ]

    return prepare(
        out,
        "iemocap",
        CLASSES,
        MODS,
        {
            "train": rows(0, train),
            "valid": rows(10**4, 30),
            "test": rows(2 * 10**4, 30),
        },
        read,
        {"name": "made for a test"},
        {},
        progress=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return made(tmp_path_factory.mktemp("data") / "iemocap-tiny")


@pytest.fixture
def mine(source, tmp_path, monkeypatch):
    "The dataset in an empty folder to work in"
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(source, tmp_path / "data/iemocap-tiny")


@pytest.fixture
def done(mine):
    return extract(mine, "small", progress=False)


def cli(*args):
    "What the script says, or the sentence that it ends with"
    try:
        extract_main("doc", [*map(str, args), "--device", "cpu"])
    except SystemExit as e:
        assert (
            isinstance(e.code, str)
            and "\n" not in e.code
            and e.code.startswith("extract_features: ")
        )
        return e.code


def shards(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.arrow")}


def test_features_are_those_of_the_encoders_one_by_one(mine, done):
    s, f = load_prepared(mine), datasets["iemocap"](variant="tiny-features")
    check_dataset(f)
    assert (
        done == mine.with_name("iemocap-tiny-features")
        and f.train.ids == s.train.ids
        and f.train.y.equal(s.train.y)
    )
    assert {m: (v.kind, v.form, v.info["shape"]) for m, v in f.modalities.items()} == {
        m: (v.kind, "vector", [64]) for m, v in s.modalities.items()
    }
    set_seed(0)
    encs = make_encoders(encoder_names("small", s.modalities), s)
    for m in MODS:
        assert f.train.has(m).equal(s.train.has(m)) and not (
            m != "audio" and f.train.has(m).all()
        )  # what is missing stays missing
        enc = encs[m].eval()
        for i in f.train.has(m).nonzero().squeeze(1).tolist()[::13]:
            with torch.no_grad():
                z = enc(enc.preprocessor.inputs([s.train[i]["x"][m]]))[0]
            assert torch.allclose(
                f.train[i]["x"][m], z, atol=2e-3, rtol=2e-3
            )  # 16 bits


def test_doing_it_twice_is_nothing_and_other_options_are_refused(mine, done, capsys):
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*")}
    extract(mine, "small", progress=False)
    assert (
        before == {p: p.stat().st_mtime_ns for p in done.rglob("*")}
        and "already prepared" in capsys.readouterr().out
    )
    for change in ({"seed": 1}, {"precision": "bf16"}, {"batch_size": 8}):
        with pytest.raises(InputError, match="was prepared differently"):
            extract(mine, "small", progress=False, **change)
    with pytest.raises(InputError, match="was prepared differently"):
        extract(mine, "audio=small,video=resnet18,text=small", progress=False)
    extract(mine, "small", seed=1, force=True, progress=False)


def test_what_is_known_about_the_features_is_stored(mine, done):
    meta = json.loads((done / "dataset.json").read_text())
    assert (
        meta["options"]["encoder"] == "small"
        and meta["source"]["features_of"] == "iemocap-tiny"
        and meta["source"]["name"] == "made for a test"
    )
    assert {
        m: w["source"] for m, w in meta["options"]["weights"].items()
    } == dict.fromkeys(MODS, "random")
    assert (
        meta["source"]["dataset_sha256"]
        == json.loads((mine / "dataset.json").read_text())["sha256"]
    )


def test_blocks_are_made_once_and_batch_mates_do_not_matter(mine):
    s = load_prepared(mine)
    encs = chosen(s, "small")
    a, b = Extractor(s, encs, 16), Extractor(s, encs, 5)
    calls, block = [], a.block
    a.block = lambda *at: calls.append(at) or block(*at)
    for row in range(40):
        src = {
            "id": s.train.ids[row],
            "split": "train",
            "row": row,
            "y": CLASSES[row % 3],
        }
        one, other = a(src), b(src)
        assert set(one) == set(other) and all(
            np.allclose(one[m], other[m], atol=2e-3) for m in MODS if m in one
        )
    assert calls == [("train", 0), ("train", 1), ("train", 2)]


def test_kill_9_is_repaired_by_running_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = made(tmp_path / "data/iemocap-large", 1100)
    args = [
        "--data",
        folder,
        "--encoder",
        "small",
        "--batch_size",
        16,
        "--device",
        "cpu",
    ]
    first = killed_at_the_second_shard(tmp_path, "extract_features.py", *args)
    for out in ("cut", "whole"):
        assert cli(*args[:-2], "--out", out) is None
    assert (
        shards(tmp_path / "cut") == shards(tmp_path / "whole")
        and len(shards(tmp_path / "cut")) == 5
    )
    assert all(
        (tmp_path / "cut" / n).stat().st_mtime_ns == t for n, t in first.items()
    )  # not made a second time


def test_a_run_on_features_and_its_net(done, tmp_path):
    cfg = Run(
        dataset="iemocap",
        dataset_args="variant=tiny-features",
        encoder="features(width=16, hidden=8)",
        epochs=2,
        batch_size=16,
        lr=0.1,
        progress=False,
        threads=1,
    )
    r = run(cfg)
    assert (
        set(r["test"]["accuracy"]) == {"fused", *MODS}
        and r["test"]["accuracy"]["audio"] > 0.5
    )  # the class is in the mean of the sound
    net, method, about = load_run(cfg.folder)
    assert {m: e.num_features for m, e in net.encoders.items()} == dict.fromkeys(
        MODS, 16
    ) and about["encoders"]["text"] == {
        "name": "features_text",
        "options": {"width": 16, "hidden": 8},
    }
    assert run(cfg) == r
    s = datasets["iemocap"](variant="tiny-features")
    show_samples(load_pred(cfg.folder), s)  # a vector can be drawn


def test_encoders_of_a_run(mine):
    r = run(
        Run(
            dataset="iemocap",
            dataset_args="variant=tiny",
            encoder="small",
            epochs=1,
            batch_size=16,
            lr=0.05,
            progress=False,
            threads=1,
        )
    )
    out = extract(mine, run=f"runs/{r['id']}", out="trained", progress=False)
    net, s, f = load_run(f"runs/{r['id']}")[0], load_prepared(mine), load_prepared(out)
    with torch.no_grad():
        z = net.encoders["audio"](
            net.encoders["audio"].preprocessor.inputs([s.test[3]["x"]["audio"]])
        )[0]
    assert torch.allclose(f.test[3]["x"]["audio"], z, atol=2e-3, rtol=2e-3)
    assert (
        json.loads((out / "dataset.json").read_text())["options"]["weights"]["text"][
            "source"
        ]
        == f"run {r['id']}"
    )
    other = run(
        Run(
            dataset="synthetic",
            dataset_args="n_train=90,n_valid=8,n_test=8",
            encoder="small",
            epochs=1,
            batch_size=30,
            progress=False,
            threads=1,
        )
    )
    with pytest.raises(InputError, match="give the dataset it was trained on"):
        extract(mine, run=f"runs/{other['id']}", out="no", progress=False)
    with pytest.raises(InputError, match="not the folder of a finished run"):
        extract(mine, run="runs", out="no", progress=False)
    assert not os.path.exists("no")


def test_random_weights_are_called_random(mine, capsys):
    assert (
        cli("--dataset", "iemocap", "--variant", "tiny", "--encoder", "small") is None
    )
    out = capsys.readouterr().out
    assert (
        "audio, video, text have RANDOM weights" in out
        and "ready: data/iemocap-tiny-features" in out
    )


def test_features_of_hub_models(mine, capsys):
    "CLIP in small: its towers read words and pictures; sound has its own encoder"
    tf = pytest.importorskip("transformers")
    from test_hub import SMALL, tokenizer

    words, eyes = (
        dict(
            SMALL,
            vocab_size=60,
            max_position_embeddings=20,
            eos_token_id=3,
            pad_token_id=0,
        ),
        dict(SMALL, hidden_size=24, image_size=16, patch_size=8),
    )
    for part in (
        tf.CLIPModel(tf.CLIPConfig(text_config=words, vision_config=eyes)),
        tokenizer(),
        tf.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    ):
        part.save_pretrained("clip")
    assert "reads text and image, not audio; name an encoder for each modality" in cli(
        "--data", mine, "--encoder", "hf:clip"
    )
    assert (
        cli(
            "--data",
            mine,
            "--encoder",
            "audio=small,video=hf:clip,text=hf:clip(pool=pooler)",
        )
        is None
    )
    assert "the encoders of audio have RANDOM weights" in capsys.readouterr().out
    f = datasets["iemocap"](variant="tiny-features")
    assert {m: v.info["shape"] for m, v in f.modalities.items()} == {
        "audio": [64],
        "video": [24],
        "text": [16],
    }
    assert {
        m: w["source"]
        for m, w in json.loads(
            (mine.parent / "iemocap-tiny-features/dataset.json").read_text()
        )["options"]["weights"].items()
    } == {"audio": "random", "video": "clip", "text": "clip"}
    shutil.rmtree("clip")
    assert "no such folder" in cli(
        "--data",
        mine,
        "--encoder",
        "audio=small,video=hf:clip,text=hf:clip(pool=pooler)",
    )
    assert run(
        Run(
            dataset="iemocap",
            dataset_args="variant=tiny-features",
            encoder="features",
            epochs=1,
            batch_size=16,
            progress=False,
            threads=1,
        )
    )["test"]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_extracts_before_it_trains():
    said = subprocess.run(
        ["make", "-n", "demo", "DATASET=iemocap", "ENCODER=features"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    steps = [
        said.index(step)
        for step in (
            "prepare_iemocap.py --miniature",
            (
                "extract_features.py --dataset 'iemocap' --variant miniature "
                "--encoder 'small'"
            ),
            "-r dataset_args 'variant=miniature-features'",
        )
    ]
    assert steps == sorted(steps) and "-p encoder 'features'" in said
    assert (
        "extract_features"
        not in subprocess.run(
            ["make", "-n", "demo", "DATASET=iemocap"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_half_precision(mine):
    a, b = (
        load_prepared(extract(mine, "small", out=p, precision=p, progress=False))
        for p in ("no", "bf16")
    )
    x, y = a.test[1]["x"]["audio"], b.test[1]["x"]["audio"]
    assert not x.equal(y) and torch.allclose(x, y, atol=0.05, rtol=0.1)


def test_features_that_are_not_finite_name_the_sample(tmp_path):
    folder = made(tmp_path / "iemocap-nan", spoiled=37)
    with pytest.raises(
        InputError,
        match="sample 'clip37': the features of audio are not finite in 16 bits",
    ):
        s = load_prepared(folder)
        read = Extractor(
            s,
            {
                "audio": call(
                    encoders["small_audio"],
                    {},
                    mod=MODS["audio"],
                    items=None,
                    preprocessor={"mean": 0.0, "std": 1.0},
                )
            },
            16,
        )
        for i in range(len(s.train)):
            read({"id": s.train.ids[i], "split": "train", "row": i, "y": "sad"})


def test_wrong_arguments_are_one_sentence(mine, done):
    tiny = ("--dataset", "iemocap", "--variant", "tiny")
    assert "which encoders? Give --encoder" in cli(*tiny) and "and not both" in cli(
        *tiny, "--encoder", "small", "--run", "runs/x"
    )
    assert "did you mean 'iemocap'" in cli("--dataset", "iemocp", "--encoder", "small")
    assert "of which dataset? Add --dataset" in cli(
        "--variant", "tiny", "--encoder", "small"
    )
    assert "no prepared dataset at data/iemocap;" in cli(
        "--dataset", "iemocap", "--encoder", "small"
    )
    assert "no prepared dataset at elsewhere" in cli(
        "--data", "elsewhere", "--encoder", "small"
    )
    assert "holds extracted features already" in cli(
        "--data", done, "--encoder", "small"
    )
    assert "did you mean 'small'" in cli(
        *tiny, "--encoder", "smal"
    ) and "names none for video" in cli(
        *tiny, "--encoder", "audio=small", "--modalities", "audio,video"
    )
    assert "unknown modality 'image'" in cli(*tiny, "--encoder", "image=small")
    assert "needs a model: hf:NAME" in cli(
        *tiny, "--encoder", "audio=small,video=small,text=hf"
    )
    assert "batch_size=0" in cli(
        *tiny, "--encoder", "small", "--batch_size", 0
    ) and "precision='fp16'" in cli(*tiny, "--encoder", "small", "--precision", "fp16")
    assert "variant='../x'" in cli(
        "--dataset", "iemocap", "--variant", "../x", "--encoder", "small"
    )
    assert "so we did not make it" in cli(*tiny, "--encoder", "small", "--out", ".")
    with pytest.raises(SystemExit):
        extract_main("doc", ["--encode", "small"])


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        extract_main("doc", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "samples at once (default: 64)" in said
        and "(default: none; this or --run is needed)" in said
    )
    for a in _parser(
        ""
    )._actions:  # switches are off, and names are empty, without a word
        assert (
            a.nargs == 0 or a.dest in ("dataset", "variant") or "(default: " in a.help
        ), a.dest


def test_features_and_other_encoders_do_not_mix(done):
    features = {
        "dataset": "iemocap",
        "dataset_args": "variant=tiny-features",
        "epochs": 1,
        "progress": False,
    }
    with pytest.raises(
        InputError,
        match=(
            r"encoder='small' for audio: its items are extracted features .*say "
            r"--encoder features"
        ),
    ):
        run(Run(**features))
    with pytest.raises(
        InputError, match="encoder='small' for text.*say --encoder features"
    ):
        run(Run(**features, encoder="audio=features,video=features,text=small"))
    with pytest.raises(
        InputError,
        match=(
            "encoder='features' for audio.*of the form 'features'; extract features "
            "first"
        ),
    ):
        run(Run(**{**features, "dataset_args": "variant=tiny"}, encoder="features"))
    with pytest.raises(InputError, match="encoder=features reads extracted features"):
        encoders["features_text"](MODS["text"], ["a"])
    assert not os.path.exists("runs")


def test_the_encoder_of_features():
    x = [torch.tensor([k, 2.0 * k + 5, 7.0]) for k in range(50)]
    preprocessor = Vectors().fit(x)
    z = preprocessor.inputs(x)
    assert (
        torch.allclose(z.mean(0), torch.zeros(3), atol=1e-5)
        and torch.allclose(z[:, :2].std(0, unbiased=False), torch.ones(2))
        and not z[:, 2].any()
    )  # a constant says nothing
    for options, layers in (({"width": 5}, 2), ({"width": 5, "hidden": 0}, 1)):
        enc = call(
            encoders["features_image"],
            options,
            mod=Modality("image", "vector"),
            items=x,
        )
        check_encoder(enc, x)
        assert (
            enc.num_features == 5
            and sum(isinstance(m, torch.nn.Linear) for m in enc.modules()) == layers
        )
        again = call(
            encoders["features_image"],
            options,
            mod=Modality("image", "vector"),
            preprocessor=json.loads(json.dumps(enc.preprocessor.config())),
        )
        again.load_state_dict(enc.state_dict())
        assert again(again.preprocessor.inputs(x)).equal(
            enc(enc.preprocessor.inputs(x))
        )
    for bad in ({"width": 0}, {"hidden": -1}, {"width": "5"}):
        with pytest.raises(InputError, match="must be a whole number"):
            call(
                encoders["features_audio"],
                bad,
                mod=Modality("audio", "vector"),
                items=x,
            )
    assert MLP(3, 2, 0)(z).shape == (50, 2)


def test_vectors_are_stored_in_16_bits():
    mod = Modality("text", "vector", {"shape": [4]})
    x = torch.tensor([1.0, -2.0, 0.5, 65504.0])
    assert (
        unpack(pack(x, mod), mod).equal(x)
        and len(pack(x, mod)) == 8
        and unpack(None, mod) is None
        and pack(None, mod) is None
    )
    with pytest.raises(InputError, match="unknown form of text 'image'"):
        Modality("text", "image")


def test_checksums_follow_the_weights():
    set_seed(0)
    a, b = MLP(3, 2), MLP(3, 2)
    assert weights_of(a) != weights_of(b)
    b.load_state_dict(a.state_dict())
    assert weights_of(a) == weights_of(b)
