"""The walk-through of CONTRIBUTING.md, walked: a method is one file."""

import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT


def test_adding_a_method_is_one_file(tmp_path):
    [code] = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S
    )
    shutil.copytree(
        ROOT / "mla_nb",
        tmp_path / "mla_nb",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (tmp_path / "mla_nb/methods/dropout.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def call(*args):
        return subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )

    train = ("-m", "mla_nb.cli", "train")
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    assert call("tools/index.py").returncode == 0  # what `make export` does
    assert "dropout" in call(*train, "--help").stdout
    tiny = [
        "--dataset_args",
        "n_train=96,n_valid=32,n_test=32",
        "--epochs",
        "1",
        "--progress",
        "false",
    ]
    out = call(*train, "--method", "dropout", "--method_args", "p=.5", *tiny)
    assert out.returncode == 0 and ", dropout(p=0.5) |" in out.stdout, out.stderr
    assert "did you mean 'dropout'" in call(*train, "--method", "dropot", *tiny).stderr
