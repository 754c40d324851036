"""Tables as people have them: programs, locales, columns of any name and kind.

With the cases of ../shared/cases that are about tables and texts.
"""

import csv
import io
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image

from mla_nb.core import InputError, check_dataset
from mla_nb.data.arrays import splits_from_arrays
from mla_nb.data.media import load_prepared, media_options, read_media, share_out
from mla_nb.data.own import (
    as_number,
    as_numbers,
    facts_of,
    kind_of,
    own_classes,
    own_rows,
    prepare_own,
    read_cells,
    read_table,
    series_of,
)
from mla_nb.encoders.text import Tokens
from mla_nb.predict import fit, load
from mla_nb.predict_table import predict_table
from mla_nb.runs.run import Run, run

torch.set_num_threads(1)
ROWS = [
    {"id": "a", "label": "glad", "text": "Crème, brûlée", "price": 1234.5},
    {"id": "b", "label": "low", "text": 'she said "no"', "price": 3.25},
    {"id": "c", "label": "glad", "text": "", "price": 12.0},
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(rows, sep=",", comma=False, end="\n", quote=csv.QUOTE_MINIMAL):
    "The rows as a program writes them"
    out = io.StringIO(newline="")
    w = csv.DictWriter(out, rows[0], delimiter=sep, lineterminator=end, quoting=quote)
    w.writeheader()
    for r in rows:
        shown = {
            k: str(v).replace(".", ",") if comma and isinstance(v, float) else v
            for k, v in r.items()
        }
        w.writerow(shown)
    return out.getvalue()


WRITERS = {  # program, locale -> bytes of the table
    "Excel CSV, English": lambda r: written(r, end="\r\n").encode("cp1252"),
    "Excel CSV, German": lambda r: written(r, ";", True, "\r\n").encode("cp1252"),
    "Excel CSV UTF-8, German": lambda r: written(r, ";", True, "\r\n").encode(
        "utf-8-sig"
    ),
    "Excel Unicode text": lambda r: written(r, "\t", True, "\r\n").encode("utf-16"),
    "sep=; first": lambda r: ("sep=;\r\n" + written(r, ";", True, "\r\n")).encode(),
    "sep=tab first": lambda r: ("sep=\t\n" + written(r, "\t")).encode(),
    "Excel, empty columns": lambda r: written(
        [{**x, "": "", " ": ""} for x in r], ";", True, "\r\n"
    ).encode("utf-8-sig"),
    "Excel, empty rows below": lambda r: (
        written(r, ";", True, "\r\n") + ";;;\r\n;;;\r\n"
    ).encode(),
    "LibreOffice, English": lambda r: written(r, quote=csv.QUOTE_NONNUMERIC).encode(),
    "LibreOffice, German": lambda r: written(
        r, ";", True, quote=csv.QUOTE_NONNUMERIC
    ).encode(),
    "Google Sheets": lambda r: written(r, end="\r\n").encode(),
    "Google Sheets, German": lambda r: written(r, ",", True, "\r\n").encode(),
    "Mac line ends": lambda r: (
        written(r, end="\r").encode("mac-roman").decode("mac-roman").encode()
    ),
    "empty first lines": lambda r: ("\r\n;;;\r\n" + written(r, ";", True)).encode(),
    "pandas with its index": lambda r: written(
        [{"": k, **x} for k, x in enumerate(r)]
    ).encode(),
    "pandas, two indexes": lambda r: written(
        [{"": k, "Unnamed: 0": k, **x} for k, x in enumerate(r)]
    ).encode(),
    "JSON lines": lambda r: "\n".join(map(json.dumps, r)).encode(),
    "JSON array": lambda r: json.dumps(r, indent=1).encode(),
    "JSON with NaN": lambda r: json.dumps(
        [{**x, "text": x["text"] or float("nan")} for x in r]
    ).encode(),
    "head in capitals": lambda r: written(
        [{k.upper() if k != "price" else k: v for k, v in x.items()} for x in r]
    ).encode(),
}


@pytest.mark.parametrize("program", WRITERS)
def test_the_same_rows_from_every_program(program, capsys):
    Path("t.csv").write_bytes(WRITERS[program](ROWS))
    columns = "words=text:text,price:vector"
    rows, plan = own_rows("t.csv", columns)
    assert [(r["id"], r["y"]) for r in rows] == [
        ("a", "glad"),
        ("b", "low"),
        ("c", "glad"),
    ]
    assert [r.get("words") for r in rows] == ["Crème, brûlée", 'she said "no"', None]
    assert [r["price"] for r in rows] == [[1234.5], [3.25], [12.0]]
    assert plan["price"]["numbers"] == [True]
    said = capsys.readouterr().out
    assert ("not used: (column 1)" in said) == ("index" in program)


def test_columns_that_are_not_asked_for_are_named(capsys):
    Path("t.csv").write_bytes(WRITERS["Google Sheets"](ROWS[:2]))
    assert not any("price" in r for r in read_table("t.csv"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "not used: price" in said
    assert "'price:vector'" in said


def test_a_missing_id_is_numbered():
    Path("t.csv").write_text("label,text\na,so\nb,no\n")
    assert [r["id"] for r in read_table("t.csv")] == ["1", "2"]
    Path("t.csv").write_text("id,label,text\nx,a,so\n,b,no\n")
    assert [r["id"] for r in read_table("t.csv")] == ["x", "row-2"]


def test_names_are_mapped():
    Path("t.csv").write_text(
        "Nr;Klasse;Foto vorn;Notiz\n7;ja;a.png;so\n8;nein;b.png;ach\n"
    )
    rows, plan = own_rows("t.csv", "id=Nr,label=klasse,vorn=Foto vorn:image,Notiz:text")
    assert [(r["id"], r["y"], r["vorn"], r["Notiz"]) for r in rows] == [
        ("7", "ja", "a.png", "so"),
        ("8", "nein", "b.png", "ach"),
    ]
    assert {m: p["kind"] for m, p in plan.items()} == {"vorn": "image", "Notiz": "text"}
    rows, plan = own_rows("t.csv", "id=Nr,label=Klasse,Foto vorn,Notiz:text")
    assert {m: p["kind"] for m, p in plan.items()} == {
        "Foto_vorn": "image",
        "Notiz": "text",
    }


WRONG = {
    "kind": ("label,a\nx,1\ny,2", "a:number", "unknown kind of column 'number'"),
    "column": ("label,photo\nx,1.png\ny,2.png", "foto:image", "did you mean 'photo'"),
    "no label": ("a,text\nx,1\ny,2", "", "say --columns label=COLUMN"),
    "undeclared": (
        "label,foto,wert\nx,1.png,3\ny,2.png,4",
        "",
        "foto:image,wert:vector",
    ),
    "typo": ("label,txet\nx,so\ny,no", "", "did you mean 'text'"),
    "two columns": ("label,a,b\nx,1.png,2.png", "p=a+b:image", "only a vector"),
    "a name of PyTorch": ("label,a\nx,1\ny,2", "keys=a:vector", "cannot be the name"),
    "span": ("label,audio,start,end\nx,a.wav,3,2", "", "the start first"),
    "half a span": ("label,audio,start\nx,a.wav,3", "", "the start first"),
    "open quote": ('id,label,text\n1,a,"so\n2,b,no', "", "never closed"),
    "columns of pandas": ('{"label": {"0": "a"}, "text": {"0": "b"}}', "", "orient="),
    "a list as label": ('[{"label": ["red", "wool"], "text": "x"}]', "", "several"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tables_are_one_sentence(what):
    text, columns, why = WRONG[what]
    Path("t.csv").write_text(text)
    with pytest.raises(InputError, match=why) as e:
        own_rows("t.csv", columns)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "head,why",
    [
        (b"PK\x03\x04rest", "spreadsheet .xlsx or ods"),
        (b"\xd0\xcf\x11\xe0rest", "spreadsheet .xls"),
        (b"PAR1rest", "Parquet"),
        ("label,text\na,b\n".encode("utf-16-le"), "UTF-16 without a mark"),
    ],
)
def test_files_that_are_no_text_are_named(head, why):
    Path("t.csv").write_bytes(head)
    with pytest.raises(InputError, match=why):
        read_cells("t.csv")


LABELS = {
    "a measurement": (
        [f"{k / 7:.3f}" for k in range(60)],
        "60 different numbers in 60",
    ),
    "German numbers": ([f"{k},5" for k in range(30)], "this is a measurement"),
    "several with ;": (["red;wool", "blue", "blue;silk"], "'blue;silk' names several"),
    "several with ,": (["red", "wool", "red,wool"], "'red,wool' names several"),
    "several with |": (["a|b", "c"], "one class here"),
    "capitals": (["Yes", "yes"], "differ only"),
    "inner spaces": (["very good", "very  good"], "differ only"),
    "no-break space": (["very good", "very\u00a0good"], "differ only"),
    "Unicode form": (["caf\u00e9", "cafe\u0301"], "differ only"),
    "zero width": (["cat", "cat\u200b"], "differ only"),
    "1 and 1.0": (["1", "1.0", "2"], "differ only"),
    "half an emoji": (["a\ufffd", "b"], "not valid text"),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_are_no_classes(what):
    labels, why = LABELS[what]
    with pytest.raises(InputError, match=why):
        own_classes([{"y": v} for v in labels])


@pytest.mark.parametrize(
    "labels",
    [
        ["happy", "happy/sad"],
        ["R&B", "rock"],
        ["Hello, world", "so"],
        [str(k % 12) for k in range(240)],
        ["1,5", "2,0", "2,5"],
        ["a+", "a", "a-"],
    ],
)
def test_labels_that_are_classes(labels):
    assert set(own_classes([{"y": v} for v in labels])) == set(labels)


def test_numbers():
    for text, value in {
        "1 234,5": 1234.5,
        "1\u00a0234,5": 1234.5,
        "1'234.5": 1234.5,
        "-0,5": -0.5,
        "1,234,567": 1234567.0,
        "1.234.567,8": 1234567.8,
        "2e-3": 0.002,
        "12 EUR": None,
        "": None,
        "1,2,3": None,
    }.items():
        assert as_number(text) == value, text
    assert as_numbers(["1.234", "2.5"]) == [1.234, 2.5]
    assert as_numbers(["0,5", "1,250"]) == [0.5, 1.25]
    assert facts_of([2, float("nan"), "x"], [True, True, False]) == [2.0, None, "x"]


def test_kinds_by_their_looks():
    for values, kind in (
        (["a.PNG", None, "b.jpeg"], "image"),
        (["x/a.wav"], "audio"),
        (["a.mp4", "b.mov"], "video"),
        (["s1.npy"], "series"),
        (["[1, 2]", "[3]"], "series"),
        ([[1, 2]], "series"),
        (["1,5", "2"], "vector"),
        (["red", "blue"] * 30, "vector"),
        ([f"a sentence about {k}" for k in range(30)], "text"),
        (["n.txt"], "text_file"),
    ):
        assert kind_of(values) == kind, values


def test_series_of_files_and_cells():
    want = np.array([[1.5, 2], [np.nan, 3]], "f4")
    np.save("s.npy", want)
    Path("e.csv").write_text("x,y\n1.5,2\n,3\n")
    Path("g.csv").write_bytes("x;y\r\n1,5;2\r\n;3\r\n".encode("utf-8-sig"))
    Path("t.tsv").write_text("1.5\t2\nnan\t3\n")
    for source in ("s.npy", "e.csv", "g.csv", "t.tsv", "[[1.5, 2], [NaN, 3]]", want):
        np.testing.assert_array_equal(series_of(source), want)
    np.save("o.npy", np.array([{"a": 1}], object), allow_pickle=True)
    Path("w.csv").write_text("x,y\n1,so\n")
    for bad in ("o.npy", "no.npy", "w.csv", "[1, 2", "[1 2 ... 9]", "[[1], [2, 3]]"):
        with pytest.raises(InputError) as e:
            series_of(bad)
        assert "\n" not in str(e.value)


def study(n=60):
    "Two pictures, a sensor and two values per sample; names and kinds of its own"
    rng, rows = np.random.default_rng(0), []
    for k in range(n):
        y = k % 2
        for side in ("front", "back"):
            gray = rng.integers(0, 80, (24, 24, 3)) + 150 * y * (side == "front")
            Image.fromarray(gray.astype("u1")).save(f"{side}{k}.png")
        wave = np.sin((0.3 + y) * np.arange(20 + k % 9)) + 0.1 * rng.standard_normal()
        np.save(f"s{k}.npy", np.stack([wave, wave], 1).astype("f4"))
        rows.append(
            {
                "Klasse": "ab"[y],
                "front": f"front{k}.png",
                "back": f"back{k}.png" if k % 5 else "",
                "Sensor 1": f"s{k}.npy",
                "Preis": f"{10 + 5 * y + rng.random():.2f}".replace(".", ","),
                "Marke": ("oak", "elm", "")[k % 3],
                "Notiz": "not asked for",
            }
        )
    Path("t.csv").write_text(written(rows, ";"))
    return rows


COLUMNS = (
    "label=Klasse,front:image,back:image,sensor=Sensor 1:series,"
    "facts=Preis+Marke:vector"
)
QUIET = {"audio": "log_mel", "size": 24, "progress": False}


def test_from_columns_of_many_kinds_to_answers(here):
    rows = study()
    s = load_prepared(prepare_own("t.csv", "x", columns=COLUMNS, **QUIET))
    check_dataset(s)
    kinds = {m: mod.kind for m, mod in s.modalities.items()}
    assert kinds == {
        "front": "image",
        "back": "image",
        "sensor": "series",
        "facts": "vector",
    }
    assert s.modalities["sensor"].info["channels"] == 2
    assert s.train[0]["x"]["sensor"].shape[1] == 2
    r = run(
        Run(
            dataset="own",
            dataset_args="variant=x",
            method="mla",
            epochs=2,
            batch_size=8,
            lr=0.003,
            optimizer="adamw",
            encoder="sensor=transformer,front=small,back=small,facts=small",
            progress=False,
            threads=1,
        )
    )
    assert set(r["test"]["accuracy"]) == {"fused", *kinds}
    p = load(Path("runs") / r["id"])
    k = int(s.test.ids[0]) - 1
    a = p.explain(
        front=[f"front{k}.png"],
        sensor=[f"s{k}.npy"],
        facts=[[12.5, None]],
        keep=True,
    )
    assert a.pred.present[:, 0].tolist() == [True, False, True, True]
    a.plot()
    item = p.read({"sensor": f"s{k}.npy", "facts": ["10,5", "elm"]})
    assert torch.equal(item["sensor"], s.test[0]["x"]["sensor"])
    assert item["facts"] == [10.5, "elm"] and item["front"] is None
    p.save(here / "kept")
    again = load(here / "kept").explain(sensor=[f"s{k}.npy"], front=[f"front{k}.png"])
    assert again.pred.present.sum() == 2
    asked = [
        {k: v for k, v in r.items() if k not in ("Notiz", "Klasse")} for r in rows[:4]
    ]
    Path("ask.csv").write_text(written(asked, ";"))
    done = predict_table(p, "ask.csv", "answers.csv", progress=False)
    assert done["answered"] == 4, done
    pytest.importorskip("onnxruntime")
    p.export(here / "net.onnx")


def test_a_series_with_other_channels_is_left_out(capsys):
    rows = study(40)
    np.save("s7.npy", np.zeros((5, 3)))
    s = load_prepared(prepare_own("t.csv", "x", columns=COLUMNS, **QUIET))
    assert sum(map(len, s.parts.values())) == len(rows) - 1
    assert "3 channels, but 2" in Path("data/own-x/skipped.csv").read_text()


def test_inferred_columns_are_shown(capsys):
    study(30)
    with pytest.raises(InputError, match="front:image,back:image,Sensor 1:series"):
        own_rows("t.csv", "label=Klasse")
    _, plan = own_rows("t.csv", "label=Klasse,front,back,Preis,Sensor 1")
    assert {m: p["kind"] for m, p in plan.items()} == {
        "front": "image",
        "back": "image",
        "Preis": "vector",
        "Sensor_1": "series",
    }


# the cases of ../shared ---------------------------------------------------------------


@pytest.fixture
def case(capsys):
    "What a case of ../shared prints, with the names of this edition"

    def ran(name):
        file = SHARED / "cases" / name / "case.py"
        if not file.exists():
            pytest.skip(f"{file} is not there")
        text = file.read_text()
        for old, new in (
            (
                "mla_nb.core import splits_of\n",
                "mla_nb.data.arrays import splits_from_arrays as splits_of\n",
            ),
            ("mla_nb.experiments import fit", "mla_nb.predict import fit"),
        ):
            text = text.replace(old, new)
        Path("case.py").write_text(text)
        capsys.readouterr()
        runpy.run_path("case.py")
        return capsys.readouterr().out

    return ran


def test_case_empty_text_file(case):
    assert "text" not in case("empty_text_file")


def test_texts_that_say_nothing_are_absent():
    for k, data in enumerate((b"", b"\n \t\r\n", b"\xff\xfe", b"\xef\xbb\xbf")):
        Path(f"{k}.txt").write_bytes(data)
        row = {"id": "x", "y": "a", "text_file": f"{k}.txt"}
        assert "text" not in read_media(row, media_options())
    assert "text" not in read_media(
        {"id": "x", "y": "a", "text": "  "}, media_options()
    )


def test_few_groups():
    for n in range(3, 11):  # the input of the case few_groups
        rows = [{"id": str(k), "y": "ab"[k % 2], "group": k % n} for k in range(8 * n)]
        parts = [{r["group"] for r in p} for p in share_out(rows, group="group")]
        assert all(parts) and sum(map(len, parts)) == n
    with pytest.raises(InputError, match="at least 3 groups"):
        share_out(
            [{"id": str(k), "y": "a", "group": k % 2} for k in range(8)], group="group"
        )
    for n in range(5, 12):
        rows = [{"id": str(k), "y": "ab"[k % 2]} for k in range(2 * n)]
        assert all(share_out(rows))


def test_case_lone_surrogate(case):
    out = case("lone_surrogate")
    assert "Error" not in out and out.count("\n") >= 2


def test_half_characters_become_a_mark():
    t = Tokens().fit(["hi \ud83d", "ho"])
    assert torch.equal(t(["hi \ud83d"])["ids"], t(["hi \ufffd"])["ids"])
    Path("t.jsonl").write_text(
        '{"label": "a", "text": "x \\ud83d"}\n{"label": "b", "text": "y"}'
    )
    assert read_table("t.jsonl")[0]["text"] == "x \ufffd"
    p = fit(splits_from_arrays({"t": ["hi \ud83d", "ho"] * 30}, [0, 1] * 30), epochs=1)
    assert p.explain(t="ho \udcff").names[0] in ("0", "1")  # a byte that is no UTF-8


def test_case_table_messages(case):
    lines = [s for s in case("table_messages").splitlines() if "not used" not in s]
    assert [s[-6:] for s in lines] == ["1 rows"] * 4 + ["2 rows", "1 rows"]


def test_case_slow_tokenizers(case):
    pytest.importorskip("transformers")
    out = case("slow_tokenizers")
    assert "InputError" in out and "BertweetTokenizer is written in Python" in out


def test_a_path_that_windows_wrote(tmp_path):
    "Backslashes in cells of a table that is read elsewhere, in training and prediction"
    from mla_nb.data.own import found_path

    folder = tmp_path / "photos" / "Mai"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(b"x")
    assert found_path(tmp_path, "photos\\Mai\\a.png") == folder / "a.png"
    assert found_path(tmp_path, "photos/Mai/a.png") == folder / "a.png"
    odd = tmp_path / "b\\c.png"  # a name that really has a backslash
    odd.write_bytes(b"x")
    assert found_path(tmp_path, "b\\c.png") == odd


def test_id_and_label_keep_the_names_that_the_training_table_declared(tmp_path):
    from mla_nb.core import Modality
    from mla_nb.predict_table import read_requests

    table = tmp_path / "neu.csv"
    table.write_text("Nr;Tweet;Stimmung\n7;hallo;gut\n8;na ja;böse\n", "utf-8")
    mods = {"Tweet": Modality("text", "text", {"columns": ["Tweet"]})}
    declared = "id=Nr,label=Stimmung,Tweet:text"
    rows = read_requests(table, mods, ["gut", "böse"], declared)
    assert [(r["id"], r["label"]) for r in rows] == [("7", "gut"), ("8", "böse")]
    usual = tmp_path / "usual.csv"  # the usual names are read as well
    usual.write_text("id,Tweet,label\n7,hallo,gut\n", "utf-8")
    [row] = read_requests(usual, mods, ["gut", "böse"], declared)
    assert (row["id"], row["label"]) == ("7", "gut")
