"""MVSA-Single from a tree of the official layout, and what can go wrong in it.

The real label file and lists, the command line.
"""

import csv
import json
import shutil
from collections import Counter
from functools import partial

import pytest
from conftest import POINTER, SHARED, killed_at_the_second_shard, script

from mla_nb.core import InputError, check_dataset, datasets
from mla_nb.data.food101 import across, repeats
from mla_nb.data.media import media_options, read_media, read_split, split_name
from mla_nb.data.miniature import miniature
from mla_nb.data.mvsa import (
    LABEL_RULES,
    POLARITIES,
    PUBLISHED,
    agree,
    mvsa_files,
    mvsa_rows,
    mvsa_splits,
    normalized_text,
    prepare_mvsa,
    read_labels,
    resolve,
)
from mla_nb.data.prepared import sha256
from mla_nb.runs.run import Run, run

SMALL = {"size": 24, "progress": False}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return miniature("mvsa", tmp_path_factory.mktemp("raw") / "mvsa", 240)


cli = partial(script, "mvsa")


@pytest.fixture(scope="module")
def real():
    "The distributed label file and the published lists"
    folder = SHARED / "data/mvsa"
    if not (folder / "labelResultAll.txt").exists():
        pytest.skip(
            "the real label file of MVSA-Single and the published lists are not here"
        )
    return folder


LISTS = ("train", "dev", "test")


def test_the_real_label_file_gives_the_published_counts(real):
    table = read_labels(real / "labelResultAll.txt")
    assert len(table) == 4869 and Counter(table.values()) == PUBLISHED
    assert {
        k: sum(rule(*pair) is not None for pair in table.values())
        for k, rule in LABEL_RULES.items()
    } == {"agree": 2592, "resolve": 4511}


def test_the_published_lists_are_what_agree_makes(real):
    table, lists = (
        read_labels(real / "labelResultAll.txt"),
        {k: read_split(real / f"{k}.jsonl") for k in LISTS},
    )
    assert {k: len(v) for k, v in lists.items()} == {
        "train": 1555,
        "dev": 518,
        "test": 519,
    }
    assert all(e["label"] == agree(*table[e["id"]]) for v in lists.values() for e in v)
    assert {e["id"] for v in lists.values() for e in v} == {
        i for i, pair in table.items() if agree(*pair)
    }
    rows = {
        k: [{"id": e["id"], "y": e["label"], "text": e["text"]} for e in v]
        for k, v in lists.items()
    }
    twins = {
        i
        for g in across(
            repeats(
                {k: rows[k] for k in ("train", "test")},
                lambda r: normalized_text(r["text"]),
            )
        )
        for s, i, _ in g
        if s == "test"
    }
    assert len(twins) == 24


def test_the_published_lists_are_recognized(real):
    assert split_name([real / f"{k}.jsonl" for k in LISTS]) == "qmf"


def test_a_tree_with_the_real_labels_splits_as_published(real, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in read_labels(real / "labelResultAll.txt"):
        (tmp_path / f"data/{i}.jpg").touch()
    shutil.copy(real / "labelResultAll.txt", tmp_path)
    assert [len(mvsa_rows(tmp_path, k)) for k in LABEL_RULES] == [2592, 4511]
    splits = mvsa_splits(tmp_path, [real / f"{k}.jsonl" for k in LISTS])
    assert [len(v) for v in splits.values()] == [
        1555,
        518,
        519,
    ] and capsys.readouterr().out == ""
    assert all(
        r["image"].endswith(f"data/{r['id']}.jpg")
        and r["text"]
        and r["y"] in POLARITIES
        for v in splits.values()
        for r in v
    )
    assert [len(v) for v in mvsa_splits(tmp_path, ["random"], "resolve").values()] == [
        3608,
        452,
        451,
    ]


@pytest.mark.parametrize(
    "text,image,one,two",
    [
        ("positive", "positive", "positive", "positive"),
        ("neutral", "neutral", "neutral", "neutral"),
        ("neutral", "negative", None, "negative"),
        ("positive", "neutral", None, "positive"),
        ("positive", "negative", None, None),
        ("negative", "positive", None, None),
    ],
)
def test_rules(text, image, one, two):
    assert (agree(text, image), resolve(text, image)) == (one, two)


def test_from_the_command_line_to_a_run_and_twice_is_nothing(mine):
    out = cli("--root", mine, "--size", 24)
    n = len(mvsa_rows(mine))
    assert "ready: data/mvsa" in out and "neutral" in out and 150 < n < 240
    before = {p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")}
    assert f"already prepared: {n}" in cli("--root", mine, "--size", 24)
    assert before == {
        p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")
    }
    assert "prepared differently (" in cli(
        "--root", mine, "--size", 24, "--labels", "resolve", ok=False
    )
    assert "ready: data/mvsa-resolve" in cli(
        "--root", mine, "--size", 24, "--labels", "resolve", "--variant", "resolve"
    )
    s = datasets["mvsa"](variant="resolve")
    check_dataset(s)
    assert (
        s.classes == POLARITIES
        and sum(map(len, s.parts.values())) == len(mvsa_rows(mine, "resolve")) > n
    )
    found = run(
        Run(
            dataset="mvsa",
            encoder="small",
            epochs=1,
            batch_size=32,
            lr=0.1,
            progress=False,
        )
    )
    assert set(found["test"]["accuracy"]) == {"image", "text", "fused"}
    cfg = Run(dataset="mvsa", preset="paper")
    assert "m3ae(weights=" in cfg.encoder
    assert (cfg.epochs, cfg.batch_size, cfg.lr) == (100, 64, 1e-3)


def test_the_miniature_says_that_it_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    miniature("mvsa", "data/raw/mvsa-miniature", 96)
    assert "nothing in it was recorded" in cli("--miniature")
    assert (
        "made, not recorded"
        in (tmp_path / "data/mvsa-miniature/dataset.json").read_text()
    )


def test_killed_in_mid_way_and_started_again(mine, tmp_path):
    table = (mine / "labelResultAll.txt").open("a")
    for k in range(1000, 1020):
        for kind in ("jpg", "txt"):
            shutil.copy(mine / f"data/{k % 240 + 1}.{kind}", mine / f"data/{k}.{kind}")
        table.write(f"{k}\tpositive,positive\n")
    table.close()
    (mine / "data/1001.txt").unlink()
    first = killed_at_the_second_shard(
        tmp_path, "prepare_mvsa.py", "--root", mine, "--size", 96, "--workers", 0
    )
    for out in ("cut", "whole"):
        prepare_mvsa(mine, out=out, size=96, progress=False)
    assert {f.name: sha256(f) for f in (tmp_path / "cut").iterdir()} == {
        f.name: sha256(f) for f in (tmp_path / "whole").iterdir()
    }
    assert all(
        (tmp_path / "cut" / n).stat().st_mtime_ns == t for n, t in first.items()
    )  # not made a second time
    assert "1001,text" in (tmp_path / "cut/incomplete.csv").read_text()


def test_broken_files_are_left_out_with_a_reason(mine):
    ids = [r["id"] for r in mvsa_rows(mine)][:6]
    pictures = [mine / f"data/{i}.jpg" for i in ids]
    pictures[0].write_bytes(b"")
    pictures[1].write_bytes(POINTER)
    pictures[2].write_bytes(pictures[2].read_bytes()[:500])
    pictures[3].write_text("<html>404 Not Found</html>" * 50)
    (mine / f"data/{ids[4]}.txt").write_bytes(POINTER)
    (mine / f"data/{ids[5]}.txt").write_bytes(b"\xff\xfea")
    out = prepare_mvsa(mine, **SMALL)
    listed = {
        r["id"]: r["reason"] for r in csv.DictReader((out / "skipped.csv").open())
    }
    assert set(listed) == set(ids)
    for i, why in zip(
        ids,
        (
            "is empty",
            "git-lfs pointer",
            "not a readable image",
            "not a readable image",
            "git-lfs pointer",
            "marked as UTF-16",
        ),
    ):
        assert why in listed[i]


def test_halves_stay_with_a_gap_and_what_has_no_file_is_reported(mine, capsys):
    ids = [r["id"] for r in mvsa_rows(mine)][:4]
    for name in (f"{ids[0]}.jpg", f"{ids[1]}.txt", f"{ids[2]}.jpg", f"{ids[2]}.txt"):
        (mine / "data" / name).unlink()
    (mine / f"data/{ids[3]}.txt").write_bytes(b"")
    out = prepare_mvsa(mine, **SMALL)
    said = capsys.readouterr().out
    assert (
        f"left out: 1 labeled samples without a file ({ids[2]})" in said
        and "without text: 2" in said
        and "without image: 1" in said
    )
    assert {
        (g["id"], g["lacks"]) for g in csv.DictReader((out / "incomplete.csv").open())
    } == {(ids[0], "image"), (ids[1], "text"), (ids[3], "text")}
    s = datasets["mvsa"]()
    assert [
        sum(x["x"][m] is None for part in s.parts.values() for x in part)
        for m in ("image", "text")
    ] == [1, 2]
    whole = prepare_mvsa(mine, variant="whole", incomplete="skip", **SMALL)
    assert (
        sum(map(len, datasets["mvsa"](variant="whole").parts.values()))
        == len(mvsa_rows(mine)) - 3
        and (whole / "incomplete.csv").exists()
    )


@pytest.mark.parametrize("codec", ["utf-8", "utf-16", "latin-1", "cp1252"])
def test_texts_in_any_encoding(mine, codec):
    row = mvsa_rows(mine)[0]
    with open(row["text_file"], "wb") as f:
        f.write("Très bien,\r\nça va! #été".encode(codec))
    assert read_media(row, media_options(size=16))["text"] == "Très bien, ça va! #été"


def lists(root, change=lambda rows: rows):
    "Published-style JSON lines: train, dev, test"
    rows = mvsa_rows(root)
    for name, part in zip(LISTS, (rows[:120], rows[120:150], rows[150:])):
        found = [
            {
                "id": r["id"],
                "label": r["y"],
                "text": f"list {r['id']}",
                "img": f"data/{r['id']}.jpg",
            }
            for r in part
        ]
        (root.parent / f"{name}.jsonl").write_text(
            "\n".join(map(json.dumps, change(found) if name == "test" else found))
        )
    return [f"{k}.jsonl" for k in LISTS]


def test_lists_bring_text_and_labels_and_need_no_table(mine):
    how = lists(
        mine,
        lambda rows: [
            dict(
                rows[0],
                label="positive" if rows[0]["label"] != "positive" else "negative",
            ),
            *rows[1:],
        ],
    )
    out = cli("--root", mine, "--split", *how, "--size", 24)
    assert (
        "1 labels of the lists are not what the rule 'agree' makes of "
        "labelResultAll.txt"
    ) in out and "ready: data/mvsa" in out
    s = datasets["mvsa"]()
    assert (
        [len(s.train), len(s.valid)] == [120, 30]
        and s.info["labels"] == "listed"
        and all(
            x["text"].startswith("list ") for x in s.test.ds.select_columns(["text"])
        )
    )
    (mine / "labelResultAll.txt").unlink()
    for p in mine.glob("data/*.txt"):
        p.unlink()
    assert "ready: data/mvsa-bare" in cli(
        "--root", mine, "--split", *how, "--size", 24, "--variant", "bare"
    )
    with pytest.raises(
        InputError, match="labelResultAll.txt: there is no such text file"
    ):
        mvsa_rows(mine)


def test_lists_that_do_not_fit(mine):
    for change, why in (
        (
            lambda rows: (
                rows
                + [
                    dict(rows[0], id="9998", img="data/9998.jpg"),
                    dict(rows[0], id="9999", img="data/9999.jpg"),
                ]
            ),
            "samples that are not there (9998, 9999)",
        ),
        (
            lambda rows: rows + rows[:1],
            "is in the test list and again in the test list",
        ),
        (
            lambda rows: (
                rows
                + [
                    json.loads(
                        (mine.parent / "train.jsonl").read_text().splitlines()[0]
                    )
                ]
            ),
            "is in the train list and in the test list",
        ),
        (
            lambda rows: [dict(rows[0], label="positve"), *rows[1:]],
            "did you mean 'positive'",
        ),
    ):
        with pytest.raises(InputError) as e:
            prepare_mvsa(mine, split=lists(mine, change), **SMALL)
        assert why in str(e.value) and not (mine.parent / "data").exists()
    some = mvsa_splits(
        mine,
        lists(mine, lambda rows: rows + [dict(rows[0], id="9999", img="gone.jpg")]),
        absent="skip",
    )
    assert sum(map(len, some.values())) == len(mvsa_rows(mine))


BAD = {
    "unknown": ("1\tpositive,happy", "unknown label .of '1', in .*line 1. 'happy'"),
    "multiple": ("1\ta,b\tc,d\te,f", "this is MVSA-Multiple"),
    "single": ("1\tpositive", "is not `ID<TAB>text,image`"),
    "comma": ("1,positive,neutral", "is not `ID<TAB>text,image`"),
    "twice": (
        "1\tpositive,neutral\n1\tneutral,neutral",
        "line 2: the id '1' occurs for the second time",
    ),
    "header": ("ID\ttext,image\n", "there is no label in it"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_label_file_names_the_line(tmp_path, what):
    (tmp_path / "l.txt").write_text(BAD[what][0])
    with pytest.raises(InputError, match=BAD[what][1]):
        read_labels(tmp_path / "l.txt")


def test_wrong_roots_and_options(mine):
    assert "give the folder that holds data/ and labelResultAll.txt as --root" in cli(
        "--root", mine / "data", ok=False
    )
    assert "did you mean 'resolve'" in cli(
        "--root", mine, "--labels", "resolved", ok=False
    )
    assert "unknown split" in cli("--root", mine, "--split", "official", ok=False)
    for p in sorted(mine.glob("data/*"))[:-100]:
        p.unlink()
    assert "hardly the complete download" in cli("--root", mine, ok=False)
    assert not (mine.parent / "data").exists() and len(mvsa_files(mine)) < 100
