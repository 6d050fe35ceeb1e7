"""Promise: evaluate.py --report turns run folders into right tables and pictures. No training: folders are written."""

import json
import math
import sys

import pytest
import torch
import yaml
from PIL import Image, ImageColor

import evaluate
import models

CONFIG = """
data: {set: glyphs, image_size: 16, classes: 4, train_images: 32, validation_images: 8, test_images: 16, workers: 0}
meta: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
teacher: {patch: 8, width: 16, heads: 2, depths: [1, 1, 1]}
student: {kind: nac, width: 16, heads: 2, head_width: 8, latents: [4, 16, 2], propagators: 1}
train: {student: {epochs: 2}}
"""
MACS = {"meta": 1e12, "incubate": 2e12, "teacher": 4e12, "distill": 8e12, "student": 16e12, "baseline": 3e12}  # of an epoch


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Multiply-adds that are easy to add up, in proportion to the epochs."""
    def multiply_adds(config, stage):
        epochs = config["train"]["baseline_epochs"] if stage == "baseline" else config["train"][stage]["epochs"]
        return MACS[stage] * epochs

    monkeypatch.setattr(models, "multiply_adds", multiply_adds)


def run(folder, top1, stages, *overrides, load=None):
    """Writes a run's folder: accuracies {role: {set: %}}, and for each stage so many epochs of 10 s, validated at
    50, 60 … %. -> its config"""
    folder.mkdir(parents=True)
    (folder / "c.yaml").write_text(CONFIG)
    config = models.load_config(folder / "c.yaml", [f"output_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    results = [{"role": role, "set": name, "top1": value} for role, sets in top1.items() for name, value in sets.items()]
    (folder / "results.json").write_text(json.dumps(results))
    more = {"expert_load": load} if load else {}
    lines = [{"stage": stage, "epoch": epoch + 1, "seconds": 10, "val_top1": 50 + 10 * epoch, **more}
             for stage, epochs in stages.items() for epoch in range(epochs)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def report(capsys, *words):
    """-> lines of what is printed."""
    evaluate.report([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def cells(lines, name):
    """The cells of the first table row of that name."""
    line = next(line for line in lines if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def is_near(image, at, color, tolerance=40):
    """Whether the pixel has the colour, up to the smoothing."""
    return all(abs(a - b) <= tolerance for a, b in zip(image.getpixel(at), ImageColor.getrgb(color)))


def test_seeds_are_one_row_of_mean_and_sample_std_and_other_settings_another(tmp_path, capsys):
    for seed, top1 in enumerate((80.0, 84.0, 91.0)):
        run(tmp_path / f"a{seed}", {"student": {"test": top1}}, {}, f"seed={seed}")
    run(tmp_path / "b", {"student": {"test": 70.0, "renditions": 30.0}}, {}, "distill.alpha=0", "distill.tau=4")
    lines = report(capsys, *tmp_path.iterdir())
    # mean (80 + 84 + 91) / 3 = 85; deviations −5, −1, 6: sample variance 62 / 2 = 31, std 5.57
    assert cells(lines, "student")[:3] == ["85.0 ± 5.6", "–", "3"]
    # without a teacher its temperature is not worth a word
    assert cells(lines, "student, distill.alpha=0")[:3] == ["70.0", "30.0", "1"]
    # against the plain row, seed by seed: 70 − 80 of seed 0; of seeds 0 and 2 −10 and −13, mean −11.5, std 2.1
    assert cells(lines, "student, distill.alpha=0")[3] == "-10.0" and cells(lines, "student")[3] == ""
    run(tmp_path / "c", {"student": {"test": 78.0}}, {}, "distill.alpha=0", "distill.tau=4", "seed=2")
    run(tmp_path / "d", {"student": {"test": 99.0}}, {}, "distill.alpha=0", "distill.tau=4", "seed=9")  # not in the plain row
    assert cells(report(capsys, *sorted(tmp_path.iterdir())), "student, distill.alpha=0")[3] == "-11.5 ± 2.1"
    # other figures of the same settings and seed are left out, and named
    run(tmp_path / "e", {"student": {"test": 1.0}}, {}, "seed=1")
    lines = report(capsys, *sorted(tmp_path.iterdir()))
    assert cells(lines, "student")[0] == "85.0 ± 5.6" and any("other figures" in l and str(tmp_path / "e") in l for l in lines)
    written = (tmp_path / "report/report.md").read_text().splitlines()
    assert written == [line for line in lines if line.startswith("|") or not line][1:-1]


def test_a_row_is_named_after_what_differs_from_the_plain_row_whatever_the_folders_names(tmp_path, capsys):
    run(tmp_path / "1", {"student": {"test": 1.0}}, {}, "distill.codes=original", "distill.reduction=mean")
    run(tmp_path / "2", {"student": {"test": 2.0}}, {})
    run(tmp_path / "3", {"student": {"test": 3.0}}, {}, "distill.alpha=0.9")
    run(tmp_path / "4", {"student": {"test": 4.0}}, {}, "distill.alpha=0.9", "distill.tau=2", "distill.kind=hard",
        "distill.codes=fresh", "train.meta.lr=1")
    vmoe = ["student.kind=vmoe", "student.experts=2"]
    lines = report(capsys, *tmp_path.iterdir())
    assert cells(lines, "student")[0] == "2.0"
    assert cells(lines, "student, distill.reduction=mean, distill.codes=original")[0] == "1.0"
    assert cells(lines, "student, distill.alpha=0.9, distill.tau=2, distill.kind=hard, + 2 more")[0] == "4.0"
    # the kind of student says it all: its widths, experts and so on follow
    run(tmp_path / "5", {"student": {"test": 5.0}}, {}, *vmoe)
    lines = report(capsys, *tmp_path.iterdir())
    assert cells(lines, "student vmoe")[0] == "5.0" and cells(lines, "student nac")[0] == "2.0"


def test_rows_that_their_first_keys_do_not_tell_apart_are_named_in_full(tmp_path, capsys):
    for seed in range(3):
        run(tmp_path / f"plain{seed}", {"student": {"test": 1.0}}, {}, f"train.student.lr={seed + 1}")
    four = ["distill.alpha=0.9", "distill.tau=2", "distill.kind=hard", "distill.codes=fresh"]
    for lr in (7, 8):
        run(tmp_path / f"four{lr}", {"student": {"test": float(lr)}}, {}, "train.student.lr=1", *four, f"train.meta.lr={lr}")
    lines = report(capsys, *tmp_path.iterdir())
    assert [cells(lines, f"student, {', '.join(four)}, train.meta.lr={lr}")[0] for lr in (7, 8)] == ["7.0", "8.0"]


def test_weights_from_elsewhere_that_differ_in_their_seed_alone_are_one_setting(tmp_path, capsys):
    for seed in (1, 12):
        run(tmp_path / f"a{seed}", {"student": {"test": 80.0 + seed}}, {}, f"seed={seed}",
            f"teacher.checkpoint={tmp_path}/t1024-s{seed}/meta.pt")
    run(tmp_path / "b", {"student": {"test": 70.0}}, {}, "seed=1", f"teacher.checkpoint={tmp_path}/u1024-s1/meta.pt")
    lines = [line for line in report(capsys, *tmp_path.iterdir()) if line.startswith("| student")]
    assert [line.split("|")[2].strip() for line in lines] == ["86.5 ± 7.8", "70.0"], lines


def test_costs_are_a_models_own_and_those_of_all_before(tmp_path, capsys):
    stages = {"meta": 10, "incubate": 10, "teacher": 10, "distill": 10, "student": 2, "baseline": 2}
    config = run(tmp_path / "a", {"student": {"test": 80.0}, "baseline": {"test": 10.0}}, stages)
    lines = report(capsys, tmp_path / "a")
    # own: 10 epochs of m2mKD and 2 of finetuning, 10·8 + 2·16; before: 10·(1 + 2 + 4)
    assert cells(lines, "student")[1:] == ["1", "", "120", "300", "112", "70"]
    assert cells(lines, "baseline")[1:] == ["1", "", "20", "0", "6", "0"]
    assert cells(lines, "incubate") == ["1", "100", "20"]
    # A run that shares stages counts them too, but not a stage of other settings.
    again = ["train.student.lr=1", f"share={tmp_path / 'a'}", "train.student.epochs=1"]
    run(tmp_path / "b", {"student": {"test": 80.0}}, {"student": 1}, *again)
    lines = report(capsys, tmp_path / "b")
    assert cells(lines, "student")[1:] == ["1", "", "110", "300", "96", "70"]
    assert not [line for line in lines if line.startswith("| baseline")]
    # a longer baseline, counted at its own length
    run(tmp_path / "c", {"baseline": {"test": 10.0}}, {"baseline": 7}, "train.baseline_epochs=7")
    assert cells(report(capsys, tmp_path / "a", tmp_path / "c"), "baseline, train.baseline_epochs=7")[5] == "21"
    assert config["train"]["baseline_epochs"] is None
    # without a teacher: incubation and the teacher's training are not its cost
    run(tmp_path / "d", {"student": {"test": 80.0}}, stages, "distill.alpha=0")
    assert cells(report(capsys, tmp_path / "d"), "student")[1:] == ["1", "", "120", "100", "112", "10"]
    # what weights from elsewhere took is not known: nothing but the finetuning is counted
    run(tmp_path / "e", {"student": {"test": 80.0}}, stages, "student.start=other.pt")
    assert cells(report(capsys, tmp_path / "e"), "student")[1:] == ["1", "", "20", "0", "32", "0"]


def test_the_axes_map_is_where_the_ink_is():
    image, draw = evaluate.paper(1000)
    place = evaluate.axes(draw, (200, 100, 1200, 900), (1, 100), (0, 50), "", "", "", log=True)
    assert place(1, 0) == (200, 900) and place(100, 50) == (1200, 100)
    assert place(10, 25) == pytest.approx((700, 500)), "10 is half way from 1 to 100"
    assert place(10, 1000) == pytest.approx((700, 100)), "what lies beyond stays at the edge"
    assert image.getpixel((200, 500)) == (0, 0, 0) and image.getpixel((700, 480)) != (255, 255, 255), "axis, grid"
    assert evaluate.ticks(0, 100) == [0, 20, 40, 60, 80, 100] and evaluate.ticks(0, 3) == [0, 1, 2, 3]
    assert evaluate.ticks(0.3, 20, log=True) == pytest.approx([0.5, 1, 2, 5, 10, 20])


def test_points_and_curves_are_drawn_where_the_numbers_say(tmp_path, capsys):
    run(tmp_path / "a", {"baseline": {"test": 60.0}}, {"baseline": 2}, "train.baseline_epochs=2")
    run(tmp_path / "b", {"baseline": {"test": 80.0}}, {"baseline": 8}, "train.baseline_epochs=8")
    report(capsys, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cost.png", "curves.png", "report.md"]
    cost = Image.open(tmp_path / "out/cost.png")
    # 6 and 24 TMAC on a log axis from 6 / 1.3 to 24 · 1.3; 60 and 80 % on one from 50 to 90; the file has half the size
    low, high = math.log(6 / 1.3), math.log(24 * 1.3)
    box = (120, 120, evaluate.WIDTH - 60, 860)
    at = [((box[0] + (box[2] - box[0]) * (math.log(macs) - low) / (high - low)) / 2, (860 - 740 * (top1 - 50) / 40) / 2)
          for macs, top1 in ((6, 60), (24, 80))]
    middle = [sum(xy) / 2 for xy in zip(*at)]
    assert all(is_near(cost, tuple(map(round, xy)), evaluate.RED) for xy in (*at, middle)), "two points, joined"
    assert is_near(cost, (round(at[0][0]), round(at[1][1])), "white")
    curves = Image.open(tmp_path / "out/curves.png")
    # first panel: epochs 0 to 8 over x 110 to 1110, 0 to 100 % over y 430 to 110; both begin at 50 %, the longer lies on top
    assert is_near(curves, ((110 + 1000 // 8) // 2, (430 - 160) // 2), evaluate.RED)
    assert is_near(curves, ((110 + 5 * 1000 // 8) // 2, (430 - 320 * 90 // 100) // 2), evaluate.RED), "fifth epoch, 90 %"
    assert is_near(curves, ((110 + 500) // 2, (430 - 80) // 2), "white")
    # its legend
    assert is_near(curves, (130 // 2, 510 // 2), evaluate.BLUE) and is_near(curves, (130 // 2, 546 // 2), evaluate.RED)


def test_modules_and_epochs_without_validation_make_curves(tmp_path):
    config = run(tmp_path / "a", {"meta": {"test": 1.0}}, {})
    lines = [{"stage": "incubate", "module": m, "epoch": e, "seconds": 1, **({"val_top1": 10 * e + m} if e % 2 else {})}
             for e in (1, 2, 3) for m in (0, 1)]
    (tmp_path / "a/log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    a = evaluate.read_run(tmp_path / "a", {})
    curves = [("module 0", [(1, 10), (3, 30)]), ("module 1", [(1, 11), (3, 31)])]
    assert evaluate.validation_curves([a], "incubate") == curves
    run(tmp_path / "b", {"meta": {"test": 1.0}}, {}, "seed=1")
    (tmp_path / "b/log.jsonl").write_text(json.dumps({**lines[0], "val_top1": 20}))
    b = evaluate.read_run(tmp_path / "b", {})
    assert evaluate.validation_curves([a, b], "incubate")[0] == ("module 0", [(1, 15), (3, 30)]), "mean over seeds"
    assert config["seed"] == 0


def nac_run(folder):
    """A run whose student has these signatures of its 16 mediators after finetuning, and before it all of one direction."""
    config = run(folder, {"student": {"test": 50.0}}, {}, "student.graph=ring_of_cliques", "student.graph_groups=4")
    model = models.build(config, "student")
    with torch.no_grad():
        model.mediator_latents.signatures.copy_(torch.ones(16, 64))
        models.save_finished(config, "assemble_student", "student_assembled.pt", model.state_dict())
        # four groups, each with a direction of its own
        model.mediator_latents.signatures.copy_(torch.eye(64)[torch.arange(16) // 4])
        models.save_finished(config, "student", "student.pt", model.state_dict())
    return config


def test_a_circuit_is_drawn_and_its_links_are_counted(tmp_path, capsys):
    nac_run(tmp_path / "a")
    lines = report(capsys, tmp_path / "a")
    # before: all 120 pairs; after: 4 groups of 6 pairs, 24 of 120
    assert [cells(lines[k:], "student") for k in range(len(lines)) if lines[k].startswith("| linked")] == [["100.0", "20.0"]]
    # a run that shares this one has the same circuit only if its settings are the same
    same = ["student.graph=ring_of_cliques", "student.graph_groups=4", f"share={tmp_path / 'a'}"]
    for name, more, shown in (("same", [], True), ("other", ["train.student.lr=1"], False)):
        run(tmp_path / name, {"student": {"test": 50.0}}, {}, *same, *more)
        assert any(line.startswith("| linked") for line in report(capsys, tmp_path / name)) == shown
    out = tmp_path / "a/report"
    assert {p.name for p in out.iterdir()} == {"report.md", "circuit.png", "contact.png"}
    model = models.build(models.load_config(tmp_path / "a/c.yaml"), "student")
    models.load_weights(model, tmp_path / "a/student.pt")
    kept = {pair: K for pair, K in evaluate.links(model).items() if 4 <= pair[0] and pair[1] < 20}
    assert len(kept) == 24 and all((u - 4) // 4 == (v - 4) // 4 for u, v in kept)
    assert list(kept.values()) == pytest.approx([1.0] * 24), "at distance 0 the kernel is 1"
    picture = Image.open(out / "circuit.png")
    # mediator 0 of 16 is the circle's leftmost, mediator 8 its rightmost, of the first and the third of four groups
    for half in (0, evaluate.WIDTH // 4):
        assert is_near(picture, (half + (575 - 380) // 2, 325), evaluate.PALETTE[0])
        assert is_near(picture, (half + (575 + 380) // 2, 325), evaluate.PALETTE[2])
    # link 0 – 8 is there before and cut in finetuning; neither is at its middle anything in the second half
    assert is_near(picture, (575 // 2, 325), evaluate.SKY)
    assert not is_near(picture, (evaluate.WIDTH // 4 + 575 // 2, 325), evaluate.SKY)


def test_the_contact_sheet_says_what_the_student_says(tmp_path, capsys):
    config = nac_run(tmp_path / "a")
    model = models.build(config, "student")
    with torch.no_grad():  # it answers the third class, whatever it sees
        model.pool.to_logits.weight.zero_()
        model.pool.to_logits.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
    models.save_finished(config, "student", "student.pt", model.state_dict())
    report(capsys, tmp_path / "a")
    sheet = Image.open(tmp_path / "a/report/contact.png")
    # 16 images of labels 0 1 2 3 0 …, of which numbers 0 3 6 9 12 15 2 5 are shown: labels 0 3 2 1 0 3 2 1
    frames = [sheet.getpixel(((23 + 285 * k) // 2, 200 // 2)) for k in range(8)]
    assert frames == [ImageColor.getrgb(evaluate.GREEN if k in (2, 6) else evaluate.RED) for k in range(8)]
    # no data, no sheet, but a sentence; the rest is drawn
    raw = yaml.safe_load((tmp_path / "a/config.yaml").read_text())
    raw["data"].update(set="cifar100", root=str(tmp_path / "none"))
    (tmp_path / "a/config.yaml").write_text(yaml.safe_dump(raw))
    lines = report(capsys, tmp_path / "a", "--out", tmp_path / "out")
    assert any(line.startswith("contact.png is left out") for line in lines) and (tmp_path / "out/circuit.png").exists()


def test_experts_are_sorted_before_the_mean_over_seeds(tmp_path, capsys):
    vmoe = ["student.kind=vmoe", "student.experts=2"]
    for seed, load in enumerate(([[0.9, 0.1]], [[0.1, 0.9]])):
        run(tmp_path / f"s{seed}", {"student": {"test": 50.0}}, {"student": 1}, f"seed={seed}", *vmoe, load=load)
    report(capsys, *tmp_path.iterdir())
    bars = Image.open(tmp_path / "report/experts.png")
    # axis 0 to 94.5 % over y 400 to 210, experts 1 and 2 at a quarter and three quarters of x 110 to 2240
    top = 400 - 190 * 90 / 94.5
    left, right = round(642 / 2), round(1707 / 2)
    assert is_near(bars, (left, round(top / 2) + 4), evaluate.BLUE)
    assert is_near(bars, (left, round(top / 2) - 2), "white", 60)
    assert is_near(bars, (right, 198), evaluate.BLUE) and is_near(bars, (right, 180), "white")


def test_a_run_without_logs_and_of_an_older_config_is_reported(tmp_path, capsys):
    config = run(tmp_path / "old", {"student": {"test": 50.0}}, {})
    (tmp_path / "old/log.jsonl").unlink()
    del config["share"], config["few_shot"], config["distill"]["finetune_alpha"]
    (tmp_path / "old/config.yaml").write_text(yaml.safe_dump(config))
    run(tmp_path / "new", {"student": {"test": 60.0}}, {}, "seed=1")
    lines = report(capsys, tmp_path / "old", tmp_path / "new", tmp_path / "nowhere")
    # a key it lacks is at its default: the same row
    assert cells(lines, "student") == ["55.0 ± 7.1", "2", "", "0", "0", "0", "0"]
    assert [p.name for p in (tmp_path / "report").iterdir()] == ["report.md"]


BAD = [("results.json", '[{"role": "student", "set": "test"}]'),
       ("results.json", '[{"role": "pupil", "set": "test", "top1": 1}]'),
       ("results.json", '[{"role": "student", "set": "test", "top1": NaN}]'), ("log.jsonl", '{"stage": "student"}'),
       ("log.jsonl", '{"stage": "student", "epoch": 1, "seconds": 1, "val_top1": "x"}'),
       ("log.jsonl", '{"stage": "student", "epoch": 1, "seconds": 1, "expert_load": 3}'),
       ("log.jsonl", '{"stage": [], "epoch": 1, "seconds": 1}'), ("config.yaml", "seed: [1]"), ("config.yaml", "data: 3"),
       ("config.yaml", "train: {student: 3}"), ("student.pt", "x"), ("student_assembled.pt", "")]


@pytest.mark.parametrize("name, text", BAD)
def test_a_damaged_file_is_one_sentence(tmp_path, name, text):
    nac_run(tmp_path / "a")
    (tmp_path / "a" / name).write_text(text)
    with pytest.raises(models.UserError, match=name.replace(".", r"\.")):
        evaluate.report([tmp_path / "a"])


def test_what_follows_report_is_checked(tmp_path, monkeypatch):
    for words in ([], ["nowhere"], ["--out"], ["a", "--out"], ["--out", "b", "a"]):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--report", *words])
        with pytest.raises(models.UserError):
            evaluate.main()
