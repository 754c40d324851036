"""Notebook chores that need no Quarto.

    nbs.py run 10 [11 …]      execute chapters in place and store them clean
    nbs.py readme [--check]   write README.md from nbs/index.ipynb, or say whether it is up to date
"""
import re, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
HIDE = re.compile(r"^\s*#\s*\|\s*(hide|default_exp|export|exporti)\b", re.M)


class Client(NotebookClient):
    "Leaves out what nbdev leaves out: cells marked `#| eval: false` (widgets, whose state does not belong in git)"
    async def async_execute_cell(self, cell, *args, **kwargs):
        if re.search(r"^\s*#\s*\|\s*eval:\s*false", cell.source, re.M): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def chapter(name):
    "A chapter by path or by number"
    if Path(name).exists(): return Path(name)
    found = sorted((ROOT / "nbs").rglob(f"{name}_*.ipynb")) or sorted((ROOT / "nbs").rglob(f"{name}.ipynb"))
    if not found: sys.exit(f"no chapter {name!r}; there are: " + ", ".join(sorted(p.stem for p in (ROOT / "nbs").rglob("[0-9]*.ipynb"))))
    return found[0]


def run(names):
    for path in map(chapter, names):
        nb, t = nbformat.read(path, 4), time.time()
        client = Client(nb, timeout=600, store_widget_state=False, resources={"metadata": {"path": str(path.parent)}})
        try: client.execute()
        except CellExecutionError as e: sys.exit(f"{path}:\n{ANSI.sub('', str(e))}")
        nb.metadata.pop("widgets", None)
        nbformat.write(nb, path)
        print(f"{path.name}: {time.time() - t:.0f} s", flush=True)
    clean()


def clean():
    subprocess.run([str(Path(sys.executable).parent / "nbdev_clean")], cwd=ROOT, check=True)


def readme(check):
    "The index as Markdown: hidden cells left out, `echo: false` cells with their outputs only, pictures with their `fig-alt`"
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb = nbformat.read(ROOT / "nbs/index.ipynb", 4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [c for c in nb.cells if c.cell_type != "code" or not HIDE.search(c.source)]
    alts = []
    for c in nb.cells:
        if c.cell_type == "code":
            if re.search(r"^#\|\s*echo:\s*false", c.source, re.M): c.metadata["tags"] = ["no-input"]
            if any("image/png" in o.get("data", {}) for o in c.outputs): alts += re.findall(r"^#\|\s*fig-alt:\s*(.+)$", c.source, re.M) or ["figure"]
            c.source = DIRECTIVE.sub("", c.source).strip("\n")
        else: c.source = re.sub(r"\]\((?!https?:|#|nbs/|/)([\w./-]+\.ipynb)\)", r"](nbs/\1)", c.source)   # links from the top level
    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"no-input"}}})
    body, res = MarkdownExporter(config=config).from_notebook_node(nb, resources={"output_files_dir": "docs/readme_files"})
    for alt in alts: body = body.replace("![png](", f"![{alt}](", 1)
    body = re.sub(r"\n\s*\n(\s*\n)*", "\n\n", body).strip() + "\n"
    files = {"README.md": body.encode(), **res.get("outputs", {})}
    old = {n for n in ("README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs/readme_files").glob("*")))}
    if check:
        stale = [n for n in files.keys() | old if n not in files or not (ROOT / n).exists() or (ROOT / n).read_bytes() != files[n]]
        sys.exit(f"out of date: {', '.join(sorted(stale))}; run `make readme`" if stale else 0)
    for n in old - files.keys(): (ROOT / n).unlink(missing_ok=True)
    for n, b in files.items():
        (ROOT / n).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / n).write_bytes(b)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *names] if names: run(names)
        case ["readme"]: readme(False)
        case ["readme", "--check"]: readme(True)
        case _: sys.exit(__doc__)
