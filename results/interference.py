"""How far does a turn move what the shared head says about the other modalities?

python results/interference.py [--plan DIR] [--seeds 3]

Trains MLA without projection, with a projected gradient and with a projected update on
synthetic(family=lazy), each at the rate that the study chose for it, with momentum and
without. In every turn it measures how far the step of the head's weight moves the mean
logits of that turn's modality (`own`) and of the others (`others`), on mean features
of 200 validation samples, taken anew in every epoch. One row per arm, seed and epoch
goes to interference.csv in the plan's folder. A minute or two.
"""

import argparse
import csv
from pathlib import Path

import torch

from mla_nb.compare import best_rate
from mla_nb.core import InputError, collate, discover
from mla_nb.runs.run import build, make_dataset
from mla_nb.study import Study
from mla_nb.train.learner import Callback

ARMS = [
    "mla(projection=False)",
    "mla",
    "mla(on=update)",
    "mla(projection=False) momentum=0",
    "mla momentum=0",
]


class Interference(Callback):
    "Per epoch: how far the head's steps move mean logits, own and of others"

    def __init__(self, samples):
        self.samples, self.epochs = samples, []

    def before_epoch(self, learn):
        "Mean features of every modality, as the encoders are now"
        was = learn.net.training
        learn.net.eval()
        encode = {m: e.preprocessor for m, e in learn.net.encoders.items()}
        with torch.no_grad():
            z = learn.net.features(collate(self.samples, encode))
        self.means = {m: v.mean(0) for m, v in z.items()}
        self.moved = {"own": [], "others": []}
        learn.net.train(was)

    def after_backward(self, learn, turn):
        "The weight before the step"
        self.before = turn.net.head.out.weight.detach().clone()

    def after_step(self, learn, turn):
        "How far the step moves the mean logits of each modality"
        step = turn.net.head.out.weight.detach() - self.before
        for m, r in self.means.items():
            key = "own" if m in turn.modalities else "others"
            self.moved[key].append((step @ r).norm())

    def after_epoch(self, learn):
        "Means over the steps of the epoch"
        row = {k: torch.stack(v).mean().item() for k, v in self.moved.items()}
        self.epochs.append(row | {"valid": learn.row["valid"]["accuracy"]["fused"]})


def watched(study, arm, seed) -> list:
    "Rows of one training"
    rate = best_rate(study.tried("lazy", arm))
    more = {"threads": 1, "workers": 0, "progress": False}
    cfg = study.config("lazy", arm, seed, rate, more=more)
    s = make_dataset(cfg)
    learn = build(cfg, s)
    watch = Interference([s.valid[i] for i in range(200)])
    watch.order = 30  # after the recorder has filled the epoch's row
    learn.callbacks = [*(c for c in learn.callbacks if keeps(c)), watch]
    learn.fit(cfg.epochs)
    return [
        {"arm": arm, "seed": seed, "lr": rate, "epoch": k + 1, **row}
        for k, row in enumerate(watch.epochs)
    ]


def keeps(callback) -> bool:
    "Does a callback belong to training, and not to a run's folder?"
    return type(callback).__name__ not in ("Saver", "Stopper", "TensorBoard")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).parent / "study"
    p.add_argument("--plan", default=str(here), help="folder of study.toml and rows")
    p.add_argument("--seeds", type=int, default=3)
    a = p.parse_args()
    torch.set_num_threads(1)
    discover()
    study = Study(a.plan)
    for arm in ARMS:
        if not study.tried("lazy", arm):
            raise InputError(
                f"{arm} has no tuned rate on lazy yet: run study.py first."
            )
    rows = [r for arm in ARMS for k in range(a.seeds) for r in watched(study, arm, k)]
    with (study.folder / "interference.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n")
        out.writeheader()
        out.writerows(
            {k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()}
            for r in rows
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        raise SystemExit(f"interference: {e}") from None
