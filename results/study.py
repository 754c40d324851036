"""The runs behind every results table: python results/study.py FSDD.zip [jobs]

Tunes every method's learning rate on validation, makes every run that is not there yet
below runs/study, and writes results/sweep.csv (one row per rate tried),
results/runs.csv (one row per run, with the command that makes it) and
results/curves.csv (validation accuracy after every epoch of four methods).
"""

import csv
import sys
from itertools import permutations
from pathlib import Path

import torch

from mla_nb.compare import grid, plan, tune
from mla_nb.data.digits import prepare_digits, read_archive
from mla_nb.evaluation import TemperatureScaled
from mla_nb.methods.base import fuse
from mla_nb.methods.fusion import make_rule, released_gate
from mla_nb.runs.run import read_history
from mla_nb.train.checkpoints import load_pred

HERE, ROOT = Path(__file__).parent, "runs/study"
DATA = {
    "lazy": "synthetic(family=lazy)",
    "balanced": "synthetic(family=balanced)",
    "digits, new voices": "digits(split=speaker,image_noise=.5)",
    "digits, known voices": "digits(split=official,image_noise=.5)",
}
METHODS = (
    "concat,sum,film,gated,ogm,ogm_ge,qmf,unimodal,ensemble,"
    "mla_fixed,mla,mla_released,mla_frozen"
)
VARIANTS = [
    "mla(projection=False)",
    "mla(norm=True)",
    "mla(when=update_first)",
    "mla(rescale=True)",
    *(f"mla(projection=False,head_step={x})" for x in (0.03, 0.1, 0.3)),
]
CURVES = "concat", "qmf", "ensemble", "mla"
LRS = [0.03, 0.1, 0.3]
SEEDS = range(5)


def orders(mods):
    "Every order of turns but the dataset's own, and a new one for every batch"
    return [
        f"mla(order={','.join(o)})" for o in permutations(mods) if list(o) != mods
    ] + ["mla(order=random)"]


def refused(pred, temperatures):
    "Accuracy of the same trained net under other fusion rules"
    out = {
        name: fuse(pred.logits, make_rule(name)(pred.logits, pred.present))
        for name in ("mean", "entropy", "energy")
    }
    scaled = TemperatureScaled("entropy", tuple(temperatures[m] for m in pred.mods))
    out["scaled entropy"] = fuse(pred.logits, scaled(pred.logits, pred.present))
    for size in (64, 1):
        parts = zip(pred.logits.split(size, 1), pred.present.split(size, 1))
        out[f"gate of {size}"] = torch.cat(
            [fuse(z, released_gate(z, p)) for z, p in parts]
        )
    return {
        k: round((v.argmax(1) == pred.y).double().mean().item(), 4)
        for k, v in out.items()
    }


def row(data, cfg, r):
    args = ",".join(f"{k}={v}" for k, v in cfg.method_args.items())
    options = ",".join(f"{k}={v}" for k, v in cfg.dataset_args.items())
    command = (
        (
            f"mla train --dataset {cfg.dataset} --dataset_args '{options}' --method "
            f"{cfg.method}"
        )
        + (f" --method_args '{args}'" if args else "")
        + f" --lr {cfg.lr} --seed {cfg.seed}"
    )
    history, pred = read_history(cfg.folder), load_pred(cfg.folder)
    return dict(
        data=data,
        method=cfg.method,
        args=args,
        lr=cfg.lr,
        seed=cfg.seed,
        **{k: round(v, 4) for k, v in r["test"]["accuracy"].items()},
        **(refused(pred, r["temperatures"]) if len(pred.mods) > 1 else {}),
        best_epoch=r["best_epoch"],
        epoch_seconds=round(r["seconds"] / len(history), 3),
        epoch_memory=round(max(h["memory"] or 0 for h in history)),
        command=command,
    )


def curve(data, cfg):
    return [
        {
            "data": data,
            "method": cfg.method,
            "seed": cfg.seed,
            "epoch": h["epoch"] + 1,
            "valid": round(h["valid"]["accuracy"]["fused"], 4),
        }
        for h in read_history(cfg.folder)
    ]


def write(name, rows):
    columns = list(dict.fromkeys(k for r in rows for k in r if k != "command")) + [
        "command"
    ] * ("command" in rows[0])
    with (HERE / name).open("w", newline="") as f:
        out = csv.DictWriter(f, columns)
        out.writeheader()
        out.writerows(rows)


def main(archive, jobs=2):
    recordings = read_archive(archive)
    for split in ("official", "speaker"):
        prepare_digits(recordings, split=split, image_noise=0.5)
    how, rows, sweep, curves = {"jobs": int(jobs)}, [], [], []
    for data, name in DATA.items():
        runs, tried = tune(
            plan(name, METHODS, SEEDS, root=ROOT), LRS, label=f"sweep {data}", **how
        )
        sweep += [
            {
                "data": data,
                "method": t["method"],
                "args": ",".join(f"{k}={v}" for k, v in t["method_args"].items()),
                "lr": t["lr"],
                "valid": round(t["valid"], 4),
                "chosen": int(t["chosen"]),
            }
            for t in tried
        ]
        lr = next(c.lr for c in runs if c.method == "mla")
        mods = (
            ["audio", "visual", "text"] if "synthetic" in name else ["audio", "image"]
        )
        runs += plan(name, VARIANTS + orders(mods), SEEDS, root=ROOT, lr=lr)
        found = grid(runs, label=data, **how)
        bad = [r for r in found if "error" in r]
        rows += [row(data, c, r) for c, r in zip(runs, found) if "error" not in r]
        curves += [
            c
            for cfg, r in zip(runs, found)
            if cfg.method in CURVES and not cfg.method_args and "error" not in r
            for c in curve(data, cfg)
        ]
        for name, what in {"sweep": sweep, "runs": rows, "curves": curves}.items():
            write(f"{name}.csv", what)
        if bad:
            print(f"{data}: {len(bad)} runs failed: {bad}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
