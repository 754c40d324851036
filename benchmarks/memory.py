"""What one encoder at a time saves: peak memory of an alternating over a joint step.

    python benchmarks/memory.py [--size base] [--batch 4] [--pixels 256]
                                [--length 256] [--checkpoint]

An M3AE for words and one for pictures train both ways, each in a fresh process, on
pictures and texts of the published size. Joint: both are encoded, then one backward and
one step (concatenation). Alternating: MLA, one turn per modality, gradients dropped
after each. Counted is what PyTorch's allocator hands out, by the profiler on a CPU, by
CUDA where there is a GPU:

  step    the peak above what is there between steps: activations, and gradients,
          which come and go; at most 0.65
  graph   what both forward passes leave for the backward pass, alone: the larger
          encoder over the two together
  total   everything: the above with parameters, momentum and batch, which are
          there either way

The published batch is 64; the default fits a machine with 8 GB and takes a minute or
two. With short texts (--length 64) the picture encoder holds four fifths of all
activations, and no order of turns can go below its share: try it with a large batch.
"""

import argparse
import itertools
import json
import multiprocessing as mp
import tempfile
from pathlib import Path

import torch

from mla_nb.core import Batch
from mla_nb.encoders.masked import M3AE, SIZES, of_size
from mla_nb.heads import ConcatHead, make_net
from mla_nb.methods.base import Method
from mla_nb.methods.mla import mla
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import Loaders, Shuffle, nbytes
from mla_nb.train.watching import StopOnNaN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, CLASSES = 30522, 101


def learner(a, joint):
    torch.manual_seed(0)
    kind = dict(**of_size(a.size), vocab=VOCAB, checkpoint=a.checkpoint)
    encs = {m: M3AE(reads=(m,), **kind) for m in ("text", "image")}
    x = {
        "text": {
            "ids": torch.randint(1, VOCAB, (a.batch, a.length)),
            "mask": torch.ones(a.batch, a.length, dtype=torch.bool),
        },
        "image": torch.randn(a.batch, 3, a.pixels, a.pixels),
    }
    here = torch.ones(a.batch, dtype=torch.bool)
    b = Batch(
        x,
        torch.randint(CLASSES, (a.batch,)),
        dict.fromkeys(x, here),
        torch.arange(a.batch),
    ).to(DEVICE)
    method = Method(ConcatHead) if joint else mla()
    net = make_net(method.head, encs, CLASSES).to(DEVICE).train()
    learn = Learner(
        net,
        Loaders([b] * 20, [], [], Shuffle(1)),
        method,
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4),
        [StopOnNaN(), Recorder()],
    )
    learn.batch, learn.step = b, 1
    for c in learn.callbacks:
        c.before_fit(learn)
    return learn


def above(do):
    "Peak of the allocator during `do`, in bytes above what there was before"
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        do()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, acc_events=True) as prof:
        do()
    with tempfile.TemporaryDirectory() as d:
        prof.export_chrome_trace(f"{d}/trace.json")
        events = json.loads(Path(d, "trace.json").read_text())["traceEvents"]
    moves = sorted(
        (e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"
    )
    return max(itertools.accumulate(n for _, n in moves))


def graph(learn):
    "Bytes left for the backward pass, per modality; parameters are not counted"
    own, out = {p.untyped_storage().data_ptr() for p in learn.net.parameters()}, {}
    for m in learn.net.encoders:
        kept = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            z = learn.net.features(learn.batch.only([m]))
        out[m] = sum(
            t.untyped_storage().nbytes() for p, t in kept.items() if p not in own
        )
        del z
    return out


def peak(a, joint, out):
    if a.threads:
        torch.set_num_threads(a.threads)
    learn = learner(a, joint)
    learn.one_batch()  # momentum and the libraries' own buffers exist from here on
    there = sum(
        p.nbytes
        + sum(
            v.nbytes for v in learn.opt.state[p].values() if isinstance(v, torch.Tensor)
        )
        for p in learn.net.parameters()
    ) + nbytes(learn.batch)
    out.put((above(learn.one_batch), there, graph(learn) if not joint else None))


def main(a):
    ctx, found = mp.get_context("spawn"), {}
    for joint in (False, True):
        out = ctx.Queue()
        p = ctx.Process(target=peak, args=(a, joint, out))
        p.start()
        found[joint] = out.get(timeout=1800)
        p.join()
    (alt, there, held), (both, there_too, _) = found[False], found[True]
    print(
        f"{DEVICE}, torch {torch.__version__}; M3AE {a.size}, batch {a.batch}, "
        f"pictures {a.pixels}², {a.length} "
        f"tokens{', checkpointing' if a.checkpoint else ''}; MiB:\n"
    )
    print("| | alternating | joint | ratio |\n|---|---|---|---|")
    rows = {
        "step": (alt, both),
        "graph": (max(held.values()), sum(held.values())),
        "total": (alt + there, both + there_too),
    }
    for name, (x, y) in rows.items():
        print(f"| {name} | {x / 2**20:,.0f} | {y / 2**20:,.0f} | {x / y:.3f} |")
    return rows


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=list(SIZES), default="base")
    p.add_argument("--batch", type=int, default=64 if DEVICE == "cuda" else 4)
    p.add_argument("--pixels", type=int, default=256)
    p.add_argument("--length", type=int, default=256)
    p.add_argument(
        "--checkpoint", action="store_true", help="gradient checkpointing in both"
    )
    p.add_argument(
        "--threads",
        type=int,
        default=0,
        help="CPU threads; 0: as many as PyTorch likes",
    )
    main(p.parse_args())
