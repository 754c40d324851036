"""Every dataset's preset at its full tensor shapes.

    python benchmarks/gpu.py [--device cpu] [--datasets cremad,mvsa]

Prepares the miniature of each dataset at the published sizes, trains MLA with the
preset's encoder and batch size for two epochs, and writes samples per second, peak
memory and the hours that a full run of published length would take to results/gpu.json.
The second epoch is measured; the first warms up. Meant for a GPU; on a CPU it says so
in the file.

Then gpu_speed.py: steps in fp32, bf16, channels-last and compiled beside a step of the
released code, under "speed".
"""

import argparse
import json
import tempfile
from importlib import import_module
from pathlib import Path

import gpu_speed
import torch

from mla_nb.data.miniature import miniature
from mla_nb.runs.run import Run, environment, read_history, run

# training samples of the published splits;
# a tenth less where validation is cut from training
PUBLISHED = {
    "cremad": 6028,
    "food101": 61127,
    "mvsa": 1555,
    "iemocap": 4425,
    "kinetics": 14799,
}
HERE = Path(__file__).parents[1] / "results"


def one(name, device, clips, work):
    module = import_module("mla_nb.data." + ("own" if name == "kinetics" else name))
    root = miniature(name, work / "raw" / name, clips)
    options = {"progress": False, "data": work / "data"}
    if name == "kinetics":
        options["split"] = [root / "train.csv", root / "test.csv"]
    getattr(module, f"prepare_{name}")(root, **options)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    cfg = Run(
        dataset=name,
        epochs=2,
        schedule="constant",
        device=device,
        data=str(work / "data"),
        root=str(work / "runs"),
        progress=False,
        precision="bf16" if torch.cuda.is_available() and device == "auto" else "no",
    )
    r = run(cfg)
    last, full = read_history(cfg.folder)[-1], Run(dataset=name)
    n = json.loads((work / f"data/{name}/dataset.json").read_text())["counts"]["train"][
        "total"
    ]
    rate = n / last["seconds"]
    memory = (
        torch.cuda.max_memory_allocated() / 2**20
        if torch.cuda.is_available()
        else last["memory"]
    )
    return {
        "encoder": cfg.encoder,
        "batch_size": cfg.batch_size,
        "precision": cfg.precision,
        "samples_per_second": round(rate, 1),
        "peak_MiB": round(memory or 0),
        "published_samples": PUBLISHED[name],
        "published_epochs": full.epochs,
        "projected_hours": round(PUBLISHED[name] * full.epochs / rate / 3600, 2),
        "parameters": r["params"],
    }


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="auto", choices=["auto", "cpu"])
    p.add_argument("--datasets", default=",".join(PUBLISHED))
    p.add_argument("--clips", type=int, default=384, help="samples of each miniature")
    p.add_argument("--out", default=str(HERE / "gpu.json"))
    p.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="timed steps of each way to step; 0: none",
    )
    p.add_argument(
        "--tiny", action="store_true", help="steps at shapes that a CPU can do"
    )
    a = p.parse_args()
    out = {"environment": environment(), "runs": {}}
    with tempfile.TemporaryDirectory() as d:
        for name in filter(None, a.datasets.split(",")):
            out["runs"][name] = one(name, a.device, a.clips, Path(d))
            print(name, out["runs"][name])
            Path(a.out).write_text(json.dumps(out, indent=1) + "\n")
    device = torch.device(
        "cuda" if torch.cuda.is_available() and a.device == "auto" else "cpu"
    )
    for name in ("resnet18", "transformer") if a.rounds else ():
        out.setdefault("speed", {})[name] = gpu_speed.measure(
            name, device, a.rounds, a.tiny
        )
        Path(a.out).write_text(json.dumps(out, indent=1) + "\n")
    if a.rounds:
        print(gpu_speed.table(out["speed"]))
