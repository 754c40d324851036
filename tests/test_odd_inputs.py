"""Ordinary inputs that are a little odd, each made here and compared with a library."""

import os
import shutil
import unicodedata
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from PIL import Image

from mla_nb.core import InputError
from mla_nb.data.arrays import as_items, as_labels, samples_from_arrays
from mla_nb.data.decode import decode_image
from mla_nb.data.media import media_options, read_media
from mla_nb.data.own import facts_of, own_rows, prepare_own
from mla_nb.evaluation import findings, gap_to_single
from mla_nb.methods.base import Pred
from mla_nb.predict import as_columns, fit
from mla_nb.predict_table import read_requests

torch.set_num_threads(1)
RATE = 16000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype("float32")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(text, encoding="utf-8"):
    Path("t.csv").write_bytes(text.encode(encoding))
    return "t.csv"


def read(kind, source):
    return read_media({"id": "a", "y": None, kind: str(source)}, media_options())


def test_headers_with_spaces_around_and_ids_that_differ_by_case():
    text = "id , label \u00a0,\ttext \nA1,a,hello\na1,b,world\n"
    rows, plan = own_rows(table(text, "utf-8-sig"))
    assert [r["id"] for r in rows] == ["A1", "a1"]
    assert [r["text"] for r in rows] == ["hello", "world"] and [*plan] == ["text"]


def test_files_with_umlauts_spaces_and_signs_and_links_to_them():
    folder = Path("Größe #1 & 50%")
    folder.mkdir()
    sf.write(folder / "ä%20b ?.wav", TONE, RATE)
    sf.write("plain.wav", TONE, RATE)
    os.symlink(folder / "ä%20b ?.wav", "link.wav")
    os.symlink("nowhere.wav", "dead.wav")
    usual = read("audio", "plain.wav")["audio"]
    for name in (folder / "ä%20b ?.wav", "link.wav"):
        assert np.array_equal(read("audio", name)["audio"], usual)
    with pytest.raises(InputError, match="dead.wav: there is no such"):
        read("audio", "dead.wav")


@pytest.mark.parametrize(
    "path,why",
    [
        ("sounds\\a.wav", "Windows"),
        ("file:///sounds/a.wav", "addresses are not read"),
        (unicodedata.normalize("NFD", "tür.wav"), "another Unicode form"),
        ("b.wav", "relative to the table's folder"),
    ],
)
def test_why_a_file_is_not_found_is_said(path, why):
    sf.write("tür.wav", TONE, RATE)
    rows = "".join(f"{'ab'[i % 2]},{path}\n" for i in range(20))
    with pytest.raises(InputError, match=why):
        prepare_own(table("label,audio\n" + rows), workers=1)


@pytest.mark.parametrize("codec", ["utf-16", "utf-8-sig", "cp1252"])
def test_text_files_of_usual_encodings(codec):
    Path("a.txt").write_bytes("Grüße aus Köln\r\nzwei".encode(codec))
    assert read("text_file", "a.txt")["text"] == "Grüße aus Köln zwei"


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-32"])
def test_text_files_with_zero_bytes_are_refused(codec):
    Path("a.txt").write_bytes("Grüße aus Köln".encode(codec))
    with pytest.raises(InputError, match="holds zero bytes"):
        read("text_file", "a.txt")


def test_recordings_without_samples_and_with_one():
    sf.write("zero.wav", TONE[:0], RATE)
    with pytest.raises(InputError, match="no samples"):
        read("audio", "zero.wav")
    sf.write("one.wav", TONE[:1], RATE)
    assert "silent" in read("audio", "one.wav")["notes"][0]


@pytest.mark.parametrize(
    "form,subtype,suffix",
    [
        ("WAVEX", "PCM_24", "wav"),
        ("RF64", "FLOAT", "wav"),
        ("W64", "PCM_16", "w64"),
        ("CAF", "ALAC_16", "caf"),
        ("AU", "ULAW", "au"),
    ],
)
def test_rare_containers_are_read_as_libsndfile_reads_them(form, subtype, suffix):
    sf.write(f"a.{suffix}", TONE, RATE, format=form, subtype=subtype)
    sf.write("same.wav", sf.read(f"a.{suffix}")[0], RATE, subtype="DOUBLE")
    ours, usual = (read("audio", n)["audio"] for n in (f"a.{suffix}", "same.wav"))
    assert np.allclose(ours, usual, atol=0.1)


@pytest.mark.parametrize("suffix", ["webp", "gif", "png", "tiff"])
def test_of_an_animation_the_first_picture_is_seen(suffix):
    frames = [Image.new("RGB", (40, 30), c) for c in ("red", "lime", "blue")]
    how = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(f"a.{suffix}", save_all=True, append_images=frames[1:], **how)
    seen = np.asarray(decode_image(read("image", f"a.{suffix}")["image"]))
    usual = np.asarray(Image.open(f"a.{suffix}").convert("RGB")).mean((0, 1))
    assert np.abs(seen.mean((1, 2)) - usual).max() < 4


@pytest.mark.parametrize("mode,color", [("CMYK", (0, 255, 255, 0)), ("1", 1)])
def test_pictures_of_printers_and_of_one_bit(mode, color):
    Image.new(mode, (40, 30), color).save("a.tiff")
    seen = np.asarray(decode_image(read("image", "a.tiff")["image"]))
    usual = np.asarray(Image.open("a.tiff").convert("RGB")).mean((0, 1))
    assert np.abs(seen.mean((1, 2)) - usual).max() < 4


def clip(path, tracks, late=0.0):
    "Two seconds of pictures with tracks of sound, which start so many seconds late"
    with av.open(path, "w") as c:
        v = c.add_stream("mpeg4", rate=25)
        v.width, v.height, v.pix_fmt = 64, 48, "yuv420p"
        sounds = [c.add_stream("aac", rate=RATE) for _ in tracks]
        for i in range(50):
            pixels = np.full((48, 64, 3), 4 * i, np.uint8)
            f = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            f.pts = i
            c.mux(v.encode(f))
        c.mux(v.encode())
        for s, wave in zip(sounds, tracks):
            for k in range(0, len(wave), 1024):
                part = wave[None, k : k + 1024]
                f = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                f.sample_rate, f.time_base = RATE, Fraction(1, RATE)
                f.pts = k + round(late * RATE)
                c.mux(s.encode(f))
            c.mux(s.encode())


def test_of_several_sounds_of_a_clip_the_first_is_heard():
    clip("two.mp4", [TONE, TONE * 0])
    clip("one.mp4", [TONE])
    ours, usual = (read("audio", f"{n}.mp4")["audio"] for n in ("two", "one"))
    assert np.allclose(ours, usual)


def test_frames_beside_files_that_systems_leave_there():
    Path("frames a").mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i,) * 3).save(f"frames a/{i}.png")
    clean = read("video", "frames a")["video"]
    for name in ("Thumbs.db", ".DS_Store", "._3.png"):
        Path("frames a", name).write_bytes(b"x")
    assert read("video", "frames a")["video"] == clean


def test_a_wrong_ending_and_capitals():
    sf.write("a.wav", TONE, RATE)
    usual = read("audio", "a.wav")["audio"]
    for name in ("a.mp3", "A.WAV"):
        shutil.copy("a.wav", name)
        assert np.array_equal(read("audio", name)["audio"], usual)


def test_rows_with_several_indices_and_gaps_of_every_kind():
    index = pd.MultiIndex.from_arrays([[*"aabb"], [1, 1, 1, 1]])
    price = pd.Series(pd.array([1.5, None, 3.0, 4.0], dtype="Float64"), index=index)
    word = pd.Series(pd.array(["a", pd.NA, "b", None], dtype="string"), index=index)
    assert as_items("price", price) == [1.5, None, 3.0, 4.0]
    assert as_items("word", word) == ["a", None, "b", None]
    mixed = np.array([None, float("nan"), 2.0, np.float32("nan")], dtype=object)
    assert as_items("mixed", mixed) == [None, None, 2.0, None]


def test_what_is_masked_is_missing():
    v = np.ma.masked_array([[1.0, 2.0], [3.0, 4.0]], mask=[[0, 1], [0, 0]])
    first, second = as_items("v", v)
    assert np.isnan(first[1]) and first[0] == 1 and second.tolist() == [3, 4]
    assert as_items("n", np.ma.masked_array([1, 2], mask=[0, 1])) == [1.0, None]
    assert as_items("n", np.ma.masked_array([1, 2])) == [1, 2]
    (row,) = as_items("rows", [v[0]])
    assert np.isnan(row[1])


def test_arrays_of_python_numbers_are_numbers():
    rows = np.array([[1, 2.5], [3, 4], [5, 6], [7, 8]], dtype=object)
    samples, _, found = samples_from_arrays({"v": rows}, [*"abab"])
    assert found["v"].form == "row" and len(samples) == 4
    assert as_items("v", rows)[0].dtype == float


def test_a_name_for_two_columns_is_refused():
    frame = pd.DataFrame([[1.0, 2.0]] * 4, columns=["price", "price"])
    with pytest.raises(InputError, match="'price' is there more than once"):
        samples_from_arrays(frame, [*"abab"])


def test_labels_with_unused_categories_and_truth_values():
    unused = pd.Series(pd.Categorical([*"abab"], categories=["a", "b", "never"]))
    assert as_labels(unused)[1] == ["a", "b"]
    assert as_labels(pd.array([True, False, True], dtype="boolean"))[1] == [False, True]
    assert as_labels(np.array([0.0, 1.0, 0.0]))[1] == [0, 1]


def test_nested_lists_of_hugging_face_are_series():
    datasets = pytest.importorskip("datasets")
    waves = [[[0.5, 1.0]] * (5 + i) for i in range(4)]
    d = datasets.Dataset.from_dict({"wave": waves})
    _, _, found = samples_from_arrays(d, [*"abab"])
    assert found["wave"].kind == "series"


EXCEL = "Nummer;Stimmung;Text;Preis (€);Größe\r\n" + "".join(
    f"{i};{('gut', 'schlecht')[i % 2]};Wort {i};1.{100 + i},5;{'SML'[i % 3]}\r\n"
    for i in range(40)
)
HOW = "words=Text:text,facts=Preis (€)+Größe:vector,label=Stimmung,id=Nummer"


@pytest.mark.parametrize("codec", ["utf-8-sig", "cp1252"])
def test_a_declared_column_called_text_is_found_again(codec):
    from mla_nb.data.own import own

    prepare_own(table(EXCEL, codec), name="xl", columns=HOW, workers=1)
    mods = own(variant="xl").modalities
    asked = read_requests("t.csv", mods, ["gut", "schlecht"])
    assert asked[3]["sources"]["words"] == "Wort 3"
    assert len(asked[3]["sources"]["facts"]) == 2


def test_a_declared_column_of_text_files_is_found_again():
    from mla_nb.data.own import own

    for i in range(30):
        Path(f"{i}.txt").write_text(f"word {i}")
    rows = "".join(f"{'ab'[i % 2]},{i}.txt\n" for i in range(30))
    how = "words=note:text_file"
    prepare_own(table("label,note\n" + rows), name="tf", columns=how, workers=1)
    asked = read_requests("t.csv", own(variant="tf").modalities, ["a", "b"])
    assert asked[3]["sources"]["words"] == Path("3.txt")


def test_looks_and_declarations_go_together():
    _, plan = own_rows(table(EXCEL, "cp1252"), "infer, label=Stimmung, id=Nummer")
    kinds = [p["kind"] for p in plan.values()]
    assert sorted(kinds) == ["text", "vector", "vector"]
    with pytest.raises(InputError, match="--columns infer,label=COLUMN"):
        own_rows("t.csv", "infer")


def test_a_vector_with_too_few_values_says_what_it_needs():
    with pytest.raises(InputError, match=r"\[a number, a word\], with quotes"):
        facts_of("12;L", [True, False])


@pytest.fixture(scope="module")
def fitted():
    g = np.random.default_rng(0)
    k = np.arange(80) % 2
    frame = pd.DataFrame(
        {
            "sway": [g.normal(c, 1, (9 + i % 5, 2)) for i, c in enumerate(k)],
            "price": np.where(g.random(80) < 0.2, np.nan, k + g.normal(0, 0.3, 80)),
            "wood": np.array(["fir", "oak"])[k],
        }
    )
    return frame, fit(frame, k, {"facts": ["price", "wood"]}, epochs=2, method="mla")


def test_a_list_is_one_row_of_a_vector_of_several_columns(fitted):
    frame, c = fitted
    one = c.predict_proba(sway=frame.sway[0], facts=[0.5, "oak"])
    same = c.predict_proba(sway=[frame.sway[0]], facts=[[0.5, "oak"]])
    assert torch.allclose(one, same[0])
    assert len(c.predict(facts=[[0.5, "oak"], [None, "fir"]])) == 2
    assert isinstance(c.predict(facts=[None, "fir"]), str)


def test_a_table_without_a_name_is_refused_with_the_spelling(fitted):
    frame, c = fitted
    for ask in (c.predict, c.predict_proba):
        with pytest.raises(InputError, match="as_columns"):
            ask(frame)
    columns = as_columns(frame, c.modalities)
    assert len(c.predict(**columns)) == len(frame)


def test_an_accuracy_on_part_of_the_samples_says_so():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    logits = torch.randn(2, 40, 2, generator=g)
    logits[0] += 4 * torch.nn.functional.one_hot(y, 2)
    present = torch.ones(2, 40, dtype=torch.bool)
    present[0, :10] = False
    p = Pred(["leaf", "bark"], logits, logits[1], None, present, y, torch.arange(40))
    d = gap_to_single(p, {"leaf": 0.9, "bark": 0.5, "fused": 0.5})
    assert d["n"] == 30
    (said,) = [f for f in findings({"single": d}) if "leaf alone" in f]
    assert "on the 30 samples of test that have leaf" in said
