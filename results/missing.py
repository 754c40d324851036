"""The runs behind chapter 21: python results/missing.py [jobs]

Two questions on synthetic(family=lazy): what do trained nets lose when test samples
lose modalities (the same nets, nothing is trained again), and what if training samples
lose them too (trained again at every rate; at one rate with other learning rates as
well, since the tuned ones were chosen on whole samples). Makes every run that is not
there yet below runs/missing, then writes results/missing.csv: one row per run and rate,
with the command that makes it.
"""

import csv
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from torch.utils.data import DataLoader

from mla_nb.compare import grid, plan
from mla_nb.core import TensorSplit
from mla_nb.methods.base import predictions, scores
from mla_nb.missing import with_missing
from mla_nb.runs.run import load_run, make_dataset

HERE, ROOT = Path(__file__).parent, "runs/missing"
DATA = "synthetic(family=lazy,n_train=800)"
# method -> learning rate, chosen on validation among 0.03, 0.1 and 0.3 on whole samples
METHODS = {
    "concat": 0.1,
    "sum": 0.03,
    "film": 0.1,
    "gated": 0.3,
    "ogm": 0.1,
    "ogm_ge": 0.1,
    "qmf": 0.1,
    "ensemble": 0.03,
    "mla_fixed": 0.03,
    "mla": 0.1,
}
ZEROS = "concat", "mla"
RATES = [0.2, 0.4, 0.6, 0.8]
SEEDS = range(3)
TRIED, AT = (
    ("concat", "qmf", "ensemble", "mla"),
    0.6,
)  # is a learning rate that was tuned on whole samples the right one for these?
LRS = [0.01, 0.03, 0.1]
EPOCHS = 12


@cache
def whole(seed):
    return make_dataset(plan(DATA, "mla", [seed])[0])


def less(cfg):
    return with_missing(
        whole(cfg.seed), cfg.missing, cfg.missing_test, cfg.seed, cfg.missing_fill
    )


def row(cfg, setting, rate, accuracy):
    "`cfg` is the run that comes to the same result by itself"
    s = less(cfg)
    flags = {
        k: getattr(cfg, k) for k in ("missing", "missing_test") if getattr(cfg, k)
    } | ({"missing_fill": cfg.missing_fill} if cfg.missing_fill != "skip" else {})
    command = (
        "mla train --dataset synthetic --dataset_args 'family=lazy,n_train=800' "
        f"--method {cfg.method} --lr {cfg.lr} --epochs {EPOCHS} --seed {cfg.seed}"
    )
    hidden = s.info.get("missing", {}).get("test", {"": 0.0})
    return dict(
        setting=setting,
        fill=cfg.missing_fill,
        method=cfg.method,
        lr=cfg.lr,
        seed=cfg.seed,
        rate=rate,
        hidden=round(sum(hidden.values()) / len(hidden), 4),
        **{k: round(v, 4) for k, v in accuracy.items()},
        bayes=round(s.bayes[tuple(s.modalities)], 4),
        command=command + "".join(f" --{k} {v}" for k, v in flags.items()),
    )


def as_is(b):
    return b


def at_test(cfg):
    "A trained net under test masks, skipped and (for some) filled with zeros"
    net, method, _ = load_run(cfg.folder)
    preprocessors, rows = {m: e.preprocessor for m, e in net.encoders.items()}, []
    for fill in ("skip", "zeros") if cfg.method in ZEROS else ("skip",):
        for rate in RATES:
            seen = cfg.replace(missing_test=rate, missing_fill=fill)
            p = predictions(
                net,
                method,
                DataLoader(
                    TensorSplit(less(seen).test, preprocessors),
                    batch_size=256,
                    collate_fn=as_is,
                ),
            )
            rows.append(row(seen, "test", rate, scores(p)["accuracy"]))
    return rows


def main(jobs=2):
    how = {"jobs": int(jobs)}
    runs = [
        r
        for m in METHODS
        for r in plan(DATA, m, SEEDS, root=ROOT, epochs=EPOCHS, lr=METHODS[m])
    ]
    both = [
        replace(r, missing=x, missing_test=x, missing_fill=f)
        for x in RATES
        for r in runs
        for f in (("skip", "zeros") if r.method in ZEROS else ("skip",))
    ]
    other = [
        replace(r, missing=AT, missing_test=AT, lr=lr)
        for r in runs
        if r.method in TRIED
        for lr in LRS
        if lr != r.lr
    ]
    todo = runs + both + other
    found = grid(todo, label="missing", **how)
    bad = [r for r in found if "error" in r]
    done = [(c, r) for c, r in zip(todo, found) if "error" not in r]
    rows = [
        row(
            c,
            "both, other lr" if c in other else "both" if c.missing else "none",
            float(c.missing or 0),
            r["test"]["accuracy"],
        )
        for c, r in done
    ]
    rows += [x for c, r in done if not c.missing for x in at_test(c)]
    rows.sort(
        key=lambda r: (
            ["none", "test", "both", "both, other lr"].index(r["setting"]),
            r["fill"],
            list(METHODS).index(r["method"]),
            r["rate"],
            r["lr"],
            r["seed"],
        )
    )
    with (HERE / "missing.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)
    if bad:
        print(f"{len(bad)} runs failed: {bad}")


if __name__ == "__main__":
    main(*sys.argv[1:])
