"""The executed chapters and the API as a web site, from packages of the index only.

    site.py build [DIR]     write the site to DIR (default: _site/html)
    site.py check [DIR]     every internal link and anchor of a built site resolves
    site.py pdf [DIR]       Part I of a built site as part-1.pdf, by Chromium

Chapters are shown as they are stored: nothing is executed. Pages of the API are written
from signatures and docstrings, and link to the cell that builds each name.
"""

import ast
import base64
import inspect
import io
import os
import re
import shutil
import struct
import subprocess
import sys
from configparser import ConfigParser
from html import escape
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from string import Template
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
from nbformat.v4 import new_markdown_cell
from PIL import Image

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
HIDDEN = re.compile(r"^\s*#\s*\|\s*(hide\s*$|default_exp)", re.M)
EXPORT = re.compile(r"^\s*#\s*\|\s*(exports?|exporti)\b[ \t]*([\w.]*)", re.M)
ECHO = re.compile(r"^\s*#\s*\|\s*echo:\s*false", re.M)
ALT = re.compile(r"^\s*#\s*\|\s*fig-alt:\s*(.+)$", re.M)
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDTH = 88  # columns that a page shows
# Title, first chapter, what the reader learns. A part ends where the next one begins.
PARTS = [
    (
        "I. The method in an evening",
        "idea",
        "Laziness and its cure in one notebook. Then each part again with care: data, "
        "encoders, heads, the training loop, turns, projection and fusion.",
    ),
    (
        "II. Rivals and yardsticks",
        "joint_heads",
        "The methods that MLA is compared with, one mechanism per chapter; missing "
        "modalities, probes and intervals.",
    ),
    (
        "III. Real encoders, real data",
        "prepared",
        "From files to samples, pretrained encoders, released checkpoints, and one "
        "chapter per dataset.",
    ),
    (
        "IV. Experiments that survive",
        "loaders",
        "Processes, checkpoints, runs, comparison, prediction, export, and the command "
        "mla.",
    ),
    (
        "V. Findings",
        "study",
        "How the comparisons were made, and what they answer.",
    ),
    ("Reference", "tools", "The tools that every chapter uses."),
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


def parts():
    "(title, what the reader learns, numbers) of every part of the book"
    found = chapters()
    begins = {p.stem.split("_", 1)[1]: n for n, p in found.items()}
    lost = [first for _, first, _ in PARTS if first not in begins]
    if lost or begins[PARTS[0][1]] != min(found):
        sys.exit(
            "tools/site.py: PARTS must name the first chapter of every part by its "
            f"name without number; not a chapter, or not the first: {lost or PARTS[0]}"
        )
    starts = [begins[first] for _, first, _ in PARTS] + ["~"]
    return [
        (title, text, [n for n in found if a <= n < b])
        for (title, _, text), a, b in zip(PARTS, starts, starts[1:])
    ]


def repository():
    "The public repository's NAME/REPOSITORY, or None while settings.ini names none"
    found = re.match(r"https://github\.com/([\w.-]+/[\w.-]+)", settings()["git_url"])
    return found and found[1].removesuffix(".git")


def badges(path):
    "Links that open a chapter elsewhere, once settings.ini names a public repository"
    s, found = settings(), repository()
    if not found:
        return ""
    where = f"{found}/blob/{s['branch']}/{path.relative_to(ROOT)}"
    binder = (
        f"https://mybinder.org/v2/gh/{found}/{s['branch']}"
        f"?labpath={path.relative_to(ROOT)}"
    )
    return (
        f" · [Source](https://github.com/{where})"
        f" · [Open in Colab](https://colab.research.google.com/github/{where})"
        f" · [Open in Binder]({binder})"
    )


def tree_of(source):
    "The statements of a cell, or [] where it is no Python (magic, shell)"
    try:
        return ast.parse(DIRECTIVE.sub("", source)).body
    except SyntaxError:
        return []


def defined(source):
    "Names that the statements of a cell bind, in order"
    names = []
    for s in tree_of(source):
        for n in [s] if hasattr(s, "name") else ast.walk(s):
            if hasattr(n, "name") and n is s:
                names.append(n.name)
            elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                names.append(n.id)
    return [*dict.fromkeys(names)]


def is_check(s):
    "Whether a statement asserts and does nothing else"
    if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call):
        f = s.value.func
        return getattr(f, "id", getattr(f, "attr", "")).startswith(("test_", "check_"))
    if isinstance(s, ast.With):
        calls = [getattr(i.context_expr, "func", None) for i in s.items]
        return any(getattr(f, "id", "") == "expect_fail" for f in calls)
    if isinstance(s, ast.For):
        return all(map(is_check, s.body))
    return isinstance(s, ast.Assert)


def fold(cell, later=""):
    """What stands beside a folded cell's arrow, or None for a cell that stays open.

    Three kinds fold: imports, with calls that set something up; cells that end in a
    check, show nothing, and bind no name that the code behind them (`later`) needs; and
    what nbdev exports without showing.
    """
    body = tree_of(cell.source)
    rest = [s for s in body if not isinstance(s, (ast.Import, ast.ImportFrom))]
    found = EXPORT.search(cell.source)
    setup = all(isinstance(s, ast.Expr) and not is_check(s) for s in rest)
    if len(rest) < len(body) and setup and not cell.outputs:
        return "Imports"
    if found and found[1] != "exports":
        names = [n for n in defined(cell.source) if n[0] != "_"]
        return "Code: " + (", ".join(names[:4]) or "internals")
    if found or not rest or cell.outputs or not is_check(rest[-1]):
        return None
    if any(isinstance(s, (ast.FunctionDef, ast.ClassDef)) for s in rest):
        return None  # a definition is there to be read
    used = any(re.search(rf"\b{n}\b", later) for n in defined(cell.source))
    return None if used else "Check"


def pictures(cell):
    "(PNG, the width at which it is shown) of every picture of a cell"
    found = []
    for o in cell.outputs:
        if png := o.get("data", {}).get("image/png"):
            png = base64.b64decode(png)
            kept = o.get("metadata", {}).get("image/png", {}).get("width")
            found.append((png, kept or struct.unpack(">I", png[16:20])[0]))
    return found


def panels(png, shown):
    """Where a phone may cut a figure into panels: [0, ..., width], in shown pixels.

    Panels stand side by side with a white gap between them, and are about equally wide.
    """
    white = (np.asarray(Image.open(io.BytesIO(png)).convert("L")) >= 250).all(0)
    scale = shown / len(white)
    steps = np.flatnonzero(np.diff(np.r_[0, white, 0]))  # where gaps begin and end
    edges = [0]
    for begin, end in zip(steps[::2] * scale, steps[1::2] * scale):
        middle = (begin + end) / 2
        if end - begin >= 5 and middle - edges[-1] >= 150 and middle <= shown - 150:
            edges.append(round(middle))
    edges.append(round(shown))
    wide = np.diff(edges)
    return edges if wide.max() < 2 * wide.min() else [0, round(shown)]


def page(path):
    "A chapter as a notebook that any renderer shows well"
    nb, out = nbformat.read(path, 4), []
    code = [c.source if c.cell_type == "code" else "" for c in nb.cells]
    seen = set()
    for k, c in enumerate(nb.cells):
        if c.cell_type == "markdown":
            c.source = linked(c.source, path)
        elif HIDDEN.search(c.source) or only_for_export(c.source):
            continue
        else:
            names = defined(c.source) if EXPORT.search(c.source) else []
            new = [n for n in names if n not in seen]
            seen.update(new)
            if new:
                spots = "".join(f'<span id="build-{n}"></span>' for n in new)
                out.append(new_markdown_cell(spots))
            shown(c, "\n".join(code[k + 1 :]))
        out.append(c)
    if out and out[0].cell_type == "markdown" and path.stem != "index":
        out[0].source = headed(out[0].source, path)
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


def only_for_export(source):
    "Whether a cell is hidden by `export` and defines nothing"
    found = EXPORT.search(source)
    return bool(found) and found[1] != "exports" and not defined(source)


def shown(c, later):
    "Prepare a code cell: no directives, folded where it may be, pictures described"
    about = {}
    if ECHO.search(c.source):
        c.metadata["tags"] = ["remove-input"]
    elif prompt := fold(c, later):
        c.metadata["tags"] = ["hide-input", *["check"] * (prompt == "Check")]
        about["code_prompt_show"] = about["code_prompt_hide"] = prompt
    image = {}
    if alt := ALT.search(c.source):
        image["alt"] = alt[1]
    found = pictures(c)
    if found:
        image["width"] = f"{max(w for _, w in found)}px"
    if len(found) == 1 and len(edges := panels(*found[0])) > 2:
        image["classes"] = "panels-" + "-".join(map(str, edges))
    if image:
        about["image"] = image
    if about:
        c.metadata["mystnb"] = about
    c.source = DIRECTIVE.sub("", c.source).strip("\n")
    c.outputs = [
        o
        for o in c.outputs
        if WIDGET not in o.get("data", {}) and o.get("name") != "stderr"
    ]


def headed(text, path):
    "The first cell of a chapter with its number, and links to the notebook"
    number = path.stem.split("_")[0]
    head, _, rest = re.sub(
        r"\n\n\[!\[Open in .*?(?=\n\n|\Z)", "", text, flags=re.S
    ).partition("\n")  # pictures from elsewhere
    links = (
        f'<a href="notebooks/{path.name}" download>Download this notebook</a>'
        f"{badges(path)}"
    )
    return (
        f"{head.replace('# ', f'# {number} · ', 1)}\n\n"
        f'<div class="links">\n\n{links}\n\n</div>\n\n{rest}'
    )


def built():
    "(module, name) -> (chapter, section, anchor) of the cell that exports it"
    found = {}
    for path in chapters().values():
        module = section = ""
        for c in nbformat.read(path, 4).cells:
            if c.cell_type == "markdown":
                heads = re.findall(r"^## (.+)$", c.source, re.M)
                section = heads[-1] if heads else section
                continue
            if m := re.search(r"^\s*#\s*\|\s*default_exp ([\w.]+)", c.source, re.M):
                module = m[1]
            if m := EXPORT.search(c.source):
                for name in defined(c.source):
                    anchor = "" if HIDDEN.search(c.source) else f"#build-{name}"
                    found[f"mla_nb.{m[2] or module}", name] = (path, section, anchor)
    return found


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


def api(module, where):
    """One module's page: every exported name with its signature, line and parameters.

    `where` is what `built` found.
    """
    if str(ROOT) not in sys.path[:1]:
        sys.path.insert(0, str(ROOT))  # this package, not one installed elsewhere
    m = import_module(module)
    lines = [f"# {module}", "", (inspect.getdoc(m) or "").strip(), ""]
    homes = [*dict.fromkeys(v[0] for (k, _), v in where.items() if k == module)]
    links = [f"[{title(p)}](../{p.name})" for p in homes]
    lines += ["Built in " + " and ".join(links) + "." if links else "", ""]
    lines += [f'<p class="links">{source_link(m)}</p>', ""]
    for name in m.__all__:
        x = getattr(m, name)
        if getattr(x, "__module__", module) != module:
            continue
        if inspect.isclass(x) or inspect.isfunction(x):
            lines += entry(name, x, where.get((module, name)))
    return "\n".join(lines) + "\n"


def title(path):
    "10 · Fusion: ..."
    first = nbformat.read(path, 4).cells[0].source.partition("\n")[0]
    return f"{path.stem.split('_')[0]} · {first.removeprefix('# ')}"


def source_link(m):
    "A module's source: in the repository, or the copy that the site holds"
    file = Path(m.__file__).relative_to(ROOT)
    to = (
        f"https://github.com/{repository()}/blob/{settings()['branch']}/{file}"
        if repository()
        else f"../source/{file}.txt"
    )
    return f'<a href="{to}">Source of this module</a>'


def signature(name, x):
    "A name with its parameters, on one line where they fit, else one line each"
    kind = "class " if inspect.isclass(x) else ""
    try:
        found = inspect.signature(x)
    except (ValueError, TypeError):
        return f"{kind}{name}(...)"
    if kind:
        found = found.replace(return_annotation=inspect.Signature.empty)

    def plain(v):  # objects that have no notation
        return re.sub(
            r"functools\.partial\(<.*?>[^)]*\)|<[^<>]*>", "...", str(v)
        ).replace("mla_nb.", "")

    line = f"{kind}{name}{plain(found)}"
    if len(line) <= WIDTH:
        return line
    rows, kinds = [], inspect.Parameter
    values = [*found.parameters.values()]
    for k, v in enumerate(values):
        before = values[k - 1].kind if k else None
        if v.kind == kinds.KEYWORD_ONLY and before not in (
            kinds.KEYWORD_ONLY,
            kinds.VAR_POSITIONAL,
        ):
            rows.append("*")
        rows.append(plain(v))
    end = plain(found.replace(parameters=[])).removeprefix("()")
    return "\n".join([f"{kind}{name}(", *(f"    {r}," for r in rows), f"){end}"])


def entry(name, x, home):
    "A name's part of its module's page; `home` is the cell that builds it"
    doc = inspect.getdoc(x) or ""
    if doc.startswith(name + "("):
        doc = ""  # a dataclass without words of its own
    out = [
        f"## {name}",
        "",
        "```{code-block} python",
        ":class: signature",
        "",
        signature(name, x),
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
    if home:
        path, section, anchor = home
        number = path.stem.split("_")[0]
        to = f"../{path.with_suffix('.html').name}{anchor}"
        what = escape(section.replace("`", "")) or title(path)
        out += [f'<p class="built">Chapter {number}: <a href="{to}">{what}</a></p>', ""]
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


def cover():
    """The figure of README: (PNG, width, alternative text, the paragraph behind it).

    None where README has none.
    """
    cells = nbformat.read(ROOT / "nbs/index.ipynb", 4).cells
    for c, after in zip(cells, [*cells[1:], None]):
        if c.cell_type == "code" and (found := pictures(c)):
            alt = ALT.search(c.source)
            said = after.source.partition("\n\n")[0] if after else ""
            words = "" if said.startswith("#") else re.sub(r"[*`]", "", said)
            return *found[0], alt[1] if alt else "", words
    return None


def landing(found):
    "The first page: docs/landing.md with the book's parts and chapters in it"
    head = nbformat.read(ROOT / "nbs/index.ipynb", 4).cells[0].source
    promise = re.search(r"^> (.+)$", head, re.M)
    cards, contents = [], []
    for name, text, numbers in parts():
        part, _, words = name.rpartition(". ")
        links = [(found[n].stem + ".html", title(found[n])) for n in numbers]
        span = f"Chapters {numbers[0]} to {numbers[-1]}"
        cards.append(
            f'<a class="card" href="{links[0][0]}">'
            f'<span class="part">{f"PART {part}" if part else "APPENDIX"}</span>'
            f"<b>{escape(words)}</b><span>{escape(text)}</span>"
            f'<span class="range">'
            f"{span if len(numbers) > 1 else f'Chapter {numbers[0]}'}</span></a>"
        )
        rows = "".join(f'<li><a href="{to}">{escape(t)}</a></li>' for to, t in links)
        contents.append(f"<div><p>{escape(name)}</p><ul>{rows}</ul></div>")
    first = parts()[0][2][0]
    figure = ""
    if picture := cover():
        png, wide, alt, words = picture
        edges = "-".join(map(str, panels(png, wide)))
        figure = (
            f'<figure class="cover"><img src="_static/figure.png" alt="{escape(alt)}" '
            f'style="width: {wide}px" class="panels-{edges}"></figure>\n'
            f"<p>{escape(words)}</p>"
        )
    return Template((ROOT / "docs/landing.md").read_text()).substitute(
        title=settings()["title"],
        about=settings()["description"].partition(" (")[0],
        promise=re.sub(r"\*(.+?)\*", r"<em>\1</em>", promise[1]) if promise else "",
        start=found[first].stem + ".html",
        first=first,
        figure=figure,
        cards="\n".join(cards),
        contents="\n".join(contents),
    )


def tree(caption, names):
    "A hidden table of contents, which the sidebar shows under its caption"
    listed = "\n".join(names)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def prepare(src):
    "Sources for Sphinx"
    shutil.rmtree(src, ignore_errors=True)
    src.mkdir(parents=True)
    shutil.copy(ROOT / "docs/conf.py", src)
    shutil.copytree(ROOT / "docs/static", src / "_static")
    found = chapters()
    for path in found.values():
        write(page(path), src / path.name)
    modules = sorted(
        "mla_nb." + ".".join(p.relative_to(ROOT / "mla_nb").with_suffix("").parts)
        for p in (ROOT / "mla_nb").rglob("*.py")
        if p.name[0] != "_"
    )
    (src / "api").mkdir()
    where = built()
    rows = []
    for m in modules:
        short = m.removeprefix("mla_nb.")
        text = api(m, where)
        (src / f"api/{short}.md").write_text(text)
        rows.append(f"| [{short}]({short}.md) | {text.split(chr(10))[2]} |")
    (src / "api/index.md").write_text(
        "# API\n\nThe modules of `mla_nb`. Each name links to the cell of the chapter "
        "that builds it.\n\n| module | what it holds |\n|:--|:--|\n"
        + "\n".join(rows)
        + "\n\n"
        + tree("API", [f"{m.removeprefix('mla_nb.')}" for m in modules])
    )
    readme = page(ROOT / "nbs/index.ipynb")
    readme.cells[0].source = re.sub("^# .+", "# README", readme.cells[0].source)
    write(readme, src / "readme.ipynb")
    more = ["readme", "api/index"]
    for f in ("teaching", "CONTRIBUTING", "CHANGELOG"):
        if (ROOT / f"{f}.md").exists():
            (src / f"{f.lower()}.md").write_text(
                linked((ROOT / f"{f}.md").read_text(), ROOT / f"{f}.md")
            )
            more.append(f.lower())
    if picture := cover():
        (src / "_static/figure.png").write_bytes(picture[0])
    (src / "index.md").write_text(
        landing(found)
        + "\n"
        + "\n".join(tree(t, [found[n].stem for n in v]) for t, _, v in parts())
        + tree("Project", more)
    )


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
    (out / "notebooks").mkdir()
    for path in chapters().values():
        shutil.copy(path, out / "notebooks")
    if not repository():
        for p in (ROOT / "mla_nb").rglob("*.py"):
            copy = out / f"source/{p.relative_to(ROOT)}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(p, copy)
    (out / "part-1.html").write_text(printed(out), encoding="utf-8")
    print(
        f"{out}: {len(list(out.rglob('*.html')))} pages, "
        f"{sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 2**20:.1f} "
        "MB"
    )


def printed(out):
    "The chapters of Part I of a built site as one page, for printing"
    name, _, numbers = parts()[0]
    found = chapters()
    pages = {found[n].stem + ".html": n for n in numbers}
    whole = []
    for file, n in pages.items():
        text = (out / file).read_text(encoding="utf-8")
        body = re.search(r"<article role=\"main\".*?>(.*)</article>", text, re.S)[1]
        body = re.sub(r'<a class="headerlink".*?</a>', "", body, flags=re.S)
        body = re.sub(r'\bid="', f'id="{n}-', body)
        whole.append(
            f'<section class="chapter" id="{n}-">{inside(body, n, pages)}</section>'
        )
    head = re.search(r"<head>.*?</head>", text, re.S)[0]
    head = re.sub(r"<title>.*?</title>", f"<title>{escape(name)}</title>", head)
    head = re.sub(r'<link rel="(next|prev|index|search)".*?>', "", head)
    scripts = re.findall(r"<script[^>]*(?:katex|site)[^>]*></script>", text)
    rows = "".join(
        f'<li><a href="#{n}-">{escape(title(found[n]))}</a></li>' for n in numbers
    )
    return (
        f'<!doctype html>\n<html lang="en">\n{head}\n<body>\n'
        f'<article role="main" class="printed">\n'
        f'<p class="no-print"><a href="index.html">Back to the book</a></p>\n'
        f"<h1>{escape(name)}</h1>\n<p>{escape(settings()['description'])}</p>\n"
        f"<ul>{rows}</ul>\n"
        + "\n".join(whole)
        + "\n</article>\n"
        + "\n".join(s for s in scripts if s not in head)
        + "\n</body>\n</html>\n"
    )


def inside(body, n, pages):
    "Links between chapters of one printed page; those that leave it become plain text"

    def one(m):
        to, words = m[2], m[4]
        if urlsplit(to).scheme:
            return m[0]
        file, _, anchor = to.partition("#")
        if file and file not in pages:
            return words
        return (
            f'<a{m[1]}href="#{pages[file] if file else n}-{anchor}"{m[3]}>{words}</a>'
        )

    return re.sub(r'<a([^>]*?)href="([^"]*)"([^>]*)>(.*?)</a>', one, body, flags=re.S)


def pdf(out):
    "Part I as a PDF, printed by Chromium"
    from playwright.sync_api import sync_playwright

    chromium = (
        os.environ.get("CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("google-chrome")
    )
    if not chromium:
        sys.exit("tools/site.py: there is no Chromium; name it in CHROMIUM")
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.goto((out / "part-1.html").as_uri())
        page.evaluate("document.fonts.ready")
        page.pdf(
            path=out / "part-1.pdf",
            format="A4",
            print_background=True,
            outline=True,
            tagged=True,
            margin=dict.fromkeys(("top", "bottom", "left", "right"), "18mm"),
        )
        browser.close()
    whole = out / "part-1.html"
    text = whole.read_text(encoding="utf-8")
    if "part-1.pdf" not in text:
        link = 'Back to the book</a> · <a href="part-1.pdf">PDF</a>'
        text = text.replace("Back to the book</a>", link, 1)
        whole.write_text(text, encoding="utf-8")
    print(f"{out / 'part-1.pdf'}: {(out / 'part-1.pdf').stat().st_size / 2**20:.1f} MB")


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
        case ["pdf", *_]:
            pdf(where)
        case _:
            sys.exit(__doc__)
