"""What docs/speed.md says, where no GPU is needed: kernels of a step, one graph, a CUDA graph's memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from conftest import ROOT

PATCH = ROOT / "docs/nac_cuda_graph.patch"
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch asks for a real GPU")
@pytest.mark.parametrize("config, gigabytes", [("imagenet_nac", 98), ("tiny_imagenet_nac", 87)])
def test_a_step_of_a_nac_has_few_kernels(config, gigabytes):
    """The goal was 2,900; docs/speed.md says what the rest would cost."""
    command = [sys.executable, "tests/fake_cuda.py", "count", f"configs/{config}.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done
    found = json.loads(done.stdout)
    assert found["kernels"] <= 2950 and found["casts"] <= 560 and found["gigabytes"] <= gigabytes, found


def gradients(call, model, images):
    torch.manual_seed(1)
    model.zero_grad()
    logits = call(images)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def test_a_nac_compiles_into_one_graph_and_its_evaluation_into_none(monkeypatch):
    compiler, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", lambda model, **more: compiler(model, backend="aot_eager", **more))
    torch.compiler.reset()
    counters.clear()
    model = models.NAC(16, 16, 2, 8, (4, 8, 2), 1, 3, grid_width=4, tokenizer_blocks=1, signature_width=8)
    models.set_drop_path(model.train(), 0.2)
    compiled, images = models.compile_blocks(model), torch.randn(3, 3, 16, 16)
    for eager, other in zip(gradients(model, model, images), gradients(compiled, model, images)):
        assert torch.equal(eager, other)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for batch in (3, 2, 1):
        model.eval()(images[:batch])
    gradients(compiled, model.train(), images)
    assert counters["stats"]["unique_graphs"] == 1


# ---------- A NAC as a CUDA graph: docs/nac_cuda_graph.patch


def make_graphed_callables(module, inputs):
    """torch.cuda's, on a CPU: what is replayed is computed, into memory that every replay writes to again."""
    assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
    parameters, forward, training = tuple(module.parameters()), module.forward, module.training
    memory = {"input": inputs[0]}

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(context, x, *_):
            assert x.shape == memory["input"].shape
            memory["input"].copy_(x)
            with torch.enable_grad():
                memory["made"] = forward(memory["input"])
            memory.setdefault("output", torch.empty_like(memory["made"])).copy_(memory["made"].detach())
            return memory["output"].detach()

        @staticmethod
        def backward(context, gradient):
            new = torch.autograd.grad(memory["made"], parameters, gradient)
            kept = memory.setdefault("gradients", [torch.empty_like(g) for g in new])
            for g, value in zip(kept, new):
                g.copy_(value)
            return None, *(g.detach() for g in kept)

    module.forward = lambda x: Replay.apply(x, *parameters) if module.training == training else forward(x)
    return module


@pytest.mark.parametrize("preallocated, total", [(True, 11), (False, 20)])
def test_a_gradient_must_have_memory_of_its_own(preallocated, total):
    """Two micro-batches, with gradients of 1 and 10. Without it the second one is added to itself."""
    module = make_graphed_callables(nn.Linear(1, 1, bias=False), (torch.zeros(1, 1),))
    module.weight.grad = torch.zeros(1, 1) if preallocated else None
    for x in (1.0, 10.0):
        module(torch.tensor([[x]])).sum().backward()
    assert module.weight.grad.item() == total


def in_git():
    return subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.skipif(not in_git(), reason="needs a git checkout")
def test_the_patch_applies():
    done = subprocess.run(["git", "apply", "--check", PATCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUN = """
import runpy, sys
sys.path.insert(0, {tests!r})
import torch
import test_speed
torch.cuda.make_graphed_callables = test_speed.make_graphed_callables
torch.compile = lambda model, **_: model
runpy.run_path("finetune.py", run_name="__main__")
"""


@pytest.mark.skipif(not in_git(), reason="needs a git checkout")
def test_a_graphed_nac_trains_to_the_same_bits(tmp_path, glyphs):
    """Fine-tuning with two micro-batches and drop path, in float32."""
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    subprocess.run(["git", "apply", PATCH], cwd=tmp_path, check=True, env={**ENV, "GIT_DIR": str(tmp_path)})
    patched = tmp_path / "models.py"
    text = patched.read_text()
    condition = 'self.process.device.type == "cuda"'
    assert text.count(condition) == 1
    patched.write_text(text.replace(condition, "True"))
    (tmp_path / "run.py").write_text(RUN.format(tests=str(Path(__file__).parent)))
    words = ["--config", ROOT / "configs/demo_nac.yaml", "role=baseline", f"data.root={glyphs}", "device=cpu",
             "data.image_size=16", "data.train_images=64", "data.validation_images=null", "meta.patch=4",
             "teacher.patch=4", "data.robustness=[]", "data.test_images=0", "student.latents=[4, 8, 2]",
             "train.student.batch=8", "train.student.accumulate=2", "train.student.epochs=2",
             "train.student.drop_path=0.2", "train.student.regularizer=0"]
    found = []
    for compile in ("false", "true"):
        command = [sys.executable, "run.py", *words, f"compile={compile}", f"output_dir={compile}"]
        done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done
        assert ("compiled" in done.stdout) == (compile == "true")
        found.append(models.read(tmp_path / compile / "baseline.pt")["model"])
    assert not [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
