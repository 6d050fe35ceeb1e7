"""What people run into: each complaint as the smallest case that once failed, and what is promised instead.

A dead worker, a small /dev/shm, SIGTERM while workers start, images in sub-folders, incomplete sets, two jobs
in one folder, terminals without UTF-8, a part of a set, few-shot folders, processes without torchrun.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

import data
import evaluate
import models
from conftest import ROOT
from test_runs import ENV, end, run, shell, start, start_processes, write_config

READ = ["role=meta", "data.workers=2", "data.randaugment=9", "train.meta.epochs=2"]  # images through workers


def folder_set(root, classes=("a", "b", "c", "d"), parts=("train", "val"), count=12, size=16):
    for part in parts:
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (size, size), (60 * k, 20 * i, 50)).save(root / part / name / f"{i}.png")
    return root


def on_folder(root, **changes):
    """A config's `data` for images in a folder."""
    plain = dict(set="folder", root=str(root), image_size=16, validation_images=8, workers=0)
    return {"data": {**plain, **changes}}


# ----------------------------------------------------------------------------------------------------------
# Workers


def start_method(name):
    return lambda rank=0: multiprocessing.set_start_method(name, force=True)


def ends_a_worker(signum, marker):
    """Makes the first worker to draw an image end by a signal, once: `marker` says that it happened."""
    def patch(rank=0):
        randaugment = data.randaugment

        def deadly(*args):
            if multiprocessing.parent_process() and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signum)
            return randaugment(*args)
        data.randaugment = deadly
    return patch


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS])  # out of memory; /dev/shm is full
@pytest.mark.parametrize("world", [1, 2])
def test_a_worker_that_dies_ends_the_run_with_a_sentence(tmp_path, signum, world):
    path, began = write_config(tmp_path), time.time()
    before = ends_a_worker(signum, tmp_path / "dead")
    words = [*READ, "train.meta.batch=4"]
    if world == 1:
        texts = [run("finetune", path, *words, before=before, expect=2)]
    else:
        ends = [end(one, 40) for one in start_processes(2, "finetune", path, *words, before=before)]
        assert all(code not in (0, "hung") for code, _ in ends), ends
        texts = [text for code, text in ends if code == 2]
    assert time.time() - began < 30
    sentences = [text.partition("error: ")[2].partition("\n")[0] for text in texts]
    assert texts and all("data.workers=0" in sentence for sentence in sentences), texts


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_real_command_with_workers_ends_and_survives_sigterm_to_its_whole_group(tmp_path, method):
    """spawn and forkserver need importable workers, so this is a script and a process group of its own."""
    path = write_config(tmp_path)
    script = tmp_path / "main.py"
    script.write_text(f"""
import multiprocessing, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    sys.argv[0] = {str(ROOT / "finetune.py")!r}
    runpy.run_path(sys.argv[0], run_name="__main__")
""")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(script), "--config", str(path), *READ, "train.meta.epochs=40"]
    job = subprocess.Popen(line, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           start_new_session=True)
    job.stdout.readline()  # the banner: from here on SIGTERM saves, while workers are about to start
    os.killpg(job.pid, signal.SIGTERM)
    text, _ = job.communicate(timeout=60)
    assert job.returncode == 143 and "saved at step" in text and "Traceback" not in text, text
    line[-1] = "train.meta.epochs=40"
    done = subprocess.run(line, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and "resumed" in done.stdout, done


# ----------------------------------------------------------------------------------------------------------
# Sets on disk


def test_images_in_sub_folders_are_read_and_other_files_are_counted(tmp_path, capsys):
    root = folder_set(tmp_path / "set", count=3)
    (root / "train/a/deep/er").mkdir(parents=True)
    shutil.copy(root / "train/a/0.png", root / "train/a/deep/er/x.png")
    shutil.copy(root / "train/a/0.png", root / "train/a/photo.heic")
    (root / "train/a/images").mkdir()
    shutil.copy(root / "train/a/0.png", root / "train/a/images/y.png")
    data.note.cache_clear()
    names = ["a", "b", "c", "d"]
    images = data._read_folders(root / "train", names, names)
    assert (images.labels == 0).sum() == 5 and len(images) == 14
    assert "1 files" in capsys.readouterr().err


@pytest.mark.parametrize("damage, names", [
    (lambda root: shutil.rmtree(root / "val"), "val"),
    (lambda root: [shutil.rmtree(root / "val/b")], "'b'"),
    (lambda root: [f.rename(root / f"val/{f.parent.name}{f.name}") for f in list(root.glob("val/*/*"))]
     + [f.rmdir() for f in root.glob("val/?")], "val"),
], ids=["absent", "a class short", "flat"])
def test_an_incomplete_test_set_is_noticed_before_anything_trains(tmp_path, damage, names):
    root = folder_set(tmp_path / "set")
    path = write_config(tmp_path, **on_folder(root, classes=4))
    damage(root)
    for word in ("--dry-run", "seed=3"):
        text = shell("bash", "run.sh", path, word)
        assert text.returncode == 2 and names in text.stderr and text.stderr.count("\n") == 1, text
    assert not (tmp_path / "run").exists()


def test_an_empty_robustness_class_is_left_out_and_a_bad_set_keeps_no_other_from_being_scored(tmp_path):
    root = folder_set(tmp_path / "set")
    shutil.copytree(root / "val", tmp_path / "drawings")
    for file in (tmp_path / "drawings/b").iterdir():
        file.unlink()
    (tmp_path / "empty").mkdir()
    path = write_config(tmp_path, **on_folder(root, robustness=[str(tmp_path / "drawings")]))
    run("finetune", path, "role=meta")
    both = f"data.robustness=[{tmp_path / 'empty'}, {tmp_path / 'drawings'}]"
    text = run("evaluate", path, "role=meta", both)
    assert "is left out" in text
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [(r["set"], r["images"]) for r in results] == [("test", 48), (str(tmp_path / "drawings"), 36)]


def test_few_shot_folders_need_no_train_have_names_of_their_own_and_errors_that_name_the_keys(tmp_path):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta")
    words = ["role=meta", "few_shot.set=folder", "few_shot.ways=2", "few_shot.shots=[1]",
             "few_shot.episodes=2"]
    for name in ("pets", "tools"):
        folder_set(tmp_path / name, parts=("test",))
        run("evaluate", path, *words, f"few_shot.root={tmp_path / name}")
    results = json.loads((tmp_path / "run/results.json").read_text())
    sets = {f"few-shot {tmp_path / name} 1-shot 2-way" for name in ("pets", "tools")}
    assert sets < {r["set"] for r in results}
    run("evaluate", path, *words, f"few_shot.root={tmp_path / 'pets'}", "few_shot.images=20")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert 20 in {r["images"] for r in results if "pets" in r["set"]}
    text = run("evaluate", path, "role=meta", "few_shot.set=lower_case", expect=2)
    assert "few_shot.images" in text.splitlines()[-1] and "data.test_images" not in text.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------
# Folders, results, terminals


def test_two_jobs_on_one_stage_the_second_says_who_is_at_work_and_a_killed_holder_does_not_block(tmp_path):
    path = write_config(tmp_path)

    def wait(rank=0):
        rate = models.learning_rate
        models.learning_rate = lambda *args: (time.sleep(0.5), rate(*args))[1]

    first = start("finetune", path, "role=meta", before=wait)
    while not (tmp_path / "run/meta.unfinished.lock").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    other = path.with_name("other.yaml")
    shutil.copy(path, other)
    text = run("finetune", other, "role=meta", expect=2)
    assert f"process {first[0]}" in text.splitlines()[-1], text
    os.kill(first[0], signal.SIGKILL)
    end(first)
    run("finetune", path, "role=meta")
    assert (tmp_path / "run/meta.pt").exists() and not (tmp_path / "run/meta.unfinished.lock").exists()


def test_a_look_at_a_part_of_the_test_set_does_not_replace_the_result(tmp_path, capsys):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta")
    run("evaluate", path, "role=meta", "data.robustness=[]")
    run("evaluate", path, "role=meta", "data.robustness=[]", "data.test_images=8")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [r["images"] for r in results] == [29, 8]
    evaluate.report([tmp_path / "run"])
    assert f"{results[0]['top1']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii:strict"])
def test_a_terminal_that_is_not_utf_8_loses_no_report(tmp_path, encoding):
    path = write_config(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}
    for script, word in (("finetune", "role=meta"), ("evaluate", "role=all"), ("finetune", "--dry-run")):
        done = subprocess.run([sys.executable, f"{script}.py", "--config", path, word], cwd=ROOT, env=env,
                              capture_output=True, timeout=120)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done
    assert (tmp_path / "run/report.md").exists()


def test_several_processes_without_torchrun_are_told_so(tmp_path):
    def alone(rank=0):
        os.environ["WORLD_SIZE"] = "2"
        os.environ.pop("MASTER_ADDR", None)

    assert "torchrun" in run("finetune", write_config(tmp_path), "role=meta", before=alone, expect=2)


def test_a_changed_setting_is_answered_with_the_command_that_keeps_the_other_stages(tmp_path):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta")
    text = run("finetune", path, "role=meta", "train.meta.lr=0.5", expect=2)
    assert "train.meta.lr was 0.05" in text and "now it is 0.5" in text
    assert f"share={tmp_path / 'run'}" in text


# ----------------------------------------------------------------------------------------------------------
# Said before it costs time


def test_a_few_shot_set_that_cannot_serve_is_named_before_training(tmp_path):
    folder_set(tmp_path / "few", count=3)
    words = ["few_shot.set=folder", f"few_shot.root={tmp_path / 'few'}", "few_shot.ways=4",
             "few_shot.shots=[1]"]
    path = write_config(tmp_path)
    text = run("finetune", path, "role=meta", *words, expect=2)
    assert "few_shot.ways=4" in text and not (tmp_path / "run/meta.pt").exists()
    text = run("finetune", path, "role=meta", "few_shot.set=cub", f"few_shot.root={tmp_path}", expect=2)
    assert "CUB-200-2011" in text


def test_going_on_with_another_number_of_processes_names_the_right_one(tmp_path):
    path = write_config(tmp_path)
    words = ["role=meta", "train.meta.epochs=1"]
    run("finetune", path, *words, before=lambda: setattr(models.Stage, "finish", models.Stage.wait))
    text = run("finetune", path, *words, before=lambda: setattr(
        data, "setup", lambda device: data.Setup(torch.device("cpu"), 0, 2)), expect=2)
    assert "processes was 1" in text and "go on with as many" in text


def test_a_dry_run_counts_the_launchers_processes(tmp_path):
    path = write_config(tmp_path)
    env = {"LAUNCH": f"env WORLD_SIZE=2 RANK=0 {sys.executable}"}
    one, two = (shell("bash", "run.sh", path, "--dry-run", env=more) for more in ({}, env))
    assert one.returncode == two.returncode == 0 and one.stdout != two.stdout
    assert not shell("bash", "run.sh", path, "--dry-run", env={**env, "LAUNCH": env["LAUNCH"].replace(
        "RANK=0", "RANK=1")}).stdout


def test_sigterm_to_run_sh_reaches_the_stage_which_saves(tmp_path):
    path = write_config(tmp_path)
    job = subprocess.Popen(["bash", "run.sh", str(path), "train.meta.epochs=1000"], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, env=ENV)
    job.stdout.readline()  # the banner: from here on SIGTERM saves
    job.terminate()
    text, _ = job.communicate(timeout=60)
    assert job.returncode == 143 and "saved at step" in text, text
    assert (tmp_path / "run/meta.unfinished.pt").exists()


def test_a_changed_setting_proposes_all_shared_runs(tmp_path):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta")
    words = [f"share={tmp_path / 'run'}", f"output_dir={tmp_path / 'b'}", "role=baseline"]
    run("finetune", path, *words, "train.student.epochs=0")
    text = run("finetune", path, *words, "train.student.epochs=1", expect=2)
    assert f"share=[{tmp_path / 'b'},{tmp_path / 'run'}] to keep" in text


def test_an_architecture_given_as_an_override_beats_the_sizes_of_the_file(tmp_path):
    path = write_config(tmp_path)
    words = ["teacher.arch=vit_tiny", "teacher.depths=[4,4,4]", "meta.width=192"]
    teacher = models.load_config(path, words)["teacher"]
    assert (teacher["width"], teacher["heads"], teacher["patch"], teacher["depth"]) == (192, 3, 16, 12)
    assert models.load_config(path, [*words, "teacher.patch=4"])["teacher"]["patch"] == 4


@pytest.mark.parametrize("words, names", [
    (["few_shot.root=here", "few_shot.set=null"], "few_shot.set"),
    (["data.train_images=3"], "3 training images")])
def test_a_dry_run_refuses_what_the_run_would_refuse(tmp_path, words, names):
    text = run("finetune", write_config(tmp_path), "--dry-run", *words, expect=2)
    assert names in text


def test_two_runs_of_one_name_and_seed_are_refused_by_the_report(tmp_path):
    path = write_config(tmp_path)
    for folder in ("a-s3", "a-s4"):
        run("finetune", path, "role=meta", f"output_dir={tmp_path / folder}")
        run("evaluate", path, "role=meta", f"output_dir={tmp_path / folder}")
    with pytest.raises(models.UserError, match="second run of name"):
        evaluate.report([tmp_path / "a-s3", tmp_path / "a-s4"])


def test_an_evaluation_leaves_the_config_that_the_run_was_trained_with(tmp_path):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta")
    before = (tmp_path / "run/config.yaml").read_bytes()
    run("evaluate", path, "role=meta", "data.test_images=7")
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_bfloat16_on_a_processor_without_units_for_it_is_said(tmp_path, monkeypatch, capsys):
    words = ["x", "--config", str(ROOT / "configs/demo_nac.yaml"), "precision=bfloat16"]
    monkeypatch.setattr(sys, "argv", words)
    for units, said in (({"avx512_bf16": True}, False), ({"avx512_f": True, "amx_bf16": False}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        data.note.cache_clear()
        models.command_line("", ("student",))
        assert ("bfloat16" in capsys.readouterr().err) == (said and not torch.cuda.is_available())


@pytest.mark.parametrize("environment", [
    {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    {"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, {"WORLD_SIZE": "0"}, {"RANK": "1"}])
def test_an_incomplete_launch_is_one_sentence(monkeypatch, environment):
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(models.UserError, match="start with torchrun"):
        data.setup("cpu")


def test_an_emptied_block_means_defaults_and_a_misspelled_empty_key_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("train:\n  student:\n")
    assert models.load_config(tmp_path / "c.yaml")["train"]["student"]["epochs"] == 10
    (tmp_path / "c.yaml").write_text("data:\n  flop:\n")
    with pytest.raises(models.UserError, match="data.flop is not a key"):
        models.load_config(tmp_path / "c.yaml")


def test_a_refused_job_leaves_the_runs_config_alone(tmp_path):
    path = write_config(tmp_path)
    run("finetune", path, "role=meta", before=lambda: setattr(models.Stage, "finish", models.Stage.wait))
    before = (tmp_path / "run/config.yaml").read_text()
    run("finetune", path, "role=meta", "train.meta.lr=0.5", expect=2)
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_a_robustness_set_without_images_is_refused(tmp_path):
    root = folder_set(tmp_path / "set")
    (tmp_path / "r/a").mkdir(parents=True)
    (tmp_path / "r/b").mkdir()
    shutil.copy(root / "val/a/0.png", tmp_path / "r/a/0.png")
    with pytest.raises(models.UserError, match="images of 1 classes"):
        data._robustness(tmp_path / "r", ["a", "b"])
