"""What all tests share: where the code is, one thread, a small set of images, the marker of slow tests."""

import functools
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(ROOT))
# Tests fork, and a process with a GPU cannot after a backward pass, not even one on its CPU. So it is hidden
# from all but what test_gpu.py starts. (Counting asks the driver and starts nothing.)
VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU = {VISIBLE: os.environ.get(VISIBLE, "0")} if torch.cuda.device_count() else {}
os.environ[VISIBLE] = ""
torch.set_num_threads(1)  # at the tests' sizes a second thread costs more than it gives

import data  # noqa: E402
import models  # noqa: E402

# Each command puts the source of its keys into --help. Finding it takes half a second: here it is found once.
inspect.getsource = functools.cache(inspect.getsource)
for block in models.BLOCKS.values():
    inspect.getsource(block)


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory):
    """Drawn characters of 24 classes at 16 pixels: 96 to train, 24 to validate, 48 to test -> an .npz."""
    from tools import prepare
    path = tmp_path_factory.mktemp("sets") / "glyphs.npz"
    prepare.glyphs(path, train=96, validation=24, test=48, size=16)
    return path


@pytest.fixture(autouse=True)
def forget():
    """A command lists a folder once, and says a thing once. Tests rewrite folders within one process."""
    data._listing.cache_clear()
    data.note.cache_clear()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
