"""Where the time of a training step goes.

    python benchmarks/profile.py [--batch 16] [--rounds 5] [--threads 0]
                                 [--out results/profile.md]

CREMA-D shapes and ResNet-18 encoders, as the paper has them: a table of data (read,
decode and collate a batch; bytes to floats), each encoder's forward and backward, the
head, the projection, the optimizer and the logging, in milliseconds and as a share of
the whole. Every part is timed on its own, by the median of a few rounds; what is not
the encoders' arithmetic should be small.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from step import DEVICE, seconds

from mla_nb.core import Batch, collate, stack
from mla_nb.data.decode import encode_image
from mla_nb.data.media import media_modalities, media_options
from mla_nb.data.prepared import load_prepared, prepare
from mla_nb.encoders.audio import resnet18_trunk
from mla_nb.encoders.base import ModuleEncoder
from mla_nb.encoders.image import OverFrames, Pixels
from mla_nb.heads import make_net
from mla_nb.methods.mla import mla
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import Loaders, Shuffle
from mla_nb.train.watching import StopOnNaN

AUDIO, FRAMES, CLASSES = (257, 188), 3, 6


def clips(folder, n, size=224, frames=FRAMES):
    "A prepared dataset with the shapes of CREMA-D; smooth pictures suit JPEG as usual"
    from PIL import Image

    rng, o = np.random.default_rng(0), media_options(size=size, frames=frames)
    mods, classes = (
        media_modalities(["audio", "video"], o),
        [f"c{k}" for k in range(CLASSES)],
    )
    mods["audio"].info["shape"] = list(AUDIO)

    def draw():
        return np.asarray(
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype="u1")).resize(
                (size, size), Image.BICUBIC
            )
        ).transpose(2, 0, 1)

    shots = [[encode_image(draw(), "JPEG") for _ in range(frames)] for _ in range(8)]
    sounds = [rng.standard_normal(AUDIO) for _ in range(8)]

    def read(r):
        i = int(r["id"])
        return {
            "id": r["id"],
            "y": classes[i % CLASSES],
            "audio": sounds[i % 8],
            "video": shots[i % 8],
        }

    rows = [{"id": str(i)} for i in range(n)]
    few = rows[: 2 * CLASSES]
    prepare(
        folder,
        "clips",
        classes,
        mods,
        {"train": rows, "valid": few, "test": few},
        read,
        {},
        o,
        progress=False,
        shard=64,
    )
    return load_prepared(folder)


def parts(B, size=224):
    "Name -> (closure to time, what is to be done before it); ResNet-18 for both"
    torch.manual_seed(0)
    encs = {
        "audio": ModuleEncoder(resnet18_trunk(1), 512),
        "video": OverFrames(resnet18_trunk(3), 512),
    }
    net, method = make_net(mla().head, encs, CLASSES).to(DEVICE), mla()
    x = {
        "audio": torch.randn(B, 1, *AUDIO),
        "video": torch.randn(B, FRAMES, 3, size, size),
    }
    b = Batch(
        x,
        torch.arange(B) % CLASSES,
        {m: torch.ones(B, dtype=torch.bool) for m in x},
        torch.arange(B),
    ).to(DEVICE)
    learn = Learner(
        net,
        Loaders([b] * 20, [], [], Shuffle(1)),
        method,
        lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, weight_decay=1e-4),
        [StopOnNaN(), Recorder()],
    )
    learn.net.train()
    learn.batch, learn.step = b, 1
    for c in learn.callbacks:
        c.before_fit(learn)
    state, jobs = {}, {}
    edit = method.grad_transforms[0]
    guard, record = learn.callbacks[0], learn.callbacks[-1]

    def forward(m):
        state[m] = learn.net.encoders[m](b.x[m])

    def backward(m):
        state[m].backward(torch.full_like(state[m], 1e-3))

    def head():
        z = torch.randn(B, 512, device=DEVICE, requires_grad=True)
        state["turn"] = turn = learn.make_turn(b.only(["video"]))
        turn.features = {"video": z}
        loss = method.loss(turn)
        loss.backward()
        turn.losses = {"loss": loss.detach()}

    def optimizer():
        learn.opt.step()
        learn.opt.zero_grad()

    def logging():
        guard.after_backward(learn, state["turn"])
        record.after_backward(learn, state["turn"])
        record.after_step(learn, state["turn"])

    for m in encs:
        jobs[f"{m}: encoder forward"] = partial_(forward, m)
        jobs[f"{m}: encoder backward"] = partial_(backward, m)
    jobs |= {
        "head, loss and their backward, twice": lambda: (head(), head()),
        "projection, twice": lambda: (
            edit.after_backward(learn, state["turn"]),
            edit.after_backward(learn, state["turn"]),
        ),
        "NaN guard and recorder, twice": lambda: (logging(), logging()),
        "optimizer": optimizer,
    }
    return jobs, sum(p.numel() for p in net.parameters())


def partial_(f, *a):
    return lambda: f(*a)


def data_parts(s, B, size=224):
    pixels, rows = Pixels(size), list(range(B))
    preprocessor = {"audio": lambda items: stack(items)[:, None], "video": pixels}
    items = s.train.__getitems__(rows)
    packed = collate(items, preprocessor)
    return {
        "data: read and decode": lambda: s.train.__getitems__(rows),
        "data: collate": lambda: collate(items, preprocessor),
        "data: bytes to floats": lambda: pixels.normalize(packed.x["video"].to(DEVICE)),
    }


def table(took, B):
    total = sum(took.values())
    encoders = sum(v for k, v in took.items() if "encoder" in k)
    lines = ["| part | ms | % of all |", "|---|---|---|"] + [
        f"| {k} | {1000 * v:.2f} | {100 * v / total:.2f} |" for k, v in took.items()
    ]
    rest = sum(
        v for k, v in took.items() if "encoder" not in k and not k.startswith("data")
    )
    return (
        "\n".join([*lines, f"| **all** | {1000 * total:.1f} | 100 |"]),
        encoders,
        rest,
    )


def measure(B=16, rounds=3, size=224):
    with tempfile.TemporaryDirectory() as d:
        s = clips(Path(d) / "clips", max(2 * B, 4 * CLASSES), size)
        jobs, _ = parts(B, size)
        jobs = {**data_parts(s, B, size), **jobs}
        took = {k: [] for k in jobs}
        for r in range(rounds + 1):
            for k, f in jobs.items():
                t = seconds(f)
                if r:
                    took[k].append(t)  # the first round warms up
    return {k: statistics.median(v) for k, v in took.items()}


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--size", type=int, default=224, help="pixels along a side")
    p.add_argument(
        "--threads",
        type=int,
        default=0,
        help="CPU threads; 0: as many as PyTorch likes",
    )
    p.add_argument("--out", help="write the table to this file too")
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    text, encoders, rest = table(measure(a.batch, a.rounds, a.size), a.batch)
    text = (
        f"ResNet-18 twice, audio 257 × 188, {FRAMES} frames of {a.size}², batch "
        f"{a.batch}; {DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} "
        "threads\n"
        "\n"
        f"{text}\n"
        "\n"
        "Head, projection, guard, recorder and optimizer together: "
        f"{100 * rest / encoders:.2f}% of the encoders."
    )
    print(text)
    if a.out:
        Path(a.out).write_text(text + "\n")
