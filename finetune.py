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
    """Knowledge distillation: soft, a KL divergence at temperature τ, or hard, the teacher's choice as label. B K, B K -> ()

    reduction (of soft): batchmean divides by B; mean, the paper's code, by B·K, which is weak beside the cross entropy.
    """
    if kind == "hard":
        return F.cross_entropy(student_logits, teacher_logits.argmax(-1))
    # both through log-softmax: a probability that rounds to 0 would have an infinite logarithm
    log_p, log_t = F.log_softmax(student_logits / tau, dim=-1), F.log_softmax(teacher_logits / tau, dim=-1)
    # KL(p_teacher ‖ p_student) · τ², summed over batch and classes. A softer target has gradients smaller by 1/τ²;
    # the factor keeps α's meaning when τ changes (Hinton et al., 1503.02531).
    loss = F.kl_div(log_p, log_t, reduction="sum", log_target=True) * tau**2
    return loss / (log_p.numel() if reduction == "mean" else len(log_p))


def main():
    config, words = models.command_line(__doc__, ("student", "meta", "teacher", "baseline", "baseline_kd"))
    if words.dry_run:
        return models.dry_run(config)
    role = stage = words.role
    # The config with the role's own data: a student may have other images than its modules had. (A file's settings are
    # compared by the config as a whole.) A baseline is trained as the student is, so it has the student's block of `train`.
    target = models.on_target(config, role)
    block = "student" if role.startswith("baseline") else role
    c, d = models.plan(config, role)[0], config["distill"]
    # The paper finetunes the student with labels alone; here the whole teacher can go on teaching it.
    alpha = {"student": d["finetune_alpha"], "baseline_kd": d["alpha"]}.get(role, 0.0)
    process = data.setup(config["device"])
    device, main_process = process.device, process.rank == 0

    # What is finished, and what an unfinished run left.
    name = f"{role}.unfinished.pt"
    if result := models.finished(config, stage, f"{role}.pt", words.force):
        return models.say(process, f"{stage}: {result} is finished; skipped (force=true repeats it).")
    resumed = models.unfinished(config, stage, name, words.force)
    models.begin(config, process, name)

    train, validation = data.load(target, "train", block), data.load(target, "validation")
    steps = data.steps_per_epoch(len(train), c["batch"], process.world, c["accumulate"], block)
    total_batch = c["batch"] * process.world * c["accumulate"]

    # Teacher and student start from their assembled modules, meta model and baselines from scratch. A baseline's graph prior
    # is fitted now; assemble.py has done it for the student.
    model = models.build(target, role)
    if role in ("teacher", "student"):
        start = config["student"]["start"] if role == "student" else None
        models.load_weights(model, start or models.needed(config, role, "assemble_" + role, f"{role}_assembled.pt"))
    elif role.startswith("baseline"):
        models.say(process, models.fit_graph_prior(model, config))
    models.set_drop_path(model, c["drop_path"])
    model.to(device)
    teacher = None
    if alpha:
        if models.new_classes(config):
            raise models.UserError(f"role={role} needs a teacher that knows the classes of `target`; here it knows those of "
                                   "`data`.")
        teacher = models.build(target, "teacher").to(device).requires_grad_(False).eval()
        models.load_weights(teacher, models.needed(config, "teacher"))
    optimizer = models.optimizer(model, c)

    # Loss·images, correct, images of the epoch so far: a row a process, of which `own` is this one's. They stay on the
    # device, and are part of the checkpoint: after a kill the epoch's line in the log is still about the whole epoch.
    sums = torch.zeros(process.world, 3, device=device)
    own = sums[process.rank]
    training = {role: (model, optimizer, sums)}
    step = models.resume(config, process, name, resumed, training)
    data.broadcast_weights(training, process)
    compiled = torch.compile(model) if config["compile"] else model
    models.announce(process, stage, training, len(train), c, steps, total_batch, step)

    while step < c["epochs"] * steps:
        epoch, first, began = step // steps, step % steps, time.time()
        model.train()
        batches = data.train_batches(train, target, block, epoch, process, start_step=first)
        bar = tqdm(batches, f"{stage} {epoch + 1}/{c['epochs']}", (steps - first) * c["accumulate"],
                   disable=process.rank > 0 or None, leave=False)
        for k, (images, targets) in enumerate(bar):
            # Drop path, code jitter and the like are a function of the step: no random state to save.
            models.seed_noise(config, stage, step, k % c["accumulate"], process.rank)
            with models.autocast(config, device):
                logits = compiled(images).float()
                loss = soft_target_ce(logits, targets)
                if teacher:
                    with torch.no_grad():
                        teacher_logits = teacher(images).float()
                    # L = (1−α)·CE(student, y) + α·KD(student, teacher)
                    loss = (1 - alpha) * loss + alpha * kd(logits, teacher_logits, d["tau"], d["kind"], d["reduction"])
            total = loss + models.regularizer(model, config)
            (total / c["accumulate"]).backward()
            correct = (logits.argmax(-1) == targets.argmax(-1)).sum()
            own += torch.stack([loss.detach() * len(images), correct, torch.full_like(correct, len(images))])
            if (k + 1) % c["accumulate"]:
                continue

            # The rate is a function of the step alone, so a resumed run has no schedule to restore.
            lr = models.learning_rate(step, steps, c, total_batch)
            data.average_gradients(training, process)
            models.update(training, lr, c["clip"])
            step += 1
            # Not at every step: to read a number is to wait for the GPU.
            if step % 20 == 0 or step % steps == 0:
                bar.set_postfix(data.check_losses(training, stage, step, config), lr=f"{lr:.1e}")
            if data.stop_asked(process):
                break

        # The epoch is over, or SIGTERM cut it short: every process gets all rows, the first one saves them.
        for *_, rows in training.values():
            data.sum_over_processes(rows)
        lines = []
        if step % steps == 0:
            trained = time.time() - began
            validated = {role: accuracy(model, validation, target, process)}
            lines = models.epoch_lines(training, validated, stage, epoch=epoch + 1, step=step, lr=lr,
                                       images_per_second=(steps - first) * total_batch / trained,
                                       seconds=(time.time() - began) / len(training))
        # The checkpoint before the log: it holds the lines too, and what the log lacks after a kill it gets on resume.
        models.save_unfinished(config, process, stage, name, training, step, lines)
        if words.force and main_process:  # from here on the repetition is an unfinished stage like any other
            models.remove(config, f"{role}.pt")
        models.add_log(config, process, lines)
        models.leave(process, data.stop_asked(process))

    if main_process:
        models.save_finished(config, stage, f"{role}.pt", model.state_dict())
        models.remove(config, name)
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
