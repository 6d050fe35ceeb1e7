"""Promise: the paper's three experiments run at the models' true sizes: two steps of every stage, by run.sh.

Images are generated, in the layouts that ImageNet, Tiny-ImageNet and their renditions have on disk. This
shows what ran, at which size, how long and in how much memory:

    python -m pytest -m slow -s tests/test_paper_scale.py

About half an hour on one core; 14 GB of memory, 30 GB of disk. Nothing of a model is made smaller.
"""

import json
import math
import os
import re
import shlex
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
from test_runs import ENV, shell

pytestmark = pytest.mark.slow

# The classes of ImageNet. Tiny-ImageNet has 200 of them, ImageNet-R too, Tiny-ImageNet-R 62.
WNIDS = [f"n{1440764 + 7 * k:08d}" for k in range(1000)]
TINY, RENDERED, TINY_RENDERED = WNIDS[::5], WNIDS[2::5], WNIDS[::5][:62]


# ---------- Images in the true layouts


def picture(path, k, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(k).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, "JPEG")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The folder that holds all data sets, an image or two a class."""
    root = tmp_path_factory.mktemp("data")
    for k, wnid in enumerate(WNIDS):
        picture(root / f"imagenet/train/{wnid}/{wnid}_{k}.JPEG", k, (100, 75))
        picture(root / f"imagenet/val/{wnid}/ILSVRC2012_val_{k:08d}.JPEG", k + 1000, (100, 75))
    for k, wnid in enumerate(RENDERED):
        picture(root / f"imagenet-r/{wnid}/art_{k}.jpg", k + 2000, (75, 100))
    lines = []
    for k, wnid in enumerate(TINY):  # as downloaded, and with val sorted into folders, as many people have it
        for j in range(2):
            file = root / f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{j}.JPEG"
            picture(file, 3000 + 2 * k + j, (64, 64))
        name = f"val_{199 - k}.JPEG"  # the list's order is not that of the classes
        picture(root / "tiny-imagenet-200/val/images" / name, 4000 + k, (64, 64))
        picture(root / f"sorted/val/{wnid}" / name, 4000 + k, (64, 64))
        lines.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (root / "tiny-imagenet-200/val/val_annotations.txt").write_text("".join(sorted(lines)))
    shutil.copytree(root / "tiny-imagenet-200/train", root / "sorted/train")
    for k, wnid in enumerate(TINY_RENDERED):
        picture(root / f"tiny-imagenet-r/{wnid}/cartoon_{k}.jpg", 5000 + k, (90, 64))
    return root


# ---------- Commands


def stages(config, words):
    """The commands that run.sh runs, in order, each as a list of words."""
    result = shell("bash", "run.sh", config, *words, env={"LAUNCH": "echo"})
    assert result.returncode == 0, result
    return [shlex.split(line) for line in result.stdout.replace(f"{ROOT}/", "").splitlines()]


def command(words, folder):
    """Runs one command -> its output. Prints what it was, what it said, its time and its peak memory."""
    began = time.time()
    with open(folder / "out.txt", "w") as file:
        job = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=ENV, stdout=file,
                               stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(job.pid, 0)
    text = (folder / "out.txt").read_text()
    assert os.waitstatus_to_exitcode(status) == 0, text
    role = next((word for word in words if word.startswith("role=")), "role=student")
    said = [line for line in text.splitlines() if re.search("parameters|skipped|top-1", line)]
    cost = f"{time.time() - began:.0f} s, {usage.ru_maxrss / 2**20:.1f} GB"
    print(f"  {words[0]} {role}: {cost}", *said, sep="\n      ", flush=True)
    return text


BATCH = {"meta": 2, "incubate": 1, "teacher": 1, "distill": 1, "student": 2}  # images of a step
TWO_STEPS = ["train.*.epochs=1", "train.*.accumulate=1", "data.workers=1", "data.validation_images=1",
             "data.test_images=2", *(f"train.{stage}.{key}" for stage, batch in BATCH.items()
                                     for key in (f"batch={batch}", f"images=[0,{2 * batch}]"))]
FILES = {("finetune.py", role): [f"{role}.pt"] for role in ("meta", "teacher", "student", "baseline")}
FILES |= {("assemble.py", role): [f"{role}_assembled.pt"] for role in ("teacher", "student")}
RUNS = {}  # config's name -> folder of its run, for the next config to share


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs are kept until all are done; tens of gigabytes."""
    folder = tmp_path_factory.mktemp("runs")
    yield folder
    shutil.rmtree(folder)


def steps_of_every_stage(name, folder, words, share=None):
    """Runs every stage of a config -> {(script, role): output}; checks files and log on the way."""
    config, run = f"configs/{name}.yaml", folder / name
    run.mkdir()
    words = [*TWO_STEPS, *words, f"output_dir={run}", *([f"share={share}"] if share else [])]
    print(f"\n{name}: models as in {config}; overrides {' '.join(words)}", flush=True)
    modules, outputs, seen = models.modules_of(models.load_config(ROOT / config, words)), {}, 0
    for line in stages(config, words):
        script = line[0]
        role = next((word[5:] for word in line if word.startswith("role=")), "student")
        text = outputs[script, role] = command(line, folder)
        files = FILES.get((script, role), [f"{role}_modules/{i}.pt" for i in range(modules)])
        if share and role in ("meta", "teacher"):
            assert "skipped" in text and not any((run / file).exists() for file in files)
            continue
        if script == "evaluate.py":
            continue
        assert all((run / file).exists() for file in files), files
        assert not list(run.rglob("*unfinished*")) + list(run.rglob("*.tmp"))
        if script == "assemble.py":
            continue
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][seen:]
        seen += len(lines)
        stage = {"teacher": "incubate", "student": "distill"}[role] if script == "distill_module.py" else role
        assert [line["module"] for line in lines] == ([stage] if stage == role else list(range(modules)))
        for line in lines:
            assert line["stage"] == stage and line["step"] == 2, line
            assert math.isfinite(line["loss"]) and line["lr"] > 0, line
    assert (run / "config.yaml").exists() and len(outputs) == 9
    results = json.loads((run / "results.json").read_text())
    assert {r["role"] for r in results} == {"meta", "teacher", "student", "baseline"}
    return outputs


def parameters(text):
    """The parameters that a training command says it trains."""
    return int(re.search(r"([\d,]+) parameters", text)[1].replace(",", ""))


def scores(run, role):
    """{set: (top-1, top-5, images)} of a role."""
    results = json.loads((run / "results.json").read_text())
    return {r["set"]: (r["top1"], r["top5"], r["images"]) for r in results if r["role"] == role}


# ViT-Huge/14 with ten blocks and with 32, no qkv bias; the head has 1000 classes.
# Of a block: qkv, proj, fc1, fc2; then the biases of proj, of fc1 and fc2, two norms.
BLOCK = 12 * 1280**2 + 1280 + 5 * 1280 + 4 * 1280
ENDS = (3 * 14 * 14 + 1) * 1280 + 1280 + 257 * 1280 + 2 * 1280 + 1281 * 1000


def test_tiny_imagenet_nac(sets, folder):
    run, tiny_r = folder / "tiny_imagenet_nac", f"{sets}/tiny-imagenet-r"
    words = [f"data.root={sets}/imagenet", f"target.root={sets}/tiny-imagenet-200",
             "target.validation_images=1", "target.test_images=0", f"target.robustness=[{tiny_r}]"]
    text = steps_of_every_stage("tiny_imagenet_nac", folder, words)
    RUNS["huge"] = run
    assert parameters(text["finetune.py", "meta"]) == 10 * BLOCK + ENDS
    assert parameters(text["finetune.py", "teacher"]) == 32 * BLOCK + ENDS
    for role in ("student", "baseline"):
        assert abs(parameters(text["finetune.py", role]) / 1e6 - 26.7) < 0.05
        assert scores(run, role).keys() == {"test", tiny_r} and scores(run, role)["test"][2] == 200
    assert f"{tiny_r}: 62 of 200 classes are present" in text["evaluate.py", "all"]
    # The modules were distilled at 224 pixels with 1000 classes: what cannot be carried over is named.
    fresh = re.search("fresh tensors: (.*)", text["assemble.py", "student"])[1].split(", ")
    assert {"tokenizer.grid", "pool.to_logits.weight", "pool.to_logits.bias"} <= set(fresh)
    assert "scale_free: 508 links over 256 mediators" in text["assemble.py", "student"]

    from_released_modules("tiny_imagenet_nac", folder, words)

    # The other layout: the same images, the same score.
    downloaded = scores(run, "student")
    evaluated("tiny_imagenet_nac", folder, [*words, f"target.root={sets}/sorted"])
    assert scores(run, "student") == downloaded


def test_imagenet_nac(sets, folder):
    """Meta model and teacher are those of tiny_imagenet_nac: that run is shared, if it is there."""
    run, rendered = folder / "imagenet_nac", f"{sets}/imagenet-r"
    words = [f"data.root={sets}/imagenet", "data.robustness=[]"]
    text = steps_of_every_stage("imagenet_nac", folder, words, share=RUNS.get("huge"))
    for role in ("student", "baseline"):
        assert abs(parameters(text["finetune.py", role]) / 1e6 - 37.6) < 0.05
    robust(run, "imagenet_nac", words, folder, rendered)
    assert "scale_free: 4572 links over 768 mediators" in text["assemble.py", "student"]


def test_imagenet_vmoe(sets, folder):
    run, rendered = folder / "imagenet_vmoe", f"{sets}/imagenet-r"
    words = [f"data.root={sets}/imagenet", "data.robustness=[]"]
    text = steps_of_every_stage("imagenet_vmoe", folder, words)
    assert parameters(text["finetune.py", "teacher"]) == 304_326_632  # DeiT-Large's
    # DeiT-Base, where seven further MLPs and a router stand in each of twelve blocks
    expected = 86_567_656 + 12 * (7 * (2 * 768 * 3072 + 3072 + 768) + 8 * 769)
    for role in ("student", "baseline"):
        assert parameters(text["finetune.py", role]) == expected
    for line in (run / "log.jsonl").read_text().splitlines():
        line = json.loads(line)
        load = line.get("expert_load", [])
        assert len(load) == {"distill": 3, "student": 12, "baseline": 12}.get(line["stage"], 0)
    from_released_modules("imagenet_vmoe", folder, words)
    robust(run, "imagenet_vmoe", words, folder, rendered)


def from_released_modules(name, folder, words):
    """docs/weights.md's recipe: a folder of modules replaces stages 1 to 4; two steps of what is left."""
    run, again = folder / name, folder / f"{name}_released"
    words = [*TWO_STEPS, *words, f"student.modules={run}/student_modules", f"output_dir={again}"]
    lines = stages(f"configs/{name}.yaml", words)
    assert [line[0] for line in lines] == ["assemble.py", "finetune.py", "finetune.py", "evaluate.py"]
    for line in lines:
        command(line, folder)
    whole, other = (models.read(f / "student_assembled.pt")["model"] for f in (run, again))
    assert whole.keys() == other.keys() and all(torch.equal(whole[k], other[k]) for k in whole)
    assert len((again / "log.jsonl").read_text().splitlines()) == 2


def evaluated(name, folder, words):
    """The output of the student's evaluation with other words."""
    words = [*TWO_STEPS, *words, f"output_dir={folder / name}"]
    return command(["evaluate.py", "--config", f"configs/{name}.yaml", *words, "role=student"], folder)


def robust(run, name, words, folder, rendered):
    """The student on 200 classes of renditions, among which alone it chooses."""
    text = evaluated(name, folder, [*words, f"data.robustness=[{rendered}]"])
    assert f"{rendered}: 200 of 1000 classes are present" in text
    assert scores(run, "student")[rendered][2] == 200
