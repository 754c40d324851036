"""What MLA adds to the cost of its encoders.

    python benchmarks/step.py [--pairs 5] [--small_pairs 400]
                              [--only cremad|small|memory] [--cpu]

Time: an MLA training step as `run` takes it (turns, shared head, projection, NaN guard,
recorder) over the bare cost, which is forward, backward and SGD step of the same
encoders with a linear head, one modality at a time. Both are timed in turn in this
process, and the median of the paired ratios is printed: at most 1.02 at CREMA-D shapes.
`--cpu` counts the seconds that a core worked for us, for machines that others use too.

Memory: peak of an MLA step over that of encoding both modalities before stepping, for
two equal encoders, each in a fresh process; counted is what PyTorch's allocator hands
out above what net, optimizer and batch already hold: at most 0.65.
"""

import argparse
import itertools
import json
import multiprocessing as mp
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mla_nb.core import Batch, collate, discover, encoders
from mla_nb.data.synthetic import synthetic
from mla_nb.encoders.audio import resnet18_trunk
from mla_nb.encoders.base import ModuleEncoder
from mla_nb.encoders.image import OverFrames
from mla_nb.heads import ConcatHead, make_net
from mla_nb.methods.base import Method
from mla_nb.methods.mla import mla
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import Loaders, Shuffle
from mla_nb.train.watching import StopOnNaN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = [time.perf_counter]  # or time.process_time


def batch(shapes, B, classes):
    x = {m: torch.randn(B, *s) for m, s in shapes.items()}
    here = torch.ones(B, dtype=torch.bool)
    return Batch(
        x, torch.randint(classes, (B,)), dict.fromkeys(x, here), torch.arange(B)
    ).to(DEVICE)


def learner(encs, b, classes, method):
    net = make_net(method.head, encs, classes).to(DEVICE)
    learn = Learner(
        net,
        Loaders([b] * 20, [], [], Shuffle(1)),
        method,
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4),
        [StopOnNaN(), Recorder()],
    )
    learn.net.train()
    learn.batch, learn.step = b, 0
    for c in learn.callbacks:
        c.before_fit(learn)
    return learn


def normalized_text(encs, b, classes):
    "The same work without anything of ours: a closure that takes one step per modality"
    head = torch.nn.Linear(next(iter(encs.values())).num_features, classes).to(DEVICE)
    encs = {m: e.to(DEVICE).train() for m, e in encs.items()}
    opt = torch.optim.SGD(
        [p for net in (*encs.values(), head) for p in net.parameters()],
        lr=1e-3,
        momentum=0.9,
        weight_decay=1e-4,
    )

    def step():
        for m, e in encs.items():
            F.cross_entropy(head(e(e.preprocessor.normalize(b.x[m]))), b.y).backward()
            opt.step()
            opt.zero_grad()

    return step


def seconds(f):
    t = CLOCK[0]()
    f()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return CLOCK[0]() - t


def compare(name, make, b, classes, pairs):
    torch.manual_seed(0)
    learn = learner(make(), b, classes, mla())

    def ours():
        learn.one_batch()
        learn.step += 1

    plain = normalized_text(make(), b, classes)
    for f in (ours, plain):
        f()
    rows = []
    # which one goes first changes, so that a drifting machine favors neither
    for k in range(pairs):
        first, second = (ours, plain) if k % 2 else (plain, ours)
        a, z = seconds(first), seconds(second)
        rows.append((a, z) if k % 2 else (z, a))
    ratios = sorted(o / p for o, p in rows)
    print(
        f"{name}: MLA step {1000 * statistics.median(o for o, _ in rows):.2f} ms, "
        f"bare {1000 * statistics.median(p for _, p in rows):.2f} ms, "
        f"ratio {statistics.median(ratios):.3f} (quartiles "
        f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f}, "
        f"{pairs} pairs)",
        flush=True,
    )


def cremad(pairs):
    def make():
        return {
            "audio": ModuleEncoder(resnet18_trunk(1), 512),
            "video": OverFrames(resnet18_trunk(3), 512),
        }

    b = batch({"audio": (1, 257, 188), "video": (3, 3, 224, 224)}, 16, 6)
    compare("CREMA-D shapes, ResNet-18, batch 16", make, b, 6, pairs)


def small(pairs):
    s = synthetic(n_train=64, n_valid=6, n_test=6)
    items = {m: list(s.train.column(m)) for m in s.modalities}

    def make():
        return {
            m: encoders[f"small_{mod.kind}"](mod, items[m])
            for m, mod in s.modalities.items()
        }

    b = collate(
        [s.train[i] for i in range(64)], {m: e.preprocessor for m, e in make().items()}
    ).to(DEVICE)
    compare(
        "small shapes, the embedded default with its encoders, batch 64",
        make,
        b,
        len(s.classes),
        pairs,
    )


def peak(joint, out):
    "Peak memory of one step above what was there before it, in MiB"
    torch.manual_seed(0)
    encs = {m: OverFrames(resnet18_trunk(3), 512) for m in ("left", "right")}
    learn = learner(
        encs,
        batch(dict.fromkeys(encs, (3, 224, 224)), 16, 6),
        6,
        Method(ConcatHead) if joint else mla(),
    )
    # gradients, momentum and the libraries' own buffers exist from here on
    learn.one_batch()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        learn.one_batch()
        out.put((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        with torch.profiler.profile(profile_memory=True, acc_events=True) as prof:
            learn.one_batch()
        with tempfile.TemporaryDirectory() as d:
            prof.export_chrome_trace(f"{d}/trace.json")
            events = json.loads(Path(d, "trace.json").read_text())["traceEvents"]
        moves = sorted(
            (e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"
        )
        out.put(max(itertools.accumulate(n for _, n in moves)) / 2**20)


def memory():
    ctx, found = mp.get_context("spawn"), {}
    for joint in (False, True):
        out = ctx.Queue()
        p = ctx.Process(target=peak, args=(joint, out))
        p.start()
        found[joint] = out.get(timeout=600)
        p.join()
    print(
        "peak memory of a step, two ResNet-18 at 224², batch 16: MLA "
        f"{found[False]:.0f} MiB, both encoded before stepping {found[True]:.0f} MiB, "
        f"ratio {found[False] / found[True]:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    discover()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--pairs", type=int, default=5, help="timed pairs at CREMA-D shapes")
    p.add_argument(
        "--small_pairs", type=int, default=400, help="timed pairs at small shapes"
    )
    p.add_argument("--only", choices=["cremad", "small", "memory"])
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
    print(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if a.only in (None, "small"):
        small(a.small_pairs)
    if a.only in (None, "cremad"):
        cremad(a.pairs)
    if a.only in (None, "memory"):
        memory()
