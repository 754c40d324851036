"""What a finished run ends with: it removes its checkpoints, and tests compare them.

`keep_ends` copies the newest checkpoint beside the run's folder before it is removed.
Nothing else is changed. Processes that tests start call it too.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import mla_nb.runs.run as run_module
from mla_nb.train.checkpoints import States, checkpoints, read_state

remove = run_module.remove_checkpoints


def end_file(folder):
    return Path(folder).parent / f".{Path(folder).name}.end"


def copy_and_remove(folder):
    "As `remove_checkpoints`; the newest checkpoint is copied first"
    for newest in checkpoints(folder)[:1]:
        part = end_file(folder).with_suffix(".part")
        shutil.copy(newest, part)
        os.replace(part, end_file(folder))
    remove(folder)
    assert not checkpoints(folder)


@contextmanager
def keep_ends():
    with patch.object(run_module, "remove_checkpoints", copy_and_remove):
        yield


def end_of(folder) -> dict:
    "The last state of a finished run"
    state = read_state(end_file(folder), "cpu", States.holds)
    assert isinstance(state, dict), state
    return state
