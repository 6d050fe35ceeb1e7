"""How fast models.py and data.py are, beside the literal definitions of tests/literal.py: prints one table.

    python tools/bench.py                 all rows (some minutes on two cores)
    python tools/bench.py read-in moe     only the rows whose names (ROWS, at the end) hold one of the words
    python tools/bench.py stages          every stage of the paper's configs; on a CPU at batch 1
    torchrun --nproc_per_node=8 tools/bench.py ddp      what averaging gradients costs on 8 GPUs

Forward and backward; the sides of a row run by turns in one process, and their medians are compared. `ratio`
is the left time over the right one: above 1, the right side is faster. Memory is the peak of what tensors
take in one step, beyond weights and inputs, as the allocator counts it (torch's profiler, or CUDA's
counters). It does not depend on what the C library keeps back, and leaves out the scratch space of matrix
products. A GPU's rows end with TFLOP/s, and with their share of what one large bfloat16 product reaches on
it. What cannot run here prints why.

Run it on an idle machine. On a busy one set OMP_NUM_THREADS=1, because threads wait for one another.
"""

import copy
import functools
import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

# ruff: noqa: E402
# glibc hands every large tensor back to the system and faults it in again. With these it keeps them, which is
# up to twice as fast on a CPU. They are read when a process starts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000",
             "MALLOC_TOP_PAD_": "67108864", "KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
if __name__ == "__main__" and not ALLOCATOR.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import cost
import data
import literal
import models
from models import kd, soft_target_ce

CUDA = torch.cuda.is_available()
PROCESS = data.setup("cuda" if CUDA else "cpu")  # TF32 on a GPU, as in training; joins torchrun's
DEVICE = PROCESS.device
LARGER = 8 if CUDA else 1  # a GPU needs more images at a time to be kept busy
SIZES = {  # a NAC, and the images of a step on a CPU
    "ImageNet": (dict(image_size=224, width=512, heads=8, latents=(192, 768, 64), classes=1000,
                      ffn_ratio=1), 2),
    "Tiny": (dict(image_size=64, width=384, heads=6, latents=(64, 256, 64), classes=200, ffn_ratio=2), 8)}
VITS = {  # patch, width, heads, blocks
    "tiny": (16, 192, 3, 12), "small": (16, 384, 6, 12),
    "base": (16, 768, 12, 12), "large": (16, 1024, 16, 24)}
REPEATS = {"ImageNet": 2, "Tiny": 3}  # of a whole step: on two cores the larger one takes seconds


def processor():
    """The processor's name, and which of the units it has that decide how fast products are."""
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_tile": "AMX"}
    path = Path("/proc/cpuinfo")
    found = dict(re.findall(r"(model name|flags)\s*: (.*)", path.read_text() if path.exists() else ""))
    units = [word for flag, word in known.items() if flag in found.get("flags", "").split()]
    return f"{found.get('model name', platform.machine())} ({', '.join(units) or 'units unknown'})"


def nac(size):
    options, batch = SIZES[size]
    torch.manual_seed(0)
    model = models.NAC(head_width=64, propagators=8, **options).to(DEVICE).train()
    models.set_drop_path(model, 0.1)
    images = torch.randn(batch * LARGER, 3, options["image_size"], options["image_size"], device=DEVICE)
    labels = torch.randint(options["classes"], (len(images),), device=DEVICE)
    return model, images, labels


def seconds(function):
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(functions, repeats):
    """Median seconds of each, run by turns, each time once untimed before: it finds its own memory."""
    times = [[(f(), seconds(f))[1] for f in functions] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times)]


@functools.cache
def peak():
    """FLOP/s of one large bfloat16 product: what a GPU gives in practice."""
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    return 2 * 8192**3 / medians([lambda: a @ b], 5)[0]


def flops(function):
    """Floating-point operations of a function's products; the formulas are those that torch lacks."""
    formulas = {torch.ops.aten.convolution_backward: cost.convolution_backward,
                torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * math.prod(a) * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return counter.get_total_flops()


def rate(operations, spent):
    """TFLOP/s, and on a GPU their share of peak()."""
    share = f", {100 * operations / spent / peak():.0f} % of a large product" if CUDA else ""
    return f"{operations / spent / 1e12:.3g} TFLOP/s{share}"


def in_words(number):
    """Images a second."""
    return f"{number:.{0 if number > 10 else 2}f} im/s"


def peak_memory(function):
    """Largest sum of live tensors that a function allocates, in bytes."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]))


def step(model, forward, *inputs, labels=None, bf16=False, more=lambda: 0):
    """A function that does one forward and backward pass. more() is added to the loss."""
    def run():
        model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            out = forward(*inputs)
            loss = out.sum() if labels is None else F.cross_entropy(out, labels)
        (loss + more()).backward()
    return run


def skip(what, why):
    print(f"{what:54}{why}", flush=True)


def line(what, left, right, ratio, memory, goal):
    ratio = f"{ratio:.2f}x" if ratio else ""
    print(f"{what:54}{left:>11}{right:>11}{ratio:>9} {memory:30}{goal}", flush=True)


def row(what, left, right, goal, repeats=3, counted=None):
    """One line of times: literal, ours, ratio, and the memory of both; without a left side ours alone.

    `counted` does the right side's operations where these cannot be counted in it.
    """
    memory, sides = [], [left, right] if left else [right]
    for function in sides:
        function()  # so that gradients exist
        memory.append(peak_memory(function) / 2**20)
    *a, b = medians(sides, repeats)
    if CUDA and (operations := flops(counted or right)):
        goal += f"   ours: {rate(operations, b)}"
    if left:
        line(what, f"{1000 * a[0]:.1f} ms", f"{1000 * b:.1f} ms", a[0] / b,
             f"{memory[0]:7.0f} MB {memory[1]:6.0f} MB {memory[0] / max(memory[1], 1e-3):5.1f}x", goal)
    else:
        line(what, "", f"{1000 * b:.1f} ms", None, f"{'':10} {memory[0]:6.0f} MB", goal)


class Nothing(torch.nn.Module):
    def forward(self, x, codes):
        return x


def read_in(size, goal, ffn=False):
    model, images, _ = nac(size)
    module, B = model.read_in.eval(), len(images)
    slow = literal.read_in if ffn else literal.read_in_attention
    if not ffn:
        module.ffn = Nothing()
    shapes = model.input_latents.codes.shape, ((images.shape[-1] // 8) ** 2, model.tokenizer.width)
    states, tokens = (torch.randn(B, *shape, device=DEVICE, requires_grad=True) for shape in shapes)
    inputs = states, tokens, model.input_latents.codes
    row(f"NAC read-in{' and its FFN' * ffn}, {size}, batch {B}",
        step(module, lambda *x: slow(module, *x), *inputs), step(module, module, *inputs), goal)


def nac_step(size, goal, bf16=False):
    model, images, labels = nac(size)
    left_bf16 = bf16 and CUDA  # on a CPU the literal side stays in float32
    row(f"NAC step, {size}, batch {len(images)}{', bf16' * bf16}",
        step(model, lambda x: literal.nac(model, x), images, labels=labels, bf16=left_bf16),
        step(model, model, images, labels=labels, bf16=bf16), goal, REPEATS[size])


def nac_bf16(size, goal):
    model, images, labels = nac(size)
    plain, bf16 = (step(model, model, images, labels=labels, bf16=on) for on in (False, True))
    row(f"float32 | bf16: NAC step, {size}, batch {len(images)}", plain, bf16, goal, REPEATS[size])


def compiled(size, goal):
    what = f"eager | compiled: NAC step, {size}, bf16"
    if not CUDA:
        return skip(what, "needs a GPU")
    model, images, labels = nac(size)
    whole = copy.deepcopy(model)
    eager = step(model, model, images, labels=labels, bf16=True)
    ours = step(whole, models.compile_blocks(whole), images, labels=labels, bf16=True)
    spent = seconds(ours)
    row(what, eager, ours, f"{goal}; compiling took {spent:.0f} s", counted=eager)


def kernels(config_name, goal):
    """Kernels and elementwise traffic of a step of fine-tuning a NAC, as a GPU would run it: needs none."""
    command = [sys.executable, ROOT / "tests/fake_cuda.py", "count", ROOT / "configs" / f"{config_name}.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        return skip(f"kernels: {config_name}", "needs another release of torch (tests/fake_cuda.py)")
    found = json.loads(done.stdout)
    line(f"kernels of a step, bf16, eager: {config_name}", "", f"{found['kernels']}", None,
         f"{found['gigabytes']:.1f} GB elementwise", f"{goal}; {found['casts']} of them casts")


def block_model(goal):
    """The block model's matching on the CPU, once a step: signatures as the student's stage begins with."""
    model, images, labels = nac("ImageNet")
    signatures = model.mediator_latents.signatures
    linked = models.random_graph("planted_partition", len(signatures), np.random.default_rng(0))
    models.fit_signatures(signatures, linked, steps=200)
    plain, more = (step(model, model, images, labels=labels, bf16=CUDA, more=more)
                   for more in (lambda: 0, lambda: models.block_model(model)))
    row(f"NAC step, ImageNet, batch {len(images)} | with block model", plain, more, goal, REPEATS["ImageNet"])


def conv(goal):
    """The ConvNeXt block of the ImageNet NAC's first stage, and the same in the images' own layout."""
    what = "channels first | last: ConvNeXt block, bf16"
    if not CUDA:
        return skip(what, "needs a GPU")
    block = models.ConvNeXtBlock(128).to(DEVICE)
    x = torch.randn(32, 128, 56, 56, device=DEVICE, requires_grad=True)

    def first(x):
        y = block.norm(block.dwconv(x).permute(0, 2, 3, 1))
        return x + (block.gamma * block.pwconv2(F.gelu(block.pwconv1(y)))).permute(0, 3, 1, 2)

    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    row(what, step(block, first, x, bf16=True), step(block, block, last, bf16=True), goal)


class Products(TorchDispatchMode):
    """Notes all matrix products, convolutions and fused attention with operands, to do them again alone."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name in self.NAMES or "scaled_dot_product" in name:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    @torch.no_grad()
    def again(self):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


def nac_products(size, goal):
    model, images, labels = nac(size)
    ours = step(model, model, images, labels=labels)
    with Products() as products, FlopCounterMode(display=False) as counter:
        ours()
    # without convolutions: the counter takes a depthwise one's backward pass for a dense one's
    flops = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "conv" not in str(name))
    row(f"its products alone ({flops / 1e9:.0f} GFLOP) | NAC step, {size}", products.again, ours, goal)


def mixture(routing="untrained"):
    """A layer of V-MoE-Base and tokens for it."""
    torch.manual_seed(0)
    layer = models.MoE(768, 3072, 8).to(DEVICE).apply(lambda m: models.init_linear(m, 0.02))
    if routing == "collapsed":
        layer.router.bias.data[:2] = 100
    return layer, torch.randn(1, 4096 * LARGER, 768, device=DEVICE, requires_grad=True)


def moe(routing, goal, bf16=False):
    layer, x = mixture(routing)
    dense = models.Mlp(768, 2 * 3072).to(DEVICE)  # top-2 of hidden width 3072: as many multiply-adds
    row(f"dense MLP | MoE layer, {routing} routing{', bf16' * bf16}",
        step(dense, dense, x, bf16=bf16), step(layer, layer, x, bf16=bf16), goal)
    print(f"{'':54}experts' load {' '.join(f'{share:.2f}' for share in layer.load.tolist())}")


def moe_loop(goal):
    layer, x = mixture()

    def loop(x):
        with mock.patch.object(torch, "bfloat16", None):  # what MoE compares its type with to take grouped_mm
            return layer(x)

    row("loop over experts | grouped_mm: MoE layer, bf16", step(layer, loop, x, bf16=True),
        step(layer, layer, x, bf16=True), goal)


def vit(goal):
    """A whole ViT, Large on a GPU and Small on a CPU, beside timm's."""
    name, batch = ("large", 64) if CUDA else ("small", 2)
    patch, width, heads, depth = VITS[name]
    model = models.ViT(224, patch, width, heads, [depth], 1000).to(DEVICE)
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)
    labels = torch.randint(1000, (batch,), device=DEVICE)
    ours, theirs = step(model, model, images, labels=labels, bf16=CUDA), None
    try:
        timm = importlib.import_module("timm")
        other = timm.create_model(f"vit_{name}_patch16_224").to(DEVICE).train()
        theirs = step(other, other, images, labels=labels, bf16=CUDA)
    except (ImportError, RuntimeError) as e:  # RuntimeError: with a torchvision that is not this torch's
        goal = f"timm is not installed ({e})"
    row(f"timm's | our ViT-{name.title()} step, batch {batch}{', bf16' * CUDA}", theirs, ours, goal)
    if CUDA:
        compiled = copy.deepcopy(model)
        models.compile_blocks(compiled)
        row(f"eager | compiled: ViT-{name.title()} step, batch {batch}, bf16", ours,
            step(compiled, compiled, images, labels=labels, bf16=True), "1.2x", counted=ours)


def ddp(goal):
    """The step of a V-MoE by itself, and as several processes do it: gradients averaged while they come."""
    if not dist.is_initialized():  # one process; those of torchrun have joined already
        store = dist.TCPStore("127.0.0.1", 0, is_master=True)
        dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=0, world_size=1)
    patch, width, heads, depth = VITS["base" if CUDA else "tiny"]
    model = models.ViT(224, patch, width, heads, [depth], 1000, moe={"experts": 8}).to(DEVICE)
    images = torch.randn(64 if CUDA else 2, 3, 224, 224, device=DEVICE)
    labels = torch.randint(1000, (len(images),), device=DEVICE)
    # As one of two: a stage of one process wraps nothing.
    stage = types.SimpleNamespace(process=data.Setup(DEVICE, PROCESS.rank, 2), compiling=False)
    wrapped = models.Stage.distributed(stage, copy.deepcopy(model))
    plain, ours = (step(m, m, images, labels=labels, bf16=CUDA) for m in (model, wrapped))
    if torch.cuda.device_count() > PROCESS.world:
        goal += "; this is one process: use torchrun for all GPUs"
    row(f"plain | in DDP: V-MoE step, processes: {PROCESS.world}", plain, ours, goal, counted=plain)


def settings(folder, *overrides):
    """Config for class folders, with the paper's augmentation."""
    (Path(folder) / "c.yaml").write_text(
        "data: {classes: 10, resized_crop: [0.08, 1], flip: 0.5, randaugment: 9, erasing: 0.25, "
        "mixup: 0.8, cutmix: 1.0, smoothing: 0.1, workers: 0}")
    return models.load_config(Path(folder) / "c.yaml", overrides)


def photographs(folder, width, height, count, quality=85):
    """An ImageSet of JPEG files: smooth random colors with some grain, about as many bytes as photographs.

    (Tiny-ImageNet's files have 2 kB, ImageNet's 110 kB.)
    """
    rng, files = np.random.default_rng(0), []
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        image = np.asarray(coarse.resize((width, height)), np.int16)
        image = image + rng.integers(-12, 13, (height, width, 1))
        files.append(Path(folder) / f"{k}.jpg")
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(files[-1], quality=quality)
    return data.ImageSet(torch.arange(count) % 10, [str(c) for c in range(10)], files=files)


def pipeline(what, size, width, height, count, quality, goal):
    """Batches of image files, each read and decoded anew: the median epoch after a first one."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(folder, f"data.image_size={size}", "train.student.batch=32",
                          f"meta.patch={size // 8}", f"teacher.patch={size // 8}")
        imageset, threads = photographs(folder, width, height, count, quality), torch.get_num_threads()
        torch.set_num_threads(1)
        spent = []
        for epoch in range(6):
            began = time.process_time()  # of this process: other processes on the core do not count
            for _ in data.train_batches(imageset, config, "student", epoch, data.Setup(DEVICE, 0, 1)):
                pass
            spent.append(time.process_time() - began)
        torch.set_num_threads(threads)
        kilobytes = statistics.mean(file.stat().st_size for file in imageset.files) / 1000
        rate = count // 32 * 32 / statistics.median(spent[1:])
        files = f"files of {kilobytes:.1f} kB, read anew"
        line(f"{what}, one core", "", in_words(rate), None, files, goal)


def images_a_second(batches):
    """Wall time of all batches -> images a second. Other processes' work counts, hence not their CPU time."""
    images = []
    spent = seconds(lambda: images.extend(len(x) for x, _ in batches))
    return sum(images) / spent


def loader(goal):
    with tempfile.TemporaryDirectory() as folder:
        imageset, rates = photographs(folder, 500, 375, 128 * LARGER, 92), []
        for workers in (0, 256):  # at most one a core
            config = settings(folder, "data.image_size=224", "train.student.batch=16", "meta.patch=28",
                              "teacher.patch=28", f"data.workers={workers}")
            each = [images_a_second(data.train_batches(imageset, config, "student", epoch, PROCESS))
                    for epoch in range(4)]
            rates.append(statistics.median(each[1:]))
        line("no workers | one a core: 224 px, full augmentation", *map(in_words, rates),
             rates[1] / rates[0], "", goal)


def transfer(goal):
    what = "float32 | uint8 to the GPU: 256 images of 224 px"
    if not CUDA:
        return skip(what, "needs a GPU")
    options = {"mean": "imagenet", "std": "imagenet"}
    images = torch.randint(256, (256, 3, 224, 224), dtype=torch.uint8)
    floats = data.normalize(images, options).pin_memory()
    images = images.pin_memory()
    row(what, lambda: floats.to(DEVICE, non_blocking=True),
        lambda: data.normalize(images.to(DEVICE, non_blocking=True), options), goal)


def one_pass(goal):
    """m2mKD of all modules on one run of the meta model and of the data, against a run for each module."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [f"{role}.{key}" for role in ("meta", "teacher", "student")
                 for key in ("patch=8", "width=192", "heads=3")]
        config = settings(folder, "student.kind=vmoe", "student.experts=4", "data.image_size=64", *sizes,
                          "train.distill.batch=16", "meta.depths=[1,1,1,1]", "teacher.depths=[2,2,2,2]",
                          "student.depths=[1,1,1,1]")
        imageset, setup, L = photographs(folder, 64, 64, 64), data.Setup(DEVICE, 0, 1), 4
        meta, teacher = (models.build(config, role).to(DEVICE).requires_grad_(False).eval()
                         for role in ("meta", "teacher"))
        students = [module.to(DEVICE).train()
                    for module in models.cut(models.build(config, "student"), config, "student")]
        hidden_states = torch.no_grad()(meta.hidden_states)

        def batches():
            return data.train_batches(imageset, config, "distill", 0, setup)

        def pairs(modules, hidden, targets):  # as the loop of distill_module.py
            for i in modules:
                logits = meta.rest(i + 1, students[i](hidden[i]))
                with torch.no_grad():
                    teacher_logits = meta.rest(i + 1, teacher.parts[i](hidden[i]))
                (0.5 * soft_target_ce(logits, targets) + 0.5 * kd(logits, teacher_logits)).backward()
                students[i].zero_grad()

        def train(modules):
            for images, targets in batches():
                pairs(modules, hidden_states(images), targets)

        images, targets = next(batches())
        hidden, flops = hidden_states(images), []
        for part in (lambda: hidden_states(images), lambda: pairs(range(L), hidden, targets)):
            with FlopCounterMode(display=False) as counter:
                part()
            flops.append(counter.get_total_flops())
        read, a, b = medians([lambda: list(batches()), lambda: [train([i]) for i in range(L)],
                              lambda: train(range(L))], 5)
        # Reading, r seconds, and the meta model's f₀ operations are shared, the pairs' f₁ are not. At the
        # rate of the one pass an operation takes t = (b − r)/(f₀ + f₁) seconds, and
        # saving = (L − 1)(r + f₀·t) / (L(r + f₀·t) + f₁·t)
        t = (b - read) / sum(flops)
        predicted = (L - 1) * (read + flops[0] * t) / (L * (read + flops[0] * t) + flops[1] * t)
        line(f"modules one by one | {L} in one pass", f"{1000 * a:.0f} ms", f"{1000 * b:.0f} ms", a / b, "",
             f"{goal}: saves {100 * (1 - b / a):.1f} %, predicted {100 * predicted:.1f} %")


def evaluation(goal):
    model, images, labels = nac("Tiny")
    options = dict(lr=1e-4, weight_decay=0.05, decay_all=True, betas=[0.9, 0.999])
    optimizer, forward_backward = models.optimizer(model, options), step(model, model, images, labels=labels)

    def train():
        model.train()
        forward_backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate():
        model.eval()
        assert not model(images).requires_grad

    a, b = medians([train, evaluate], 5)
    line(f"training | evaluation, NAC Tiny, batch {len(images)}", in_words(len(images) / a),
         in_words(len(images) / b), a / b, "", goal)


def busy(goal):
    """A demo's steps, a thread a core, beside one busy process: threads that spin, and threads that sleep."""
    code = """
import sys, time
sys.path.insert(0, sys.argv[1])
import models, torch
config = models.load_config(sys.argv[1] + "/configs/demo_nac.yaml", ["data.classes=24"])
model = models.build(config, "baseline")
images = torch.randn(64, 3, 32, 32)
for step in range(15):
    if step == 5:
        began = time.perf_counter()
    model(images).sum().backward()
print(time.perf_counter() - began)"""

    def spent(policy):
        env = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(os.cpu_count())}
        command = [sys.executable, "-c", code, str(ROOT)]
        return float(subprocess.check_output(command, env=env, text=True))

    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        times = [(spent("ACTIVE"), spent("PASSIVE")) for _ in range(3)]
    finally:
        other.kill()
    left, right = (statistics.median(column) for column in zip(*times))
    what = "demo NAC's 10 steps beside a busy process"
    line(what, f"spin {left:.1f} s", f"sleep {right:.1f} s", left / right, "", goal)


def training(config, name):
    """A step of a stage, of modules of the second one, on random images -> the function, how many images."""
    s, role = models.schedule(config, name), models.STAGES[name][1]
    alone = name == role
    with DEVICE:
        whole = models.build(config, role)
        meta, teacher = (None if alone else models.build(config, other).requires_grad_(False).eval()
                         for other in ("meta", "teacher"))
        images = torch.randn(s["batch"] if CUDA else 1, 3, *[config["data"]["image_size"]] * 2)
        targets = torch.rand(len(images), config["data"]["classes"]).softmax(-1)
    models.set_drop_path(whole, s["drop_path"])
    module = whole if alone else models.cut(whole, config, role)[1].to(DEVICE)
    optimizer, called = models.optimizer(module.train(), s), module
    if config["compile"] and CUDA:
        called = models.compile_blocks(module)
        for model in () if alone else (meta, teacher):
            models.compile_blocks(model)

    def run():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            if alone:
                loss = soft_target_ce(called(images).float(), targets)
            else:
                with torch.no_grad():
                    hidden = meta.hidden_states(images)
                logits = meta.rest(2, called(hidden[1])).float()
                loss = soft_target_ce(logits, targets)
                if s["alpha"]:
                    with torch.no_grad():
                        taught = meta.rest(2, teacher.parts[1](hidden[1])).float()
                    loss = 0.5 * loss + 0.5 * kd(logits, taught)
        (loss + models.regularizer(module, config)).backward()
        if s["clip"]:
            torch.nn.utils.clip_grad_norm_(module.parameters(), s["clip"])
        optimizer.step()
        optimizer.zero_grad()
    return run, len(images)


def stages(config_name, *names):
    """Stages of a paper config, at their micro-batches; on a CPU at batch 1, in float32, uncompiled."""
    if not CUDA and not any("stages" in word for word in sys.argv[1:]):
        why = "needs a GPU; the word stages tries them on a CPU, at batch 1"
        return skip(f"all stages of {config_name}", why)
    config = models.load_config(ROOT / "configs" / f"{config_name}.yaml")
    for name in names:
        run, batch = training(config, name)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        spent = medians([run], 3)[0]
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in all" if CUDA else ""
        one = name in ("incubate", "distill")
        macs = cost.cost(config, name, [1] if one else ())[2] * batch / models.schedule(config, name)["batch"]
        line(f"{config_name}: {name}{', one module' * one}, batch {batch}",
             f"{1000 * spent:.0f} ms", in_words(batch / spent), None, memory, rate(2 * macs, spent))
        del run
        torch.compiler.reset()


ALL = ("meta", "incubate", "teacher", "distill", "student")  # a baseline's step is a student's
ROWS = {
    "read-in ImageNet": lambda: read_in("ImageNet", "50x, memory 20x"),
    "read-in Tiny": lambda: read_in("Tiny", "14x"),
    "read-in FFN Tiny": lambda: read_in("Tiny", "-", ffn=True),
    "nac ImageNet": lambda: nac_step("ImageNet", "4.5x, memory 3x"),
    "nac ImageNet bf16": lambda: nac_step("ImageNet", "6.5x", bf16=True),
    "nac Tiny": lambda: nac_step("Tiny", "1.5x"),
    "nac Tiny bf16": lambda: nac_step("Tiny", "2.2x", bf16=True),
    "nac Tiny products": lambda: nac_products("Tiny", "0.8x"),
    "nac ImageNet products": lambda: nac_products("ImageNet", "-"),
    "nac ImageNet float32": lambda: nac_bf16("ImageNet", "1x with units for bf16"),
    "kernels ImageNet": lambda: kernels("imagenet_nac", "2,900"),
    "kernels Tiny": lambda: kernels("tiny_imagenet_nac", "2,900"),
    "compile ImageNet": lambda: compiled("ImageNet", "1.3x"),
    "compile Tiny": lambda: compiled("Tiny", "1.4x"),
    "block model": lambda: block_model("0.9x"),
    "channels_last": lambda: conv("1.5x"),
    "moe uneven": lambda: moe("untrained", "0.91x"),
    "moe collapsed": lambda: moe("collapsed", "0.91x"),
    "moe bf16": lambda: moe("untrained", "0.91x", bf16=True),
    "moe loop": lambda: moe_loop("0.9x on a CPU, 1.1x on a GPU"),
    "vit": lambda: vit("1x"),
    "ddp": lambda: ddp("0.95x"),
    "busy": lambda: busy("1.5x"),
    "one pass": lambda: one_pass("90 % of the predicted saving"),
    "data Tiny": lambda: pipeline("Tiny-ImageNet, full augmentation", 64, 64, 64, 512, 85, "1500 im/s"),
    "data ImageNet": lambda: pipeline(
        "224 px from 500x375 JPEG, full augmentation", 224, 500, 375, 96, 92, "150 im/s"),
    "loader": lambda: loader("0.8x the cores"),
    "transfer": lambda: transfer("1x"),
    "evaluation": lambda: evaluation("2.5x"),
    "stages ImageNet NAC": lambda: stages("imagenet_nac", *ALL),
    "stages ImageNet V-MoE": lambda: stages("imagenet_vmoe", *ALL),
    "stages Tiny NAC": lambda: stages("tiny_imagenet_nac", "student"),
}

if __name__ == "__main__":
    if PROCESS.rank:
        sys.stdout = open(os.devnull, "w")  # torchrun's first process prints for all
    print(f"torch {torch.__version__}, {processor()}, {torch.get_num_threads()} threads")
    if CUDA:
        print(f"{torch.cuda.get_device_name()}; a large bf16 product: {peak() / 1e12:.0f} TFLOP/s")
    print(f"{'what (left | right)':54}{'literal':>11}{'ours':>11}{'ratio':>9} {'peak memory of both':30}goal")
    for name, measure in ROWS.items():
        if len(sys.argv) == 1 or any(word in name for word in sys.argv[1:]):
            try:
                measure()
            except torch.OutOfMemoryError:
                skip(name, "does not fit into the GPU's memory")
    data.close()
