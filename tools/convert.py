"""convert.py – weights from elsewhere -> the very file that a stage of this run would have written.

    python tools/convert.py --config C teacher=deit.pth              teacher.pt: no teacher is incubated
    python tools/convert.py --config C teacher_assembled=vit.pth     a fresh classifier; fine-tuning is next
    python tools/convert.py --config C student_modules=FOLDER        student_modules/0.pt …; assembly is next
    python tools/convert.py --config C student_upcycled=vit.pt       a whole V-MoE from a ViT of its shape

docs/weights.md lists the formats. deit.pth#model_ema is an entry of a file. A folder has a file for each
module; meta, teacher and teacher_assembled take one, too. Nothing in a file is executed.
"""

import argparse
import importlib
import math
import os
import re
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import models

TARGETS = {  # option: the stage that would have written the result
    "meta": "meta", "teacher": "teacher", "student": "student", "teacher_modules": "incubate",
    "student_modules": "distill", "teacher_assembled": "assemble_teacher",
    "student_assembled": "assemble_student", "student_upcycled": "assemble_student"}


def main():
    options = {target: {"metavar": "PATH"} for target in TARGETS}
    options["fresh"] = {"default": "", "help": "tensors whose names begin so stay as initialized: a,b"}
    config, words = models.command_line(__doc__, (), **options)
    begins = tuple(re.findall("[^,]+", words.fresh))
    # Everything is read and fitted before anything is written.
    results = []
    for target in TARGETS:
        if path := getattr(words, target):
            results += convert(config, target, os.path.expanduser(path), begins)
    if not results:
        raise data.UserError(f"Nothing to convert: give one of {', '.join(TARGETS)}.")
    models.begin(config, data.setup("cpu"))
    for name, file, state, class_names, imported, fresh in results:
        models.save_finished(config, name, file, state, class_names, imported=imported)
        print(f"{Path(config['output_dir'], file)}: from {imported}; fresh: {', '.join(fresh) or 'none'}")


def convert(config, target, path, begins):
    """Reads what one option names -> [(stage, file, state dict, class names, imported, fresh tensors), …]."""
    name, role = TARGETS[target], target.split("_")[0]
    files, whole = models.files(config, name), models.build(config, role)
    for old in [Path(config["output_dir"], file) for file in files]:
        if old.exists() and "imported" not in models.about(old):
            raise data.UserError(f"{old} was made by training: remove it or choose another output_dir.")
    parts, sources = [whole], [path]
    if target.endswith("modules"):
        parts, sources = models.cut(whole, config, role), module_files(path, len(files))
    elif role != "student" and Path(path).is_dir():
        parts, sources = whole.parts, module_files(path, len(whole.parts))
    done = [fit(part, source, config, target, begins) for part, source in zip(parts, sources)]
    if len(done) > len(files):
        # A folder becomes one file. The parts share the whole's parameters; the last has the classifier.
        _, class_names, _, fresh = done[-1]
        checksum = zlib.crc32(repr([imported for _, _, imported, _ in done]).encode())
        done = [(whole.state_dict(), class_names, f"{Path(path).resolve().name} {checksum:08x}", fresh)]
    return [(name, file, *one) for file, one in zip(files, done)]


def fit(model, path, config, target, begins):
    """Loads a file into a model or module -> its state dict, class names, imported, fresh tensors' names."""
    state, content, imported = read_weights(path)
    theirs = check_options(content, path, config, target.split("_")[0])
    # Classes are compared by name where both sides tell names; a foreign teacher_assembled gets new ones.
    ours = data.class_names(config["data"]) if os.path.exists(config["data"]["root"]) else None
    others = theirs != ours if theirs and ours else target == "teacher_assembled"
    classifier = ("head.", "pool.to_logits.")
    begins += classifier if others else ()
    fresh, state, own = [], translate(state, model), model.state_dict()
    for name, value in own.items():
        plain = name.removeprefix("body.")  # a student's module is between stitches
        if plain == "pos_embed" and name in state:
            state[name] = resize_pos_embed(state[name], value.shape[1])
        if isinstance(model, models.Stitched) and name.endswith("attention.bandwidth"):
            state.setdefault(name, value)  # inside the meta model there is no kernel
        dense = re.sub(r"moe\.(fc\d)_", r"mlp.\1.", name)
        if target == "student_upcycled" and dense != name and dense in state:
            # Each expert is a copy of its block's MLP (2212.05055), so at first the V-MoE answers as the ViT.
            state[name] = state[dense].expand(len(value), *state.pop(dense).shape)
        misfit = name in state and state[name].shape != value.shape
        new = plain.startswith(begins) or target == "student_upcycled" and ".moe.router." in name
        if new or misfit and plain.startswith((*classifier, "tokenizer.grid")):
            state[name] = value
            fresh.append(name)
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    if isinstance(model, models.ViT) and len(blocks) not in (0, len(model.blocks)):
        path = f"{path} ({len(blocks)} blocks, the config has {len(model.blocks)})"
    models.load_state(model, state, path)
    if fresh and target in ("meta", "teacher", "student"):
        raise data.UserError(f"{path}: {', '.join(fresh)} would start fresh, but {target}= is not trained; "
                             "with other classes or sizes use teacher_assembled=, student_assembled=.")
    names = ours or theirs or [str(k) for k in range(config["data"]["classes"])]
    # Copies, because the modules of a NAC share tensors.
    return {name: value.clone() for name, value in own.items()}, names, imported, fresh


def check_options(content, path, config, role):
    """Refuses a file that tells that it was made with other options -> its class names, if it tells them."""
    told, class_names = {"mean": None, "std": None} | (content.get("pretrained_cfg") or {}), None  # timm's
    # These change what a model computes, but no tensor's name or shape.
    keys = ["heads", "head_width"] if config[role].get("kind") == "nac" else ["heads", "eps"]
    if config[role]["experts"]:
        keys.append("top_k")
    if str(content.get("stage")) in models.STAGES and {"config", "class_names"} <= content.keys():  # ours
        then, made_as = content["config"], models.STAGES[content["stage"]][1]
        block = then.get(made_as, then["student"])  # a baseline has no block of its own
        for key in keys:
            ours = config[role][key]
            if block.get(key, ours) != ours and (key != "top_k" or block["experts"]):
                raise data.UserError(f"{path} was made with {key}={block[key]}, but {role}.{key}={ours}.")
        told = then["data"]
        class_names = content["class_names"] or content.get("settings", {}).get("data.class_names")
    else:
        data.note(f"assumed: {' '.join(f'{role}.{key}={config[role][key]}' for key in keys)}")
    for key, named in (("mean", data.MEAN), ("std", data.STD)):
        theirs, ours = (named.get(str(value), value) for value in (told.get(key), config["data"][key]))
        if isinstance(theirs, (list, tuple)) and list(theirs) != list(ours):
            raise data.UserError(f"{path} wants images with data.mean={told['mean']} data.std={told['std']}.")
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
    except Exception as e:  # pickle, zip and torch have many kinds of errors for broken files
        reason = re.split(r"\n|\. ", str(e))[0] or type(e).__name__  # EOFError has no words
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            reason = f"it holds a {code[1]}, which could run code"
        raise data.UserError(f"{path} is not a checkpoint that can be read: {reason}.") from None


def read_weights(path):
    """FILE or FILE#KEY -> the state dict, whatever wraps it, the whole content, and the text for imported."""
    file, _, entry = str(path).rpartition("#")
    if not file or Path(path).exists():  # a # in the file's name
        file, entry = str(path), ""
    content = state = read(file)
    if entry and not isinstance(content.get(entry), dict):
        raise data.UserError(f"{file} holds no {entry}, but {', '.join(map(str, content))}.")
    wrappers = ("model", "state_dict", "block_state_dict", "model_state_dict", "module")
    for key in (entry, *wrappers, *wrappers):  # also nested
        state = state[key] if isinstance(state.get(key), dict) else state
    for name, value in state.items():
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
        if not (plain and value.is_floating_point() and isinstance(name, str)):
            raise data.UserError(f"{path}: the entry {name} is not a tensor of floating-point numbers.")
    return state, content, f"{Path(path).name} {zlib.crc32(Path(file).read_bytes()):08x}"


def module_files(folder, count):
    """[a module's file, …]: files, or folders with a finished_checkpoint.pth, of one name and numbered."""
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
        raise data.UserError(f"{folder} must be a folder of modules 0 to {count - 1}, but it holds {found}.")
    return [file for _, file in whole[0]]


def resize_pos_embed(pos_embed, tokens):
    """Bicubically resizes a position grid; the class token's is kept. 1 1+N D -> 1 tokens D."""
    if pos_embed.ndim != 3 or len(pos_embed) != 1 or pos_embed.shape[1] < 2:
        return pos_embed  # the shape check will name it, as it does a grid that is not square
    old, new = (math.isqrt(count - 1) for count in (pos_embed.shape[1], tokens))
    if old == new or old * old != pos_embed.shape[1] - 1:
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid.float(), (new, new), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


# Names in the authors' files -> ours, in this order.
ORIGINAL_NAMES = [
    (r"_orig_mod\.", ""), (r"^((module|model)\.)+", ""), (r"\.moe\.gate\.gate\.", ".moe.router."),
    (r"^latent_graphs\.0\.", ""), (r"(codes|signatures)_$", r"\1"),
    (r"^latent_seeder\.", "seeder."), (r"code_to_state_", ""),
    (r"(^|\.)(read_in|latent)_attention\.", r"\1attention."), (r"attention\.kernel\.", "attention."),
    (r"(sender|receiver)_layernorm", r"\1_norm"), (r"(^|\.)layernorm\.", r"\1norm."),
    (r"_compiler\.", "."), (r"exit_layer\.", "exit."), (r"native_", ""), (r"scale_gain$", "gain"),
    (r"layer_scale\.gamma", "gamma"), (r"ffn\.ffn\.0\.", "ffn.fc1."), (r"ffn\.ffn\.2\.", "ffn.fc2."),
    (r"^(input_)?tokenizer\.(backbone|positional_grid)\.", "tokenizer."),
    (r"^(output_)?tokenizer\.(confidence_scorer|to_logits)", r"pool.\2")]


def translate(state, model):
    """A state dict with names of timm, Deep Incubation, the authors or ours -> with our names for `model`."""
    names = list(ORIGINAL_NAMES)
    # The authors keep stitches in the last block of a module and in the first of the next.
    if isinstance(model, models.ViT):
        for i, end in enumerate(np.cumsum([len(part.blocks) for part in model.parts])[:-1].tolist()):
            names.append((rf"^blocks\.{end - 1}\.post_stitch\.", f"stitches.{i}.post."))
            names.append((rf"^blocks\.{end}\.pre_stitch\.", f"stitches.{i}.pre."))
    if isinstance(model, models.Stitched) and not any(name.startswith("body.") for name in state):
        names += [("^", "body."), (r"^body\..*(pre|post)_stitch\.", r"\1_stitch.")]
        part = "propagator" if hasattr(model.body, "propagator") else "read_out"
        names.append((r"^body\.(attention|ffn)\.", rf"body.{part}.\1."))
    out = {}
    for name, value in state.items():
        # Deep Incubation keeps every tensor twice; blocks.* are the plain model.
        if re.match(r"((module|model|_orig_mod)\.)*stages\.", name):
            continue
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        if name in out:
            raise data.UserError(f"two of its tensors are called {name}: FILE#KEY takes one entry of a file.")
        out[name] = value
    # one tensor per expert, htoh4 (1, H, D) -> all experts in one, fc1 (E, H, D)
    for name in [name for name in out if ".moe.experts.0." in name]:
        rows, ours = [], name.replace("experts.0.htoh4.", "fc1_").replace("experts.0.h4toh.", "fc2_")
        while (one := name.replace(".experts.0.", f".experts.{len(rows)}.")) in out:
            rows.append(out.pop(one).squeeze(0))
        if len({row.shape for row in rows}) == 1:  # else the tensor is named as missing
            out[ours] = torch.stack(rows)
    return out


if __name__ == "__main__":
    models.run(main)
