"""Would the pretend GPU notice? Deliberate mistakes, each in a copy of the package.

    python tests/mutants.py [NUMBER …]      all of them, or some

For each mistake one line of the package is spoiled, as one might write it without a GPU
at hand, and one training that passes otherwise is tried. The first line of the output
is the package as it is, for the same trainings: it must pass. The exit code is 0 if all
mistakes were found, else how many were not.

What is slow to import is imported once; then a child is forked for each mistake.
"""

import importlib
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass
class Mistake:
    file: str  # of the package
    good: str  # what stands there
    bad: str  # what one might have written
    method: str  # that is trained, or PICTURE
    options: dict = field(default_factory=dict)  # of the run
    resumed: bool = False  # is it seen only when a run goes on?


GAPS = {"missing": "0.4"}
PICTURE = "varies a picture"  # in place of a method: training in workers hides it
MISTAKES = [
    Mistake(
        "core.py",
        "return x[rows.to(x.device, non_blocking=True)]",
        "return x[rows]",
        "mla",
        GAPS,
    ),
    Mistake(
        "heads.py",
        "places = rows.to(z.device, non_blocking=True)",
        "places = rows",
        "mla",
        GAPS,
    ),
    Mistake(
        "heads.py",
        "torch.cat(parts).to(logits[0].device, non_blocking=True)",
        "torch.cat(parts)",
        "concat",
        GAPS,
    ),
    Mistake(
        "methods/base.py",
        "here = to_device(present, b.y.device)",
        "here = present",
        "mla",
    ),
    Mistake(
        "methods/base.py",
        "net.head.classes, device=b.y.device)",
        "net.head.classes)",
        "mla",
    ),
    Mistake(
        "methods/base.py",
        "return Pred.cat(found).cpu()",
        "return Pred.cat(found)",
        "mla",
        {"temperature": "validation"},
    ),
    Mistake(
        "methods/base.py",
        "kept = to_device(self.batch.present[m], z.device)[:, None]",
        "kept = self.batch.present[m][:, None]",
        "opm",
        {"method_args": {"start": 0, "chance": 1.0}},
    ),
    Mistake(
        "methods/qmf.py",
        "here = to_device(t.present[m], own.device)[:, None]",
        "here = t.present[m][:, None]",
        "qmf",
        GAPS,
    ),
    Mistake(
        "methods/qmf.py",
        "torch.zeros(n, device=device)",
        "torch.zeros(n)",
        "qmf",
    ),
    Mistake(
        "methods/ogm.py",
        "(torch.arange(len(s), device=s.device) > 0)",
        "(torch.arange(len(s)) > 0)",
        "ogm",
        {"method_args": {"form": "released"}},
    ),
    Mistake(
        "methods/projection.py",
        "dtype=W.dtype, device=W.device)",
        "dtype=W.dtype)",
        "mla",
    ),
    Mistake(
        "evaluation.py",
        "dtype=logits.dtype, device=logits.device)",
        "dtype=logits.dtype)",
        "mla",
        {"temperature": "validation"},
    ),
    Mistake(
        "methods/fusion.py",
        "dtype=exact, device=present.device)",
        "dtype=exact)",
        "mla_fixed",
    ),
    Mistake("train/runtime.py", "main.wait_event(copied)", "pass", "mla"),
    Mistake(
        "train/runtime.py",
        "torch.zeros(len(b), width, device=b.y.device)",
        "torch.zeros(len(b), width)",
        "concat",
        {"missing": "0.6", "batch_size": 2, "accumulation_steps": 4},
    ),
    Mistake(
        "train/runtime.py",
        "self.share(net.to(self.device))",
        "self.share(net)",
        "mla",
    ),
    Mistake(
        "runs/run.py",
        '["momentum_buffer"] = torch.zeros_like(p)',
        '["momentum_buffer"] = torch.zeros(p.shape)',
        "mla",
        {"fused": True},
    ),
    Mistake(
        "train/learner.py",
        "(turn.loss, turn.count)",
        "(turn.loss.cpu(), turn.count)",
        "mla",
    ),
    Mistake(
        "train/watching.py",
        "self.k += 1",
        "self.k += 1; assert turn.loss.isfinite()",
        "mla",
    ),
    Mistake(
        "methods/dropping.py",
        "to_device(torch.randperm(head.classes) >= n, shares.device)",
        "(torch.randperm(head.classes) >= n)",
        "amco",
        {"method_args": {"start": 0}},
    ),
    Mistake(
        "methods/objectives.py",
        "ce = ce * to_device(turn.batch.present[m], ce.device)",
        "ce = ce * turn.batch.present[m]",
        "aux",
        GAPS,
    ),
    Mistake(
        "methods/restarts.py",
        "self.now[m].to(square) if known else square",
        "self.now.get(m, torch.zeros(())).to(square)",
        "inforeg",
    ),
    Mistake(
        "train/checkpoints.py",
        'self.read("cpu")',
        "self.read(next(learn.net.parameters()).device)",
        "concat",
        {"optimizer": "adamw", "lr": 1e-3},
        resumed=True,
    ),
    Mistake(
        "encoders/image.py",
        "torch.default_generator.manual_seed(seed)",
        "torch.manual_seed(seed)",
        PICTURE,
    ),
]


def attempt(m: Mistake):
    "One training on the pretend device, beside the CPU or beside one that was cut"
    import pretend_runs as P

    if m.method == PICTURE:
        varied()
        return
    if not m.resumed:
        waits = 4 if m.method == "opm" else 0
        learn = P.Twins(method=m.method, **m.options).check(waits=waits).gpu
        with P.gpu():
            p = learn.predictions(learn.dls.valid)
        assert p.fused.device.type == "cpu", "predictions stayed on the device"
        return
    root = Path(tempfile.mkdtemp())
    whole, cut, _, steps = P.cut_and_whole(root, method=m.method, **m.options)
    waits, far = P.certain(sum(steps, P.Counter())), P.same_files(whole, cut)
    shutil.rmtree(root)
    assert not waits and far == 0, (dict(waits), far)


def varied():
    "A picture that is varied leaves the generator of the device alone"
    import pretend
    import torch

    from mla_nb.encoders.image import augment_image

    before = pretend.generator.get_state()
    augment_image(torch.zeros(3, 8, 8, dtype=torch.uint8), 5)
    assert pretend.generator.get_state().equal(before), "the device was seeded"


def outcome(package: Path, mistakes) -> str:
    "What a child process says that imports this package; empty: nothing was noticed"
    end, begin = os.pipe()
    if (pid := os.fork()) == 0:
        sys.path.insert(0, str(package))
        said = ""
        try:
            null = open(os.devnull, "w")  # noqa: SIM115
            with null, redirect_stdout(null), redirect_stderr(null):
                for m in mistakes:
                    attempt(m)
        except BaseException as e:
            said = f"{type(e).__name__}: {e}"
        os.write(begin, said.encode()[:2000])
        os._exit(0)
    os.close(begin)
    with os.fdopen(end, "rb") as f:
        said = f.read().decode(errors="replace")
    os.waitpid(pid, 0)
    return " ".join(said.split())


def spoiled(m: Mistake, root: Path) -> Path:
    "A copy of the package with one mistake"
    shutil.copytree(HERE.parent / "mla_nb", root / "mla_nb")
    path = root / "mla_nb" / m.file
    text = path.read_text()
    assert m.good in text, f"{m.file} does not have {m.good!r} any more"
    path.write_text(text.replace(m.good, m.bad))
    return root


def main(numbers):
    for name in ("accelerate", "pydantic", "torch._dynamo", "torch.utils.tensorboard"):
        importlib.import_module(name)  # nothing that computes: threads end at a fork
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE.parent]
    chosen = [MISTAKES[k] for k in numbers] or MISTAKES
    plain = outcome(HERE.parent, chosen)
    print(f"without a mistake: {plain or 'passes'}", flush=True)
    missed = 0
    for m in chosen:
        with tempfile.TemporaryDirectory() as root:
            said = outcome(spoiled(m, Path(root)), [m])
        missed += not said
        what = f"found: {said[:90]}" if said else "NOT FOUND"
        print(f"{m.file:22} {m.bad[:44]:44} {what}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found")
    sys.exit(min(100, missed + 100 * bool(plain)))


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]])
