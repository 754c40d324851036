"""What importing the package costs and needs, seen from fresh interpreters.

And imports point backwards only.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BLOCK = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, No())
"""


def fresh(code, blocked=()):
    out = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=set(blocked)) + code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert out.returncode == 0, out.stderr
    return out.stdout


MODULES = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in (ROOT / "mla_nb").rglob("*.py")
    if p.name != "_modidx.py"
)
NOTEBOOK_TOOLS = [
    "nbdev",
    "fastcore",
    "execnb",
    "IPython",
    "ipykernel",
    "jupyter",
    "jupyterlab",
    "papermill",
    "nbformat",
    "nbclient",
    "ipywidgets",
    "pytest",
]
HEAVY = [
    "transformers",
    "timm",
    "datasets",
    "torchvision",
    "torchaudio",
    "torchmetrics",
    "accelerate",
    "sklearn",
    "matplotlib",
    "tensorboard",
    "soundfile",
    "tokenizers",
    "pandas",
    "pyarrow",
]


def test_every_module_alone_without_notebook_tools_or_heavy_libraries():
    """One after the other, in a process where these libraries do not exist.

    Each module in an interpreter of its own would take minutes.
    """
    fresh(
        "import importlib\n"
        f"for m in {MODULES!r}: importlib.import_module(m)\n"
        "from mla_nb.core import discover, methods\n"
        "discover(); assert 'mla' in methods",
        NOTEBOOK_TOOLS + HEAVY,
    )


@pytest.mark.parametrize(
    "module",
    ["mla_nb", "mla_nb.methods.fusion", "mla_nb.runs.run", "mla_nb.data.digits"],
)
def test_import_takes_nothing_heavy_along(module):
    got = json.loads(
        fresh(
            f"import {module}, json\n"
            f"print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
        )
    )
    assert not set(got) & set(HEAVY + NOTEBOOK_TOOLS)


def test_import_of_the_package_does_not_even_take_torch():
    assert (
        fresh(
            "import mla_nb\nprint('torch' in sys.modules, mla_nb.__version__)"
        ).split()[0]
        == "False"
    )


EXPORT = re.compile(r"^#\|\s*exports?\b", re.M)


def chapters():
    "Module name -> chapter number, from the notebooks"
    out = {}
    for p in (ROOT / "nbs").rglob("[0-9]*.ipynb"):
        src = "\n".join(
            "".join(c["source"]) for c in json.loads(p.read_text())["cells"]
        )
        for m in re.findall(r"^#\| (?:default_exp|exports?) (\S+)", src, re.M):
            out["mla_nb." + m] = p.name.split("_")[0], p, src
    return out


LATER = {  # module -> chapters ahead that its exported code may import, and why
    "mla_nb.features": ({"mla_nb.runs.run"}, "the encoders of a finished run"),
}
REFERENCE = {f"mla_nb.{m}" for m in ("tools", "plots", "widgets")}  # the last chapter


def exported(path):
    "The code that a chapter puts into the package"
    for c in json.loads(path.read_text())["cells"]:
        source = "".join(c["source"])
        if c["cell_type"] == "code" and EXPORT.search(source):
            yield source


def test_imports_point_backwards():
    "The exported code of chapter k uses chapters before k"
    known, used = chapters(), set()
    assert len(known) >= 40
    for name, (k, path, _) in known.items():
        allowed = {*REFERENCE, name, *LATER.get(name, ((), ""))[0]}
        for node in ast.walk(ast.parse("\n".join(exported(path)))):
            if not isinstance(node, ast.ImportFrom) or node.module not in known:
                continue
            ahead = known[node.module][0] > k
            used |= {(name, node.module)} if ahead else set()
            assert not ahead or node.module in allowed, (
                f"{path.name} imports {node.module}: chapter {known[node.module][0]}"
            )
    for name, (modules, _) in LATER.items():
        assert {(name, m) for m in modules} <= used, f"{name}: exception not needed"


def test_wings_know_only_what_is_below_them():
    "The contracts in .importlinter"
    out = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert out.returncode == 0, out.stdout + out.stderr
