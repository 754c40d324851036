"""How long does an answer take on a CPU?

    python benchmarks/predict.py [--tries 30] [--encoders small,resnet18] [--threads 1]

One sample with a recording and a photograph as files, 5 s at 16 kHz and 640 x 480, at
the full size of the datasets (spectrogram, 224 x 224): median and 90th percentile per
stage (read the files; prepare and encode; heads and fusion), and of the whole call;
then the throughput of a batch of items that were read. The nets are not trained: that
changes no time.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from mla_nb.core import collate, discover, encoders
from mla_nb.data.decode import encode_image
from mla_nb.data.media import media_modalities, media_options
from mla_nb.heads import make_net
from mla_nb.methods.base import predict
from mla_nb.methods.mla import mla
from mla_nb.predict import Classifier


def predictor(family):
    "An untrained net as a run on a table of sounds and photographs would leave it"
    o = media_options()
    mods = media_modalities(["audio", "image"], o)
    shapes = {"audio": mods["audio"].info["shape"], "image": [3, o["size"], o["size"]]}
    items = {
        "audio": [torch.randn(*shapes["audio"]) for _ in range(4)],
        "image": [
            torch.randint(256, shapes["image"], dtype=torch.uint8) for _ in range(4)
        ],
    }
    encs = {
        m: encoders[f"{family}_{mod.kind}"](mod, items[m]) for m, mod in mods.items()
    }
    method = mla()
    about = {
        "run": {"dataset": "own", "method": "mla", "epochs": 1, "seed": 0},
        "classes": [f"class {k}" for k in range(6)],
        "modalities": {m: vars(v) for m, v in mods.items()},
        "encoders": {
            m: {"name": f"{family}_{v.kind}", "options": {}} for m, v in mods.items()
        },
        "dataset": o,
        "items": shapes,
    }
    return Classifier(make_net(method.head, encs, 6), method, about, {})


def files(folder):
    rng = np.random.default_rng(0)
    sf.write(folder / "a.wav", 0.1 * rng.standard_normal(80_000), 16000)
    y, x = np.mgrid[:480, :640]
    picture = np.stack([(x + y) % 256, x % 256, (2 * y) % 256]).astype("u1")
    (folder / "a.jpg").write_bytes(encode_image(picture, "JPEG"))
    return {"audio": str(folder / "a.wav"), "image": str(folder / "a.jpg")}


@torch.inference_mode()
def stages(p, sources):
    "Seconds per stage of one answer"
    t = [time.perf_counter()]
    item = p.read(sources, "a")
    t.append(time.perf_counter())
    preprocessors = {m: e.preprocessor for m, e in p.net.encoders.items()}
    b = collate([{"x": item, "y": 0, "idx": 0}], preprocessors)
    z = p.net.features(b)
    t.append(time.perf_counter())
    features, p.net.features = p.net.features, lambda b: z
    try:
        predict(p.net, p.method, b)
    finally:
        p.net.features = features
    t.append(time.perf_counter())
    return dict(zip(("read", "encode", "fuse"), np.diff(t)))


def timed(do, tries):
    do(), do()  # what happens once only: imports, caches
    found = [do() for _ in range(tries)]
    return {k: [1000 * f[k] for f in found] for k in found[0]}


def whole(p, sources):
    t = time.perf_counter()
    p.predict(**sources)
    return {"all": time.perf_counter() - t}


def throughput(p, sources, n, tries):
    items = [p.read(sources, "a")] * n

    def one():
        t = time.perf_counter()
        p.predict_items(items)
        return {"s": time.perf_counter() - t}

    return n / (statistics.median(timed(one, tries)["s"]) / 1000)


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--tries", type=int, default=30)
    a.add_argument("--encoders", default="small,resnet18")
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--batch", type=int, default=16)
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    discover()
    print(f"one sample, {a.threads} thread{'s' * (a.threads > 1)}, ms: median (p90)\n")
    print(
        "| encoder | read | encode | fuse | the whole call | samples per second, "
        f"{a.batch} at once |\n"
        "|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        sources = files(Path(folder))
        for family in a.encoders.split(","):
            p = predictor(family)
            found = {
                **timed(partial(stages, p, sources), a.tries),
                **timed(partial(whole, p, sources), a.tries),
            }
            cells = [
                f"{statistics.median(v):.1f} ({np.quantile(v, 0.9):.1f})"
                for v in found.values()
            ]
            print(
                f"| {family} | {' | '.join(cells)} | "
                f"{throughput(p, sources, a.batch, max(3, a.tries // 6)):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
