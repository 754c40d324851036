"""The package as others get it: a wheel and an archive that hold everything.

They import in an environment that holds nothing else.
"""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser

import pytest
from conftest import ROOT

CONFIG = ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini")
SETTINGS = CONFIG["DEFAULT"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A copy of what git knows: building writes beside the sources"
    out = tmp_path_factory.mktemp("source")
    files = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
        .stdout.decode()
        .split("\0")
    )
    if not any(files):
        pytest.skip("not a git checkout")
    for f in filter(None, files):
        if (
            f.split("/")[0] in ("nbs", "tests", "results", "benchmarks")
            or not (ROOT / f).exists()
        ):
            continue
        (out / f).parent.mkdir(parents=True, exist_ok=True)
        (out / f).write_bytes((ROOT / f).read_bytes())
    return out


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    p = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(out),
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "mla_nb").rglob("*.py")}
    modules.add("mla_nb/style.mplstyle")
    assert modules <= names and not [
        n for n in names - modules if not n.startswith("mla_nb-")
    ]
    about = next(n for n in names if n.endswith("/METADATA"))
    text = zipfile.ZipFile(wheel).read(about).decode()
    assert (
        f"Version: {SETTINGS['version']}" in text and "# mla_nb" in text
    )  # the README is its long description
    for extra in ("dev", "cluster", "hub", "export"):
        assert f"Provides-Extra: {extra}" in text
    commands = (
        zipfile.ZipFile(wheel)
        .read(about.replace("METADATA", "entry_points.txt"))
        .decode()
    )
    for c in SETTINGS["console_scripts"].split():
        assert c.split("=")[0] in commands


def test_imports_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    p = subprocess.run(
        [python, "-c", "import mla_nb; print(mla_nb.__version__, mla_nb.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean,
    )
    assert (
        p.returncode == 0
        and p.stdout.startswith(SETTINGS["version"])
        and str(tmp_path) in p.stdout
    ), p.stderr


def test_source_archive_can_be_built_from(source, tmp_path):
    p = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import setuptools.build_meta as b; "
                f"print(b.build_sdist({str(tmp_path)!r}))"
            ),
        ],
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert p.returncode == 0, p.stderr[-2000:]
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    for f in ("settings.ini", "setup.py", "LICENSE", "mla_nb/core.py"):
        assert any(n.endswith("/" + f) for n in names), f


def test_every_module_says_what_is_public():
    from importlib import import_module

    for p in (ROOT / "mla_nb").rglob("*.py"):
        if p.name[0] == "_":
            continue
        m = import_module(
            "mla_nb." + ".".join(p.relative_to(ROOT / "mla_nb").with_suffix("").parts)
        )
        assert m.__all__ and not [n for n in m.__all__ if not hasattr(m, n)], m.__name__
        assert m.__doc__, f"{m.__name__} has no promise"


def test_what_is_pinned_installs_on_the_oldest_python_that_is_promised():
    "A pin may ask for a later patch of Python than the one that a distribution ships"
    from importlib.metadata import PackageNotFoundError, metadata

    from packaging.specifiers import SpecifierSet

    seen, oldest = 0, SETTINGS["min_python"] + ".0"
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        try:
            needs = metadata(line.split("==")[0]).get("Requires-Python")
        except PackageNotFoundError:
            continue  # for another system
        seen += 1
        assert not needs or SpecifierSet(needs).contains(oldest), (
            f"{line} needs Python {needs}, and {oldest} is promised; run `make lock`"
        )
    assert seen > 100


def test_lines_fit_the_web_site():
    "At most 88 columns, but for the list of names that nbdev writes"
    import ast

    for path in sorted((ROOT / "mla_nb").rglob("*.py")):
        if path.name == "_modidx.py":
            continue
        source = path.read_text()
        listed = set()
        for n in ast.parse(source).body:
            names = getattr(n, "targets", [None])
            if getattr(names[0], "id", "") == "__all__":
                listed |= set(range(n.lineno, n.end_lineno + 1))
        for k, line in enumerate(source.splitlines(), 1):
            assert len(line) <= 88 or k in listed, f"{path.name}:{k}: {line}"
