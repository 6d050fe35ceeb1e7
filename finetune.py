"""finetune.py – train any whole model end to end: stages 1 (meta), 3 (teacher) and 5 (student) of m2mKD, and the baselines.

    python finetune.py --config configs/demo_nac.yaml role=meta         the meta model, from scratch
    python finetune.py --config configs/demo_nac.yaml role=teacher      the teacher assembled from incubated modules
    python finetune.py --config configs/demo_nac.yaml                   the student assembled from distilled modules
    python finetune.py --config configs/demo_nac.yaml role=baseline     the same student from scratch
    python finetune.py --config configs/demo_nac.yaml role=baseline_kd  … with (1-α)·CE + α·KD from the whole teacher
    torchrun --nproc_per_node=8 finetune.py --config configs/imagenet_vmoe.yaml role=meta

Writes <output_dir>/<role>.pt. Skips what is finished, resumes what is not; key=value overrides any key of the config.
distill_module.py has the same loop for modules inside the meta model: `diff finetune.py distill_module.py`.
"""

import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import models


def soft_target_ce(logits, targets):
    """Cross entropy with soft targets (mixup, smoothing): −Σ_k y_k log p_k, mean over the batch. B K, B K -> ()."""
    return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()


def kd(student_logits, teacher_logits, tau=1.0, kind="soft", reduction="batchmean"):
    """Knowledge distillation: soft, a KL divergence at temperature τ, or hard, the teacher's choice as label. B K, B K -> ().

    reduction (of soft): batchmean divides by B; mean, the paper's code, by B·K, which is weak beside the cross entropy.
    """
    if kind == "hard":
        return F.cross_entropy(student_logits, teacher_logits.argmax(-1))
    log_p, log_t = F.log_softmax(student_logits / tau, dim=-1), F.log_softmax(teacher_logits / tau, dim=-1)
    # KL(p_teacher ‖ p_student) · τ², summed over batch and classes
    loss = F.kl_div(log_p, log_t, reduction="sum", log_target=True) * tau**2
    return loss / (log_p.numel() if reduction == "mean" else len(log_p))


def main():
    config, words = models.command_line(__doc__, ("student", "meta", "teacher", "baseline", "baseline_kd"))
    if words.dry_run:
        return models.dry_run(config)
    role = words.role
    target = models.on_target(config, role)  # the config with the role's own data; settings are compared by the whole one
    stage = "student" if role.startswith("baseline") else role  # whose block of `train` holds
    c, d = dict(config["train"][stage]), config["distill"]
    if role.startswith("baseline") and config["train"]["baseline_epochs"] is not None:
        c["epochs"] = config["train"]["baseline_epochs"]
    process = data.setup(config["device"])
    device, main_process = process.device, process.rank == 0

    # what is finished, and what an unfinished run left
    result = models.finished(config, role, f"{role}.pt", words.force)
    if result:
        return models.say(process, f"{role}: {result} is finished; skipped (force=true repeats it).")
    name = f"{role}.unfinished.pt"
    resumed = models.unfinished(config, role, name, words.force)
    models.begin(config, process, name)

    train, validation = data.load(target, "train", stage), data.load(target, "validation")
    steps = data.steps_per_epoch(len(train), c["batch"], process.world, c["accumulate"], stage)
    total_batch = c["batch"] * process.world * c["accumulate"]

    model = models.build(target, role)
    if role in ("teacher", "student"):
        start = config["student"]["start"] if role == "student" else None
        models.load_weights(model, start or models.needed(config, role, "assemble_" + role, f"{role}_assembled.pt"))
    elif role.startswith("baseline"):
        models.say(process, models.fit_graph_prior(model, config))
    models.set_drop_path(model, c["drop_path"])
    model.to(device)
    teacher = None
    if role == "baseline_kd":
        teacher = models.build(target, "teacher").to(device).requires_grad_(False).eval()
        models.load_weights(teacher, models.needed(config, "teacher"))
    optimizer = models.optimizer(model, c)

    # loss·images, correct, images of the epoch so far: a row a process, of which `own` is this one's
    sums = torch.zeros(process.world, 3, device=device)
    own = sums[process.rank]
    parts = {role: (model, optimizer, sums)}
    step = models.resume(config, process, name, resumed, parts)
    parallel = data.parallel(model, config, process)
    models.say(process, f"{role}: {models.count(model):,} parameters, {len(train):,} images, {c['epochs']} epochs of "
               f"{steps} steps of {total_batch} images, learning rate {c['lr'] * total_batch / 512:g}"
               + (f", resumed at step {step}" if resumed else ""))

    while step < c["epochs"] * steps:
        epoch, first, began = step // steps, step % steps, time.time()
        model.train()
        batches = data.train_batches(train, target, stage, epoch, process, start_step=first)
        bar = tqdm(batches, f"{role} {epoch + 1}/{c['epochs']}", (steps - first) * c["accumulate"],
                   disable=models.quiet(process), leave=False)
        for k, (images, targets) in enumerate(bar):
            models.seed_noise(config, role, step, k % c["accumulate"], process.rank)
            with models.autocast(config, device):
                logits = parallel(images).float()
                loss = soft_target_ce(logits, targets)
                if teacher:
                    with torch.no_grad():
                        teacher_logits = teacher(images).float()
                    # L = (1−α)·CE(student, y) + α·KD(student, teacher)
                    loss = (1 - d["alpha"]) * loss + d["alpha"] * kd(logits, teacher_logits, d["tau"], d["kind"],
                                                                      d["reduction"])
            total = loss + models.regularizer(model, config)
            (total / c["accumulate"]).backward()
            correct = (logits.argmax(-1) == targets.argmax(-1)).sum()
            own += torch.stack([loss.detach() * len(images), correct, correct.new_tensor(len(images))])
            if (k + 1) % c["accumulate"]:
                continue

            lr = models.learning_rate(step, steps, c, total_batch)
            models.update(model, optimizer, lr, c["clip"])
            step += 1
            if step % 20 == 0 or step % steps == 0:  # not at every step: reading a number waits for the GPU
                loss_sum = data.sum_over_processes(own[0].clone())  # what one process meets stops all
                models.check_finite(loss_sum, f"{role}: the loss at step {step}", config)
                bar.set_postfix(loss=f"{own[0] / own[2]:.3f}", top1=f"{100 * own[1] / own[2]:.1f}", lr=f"{lr:.1e}")
            if data.stop_asked(process):
                break

        lines = []
        if step % steps == 0:
            loss_sum, correct, images = data.sum_over_processes(sums).sum(0).tolist()
            trained = time.time() - began
            lines = [{"stage": role, "epoch": epoch + 1, "step": step, "loss": loss_sum / images,
                      "top1": 100 * correct / images, "val_top1": accuracy(model, validation, target, process),
                      "lr": lr, "images_per_second": (steps - first) * total_batch / trained, "seconds": time.time() - began,
                      **models.expert_load(model)}]
            sums.zero_()
        data.sum_over_processes(sums)  # all rows for rank 0's file; zeros after a whole epoch
        models.save_unfinished(config, process, role, name, parts, step, lines)
        models.add_log(config, process, lines)
        models.leave(process, data.stop_asked(process))

    if main_process:
        models.save_finished(config, role, f"{role}.pt", model.state_dict())
        models.remove(config, name)
    del parallel  # before the process group that it uses, or leaving can hang
    data.close()


@torch.no_grad()
def accuracy(model, images, config, process):
    """Top-1 in % over all images, each counted once however many processes there are."""
    model.eval()
    correct = torch.zeros((), device=process.device)
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            correct += (model(x).argmax(-1) == labels).sum()
    return round(100 * data.sum_over_processes(correct).item() / len(images), 2)


if __name__ == "__main__":
    models.run(main)
