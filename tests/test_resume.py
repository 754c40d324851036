"""Every registered method, ended in the middle of an epoch, goes on to the same bits.

A new process starts from the checkpoint alone; here new objects do.
"""

import shutil
from unittest.mock import patch

import pytest
from ends import end_of, keep_ends
from safetensors.torch import load_file
from test_distributed import VARIANTS

from mla_nb.core import discover, methods
from mla_nb.methods.base import Callback
from mla_nb.runs.config import Run
from mla_nb.runs.run import _callbacks, read_history, run

discover()
CASES = {name: (name, {}) for name in sorted(methods)}
LATE = "early", "often", "learned"  # variants that act at once, and not after epochs
CASES |= {n: (n.split()[0], how) for n, how in VARIANTS.items() if n.endswith(LATE)}


class Dead(BaseException):
    "What no handler of errors catches"


class Dies(Callback):
    "The end of the process, after the second batch of the second epoch was saved"

    order = 99

    def after_batch(self, learn):
        if (learn.epoch, learn.step) == (1, 1):
            raise Dead


def configuration(case, root):
    method, how = CASES[case]
    return Run(
        dataset_args="n_train=64,n_valid=32,n_test=32,size=16",
        missing="text=.3",
        method=method,
        method_args=how,
        batch_size=16,
        encoder="small(width=16)",
        epochs=3,
        lr=0.01,
        save_every=1e-6,
        progress=False,
        threads=1,
        root=str(root),
    )


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_died_goes_on_to_the_same_bits(case, tmp_path):
    whole, cut = (configuration(case, tmp_path / k) for k in ("whole", "cut"))
    with keep_ends():
        expected = run(whole)
    with (
        patch("mla_nb.runs.run._callbacks", lambda c: [*_callbacks(c), Dies()]),
        pytest.raises(Dead),
    ):
        run(cut)
    done = len(read_history(cut.folder))
    assert done == 1 and (cut.folder / "last.pt").exists()
    with keep_ends():
        again = run(cut)
    assert again["test"] == expected["test"], (
        f"{case}: the resumed run differs; does every transform return all that it "
        "remembers in state_dict, and take it back in load_state_dict?"
    )
    a, b = (load_file(c.folder / "model.safetensors") for c in (whole, cut))
    assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
    a, b = (end_of(c.folder) for c in (whole, cut))
    assert a["net"].keys() == b["net"].keys()
    assert all(v.equal(b["net"][k]) for k, v in a["net"].items())
    shutil.rmtree(tmp_path)
