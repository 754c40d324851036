"""How often a GPU makes the host wait: per method, training step and epoch.

    python benchmarks/waits.py [--only mla,opm] [--missing 0.4] [--lines]

Counted on the pretend GPU of `tests/pretend.py`, so no GPU is needed. A wait keeps the
host from preparing what comes next, and then the GPU has nothing to do.

step      certain waits inside a training step (a batch), where there should be none
may       copies inside a step from memory that is not pinned: CUDA may wait for them
epoch     certain waits outside of steps, per epoch: predictions that are downloaded,
          the losses of the epoch, and what a method does between epochs

`--lines` also names the lines that asked. The start of a run is not counted: the net is
moved, and teachers are trained. Checkpoints are not written here: a save waits once per
tensor.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import pretend

EPOCHS = 2


def counted(name, missing):
    "Waits in the steps and outside of them, and the number of steps"
    import pretend_runs as P

    class Start(P.Callback):
        "Forget what was waited for before the first epoch"

        order = -99

        def before_epoch(self, learn):
            if not learn.epoch:
                seen.clear()
                steps.clear()

    how = {"method_args": P.ACTIVE.get(name, {}), "missing": missing, "epochs": EPOCHS}
    with P.gpu(), P.watch() as seen, P.counted_steps() as steps:
        P.trained(P.configure(method=name, **how), callbacks=[Start()])
    inside = sum(steps, Counter())
    return inside, seen - inside, len(steps)


def row(name, missing):
    inside, outside, n = counted(name, missing)
    sure = pretend.certain(inside)
    may = sum(inside.values()) - sum(sure.values())
    rest = sum(pretend.certain(outside).values())
    numbers = sum(sure.values()) / n, may / n, rest / EPOCHS
    return numbers, sure, pretend.certain(outside), n


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", default="", help="methods, separated by commas")
    p.add_argument("--missing", default="0.4", help="rate of missing modalities")
    p.add_argument("--lines", action="store_true", help="name the lines that asked")
    args = p.parse_args()
    if pretend.WHY_NOT:
        sys.exit(pretend.WHY_NOT)
    from mla_nb.core import discover, methods

    discover()
    print(f"{'':14}{'all present':>21}{f'missing={args.missing}':>24}")
    print(f"{'method':14}" + f"{'step':>7}{'may':>7}{'epoch':>7}   " * 2)
    for name in args.only.split(",") if args.only else sorted(methods):
        rows = [row(name, missing) for missing in ("", args.missing)]
        cells = "   ".join("".join(f"{v:7.1f}" for v in r[0]) for r in rows)
        print(f"{name:14}{cells}", flush=True)
        for (what, line), n in rows[1][1].items():
            print(f"{'':14}  in steps: {n / rows[1][3]:.1f} {what}, {line}")
        for (what, line), n in rows[1][2].most_common() if args.lines else ():
            print(f"{'':14}  per epoch: {n / EPOCHS:.1f} {what}, {line}")


if __name__ == "__main__":
    main()
