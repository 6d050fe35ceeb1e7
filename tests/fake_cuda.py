"""Runs the stages on a CUDA device that computes nothing, with torch's CPU build.

    python tests/fake_cuda.py CONFIG WORLD      all stages
    python tests/fake_cuda.py count CONFIG      the kernels of a step of fine-tuning the student

Shapes, dtypes (bfloat16 autocast) and devices are those of CUDA, so a tensor left on the CPU, a wrong dtype
or a mask that no fused kernel takes is an error. Every stage is cut off after its first step and resumed.
Prints, for each stage, the lines of a training step that wait for the GPU, as JSON. Numbers are not computed
(each .item() is 1), and kernels, NCCL and memory are not seen. A process of its own: it replaces parts of
torch.
"""

import collections
import contextlib
import ctypes
import io
import json
import math
import os
import sys
import tempfile
import traceback
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))
WAITS = collections.Counter()
# Where waiting is no harm: once in 20 steps, once an epoch, or before the first step; and in the block model,
# whose matching is done on the CPU. What an epoch does before its first step is left out too: each stage's
# list is emptied after the first step that it takes.
HARMLESS = {"block_model", "check", "end_epoch", "save", "finish", "accuracy", "resume", "frozen",
            "fit_signatures", "evaluate", "score"}


def waits(tensor):
    """Notes the line of the project that makes the CPU wait for a CUDA tensor within a training step."""
    frames = [f for f in traceback.extract_stack()
              if "site-packages" not in f.filename and f.filename != __file__]
    if tensor.device.type == "cuda" and frames and not HARMLESS & {f.name for f in frames}:
        WAITS[f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"] += 1


class Mode(FakeTensorMode):
    avoid_device_init = True  # there is no CUDA to initialize, whatever is_available() says


def lend_a_device_guard():
    """autograd asks a tensor's device for its stream. A build without CUDA has no guard; "meta"'s answers."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    registry = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[1] = registry[14]  # c10::DeviceType: 1 is CUDA, 14 Meta


def backward(root):
    """loss.backward() by walking autograd's own nodes, because its engine wants events of a real device."""
    order, seen, stack = [], {root.grad_fn}, [(root.grad_fn, iter(root.grad_fn.next_functions))]
    while stack:
        for node, _ in stack[-1][1]:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append((node, iter(node.next_functions)))
                break
        else:
            order.append(stack.pop()[0])
    gradients = {root.grad_fn: [torch.ones_like(root)]}
    with torch.no_grad():
        for node in reversed(order):
            own = gradients.pop(node, [None])
            if all(g is None for g in own):
                continue
            if hasattr(node, "variable"):  # a parameter
                p, g = node.variable, own[0]
                assert (g.device, g.dtype, g.shape) == (p.device, p.dtype, p.shape)
                p.grad = g if p.grad is None else p.grad + g
                continue
            out = node(*own) if callable(node) else node.apply(*own)
            for (following, k), g in zip(node.next_functions, out if isinstance(out, tuple) else (out,)):
                if following is None or g is None:
                    continue
                like = following._input_metadata[k]  # what the engine would check and cast to
                g = g.sum_to_size(tuple(like.shape)).to(like.dtype)
                assert like.device in (g.device, torch.device("meta")), (following, g.device, like.device)
                place = gradients.setdefault(following, [None] * len(following._input_metadata))
                place[k] = g if place[k] is None else place[k] + g


MOVED = {}  # id of a parameter -> it, and what it was moved to


def apply(self, function, recurse=True):
    """Module.to: fake parameters cannot be moved in place and are replaced; what is shared stays shared."""
    for child in (*self.children(), *getattr(self, "parts", ())):
        child._apply(function)
    for tensors in (self._parameters, self._buffers):
        for key, p in tensors.items():
            if p is not None and MOVED.get(id(p), (None,))[0] is not p:
                with torch.no_grad():
                    new = function(p)
                if new.device == p.device:
                    new = p
                elif isinstance(p, nn.Parameter):
                    new = nn.Parameter(new, p.requires_grad)
                MOVED[id(p)] = p, new
                MOVED.setdefault(id(new), (new, new))
            tensors[key] = p if p is None else MOVED[id(p)][1]
    return self


def scalar(tensor):
    waits(tensor)
    return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def tolist(tensor):
    waits(tensor)
    kind = float if tensor.dtype.is_floating_point else int
    return np.ones(tuple(tensor.shape), kind).tolist()


def attention(q, k, v, attn_mask=None, scale=None, real=F.scaled_dot_product_attention):
    """What CUDA's fused kernels ask for, and the backward of the one that would be taken."""
    if not q.is_cuda:
        return real(q, k, v, attn_mask=attn_mask, scale=scale)
    if torch.is_autocast_enabled("cuda"):
        q, k, v, attn_mask = (x if x is None else x.to(torch.bfloat16) for x in (q, k, v, attn_mask))
    assert q.dtype == k.dtype == v.dtype and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    if attn_mask is None and q.shape[-1] <= 256 and q.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]
    assert q.shape[-1] % (16 // q.element_size()) == 0, "not for the memory-efficient kernel"
    if attn_mask is not None:
        assert attn_mask.dtype == q.dtype and attn_mask.stride(-1) == 1
        attn_mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, torch.is_grad_enabled(), scale=scale)[0]


def to(tensor, *where, real=torch.Tensor.to, **options):
    """A copy from ordinary memory to the GPU waits for all the GPU's work, unless it is told not to."""
    moved = real(tensor, *where, **options)
    if moved.device != tensor.device and not options.get("non_blocking"):
        waits(moved if moved.is_cuda else tensor)
    return moved


def adamw(params, *rest, state_steps=None, real=torch._fused_adamw_, **options):
    steps = state_steps if state_steps is not None else rest[4]
    assert all(step.device == p.device for step, p in zip(steps, params)), "AdamW's step is on another device"
    return real(params, *rest, **({} if state_steps is None else {"state_steps": state_steps}), **options)


class Replica(nn.Module):
    """In place of DistributedDataParallel."""

    def __init__(self, module, **options):
        super().__init__()
        assert len({p.device for p in module.parameters()}) == 1
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def on_cpu(content):
    if isinstance(content, torch.Tensor):
        return content.detach().cpu()
    return {k: on_cpu(v) for k, v in content.items()} if isinstance(content, dict) else content


def install(world):
    """Puts all of this in place of the real things -> the scripts' modules."""
    lend_a_device_guard()
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *a, **k: True
    torch.cuda.set_device = lambda device: None
    nn.Module._apply, F.scaled_dot_product_attention, torch._fused_adamw_ = apply, attention, adamw
    T = torch.Tensor
    T.backward, T.item, T.tolist, FakeTensor.tolist, T.to = backward, scalar, tolist, tolist, to
    for name, kind in (("__bool__", bool), ("__float__", float), ("__int__", int)):
        setattr(T, name, lambda t, kind=kind: kind(scalar(t)))
    T.numpy = lambda t: np.zeros(tuple(t.shape), str(t.dtype)[6:]) if t.device.type == "cpu" else waits(t)
    nn.init.trunc_normal_ = nn.init.orthogonal_ = lambda t, *a, **k: t
    import assemble
    import data
    import distill_module
    import finetune
    import models

    # Files, on the CPU as torch.load(map_location="cpu") gives them.
    store, exists, unlink = {}, Path.exists, Path.unlink
    torch.save = lambda content, sink: store.update({sink: on_cpu(content)})
    models.write = lambda path, put: put(str(path)) if str(path).endswith(".pt") else None
    models.read = lambda path, whole=True: store[str(path)]
    Path.exists = lambda path: str(path) in store or exists(path)
    Path.unlink = lambda path, missing_ok=False: store.pop(str(path), None) or unlink(path, missing_ok=True)
    # No lock, because the stage that was cut off is still there, in the same process.
    models.lock = lambda path: types.SimpleNamespace(name=f"{path}.lock", close=lambda: None)
    models.about = lambda path: {key: value for key, value in store[str(path)].items() if key != "model"}
    models.check_inputs = lambda config: None  # counts labels, of which the fake has none
    models.fit_signatures = lambda signatures, linked: (1.0, 1.0)

    # Processes: this one plays the first of `world`.
    data.setup = lambda device: data.Setup(torch.device("cuda:0"), 0, world)
    dist.is_initialized = lambda: world > 1
    dist.all_reduce = lambda t: assert_contiguous(t)
    dist.all_gather_object = lambda everyone, facts: None
    models.DistributedDataParallel = Replica
    check = models.Stage.check
    models.Stage.check = lambda stage: check(stage) and False  # every number is 1, "asked to end" too
    return types.SimpleNamespace(
        assemble=assemble, distill_module=distill_module, finetune=finetune, models=models)


def assert_contiguous(tensor):
    assert tensor.is_contiguous() and tensor.is_cuda


def main(config, world, *words):
    m = install(int(world))
    holder = tempfile.TemporaryDirectory()  # goes with the process
    folder = holder.name
    step = m.models.Stage.step

    def run(script, role, cut_off=False):
        def watched(stage):
            step(stage)
            if watched.first:
                WAITS.clear()
                watched.first = False
            if cut_off:
                stage.leave()

        watched.first, m.models.Stage.step = True, watched
        overrides = [f"output_dir={folder}", "device=cuda", f"role={role}", *words]
        sys.argv = [script.__name__, "--config", config, *overrides]
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
            script.main()
        assert cut_off == ("stopped: saved" in text.getvalue()), text.getvalue()
        print(json.dumps({"script": script.__name__, "role": role, "waits": WAITS}), flush=True)

    with Mode():
        for script, role in ((m.finetune, "meta"), (m.distill_module, "teacher"), (m.assemble, "teacher"),
                             (m.finetune, "teacher"), (m.distill_module, "student"), (m.assemble, "student"),
                             (m.finetune, "student"), (m.finetune, "baseline_kd")):
            if script is not m.assemble:
                run(script, role, cut_off=True)
            run(script, role)


class Kernels(TorchDispatchMode):
    """Counts the kernels that a GPU would launch, and the bytes that go in and out of elementwise ones."""

    PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm"}
    # Kernels of an operation that launches several: as seen in traces, of which these are the rule
    SEVERAL = {"native_layer_norm_backward": 2, "convolution_backward": 3, "topk": 2, "sort": 4,
               "_scaled_dot_product_flash_attention_backward": 4,
               "_scaled_dot_product_efficient_attention_backward": 4}

    def __init__(self):
        super().__init__()
        self.kernels, self.casts, self.bytes = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        nothing = not made or function.is_view or "empty" in name or name == "_unsafe_view"
        if nothing or any(x.device.type != "cuda" for x in made):
            return out
        # AdamW takes as many parameters at once as fit into a kernel's arguments.
        several = math.ceil(len(args[0]) / 36) if name == "_fused_adamw_" else self.SEVERAL.get(name, 1)
        if name == "native_layer_norm_backward" and args[5] is None:  # no gain, no gradient of it
            several = 1
        self.kernels += several
        self.casts += name == "_to_copy"
        if name not in self.PRODUCTS and "attention" not in name:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(map(size, tensors + made))
        return out


def size(tensor):
    """Bytes in memory; what is expanded is there once."""
    lengths = [n for n, stride in zip(tensor.shape, tensor.stride()) if stride]
    return math.prod(lengths) * tensor.element_size()


def count(config, *words):
    """Prints the kernels, casts and elementwise gigabytes of a step of fine-tuning the student, as JSON."""
    models = install(1).models
    config = models.load_config(config, words)
    c, options = models.schedule(config, "student"), config["data"]
    kernels = Kernels()
    with Mode():
        with torch.device("cuda"):
            model = models.build(config, "student").train()
            images = torch.randn(c["batch"], 3, options["image_size"], options["image_size"])
            targets = torch.rand(c["batch"], options["classes"])
        models.set_drop_path(model, c["drop_path"])
        optimizer = models.optimizer(model, c)
        for counted in (contextlib.nullcontext(), kernels):  # the first step makes AdamW's state
            with counted:
                with torch.autocast("cuda", torch.bfloat16, enabled=config["precision"] != "float32"):
                    loss = models.soft_target_ce(model(images).float(), targets)
                (loss + models.regularizer(model, config)).backward()
                optimizer.step()
                optimizer.zero_grad()
    print(json.dumps({"kernels": kernels.kernels, "casts": kernels.casts, "gigabytes": kernels.bytes / 1e9}))


if __name__ == "__main__":
    (count if sys.argv[1] == "count" else main)(*sys.argv[2 if sys.argv[1] == "count" else 1:])
