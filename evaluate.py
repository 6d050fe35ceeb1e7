"""evaluate.py – scores trained models on test and robustness sets and on new classes; tables over runs.

    python evaluate.py --config configs/demo_nac.yaml                     the student
    python evaluate.py --config configs/demo_nac.yaml role=all            all finished models, and the report
    python evaluate.py --config configs/demo_nac.yaml checkpoint=FILE     these weights as the role's
    python evaluate.py --config configs/demo_nac.yaml image=cat.jpg       an image's five best classes
    python evaluate.py --config configs/demo_nac.yaml few_shot.set=cub few_shot.root=FOLDER     on new classes
    python evaluate.py --report runs/demo_nac*                            mean ± std over seeds, in Markdown
    torchrun --nproc_per_node=8 evaluate.py --config configs/imagenet_vmoe.yaml role=baseline

Writes <output_dir>/results.json, a list of {role, set, top1, top5, images}; what is scored by checkpoint= is
only printed. Every image of a set counts once, however many processes share it. The last weights are scored,
not the best on the way.
"""

import fcntl
import json
import re
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import models

# role: (stages that train it, stages that it needs first)
STAGES = {"student": (["distill", "student"], ["meta", "incubate", "teacher"]), "meta": (["meta"], []),
          "teacher": (["incubate", "teacher"], ["meta"]), "baseline": (["baseline"], []),
          "baseline_kd": (["baseline_kd"], ["meta", "incubate", "teacher"])}


def main():
    if "--report" in sys.argv:
        return report(sys.argv[sys.argv.index("--report") + 1:])
    config, args = models.command_line(__doc__, (*STAGES, "all"), checkpoint={}, image=dict(action="append"))
    if args.dry_run:
        return models.dry_run(config)
    if args.checkpoint and args.role == "all":
        raise models.UserError("checkpoint= is one model's weights: say which with role=.")
    process = data.setup(config["device"])
    if args.image:
        return classify(args.image, args.checkpoint or models.weights_of(config, args.role), process)
    if not Path(config["output_dir"], "config.yaml").exists():  # of a run: how it was trained
        models.begin(config, process)
    # role=all scores the models that are there: the baseline may still be training.
    given = [role for role in ("meta", "teacher") if config[role]["checkpoint"]]
    for role in STAGES if args.role == "all" else [args.role]:
        if args.role == "all" and role not in given and not models.finished(config, role, f"{role}.pt"):
            continue
        # A student is tested where it was fine-tuned, which need not be where its modules were distilled.
        path, target = args.checkpoint or models.weights_of(config, role), models.on_target(config, role)
        for result in evaluate(role, path, target, process):
            # At once, whatever happens to the next set.
            if process.rank == 0 and not args.checkpoint:
                keep(Path(config["output_dir"], "results.json"), result)
            line = "{role}, {set}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {images:,} images"
            models.say(process, line.format(**result))
    # The other processes need not wait: nothing collective follows.
    if args.role == "all" and process.rank == 0:
        report([config["output_dir"]])
        print(f"pictures: pip install matplotlib && python docs/figures.py {config['output_dir']}")


def evaluate(role, path, config, process):
    """Yields the results {role, set, top1, top5, images} of a model on all sets of the config."""
    model = models.build(config, role)
    models.load_weights(model, path)
    model.to(process.device).eval()
    # Robustness sets differ from the test set in their images alone: the same model is scored.
    for name in ("test", *config["data"]["robustness"]):
        try:
            images = data.load(config, name)
        except models.UserError as e:
            if name == "test":
                raise
            models.say(process, f"{name} is left out: {e}")
            continue
        if images.present is not None:
            models.say(process, f"{name}: {len(images.present)} of {config['data']['classes']} classes are "
                       "present; the model chooses among these only.")
        top1, top5 = score(model, images, config, process)
        yield {"role": role, "set": name, "top1": top1, "top5": top5, "images": len(images)}
    for result in few_shot(model, config, process) if config["few_shot"]["set"] else ():
        yield {"role": role, **result}


@torch.no_grad()
def score(model, images, config, process):
    """Top-1 and top-5 in % over an ImageSet; logits of classes that it does not have are left out."""
    # On the device until the end, because reading a number after each batch would wait for the GPU.
    hits, absent = torch.zeros(2, device=process.device), None
    if images.present is not None:
        absent = torch.ones(config["data"]["classes"], dtype=torch.bool, device=process.device)
        absent[images.present] = False
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            logits = model(x).float()
        # ImageNet-R has 200 of ImageNet's 1000 classes: others would be wrong by construction.
        if absent is not None:
            logits = logits.masked_fill(absent, -torch.inf)
        # Of fewer than five classes every answer is among the best five.
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # B 5
        hits += torch.stack([best[:, 0].sum(), best.sum()])
    # Counts are summed, not the processes' means: their shares can differ by one image.
    return (100 * data.sum_over_processes(hits) / len(images)).tolist()


def classify(files, path, process):
    """Prints the five best classes of each image file."""
    model = models.load(path).to(process.device)
    images = data.ImageSet([0] * len(files), model.class_names, files=files)
    alone = data.Setup(process.device, 0, 1)  # each process reads all files; the first one prints
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in data.eval_batches(images, model.config, alone)])
    for file, probabilities in zip(files, logits.softmax(-1)):
        best = probabilities.topk(min(5, len(probabilities)))
        names = [f"{model.class_names[k]} {100 * p:.1f} %" for p, k in zip(*map(torch.Tensor.tolist, best))]
        models.say(process, f"{file}: {', '.join(names)}")


def few_shot(model, config, process):
    """Yields accuracies on classes that the model has not seen: means over episodes, with 95 % intervals.

    In an episode a few images of each class have labels, and a linear classifier learns from their features.
    """
    f, images = config["few_shot"], data.few_shot_set(config)
    # The model is frozen, so each image goes through it once and serves all episodes.
    features, labels = features_of(model, images, config, process), images.labels.numpy()
    for shots in f["shots"]:
        # The same episodes for every role and run of a seed: models are compared on the same questions.
        episodes = data.episodes(labels, f["ways"], shots, 3 * shots, f["episodes"], config["seed"])
        support, query = (features[indices] for indices in episodes)
        accuracy = 100 * linear_probe(support, query, f["ways"]).float().mean(1)  # episodes 2
        top1, top5 = accuracy.mean(0).tolist()
        # 95 % interval of a mean: ± 1.96 σ / √episodes. It is about the draw of episodes, not about training.
        interval = 1.96 * accuracy[:, 0].std().item() / len(accuracy) ** 0.5
        name = f["root"] if f["set"] == "folder" else f["set"]
        yield {"set": f"few-shot {name} {shots}-shot {f['ways']}-way", "top1": top1, "top5": top5,
               "images": len(images), "ci95": interval, "episodes": len(accuracy)}


@torch.no_grad()
def features_of(model, images, config, process):
    """What the model's classifier is given, for every image, once. -> N D on every process."""
    # A hook on the classifier, so that no model needs a forward pass of its own for features.
    classifier, mine = model.pool.to_logits if isinstance(model, models.NAC) else model.head, []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: mine.append(inputs[0].float()))
    for x, _ in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            model(x)
    hook.remove()
    # Each process fills in its own rows, and the sum puts them together.
    features = torch.zeros(len(images), classifier.in_features, device=process.device)
    features[process.rank::process.world] = torch.cat(mine)  # eval_batches' share of each process
    # Of equal size for every model, so that one learning rate suits all.
    return F.layer_norm(data.sum_over_processes(features), features.shape[1:])


def linear_probe(support, query, ways):
    """Trains a linear classifier for each of E episodes, all side by side.

    support E ways·n D, query E ways·m D, class by class -> E ways·m 2: is the label the best, or among the
    best 5?
    """
    E, D = len(support), support.shape[2]

    def labels(x):  # E ways·n
        return torch.arange(ways, device=x.device).repeat_interleave(x.shape[1] // ways).expand(E, -1)

    # From zero, and convex: no seed. Without a bias, because classes are balanced and features have mean 0.
    weight = torch.zeros(E, D, ways, device=support.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(100):
        # The sum: an episode's gradient does not depend on how many others there are.
        loss = F.cross_entropy((support @ weight).transpose(1, 2), labels(support), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = (query @ weight.detach()).topk(min(5, ways)).indices == labels(query)[..., None]
    return torch.stack([hits[..., 0], hits.any(-1)], dim=-1)


# ---------- Report: a row per model and run name, over seeds


def keep(path, result):
    """Adds a result to results.json, in place of an older one of the same role, set and number of images."""
    key = ("role", "set", "images")
    with open(path.with_name("config.yaml"), "a") as lock:  # to write, or a network's file system refuses
        fcntl.flock(lock, fcntl.LOCK_EX)  # another evaluation of this run may add its own
        others = [r for r in read_results(path) if [r[k] for k in key] != [result[k] for k in key]]
        models.write(path, lambda file: file.write(json.dumps([*others, result], indent=1).encode()))


def read_results(path):
    try:
        return json.loads(path.read_bytes()) if path.exists() else []
    except (OSError, ValueError) as e:
        raise models.UserError(f"{path} cannot be read ({e}); remove it and evaluate again.") from None


def read_config(folder):
    try:
        return models.parse((folder / "config.yaml").read_bytes(), f"{folder / 'config.yaml'}")
    except OSError as e:
        raise models.UserError(f"{folder} is not a run's folder: {e}.") from None


def read_log(folder):
    """A run's log lines; of each stage, module and epoch the last, because a kill makes a run repeat it."""
    path, last = folder / "log.jsonl", {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
            last[line["stage"], line["module"], line["epoch"]] = line
        except ValueError:
            continue  # a full disk cut it short, and the epoch was repeated
    return list(last.values())


def report(folders):
    """Of one run: prints a table of six columns and a verdict, and writes all columns to its report.md.
    Of several: prints all columns as Markdown, mean ± sample standard deviation over seeds.

    A run's name is its folder's without the seed: runs/demo_nac-s3-alpha0 -> demo_nac-alpha0. Runs of one
    name may differ in their seed alone. `against`: the difference to the first name's model, seed by seed.
    """
    if not folders:
        raise models.UserError("--report needs the folders of runs.")
    folders = list(dict.fromkeys(map(Path, folders)))
    rows, made = {}, {}  # (name, role): {seed: {column: value}}; name: its runs' settings
    sizes = {}  # (test set, data set, its folder): its number of images, in all runs
    for folder in folders:
        config, name = read_config(folder), re.sub(r"-s\d+", "", folder.name)
        settings = {key: value for key, value in models.settings(config, "student").items()
                    if key not in ("seed", *models.GIVEN)}
        models.compare(made.setdefault(name, settings), settings, f"another run named {name}", config)
        for role, values in scores(folder, config, sizes).items():
            row = rows.setdefault((name, role), {})
            if row.setdefault(config["seed"], values) is not values:
                raise models.UserError(f"{folder} is the second run of name {name} and this seed, "
                                       f"{config['seed']}; rename it.")
    sets = dict.fromkeys(c for row in rows.values() for one in row.values() for c in one if c.endswith("%"))
    sets = sorted(sets, key=lambda c: c != "test %")
    first, lines = next(iter(made)), []
    for (name, role), row in rows.items():
        plain = rows.get((first, role), {})
        line = {"model": f"{name} {role}" if len(folders) > 1 else role, "seeds": str(len(row))}
        line |= {column: mean_std([one[column] for one in row.values() if column in one]) for column in sets}
        gains = [row[s]["test %"] - plain[s]["test %"] for s in row
                 if "test %" in row[s].keys() & plain.get(s, {}).keys()]
        if len(folders) > 1:
            line[f"against {first}"] = mean_std(gains, "+")
        for column in ("own TMAC", "all TMAC", "own s"):
            line[column] = f"{statistics.mean(one[column] for one in row.values()):.3g}"
        lines.append(line)
    cells = [lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)]
    markdown = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    if len(folders) > 1:
        return print(markdown)
    models.write(folders[0] / "report.md", lambda file: file.write(f"{markdown}\n".encode()))
    columns = ["model", *sets[:3], "own TMAC", "all TMAC"]
    for line in [dict(zip(columns, columns)), *lines]:
        print("  ".join(line[c].rjust(len(c)) if c != "model" else line[c].ljust(11) for c in columns))
    print(verdict({role: row[config["seed"]] for (_, role), row in rows.items()}, config))


def scores(folder, config, sizes):
    """{role: {column: value}} of a run: accuracies, each on the whole set, and costs.

    Raises UserError if other runs, whose `sizes` are known, were scored on more or fewer images of a set.
    """
    results, spent, table, whole = read_results(folder / "results.json"), costs(folder, config), {}, {}
    if not results:
        raise models.UserError(f"{folder} holds no results: run evaluate.py first.")
    for r in results:
        options = models.on_target(config, r["role"])["data"]
        r["of"] = r["set"], options["set"], options["root"]
        whole[r["of"]] = max(r["images"], whole.get(r["of"], 0))
    for of, images in whole.items():
        if sizes.setdefault(of, images) != images:
            raise models.UserError(f"{folder} was scored on {images} images of {of[0]}, another run on "
                                   f"{sizes[of]}: evaluate both alike.")
    for r in results:
        if r["images"] == whole[r["of"]]:  # else only a part of the set was looked at
            table.setdefault(r["role"], dict(spent[r["role"]]))[f"{r['set']} %"] = r["top1"]
    return table


def verdict(row, config):
    """What a run shows, in a sentence; empty without a student and its baseline."""
    if any("test %" not in row.get(role, {}) for role in ("student", "baseline")):
        return ""
    student, baseline = row["student"]["test %"], row["baseline"]["test %"]
    lengths = [models.schedule(config, role)["epochs"] for role in ("student", "baseline")]
    same = "the same epochs" if lengths[0] == lengths[1] else f"{lengths[1]} epochs instead of {lengths[0]}"
    chance = 100 / models.on_target(config, "student")["data"]["classes"]
    times = row["student"]["all TMAC"] / (row["baseline"]["all TMAC"] or 1)
    return (f"student {student:.1f} %, the same model end to end for {same} {baseline:.1f} % "
            f"({student - baseline:+.1f}); chance {chance:.1f} %; the whole pipeline cost {times:.1f} times "
            "the baseline's multiply-adds")


def costs(folder, config):
    """{role: seconds and 10¹² multiply-adds, the model's own and with all stages before it}, from logs."""
    spent = {}  # stage: (s, TMAC)
    ran = {stage for _, _, stage in models.stages(config)} | {"baseline_kd"}
    for source in map(Path, (folder, *models.folders(config)[1:])):
        other, found = read_config(source), {}
        same = {stage for stage in ran - spent.keys()
                if models.settings(config, stage) == models.settings(other, stage)}
        for line in read_log(source):
            stage = line["stage"]
            if stage in same:
                found.setdefault(stage, []).append((line["seconds"], line["tmac"]))
        spent |= {stage: tuple(map(sum, zip(*values))) for stage, values in found.items()}
    result = {}
    for role, (own, before) in STAGES.items():
        seconds, mine = (sum(spent[stage][k] for stage in own if stage in spent) for k in (0, 1))
        others = sum(spent[stage][1] for stage in before if stage in spent)
        result[role] = {"own TMAC": mine, "all TMAC": mine + others, "own s": seconds}
    return result


def mean_std(values, sign=""):
    """Mean ± sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:{sign}.1f}" if values else "–"
    return f"{statistics.mean(values):{sign}.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    models.run(main)
