"""Promises of the tools that train nothing.

report.py: runs that differ in more than their seed are never averaged, and what cannot be used is left out
with a reason. cost.py: nothing is allocated, and multiply-adds are those computed by hand. few_shot.py:
support and query share no image, and only a linear classifier learns.
"""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

import convert
import cost
import data
import few_shot
import models
import report
from conftest import one_sentence, run_main, save_image, write_npz

VIT = {"patch": 8, "width": 16, "heads": 2, "depths": [1, 1, 1]}
CONFIG = {
    "device": "cpu", "precision": "float32",
    "data": {"image_size": 16, "classes": 4, "validation_images": 8, "workers": 0},
    "meta": VIT, "teacher": VIT, "train": {"student": {"epochs": 2}},
    "student": {"width": 16, "heads": 2, "head_width": 8, "latents": [4, 16, 2], "propagators": 1}}


@pytest.fixture
def home(tmp_path):
    """A folder with a config and its data."""
    options = {**CONFIG["data"], "root": str(write_npz(tmp_path / "set.npz", train=40, test=40, size=16))}
    tree = {**CONFIG, "data": options, "output_dir": str(tmp_path / "run")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a tool's main() -> what it prints on stdout; UserErrors come out."""
    def call(tool, *words):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, words)])
        capsys.readouterr()
        tool.main()
        out, call.errors = capsys.readouterr()
        return out
    return call


# ---------- Report

TMAC = {"meta": 1, "incubate": 2, "teacher": 4, "distill": 8, "student": 16, "baseline": 3}  # of an epoch
EPOCHS = {"meta": 10, "incubate": 10, "teacher": 10, "distill": 10, "student": 2, "baseline": 2}  # of 10 s
BOTH = {"student": {"test": 80.0}, "baseline": {"test": 10.0}}


def write_run(folder, top1, stages=(), *overrides, made=None, imported=()):
    """Writes a run's folder: accuracies {role: {set: %}}, for each stage so many epochs, finished files."""
    folder.mkdir(parents=True)
    config = models.load_config(folder.parent / "c.yaml", [f"output_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in [*imported, *((stages or top1) if made is None else made)]:
        for file in models.files(config, name):
            (folder / file).parent.mkdir(exist_ok=True)
            origin = folder.name if name in imported else None
            models.save_finished(config, name, file, {}, list("abcd"), origin)
    results = [{"role": role, "set": name, "top1": value, "top5": 100.0, "images": 100}
               for role, sets in top1.items() for name, value in sets.items()]
    (folder / "results.json").write_text(json.dumps(results))
    lines = []
    for stage, epochs in dict(stages).items():
        modules = [0, 1, 2] if stage in ("incubate", "distill") else [stage]
        lines += [{"stage": stage, "module": module, "epoch": epoch, "seconds": 10 / len(modules),
                   "images": 100, "modules": modules} for epoch in range(epochs) for module in modules]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def reported(call, monkeypatch):
    """-> lines of what is printed about these folders, where an epoch of a stage costs TMAC."""
    monkeypatch.setattr(report, "per_image", lambda config, name, modules: TMAC[name] * 1e10)
    return lambda *folders: call(report, *folders).splitlines()


def cells(lines, name):
    """{column: cell} of the row of that name in a table of Markdown."""
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in lines if line.startswith("|")]
    (row,) = (row for row in rows[2:] if row[0] == name)
    return dict(zip(rows[0], row, strict=True))


def test_seeds_are_one_row_of_mean_and_sample_std_and_other_names_another(home, reported):
    for seed, top1 in enumerate((80.0, 84.0, 91.0)):
        write_run(home / f"a-s{seed}", {"student": {"test": top1}}, (), f"seed={seed}")
    for seed, top1 in ((0, 70.0), (2, 78.0), (9, 99.0)):
        sets = {"student": {"test": top1, "renditions": 30.0}}
        write_run(home / f"a-s{seed}-alone", sets, (), "distill.alpha=0", f"seed={seed}")
    lines = reported(*(home / f"a-s{seed}" for seed in range(3)), home / "a-s0-alone")
    assert all(line.startswith("|") for line in lines) and not list(home.rglob("report.md"))
    plain, alone = cells(lines, "a student"), cells(lines, "a-alone student")
    # mean (80 + 84 + 91) / 3 = 85; deviations −5, −1, 6: sample variance 62 / 2 = 31, std 5.57
    assert (plain["seeds"], plain["test %"], plain["renditions %"]) == ("3", "85.0 ± 5.6", "–")
    assert (alone["seeds"], alone["test %"], alone["renditions %"]) == ("1", "70.0", "30.0")
    # Against the first name, seed by seed: 70 − 80 of seed 0. A run is not compared with itself.
    assert (alone["against a, test"], plain["against a, test"]) == ("-10.0", "–")
    # Of seeds 0 and 2 −10 and −13: mean −11.5, std 2.1; seed 9 has no partner.
    alone = cells(reported(*sorted(home.glob("a-*"))), "a-alone student")
    assert (alone["seeds"], alone["against a, test"]) == ("3", "-11.5 ± 2.1")
    edit(home / "a-s0-alone/results.json", ": 100}", ": 50}")  # another test set
    assert cells(reported(home / "a-s0", home / "a-s0-alone"), "a-alone student")["against a, test"] == "–"


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("overrides, spoil, reason", [
    (["train.student.lr=1"], None, "train.student.lr is 1 here and 0.0005 in"),
    (["data.root=other.npz"], None, "data.checksum is"),
    (["seed=1"], None, "the seed is that of"),
    ([], lambda run: edit(run / "results.json", ': 100}', ': 50}'), "50 images"),
    ([], lambda run: edit(run / "results.json", "}]", ""), "cannot be read"),
    ([], lambda run: (run / "results.json").unlink(), "holds no results: run evaluate.py first"),
    ([], lambda run: edit(run / "config.yaml", "root:", "set: glyphs\n  root:"), "data.set is not a key"),
    ([], lambda run: (run / "config.yaml").unlink(), "a-s3/config.yaml"),
    ([], lambda run: (run / "student.pt").unlink(), "no finished model tells its data")])
def test_a_run_that_cannot_be_used_is_left_out_and_the_others_are_reported(
        home, reported, call, monkeypatch, overrides, spoil, reason):
    monkeypatch.chdir(home)
    write_npz(home / "other.npz", train=44, test=44, size=16)
    for seed in (1, 2):
        write_run(home / f"a-s{seed}", {"student": {"test": 80.0 + seed}}, (), f"seed={seed}")
    odd = write_run(home / "a-s3", {"student": {"test": 9.0}}, (), "seed=3", *overrides)
    if spoil:
        spoil(odd)
    lines = reported(*sorted(home.glob("a-s*")))
    assert cells(lines, "a student")["test %"] == "81.5 ± 0.7"
    (error,) = [line for line in call.errors.splitlines() if "not counted" not in line]
    assert error.startswith(f"{odd} is left out: ") and reason in error


def test_runs_of_one_name_may_differ_in_what_was_imported_with_their_seed(home, reported, call):
    for seed in (1, 2, 3):
        write_run(home / f"a-s{seed}", {"student": {"test": 80.0 + seed}}, (), f"seed={seed}",
                  f"few_shot.images={seed}", imported=["teacher"] * (seed < 3))
    assert cells(reported(*sorted(home.glob("a-s*"))), "a student")["test %"] == "81.5 ± 0.7"
    assert "a-s3 is left out: " in call.errors and "teacher" in call.errors


def test_nothing_to_report_is_an_error(home, call):
    for folders, error in (["nowhere"], "nowhere/config.yaml"), (["a", "b"], "Name the"), ([], "Name the"):
        with pytest.raises(data.UserError, match=error):
            call(report, *folders)


@pytest.fixture
def costs(reported, call):
    """-> own and all TMAC of a run's model, and what is said to be not counted."""
    def costs(folder, role="student"):
        reported(folder)
        row = cells((folder / "report.md").read_text().splitlines(), role)
        return row["own TMAC"], row["all TMAC"], call.errors.strip().rpartition("a log: ")[2]
    return costs


def test_costs_are_a_models_own_and_those_of_all_before(home, costs):
    plain = write_run(home / "a", BOTH, EPOCHS)
    # own: 10 epochs of m2mKD and 2 of fine-tuning, 10·8 + 2·16; before: 10·(1 + 2 + 4)
    assert costs(plain) == ("112", "182", "") and costs(plain, "baseline")[:2] == ("6", "6")
    # A run that shares stages counts them too, but not a stage of other settings.
    student = {"student": {"test": 80.0}}
    other = write_run(home / "z", student, {"distill": 3}, "train.distill.lr=1")
    words = ["train.student.lr=1", f"share=[{other},{plain}]"]
    shares = write_run(home / "b", student, {"student": 1}, *words)
    assert costs(shares) == ("96", "166", "")
    assert costs(write_run(home / "c", student, {}, *words))[:2] == ("80", "150")
    # Without a teacher, incubation and the teacher's training are not its cost.
    alone = write_run(home / "d", student, EPOCHS, "distill.alpha=0")
    assert costs(alone) == ("112", "122", "")
    # No log, no cost, and the reader is told.
    (alone / "log.jsonl").unlink()
    assert costs(alone) == ("–", "–", "meta, distill, student")
    # What is gone changes no accuracy, and the reader is told, too.
    shutil.rmtree(plain)
    (home / "set.npz").unlink()
    assert costs(shares.rename(home / "renamed")) == ("16", "16", "meta, incubate, teacher, distill")


def test_what_made_imported_weights_is_not_counted(home, costs):
    for name, own, every in (("assemble_student", "32", "32"), ("distill", "32", "32"),
                             ("teacher", "112", "122"), ("student", "–", "–")):
        made = [] if name == "student" else ["student"]
        run = write_run(home / name, {"student": {"test": 80.0}}, EPOCHS, made=made, imported=[name])
        assert costs(run) == (own, every, name)


def test_multiply_adds_of_a_line_are_those_of_its_pass(home, monkeypatch):
    # A batch of 64 images costs the meta model's 10 for all modules of a pass, and 5 for each of them.
    monkeypatch.setattr(cost, "cost", lambda config, name, only: (0, 0, 64e12 * (10 + 5 * len(only))))
    run = write_run(home / "a", BOTH, {"distill": 1, "student": 3})
    assert report.Run(run).costs["student"]["own TMAC"] == pytest.approx(100 * 25 + 3 * 100 * 10)
    first, second, *lines = (run / "log.jsonl").read_text().splitlines()
    alone = json.dumps({**json.loads(second), "modules": [1]})
    (run / "log.jsonl").write_text("\n".join([first, alone, *lines]))
    again = report.Run(run).costs["student"]["own TMAC"]
    assert again == pytest.approx(100 * (25 * 2 / 3 + 15) + 3 * 100 * 10)


def test_an_epoch_that_a_kill_repeated_and_a_line_that_was_cut_short_count_once(home, costs):
    folder = write_run(home / "a", {"meta": {"test": 80.0}}, {"meta": 3})
    *_, last = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({**json.loads(last), "images": 500}) + "\n" + last[:20])
    assert [line["images"] for line in report.read_log(folder)] == [100, 100, 500]
    assert costs(folder, "meta")[0] == "7"
    # What follows the torn line stands on a line of its own.
    models.append(folder / "log.jsonl", [{**json.loads(last), "epoch": 3}])
    assert [line["epoch"] for line in report.read_log(folder)] == [0, 1, 2, 3]
    # What an earlier recipe of more epochs or modules has left costs nothing.
    before = costs(folder, "meta")
    models.append(folder / "log.jsonl", [{**json.loads(last), **more} for more in (
        {"epoch": 11}, {"module": 3, "modules": [3]}, {"epoch": "3"}, {"modules": [[1]]})])
    assert costs(folder, "meta") == before == ("8", "8", "")


def test_one_run_is_an_aligned_table_and_a_verdict_and_report_md_has_all_columns(home, reported):
    sets = {"test": 80.0, "ab": 30.25, "few-shot lower_case 1-shot 8-way": 5.0, "more": 4.0}
    folder = write_run(home / "a", {"student": sets, "baseline": {"test": 10.0}, "meta": sets}, EPOCHS)
    head, *rows, verdict, more, pictures = reported(folder)
    assert more == f"all columns: {folder}/report.md"
    assert pictures == f"pictures: pip install matplotlib && python tools/figures.py {folder}"
    columns = ["model", *(f"{name} %" for name in list(sets)[:3]), "own TMAC", "all TMAC"]
    assert re.split("  +", head) == columns
    assert len({len(row) for row in (head, *rows)}) == 1 and len(head) < 100
    assert [re.split("  +", row) for row in rows] == [
        ["student", "80.0", "30.2", "5.0", "112", "182"], ["baseline", "10.0", "–", "–", "6", "6"],
        ["meta", "80.0", "30.2", "5.0", "10", "10"]]
    assert verdict == ("student 80.0 %, the same model end to end for the same epochs 10.0 % (+70.0); chance "
                       "25.0 %; the whole pipeline cost 30.3 times the baseline's multiply-adds")
    row = cells((folder / "report.md").read_text().splitlines(), "student")
    assert list(row) == ["model", "seeds", "test %", "ab %", columns[3], "more %", *columns[4:]]
    assert row["more %"] == "4.0"
    for override, words in (("train.baseline_epochs=7", "for 7 epochs instead of 2 10.0 % (+70.0)"),
                            ("assemble.stitches=fold", "the same model without stitches end to end for"),
                            ("train.student.alpha=0.5", "end to end, with labels alone, for the same")):
        assert words in reported(write_run(home / override, BOTH, EPOCHS, override))[-3]
    # Scores of as many other images are not compared.
    edit(folder / "results.json", '10.0, "top5"', '10.0, "checksum": "of others", "top5"')
    assert reported(folder)[-3] == "a student and its baseline are needed to compare"


# ---------- Cost: the demos' ViTs by hand
#
# 32 px, patch 8, so 16 patches and 17 tokens; width 64, MLP 128, 24 classes. A batch is 64 images.

STEM = 64 * 16 * (3 * 8 * 8) * 64
# qkv, projection, two layers of the MLP; q·k and the sum over v
LINEAR, ATTENTION = 64 * 17 * 64 * (192 + 64 + 128 + 128), 64 * 2 * 17 * 17 * 64
BLOCK, HEAD = LINEAR + ATTENTION, 64 * 64 * 24
DEMO = {"data": {"image_size": 32, "classes": 24, "train_images": 5000, "root": "nowhere"},
        "train": {"student": {"epochs": 6}}}
DEMO |= {"meta": {"mlp_ratio": 2}, "teacher": {"mlp_ratio": 2, "depths": [2, 2, 2]}}
STUDENTS = {"nac": {"mlp_ratio": 2}, "vmoe": {"kind": "vmoe", "width": 48, "mlp_ratio": 1, "experts": 4}}


@pytest.fixture
def demo(tmp_path):
    def demo(*overrides, kind="nac"):
        (tmp_path / "demo.yaml").write_text(yaml.safe_dump({**DEMO, "student": STUDENTS[kind]}))
        return models.load_config(tmp_path / "demo.yaml", overrides)
    return demo


@pytest.fixture
def work(demo):
    return lambda name, *overrides, **kind: cost.cost(demo(*overrides, **kind), name)[2]


def trained(forward):
    """Backward costs twice the forward: the gradient of the input, and of the weight."""
    return 3 * forward


def test_parameters_and_their_state_are_counted(demo):
    for kind, name in (("nac", "student"), ("vmoe", "meta"), ("vmoe", "baseline")):
        parameters, state, _ = cost.cost(demo(kind=kind), name)
        assert parameters == models.parameters(models.build(demo(kind=kind), name))
        assert state == 16 * parameters  # weight, gradient and two moments in float32
    # Of frozen models there are weights alone.
    config = demo(kind="vmoe")
    meta, teacher = (models.parameters(models.build(config, role)) for role in ("meta", "teacher"))
    modules = models.cut(models.build(config, "student"), config, "student")
    parameters, state, _ = cost.cost(config, "distill")
    assert parameters == sum(map(models.parameters, modules))
    assert state == 16 * parameters + 4 * (meta + teacher)
    assert cost.cost(demo("distill.alpha=0", kind="vmoe"), "distill")[1] == state - 4 * teacher
    # Nothing is allocated.
    parameters, state, _ = cost.cost(demo("meta.width=65536", "teacher.width=65536"), "meta")
    assert parameters > 2e10 and state > 300 * 2**30


def test_multiply_adds_are_those_computed_by_hand(work):
    def frozen(blocks):
        # A linear layer costs 2 times its forward; attention has no weights, both of its inputs are states.
        return 2 * (blocks * LINEAR + HEAD) + 3 * blocks * ATTENTION

    # Nobody asks for the gradient of the images.
    assert work("meta") == trained(STEM + 3 * BLOCK + HEAD) - STEM
    prefix = STEM + 2 * BLOCK  # h_1 and h_2, once for all three modules
    modules = (trained(STEM + 2 * BLOCK) - STEM + frozen(2),  # the teacher's modules have two blocks each
               trained(2 * BLOCK) + frozen(1), trained(2 * BLOCK + HEAD))
    assert work("incubate") == prefix + sum(modules)
    # A teacher costs its forward.
    whole = STEM + 6 * BLOCK + HEAD
    hybrids = (STEM + 2 * BLOCK) + (2 * BLOCK + HEAD) + (2 * BLOCK) + (2 * BLOCK + HEAD) + (BLOCK + HEAD)
    for name, key, forward in (("distill", "distill", hybrids), ("baseline_kd", "distill", whole),
                               ("student", "train.student", whole)):
        with_teacher, alone = (work(name, f"{key}.alpha={alpha}", kind="vmoe") for alpha in (0.5, 0))
        assert with_teacher - alone == forward
    # What depends on codes and signatures alone is computed once a batch.
    assert work("meta", "train.meta.batch=8") * 8 == work("meta")
    assert work("student", "train.student.batch=8") * 8 > work("student")


def test_a_mixture_counts_the_experts_that_a_token_uses(work):
    dense = work("student", "student.mlp_ratio=2", "student.top_k=1", kind="vmoe")
    assert work("student", kind="vmoe") == dense > 0
    # Experts in one of three blocks: the other two's MLPs (17 tokens, 2 layers of 48·48) are not doubled.
    less = work("student", kind="vmoe") - work("student", "student.moe_blocks=[0]", kind="vmoe")
    assert less == 64 * 2 * trained(17 * 2 * 48 * 48)


def test_a_depthwise_convolution_costs_each_channel_its_own_filter():
    formulas = {torch.ops.aten.convolution_backward: cost.convolution_backward}
    with torch.device("meta"):
        x = torch.zeros(2, 8, 10, 10, requires_grad=True)
        convolution = torch.nn.Conv2d(8, 8, 7, padding=3, groups=8)
        with cost.FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            convolution(x).sum().backward()
    assert counter.get_total_flops() / 2 == trained(2 * 10 * 10 * 8 * 7 * 7)


@pytest.fixture
def rows_of(call, monkeypatch):
    """-> {stage: cells} of the printed table, where a stage has 1234 parameters and a batch 10¹⁰ MACs."""
    monkeypatch.setattr(cost, "cost", lambda *_: (1234, 2**29, 1e10))

    def rows_of(*words):
        lines = [re.split("  +", line) for line in call(cost, *words).splitlines()]
        return {line[0]: line[1:] for line in lines if len(line) > 1}
    return rows_of


def test_the_table_needs_no_data_and_counts_processes(tmp_path, demo, rows_of, monkeypatch):
    demo()
    words = ["--config", tmp_path / "demo.yaml", "train.meta.lr=0.032"]
    rows = rows_of(*words)
    stages = ["meta", "incubate", "teacher", "distill", "student", "baseline"]
    assert [*rows] == ["stage", *stages, "to do"]
    # 5,000 // 64 = 78 steps; 78 · 10 · 10¹⁰ multiply-adds, two operations each
    assert rows["meta"] == ["1,234", "5,000", "10", "780", "64", "0.004 → 1e-05", "0.50", "7.8", "0.00"]
    assert rows["to do"][0] == f"{7.8 * 4 + 4.68 * 2:.3g}"
    # Three processes drop more of the 5,000 images: 16 steps of 300 are 48 batches of 100, not 50.
    monkeypatch.setenv("WORLD_SIZE", "3")
    meta = rows_of(*words, "train.meta.batch=100")["meta"]
    assert meta[3:8] == ["160", "300", "0.019 → 1e-05", "0.50", "4.8"]
    with pytest.raises(data.UserError, match="5000 training images"):
        rows_of(*words, "train.meta.batch=5000")
    # Known sets have their size.
    monkeypatch.delenv("WORLD_SIZE")
    words += ["data.train_images=0", "train.meta.images=[0,9900]"]
    for root, held_out, images in (("data/imagenet", 0, "1,281,167"), ("x/tiny_imagenet", 1000, "99,000")):
        rows = rows_of(*words, f"data.root={root}", f"data.validation_images={held_out}")
        assert (rows["student"][1], rows["meta"][1]) == (images, "9,900")
    with pytest.raises(data.UserError, match="data.root='elsewhere' is not there; set data.train_images"):
        rows_of(*words, "data.root=elsewhere")


def test_finished_stages_are_marked_and_not_to_do(home, rows_of):
    words = ["--config", home / "c.yaml", "train.*.batch=8"]
    before = rows_of(*words)
    config = models.load_config(home / "c.yaml", words[2:])
    models.save_finished(config, "teacher", "teacher.pt", {})
    rows = rows_of(*words)
    assert rows["teacher"] == ["finished"] and before.keys() - rows.keys() == {"incubate"}
    # 4 steps, 10 epochs and 10¹⁰ multiply-adds
    assert float(before["to do"][0]) - float(rows["to do"][0]) == pytest.approx(2 * 0.4)
    # Without the data it is known that imported weights fit, and nothing else.
    models.save_finished(config, "assemble_student", "student_assembled.pt", {}, imported="x.pt")
    (home / "set.npz").unlink()
    rows = rows_of(*words, "data.train_images=40")
    assert list(rows) == ["stage", "assemble_student", "student", "baseline", "to do"]


def test_the_list_is_what_run_sh_runs(home, call, monkeypatch):
    words = ["--config", home / "c.yaml", "--list", f"output_dir={home / 'a run'}", "train.*.batch=8"]
    made = [f"{script}.py role={role}" for role, scripts in (
        ("meta", ["finetune"]), ("teacher", ["distill_module", "assemble", "finetune"]),
        ("student", ["distill_module", "assemble", "finetune"]), ("baseline", ["finetune"]))
        for script in scripts]
    last = ["evaluate.py role=all", f"tools/report.py {home / 'a run'}"]
    assert call(cost, *words).splitlines() == made + last and not call.errors
    monkeypatch.setenv("GOAL", "distill")
    assert call(cost, *words).splitlines() == made[:5]
    monkeypatch.setenv("GOAL", "distil")
    with pytest.raises(data.UserError, match="GOAL=distil is not one of the stages meta, "):
        call(cost, *words)
    monkeypatch.delenv("GOAL")
    config = models.load_config(home / "c.yaml", words[3:])
    models.save_finished(config, "baseline", "baseline.pt", {})
    with monkeypatch.context() as patch:
        patch.setattr(models, "code", lambda: "older")
        models.save_finished(config, "teacher", "teacher.pt", {})
    left = home / "a run/teacher.unfinished.pt"  # by a kill: a new teacher would go on from it
    left.touch()
    assert call(cost, *words).splitlines() == [made[0], *made[4:-1], *last]
    assert call.errors == "teacher is finished (other code made it)\nbaseline is finished\n"
    assert not left.exists()
    # The few-shot set is looked at before anything is trained.
    words += ["few_shot.root=" + str(home / "set.npz"), "few_shot.ways=4", "few_shot.shots=[1,2]"]
    assert call(cost, *words).splitlines()[-2:] == ["tools/few_shot.py role=all", last[-1]]
    for word, error in (("few_shot.shots=[1,3]", "12 images"), ("share=no", "share=no"),
                        ("few_shot.root=no", "few_shot.root='no'"), ("data.root=no", "data.root='no' is not"),
                        ("train.distill.batch=64", "train.distill.batch=64"),
                        ("meta.patch=7", "not a multiple of 7, meta's patch")):
        with pytest.raises(data.UserError, match=error):
            call(cost, *words, f"output_dir={home / 'other'}", word)
    with pytest.raises(data.UserError, match="12 images"):  # and by a dry run
        call(cost, *words[:2], *words[3:], "few_shot.shots=[1,3]")


# ---------- Few-shot


def test_episodes_are_seeded_disjoint_and_complete():
    labels = np.arange(90) % 9
    labels[labels == 8] = 7  # classes 0–6 have 10 images, 7 has 20
    support, query = few_shot.episodes(labels, ways=4, shots=2, count=20, seed=1)
    assert support.shape == (20, 8) and query.shape == (20, 24)
    for s, q in zip(support, query):
        classes = labels[s].reshape(4, 2)[:, 0]
        assert len(set(classes)) == 4
        assert labels[s].tolist() == classes.repeat(2).tolist()
        assert labels[q].tolist() == classes.repeat(6).tolist()
        assert len(set(s) | set(q)) == 4 * 8  # no image twice, none in both
    again, other = (few_shot.episodes(labels, 4, 2, 20, seed) for seed in (1, 2))
    assert (again[0] == support).all() and (again[1] == query).all() and not (other[0] == support).all()
    assert len({tuple(sorted(labels[s])) for s in support}) > 5
    with pytest.raises(data.UserError, match=r"few_shot.ways=4, but only 1 classes have 12 images"):
        few_shot.episodes(labels, 4, 3, 1, seed=1)


def test_the_probe_learns_what_the_support_tells_and_nothing_else():
    torch.manual_seed(0)
    centers = torch.randn(6, 3, 1, 32)  # E ways 1 D

    def near(n):
        return (centers + 0.1 * torch.randn(6, 3, n, 32)).flatten(1, 2)

    assert few_shot.linear_probe(near(1), near(7), 3).all()
    # Support whose classes stand in another order teaches other labels: not one query is right.
    moved = near(1)[:, [1, 2, 0]]
    assert not few_shot.linear_probe(moved, near(7), 3)[..., 0].any()
    chance = few_shot.linear_probe(torch.randn(200, 8, 32), torch.randn(200, 24, 32), 8)
    assert chance.float().mean((0, 1)).tolist() == pytest.approx([1 / 8, 5 / 8], abs=0.03)
    # Every episode is its own.
    support, query = torch.randn(4, 6, 16), torch.randn(4, 9, 16)
    together = few_shot.linear_probe(support, query, 3)
    for one, (s, q) in zip(together, zip(support, query)):
        assert torch.equal(few_shot.linear_probe(s[None], q[None], 3)[0], one)


@pytest.mark.parametrize("kind", ["vmoe", "nac"])
def test_features_are_what_the_classifier_is_given_from_any_number_of_processes(home, monkeypatch, kind):
    config = models.load_config(home / "c.yaml", [f"student.kind={kind}", "student.experts=2"])
    model, images = models.build(config, "student").eval(), data.load(config, "test")
    sums, add = [], data.sum_over_processes
    monkeypatch.setattr(data, "sum_over_processes", lambda tensor: sums.append(tensor.clone()) or add(tensor))
    features, *_ = [few_shot.features_of(model, images, config, data.Setup(torch.device("cpu"), rank, world))
                    for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3))]
    assert torch.allclose(sums[0], sum(sums[1:]), atol=1e-5)
    classifier, kept = model.pool.to_logits if kind == "nac" else model.head, []
    classifier.forward = lambda x: kept.append(x) or x
    with torch.no_grad():
        model(next(data.eval_batches(images, config, data.Setup(torch.device("cpu"), 0, 1)))[0])
    assert torch.allclose(features, F.layer_norm(kept[0], kept[0].shape[1:]), atol=1e-6)


@pytest.mark.parametrize("split", ["test", "val", "", ".npz"])
def test_the_command_keeps_mean_and_interval(home, call, capsys, split):
    root = home / f"letters.v2{split if split == '.npz' else ''}"
    if split == ".npz":
        write_npz(root, classes="avwxy", test=40, size=16)
    else:
        for k in range(40):
            save_image(root / split / "avwxy"[k % 5] / f"{k}.png", (5 * k, 90, 50), (20, 20 + k))
    if split == "val":
        save_image(root / "test/images/1.png")  # ImageNet's, without classes
    few = [f"few_shot.root={root}", "few_shot.ways=3", "few_shot.shots=[1,2]", "few_shot.episodes=20"]
    words = ["--config", home / "c.yaml", *few]
    config = models.load_config(home / "c.yaml", few)
    state = models.build(config, "meta").state_dict()
    models.save_finished(config, "meta", "meta.pt", state, data.class_names(config["data"]))
    lines = call(few_shot, *words, "role=all").splitlines()
    assert lines[0] == "meta was trained on 1 of these classes, such as a."
    results = json.loads((home / "run/results.json").read_text())
    assert [r["set"] for r in results] == [f"few-shot letters.v2 {shots}-shot 3-way" for shots in (1, 2)]
    for line, r in zip(lines[1:], results):
        assert r["role"] == "meta" and r["episodes"] == 20 and r["images"] == 40 and r["top5"] == 100
        assert 0 < r["ci95"] < 20 and 0 < r["top1"] < 100 and "top-5" not in line
        assert f"top-1 {r['top1']:.2f} ± {r['ci95']:.2f} % of 40 images" in line
    assert "of 30 images" in call(few_shot, *words, "role=meta", "few_shot.images=30", "few_shot.shots=[1]")
    for word, error in (("few_shot.ways=6", "few_shot.ways=6"), ("few_shot.images=41", "few_shot.images=41"),
                        ("few_shot.root=", "few_shot.root='' is"), ("role=teacher", "teacher.pt is not")):
        with pytest.raises(data.UserError, match=error):
            call(few_shot, *words, word)
    # What cannot be kept is printed all the same.
    (home / "run/results.json").write_text("[{")
    assert run_main("tools/few_shot", *words, "role=meta") == 2
    out, error = capsys.readouterr()
    assert out.count("top-1") == 2 and "results.json cannot be read" in one_sentence(error)


def test_an_upcycled_model_answers_as_the_dense_one_does(home, call):
    dense = models.load_config(home / "c.yaml")
    models.save_finished(dense, "meta", "meta.pt", models.build(dense, "meta").state_dict(), list("abcd"))
    words = ["student.kind=vmoe", "student.experts=3", "student.moe_blocks=[1,2]"]
    text = call(convert, "--config", home / "c.yaml", *words, f"student_upcycled={home}/run/meta.pt")
    assert text.count(".moe.router.") == 4
    content, images = models.read(home / "run/student_assembled.pt"), torch.randn(2, 3, 16, 16)
    model = models.build(content["config"], "student").eval()
    models.load_state(model, content["model"], "")
    assert hasattr(model.blocks[1], "moe") and content["class_names"] == list("abcd")
    assert torch.allclose(model(images), models.load(home / "run/meta.pt")(images), atol=1e-5)
