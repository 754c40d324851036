"""Shared by all tests: one thread, and where the real data lies (tests that need it skip, with a reason, where it does not)."""
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def real_archive():
    "The Free Spoken Digit Dataset, where it is at hand"
    path = Path(os.environ.get("FSDD_ARCHIVE", SHARED / "data/free-spoken-digit-dataset.zip"))
    if not path.exists(): pytest.skip("the real recordings are not here; set FSDD_ARCHIVE to their zip file")
    return path


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    "A made archive in the layout of the real one"
    from mla_nb.data.digits import miniature
    return miniature(tmp_path_factory.mktemp("tones") / "tones.zip", per=12)


def pytest_terminal_summary(terminalreporter):
    "What test_parity has checked, and what not yet"
    reports = [r for rs in terminalreporter.stats.values() for r in rs if hasattr(r, "user_properties")]
    lines = sorted({v for r in reports for k, v in r.user_properties if k == "parity"})
    if lines:
        terminalreporter.section("parity with the released code")
        for line in lines: terminalreporter.write_line(line)
