"The walk-through of CONTRIBUTING.md, walked: a method is one file, an encoder is one."

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
from conftest import ROOT

from mla_nb.core import discover
from mla_nb.data.decode import encode_image

TINY = [
    "--dataset_args",
    "n_train=96,n_valid=32,n_test=32,size=16",
    "--epochs",
    "1",
    "--progress",
    "false",
]


SEVERAL = """
import json, sys
from mla_nb.cli import main
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as e:
        print(e.code)
    print(chr(12))
"""  # commands of `mla`, one after the other; importing takes longer than all of them


def section(heading):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.search(rf"^## {heading}\n(.*?)^## ", text, re.S | re.M)[1]


def block(heading):
    "The only Python block of a section"
    [code] = re.findall(r"^```python\n(.*?)^```", section(heading), re.S | re.M)
    return code


def known():
    "Every name that a module of the package defines or imports -> what it is"
    modules = [import_module(name) for name in discover()]
    return {k: v for m in modules for k, v in vars(m).items()}


@pytest.mark.parametrize("what", ["run", "batch", "sample"])
def test_journeys_name_what_there_is(what):
    "Modules are files, methods belong to their classes, functions exist"
    text, names = section(f"The journey of a {what}"), known()
    assert 5 < len(re.findall(r"^\d+\. ", text, re.M)) <= 10
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / "mla_nb" / file).exists(), file
    for owner, name in re.findall(
        r"`(?!None)([A-Z]\w+)(?:\.(\w+))?(?:\(.*?\))?`", text
    ):
        fields = inspect.get_annotations(names[owner])
        assert not name or name in fields or hasattr(names[owner], name), name
    functions = re.findall(r"`(_?[a-z]+(?:_[a-z]+)+)`", text)
    hooks = [n for n in functions if not n.startswith(("before_", "after_"))]
    assert hooks and all(n in names for n in hooks), set(hooks) - set(names)


@pytest.fixture
def call(tmp_path):
    "Python in a folder with a copy of the package"
    for name in ("mla_nb", "tools", "tests"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(ROOT / "pytest.ini", tmp_path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def call(*args):
        return subprocess.run(
            [sys.executable, *args],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )

    call.mla = lambda *commands: call("-c", SEVERAL, json.dumps(commands))
    return call


def test_adding_a_method_is_one_file(tmp_path, call):
    (tmp_path / "mla_nb/methods/batch_dropout.py").write_text(block("Add a method"))
    assert call("tools/index.py").returncode == 0  # what `make export` does
    train = ["train", "--method", "batch_dropout", "--method_args", "p=.5", *TINY]
    wrong = ["train", "--method", "batch_dropot", *TINY]
    done = call.mla(["train", "--help"], train, wrong)
    helped, trained, refused, rest = done.stdout.split("\f")
    assert done.returncode == 0 and not rest.strip(), done.stderr
    assert "batch_dropout" in helped
    assert ", batch_dropout(p=0.5) |" in trained, done.stderr
    assert "did you mean 'batch_dropout'" in refused


def test_adding_an_encoder_is_one_file(tmp_path, call):
    (tmp_path / "mla_nb/encoders/thumbnail.py").write_text(block("Add an encoder"))
    assert call("tools/index.py").returncode == 0
    checked = call("-m", "pytest", "-q", "tests/test_contracts.py", "-k", "thumbnail")
    assert checked.returncode == 0 and "2 passed" in checked.stdout, checked.stdout
    spec = "audio=small,visual=thumbnail(size=4),text=small"
    train = ["train", "--encoder", spec, "--name", "mine", *TINY]
    wrong = ["train", "--encoder", spec.replace("thumbnail", "thumbnial"), *TINY]
    done = call.mla(train, wrong)
    trained, refused, rest = done.stdout.split("\f")
    assert done.returncode == 0 and not rest.strip(), done.stderr
    assert "best epoch" in trained, done.stderr
    assert "did you mean 'thumbnail'" in refused
    stored = (tmp_path / "runs/mine/preprocessors.json").read_text()
    assert '"size": 4' in stored  # hence the encoder is built again without data
    picture = np.zeros((3, 32, 32), "u1")
    (tmp_path / "black.png").write_bytes(encode_image(picture))
    out = call("-m", "mla_nb.cli", "predict", "runs/mine", "--visual", "black.png")
    assert out.returncode == 0 and out.stdout.startswith("black: "), out.stderr
