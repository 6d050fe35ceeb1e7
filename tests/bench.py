"""How fast models.py and data.py are, beside the literal definitions of literal.py: prints one table.

    python tests/bench.py                 all rows (some minutes on two cores)
    python tests/bench.py read-in moe     only the rows whose names hold one of the words

Forward and backward; the sides of a row run by turns in one process, and their medians are compared. `ratio`
is the left time over the right one: above 1, ours is faster. Memory is the peak of what tensors take in one
step, beyond weights and inputs, as the allocator counts it (torch's profiler, or CUDA's counters). It does
not depend on what the C library keeps back, and leaves out the scratch space of matrix products.

Run it on an idle machine. On a busy one set OMP_NUM_THREADS=1, because threads wait for one another.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

# ruff: noqa: E402
# glibc hands every large tensor back to the system and faults it in again. With these it keeps them, which is
# up to twice as fast on a CPU. They are read when a process starts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000",
             "MALLOC_TOP_PAD_": "67108864", "KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
if __name__ == "__main__" and not ALLOCATOR.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import literal
import models
from models import kd, soft_target_ce

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LARGER = 8 if CUDA else 1  # a GPU needs more images at a time to be kept busy
SIZES = {  # a NAC, and the images of a step on a CPU
    "ImageNet": (dict(image_size=224, width=512, heads=8, latents=(192, 768, 64), classes=1000,
                      ffn_ratio=1), 2),
    "Tiny": (dict(image_size=64, width=384, heads=6, latents=(64, 256, 64), classes=200, ffn_ratio=2), 8)}


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


def step(model, forward, *inputs, labels=None, bf16=False):
    """A function that does one forward and backward pass."""
    def run():
        model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            out = forward(*inputs)
            loss = out.sum() if labels is None else F.cross_entropy(out, labels)
        loss.backward()
    return run


def line(what, left, right, ratio, memory, goal):
    ratio = f"{ratio:.2f}x" if ratio else ""
    print(f"{what:54}{left:>11}{right:>11}{ratio:>9} {memory:30}{goal}", flush=True)


def row(what, left, right, goal, repeats=3):
    """One line of times: literal, ours, ratio, and the memory of both."""
    memory = []
    for function in (left, right):
        function()  # so that gradients exist
        memory.append(peak_memory(function) / 2**20)
    a, b = medians([left, right], repeats)
    if CUDA:
        with FlopCounterMode(display=False) as counter:
            right()
        goal += f"   ours: {counter.get_total_flops() / b / 1e12:.1f} TFLOP/s"
    line(what, f"{1000 * a:.1f} ms", f"{1000 * b:.1f} ms", a / b,
         f"{memory[0]:7.0f} MB {memory[1]:6.0f} MB {memory[0] / memory[1]:5.1f}x", goal)


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
        step(model, model, images, labels=labels, bf16=bf16), goal)


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


def moe(routing, goal):
    torch.manual_seed(0)
    layer = models.MoE(768, 3072, 8).to(DEVICE).apply(lambda m: models.init_linear(m, 0.02))
    dense = models.Mlp(768, 2 * 3072).to(DEVICE)  # top-2 of hidden width 3072: as many multiply-adds
    if routing == "collapsed":
        layer.router.bias.data[:2] = 100
    x = torch.randn(1, 4096 * LARGER, 768, device=DEVICE, requires_grad=True)
    row(f"dense MLP | MoE layer, {routing} routing", step(dense, dense, x), step(layer, layer, x), goal)
    print(f"{'':54}experts' load {' '.join(f'{share:.2f}' for share in layer.load.tolist())}")


def settings(folder, *overrides):
    """Config for class folders, with the paper's augmentation."""
    (Path(folder) / "c.yaml").write_text(
        "data: {set: folder, classes: 10, resized_crop: [0.08, 1], flip: 0.5, randaugment: 9, erasing: 0.25, "
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
        line(f"{what}, one core", "", f"{rate:.0f} im/s", None, files, goal)


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
    line(f"training | evaluation, NAC Tiny, batch {len(images)}", f"{len(images) / a:.1f} im/s",
         f"{len(images) / b:.1f} im/s", a / b, "", goal)


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
    "moe uneven": lambda: moe("untrained", "0.91x"),
    "moe collapsed": lambda: moe("collapsed", "0.91x"),
    "one pass": lambda: one_pass("90 % of the predicted saving"),
    "data Tiny": lambda: pipeline("Tiny-ImageNet, full augmentation", 64, 64, 64, 512, 85, "1500 im/s"),
    "data ImageNet": lambda: pipeline(
        "224 px from 500x375 JPEG, full augmentation", 224, 500, 375, 96, 92, "150 im/s"),
    "evaluation": lambda: evaluation("2.5x"),
}

if __name__ == "__main__":
    name = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, {name}")
    print(f"{'what (left | right)':54}{'literal':>11}{'ours':>11}{'ratio':>9} {'peak memory of both':30}goal")
    for name, measure in ROWS.items():
        if len(sys.argv) == 1 or any(word in name for word in sys.argv[1:]):
            measure()
