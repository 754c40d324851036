"""Every dataset on a GPU: end to end by papermill, and its preset at full size.

    python benchmarks/gpu.py [--device cpu] [--datasets cremad,mvsa]

For each dataset: the miniature of it is prepared, `nbs/experiments/run.ipynb` is
executed on it by papermill, and date and device are written to results/gpu.json (which
says "not run" until then). Then MLA is trained at the shapes of the preset `paper`,
encoders from random weights, for two epochs, of which the second is measured: samples
per second, peak memory, and the hours of a full run of published length.

One training step runs with `torch.cuda.set_sync_debug_mode("error")`: a wait of the
host for the GPU ends it. Then gpu_speed.py: steps in fp32, TF32, bf16, channels-last
and compiled beside a step of the released code, under "speed".
"""

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import gpu_speed
import torch

from mla_nb.core import datasets, discover
from mla_nb.data.miniature import miniature
from mla_nb.runs.config import Run
from mla_nb.runs.run import (
    build,
    environment,
    make_dataset,
    read_history,
    run,
    settled,
)

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


ROOT = Path(__file__).parents[1]


def without_weights(encoder: str) -> str:
    "The same encoders from random weights, with a dictionary trained on the texts"
    return re.sub(r"(weights|tokenizer)=[^,)]*,?", "", encoder).replace(",)", ")")


def prepared(name, work, clips, small):
    "A miniature, prepared as the preset has it; small: at sizes for a CPU"
    module = import_module("mla_nb.data." + ("own" if name == "kinetics" else name))
    root = miniature(name, work / "raw" / name, clips)
    options = {
        "progress": False,
        "data": work / "data",
        **datasets[name].stored["paper"],
    }
    if small:
        options |= {"size": 32, "store": 40}
    if name == "kinetics":
        options["split"] = [root / "train.csv", root / "test.csv"]
    return getattr(module, f"prepare_{name}")(root, **options)


def end_to_end(name, device, work):
    "run.ipynb by papermill; when and where"
    out = work / f"{name}.ipynb"
    told = {"dataset": name, "epochs": 1, "batch_size": 16, "progress": False}
    told |= {
        "device": device,
        "data": str(work / "data"),
        "root": str(work / "papermill"),
    }
    command = [sys.executable, ROOT / "tools/nbs.py", "papermill", "-k", "python3"]
    command += ["--no-progress-bar", ROOT / "nbs/experiments/run.ipynb", out]
    for k, v in told.items():
        command += ["-p", k, str(v)]
    subprocess.run(command, check=True, cwd=ROOT)
    when = datetime.date.today().isoformat()
    return {"date": when, "device": environment(torch.device(kind(device)))["device"]}


def kind(device):
    "cuda or cpu"
    return "cuda" if torch.cuda.is_available() and device == "auto" else "cpu"


def unsynchronized(cfg):
    "One step in which a wait of the host for the GPU is an error; True if it passed"
    if kind(cfg.device) == "cpu":
        return None
    learn = build(cfg, make_dataset(cfg))
    learn.callbacks = list(learn.method.grad_transforms)
    learn.epochs, learn.epoch = 1, 0
    learn.runtime.prepare(learn)
    learn.net.train()
    for step, batch in zip(range(3), learn.dls.train):
        learn.step, learn.batch = step, batch
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            learn.one_batch()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return True


def one(name, device, work, small):
    "MLA at the shapes of the preset `paper`: speed, memory, projected hours"
    full = settled(Run(dataset=name, preset="paper", device=device))
    encoder = without_weights(full.encoder)
    if small:
        encoder = encoder.replace("resnet18", "small").replace("(imagenet=True)", "")
        encoder = encoder.replace("m3ae(", "m3ae(size=tiny,").replace(
            "pixels=256", "pixels=32"
        )
        encoder = encoder.replace("cavmae()", "cavmae(size=tiny)")
    cfg = full.replace(
        encoder=encoder,
        epochs=2,
        schedule="constant",
        data=str(work / "data"),
        root=str(work / "runs"),
        progress=False,
        batch_size=16 if small else full.batch_size,
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    r = run(cfg)
    last = read_history(cfg.folder)[-1]
    meta = json.loads((work / f"data/{name}/dataset.json").read_text())
    rate = meta["counts"]["train"]["total"] / last["seconds"]
    gpu = kind(device) == "cuda"
    memory = torch.cuda.max_memory_allocated() / 2**20 if gpu else last["memory"]
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
        "no_host_wait_in_a_step": unsynchronized(cfg),
    }


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="auto", choices=["auto", "cpu"])
    p.add_argument("--datasets", default=",".join(PUBLISHED))
    p.add_argument("--clips", type=int, default=384, help="samples of each miniature")
    p.add_argument("--out", default=str(HERE / "gpu.json"))
    p.add_argument("--rounds", type=int, default=20, help="timed steps; 0: none")
    p.add_argument("--tiny", action="store_true", help="shapes that a CPU can do")
    a = p.parse_args(argv)
    discover()
    out = {"end_to_end": dict.fromkeys(PUBLISHED, "not run"), "runs": {}}
    if Path(a.out).exists():
        out |= json.loads(Path(a.out).read_text())

    def save():
        Path(a.out).write_text(json.dumps(out, indent=1) + "\n")

    for name in filter(None, a.datasets.split(",")):
        with tempfile.TemporaryDirectory() as d:
            prepared(name, Path(d), a.clips, a.tiny)
            out["end_to_end"][name] = end_to_end(name, a.device, Path(d))
            out["runs"][name] = one(name, a.device, Path(d), a.tiny)
        out["environment"] = environment(torch.device(kind(a.device)))
        print(name, out["end_to_end"][name], out["runs"][name])
        save()
    for name in ("resnet18", "transformer") if a.rounds else ():
        device = torch.device(kind(a.device))
        found = gpu_speed.measure(name, device, a.rounds, a.tiny)
        out.setdefault("speed", {})[name] = found
        save()
    if a.rounds:
        print(gpu_speed.table(out["speed"]))


if __name__ == "__main__":
    main()
