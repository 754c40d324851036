"""IEMOCAP from a tree of the official layout, and what can go wrong in it.

Annotation files, the speaker's half, splits by session, the command line.
"""

import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from conftest import POINTER, killed_at_the_second_shard, script

from mla_nb.core import InputError, check_dataset, datasets
from mla_nb.data import media
from mla_nb.data.iemocap import (
    CLASSES,
    half,
    iemocap_rows,
    iemocap_splits,
    prepare_iemocap,
    read_emotions,
    read_words,
)
from mla_nb.data.miniature import miniature
from mla_nb.runs.run import Run, run

SMALL = {"audio": "log_mel", "seconds": 1.5, "size": 24, "progress": False}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return miniature(
        "iemocap", tmp_path_factory.mktemp("raw") / "IEMOCAP_full_release", 120
    )


cli = partial(script, "iemocap")


def refused(root, why, split=("random",), **kw):
    "One clear sentence, and nothing half-written"
    with pytest.raises(InputError, match=why) as e:
        prepare_iemocap(root, split, **{**SMALL, **kw})
    assert "\n" not in str(e.value) and not list(root.parent.glob("data/*"))


def labels(root, k=1):
    return root / f"Session{k}/dialog/EmoEvaluation/Ses0{k}F_impro01.txt"


def test_the_official_formats(tmp_path):
    "Lines as the release has them; other lines and files are passed over"
    (tmp_path / "Ses01F_impro01.txt").write_text(
        "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n"
        "\n"
        "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"
        "C-E2:\tNeutral;\t()\n"
        "A-E3:\tval 3; act 2; dom  2;\t()\n"
        "\n"
        "[10.0100 - 11.3925]\tSes01F_impro01_MXX0\txxx\t[2.5000, 2.5000, 2.5000]\n"
    )
    found = read_emotions(tmp_path / "Ses01F_impro01.txt")
    assert [(u["id"], u["code"], u["span"]) for u in found] == [
        ("Ses01F_impro01_F000", "neu", (6.2901, 8.2357)),
        ("Ses01F_impro01_MXX0", "xxx", (10.01, 11.3925)),
    ]
    (tmp_path / "words.txt").write_text(
        "Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.\n"
        "M: [LAUGHTER]\n"
        "Ses01F_impro01_M000 [008.0000-009.0000]: \n"
    )
    assert read_words(tmp_path / "words.txt") == {"Ses01F_impro01_F000": "Excuse me."}


def test_rows_of_the_tree(mine):
    here = labels(mine).parent
    (here / "._Ses01F_impro01.txt").write_bytes(b"\0\5\x16\7Mac OS X")
    (here / "Categorical").mkdir()
    (here / "Categorical/Ses01F_impro01_e1_cat.txt").write_text(
        "Ses01F_impro01_F000 :Neutral state; ()\n[broken"
    )
    rows = iemocap_rows(mine)
    codes = [
        line.split("\t")[2]
        for p in mine.rglob("EmoEvaluation/Ses*_*1.txt")
        for line in p.read_text().splitlines()
        if line.startswith("[")
    ]
    n = Counter(codes)
    assert (
        Counter(r["y"] for r in rows)
        == {
            "angry": n["ang"],
            "sad": n["sad"],
            "neutral": n["neu"],
            "happy": n["hap"] + n["exc"],
        }
        and n["exc"]
        and n["fru"] + n["xxx"] == 120 - len(rows)
    )
    assert {r["session"] for r in rows} == {1, 2, 3, 4, 5} and all(
        r["text"] for r in rows
    )
    assert (
        iemocap_rows(mine.parent / "raw", "whole")[0]["crop"] is None
        and "video" not in iemocap_rows(mine, "none")[0]
    )
    shutil.move(mine, mine.parent / "IEMOCAP_full_release")
    assert len(iemocap_rows(mine.parent)) == len(rows)  # the folder above will do


def test_the_speakers_half_holds_the_speakers_face(mine):
    "The silent one hides below a cap and behind a scarf: no mouth is seen"
    assert half("Ses03M_script01_1_M004") == (0, 0, 0.5, 1) and half(
        "Ses03M_script01_1_F004"
    ) == (0.5, 0, 1, 1)
    rows = iemocap_rows(mine)[:40]

    def mouth(r, crop):
        return (
            media.video_frames(r["video"], 0.5, r["span"], crop)[1]
            .float()
            .mean(0)[58:82, 34:62]
            .std()
            .item()
        )

    def other(r):
        return (0.5, 0, 1, 1) if r["crop"][0] == 0 else (0, 0, 0.5, 1)

    speaks, listens = (
        np.median([mouth(r, c(r)) for r in rows]) for c in (lambda r: r["crop"], other)
    )
    assert speaks > 1.5 * listens, (speaks, listens)


def test_cutting_utterances_does_not_decode_the_dialogue(tmp_path, monkeypatch):
    "However late the span: about one keyframe interval, not all that lies before it"
    with av.open(str(tmp_path / "long.avi"), "w") as c:
        v = c.add_stream("mpeg4", rate=10)
        v.width, v.height, v.pix_fmt, v.codec_context.gop_size = 64, 48, "yuv420p", 50
        for k in range(3000):
            c.mux(
                v.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((48, 64, 3), k // 10 % 150 + 50, "u1"), format="rgb24"
                    )
                )
            )
        c.mux(v.encode())
    decoded, opened = Counter(), media._opened

    class Counting:
        def __init__(self, c):
            self.c = c

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.c.close()

        def __getattr__(self, k):
            return getattr(self.c, k)

        def decode(self, s):
            for f in self.c.decode(s):
                decoded["n"] += 1
                yield f

    monkeypatch.setattr(media, "_opened", lambda *a: Counting(opened(*a)))
    for start in (0, 100, 200, 298):
        decoded.clear()
        frames = media.video_frames(
            tmp_path / "long.avi", 1.0, (start + 0.2, start + 1.7)
        )
        assert (
            abs(frames[-1].float().mean() - (start % 150 + 51)) < 3
            and decoded["n"] < 100
        ), (start, decoded)


def test_a_video_whose_end_is_zeros_is_not_answered_with_its_beginning(mine):
    r = iemocap_rows(mine)[9]
    video = Path(r["video"])
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 3] + bytes(len(data) - len(data) // 3))
    with pytest.raises(InputError, match="no picture can be decoded|damaged"):
        media.video_frames(r["video"], 1.0, r["span"])


def test_splits(mine):
    rows = iemocap_rows(mine)
    for k in range(1, 6):
        parts = iemocap_splits(rows, [f"session={k}"])
        assert {r["session"] for r in parts["test"]} == {k} and k not in {
            r["session"] for r in parts["train"] + parts["valid"]
        }
        assert len(parts["valid"]) == pytest.approx(
            0.1 * len(parts["train"] + parts["valid"]), abs=2
        ) and {r["y"] for r in parts["valid"]} == set(CLASSES)
    written = [
        "{}.mp4 [split|sign] {} [split|sign] {}\n".format(
            r["id"], r["text"], {"happy": "hap", "angry": "Ang"}.get(r["y"], r["y"])
        )
        for r in rows
    ]
    (
        (mine.parent / "train.txt").write_text("".join(written[:70])),
        (mine.parent / "test.txt").write_text("".join(written[70:])),
    )
    parts = iemocap_splits(rows, ["train.txt", "test.txt"])
    assert [r["id"] for r in parts["test"]] == [r["id"] for r in rows[70:]] and len(
        parts["train"] + parts["valid"]
    ) == 70
    assert (
        len(iemocap_splits(rows, ["train.txt", "test.txt", "test.txt"][:2])["test"])
        == len(rows) - 70
    )
    for how, why in (
        (["session=6"], "choose one of 1, 2, 3, 4, 5"),
        (["session="], "no such session"),
        (["sesion=5"], "did you mean 'session=5'"),
        (["session=5", "test.txt"], "no such text file"),
    ):
        with pytest.raises(InputError, match=why):
            iemocap_splits(rows, how)
    (mine.parent / "more.txt").write_text(
        "".join(written[70:])
        + "Ses09F_impro01_F000.mp4 [split|sign] no [split|sign] sad\n"
    )
    (mine.parent / "joy.txt").write_text(
        "".join(written[70:]).replace("[split|sign] sad", "[split|sign] gloom")
    )
    (mine.parent / "both.txt").write_text("".join(written[69:]))
    for f, why in (
        ("more", r"1 of \d+ samples that are not there \(Ses09F_impro01_F000\)"),
        ("joy", "unknown label .*gloom"),
        ("both", "in the train list and in the test list"),
    ):
        refused(mine, why, ["train.txt", f"{f}.txt"])


def test_from_the_command_line_to_a_run_and_twice_is_nothing(mine):
    args = [
        "--root",
        mine,
        "--audio",
        "log_mel",
        "--seconds",
        1.5,
        "--size",
        24,
        "--split",
        "session=5",
    ]
    out = cli(*args)
    assert "ready: data/iemocap" in out and "total" in out and "angry" in out
    before = {p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")}
    assert "already prepared" in cli(*args)
    assert before == {
        p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")
    }
    assert "prepared differently (options." in cli(*args, "--faces", "whole", ok=False)
    s = datasets["iemocap"]()
    check_dataset(s)
    assert s.info["faces"] == "speaker" and list(s.modalities) == [
        "audio",
        "video",
        "text",
    ]
    r = run(
        Run(
            dataset="iemocap",
            encoder="small",
            epochs=1,
            batch_size=32,
            lr=0.05,
            progress=False,
            threads=1,
        )
    )
    assert (
        set(r["test"]["accuracy"]) == {"fused", "audio", "video", "text"}
        and Run(dataset="iemocap", preset="paper").epochs == 100
    )


def test_kill_9_is_repaired_by_running_again(mine):
    args = ["--root", str(mine), "--audio", "log_mel", "--size", "24", "--workers", "0"]
    first = killed_at_the_second_shard(mine.parent, "prepare_iemocap.py", *args)
    for out in ("cut", "whole"):
        cli(*args, "--out", out)
    assert {f.name: f.read_bytes() for f in (mine.parent / "cut").iterdir()} == {
        f.name: f.read_bytes() for f in (mine.parent / "whole").iterdir()
    }
    assert all(
        (mine.parent / "cut" / n).stat().st_mtime_ns == t for n, t in first.items()
    )  # not made a second time


def test_missing_words_are_absent_and_broken_recordings_left_out(mine, capsys):
    rows = iemocap_rows(mine)
    (mine / "Session2/dialog/transcriptions/Ses02F_impro01.txt").unlink()
    said = labels(mine, 3).parents[1] / "transcriptions/Ses03F_impro01.txt"
    said.write_text("".join(said.read_text().splitlines(True)[1:]))
    lost = {r["id"] for r in rows if r["id"].startswith("Ses02F_impro01")} | {
        "Ses03F_impro01_F000"
    }
    wavs = {r["id"]: mine / r["audio"] for r in rows if r["session"] == 4}
    bad = dict(
        zip(wavs, ("is empty", "git-lfs pointer", "cut short", "no such recording"))
    )
    spoil = [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(POINTER),
        lambda p: p.write_bytes(p.read_bytes()[:500]),
        lambda p: p.unlink(),
    ]
    for i, f in zip(bad, spoil):
        f(wavs[i])
    x, rate = sf.read(wavs[list(wavs)[5]])
    (
        sf.write(wavs[list(wavs)[5]], np.stack([x, x], 1).repeat(2, 0), 2 * rate),
        sf.write(wavs[list(wavs)[6]], x[::2], 8000),
    )  # resampled, not refused
    videos = {
        "Ses05F_impro01": lambda p: p.write_bytes(p.read_bytes()[:4000]),
        "Ses05M_script01_1": lambda p: p.unlink(),
    }
    for name, f in videos.items():
        f(mine / f"Session5/dialog/avi/DivX/{name}.avi")
    out = prepare_iemocap(mine, **{**SMALL, "progress": True})
    assert (
        f"note: {len(lost)} of {len(rows)} utterances have no transcript"
        in capsys.readouterr().out
    )
    listed = (out / "skipped.csv").read_text().splitlines()
    assert all(
        any(i in line and why in line for line in listed) for i, why in bad.items()
    ), listed
    assert all(
        any(
            r["id"] in line and ("cut short" in line or "no such video" in line)
            for line in listed
        )
        for r in rows
        if r["session"] == 5
    )
    s = media.load_prepared(out)
    kept = [i for p in s.parts.values() for i in p.ids]
    assert (
        len(listed) - 1
        == len(bad) + sum(r["session"] == 5 for r in rows)
        == len(rows) - len(kept)
    )
    assert (
        sum(len(p.column("text")) for p in s.parts.values()) == len(kept) - len(lost)
        and list(wavs)[5] in kept
        and list(wavs)[6] in kept
    )


def no_video_stream(root):
    for p in root.rglob("*.avi"):
        shutil.copy(next(root.rglob("Ses01F_impro01_F000.wav")), p)


WRONG = {
    "no avi": (
        lambda r: [p.unlink() for p in r.rglob("*.avi")],
        "no dialogue has its video .*--faces none",
    ),
    "no words": (
        lambda r: (
            shutil.rmtree(r / "Session1/dialog/transcriptions")
            or [p.unlink() for p in r.rglob("transcriptions/*.txt")]
        ),
        "no utterance has its words",
    ),
    "no labels": (
        lambda r: shutil.rmtree(r / "Session3/dialog/EmoEvaluation"),
        "Session3/dialog/EmoEvaluation: there is no such folder",
    ),
    "twice": (
        lambda r: labels(r).write_text(labels(r).read_text() + labels(r).read_text()),
        "'Ses01F_impro01_F000' occurs more than once",
    ),
    "malformed": (
        lambda r: labels(r).write_text("x\n[6.2 - 8.1] Ses01F_impro01_F000 neu\n"),
        "line 2: '.6.2 - 8.1. Ses01F_impro01_F000 neu' is not an utterance",
    ),
    "backwards": (
        lambda r: labels(r).write_text(
            "[8.2 - 6.1]\tSes01F_impro01_F000\tneu\t[2, 2, 2]\n"
        ),
        "line 1: .* is not an utterance",
    ),
    "other dialogue": (
        lambda r: labels(r).write_text(
            "[6.1 - 8.2]\tSes01F_impro02_F000\tneu\t[2, 2, 2]\n"
        ),
        "not an utterance of this dialogue",
    ),
    "code": (
        lambda r: labels(r).write_text(
            "[6.1 - 8.2]\tSes01F_impro01_F000\tsda\t[2, 2, 2]\n"
        ),
        "unknown emotion .*'sda': did you mean 'sad'",
    ),
    "pointers": (
        lambda r: [p.write_bytes(POINTER) for p in r.rglob("*.wav")],
        "hardly the right folder.*git-lfs pointer",
    ),
    "sound only": (no_video_stream, "hardly the right folder.*no video stream"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_tree_is_one_sentence(mine, what):
    WRONG[what][0](mine)
    refused(mine, WRONG[what][1])


def test_wrong_roots_and_options(mine):
    assert "Session1 … Session5" in cli("--root", mine / "Session1", ok=False)
    refused(mine, "Allowed: none, speaker, whole", faces="left")
    for p in mine.rglob("*.avi"):
        p.unlink()
    s = media.load_prepared(prepare_iemocap(mine, faces="none", **SMALL))
    assert list(s.modalities) == ["audio", "text"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(mine):
    (mine.parent / "locked").mkdir(mode=0o500)
    assert "cannot read or write" in cli(
        "--root", mine, "--data", "locked", "--size", 24, ok=False
    )


MLA = ("iemocap_mla_train.txt", "iemocap_mla_test.txt")


def test_the_real_lists_of_mla_split_rows_with_their_ids(real_lists):
    files = real_lists(*MLA)
    lists = [media.read_split(f) for f in files]
    assert [len(v) for v in lists] == [3318, 1107]
    rows = [{"id": r["id"], "text": "as the release has it"} for v in lists for r in v]
    splits = iemocap_splits(rows, files)
    assert [len(splits[k]) for k in ("train", "valid", "test")] == [2986, 332, 1107]
    assert Counter(r["y"] for r in splits["test"]) == Counter(
        r["label"].lower() for r in lists[1]
    )
    assert {r["text"] for r in splits["test"]} == {"as the release has it"}
    assert media.split_name(files) == "mla"


def test_lists_as_mla_has_them_and_wrong_lines(mine):
    rows = iemocap_rows(mine)
    lines = [
        f"{r['id']}.mp4 [split|sign] said so [split|sign] {r['y'].title()}"
        for r in rows
    ]
    (mine.parent / "train.txt").write_text("\n".join(lines[:60]))
    (mine.parent / "test.txt").write_text("\n".join(lines[60:]))
    said = cli(
        *("--root", mine, "--split", "train.txt", "test.txt"),
        *("--size", 24, "--seconds", 1.5, "--audio", "log_mel"),
    )
    assert "split: train.txt+test.txt" in said
    s = datasets["iemocap"]()
    assert sum(map(len, s.parts.values())) == len(rows)
    assert "said so" not in {x["text"] for x in s.train.ds.select_columns(["text"])}
    for line, why in (
        ("Ses01F_impro01_F000.mp4 Happy", "expected `name .split.sign. text"),
        (lines[0].replace(rows[0]["y"].title(), ""), "expected `name .split.sign."),
        (lines[0].replace(rows[0]["y"].title(), "Hapy"), "did you mean"),
    ):
        (mine.parent / "train.txt").write_text("\n".join([line, *lines[1:60]]))
        with pytest.raises(InputError, match=why) as e:
            prepare_iemocap(mine, ["train.txt", "test.txt"], variant="x", **SMALL)
        assert "\n" not in str(e.value)
