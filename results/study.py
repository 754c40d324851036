"""The runs behind part V of the book: python results/study.py [options]

Reads results/study/study.toml, makes every run that has no row yet, and appends its row
to sweep.csv (one per rate tried) or runs.csv (one per tested run), and the
single answers to answers.csv. It can be stopped at any time: the same command
goes on, also on another machine, because the rows are what it looks at.

--only lazy,digits    these datasets of study.toml (default: all that are prepared)
--arms mla,concat     these arms (default: all that a comparison needs)
--all                 every registered method, too: the leaderboard
--jobs 2              processes
--data, --runs        folders of prepared datasets, and of unfinished runs
--status              say how much is there, and do nothing
--fresh               first drop the rows that other versions of the code made
--verify 20           make so many tested rows again, and compare every number

Code that is changed after the runs may still make the same numbers (a fix of what no
run uses). --verify says so, and [protocol] versions in study.toml lists such versions.

results/sources.py prepares the datasets; one that is not prepared is left out.
"""

import argparse
import csv
import io
import random
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from mla_nb.compare import best_rate, rate_beyond, reopen
from mla_nb.core import InputError, datasets, discover, methods
from mla_nb.evaluation import TemperatureScaled, linear_probe
from mla_nb.methods.base import answered_by, predict, scores
from mla_nb.methods.fusion import FixedWeights, make_rule
from mla_nb.runs.run import run
from mla_nb.study import Study, code_version, hex_of
from mla_nb.tools import write_atomic
from mla_nb.train.learner import Diverged

HERE = Path(__file__).parent
RULES = {
    "mean": lambda: make_rule("mean"),
    "probabilities": lambda: make_rule("probabilities"),
    "scaled": lambda: TemperatureScaled("mean", sums=True),
    "entropy": lambda: make_rule("entropy"),
    "scaled entropy": lambda: TemperatureScaled("entropy", sums=True),
    "energy": lambda: make_rule("energy"),
    "fixed": FixedWeights,
    "best": lambda: make_rule("best"),
}
PROBED = "concat", "ensemble", "mla"  # arms whose encoders are probed
VERSION = code_version()
MACHINE = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def forget(cfg):
    "The row is the record; the folder goes"
    shutil.rmtree(cfg.folder, ignore_errors=True)


def swept(key, cfg, told) -> dict:
    "The row of a tuning run: its accuracy on validation; 0 where training broke down"
    row = {**key, "valid": 0.0, "seconds": "", "note": ""}
    try:
        r = run(cfg)
        row["valid"] = round(r["valid"]["accuracy"]["fused"], 5)
        row["seconds"] = round(r["seconds"], 1)
    except Diverged as e:
        row["note"] = str(e).split(";")[0]
    forget(cfg)
    return {"sweep.csv": [row]}


def held(b):
    "The features that a batch holds already"
    return b.x


def share_right(p) -> float:
    "The share of samples that predictions answer correctly"
    return float((p.fused.argmax(1) == p.y).float().mean())


def on_validation(make, valid) -> float:
    "Accuracy under a rule; one that learns learns from one half and answers the other"
    rule = make()
    if not hasattr(rule, "fit"):
        return share_right(answered_by(rule, valid))
    taught, asked = (valid.select_rows(valid.idx % 2 == k) for k in (0, 1))
    return share_right(answered_by(rule.fit(taught), asked))


def under_rules(learn) -> tuple:
    "(test predictions, rule -> fused test logits, rule -> accuracy on validation)"
    sides = [learn.encode_split(getattr(learn.dls, k)) for k in ("valid", "test")]
    valid, test = (predict(learn.net, learn.method, b, held) for b in sides)
    fused, chosen = {"own": test.fused}, {}
    for name, make in RULES.items() if len(test.mods) > 1 else ():
        rule = make()
        rule = rule.fit(valid) if hasattr(rule, "fit") else rule
        fused[name] = answered_by(rule, test).fused
        chosen[f"valid {name}"] = on_validation(make, valid)
    return test, fused, chosen


def tested(key, cfg, told, shared=False) -> dict:
    "The rows of a tested run: accuracies, also under other rules, and single answers"
    r = run(cfg)
    learn, _ = reopen(cfg.folder, cfg.data, "cpu")
    test, fused, chosen = under_rules(learn)
    order = test.idx.argsort()
    every = {m: v for m, v in test.uni.items() if test.present.all()}
    told_by = fused | (every if len(every) > 1 else {})
    right = {k: (v.argmax(1) == test.y)[order].numpy() for k, v in told_by.items()}
    single = {m: v for m, v in scores(test)["accuracy"].items() if m != "fused"}
    shares = {
        "valid": r["valid"]["accuracy"]["fused"],
        "train": scores(learn.predictions(learn.dls.train))["accuracy"]["fused"],
        **{k: float(right[k].mean()) for k in fused},
        **single,
        **chosen,
        **{k: r["metrics"]["fused"][k] for k in ("f1", "balanced")},
    }
    if key["arm"] in PROBED:
        probes = linear_probe(learn.net, learn.dls)
        shares |= {f"probe {m}": v for m, v in probes.items()}
    row = {**key, "n_test": len(test.y), **{k: round(v, 5) for k, v in shares.items()}}
    row |= {"best_epoch": r["best_epoch"], "seconds": round(r["seconds"], 1)}
    forget(cfg)
    rows = {"runs.csv": [row | {"command": told}]}
    if shared:
        short = {k: key[k] for k in ("data", "fold", "arm", "seed", "version")}
        rows["answers.csv"] = [
            {**short, "what": k, "right": hex_of(v)} for k, v in right.items()
        ]
    return rows


def start_worker():
    "One thread; synthetic data are made once per seed, for all arms and rates"
    torch.set_num_threads(1)
    discover()
    spec = datasets["synthetic"]
    datasets["synthetic"] = replace(spec, make=lru_cache(16)(spec.make))


def attempt(job) -> tuple:
    "(key, rows or None, what went wrong) of one job, in a worker"
    kind, key, cfg, told = job
    try:
        return key, kind(key, cfg, told), ""
    except Exception as e:  # told by the caller, and tried again by the next call
        return key, None, f"{type(e).__name__}: {e}"


class Rows:
    "Files of rows that grow; for a new column, a file is written again"

    def __init__(self, study):
        self.study = study

    def add(self, name: str, rows: list):
        "Append rows; once this returns, they are on disk"
        path, old = self.study.folder / name, []
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        columns = next(csv.reader([text.partition("\n")[0]]), []) if text else []
        wanted = list(dict.fromkeys([*columns, *(k for r in rows for k in r)]))
        if wanted == columns and text.endswith("\n"):
            with path.open("a", newline="", encoding="utf-8") as f:
                f.write(as_text(rows, wanted))
            return
        old = self.study.rows(name)  # without a row that a kill has torn
        self.write(name, [*old, *rows], wanted)

    def write(self, name: str, rows: list, columns: list):
        "A whole file, or the old one if this is ended"
        head = ",".join(columns) + "\n"
        write_atomic(self.study.folder / name, head + as_text(rows, columns))


def as_text(rows, columns) -> str:
    "Rows as lines of a CSV file, without a header"
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def new_pool(workers):
    "Processes that are ready to train"
    how = {"mp_context": get_context("spawn"), "initializer": start_worker}
    return ProcessPoolExecutor(workers, **how)


def work(jobs, workers, label, rows) -> int:
    "Do the jobs, store their rows as they come; returns how many failed"
    failed = 0
    if not jobs:
        return failed
    with new_pool(workers) as pool:
        futures = [pool.submit(attempt, job) for job in jobs]
        try:
            for f in tqdm(as_completed(futures), label, len(futures), unit="run"):
                key, found, why = f.result()
                for name, new in (found or {}).items():
                    rows.add(name, new)
                if why:
                    failed += 1
                    tqdm.write(f"{key}: {why}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def make_job(study, a, kind, data, arm, fold, lr, seed) -> tuple:
    "What a worker needs for one run"
    key = {"data": data, "fold": fold, "arm": arm, "seed": seed, "lr": lr}
    where = {"data": a.data, "root": a.runs}
    quiet = {"progress": False, "threads": 1, "workers": 0}
    cfg = study.config(data, arm, seed, lr, fold, where | quiet)
    told = study.command(data, arm, seed, lr, fold)
    if kind is tested and study.about(data)["design"] == "shared":
        kind = partial(tested, shared=True)
    return kind, {**key, "version": VERSION, "machine": MACHINE}, cfg, told


def to_tune(study, a, data, arms, beyond=False) -> list:
    "Tuning runs without a row; `beyond`: one rate further out where the best is last"
    out = []
    for fold, arm in product(study.folds(data), arms):
        rates = study.rates(data)
        if beyond:
            tried = study.tried(data, arm, fold)
            further = rate_beyond(tried) if set(rates) <= set(tried) else None
            rates = [further] if further else []
        for lr, seed in product(rates, study.plan["protocol"]["tuning_seeds"]):
            if (data, arm, fold, lr, seed) not in study.swept:
                out.append(make_job(study, a, swept, data, arm, fold, lr, seed))
    return out


def to_test(study, a, data, arms) -> list:
    "Runs to be tested without a row, with the rate that validation chose"
    out = []
    for fold, arm in product(study.folds(data), arms):
        if not (tried := study.tried(data, arm, fold)):
            continue
        lr, have = best_rate(tried), study.values(data, arm)
        todo = [s for s in study.seeds(data) if (fold, s) not in have]
        out += [make_job(study, a, tested, data, arm, fold, lr, s) for s in todo]
    return out


def is_prepared(study, a, data) -> bool:
    "Can all runs of a dataset start?"
    for fold in study.folds(data):
        cfg = study.config(data, "concat", 0, 0.1, fold, {"data": a.data})
        spec = datasets[cfg.dataset]
        where = spec.folder and spec.folder(data=a.data, **cfg.dataset_args)
        if where and not (where / "dataset.json").exists():
            return False
    return True


def same_code(study) -> set:
    "Versions of the code that make the numbers of the present one"
    listed = study.plan["protocol"].get("versions", [])
    return {VERSION, *listed} if VERSION in listed else {VERSION}


def drop_old(study):
    "Keep only rows that the present code makes"
    for name in ("sweep.csv", "runs.csv", "answers.csv"):
        old = study.rows(name)
        kept = [r for r in old if r["version"] in same_code(study)]
        if len(kept) < len(old):
            print(f"{name}: {len(old) - len(kept)} rows of older code are dropped")
            Rows(study).write(name, kept, list(old[0]))


def arms_of(study, a, data) -> list:
    "The arms of a dataset: those of the comparisons; with --all, every method"
    if a.arms:
        return [arm for arm in study.arms(data) if arm in a.arms.split(";")]
    more = [m for m in methods if m != "unimodal"] if a.all else []
    return list(dict.fromkeys([*study.arms(data), *more]))


def one_dataset(study, a, data) -> int:
    "Tune and test all arms of a dataset; returns how many runs failed"
    arms, rows = arms_of(study, a, data), Rows(study)
    failed = work(to_tune(study, a, data, arms), a.jobs, f"{data}: tuning", rows)
    for _ in range(study.plan["protocol"]["widen"]):
        study.read()
        jobs = to_tune(study, a, data, arms, beyond=True)
        failed += work(jobs, a.jobs, f"{data}: further rates", rows)
    study.read()
    return failed + work(to_test(study, a, data, arms), a.jobs, f"{data}: tests", rows)


def verify(study, a):
    "Make some tested rows again; every number but the seconds must be the same"
    ready = [r for r in study.runs if is_prepared(study, a, r["data"])]
    rows = random.Random(a.verify).sample(ready, min(a.verify, len(ready)))
    jobs = []
    for r in rows:
        where = r["data"], r["arm"], r["fold"], float(r["lr"]), int(r["seed"])
        jobs.append(make_job(study, a, tested, *where))
    with new_pool(a.jobs) as pool:
        again = list(tqdm(pool.map(attempt, jobs), "again", len(jobs), unit="run"))
    other = 0
    for row, (key, made, why) in zip(rows, again):
        new = made["runs.csv"][0] if made else {}
        told = [k for k in row if row[k] and k not in ("seconds", "version", "machine")]
        bad = why or [k for k in told if str(new.get(k, "")) != row[k]]
        other += bool(bad)
        if bad:
            print(f"{key['data']} {key['fold']} {key['arm']} seed {key['seed']}: {bad}")
    made_by = ", ".join(sorted({r["version"] for r in rows}))
    print(
        f"{len(rows) - other} of {len(rows)} rows of {made_by} are those of {VERSION}"
    )
    if other:
        raise InputError(f"{other} rows came out differently.")


def status(study, a) -> str:
    "What is there, dataset by dataset"
    lines = []
    for data in study.data:
        arms = arms_of(study, a, data)
        full = len(study.seeds(data)) * len(study.folds(data))
        done = Counter(r["arm"] for r in study.runs if r["data"] == data)
        complete = sum(done[arm] >= full for arm in arms)
        ready = "" if is_prepared(study, a, data) else " (not prepared)"
        lines.append(f"{data}: {complete} of {len(arms)} arms complete{ready}")
    versions = Counter(r["version"] for r in study.runs)
    told = ", ".join(f"{k}: {n} rows" for k, n in versions.items())
    return "\n".join([*lines, f"code now {VERSION}; tested runs by code: {told}"])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--only", default="", help="datasets of study.toml, with commas")
    p.add_argument("--arms", default="", help="arms, with semicolons")
    p.add_argument("--all", action="store_true", help="every registered method")
    p.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    p.add_argument("--data", default="data", help="prepared datasets")
    p.add_argument("--runs", default="runs/study", help="unfinished runs")
    p.add_argument(
        "--plan", default=str(HERE / "study"), help="folder of study.toml and rows"
    )
    p.add_argument("--status", action="store_true", help="say what is there")
    p.add_argument("--fresh", action="store_true", help="drop rows of older code")
    p.add_argument("--verify", type=int, default=0, help="make rows again, compare")
    a = p.parse_args()
    discover()
    study = Study(a.plan)
    if a.status:
        print(status(study, a))
        return
    if a.verify:
        verify(study, a)
        return
    if a.fresh:
        drop_old(study)
        study.read()
    wanted = [d.strip() for d in a.only.split(",") if d.strip()]
    for data in wanted:
        study.about(data)
    ready = [d for d in wanted or study.data if is_prepared(study, a, d)]
    for d in wanted or study.data:
        if d not in ready:
            print(f"{d} is not prepared below {a.data}; see results/sources.py")
    failed = sum(one_dataset(study, a, d) for d in ready)
    if failed:
        raise InputError(f"{failed} runs failed; the same command tries them again.")


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        raise SystemExit(f"study: {e}") from None
