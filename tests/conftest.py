"""Shared by all tests: one thread, and where the real data lies.

Tests that need the data skip, with a reason, where it is not there.
"""

import contextlib
import io
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
LONGEST = "distributed faults pretend runs grid predict cremad resume compare site"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def pytest_collection_modifyitems(items):
    "The longest files come first: else one process ends minutes before the other"

    def place(item):
        name, order = item.path.stem.removeprefix("test_"), LONGEST.split()
        return order.index(name) if name in order else len(order)

    items.sort(key=place)


def script(name, *args, ok=True):
    """data_scripts/prepare_NAME.py as a command, in this process.

    Importing everything again would take longer than what is tested.
    """
    said, code = io.StringIO(), None
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        pytest.MonkeyPatch.context() as m,
    ):
        m.setattr(
            sys, "argv", [f"prepare_{name}.py", "--workers", "0", *map(str, args)]
        )
        try:
            runpy.run_path(
                str(ROOT / f"data_scripts/prepare_{name}.py"), run_name="__main__"
            )
        except SystemExit as e:
            code = e.code
    assert (code in (None, 0)) == ok and "\n" not in str(code), (said.getvalue(), code)
    return f"{said.getvalue()}{code}"


DIE = """
import os, signal
from pathlib import Path
replace = os.replace
def dying(part, path, **kw):
    path = Path(path)
    if path.suffix == ".arrow" and list(path.parent.glob("*.arrow")):
        os.killpg(0, signal.SIGKILL)
    return replace(part, path, **kw)
os.replace = dying
"""


def killed_at_the_second_shard(tmp_path, path, *args):
    """data_scripts/PATH is killed, with all that it started, at its second shard.

    Returns when each file that was whole was written.
    """
    (tmp_path / "die").mkdir()
    (tmp_path / "die/sitecustomize.py").write_text(
        DIE
    )  # read by whatever Python begins with this PYTHONPATH
    where = [str(tmp_path / "die"), os.environ.get("PYTHONPATH", "")]
    p = subprocess.run(
        [
            sys.executable,
            str(ROOT / "data_scripts" / path),
            *map(str, args),
            "--out",
            "cut",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(where)},
    )
    assert p.returncode == -signal.SIGKILL and not (tmp_path / "cut").exists(), (
        p.stderr[-3000:]
    )
    first = {f.name: f.stat().st_mtime_ns for f in tmp_path.glob("cut.partial/*.arrow")}
    assert len(first) == 1 and list(tmp_path.glob("cut.partial/.*.part"))
    return first


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(*how):
    "The command that begins two processes that train one net"
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        *map(str, how),
    ]


def started(*args, cwd, how=("-m", "mla_nb.cli", "train")):
    "Two processes that train one net"
    args = together(*how, *args)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        args,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )


def torchrun(*args, cwd):
    p = started(*args, cwd=cwd)
    out, err = p.communicate(timeout=240)
    assert p.returncode == 0, err[-4000:]
    return out


@pytest.fixture
def mine(tree, tmp_path, monkeypatch):
    "A copy of the test module's `tree` to spoil, and an empty folder to work in"
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(tree, tmp_path / "raw")


@pytest.fixture(scope="session")
def real_archive():
    "The Free Spoken Digit Dataset, where it is at hand"
    path = Path(
        os.environ.get("FSDD_ARCHIVE", SHARED / "data/free-spoken-digit-dataset.zip")
    )
    if not path.exists():
        pytest.skip(
            "the real recordings are not here; set FSDD_ARCHIVE to their zip file"
        )
    return path


@pytest.fixture(scope="session")
def real_lists():
    "Paths of real split lists by their names, where they are at hand"

    def find(*names):
        files = [SHARED / "data/splits" / n for n in names]
        if not all(f.exists() for f in files):
            pytest.skip("the real split lists are not here")
        return files

    return find


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    "A made archive in the layout of the real one"
    from mla_nb.data.digits import miniature

    return miniature(tmp_path_factory.mktemp("tones") / "tones.zip", per=12)


def pytest_terminal_summary(terminalreporter):
    "What test_parity has checked, and what not yet"
    reports = [
        r
        for rs in terminalreporter.stats.values()
        for r in rs
        if hasattr(r, "user_properties")
    ]
    lines = sorted({v for r in reports for k, v in r.user_properties if k == "parity"})
    if lines:
        terminalreporter.section("parity with the released code")
        for line in lines:
            terminalreporter.write_line(line)
