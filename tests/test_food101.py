"""Food-101 from a tree of the official layout, and what can go wrong in it.

Pictures and titles joined, lists, the command line.
"""

import csv
import json
import shutil
from functools import partial

import pytest
from conftest import POINTER, killed_at_the_second_shard, script

from mla_nb.core import InputError, check_dataset, datasets
from mla_nb.data.food101 import (
    across,
    food101_rows,
    food101_splits,
    prepare_food101,
    read_titles,
    repeats,
    split_by_lists,
    split_incomplete,
)
from mla_nb.data.media import media_options, read_media, read_split, split_name
from mla_nb.data.miniature import miniature
from mla_nb.data.prepared import sha256
from mla_nb.runs.run import Run, run

SMALL = {"size": 24, "progress": False}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return miniature("food101", tmp_path_factory.mktemp("raw") / "food-101", 240)


cli = partial(script, "food101")


def titles(root, split="train"):
    return root / f"texts/{split}_titles.csv"


def add(root, *lines, split="train", codec="utf-8"):
    with titles(root, split).open("ab") as f:
        f.write(("\n".join(lines) + "\n").encode(codec))


def lists(root, change=lambda rows: rows, **more):
    "Published-style JSON lines with ids that are no file names: train, dev, test"
    rows = (
        [r for r in food101_rows(root) if r["split"] == "train"][::2],
        [r for r in food101_rows(root) if r["split"] == "test"],
    )
    for name, part in (
        ("train", rows[0][10:]),
        ("dev", rows[0][:10]),
        ("test", rows[1]),
    ):
        found = [
            {
                "id": f"{r['y']}_{r['id']}.jpg",
                "label": r["y"],
                "text": f"list {r['id']}",
                "img": f"images/{r['split']}/{r['y']}/{r['id']}.jpg",
            }
            for r in part
        ]
        (root.parent / f"{name}.jsonl").write_text(
            "\n".join(map(json.dumps, change(found) if name == "test" else found))
        )
    return ["train.jsonl", "dev.jsonl", "test.jsonl"]


def test_pictures_and_titles_are_joined(tree):
    rows = {r["id"]: r for r in food101_rows(tree)}
    assert len(rows) == 240 and all(
        r["image"].endswith(f"{r['split']}/{r['y']}/{k}.jpg") and r["text"]
        for k, r in rows.items()
    )
    assert (
        '"home-made" | Café' in rows["pho_3"]["text"] and "," in rows["pho_3"]["text"]
    )
    s = food101_splits(tree)
    assert [len(s[k]) for k in ("train", "valid", "test")] == [162, 18, 60] and {
        r["split"] for r in s["test"]
    } == {"test"}
    assert {r["y"]: 0 for r in s["valid"]}.keys() == {
        r["y"]: 0 for r in s["test"]
    }.keys()
    assert [len(v) for v in food101_splits(tree, ["random"]).values()] == [192, 24, 24]


def test_from_the_command_line_to_a_run_and_twice_is_nothing(mine):
    out = cli("--root", mine, "--size", 24)
    assert (
        "ready: data/food101" in out
        and "note: 6 classes; the whole dataset has 101" in out
        and "without" not in out
    )
    before = {p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")}
    assert "already prepared: 240" in cli("--root", mine, "--size", 24)
    assert before == {
        p: p.stat().st_mtime_ns for p in (mine.parent / "data").rglob("*")
    }
    assert "prepared differently (options." in cli(
        "--root", mine, "--size", 32, ok=False
    )
    check_dataset(datasets["food101"]())
    found = run(
        Run(
            dataset="food101",
            encoder="small",
            epochs=1,
            batch_size=32,
            lr=0.1,
            progress=False,
        )
    )
    assert set(found["test"]["accuracy"]) == {"image", "text", "fused"}
    cfg = Run(dataset="food101", preset="paper")
    assert "m3ae(weights=" in cfg.encoder
    assert (cfg.epochs, cfg.batch_size, cfg.lr) == (100, 64, 1e-3)


def test_the_miniature_says_that_it_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    miniature("food101", "data/raw/food101-miniature", 96)
    assert "nothing in it was recorded" in cli("--miniature")
    assert (
        "made, not recorded"
        in (tmp_path / "data/food101-miniature/dataset.json").read_text()
    )
    said = cli("--help")
    assert (
        "--size" in said and "--fps" not in said and "--audio" not in said
    )  # there is no sound and no video


def test_killed_in_mid_way_and_started_again(mine, tmp_path):
    for p in list(mine.glob("images/train/*/*_1?.jpg")):
        shutil.copy(p, p.with_name(f"{p.stem}_0.jpg"))
        shutil.copy(p, p.with_name(f"{p.stem}_1.jpg"))
        add(
            mine, f"{p.stem}_0.jpg,a copy,{p.parent.name}"
        )  # the other copy has no caption
    first = killed_at_the_second_shard(
        tmp_path, "prepare_food101.py", "--root", mine, "--size", 96, "--workers", 0
    )
    for out in ("cut", "whole"):
        prepare_food101(mine, out=out, size=96, progress=False)
    assert {f.name: sha256(f) for f in (tmp_path / "cut").iterdir()} == {
        f.name: sha256(f) for f in (tmp_path / "whole").iterdir()
    }
    assert all(
        (tmp_path / "cut" / n).stat().st_mtime_ns == t for n, t in first.items()
    )  # not made a second time
    assert (tmp_path / "cut/incomplete.csv").exists()


def test_broken_pictures_are_left_out_with_a_reason(mine):
    pictures = sorted(mine.glob("images/*/*/*.jpg"))[::20]
    pictures[0].write_bytes(b"")
    pictures[1].write_bytes(POINTER)
    pictures[2].write_bytes(pictures[2].read_bytes()[:500])
    pictures[3].write_text("<html>404 Not Found</html>" * 50)
    out = prepare_food101(mine, **SMALL)
    listed = {
        r["id"]: r["reason"] for r in csv.DictReader((out / "skipped.csv").open())
    }
    assert set(listed) == {p.stem for p in pictures[:4]}
    for p, why in zip(
        pictures,
        ("is empty", "git-lfs pointer", "not a readable image", "not a readable image"),
    ):
        assert why in listed[p.stem]
    assert sum(map(len, datasets["food101"]().parts.values())) == 236


def test_halves_stay_with_a_gap_or_are_left_out_and_are_listed_either_way(mine, capsys):
    (mine / "images/train/pho/pho_1.jpg").unlink()
    shutil.copy(
        mine / "images/test/pho/pho_0.jpg", mine / "images/test/pho/pho_800.jpg"
    )
    add(mine, "pho_801.jpg, ,pho")  # neither a picture nor words
    out = prepare_food101(mine, **SMALL)
    gaps = list(csv.DictReader((out / "incomplete.csv").open()))
    assert {(g["id"], g["lacks"]) for g in gaps} == {
        ("pho_1", "image"),
        ("pho_800", "text"),
        ("pho_801", "image"),
        ("pho_801", "text"),
    }
    said = capsys.readouterr().out
    assert (
        "without image: 2" in said
        and "without text: 2" in said
        and "(kept), listed in data/food101/incomplete.csv" in said
    )
    s = datasets["food101"]()
    assert [
        sum(x["x"][m] is None for part in s.parts.values() for x in part)
        for m in ("image", "text")
    ] == [1, 1]
    before = (out / "incomplete.csv").stat().st_mtime_ns
    prepare_food101(mine, **SMALL)
    assert (out / "incomplete.csv").stat().st_mtime_ns == before
    (out / "incomplete.csv").unlink()  # as if killed just before it was written
    prepare_food101(mine, **SMALL)
    assert list(csv.DictReader((out / "incomplete.csv").open())) == gaps
    prepare_food101(mine, variant="whole", incomplete="skip", **SMALL)
    s = datasets["food101"](variant="whole")
    assert (
        sum(map(len, s.parts.values())) == 239
        and "left out" in capsys.readouterr().out
        and len((out.parent / "food101-whole/incomplete.csv").read_text().splitlines())
        == 5
    )
    with pytest.raises(InputError, match="did you mean 'skip'"):
        prepare_food101(mine, variant="x", incomplete="skipp", **SMALL)


def test_a_tree_without_most_of_its_pictures_is_refused(mine):
    for p in mine.glob("images/*/*/*.jpg"):
        p.unlink() if p.stem[-1] not in "0123" else None
    said = cli("--root", mine, ok=False)
    assert (
        "samples have no image" in said
        and "--incomplete skip" in said
        and not (mine.parent / "data").exists()
    )


def test_titles_in_latin_1_with_commas_quotes_and_line_breaks(mine):
    t = titles(mine)
    t.write_bytes(t.read_text(encoding="utf-8").encode("latin-1"))
    add(mine, 'pho_900.jpg,"Crème, ""brûlée""\nà la maison",pho', codec="latin-1")
    found = {r["id"]: r["text"] for r in read_titles(t)}
    assert (
        found["pho_900"] == 'Crème, "brûlée" à la maison' and "Café" in found["pho_1"]
    )
    row = next(r for r in food101_rows(mine) if r["id"] == "pho_1")
    assert "Café" in read_media(row, media_options(size=16))["text"]


def test_what_does_not_fit_is_reported_and_the_folder_is_right(mine, capsys):
    add(mine, "pho_1.jpg,another title,pho")
    first = titles(mine, "test").read_text().splitlines()
    titles(mine, "test").write_text(
        "\n".join([first[0].replace(",apple_pie", ",pho"), *first[1:-1]]) + "\n"
    )
    add(mine, first[-1])
    rows = {r["id"]: r for r in food101_rows(mine)}
    said = capsys.readouterr().out
    assert (
        "1 second titles dropped (pho_1)" in said
        and "1 titles with another class" in said
        and "1 titles in another split" in said
    )
    assert (
        rows["pho_1"]["text"] != "another title"
        and rows["apple_pie_0"]["y"] == "apple_pie"
        and all(f"/{r['split']}/" in r["image"] for r in rows.values())
    )


def test_copies_are_found_across_splits_and_classes(mine):
    for to in ("test/pho/pho_700.jpg", "train/ceviche/ceviche_700.jpg"):
        shutil.copy(mine / "images/train/pho/pho_1.jpg", mine / "images" / to)
    copies = repeats(food101_splits(mine), lambda r: sha256(r["image"]))
    assert len(copies) == len(across(copies)) == len(across(copies, 2)) == 1 and {
        i for _, i, _ in copies[0]
    } == {"pho_1", "pho_700", "ceviche_700"}


def test_published_style_lists_bring_text_and_need_no_titles(mine):
    how = lists(mine)
    shutil.rmtree(mine / "texts")
    shutil.move(
        mine / "images/train/baklava/baklava_1.jpg",
        mine / "images/train/baklava/sub.jpg",
    )
    shutil.move(
        mine / "images/train/baklava/sub.jpg",
        mine / "images/test/baklava/baklava_1.jpg",
    )  # not where `img` says, but of that name
    out = cli("--root", mine, "--split", *how, "--size", 24)
    assert "ready: data/food101" in out
    s = datasets["food101"]()
    assert [len(p) for p in s.parts.values()] == [80, 10, 60]
    assert all(
        x["text"].startswith("list ") for x in s.train.ds.select_columns(["text"])
    )


MLA = ("food101_mla_train.txt", "food101_mla_test.txt")


def test_the_real_lists_of_mla_split_rows_with_their_ids(real_lists, mine):
    files = real_lists(*MLA)
    lists = [read_split(f) for f in files]
    assert [len(v) for v in lists] == [62970, 22714]
    have = {r["id"]: {"id": r["id"], "text": "a title"} for v in lists for r in v}
    assert len(have) == 62970 + 22714
    splits = split_by_lists(mine, have, files)
    assert [len(splits[k]) for k in ("train", "valid", "test")] == [56673, 6297, 22714]
    assert len({r["y"] for r in splits["train"]}) == 101
    assert splits["test"][0] == {**have["frozen_yogurt_426"], "y": "frozen_yogurt"}
    assert split_name(files) == "mla"


def test_lists_as_mla_has_them_take_titles_from_the_download(mine):
    for part in ("train", "test"):
        rows = [r for r in food101_rows(mine) if r["split"] == part]
        text = "".join(f"{r['id']}.jpg {r['y']}\n" for r in rows)
        (mine.parent / f"{part}.txt").write_text(text)
    said = cli("--root", mine, "--split", "train.txt", "test.txt", "--size", 24)
    assert "split: train.txt+test.txt" in said
    s = datasets["food101"]()
    assert [len(p) for p in s.parts.values()] == [162, 18, 60]
    assert all(x["text"] for x in s.train.ds.select_columns(["text"]))
    (mine.parent / "test.txt").write_text("pho_1.jpg pho\npho_2.jpg\n")
    said = cli("--root", mine, "--split", "train.txt", "test.txt", ok=False)
    assert "test.txt, line 2: 'pho_2.jpg' is not a sample" in said


def test_lists_that_do_not_fit(mine):
    for change, why in (
        (
            lambda rows: (
                rows
                + [
                    dict(rows[0], id="x1", img="images/test/pho/pho_9999.jpg"),
                    dict(rows[0], id="x2", img="gone.jpg"),
                ]
            ),
            "2 of 152 samples that are not there (x1, x2)",
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
            lambda rows: [dict(rows[0], label="aple_pie"), *rows[1:]],
            "did you mean 'apple_pie'",
        ),
        (
            lambda rows: [dict(rows[0], label=None), *rows[1:]],
            "line 1: there is no 'label'",
        ),
    ):
        with pytest.raises(InputError) as e:
            prepare_food101(mine, lists(mine, change), **SMALL)
        assert why in str(e.value) and not (mine.parent / "data").exists()
    how = lists(mine, lambda rows: rows + [dict(rows[0], id="x1", img="gone.jpg")])
    assert "left out: 1 samples that the split lists name" in cli(
        "--root", mine, "--split", *how, "--absent", "skip", "--size", 24
    )


def test_wrong_roots_titles_and_names(mine):
    assert "give the folder that holds images/ and texts/ as --root" in cli(
        "--root", mine / "images", ok=False
    )
    assert "did you mean 'official'" in cli(
        "--root", mine, "--split", "offical", ok=False
    )
    shutil.copy(mine / "images/train/pho/pho_1.jpg", mine / "images/test/pho/pho_1.jpg")
    with pytest.raises(
        InputError, match="every image needs a name of its own, in one split"
    ):
        food101_rows(mine)
    (mine / "images/test/pho/pho_1.jpg").unlink()
    whole = titles(mine).read_text()
    for line, why in (
        ("pho_5.jpg,pho", "line 181: 'pho_5.jpg,pho' is not `image,title,class`"),
        ("pho_999.jpg,soup,phoo", "did you mean 'pho'"),
        ('pho_5.jpg,"' + "x" * 200000 + '",pho', "not valid CSV"),
    ):
        titles(mine).write_text(f"{whole}{line}\n")
        with pytest.raises(InputError, match=why):
            food101_rows(mine)
    titles(mine).unlink()
    assert "train_titles.csv: there is no such text file" in cli(
        "--root", mine, ok=False
    )
    assert not (mine.parent / "data").exists()


def test_halves_of_rows():
    splits = {
        "train": [{"id": str(k), "image": "i", "text": "t"} for k in range(8)]
        + [
            {"id": "a", "image": "i", "text": None},
            {"id": "b", "text_file": "f"},
            {"id": "c", "text": ""},
        ]
    }
    kept, gaps = split_incomplete(splits, ("image", "text"))
    assert len(kept["train"]) == 10 and [(g["id"], g["lacks"]) for g in gaps] == [
        ("a", "text"),
        ("b", "image"),
        ("c", "image"),
        ("c", "text"),
    ]
    assert len(split_incomplete(splits, ("image", "text"), "skip")[0]["train"]) == 8
    with pytest.raises(InputError, match="unknown way"):
        split_incomplete(splits, ("image", "text"), "maybe")
