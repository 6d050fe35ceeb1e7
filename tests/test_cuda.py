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


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """The demo's set, with few images -> its .npz."""
    path = tmp_path_factory.mktemp("cuda") / "glyphs.npz"
    prepare.glyphs(path, train=512, validation=32, test=32)
    return path


@pytest.mark.parametrize("config, world, words", [
    pytest.param("demo_nac", 1, [*MORE, "train.student.regularizer=0.1"],
                 marks=pytest.mark.slow),  # one step of a NAC is counted below
    ("demo_vmoe", 8, [*MORE, "student.balance=0.01", "student.capacity=1.5"]),
    pytest.param("demo_nac", 8, ["assemble.graph=planted_partition", "train.student.regularizer=1"],
                 marks=pytest.mark.slow),
    pytest.param("demo_vmoe", 1, ["precision=float32"], marks=pytest.mark.slow),
])
def test_no_stage_mixes_devices_or_waits_for_the_gpu(glyphs, config, world, words):
    """In the first of `world` processes."""
    words = [f"data.root={glyphs}", *SHORT, f"data.train_images={64 * world}", *words]  # four steps
    words = ["tests/fake_cuda.py", f"configs/{config}.yaml", world, *words]
    done = shell(sys.executable, *words, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    # 14 commands, of which two assemble and the others train
    assert len(stages) == 14 and not any(stage["waits"] for stage in stages), stages


@pytest.mark.parametrize("config, gigabytes", [("imagenet_nac", 98), ("tiny_imagenet_nac", 87)])
def test_a_step_of_a_nac_has_few_kernels(config, gigabytes):
    words = ["tests/fake_cuda.py", "count", f"configs/{config}.yaml"]
    done = shell(sys.executable, *words, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert found["kernels"] <= 2900 and found["casts"] <= 530 and found["gigabytes"] <= gigabytes, found
