"""Chapters in a real JupyterLab, driven by Chromium: `make browser`.

Every cell runs, knobs move pictures, a button stops training.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, free_port

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupyterlab")
pw = pytest.importorskip("playwright.sync_api")
CHROMIUM = (
    os.environ.get("CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM, reason="there is no Chromium; install one, or name it in CHROMIUM"
    ),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}  # every cell is in the page
END, WRONG = "every cell was run", "Traceback (most recent call last)"
LONG = (
    float(os.environ.get("MLA_PATIENCE", 900)) * 1000
)  # milliseconds for a chapter, on a busy machine


class Lab:
    """A JupyterLab of its own, which wants a token.

    Settings, kernels and notebooks lie in a temporary folder.
    """

    def __init__(self, root):
        self.root, self.port, self.token = root, free_port(), secrets.token_hex(16)
        for name, value in SETTINGS.items():
            self.setting(name, value)
        env = {
            k: v
            for k, v in os.environ.items()
            if k.lower() not in ("http_proxy", "https_proxy", "mplbackend")
        }
        env.update(
            JUPYTER_TOKEN=self.token,
            JUPYTER_CONFIG_DIR=str(root / "cfg"),
            JUPYTER_DATA_DIR=str(root / "data"),
            JUPYTER_RUNTIME_DIR=str(root / "rt"),
            JUPYTERLAB_SETTINGS_DIR=str(root / "settings"),
            JUPYTERLAB_WORKSPACES_DIR=str(root / "ws"),
            IPYTHONDIR=str(root / "ipy"),
            NO_PROXY="127.0.0.1,localhost",
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS="1",
        )
        (root / "nbs").mkdir()
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--ip=127.0.0.1",
            f"--port={self.port}",
            "--ServerApp.port_retries=0",
            "--allow-root",
            "--MappingKernelManager.transport_encryption=auto",
            f"--ServerApp.root_dir={root / 'nbs'}",
        ]
        with (root / "lab.log").open("w") as log:  # the process keeps it open
            self.process = subprocess.Popen(
                command, cwd=root, env=env, stdout=log, stderr=log
            )

    def setting(self, name, value):
        path = self.root / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    def api(self, path, method="GET"):
        ask = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        return (
            urllib.request.build_opener(urllib.request.ProxyHandler({}))
            .open(ask, timeout=5)
            .read()
        )

    def wait(self):
        for _ in range(480):
            assert self.process.poll() is None, (self.root / "lab.log").read_text()[
                -3000:
            ]
            try:
                return self.api("status")
            except OSError:
                time.sleep(0.25)
        pytest.fail(
            "JupyterLab did not start: " + (self.root / "lab.log").read_text()[-3000:]
        )

    def end_kernels(self):
        for k in json.loads(self.api("kernels")):
            self.api(f"kernels/{k['id']}", "DELETE")

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    it = Lab(tmp_path_factory.mktemp("lab"))
    try:
        it.wait()
        yield it
    finally:
        it.close()


def chromium():
    "A browser, for as long as a file of tests runs"
    with pw.sync_playwright() as play:
        it = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield it
        it.close()


browser = pytest.fixture(scope="module")(chromium)


@pytest.fixture
def page(lab, browser):
    it = browser.new_page(viewport={"width": 1300, "height": 950})
    it.set_default_timeout(60_000)
    yield it
    it.close()
    lab.end_kernels()


def shot(what, name, tmp_path):
    "A screenshot that is kept: in the folder MLA_SHOTS, or with the test's other files"
    folder = Path(os.environ.get("MLA_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    what.screenshot(path=folder / f"{name}.png")


def errors(lab, name):
    return [
        "\n".join(o["traceback"])[-2000:]
        for c in nbformat.read(lab.root / "nbs" / name, 4).cells
        for o in c.get("outputs", ())
        if o["output_type"] == "error"
    ]


def run_all(lab, page, nb, name):
    "Open a notebook, run all cells, `eval: false` or not, and wait for the end"
    nb.cells.append(nbformat.v4.new_code_cell(f"print({END[:5]!r} + {END[5:]!r})"))
    nbformat.write(nb, lab.root / "nbs" / name)
    page.goto(f"http://127.0.0.1:{lab.port}/lab/tree/{name}?reset&token={lab.token}")
    page.locator(".jp-NotebookPanel .jp-Cell").first.wait_for()
    # a run asked for before the kernel is connected opens the "Select Kernel" dialog
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle")).wait_for()
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()


def finished(lab, page, name, patience=LONG):
    "Every cell was run, and none ended in an error, in the page and in the file"
    end, wrong = (
        page.locator(".jp-OutputArea-output pre", has_text=t) for t in (END, WRONG)
    )
    end.or_(wrong).first.wait_for(timeout=patience)
    page.keyboard.press("Control+s")
    for _ in range(60):
        saved = nbformat.read(lab.root / "nbs" / name, 4)
        if any(END in o.get("text", "") for o in saved.cells[-1].outputs) or errors(
            lab, name
        ):
            break
        time.sleep(0.5)
    assert not errors(lab, name) and not wrong.count(), (
        errors(lab, name) or wrong.first.inner_text()
    )
    assert end.count() == 1


def knob(page, label):
    return page.locator(
        ".widget-slider",
        has=page.locator("label", has_text=re.compile(f"^{re.escape(label)}$")),
    ).last


def moved(picture, act):
    "Do something; the picture must follow"
    old = picture.get_attribute("src")
    act()
    pw.expect(picture).not_to_have_attribute("src", old, timeout=60_000)
    assert (
        picture.evaluate("async e => { await e.decode(); return e.naturalWidth }") > 300
    )


def press(slider, key):
    "One step, one new picture: a second one would pass for the answer to the next step"
    handle = slider.locator(".noUi-handle")
    handle.focus()
    handle.press(key)


@pytest.mark.parametrize(
    "name, theme, knobs, boxes",
    [
        ("10_fusion", "Light", ["audio, A", "text, C"], ["visual is there"]),
        (
            "09_projection",
            "Light",
            ["audio, degrees", "gradient, degrees", "λ", "turns"],
            [],
        ),
        ("02_synthetic", "Dark", ["visual, expressed", "text, blank"], []),
    ],
)
def test_a_chapter_runs_and_its_knobs_move_its_picture(
    lab, page, tmp_path, name, theme, knobs, boxes
):
    lab.setting("apputils-extension/themes", {"theme": f"JupyterLab {theme}"})
    run_all(lab, page, nbformat.read(ROOT / f"nbs/{name}.ipynb", 4), f"{name}.ipynb")
    finished(lab, page, f"{name}.ipynb")
    widget = page.locator(
        ".jp-OutputArea-output .widget-vbox", has=knob(page, knobs[0])
    ).last
    picture = widget.locator("img.widget-image")
    widget.scroll_into_view_if_needed()
    shot(widget, f"{name}-before", tmp_path)
    for label in knobs:
        moved(picture, partial(press, knob(page, label), "ArrowLeft"))
    for label in boxes:
        box = widget.locator("label", has_text=label).locator("input")
        moved(picture, box.click)
    shot(widget, f"{name}-after", tmp_path)
    shot(page, f"{name}-page", tmp_path)
    assert not errors(lab, f"{name}.ipynb")


def notebook(*cells):
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells],
        metadata={
            "kernelspec": {
                "name": "python3",
                "display_name": "python3",
                "language": "python",
            }
        },
    )


def test_an_error_is_noticed(lab, page):
    "These tests can fail: a cell that raises is found, in the page and in the file"
    run_all(lab, page, notebook("1 + 1", "1 / 0"), "wrong.ipynb")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        finished(lab, page, "wrong.ipynb", 60_000)
    assert errors(lab, "wrong.ipynb")


LIVE = """
from mla_nb.core import encoders
from mla_nb.data.synthetic import synthetic
from mla_nb.heads import ConcatHead, make_net
from mla_nb.methods.base import concat
from mla_nb.train.learner import Learner, Recorder
from mla_nb.train.loaders import loaders
from mla_nb.train.watching import LiveView
s = synthetic(n_train=200, n_valid=60, n_test=60)
encs = {
    m: encoders[f'small_{mod.kind}'](mod, s.train.column(m))
    for m, mod in s.modalities.items()
}
learn = Learner(
    make_net(ConcatHead, encs, 6),
    loaders(s, {m: e.preprocessor for m, e in encs.items()}),
    concat(),
    callbacks=[Recorder(), LiveView(s.bayes)],
)
learn.fit(500)
print('epochs', learn.epoch, len(learn.history), learn.stop)
"""


def test_training_can_be_watched_and_stopped(lab, page, tmp_path):
    "The button is heard while the cell is running; without it this would be 500 epochs"
    lab.setting("apputils-extension/themes", {"theme": "JupyterLab Light"})
    run_all(lab, page, notebook(LIVE.strip()), "live.ipynb")
    picture = page.locator("img.widget-image")
    picture.wait_for(timeout=LONG)
    pw.expect(picture).to_have_attribute("src", re.compile("^blob:"), timeout=60_000)
    moved(picture, lambda: None)  # the next epoch
    page.get_by_role("button", name="Stop").click()
    said = page.locator(".jp-OutputArea-output pre", has_text=re.compile(r"^epochs"))
    said.wait_for(timeout=120_000)
    epochs, rows, stopped = said.inner_text().split()[1:]
    assert epochs == rows and stopped == "True" and 1 <= int(epochs) < 500
    pw.expect(page.locator(".widget-label", has_text="stopped after")).to_be_visible()
    shot(page, "live", tmp_path)
    finished(lab, page, "live.ipynb")
