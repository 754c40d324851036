"""Notebook chores that need no Quarto.

nbs.py run 10 [11 …]      execute chapters in place and store them clean
nbs.py solutions [10 …]   run the exercises' solutions after their chapters, and say
                          what fails or prints something else than it says there
nbs.py test [-jN] [10 …]  run chapters with nbdev's tests, N at a time
nbs.py examples           execute the notebooks of experiments/ with the small runs that
                          their first cells name, and store the outputs
nbs.py papermill …        papermill, with the same arguments; what its kernel says is
                          encrypted
nbs.py readme [--check]   write README.md from nbs/index.ipynb, or say whether it is up
                          to date
nbs.py publish URL        name the public repository: in settings.ini, and in every
                          chapter badges that open it in Colab or Binder with a cell
                          that installs the package there
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ENCRYPTED = Config(
    KernelManager={"transport_encryption": "auto"}
)  # else others on the machine can listen, and ipykernel warns at every start
SHARP = ["--InlineBackend.figure_formats={'retina'}"]  # stored at twice the resolution
SHARED = [  # what most chapters load at some time; torch._dynamo at the first step
    "torch._dynamo",
    "torchvision",
    "sklearn.linear_model",
    "accelerate",
    "datasets",
    "matplotlib.pyplot",
    "nbdev.test",
]
HIDE = re.compile(r"^\s*#\s*\|\s*(hide|default_exp|export|exporti)\b", re.M)


class Client(NotebookClient):
    """Leaves out what nbdev leaves out: cells marked `#| eval: false`.

    They are widgets, whose state does not belong in git.
    """

    async def async_execute_cell(self, cell, *args, **kwargs):
        if re.search(r"^\s*#\s*\|\s*eval:\s*false", cell.source, re.M):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def chapter(name):
    "A chapter by path or by number"
    if Path(name).exists():
        return Path(name)
    found = sorted((ROOT / "nbs").rglob(f"{name}_*.ipynb")) or sorted(
        (ROOT / "nbs").rglob(f"{name}.ipynb")
    )
    if not found:
        sys.exit(
            f"no chapter {name!r}; there are: "
            + ", ".join(sorted(p.stem for p in (ROOT / "nbs").rglob("[0-9]*.ipynb")))
        )
    return found[0]


def run(names):
    for path in map(chapter, names):
        nb, t = nbformat.read(path, 4), time.time()
        client = Client(
            nb,
            config=ENCRYPTED,
            timeout=600,
            extra_arguments=SHARP,
            store_widget_state=False,
            resources={"metadata": {"path": str(path.parent)}},
        )
        try:
            client.execute()
        except CellExecutionError as e:
            sys.exit(f"{path}:\n{ANSI.sub('', str(e))}")
        nb.metadata.pop("widgets", None)
        nbformat.write(nb, path)
        print(f"{path.name}: {time.time() - t:.0f} s", flush=True)
    clean()


def tested(path):
    "Run a chapter as nbdev_test does"
    from nbdev.test import test_nb

    good, seconds = test_nb(path, basepath=ROOT)
    return path.name, good, seconds


def test(names, jobs):
    """Every chapter in a process of its own, since chapters register what they define.

    Processes are forked from this one, which has imported what all chapters need.
    """
    import multiprocessing
    from importlib import import_module

    for package in SHARED:
        import_module(package)
    paths = [*map(chapter, names)] or sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        found = []
        for name, good, seconds in pool.imap_unordered(tested, paths, chunksize=1):
            print(f"{name}: {seconds:.0f} s{'' if good else ', FAILED'}", flush=True)
            found.append((name, good, seconds))
    mean = sum(seconds for *_, seconds in found) / len(found)
    print(f"{len(found)} chapters, {mean:.0f} s on average")
    if bad := [name for name, good, _ in found if not good]:
        sys.exit(f"failed: {', '.join(sorted(bad))}")


def printed(cell):
    "What a cell says: its text, or its error"
    text = [
        o.text
        if o.output_type == "stream" and o.name == "stdout"
        else f"{o.ename}: {o.evalue}"
        if o.output_type == "error"
        else o.get("data", {}).get("text/plain", "")
        for o in cell.outputs
        if "image/png" not in o.get("data", {})
    ]
    return " ".join(ANSI.sub("", " ".join(text)).split())


def solutions(names):
    """Chapter and solutions in one kernel; nothing is stored.

    An error that the solution speaks of (`# Diverged: …`) is none.
    """
    failed = 0
    for path in map(
        chapter, names or sorted(str(p) for p in (ROOT / "nbs").rglob("[0-9]*.ipynb"))
    ):
        nb = nbformat.read(path, 4)
        blocks = [
            b
            for c in nb.cells
            if c.source.startswith("**Solutions**")
            for b in re.findall(r"^```(python|text)\n(.*?)^```", c.source, re.M | re.S)
        ]
        nb.cells.append(
            nbformat.v4.new_code_cell(
                "import os, tempfile\n"
                f"if os.path.samefile('.', {str(path.parent)!r}): "
                "os.chdir(tempfile.mkdtemp())"
            )
        )  # what solutions write is not kept
        first, said = len(nb.cells), []
        for kind, text in blocks:
            if kind == "python":
                nb.cells.append(nbformat.v4.new_code_cell(text))
                said.append(None)
            elif said:
                said[-1] = " ".join(text.split())
        Client(
            nb,
            config=ENCRYPTED,
            timeout=600,
            allow_errors=True,
            store_widget_state=False,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
        for cell, text in zip(nb.cells[first:], said):
            error = next(
                (o.ename for o in cell.outputs if o.output_type == "error"), None
            )
            failed += bool(error) and error not in cell.source
            if (error and error not in cell.source) or text not in (
                None,
                printed(cell),
            ):
                print(
                    f"{path.name}:\n"
                    f"{cell.source}\n"
                    f"  it says  {text}\n"
                    f"  it gave  {printed(cell)}\n",
                    flush=True,
                )
        print(f"{path.name}: {len(said)} solutions", flush=True)
    sys.exit(f"{failed} solutions do not run" if failed else 0)


def declared(nb):
    "The names that the cell tagged `parameters` assigns"
    import ast

    cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    trees = [ast.parse(c.source) for c in cells]
    found = [n for t in trees for n in ast.walk(t) if isinstance(n, ast.Assign)]
    return {name.id for n in found for name in n.targets}


def refuse_unknown_parameters(nb):
    "Papermill itself only warns about a name that the notebook does not have"
    from mla_nb.tools import unknown

    known = declared(nb)
    for name in nb.metadata.get("papermill", {}).get("parameters", {}):
        if name not in known:
            sys.exit(str(unknown("parameter", name, known)))


def papermill(args):
    from papermill.cli import papermill as command
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, *args, **kwargs):
            refuse_unknown_parameters(args[0].nb)
            return super().execute_managed_notebook(*args, config=ENCRYPTED, **kwargs)

    papermill_engines.register(None, Engine)
    command(args, prog_name="papermill")


EXAMPLES = {
    "run": {
        "epochs": 8,
        "progress": False,
        "threads": 1,
        "dataset_args": "n_train=600,n_valid=200,n_test=300",
    },
    "compare": {"root": "runs/example"},
}  # notebook of experiments/ -> the parameters of its stored outputs
EXAMPLE_GRID = (
    "--dataset 'synthetic(n_train=320,n_valid=120,n_test=200)' "
    "--method concat,unimodal,mla --seed 0:5 --epochs 6 --root runs/example"
)


def examples():
    """Notebooks of experiments/ with the outputs of a small run.

    They are executed in an empty folder. The cells stay as they are: parameters have
    their defaults, and the first cell names those of the outputs.
    """
    import shlex
    import tempfile

    import papermill

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mla_nb.cli", "grid"]
        grid = [*command, *shlex.split(EXAMPLE_GRID), "--jobs", "1", "--device", "cpu"]
        subprocess.run(grid, cwd=folder, check=True)
        for name, parameters in EXAMPLES.items():
            path, out = (
                ROOT / f"nbs/experiments/{name}.ipynb",
                Path(folder) / "out.ipynb",
            )
            papermill.execute_notebook(
                path,
                out,
                parameters,
                kernel_name="python3",
                cwd=folder,
                progress_bar=False,
            )
            store_outputs(path, nbformat.read(out, 4))
            print(f"{path.name}: stored", flush=True)
    clean()


def store_outputs(path, executed):
    "The outputs of an executed notebook in the cells of the notebook itself"
    nb = nbformat.read(path, 4)
    injected = "injected-parameters"
    cells = [c for c in executed.cells if injected not in c.metadata.get("tags", [])]
    assert [c.source for c in cells] == [c.source for c in nb.cells]
    for cell, other in zip(nb.cells, cells):
        if cell.cell_type == "code":
            cell.outputs = other.outputs
    nbformat.write(nb, path)


def clean():
    subprocess.run(
        [str(Path(sys.executable).parent / "nbdev_clean")], cwd=ROOT, check=True
    )


def readme(check):
    """The index as Markdown: hidden cells left out, pictures with their `fig-alt`.

    Cells marked `echo: false` show their outputs only.
    """
    from nbconvert import MarkdownExporter

    nb = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [
        c for c in nb.cells if c.cell_type != "code" or not HIDE.search(c.source)
    ]
    alts = []
    for c in nb.cells:
        if c.cell_type == "code":
            if re.search(r"^#\|\s*echo:\s*false", c.source, re.M):
                c.metadata["tags"] = ["no-input"]
            if any("image/png" in o.get("data", {}) for o in c.outputs):
                alts += re.findall(r"^#\|\s*fig-alt:\s*(.+)$", c.source, re.M) or [
                    "figure"
                ]
            c.source = DIRECTIVE.sub("", c.source).strip("\n")
        else:
            c.source = re.sub(
                r"\]\((?!https?:|#|nbs/|/)([\w./-]+\.ipynb)\)", r"](nbs/\1)", c.source
            )  # links from the top level
    config = Config(
        {"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"no-input"}}}
    )
    body, res = MarkdownExporter(config=config).from_notebook_node(
        nb, resources={"output_files_dir": "docs/readme_files"}
    )
    for alt in alts:
        body = body.replace("![png](", f"![{alt}](", 1)
    body = re.sub(r"\n\s*\n(\s*\n)*", "\n\n", body).strip() + "\n"
    files = {"README.md": body.encode(), **res.get("outputs", {})}
    old = {
        "README.md",
        *(str(p.relative_to(ROOT)) for p in (ROOT / "docs/readme_files").glob("*")),
    }
    if check:
        stale = [
            n
            for n in files.keys() | old
            if n not in files
            or not (ROOT / n).exists()
            or (ROOT / n).read_bytes() != files[n]
        ]
        sys.exit(
            f"out of date: {', '.join(sorted(stale))}; run `make readme`"
            if stale
            else 0
        )
    for n in old - files.keys():
        (ROOT / n).unlink(missing_ok=True)
    for n, b in files.items():
        (ROOT / n).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / n).write_bytes(b)


BADGES = re.compile(r"\n\n\[!\[Open in Colab\].*?(?=\n\n|\Z)", re.S)
INSTALL = '''#| hide
#| eval: false
# in Colab, or wherever the package is not there yet
from importlib.util import find_spec
if not find_spec('mla_nb'):
    %pip install -q "fastcore<2" "git+{url}@{branch}"'''


def badges(path, repo, branch):
    "Two pictures that open a chapter elsewhere"
    place = path.relative_to(ROOT)
    colab = "https://colab.research.google.com"
    binder = "https://mybinder.org"
    return (
        f"\n\n[![Open in Colab]({colab}/assets/colab-badge.svg)]"
        f"({colab}/github/{repo}/blob/{branch}/{place}) "
        f"[![Open in Binder]({binder}/badge_logo.svg)]"
        f"({binder}/v2/gh/{repo}/{branch}?labpath={place})"
    )


def publish(url):
    "Once for a repository; once more, or with another address, replaces what is there"
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", url)
    if not found:
        sys.exit(
            f"{url!r} is not the address of a repository that Colab can open; "
            "expected https://github.com/NAME/REPOSITORY"
        )
    ini = (ROOT / "settings.ini").read_text()
    url, branch = (
        f"https://github.com/{found[1]}",
        re.search(r"^branch *= *(\S+)", ini, re.M)[1],
    )
    (ROOT / "settings.ini").write_text(
        re.sub(r"^(git_url *= *).*", rf"\g<1>{url}", ini, flags=re.M)
    )
    for path in sorted((ROOT / "nbs").rglob("[0-9]*.ipynb")):
        nb = nbformat.read(path, 4)
        title, _, rest = BADGES.sub("", nb.cells[0].source).partition("\n")
        nb.cells[0].source = title + badges(path, found[1], branch) + "\n" + rest
        nb.cells = [
            c
            for c in nb.cells
            if not ("%pip install" in c.source and "find_spec('mla_nb')" in c.source)
        ]
        nb.cells.insert(
            1,
            nbformat.v4.new_code_cell(
                INSTALL.format(url=url, branch=branch), id="install"
            ),
        )
        nbformat.write(nb, path)
    clean()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *names] if names:
            run(names)
        case ["publish", url]:
            publish(url)
        case ["test", jobs, *names] if re.fullmatch(r"-j\d+", jobs):
            test(names, int(jobs[2:]))
        case ["test", *names]:
            test(names, 1)
        case ["solutions", *names]:
            solutions(names)
        case ["examples"]:
            examples()
        case ["papermill", *args]:
            papermill(args)
        case ["readme"]:
            readme(False)
        case ["readme", "--check"]:
            readme(True)
        case _:
            sys.exit(__doc__)
