"""CREMA-D from a tree of the official layout, and what can go wrong in it.

Names, published lists, the command line.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, killed_at_the_second_shard, script

from mla_nb.compare import table
from mla_nb.core import InputError, check_dataset, datasets
from mla_nb.data.cremad import (
    LABELS,
    audit,
    clip_traits,
    cremad_rows,
    cremad_splits,
    parse_clip,
    prepare_cremad,
)
from mla_nb.data.media import read_split, split_name
from mla_nb.data.miniature import miniature
from mla_nb.runs.run import Run, run

SMALL = {"audio": "log_mel", "seconds": 1.5, "size": 24, "progress": False}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return miniature("cremad", tmp_path_factory.mktemp("raw") / "CREMA-D", 120)


def cli(*args, ok=True):
    "A process of its own, with workers of its own; `script` needs none"
    p = subprocess.run(
        [sys.executable, str(ROOT / "data_scripts/prepare_cremad.py"), *map(str, args)],
        capture_output=True,
        text=True,
    )
    assert (p.returncode == 0) == ok, p.stdout + p.stderr
    assert ok or "Traceback" not in p.stderr, p.stderr
    return p.stdout + p.stderr


LISTS = {
    "ogm": ("cremad_ogm_train.csv", "cremad_ogm_test.csv"),
    "mla": ("cremad_mla_train.txt", "cremad_mla_test.txt"),
}


@pytest.mark.parametrize("name", LISTS)
def test_the_published_lists_parse_and_split_as_published(real_lists, name):
    files = real_lists(*LISTS[name])
    lists = dict(zip(("train", "test"), map(read_split, files)))
    assert {k: len(v) for k, v in lists.items()} == {"train": 6698, "test": 744}
    clips = [parse_clip(r["id"]) for v in lists.values() for r in v]
    assert len({c["id"] for c in clips}) == 7442
    assert all(
        LABELS[r["label"].lower()] == parse_clip(r["id"])["y"]
        for v in lists.values()
        for r in v
    )
    splits = cremad_splits(clips, files)
    assert [len(splits[k]) for k in ("train", "valid", "test")] == [6028, 670, 744]
    for part, names in (
        (splits["train"] + splits["valid"], lists["train"]),
        (splits["test"], lists["test"]),
    ):
        assert Counter(r["y"] for r in part) == Counter(
            LABELS[r["label"].lower()] for r in names
        )
    assert split_name(files) == name
    apart = cremad_splits(clips, ["speaker"])
    assert not {c["actor"] for c in apart["train"]} & {
        c["actor"] for c in apart["test"]
    }


def shared(first, second):
    return {r["what"]: r for r in audit(first, second, clip_traits)}


def test_the_two_published_splits_share_few_test_clips(real_lists):
    files = {k: real_lists(*v) for k, v in LISTS.items()}
    ogm, mla = ([read_split(f) for f in files[k]] for k in ("ogm", "mla"))
    for train, test in (ogm, mla):  # one split against itself
        found = shared(train, test)
        assert found["clip"]["both"] == 0
        for what, n in (("actor", 91), ("sentence", 12), ("emotion", 6)):
            assert found[what]["train"] == found[what]["both"] == n
            assert found[what]["seen"] == 744
    assert shared(ogm[1], mla[1])["clip"]["both"] == 71
    assert shared(ogm[0], mla[1])["clip"]["both"] == 673
    assert shared(mla[0], ogm[1])["clip"]["both"] == 673
    assert {r["id"] for r in ogm[0] + ogm[1]} == {r["id"] for r in mla[0] + mla[1]}


@pytest.mark.parametrize("name", LISTS)
def test_the_command_line_takes_the_published_lists(real_lists, mine, name):
    files = real_lists(*LISTS[name])
    args = ["--root", mine, "--size", 24, "--seconds", 1.5, "--audio", "log_mel"]
    args += ["--split", *files]
    assert "samples that are not there" in script("cremad", *args, ok=False)
    said = script("cremad", *args, "--absent", "skip", "--variant", name)
    assert f"split: {name}\n" in said
    s = datasets["cremad"](variant=name)
    assert s.info["source"]["split_name"] == name
    assert s.info["source"]["split"] == [f.name for f in files]
    listed = {r["id"] for r in read_split(files[1])}
    assert s.parts["test"].ids and set(s.parts["test"].ids) <= listed


def test_a_result_names_its_split(mine):
    rows = cremad_rows(mine)
    for part, some in (("train", rows[:90]), ("test", rows[90:])):
        text = "\n".join(f"{r['id']}.flv {r['y'].title()}" for r in some)
        (mine.parent / f"{part}.txt").write_text(text)
    prepare_cremad(mine, ["train.txt", "test.txt"], **SMALL)
    prepare_cremad(mine, ["random"], variant="chance", **SMALL)
    quick = {"dataset": "cremad", "encoder": "small", "epochs": 1, "progress": False}
    found = run(Run(**quick)), run(Run(**quick, dataset_args="variant=chance"))
    assert [r["split"] for r in found] == ["train.txt+test.txt", "random"]
    text = table()
    assert "| cremad, split train.txt+test.txt |" in text
    assert "| cremad variant=chance, split random |" in text


def test_from_the_command_line_to_a_run_and_twice_is_nothing(mine):
    out = cli("--root", mine, "--audio", "log_mel", "--seconds", 1.5, "--size", 24)
    assert "ready: data/cremad" in out and "total" in out and "anger" in out
    before = {p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")}
    assert "already prepared: 120" in script(
        "cremad", "--root", mine, "--audio", "log_mel", "--seconds", 1.5, "--size", 24
    )
    assert before == {
        p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")
    }
    assert "prepared differently (options." in script(
        "cremad", "--root", mine, "--audio", "fbank", ok=False
    )
    check_dataset(datasets["cremad"]())
    r = run(
        Run(
            dataset="cremad",
            encoder="small",
            epochs=1,
            batch_size=32,
            lr=0.05,
            progress=False,
            threads=1,
        )
    )
    assert (
        set(r["test"]["accuracy"]) == {"fused", "audio", "video"}
        and r["run"]["lr"] == 0.05
    )


def test_miniature_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = script("cremad", "--miniature")
    assert "nothing in it was recorded" in out and "ready: data/cremad-miniature" in out
    assert (
        "made, not recorded"
        in json.loads((tmp_path / "data/cremad-miniature/dataset.json").read_text())[
            "source"
        ]["name"]
    )
    with pytest.raises(InputError, match="prepared are: cremad-miniature"):
        datasets["cremad"]()


def test_kill_9_is_repaired_by_running_again(mine):
    args = ["--root", str(mine), "--audio", "log_mel", "--size", "24", "--workers", "1"]
    first = killed_at_the_second_shard(mine.parent, "prepare_cremad.py", *args)
    for out in ("cut", "whole"):
        script("cremad", *args, "--out", out)
    assert {f.name: f.read_bytes() for f in (mine.parent / "cut").glob("*.arrow")} == {
        f.name: f.read_bytes() for f in (mine.parent / "whole").glob("*.arrow")
    }
    assert all(
        (mine.parent / "cut" / n).stat().st_mtime_ns == t for n, t in first.items()
    )  # not made a second time


def test_broken_clips_are_left_out_with_a_reason(mine):
    clips = sorted((mine / "VideoFlash").iterdir())
    clips[0].write_bytes(b"")
    clips[1].write_text("version https://git-lfs.github.com/spec/v1\n")
    clips[2].write_bytes(clips[2].read_bytes()[:900])
    clips[3].unlink()
    wav = mine / "AudioWAV" / f"{clips[4].stem}.wav"
    wav.write_bytes(wav.read_bytes()[:500])
    out = prepare_cremad(mine, **SMALL)
    listed = (out / "skipped.csv").read_text()
    for k, why in enumerate(
        ("is empty", "git-lfs pointer", "cut short", "no such video", "cut short")
    ):
        assert any(
            clips[k].stem in line and why in line for line in listed.splitlines()
        ), listed
    assert (
        sum(
            v["total"]
            for v in json.loads((out / "dataset.json").read_text())["counts"].values()
        )
        == 115
    )


def test_capitals_and_hidden_files_do_not_matter(mine):
    wavs = sorted((mine / "AudioWAV").iterdir())
    wavs[0].rename(wavs[0].with_suffix(".WAV"))
    (mine / "AudioWAV" / f"._{wavs[1].name}").write_bytes(b"resource fork")
    rows = cremad_rows(mine)
    assert len(rows) == 120 and rows[0]["audio"].endswith(".WAV")


def test_a_clone_without_lfs_is_named_as_such(mine):
    for f in mine.rglob("*.*v"):
        f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    said = script("cremad", "--root", mine, ok=False)
    assert (
        "git lfs pull" in said
        and "hardly the right folder" in said
        and not (mine.parent / "data/cremad").exists()
    )


def test_wrong_roots_splits_and_names(mine):
    assert "AudioWAV: there is no such folder" in script(
        "cremad", "--root", mine / "AudioWAV", ok=False
    )
    assert "did you mean 'speaker'" in script(
        "cremad", "--root", mine, "--split", "speakers", ok=False
    )
    (
        (mine.parent / "train.csv").write_text(
            "1001_IEO_HAP_MD,HAP\n1099_IEO_HAP_MD,HAP\n"
        ),
        (mine.parent / "test.csv").write_text("1002_IEO_HAP_MD,HAP\n"),
    )
    assert "1 of 3 samples that are not there (1099_IEO_HAP_MD)" in script(
        "cremad", "--root", mine, "--split", "train.csv", "test.csv", ok=False
    )
    (mine / "AudioWAV/notes.wav").write_text("x")
    assert "'notes' is not named ACTOR_SENTENCE" in script(
        "cremad", "--root", mine, ok=False
    )
    assert not (mine.parent / "data").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(mine):
    (mine.parent / "locked").mkdir(mode=0o500)
    assert "cannot read or write" in script(
        "cremad", "--root", mine, "--data", "locked", "--size", 24, ok=False
    )
