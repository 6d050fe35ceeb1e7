"""assemble.py – puts separately trained modules together: <role>_modules/<i>.pt -> <role>_assembled.pt.

    python assemble.py --config configs/demo_nac.yaml role=teacher      after incubation (stage 2 of m2mKD)
    python assemble.py --config configs/demo_nac.yaml                   the student, after m2mKD (stage 4)

Nothing is trained here, tensors are only copied. A teacher's modules fit one another as they are. A student's module
was trained between two stitch layers, which translated from the meta model's width to its own and back:

    m2mKD    M_{i-1} ─ pre_i ─ S_i ─ post_i ─ M_{i+1}         M: meta model, S: student; pre_1 and post_L do not exist
    drop     … S_i ─ S_{i+1} …                                without stitches, finetuning has to join the modules
    keep     … S_i ─ post_i ─ pre_{i+1} ─ S_{i+1} …           both stay: S_{i+1} hears what S_i says through M's width
    fold     … S_i ─ (pre_{i+1} ∘ post_i) ─ S_{i+1} …         the same function as keep, as one affine map

(Config key distill.stitches; fold is for a NAC only: a V-MoE's stitches hold LayerNorms, too.) Every tensor of the whole
model either comes from the modules or is named here as fresh; a NAC's graph prior is fitted now. finetune.py trains the
result end to end. Right after assembly a student's accuracy is near chance: its modules have never met.
"""

import data
import models


def main():
    config, words = models.command_line(__doc__, ("student", "teacher"))
    if words.dry_run:
        return models.dry_run(config)
    process = data.setup(config["device"])
    # A copy of files: under torchrun too, one process does it.
    if process.rank == 0:
        assemble(config, words.role, words.force, process)
    data.close()


def assemble(config, role, force, process):
    stage, name = f"assemble_{role}", f"{role}_assembled.pt"
    if result := models.finished(config, stage, name, force):
        return models.say(process, f"{stage}: {result} is finished; skipped (force=true repeats it).")
    models.begin(config, process, name)
    whole = models.build(config, role)
    # A NAC's signatures, who talks to whom, are in no module: tokens of the meta model have none.
    models.say(process, models.fit_graph_prior(whole, config))

    # The modules share the whole model's parameters: reading a module's file fills its place in the whole.
    modules = models.cut(whole, config, role)
    for i, module in enumerate(modules):
        path = models.needed(config, role, "incubate" if role == "teacher" else "distill", f"{role}_modules/{i}.pt")
        models.load_weights(module, path)

    # Kept stitches are shared as well, so they are filled by now. Dropped ones were read into `modules` alone, and go
    # with them. Folded ones are made of these:
    stitches = config["distill"]["stitches"] if role == "student" else "none"
    if stitches == "fold":
        # A NAC's stitches are Linear layers with nothing in between, so two are one:
        # pre(post(h)) = W_pre (W_post h + b_post) + b_pre = (W_pre W_post) h + (W_pre b_post + b_pre)
        models.fold_stitches(whole, modules)

    # The original ignores what is missing in its files. Here what is in no module's file is found by identity and named.
    from_modules = {id(tensor) for part in (*modules, whole.stitches) for tensor in part.state_dict(keep_vars=True).values()}
    fresh = [name for name, tensor in whole.state_dict(keep_vars=True).items() if id(tensor) not in from_modules]
    if role == "student":
        whole, other = carry(whole, models.build(models.on_target(config, role), role), models.new_classes(config))
        fresh += other
    models.save_finished(config, stage, name, whole.state_dict())
    models.say(process, f"{stage}: {len(modules)} modules, stitches {stitches}; "
               f"fresh tensors: {', '.join(fresh) or 'none'}")


def carry(distilled, student, new_classes):
    """Weights of the distilled student -> the student of the target data. Returns it, and the names not carried over.

    In the paper Tiny-ImageNet's students are distilled on ImageNet, at 224 pixels: the image size and the classes differ.
    """
    source, state, fresh = distilled.state_dict(), student.state_dict(), []
    for name, tensor in state.items():
        fits = source[name].shape == tensor.shape
        # A NAC's position grid belongs to the size, a classifier to the classes: they start afresh, as in the original.
        if name.startswith("tokenizer.grid") and not fits or name.startswith(("pool.to_logits", "head.")) and new_classes:
            fresh.append(name)
        elif fits:
            state[name] = source[name]
        elif name == "pos_embed":
            # A V-MoE's are resized, as when weights from elsewhere are read.
            state[name] = models.resize_pos_embed(source[name], tensor.shape[1])
        else:
            raise models.UserError(f"{name} is {tuple(source[name].shape)} in the distilled modules and "
                                   f"{tuple(tensor.shape)} in the student on target: it cannot be carried over.")
    student.load_state_dict(state)
    return student, fresh


if __name__ == "__main__":
    models.run(main)
