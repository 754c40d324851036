"""Files as people have them.

Every kind of damage is one clear sentence, and nothing half-written stays behind.
"""

import json

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import POINTER

from mla_nb.core import InputError
from mla_nb.data.decode import encode_image
from mla_nb.data.media import (
    FEATURES,
    media_options,
    open_image,
    prepare_media,
    read_media,
    read_split,
    read_text,
    share_out,
    sound_of,
    split_by_files,
    the_splits,
    video_frames,
    write_video,
)
from mla_nb.data.miniature import MINIATURES, miniature
from mla_nb.data.prepared import evenly, load_prepared

KINDS = "flv", "mp4", "avi"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "A good clip of every kind, two seconds long, dark and then bright"
    folder, t = tmp_path_factory.mktemp("clips"), np.arange(32000) / 16000
    frames = np.repeat(np.array([40, 200], "u1"), 10)[:, None, None, None] + np.zeros(
        (20, 48, 64, 3), "u1"
    )
    for k in KINDS:
        write_video(
            folder / f"ok.{k}",
            frames,
            10,
            None if k == "flv" else np.sin(400 * t).astype("f4") / 2,
        )
    sf.write(folder / "ok.wav", np.sin(400 * t) / 2, 16000)
    (folder / "ok.jpg").write_bytes(
        encode_image(np.full((3, 40, 60), 90, "u1"), "JPEG")
    )
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_frames_come_in_time_order_and_of_the_right_second(clips, kind):
    found = video_frames(clips / f"ok.{kind}", 1.0)
    assert [round(f.float().mean().item(), -1) for f in found] == [40, 200]
    assert [
        round(f.float().mean().item(), -1)
        for f in video_frames(clips / f"ok.{kind}", 0.5, span=(1.0, 2.0))
    ] == [200, 200]
    left = video_frames(clips / f"ok.{kind}", crop=(0, 0, 0.5, 1))[0]
    assert left.shape == (3, 48, 32) and video_frames(clips / f"ok.{kind}", size=16)[
        0
    ].shape == (3, 16, 16)


DAMAGE = {
    "empty": (lambda b: b"", "is empty"),
    "pointer": (lambda b: POINTER, "git-lfs pointer"),
    "noise": (lambda b: bytes(range(256)) * 9, "not a readable"),
    "half": (lambda b: b[: len(b) // 2], "cut short|not a readable|damaged"),
    "head": (lambda b: b[:20], "not a readable|cut short"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["ok.flv", "ok.mp4", "ok.avi", "ok.wav", "ok.jpg"])
def test_damage_is_a_sentence(clips, tmp_path, name, how):
    spoil, why = DAMAGE[how]
    bad = tmp_path / name
    bad.write_bytes(spoil((clips / name).read_bytes()))
    read = {"jpg": open_image, "wav": sound_of}.get(name[-3:], video_frames)
    with pytest.raises(InputError, match=why) as e:
        read(bad)
    assert str(bad) in str(e.value) and "\n" not in str(e.value)
    if name == "ok.mp4" or name == "ok.avi":
        with pytest.raises(InputError, match=why):
            sound_of(bad)


def test_wrong_kinds_of_files(clips, tmp_path):
    with pytest.raises(InputError, match="no video stream"):
        video_frames(clips / "ok.wav")
    with pytest.raises(InputError, match="no audio stream"):
        sound_of(clips / "ok.flv")
    with pytest.raises(InputError, match="there is no such"):
        video_frames(clips / "no.flv")
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path)
    with pytest.raises(InputError, match="begins after the recording ends"):
        video_frames(clips / "ok.avi", span=(8.0, 9.0))
    with pytest.raises(InputError, match="lies outside"):
        sound_of(clips / "ok.wav", span=(8.0, 9.0))
    with pytest.raises(InputError, match="unknown container '.ogv'"):
        write_video(tmp_path / "x.ogv", np.zeros((2, 16, 16, 3), "u1"))


@pytest.mark.parametrize(
    "rate,channels", [(8000, 1), (44100, 2), (16000, 2), (48000, 1)]
)
def test_other_rates_and_stereo_are_resampled_not_refused(tmp_path, rate, channels):
    t = np.arange(rate) / rate
    sf.write(
        tmp_path / "a.wav", np.stack([np.sin(2 * np.pi * 440 * t)] * channels, 1), rate
    )
    x = sound_of(tmp_path / "a.wav")
    assert x.shape == (16000,) and x.abs().max() < 1.1
    assert x[2000:-2000].square().mean().sqrt() == pytest.approx(
        0.5**0.5, abs=0.02
    )  # still the same tone, as loud
    assert (
        torch.stft(x, 1600, window=torch.ones(1600), return_complex=True)
        .abs()
        .mean(1)
        .argmax()
        == 44
    )


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1"])
def test_text_in_any_of_the_usual_encodings(tmp_path, codec):
    (tmp_path / "t.txt").write_bytes(
        "Crème brûlée à la “maison”".replace("“", '"').replace("”", '"').encode(codec)
    )
    assert read_text(tmp_path / "t.txt") == 'Crème brûlée à la "maison"'


@pytest.mark.parametrize(
    "feature,shape",
    [("spectrogram", (129, 626)), ("fbank", (1024, 128)), ("log_mel", (64, 128))],
)
def test_features_have_the_promised_shape_and_no_chance_in_them(clips, feature, shape):
    o = media_options(audio=feature)
    a, b = (
        read_media({"id": "x", "y": "k", "audio": clips / "ok.wav"}, o)["audio"]
        for _ in range(2)
    )
    assert a.shape == shape and (a == b).all() and np.isfinite(a).all()


def test_long_clips_are_cut_where_seed_and_id_say(tmp_path):
    sf.write(
        tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 160000), 16000
    )
    row = {"id": "a", "y": "k", "audio": tmp_path / "long.wav"}
    cut = [
        read_media({**row, "id": i}, media_options(seconds=1.0, seed=s))["audio"]
        for i, s in (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    ]
    assert (
        (cut[0] == cut[1]).all()
        and not (cut[0] == cut[2]).all()
        and not (cut[0] == cut[3]).all()
    )


@pytest.mark.parametrize(
    "bad,why",
    [
        ({"audio": "mfcc"}, "unknown audio feature 'mfcc'"),
        ({"size": 4}, "at least 16"),
        ({"frames": 0}, "at least 1"),
        ({"seconds": 0}, "at least 0.1"),
        ({"seed": -1}, "at least 0"),
        ({"fps": "fast"}, "a number"),
    ],
)
def test_wrong_options_are_refused(bad, why):
    with pytest.raises(InputError, match=why):
        media_options(**bad)


BAD_LISTS = {
    "empty": ("", "the file is empty"),
    "json": ('{"id": "1", "label": "a"}\n{"id": 2', "line 2: not valid JSON"),
    "no label": ('{"id": "1"}', "there is no 'label'"),
    "columns": ("id,label\n1,a\n2", "line 3: 1 columns"),
    "no comma": ("1,a\n2", "line 2: '2' is not a sample"),
    "bare": ("one\ntwo", "is not a sample"),
    "after a gap": ('{"id": "1", "label": "a"}\n\n{"id": 2', "line 3: not valid JSON"),
    "gap in a table": ("id,label\n\n1,a\n2", "line 4: 1 columns"),
    "huge": ("id,label\n" + '"x' * 90000, "line 2: not valid CSV"),
    "no sign": (
        "1 a\n2 [split|sign] so [split|sign] a",
        r"line 1: '1 a' is not .*sign",
    ),
    "no label, sign": ("1 [split|sign] so [split|sign]", "line 1: .*is not a sample"),
}


@pytest.mark.parametrize("what", BAD_LISTS)
def test_broken_split_lists_name_the_line(tmp_path, what):
    text, why = BAD_LISTS[what]
    (tmp_path / "list").write_text(text)
    with pytest.raises(InputError, match=why):
        read_split(tmp_path / "list")


ROWS = [{"id": f"c{k}", "y": "ab"[k % 2], "who": f"p{k % 10}"} for k in range(60)]
LISTS = {
    "train": [{"id": r["id"], "label": r["y"]} for r in ROWS[:40]],
    "test": [{"id": r["id"], "label": r["y"]} for r in ROWS[40:]],
}


@pytest.mark.parametrize(
    "lists,why",
    [
        (
            dict(
                LISTS,
                test=LISTS["test"]
                + [{"id": "ghost", "label": "a"}, {"id": "ghoul", "label": "b"}],
            ),
            r"2 of 62 samples that are not there \(ghost, ghoul\)",
        ),
        (
            dict(LISTS, test=LISTS["test"] + LISTS["train"][:1]),
            "'c0' is in the train list and in the test list",
        ),
        (
            dict(LISTS, test=LISTS["test"] * 2),
            "'c40' is in the test list and again in the test list",
        ),
        (dict(LISTS, test=[{"id": "c50", "label": "z"}]), "unknown label .*'c50'"),
    ],
)
def test_split_lists_that_do_not_fit(lists, why):
    with pytest.raises(InputError, match=why):
        split_by_files(ROWS, lists, {"a": "a", "b": "b"})


def test_absent_ids_can_be_left_out(capsys):
    lists = dict(LISTS, test=LISTS["test"] + [{"id": "ghost", "label": "a"}])
    out = split_by_files(ROWS, lists, {"a": "a", "b": "b"}, absent="skip")
    assert [len(v) for v in out.values()] == [
        36,
        4,
        20,
    ] and "left out: 1 samples" in capsys.readouterr().out
    with pytest.raises(InputError, match="60 of 60"):
        split_by_files([], LISTS, {"a": "a", "b": "b"}, absent="skip")


@pytest.mark.parametrize("seed", range(5))
def test_random_parts_are_stratified_disjoint_and_complete(seed):
    parts = share_out(ROWS, seed=seed)
    assert sorted(r["id"] for p in parts for r in p) == sorted(
        r["id"] for r in ROWS
    ) and [len(p) for p in parts] == [48, 6, 6]
    assert all(abs(sum(r["y"] == "a" for r in p) - len(p) / 2) <= 1 for p in parts)
    groups = [
        {r["who"] for r in p}
        for p in the_splits(
            ROWS, ["people"], {}, seed, groups={"people": "who"}
        ).values()
    ]
    assert (
        not groups[0] & groups[1]
        and not groups[0] & groups[2]
        and not groups[1] & groups[2]
        and all(groups)
    )


def sources(clips, n=24, bad=()):
    rows = [
        {
            "id": f"c{k:02}",
            "y": "ab"[k % 2],
            "audio": str(clips / ("nothing.wav" if k in bad else "ok.wav")),
        }
        for k in range(n)
    ]
    return {"train": rows[:16], "valid": rows[16:20], "test": rows[20:]}


def test_what_cannot_be_read_is_left_out_and_listed(clips, tmp_path, capsys):
    out = prepare_media(
        "toy",
        ["a", "b"],
        sources(clips, bad=(3, 17)),
        ["audio"],
        media_options(audio="log_mel"),
        {},
        tmp_path,
    )
    assert [len(p) for p in load_prepared(out).parts.values()] == [15, 3, 4]
    listed = (out / "skipped.csv").read_text().splitlines()
    assert (
        listed[0] == "split,id,reason"
        and listed[1].startswith("train,c03,")
        and listed[2].startswith("valid,c17,")
        and "no such recording" in listed[1]
    )
    said = capsys.readouterr().out
    assert "left out: 2" in said and "no such recording" in said and "train" in said


def test_the_wrong_folder_is_an_error_and_leaves_nothing(clips, tmp_path):
    with pytest.raises(
        InputError,
        match="14 of 24 samples cannot be read, so this is hardly the right folder",
    ):
        prepare_media(
            "toy",
            ["a", "b"],
            sources(clips, bad=range(14)),
            ["audio"],
            media_options(audio="log_mel"),
            {},
            tmp_path,
            progress=False,
        )
    assert not list(tmp_path.iterdir())


def test_duplicate_ids_unknown_classes_and_no_rows(clips, tmp_path):
    s = sources(clips)
    for splits, why in (
        (dict(s, test=s["test"] + s["train"][:1]), "'c00' occurs more than once"),
        (dict(s, test=[dict(s["test"][0], y="z")]), "unknown label of 'c20' 'z'"),
        ({"train": [], "valid": [], "test": []}, "no samples found"),
    ):
        with pytest.raises(InputError, match=why):
            prepare_media(
                "toy",
                ["a", "b"],
                splits,
                ["audio"],
                media_options(audio="log_mel"),
                {},
                tmp_path,
                progress=False,
            )
    assert not list(tmp_path.iterdir())


def test_processes_make_the_same_bytes(clips, tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        prepare_media(
            "toy",
            ["a", "b"],
            sources(clips),
            ["audio"],
            media_options(audio="log_mel"),
            {},
            out=tmp_path / name,
            workers=workers,
            progress=False,
            shard=5,
        )
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()}
        for n in ("one", "two")
    ]
    assert files[0] == files[1] and len(files[0]) == 7


def test_a_full_disk_is_one_sentence_before_the_work_and_in_it(
    clips, tmp_path, monkeypatch
):
    from collections import namedtuple

    from mla_nb.data import prepared

    many = {
        "train": sources(clips)["train"] * 30,
        "valid": sources(clips)["valid"],
        "test": sources(clips)["test"],
    }
    many = {
        k: [dict(r, id=f"{k}{i}") for i, r in enumerate(v)] for k, v in many.items()
    }
    monkeypatch.setattr(
        prepared.shutil,
        "disk_usage",
        lambda p: namedtuple("u", "total used free")(9, 9, 1000),
    )
    with pytest.raises(InputError, match="make room"):
        prepare_media(
            "toy",
            ["a", "b"],
            many,
            ["audio"],
            media_options(audio="log_mel"),
            {},
            tmp_path,
        )
    assert (
        not [p for p in tmp_path.rglob("*") if p.suffix == ".arrow"]
        and not (tmp_path / "toy").exists()
    )


def test_evenly_keeps_order_and_ends_inside():
    for n in range(1, 30):
        for k in range(1, 12):
            got = evenly(n, k)
            assert (
                len(got) == k
                and got == sorted(got)
                and got[0] >= 0
                and got[-1] < n
                and (k > n or len(set(got)) == k)
            )


@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures_are_whole_or_not_there_and_repeatable(name, tmp_path):
    a, b = miniature(name, tmp_path / "a", 24), miniature(name, tmp_path / "b", 24)
    files = [
        {p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()}
        for r in (a, b)
    ]
    assert files[0].keys() == files[1].keys() and len(files[0]) > 20
    assert [
        k
        for k in files[0]
        if files[0][k] != files[1][k] and k.suffix not in (".flv", ".mp4", ".avi")
    ] == []
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["notes.txt", "my_results.arrow", "incomplete.csv"])
def test_nothing_of_the_users_is_ever_removed(clips, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("precious")
    for force in (False, True):
        with pytest.raises(InputError, match="so we did not make it"):
            prepare_media(
                "toy",
                ["a", "b"],
                sources(clips),
                ["audio"],
                media_options(audio="log_mel"),
                {},
                out=tmp_path / "mine",
                force=force,
                progress=False,
            )
    assert (tmp_path / "mine" / name).read_text() == "precious"
    done = prepare_media(
        "toy",
        ["a", "b"],
        sources(clips),
        ["audio"],
        media_options(audio="log_mel"),
        {},
        out=tmp_path / "done",
        progress=False,
    )
    (done / name).write_text("precious")
    if name != "incomplete.csv":  # which scripts write there themselves
        with pytest.raises(InputError, match="which would be lost"):
            prepare_media(
                "toy",
                ["a", "b"],
                sources(clips),
                ["audio"],
                media_options(audio="log_mel"),
                {},
                out=done,
                force=True,
                progress=False,
            )
        assert (done / name).read_text() == "precious"
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="is a link"):
        prepare_media(
            "toy",
            ["a", "b"],
            sources(clips),
            ["audio"],
            media_options(audio="log_mel"),
            {},
            out=tmp_path / "link",
            progress=False,
        )


def test_what_a_stranger_found(clips, tmp_path):
    def make(splits, classes=("a", "b"), **kw):
        return prepare_media(
            "toy",
            list(classes),
            splits,
            ["audio"],
            media_options(audio="log_mel"),
            {},
            tmp_path,
            progress=False,
            **kw,
        )

    s = sources(clips)
    with pytest.raises(InputError, match="cannot be called 'total'"):
        make({k: [dict(r, y="total") for r in v] for k, v in s.items()}, ["total"])
    with pytest.raises(InputError, match="no sample of the test split can be read"):
        make(sources(clips, bad=range(20, 24)))
    with pytest.raises(InputError, match="workers=-1"):
        make(s, workers=-1)
    with pytest.raises(InputError, match="not valid text"):
        make({k: [dict(r, id=r["id"] + "\ud800") for r in v] for k, v in s.items()})
    for variant in ("a/b", "..", "../../x", ".hidden"):
        with pytest.raises(InputError, match="variant="):
            make(s, variant=variant)
    sf.write(tmp_path / "nan.wav", np.full(16000, np.nan, "f4"), 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="NaN or infinity"):
        sound_of(tmp_path / "nan.wav")
    sf.write(tmp_path / "click.wav", np.ones(20, "f4") / 2, 16000)
    for f in FEATURES:
        assert np.isfinite(
            read_media(
                {"id": "x", "y": "a", "audio": tmp_path / "click.wav"},
                media_options(audio=f),
            )["audio"]
        ).all()
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize("where", ["checksum", "rename", "after"])
def test_a_kill_at_the_very_end_loses_nothing(clips, tmp_path, monkeypatch, where):
    "Not the work, and not the list of what was left out"
    from mla_nb.data import prepared

    args = (
        "toy",
        ["a", "b"],
        sources(clips, bad=(3, 17)),
        ["audio"],
        media_options(audio="log_mel"),
        {},
    )
    whole = prepare_media(*args, tmp_path / "whole", progress=False)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        if where == "checksum":
            m.setattr(prepared, "sha256", die)
        else:
            m.setattr(prepared.Path, "rename" if where == "rename" else "unlink", die)
        if where == "after":
            m.setattr(
                prepared,
                "write_atomic",
                lambda p, c: c(p) if callable(c) else p.write_text(c),
            )  # which unlinks, too
        with pytest.raises(KeyboardInterrupt):
            prepare_media(*args, tmp_path / "cut", progress=False)
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "cut").rglob("*.arrow")}
    cut = prepare_media(*args, tmp_path / "cut", progress=False)
    assert made and [p.stat().st_mtime_ns for p in sorted(cut.glob("*.arrow"))] == [
        made[p] for p in sorted(made)
    ]  # read once
    assert {
        p.name: p.read_bytes() for p in cut.iterdir() if p.suffix in (".arrow", ".csv")
    } == {
        p.name: p.read_bytes()
        for p in whole.iterdir()
        if p.suffix in (".arrow", ".csv")
    }
    assert json.loads((cut / "dataset.json").read_text())["skipped"] == {
        "train": 1,
        "valid": 1,
    }
