"""The command line before any work begins.

No PyTorch, quick answers, an index that agrees with the registries.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

NO_TORCH = """
import sys
from mla_nb.cli import main
try:
    main(sys.argv[1:])
except SystemExit as e:
    print(e.code, file=sys.stderr)
sys.exit(int("torch" in sys.modules or "numpy" in sys.modules))
"""


@pytest.mark.parametrize(
    "line, says",
    [
        ("--help", "doctor"),
        ("train --help", "--accumulation_steps"),
        ("grid --help", "--scheduler"),
        ("trian", "did you mean 'train'"),
        ("train --epoch 3", "did you mean '--epochs'"),
        ("train --lr fast", "lr='fast': must be a number above 0"),
        ("train --method mal", "did you mean 'mla'"),
        ("train --dataset digit", "did you mean 'digits'"),
        ("grid --method concta", "did you mean 'concat'"),
        ("predict nowhere --text x", "no such folder"),
        ("prepare cremd", "did you mean 'cremad'"),
    ],
)
def test_help_and_mistakes_need_no_torch(line, says):
    out = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *line.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert says in out.stdout + out.stderr and "Traceback" not in out.stderr
    assert out.returncode == 0, "torch or numpy was imported"


def test_the_index_agrees_with_the_registries():
    done = subprocess.run(
        [sys.executable, "tools/index.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
