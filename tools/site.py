"""The executed chapters and the API as a web site, from packages of the index only.

    site.py build [DIR]     write the site to DIR (default: _site/html)
    site.py check [DIR]     every internal link and anchor of a built site resolves

Chapters are shown as they are stored: nothing is executed. Pages of the API are written
from signatures and docstrings.
"""

import inspect
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from nbformat.v4 import new_markdown_cell

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
HIDDEN = re.compile(r"^\s*#\s*\|\s*(hide\s*$|default_exp|export\s*$|exporti)", re.M)
ECHO = re.compile(r"^\s*#\s*\|\s*echo:\s*false", re.M)
ALT = re.compile(r"^\s*#\s*\|\s*fig-alt:\s*(.+)$", re.M)
WIDGET = "application/vnd.jupyter.widget-view+json"
PARTS = [
    ("I. The method in an evening", range(0, 12)),
    ("II. Rivals and yardsticks", range(12, 23)),
    ("III. Real encoders, real data", range(23, 40)),
    ("IV. Experiments that survive", range(40, 55)),
    ("V. Findings", range(55, 58)),
    ("Reference", range(58, 59)),
]


def settings():
    c = ConfigParser(delimiters=["="])
    c.read(ROOT / "settings.ini")
    return c["DEFAULT"]


def chapters():
    "Number -> path of every chapter"
    return {
        p.name.split("_")[0]: p for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    }


def badges(path):
    "Links that open a chapter elsewhere, once settings.ini names a public repository"
    s = settings()
    found = re.match(r"https://github\.com/([\w.-]+/[\w.-]+)", s["git_url"])
    if not found:
        return ""
    where = f"{found[1]}/blob/{s['branch']}/{path.relative_to(ROOT)}"
    binder = (
        f"https://mybinder.org/v2/gh/{found[1]}/{s['branch']}"
        f"?labpath={path.relative_to(ROOT)}"
    )
    return (
        f"[Open in Colab](https://colab.research.google.com/github/{where}) · "
        f"[Open in Binder]({binder})\n\n"
    )


def page(path):
    "A chapter as a notebook that any renderer shows well"
    nb, out = nbformat.read(path, 4), []
    for c in nb.cells:
        if c.cell_type == "code":
            if HIDDEN.search(c.source):
                continue
            if ECHO.search(c.source):
                c.metadata["tags"] = ["remove-input"]
            alt = ALT.search(c.source)
            if alt:
                c.metadata["mystnb"] = {"image": {"alt": alt[1]}}
            c.source = DIRECTIVE.sub("", c.source).strip("\n")
            c.outputs = [
                o
                for o in c.outputs
                if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"
            ]
        else:
            c.source = linked(c.source, path)
        out.append(c)
    if out and out[0].cell_type == "markdown" and path.stem != "index":
        number = path.stem.split("_")[0]
        head, _, rest = re.sub(
            r"\n\n\[!\[Open in .*?(?=\n\n|\Z)", "", out[0].source, flags=re.S
        ).partition("\n")  # pictures from elsewhere
        out[
            0
        ].source = f"{head.replace('# ', f'# {number} · ', 1)}\n\n{badges(path)}{rest}"
    nb.cells = out
    nb.metadata = {
        "kernelspec": {
            "name": "python3",
            "display_name": "python3",
            "language": "python",
        },
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return nb


def linked(text, path):
    """Links to files that are no pages go to the repository.

    They become plain text where it has no address.
    """
    url = settings()["git_url"].rstrip("/")

    def one(m):
        label, target = m[1], m[2]
        if re.match(r"https?:|#|mailto:", target):
            return m[0]
        file = (path.parent / target.split("#")[0]).resolve()
        if (
            file.suffix == ".ipynb"
            and "experiments" not in file.parts
            and file.exists()
        ):
            return m[0]
        return (
            f"`{label.strip('`')}`"
            if "example.invalid" in url
            else (
                f"[{label}]({url}/blob/{settings()['branch']}/{file.relative_to(ROOT)})"
            )
        )

    parts = re.split(
        r"(^```.*?^```)", text, flags=re.S | re.M
    )  # heads[m](z) in code is no link
    return "".join(
        t if k % 2 else re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", one, t)
        for k, t in enumerate(parts)
    )


def api(module):
    "One module's page: every exported name with its signature, line and parameters"
    m = import_module(module)
    lines = [f"# {module}", "", (inspect.getdoc(m) or "").strip(), ""]
    for name in m.__all__:
        x = getattr(m, name)
        if getattr(x, "__module__", module) != module:
            continue
        if inspect.isclass(x) or inspect.isfunction(x):
            lines += entry(name, x)
    return "\n".join(lines) + "\n"


def entry(name, x):
    kind = "class " if inspect.isclass(x) else ""
    try:
        signature = re.sub(
            r"functools\.partial\(<.*?>[^)]*\)|<[^<>]*>",
            "...",
            str(inspect.signature(x)).replace("mla_nb.", ""),
        )  # objects that have no notation
    except (ValueError, TypeError):
        signature = "(...)"
    doc = inspect.getdoc(x) or ""
    if doc.startswith(name + "("):
        doc = ""  # a dataclass without words of its own
    out = [
        f"## {name}",
        "",
        "```python",
        f"{kind}{name}{signature}",
        "```",
        "",
        doc,
        "",
    ]
    rows = params(x)
    if rows:
        out += [
            "| parameter | default | what it is |",
            "|:--|:--|:--|",
            *(f"| `{n}` | {d} | {t} |" for n, d, t in rows),
            "",
        ]
    if inspect.isclass(x):
        for k, f in vars(x).items():
            if (
                k[0] != "_"
                and (inspect.isfunction(f) or isinstance(f, (property, classmethod)))
                and inspect.getdoc(getattr(f, "__func__", f))
            ):
                out += [f"**`{k}`**: {inspect.getdoc(getattr(f, '__func__', f))}", ""]
    return out


def params(x):
    "(name, default, what it is) from the comments beside the parameters"
    from fastcore.docments import docments

    try:
        found = docments(x, full=True)
    except (TypeError, OSError, ValueError, SyntaxError, AttributeError):
        return []  # made at run time: no source

    def plain(v):
        return "" if v in (None, inspect.Parameter.empty) else str(v)

    rows = [
        (
            "returns" if n == "return" else n,
            f"`{d.default!r}`"
            if d.default is not inspect.Parameter.empty and n != "return"
            else "",
            plain(d.docment).replace("|", r"\|").replace("\n", " "),
        )
        for n, d in found.items()
        if n not in ("self", "cls")
    ]
    return (
        [r for r in rows if r[0] != "returns" or r[2]]
        if any(r[2] for r in rows)
        else []
    )


def prepare(src):
    "Sources for Sphinx"
    shutil.rmtree(src, ignore_errors=True)
    src.mkdir(parents=True)
    shutil.copy(ROOT / "docs/conf.py", src)
    for f in (ROOT / "docs/static").glob("*"):
        (src / "_static").mkdir(exist_ok=True), shutil.copy(f, src / "_static")
    found = chapters()
    lost = {n for n in found if not any(int(n) in numbers for _, numbers in PARTS)}
    if lost:
        sys.exit(
            f"tools/site.py: chapter {', '.join(sorted(lost))} belongs to no part; "
            "add it to PARTS"
        )
    for path in found.values():
        write(page(path), src / path.relative_to(ROOT / "nbs"))
    modules = sorted(
        "mla_nb." + ".".join(p.relative_to(ROOT / "mla_nb").with_suffix("").parts)
        for p in (ROOT / "mla_nb").rglob("*.py")
        if p.name[0] != "_"
    )
    (src / "api").mkdir()
    for m in modules:
        (src / f"api/{m.removeprefix('mla_nb.')}.md").write_text(api(m))
    for f in ("CONTRIBUTING", "CHANGELOG", "teaching"):
        if (ROOT / f"{f}.md").exists():
            (src / f"{f.lower()}.md").write_text(
                linked((ROOT / f"{f}.md").read_text(), ROOT / f"{f}.md")
            )
    index = page(ROOT / "nbs/index.ipynb")

    def tree(title, names):
        return (
            "```{toctree}\n:hidden:\n:caption: "
            + title
            + "\n"
            + "\n".join(names)
            + "\n```"
        )

    parts = [
        (
            t,
            [
                str(found[n].relative_to(ROOT / "nbs").with_suffix(""))
                for n in found
                if int(n) in v
            ],
        )
        for t, v in PARTS
    ]
    more = [
        f
        for f in ("teaching", "contributing", "changelog")
        if (src / f"{f}.md").exists()
    ]
    index.cells += [
        new_markdown_cell(tree(t, n))
        for t, n in [
            *parts,
            ("API", [f"api/{m.removeprefix('mla_nb.')}" for m in modules]),
            ("Project", more),
        ]
    ]
    write(index, src / "index.ipynb")


def write(nb, path):
    for i, c in enumerate(nb.cells):
        c["id"] = f"c{i}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


def build(out):
    src = out.parent / "src"
    prepare(src)
    shutil.rmtree(out, ignore_errors=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-E",
            "-W",
            "--keep-going",
            "-b",
            "html",
            "-d",
            str(src / ".doctrees"),
            str(src),
            str(out),
        ]
    )
    if done.returncode:
        sys.exit(
            "tools/site.py: the site was built with warnings; mend what is named above"
        )
    (out / ".nojekyll").touch()
    print(
        f"{out}: {len(list(out.rglob('*.html')))} pages, "
        f"{sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 2**20:.1f} "
        "MB"
    )


class Links(HTMLParser):
    "The targets and the anchors of a page"

    def __init__(self, text):
        super().__init__()
        self.to, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"):
            self.ids.add(a["id"])
        for k in ("href", "src"):
            if a.get(k):
                self.to.append(a[k])


def broken(out):
    "Links of a built site that lead nowhere"
    pages = {
        p.resolve(): Links(p.read_text(encoding="utf-8")) for p in out.rglob("*.html")
    }
    bad = []
    for p, links in pages.items():
        for to in links.to:
            u = urlsplit(to)
            if u.scheme or u.netloc or to.startswith("data:"):
                continue
            file = (p.parent / unquote(u.path)).resolve() if u.path else p
            if not file.exists():
                bad.append(f"{p.relative_to(out.resolve())}: {to}")
            elif (
                u.fragment
                and file in pages
                and unquote(u.fragment) not in pages[file].ids
            ):
                bad.append(f"{p.relative_to(out.resolve())}: {to} (no such anchor)")
    return bad


def check(out):
    bad = broken(out)
    sys.exit("\n".join(bad) + f"\n{len(bad)} broken links" if bad else 0)


if __name__ == "__main__":
    where = Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "_site/html").resolve()
    match sys.argv[1:]:
        case ["build", *_]:
            build(where)
        case ["check", *_]:
            check(where)
        case _:
            sys.exit(__doc__)
