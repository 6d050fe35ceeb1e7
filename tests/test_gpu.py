"""On a GPU, against the CPU; skipped where there is none.

  - Models give a CPU's outputs and gradients, in float32 and in bfloat16, mixtures with idle experts too.
  - A training step waits for nothing.
  - A run that is killed and goes on ends with the weights of an unbroken one.
"""

import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

import models
from conftest import GPU
from test_runs import PIPELINE, STUDENTS, shell, stopped, weights, write_config

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")

norm = np.linalg.norm
MODELS = {  # and their inputs
    "ViT": (lambda: models.ViT(32, 8, 64, 4, [2, 2], 10), (4, 3, 32, 32)),
    "V-MoE": (lambda: models.ViT(32, 8, 64, 4, [2, 2], 10, moe={"experts": 8}), (4, 3, 32, 32)),
    # A read-in of 320 channels, more than fused attention's 256
    "NAC": (lambda: models.NAC(64, 512, 4, 32, (16, 32, 8), 2, 10), (4, 3, 64, 64)),
    "mixture": (lambda: models.MoE(64, 128, 8), (4, 64, 64)),
}


def gradients(name, device, bf16=False, env=()):
    """Output and gradients of the input and of all parameters, float64."""
    os.environ.update(env)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    if name == "mixture":
        model.apply(lambda m: models.init_linear(m, 0.1))
        model.router.bias.data[:2] = 100  # six experts get nothing
    model, x = model.to(device).eval(), x.to(device).requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        out = model(x)
    (out.float().square().sum() / 100).backward()
    found = {"output": out, "input": x.grad, **{n: p.grad for n, p in model.named_parameters()}}
    found = {name: torch.zeros(()) if g is None else g for name, g in found.items()}
    return {name: g.detach().double().cpu().numpy() for name, g in found.items()}


@pytest.fixture(scope="module")
def another():
    """A process for what runs on the GPU, which is hidden from this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-4), (True, 0.06)])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_a_cpu(another, name, bf16, tolerance):
    here, there = gradients(name, "cpu"), another.submit(gradients, name, "cuda", bf16, GPU).result()
    for part in ("output", "input"):
        assert norm(here[part] - there[part]) < tolerance * norm(here[part]), part
    whole, apart = norm([*map(norm, here.values())]), norm([norm(here[part] - there[part]) for part in here])
    assert apart < tolerance * whole
    if name == "mixture":
        assert not there["fc1_weight"][2:].any() and not there["fc2_bias"][2:].any()


WAITS = ("import runpy, sys, torch; torch.cuda.set_sync_debug_mode('warn'); sys.argv = sys.argv[1:]; "
         "runpy.run_path(sys.argv[0], run_name='__main__')")


def waits(script, *words):
    """Runs a stage -> {line of the code: how often the processor waited for the GPU there}."""
    done = shell(sys.executable, "-W", "always", "-c", WAITS, f"{script}.py", *words, env=GPU)
    assert done.returncode == 0, done
    lines = re.findall(r"(\S+\.py:\d+): UserWarning: called a synchronizing", done.stderr)
    return {line: lines.count(line) for line in lines}


@pytest.mark.parametrize("student", STUDENTS)
def test_a_training_step_waits_for_nothing(tmp_path, student):
    """An epoch of twice as many steps waits as often."""
    words = ["device=cuda", "precision=bfloat16", "train.*.epochs=1", "data.erasing=0.5",
             "teacher.depths=[1,1,1]"]
    for script, role in (PIPELINE[0], *PIPELINE[4:7]):
        found = []
        for images in (67, 131):  # 4 steps and 8, of two batches each
            folder = tmp_path / str(images)
            path = write_config(folder, student)
            own = ["--config", path, *words, f"data.train_images={images}"]
            found.append(waits(script, f"role={role}", *own))
            if role == "meta":  # it will teach, too
                done = shell(sys.executable, "tools/convert.py", f"teacher={folder}/run/meta.pt", *own)
                assert done.returncode == 0, done
        assert found[0] == found[1], (script, role)


@pytest.mark.parametrize("student, compiled", [
    *((student, "false") for student in STUDENTS),
    *(pytest.param(student, "true", marks=pytest.mark.slow) for student in STUDENTS)])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, student, compiled):
    """Each stage is stopped after its second epoch by SIGTERM, and started again."""
    paths = {name: write_config(tmp_path / name, student) for name in ("broken", "unbroken")}
    for script, role in (PIPELINE[0], PIPELINE[4], PIPELINE[7]):
        for name in paths:
            line = [sys.executable, f"{script}.py", "--config", paths[name], f"role={role}", "device=cuda",
                    "train.*.epochs=4", "distill.alpha=0", f"compile={compiled}"]
            if name == "broken":
                text, code = stopped(line, os.kill, env=GPU)
                assert code == 143, text
            assert (done := shell(*line, env=GPU, timeout=900)).returncode == 0, done
            assert ("resumed at step" in done.stdout) == (name == "broken")
    for file in ("meta.pt", "baseline.pt", *(f"student_modules/{i}.pt" for i in range(3))):
        broken, unbroken = (weights(tmp_path / name / "run" / file) for name in paths)
        assert torch.equal(broken, unbroken), file
