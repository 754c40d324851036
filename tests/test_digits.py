"""The digits dataset: preparation from the command line.

On synthetic recordings and on the real ones.
"""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import killed_at_the_second_shard

from mla_nb.core import InputError, check_dataset
from mla_nb.data.digits import (
    CONTENT,
    content_sha,
    digits,
    digits_main,
    miniature,
    prepare_digits,
    read_archive,
)
from mla_nb.runs.run import Run, run


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    return {
        p: (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_prepare_train_predict(here, tones, capsys):
    digits_main(["--archive", str(tones), "--split", "speaker", "--image_noise", "0.3"])
    assert "ready: data/digits-speaker-noise0.3" in capsys.readouterr().out
    s = digits("data", split="speaker", image_noise=0.3)
    check_dataset(s)
    meta = json.loads((here / "data/digits-speaker-noise0.3/dataset.json").read_text())
    assert (
        meta["counts"]["train"]["total"] == len(s.train) == 4 * 10 * 7
        and meta["counts"]["test"]["7"] == 2 * 12
    )
    assert (
        meta["modalities"]["audio"]["info"]["feature"] == "log_mel"
        and meta["source"]["published"] is False
    )
    r = run(
        Run(
            dataset="digits",
            dataset_args="split=speaker,image_noise=.3",
            epochs=2,
            progress=False,
            threads=1,
        )
    )
    assert (
        set(r["test"]["accuracy"]) == {"fused", "audio", "image"}
        and r["bayes"] is None
        and r["n_test"] == len(s.test)
    )


def test_twice_is_nothing(here, tones, capsys):
    digits_main(["--archive", str(tones)])
    before = tree(here / "data")
    digits_main(["--archive", str(tones)])
    assert (
        tree(here / "data") == before and "already prepared" in capsys.readouterr().out
    )


def test_root_gives_the_same_as_archive(here, tones):
    with zipfile.ZipFile(tones) as z:
        z.extractall(here / "clone")
    digits_main(["--root", "clone/miniature", "--out", "a"])
    digits_main(["--archive", str(tones), "--out", "b"])
    assert [(here / f"{x}/train-00000.arrow").read_bytes() for x in "ab"][0] == (
        here / "b/train-00000.arrow"
    ).read_bytes()


def test_no_image_is_in_two_splits(here, tones):
    digits_main(["--archive", str(tones)])
    s = digits("data")
    seen = [
        {i.numpy().tobytes() for i in p.column("image")}
        for p in (s.train, s.valid, s.test)
    ]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_kill_9_is_repaired_by_running_again(here):
    "Killed at work; the second call makes what is missing, byte for byte the same"
    miniature("tones.zip", per=20)
    first = killed_at_the_second_shard(
        here, "prepare_digits.py", "--archive", "tones.zip"
    )
    for out in ("cut", "whole"):
        digits_main(["--archive", "tones.zip", "--out", out])
    assert not (here / "cut.partial").exists()
    assert all(
        (here / "cut" / n).stat().st_mtime_ns == t for n, t in first.items()
    )  # not made a second time
    assert {f.name: f.read_bytes() for f in (here / "cut").glob("*.arrow")} == {
        f.name: f.read_bytes() for f in (here / "whole").glob("*.arrow")
    }


def broken(tones, name, data):
    "A copy of the made archive with one member replaced (None: left out)"
    out = f"{name}.zip"
    with zipfile.ZipFile(tones) as a, zipfile.ZipFile(out, "w") as b:
        for i, m in enumerate(a.namelist()):
            if i == 5 and data is None:
                continue
            b.writestr(m, data(a.read(m)) if i == 5 else a.read(m))
    return out


BAD = {
    "pointer": (
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
        "git-lfs pointer",
    ),
    "truncated": (lambda b: b[: len(b) // 2], "cut short"),
    "text": (lambda b: b"this is not a sound", "not a readable recording"),
    "empty": (lambda b: b"", "the file is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_recording(name, here, tones):
    change, says = BAD[name]
    archive = broken(tones, name, change)
    with pytest.raises(SystemExit, match=says) as e:
        digits_main(["--archive", archive])
    assert "0_anna_5.wav" in str(e.value) and "\n" not in str(e.value).strip()
    assert not list(here.glob("data/*")), "something half-written was left"


def test_wrong_arguments(here, tones):
    for args, says in [
        (["--archive", "no.zip"], "no such archive"),
        (["--root", "nowhere"], "no such folder"),
        (["--archive", str(tones), "--split", "speakers"], "did you mean 'speaker'"),
        (["--archive", str(tones), "--occlusion", "3"], "at least 0 and at most 1"),
        (["--archive", str(tones), "--n_train", "5"], "at least 10"),
        (
            ["--archive", str(tones), "--n_train", "5000"],
            "only 120 training recordings",
        ),
    ]:
        with pytest.raises(SystemExit, match=says):
            digits_main(args)
    assert not list(here.glob("data/*"))


def make(names, data=b"x"):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for n in names:
            z.writestr(n, data)
    Path("made.zip").write_bytes(out.getvalue())
    return ["--archive", "made.zip"]


def test_hostile_and_odd_archives(here, tones):
    for names, says in [
        (["a/recordings/../../../x.wav"], "points outside"),
        (["/etc/recordings/0_a_0.wav"], "points outside"),
        (["..\\recordings\\0_a_0.wav"], "points outside"),
        (
            [f"a/recordings/{d}_a_0.wav" for d in range(9)],
            "no recording of the digit 9",
        ),
        (["a/recordings/zero.wav"], "not named"),
        (["a/readme.md"], "no recordings found"),
    ]:
        with pytest.raises(SystemExit, match=says):
            digits_main(make(names))
    assert sorted(p.name for p in here.iterdir()) == ["made.zip"]


def only(tones, keep):
    "The made archive with some recordings only"
    with zipfile.ZipFile(tones) as a, zipfile.ZipFile("some.zip", "w") as b:
        for m in a.namelist():
            d, s, i = m.split("/")[-1].removesuffix(".wav").split("_")
            if keep(int(d), s, int(i)):
                b.writestr(m, a.read(m))
    return ["--archive", "some.zip"]


def test_a_class_that_is_tested_but_not_trained(here, tones):
    "Digit 3 only among the recordings that the official split tests"
    with pytest.raises(
        SystemExit, match="'3' in the (valid|test) split but in no training sample"
    ):
        digits_main(only(tones, lambda d, s, i: d != 3 or i < 5))
    assert not list(here.glob("data/*"))


def test_an_empty_split(here, tones):
    with pytest.raises(SystemExit, match="the train split would be empty"):
        digits_main(only(tones, lambda d, s, i: i < 5))
    with pytest.raises(SystemExit, match="the train split would be empty"):
        digits_main(
            [*only(tones, lambda d, s, i: s in ("anna", "ben")), "--split", "speaker"]
        )
    assert not list(here.glob("data/*"))


def test_a_missing_recording_is_said(here, tones, capsys):
    digits_main(["--archive", broken(tones, "one_less", None), "--split", "speaker"])
    assert (
        "719 recordings that differ from the 3,000 published ones"
        in capsys.readouterr().out
    )


def test_damaged_dataset(here, tones):
    digits_main(["--archive", str(tones), "--split", "speaker"])
    shard = next((here / "data/digits-speaker").glob("test-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="has 100 bytes"):
        digits("data", split="speaker")
    with pytest.raises(SystemExit, match="has 100 bytes"):
        digits_main(["--archive", str(tones), "--split", "speaker"])
    digits_main(["--archive", str(tones), "--split", "speaker", "--force"])
    check_dataset(digits("data", split="speaker"))


def test_other_files_are_never_removed(here, tones):
    (here / "precious").mkdir()
    (here / "precious/thesis.txt").write_text("four years")
    for force in ([], ["--force"]):
        with pytest.raises(SystemExit, match="holds thesis.txt, but no dataset.json"):
            digits_main(["--archive", str(tones), "--out", "precious", *force])
    with pytest.raises(SystemExit, match="is a file"):
        digits_main(["--archive", str(tones), "--out", "precious/thesis.txt"])
    assert [p.name for p in here.rglob("*") if p.is_file()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: "{bad",
        lambda t: "{}",
        lambda t: "[]",
        lambda t: t.replace('"format": 1', '"format": 99'),
    ],
    ids=["json", "empty", "list", "edited"],
)
def test_damaged_description(here, tones, damage):
    out = Path(
        prepare_digits(read_archive(tones), here, split="speaker", progress=False)
    )
    (out / "dataset.json").write_text(damage((out / "dataset.json").read_text()))
    with pytest.raises(InputError, match="with --force"):
        digits(here, split="speaker")
    digits_main(
        ["--archive", str(tones), "--split", "speaker", "--data", str(here), "--force"]
    )
    check_dataset(digits(here, split="speaker"))


def test_a_flipped_byte_is_found(here, tones):
    out = Path(
        prepare_digits(read_archive(tones), here, split="speaker", progress=False)
    )
    shard = next(out.glob("train-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    with pytest.raises(InputError, match="checksum is wrong"):
        digits(here, split="speaker")


def test_empty_names_are_not_taken_for_something_else(here):
    for flag in ("--archive", "--root"):
        with pytest.raises(SystemExit, match="no such|no recordings"):
            digits_main([flag, ""])
    with pytest.raises(SystemExit, match="never taken for recordings"):
        digits_main(["--miniature"])


def test_another_version_of_the_data_is_another_run(here, tones):
    prepare_digits(read_archive(tones), here / "data", split="speaker", progress=False)
    cfg = Run(
        dataset="digits",
        dataset_args={"split": "speaker"},
        epochs=1,
        data=str(here / "data"),
        root=str(here / "runs"),
        progress=False,
    )
    first = run(cfg)
    assert run(cfg) == first
    fewer = {k: v for k, v in read_archive(tones).items() if "_11" not in k}
    prepare_digits(fewer, here / "data", split="speaker", progress=False, force=True)
    with pytest.raises(InputError, match="another version of the dataset"):
        run(cfg)


# the real recordings ------------------------------------------------------------------


def test_real_archive(here, real_archive):
    assert content_sha(read_archive(real_archive)) == CONTENT
    for split, n in (("official", (2400, 300, 300)), ("speaker", (1800, 200, 1000))):
        digits_main(["--archive", str(real_archive), "--split", split])
        s = digits("data", split=split)
        check_dataset(s)
        assert tuple(map(len, (s.train, s.valid, s.test))) == n
        assert all(
            torch.bincount(p.y).tolist() == [len(p) // 10] * 10
            for p in (s.train, s.valid, s.test)
        )
    voices = [{i.split("_")[1] for i in p.ids} for p in (s.train, s.test)]
    assert not voices[0] & voices[1] and voices[1] == {"theo", "yweweler"}


def test_real_recordings_are_learned(here, real_archive):
    "Two epochs on the real thing: far above chance with both modalities, and with each"
    digits_main(["--archive", str(real_archive)])
    r = run(Run(dataset="digits", epochs=2, progress=False, threads=1))
    assert (
        r["test"]["accuracy"]["fused"] > 0.85
        and r["test"]["accuracy"]["image"] > 0.85
        and r["test"]["accuracy"]["audio"] > 0.2
    )
