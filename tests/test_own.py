"""Data of one's own from a table, and Kinetics-Sounds from class folders.

From the command line to a run, and what can be wrong with either.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import POINTER, killed_at_the_second_shard, script

from mla_nb.cli import main
from mla_nb.core import InputError, Modality, check_dataset, datasets
from mla_nb.data.decode import encode_image
from mla_nb.data.media import load_prepared, write_video
from mla_nb.data.miniature import miniature
from mla_nb.data.own import (
    kind_of,
    kinetics_rows,
    kinetics_splits,
    own,
    own_classes,
    own_example,
    own_splits,
    prepare_kinetics,
    prepare_own,
    read_cells,
    read_table,
)
from mla_nb.predict import load
from mla_nb.predict_table import _stamp
from mla_nb.runs.run import Run, run

SMALL = {"audio": "log_mel", "seconds": 1.5, "size": 24, "progress": False}
FLAGS = ["--audio", "log_mel", "--seconds", 1.5, "--size", 24]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return own_example(tmp_path_factory.mktemp("own") / "study", 120).parent


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return miniature("kinetics", tmp_path_factory.mktemp("raw") / "KS", 72)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mine(example, here):
    return shutil.copytree(example, here / "study")


@pytest.fixture
def clips(videos, here):
    return shutil.copytree(videos, here / "KS")


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def change(table, how):
    "Rewrite a table's rows (a list of dicts)"
    with table.open(newline="") as f:
        rows = list(csv.DictReader(f))
    rows = how(rows) or rows
    with table.open("w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader(), out.writerows(rows)


# a table of one's own -----------------------------------------------------------------


def test_from_a_table_to_a_run_and_twice_is_nothing(mine, here):
    args = ["--table", mine / "table.csv", "--name", "day", *FLAGS]
    out = script("own", *args)
    assert "ready: data/own-day" in out and "calm" in out
    before = stamps(here / "data")
    assert (
        "already prepared: 120" in script("own", *args)
        and stamps(here / "data") == before
    )
    assert "prepared differently (options." in script(
        "own", *args, "--fps", 2, ok=False
    )
    s = own(variant="day")
    check_dataset(s)
    assert s.classes == ["calm", "glad", "low", "tense"] and list(s.modalities) == [
        "audio",
        "image",
        "text",
    ]
    rows = read_table(mine / "table.csv")
    for m in s.modalities:
        assert sum(len(p.column(m)) for p in s.parts.values()) == sum(
            m in r for r in rows
        )
    r = run(
        Run(
            dataset="own",
            dataset_args="variant=day",
            epochs=1,
            progress=False,
            threads=1,
        )
    )
    assert set(r["test"]["accuracy"]) == {"fused", "audio", "image", "text"}
    with pytest.raises(InputError, match="prepared are: day"):
        datasets["own"]()
    with pytest.raises(InputError, match="--table FILE --name night"):
        datasets["own"](variant="night")


def test_miniature_says_what_it_is(example, here):
    shutil.copytree(
        example, here / "data/raw/own-miniature"
    )  # is taken as it is: making it takes a while
    out = script("own", "--miniature")
    assert "nothing in it was recorded" in out and "ready: data/own-miniature" in out
    meta = json.loads((here / "data/own-miniature/dataset.json").read_text())
    assert (
        "made, not recorded" in meta["source"]["name"]
        and meta["modalities"]["audio"]["info"]["feature"] == "log_mel"
        and meta["modalities"]["image"]["info"]["size"] == 48
    )


@pytest.mark.parametrize("name", ["own", "kinetics"])
def test_kill_9_is_repaired_by_running_again(name, mine, clips, here):
    what = (
        ["--table", str(mine / "table.csv")]
        if name == "own"
        else ["--root", str(clips)]
    )
    args = [*what, "--size", "24", "--workers", "0"]
    first = killed_at_the_second_shard(here, f"prepare_{name}.py", *args)
    for out in ("cut", "whole"):
        script(name, *args, "--out", out)
    assert {f.name: f.read_bytes() for f in (here / "cut").iterdir()} == {
        f.name: f.read_bytes() for f in (here / "whole").iterdir()
    }
    assert all((here / "cut" / n).stat().st_mtime_ns == t for n, t in first.items())


def test_every_modality_and_both_formats_give_the_same(mine, here):
    "CSV with absolute paths or relative ones, JSON lines, text in files, videos"
    t = np.arange(16000) / 16000
    write_video(
        mine / "v.mp4",
        np.zeros((12, 32, 32, 3), "u1")
        + np.arange(12, dtype="u1")[:, None, None, None] * 20,
        8,
        np.sin(300 * t),
    )
    (mine / "words.txt").write_bytes("naïve".encode("cp1252"))
    rows = [
        {
            "id": f"s{k}",
            "label": "ab"[k % 2],
            "split": ("train", "train", "dev", "test")[k // 2],
            "audio": "sounds/p000.wav",
            "video": "v.mp4" if k % 3 else "",
            "image": f"photos/p00{k}.jpg",
            "text_file": "words.txt",
        }
        for k in range(8)
    ]
    rows[4]["image"] = ""
    with (mine / "own.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)
    (mine / "own.jsonl").write_text(
        "\n".join(json.dumps({k: v or None for k, v in r.items()}) for r in rows)
    )
    for r in rows:
        r["audio"] = str(mine / r["audio"])
    with (mine / "absolute.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, rows[0], delimiter=";")
        out.writeheader()
        out.writerows(rows)
    made = [
        prepare_own(mine / f, "x", out=f.replace(".", "_"), **SMALL)
        for f in ("own.csv", "own.jsonl", "absolute.csv")
    ]
    shards = [{p.name: p.read_bytes() for p in m.glob("*.arrow")} for m in made]
    assert shards[0] == shards[1] == shards[2]
    s = load_prepared(made[0])
    assert list(s.modalities) == ["audio", "video", "image", "text"] and [
        p.ids for p in s.parts.values()
    ] == [["s0", "s1", "s2", "s3"], ["s4", "s5"], ["s6", "s7"]]
    assert (
        s.train[0]["x"]["video"] is None
        and s.train[1]["x"]["video"] is not None
        and s.valid[0]["x"]["image"] is None
        and s.test[0]["x"]["text"] == "naïve"
    )


def test_splits(mine):
    rows = read_table(mine / "table.csv")
    group = {r["id"]: r["group"] for r in rows}
    parts = own_splits(rows, "group")
    assert not {group[r["id"]] for r in parts["train"]} & {
        group[r["id"]] for r in parts["test"]
    }
    assert [len(p) for p in own_splits(rows).values()] == [96, 12, 12]
    marked = [
        dict(r, split="test" if k % 4 == 0 else "train") for k, r in enumerate(rows)
    ]
    n = [len(p) for p in own_splits(marked).values()]
    assert n[2] == 30 and n[0] + n[1] == 90 and 6 <= n[1] <= 12
    assert [len(p) for p in own_splits(marked, "random").values()] == [96, 12, 12]
    for r, how, why in (
        (rows, "column", "no column 'split'"),
        (rows, "groups", "did you mean 'group'"),
        ([dict(r, split="train") for r in rows], "", "no sample into 'test'"),
    ):
        with pytest.raises(InputError, match=why):
            own_splits(r, how)
    assert own_classes(rows) == own_classes(rows[::-1])


def set_all(key, value):
    return lambda rows: [{**r, key: value(k, r)} for k, r in enumerate(rows)]


BAD = {
    "typo": (
        lambda rows: [
            {"audo" if k == "audio" else k: v for k, v in r.items()} for r in rows
        ],
        "did you mean 'audio'",
    ),
    "twice": (
        lambda rows: rows + rows[:2],
        "'p000' occurs more than once .and 1 other",
    ),
    "two splits": (
        lambda rows: (
            set_all("split", lambda k, r: "train")(rows)
            + [{**rows[3], "split": "test"}]
        ),
        "'p003' occurs more than once",
    ),
    "no label": (
        set_all("label", lambda k, r: "" if k == 4 else r["label"]),
        "line 6: there is no 'label'",
    ),
    "label": (
        set_all("label", lambda k, r: "Calm" if k == 5 else r["label"]),
        "'Calm' and 'calm' differ only",
    ),
    "split": (
        set_all("split", lambda k, r: "train" if k else "tarin"),
        "unknown split .*line 2.*did you mean 'train'",
    ),
    "some split": (
        set_all("split", lambda k, r: "train" if k else ""),
        r"1 of 120 samples have no split \(p000\)",
    ),
    "absent": (
        set_all("audio", lambda k, r: f"no/{k}.wav" if k < 4 else r["audio"]),
        r"4 of 120 samples name files that are not there .*0.wav, .*2.wav, …",
    ),
    "nothing": (
        lambda rows: [
            dict(r, audio="", image="", text="") if k == 7 else r
            for k, r in enumerate(rows)
        ],
        "line 9: 'p007' has none of",
    ),
    "only in test": (
        lambda rows: [
            dict(
                r,
                split="train" if k < 60 else "test",
                image="" if k < 60 else r["image"],
            )
            for k, r in enumerate(rows)
        ],
        "no training sample has image",
    ),
    "one class": (set_all("label", lambda k, r: "x"), "at least two classes"),
    "untrained class": (
        lambda rows: [
            dict(
                r,
                split="train" if k < 100 else "test",
                label="new" if k > 100 else r["label"],
            )
            for k, r in enumerate(rows)
        ],
        "'new' in validation or test but in no training sample",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_table_is_one_sentence(mine, here, what):
    how, why = BAD[what]
    change(mine / "table.csv", how)
    with pytest.raises(InputError, match=why) as e:
        prepare_own(mine / "table.csv", "x", **SMALL)
    assert "\n" not in str(e.value) and not list(here.glob("data/*"))


def test_wrong_arguments(mine, here):
    (here / "empty.csv").write_text("")
    (here / "head.csv").write_text("id,label,text\n")
    (here / "bad.jsonl").write_text('{"id": 1, "label": "a", "text": "x"}\n{"id": 2')
    (here / "list.jsonl").write_text('{"id": 1, "label": "a", "text": "x"}\n[1]')
    for args, why in (
        (["--table", "nowhere.csv"], "there is no such text file"),
        (["--table", "study"], "is a folder"),
        (["--table", "empty.csv"], "the file is empty"),
        (["--table", "head.csv"], "no samples found"),
        (["--table", "bad.jsonl"], "line 2: not valid JSON"),
        (["--table", "study/table.csv", "--name", "../x"], "becomes a folder"),
    ):
        assert why in script("own", *args, ok=False)
    with pytest.raises(InputError, match="line 2: .* is not an object"):
        read_table("list.jsonl")
    assert not (here / "data").exists()


def test_absent_and_broken_files(mine, here, capsys):
    """Files that are not there can be left out; broken ones are, and listed.

    Stereo and other rates are resampled.
    """

    def wav(k):
        return mine / f"sounds/p{k:03}.wav"

    for k in (10, 11):
        wav(k).unlink()
    (
        wav(20).write_bytes(b""),
        wav(21).write_bytes(POINTER),
        wav(22).write_bytes(wav(22).read_bytes()[:400]),
        (mine / "photos/p023.jpg").write_bytes(b"\xff\xd8\xff"),
    )
    x, _ = sf.read(wav(30))
    sf.write(wav(30), np.stack([x, x], 1), 44100), sf.write(wav(31), x[::2], 8000)
    with pytest.raises(InputError, match="2 of 120 samples .*--absent skip"):
        prepare_own(mine / "table.csv", "x", **SMALL)
    s = load_prepared(prepare_own(mine / "table.csv", "x", absent="skip", **SMALL))
    kept, listed = (
        [i for p in s.parts.values() for i in p.ids],
        (here / "data/own-x/skipped.csv").read_text().splitlines(),
    )
    assert (
        "left out: 2 of 120" in capsys.readouterr().out
        and len(kept) == 114
        and {"p030", "p031"} <= set(kept)
    )
    for i, why in {
        "p020": "is empty",
        "p021": "git-lfs pointer",
        "p022": "cut short",
        "p023": "not a readable image",
    }.items():
        assert any(i in line and why in line for line in listed), listed


def test_the_example_is_not_made_twice(mine):
    before = stamps(mine)
    assert own_example(mine) == mine / "table.csv" and stamps(mine) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_sentence(mine, here):
    (here / "locked").mkdir(mode=0o500)
    assert "cannot read or write" in script(
        "own", "--table", mine / "table.csv", "--data", "locked", *FLAGS, ok=False
    )


# Kinetics-Sounds ----------------------------------------------------------------------


def test_kinetics_from_lists_to_a_run_and_twice_is_nothing(clips, here):
    args = ["--root", clips, "--split", clips / "train.csv", clips / "test.csv", *FLAGS]
    out = script("kinetics", *args)
    assert "ready: data/kinetics" in out and "tap_dancing" in out
    before = stamps(here / "data")
    assert (
        "already prepared: 72" in script("kinetics", *args)
        and stamps(here / "data") == before
    )
    s = datasets["kinetics"]()
    check_dataset(s)
    assert set(s.test.ids) == {
        line.split(".")[0] for line in (clips / "test.csv").read_text().splitlines()
    } and s.classes == sorted(s.classes)
    r = run(
        Run(
            dataset="kinetics",
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
        and "resnet18" in Run(dataset="kinetics", preset="paper").encoder
    )


def test_kinetics_folders_and_lists(clips, here):
    rows = kinetics_rows(clips)
    assert [(r["id"], r["y"]) for r in kinetics_rows(clips / "videos")] == [
        (r["id"], r["y"]) for r in rows
    ] and len(rows) == 72

    def write(name, some, y=lambda r: r["y"]):
        return (here / name).write_text(
            "".join(f"{r['id']}.mkv,{y(r)}\n" for r in some)
        )

    (
        write("a.csv", rows[::2]),
        write("b.csv", rows[1::2], lambda r: r["y"].replace("_", " ").title()),
    )
    assert [len(p) for p in kinetics_splits(rows, ["a.csv", "b.csv"]).values()] == [
        32,
        4,
        36,
    ]
    (
        write(
            "more.csv",
            [
                *rows[1::2],
                {"id": "gone1", "y": "bowling"},
                {"id": "gone2", "y": "bowling"},
            ],
        ),
        write("both.csv", rows[:3:2] + rows[1::2]),
        write("sleep.csv", rows[1::2], lambda r: "sleeping"),
        write("other.csv", rows[1::2], lambda r: "bowling"),
    )
    for f, why in (
        ("more", r"2 of 74 samples that are not there \(gone1, gone2\)"),
        ("both", "in the train list and in the test list"),
        ("sleep", "unknown label .*'sleeping'"),
        ("other", "lie in another class folder than the lists say"),
    ):
        with pytest.raises(InputError, match=why):
            prepare_kinetics(clips, ["a.csv", f"{f}.csv"], **SMALL)
    assert (
        len(kinetics_splits(rows, ["a.csv", "more.csv"], absent="skip")["test"]) == 36
    )
    assert "did you mean 'random'" in script(
        "kinetics", "--root", clips, "--split", "randon", ok=False
    )
    shutil.copy(rows[0]["video"], clips / "videos/tap_dancing")
    with pytest.raises(InputError, match="occurs more than once"):
        prepare_kinetics(clips, **SMALL)
    for root, why in (
        ("nowhere", "there is no such folder"),
        (here, "no class folders with videos"),
        (clips / "videos/bowling", "no class folders"),
    ):
        with pytest.raises(InputError, match=why):
            prepare_kinetics(root, **SMALL)
    assert not (here / "data").exists()


def test_kinetics_broken_videos_are_left_out_with_a_reason(clips, here):
    found = kinetics_rows(clips)[::9]
    frames = np.zeros((16, 32, 32, 3), "u1")
    sf.write(here / "sound.wav", np.zeros(16000), 16000)
    spoil = {
        "is empty": lambda p: Path(p).write_text(""),
        "git-lfs pointer": lambda p: Path(p).write_bytes(POINTER),
        "not a readable|cut short|damaged": lambda p: os.truncate(
            p, os.path.getsize(p) // 2
        ),
        "no audio stream": lambda p: write_video(p, frames, 8),
        "no video stream": lambda p: shutil.copy(here / "sound.wav", p),
    }
    for r, f in zip(found, spoil.values()):
        f(r["video"])
    out = prepare_kinetics(clips, **SMALL)
    listed = (out / "skipped.csv").read_text().splitlines()
    assert len(listed) == 1 + len(spoil)
    for r, why in zip(found, spoil):
        assert any(
            r["id"] in line and any(w in line for w in why.split("|"))
            for line in listed
        ), (why, listed)


# a folder of frames, and the sound of a clip ------------------------------------------


def films(folder, n=24):
    "Clips of two classes: files with and without sound, and folders of pictures"
    folder.mkdir()
    rows = []
    for k in range(n):
        y = k % 2
        frames = [np.full((32, 32, 3), 60 + 120 * y + 5 * i, "u1") for i in range(15)]
        wave = 0.4 * np.sin(np.arange(16000) * (0.1 + 0.3 * y))
        name = f"clip{k}.mp4" if k % 6 else f"clip{k}"
        if k % 6:
            write_video(folder / name, frames, 15, wave if k % 6 < 4 else None)
        else:
            (folder / name).mkdir()
            for i in (1, 2, 10):
                picture = encode_image(frames[i].transpose(2, 0, 1), "PNG")
                (folder / name / f"f{i}.png").write_bytes(picture)
        part = "test" if k > 17 else "valid" if k > 11 else "train"
        rows.append({"id": f"s{k}", "label": "ab"[y], "clip": name, "split": part})
    with open(folder / "films.csv", "w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader(), out.writerows(rows)
    return folder / "films.csv"


def test_a_folder_of_frames_and_the_sound_of_a_clip(here, capsys):
    table = films(here / "films")
    with pytest.raises(InputError, match="they look like --columns 'clip:video'"):
        prepare_own(table, "guess", **SMALL)
    script("own", "--table", table, "--columns", "clip:video+audio", *FLAGS)
    s = own(variant="films")
    assert list(s.modalities) == ["clip", "clip_sound"]
    train = [s.train[i]["x"] for i in range(12)]
    assert [x["clip_sound"] is not None for x in train] == 2 * (
        [False, True, True, True, False, False]
    )
    assert all(x["clip"].shape == (3, 3, 24, 24) for x in train)
    cfg = Run(
        dataset="own", dataset_args="variant=films", method="mla", epochs=2,
        batch_size=4, lr=0.01, progress=False,
    )  # fmt: skip
    made = run(cfg)
    assert set(made["test"]["accuracy"]) == {"clip", "clip_sound", "fused"}
    p = load(f"runs/{made['id']}")
    test = [s.test[i]["x"] for i in range(6)]
    for k, x in enumerate(test, 18):
        path = here / "films" / (f"clip{k}.mp4" if k % 6 else f"clip{k}")
        read = p.read({"clip": str(path)}, f"s{k}")
        for m in s.modalities:
            assert (read[m] is None) == (x[m] is None), (k, m)
            assert x[m] is None or (read[m] == x[m]).all(), (k, m)
        assert p.predict(clip=path) in s.classes
    frames = [np.full((24, 24, 3), 60, "u1")] * 3
    assert p.read({"clip": np.stack(frames)})["clip_sound"] is None
    part = {"path": here / "films/clip19.mp4", "span": (0.2, 0.8)}
    assert p.read({"clip": part})["clip_sound"] is not None
    capsys.readouterr()
    for name in ("clip19.mp4", "clip18"):
        main(["predict", f"runs/{made['id']}", "--clip", f"films/{name}", "--json"])
        said = json.loads(capsys.readouterr().out)["modalities"]
        assert ("clip_sound" in said) == (name == "clip19.mp4"), said
    out = ["--csv", "films/films.csv", "--out", "out.csv"]
    main(["predict", f"runs/{made['id']}", *out])
    rows = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    assert not any(r["reason"] for r in rows)
    assert [r["weight_clip_sound"] != "" for r in rows] == 4 * (
        [False, True, True, True, False, False]
    )


def test_folders_of_frames_in_a_table(here):
    table = films(here / "films", 24)
    lines = read_cells(table)
    clips = [row["clip"] for _, row in lines]
    assert kind_of(clips, here / "films") == "video"
    assert kind_of(["clip0", "clip6"], here / "films") == "video"
    assert kind_of(["clip0", "clip6"], here) != "video"
    prepare_own(table, "guessed", columns="infer", **SMALL)
    assert own(variant="guessed").modalities["clip"].kind == "video"
    text = table.read_text().replace("clip,split", "video,split")
    (here / "films/usual.csv").write_text(text)
    prepare_own(here / "films/usual.csv", "usual", **SMALL)
    train = own(variant="usual").train
    assert {len(train[i]["x"]["video"]) for i in range(len(train))} == {3}

    def timed(rows):
        return [r | {"start": "0", "end": "1"} for r in rows]

    change(table, timed)
    with pytest.raises(InputError, match="line 2: 's0' has start and end, and its"):
        read_table(table, "clip:video")
    with pytest.raises(InputError, match="did you mean 'video"):
        read_table(table, "clip:video+sound")


def test_an_answer_about_a_folder_is_old_when_one_of_its_pictures_changes(here):
    films(here / "films", 1)
    clip, mod = here / "films/clip0", Modality("video", "frames")
    before = _stamp(str(clip), mod)
    assert _stamp(str(clip), mod) == before
    picture = np.zeros((3, 32, 32), "u1")
    (clip / "f2.png").write_bytes(encode_image(picture, "PNG"))
    assert _stamp(str(clip), mod) != before
    assert _stamp(str(here / "none.mp4"), mod) == [str(here / "none.mp4")]
