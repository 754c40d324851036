"""Why does a fusion rule win or lose? Confidence of the modalities on test samples.

python results/confidence.py [--plan DIR] [--data DIR] [--seeds 3]

Makes runs of `ensemble` and `mla` on `lazy` and on digits of new speakers again, at the
rates that the study chose, and asks each modality how accurate and how confident it is
(the largest probability), in all and where it is wrong. `alone` counts the samples on
which only this modality is right (for modality `none`: no modality is); `mean`,
`probabilities` and `entropy` count how many of these are right after fusion. One row
per dataset, arm, fold, seed and modality goes to confidence.csv in the plan's folder. A
few minutes.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from mla_nb.compare import best_rate
from mla_nb.core import InputError, discover
from mla_nb.methods.base import answered_by
from mla_nb.methods.fusion import make_rule
from mla_nb.runs.run import run
from mla_nb.study import Study
from mla_nb.train.checkpoints import load_pred

RULES = "mean", "probabilities", "entropy"


def answers(study, data, arm, fold, seed, where) -> list:
    "Rows of one run: a modality each, and one of samples that none answers"
    rate = best_rate(study.tried(data, arm, fold))
    with tempfile.TemporaryDirectory() as root:
        more = {"threads": 1, "workers": 0, "progress": False, "root": root} | where
        cfg = study.config(data, arm, seed, rate, fold, more)
        run(cfg)
        p = load_pred(cfg.folder)
    said = torch.softmax(p.logits.double(), 2)
    right, sure = said.argmax(2) == p.y, said.amax(2)
    by = {r: answered_by(make_rule(r), p).fused.argmax(1) == p.y for r in RULES}
    none = ~right.any(0)
    kept = {r: int((by[r] & none).sum()) for r in RULES}
    key = {"data": data, "arm": arm, "fold": fold, "seed": seed, "n": len(p.y)}
    rows = [key | {"modality": "none", "alone": int(none.sum())} | kept]
    for k, m in enumerate(p.mods):
        alone = right[k] & (right.sum(0) == 1)
        asked = {
            "accuracy": right[k].double().mean().item(),
            "confidence": sure[k].mean().item(),
            "confidence when wrong": sure[k][~right[k]].mean().item(),
        }
        kept = {r: int((by[r] & alone).sum()) for r in RULES}
        rows.append(key | {"modality": m, **asked, "alone": int(alone.sum())} | kept)
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).parent / "study"
    p.add_argument("--plan", default=str(here), help="folder of study.toml and rows")
    p.add_argument("--data", default="data", help="folder of prepared datasets")
    p.add_argument("--seeds", type=int, default=3)
    a = p.parse_args()
    torch.set_num_threads(1)
    discover()
    study = Study(a.plan)
    todo = [
        (data, arm, fold, seed)
        for data in ("lazy", "digits")
        for arm in ("ensemble", "mla")
        for fold in study.folds(data)
        for seed in range(a.seeds)
    ]
    if missing := [t for t in todo if not study.tried(t[0], t[1], t[2])]:
        raise InputError(f"{missing[0]} has no tuned rate yet: run study.py first.")
    rows = [
        row
        for job in tqdm(todo, "runs")
        for row in answers(study, *job, {"data": a.data})
    ]
    with (study.folder / "confidence.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, rows[1], lineterminator="\n")
        out.writeheader()
        out.writerows(
            {k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()}
            for r in rows
        )


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        raise SystemExit(f"confidence: {e}") from None
