"""What all tests share: where the code is, one thread, ways to run a command, small sets of images."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
# Tests fork, and a process with a GPU cannot after a backward pass, not even one on its CPU. So it is hidden
# from all but what test_gpu.py starts. (Counting asks the driver and starts nothing.)
VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU = {VISIBLE: os.environ.get(VISIBLE, "0")} if torch.cuda.device_count() else {}
os.environ[VISIBLE] = ""
torch.set_num_threads(1)  # at the tests' sizes a second thread costs more than it gives

import data  # noqa: E402
import models  # noqa: E402

# ---------- Running commands

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def shell(*words, env=(), **options):
    """Runs a command line as a user would -> CompletedProcess."""
    return subprocess.run([str(word) for word in words], env=ENV | dict(env), text=True,
                          **{"capture_output": True, "timeout": 120, **options})


def run_main(script, *words):
    """Runs a script's main() in this process -> its exit code. A traceback fails the test by itself."""
    argv, sys.argv = sys.argv, [f"{script}.py", *map(str, words)]
    code = 0
    try:
        models.run(importlib.import_module(Path(script).name).main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for number in data.SIGNALS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    gc.collect()  # gives back what the end of a process would, such as a lock
    return code


def one_sentence(text):
    """The error in a command's output: its last line, and no traceback. argparse names the script first."""
    assert "Traceback" not in text, text
    last = text.splitlines()[-1]
    assert last.startswith("error: ") or text.startswith("usage: "), text
    return last[last.index("error: "):]


# ---------- Images and weights


def save_image(path, color=(10, 200, 30), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def write_folder(root, parts=("train", "val"), classes="ab", count=2):
    """Writes <part>/<class>/<number>.png, each with a color of its own -> root."""
    for part in parts:
        for k, name in enumerate(classes):
            for i in range(count):
                save_image(root / part / name / f"{i}.png", (40 * k, 10 * i, len(part)))
    return root


def write_npz(path, seed=0, classes="abcd", train=20, test=8, size=8, **more):
    """Writes an .npz of random images -> its path. `more`: other arrays; one that is None is left out."""
    rng, arrays = np.random.default_rng(seed), {"class_names": np.array(list(classes))}
    for split, count in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % len(classes)).astype(">i4")  # as in MNIST's files
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in (arrays | more).items() if value is not None})
    return path


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory):
    """Drawn characters of 24 classes at 16 pixels: 96 to train, 24 to validate, 48 to test -> an .npz."""
    from tools import prepare
    path = tmp_path_factory.mktemp("sets") / "glyphs.npz"
    prepare.glyphs(path, train=96, validation=24, test=48, size=16)
    return path


def fixture(name):
    """What the original's code computed, and its weights (tests/fixtures)."""
    return torch.load(Path(__file__).parent / f"fixtures/{name}.pt", weights_only=True)


class Trap:  # unpickled, it would run a command
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture(autouse=True)
def forget():
    """A command lists a folder once, and says a thing once. Tests rewrite folders within one process."""
    data._listing.cache_clear()
    data.note.cache_clear()


def pytest_configure(config):
    # What torch, multiprocessing and pytest leave behind goes with this folder when the tests end.
    config.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ["TMPDIR"] = ENV["TMPDIR"] = tempfile.tempdir = config.temporary.name
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
