"""finetune.py – trains a whole model end to end: stages 1 (meta), 3 (teacher), 5 (student) and the baselines.

    python finetune.py --config configs/demo_nac.yaml role=meta         the meta model, from scratch
    python finetune.py --config configs/demo_nac.yaml role=teacher      the teacher assembled from its modules
    python finetune.py --config configs/demo_nac.yaml                   the student assembled from its modules
    python finetune.py --config configs/demo_nac.yaml role=baseline     the same student from scratch
    python finetune.py --config configs/demo_nac.yaml role=baseline_kd  … and the whole teacher teaches it
    torchrun --nproc_per_node=8 finetune.py --config configs/imagenet_vmoe.yaml role=meta

Writes <output_dir>/<role>.pt. Skips what is finished, resumes what is not; key=value overrides any key.
distill_module.py has the same loop for modules inside the meta model.
"""

import torch

import data
import models
from models import kd, soft_target_ce


def main():
    config, args = models.command_line(__doc__, ("student", "meta", "teacher", "baseline", "baseline_kd"))
    role, c, d = args.role, models.schedule(config, args.role), config["distill"]
    # The paper fine-tunes the student with labels alone; here the whole teacher can go on teaching it.
    alpha = models.alpha_of(config, role)
    options = {key: d[key] for key in ("tau", "kind", "reduction")}
    process = data.setup(config["device"])
    if models.finished(config, role, f"{role}.pt"):
        return models.skip(config, process, role)
    # A baseline has the student's images and recipe (the block train.student), but not its α.
    train, validation = data.load(config, "train", c["block"]), data.load(config, "validation")

    # Teacher and student start from their assembled modules, meta model and baselines from scratch. A
    # baseline's graph prior is fitted now; assemble.py has done it for the student.
    model = models.build(config, role)
    if role in ("teacher", "student"):
        models.load_weights(model, models.needed(config, f"assemble_{role}", f"{role}_assembled.pt"))
    elif role.startswith("baseline"):
        models.say(process, models.fit_graph_prior(model, config))
    models.set_drop_path(model, c["drop_path"])
    model.to(process.device)
    teacher = models.frozen(config, "teacher", process) if alpha else None
    stage = models.Stage(config, process, role, {role: model}, {role: f"{role}.pt"}, train)

    for epoch in stage.epochs():
        for images, targets in stage.batches(epoch):
            # Drop path, code jitter and the like are drawn from the step's number: no random state to save.
            stage.seed_noise()
            with models.autocast(config, process.device):
                logits = stage.wrapped[role](images).float()
                loss = soft_target_ce(logits, targets)
                if teacher:
                    with torch.no_grad():
                        teacher_logits = teacher(images).float()
                    # L = (1−α)·CE(student, y) + α·KD(student, teacher)
                    lesson = kd(logits, teacher_logits, targets=targets, **options)
                    loss = (1 - alpha) * loss + alpha * lesson
            total = loss + models.regularizer(model, config)
            (total / stage.c["accumulate"]).backward()
            stage.record(role, loss, logits, targets)
            stage.step()
        stage.end_epoch({role: accuracy(model, validation, config, process)})
    stage.finish()


@torch.no_grad()
def accuracy(model, images, config, process):
    """Top-1 in % over all images, each counted once however many processes there are; None without any."""
    if not len(images):
        return None
    model.eval()
    correct = torch.zeros((), device=process.device)
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            correct += (model(x).argmax(-1) == labels).sum()
    return round(100 * data.sum_over_processes(correct).item() / len(images), 2)


if __name__ == "__main__":
    models.run(main)
