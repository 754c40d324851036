"""What a run adds to its steps.

    python benchmarks/epoch.py [--clips 64] [--batch 16] [--epochs 3]
                               [--workers 0] [--threads 0] [--cpu]

A whole epoch of MLA through `run()`, over the sum of its bare steps: reading and
decoding a prepared dataset with the shapes of CREMA-D (257 × 188 spectrograms, 3 frames
of 224²), steps, guard, recorder, metrics, TensorBoard and checkpoints, with two
ResNet-18. Validation is left out on both sides: it is forward passes, and nothing that
a step has. After every epoch the same number of bare steps (forward, backward, SGD, no
data) is timed in the same process; printed is the median of the ratios: at most 1.10.
Two checkpoints of 270 MB per epoch are most of what is left in an epoch as short as
this one, so their share is printed too: an epoch of CREMA-D has 377 batches of 16.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from parts import AUDIO, CLASSES, FRAMES, clips
from step import CLOCK, DEVICE, batch, normalized_text, seconds

from mla_nb.core import datasets, discover
from mla_nb.data.prepared import load_prepared
from mla_nb.encoders.audio import resnet18_trunk
from mla_nb.encoders.base import ModuleEncoder
from mla_nb.encoders.image import OverFrames
from mla_nb.runs.run import Run, run
from mla_nb.train.checkpoints import Saver
from mla_nb.train.learner import Learner
from mla_nb.train.loaders import loaders


def measure(n=64, B=16, epochs=3, size=224, workers=0, encoder="resnet18", root=None):
    "Seconds of run, of its bare steps, of its checkpoint; every epoch but the first"
    discover()
    rows, spent = [], {"validation": 0.0, "checkpoint": 0.0}
    epoch = Learner.one_epoch
    torch.manual_seed(0)
    b = batch({"audio": (1, *AUDIO), "video": (FRAMES, 3, size, size)}, B, CLASSES)
    plain = normalized_text(
        {
            "audio": ModuleEncoder(resnet18_trunk(1), 512),
            "video": OverFrames(resnet18_trunk(3), 512),
        },
        b,
        CLASSES,
    )

    def counted(f, name):
        def timed(*args, **kw):
            t = CLOCK[0]()
            try:
                return f(*args, **kw)
            finally:
                spent[name] += CLOCK[0]() - t

        return timed

    def timed_epoch(learn):
        spent.update(validation=0.0, checkpoint=0.0)
        t = CLOCK[0]()
        epoch(learn)
        whole = CLOCK[0]() - t - spent["validation"]
        rows.append(
            (
                whole,
                sum(seconds(plain) for _ in range(len(learn.dls.train))),
                spent["checkpoint"],
            )
        )

    with tempfile.TemporaryDirectory() as d:
        folder = Path(d) / "clips"
        clips(folder, n, size)
        datasets(lambda data="data": load_prepared(folder), "clips")
        try:
            with (
                patch.object(Learner, "one_epoch", timed_epoch),
                patch.object(
                    Learner, "predictions", counted(Learner.predictions, "validation")
                ),
                patch.object(
                    Saver, "after_epoch", counted(Saver.after_epoch, "checkpoint")
                ),
                patch("mla_nb.runs.run.loaders", partial(loaders, ready=0)),
            ):  # CREMA-D is too large to be kept as tensors
                run(
                    Run(
                        dataset="clips",
                        encoder=encoder,
                        epochs=epochs + 1,
                        batch_size=B,
                        lr=1e-4,
                        schedule="constant",
                        workers=workers,
                        progress=False,
                        root=str(Path(d) / "runs"),
                    )
                )
        finally:
            del datasets["clips"]
    return rows[1:]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--clips", type=int, default=64)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--size", type=int, default=224, help="pixels along a side")
    p.add_argument("--workers", type=int, default=0)
    p.add_argument(
        "--threads",
        type=int,
        default=0,
        help="CPU threads; 0: as many as PyTorch likes",
    )
    p.add_argument(
        "--cpu",
        action="store_true",
        help="CPU seconds of this process instead of time on the wall",
    )
    a = p.parse_args()
    if a.cpu:
        CLOCK[0] = time.process_time
    if a.threads:
        torch.set_num_threads(a.threads)
    rows = measure(a.clips, a.batch, a.epochs, a.size, a.workers)
    ratios = sorted(w / s for w, s, _ in rows)
    without = statistics.median((w - c) / s for w, s, c in rows)
    print(
        f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{a.workers} workers; {a.clips} clips, batch {a.batch}, {a.size}²\n"
        f"epoch through run {statistics.median(w for w, _, _ in rows):.2f} s, bare "
        f"steps {statistics.median(s for _, s, _ in rows):.2f} s, "
        f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}, "
        f"{len(rows)} epochs); without its checkpoint {without:.3f}"
    )


if __name__ == "__main__":
    main()
