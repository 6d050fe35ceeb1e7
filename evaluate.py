"""evaluate.py – scores trained models on the test set and on robustness sets, and classifies single images.

    python evaluate.py --config configs/demo_nac.yaml                     the student
    python evaluate.py --config configs/demo_nac.yaml role=all            all finished models
    python evaluate.py --config configs/demo_nac.yaml image=cat.jpg       an image's five best classes
    torchrun --nproc_per_node=8 evaluate.py --config configs/imagenet_vmoe.yaml

Writes <output_dir>/results.json, a list of {role, set, top1, top5, images, checksum}. Every image of a set
counts once, however many processes share it. The last weights are scored, not the best on the way.
tools/few_shot.py scores classes that the model has not seen, tools/report.py makes tables over runs.
"""

import contextlib
import fcntl
import json
import math
import os
from pathlib import Path

import torch

import data
import models

ROLES = ("student", "meta", "teacher", "baseline", "baseline_kd")


def main():
    config, args = models.command_line(__doc__, (*ROLES, "all"), image=dict(action="append"))
    process = data.setup(config["device"])
    if args.image:
        role = ROLES[0] if args.role == "all" else args.role
        own = Path(config["output_dir"], f"{role}.pt")  # its data may be gone
        path = own if own.exists() else models.needed(config, role, f"{role}.pt")
        return classify([os.path.expanduser(file) for file in args.image], path, process)
    finished, problem = trained(config, args.role, process), None
    for role, path in finished.items():
        for result in evaluate(role, path, config, process):
            # At once, whatever happens to the next set. What cannot be kept is printed all the same.
            if process.rank == 0:
                problem = keep(Path(config["output_dir"], "results.json"), result) or problem
            # Of five classes or fewer every answer is among the best five.
            top5 = f", top-5 {result['top5']:.2f} %" if config["data"]["classes"] > 5 else ""
            models.say(process, f"{role}, {result['set']}: top-1 {result['top1']:.2f} %{top5} of "
                       f"{result['images']:,} images")
    if problem:
        raise problem


def trained(config, role, process):
    """{role: path} of a finished model, or for `all` of those that are there. Makes the run's folder."""
    roles = ROLES if role == "all" else [role]
    found = {one: models.finished(config, one, f"{one}.pt", evaluating=True) for one in roles}
    if not any(found.values()):
        models.needed(config, roles[0], f"{roles[0]}.pt")  # says what to do
    if not Path(config["output_dir"], "config.yaml").exists():
        with contextlib.suppress(models.UserError, OSError):  # keep() will say it, after the score
            models.begin(config, process)
    return {one: path for one, path in found.items() if path}


def evaluate(role, path, config, process):
    """Yields the results {role, set, top1, top5, images, checksum} of a model on all sets of the config."""
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
        size = config["data"]["image_size"]
        fits = data.read_image(images.source(0)).size == (size, size)
        if name == "test":
            test_fits = fits
        elif test_fits and not fits:  # such as ImageNet-R in place of Tiny-ImageNet-R, which was squashed
            models.say(process, f"{name}: its images are not {size} x {size} as the test images are, so they "
                       "are resized and cropped.")
        if not images.present.all():
            models.say(process, f"{name}: {images.present.sum()} of {len(images.present)} classes are "
                       "present; the model chooses among these only.")
        known = {"role": role, "set": name, "images": len(images), "checksum": images.checksum()}
        data.agree(process, known)
        top1, top5 = score(model, images, config, process)
        yield {**known, "top1": top1, "top5": top5}


@torch.no_grad()
def score(model, images, config, process):
    """Top-1 and top-5 in % over an ImageSet; the model chooses among the classes that are present."""
    # On the device until the end, because reading a number after each batch would wait for the GPU.
    hits, absent = torch.zeros(2, device=process.device), ~images.present.to(process.device)
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            logits = model(x).float()
        # ImageNet-R has 200 of ImageNet's 1000 classes: others would be wrong by construction.
        logits = logits.masked_fill(absent, -torch.inf)
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


def keep(path, result):
    """Adds a result to results.json, in place of one of its role, set and images -> an error if it fails."""
    key = ("role", "set", "images")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # another evaluation of this run may add its own
        others = [r for r in read_results(path) if [r[k] for k in key] != [result[k] for k in key]]
        models.write(path, lambda file: file.write(json.dumps([*others, result], indent=1).encode()))
    except (models.UserError, OSError) as e:
        return e
    finally:
        os.close(folder)


def read_results(path):
    """The results of a run. Raises UserError if the file holds anything else."""
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_bytes())
        for r in results:
            finite = math.isfinite(r["top1"] + r["images"])
            if r["role"] not in ROLES or type(r["set"]) is not str or not finite:
                raise ValueError(f"one of its results is {r}")
        return results
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
        raise models.UserError(f"{path} cannot be read ({e!r}); remove it and evaluate again.") from None


if __name__ == "__main__":
    models.run(main)
