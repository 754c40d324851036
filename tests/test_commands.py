"""What README, teaching.md, CONTRIBUTING and the chapters tell a reader to type.

Python blocks run; command lines are understood by the programs they name.
"""

import argparse
import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from unittest.mock import patch

import pytest
from conftest import ROOT

TEXTS = [ROOT / f for f in ("README.md", "teaching.md", "CONTRIBUTING.md")]
CHAPTERS = sorted(
    p
    for p in (ROOT / "nbs").rglob("[0-9]*.ipynb")
    if "experiments" not in p.parts and ".ipynb_checkpoints" not in p.parts
)
SCRIPTS = sorted((ROOT / "data_scripts").glob("*.py"))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.S | re.M)
PROGRAMS = [
    "make",
    "mla",
    "papermill",
    "python",
    "source",
    "pip",
    "git",
    "dask",
    "torchrun",
    "accelerate",
    "cd",
    "nbdev_export",
    "nbdev_test",
    "pytest",
    "docker",
    "tensorboard",
]
TRUSTED = [
    "source",
    "pip",
    "git",
    "dask",
    "accelerate",
    "cd",
    "nbdev_export",
    "nbdev_test",
    "pytest",
    "docker",
    "tensorboard",
]  # not ours to parse
SPAN = re.compile(r"(?<!`)`((?:make|mla|papermill|python|torchrun) [^`\n]+)`(?!`)")
SMALLER = [
    ("epochs=14", "epochs=1, dataset_args='n_train=64,n_valid=32,n_test=32'")
]  # the same lines, in seconds


def number(path):
    return path.name.split("_")[0]


def markdown(path):
    "The text of a file; of a chapter, that of its markdown cells"
    if path.suffix == ".md":
        return path.read_text()
    return "\n\n".join(
        "".join(c["source"])
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "markdown"
    )


def blocks(path, language):
    return [code for lang, code in FENCE.findall(markdown(path)) if lang == language]


def command_lines(text):
    "Lines of blocks that begin with a program, and code in a sentence that does"
    out = []
    for lang, code in FENCE.findall(text):
        lines = [s for s in code.replace("\\\n", " ").splitlines() if s.strip()]
        if (
            lang in ("", "bash", "sh", "console")
            and lines
            and lines[0].split()[0] in PROGRAMS
        ):
            out += lines
    out += SPAN.findall(FENCE.sub("", text))
    return [words for s in out if (words := shlex.split(s, comments=True))]


ALL = sorted(
    {
        (p.name, tuple(words))
        for p in [f for f in TEXTS if f.exists()] + CHAPTERS
        for words in command_lines(markdown(p))
    }
    | {
        (p.name, tuple(shlex.split(s)))
        for p in SCRIPTS
        for s in re.findall(
            r"^    ((?:python|mla) .+)$",
            ast.get_docstring(ast.parse(p.read_text()), clean=False),
            re.M,
        )
    }
)


class Parsed(Exception):
    "The command line was understood; nothing more is wanted"


def parse_only(script, args):
    "Run a script up to the point where it has understood its arguments"
    usual = argparse.ArgumentParser.parse_args

    def stop(self, argv=None, namespace=None):
        raise Parsed(usual(self, argv, namespace))

    with (
        patch.object(argparse.ArgumentParser, "parse_args", stop),
        patch.object(sys, "argv", [script.name, *args]),
    ):
        runpy.run_path(str(script), run_name="__main__")


def field_names():
    from mla_nb.runs.config import Run

    return set(Run.model_fields)


def understood(words):
    "Refuse a command that its program would not take"
    program, args = words[0], list(words[1:])
    assert program in PROGRAMS, (
        f"what is {program!r}? Add it to PROGRAMS, or mend the line"
    )
    if program in TRUSTED:
        return None
    return {
        "make": make,
        "papermill": papermill,
        "python": python,
        "torchrun": torchrun,
    }.get(program, ours)(program, args)


@cache
def targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def make(program, args):
    if not shutil.which("make"):
        pytest.skip("make is not installed here")
    assert args and args[0] in targets() | {"help"} or args[0].startswith("prepare-"), (
        f"make {args[0]}: no such target"
    )
    done = subprocess.run(
        ["make", "-n", *args], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def papermill(program, args):
    from mla_nb.runs.run import Run

    notebook, given = ROOT / args[0], {}
    assert notebook.exists(), f"{args[0]}: no such notebook"
    for flag, a, b in zip(args, args[1:], [*args[2:], ""]):
        if flag in ("-p", "-r"):
            given[a] = b
        if flag == "-f":
            given |= dict(re.findall(r"^(\w+): *(.*)$", (ROOT / a).read_text(), re.M))
    assert given and set(given) <= field_names(), set(given) - field_names()
    Run(**{k: v.strip("'\"") for k, v in given.items()})


def ours(program, args):
    "The command line of `mla`, read by its own parser; nothing is carried out"
    from mla_nb import cli
    from mla_nb.runs.config import Run

    group = cli.typer.main.get_command(cli.app)
    if not args or "--help" in args:
        return None
    assert args[0] in group.commands, f"what is mla {args[0]}?"
    if args[0] in ("prepare", "features"):  # passed on to data_scripts/
        return None
    if len(args) == 1:  # a sentence names the command, and gives no line to type
        return None
    command = group.commands[args[0]]
    given = command.make_context(args[0], list(args[1:]), resilient_parsing=False)
    fields = {k: v for k, v in given.params.items() if v is not None}
    if args[0] == "train":
        fields = {k: v for k, v in fields.items() if k in Run.model_fields}
        return Run(**cli.dataset_fields(fields))
    return fields


def python(program, args):
    if args[0] in ("-m", "-c"):
        return
    script = ROOT / args[0]
    assert script.exists(), f"{args[0]}: no such script"
    if script.parent.name != "data_scripts" or args[1:] == ["--help"]:
        return
    with pytest.raises(Parsed):
        parse_only(script, args[1:])


def torchrun(program, args):
    at = args.index("mla_nb.cli")
    ours("mla", args[at + 1 :])


@pytest.mark.parametrize(
    "where, words",
    ALL,
    ids=[f"{where}: {' '.join(words)[:70]}" for where, words in ALL],
)
def test_command_is_understood(where, words):
    args = [w for w in words if w not in ("…", "...")]
    if any(re.search(r"\bNN?\b|DIR|FILE\b", w) for w in args) and args[0] == "make":
        args = [re.sub(r"=NN?$", "=10", w) for w in args]
    understood(args)


def test_wrong_commands_are_found():
    for line, error in (
        ("make dmeo", AssertionError),
        ("mla train --methd mla", Exception),
        ("mla tarin --method mla", AssertionError),
        ("papermill nbs/experiments/run.ipynb o.ipynb -p epoch 3", AssertionError),
        ("papermill nbs/nothing.ipynb o.ipynb -p epochs 3", AssertionError),
        ("python data_scripts/prepare_cremad.py --rot X", SystemExit),
        ("python data_scripts/prepare_nothing.py", AssertionError),
        ("mla tabel runs", AssertionError),
    ):
        with pytest.raises(error):
            understood(shlex.split(line))


def test_something_is_checked():
    "At least these are told to readers somewhere"
    seen = {words[0] for _, words in ALL}
    assert {
        "make",
        "mla",
        "papermill",
        "python",
    } <= seen and len(ALL) > 40


def test_scripts_answer_help():
    for script in SCRIPTS:
        with (
            pytest.raises(SystemExit) as done,
            patch.object(sys, "argv", [script.name, "--help"]),
        ):
            runpy.run_path(str(script), run_name="__main__")
        assert done.value.code in (0, None), script.name


@pytest.mark.parametrize("file", [f for f in TEXTS if f.exists()], ids=lambda f: f.name)
def test_python_blocks_run(file, tmp_path, monkeypatch):
    from mla_nb.core import datasets, discover, encoders, methods, rules

    discover()  # before: what a block registers is forgotten, what it imports is not
    monkeypatch.chdir(tmp_path)
    for code in blocks(file, "python"):
        for old, new in SMALLER:
            code = code.replace(old, new)
        with (
            patch.dict(methods),
            patch.dict(rules),
            patch.dict(datasets),
            patch.dict(encoders),
        ):
            exec(compile(code, file.name, "exec"), {"__name__": "block"})


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_solutions(path):
    "One for every exercise, hidden, with code that is Python"
    text = markdown(path)
    for code in blocks(path, "python"):
        ast.parse(code)
    if "## Exercises" not in text:
        return
    exercises = re.findall(
        r"^(\d+)\. ", text.split("## Exercises")[1].split("\n## ")[0], re.M
    )
    solved = re.findall(
        r"<details><summary>Exercise (\d+)</summary>\n\n(.*?)\n\n</details>", text, re.S
    )
    assert [k for k, _ in solved] == exercises, (
        f"{path.name}: exercises {exercises}, solutions {[k for k, _ in solved]}"
    )
    assert all(len(s.split()) > 5 for _, s in solved)
