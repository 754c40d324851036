"""Faster arithmetic on a GPU, beside the step of the released code.

Called by gpu.py; alone: python benchmarks/gpu_speed.py [--tiny]

For two ResNet-18 at CREMA-D shapes and for two base transformers (ViT-B/16 shapes), one
row per way to step:

- `released`: the same encoders and head, stepped as the released code does it: both
  encoders forward for every modality's step, fp32, gradients zeroed instead of dropped,
  the loss read with `.item()` after every step;
- `fp32`, `bf16`, `bf16+channels_last`, `bf16+channels_last+compiled` (and the fused
  optimizer): `Learner.one_batch` as `run` takes it.

Samples per second, peak memory, speed over `released` (at least 3 is wanted), and the
share of device time in the encoders' kernels by torch.profiler (at least 0.9). `--tiny`
leaves compiling out.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from mla_nb.core import Batch
from mla_nb.encoders.audio import resnet18_trunk
from mla_nb.encoders.base import Encoder, ModuleEncoder
from mla_nb.encoders.image import OverFrames
from mla_nb.heads import make_net
from mla_nb.methods.mla import mla
from mla_nb.runs.run import Run, make_opt
from mla_nb.tools import set_seed
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import Loaders, Shuffle
from mla_nb.train.runtime import Runtime
from mla_nb.train.watching import StopOnNaN

CLASSES = 6
WAYS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16+channels_last": {"precision": "bf16", "channels_last": True},
    "bf16+channels_last+compiled": {
        "precision": "bf16",
        "channels_last": True,
        "compiled": True,
        "tf32": True,
        "fused": True,
    },
}


class Transformer(Encoder):
    "A transformer on patches of 16 × 16: the mean of its last layer; base by default"

    def __init__(self, channels, width=768, layers=12, heads=12):
        super().__init__(width)
        self.patches = nn.Conv2d(channels, width, 16, 16)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x):
        return self.body(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


def setting(name, tiny):
    "Encoders, shapes, batch size"
    small = {"width": 32, "layers": 2, "heads": 2} if tiny else {}
    if name == "resnet18":
        shapes = (
            {"audio": (1, 64, 48), "video": (2, 3, 32, 32)}
            if tiny
            else {"audio": (1, 257, 188), "video": (3, 3, 224, 224)}
        )
        return (
            lambda: {
                "audio": ModuleEncoder(resnet18_trunk(1), 512),
                "video": OverFrames(resnet18_trunk(3), 512),
            },
            shapes,
            4 if tiny else 64,
        )
    shapes = (
        {"audio": (1, 32, 48), "video": (3, 32, 32)}
        if tiny
        else {"audio": (1, 128, 1024), "video": (3, 224, 224)}
    )
    return (
        lambda: {"audio": Transformer(1, **small), "video": Transformer(3, **small)},
        shapes,
        4 if tiny else 64,
    )


def data(shapes, B):
    here = torch.ones(B, dtype=torch.bool)
    return Batch(
        {m: torch.randn(B, *s) for m, s in shapes.items()},
        torch.arange(B) % CLASSES,
        dict.fromkeys(shapes, here),
        torch.arange(B),
    )


def ours(make, b, device, **how):
    "A closure that takes one batch's turns, and the net"
    set_seed(0)
    cfg, method = Run(lr=1e-4, **how), mla()
    how = cfg.precision, cfg.channels_last, cfg.compiled, cfg.tf32
    learn = Learner(
        make_net(method.head, make(), CLASSES),
        Loaders([b] * 20, [], [], Shuffle(len(b))),
        method,
        make_opt(cfg),
        [StopOnNaN(), Recorder()],
        runtime=Runtime(device, *how),
    )
    learn.runtime.prepare(learn)
    learn.net.train()
    for c in learn.callbacks:
        c.before_fit(learn)
    learn.batch, learn.step = next(iter(learn.dls.train)), 0

    def step():
        learn.one_batch()
        learn.step += 1
        learn.callbacks[-1].loss.clear()

    return step, learn.net


def released(make, b, device):
    "The released step: both are encoded for every modality, and every loss is read"
    set_seed(0)
    net = make_net(mla().head, make(), CLASSES).to(device).train()
    b, opt = (
        b.to(device),
        torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4),
    )

    def step():
        total = 0.0
        for m in b.x:
            z = net.features(b)
            loss = F.cross_entropy(net.head.out(z[m]), b.y)
            opt.zero_grad(set_to_none=False)
            loss.backward()
            opt.step()
            total += loss.item()
        return total

    return step, net


def per_second(step, B, device, rounds):
    for _ in range(3):
        step()
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(rounds):
        t = time.perf_counter()
        step()
        sync()
        took.append(time.perf_counter() - t)
    return B / statistics.median(
        took
    ), torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None


def device_time(f, device):
    "Microseconds that one call spends in kernels (on a CPU: in operators)"
    from torch.profiler import ProfilerActivity, profile

    with profile(
        activities=[ProfilerActivity.CPU]
        + [ProfilerActivity.CUDA] * (device.type == "cuda")
    ) as prof:
        f()
    return sum(
        e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total
        for e in prof.key_averages()
    )


def encoder_share(step, net, b, device):
    "Kernels of the encoders alone, forward and backward, over those of the whole step"

    def encoders():
        for m in b.x:
            for z in net.features(b.only([m])).values():
                z.backward(torch.full_like(z, 1e-4))
        for p in net.parameters():
            p.grad = None

    encoders()
    alone = device_time(encoders, device)
    return alone / device_time(step, device)


def measure(name, device, rounds, tiny=False):
    make, shapes, B = setting(name, tiny)
    b, out = data(shapes, B), {}
    for way in (
        "released",
        *(w for w in WAYS if not (tiny and "compiled" in w)),
    ):  # compiling takes minutes on a CPU
        if device.type == "cuda":
            torch.cuda.empty_cache()
        step, net = (
            released(make, b, device)
            if way == "released"
            else ours(make, b, "cpu" if device.type == "cpu" else "auto", **WAYS[way])
        )
        rate, memory = per_second(step, B, device, rounds)
        out[way] = {
            "samples_per_second": round(rate, 1),
            "peak_MiB": memory and round(memory),
            "over_released": round(rate / out["released"]["samples_per_second"], 2)
            if out
            else 1.0,
        }
        share = (
            None
            if way == "released" or "compiled" in way
            else encoder_share(step, net, b.to(device), device)
        )
        if share is not None:
            out[way]["encoder_share"] = round(share, 3)
        torch.set_float32_matmul_precision("highest")
    return {
        "batch_size": B,
        "shapes": {m: list(s) for m, s in shapes.items()},
        "ways": out,
    }


def table(found):
    lines = [
        "| encoders | step | samples/s | peak MiB | over released | in encoders |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in found.items():
        for way, v in r["ways"].items():
            lines.append(
                f"| {name} | {way} | {v['samples_per_second']} | "
                f"{v['peak_MiB'] or '–'} | {v['over_released']} | "
                f"{v.get('encoder_share', '–')} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="auto", choices=["auto", "cpu"])
    p.add_argument(
        "--tiny",
        action="store_true",
        help="shapes that a CPU can do, to see that it works",
    )
    p.add_argument("--rounds", type=int, default=20)
    a = p.parse_args()
    device = torch.device(
        "cuda" if torch.cuda.is_available() and a.device == "auto" else "cpu"
    )
    found = {
        name: measure(name, device, a.rounds, a.tiny)
        for name in ("resnet18", "transformer")
    }
    print(table(found))
    print(json.dumps(found))
