"""The runs behind chapter 12 and the README: python results/ablation.py FSDD.zip [processes]

Makes every run that is not there yet below runs/ablation, then writes results/ablation.csv.
"""
import csv, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mla_nb.data.digits import prepare_digits, read_archive
from mla_nb.experiments import Run, run

DATA = {"lazy": dict(dataset="synthetic", dataset_args="preset=lazy"),
        "balanced": dict(dataset="synthetic", dataset_args="preset=balanced"),
        "digits, known voices": dict(dataset="digits", dataset_args="split=official,image_noise=.5"),
        "digits, new voices": dict(dataset="digits", dataset_args="split=speaker,image_noise=.5")}
VARIANTS = {"concat": dict(method="concat"),
            "ensemble": dict(method="ensemble"),
            "mla, no projection, mean": dict(method="mla", method_args="projection=False", rule="mean"),
            "mla, mean": dict(method="mla", rule="mean"),
            "mla": dict(method="mla"),
            "mla, update first": dict(method="mla", method_args="when=update_first"),
            "mla, normalised P": dict(method="mla", method_args="norm=True"),
            "mla_fixed": dict(method="mla_fixed")}
SEEDS = range(5)


def command(what):
    return "mla_run " + " ".join(f"--{k} '{v}'" if "," in str(v) else f"--{k} {v}" for k, v in what.items())


def one(what):
    return run(Run(**what, root="runs/ablation", progress=False, threads=1))


def main(archive, processes=2):
    recordings = read_archive(archive)
    for split in ("official", "speaker"): prepare_digits(recordings, split=split, image_noise=.5)
    jobs = [(d, v, s, {**DATA[d], **VARIANTS[v], "seed": s}) for s in SEEDS for d in DATA for v in VARIANTS]
    with ProcessPoolExecutor(int(processes)) as pool: found = list(pool.map(one, [j[3] for j in jobs]))
    rows = [dict(data=d, variant=v, seed=s, **{m: round(a, 4) for m, a in r["test"]["accuracy"].items()}, best_epoch=r["best_epoch"],
                 seconds=round(r["seconds"], 1), command=command(what)) for (d, v, s, what), r in zip(jobs, found)]
    rows.sort(key=lambda r: (list(DATA).index(r["data"]), list(VARIANTS).index(r["variant"]), r["seed"]))
    with (Path(__file__).parent / "ablation.csv").open("w", newline="") as f:
        out = csv.DictWriter(f, ["data", "variant", "seed", "fused", "audio", "visual", "image", "text", "best_epoch", "seconds", "command"])
        out.writeheader()
        out.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) < 2: sys.exit(__doc__)
    main(*sys.argv[1:])
