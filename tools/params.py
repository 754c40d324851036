"""Parameter files for papermill, one per dataset and preset: python tools/params.py

Each holds what the preset says, spelled out; the method is named beside it:

    papermill nbs/experiments/run.ipynb out.ipynb \\
        -f nbs/experiments/params/cremad-paper.yaml -p method mla
"""

from pathlib import Path

from mla_nb.core import datasets, discover
from mla_nb.runs.config import PRESET

discover()
OUT = Path(__file__).parents[1] / "nbs/experiments/params"
MODALITIES = {n: s.modalities for n, s in datasets.items() if s.modalities}


def text(dataset: str, preset: str) -> str:
    "The fields that a preset fills, as YAML"
    told = {**PRESET, **datasets[dataset].presets.get(preset, {})}
    values = {"dataset": dataset, "preset": preset, **told}
    return "".join(f"{k}: {v!r}\n".replace("'", '"') for k, v in values.items())


def files() -> dict:
    "Name -> text of every parameter file"
    return {
        f"{d}-{p}.yaml": text(d, p)
        for d in MODALITIES
        for p in ("small", *datasets[d].presets)
    }


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    made = files()
    for old in OUT.glob("*.yaml"):
        if old.name not in made:
            old.unlink()
    for name, content in made.items():
        (OUT / name).write_text(content)
    print(f"{len(made)} files in {OUT.relative_to(Path.cwd())}")
