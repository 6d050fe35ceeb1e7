"""A NAC as a CUDA graph (docs/nac_cuda_graph.patch): its memory rules, on a CPU."""

import subprocess
import sys
from pathlib import Path

import torch

import models
from conftest import ENV, ROOT


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


RUN = f"""import runpy, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import test_cuda_graph
torch.cuda.make_graphed_callables = test_cuda_graph.make_graphed_callables
torch.compile = lambda model, **_: model
runpy.run_path("finetune.py", run_name="__main__")
"""


def test_a_graphed_nac_trains_to_the_same_bits(tmp_path, glyphs):
    """Fine-tuning with two micro-batches and drop path, in float32."""
    for file in ROOT.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    patch = ["git", "apply", ROOT / "docs/nac_cuda_graph.patch"]
    subprocess.run(patch, cwd=tmp_path, check=True, env={**ENV, "GIT_DIR": str(tmp_path)})
    text, condition = (tmp_path / "models.py").read_text(), 'self.process.device.type == "cuda"'
    assert text.count(condition) == 1
    (tmp_path / "models.py").write_text(text.replace(condition, "True"))
    (tmp_path / "run.py").write_text(RUN)
    words = ["--config", ROOT / "configs/demo_nac.yaml", "role=baseline", f"data.root={glyphs}", "device=cpu",
             "data.image_size=16", "data.train_images=64", "data.validation_images=null", "meta.patch=4",
             "teacher.patch=4", "data.robustness=[]", "data.test_images=0", "student.latents=[4, 8, 2]",
             "train.student.batch=8", "train.student.accumulate=2", "train.student.epochs=2",
             "train.student.drop_path=0.2", "train.student.regularizer=0"]
    found = []
    for compile in ("false", "true"):
        command = [sys.executable, "run.py", *words, f"compile={compile}", f"output_dir={compile}"]
        done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0 and ("compiled" in done.stdout) == (compile == "true"), done
        found.append(models.read(tmp_path / compile / "baseline.pt")["model"])
    assert not [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
