"""Promises of the commands: runs survive kills to the bit, processes agree, stages skip, resume, share and refuse.

Most commands run in a fork of this process, which is killed or patched without harm and spares torch's slow start;
some run as a user would start them.
"""

import ast
import contextlib
import copy
import datetime
import gc
import json
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo  # torch.optim imports it when first used: once here, not in every fork
import yaml

import data
import models
from conftest import ROOT

STAGE = dict(epochs=2, batch=8, accumulate=2, lr=0.05, warmup=0.5, clip=1, drop_path=0.2)  # 4 steps of 16 images
VIT = dict(patch=8, width=16, heads=2, mlp_ratio=2, init_std=0.1)
CONFIG = {
    "seed": 3, "device": "cpu",
    "data": dict(set="glyphs", image_size=16, classes=4, train_images=67, validation_images=23, test_images=29, pad=1,
                 mixup=0.8, cutmix=1.0, smoothing=0.1, workers=0, robustness=["renditions"]),
    "meta": dict(VIT, depths=[1, 1, 1]), "teacher": dict(VIT, depths=[1, 2, 1]),
    "distill": dict(alpha=0.5), "train": {s: dict(STAGE) for s in ("meta", "incubate", "teacher", "distill", "student")},
}
STUDENTS = {
    "vmoe": dict(VIT, kind="vmoe", width=24, depths=[2, 1, 1], experts=4, balance=0.01),
    "nac": dict(kind="nac", width=16, heads=2, head_width=8, latents=[4, 8, 2], propagators=1, tokenizer_blocks=1,
                grid_width=4, signature_width=8, graph_groups=2, sbm_groups=2, regularizer=0.1),
}
PIPELINE = [("finetune", "meta"), ("distill_module", "teacher"), ("assemble", "teacher"), ("finetune", "teacher"),
            ("distill_module", "student"), ("assemble", "student"), ("finetune", "student"), ("finetune", "baseline"),
            ("finetune", "baseline_kd"), ("evaluate", "all")]
# nothing random within a step, so that batches may be split
PLAIN = ["data.pad=0", "data.mixup=0", "data.cutmix=0", "student.balance=0", *(f"train.{s}.drop_path=0" for s in CONFIG["train"])]


# ----------------------------------------------------------------------------------------------------------------------
# Running commands


def write_config(folder, student="vmoe", **changes):
    """Writes the config of a run that lives in `folder` -> the path of the YAML."""
    config = copy.deepcopy(CONFIG) | {"student": STUDENTS[student], "output_dir": str(folder / "run")} | changes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{student}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(script, path, *words, before=None, env={}):
    """Starts a script's main() in a fork -> (pid, file of its output). before() runs first, in the fork."""
    out = path.with_name(f"{path.stem}.{env.get('RANK', 0)}.out")
    gc.freeze()  # or a collection in the fork touches, and so copies, all of this process's memory
    pid = os.fork()
    if pid:
        return pid, out
    code = 99
    try:
        with open(out, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.environ.update(env)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a command that ran in this process may have set its own
        torch.set_num_threads(1)
        warnings.simplefilter("error")  # our code gives none
        remove = models.remove  # finished stages leave their last optimiser's state, to be compared
        models.remove = lambda config, name: "unfinished" in name or remove(config, name)
        if before:
            before()
        sys.argv = [str(ROOT / f"{script}.py"), "--config", str(path), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(started, seconds=60):
    """Waits for a started command -> (exit code, or minus the signal's number; output). Kills it after `seconds`."""
    pid, out = started
    deadline = time.time() + seconds
    while not (status := os.waitpid(pid, os.WNOHANG))[0]:
        if time.time() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hung", out.read_text()
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status[1]), out.read_text()


def run(script, path, *words, before=None, expect=0):
    """Runs a command in a fork -> its output; its exit code must be `expect`."""
    code, text = end(start(script, path, *words, before=before))
    assert code == expect, (code, text)
    return text


def start_processes(world, script, path, *words, before=None):
    """Starts `world` processes of one group; before(rank) runs first in each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [start(script, path, *words, before=(lambda r=rank: before(r)) if before else None, env={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}) for rank in range(world)]


def run_processes(world, script, path, *words, before=None, expect=0, seconds=60):
    """The same, until they end -> the outputs."""
    ends = [end(one, seconds) for one in start_processes(world, script, path, *words, before=before)]
    assert [code for code, _ in ends] == [expect] * world, ends
    return [text for _, text in ends]


def shell(*words, **options):
    """Runs a command line as a user would -> CompletedProcess."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # for run.sh
    return subprocess.run([str(w) for w in words], cwd=ROOT, env=env, text=True,
                          **{"capture_output": True, "timeout": 120, **options})


def launch(script, path, *words):
    return shell(sys.executable, f"{script}.py", "--config", path, *words)


# the stages that train, each with the students that it depends on
CASES = [("vmoe", "finetune", "meta"), ("vmoe", "distill_module", "student"), ("nac", "distill_module", "student"),
         ("nac", "finetune", "student"), pytest.param("vmoe", "distill_module", "teacher", marks=pytest.mark.slow),
         pytest.param("vmoe", "finetune", "student", marks=pytest.mark.slow)]
every_case = pytest.mark.parametrize("done, script, role", CASES, indirect=["done"])
vmoe_only = pytest.mark.parametrize("done", ["vmoe"], indirect=True)
nac_only = pytest.mark.parametrize("done", ["nac"], indirect=True)


DONE = {}  # student -> its finished run


@pytest.fixture(params=["vmoe", "nac"])
def done(request, tmp_path_factory):
    """A run with every stage finished, made once for all tests -> (path of its config, its folder)."""
    student = request.param
    if student not in DONE:
        folder = tmp_path_factory.mktemp(student)
        path = write_config(folder, student)
        for script, role in PIPELINE:
            run(script, path, f"role={role}")
        DONE[student] = path, folder / "run"
    return DONE[student]


def beside(done, folder, script, role):
    """A copy of a finished run up to just before a stage -> (path of its config, its folder)."""
    path = folder / done[0].name
    path.write_text(done[0].read_text().replace(str(done[1]), str(folder / "run")))
    shutil.copytree(done[1], folder / "run")
    for old, old_role in PIPELINE[PIPELINE.index((script, role)):]:
        for name in {"finetune": [f"{old_role}.pt", f"{old_role}.unfinished.pt"], "assemble": [f"{old_role}_assembled.pt"],
                     "distill_module": [f"{old_role}_modules"], "evaluate": ["results.json"]}[old]:
            gone = folder / "run" / name
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    (folder / "run" / "log.jsonl").unlink()
    return path, folder / "run"


def stage_of(script, role):
    return {"teacher": "incubate", "student": "distill"}[role] if script == "distill_module" else role


def files_of(script, role):
    if script == "distill_module":
        return [f"{role}_modules/{name}.pt" for name in (0, 1, 2, "unfinished")]
    return [f"{role}.pt", f"{role}.unfinished.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Comparing runs


def log(folder, stage=None):
    """The log's lines, apart from times, in an order that does not depend on which module came first."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines
             if stage in (None, line["stage"])]
    return sorted(lines, key=lambda line: (line["stage"], line.get("module", -1), line["epoch"]))


def bits(content):
    """A checkpoint's content with each tensor as its bytes, and without the log's times."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {k: bits(v) for k, v in content.items() if k not in ("seconds", "images_per_second")}
    return [bits(v) for v in content] if isinstance(content, (list, tuple)) else content


def same_bits(one, two, names):
    for name in names:
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, two))
        assert bits(a) == bits(b), name


def same_run(one, two, script, role):
    same_bits(one, two, [f for f in files_of(script, role)  # what was unfinished is gone where real commands ran
                         if "unfinished" not in f or (one / f).exists() or (two / f).exists()])
    assert log(one, stage_of(script, role)) == log(two, stage_of(script, role))


def weights(path):
    return torch.cat([v.flatten() for v in torch.load(path, weights_only=True)["model"].values()])


# ----------------------------------------------------------------------------------------------------------------------
# Every stage


def test_every_stage_runs_and_the_run_folder_holds_what_is_promised(done):
    path, folder = done
    roles = ["meta", "teacher", "student", "baseline", "baseline_kd"]
    for name in ["config.yaml", "log.jsonl", "results.json", "teacher_assembled.pt", "student_assembled.pt",
                 *(f"{r}.pt" for r in roles), *(f"{r}_modules/{i}.pt" for r in ("teacher", "student") for i in range(3))]:
        assert (folder / name).exists(), name
    assert not list(folder.rglob("*.tmp"))
    results = json.loads((folder / "results.json").read_text())
    assert {(r["role"], r["set"]) for r in results} == {(r, s) for r in roles for s in ("test", "renditions")}
    assert all(r["images"] == 29 and r["top1"] <= r["top5"] and Path(r["checkpoint"]).exists() for r in results)
    assert models.load_config(folder / "config.yaml") == models.load_config(path)


def test_a_log_line_a_stage_module_and_epoch_has_the_promised_fields(done):
    lines = [json.loads(line) for line in (done[1] / "log.jsonl").read_text().splitlines()]
    fields = {"stage", "epoch", "step", "loss", "top1", "val_top1", "lr", "images_per_second", "seconds"}
    assert all(fields <= set(line) for line in lines)
    expected = [(s, m, e) for s in ("baseline", "baseline_kd", "distill", "incubate", "meta", "student", "teacher")
                for m in ((0, 1, 2) if s in ("distill", "incubate") else (None,)) for e in (1, 2)]
    assert [(line["stage"], line.get("module"), line["epoch"]) for line in log(done[1])] == expected
    assert all(line["step"] == 4 * line["epoch"] and line["images_per_second"] > 0 for line in lines)
    for line in lines if done[0].stem == "vmoe" else ():  # a collapsed router must be visible
        assert ("expert_load" in line) == (line["stage"] in ("distill", "student", "baseline", "baseline_kd"))
        for shares in line.get("expert_load", ()):
            assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=2e-3)


@vmoe_only
def test_checkpoints_hold_only_what_weights_only_reads(done):
    files = list(done[1].rglob("*.pt"))
    assert len(files) > 15
    for file in files:
        torch.load(file, weights_only=True)


def test_a_finished_stage_is_skipped_with_a_line_and_its_file_is_left_alone(done, tmp_path):
    path, folder = done
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.pt")}
    for script, role in PIPELINE[:-1]:
        text = run(script, path, f"role={role}")
        assert "finished; skipped" in text and len(text.splitlines()) == 1, text
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.pt")}


def test_the_same_folder_with_other_settings_is_refused_naming_the_key(done):
    for script, role, word in [("finetune", "meta", "meta.mlp_ratio=3"), ("finetune", "baseline", "train.student.lr=0.1"),
                               ("distill_module", "teacher", "train.incubate.epochs=3"),
                               ("distill_module", "student", "distill.alpha=0.25"), ("assemble", "student", "seed=4"),
                               ("finetune", "student", "data.mixup=0.5"), ("evaluate", "student", "train.meta.clip=2")]:
        text = run(script, done[0], f"role={role}", word, expect=2)
        assert word.split("=")[0] in text and "output_dir" in text and len(text.splitlines()) == 1, text


def test_what_does_not_change_a_result_may_differ(done):
    assert "skipped" in run("finetune", done[0], "role=meta", "data.workers=1", "data.test_images=5")


@vmoe_only
def test_share_takes_another_runs_finished_stages_but_none_made_with_other_settings(done, tmp_path):
    words = [f"output_dir={tmp_path / 'run'}", f"share={done[1]}", "distill.alpha=0.25"]
    for script, role in PIPELINE[:4]:
        assert str(done[1]) in (text := run(script, done[0], f"role={role}", *words)) or "skipped" in text, text
    assert not list(tmp_path.rglob("*.pt"))
    run("distill_module", done[0], *words)
    assert sorted(f.name for f in tmp_path.rglob("?.pt")) == ["0.pt", "1.pt", "2.pt"]
    # of several runs each stage is taken from whichever has it: modules from the one, all before them from the other
    words[:2] = [f"output_dir={tmp_path / 'more'}", f"share=[{tmp_path / 'run'}, {done[1]}]"]
    run("assemble", done[0], *words)
    assert "skipped" in run("distill_module", done[0], *words) and not (tmp_path / "more/student_modules").exists()


@vmoe_only
def test_a_file_made_before_a_key_existed_counts_as_made_with_its_default(done, tmp_path):
    path, folder = beside(done, tmp_path, "finetune", "teacher")
    content = models.read(folder / "meta.pt")
    old = json.loads(content["settings"])
    assert old.pop("train.meta.wrong_labels") == 0
    torch.save({**content, "settings": json.dumps(old)}, folder / "meta.pt")
    assert "skipped" in run("finetune", path, "role=meta")
    assert "wrong_labels=0.0 instead of 0.5" in run("finetune", path, "role=meta", "train.meta.wrong_labels=0.5", expect=2)


@vmoe_only
def test_force_repeats_a_finished_stage_to_the_same_bits(done, tmp_path):
    path, folder = beside(done, tmp_path, "finetune", "baseline_kd")
    for script, role in (("finetune", "baseline"), ("distill_module", "student")):
        assert "skipped" not in run(script, path, f"role={role}", "force=true")
        same_run(folder, done[1], script, role)


@vmoe_only
@pytest.mark.parametrize("script, role", [("finetune", "meta"), ("distill_module", "student")])
def test_a_forced_stage_that_is_stopped_goes_on_where_it_stopped(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    run(script, path, f"role={role}")
    finished = [folder / f for f in files_of(script, role) if "unfinished" not in f]
    (folder / "log.jsonl").unlink()  # a repetition's lines follow those of the first time
    # what is finished stays until the repetition has a checkpoint of its own
    run(script, path, f"role={role}", "force=true", before=die(models, "learning_rate", 2), expect=-signal.SIGKILL)
    assert all(file.exists() for file in finished)
    text = run(script, path, f"role={role}", "force=true", before=die(models, "learning_rate", 2, signal.SIGTERM), expect=143)
    assert text.endswith(f" role={role}\n") and not any(file.exists() for file in finished), text
    assert "resumed at step 2" in run(script, path, f"role={role}")
    same_run(folder, done[1], script, role)


@vmoe_only
def test_weights_given_by_checkpoint_are_scored_beside_the_runs_own(done, tmp_path):
    path, folder = beside(done, tmp_path, "evaluate", "all")
    other = write_config(tmp_path / "other")
    run("finetune", other, "role=baseline", "train.student.epochs=0")
    run("evaluate", path)
    own = json.loads((folder / "results.json").read_text())
    run("evaluate", path, f"checkpoint={tmp_path / 'other/run/baseline.pt'}")
    results = json.loads((folder / "results.json").read_text())
    assert results[:2] == own and [r["given"] for r in results] == [False, False, True, True]
    assert "role=" in run("evaluate", path, "role=all", "checkpoint=other.pt", expect=2)


@pytest.mark.parametrize("student", ["nac", pytest.param("vmoe", marks=pytest.mark.slow)])
def test_a_student_is_finetuned_and_scored_on_another_set_than_its_modules_are_distilled_on(tmp_path, student):
    """In the paper Tiny-ImageNet's students are distilled on ImageNet: other images, sizes, classes."""
    path = write_config(tmp_path, student, distill=dict(alpha=0), train={s: dict(STAGE, epochs=1) for s in CONFIG["train"]},
                        target=dict(image_size=24, classes=3, test_images=31, robustness=[]))
    for script, role in PIPELINE:
        if role not in ("teacher", "baseline_kd"):
            run(script, path, f"role={role}")
    results = json.loads((tmp_path / "run/results.json").read_text())
    own = {(r["role"], r["set"], r["images"]) for r in results}
    assert own == {("student", "test", 31), ("baseline", "test", 31)} | {
        ("meta", s, 29) for s in ("test", "renditions")}
    assert models.load_config(tmp_path / "run/config.yaml") == models.load_config(path)
    assert "finished; skipped" in run("finetune", path)
    text = run("finetune", path, "role=baseline", "target.classes=4", expect=2)
    assert "target.classes=3 instead of 4" in text and len(text.splitlines()) == 1, text


# ----------------------------------------------------------------------------------------------------------------------
# The method's identities


@pytest.mark.parametrize("done, role", [("vmoe", "teacher"), ("nac", "student")], indirect=["done"])
def test_all_modules_in_one_pass_are_the_modules_trained_one_by_one(done, tmp_path, role):
    path, folder = beside(done, tmp_path, "distill_module", role)
    for i in (2, 0, 1):
        run("distill_module", path, f"role={role}", f"module={i}")
    same_bits(folder, done[1], files_of("distill_module", role)[:3])
    assert log(folder) == log(done[1], stage_of("distill_module", role))


@pytest.mark.parametrize("codes", ["fresh", pytest.param("original", marks=pytest.mark.slow)])
def test_with_other_codes_too_one_pass_is_one_by_one(tmp_path, codes):
    path = write_config(tmp_path, "nac")
    run("finetune", path, "role=meta")
    words = [f"distill.codes={codes}", "distill.alpha=0"]
    run("distill_module", path, *words)
    shutil.move(tmp_path / "run" / "student_modules", tmp_path / "together")
    for i in range(3):
        run("distill_module", path, *words, f"module={i}")
        same_bits(tmp_path / "together", tmp_path / "run" / "student_modules", [f"{i}.pt"])


def test_alpha_0_needs_no_teacher_and_any_other_asks_for_it(tmp_path):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta")
    assert "teacher.pt is not there yet" in run("distill_module", path, expect=2)
    run("distill_module", path, "distill.alpha=0")


@pytest.mark.parametrize("done, script, role", [("nac", "distill_module", "student"), ("vmoe", "finetune", "baseline_kd")],
                         indirect=["done"])
def test_alpha_1_does_not_look_at_labels_and_one_half_does(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    name = files_of(script, role)[0]
    load = data.load

    def wrong_labels():
        def shifted(*args, **options):
            images = load(*args, **options)
            images.labels = (images.labels + 1) % 4
            return images
        data.load = shifted

    result = {}
    for alpha in (1, 0.5):
        for lie in (None, wrong_labels):
            run(script, path, f"role={role}", f"distill.alpha={alpha}", "force=true", before=lie)
            result[alpha, lie] = weights(folder / name)
    assert torch.equal(result[1, None], result[1, wrong_labels])
    assert not torch.equal(result[0.5, None], result[0.5, wrong_labels])


def without_noise(rank=0):
    """Patches the process: what the NAC draws is its mean, and SGD shows gradients where Adam would hide their size."""
    torch.randn_like, torch.rand_like = torch.zeros_like, lambda x: torch.full_like(x, 0.5)
    torch.rand = lambda *shape, **options: torch.full(shape if type(shape[0]) is int else shape[0], 0.5, **options)
    torch.Tensor.exponential_ = lambda self: self.fill_(1)
    models.optimizer = lambda module, c: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)


@every_case
def test_half_the_batch_in_two_processes_or_two_steps_is_the_whole_batch(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    stage = stage_of(script, role)
    base = [f"role={role}", "force=true", *PLAIN, f"train.{stage}.lr=50"]
    # the stages before had other settings, which this test does not mind: it compares like with like
    any_settings = lambda rank=0: (without_noise(), setattr(models, "difference", lambda *_: None))
    result, lines = [], []
    for world, batch, accumulate in ((1, 16, 1), (1, 8, 2), (2, 8, 1)):
        (folder / "log.jsonl").unlink(missing_ok=True)
        words = [*base, f"train.{stage}.batch={batch}", f"train.{stage}.accumulate={accumulate}"]
        if world == 1:
            run(script, path, *words, before=any_settings)
        else:
            run_processes(world, script, path, *words, before=any_settings)
        result.append(torch.cat([weights(folder / f) for f in files_of(script, role) if "unfinished" not in f]))
        lines.append(log(folder, stage))
    start = models.build(models.load_config(path), role)
    if script == "finetune" and role == "student":
        models.load_weights(start, folder / "student_assembled.pt")
    if script == "finetune":
        start = torch.cat([v.flatten() for v in start.state_dict().values()])
        assert (result[0] - start).norm() > 0.01 * start.norm()  # it learnt something
    for other, line in zip(result[1:], lines[1:]):
        assert (other - result[0]).norm() < 1e-5 * result[0].norm()
        for a, b in zip(line, lines[0], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert (a["top1"], a["val_top1"], a["step"]) == (b["top1"], b["val_top1"], b["step"])


def test_processes_that_round_differently_train_the_same_weights(tmp_path):
    def rounds_differently(rank):
        build = models.build

        def other(config, role):
            model = build(config, role)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 1e-3 * rank)
            return model
        models.build = other

    for name, before in (("a", None), ("b", rounds_differently)):
        run_processes(2, "finetune", write_config(tmp_path / name), "role=baseline", "train.student.batch=4", before=before)
    same_run(tmp_path / "a/run", tmp_path / "b/run", "finetune", "baseline")


def test_same_seed_twice_gives_the_same_bits_with_workers_and_another_seed_does_not(tmp_path):
    words = ["role=baseline", "data.resized_crop=[0.5, 1]", "data.randaugment=9", "data.erasing=0.5", "data.repeats=2"]
    result = []
    for name, *more in (("a", "data.workers=0"), ("b", "data.workers=2"), ("c", "data.workers=0", "seed=4")):
        run("finetune", write_config(tmp_path / name), *words, *more)
        result.append(weights(tmp_path / name / "run" / "baseline.pt"))
    assert torch.equal(result[0], result[1]) and not torch.equal(result[0], result[2])


# ----------------------------------------------------------------------------------------------------------------------
# Kills


def die(owner, name, call, signum=signal.SIGKILL, after=False):
    """-> a function for `before`: the process signals itself at the given call (from 1) of owner.name."""
    def patch(rank=0):
        original, count = getattr(owner, name), [0]

        def counted(*args, **options):
            count[0] += 1
            if count[0] == call and not after:
                os.kill(os.getpid(), signum)
            result = original(*args, **options)
            if count[0] == call and after:
                os.kill(os.getpid(), signum)
            return result
        setattr(owner, name, counted)
    return patch


KILLS = {  # in the order of a run: each kill hits the run that the one before left
    "in the first epoch": die(data, "eval_batches", 1),
    "while the first checkpoint is written": die(os, "fsync", 1),
    "between the epoch's checkpoint and its log line": die(models, "add_log", 1),
    "in the second epoch, after a resume": die(models, "learning_rate", 2),
    "before the second checkpoint gets its name": die(os, "replace", 2),  # the first is config.yaml's
    "with all steps done": die(models, "save_finished", 1),
    "after the first result": die(models, "save_finished", 1, after=True),
}


@every_case
def test_a_run_killed_at_seven_places_ends_as_the_unbroken_run(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    for place, kill in KILLS.items():
        run(script, path, f"role={role}", before=kill, expect=-signal.SIGKILL)
    run(script, path, f"role={role}")
    same_run(folder, done[1], script, role)


@every_case
def test_sigterm_saves_at_once_and_the_resumed_run_is_the_unbroken_one(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    for call, step in ((2, 2), (2, 4), (3, 7)):  # within an epoch, at its end, within the next
        text = run(script, path, f"role={role}", before=die(models, "learning_rate", call, signal.SIGTERM), expect=143)
        assert f"to go on: python {ROOT}/{script}.py --config {path} role={role}\n" in text, text
        assert torch.load(folder / files_of(script, role)[-1], weights_only=True)["step"] == step
    assert "resumed at step 7" in run(script, path, f"role={role}")
    same_run(folder, done[1], script, role)


@vmoe_only
@pytest.mark.parametrize("script, role, call", [("finetune", "student", 1), ("distill_module", "student", 3)])
def test_sigterm_during_validation_leaves_right_after_it(done, tmp_path, script, role, call):
    path, folder = beside(done, tmp_path, script, role)
    assert "to go on: python" in run(script, path, f"role={role}", before=die(data, "eval_batches", call, signal.SIGTERM), expect=143)
    assert torch.load(folder / files_of(script, role)[-1], weights_only=True)["step"] == 4
    assert "resumed at step 4" in run(script, path, f"role={role}")
    same_run(folder, done[1], script, role)


@vmoe_only
def test_sigterm_before_the_first_step_or_in_evaluation_ends_at_once_and_harms_nothing(done, tmp_path):
    path, folder = beside(done, tmp_path, "finetune", "student")
    run("finetune", path, before=die(models, "learning_rate", 6), expect=-signal.SIGKILL)
    run("finetune", path, before=die(data, "steps_per_epoch", 1, signal.SIGTERM), expect=-signal.SIGTERM)
    run("finetune", path)
    same_run(folder, done[1], "finetune", "student")
    run("evaluate", path, "role=meta")
    good = (folder / "results.json").read_text()
    run("evaluate", path, "role=student", before=die(data, "eval_batches", 1, signal.SIGTERM), expect=-signal.SIGTERM)
    assert (folder / "results.json").read_text() == good


@pytest.mark.parametrize("script", ["finetune", "distill_module"])
def test_sigterm_that_reaches_three_processes_at_different_steps_stops_all_at_one_step(tmp_path, script):
    words = ["data.train_images=134", "train.meta.batch=2", "train.meta.accumulate=1", "train.distill.batch=2",
             "train.distill.accumulate=1", "train.distill.epochs=1", "train.meta.epochs=1", "distill.alpha=0"]  # 22 steps
    role = {"finetune": "meta", "distill_module": "student"}[script]
    for name in "ab":
        path = write_config(tmp_path / name)
        if script == "distill_module":
            run("finetune", path, "role=meta", *words)
        if name == "a":
            run_processes(3, script, path, f"role={role}", *words, expect=143, seconds=30,
                          before=lambda rank: die(models, "learning_rate", 5 + rank, signal.SIGTERM)())
        run_processes(3, script, path, f"role={role}", *words)
    # to the bit: of three numbers the sum depends on the order, which a resumed run must not change
    same_run(tmp_path / "a/run", tmp_path / "b/run", script, role)


def test_a_run_is_not_resumed_with_another_number_of_processes(tmp_path):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta", before=die(models, "learning_rate", 2, signal.SIGTERM), expect=143)
    for text in run_processes(2, "finetune", path, "role=meta", expect=2)[:1]:
        assert "processes" in text and len(text.splitlines()) == 1, text


@nac_only
def test_modules_trained_side_by_side_do_not_disturb_one_another(done, tmp_path):
    path, folder = beside(done, tmp_path, "distill_module", "student")
    jobs = []
    for i in range(3):
        own = path.with_name(f"job{i}.yaml")
        shutil.copy(path, own)
        jobs.append(start("distill_module", own, f"module={i}"))
    assert [end(job)[0] for job in jobs] == [0, 0, 0]
    same_bits(folder, done[1], files_of("distill_module", "student")[:3])
    assert log(folder) == log(done[1], "distill")


@vmoe_only
def test_a_module_that_an_unfinished_pass_lacks_is_named_not_lost(done, tmp_path):
    path, folder = beside(done, tmp_path, "distill_module", "student")
    run("distill_module", path, "module=2")
    run("distill_module", path, before=die(models, "learning_rate", 6), expect=-signal.SIGKILL)
    (folder / "student_modules/2.pt").unlink()
    text = run("distill_module", path, expect=2)
    assert "module=2" in text.splitlines()[-1] and "Traceback" not in text, text
    run("distill_module", path, "module=2")
    run("distill_module", path)
    same_bits(folder, done[1], files_of("distill_module", "student")[:3])


@vmoe_only
@pytest.mark.parametrize("script, role, words", [
    ("finetune", "meta", ["train.meta.lr=1e29", "train.meta.clip=0"]),
    ("distill_module", "teacher", ["train.incubate.lr=1e29", "train.incubate.clip=0"])])
def test_a_loss_that_is_not_finite_stops_the_run_with_one_sentence_that_names_the_step(done, tmp_path, script, role, words):
    path, folder = beside(done, tmp_path, script, role)
    text = run(script, path, f"role={role}", *words, expect=2)
    assert "not finite" in text.splitlines()[-1] and re.search(r"step \d", text) and "Traceback" not in text, text
    assert not (folder / files_of(script, role)[0]).exists()


def test_weights_that_are_not_finite_are_never_a_result(tmp_path):
    """The last update can overflow after the last loss was fine."""
    path = write_config(tmp_path)

    def overflow():
        update = models.update

        def last(parts, lr, clip):
            update(parts, lr, clip)
            last.calls += 1
            if last.calls == 8:
                next(parts["meta"][0].parameters()).data.fill_(torch.inf)
        last.calls = 0
        models.update = last

    text = run("finetune", path, "role=meta", before=overflow, expect=2)
    assert "cls_token" in text.splitlines()[-1] and "not finite" in text, text
    assert not (tmp_path / "run/meta.pt").exists()


def no_room(name):
    """-> a function for `before`: the file of this name cannot be written."""
    def patch(rank=0):
        replace = os.replace
        os.replace = lambda old, new: (_ for _ in ()).throw(OSError(28, "No space left on device")) if Path(new).name == name else replace(old, new)
    return patch


def small_disk(rank=0):
    """No file may be larger than 20,000 bytes: the config fits, a checkpoint does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))


FULL = {"the config": no_room("config.yaml"), "the first checkpoint": no_room("student.unfinished.pt"), "the result": no_room("student.pt"),
        "in a checkpoint's middle": small_disk}


@vmoe_only
@pytest.mark.parametrize("place", FULL)
def test_a_full_disk_is_one_sentence_and_harms_nothing(done, tmp_path, place):
    path, folder = beside(done, tmp_path, "finetune", "student")
    run("finetune", path, before=die(models, "learning_rate", 6), expect=-signal.SIGKILL)
    good = bits(torch.load(folder / "student.unfinished.pt", weights_only=True))
    text = run("finetune", path, before=FULL[place], expect=2)
    assert "cannot be written" in text.splitlines()[-1] and "Traceback" not in text and not list(folder.rglob("*.tmp")), text
    if place != "the result":
        assert bits(torch.load(folder / "student.unfinished.pt", weights_only=True)) == good
    run("finetune", path)
    same_run(folder, done[1], "finetune", "student")


@every_case
def test_a_disk_that_fills_up_within_a_line_of_the_log_costs_no_line(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    other = {"stage": "other", "epoch": 1}
    (folder / "log.jsonl").write_text((json.dumps(other) + "\n") * 500)  # longer than what the command prints

    def room_for_part_of_a_line(rank=0):
        add_log = models.add_log

        def cut(*args):
            size = (folder / "log.jsonl").stat().st_size + 30
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            add_log(*args)
        models.add_log = cut

    for _ in range(2):  # the second time the first attempt's half line is there
        text = run(script, path, f"role={role}", before=room_for_part_of_a_line, expect=2)
        assert "log.jsonl cannot be written" in text.splitlines()[-1] and "Traceback" not in text, text
        assert not (folder / "log.jsonl").read_text().endswith("\n")
    run(script, path, f"role={role}")
    same_run(folder, done[1], script, role)
    assert log(folder, "other") == [other] * 500


@vmoe_only
@pytest.mark.parametrize("script, role", [("finetune", "meta"), ("distill_module", "teacher")])
def test_a_run_folder_that_vanishes_is_one_sentence_and_is_not_made_again(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)

    def vanish(rank=0):
        rate = models.learning_rate
        models.learning_rate = lambda *args: (shutil.rmtree(folder, ignore_errors=True), rate(*args))[1]

    text = run(script, path, f"role={role}", before=vanish, expect=2)
    assert "has vanished" in text.splitlines()[-1] and str(folder) in text and "Traceback" not in text, text
    assert not folder.exists()


@vmoe_only
def test_a_file_of_the_run_that_is_a_folder_is_one_sentence(done, tmp_path):
    path, folder = beside(done, tmp_path, "finetune", "student")
    for script, name in (("finetune", "config.yaml"), ("evaluate", "results.json"), ("finetune", "log.jsonl"), ("finetune", "student.pt")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        text = run(script, path, "role=meta" if script == "evaluate" else "role=student", expect=2)
        assert name in text.splitlines()[-1] and "Traceback" not in text, text
        (folder / name).rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Several processes of which one fails


@pytest.mark.parametrize("script, role", [("finetune", "meta"), ("distill_module", "teacher")])
def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_the_step(tmp_path, script, role):
    path = write_config(tmp_path)
    if script == "distill_module":
        run("finetune", path, "role=meta")

    def poison(rank):
        batches = data.train_batches
        if rank == 1:
            data.train_batches = lambda *args, **options: ((images * torch.nan, labels) for images, labels in batches(*args, **options))

    for text in run_processes(2, script, path, f"role={role}", before=poison, expect=2, seconds=30):
        assert re.search(r"loss.* at step 2 is not finite", text.splitlines()[-1]) and "Traceback" not in text, text
    assert not any((tmp_path / "run" / name).exists() for name in files_of(script, role))


def test_a_hung_process_ends_the_others_after_the_stated_patience(tmp_path):
    assert data.PATIENCE == datetime.timedelta(minutes=30)  # as in the README

    def hang(rank):
        data.PATIENCE = datetime.timedelta(seconds=3)
        if rank == 1:
            rate, calls = models.learning_rate, []
            models.learning_rate = lambda *args: (calls.append(1), time.sleep(50 * (len(calls) == 2)), rate(*args))[-1]

    waiting, hung = start_processes(2, "finetune", write_config(tmp_path), "role=meta", before=hang)
    began = time.time()
    code, text = end(waiting, seconds=30)
    assert code == 99 and "Timed out" in text and time.time() - began < 25, (code, text)
    os.kill(hung[0], signal.SIGKILL)
    end(hung)


def test_an_error_in_one_process_leaves_none_hanging(tmp_path):
    path = write_config(tmp_path)
    ends = [end(one, 30) for one in start_processes(2, "finetune", path, "role=meta", before=lambda rank: rank or no_room("meta.unfinished.pt")())]
    assert ends[0][0] == 2 and "cannot be written" in ends[0][1] and ends[1][0] not in (0, "hung"), ends


# ----------------------------------------------------------------------------------------------------------------------
# As a user starts them


@nac_only
def test_two_processes_run_every_stage_and_count_every_image_once(done, tmp_path):
    path = write_config(tmp_path, done[0].stem)
    for script, role in PIPELINE:
        run_processes(2, script, path, f"role={role}", *(f"train.{s}.batch=4" for s in CONFIG["train"]))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert len(results) == 10 and {r["images"] for r in results} == {29}
    assert all(r["top5"] == 100 for r in results)  # of four classes: any image left out or counted twice would show


@pytest.mark.parametrize("codes", ["fresh", pytest.param("original", marks=pytest.mark.slow)])
def test_two_processes_train_modules_with_other_codes(tmp_path, codes):
    path = write_config(tmp_path, "nac")
    run("finetune", path, "role=meta")
    run_processes(2, "distill_module", path, f"distill.codes={codes}", "distill.alpha=0", "train.distill.batch=4")


@nac_only
def test_one_and_three_processes_evaluate_to_the_same_numbers(done, tmp_path):
    path, folder = beside(done, tmp_path, "evaluate", "all")
    run_processes(3, "evaluate", path, "role=all")
    one, three = (json.loads((f / "results.json").read_text()) for f in (done[1], folder))
    for a, b in zip(one, three, strict=True):
        assert {**a, "checkpoint": ""} == {**b, "checkpoint": ""} and a["top5"] == 100  # of four classes


def stopped(line, signal_to, seconds=90):
    """Starts a command line, sends SIGTERM in its second epoch -> its exit code, its output."""
    job = subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "epoch 2" not in (text := job.stdout.readline()):
        assert text, "it ended"
    signal_to(job.pid, signal.SIGTERM)
    return job.communicate(timeout=seconds)[0], job.returncode


def test_a_command_stopped_by_sigterm_goes_on_with_the_line_it_prints(tmp_path):
    """The whole group gets the signal, as from a scheduler: processes that read images too."""
    path, words = write_config(tmp_path / "broken run"), ["role=meta", "train.meta.epochs=30", "data.randaugment=9", "data.workers=2"]
    text, code = stopped([sys.executable, "finetune.py", "--config", path, *words], os.killpg)
    assert code == 143, text
    line = re.search("to go on: (.*)", text)[1]
    again = shell(sys.executable, *shlex.split(line)[1:])
    assert again.returncode == 0 and "resumed at step" in again.stdout, again
    whole = write_config(tmp_path / "unbroken")
    run("finetune", whole, *words, "data.workers=0")
    assert torch.equal(weights(tmp_path / "broken run/run/meta.pt"), weights(tmp_path / "unbroken/run/meta.pt"))
    assert not list((tmp_path / "broken run/run").glob("meta.*.*"))  # nothing unfinished is left


def torchrun(processes, *words, options=()):
    return shell(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options,
                 *words)


def test_torchrun_trains_all_modules(tmp_path):
    path = write_config(tmp_path, "nac")
    run("finetune", path, "role=meta")
    text = torchrun(2, "distill_module.py", "--config", path, "distill.alpha=0")
    assert text.returncode == 0, text
    assert len(log(tmp_path / "run", "distill")) == 6


def two_machines(line, processes=1):
    """Runs a line of bash twice, as on two machines; LAUNCH is README's torchrun line for that -> the outputs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
           "LAUNCH": f"torchrun --nnodes=2 --nproc_per_node={processes} --rdzv_backend=c10d --rdzv_endpoint=localhost:{port}"}
    agents = [subprocess.Popen(["bash", "-c", line], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True) for _ in range(2)]
    try:
        texts = [agent.communicate(timeout=400)[0] for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                os.killpg(agent.pid, signal.SIGKILL)
    assert [agent.returncode for agent in agents] == [0, 0], texts
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_two_torchrun_agents_train_what_one_with_as_many_processes_does(tmp_path, processes):
    one, two = (write_config(tmp_path / name, "nac") for name in ("one", "two"))
    for script, words in (("finetune", ["role=meta"]), ("distill_module", ["distill.alpha=0"])):
        text = torchrun(2 * processes, f"{script}.py", "--config", one, *words)
        assert text.returncode == 0, text
        texts = two_machines(f"$LAUNCH {script}.py --config {two} {' '.join(words)}", processes)
        assert sum("parameters" in text for text in texts) == 1, texts  # one of all processes is the first
    same_run(tmp_path / "one/run", tmp_path / "two/run", "finetune", "meta")
    same_run(tmp_path / "one/run", tmp_path / "two/run", "distill_module", "student")


@pytest.mark.slow
def test_run_sh_on_two_machines_runs_the_whole_method(tmp_path):
    path = write_config(tmp_path, "nac")
    two_machines(f"bash run.sh {path}")
    lines = [(line["stage"], line.get("module"), line["epoch"]) for line in log(tmp_path / "run")]
    assert len(lines) == len(set(lines)) == 2 * (3 + 3 + 4)  # meta, teacher, student, baseline; each module twice
    assert {r["images"] for r in json.loads((tmp_path / "run/results.json").read_text())} == {29}


@pytest.mark.slow
def test_torchrun_stopped_by_sigterm_goes_on_with_the_line_it_prints(tmp_path):
    path, words = write_config(tmp_path), ["role=meta", "train.meta.epochs=300"]
    text, code = stopped([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "finetune.py", "--config", path,
                          *words], os.kill)
    assert code, text
    program, *line = shlex.split(re.search("to go on: (.*)", text)[1])
    assert program == "torchrun", line
    again = shell(sys.executable, "-m", "torch.distributed.run", *line)
    assert again.returncode == 0 and "resumed at step" in again.stdout, again
    assert (tmp_path / "run/meta.pt").exists()


@pytest.mark.slow
def test_torchrun_runs_every_stage(done, tmp_path):
    path = write_config(tmp_path, done[0].stem)
    for script, role in PIPELINE:
        text = torchrun(2, f"{script}.py", "--config", path, f"role={role}")
        assert text.returncode == 0, text


@pytest.mark.slow
def test_run_sh_runs_the_whole_method(tmp_path):
    path = write_config(tmp_path, "nac")
    text = shell("bash", "run.sh", path, "train.baseline_epochs=1")
    assert text.returncode == 0 and "| student" in text.stdout, text
    again = shell("bash", "run.sh", path, "train.baseline_epochs=1")
    assert again.returncode == 0 and again.stdout.count("skipped") == 8, again


@pytest.mark.slow
@pytest.mark.parametrize("student", ["vmoe", "nac"])
def test_twenty_kills_at_random_moments_make_no_difference(tmp_path, student):
    """SIGKILLs of real commands, anywhere between the start and the last write, over all training stages: mixup, cutmix,
    repeated augmentation, two workers, gradient accumulation, all modules in one pass; two stages in two processes."""
    rng, kills = random.Random(0), 0
    words = [f"train.{stage}.epochs=12" for stage in CONFIG["train"]] + [
        "data.randaugment=9", "data.erasing=0.25", "data.resized_crop=[0.3, 1]", "data.flip=0.5", "data.repeats=3", "data.workers=2"]
    jobs = [(s, r) for s, r in PIPELINE if s not in ("evaluate", "assemble")]
    two = [("finetune", "baseline"), ("distill_module", "student")]
    paths = {name: write_config(tmp_path / name, student) for name in ("broken", "unbroken")}

    def line(name, script, role):
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if (script, role) in two else []
        return [sys.executable, *start, f"{script}.py", "--config", paths[name], f"role={role}", *words]

    for script, role in PIPELINE[:-1]:
        assert (done := shell(*line("unbroken", script, role))).returncode == 0, done
    for script, role in PIPELINE[:-1]:
        for _ in range(3 if (script, role) in jobs else 0):
            job = subprocess.Popen(line("broken", script, role), cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True,
                                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            job.stdout.readline()  # it has begun
            time.sleep(rng.uniform(0, 2))
            kills += job.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # with its workers, as a scheduler does
            job.communicate()
        assert (done := shell(*line("broken", script, role))).returncode == 0, done
        if script != "assemble":
            same_run(tmp_path / "broken/run", tmp_path / "unbroken/run", script, role)
    assert kills >= 18
    assert log(tmp_path / "broken/run") == log(tmp_path / "unbroken/run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_after_a_killed_worker_and_ends_as_an_unbroken_run(tmp_path, victim):
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import models
original, calls = models.learning_rate, []
def counted(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "{victim}" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
models.learning_rate = counted
sys.argv[0] = "finetune.py"
runpy.run_path({str(ROOT / 'finetune.py')!r}, run_name="__main__")
""")
    broken, unbroken = (write_config(tmp_path / name) for name in ("broken", "unbroken"))
    text = torchrun(2, script, "--config", broken, "role=meta", options=["--max-restarts=1"])
    assert text.returncode == 0 and "resumed at step 2" in text.stdout, text  # two epochs of two steps
    assert torchrun(2, "finetune.py", "--config", unbroken, "role=meta").returncode == 0
    same_run(tmp_path / "broken/run", tmp_path / "unbroken/run", "finetune", "meta")


# ----------------------------------------------------------------------------------------------------------------------
# Python and torch


@pytest.mark.slow
def test_the_scripts_give_no_warning(tmp_path):
    path = write_config(tmp_path)
    for script, role in PIPELINE:
        text = shell(sys.executable, "-W", "error", f"{script}.py", "--config", path, f"role={role}")
        assert text.returncode == 0 and "Warning" not in text.stderr, text


def test_the_code_is_python_3_10():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        ast.parse(file.read_text(), feature_version=(3, 10))
