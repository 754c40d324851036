"""The tests on a pretend GPU, in a process of their own, reported one by one.

`pretend.py` registers a device, which changes the whole process. So the tests of
`on_pretend.py` are not collected here (their file's name does not begin with `test_`):
they run once, in `python -m pytest tests/on_pretend.py`, and each function of that file
is a test here, which fails with the cases that failed there. To see more of one:

    python -m pytest tests/on_pretend.py -k NAME
"""

import ast
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections import defaultdict

import pytest
from conftest import ROOT

FILE = ROOT / "tests/on_pretend.py"
NAMES = [
    f.name
    for f in ast.parse(FILE.read_text()).body
    if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "name of a function -> its cases, as (name of the case, 'failure', message)"
    path = tmp_path_factory.mktemp("pretend") / "found.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-W", "ignore", f"--junitxml={path}", str(FILE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    cases = defaultdict(list)
    for case in xml.parse(path).iter("testcase"):
        kind, message = "passed", ""
        for e in case:
            if e.tag in ("failure", "error", "skipped"):
                kind, message = e.tag, e.get("message", "")[:600]
        cases[case.get("name").split("[")[0]].append((case.get("name"), kind, message))
    return cases, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_the_pretend_gpu(found, name):
    cases, said = found
    assert cases[name], f"{name} was not run: {said[-3000:]}"
    wrong = [f"{n}: {m}" for n, kind, m in cases[name] if kind in ("failure", "error")]
    assert not wrong, "\n\n".join(wrong)
    if all(kind == "skipped" for _, kind, _ in cases[name]):
        pytest.skip(cases[name][0][2])


def test_without_a_private_interface_the_reason_is_given():
    code = (
        "import torch.utils.backend_registration as b; del b._DummyDeviceGuard;"
        "import pretend; print(pretend.WHY_NOT)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert "_DummyDeviceGuard" in done.stdout and "has changed" in done.stdout


@pytest.mark.slow
def test_deliberate_mistakes_are_found():
    "Some of them: `python tests/mutants.py` tries all"
    some = [str(k) for k in (0, 3, 13, 17)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests/mutants.py"), *some],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if "private interface" in done.stdout or "has changed" in done.stdout:
        pytest.skip(done.stdout)
    assert done.returncode == 0 and "4 of 4 found" in done.stdout, (
        done.stdout + done.stderr[-3000:]
    )
