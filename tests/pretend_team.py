"""Two processes (gloo) on the pretend GPU, beside two on the CPU.

torchrun --nproc_per_node 2 tests/pretend_team.py
"""

import os
from contextlib import ExitStack
from unittest import mock

import pretend_runs as P
import torch.distributed as dist
from pretend import certain, host
from pretend_runs import configure, counted_steps, gpu, runs, trained

CASES = (
    {"method": "mla", "missing": "0.4"},
    {"method": "qmf", "missing": "0.4"},
    {"method": "ogm_ge", "method_args": {"end": 9}},
    {"method": "concat", "batch_size": 2, "accumulation_steps": 2, "missing": "0.6"},
)


def aliased(name):
    "Gloo knows the memory of the CPU only"
    old = getattr(dist, name)

    def call(*args, **kwargs):
        args = [[host(t) for t in a] if isinstance(a, list) else host(a) for a in args]
        return old(*args, **kwargs)

    return mock.patch.object(dist, name, call)


def main():
    for case in CASES:
        cfg = configure(**{"batch_size": 4, "dataset_args": "n=26", **case})
        s = runs.make_dataset(cfg)
        a = trained(cfg.replace(device="cpu"), s)
        with ExitStack() as stack:
            for name in ("all_reduce", "all_gather", "broadcast"):
                stack.enter_context(aliased(name))
            stack.enter_context(gpu())
            steps = stack.enter_context(counted_steps())
            b = trained(cfg, s)
        pairs = zip(a.net.state_dict().values(), b.net.state_dict().values())
        far = max(float((x - host(y)).abs().max()) for x, y in pairs)
        far = max(far, *(abs(p - q) for p, q in zip(P.losses(a), P.losses(b))))
        waits = sum(certain(sum(steps, P.Counter())).values()) / len(steps)
        if int(os.environ["RANK"]) == 0:
            word = "same" if far <= 2e-5 else "DIFFERENT"
            print(word, f"{far:.1e}", f"{waits:.1f} waits per step", case, flush=True)


if __name__ == "__main__":
    main()
