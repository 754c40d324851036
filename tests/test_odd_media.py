"""Files that are legal and unusual: what recorders, browsers and phones write.

The answers are compared with those of PyAV (FFmpeg's library), soundfile (libsndfile)
and Pillow, and with the cases in ../shared/cases.
"""

import io
import re
import shutil
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import SHARED
from PIL import Image, ImageOps

from mla_nb.core import InputError
from mla_nb.data.decode import decode_image, decode_wave, file_problem, resample
from mla_nb.data.food101 import read_titles
from mla_nb.data.media import (
    media_options,
    open_image,
    prepare_media,
    read_media,
    sound_of,
    summary,
    video_frames,
    write_video,
)
from mla_nb.data.own import kinetics_rows

torch.set_num_threads(1)
TONE = (0.3 * np.sin(np.arange(32000) * 0.2)).astype("f4")


def clip(path, times, start=0.0, codec="libx264", size=(64, 48), pictures=None, **more):
    "A video whose gray tells the second; one frame at each of these times"
    times, packets = list(times), []
    with av.open(str(path), "w") as c:
        v = c.add_stream(codec, rate=25)
        v.width, v.height, v.pix_fmt = *size, "yuv420p"
        v.time_base = v.codec_context.time_base = Fraction(1, 1000)
        v.codec_context.max_b_frames = 0
        for k, x in more.items():
            setattr(v.codec_context, k, x)
        for k, s in enumerate(times):
            gray = np.full((size[1], size[0], 3), min(250, 20 * int(s + 1e-6)), "u1")
            f = av.VideoFrame.from_ndarray(
                gray if pictures is None else pictures[k], format="rgb24"
            )
            f.pts, f.time_base = round(1000 * (s + start)), v.time_base
            packets += v.encode(f)
        c.mux(packets + v.encode())
    return path


def seconds(path, *args, **kw):
    return [
        round(f.float().mean().item() / 20) for f in video_frames(path, *args, **kw)
    ]


# --- sound


def wav(riff, data, pcm, extra=b""):
    "A wav file of 16 bits at 16 kHz whose header says what one likes"
    form = struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16)
    head = b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + form + extra
    return head + b"data" + struct.pack("<I", data) + pcm


PCM = (TONE[:800] * 32767).astype("<i2").tobytes()
N = len(PCM)
HEADERS = {
    "good": (36 + N, N, b""),
    "a pipe of FFmpeg": (2**32 - 1, 2**32 - 1, b""),
    "a pipe of SoX": (0x7FFFF024, 0x7FFFF000, b""),
    "a pipe of arecord": (0x80000024, 0x80000000, b""),
    "a browser that counts the header twice": (44 + N, N, b""),
    "a header in the size of the samples": (80 + N, 44 + N, b""),
    "an uncounted pad byte": (37 + N, N, b""),
    "sizes never filled in": (0, 0, b""),
    "the RIFF size alone is zero": (0, N, b""),
    "a long note first": (36 + N, N, b"LIST" + struct.pack("<I", 5000) + b"x" * 5000),
}


@pytest.mark.parametrize("what", HEADERS)
def test_sizes_in_a_header_are_not_believed(tmp_path, what):
    riff, data, extra = HEADERS[what]
    (tmp_path / "a.wav").write_bytes(wav(riff, data, PCM, extra))
    want = np.frombuffer(PCM, "<i2") / 32768
    assert sound_of(tmp_path / "a.wav").numpy() == pytest.approx(want, abs=1e-6)
    with av.open(str(tmp_path / "a.wav")) as c:  # FFmpeg reads as much
        assert sum(f.samples for f in c.decode(audio=0)) == 800


@pytest.mark.parametrize("riff", [0, 36 + N, 2**32 - 1])
def test_samples_that_are_missing_are_missed(tmp_path, riff):
    (tmp_path / "a.wav").write_bytes(wav(riff, N, PCM[:900]))
    with pytest.raises(InputError, match="cut short"):
        sound_of(tmp_path / "a.wav")
    (tmp_path / "b.flac").write_bytes(_coded("FLAC", "PCM_16")[:-9000])
    with pytest.raises(InputError, match="cut short|damaged|not a readable"):
        sound_of(tmp_path / "b.flac")
    assert file_problem(b"RIFF\0\0\0\0WAVE", 12) == ""


def _coded(form, subtype, x=TONE, rate=16000):
    out = io.BytesIO()
    sf.write(out, x, rate, format=form, subtype=subtype)
    return out.getvalue()


KINDS = [("WAV", s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT")]
KINDS += [("WAV", s) for s in ("DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "GSM610")]
KINDS += [("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "FLOAT"), ("AIFF", "PCM_24")]
KINDS += [("AU", "PCM_16"), ("CAF", "ALAC_24"), ("FLAC", "PCM_24"), ("OGG", "VORBIS")]
KINDS += [("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]


@pytest.mark.parametrize("form,subtype", KINDS)
def test_every_kind_of_recording_is_as_loud_as_libsndfile_says(form, subtype):
    pair = np.stack([TONE, TONE / 2], 1)
    data = _coded(form, subtype, TONE if subtype == "GSM610" else pair)
    with sf.SoundFile(io.BytesIO(data)) as f:
        want = f.read(f.frames, dtype="float32", always_2d=True).mean(1)
    wave, rate = decode_wave(data)
    assert rate == 16000 and wave.numpy() == pytest.approx(want, abs=1e-6)
    part = decode_wave(data, 8000)[0]
    assert len(part) == (len(want) + 1) // 2


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_every_link_of_a_chained_ogg_is_read(tmp_path, subtype):
    "Radio recorders write one link per song; libsndfile stops after the first"
    parts = [_coded("OGG", subtype, TONE), _coded("OGG", subtype, TONE[:16000] / 2)]
    whole = torch.cat([decode_wave(p)[0] for p in parts])
    chained = b"".join(parts)
    assert decode_wave(chained)[0].equal(whole)
    path = tmp_path / "radio.ogg"
    path.write_bytes(chained)
    assert sound_of(path, 16000, (2.25, 2.75)).equal(whole[36000:44000])
    assert sound_of(path, 16000, (1.5, 2.5)).equal(whole[24000:40000])
    half = parts[0] + parts[1][:300]
    with pytest.raises(InputError, match=r"damaged after 2\.00 s"):
        decode_wave(half)


def test_a_flac_that_does_not_say_how_long_it_is(tmp_path):
    data = bytearray(_coded("FLAC", "PCM_16"))
    data[21] &= 0xF0  # 36 bits for the number of samples
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    assert sound_of(tmp_path / "a.flac").numpy() == pytest.approx(TONE, abs=1e-4)


@pytest.mark.parametrize("top", [2.0**15, 2.0**23, 2.0**31])
def test_floating_point_in_integer_units(tmp_path, top):
    sf.write(tmp_path / "a.wav", TONE * top, 16000, subtype="FLOAT")
    assert sound_of(tmp_path / "a.wav").numpy() == pytest.approx(TONE, abs=1e-6)
    sf.write(tmp_path / "b.wav", TONE * 5, 16000, subtype="FLOAT")  # only too loud
    assert sound_of(tmp_path / "b.wav").numpy() == pytest.approx(TONE * 5, abs=1e-5)
    sf.write(tmp_path / "c.wav", TONE * 1e30, 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="its samples reach 3e"):
        sound_of(tmp_path / "c.wav")


CONTAINERS = {
    "mp4": "aac",
    "mov": "pcm_s24le",
    "m4v": "aac",
    "mkv": "pcm_f32le",
    "avi": "pcm_s16le",
    "ts": "mp2",
    "mpeg": "mp2",
    "3gp": "aac",
    "flv": "aac",
    "wmv": "pcm_s16le",
    "webm": "libopus",
    "m4a": "alac",
    "aac": "aac",
    "opus": "libopus",
    "wma": "pcm_s16le",
}


def track(path, codec, x, rate=48000, begins=0):
    "Stereo sound alone in a container"
    with av.open(str(path), "w") as c:
        s = c.add_stream(codec, rate=rate, layout="stereo")
        to = av.AudioResampler(format=s.codec_context.format, layout="stereo")
        fifo = av.AudioFifo()
        f = av.AudioFrame.from_ndarray(x, format="fltp", layout="stereo")
        f.sample_rate = rate
        for g in to.resample(f):
            g.pts = None
            fifo.write(g)
        at = begins
        for g in fifo.read_many(s.codec_context.frame_size or 1024, partial=True):
            g.pts, g.time_base = at, Fraction(1, rate)
            at += g.samples
            c.mux(s.encode(g))
        c.mux(s.encode())
    return path


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_sound_of_every_container_is_as_long_and_as_loud_as_a_wav(tmp_path, suffix):
    t = np.arange(96000) / 48000
    x = 0.4 * np.sin(2 * np.pi * 440 * t) * (1 + t)
    pair = np.stack([x, x / 3]).astype("f4")
    path = track(tmp_path / f"a.{suffix}", CONTAINERS[suffix], pair)
    sf.write(tmp_path / "a.wav", pair.T, 48000, subtype="FLOAT")
    want, got = sound_of(tmp_path / "a.wav"), sound_of(path)
    assert abs(len(got) - len(want)) < 1600
    loud = [y[3200:28800].square().mean().sqrt().item() for y in (want, got)]
    assert loud[0] == pytest.approx(loud[1], rel=0.08)  # codecs lose a little
    assert not (tmp_path / "a.xyz").exists()
    shutil.copy(path, tmp_path / "a.xyz")  # a name says nothing
    assert torch.equal(sound_of(tmp_path / "a.xyz"), got)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "mkv", "mp4", "ts"])
def test_a_span_is_that_part_of_the_whole(tmp_path, suffix):
    "And only it is decoded; the clock of a container may begin anywhere"
    t = np.arange(44100 * 6) / 44100
    x = (0.2 * np.sin(2 * np.pi * (200 * t + 40 * t**2))).astype("f4")
    path = tmp_path / f"a.{suffix}"
    if suffix in ("wav", "flac", "mp3"):
        sf.write(path, x, 44100)
    else:
        codec = {"mkv": "pcm_f32le", "mp4": "aac", "ts": "mp2"}[suffix]
        late = 44100 * 30 if suffix in ("mkv", "ts") else 0
        track(path, codec, np.stack([x, x]), 44100, late)
    whole, part = sound_of(path), sound_of(path, span=(3.21, 4.5))
    want = whole[int(3.21 * 16000) : int(4.5 * 16000)]
    assert abs(len(part) - len(want)) <= 1
    n, most = min(len(part), len(want)), 0.002 if suffix in ("wav", "flac") else 0.02
    lag = [
        (part[200 + k : n - 200 + k] - want[200 : n - 200]).abs().max()
        for k in (-1, 0, 1)
    ]
    assert min(lag) < most
    with pytest.raises(InputError, match="lies outside of the recording"):
        sound_of(path, span=(9.0, 10.0))


@pytest.mark.parametrize("rate", [7350, 11127, 16001, 22254, 44101, 192000])
def test_odd_rates_keep_the_tone(rate):
    t, want = torch.arange(rate) / rate, torch.arange(16000) / 16000
    x = resample(torch.sin(2 * torch.pi * 1000 * t), rate, 16000)
    wrong = x - torch.sin(2 * torch.pi * 1000 * want)
    assert len(x) == 16000 and wrong[300:-300].abs().max() < 2e-3
    if rate > 40000:  # what 16 kHz cannot hold is taken away
        high = resample(torch.sin(2 * torch.pi * 11000 * t), rate, 16000)
        assert high[300:-300].abs().max() < 5e-3


# --- pictures


def shape_of(size=(48, 32)):
    "A picture that differs in every direction"
    x = np.zeros((size[1], size[0], 3), "u1")
    x[: size[1] // 2, :, 0] = 220
    x[:, : size[0] // 2, 2] = 220
    x[:8, :8] = 255
    return x


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photographs_are_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, path = Image.fromarray(shape_of()), tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, **({"quality": 95} if suffix != "tif" else {}))
    with Image.open(path) as found:
        want = np.asarray(ImageOps.exif_transpose(found).convert("RGB"))
    assert want.shape[:2] == ((48, 32) if 5 <= orientation <= 8 else (32, 48))
    assert np.array_equal(open_image(path).permute(1, 2, 0), want)
    assert np.array_equal(decode_image(path.read_bytes()).permute(1, 2, 0), want)


RAMP = np.tile(np.arange(256), (8, 1))
DEPTHS = {
    "16.png": (RAMP * 257).astype("u2"),
    "16.tif": (RAMP * 257).astype("u2"),
    "16.pgm": (RAMP * 257).astype("u2"),
    "32.tif": RAMP.astype("i4"),
    "big.tif": (RAMP * 257).astype("i4"),
    "unit.tif": (RAMP / 255).astype("f4"),
    "byte.tif": RAMP.astype("f4"),
    "8.png": RAMP.astype("u1"),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_gray_of_any_depth_keeps_its_ramp(tmp_path, name):
    Image.fromarray(DEPTHS[name]).save(tmp_path / name)
    x = open_image(tmp_path / name)
    assert (x.int() - torch.from_numpy(RAMP).int()).abs().max() <= 1


@pytest.mark.parametrize("bad", [np.nan, -40.0, 1e9, np.inf])
def test_numbers_that_are_no_gray_are_refused(tmp_path, bad):
    Image.fromarray(np.array([[0, 0.5, bad]], "f4").repeat(3, 0)).save(
        tmp_path / "a.tif"
    )
    with pytest.raises(InputError, match="its values go from"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1", "CMYK"])
def test_what_is_transparent_is_white_and_the_rest_as_pillow_has_it(tmp_path, mode):
    image = Image.fromarray(shape_of()).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.new("L", image.size, 0))
    image.save(path, **({"transparency": bytes(256)} if mode == "P" else {}))
    found = open_image(path)
    if mode in ("RGBA", "LA", "P"):
        assert found.min() == 255
    else:
        assert np.array_equal(found.permute(1, 2, 0), image.convert("RGB"))


def test_half_transparent_colors_and_a_color_that_stands_for_nothing(tmp_path):
    x = np.zeros((8, 8, 4), "u1")
    x[..., 3] = 128
    Image.fromarray(x).save(tmp_path / "half.png")
    assert set(open_image(tmp_path / "half.png").flatten().tolist()) == {127}
    Image.new("RGB", (8, 8), (0, 0, 0)).save(
        tmp_path / "key.png", transparency=(0, 0, 0)
    )
    assert open_image(tmp_path / "key.png").min() == 255


def test_a_picture_of_400_million_pixels_is_one_sentence(tmp_path):
    out = io.BytesIO()
    Image.new("1", (20000, 20000)).save(out, "PNG")
    (tmp_path / "big.png").write_bytes(out.getvalue())
    for read in (
        lambda: decode_image(out.getvalue(), "big"),
        lambda: open_image(tmp_path / "big.png", 64),
    ):
        with pytest.raises(InputError, match="too large .*400000000 pixels"):
            read()


# --- video


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov", "flv", "ts"])
@pytest.mark.parametrize("start", [0.0, 60.0, 3600.5])
def test_time_begins_where_the_clip_does(tmp_path, suffix, start):
    path = clip(tmp_path / f"a.{suffix}", np.arange(0, 6, 0.04), start)
    assert seconds(path) == [0, 1, 2, 3, 4, 5]
    assert seconds(path, span=(2.5, 4.6)) == [2, 3, 4]
    with pytest.raises(InputError, match="begins after the recording ends"):
        video_frames(path, span=(8.0, 9.0))


GAPS = {
    "even": (np.arange(0, 6, 0.04), [0, 1, 2, 3, 4, 5]),
    "a gap": (np.r_[np.arange(0, 1, 0.04), np.arange(5, 8, 0.04)], [0, 5, 6, 7]),
    "nothing moves": ([0.0, *np.arange(9, 11, 0.04)], [0, 9, 10]),
    "slow": (np.arange(0, 9, 2.5), [0, 2, 5, 7]),
    "jitter": (np.arange(0, 6, 0.1) + np.tile([0, 0.03], 30), [0, 1, 2, 3, 4, 5]),
    "one": ([0.0], [0]),
}


@pytest.mark.parametrize("what", GAPS)
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_frames_are_an_interval_apart_whatever_the_rate(tmp_path, what, suffix):
    times, want = GAPS[what]
    path = clip(tmp_path / f"a.{suffix}", times)
    assert seconds(path) == want
    if suffix == "mkv":
        with av.open(str(path)) as c:  # PyAV sees these times
            found = [f.time for f in c.decode(video=0)]
        assert found == pytest.approx(list(times), abs=0.002)


def test_a_long_clip_is_thinned_and_stays_even(tmp_path):
    path = clip(tmp_path / "a.mkv", np.arange(0, 12, 0.1))
    found = [f.float().mean().item() / 20 for f in video_frames(path, 0.1, limit=4)]
    assert len(found) == 4 and found == pytest.approx([1, 4, 7, 10], abs=1.1)


def test_clips_that_were_joined_and_a_clock_that_is_set_back(tmp_path):
    a = clip(tmp_path / "a.ts", np.arange(0, 3, 0.04))
    b = clip(tmp_path / "b.ts", np.arange(5, 8, 0.04), -5.0)
    (tmp_path / "ab.ts").write_bytes(a.read_bytes() + b.read_bytes())
    assert seconds(tmp_path / "ab.ts") == [0, 1, 2, 5, 6, 7]


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_videos_are_upright(tmp_path, degrees, suffix):
    shown = shape_of((48, 32))
    stored = np.ascontiguousarray(np.rot90(shown, degrees // 90))
    path, size = tmp_path / f"a.{suffix}", (stored.shape[1], stored.shape[0])
    with av.open(str(path), "w") as c:
        v = c.add_stream("libx264", rate=10)
        v.width, v.height, v.pix_fmt = *size, "yuv420p"
        v.set_display_rotation(-degrees)
        for _ in range(10):
            c.mux(v.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        c.mux(v.encode())
    with av.open(str(path)) as c:
        assert next(c.decode(video=0)).rotation % 360 == -degrees % 360
    found = video_frames(path)[0].permute(1, 2, 0).numpy()
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown).mean() < 12


MATRICES = {  # a, b, c, d of the display matrix, and what a player does
    (1, 0, 0, 1): lambda x: x,
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (0, 1, 1, 0): lambda x: x.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("m", MATRICES)
def test_mirrored_videos_of_front_cameras(tmp_path, m):
    path, x = tmp_path / "a.mp4", shape_of((48, 32))
    write_video(path, [x] * 8, 8)
    b, (p, q, r, s) = bytearray(path.read_bytes()), (k << 16 for k in m)
    at = b.find(b"tkhd") + 44
    b[at : at + 36] = struct.pack(">9i", p, q, 0, r, s, 0, 0, 0, 1 << 30)
    path.write_bytes(b)
    want, found = MATRICES[m](x), video_frames(path)[0].permute(1, 2, 0).numpy()
    assert found.shape == want.shape
    assert np.abs(found.astype(int) - want).mean() < 12


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    wide = {"sample_aspect_ratio": Fraction(2, 1)}
    path = clip(tmp_path / "a.mkv", np.arange(0, 2, 0.1), **wide)
    assert {f.shape for f in video_frames(path)} == {(3, 48, 128)}
    assert video_frames(path, size=32)[0].shape == (3, 32, 32)
    assert video_frames(path, size=24, keep=True)[0].shape == (3, 24, 64)


def test_a_size_that_changes_on_the_way(tmp_path):
    a = clip(tmp_path / "a.ts", np.arange(0, 2, 0.04))
    b = clip(tmp_path / "b.ts", np.arange(2, 4, 0.04), size=(128, 96))
    (tmp_path / "ab.ts").write_bytes(a.read_bytes() + b.read_bytes())
    assert [f.shape for f in video_frames(tmp_path / "ab.ts")] == [(3, 96, 128)] * 4


def test_a_video_may_end_before_its_sound_but_not_before_its_own_end(tmp_path):
    frames = [np.full((48, 64, 3), 9 * k % 250, "u1") for k in range(30)]
    for suffix in ("mp4", "avi", "flv"):
        path, rate = tmp_path / f"a.{suffix}", 44100
        write_video(path, frames, 10, np.tile(TONE, 12)[: 8 * rate], rate)
        assert len(video_frames(path)) == 3
        assert len(sound_of(path)) == pytest.approx(128000, abs=2400)
    data = (tmp_path / "a.flv").read_bytes()
    at = data.find(b"duration") + 9
    wrong = data[:at] + struct.pack(">d", 30.0) + data[at + 8 :]
    (tmp_path / "b.flv").write_bytes(wrong)
    assert len(video_frames(tmp_path / "b.flv")) == 3
    (tmp_path / "c.flv").write_bytes(wrong[: len(wrong) * 2 // 3])
    with pytest.raises(InputError, match="cut short"):
        video_frames(tmp_path / "c.flv")
    clip(tmp_path / "d.mkv", np.arange(0, 6, 0.04))
    data = (tmp_path / "d.mkv").read_bytes()
    (tmp_path / "d.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cut short|not a readable|damaged"):
        video_frames(tmp_path / "d.mkv")


def test_covers_are_no_videos_and_colons_no_addresses(tmp_path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as c:
        v = c.add_stream("mjpeg", rate=1)
        v.width, v.height, v.pix_fmt = 64, 48, "yuvj420p"
        v.disposition = av.stream.Disposition.attached_pic
        a = c.add_stream("aac", rate=16000, layout="mono")
        c.mux(v.encode(av.VideoFrame.from_ndarray(shape_of((64, 48)), format="rgb24")))
        for k in range(0, 32000 - 1024, 1024):
            f = av.AudioFrame.from_ndarray(
                TONE[None, k : k + 1024], format="fltp", layout="mono"
            )
            f.sample_rate, f.pts, f.time_base = 16000, k, Fraction(1, 16000)
            c.mux(a.encode(f))
        c.mux(a.encode())
    assert len(sound_of(path)) > 30000
    with pytest.raises(InputError, match="no video stream"):
        video_frames(path)
    colon = clip(tmp_path / "12:30:05.mkv", np.arange(0, 2, 0.1))
    assert seconds(colon) == [0, 1]


# --- what is counted and named


def test_what_holds_nothing_is_named_in_the_summary(tmp_path, capsys):
    x, rows = 0.3 * np.sin(np.arange(16000) * 0.05), []
    sounds = {"zeros": 0 * x, "cancel": np.stack([x, -x], 1), "tone": x}
    black = np.zeros((32, 48, 3), "u1")
    for k in range(24):
        name = ("zeros", "cancel")[k] if k < 2 else "tone"
        row = {"id": f"c{k}", "y": "ab"[k % 2]}
        row |= {m: str(tmp_path / f"{k}.{s}") for m, s in (("audio", "wav"),)}
        row |= {"image": str(tmp_path / f"{k}.png")}
        sf.write(row["audio"], sounds[name], 16000)
        Image.fromarray(black if k == 5 else shape_of()).save(row["image"])
        rows.append(row)
    parts = {"train": rows[:12], "valid": rows[12:16], "test": rows[16:]}
    options = media_options(audio="log_mel", size=32, seconds=1.0)
    args = ("toy", ["a", "b"], parts, ["audio", "image"], options, {}, tmp_path)
    out = prepare_media(*args, workers=0)
    said = capsys.readouterr().out
    assert "2 × audio: silent, or its channels cancel (c0, c1)" in said
    assert (
        "1 × image: has one color (c5)" in said and said.strip() in summary(out) + said
    )
    listed = (out / "notes.csv").read_text().splitlines()
    assert listed[0] == "split,id,note" and len(listed) == 4
    assert not list(out.glob("*.noted"))
    prepare_media(*args)  # again: the list is one of ours
    write_video(tmp_path / "dark.mp4", [black] * 8, 8)
    row = {"id": "v", "y": "a", "video": tmp_path / "dark.mp4"}
    assert read_media(row, options)["notes"] == ["video: every frame has one color"]
    assert "notes" not in read_media(rows[3], options)


def test_endings_that_are_not_read_are_named(tmp_path, capsys):
    for c in "ab":
        (tmp_path / c).mkdir()
        for name in ("1.mp4", "2.m4v", "3.3gp", "4.txt", "5.part", ".hidden"):
            (
                tmp_path / c / f"{c}{name}" if name[0] != "." else tmp_path / c / name
            ).touch()
    assert [r["id"] for r in kinetics_rows(tmp_path)] == [
        "a1",
        "a2",
        "a3",
        "b1",
        "b2",
        "b3",
    ]
    assert "2 × .txt, 2 × .part" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_an_open_quote_costs_no_other_title(tmp_path, seed):
    rng = np.random.default_rng(seed)
    lines = [f"pho_{k}.jpg,soup {k},pho" for k in range(60)]
    odd = rng.permutation(60)[:12].tolist()
    forms = [
        '"soup {}',
        'soup {} 12" wide',
        'soup {}"',
        '"a, {}',
        '"soup\n{}"',
        '"""{}',
    ]
    for k, form in zip(odd, 2 * forms):
        lines[k] = f"pho_{k}.jpg,{form.format(k)},pho"
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    found = {r["id"]: r for r in read_titles(tmp_path / "t.csv")}
    assert len(found) == 60 and {r["y"] for r in found.values()} == {"pho"}
    assert all(
        re.findall(r"\d+", r["text"])[0] == i.removeprefix("pho_")
        for i, r in found.items()
    )


# --- the cases

CASES = SHARED / "cases"
RIGHT = {
    "frames_of_uneven_clips": [
        r"even +\[0, 1, 2, 3, 4, 5, 6, 7\]",
        r"gap +\[0, 6, 7\]",
        r"screen +\[0, 12, 12\]",
        r"starts_at_60 +\[0, 1, 2, 3, 4, 5, 6, 7\]",
    ],
    "picture_modes": [
        r"grey16.png .* \[3, 43, 83, 123, 164, 204, 244\]",
        r"float.tif .* \[3, 43, 83, 123, 164, 204, 244\]",
        r"logo.png .* mean 2[12]\d\.",
        r"big.png +InputError",
    ],
    "resample_memory": [r"22254 Hz: 16000 samples, \d\d? MiB more"],
    "rotation_ignored": [r"exif6.jpg .*\) red above", r"stored: red above"],
    "silent_recordings": [r"zeros \(129", r"channels_cancel \(129"],
    "sound_of_other_containers": [r"'b1', 'b2', 'b3'\] of 6", r"^32768$"],
    "video_shorter_than_sound": [r"short.mp4 5 frames", r"flv30.flv 8 frames"],
    "wav_riff_size": [
        rf"{k} +800 samples" for k in ("sox_pipe", "riff_zero", "pad_byte")
    ],
    "food101_open_quote": [r"^180 of 180 dishes .* longest has \d\d char"],
}


@pytest.mark.parametrize("name", RIGHT)
def test_cases_end_right(tmp_path, monkeypatch, capsys, name):
    "The inputs that others brought, run as they were written"
    if not (CASES / name).is_dir():
        pytest.skip(f"{CASES / name} is not there")
    source = (CASES / name / "case.py").read_text()
    source = source.replace(
        "mla_nb.encoders.visual import", "mla_nb.data.decode import"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["case.py"])
    exec(compile(source, f"{name}/case.py", "exec"), {"__name__": "__main__"})
    said = capsys.readouterr().out
    for right in RIGHT[name]:
        assert re.search(right, said, re.M), said
    assert "Error:" not in said


# a folder of pictures is a video ------------------------------------------------------


def shots(folder, names, size=(16, 12), **more):
    "Pictures whose gray tells their place in `names`"
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        gray = np.full((*size[::-1], 3), 10 * k, "u1")
        Image.fromarray(gray).save(folder / name, **more)
    return folder


def test_frames_in_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    names = ["frame1.png", "frame2.png", "frame10.png", "Frame11.PNG"]
    folder = shots(tmp_path / "clip", names)
    (folder / "notes.txt").write_text("made by hand")
    (folder / "._frame1.png").write_bytes(b"what a Mac leaves behind")
    found = video_frames(folder, 1.0, None, None, 8)
    assert [int(f.max()) for f in found] == [0, 10, 20, 30]
    assert found[0].shape == (3, 8, 8)
    many = shots(tmp_path / "many", [f"{k}.png" for k in range(25)])
    assert [int(f.max()) // 10 for f in video_frames(many)] == [
        1, 3, 6, 8, 11, 13, 16, 18, 21, 23
    ]  # fmt: skip
    half = video_frames(folder, crop=(0.0, 0.0, 0.5, 1.0))
    assert half[0].shape == (3, 12, 8)


def test_a_folder_that_is_no_video_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: the folder holds nothing"):
        video_frames(tmp_path / "empty")
    (tmp_path / "empty/a.txt").write_text("so")
    with pytest.raises(InputError, match="holds 1 files and no picture"):
        video_frames(tmp_path / "empty")
    clip = shots(tmp_path / "clip", ["1.png", "2.png", "3.png"])
    with pytest.raises(InputError, match="no times; leave out start and end"):
        video_frames(clip, 1.0, (0.0, 1.0))
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), "u1")
    Image.fromarray(noise).save(clip / "2.png")
    (clip / "2.png").write_bytes((clip / "2.png").read_bytes()[:300])
    with pytest.raises(InputError, match=r"clip/2\.png: not a readable image"):
        video_frames(clip)
    shots(clip, ["2.png"], (12, 16))
    with pytest.raises(InputError, match=r"clip/2\.png: has 12 × 16 .* 1\.png has 16"):
        video_frames(clip)
    (clip / "2.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"clip/2\.png: the file is empty"):
        video_frames(clip)


def test_a_frame_that_was_turned_is_as_large_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    clip = shots(tmp_path / "clip", ["1.jpg"], (16, 12))
    shots(clip, ["2.jpg"], (12, 16), exif=exif)
    assert [f.shape for f in video_frames(clip)] == 2 * [(3, 12, 16)]
    shots(clip, ["3.jpg"], (16, 12), exif=exif)
    with pytest.raises(InputError, match=r"3\.jpg: has 12 × 16 pixels"):
        video_frames(clip)
