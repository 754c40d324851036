"""How fast samples come, against the way the released code reads them.

    python benchmarks/input.py [--clips 96] [--only paper|loader|features]

Paper: the pipeline of the preset `paper` for CREMA-D, per sample and core: three frames
of 480 × 360 decoded, a random part of each enlarged to 224 × 224 and mirrored, a
filter bank read, all of it put into a batch, in the worker. At most 1.6 times a bare
decode of the same JPEG files. And what the process that trains spends on a sample while
a worker prepares it: below 1 ms.

Loader: a prepared dataset through a DataLoader with one worker, against one `.npy`
spectrogram and a folder of JPEG frames (480 × 360) per clip, listed and decoded for
every sample and shrunk to 224 × 224. The same clips, the same frames in the end: at
least 2.5 times as fast. The parts of both are timed too, so that it can be said what
bounds them.

Features: log-spectrograms per second and core, against librosa's STFT (if librosa is
installed): at least 3 times as fast.
"""

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mla_nb.core import collate, stack
from mla_nb.data.decode import encode_image
from mla_nb.data.media import RATE, media_modalities, media_options
from mla_nb.data.prepared import load_prepared, prepare
from mla_nb.encoders.audio import audio_preprocessor
from mla_nb.encoders.image import Pixels
from mla_nb.signals import excerpt, log_spectrogram
from mla_nb.train.loaders import loaders

SIZE, FRAMES = 224, 3


def picture(rng):
    "480 × 360 of something as smooth as a photograph"
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype="u1"))
    return np.asarray(small.resize((480, 360), Image.BICUBIC))


class AsReleased(Dataset):
    "A .npy and a folder of frames per clip"

    def __init__(self, folder, n):
        self.folder, self.n = folder, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        spec = np.load(self.folder / f"{i}.npy")
        names = sorted(os.listdir(self.folder / f"{i}"))
        frames = [self.frame(self.folder / f"{i}" / names[k]) for k in range(FRAMES)]
        return torch.from_numpy(spec), torch.stack(frames)

    def frame(self, path):
        import torchvision.transforms as T

        if not hasattr(self, "t"):
            self.t = T.Compose(
                [
                    T.Resize((SIZE, SIZE)),
                    T.ToTensor(),
                    T.Normalize([0.5] * 3, [0.25] * 3),
                ]
            )
        return self.t(Image.open(path).convert("RGB"))


def make(folder, n):
    "The same clips in both forms"
    rng, o = np.random.default_rng(0), media_options(size=SIZE, frames=FRAMES)
    mods = media_modalities(["audio", "video"], o)
    specs = [log_spectrogram(torch.randn(5 * RATE)).numpy() for _ in range(8)]
    shots = [[picture(rng) for _ in range(FRAMES)] for _ in range(8)]
    for i in range(n):
        np.save(folder / f"{i}.npy", specs[i % 8])
        (folder / f"{i}").mkdir()
        for k, f in enumerate(shots[i % 8]):
            Image.fromarray(f).save(folder / f"{i}" / f"{k:05d}.jpg", quality=90)
    small = [
        [
            encode_image(
                np.asarray(
                    Image.fromarray(f).resize((SIZE, SIZE), Image.BILINEAR)
                ).transpose(2, 0, 1),
                "JPEG",
            )
            for f in s
        ]
        for s in shots
    ]
    rows = [{"id": str(i)} for i in range(n)]

    def read(r):
        i = int(r["id"])
        return {
            "id": r["id"],
            "y": "ab"[i % 2],
            "audio": specs[i % 8],
            "video": small[i % 8],
        }

    prepare(
        folder / "prepared",
        "clips",
        ["a", "b"],
        mods,
        {"train": rows, "valid": rows[:2], "test": rows[:2]},
        read,
        {},
        o,
        progress=False,
    )
    return load_prepared(folder / "prepared").train


def rate(dl, n, finish=lambda b: None):
    it = iter(dl)
    next(it)  # the worker has started
    t, seen = time.perf_counter(), 0
    for b in it:
        seen += len(b.y) if hasattr(b, "y") else len(b[0])
        finish(b)
    return seen / (time.perf_counter() - t)


def loader(n):
    with tempfile.TemporaryDirectory() as d:
        ours, theirs = make(Path(d), n), AsReleased(Path(d), n)
        pixels = Pixels(SIZE)
        preprocessor = {
            "audio": lambda items: stack(items)[:, None],
            "video": pixels,
        }

        def batches(rows):
            return collate(rows, preprocessor)

        kw = {"batch_size": 16, "num_workers": 1, "multiprocessing_context": "fork"}
        found = [
            (
                rate(
                    DataLoader(ours, collate_fn=batches, **kw),
                    n,
                    lambda b: pixels.normalize(b.x["video"]),
                ),
                rate(DataLoader(theirs, **kw), n),
            )
            for _ in range(3)
        ]
        a, b = (float(np.median(v)) for v in zip(*found))
        print(
            f"loader, one worker: prepared {a:.0f} samples/s, as released {b:.0f} "
            f"samples/s: {a / b:.1f} times as fast"
        )
        parts(ours, theirs, preprocessor)


def parts(ours, theirs, preprocessor):
    "Milliseconds per sample of every part, in this process"

    def ms(f, n=48):
        t = time.perf_counter()
        for i in range(n):
            f(i % len(ours))
        return 1000 * (time.perf_counter() - t) / n

    items, pixels = [ours[i] for i in range(16)], Pixels(SIZE)
    packed = pixels([i["x"]["video"] for i in items])
    theirs[0]  # imports torchvision
    from mla_nb.data.decode import decode_image

    raw = ours.ds[0]["video"]
    print(
        f"  prepared: read and decode {ms(lambda i: ours[i]):.1f} ms (of it JPEG "
        f"{ms(lambda i: [decode_image(f) for f in raw]):.1f}), "
        f"collate {ms(lambda i: collate(items, preprocessor), 3) / 16:.1f}, float and "
        f"normalize {ms(lambda i: pixels.normalize(packed), 3) / 16:.1f} (in the "
        "process that trains)"
    )
    first = theirs.folder / "0" / "00000.jpg"
    print(
        f"  as released: .npy {ms(lambda i: np.load(theirs.folder / f'{i}.npy')):.1f} "
        "ms, JPEG 480 × 360 "
        f"{FRAMES * ms(lambda i: Image.open(first).convert('RGB')):.1f}, "
        f"all of it {ms(lambda i: theirs[i]):.1f}"
    )


def paper(n):
    "The input pipeline of the preset `paper`, against a bare decode"
    o = media_options(audio="fbank", size=SIZE, store=360, pick="starts")
    mods, rng = media_modalities(["audio", "video"], o), np.random.default_rng(0)
    shots = [[picture(rng).transpose(2, 0, 1) for _ in range(FRAMES)] for _ in range(8)]
    stored = [[encode_image(f, "JPEG") for f in clip] for clip in shots]
    sounds = [rng.standard_normal((1024, 128)).astype("f4") for _ in range(8)]

    def read(r):
        i = int(r["id"])
        return {**r, "y": "ab"[i % 2], "audio": sounds[i % 8], "video": stored[i % 8]}

    rows = [{"id": str(i)} for i in range(n)]
    parts = {"train": rows, "valid": rows[:2], "test": rows[:2]}
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d) / "paper"
        prepare(folder, "clips", ["a", "b"], mods, parts, read, {}, o, progress=False)
        s = load_prepared(folder)
        preprocessors = {
            "audio": audio_preprocessor(mods["audio"], s.train.column("audio")[:8]),
            "video": Pixels(SIZE),
        }
        for how in ("resized,flip,each", "resized,flip"):
            compare_with_decode(s, preprocessors, stored, how)
        trains(s, preprocessors)


def compare_with_decode(s, preprocessors, stored, how):
    "Milliseconds per sample of the whole pipeline in one process, and of its decoding"
    dl = loaders(s, preprocessors, 16, workers=0, augment=how).train
    found = []
    for _ in range(5):
        t = time.process_time()
        for _ in dl:
            pass
        whole = (time.process_time() - t) / (len(dl) * 16)
        t = time.process_time()
        for clip in stored * 4:
            for f in clip:
                np.asarray(Image.open(io.BytesIO(f)).convert("RGB"))
        bare = (time.process_time() - t) / len(stored * 4)
        found.append((1000 * whole, 1000 * bare))
    a, b = (float(np.median(v)) for v in zip(*found))
    print(
        f"paper preset, {how}, one core: {a:.1f} ms per sample, bare decode {b:.1f}: "
        f"{a / b:.2f} times"
    )


def trains(s, preprocessors):
    "CPU time that the process that trains spends on a sample, with one worker"
    dl = loaders(s, preprocessors, 16, workers=1, augment="resized,flip,each").train
    it, n = iter(dl), 0
    next(it)
    t = time.thread_time()
    for b in it:
        n += len(b)
    spent = 1000 * (time.thread_time() - t) / n
    print(f"paper preset: the process that trains spends {spent:.2f} ms per sample")


def features(n):
    waves = [torch.randn(3 * RATE).clamp(-1, 1) for _ in range(8)]

    def ours(i):
        return log_spectrogram(excerpt(waves[i % 8], 5 * RATE))

    try:
        import librosa
    except ImportError:
        return print(
            "features: librosa is not installed, so there is nothing to compare with "
            "(pip install librosa)"
        )

    def theirs(i):
        x = np.tile(waves[i % 8].numpy(), 4)[: 5 * RATE]
        x = np.clip(x, -1, 1)
        return np.log(
            np.abs(librosa.stft(x, n_fft=256, hop_length=128, pad_mode="constant"))
            + 1e-7
        )

    assert np.allclose(
        ours(0)[:, :370], theirs(0)[:, :370], atol=1e-2
    )  # before the first repetition ends

    def per_second(f):
        f(0)
        t = time.perf_counter()
        for i in range(n):
            f(i)
        return n / (time.perf_counter() - t)

    found = [(per_second(ours), per_second(theirs)) for _ in range(5)]
    a, b = (float(np.median(v)) for v in zip(*found))
    print(
        f"features, one core: {a:.0f} spectrograms/s, librosa {b:.0f}: {a / b:.1f} "
        "times as fast"
    )
    return None


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--clips", type=int, default=256)
    p.add_argument("--only", choices=["paper", "loader", "features"])
    a = p.parse_args()
    torch.set_num_threads(1)
    for name, measure in {
        "paper": paper,
        "loader": loader,
        "features": features,
    }.items():
        if a.only in (None, name):
            measure(a.clips)
