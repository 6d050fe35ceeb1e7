"""evaluate.py – accuracy of trained models on test and robustness sets, and tables over runs.

    python evaluate.py --config configs/demo_nac.yaml                         the student
    python evaluate.py --config configs/demo_nac.yaml role=all                every finished model of the run, and a table
    python evaluate.py --config configs/demo_nac.yaml checkpoint=other.pt     these weights as the role's
    torchrun --nproc_per_node=8 evaluate.py --config configs/imagenet_vmoe.yaml role=baseline
    python evaluate.py --config configs/demo_nac.yaml few_shot.set=cifar100 few_shot.root=FOLDER    on new classes, too
    python evaluate.py --report runs/demo_nac*                                mean ± std over seeds, as Markdown

Writes <output_dir>/results.json, a list of {role, set, top1, top5, images, checkpoint}. Every image of a set counts
once, however many processes share it, and the last weights are scored, not the best on the way.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

import data
import models

ROLES = ("student", "meta", "teacher", "baseline", "baseline_kd", "all")


def main():
    if "--report" in sys.argv:
        return report(sys.argv[sys.argv.index("--report") + 1:])
    config, words = models.command_line(__doc__, ROLES, ("checkpoint",))
    if words.dry_run:
        return models.dry_run(config)
    process = data.setup(config["device"])
    folder = Path(config["output_dir"])
    roles = [words.role] if words.role != "all" else [r for r in ROLES[:-1] if find(config, r)]
    sets = {}  # by data block, each loaded once
    for role in roles:
        path = words.checkpoint or find(config, role) or models.needed(config, role)
        c = models.on_target(config, role)
        model = models.build(c, role)
        models.load_weights(model, path)
        model.to(process.device).eval()
        for name in ("test", *c["data"]["robustness"]):
            key = (name, json.dumps(c["data"]))
            images = sets[key] = sets[key] if key in sets else data.load(c, name)
            if images.present is not None:
                models.say(process, f"{name}: {len(images.present)} of the model's {c['data']['classes']} classes are "
                           "present; it chooses among these only.")
            top1, top5 = score(model, images, c, process)
            if process.rank == 0:
                keep_result(folder, {"role": role, "set": name, "top1": top1, "top5": top5, "images": len(images),
                                     "checkpoint": str(path)})
            models.say(process, f"{role}, {name}: top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(images):,} images")
        if c["few_shot"]["set"]:
            few_shot(model, role, path, c, process)
    if words.role == "all" and process.rank == 0:
        report([folder])
    data.close()


def find(config, role):
    """Path of a role's weights, or None."""
    if role in ("meta", "teacher") and config[role]["checkpoint"]:
        return config[role]["checkpoint"]
    return models.finished(config, role, f"{role}.pt")


@torch.no_grad()
def score(model, images, config, process):
    """Top-1 and top-5 in % over an ImageSet; logits of classes that it has not are left out."""
    hits = torch.zeros(2, device=process.device)
    absent = None
    if images.present is not None:
        absent = torch.ones(config["data"]["classes"], dtype=torch.bool, device=process.device)
        absent[images.present] = False
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            logits = model(x).float()
        if absent is not None:
            logits = logits.masked_fill(absent, -torch.inf)
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # B 5
        hits += torch.stack([best[:, 0].sum(), best.sum()])
    return (100 * data.sum_over_processes(hits) / len(images)).tolist()


def few_shot(model, role, path, config, process):
    """Accuracy on classes the model has not seen: of each episode's images a few are labelled, and a linear classifier is
    trained on the frozen model's features of these alone. Keeps and prints mean ± 95 % interval over episodes."""
    f = config["few_shot"]
    options = {**config["data"], "set": f["set"], "root": f["root"], "classes": None, "test_images": f["images"]}
    images = data.load({**config, "data": options}, "test")
    features = features_of(model, images, config, process)
    for shots in f["shots"]:
        support, query = data.episodes(images.labels.numpy(), f["ways"], shots, 3 * shots, f["episodes"], config["seed"])
        hits = linear_probe(features[support], features[query], f["ways"])  # episodes queries 2
        accuracy = 100 * hits.float().mean(1)
        top1, top5 = accuracy.mean(0).tolist()
        interval = 1.96 * accuracy[:, 0].std().item() / len(accuracy) ** 0.5
        name = f"few-shot {f['set']} {shots} of {f['ways']}"
        if process.rank == 0:
            keep_result(Path(config["output_dir"]), {
                "role": role, "set": name, "top1": top1, "top5": top5, "images": len(images), "checkpoint": str(path),
                "ci95": interval, "episodes": len(accuracy)})
        models.say(process, f"{role}, few-shot on {f['set']}, {f['ways']} ways, {shots} shots: top-1 {top1:.2f} ± "
                   f"{interval:.2f} % (95 % interval of {len(accuracy)} episodes)")


@torch.no_grad()
def features_of(model, images, config, process):
    """What the model's classifier is given, for every image, once. -> N D on every process."""
    classifier, mine = model.pool.to_logits if isinstance(model, models.NAC) else model.head, []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: mine.append(inputs[0].float()))
    for x, _ in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            model(x)
    hook.remove()
    features = torch.zeros(len(images), classifier.in_features, device=process.device)
    features[process.rank::process.world] = torch.cat(mine)  # eval_batches' share of each process
    # of equal size for every model, so that one learning rate suits all
    return F.layer_norm(data.sum_over_processes(features), features.shape[1:])


def linear_probe(support, query, ways):
    """Trains a linear classifier for each of E episodes, all side by side. support E ways·n D, query E ways·m D, both class
    by class -> whether the label is among the best 1 and 5 of each query: E ways·m 2."""
    E, D = len(support), support.shape[2]
    weight = torch.zeros(E, D, ways, device=support.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    labels = lambda x: torch.arange(ways, device=x.device).repeat_interleave(x.shape[1] // ways).expand(E, -1)  # E ways·n
    for _ in range(100):
        loss = F.cross_entropy((support @ weight).transpose(1, 2), labels(support), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = (query @ weight.detach()).topk(min(5, ways)).indices == labels(query)[..., None]
    return torch.stack([hits[..., 0], hits.any(-1)], dim=-1)


def keep_result(folder, result):
    """Adds a result to the run's results.json, in place of an older one of the same role and set."""
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text()) if path.exists() else []
        results = [r for r in results if (r["role"], r["set"]) != (result["role"], result["set"])] + [result]
    except (ValueError, TypeError, KeyError):
        raise models.UserError(f"{path} is not a list of results; remove it and evaluate again.") from None
    models.write_text(path, json.dumps(results, indent=1))


# role: the stages whose time is the model's own, and those that come before it
STAGES = {"meta": (["meta"], []), "teacher": (["incubate", "teacher"], ["meta"]),
          "student": (["distill", "student"], ["meta", "incubate", "teacher"]), "baseline": (["baseline"], []),
          "baseline_kd": (["baseline_kd"], ["meta", "incubate", "teacher"])}


def report(folders):
    """Prints a Markdown table of run folders: accuracy as mean ± sample std over seeds, and seconds of training.

    Runs that differ only in their seed make one row. A row is named by the settings in which it differs from others
    of its role.
    """
    rows = {}  # (role, settings without the seed) -> {seed: (results, seconds)}
    for folder in sorted({Path(f).resolve() for f in folders}):
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text())
            results = json.loads((folder / "results.json").read_text())
            logs = [[json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
                    for log in (folder / "log.jsonl", Path(config["share"] or folder, "log.jsonl"))]
            own = {line["stage"] for line in logs[0]}
            # by stage, module, epoch: a stage that was forced again counts once, and a shared one only if the run has none
            spent = {(line["stage"], line.get("module"), line["epoch"]): line["seconds"]
                     for line in [line for line in logs[1] if line["stage"] not in own] + logs[0]}
            for role in {r["role"] for r in results}:
                made = json.loads(models.settings(config, role))
                seed = made.pop("seed")
                top1 = {r["set"]: r["top1"] for r in results if r["role"] == role}
                cost = [sum(s for (stage, *_), s in spent.items() if stage in stages) for stages in STAGES[role]]
                rows.setdefault((role, json.dumps(made)), {})[seed] = (top1, cost)
        except OSError:
            continue  # not a run, or not evaluated yet
        except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as e:
            raise models.UserError(f"{folder}: config.yaml, results.json or log.jsonl is damaged ({e}).") from None
    if not rows:
        raise models.UserError(f"no results in {', '.join(map(str, folders)) or 'no folder'}: run evaluate.py first.")
    sets = list(dict.fromkeys(name for runs in rows.values() for top1, _ in runs.values() for name in top1))
    print("\n| model | " + " | ".join(f"{name} top-1 %" for name in sets) + " | seeds | own s | s before |")
    print("|---|" + "---|" * (len(sets) + 3))
    for role in ROLES[:-1]:
        group = {made: runs for (r, made), runs in rows.items() if r == role}
        for made, runs in group.items():
            cells = [mean_std([top1[name] for top1, _ in runs.values() if name in top1]) for name in sets]
            own, before = (statistics.mean(cost[i] for _, cost in runs.values()) for i in (0, 1))
            print(f"| {role}{named(made, group)} | {' | '.join(cells)} | {len(runs)} | {own:.0f} | {before:.0f} |")


def named(made, group):
    """The settings in which one row differs from the others of its role, as text."""
    made, others = json.loads(made), [json.loads(m) for m in group]
    keys = [k for k in made if any(o.get(k) != made[k] for o in others)]
    return "".join(f", {k}={json.dumps(made[k])}" for k in keys)


def mean_std(values):
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    models.run(main)
