"""What each method costs, and how much of it is the passes it needs.

    python benchmarks/methods.py [--rounds 5] [--only mla,pmr] [--small]
                                 [--batch 16] [--size 128] [--frames 1]

Two ResNet-18 (sound and pictures; `--size 224 --frames 3` are the shapes of CREMA-D),
everything that `run` has in its step (NaN guard, recorder). Two ratios are printed:

over concat   the method's training step over that of joint training
over passes   the same step over its bare passes: every forward and backward pass of an
              encoder that the step takes, and its optimizer steps, with nothing between
              them. At most 1.15.

The passes are counted by hooks in one step, and taken again with the same inputs. The
three closures take turns in a random order, so that a drifting machine favors none;
printed are medians. What a method does between epochs (teachers, k-means, a pass over
the training set) is not in its step; the chapters name it.

`--small` times the embedded dataset's shapes and encoders instead, where the loop
around the passes weighs more.
"""

import argparse
import random
import sys
from collections import Counter
from functools import partial
from statistics import median

import torch
from step import DEVICE, batch, seconds
from torch.nn.modules import module as hooks

from mla_nb.core import collate, discover, encoders, methods
from mla_nb.data.synthetic import synthetic
from mla_nb.encoders.audio import resnet18_trunk
from mla_nb.encoders.base import Encoder, ModuleEncoder
from mla_nb.encoders.image import OverFrames
from mla_nb.heads import make_net
from mla_nb.tools import set_seed
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import Loaders, Shuffle
from mla_nb.train.watching import StopOnNaN

OPTIONS = {"umt": {"epochs": 1}, "g2d": {"epochs": 1}}  # teachers: not timed here
EPOCH, EPOCHS = 6, 20  # what starts late has started, what ends early goes on


class Pass:
    "A forward pass of an encoder, and the backward passes through it"

    def __init__(self, net, x):
        self.net, self.x, self.training = net, x, net.training
        self.grad = torch.is_grad_enabled()
        self.backward, self.first, self.up = 0, True, None

    def add(self, grad):
        self.backward += 1

    def again(self):
        self.net.train(self.training)
        with torch.set_grad_enabled(self.grad):
            out = self.net(self.x)
        if self.up is None:
            self.up = torch.randn_like(out)
        for k in range(self.backward):
            out.backward(self.up, retain_graph=k + 1 < self.backward)


def counted(step, opt) -> list:
    "The passes and optimizer steps of one step, in order"
    found, open_ = [], []

    def enter(net, args):
        if isinstance(net, Encoder):
            if not open_:
                found.append(Pass(net, args[0]))
            open_.append(net)

    def leave(net, args, out):
        if open_ and found[-1].first and next(net.parameters(False), None) is not None:
            found[-1].first = False  # a backward pass arrives here last
            if out.requires_grad:
                out.register_hook(found[-1].add)
        if open_ and net is open_[-1]:
            open_.pop()

    handles = [
        hooks.register_module_forward_pre_hook(enter),
        hooks.register_module_forward_hook(leave),
        opt.register_step_post_hook(lambda *_: found.append(opt)),
    ]
    step()
    for h in handles:
        h.remove()
    return found


def again(parts, opt):
    "The same passes and steps, and nothing else"
    for p in parts:
        if p is opt:
            opt.step()
            opt.zero_grad()
        else:
            p.again()
    opt.zero_grad()


def resnets():
    return {
        "audio": ModuleEncoder(resnet18_trunk(1), 512),
        "video": OverFrames(resnet18_trunk(3), 512),
    }


def stepper(name, make, classes, b):
    "A learner within training, a closure that takes one step, and its bare passes"
    set_seed(0)
    method = methods[name](**OPTIONS.get(name, {}))
    encs = make()
    encs = {m: encs[m] for m in method.modalities or encs}
    net = make_net(method.head, encs, classes).to(DEVICE)
    dls = Loaders([b] * 2, [b], [b], Shuffle(len(b)))
    slow = partial(torch.optim.SGD, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    learn = Learner(net, dls, method, slow, [StopOnNaN(), Recorder()])
    learn.batch, learn.step, learn.epochs, learn.row = b, 0, EPOCHS, {}
    learn.call("before_fit")
    learn.epoch = EPOCH
    learn.net.train()
    learn.call("before_epoch")

    def step():
        learn.one_batch()
        learn.step += 1

    step()
    parts = counted(step, learn.opt)
    return step, partial(again, parts, learn.opt), parts


def small_ones():
    "Encoders, classes and a batch of the embedded dataset"
    s = synthetic(n_train=64, n_valid=6, n_test=6)

    def make():
        return {
            m: encoders[f"small_{mod.kind}"](mod, s.train.column(m))
            for m, mod in s.modalities.items()
        }

    plain = {m: e.preprocessor for m, e in make().items()}
    return make, len(s.classes), collate([s.train[i] for i in range(64)], plain)


def count(parts) -> str:
    "Forward (without gradient in brackets) and backward passes, and optimizer steps"
    n = Counter()
    for p in parts:
        if isinstance(p, Pass):
            n["forward" if p.grad else "bare"] += 1
            n["backward"] += p.backward
        else:
            n["steps"] += 1
    bare = f" (+{n['bare']})" if n["bare"] else ""
    return f"{n['forward']}{bare} | {n['backward']} | {n['steps']}"


def timed(name, joint, made, rounds):
    "Milliseconds of a step, and a row of the table"
    step, bare, parts = made
    took = {f: [] for f in (step, bare, joint)}
    for f in took:
        f()
    for _ in range(rounds):
        for f in random.sample(list(took), 3):
            took[f].append(seconds(f))
    over = [median(a / o for a, o in zip(took[step], took[f])) for f in (joint, bare)]
    print(name, *(f"{x:.2f}" for x in over), file=sys.stderr, flush=True)
    ratios = " | ".join(f"{x:.2f}" for x in over)
    return 1000 * median(took[step]), f"| {name} | {count(parts)} | {{}} | {ratios} |"


def main(rounds, only, small, rows, size, frames):
    discover()
    if small:
        make, classes, b = small_ones()
        b = b.to(DEVICE)
    else:
        shapes = {"audio": (1, size, size), "video": (frames, 3, size, size)}
        make, classes, b = resnets, 6, batch(shapes, rows, 6)
    names = [n for n in methods if n in only or not only]
    joint = stepper("concat", make, classes, b)[0]
    rows = [timed(n, joint, stepper(n, make, classes, b), rounds) for n in names]
    where = "small shapes" if small else f"{frames} frames of {size}²"
    print(
        f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{rounds} rounds, {where}\n"
        "\n"
        "| method | forward | backward | steps | ms per step | over concat | "
        "over passes |\n"
        "|---|---|---|---|---|---|---|"
    )
    for ms, text in sorted(rows):
        print(text.format(f"{ms:.0f}"))


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--only", default="", help="methods, separated by commas")
    p.add_argument("--small", action="store_true")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--frames", type=int, default=1)
    o = p.parse_args()
    only = [n for n in o.only.split(",") if n]
    main(o.rounds, only, o.small, o.batch, o.size, o.frames)
