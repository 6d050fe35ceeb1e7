"""convert.py – weights from elsewhere -> the very file that a stage of this run would have written.

    python tools/convert.py --config C teacher=deit.pth              teacher.pt: no teacher is incubated
    python tools/convert.py --config C teacher_assembled=vit.pth     a fresh classifier; fine-tuning is next
    python tools/convert.py --config C student_modules=FOLDER        student_modules/0.pt …; assembly is next
    python tools/convert.py --config C student_assembled=nac.pth     a whole student; fine-tuning is next
    python tools/convert.py --config C meta=a.pth#model_ema student=b.pt teacher_modules=FOLDER

docs/weights.md lists the formats. FILE#KEY is an entry of a file, such as EMA weights. A folder has a file
for each module; meta, teacher and teacher_assembled take one, too. Nothing in a file is executed.
"""

import argparse
import importlib
import math
import re
import reprlib
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import models
from data import UserError

TARGETS = {  # option: the stage that would have written the result
    "meta": "meta", "teacher": "teacher", "student": "student", "teacher_modules": "incubate",
    "student_modules": "distill", "teacher_assembled": "assemble_teacher",
    "student_assembled": "assemble_student"}
FINAL = ("meta", "teacher", "student")  # no training follows, so no tensor may be fresh
CLASSIFIER, GRID = ("head.", "pool.to_logits."), ("tokenizer.grid",)  # depend on classes and image size


def main():
    options = {target: {"metavar": "PATH"} for target in TARGETS}
    options["fresh"] = {"default": "", "help": "tensors whose names begin so stay as initialized: a,b"}
    config, words = models.command_line(__doc__, (), **options)
    more = tuple(filter(None, words.fresh.split(",")))
    chosen = {target: path for target, path in vars(words).items() if target in TARGETS and path}
    if not chosen:
        raise UserError(f"Nothing to convert: give one of {', '.join(TARGETS)}, such as teacher=FILE.")
    # Everything is read and fitted before anything is written.
    results = []
    for target, path in chosen.items():
        if more and target in FINAL:
            raise UserError(f"fresh= is not for {target}=: no training follows.")
        results += convert(config, target, models.expand_home(path), more)
    every = [name.removeprefix("body.") for *_, fresh in results for name in fresh]
    for begin in more:
        if not any(name.startswith(begin) for name in every):
            raise UserError(f"fresh={begin}: no tensor's name begins so.")
    models.begin(config, data.setup("cpu"))
    for name, file, state, class_names, imported, fresh in results:
        models.save_finished(config, name, file, state, class_names, imported=imported)
        count = sum(tensor.numel() for tensor in state.values())
        print(f"{Path(config['output_dir'], file)}: from {imported}, {count:,} parameters; "
              f"fresh: {', '.join(fresh) or 'none'}")


def convert(config, target, path, more=()):
    """Reads what one option names -> [(stage, file, state dict, class names, imported, fresh tensors), …]."""
    name = TARGETS[target]
    role = models.STAGES[name][1]
    files, whole = models.files(config, name), models.build(config, role)
    for file in files:
        there = Path(config["output_dir"], file)
        if there.exists() and "imported" not in models.about(there):
            raise UserError(f"{there} was made by training: remove it or choose another output_dir.")
    if target.endswith("modules"):
        parts = zip(models.cut(whole, config, role), module_files(path, len(files)), files)
        return [(name, file, *fit(part, source, config, target, more)) for part, source, file in parts]
    if role == "student" or not Path(path).is_dir():
        return [(name, files[0], *fit(whole, path, config, target, more))]
    # A folder becomes one file. The parts share the whole model's parameters; the last has the classifier.
    sources = module_files(path, len(whole.parts))
    done = [fit(part, source, config, target, more) for part, source in zip(whole.parts, sources)]
    _, class_names, _, fresh = done[-1]
    checksum = zlib.crc32(repr([imported for _, _, imported, _ in done]).encode())
    imported = f"{Path(path).resolve().name} {checksum:08x}"
    return [(name, files[0], whole.state_dict(), class_names, imported, fresh)]


def fit(model, path, config, target, more=()):
    """Loads a file into a model or module -> its state dict, class names, imported, fresh tensors' names."""
    state, content, imported = read_weights(path)
    theirs = check_options(content, path, config, models.STAGES[TARGETS[target]][1])
    state, own = translate(state, model), model.state_dict()
    for name, value in own.items():
        if name.endswith("pos_embed") and name in state:
            state[name] = resize_pos_embed(state[name], value.shape[1])
        if isinstance(model, models.Stitched) and name.endswith("attention.bandwidth"):
            state.setdefault(name, value)  # inside the meta model there is no kernel

    # Classes are compared by name where both sides tell names, else by number. A teacher of other people that
    # will be fine-tuned never keeps its classifier.
    root = config["data"]["root"]
    ours = data.class_names(config["data"]) if root and Path(root).exists() else None
    others = theirs != ours if theirs and ours else target == "teacher_assembled"
    if others and target in FINAL:
        raise UserError(f"{path} knows the classes {reprlib.repr(theirs)}, the data has {reprlib.repr(ours)}."
                        " teacher_assembled= and student_assembled= make a fresh classifier.")
    begin = {name: name.removeprefix("body.") for name in own}  # a student's module is between stitches
    head = [name for name in own if begin[name].startswith(CLASSIFIER)]
    differ = [name for name in own if name in state and state[name].shape != own[name].shape]
    fresh = [name for name in differ if begin[name].startswith(CLASSIFIER + GRID) and target not in FINAL]
    fresh += [name for name in head if others and name not in fresh]
    fresh += [name for name in own if more and begin[name].startswith(more) and name not in fresh]
    try:
        models.load_state(model, state | {name: own[name] for name in fresh}, path)
    except UserError as e:
        if not isinstance(model, models.ViT):
            raise
        raise UserError(f"{e} (The file has {blocks_in(state)}, the config's model {blocks_in(own)}. With "
                        "other classes, use teacher_assembled= or student_assembled=.)") from None
    kept = head and not {*head} & {*fresh}
    class_names = kept and theirs or ours or [str(k) for k in range(config["data"]["classes"])]
    # Copies, because the modules of a NAC share tensors.
    return {name: value.clone() for name, value in own.items()}, class_names, imported, fresh


def blocks_in(state):
    """How many blocks of which width a ViT's state dict has, in words."""
    widths = [len(value) for name, value in state.items() if re.search(r"blocks.*norm1\.weight", name)]
    return f"{len(widths)} blocks of width {max(widths, default=0)}"


def check_options(content, path, config, role):
    """Refuses a file that tells that it was made with other options -> its class names, if it tells them."""
    options, told, class_names = config[role], content.get("pretrained_cfg"), None  # timm's
    # These change what a model computes, but no tensor's name or shape.
    unseen = ["heads", "eps", "top_k"] if options["experts"] else ["heads", "eps"]
    if options.get("kind") == "nac":
        unseen = ["heads", "head_width"]
    if str(content.get("stage")) in models.STAGES:  # one of our files
        then, made_as = content["config"], models.STAGES[content["stage"]][1]
        block = then.get(made_as, then["student"])  # a baseline has no block of its own
        for key in unseen:
            if block.get(key, options[key]) != options[key]:
                raise UserError(f"{path} was made with {key}={block[key]}, but {role}.{key}={options[key]}.")
        told = then["data"]
        class_names = content["class_names"] or content.get("settings", {}).get("data.class_names")
    else:
        data.note(f"assumed: {' '.join(f'{role}.{key}={options[key]}' for key in unseen)}")
    for key, named in (("mean", data.MEAN), ("std", data.STD)) if isinstance(told, dict) else ():
        theirs, ours = (named.get(str(value), value) for value in (told.get(key), config["data"][key]))
        if isinstance(theirs, (list, tuple)) and list(theirs) != list(ours):
            raise UserError(f"{path} wants images with data.mean={told['mean']} data.std={told['std']}: set "
                            f"both, because data.{key} is {config['data'][key]}.")
    return class_names


# ---------- Files

# What checkpoints hold beside tensors: arguments, and numpy's numbers.
HARMLESS = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in np.typecodes["All"])]
HARMLESS += [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def read(path):
    """A checkpoint's content. Nothing in it is executed."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch does not compare checksums
                if bad := archive.testzip():
                    raise ValueError(f"the checksum of its record {bad} is wrong")
        if Path(path).suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except Exception as e:  # pickle, zip and torch each have errors of their own for a broken or foreign file
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise UserError(f"{path} holds a {code[1]}, which could run code.") from None
        reason = re.split(r"\n|\. ", str(e))[0] or type(e).__name__  # EOFError has no words
        raise UserError(f"{path} is not a checkpoint that can be read: {reason}.") from None


def read_weights(path):
    """FILE or FILE#KEY -> the state dict, whatever wraps it, the whole content, and the text for imported."""
    file, _, entry = str(path).rpartition("#")
    if not file or Path(path).exists():  # a # in the file's name
        file, entry = str(path), ""
    content = state = read(file)
    if entry:
        if entry not in content:
            raise UserError(f"{file} holds no {entry}, but {', '.join(map(str, content))}.")
        state = content[entry]
    for key in ("model", "state_dict", "block_state_dict", "model_state_dict", "module") * 2:  # also nested
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict, but a {type(state).__name__}.")
    for name, value in state.items():
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
        if not (dense and value.is_floating_point()):
            raise UserError(f"{path}: the entry {name} is not a dense tensor of floating-point numbers.")
    name = Path(path if entry else file).name
    return state, content, f"{name} {zlib.crc32(Path(file).read_bytes()):08x}"


def module_files(folder, count):
    """[a module's file, …] of a folder: files, or folders with a finished_checkpoint.pth, of one name that
    ends in the modules' numbers: 0.pt …; ReadInStudent.pth, MediatorStudent_1.pth …, ReadOutStudent.pth.
    """
    series = {}  # name without number: [(number, file)]
    for file in [*Path(folder).glob("*.pt*"), *Path(folder).glob("*/finished_checkpoint.pt*")]:
        name = file.parent.name if file.stem == "finished_checkpoint" else file.stem
        name = name.replace("ReadInStudent", "MediatorStudent_0")
        name = name.replace("ReadOutStudent", f"MediatorStudent_{count - 1}")
        if number := re.search(r"\d+$", name):
            series.setdefault(name[:number.start()], []).append((int(number[0]), file))
    whole = [files for files in map(sorted, series.values()) if [i for i, _ in files] == list(range(count))]
    if len(whole) != 1:
        found = sorted(f"{name}{i}" for name, files in series.items() for i, _ in files)
        raise UserError(f"{folder} must hold one file for each of the modules 0 to {count - 1}, but it holds "
                        f"{found}.")
    return [file for _, file in whole[0]]


def resize_pos_embed(pos_embed, tokens):
    """Bicubically resizes a position grid; the class token's is kept. 1 1+N D -> 1 tokens D."""
    places = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 and len(pos_embed) == 1 else 0
    old, new = math.isqrt(max(places, 0)), math.isqrt(tokens - 1)
    if old == new or not old or old * old != places or new * new != tokens - 1:
        return pos_embed  # not a square grid: the shape check will name it
    grid = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), (new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


# Names in the authors' files -> ours, in this order.
ORIGINAL_NAMES = [(re.compile(pattern), ours) for pattern, ours in [
    (r"_orig_mod\.", ""), (r"^((module|model)\.)+", ""), (r"^latent_graphs\.0\.", ""),
    (r"(codes|signatures)_$", r"\1"),
    (r"^latent_seeder\.", "seeder."), (r"code_to_state_", ""),
    (r"(^|\.)(read_in|latent)_attention\.", r"\1attention."), (r"attention\.kernel\.", "attention."),
    (r"(sender|receiver)_layernorm", r"\1_norm"), (r"(^|\.)layernorm\.", r"\1norm."),
    (r"_compiler\.", "."), (r"exit_layer\.", "exit."), (r"native_", ""), (r"scale_gain$", "gain"),
    (r"layer_scale\.gamma", "gamma"), (r"ffn\.ffn\.0\.", "ffn.fc1."), (r"ffn\.ffn\.2\.", "ffn.fc2."),
    (r"^(input_)?tokenizer\.(backbone|positional_grid)\.", "tokenizer."),
    (r"\.moe\.gate\.gate\.", ".moe.router."),
    (r"^(output_)?tokenizer\.(confidence_scorer|to_logits)", r"pool.\2"),
]]


def translate(state, model):
    """A state dict with names of timm, Deep Incubation, the authors or ours -> with our names for `model`."""
    out = {}
    for name, value in state.items():
        for pattern, ours in ORIGINAL_NAMES:
            name = pattern.sub(ours, name)
        # Deep Incubation keeps every tensor twice; blocks.* are the plain model.
        if isinstance(model, models.NAC) or not name.startswith("stages."):
            out[name] = value
    # one tensor per expert, htoh4 (1, H, D) -> all experts in one, fc1 (E, H, D)
    for name in [name for name in out if ".moe.experts.0." in name]:
        rows, ours = [], name.replace("experts.0.htoh4.", "fc1_").replace("experts.0.h4toh.", "fc2_")
        while (one := name.replace(".experts.0.", f".experts.{len(rows)}.")) in out:
            rows.append(out.pop(one).squeeze(0))
        if len({row.shape for row in rows}) == 1:  # else the tensor is named as missing
            out[ours] = torch.stack(rows)
    # The authors keep stitches in the last block of a module and in the first of the next.
    if isinstance(model, models.ViT):
        for i, end in enumerate(np.cumsum([len(part.blocks) for part in model.parts])[:-1].tolist()):
            rename(out, f"blocks.{end - 1}.post_stitch.", f"stitches.{i}.post.")
            rename(out, f"blocks.{end}.pre_stitch.", f"stitches.{i}.pre.")
    if isinstance(model, models.Stitched) and not any(name.startswith("body.") for name in out):
        rename(out, "", "body.")
        for name in list(out):
            if stitch := re.search(r"(pre|post)_stitch\..*", name):
                out[stitch[0]] = out.pop(name)
        for part in ("propagator", "read_out"):
            if hasattr(model.body, part):
                rename(out, "body.attention.", f"body.{part}.attention.")
                rename(out, "body.ffn.", f"body.{part}.ffn.")
    return out


def rename(state, old, new):
    """Replaces a prefix of names in a state dict, in place."""
    for name in [name for name in state if name.startswith(old)]:
        state[new + name[len(old):]] = state.pop(name)


if __name__ == "__main__":
    models.run(main)
