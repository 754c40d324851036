"""How fast samples come, against the way the released code reads them.

    python benchmarks/input.py [--clips 96] [--only loader|features]

Loader: a prepared dataset through a DataLoader with one worker, against one `.npy`
spectrogram and a folder of JPEG frames (480 × 360) per clip, listed and decoded for
every sample and shrunk to 224 × 224. The same clips, the same frames in the end: at
least 2.5 times as fast. The parts of both are timed too, so that it can be said what
bounds them.

Features: log-spectrograms per second and core, against librosa's STFT (if librosa is
installed): at least 3 times as fast.
"""

import argparse
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
from mla_nb.encoders.image import Pixels
from mla_nb.signals import excerpt, log_spectrogram

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
    p.add_argument("--only", choices=["loader", "features"])
    a = p.parse_args()
    torch.set_num_threads(1)
    if a.only != "features":
        loader(a.clips)
    if a.only != "loader":
        features(a.clips)
