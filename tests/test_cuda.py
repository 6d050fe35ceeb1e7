"""Every stage on a CUDA device that computes nothing (fake_cuda.py).

Checked are shapes, dtypes, devices, what fused kernels ask for, that a training step never waits, and the
number of kernels that docs/speed.md says.
"""

import json
import sys

import pytest
import torch

from conftest import ROOT, shell
from tools import prepare

pytestmark = pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch asks for a real GPU")

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


def stages(config, world, *words):
    """Runs all stages of `config` as the first of `world` processes -> (stages, lines that wait) or fails."""
    words = [f"configs/{config}.yaml", world, *SHORT, f"data.train_images={64 * world}", *words]  # four steps
    done = shell(sys.executable, "tests/fake_cuda.py", *words, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return len(lines), {line for stage in lines for line in stage["waits"]}


@pytest.mark.parametrize("config, world, words", [
    pytest.param("demo_nac", 1, NAC, marks=pytest.mark.slow),  # one step of a NAC is counted below
    ("demo_vmoe", 8, VMOE),
    pytest.param("demo_nac", 8, ["assemble.graph=planted_partition", "train.student.regularizer=1"],
                 marks=pytest.mark.slow),
    pytest.param("demo_vmoe", 1, ["precision=float32"], marks=pytest.mark.slow),
])
def test_no_stage_mixes_devices_or_waits_for_the_gpu(glyphs, config, world, words):
    # 14 commands, of which two assemble and the others train
    assert stages(config, world, f"data.root={glyphs}", *words) == (14, set())


@pytest.mark.parametrize("config, gigabytes", [("imagenet_nac", 98), ("tiny_imagenet_nac", 87)])
def test_a_step_of_a_nac_has_few_kernels(config, gigabytes):
    words = ["tests/fake_cuda.py", "count", f"configs/{config}.yaml"]
    done = shell(sys.executable, *words, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert found["kernels"] <= 2900 and found["casts"] <= 560 and found["gigabytes"] <= gigabytes, found
