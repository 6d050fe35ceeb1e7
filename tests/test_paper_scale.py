"""Promise: the paper's three experiments run at the models' true sizes: two steps of every stage.

Images are generated, in the layouts that ImageNet, Tiny-ImageNet and ImageNet-R have on disk. This shows what
ran, at which size, how long and in how much memory:

    python -m pytest -m slow -s tests/test_paper_scale.py

About half an hour on one core; 14 GB of memory, 30 GB of disk. Nothing of a model is made smaller.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import models
from conftest import ROOT

# The classes of ImageNet. Tiny-ImageNet has 200 of them, and so has ImageNet-R; 62 are in both.
WNIDS = [f"n{1440764 + 7 * k:08d}" for k in range(1000)]
TINY = WNIDS[::5]
RENDERED = TINY[:62] + WNIDS[2::5][:138]

# ViT-Huge/14 with ten blocks and with 32, no qkv bias; the head has 1000 classes.
# Of a block: qkv, proj, fc1, fc2; then the biases of proj, of fc1 and fc2, two norms.
BLOCK = 12 * 1280**2 + 1280 + 5 * 1280 + 4 * 1280
ENDS = (3 * 14 * 14 + 1) * 1280 + 1280 + 257 * 1280 + 2 * 1280 + 1281 * 1000
HUGE = {"meta": 10 * BLOCK + ENDS, "teacher": 32 * BLOCK + ENDS}
SIZES = {  # parameters; those of a NAC are the paper's, in millions
    "imagenet_nac": {**HUGE, "student": 37.6e6},
    "tiny_imagenet_modules": HUGE,
    "tiny_imagenet_nac": {"student": 26.7e6},
    # DeiT-Large; DeiT-Base, where seven further MLPs and a router stand in each of twelve blocks
    "imagenet_vmoe": {"teacher": 304_326_632,
                      "student": 86_567_656 + 12 * (7 * (2 * 768 * 3072 + 3072 + 768) + 8 * 769)}}


def check_size(name, role, count):
    """Compares a number of parameters with the table above."""
    expected = SIZES[name].get(role.replace("baseline", "student"), count)
    assert count == pytest.approx(expected, abs=5e4 if isinstance(expected, float) else 0, rel=0)


@pytest.mark.parametrize("name", SIZES)
def test_the_models_have_the_papers_sizes(name):
    config = models.load_config(ROOT / f"configs/{name}.yaml")
    with torch.device("meta"):
        for role in SIZES[name]:
            check_size(name, role, models.parameters(models.build(config, role)))


def test_the_configs_hold_the_original_values():
    vmoe = models.load_config(ROOT / "configs/imagenet_vmoe.yaml")["student"]
    assert vmoe["expert_std"] == pytest.approx(1 / math.sqrt(3 * 768 * 3072), rel=1e-3)
    assert vmoe["stitch_std"] == 0.02
    for name in SIZES:
        c = models.load_config(ROOT / f"configs/{name}.yaml")
        warm = [stage for stage in c["train"].values() if isinstance(stage, dict) and stage["warmup"]]
        assert warm and not any(stage["warmup_prefix"] for stage in warm), name
        assert c["data"]["validation_images"] == 0, name


def test_the_modules_distilled_on_imagenet_are_those_of_the_tiny_imagenet_nac():
    """All tensors but the classifier and the position grid have the same shapes."""
    shapes = []
    for name in ("tiny_imagenet_modules", "tiny_imagenet_nac"):
        config = models.load_config(ROOT / f"configs/{name}.yaml")
        with torch.device("meta"):
            modules = models.cut(models.build(config, "student"), config, "student")
        shapes.append({f"{i}.{key}": tuple(value.shape) for i, module in enumerate(modules)
                       for key, value in module.state_dict().items()})
    assert shapes[0].keys() == shapes[1].keys()
    differ = {key for key in shapes[0] if shapes[0][key] != shapes[1][key]}
    assert differ == {"0.body.tokenizer.grid", "9.body.pool.to_logits.weight", "9.body.pool.to_logits.bias"}


# ---------- Images in the true layouts


def picture(path, k, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(k).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, "JPEG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all data sets, an image or two a class. Runs are kept beside them; tens of gigabytes."""
    root = tmp_path_factory.mktemp("paper")
    for k, wnid in enumerate(WNIDS):
        picture(root / f"imagenet/train/{wnid}/{wnid}_{k}.JPEG", k, (100, 75))
        picture(root / f"imagenet/val/{wnid}/ILSVRC2012_val_{k:08d}.JPEG", k + 1000, (100, 75))
    for k, wnid in enumerate(RENDERED):
        picture(root / f"imagenet-r/{wnid}/art_{k}.jpg", k + 2000, (75, 100))
    lines = []
    for k, wnid in enumerate(TINY):
        for j in range(2):
            file = f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{j}.JPEG"
            picture(root / file, 3000 + 2 * k + j, (64, 64))
        name = f"val_{199 - k}.JPEG"  # the list's order is not that of the classes
        picture(root / "tiny-imagenet-200/val/images" / name, 4000 + k, (64, 64))
        lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (root / "tiny-imagenet-200/val/val_annotations.txt").write_text("".join(sorted(lines)))
    command(["tools/prepare.py", "tiny_imagenet", root / "tiny", root / "tiny-imagenet-200"])
    command(["tools/prepare.py", "tiny_imagenet_r", root / "tiny-r", root / "imagenet-r"])
    yield root
    shutil.rmtree(root)


# ---------- Commands


def command(words, **env):
    """Runs one command -> its output. Prints what it was, what it said, its time and its peak memory."""
    began = time.time()
    job = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    text = job.stdout.read()
    _, status, usage = os.wait4(job.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, text
    said = [line for line in text.splitlines() if re.search("parameters|modules;|top-1", line)]
    cost = f"{time.time() - began:.0f} s, {usage.ru_maxrss / 2**20:.1f} GB"
    print(f"  {words[0]} {words[-1]}: {cost}", *said[:12], sep="\n      ", flush=True)
    return text


BATCH = {"meta": 2, "incubate": 1, "teacher": 1, "distill": 1, "student": 2}  # images of a step
TWO_STEPS = ["train.*.epochs=1", "train.*.accumulate=1", "data.workers=1",
             "data.validation_images=1", "data.test_images=2",
             *(f"train.{stage}.{key}" for stage, batch in BATCH.items()
               for key in (f"batch={batch}", f"images=[0,{2 * batch}]"))]


def two_steps_of_every_stage(name, run, words, expected, goal=""):
    """Runs what run.sh would run, which must be the expected stages -> {stage: output}. Checks files, log."""
    words = ["--config", f"configs/{name}.yaml", *TWO_STEPS, *words, f"output_dir={run}"]
    print(f"\n{name}: models as in {words[1]}; overrides {' '.join(words[2:])}", flush=True)
    config = models.load_config(ROOT / words[1], words[2:])
    stages = {(script, role): stage for stage, (script, role, *_) in models.STAGES.items()}
    listed = [line.split() for line in command(["tools/cost.py", *words, "--list"], GOAL=goal).splitlines()
              if re.match(r"[\w/]+\.py ", line)]
    outputs, seen = {}, 0
    for script, word in listed:
        if script == "tools/report.py":
            command([script, word])
            continue
        stage = stages.get((script, word.removeprefix("role=")), "evaluate")
        word = "role=student" if stage == "evaluate" else word  # the Huge would take half an hour
        text = outputs[stage] = command([script, *words, word])
        if stage == "evaluate":
            continue
        assert all((run / file).exists() for file in models.files(config, stage)), stage
        assert not list(run.rglob("*unfinished*")) + list(run.rglob("*.tmp"))
        if stage.startswith("assemble"):
            continue
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][seen:]
        seen += len(lines)
        every = range(models.modules_of(config)) if stage in ("incubate", "distill") else [stage]
        assert [line["module"] for line in lines] == [*every]
        for line in lines:
            assert line["stage"] == stage and line["step"] == 2, line
            assert math.isfinite(line["loss"]) and line["lr"] > 0, line
        if stage in ("meta", "teacher", "student", "baseline"):
            check_size(name, stage, int(re.search(r"([\d,]+) parameters", text)[1].replace(",", "")))
    assert list(outputs) == [*expected, *([] if goal else ["evaluate"])]
    return outputs


LAST = ["assemble_student", "student", "baseline"]
FIRST = ["meta", "incubate", "assemble_teacher", "teacher", "distill"]


def scores(run):
    """{set: images} of the student."""
    results = json.loads((run / "results.json").read_text())
    return {r["set"]: r["images"] for r in results if r["role"] == "student"}


@pytest.mark.slow
def test_tiny_imagenet_nac(folder):
    """Modules are distilled on ImageNet, the student is fine-tuned on Tiny-ImageNet."""
    modules, run, tiny_r = folder / "runs/huge", folder / "runs/tiny", folder / "tiny-r"
    words = [f"data.root={folder}/imagenet"]
    two_steps_of_every_stage("tiny_imagenet_modules", modules, words, FIRST, goal="distill")
    words = [f"data.root={folder}/tiny", "data.test_images=0", f"data.robustness=[{tiny_r}]"]
    text = command(["tools/convert.py", "--config", "configs/tiny_imagenet_nac.yaml", *TWO_STEPS, *words,
                    f"output_dir={run}", f"student_modules={modules}/student_modules"])
    # The modules were distilled at 224 pixels with 1000 classes: what cannot be carried over is named.
    fresh = {name for names in re.findall("fresh: (.*)", text) for name in names.split(", ")} - {"none"}
    assert fresh == {"body.tokenizer.grid", "body.pool.to_logits.weight", "body.pool.to_logits.bias"}
    text = two_steps_of_every_stage("tiny_imagenet_nac", run, words, LAST)
    assert "scale_free: 508 links over 256 mediators" in text["assemble_student"]
    assert f"{tiny_r}: 62 of {len(TINY)} classes are present" in text["evaluate"]
    assert scores(run) == {"test": 200, str(tiny_r): 62}


@pytest.mark.slow
def test_imagenet_nac(folder):
    """Meta model and teacher are those of the test above, if it ran: that run is shared."""
    run, huge = folder / "runs/imagenet_nac", folder / "runs/huge"
    words = [f"data.root={folder}/imagenet", f"data.robustness=[{folder}/imagenet-r]"]
    words += [f"share={huge}"] if huge.exists() else []
    expected = [*(FIRST[-1:] if huge.exists() else FIRST), *LAST]
    text = two_steps_of_every_stage("imagenet_nac", run, words, expected)
    assert "scale_free: 4572 links over 768 mediators" in text["assemble_student"]
    assert scores(run) == {"test": 2, f"{folder}/imagenet-r": 200}


@pytest.mark.slow
def test_imagenet_vmoe(folder):
    run = folder / "runs/imagenet_vmoe"
    words = [f"data.root={folder}/imagenet", f"data.robustness=[{folder}/imagenet-r]"]
    text = two_steps_of_every_stage("imagenet_vmoe", run, words, [*FIRST, *LAST])
    assert f"{folder}/imagenet-r: {len(RENDERED)} of {len(WNIDS)} classes are present" in text["evaluate"]
