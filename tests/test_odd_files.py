"""Odd but valid inputs that one would meet next, tried by someone who had not written
the readers: files as recorders, browsers and scanners write them, tables and arrays as
people have them."""

import os
from fractions import Fraction

import av
import datasets as hub
import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from PIL import Image

from mla_nb import fit
from mla_nb.data.decode import load_wave
from mla_nb.data.own import own, prepare_own
from mla_nb.estimator import MultimodalClassifier
from mla_nb.tools import InputError

QUICK = {"epochs": 1, "verbose": False}
N = 24


def prepared(folder, header, rows, delimiter=",", name="odd", **options):
    "A table as a prepared dataset"
    lines = [delimiter.join(map(str, row)) for row in (header, *rows)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n", "utf-8")
    how = {"data": folder, "size": 16, "workers": 1, "progress": False}
    prepare_own(folder / "table.csv", name, **how, **options)
    return own(folder, variant=name)


def parts(s):
    return {
        i: part[k]["x"] for part in s.parts.values() for k, i in enumerate(part.ids)
    }


def noise(rng, n=8000):
    return 0.2 * rng.standard_normal(n)


def test_sounds_of_recorders_in_folders_with_any_name(tmp_path):
    "24-bit extensible, 64-bit float, umlauts, spaces, # and %, links, no sample at all"
    rng, rows = np.random.default_rng(0), []
    folder = tmp_path / "Töne #1"
    folder.mkdir()
    for k in range(N):
        path = folder / f"auf nahme {k} 100%.wav"
        kinds = {"format": "WAVEX", "subtype": "PCM_24"}, {"subtype": "DOUBLE"}
        sf.write(path, noise(rng, 0 if k == 3 else 8000), 8000, **kinds[k % 2])
        if k % 5 == 4:
            os.symlink(path, tmp_path / f"link{k}.wav")
            path = tmp_path / f"link{k}.wav"
        rows.append([k, path.relative_to(tmp_path), "xy"[k % 2]])
    s = prepared(tmp_path, ["id", "audio", "label"], rows, "\t", audio="log_mel")
    items = parts(s)
    assert set(items) == set(map(str, range(N))) - {"3"}
    left_out = (tmp_path / "own-odd/skipped.csv").read_text()
    assert left_out.count("\n") == 2 and "auf nahme 3 100%.wav" in left_out
    heard = torch.stack([torch.as_tensor(items[str(k)]["audio"]) for k in (0, 1, 4)])
    assert heard.isfinite().all() and heard.float().std() > 0.01


def test_pictures_of_browsers_and_scanners(tmp_path):
    "An animation shows its first frame; pages of 16 bits their first page, not black"
    rows, first = [], {}
    for k in range(N):
        if k % 2:
            frames = [np.full((20, 30, 3), v, "u1") for v in (200, 30, 30)]
            name, more = f"{k}.webp", {"duration": 100, "lossless": True}
            first[str(k)] = 200
        else:
            frames = [np.full((20, 30), v, "u2") for v in (40000, 100)]
            name, more = f"{k}.tif", {}
            first[str(k)] = round(40000 / 65535 * 255)
        head, *rest = map(Image.fromarray, frames)
        head.save(tmp_path / name, save_all=True, append_images=rest, **more)
        rows.append([k, name, "xy"[k // 2 % 2]])
    items = parts(prepared(tmp_path, ["id", "image", "label"], rows))
    for i, v in first.items():
        assert abs(torch.as_tensor(items[i]["image"]).float().mean() - v) < 4, i


def test_a_clip_with_two_sound_tracks_is_heard_on_its_first(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for k in range(12):
        with av.open(str(tmp_path / f"{k}.mp4"), "w") as c:
            show = c.add_stream("mpeg4", rate=10)
            show.width, show.height, show.pix_fmt = 48, 32, "yuv420p"
            tracks = [c.add_stream("aac", rate=16000) for _ in range(2)]
            for _ in range(10):
                frame = rng.integers(0, 255, (32, 48, 3), dtype="u1")
                for packet in show.encode(av.VideoFrame.from_ndarray(frame)):
                    c.mux(packet)
            for track, loud in zip(tracks, (0.5, 0.0)):
                wave = (loud * np.sin(np.arange(16000) * 0.3)).astype("f4")[None]
                sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                sound.rate = 16000
                for packet in track.encode(sound):
                    c.mux(packet)
            for stream in (show, *tracks):
                for packet in stream.encode(None):
                    c.mux(packet)
        rows.append([k, f"{k}.mp4", "xy"[k % 2]])
    how = {"columns": "clip:video+audio", "audio": "log_mel", "seconds": 1.0}
    s = prepared(tmp_path, ["id", "clip", "label"], rows, **how)
    for x in parts(s).values():
        sound = torch.as_tensor(x["clip_sound"]).float()
        assert sound.amax() - sound.amin() > 3  # a tone, and no silence


def test_tables_as_people_have_them(tmp_path):
    "Spaces in the header, empty columns and rows at the end, ids that differ by case"
    ids = ["a", "A", *map(str, range(2, N))]
    rows = [[i, f"word {i}", "xy"[k % 2], "", ""] for k, i in enumerate(ids)]
    rows += [[""] * 5] * 3
    s = prepared(tmp_path, ["id ", " text ", "label", "", ""], rows, ";")
    items = parts(s)
    assert set(items) == set(ids) and items["A"]["text"] == "word A"


def test_texts_in_sixteen_bits(tmp_path):
    for k in range(N):
        (tmp_path / f"{k}.txt").write_text(f"hällo wörld {k}", "utf-16")
    rows = [[k, f"{k}.txt", "xy"[k % 2]] for k in range(N)]
    items = parts(prepared(tmp_path, ["id", "text_file", "label"], rows))
    assert items["7"]["text"] == "hällo wörld 7"


@pytest.mark.parametrize(
    "labels, says",
    [
        (["1", "1.0", "2"], "'1' and '1.0' differ only"),
        (["yes", "Yes ", "no"], "differ only in capitals, spaces"),
        ([f"2024-01-{d + 1:02d}" for d in range(24)], "more than a few samples"),
    ],
)
def test_labels_that_are_refused_with_the_reason(tmp_path, labels, says):
    rows = [[k, f"word {k}", labels[k % len(labels)]] for k in range(2 * N)]
    with pytest.raises(InputError, match=says):
        prepared(tmp_path, ["id", "text", "label"], rows)


# in memory ----------------------------------------------------------------------------

TEXTS, Y = ["hello there", "good bye"] * 16, ["u", "v"] * 16


def test_nullable_columns_and_gaps_of_any_kind():
    frame = pd.DataFrame(
        {
            "price": pd.array([1, 2, None, 4] * 8, dtype="Int64"),
            "text": pd.array(["a b", None, "c", "d"] * 8, dtype="string"),
        }
    )
    p = fit(frame, pd.array(Y, dtype="string"), **QUICK)
    assert set(p.modalities) == {"price", "text"} and p.classes == ["u", "v"]
    nothing = frame.assign(text=pd.array(["a", None, None, "d"] * 8, dtype="string"))
    with pytest.raises(InputError, match="row 2 has no modality"):
        fit(nothing, Y, **QUICK)


def test_labels_that_are_categories_or_true_and_false():
    unused = pd.Series(pd.Categorical(Y, categories=["u", "v", "w"]))
    assert fit({"text": TEXTS}, unused, **QUICK).classes == ["u", "v"]
    assert fit({"text": TEXTS}, [True, False] * 16, **QUICK).classes == [
        "False",
        "True",
    ]


def test_arrays_of_objects_and_nested_lists():
    x = np.empty(32, object)
    x[:] = [np.ones(4) * k if k % 5 else None for k in range(32)]
    p = fit({"v": x, "text": TEXTS}, Y, **QUICK)
    assert p.modalities["v"].kind == "vector"
    d = hub.Dataset.from_dict(
        {
            "sensor": [
                [[float(k + i), 1.0] for i in range(20 + k % 3)] for k in range(32)
            ],
            "text": TEXTS,
        }
    )
    p = fit({"sensor": d["sensor"], "text": d["text"]}, Y, **QUICK)
    assert p.modalities["sensor"].kind == "series"


@pytest.mark.parametrize(
    "columns, says",
    [
        ({("a", "x"): TEXTS}, "rename it to a word"),
        ({"when": list(pd.date_range("2024-01-01", periods=32))}, "Timestamp"),
    ],
)
def test_columns_that_are_refused(columns, says):
    with pytest.raises(InputError, match=says):
        fit(columns, Y, **QUICK)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_sound_that_begins_after_the_picture_stays_beside_its_pictures(
    tmp_path, suffix
):
    "A second of picture, then a tone: first silence, and spans on the clip's clock"
    path = tmp_path / f"late.{suffix}"
    with av.open(str(path), "w") as c:
        show, track = c.add_stream("mpeg4", rate=10), c.add_stream("aac", rate=16000)
        show.width, show.height, show.pix_fmt = 48, 32, "yuv420p"
        for k in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 5 * k, "u1"))
            frame.pts, frame.time_base = k, Fraction(1, 10)
            c.mux(show.encode(frame))
        for k in range(0, 32000, 1000):
            wave = (0.5 * np.sin(np.arange(k, k + 1000) * 0.2)).astype("f4")[None]
            sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 16000, k + 16000
            sound.time_base = Fraction(1, 16000)
            c.mux(track.encode(sound))
        c.mux(show.encode())
        c.mux(track.encode())

    def first_tone(span=None):
        wave, rate = load_wave(path, None, span)
        loud = (wave.abs() > 0.05).nonzero()
        return round(len(wave) / rate, 1), loud[0].item() / rate if len(loud) else None

    length, begins = first_tone()
    assert abs(length - 3) < 0.1 and abs(begins - 1) < 0.03
    length, begins = first_tone((0.5, 1.5))
    assert length == 1 and abs(begins - 0.5) < 0.03
    length, begins = first_tone((1.5, 2.5))
    assert length == 1 and begins < 0.03
    assert first_tone((0.0, 0.5)) == (0.5, None)  # silence, and no error


@pytest.mark.parametrize(
    "labels, says",
    [
        (["Yes", "yes", "no", "no"], "differ only in capitals"),
        (["1", "1.0", "2", "2"], "differ only in capitals, spaces, Unicode form or n"),
        (["red;wool", "red", "wool", "red"], "red;wool"),
    ],
)
def test_labels_in_memory_are_checked_as_those_of_a_table(labels, says):
    with pytest.raises(InputError, match=says):
        fit({"text": TEXTS}, labels * 8, **QUICK)
    with pytest.raises(InputError, match=says):
        MultimodalClassifier(epochs=1).fit(pd.DataFrame({"text": TEXTS}), labels * 8)
