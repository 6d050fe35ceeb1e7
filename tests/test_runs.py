"""Promises of the commands, beside what they compute:

  - every stage writes the files and the log lines that the README names; a finished stage is skipped,
    another run's stages are shared, and a folder of other settings or of another data set is refused;
  - all modules in one pass = one by one; half the batch in two processes = the whole batch; same seed, same
    bits;
  - a kill at any moment, a signal, a full disk or a lost folder costs time and no result: what is started
    again ends with the weights, optimizer states and log of a run that nobody disturbed;
  - several processes count every image once, stop together and never wait for one another without end.

Most commands run in a fork of this process: it can be killed or patched without harm, and torch is loaded
once. The others run as a user starts them.
"""

import atexit
import contextlib
import copy
import datetime
import errno
import fcntl
import functools
import gc
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo  # torch.optim imports it when first used: once here, not in every fork
import yaml
from PIL import Image

import conftest
import data
import models
from conftest import ENV, ROOT, one_sentence
from tools import prepare

# 4 steps of 16 images
STAGE = dict(epochs=2, batch=8, accumulate=2, lr=0.05, warmup=0.5, clip=1, drop_path=0.2)
STAGES = ("meta", "incubate", "teacher", "distill", "student")
VIT = dict(patch=8, width=16, heads=2, mlp_ratio=2, init_std=0.1)
CONFIG = {
    "seed": 3, "device": "cpu",
    "data": dict(image_size=16, train_images=67, pad=1, mixup=0.8, cutmix=1.0, smoothing=0.1, workers=0,
                 robustness=["renditions"]),
    "meta": dict(VIT, depths=[1, 1, 1]), "teacher": dict(VIT, depths=[1, 2, 1]),
    "distill": dict(alpha=0.5), "assemble": dict(graph_groups=2),
    "train": {s: dict(STAGE) for s in STAGES},
}
CONFIG["train"]["student"] |= dict(regularizer=0.1, block_groups=2)
STUDENTS = {
    "vmoe": dict(VIT, kind="vmoe", width=24, depths=[2, 1, 1], experts=4, balance=0.01),
    "nac": dict(kind="nac", width=16, heads=2, head_width=8, latents=[4, 8, 2], propagators=1, grid_width=4,
                tokenizer_blocks=1, signature_width=8),
}
PIPELINE = [("finetune", "meta"), ("distill_module", "teacher"), ("assemble", "teacher"),
            ("finetune", "teacher"), ("distill_module", "student"), ("assemble", "student"),
            ("finetune", "student"), ("finetune", "baseline"), ("finetune", "baseline_kd"),
            ("evaluate", "all")]
# nothing random within a step, so that batches may be split
PLAIN = ["data.pad=0", "data.mixup=0", "data.cutmix=0", "student.balance=0", "train.*.drop_path=0"]


# ---------- Running commands

shell = functools.partial(conftest.shell, cwd=ROOT)


@functools.cache
def drawn(characters="ABCD", train=670):
    """Draws a set at 16 pixels, a class a character: 23 images to validate, 29 to test -> its .npz."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with contextlib.redirect_stdout(None):
        prepare.draw_set(characters, folder / "set.npz", train, validation=23, test=29, size=16)
    return folder / "set.npz"


def write_config(folder, student="vmoe", **changes):
    """Writes the config of a run that lives in `folder` -> the path of the YAML."""
    config = copy.deepcopy(CONFIG) | {"output_dir": str(folder / "run"), "student": STUDENTS[student]}
    config |= changes
    config["data"] = {"root": str(drawn()), **config["data"]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{student}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


UNLINK = Path.unlink  # as it is for users; see start()


def start(script, path, *words, before=None, rank=0, env=()):
    """Starts a script's main() in a fork -> (pid, file of its output). before() runs first, in the fork."""
    out = path.with_name(f"{path.stem}.{rank}.out")
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
        # A command that ran in this process may have set its own, and pytest has one for Ctrl-C.
        for number in data.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        warnings.simplefilter("error")  # the code gives none
        # Finished stages leave their last checkpoint, so that optimizer states can be compared.
        Path.unlink = lambda self, **o: self.name.endswith("unfinished.pt") or UNLINK(self, **o)
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
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a test has closed it
                stream.flush()
        os._exit(code)


def end(started, seconds=60):
    """Waits for a started command -> (exit code or minus the signal, output). Kills it if it hangs."""
    pid, out = started
    deadline = time.time() + seconds
    while not (status := os.waitpid(pid, os.WNOHANG))[0]:
        if time.time() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hung", out.read_text()
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status[1]), out.read_text()


def wait_for_a_line(started, seconds=60):
    """Waits until a started command has printed something."""
    while not (started[1].exists() and started[1].read_text()):
        assert (seconds := seconds - 0.05) > 0, "it printed nothing"
        time.sleep(0.05)


def run(script, path, *words, before=None, expect=0):
    """Runs a command in a fork -> its output; its exit code must be `expect`."""
    code, text = end(start(script, path, *words, before=before))
    assert code == expect, (code, text)
    return text


def start_processes(world, script, path, *words, before=None):
    """Starts `world` processes of one group; before(rank) runs first in each. A list has a path for each."""
    paths = path if isinstance(path, list) else [path] * world
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return [start(script, path, *words, before=(lambda r=rank: before(r)) if before else None, rank=rank,
                  env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank, path in enumerate(paths)]


def run_processes(world, script, path, *words, before=None, expect=0, seconds=60):
    """The same, until they end -> the outputs."""
    ends = [end(one, seconds) for one in start_processes(world, script, path, *words, before=before)]
    assert [code for code, _ in ends] == [expect] * world, ends
    return [text for _, text in ends]


# the stages that train, each with the students that it depends on
CASES = [("vmoe", "finetune", "meta"), ("vmoe", "distill_module", "student"),
         ("nac", "distill_module", "student"), ("nac", "finetune", "student"),
         pytest.param("vmoe", "distill_module", "teacher", marks=pytest.mark.slow),
         pytest.param("vmoe", "finetune", "student", marks=pytest.mark.slow)]
every_case = pytest.mark.parametrize("done, script, role", CASES, indirect=["done"])
vmoe_only = pytest.mark.parametrize("done", ["vmoe"], indirect=True)

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


def files_of(script, role):
    """What a stage writes: its results, and the checkpoint that it goes on from."""
    if script == "distill_module":
        return [f"{role}_modules/{name}.pt" for name in (0, 1, 2, "unfinished")]
    return {"assemble": [f"{role}_assembled.pt"], "evaluate": ["results.json"]}.get(
        script, [f"{role}.pt", f"{role}.unfinished.pt"])


def beside(done, folder, script, role):
    """A copy of a finished run up to just before a stage -> (path of its config, its folder)."""
    path = folder / done[0].name
    path.write_text(done[0].read_text().replace(str(done[1]), str(folder / "run")))
    shutil.copytree(done[1], folder / "run")
    for later in PIPELINE[PIPELINE.index((script, role)):]:
        for name in files_of(*later):
            (folder / "run" / name).unlink()
    (folder / "run" / "log.jsonl").unlink()
    return path, folder / "run"


def stage_of(script, role):
    return {"teacher": "incubate", "student": "distill"}[role] if script == "distill_module" else role


# ---------- Comparing runs

TIMES = ("seconds", "images_per_second")


def log(folder, stage=None, without=()):
    """The log's lines apart from times, in an order that does not depend on which module came first.

    Of a stage, module and epoch the last one counts. A line that was cut short is none.
    """
    lines = {}
    for text in (folder / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if stage in (None, line["stage"]):
                place = line["stage"], str(line["module"]), line["epoch"]
                lines[place] = {k: v for k, v in line.items() if k not in (*TIMES, *without)}
    return [lines[place] for place in sorted(lines)]


def bits(content):
    """A checkpoint's content with each tensor as its bytes."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape), content.numpy().tobytes()
    if isinstance(content, dict):
        return {k: bits(v) for k, v in content.items() if k not in ("output_dir", "config")}
    return [bits(v) for v in content] if isinstance(content, (list, tuple)) else content


def same_bits(one, two, names):
    for name in names:
        a, b = (torch.load(folder / name, weights_only=True) for folder in (one, two))
        assert bits(a) == bits(b), name


def same_run(one, two, script, role, within_epoch=False):
    """Weights, optimizer states, log. An epoch resumed in its middle has the losses of its last steps."""
    # Real commands leave no checkpoint behind.
    same_bits(one, two, [f for f in files_of(script, role)
                         if "unfinished" not in f or (one / f).exists() or (two / f).exists()])
    stage, without = stage_of(script, role), ("loss", "top1") if within_epoch else ()
    assert log(one, stage, without) == log(two, stage, without) != []


def weights(path):
    return torch.cat([v.flatten() for v in torch.load(path, weights_only=True)["model"].values()])


# ---------- Every stage


def test_every_stage_runs_and_the_run_folder_holds_what_is_promised(done):
    path, folder = done
    roles = ["meta", "teacher", "student", "baseline", "baseline_kd"]
    modules = [f"{role}_modules/{i}.pt" for role in ("teacher", "student") for i in range(3)]
    for name in ["config.yaml", "log.jsonl", "results.json", "teacher_assembled.pt", "student_assembled.pt",
                 *(f"{role}.pt" for role in roles), *modules]:
        assert (folder / name).exists(), name
    assert not [*folder.rglob("*.tmp"), *folder.rglob("*.lock")]
    for file in folder.rglob("*.pt"):  # checkpoints, too
        torch.load(file, weights_only=True)
    results = json.loads((folder / "results.json").read_text())
    expected = {(role, name) for role in roles for name in ("test", "renditions")}
    assert {(r["role"], r["set"]) for r in results} == expected
    assert all(r["images"] == 29 and r["top1"] <= r["top5"] for r in results)
    assert models.load_config(folder / "config.yaml") == {**models.load_config(path), "precision": "float32"}


def test_a_log_line_a_stage_module_and_epoch_has_the_promised_fields(done):
    lines = [json.loads(line) for line in (done[1] / "log.jsonl").read_text().splitlines()]
    fields = {"stage", "module", "epoch", "step", "loss", "top1", "val_top1", "lr", "images", "modules",
              *TIMES}
    assert all(fields <= line.keys() <= fields | {"expert_load", "linked"} for line in lines)
    wholes = ("baseline", "baseline_kd", "meta", "student", "teacher")
    expected = [(s, s, e) for s in wholes for e in (1, 2)]
    expected += [(s, m, e) for s in ("distill", "incubate") for m in (0, 1, 2) for e in (1, 2)]
    found = [(line["stage"], line["module"], line["epoch"]) for line in lines]
    assert sorted(found, key=str) == sorted(expected, key=str)
    for line in lines:
        assert line["step"] == 4 * line["epoch"] and line["images"] == 64 and line["images_per_second"] > 0
        assert line["modules"] == ([line["stage"]] if line["stage"] in wholes else [0, 1, 2])
        # A collapsed router and a circuit without links must be visible.
        of_student = line["stage"] in ("student", "baseline", "baseline_kd")
        assert ("linked" in line) == (of_student and done[0].stem == "nac")
        of_module = line["stage"] == "distill"
        assert ("expert_load" in line) == ((of_student or of_module) and done[0].stem == "vmoe")
        for shares in line.get("expert_load", ()):
            assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=2e-3)


def test_a_finished_stage_is_skipped_with_a_line_and_its_file_is_left_alone(done):
    path, folder = done
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.pt")}
    for script, role in PIPELINE[:-1]:
        name = f"assemble_{role}" if script == "assemble" else stage_of(script, role)
        more = ["data.workers=1", "data.test_images=5"]  # what changes no result
        title = models.TITLES.get(name, name)
        assert run(script, path, f"role={role}", *more) == f"{title}: finished; skipped\n"
    text = run("distill_module", path, before=lambda: setattr(models, "code", lambda: "a fork's"))
    assert text == "m2mKD: finished; skipped (other code made it)\n"
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.pt")}


def test_the_same_folder_with_other_settings_is_refused_naming_the_key(done):
    path, folder = done
    for script, role, word in [
            ("finetune", "meta", "meta.mlp_ratio=3"), ("finetune", "baseline", "train.student.lr=0.1"),
            ("distill_module", "teacher", "train.incubate.epochs=3"), ("assemble", "student", "seed=4"),
            ("distill_module", "student", "distill.alpha=0.25"), ("finetune", "student", "data.mixup=0.5"),
            ("evaluate", "student", "train.meta.clip=2")]:
        key, value = word.split("=")
        text = run(script, path, f"role={role}", word, expect=2)
        assert re.fullmatch(
            rf"error: {key} was \S+ when {folder}/\S+ was made, now it is {value}\. Use a new output_dir and "
            rf"share={folder} to keep the stages that do not change\.\n", text), text


@vmoe_only
def test_share_takes_another_runs_finished_stages_but_none_made_with_other_settings(done, tmp_path):
    words = [f"output_dir={tmp_path / 'run'}", f"share={done[1]}", "distill.alpha=0.25"]
    for script, role in PIPELINE[:4]:
        assert "finished; skipped" in run(script, done[0], f"role={role}", *words)
    assert not list(tmp_path.rglob("*.pt"))
    run("distill_module", done[0], *words)
    assert sorted(f.name for f in tmp_path.rglob("?.pt")) == ["0.pt", "1.pt", "2.pt"]
    # Of several runs each stage is taken from whichever has it: modules from one, the rest from the other.
    words[:2] = [f"output_dir={tmp_path / 'more'}", f"share=[{tmp_path / 'run'}, {done[1]}]"]
    run("assemble", done[0], *words)
    assert "skipped" in run("distill_module", done[0], *words)
    assert not (tmp_path / "more/student_modules").exists()
    # A refusal tells the command that keeps all of them.
    text = one_sentence(run("assemble", done[0], *words, "assemble.stitches=keep", expect=2))
    assert f"share=[{tmp_path / 'more'},{tmp_path / 'run'},{done[1]}] to keep" in text


@vmoe_only
def test_a_finished_run_is_evaluated_where_what_it_was_built_on_is_gone(done, tmp_path):
    """The shared run is removed and the folder has another name; the machine has another precision."""
    shutil.copytree(done[1], tmp_path / "shared")
    words = [f"output_dir={tmp_path / 'run'}", f"share={tmp_path / 'shared'}", "train.student.lr=0.01"]
    run("finetune", done[0], "role=student", *words)
    shutil.rmtree(tmp_path / "shared")
    run("evaluate", done[0], "role=student", *words)
    (tmp_path / "run").rename(tmp_path / "renamed")
    own, results = tmp_path / "renamed/config.yaml", tmp_path / "renamed/results.json"
    first = results.read_text()
    run("evaluate", own, "role=all", before=lambda: results.unlink())
    assert results.read_text() == first and not (tmp_path / "run").exists()
    run("evaluate", own, "role=all", "precision=bfloat16")
    assert [r["role"] for r in json.loads(results.read_text())] == ["student", "student"]


def test_image_prints_the_five_best_classes_of_each_file_best_first(tmp_path):
    path = write_config(tmp_path, data={**CONFIG["data"], "root": str(drawn("ABCDEFGHJ"))})
    run("finetune", path, "role=meta", "train.meta.epochs=0")
    for name, size in ("a.png", (40, 30)), ("b.png", (16, 16)):
        Image.new("RGB", size, (90, 120, 30)).save(tmp_path / name)
    files = [f"image={tmp_path / name}" for name in ("a.png", "b.png")]
    lines = run("evaluate", path, *files, "role=meta").splitlines()
    for line, name in zip(lines, ("a", "b"), strict=True):
        pairs = re.findall(r"([A-J]) (\d+\.\d) %", line)
        assert line.startswith(f"{tmp_path}/{name}.png: ") and len({c for c, _ in pairs}) == len(pairs) == 5
        shares = [float(p) for _, p in pairs]
        assert shares == sorted(shares, reverse=True) and sum(shares) < 100
    assert "none.png" in one_sentence(run("evaluate", path, "image=none.png", "role=meta", expect=2))
    # A shared model of other settings (two epochs) is not this run's.
    words = ["role=meta", f"output_dir={tmp_path}/own", f"share={tmp_path}/run"]
    assert "own/meta.pt is not there yet" in one_sentence(run("evaluate", path, *files, *words, expect=2))


def plan(path, *words, goals=("student", "baseline")):
    return models.stages(models.load_config(path, ["precision=float32", *words]), goals)


def test_what_is_to_be_made_is_found_by_walking_back_from_the_goals(tmp_path):
    path, folder = write_config(tmp_path), tmp_path / "run"
    config, every = models.load_config(path, ["precision=float32"]), list(models.STAGES)
    assert plan(path, goals=every) == every and plan(path) == every[:-1]
    commands = [models.STAGES[name][:2] for name in every[:-1]]
    assert [(f"{script}.py", role) for script, role in PIPELINE[:8]] == commands
    assert plan(path, goals=["teacher"]) == ["meta", "incubate", "assemble_teacher", "teacher"]
    # Without a teacher's lesson there is no teacher, and its keys are no settings.
    assert plan(path, "distill.alpha=0") == ["meta", *every[4:-1]]
    assert plan(path, "distill.alpha=0", "train.student.alpha=0.5") == every[:-1]
    blocks = ("teacher.", "train.teacher.", "train.incubate.")
    for word, there in (("distill.alpha=0", False), ("distill.alpha=1", True)):
        for name in ("distill", "assemble_student", "student"):
            keys = models.settings(models.load_config(path, [word]), name)
            assert any(key.startswith(blocks) for key in keys) == there, (word, name)

    make = functools.partial(models.save_finished, config, state={})
    # What is there needs nothing that came before, from wherever it came.
    for i in range(2):
        make("distill", f"student_modules/{i}.pt")
    assert plan(path) == every[:-1]
    make("distill", "student_modules/2.pt")
    assert plan(path) == ["assemble_student", "student", "baseline"]
    make("student", "student.pt")
    assert plan(path) == ["baseline"] and plan(path, goals=["teacher"]) == every[:4]
    make("baseline", "baseline.pt")
    assert plan(path) == [] and not (folder / "meta.pt").exists()


def test_another_set_of_as_many_classes_is_another_setting_wherever_it_is(tmp_path):
    sets = drawn("ABCD", 80), drawn("EFGH", 80), drawn("ABCD", 81)
    path = write_config(tmp_path, data={**CONFIG["data"], "robustness": []})
    cats, cars, more = (f"data.root={place}" for place in sets)
    run("finetune", path, "role=meta", cats)
    kill = die(models, "learning_rate", 6)
    run("finetune", path, "role=baseline", cats, before=kill, expect=-signal.SIGKILL)
    unfinished = (tmp_path / "run/baseline.unfinished.pt").read_bytes()
    for script, role, name in [("finetune", "meta", "meta.pt"), ("evaluate", "meta", "meta.pt"),
                               ("finetune", "baseline", "baseline.unfinished.pt")]:
        for root, key in (cars, "data.class_names"), (more, "data.checksum"):
            text = one_sentence(run(script, path, f"role={role}", root, expect=2))
            start = f"{tmp_path}/run/{name} was made from other images than those of {root}: {key} was "
            assert start in text, text
    assert (tmp_path / "run/baseline.unfinished.pt").read_bytes() == unfinished
    # A shared run of another set is passed over.
    words = [f"output_dir={tmp_path / 'cars run'}", f"share={tmp_path / 'run'}"]
    assert "skipped" not in run("finetune", path, "role=meta", cars, *words)
    assert not torch.equal(weights(tmp_path / "run/meta.pt"), weights(tmp_path / "cars run/meta.pt"))
    # The same set at another place is the same set.
    moved = shutil.copy(sets[0], tmp_path / "moved.npz")
    assert "skipped" in run("finetune", path, "role=meta", f"data.root={moved}")
    assert "resumed at step 4" in run("finetune", path, "role=baseline", f"data.root={moved}")


def test_a_set_that_is_replaced_while_a_stage_trains_is_another_set_ever_after(tmp_path):
    root, other = shutil.copy(drawn("ABCD", 80), tmp_path), drawn("EFGH", 80)
    path = write_config(tmp_path, data={**CONFIG["data"], "robustness": [], "root": str(root)})
    run("finetune", path, "role=meta", before=lambda: setattr(
        models, "append", lambda *line: shutil.copy(other, root)))
    assert "meta.pt was made from other images" in one_sentence(run("finetune", path, "role=meta", expect=2))


# ---------- The method's identities


@pytest.mark.parametrize("done, role, words", [
    ("vmoe", "teacher", []), ("nac", "student", []),
    ("nac", "student", ["distill.codes=original", "distill.alpha=0"]),
], indirect=["done"])
def test_all_modules_in_one_pass_are_the_modules_trained_side_by_side(done, tmp_path, role, words):
    path, folder = beside(done, tmp_path, "distill_module", role)
    together = done[1]
    if words:
        together, words = tmp_path / "pass", [*words, f"share={done[1]}"]
        run("distill_module", path, f"role={role}", *words, f"output_dir={together}")
    jobs = []
    for i in (2, 0, 1):
        own = shutil.copy(path, path.with_name(f"job{i}.yaml"))
        jobs.append(start("distill_module", own, f"role={role}", f"module={i}", *words))
    assert [end(job)[0] for job in jobs] == [0, 0, 0]
    same_bits(folder, together, files_of("distill_module", role)[:3])
    assert log(folder, without=["modules"]) == log(together, stage_of("distill_module", role), ["modules"])
    assert [line["modules"] for line in log(folder)] == [[0], [0], [1], [1], [2], [2]]


@pytest.mark.parametrize("done, script, role", [("nac", "distill_module", "student"),
                                                ("vmoe", "finetune", "baseline_kd")], indirect=["done"])
def test_alpha_1_does_not_look_at_labels_and_three_quarters_do(done, tmp_path, script, role):
    load = data.load

    def shift_labels():
        def shifted(*args):
            images = load(*args)
            images.labels = (images.labels + 1) % 4
            return images
        data.load = shifted

    result = {}
    for alpha in (1, 0.75):
        for lie in (None, shift_labels):
            folder = tmp_path / f"{alpha}-{bool(lie)}"
            run(script, done[0], f"role={role}", f"distill.alpha={alpha}", f"output_dir={folder}",
                f"share={done[1]}", before=lie)
            result[alpha, bool(lie)] = weights(folder / files_of(script, role)[0])
    assert torch.equal(result[1, False], result[1, True])
    assert not torch.equal(result[0.75, False], result[0.75, True])


def without_noise():
    """What a NAC draws is its mean, and SGD shows gradients where Adam would hide their size."""
    torch.randn_like, models.Jitter.forward = torch.zeros_like, lambda self, codes: codes
    torch.rand = lambda *shape, **o: torch.full(shape if type(shape[0]) is int else shape[0], 0.5, **o)
    torch.Tensor.exponential_ = lambda self: self.fill_(1)
    models.optimizer = lambda module, c: torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad], 0.1)


@every_case
def test_half_the_batch_in_two_processes_or_two_steps_is_the_whole_batch(done, tmp_path, script, role):
    stage, names = stage_of(script, role), [f for f in files_of(script, role) if "unfinished" not in f]
    path, folder = beside(done, tmp_path, script, role)

    def patch(rank=0):
        without_noise()
        # The stages before had other settings. This test compares like with like.
        models.finished = lambda config, name, file, *_: (folder / file).exists() and folder / file

    result, lines = [], []
    for world, batch, accumulate in ((1, 16, 1), (1, 8, 2), (2, 8, 1), (2, 4, 2)):
        words = [f"role={role}", *PLAIN, f"train.{stage}.lr=50", f"train.{stage}.batch={batch}",
                 f"train.{stage}.accumulate={accumulate}"]
        if world == 1:
            run(script, path, *words, before=patch)
        else:
            run_processes(world, script, path, *words, before=patch)
        result.append(torch.cat([weights(folder / f) for f in names]))
        lines.append(log(folder, stage))
        for name in [*files_of(script, role), "log.jsonl"]:
            (folder / name).unlink()
    first, second = (line["loss"] for line in lines[0][:2])
    assert second != pytest.approx(first, rel=1e-3)  # it learned something
    for other, line in zip(result[1:], lines[1:]):
        assert (other - result[0]).norm() < 1e-5 * result[0].norm()
        for a, b in zip(line, lines[0], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert all(a[key] == b[key] for key in ("top1", "val_top1", "step", "images"))


# ---------- Kills


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


KILLS = {  # where: at which step the command begins, and how it is killed. Each hits what the last left.
    "in the first epoch": (0, die(models, "learning_rate", 3)),
    "while the first checkpoint is written": (0, die(os, "fsync", 2)),  # the first is config.yaml's
    "before the epoch's log line": (0, die(models, "append", 1)),
    "between the epoch's log line and its checkpoint": (0, die(models.Stage, "save", 1)),
    "in the second epoch": (0, die(models, "learning_rate", 6)),
    "in the second epoch, after a resume": (4, die(models, "learning_rate", 2)),
    "before the second checkpoint gets its name": (4, die(os, "replace", 2)),
    "with all steps done": (4, die(models, "save_finished", 1)),
    "after the first result": (8, die(models, "save_finished", 1, after=True)),
}


@every_case
def test_a_run_killed_at_nine_places_ends_as_the_unbroken_run(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    for place, (step, kill) in KILLS.items():
        text = run(script, path, f"role={role}", before=kill, expect=-signal.SIGKILL)
        assert re.findall(r"resumed at step (\d)", text) == [str(step)] * (step > 0), (place, text)
    run(script, path, f"role={role}")
    same_run(folder, done[1], script, role)


@vmoe_only
@pytest.mark.parametrize("script, results", [("distill_module", 1), ("distill_module", 3), ("finetune", 1)])
def test_a_kill_between_the_last_files_costs_no_training_and_leaves_no_checkpoint(
        done, tmp_path, script, results):
    path, folder = beside(done, tmp_path, script, "student")

    def kill():
        Path.unlink = UNLINK
        die(models, "save_finished", results, after=True)()

    *files, checkpoint = files_of(script, "student")
    run(script, path, before=kill, expect=-signal.SIGKILL)
    assert (folder / checkpoint).exists() and sum((folder / file).exists() for file in files) == results
    text = run(script, path, before=lambda: setattr(Path, "unlink", UNLINK))
    assert ("resumed at step 8" if results < len(files) else "skipped") in text and " 2/2 " not in text, text
    same_bits(folder, done[1], files)
    assert log(folder) == log(done[1], stage_of(script, "student")) and not (folder / checkpoint).exists()


@every_case
def test_a_signal_saves_at_once_and_the_resumed_run_is_the_unbroken_one(done, tmp_path, script, role):
    path, folder = beside(done, tmp_path, script, role)
    before = {"finetune": 0, "distill_module": 2 if role == "student" else 1}[script]  # hybrids
    for owner, name, call, signum, step in [
            (models, "learning_rate", 2, signal.SIGTERM, 2),  # within an epoch, from a scheduler
            (data, "eval_batches", before + 1, signal.SIGINT, 4),  # in validation, Ctrl-C
            (models, "learning_rate", 3, signal.SIGHUP, 7),  # within the next epoch, a closed terminal
            (models, "learning_rate", 1, signal.SIGTERM, 8)]:  # in the last step of an epoch
        text = run(script, path, f"role={role}", before=die(owner, name, call, signum), expect=143)
        assert text.endswith(f"saved at step {step}; the same command goes on from there.\n"), text
        assert torch.load(folder / files_of(script, role)[-1], weights_only=True)["number"] == step
    assert "resumed at step 8" in run(script, path, f"role={role}")
    same_run(folder, done[1], script, role, within_epoch=True)


@vmoe_only
def test_a_signal_before_the_first_step_or_in_evaluation_ends_at_once_and_harms_nothing(done, tmp_path):
    path, folder = beside(done, tmp_path, "finetune", "student")
    run("finetune", path, before=die(models, "learning_rate", 6), expect=-signal.SIGKILL)
    run("finetune", path, before=die(data, "steps_per_epoch", 1, signal.SIGTERM), expect=-signal.SIGTERM)
    run("finetune", path)
    same_run(folder, done[1], "finetune", "student")
    run("evaluate", path, "role=meta")
    good = (folder / "results.json").read_text()
    sigterm = die(data, "eval_batches", 1, signal.SIGTERM)
    run("evaluate", path, "role=student", before=sigterm, expect=-signal.SIGTERM)
    assert (folder / "results.json").read_text() == good


@pytest.mark.parametrize("script", ["finetune", "distill_module"])
def test_a_signal_that_reaches_three_processes_at_different_steps_stops_all_at_one_step(tmp_path, script):
    role = {"finetune": "meta", "distill_module": "student"}[script]
    words = ["data.train_images=134", "train.*.batch=2", "train.*.accumulate=1", "train.*.epochs=1",
             "distill.alpha=0"]  # 22 steps
    for name in "ab":
        path = write_config(tmp_path / name)
        if script == "distill_module":
            run("finetune", path, "role=meta", *words)
        if name == "a":
            texts = run_processes(3, script, path, f"role={role}", *words, expect=143, seconds=30, before=(
                lambda rank: die(models, "learning_rate", 5 + rank, signal.SIGTERM)()))
            # Processes are asked every 20 steps.
            assert "saved at step 20" in texts[0]
            # The others print nothing; the one line is torch's (Stage.distributed).
            assert all(text.count("\n") == 1 and "find_unused_parameters" in text for text in texts[1:])
            text = one_sentence(run(script, path, f"role={role}", *words, expect=2))
            assert "processes was 3" in text and "now it is 1" in text, text
        texts = run_processes(3, script, path, f"role={role}", *words)
        assert ("resumed at step 20" in texts[0]) == (name == "a")
    # To the bit: a sum of three numbers depends on their order, which a resumed run must not change.
    same_run(tmp_path / "a/run", tmp_path / "b/run", script, role, within_epoch=True)


@vmoe_only
def test_a_module_that_an_unfinished_pass_lacks_is_named_not_lost(done, tmp_path):
    path, folder = beside(done, tmp_path, "distill_module", "student")
    run("distill_module", path, "module=2")
    run("distill_module", path, before=die(models, "learning_rate", 6), expect=-signal.SIGKILL)
    (folder / "student_modules/2.pt").unlink()
    assert "module=2" in one_sentence(run("distill_module", path, expect=2))
    (folder / "student_modules/2.unfinished.pt").unlink()  # which only these tests keep
    run("distill_module", path, "module=2")
    run("distill_module", path)
    same_bits(folder, done[1], files_of("distill_module", "student")[:3])


@vmoe_only
def test_an_output_that_nobody_reads_any_more_costs_no_epoch(done, tmp_path):
    """As behind `| head`: the checkpoint is there before the epoch's line is printed."""
    path, folder = beside(done, tmp_path, "finetune", "student")

    def close_output():
        append = models.append

        def closing(*args):
            append(*args)
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
        models.append = closing

    for step in (4, 8):
        one_sentence(run("finetune", path, before=close_output, expect=2))
        assert torch.load(folder / "student.unfinished.pt", weights_only=True)["number"] == step
    assert "resumed at step 8" in run("finetune", path)
    same_run(folder, done[1], "finetune", "student")


def test_a_pass_over_all_modules_and_a_job_for_one_exclude_each_other(done, tmp_path):
    path, folder = beside(done, tmp_path, "distill_module", "student")
    with models.lock(folder / "student_modules/1.pt"):
        assert "student_modules/1.lock" in one_sentence(run("distill_module", path, expect=2))
        assert "student_modules/1.lock" in one_sentence(run("distill_module", path, "module=1", expect=2))
        run("distill_module", path, "module=0")


def test_a_second_job_on_a_stage_is_refused_and_a_killed_one_does_not_block(tmp_path):
    path = write_config(tmp_path)
    waiting = start("finetune", path, "role=meta", before=lambda: setattr(
        models.Stage, "step", lambda stage: time.sleep(60)))
    wait_for_a_line(waiting)
    other = path.with_name("other.yaml")
    shutil.copy(path, other)
    text = one_sentence(run("finetune", other, "role=meta", expect=2))
    assert "run/meta.unfinished.lock" in text and "at work" in text, text
    os.kill(waiting[0], signal.SIGKILL)
    end(waiting)
    left = tmp_path / "run/meta.unfinished.pt.01234567.tmp", tmp_path / "run/notes.tmp"
    for file in left:  # a kill while the checkpoint was written, and something of the user's
        file.touch()
    run("finetune", path, "role=meta")
    assert [*tmp_path.rglob("*.lock"), *tmp_path.rglob("*.tmp")] == [left[1]]
    # Another job finishes after this one has looked.
    text = run("finetune", path, "role=meta", f"output_dir={tmp_path}/b", expect=2, before=lambda: setattr(
        models, "check_inputs", lambda config: models.save_finished(config, "meta", "meta.pt", {})))
    assert "meta model was finished by another job meanwhile" in one_sentence(text)


def test_a_stage_needs_neither_validation_images_nor_a_clock_that_runs(tmp_path):
    stopped = types.SimpleNamespace(monotonic=lambda: 5.0)
    text = run("finetune", write_config(tmp_path), "role=meta", "data.validation_images=0",
               before=lambda: setattr(models, "time", stopped))
    assert text.count("no validation") == 2 and (tmp_path / "run/log.jsonl").read_text().count("null") == 2


def test_a_file_system_without_locks_trains_with_a_note(tmp_path):
    def no_locks():
        def flock(*args):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock = flock

    path = write_config(tmp_path)
    text = run("finetune", path, "role=meta", before=no_locks)
    assert text.count("knows no locks") == 1 and "meta model 2/2" in text, text
    run("evaluate", path, "role=meta", before=no_locks)
    assert len(json.loads((tmp_path / "run/results.json").read_text())) == 2


def small_disk(rank=0):
    """No file may be larger than 100,000 bytes: config and log fit, a checkpoint does not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))


def room_for_part_of_a_line(rank=0):
    append = models.append

    def cut_short(path, lines):
        size = path.stat().st_size + 30
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        append(path, lines)
    models.append = cut_short


@vmoe_only
def test_a_full_disk_is_one_sentence_and_harms_nothing(done, tmp_path):
    path, folder = beside(done, tmp_path, "finetune", "student")
    others = [{"stage": "other", "module": "other", "epoch": e} for e in range(500)]
    (folder / "log.jsonl").write_text("".join(json.dumps(other) + "\n" for other in others))
    run("finetune", path, before=die(models, "learning_rate", 6), expect=-signal.SIGKILL)
    checkpoint = folder / "student.unfinished.pt"
    good = checkpoint.read_bytes()
    for full in (small_disk, room_for_part_of_a_line, room_for_part_of_a_line):
        text = run("finetune", path, before=full, expect=2)
        assert ("cannot be written" in one_sentence(text)) == (full == small_disk), text
        assert not list(folder.rglob("*.tmp")) and not (folder / "student.pt").exists()
        assert checkpoint.read_bytes() == good
    assert not (folder / "log.jsonl").read_text().endswith("\n")
    run("finetune", path)
    same_run(folder, done[1], "finetune", "student")
    assert log(folder, "other") == others


@vmoe_only
def test_a_run_folder_that_vanishes_is_one_sentence_and_is_not_made_again(done, tmp_path):
    path, folder = beside(done, tmp_path, "distill_module", "teacher")

    def vanish(rank=0):
        rate = models.learning_rate
        models.learning_rate = lambda *args: (shutil.rmtree(folder, ignore_errors=True), rate(*args))[1]

    assert str(folder) in one_sentence(run("distill_module", path, "role=teacher", before=vanish, expect=2))
    assert not folder.exists()


# ---------- Several processes


@pytest.mark.parametrize("script, role", [("finetune", "meta"), ("distill_module", "teacher")])
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_the_last_good_checkpoint_stays(
        tmp_path, script, role):
    path = write_config(tmp_path)
    if script == "distill_module":
        run("finetune", path, "role=meta")

    def poison(rank):
        batches = data.train_batches
        if rank == 1:
            data.train_batches = lambda images, config, stage, epoch, *rest: (
                (x * (torch.nan if epoch else 1), targets)
                for x, targets in batches(images, config, stage, epoch, *rest))

    for text in run_processes(2, script, path, f"role={role}", before=poison, expect=2, seconds=30):
        assert re.search(r"\w+: the loss of \w+ is not finite at step 4", one_sentence(text)), text
    *files, checkpoint = (tmp_path / "run" / name for name in files_of(script, role))
    assert not any(file.exists() for file in files)
    good = torch.load(checkpoint, weights_only=True)
    assert good["number"] == 2
    assert all(v.isfinite().all() for module in good["modules"].values() for v in module.values())


@pytest.mark.parametrize("patience, signals, codes", [(3, 0, [2]), (60, 2, [143, -signal.SIGTERM])])
def test_a_hung_process_ends_the_others_after_the_stated_patience_or_at_a_second_signal(
        tmp_path, patience, signals, codes):
    assert data.PATIENCE == datetime.timedelta(minutes=30)  # as the README says

    def hang(rank):
        data.PATIENCE = datetime.timedelta(seconds=patience)
        rate, calls = models.learning_rate, []
        models.learning_rate = lambda *args: (
            calls.append(1), time.sleep(50 * (len(calls) == 2 and rank == 1)), rate(*args))[-1]

    waiting, hung = start_processes(2, "finetune", write_config(tmp_path), "role=meta", before=hang)
    wait_for_a_line(waiting)
    for _ in range(signals):
        time.sleep(3)  # by now it waits
        os.kill(waiting[0], signal.SIGTERM)
    code, text = end(waiting, seconds=25)
    os.kill(hung[0], signal.SIGKILL)
    end(hung)
    assert code in codes and ("Another process hangs" in text) == (not signals), (code, text)


def test_processes_that_would_begin_differently_all_end_with_a_sentence(tmp_path):
    """Two machines without a common disk: one has a checkpoint or a module that the other one lacks."""
    paths = [write_config(tmp_path / folder) for folder in ("a", "b")]
    run("finetune", paths[0], "role=meta", before=die(models, "learning_rate", 2, signal.SIGTERM), expect=143)
    checkpoint = tmp_path / "a/run/meta.unfinished.pt"
    torch.save(torch.load(checkpoint, weights_only=True) | {"processes": 2}, checkpoint)
    for text in run_processes(2, "finetune", paths, "role=meta", expect=2):
        assert "step is 2 for process 0, 0 for process 1" in text, text
    for i, path in enumerate(paths):
        config = models.load_config(path, ["precision=float32"])
        models.save_finished(config, "meta", "meta.pt", models.build(config, "meta").state_dict())
        models.save_finished(config, "incubate", f"teacher_modules/{i}.pt", {})
    for text in run_processes(2, "distill_module", paths, "role=teacher", expect=2):
        assert "modules is [1, 2] for process 0, [0, 2] for process 1" in text, text
    assert not list(tmp_path.rglob("log.jsonl"))


def test_an_error_in_one_process_leaves_none_hanging(tmp_path):
    path = write_config(tmp_path)
    processes = start_processes(2, "finetune", path, "role=meta", before=lambda rank: rank or small_disk())
    ends = [end(one, 30) for one in processes]
    assert ends[0][0] == 2 and "cannot be written" in ends[0][1] and ends[1][0] not in (0, "hung"), ends


@pytest.mark.parametrize("done", ["nac"], indirect=True)
def test_two_processes_run_every_stage_and_count_every_image_once(done, tmp_path):
    path = write_config(tmp_path, done[0].stem)
    for script, role in PIPELINE:
        run_processes(2, script, path, f"role={role}", "train.*.batch=4")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert len(results) == 10 and {r["images"] for r in results} == {29}
    # Of four classes one is always among the best five: an image left out or counted twice would show.
    assert all(r["top5"] == 100 for r in results)


# ---------- As a user starts them


def stopped(line, signal_to, seconds=90, env=()):
    """Starts a command line, sends SIGTERM after its second epoch -> its output, its exit code."""
    job = subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True,
                           env=ENV | dict(env))
    while not re.match(r"(meta model|m2mKD|baseline) +2/", text := job.stdout.readline()):
        assert text, "it ended"
    signal_to(job.pid, signal.SIGTERM)
    try:
        return job.communicate(timeout=seconds)[0], job.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(processes, *words, options=()):
    return shell(*TORCHRUN, f"--nproc_per_node={processes}", *options, *words)


@pytest.mark.parametrize("launch, epochs", [
    ([sys.executable], 30), pytest.param([*TORCHRUN, "--nproc_per_node=2"], 300, marks=pytest.mark.slow)])
def test_a_command_stopped_by_sigterm_goes_on_when_it_is_started_again(tmp_path, launch, epochs):
    """Without torchrun the whole group gets the signal, as from a scheduler: data-loader workers too."""
    words = [f"train.meta.epochs={epochs}", "data.randaugment=9", "data.workers=2"]
    lines = {name: [*launch, "finetune.py", "--config", write_config(tmp_path / name), "role=meta", *words]
             for name in ("broken run", "unbroken")}
    text, code = stopped(lines["broken run"], os.killpg if launch == [sys.executable] else os.kill)
    assert code and "stopped: saved at step" in text, text
    for name, line in lines.items():
        again = shell(*line)
        assert again.returncode == 0 and ("resumed at step" in again.stdout) == (name == "broken run"), again
    broken, unbroken = (tmp_path / name / "run" for name in lines)
    assert torch.equal(weights(broken / "meta.pt"), weights(unbroken / "meta.pt"))
    assert not list(broken.glob("meta.*.*"))  # nothing unfinished is left


def test_torchrun_trains_all_modules(tmp_path):
    path = write_config(tmp_path, "nac")
    run("finetune", path, "role=meta")
    text = torchrun(2, "distill_module.py", "--config", path, "distill.alpha=0")
    assert text.returncode == 0, text
    # Of each module the loss and the hybrid's validation accuracy.
    assert re.search(r"^m2mKD 2/2 .*loss( [\d.]+){3}  validation( [\d.]+){3} %  ", text.stdout, re.M), text
    assert len(log(tmp_path / "run", "distill")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("student", ["vmoe", "nac"])
def test_twenty_kills_at_random_moments_make_no_difference(tmp_path, student):
    """Real commands are killed anywhere between start and last write, over all training stages: mixup,
    cutmix, repeated augmentation, two workers, gradient accumulation, two stages in two processes."""
    rng, kills = random.Random(0), 0
    words = ["train.*.epochs=40", "data.randaugment=9", "data.erasing=0.25", "data.resized_crop=[0.3, 1]",
             "data.flip=0.5", "data.repeats=3", "data.workers=2"]
    two = [("finetune", "baseline"), ("distill_module", "student")]
    paths = {name: write_config(tmp_path / name, student) for name in ("broken", "unbroken")}

    def line(name, script, role):
        launch = [*TORCHRUN, "--nproc_per_node=2"] if (script, role) in two else [sys.executable]
        return [*launch, f"{script}.py", "--config", paths[name], f"role={role}", *words]

    for script, role in PIPELINE[:-1]:
        assert (done := shell(*line("unbroken", script, role))).returncode == 0, done
    for script, role in PIPELINE[:-1]:
        for _ in range(3 if script != "assemble" else 0):
            job = subprocess.Popen(line("broken", script, role), cwd=ROOT, stdout=subprocess.PIPE, env=ENV,
                                   start_new_session=True, stderr=subprocess.DEVNULL)
            job.stdout.readline()  # it has begun
            time.sleep(rng.uniform(0, 2))
            kills += job.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)  # with its workers, as a scheduler does
            job.communicate()
        assert (done := shell(*line("broken", script, role))).returncode == 0, done
        if script != "assemble":
            same_run(tmp_path / "broken/run", tmp_path / "unbroken/run", script, role)
    assert kills >= 15  # on a fast machine some come too late
    assert log(tmp_path / "broken/run") == log(tmp_path / "unbroken/run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_after_a_killed_worker_and_ends_as_an_unbroken_run(tmp_path, victim):
    script = tmp_path / "killed.py"
    script.write_text(f"""
import os, runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import models, test_runs
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("{victim}", "0"):
    test_runs.die(models, "learning_rate", 3)()
sys.argv[0] = "finetune.py"
runpy.run_path({str(ROOT / "finetune.py")!r}, run_name="__main__")
""")
    broken, unbroken = (write_config(tmp_path / name) for name in ("broken", "unbroken"))
    text = torchrun(2, script, "--config", broken, "role=meta", options=["--max-restarts=1"])
    assert text.returncode == 0 and "resumed at step 2" in text.stdout, text  # two epochs of two steps
    assert torchrun(2, "finetune.py", "--config", unbroken, "role=meta").returncode == 0
    same_run(tmp_path / "broken/run", tmp_path / "unbroken/run", "finetune", "meta")
