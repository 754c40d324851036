"""What each method costs: its training step over that of concat.

    python benchmarks/methods.py [--rounds 60]

Data, encoders and batch are the same: the embedded dataset's shapes and `small`
encoders, batch 64, everything `run` has in its step (NaN guard, recorder). The methods
take turns in a random order, so that a drifting machine favors none; printed is the
median, and the quartiles of the ratio.
"""

import argparse
import random

import torch
from step import DEVICE, seconds

from mla_nb.core import collate, discover, encoders, methods
from mla_nb.data.synthetic import synthetic
from mla_nb.heads import make_net
from mla_nb.tools import set_seed
from mla_nb.train.learner import Learner, Recorder, sgd
from mla_nb.train.loaders import Loaders, Shuffle
from mla_nb.train.watching import StopOnNaN


def stepper(name, s, batch):
    "A closure that takes one training step of a method"
    set_seed(0)
    method = methods[name]()
    mods = method.modalities or s.modalities
    encs = {
        m: encoders[f"small_{s.modalities[m].kind}"](s.modalities[m], s.train.column(m))
        for m in mods
    }
    learn = Learner(
        make_net(method.head, encs, len(s.classes)).to(DEVICE),
        Loaders([batch] * 20, [], [], Shuffle(64)),
        method,
        sgd,
        [StopOnNaN(), Recorder()],
    )
    learn.batch, learn.step, learn.epochs = batch, 0, 2
    learn.net.train()
    for c in learn.callbacks:
        c.before_fit(learn)

    def step():
        learn.one_batch()
        learn.step += 1

    return step


def main(rounds):
    discover()
    s = synthetic(n_train=64, n_valid=6, n_test=6)
    preprocessors = {
        m: encoders[f"small_{mod.kind}"](mod, s.train.column(m)).preprocessor
        for m, mod in s.modalities.items()
    }
    batch = collate([s.train[i] for i in range(64)], preprocessors).to(DEVICE)
    steps = {name: stepper(name, s, batch) for name in methods}
    took = {name: [] for name in steps}
    for f in steps.values():
        f()
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            took[name].append(seconds(steps[name]))
    print(
        f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{rounds} rounds\n"
        "\n"
        "| method | ms per step | over concat | quartiles |\n"
        "|---|---|---|---|"
    )
    for name in sorted(took, key=lambda n: sorted(took[n])[rounds // 2]):
        ratio = sorted(a / b for a, b in zip(took[name], took["concat"]))
        print(
            f"| {name} | {1000 * sorted(took[name])[rounds // 2]:.1f} | "
            f"{ratio[rounds // 2]:.2f} | {ratio[rounds // 4]:.2f} – "
            f"{ratio[-1 - rounds // 4]:.2f} |"
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=60)
    main(p.parse_args().rounds)
