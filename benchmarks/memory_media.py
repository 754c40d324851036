"""How much memory preparing needs: it must follow what is kept, not the input's length.

    python benchmarks/memory_media.py [--minutes 10] [--rate 11127]

Written with PyAV and soundfile, and read by `read_media` as a worker of `mla prepare`
does, each in a fresh process:

  clip        a 720p clip of so many minutes with sound, frames and features of it
  recording   as many minutes of sound at a rate that has no small fraction with 16 kHz
  span        five seconds from the middle of that recording
  photograph  a JPEG of 48 million pixels

`import` is the resident memory of a worker that has imported what it needs (PyTorch's
libraries, most of them shared between workers), `peak` the highest while it reads.
`more`, the difference, is what preparing holds: it must stay under 400 MiB, or the exit
code is 1. Linux only (`ru_maxrss`, /proc).
"""

import argparse
import multiprocessing as mp
import resource
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

LIMIT = 400  # MiB


def write_clip(path, minutes):
    "A 720p clip with a picture that moves and a tone"
    import av

    with av.open(str(path), "w") as c:
        v = c.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        v.width, v.height, v.pix_fmt = 1280, 720, "yuv420p"
        a = c.add_stream("aac", rate=48000, layout="mono")
        ramp = np.tile(np.arange(1280, dtype="u2"), (720, 1))
        tone = (0.2 * np.sin(np.arange(48000) * 0.05)).astype("f4")[None]
        for k in range(int(minutes * 60)):
            gray = ((ramp + 8 * k) % 256).astype("u1")
            frame = av.VideoFrame.from_ndarray(gray, format="gray").reformat(
                format="yuv420p"
            )
            for i in range(25):
                frame.pts = 25 * k + i
                frame.time_base = Fraction(1, 25)
                c.mux(v.encode(frame))
            for i in range(0, 48000, 1000):
                f = av.AudioFrame.from_ndarray(
                    tone[:, i : i + 1000], format="fltp", layout="mono"
                )
                f.sample_rate, f.pts = 48000, 48000 * k + i
                c.mux(a.encode(f))
        c.mux(v.encode())
        c.mux(a.encode())


def write_recording(path, minutes, rate):
    import soundfile as sf

    with sf.SoundFile(path, "w", rate, 2) as f:
        for k in range(int(minutes * 60)):
            t = np.arange(k * rate, (k + 1) * rate)
            f.write(0.2 * np.stack([np.sin(t * 0.05), np.sin(t * 0.07)], 1))


def write_photograph(path):
    from PIL import Image

    Image.effect_noise((8000, 6000), 60).convert("RGB").save(path, quality=80)


def resident():
    "MiB that this process holds now, and the most it ever held"
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return now / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(row, options, out):
    import av  # noqa: F401
    import soundfile  # noqa: F401
    import torch
    from PIL import Image  # noqa: F401

    from mla_nb.data.media import audio_features, media_options, read_media

    torch.set_num_threads(1)
    o = media_options(**options)
    audio_features(torch.zeros(16000), o)  # the first call loads libraries
    before = resident()[0]
    began = time.perf_counter()
    read_media({"id": "x", "y": "a", **row}, o)
    out.put((before, resident()[1], time.perf_counter() - began))


def main(a):
    ctx, worst = mp.get_context("spawn"), 0
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        write_clip(d / "clip.mp4", a.minutes)
        write_recording(d / "long.wav", a.minutes, a.rate)
        write_photograph(d / "photo.jpg")
        clip, sound = str(d / "clip.mp4"), str(d / "long.wav")
        middle = (a.minutes * 30.0, a.minutes * 30.0 + 5)
        rows = {
            "clip": {"audio": clip, "video": clip},
            "recording": {"audio": sound},
            "span": {"audio": sound, "audio_span": middle},
            "photograph": {"image": str(d / "photo.jpg")},
        }
        print(
            f"{a.minutes:g} minutes, sound at {a.rate} Hz, features {a.audio}; MiB:\n"
        )
        print("| | import | peak | more | seconds |\n|---|---|---|---|---|")
        for name, row in rows.items():
            out = ctx.Queue()
            p = ctx.Process(target=read, args=(row, {"audio": a.audio}, out))
            p.start()
            before, peak, seconds = out.get(timeout=1800)
            p.join()
            worst = max(worst, peak - before)
            print(
                f"| {name} | {before:.0f} | {peak:.0f} | {peak - before:.0f} "
                f"| {seconds:.1f} |",
                flush=True,
            )
    verdict = "under" if worst < LIMIT else "NOT under"
    print(f"\n{verdict} {LIMIT} MiB per worker beyond its imports")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--rate", type=int, default=11127)
    p.add_argument("--audio", default="spectrogram")
    sys.exit(main(p.parse_args()))
