"""Every stage on a CUDA device that computes nothing (fake_cuda.py).

Checked are shapes, dtypes, devices, what fused kernels ask for, and that a training step never waits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import prepare

ROOT = Path(__file__).parent.parent
SHORT = ["data.validation_images=null", "data.test_images=0", "train.*.epochs=1", "train.*.batch=16"]
# What no demo uses, so that it is seen too.
MORE = ["train.*.drop_path=0.1", "data.mixup=0.5", "data.cutmix=0.5", "data.smoothing=0.1",
        "data.erasing=0.5"]
NAC = [*MORE, "train.student.regularizer=0.1"]
VMOE = [*MORE, "student.balance=0.01", "student.capacity=1.5"]


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """The demo's set, with few images -> its .npz."""
    path = tmp_path_factory.mktemp("cuda") / "glyphs.npz"
    prepare.glyphs(path, train=512, validation=32, test=32)
    return path


def stages(config, world, *words, root=ROOT):
    """Runs all stages of `config` as the first of `world` processes -> (stages, lines that wait) or fails."""
    command = [sys.executable, "tests/fake_cuda.py", f"configs/{config}.yaml", str(world), *SHORT,
               f"data.train_images={64 * world}", *words]  # four steps
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return len(lines), {line for stage in lines for line in stage["waits"]}


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch asks for a real GPU")
@pytest.mark.parametrize("config, world, words", [
    pytest.param("demo_nac", 1, NAC, marks=pytest.mark.slow),  # test_speed.py runs one step of a NAC so
    ("demo_vmoe", 8, VMOE),
    pytest.param("demo_nac", 8, ["assemble.graph=planted_partition", "train.student.regularizer=1"],
                 marks=pytest.mark.slow),
    pytest.param("demo_vmoe", 1, ["precision=float32"], marks=pytest.mark.slow),
])
def test_no_stage_mixes_devices_or_waits_for_the_gpu(glyphs, config, world, words):
    # 14 commands, of which two assemble and the others train
    assert stages(config, world, f"data.root={glyphs}", *words) == (14, set())
