"""evaluate.py – accuracy of trained models on test and robustness sets; tables and pictures over runs.

    python evaluate.py --config configs/demo_nac.yaml                         the student
    python evaluate.py --config configs/demo_nac.yaml role=all                every finished model of the run, and its report
    python evaluate.py --config configs/demo_nac.yaml checkpoint=other.pt     these weights as the role's
    torchrun --nproc_per_node=8 evaluate.py --config configs/imagenet_vmoe.yaml role=baseline
    python evaluate.py --config configs/demo_nac.yaml few_shot.set=cifar100 few_shot.root=FOLDER    on new classes, too
    python evaluate.py --report runs/demo_nac* [--out FOLDER]                 mean ± std over seeds, as Markdown and PNG

Writes <output_dir>/results.json, a list of {role, set, top1, top5, images, checkpoint, given}; given: by checkpoint=, which
the report leaves out. Every image of a set counts once, however many processes share it, and the last weights are
scored, not the best on the way.
Three parts: scoring · the report's tables (report.md) · its pictures (PNG). A single run's report is in <output_dir>/report,
that of several in `report` in the folder that holds them.
"""

import json
import math
import os
import re
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageDraw, ImageFont

import data
import models

ROLES = ("student", "meta", "teacher", "baseline", "baseline_kd", "all")


def main():
    if "--report" in sys.argv:
        return report(sys.argv[sys.argv.index("--report") + 1:])
    config, words = models.command_line(__doc__, ROLES, ("checkpoint",))
    if words.dry_run:
        return models.dry_run(config)
    if words.checkpoint and words.role == "all":
        raise models.UserError("checkpoint= is one model's weights: say which with role=.")
    process = data.setup(config["device"])
    folder = Path(config["output_dir"])
    # `all` means all there is: a run whose teacher came from elsewhere, or whose baseline is still training, has fewer.
    roles = [words.role] if words.role != "all" else [r for r in ROLES[:-1] if find(config, r)]
    sets = {}  # by data block, each loaded once
    for role in roles:
        path = words.checkpoint or models.needed(config, role)
        # A student is tested where it was finetuned, which need not be where its modules were distilled.
        c = models.on_target(config, role)
        model = models.build(c, role)
        models.load_weights(model, path)
        model.to(process.device).eval()
        # Robustness sets differ from the test set in their images alone: the same model, never trained on any of them.
        for name in ("test", *c["data"]["robustness"]):
            key = (name, json.dumps(c["data"]))
            images = sets[key] = sets[key] if key in sets else data.load(c, name)
            if images.present is not None:
                models.say(process, f"{name}: {len(images.present)} of the model's {c['data']['classes']} classes are "
                           "present; it chooses among these only.")
            top1, top5 = score(model, images, c, process)
            # At once, not at the end: what is scored stays, whatever happens to the next set.
            if process.rank == 0:
                keep_result(folder, {"role": role, "set": name, "top1": top1, "top5": top5, "images": len(images),
                                     "checkpoint": str(path), "given": bool(words.checkpoint)})
            models.say(process, f"{role}, {name}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(images):,} images")
        if c["few_shot"]["set"]:
            few_shot(model, role, path, c, process, bool(words.checkpoint))
    # The other processes need not wait: nothing collective comes any more.
    if words.role == "all" and process.rank == 0:
        report([folder])
    data.close()


# ------------------------------------------------------------------------------------------------------------------
# Scoring


def find(config, role):
    """Path of a role's weights, or None."""
    if role in ("meta", "teacher") and config[role]["checkpoint"]:
        return config[role]["checkpoint"]
    return models.finished(config, role, f"{role}.pt")


@torch.no_grad()
def score(model, images, config, process):
    """Top-1 and top-5 in % over an ImageSet; logits of classes that it has not are left out."""
    # on the device until the end: to read a number after each batch would be to wait for the GPU
    hits = torch.zeros(2, device=process.device)
    absent = None
    if images.present is not None:
        absent = torch.ones(config["data"]["classes"], dtype=torch.bool, device=process.device)
        absent[images.present] = False
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            logits = model(x).float()
        # ImageNet-R has 200 of ImageNet's 1000 classes: an answer outside them would be wrong by construction
        if absent is not None:
            logits = logits.masked_fill(absent, -torch.inf)
        # a set of fewer than five classes has its top-5 all the same: everything is right
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # B 5
        hits += torch.stack([best[:, 0].sum(), best.sum()])
    # Counts are summed, not the processes' means: their shares can differ by one image.
    return (100 * data.sum_over_processes(hits) / len(images)).tolist()


def few_shot(model, role, path, config, process, given):
    """Accuracy on classes the model has not seen: of each episode's images a few are labelled, and a linear classifier is
    trained on the frozen model's features of these alone. Keeps and prints mean ± 95 % interval over episodes."""
    f = config["few_shot"]
    # as the model knows images (size, crop), but of another set; its number of classes is whatever it has
    options = {**config["data"], "set": f["set"], "root": f["root"], "classes": None, "test_images": f["images"]}
    images = data.load({**config, "data": options}, "test")
    # The model is frozen, so each image goes through it once and serves all episodes.
    features = features_of(model, images, config, process)
    for shots in f["shots"]:
        # the same episodes for every role and run of a seed: models are compared on the same questions
        support, query = data.episodes(images.labels.numpy(), f["ways"], shots, 3 * shots, f["episodes"], config["seed"])
        hits = linear_probe(features[support], features[query], f["ways"])  # episodes queries 2
        accuracy = 100 * hits.float().mean(1)
        top1, top5 = accuracy.mean(0).tolist()
        # 95 % interval of a mean: ± 1.96 σ / √episodes. It is about the draw of episodes, not about the training's seed.
        interval = 1.96 * accuracy[:, 0].std().item() / len(accuracy) ** 0.5
        name = f"few-shot {f['set']} {shots}-shot {f['ways']}-way"
        if process.rank == 0:
            keep_result(Path(config["output_dir"]), {
                "role": role, "set": name, "top1": top1, "top5": top5, "images": len(images), "checkpoint": str(path),
                "given": given, "ci95": interval, "episodes": len(accuracy)})
        models.say(process, f"{role}, few-shot on {f['set']}, {f['ways']} ways, {shots} shots: top-1 {top1:.2f} ± "
                   f"{interval:.2f} % (95 % interval of {len(accuracy)} episodes)")


@torch.no_grad()
def features_of(model, images, config, process):
    """What the model's classifier is given, for every image, once. -> N D on every process."""
    # A hook on the classifier: so that ViT, V-MoE and NAC need no forward pass of their own for features.
    classifier, mine = model.pool.to_logits if isinstance(model, models.NAC) else model.head, []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: mine.append(inputs[0].float()))
    for x, _ in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            model(x)
    hook.remove()
    # Each process fills in its own rows, and the sum puts them together.
    features = torch.zeros(len(images), classifier.in_features, device=process.device)
    features[process.rank::process.world] = torch.cat(mine)  # eval_batches' share of each process
    # of equal size for every model, so that one learning rate suits all
    return F.layer_norm(data.sum_over_processes(features), features.shape[1:])


def linear_probe(support, query, ways):
    """Trains a linear classifier for each of E episodes, all side by side. support E ways·n D, query E ways·m D, both class
    by class -> whether the label is among the best 1 and 5 of each query: E ways·m 2."""
    E, D = len(support), support.shape[2]
    # From zero, and convex: no seed. Without a bias, for the classes are balanced and the features have mean 0.
    weight = torch.zeros(E, D, ways, device=support.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    labels = lambda x: torch.arange(ways, device=x.device).repeat_interleave(x.shape[1] // ways).expand(E, -1)  # E ways·n
    for _ in range(100):
        # the sum: an episode's gradient does not depend on how many others there are
        loss = F.cross_entropy((support @ weight).transpose(1, 2), labels(support), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = (query @ weight.detach()).topk(min(5, ways)).indices == labels(query)[..., None]
    return torch.stack([hits[..., 0], hits.any(-1)], dim=-1)


def keep_result(folder, result):
    """Adds a result to the run's results.json, in place of an older one of the same role and set; what was scored by
    checkpoint= stands beside the run's own."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text()) if path.exists() else []
        # A second evaluation, say after more training, takes the place of the first.
        kind = lambda r: (r["role"], r["set"], "given" in r and r["given"])
        results = [r for r in results if kind(r) != kind(result)] + [result]
    except (ValueError, TypeError, KeyError):
        raise models.UserError(f"{path} is not a list of results; remove it and evaluate again.") from None
    models.write_text(path, json.dumps(results, indent=1))


# ------------------------------------------------------------------------------------------------------------------
# The report: reading runs, and tables

# role: the stages whose cost is the model's own, and those that come before it
STAGES = {"meta": (["meta"], []), "teacher": (["incubate", "teacher"], ["meta"]),
          "student": (["distill", "student"], ["meta", "incubate", "teacher"]), "baseline": (["baseline"], []),
          "baseline_kd": (["baseline_kd"], ["meta", "incubate", "teacher"])}
TRAINED = ("meta", "incubate", "teacher", "distill", "student", "baseline", "baseline_kd")
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, yaml.YAMLError)


def report(words):
    """Prints tables over run folders and writes them as report.md, with pictures; `words` may end in --out FOLDER."""
    at = words.index("--out") if "--out" in words else len(words)
    folders, out = words[:at], words[at + 1:]
    if len(out) != (at < len(words)):
        raise models.UserError("--out stands last and needs one folder: --report RUN … --out FOLDER.")
    counted = {}
    # as a reader would sort them: base6 before base20
    natural = lambda folder: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(folder))]
    runs = [read_run(folder, counted) for folder in sorted({Path(f).resolve() for f in folders}, key=natural)]
    runs = [run for run in runs if run]
    if not runs:
        raise models.UserError(f"no results in {', '.join(map(str, folders)) or 'no folder'}: run evaluate.py first.")
    out = Path(out[0] if out else Path(os.path.commonpath([run["folder"] for run in runs]), "report"))
    first = {}  # run by what it was made with
    for run in runs:
        for role, top1 in run["top1"].items():
            other = first.setdefault((role, *row(run["config"], role)), run)
            if other["top1"][role].get("test", top1.get("test")) != top1.get("test"):
                print(f"{run['folder']}: left out, for its {role} has the settings and seed of {other['folder']}'s, and other "
                      "figures")
    tables = [results_table(runs), costs_table(runs), circuits_table(runs)]
    text = "\n\n".join("\n".join(lines) for lines in tables if lines)
    print(f"\n{text}\n\n{out / 'report.md'}")
    models.write_text(out / "report.md", text + "\n")
    for name, draw in (("curves", draw_curves), ("cost", draw_cost), ("circuit", draw_circuit), ("experts", draw_experts),
                       ("contact", draw_contact)):
        if picture := draw(runs):
            # Drawn at twice the size: Pillow's lines have jagged edges, which halving smooths.
            models.write(out / f"{name}.png", lambda file: picture.reduce(2).save(file, "PNG"))
            print(out / f"{name}.png")


def read_run(folder, counted):
    """A run's folder -> {folder, config, top1 {role: {set: %}}, log {(stage, module, epoch): line}, cost {stage: (s,
    TMAC)}}; None if it is not a run, or not evaluated yet. `counted` keeps what stages cost: runs share most of them."""
    try:
        config, top1, log = full_config(folder), {}, read_log(folder)
        for r in json.loads((folder / "results.json").read_text()):
            if not r.get("given"):  # weights from elsewhere say nothing about the run's settings
                top1.setdefault(r["role"], {})[r["set"]] = number(r["top1"])
        # A stage that was taken from the shared run is in that one's log. It is the same only if its settings are.
        for shared in map(Path, models.folders(config)[1:]):
            if not shared.is_dir():
                print(f"{folder}: the run that it shares, {shared}, is not there; what its stages cost is left out")
                continue
            own, theirs = {stage for stage, *_ in log}, full_config(shared) if (shared / "config.yaml").exists() else config
            for key, line in read_log(shared).items():
                if key[0] not in own and models.settings(config, key[0]) == models.settings(theirs, key[0]):
                    log[key] = line
        cost = {stage: (sum(line["seconds"] for key, line in log.items() if key[0] == stage), tmac(config, stage, counted))
                for stage in {stage for stage, *_ in log}}
        for role in [*top1, *cost]:
            row(config, role)  # raises if it cannot be told what they were made with
    except OSError:
        return None
    except DAMAGE as e:
        raise models.UserError(f"{folder}: config.yaml, results.json or log.jsonl is damaged ({e}).") from None
    return dict(folder=folder, config=config, top1=top1, log=log, cost=cost)


def tmac(config, stage, counted):
    """10¹² multiply-adds of a stage. They are counted for one epoch and kept in `counted`: a count takes a second, and most
    runs of a sweep differ in nothing that changes it."""
    block = "student" if stage.startswith("baseline") else stage
    epochs = models.plan(config, stage)[0]["epochs"]
    flat = {**models.flatten(config), f"train.{block}.epochs": 1, "train.baseline_epochs": 1}
    # of α only whether there is a teacher; of the other stages nothing; no learning rates
    key = str([stage] + [v > 0 if k.endswith("alpha") else v for k, v in flat.items() if k.startswith(
        ("data.", "target.", "meta.", "teacher.", "student.", "distill.", f"train.{block}.")) and not k.endswith("lr")])
    if key not in counted:
        counted[key] = number(models.multiply_adds(models.unflatten(flat), stage)) / 1e12
    return number(epochs) * counted[key]


def full_config(folder):
    """A run's config; keys that its version did not have yet are at their defaults, those that are no longer left out."""
    defaults = {key: default for key, (default, _) in models.KEYS.items()}
    given = models.flatten(yaml.safe_load((folder / "config.yaml").read_text()))
    for key, (_, (allowed, words)) in models.KEYS.items():
        if key in given and not allowed(given[key]):
            raise ValueError(f"{key}={given[key]!r} is not {words}")
    number(given["data.classes"])  # never left open in a resolved config
    return models.unflatten({**defaults, **{key: value for key, value in given.items() if key in defaults}})


def read_log(folder):
    """A run's log -> {(stage, module or None, epoch): line}. A stage that was forced again counts once: its later lines."""
    path, log = folder / "log.jsonl", {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        line.update({key: number(line[key]) for key in ("seconds", "val_top1") if key == "seconds" or key in line})
        line["expert_load"] = [[number(share) for share in layer] for layer in line.get("expert_load", [])]
        stage, module, epoch = line["stage"], line.get("module"), int(line["epoch"])
        if epoch == 1:  # forced again
            log = {key: value for key, value in log.items() if key[:2] != (stage, module)}
        log[stage, module, epoch] = line
    return log


def number(value):
    """The value, if it is a number that can be drawn; else ValueError."""
    if type(value) not in (int, float) or not 0 <= value < 1e30:
        raise ValueError(f"{value!r} is not a number from 0 up")
    return float(value)


def row(config, stage):
    """The settings that a stage depends on but for the seed, as JSON, and the seed: runs of the same settings make a row."""
    made = json.loads(models.settings(config, stage))
    seed = int(made.pop("seed"))
    # Weights from elsewhere are mostly of the same seed: runs/teacher-s3/meta.pt and …-s4/meta.pt are one setting.
    for key in ("meta.checkpoint", "teacher.checkpoint", "student.start"):
        if made.get(key):
            made[key] = re.sub(rf"(?<![a-zA-Z])(s|seed[-_=]?){seed}(?!\d)", r"\1*", made[key])
    return json.dumps(made), seed


def grouped(runs, stage, value):
    """{settings: {seed: value(run)}} of the runs whose value is not None; of runs with equal settings and seed the first."""
    rows = {}
    for run in runs:
        if (v := value(run)) is not None:
            made, seed = row(run["config"], stage)
            rows.setdefault(made, {}).setdefault(seed, v)
    return rows


HEAD = ("student.kind", "data.set")  # what other settings follow from: rows are compared among those that share it
FIRST = ("distill.", "student.", "train.baseline_epochs", "train.student.", "train.distill.")  # the keys named first


def names(stage, rows, most=3):
    """Yields (name, values over seeds) of each row. A name holds what sets the row apart from the plain one, which is the
    row that differs least from all others; at most so many keys, unless two rows would then be called alike."""
    flat = [json.loads(made) for made in rows]
    differ = lambda a, b: [k for k in a if a[k] != b.get(k)]
    long = []
    for a in flat:
        # A V-MoE and a NAC differ in dozens of keys, none of which tells more than the kind.
        family = [b for b in flat if all(a.get(k) == b.get(k) for k in HEAD)]
        plain = min(family, key=lambda b: sum(len(differ(b, c)) for c in family))
        keys = sorted(differ(a, plain), key=lambda k: not k.startswith(FIRST))
        # Who has no teacher need not say how it would have been listened to.
        if not taught(a):
            keys = [k for k in keys if k not in ("distill.tau", "distill.kind", "distill.reduction")]
        head = [str(a[k]) for k in HEAD if any(k in differ(a, b) for b in flat)]
        text = [f"{k}={json.dumps(a[k])}".replace('"', "").removesuffix(".0") for k in keys]
        long.append([" ".join([stage, *head])] + text)
    short = [", ".join(n[:1 + most]) + (f", + {len(n) - 1 - most} more" if len(n) > 1 + most else "") for n in long]
    for n, name, values in zip(long, short, rows.values()):
        yield (name if short.count(name) == 1 else ", ".join(n)), list(values.values())


def taught(flat):
    """Whether a student has a teacher, by its modules or as a whole."""
    return flat.get("distill.alpha") != 0 or flat.get("distill.finetune_alpha", 0) != 0


def spent(run, role, unit):
    """(own, before): seconds (unit 0) or TMAC (unit 1) of the stages that are a role's own, and of those it builds on."""
    own, before = STAGES[role]
    if role == "student" and run["config"]["student"]["start"]:
        own, before = ["student"], []  # what its weights took elsewhere is not known here
    if role == "student" and not taught(models.flatten(run["config"])):
        before = ["meta"]  # nobody listens to the teacher
    return [sum(run["cost"][stage][unit] for stage in stages if stage in run["cost"]) for stages in (own, before)]


def results_table(runs):
    """Lines of a Markdown table: accuracy as mean ± sample std over seeds, and what training cost."""
    sets = list(dict.fromkeys(name for run in runs for top1 in run["top1"].values() for name in top1))
    lines = ["| model | " + " | ".join(f"{name} top-1 %" for name in sets)
             + " | seeds | test, against the plain row | own s | s before | own TMAC | TMAC before |",
             "|---|" + "---|" * (len(sets) + 6)]
    for role in ROLES[:-1]:
        rows = grouped(runs, role, lambda run: (run["top1"][role], *spent(run, role, 0), *spent(run, role, 1))
                       if role in run["top1"] else None)
        named = {name: row for (name, _), row in zip(names(role, rows), rows.values())}
        for name, values in named.items():
            top1, *costs = zip(*values.values())
            cells = [mean_std([t[s] for t in top1 if s in t]) for s in sets] + [str(len(values))]
            # Within each seed: seeds differ more from one another than most settings do.
            plain = named.get(name.split(",")[0], values)
            pairs = [(v[0].get("test"), plain[seed][0].get("test")) for seed, v in values.items() if seed in plain]
            differences = [a - b for a, b in pairs if None not in (a, b)]
            cells.append(mean_std(differences, "+") if differences and plain is not values else "")
            cells += [f"{statistics.mean(cost):{form}}" for cost, form in zip(costs, (".0f", ".0f", ".3g", ".3g"))]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def costs_table(runs):
    """Lines of a Markdown table: a row a stage, seconds as mean over seeds and multiply-adds."""
    lines = ["| stage | seeds | s | TMAC (10¹² multiply-adds) |", "|---|---|---|---|"]
    for stage in TRAINED:
        for name, values in names(stage, grouped(runs, stage, lambda run: run["cost"].get(stage))):
            seconds, macs = map(statistics.mean, zip(*values))
            lines.append(f"| {name} | {len(values)} | {seconds:.0f} | {macs:.3g} |")
    return lines


def circuits_table(runs):
    """Lines that say how many of a NAC's mediators can hear each other, before finetuning and after; none without a NAC."""
    rows = grouped(runs, "student", lambda run: (pair := circuits(run)) and [linked_share(nac) for nac in pair])
    lines = [f"| {name} | {' | '.join(map(mean_std, zip(*values)))} |" for name, values in names("student", rows)]
    title = f"| linked pairs of mediators (δ ≤ {models.TRUNCATION}), % | assembled | finetuned |"
    return lines and [title, "|---|---|---|", *lines]


def mean_std(values, sign=""):
    if not values:
        return "–"
    return f"{statistics.mean(values):{sign}.1f}" + (f" ± {std(values):.1f}" if len(values) > 1 else "")


def std(values):
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def student_of(run, stage, name):
    """The run's student with the weights of a stage's file, the run's own or, made with the same settings, that of the run
    it shares; None if there is none."""
    for folder in (run["folder"], *models.folders(run["config"])[1:]):
        path = Path(folder, name)
        if path.exists() and (folder == run["folder"] or not models.difference(models.read(path), run["config"], stage)):
            model = models.build(models.on_target(run["config"], "student"), "student")
            models.load_weights(model, path)
            return model.eval()
    return None


def circuits(run):
    """A NAC student [before, after] finetuning; None if the run has not both."""
    if run["config"]["student"]["kind"] != "nac":
        return None
    pair = [student_of(run, "assemble_student", "student_assembled.pt"), student_of(run, "student", "student.pt")]
    return None if None in pair else pair


@torch.no_grad()
def linked_share(nac):
    """Share in % of the mediators' pairs that the kernel lets talk."""
    s = nac.mediator_latents.signatures
    linked = (models.distance(s, s) <= models.TRUNCATION).triu(1)
    return 100 * linked.sum().item() / max(1, len(s) * (len(s) - 1) // 2)


# ------------------------------------------------------------------------------------------------------------------
# Pictures: each draw_… makes an image with Pillow, or returns None where there is nothing to draw

WIDTH = 2300
BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY = PALETTE = (  # Okabe's and Ito's, which the colour-blind can tell apart
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#777777")
COLORS = {"student": BLUE, "baseline": RED, "baseline_kd": ORANGE, "teacher": GREEN, "meta": GREY}


def paper(height):
    """A white image of the common width, and its pen."""
    image = Image.new("RGB", (WIDTH, height), "white")
    return image, ImageDraw.Draw(image)


def write(draw, xy, text, size=26, fill=BLACK, anchor="lm", width=WIDTH):
    """Text at xy; what goes beyond `width` pixels is cut off with an ellipsis."""
    font = ImageFont.load_default(size=size)  # Pillow's own: it has neither Greek letters nor superscripts
    while font.getlength(text) > width:
        text = text.rstrip("…")[:-1] + "…"
    # the white rim keeps it legible on lines
    draw.text(xy, text, fill=fill, font=font, anchor=anchor, stroke_width=4, stroke_fill="white")


def ticks(low, high, log=False):
    """Round numbers from low to high: at most six multiples of 1, 2, 5, 10 …; on a log axis 1, 2, 5 of every decade."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        return [x for k in decades for m in (1, 2, 5) if low <= (x := m * 10.0**k) <= high]
    step = next(m * 10**k for k in range(30) for m in (1, 2, 5) if (high - low) / (m * 10**k) <= 5)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def axes(draw, box, xs, ys, title, x_name, y_name, log=False):
    """Axes in box = (left, top, right, bottom) over the ranges xs (logarithmic with `log`) and ys -> place, which maps
    x, y to a pixel."""
    left, top, right, bottom = box
    scale = math.log10 if log else float

    def place(x, y):
        across = (scale(x) - scale(xs[0])) / (scale(xs[1]) - scale(xs[0]))
        up = (min(max(y, ys[0]), ys[1]) - ys[0]) / (ys[1] - ys[0])
        return left + (right - left) * across, bottom - (bottom - top) * up

    for x in ticks(*xs, log):
        draw.line([place(x, ys[0]), place(x, ys[1])], "#E6E6E6", 2)
        write(draw, (place(x, 0)[0], bottom + 12), f"{x:g}", anchor="mt")
    for y in ticks(*ys):
        draw.line([place(xs[0], y), place(xs[1], y)], "#E6E6E6", 2)
        write(draw, (left - 12, place(xs[0], y)[1]), f"{y:g}", anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], BLACK, 3)
    write(draw, (left, top - 62), title, 34, width=right - left)
    # above the axis: nobody likes to read sideways
    write(draw, (left, top - 24), y_name, fill=GREY)
    write(draw, (right, bottom + 50), x_name, fill=GREY, anchor="rt")
    return place


def dot(draw, at, radius, fill, outline=None):
    draw.ellipse([at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius], fill, outline, 3)


def validation_curves(runs, stage):
    """[(name, [(epoch, %), …])] of a stage, mean over seeds: a curve a module, or where settings differ a curve a row,
    then over all its modules."""
    rows = grouped(runs, stage, lambda run: {
        k[1:]: line["val_top1"] for k, line in run["log"].items() if k[0] == stage and "val_top1" in line} or None)
    curves = {}  # name: {epoch: values}
    for name, values in names(stage, rows):
        for (module, epoch), value in ((k, v) for points in values for k, v in points.items()):
            what = f"module {module}" if len(rows) == 1 and module is not None else name
            curves.setdefault(what, {}).setdefault(epoch, []).append(value)
    return [(name, sorted((epoch, statistics.mean(v)) for epoch, v in points.items())) for name, points in curves.items()]


def draw_curves(runs):
    """Validation accuracy against epochs, a panel a stage; the two baselines share one."""
    panels = {}
    for stage in TRAINED:
        panels.setdefault(stage.removesuffix("_kd"), []).extend(validation_curves(runs, stage))
    panels = [(title, curves[:len(PALETTE)]) for title, curves in panels.items() if curves]
    if not panels:
        return None
    heights = [540 + 36 * max(len(curves) for _, curves in panels[k:k + 2]) for k in range(0, len(panels), 2)]
    image, draw = paper(sum(heights))
    for k, (title, curves) in enumerate(panels):
        left, top = 110 + k % 2 * WIDTH // 2, 110 + sum(heights[:k // 2])
        right, last = left + WIDTH // 2 - 150, max(epoch for _, points in curves for epoch, _ in points)
        place = axes(draw, (left, top, right, top + 320), (0, max(1, last)), (0, 100), title, "epoch", "validation top-1 %")
        for n, ((name, points), color) in enumerate(zip(curves, PALETTE)):
            draw.line([place(*point) for point in points], color, 5, joint="curve")
            for point in points:
                dot(draw, place(*point), 7, color)
            y = top + 400 + 36 * n
            draw.line([(left, y), (left + 44, y)], color, 7)
            write(draw, (left + 60, y), name, width=right - left - (60 if n else 200))  # beside the first: "epoch"
    return image


def draw_cost(runs):
    """Test accuracy against the multiply-adds of all stages that went into a model: a point a row of the table."""
    points, curves = [], []
    for role in STAGES:
        # What students that began with weights from elsewhere cost is not known.
        known = [run for run in runs if role != "student" or not run["config"]["student"]["start"]]
        rows = grouped(known, role, lambda run: (sum(spent(run, role, 1)), run["top1"][role]["test"])
                       if "test" in run["top1"].get(role, ()) else None)
        budgets = {}  # rows that differ only in how long was trained make one curve
        for made, (name, values) in zip(rows, names(role, rows)):
            macs, top1 = zip(*values)
            if (x := statistics.mean(macs)) > 0:
                points.append((x, statistics.mean(top1), top1, role, name))
                family = [item for item in json.loads(made).items() if not item[0].endswith("epochs")]
                budgets.setdefault(str(family), []).append((x, statistics.mean(top1)))
        curves += [(COLORS[role], sorted(curve)) for curve in budgets.values()]
    if not points:
        return None
    points.sort()
    image, draw = paper(1010 + 44 * len(points))
    ys = [min(mean - std(top1) for _, mean, top1, *_ in points), max(mean + std(top1) for _, mean, top1, *_ in points)]
    ys = max(0, 10 * math.floor(ys[0] / 10 - 0.5)), min(100, 10 * math.ceil(ys[1] / 10 + 0.2))
    place = axes(draw, (120, 120, WIDTH - 60, 860), (points[0][0] / 1.3, points[-1][0] * 1.3), ys, "accuracy against cost",
                 "10^12 multiply-adds (TMAC) of the model's own stages and all before", "test top-1 %", log=True)
    for color, curve in curves:
        draw.line([place(*point) for point in curve], color, 4)
    taken = [place(x, y) for x, y, *_ in points]
    for x, mean, top1, role, _ in points:
        draw.line([place(x, mean - std(top1)), place(x, mean + std(top1))], COLORS[role], 4)
        dot(draw, place(x, mean), 12, COLORS[role])
    for k, (x, mean, top1, role, name) in enumerate(points):
        at, color, y = place(x, mean), COLORS[role], 990 + 44 * k
        # The point's number goes where most room is. (Right above and below it is the whisker.)
        spots = [(at[0] + 38 * math.cos(a), at[1] + 38 * math.sin(a)) for a in (math.pi * n / 4 for n in (7, 5, 1, 3, 0, 4))]
        spots = [spot for spot in spots if 135 < spot[1] < 845]
        taken.append(max(spots, key=lambda spot: min(math.dist(spot, t) for t in taken) // 8))
        write(draw, taken[-1], str(k + 1), 28, color, "mm")
        dot(draw, (140, y), 12, color)
        for edge, text, anchor in ((110, k + 1, "rm"), (170, name, "lm"), (1960, f"{mean_std(top1)} %", "rm"),
                                   (WIDTH - 60, f"{x:.3g} TMAC", "rm")):
            write(draw, (edge, y), str(text), anchor=anchor, width=1500)
    return image


def ring(nac, c):
    """Order of the mediators around a circle, and how many groups it falls into. A graph prior's groups are ranges of
    indices; else the order is by direction in the plane in which the signatures vary most, so that neighbours are alike."""
    if c["graph"] in ("planted_partition", "ring_of_cliques"):
        return list(range(c["latents"][1])), c["graph_groups"]
    s = F.normalize(nac.mediator_latents.signatures, dim=-1)
    u, scale, _ = torch.linalg.svd(s - s.mean(0), full_matrices=False)
    x, y = F.pad(u * scale, (0, 2))[:, :2].T
    return torch.atan2(y, x).argsort().tolist(), 6


def links(nac):
    """{(sender, receiver): K} of the pairs within the truncation, nodes numbered inputs, mediators, outputs; K is the mean
    over propagators. (The read-out hears the far ones too, but drawn they would hide the near ones.)"""
    inputs, mediators, outputs = (x.signatures for x in (nac.input_latents, nac.mediator_latents, nac.output_latents))
    senders, U = torch.cat([inputs, mediators]), len(inputs)
    kernel = lambda s, part: models.log_kernel(models.distance(s, senders), part.attention.bandwidth).exp()
    K = torch.cat([torch.stack([kernel(mediators, p) for p in nac.propagators]).mean(0), kernel(outputs, nac.read_out)])
    # among mediators K is symmetric: one line a pair, none to itself
    return {(v, U + u): K[u, v].item() for u, v in K.nonzero().tolist() if v < U or v < U + u}


@torch.no_grad()
def draw_circuit(runs):
    """The first NAC's circuit before and after finetuning: who hears whom, the darker the better."""
    run, pair = next(((run, pair) for run in runs if (pair := circuits(run))), (None, None))
    if not pair:
        return None
    image, draw = paper(1290)
    order, groups = ring(pair[1], run["config"]["student"])
    U, M, O = run["config"]["student"]["latents"]
    both = [links(nac) for nac in pair]
    for k, (title, mine, others) in enumerate((("assembled", *both), ("finetuned", *both[::-1]))):
        left, at, colors = k * WIDTH // 2, {}, {}
        for n, x, first in ((U, 60, 0), (O, 1090, U + M)):
            for i in range(n):
                at[first + i] = (left + x, 650 + (i - (n - 1) / 2) * min(64, 1000 / n))
        for i, mediator in enumerate(order):
            a = 2 * math.pi * i / M
            at[U + mediator] = (left + 575 - 380 * math.cos(a), 650 - 440 * math.sin(a))
            colors[U + mediator] = PALETTE[i * groups // M % 6]
        # what finetuning changes comes last and so lies on top, and of the others the strong
        for (v, u), K in sorted(mine.items(), key=lambda item: (item[0] not in others, item[1])):
            grey = "#" + 3 * f"{round(255 * (1 - min(1, max(0, K)))):02X}"
            draw.line([at[v], at[u]], grey if (v, u) in others else (SKY, RED)[k], 3 if (v, u) in others else 6)
        for node, place in at.items():
            dot(draw, place, max(6, min(20, 900 // M)), colors.get(node, BLACK), "white")
        write(draw, (left + 575, 40), f"{title}: {linked_share(pair[k]):.0f} % of mediator pairs linked", 34, anchor="mm")
        for x, text, anchor in ((40, "inputs", "lm"), (575, "mediators", "mm"), (1110, "outputs", "rm")):
            write(draw, (left + x, 110), text, fill=GREY, anchor=anchor)
    for n in range(300):
        draw.line([(120 + n, 1225), (120 + n, 1250)], (255 - 255 * n // 300,) * 3, 1)
    write(draw, (105, 1237), "0", anchor="rm")
    write(draw, (435, 1237), "1   kernel K", anchor="lm")
    for x, text, color in ((820, "cut in finetuning", SKY), (1300, "made in finetuning", RED)):
        draw.line([(x, 1237), (x + 60, 1237)], color, 8)
        write(draw, (x + 80, 1237), text)
    return image


def draw_experts(runs):
    """Share of tokens by expert, a column a layer, a line of bars a row of settings. In each seed experts are sorted by
    share before the mean: their numbers mean nothing, so a mean by number would look even however lopsided each seed is."""
    bars = []  # stage, name, layers of shares
    for stage in ("student", "baseline", "baseline_kd"):
        def last_load(run):
            logged = {epoch: line["expert_load"] for (s, _, epoch), line in run["log"].items() if s == stage}
            return logged[max(logged)] or None if logged else None

        for name, values in names(stage, grouped(runs, stage, last_load)):
            layers = [[sorted(shares, reverse=True) for shares in seeds] for seeds in zip(*values)]
            bars.append((stage, name, [[100 * statistics.mean(shares) for shares in zip(*seeds)] for seeds in layers]))
    if not bars:
        return None
    most = 1.05 * max([share for *_, layers in bars for shares in layers for share in shares] + [1])
    image, draw = paper(80 + 400 * len(bars))
    write(draw, (110, 45), "experts, the busiest first: share of tokens in training's last batch; dashed: even", 34)
    for k, (stage, name, layers) in enumerate(bars):
        step = (WIDTH - 60) / len(layers)
        for n, shares in enumerate(layers):
            box, E = (110 + step * n, 210 + 400 * k, step * (n + 1), 400 + 400 * k), max(1, len(shares))
            place = axes(draw, box, (0.5, E + 0.5), (0, most), "", "", f"layer {n + 1}, %")
            for e, share in enumerate(shares):
                draw.rectangle([place(e + 0.6, share), place(e + 1.4, 0)], COLORS[stage])
            for x in range(40):
                draw.line([place(0.5 + E * x / 40, 100 / E), place(0.5 + E * (x + 0.5) / 40, 100 / E)], BLACK, 3)
        write(draw, (110, 148 + 400 * k), name, 34)
    return image


@torch.no_grad()
def draw_contact(runs):
    """Eight test images and their renditions, with what the first finished student takes them for."""
    run, model = next(((run, m) for run in runs if (m := student_of(run, "student", "student.pt"))), (None, None))
    if not model:
        return None
    config = models.on_target(run["config"], "student")
    few = min(config["data"]["test_images"], 480) if config["data"]["set"] in models.DRAWN else config["data"]["test_images"]
    config = {**config, "data": {**config["data"], "workers": 0, "test_images": few}}
    try:
        test = data.load(config, "test")
    except models.UserError as e:
        return print(f"contact.png is left out: {e}")
    # far apart, and not in step with the classes, which drawn sets go through in turn
    test = test.take([i * (len(test) // 8 + 1) % len(test) for i in range(min(8, len(test)))])
    image, draw = paper(810)
    for row, (title, images) in enumerate((("test images", test), ("renditions", data.renditions(test)))):
        write(draw, (20, 40 + 400 * row), f"{title}, and what the student takes them for", 34)
        x, labels = next(iter(data.eval_batches(images, config, data.Setup(torch.device("cpu"), 0, 1))))
        seen = (x * torch.tensor(data.STD)[:, None, None] + torch.tensor(data.MEAN)[:, None, None]).clamp(0, 1)  # B 3 H W
        for k, (pixels, label, answer) in enumerate(zip(seen, labels.tolist(), model(x).argmax(-1).tolist())):
            left, top, color = 20 + 285 * k, 80 + 400 * row, GREEN if answer == label else RED
            draw.rectangle([left, top, left + 265, top + 265], color)
            tile = Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())
            image.paste(tile.resize((250, 250), Image.Resampling.NEAREST), (left + 8, top + 8))
            text = test.class_names[answer] + ("" if answer == label else f", not {test.class_names[label]}")
            write(draw, (left + 132, top + 292), text, 30, color, "mm", 275)
    return image


if __name__ == "__main__":
    models.run(main)
