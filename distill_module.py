"""distill_module.py – m2mKD: each module of the student learns from the teacher's module, both inside one frozen meta model.

    python distill_module.py --config configs/demo_nac.yaml                  stage 4, m2mKD: all modules in one pass
    python distill_module.py --config configs/demo_nac.yaml module=2         one module (counted from 0), its own job
    python distill_module.py --config configs/demo_nac.yaml role=teacher     stage 2: incubates the teacher's modules
    torchrun --nproc_per_node=8 distill_module.py --config configs/imagenet_vmoe.yaml

Teacher T, student S and meta model M are each cut into L modules: T = T_L ∘ … ∘ T_1, and so on (in the code i counts from
0: parts[i] is T_{i+1}). M is small, one block a module; it was trained first (finetune.py role=meta) and never changes
here. T is finished too (finetune.py role=teacher). To teach S_i, put it in M's place i:

                              ┌─        T_i       ─ M_{i+1} ─ … ─ M_L ─ teacher hybrid's logits
    image ─ M_1 ─ … ─ M_{i-1} ┤ h_{i-1}                                   │ KD         loss = (1−α)·CE + α·KD
                              └─ pre ─ S_i ─ post ─ M_{i+1} ─ … ─ M_L ─ student hybrid's logits ─ CE ─ label

Only S_i learns, with its stitch layers pre and post, which translate between the student's width and M's (T has M's
width); of a NAC's module what it shares with others does not (see NACModule). The gradient reaches S_i through the frozen
M_{i+1} … M_L. S_1 takes in pixels, like M_1, and has no pre; S_L gives logits and has no post. The L pairs (T_i, S_i) do
not depend on one another, but all start from states h of the same M: one run of M over a batch gives h_0 … h_{L-1} to all.
The teacher's own modules are made the same way, without a teacher (α = 0) and without stitches: Deep Incubation.
Afterwards assemble.py joins the modules, and finetune.py trains the whole.

Writes <output_dir>/<role>_modules/<i>.pt. Skips what is finished, resumes what is not; key=value overrides any key.
finetune.py has the same loop for one whole model.
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
    config, words = models.command_line(__doc__, ("student", "teacher"), ("module",))
    if words.dry_run:
        return models.dry_run(config)
    role = words.role
    # Stage 2 trains the teacher's modules with labels alone, stage 4 the student's with labels and teacher.
    stage = "incubate" if role == "teacher" else "distill"
    c, d = dict(config["train"][stage]), config["distill"]
    alpha = 0.0 if role == "teacher" else d["alpha"]
    process = data.setup(config["device"])
    device, main_process = process.device, process.rank == 0

    # What is finished, and what an unfinished run left. One pass over all modules has one checkpoint; a job of its own
    # for one module has its own, so that such jobs can run side by side.
    wanted = range(models.modules_of(config)) if words.module is None else [words.module]
    name = f"{role}_modules/unfinished.pt" if words.module is None else f"{role}_modules/{words.module}.unfinished.pt"
    todo = [i for i in wanted if not models.finished(config, stage, f"{role}_modules/{i}.pt", words.force)]
    if len(todo) < len(wanted):
        models.say(process, f"{stage}: modules {sorted(set(wanted) - set(todo))} are finished; skipped (force=true "
                   "repeats them).")
    if not todo:
        return
    resumed = models.unfinished(config, stage, name, words.force)
    models.begin(config, process, name)

    train, validation = data.load(config, "train", stage), data.load(config, "validation")
    steps = data.steps_per_epoch(len(train), c["batch"], process.world, c["accumulate"], stage)
    total_batch = c["batch"] * process.world * c["accumulate"]

    # The frame that never changes. Evaluation mode: no noise but the module's own.
    meta = models.build(config, "meta").to(device).requires_grad_(False).eval()
    models.load_weights(meta, models.needed(config, "meta"))
    teacher = None
    if alpha:
        teacher = models.build(config, "teacher").to(device).requires_grad_(False).eval()
        models.load_weights(teacher, models.needed(config, "teacher"))
        # Does T fit this frame? Far below M alone it does not; above M alone it has something to add.
        hybrids = accuracy(meta, dict(enumerate(teacher.parts)), validation, config, process)
        alone = accuracy(meta, {0: meta.parts[0]}, validation, config, process)[0]
        models.say(process, f"distill: validation top-1 of the teacher hybrids {hybrids}, of the meta model {alone}")
        if min(hybrids.values()) < alone / 2:
            models.say(process, "warning: these teacher modules do not work inside this meta model; a teacher that was not "
                       "incubated in it has little to teach here")
    # The modules share the parameters of a whole model, so all start as they would in it. Each has an optimiser of its
    # own: no pair touches another, and to train all in one pass is to train each alone.
    whole = models.build(config, role)
    models.set_drop_path(whole, c["drop_path"])
    modules = models.cut(whole.to(device), config, role)
    students = {i: modules[i].to(device) for i in todo}
    optimizers = {i: models.optimizer(student, c) for i, student in students.items()}

    # Loss·images, correct, images of the epoch so far: a row a process, of which `own` is this one's. They stay on the
    # device, and are part of the checkpoint: after a kill the epoch's line in the log is still about the whole epoch.
    sums = {i: torch.zeros(process.world, 3, device=device) for i in todo}
    own = {i: rows[process.rank] for i, rows in sums.items()}
    training = {i: (students[i], optimizers[i], sums[i]) for i in todo}
    step = models.resume(config, process, name, resumed, training)
    data.broadcast_weights(training, process)
    compiled = {i: torch.compile(student) if config["compile"] else student for i, student in students.items()}
    models.announce(process, stage, training, len(train), c, steps, total_batch, step)

    while step < c["epochs"] * steps:
        epoch, first, began = step // steps, step % steps, time.time()
        for student in students.values():
            student.train()
        batches = data.train_batches(train, config, stage, epoch, process, start_step=first)
        bar = tqdm(batches, f"{stage} {epoch + 1}/{c['epochs']}", (steps - first) * c["accumulate"],
                   disable=process.rank > 0 or None, leave=False)
        for k, (images, targets) in enumerate(bar):
            # h_0 = images, h_i = M_i ∘ … ∘ M_1(images): one run of M serves all pairs.
            with models.autocast(config, device), torch.no_grad():
                hidden = meta.hidden_states(images)
            for i in todo:
                # Drop path, code jitter and the like: a module gets the same noise alone as among all others.
                models.seed_noise(config, stage, i, step, k % c["accumulate"], process.rank)
                with models.autocast(config, device):
                    # Student hybrid: M_L ∘ … ∘ M_{i+2} ∘ post ∘ S_{i+1} ∘ pre (h_i). The rest of M is frozen but not
                    # under no_grad: the gradient must pass through it to reach S.
                    logits = meta.rest(i + 1, compiled[i](hidden[i])).float()
                    loss = soft_target_ce(logits, targets)
                    if teacher:
                        with torch.no_grad():
                            # Teacher hybrid, from the same state: M_L ∘ … ∘ M_{i+2} ∘ T_{i+1} (h_i)
                            teacher_logits = meta.rest(i + 1, teacher.parts[i](hidden[i])).float()
                        # L = (1−α)·CE(student hybrid, y) + α·KD(student hybrid, teacher hybrid)
                        loss = (1 - alpha) * loss + alpha * kd(logits, teacher_logits, d["tau"], d["kind"], d["reduction"])
                # Balance losses of a V-MoE's mixtures. 0 for a NAC: its graph regulariser is for the whole circuit.
                total = loss + models.regularizer(students[i], config)
                (total / c["accumulate"]).backward()
                correct = (logits.argmax(-1) == targets.argmax(-1)).sum()
                own[i] += torch.stack([loss.detach() * len(images), correct, torch.full_like(correct, len(images))])
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
            validated = accuracy(meta, students, validation, config, process)
            lines = models.epoch_lines(training, validated, stage, epoch=epoch + 1, step=step, lr=lr,
                                       images_per_second=(steps - first) * total_batch / trained,
                                       seconds=(time.time() - began) / len(training))
        # The checkpoint before the log: it holds the lines too, and what the log lacks after a kill it gets on resume.
        models.save_unfinished(config, process, stage, name, training, step, lines)
        for i in todo if words.force and main_process else ():  # from here on unfinished modules like any others
            models.remove(config, f"{role}_modules/{i}.pt")
        models.add_log(config, process, lines)
        models.leave(process, data.stop_asked(process))

    if main_process:
        for i in todo:
            models.save_finished(config, stage, f"{role}_modules/{i}.pt", students[i].state_dict())
        models.remove(config, name)
    data.close()


@torch.no_grad()
def accuracy(meta, modules, images, config, process):
    """Top-1 in % of each hybrid M_L ∘ … ∘ module ∘ … ∘ M_1 over all images, each counted once. {i: module} -> {i: %}."""
    correct = {i: torch.zeros((), device=process.device) for i in modules}
    for x, labels in data.eval_batches(images, config, process):
        with models.autocast(config, process.device):
            hidden = meta.hidden_states(x)
            for i, module in modules.items():
                correct[i] += (meta.rest(i + 1, module.eval()(hidden[i])).argmax(-1) == labels).sum()
    return {i: round(100 * data.sum_over_processes(c).item() / len(images), 2) for i, c in correct.items()}


if __name__ == "__main__":
    models.run(main)
