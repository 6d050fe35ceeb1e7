"""Promise: bad input ends in exit code 2 and one sentence that names key or file, value and remedy.

No traceback, ever: no mutation of a file's bytes gives one, and nothing in a file is executed. A command
works from any folder, and run.sh runs what is to be done.
"""

import io
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import models
from conftest import ENV, ROOT, Trap, one_sentence, run_main, shell, write_folder

CONFIG = """
device: cpu
data: {image_size: 16, train_images: 32, test_images: 16, workers: 0, root: "%s"}
meta: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
teacher: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
student: {kind: nac, width: 16, heads: 2, head_width: 8, latents: [4, 16, 2], propagators: 1}
train: {meta: &few {epochs: 1, batch: 16}, incubate: *few, teacher: *few, distill: *few, student: *few}
"""
STAGES = ["finetune", "distill_module", "assemble", "evaluate"]


@pytest.fixture
def here(tmp_path, monkeypatch, glyphs):
    """An empty folder with c.yaml, where commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG % glyphs)
    return tmp_path


def command(script, *words, config="c.yaml"):
    """Runs a script's main() on the config here -> its exit code."""
    return run_main(script, *(["--config", config] if config else []), *words)


@pytest.fixture
def refused(here, capsys):
    """A command must end with code 2 and one sentence that holds each of the names."""
    def refused(names, script, *words, **more):
        capsys.readouterr()
        assert command(script, *words, **more) == 2
        error = one_sentence(capsys.readouterr().err)
        assert all(name in error for name in ([names] if isinstance(names, str) else names)), error
    return refused


BAD_WORDS = [  # script, words, what the sentence must name
    ("distill_module", "module=one", ["module", "one"]), ("distill_module", "module=", "module"),
    ("distill_module", "role=meta", "meta"), ("assemble", "role=baseline", "baseline"),
    ("distill_module", "module=3", ["module=3", "0 to 2"]), ("distill_module", "module=-1", "module=-1"),
    ("assemble", "module=1", "module"), ("finetune", "role=tutor", ["tutor", "teacher"]),
    ("distill_module", "seed=0", "meta.pt is not there yet"), ("assemble", "seed=0", "0.pt is not there yet"),
    ("finetune", "seed=0", "student_assembled.pt is not there yet"), ("evaluate", "role=pupil", "pupil"),
    ("evaluate", "seed=0", "student.pt is not there yet"), ("evaluate", "image=none.png", "student.pt"),
    ("evaluate", "--report", "--report"), ("finetune", "meta.hedas=2", "meta.heads"),
    ("finetune", "device=cuda", "device=cuda"), ("finetune", "device=mps", "device=mps"),
    ("finetune", "role=meta share=nowhere", "share=nowhere"), ("finetune", "role=meta data.root=no", "'no'"),
    ("finetune", "role=meta train.meta.batch=64", ["train.meta.batch=64", "32"]),
    ("finetune", "role=meta train.meta.accumulate=3", ["accumulate=3", "32"]),
    ("finetune", "role=meta train.meta.images=[0,33]", ["train.meta.images=[0, 33]", "32"]),
    ("finetune", "role=meta train.meta.images=[5,5]", "train.meta.images"),
    ("finetune", "role=meta data.train_images=97", ["data.train_images=97", "96"]),
    ("finetune", "role=meta data.classes=9", "data.classes=9"),
    ("finetune", "output_dir=/proc/no role=meta", "/proc"),
    ("finetune", "role=meta output_dir=c.yaml/run", "c.yaml"),
    ("finetune", "role=meta data.robustness=[nowhere]", "data.robustness='nowhere'"),
]


@pytest.mark.parametrize("script, words, names", BAD_WORDS)
def test_a_bad_word_or_a_stage_too_early_is_one_sentence(refused, here, script, words, names):
    refused(names, script, *words.split())
    assert not list(here.rglob("*.pt"))


@pytest.mark.parametrize("script", [*STAGES, "tools/cost", "tools/few_shot"])
def test_help_shows_commands_and_keys_and_a_config_must_be_named(refused, capsys, script):
    assert command(script, "--help") == 0
    shown = capsys.readouterr().out
    assert f"python {script}.py --config" in shown and "train.student." in shown and "area's share" in shown
    refused("--config", script, config=None)
    refused("none.yaml", script, config="none.yaml")


def test_too_little_memory_is_one_sentence_and_other_errors_are_shown(refused, capsys, monkeypatch):
    monkeypatch.setattr(models, "build", lambda *_: torch.empty(2**58))
    refused(["alloc", "TRACEBACK=1"], "finetune", "role=meta")
    monkeypatch.setenv("TRACEBACK", "1")
    assert command("finetune", "role=meta") == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(models, "build", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        command("finetune", "role=meta")


# ---------- Images


def test_a_test_set_that_is_not_all_there_is_noticed_before_anything_trains(refused, here):
    """test_data.py has all that can be wrong with a folder."""
    write_folder(here / "set", count=6)
    (here / "set/val/b/6.png").symlink_to("none")
    words = ["data.root=set", "data.train_images=0", "data.test_images=0"]
    refused("val/b/6.png", "finetune", "role=meta", *words, "train.meta.batch=4")
    refused("val/b/6.png", "tools/cost", *words, "train.*.batch=4", "--list")
    assert not (here / "runs").exists()


def test_a_bad_robustness_set_keeps_no_other_from_being_scored(refused, here, capsys):
    write_folder(here / "set", count=6)
    words = ["role=meta", "data.root=set", "data.train_images=0", "data.test_images=0", "train.meta.epochs=0",
             "train.meta.batch=4"]
    assert command("finetune", *words) == 0
    assert command("evaluate", *words, "data.robustness=[nowhere,set/val]") == 0
    assert "nowhere is left out: data.robustness" in capsys.readouterr().out
    assert [r["set"] for r in evaluate.read_results(here / "runs/c/results.json")] == ["test", "set/val"]
    os.truncate(here / "set/val/a/1.png", 40)
    refused("set/val/a/1.png is not a readable image", "evaluate", *words)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS])  # out of memory; /dev/shm is full
def test_a_data_loader_worker_that_dies_is_one_sentence(refused, here, monkeypatch, signum):
    monkeypatch.setattr(data, "randaugment", lambda *_: os.kill(os.getpid(), signum))
    words = ["role=meta", "data.workers=1", "data.randaugment=9"]
    refused(["DataLoader worker", "data.workers=0"], "finetune", *words)


# ---------- Files of a run


@pytest.fixture(scope="module")
def meta(tmp_path_factory, glyphs):
    """The bytes of a finished meta model's file."""
    folder = tmp_path_factory.mktemp("meta")
    (folder / "c.yaml").write_text(CONFIG % glyphs)
    words = ["role=meta", f"output_dir={folder}/run", "train.meta.epochs=0"]
    assert command("finetune", *words, config=str(folder / "c.yaml")) == 0
    return (folder / "run/meta.pt").read_bytes()


def changed(change):
    """A checkpoint whose content went through change()."""
    def write(path, good):
        content = torch.load(io.BytesIO(good), weights_only=True)
        change(content)
        torch.save(content, path)
    return write


def weights(**tensors):
    """A checkpoint with these tensors in place of its own; a _ in a name is a dot."""
    return changed(lambda c: c["model"].update({k.replace("_", "."): v for k, v in tensors.items()}))


ONES = torch.ones(16)
BAD_FILES = {  # what is wrong: (write, what the sentence must name)
    "empty": (lambda path, good: path.write_bytes(b""), ""),
    "truncated": (lambda path, good: path.write_bytes(good[:len(good) // 2]), ""),
    "without its last byte": (lambda path, good: path.write_bytes(good[:-1]), ""),
    "a folder": (lambda path, good: path.mkdir(), ""),
    "a pickle that runs a command": (lambda path, good: path.write_bytes(pickle.dumps(Trap(), 2)), ""),
    "torch.save of one": (lambda path, good: torch.save({"model": Trap()}, path), ""),
    "a whole module": (lambda path, good: torch.save(torch.nn.Linear(2, 2), path), ""),
    "a number": (lambda path, good: torch.save(3, path), ""),
    "no model": (changed(lambda c: c.pop("model")), "lacks the tensor"),
    "no settings": (changed(lambda c: c.pop("settings")), "was None"),
    "settings less": (changed(lambda c: c["settings"].pop("meta.eps")), "meta.eps was None"),
    "a tensor missing": (changed(lambda c: c["model"].pop("norm.bias")), "lacks the tensor norm.bias (16,)"),
    "a tensor too many": (weights(extra=ONES), "has an unexpected tensor extra (16,)"),
    "a tensor of another shape": (weights(head_bias=ONES), "head.bias is (16,), the model's (24,)"),
    "weights that are not finite": (weights(norm_bias=ONES / 0), "norm.bias is not finite"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_of_a_run_is_one_sentence_and_nothing_in_it_runs(refused, here, meta, what):
    write, name = BAD_FILES[what]
    (here / "runs/c").mkdir(parents=True)
    write(here / "runs/c/meta.pt", meta)
    refused(["runs/c/meta.pt", name], "distill_module", "role=teacher", "train.meta.epochs=0")
    assert not (here / "pwned").exists() and not list(here.rglob("?.pt"))


def cut_off(here, script, role):
    """Stops a stage after its first step, in a fork -> its unfinished file."""
    if not (pid := os.fork()):
        rate = models.learning_rate
        models.learning_rate = lambda *a: (signal.raise_signal(signal.SIGTERM), rate(*a))[1]
        os._exit(command(script, f"role={role}"))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    (file,) = here.rglob("*unfinished.pt")
    return file


@pytest.mark.parametrize("script, role", [("finetune", "meta"), ("distill_module", "teacher")])
def test_a_checkpoint_that_is_not_whole_is_named_and_stays(refused, here, script, role):
    assert role == "meta" or command("finetune", "role=meta") == 0
    path = cut_off(here, script, role)
    good, module = path.read_bytes(), next(iter(models.read(path)["modules"].values()))
    place = good.index(max(module.values(), key=torch.numel).numpy().tobytes()[:64]) + 5
    flipped = good[:place] + bytes([good[place] ^ 1]) + good[place + 1:]
    for bad in (good[:-1], good[:len(good) // 2], b"", flipped):
        path.write_bytes(bad)
        refused("unfinished.pt", script, f"role={role}")
        assert path.read_bytes() == bad and not list(here.rglob(f"{role}.pt" if role == "meta" else "?.pt"))


def test_a_refused_job_an_evaluation_and_a_shared_result_leave_a_run_alone(refused, here):
    checkpoint = cut_off(here, "finetune", "meta")
    before = (here / "runs/c/config.yaml").read_bytes()
    refused("train.meta.lr was 0.0005", "finetune", "role=meta", "train.meta.lr=0.5")
    for word in "output_dir=other", "share=other":
        assert command("finetune", "role=meta", word) == 0 and checkpoint.exists()
    assert command("finetune", "role=meta") == command("evaluate", "role=meta", "data.test_images=7") == 0
    assert (here / "runs/c/config.yaml").read_bytes() == before


def test_results_replace_older_ones_of_the_same_role_set_and_number_of_images(refused, here):
    path = here / "results.json"
    for role, images, top1 in (("meta", 9, 1.0), ("student", 9, 2.0), ("meta", 8, 3.0), ("meta", 9, 4.0)):
        evaluate.keep(path, {"role": role, "set": "test", "top1": top1, "images": images})
    assert [r["top1"] for r in evaluate.read_results(path)] == [2.0, 3.0, 4.0]
    jobs = []
    for role in "meta", "teacher":  # two evaluations at once lose none
        if not (pid := os.fork()):
            for k in range(30):
                evaluate.keep(path, {"role": role, "set": str(k), "top1": 1.0, "images": 9})
            os._exit(0)
        jobs.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in jobs] == [0, 0] and len(evaluate.read_results(path)) == 63
    assert command("finetune", "role=meta", "train.meta.epochs=0") == 0
    row = '{"role": "meta", "set": "test", "images": 9, "top1": '
    for text in "[{", "[1, 2]", '{"a": 1}', "5", "[" * 10**5, "[{}]", f"[{row}null}}]", f"[{row}NaN}}]":
        (here / "runs/c/results.json").write_text(text)
        refused("results.json", "evaluate", "role=meta", "train.meta.epochs=0")


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_mutation_of_a_files_bytes_gives_a_traceback_or_other_weights(here, meta, count):
    """A refused file leaves the model as it was."""
    rng, path, config = random.Random(2), here / "runs/c/meta.pt", models.load_config("c.yaml")
    path.parent.mkdir(parents=True)
    model, refusals = models.build(config, "meta"), 0
    content = torch.load(io.BytesIO(meta), weights_only=True)["model"]
    model.load_state_dict(content)
    for k in range(count):
        a, size = rng.randrange(len(meta)), rng.choice([1, 1, 8, 200])
        piece = rng.choice([b"", rng.randbytes(size), meta[a:a + size] * 2])
        path.write_bytes(bad := meta[:a] + piece + meta[a + size * rng.choice([0, 1]):])
        for call, words in ((models.load_weights, (model, path)),
                            (models.finished, (config, "meta", "meta.pt"))):
            try:
                call(*words)
            except models.UserError as error:
                assert "meta.pt" in str(error) and "\n" not in str(error), (k, error)
                refusals += bad != meta
            assert all(torch.equal(v, content[name]) for name, v in model.state_dict().items()), k
    assert refusals > count / 2


# ---------- As a user meets it


def launcher(text):
    """The environment in which run.sh starts this line of sh in place of python."""
    Path("launch").write_text(f"#!/bin/sh\n{text}\n")
    Path("launch").chmod(0o755)
    return {"LAUNCH": "env\n" + os.path.abspath("launch")}


def test_a_command_works_from_any_folder_and_in_a_terminal_without_utf_8(here):
    for script, word in (("finetune", "role=meta"), ("tools/cost", "data.test_images=0")):
        done = shell(sys.executable, ROOT / f"{script}.py", "--config", "c.yaml", word,
                     env={"PYTHONIOENCODING": "ascii:strict"})
        assert done.returncode == 0 and "meta" in done.stdout and not done.stderr.count("Traceback"), done
    assert (here / "runs/c/meta.pt").exists()


def test_run_sh_help_shows_the_commands_and_run_sh_alone_is_wrong_use():
    shown, alone = shell("bash", ROOT / "run.sh", "--help"), shell("bash", ROOT / "run.sh")
    assert shown.returncode == 0 and "bash run.sh configs/demo_nac.yaml" in shown.stdout and not shown.stderr
    assert not any(line.startswith(("#", "set ", "[")) for line in shown.stdout.splitlines())
    assert alone.returncode == 2 and alone.stdout == shown.stdout


def test_run_sh_takes_the_callers_config_and_runs_every_stage_in_order(here):
    """Even where the repository has a config of the same name; paths may be odd."""
    (here / "configs").mkdir()
    shutil.copy("c.yaml", "configs/demo_nac.yaml")
    words = ["configs/demo_nac.yaml", "output_dir=odd #1 é/a run "]
    done = shell("bash", ROOT / "run.sh", *words, env=launcher('echo "$STAGE$*"'))
    made = [("finetune", "meta"), *((script, role) for role in ("teacher", "student")
                                    for script in ("distill_module", "assemble", "finetune")),
            ("finetune", "baseline"), ("evaluate", "all")]
    assert done.stdout.replace(f"{ROOT}/", "").splitlines() == [
        f"[{k}/9] {script}.py --config {' '.join(words)} role={role}"
        for k, (script, role) in enumerate(made, 1)]
    # The launcher has made nothing, so the report has nothing to say.
    assert done.returncode == 2 and "odd #1 é/a run /" in one_sentence(done.stderr)


def test_run_sh_works_in_an_odd_folder_also_as_sh_run_sh(here):
    odd = here / "it's #1"
    shutil.copytree(ROOT / "tools", odd / "tools")
    for file in [ROOT / "run.sh", *ROOT.glob("*.py")]:
        shutil.copy(file, odd)
    done = shell("sh", "run.sh", here / "c.yaml", "--dry-run", cwd=odd, env={"CDPATH": str(here)})
    assert done.returncode == 0 and done.stdout.startswith("stage"), done


def test_only_the_six_files_are_the_code_that_made_a_result(tmp_path, monkeypatch):
    code = models.code()
    for file in ROOT.glob("[a-z]*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "notes.py").write_text("pass")
    (tmp_path / ".#models.py").symlink_to("what an editor locks")
    monkeypatch.setattr(models, "__file__", str(tmp_path / "models.py"))
    assert models.code.__wrapped__() == code
    (tmp_path / "assemble.py").write_text("pass")
    assert models.code.__wrapped__() != code


def test_a_port_that_is_taken_is_one_sentence(here):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        done = shell(sys.executable, ROOT / "finetune.py", "--config", "c.yaml", "role=meta", env=env)
    assert done.returncode == 2 and "already in use" in one_sentence(done.stderr)
    for port in "abc", "70000", "":
        with pytest.MonkeyPatch.context() as patch, pytest.raises(data.UserError, match="MASTER_PORT"):
            for name, value in (env | {"MASTER_PORT": port}).items():
                patch.setenv(name, value)
            data.setup("cpu")
    for size in "two", "", "0":
        done = shell(sys.executable, ROOT / "tools/cost.py", "--config", "c.yaml", env={"WORLD_SIZE": size})
        assert done.returncode == 2 and "WORLD_SIZE=" in one_sentence(done.stderr)


def test_run_sh_stops_at_the_first_error_and_a_dry_run_runs_nothing(here):
    done = shell("bash", ROOT / "run.sh", "c.yaml", env=launcher('echo "$STAGE"; exit 7'))
    assert (done.returncode, done.stdout) == (7, "[1/9] \n"), done
    done = shell("bash", ROOT / "run.sh", "c.yaml", "seed=5", "--dry-run", env=launcher("exit 7"))
    assert done.returncode == 0 and done.stdout.startswith("stage") and not (here / "runs").exists(), done


def test_a_signal_to_run_sh_reaches_the_stage_which_saves(here):
    job = subprocess.Popen(["bash", str(ROOT / "run.sh"), "c.yaml", "train.meta.epochs=1000"], text=True,
                           stdout=subprocess.PIPE, env=ENV | {"GOAL": "meta"})
    job.stdout.readline()  # the banner: from here on a signal saves
    job.terminate()
    text, _ = job.communicate(timeout=60)
    assert job.returncode == 143 and "saved at step" in text, text
    assert (here / "runs/c/meta.unfinished.pt").exists()
