"""Parameter files for papermill, one per dataset and method: python tools/params.py

Each holds what the dataset's preset says, spelled out:

    papermill nbs/experiments/run.ipynb out.ipynb \\
        -f nbs/experiments/params/cremad-mla.yaml
"""

from pathlib import Path

from mla_nb.core import datasets, discover
from mla_nb.runs.run import Run

discover()
OUT = Path(__file__).parents[1] / "nbs/experiments/params"
MODALITIES = {n: s.modalities for n, s in datasets.items() if s.modalities}
METHODS = [
    "concat",
    "sum",
    "film",
    "gated",
    "ogm",
    "ogm_ge",
    "qmf",
    "ensemble",
    "mla_fixed",
    "mla",
    "mla_released",
]
FIELDS = [
    "dataset",
    "method",
    "method_args",
    "encoder",
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "optimizer",
    "schedule",
]


def files():
    "Name -> text of every parameter file"
    runs = {
        f"{d}-{m}": {"dataset": d, "method": m} for d in MODALITIES for m in METHODS
    }
    runs |= {
        f"{d}-unimodal-{k}": {
            "dataset": d,
            "method": "unimodal",
            "method_args": f"modality={k}",
        }
        for d, mods in MODALITIES.items()
        for k in mods
    }

    def text(what):
        cfg = Run(**what)
        values = {
            k: what.get(k, getattr(cfg, k))
            for k in FIELDS
            if k != "method_args" or k in what
        }
        return "".join(f"{k}: {v}\n" for k, v in values.items())

    return {f"{name}.yaml": text(what) for name, what in runs.items()}


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    made = files()
    for old in OUT.glob("*.yaml"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (OUT / name).write_text(text)
    print(f"{len(made)} files in {OUT.relative_to(Path.cwd())}")
