"""Runs of the project on the pretend GPU, and the same on the CPU.

Shared by `on_pretend.py`, `mutants.py` and `benchmarks/waits.py`.
"""

import json
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from pretend import NAME, certain, host, posing, shared_numbers, watch

from mla_nb.core import datasets, discover
from mla_nb.data.arrays import splits_from_arrays
from mla_nb.methods.base import Callback
from mla_nb.runs import run as runs
from mla_nb.runs.config import Run
from mla_nb.train.checkpoints import Saver, read_tensors
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.runtime import PrefetchLoader
from mla_nb.train.watching import StopOnNaN

torch.set_num_threads(1)
discover()
DEVICE = torch.device(NAME)
TINY = {
    "dataset": "tiny",
    "encoder": "small",
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.02,
    "threads": 1,
    "progress": False,
}
WORDS = ["a dog barks", "the cat sleeps here", "birds sing and fly away"]


@datasets.register(modalities=("audio", "image", "text"))
def tiny(
    seed: int = 0,
    n: int = 24,  # two thirds of them for training
):
    "Three classes, three modalities, sixteen pixels"
    rng, y = np.random.default_rng(seed), np.arange(n) % 3
    pictures = (rng.integers(0, 80 + 80 * k, (3, 16, 16)) for k in y)
    x = {
        "audio": [torch.tensor(rng.normal(k, 1.0, (16, 16))).float() for k in y],
        "image": [torch.tensor(p, dtype=torch.uint8) for p in pictures],
        "text": [WORDS[k] for k in y],
    }
    return splits_from_arrays(x, list(y), shares=(2 / 3, 1 / 6, 1 / 6), seed=seed)


ACTIVE = {  # options with which a method does all it can do within two short epochs
    "unimodal": {"modality": "audio"},
    "mslr": {"window": 1, "rates": "audio=.5"},
    "mses": {"patience": 1},
    "agm": {},
    "gblending": {"every": 1},
    "relearning": {"every": 1, "times": 1},
    "arl": {"start": 1},
    "ogm": {"end": 9},
    "ogm_ge": {"end": 9},
    "ogm_plus": {"end": 9},
    "umt": {"epochs": 1},
    "g2d": {"epochs": 1, "pause": 2},
    "lfm": {"alpha": "learned"},
    "inforeg": {"window": 1},
}


class OnPretend(Accelerator):
    "Accelerate on the pretend device; asked for the CPU, it is Accelerate"

    def __init__(self, cpu=False, **kwargs):
        super().__init__(cpu=True, **kwargs)
        self.wanted = super().device if cpu else DEVICE

    @property
    def device(self):
        return getattr(self, "wanted", torch.device("cpu"))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16)


def _batches(self):
    "As on CUDA: one batch ahead"
    if self.device.type != "cpu":
        return self.ahead()
    return (b.to(self.device) for b in self.dl)


@contextmanager
def gpu(own=False):
    "The project finds the pretend device as it would find CUDA"
    with (
        posing(),
        mock.patch.object(accelerate, "Accelerator", OnPretend),
        mock.patch.object(PrefetchLoader, "__iter__", _batches),
    ):
        if own:
            yield
        else:
            with shared_numbers():
                yield


@contextmanager
def counted_steps():
    "A list with a Counter of waits for each batch that is trained"
    found, one_batch = [], Learner.one_batch

    def counted(self):
        with watch() as seen:
            one_batch(self)
        found.append(seen)

    with mock.patch.object(Learner, "one_batch", counted):
        yield found


def configure(**fields):
    return Run(**{**TINY, **fields})


def trained(cfg, s=None, callbacks=()):
    "A learner after its epochs, without files"
    learn = runs.build(cfg, runs.make_dataset(cfg) if s is None else s)
    kept = [c for c in learn.callbacks if not isinstance(c, (Saver, runs.Stopper))]
    kept = [c for c in kept if type(c) not in (runs.TensorBoard, runs.Progress)]
    for c in kept:
        if isinstance(c, StopOnNaN):
            c.folder = None
        if isinstance(c, Recorder):
            c.every = 1
    learn.callbacks = sorted([*kept, *callbacks], key=lambda c: c.order)
    return learn.fit(cfg.epochs)


def losses(learn):
    return [v for row in learn.history for v in row["train"]["loss"].values()]


class Twins:
    "One configuration, trained on the CPU and on the device"

    def __init__(self, s=None, **fields):
        cfg = configure(**fields)
        self.cpu = trained(cfg.replace(device="cpu"), s)
        with gpu(), watch() as self.seen, counted_steps() as self.steps:
            self.gpu = trained(cfg, s)

    @property
    def apart(self) -> float:
        "The largest difference of weights and of losses"
        a, b = self.cpu.net.state_dict(), self.gpu.net.state_dict()
        pairs = [(a[k].double(), host(b[k]).double()) for k in a if a[k].numel()]
        far = [float((x - y).abs().max()) for x, y in pairs]
        named = zip(losses(self.cpu), losses(self.gpu))
        return max(*far, *(abs(p - q) for p, q in named))

    @property
    def waits(self) -> Counter:
        "Certain waits inside the training steps"
        return certain(sum(self.steps, Counter()))

    @property
    def waits_outside(self) -> Counter:
        "Certain waits outside of them"
        return certain(self.seen - sum(self.steps, Counter()))

    def check(self, tol=1e-5, waits=0):
        "Equal numbers, everything on the device, no waiting inside a step"
        state = [v for one in self.gpu.opt.state.values() for v in one.items()]
        moved = [v for k, v in state if k != "step" and isinstance(v, torch.Tensor)]
        for v in [*self.gpu.net.state_dict().values(), *moved]:
            assert v.device.type == NAME, f"something stayed on {v.device}"
        assert self.apart <= tol, f"differs from the CPU by {self.apart:.1e}"
        assert sum(self.waits.values()) <= waits, dict(self.waits)
        return self


class Cut(Callback):
    "Stops a run in the middle of its second epoch, once, after it was saved"

    order = 50

    def __init__(self, folder):
        self.seen = folder / "seen"

    def after_batch(self, learn):
        if (learn.epoch, learn.step) == (1, 0) and not self.seen.exists():
            self.seen.touch()
            next(c for c in learn.callbacks if isinstance(c, Saver)).within(learn)
            raise KeyboardInterrupt


def cut_and_whole(root, **fields):
    "Two runs on the device, one of which was stopped; their folders, and the waits"
    make, cfg = runs._callbacks, configure(root=str(root), save_every=0.0, **fields)
    with gpu(own=True), watch() as seen:
        runs.run(cfg.replace(name="whole"))
        with mock.patch.object(runs, "_callbacks", lambda c: [*make(c), Cut(root)]):
            try:
                runs.run(cfg.replace(name="cut"))
                raise AssertionError("was not stopped")
            except KeyboardInterrupt:
                pass
            with counted_steps() as steps:
                runs.run(cfg.replace(name="cut"))
    return root / "whole", root / "cut", seen, steps


def same_files(a, b):
    "The largest difference of weights and losses of two runs"
    x, y = (read_tensors(f / "model.safetensors")[0] for f in (a, b))
    far = [float((x[k].double() - y[k].double()).abs().max()) for k in x]
    one, two = (
        [
            json.loads(line)["train"]["loss"]
            for line in (f / "metrics.jsonl").read_text().splitlines()
        ]
        for f in (a, b)
    )
    return max(*far, *(abs(p[k] - q[k]) for p, q in zip(one, two) for k in p))


__all__ = [k for k in globals() if not k.startswith("_")]
