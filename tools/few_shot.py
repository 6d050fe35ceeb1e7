"""few_shot.py – accuracy on classes that a model has never seen, from a few labeled images of each.

    python tools/few_shot.py --config configs/demo_nac.yaml               the student, on few_shot.root
    python tools/few_shot.py --config configs/demo_nac.yaml role=all      all finished models

few_shot.root is a folder (<class>/* in its test/, its val/ or itself) or an .npz (its test split). In an
episode a linear classifier learns from the frozen model's features of `shots` images of each of `ways`
classes, and is asked about three times as many others. Adds the means over all episodes to results.json.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import evaluate
import models


def main():
    config, words = models.command_line(__doc__, (*evaluate.ROLES, "all"))
    few, images, process = config["few_shot"], few_shot_set(config), data.setup(config["device"])
    stem = Path(few["root"]).absolute().name.removesuffix(".npz")
    finished, problem = evaluate.trained(config, words.role, process), None
    for role, path in finished.items():
        data.agree(process, {"role": role, "images": len(images), "checksum": images.checksum()})
        model = models.load(path).to(process.device)
        if known := {*model.class_names} & {*images.class_names}:
            models.say(process, f"{role} was trained on {len(known)} of these classes, such as {min(known)}.")
        # The model is frozen, so each image goes through it once and serves all episodes.
        features = features_of(model, images, config, process)
        for shots in few["shots"]:
            # The same episodes for every role and run of a seed: all models get the same questions.
            drawn = episodes(images.labels.numpy(), few["ways"], shots, few["episodes"], config["seed"])
            support, query = (features[indices] for indices in drawn)
            accuracy = 100 * linear_probe(support, query, few["ways"]).float().mean(1)  # episodes 2
            top1, top5 = accuracy.mean(0).tolist()
            # 95 % interval of the mean: ± 1.96 σ / √episodes, about the draw of episodes, not about training
            ci95 = 1.96 * accuracy[:, 0].std().item() / len(accuracy) ** 0.5
            name = f"few-shot {stem} {shots}-shot {few['ways']}-way"
            result = {"role": role, "set": name, "top1": top1, "top5": top5, "ci95": ci95,
                      "images": len(images), "episodes": len(accuracy), "checksum": images.checksum()}
            if process.rank == 0:
                problem = evaluate.keep(Path(config["output_dir"], "results.json"), result) or problem
            models.say(process, f"{role}, {name}: top-1 {top1:.2f} ± {ci95:.2f} % of {len(images):,} images")
    if problem:
        raise problem


def few_shot_set(config):
    """The images of few_shot.root -> ImageSet. Raises UserError if they are too few for the episodes."""
    few, root = config["few_shot"], Path(config["few_shot"]["root"])
    if not few["root"] or not root.exists():
        raise data.UserError(f"few_shot.root={few['root']!r} is not there.")
    if root.is_dir():
        parts = [part for part in (root / "test", root / "val") if part.is_dir()] or [root]
        folder = next((part for part in parts if sum(map(Path.is_dir, part.glob("*"))) > 1), parts[0])
        names = data.class_folders(folder)
        images = data.read_folders(folder, names)
    else:
        images = data.load({"data": {"root": few["root"], "classes": None, "test_images": 0}}, "test")
    images = data.subset(images, few["images"], "few_shot.images")
    for shots in few["shots"]:
        episodes(images.labels.numpy(), few["ways"], shots, count=1, seed=0)
    return images


def episodes(labels, ways, shots, count, seed):
    """`count` episodes of a set's labels (N), a pure function of the arguments -> support (count, ways·shots)
    and query (count, ways·3·shots): indices into the set, class by class.
    """
    classes = np.split(np.argsort(labels, kind="stable"), np.bincount(labels).cumsum()[:-1])
    found = [indices for indices in classes if len(indices) >= 4 * shots]
    if len(found) < ways:
        raise data.UserError(f"few_shot.ways={ways}, but only {len(found)} classes have {4 * shots} images.")
    if len(found) < len(classes):
        data.note(f"{shots}-shot: {len(classes) - len(found)} classes have fewer than {4 * shots} images")
    drawn = []
    for episode in range(count):
        rng = data.generator(seed, "few-shot", episode)
        classes = rng.choice(len(found), ways, replace=False)
        # Support and queries are drawn together, so no image is in both.
        drawn.append([rng.permutation(found[c])[:4 * shots] for c in classes])
    support, query = np.split(np.array(drawn), [shots], axis=2)  # count ways shots, count ways 3·shots
    return support.reshape(count, -1), query.reshape(count, -1)


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
    """Trains a linear classifier for each of E episodes, side by side. support E ways·n D, query E ways·m D,
    class by class -> E ways·m 2: is the label the best, is it among the best 5?
    """
    E, D = len(support), support.shape[2]
    labels, asked = (torch.arange(ways, device=x.device).repeat_interleave(x.shape[1] // ways).expand(E, -1)
                     for x in (support, query))  # E ways·n, E ways·m
    # From zero, and convex: no seed. Without a bias, because classes are balanced and features have mean 0.
    weight = torch.zeros(E, D, ways, device=support.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(100):
        # The sum: an episode's gradient does not depend on how many others there are.
        loss = F.cross_entropy((support @ weight).transpose(1, 2), labels, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = (query @ weight.detach()).topk(min(5, ways)).indices == asked[..., None]
    return torch.stack([hits[..., 0], hits.any(-1)], dim=-1)


if __name__ == "__main__":
    models.run(main)
