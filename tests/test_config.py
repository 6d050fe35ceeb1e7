"""Promises of a config: what it is read as, what is refused, and what its keys do in training."""

import json
import math
import os
import random

import pytest
import torch
import yaml

import data
import models
from conftest import ROOT, run_main
from models import UserError

STAGES = ("meta", "incubate", "teacher", "distill", "student")
CONFIG = """
device: cpu
data: {root: set.npz, image_size: 16, classes: 4, train_images: 32, validation_images: 8, workers: 0}
meta: {patch: 8, width: 16, heads: 2}
teacher: {patch: 8, width: 16, heads: 2}
student: {width: 16, heads: 2, head_width: 8, latents: [4, 16, 2], propagators: 1}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with c.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def read(here):
    """Reads the config with overrides, or another YAML text."""
    def read(*overrides, text=CONFIG):
        (here / "c.yaml").write_text(text)
        return models.load_config("c.yaml", ["data.classes=24", *overrides])
    return read


@pytest.fixture
def call(glyphs):
    """Runs a script's main() on the config and a set -> its exit code."""
    words = ["--config", "c.yaml", f"data.root={glyphs}", "data.classes=24", "train.*.batch=16"]
    return lambda script, *more: run_main(script, *words, *more)


def refused(names, *words, path="c.yaml"):
    """The config must be refused with a sentence that holds each of the names -> the sentence."""
    with pytest.raises(UserError) as refusal:
        models.load_config(path, words)
    text = " ".join(str(refusal.value).split())  # as models.run prints it
    assert all(name in text for name in ([names] if isinstance(names, str) else names)), text
    return text


# ---------- 1 What a config is read as

TEXTS = ["a #3", "2024-05-01", "12:30", "010", "0x1f", "1e3", "5", "true", "a: b", "a, b", "'quoted'", "é",
         "*x", "yes", ".inf", "~x", "{a: 1}", "a=b", " a", "#"]


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_text_is_taken_as_it_stands(read, text):
    config = read(f"output_dir={text}", f"data.root={text}", f"share={text}")
    assert config["output_dir"] == config["data"]["root"] == config["share"] == text


def test_the_home_folder_is_expanded_and_null_is_nothing(read):
    home = os.environ["HOME"]
    assert read("output_dir=~/x")["output_dir"] == f"{home}/x"
    assert read("share=[~/x,y]")["share"] == [f"{home}/x", "y"] and read("share=null")["share"] is None
    assert read("output_dir=null")["output_dir"] == "runs/c"


@pytest.mark.parametrize("text", ["2024-05-01", "12:30", "010", "yes", "0x1f", "1_000", "a#3", "'7'"])
def test_a_text_in_the_file_stays_a_text_too(read, text):
    assert read(text=f"data: {{root: {text}}}")["data"]["root"] == text.strip("'")


def test_numbers_are_decimal_and_nothing_else_is_one(read):
    for text, value in (("5e-4", 5e-4), ("1.", 1), (".5", 0.5), ("2", 2), ("+2", 2), ("1e0", 1)):
        assert read(f"train.meta.lr={text}")["train"]["meta"]["lr"] == value
    for text in ("010", "0x1f", "0b1", "1_000", "1:30", "'8'", "2024-05-01"):
        with pytest.raises(UserError, match="seed=.* is not allowed: it must be int"):
            read(f"seed={text}")
    for text in ("yes", "on", "True", "1"):
        with pytest.raises(UserError, match="compile=.* must be true or false"):
            read(f"compile={text}")


@pytest.mark.parametrize("text", ["data:", "data: {}", "data: ~", "train:\n  meta:\n", "few_shot:\nteacher:"])
def test_an_emptied_block_means_its_defaults_and_each_default_is_a_new_value(read, text):
    plain = read(text="{}")
    plain["data"]["robustness"].append("renditions")
    plain["meta"]["depths"].append(1)
    emptied = read(text=text)
    assert emptied == read(text="{}")
    assert emptied["data"]["robustness"] == [] and emptied["meta"]["depths"] == [1, 1, 1]


def test_a_star_sets_the_key_in_every_stage_and_the_last_override_counts(read):
    train = read("train.*.epochs=1", "train.meta.epochs=7", "train.*.lr=0.25", "*.alpha=0.75")["train"]
    assert {stage: train[stage]["epochs"] for stage in STAGES} == {s: 7 if s == "meta" else 1 for s in STAGES}
    assert all(train[stage]["lr"] == 0.25 for stage in STAGES) and train["student"]["alpha"] == 0.75


# ---------- 2 What is refused

# override(s): what the sentence must name (key, value or what is allowed). First each kind of value, then
# what must fit together.
BAD_OVERRIDES = [
    ("distill.alpa=1", ["distill.alpa", "distill.alpha"]), ("train.meta.epoch=1", "train.meta.epochs"),
    ("alpha=1", ["alpha", "distill.alpha"]), ("train=1", "train"), ("=1", "--help"), ("force=true", "force"),
    ("seed", ["'seed'", "override"]), ("train.*.epoch=1", "train.*.epoch"), ("share=[1", "share=[1"),
    ("data.image_size=0", ["data.image_size=0", "int from 1 to 4096"]),
    ("data.image_size=big", ["big", "int"]), ("data.image_size=16.5", "16.5"),
    ("data.flip=2", ["data.flip=2", "float from 0 to 1"]), ("data.flip=yes", "data.flip='yes'"),
    ("data.resized_crop=0.5", "[float from 0 to 1, float from 0 to 1] or null"),
    ("data.resized_crop=[0.1]", "data.resized_crop"), ("data.mixup=-1", "float from 0"),
    ("data.mixup=.nan", "data.mixup"), ("data.cutmix=.inf", "data.cutmix"),
    ("data.robustness=renditions", "a list of a text"), ("data.std=[1, 1]", "data.std"),
    ("data.mean=imagenet21k", "imagenet or half or [float"), ("data.std=null", "data.std"),
    ("seed=123456789012345678901234567890", "seed"), ("device=gpu", "auto or cpu or cuda or mps"),
    ("precision=fp16", ["fp16", "bfloat16"]), ("compile=1", "true or false"),
    ("meta.depths=[]", "meta.depths"), ("meta.depths=3", "a list of int from 1 to 1000"),
    ("student.kind=cnn", ["cnn", "must be nac or vmoe"]), ("student.latents=[4, 16]", "student.latents"),
    ("distill.kind=medium", "it must be soft or hard"), ("train.meta.lr=fast", "train.meta.lr='fast'"),
    ("output_dir=" + "x" * 300, "output_dir"), ("output_dir=a\0b", "output_dir"), ("share=a\0b", "share"),
    ("meta.heads=3", ["meta.width=16", "meta.heads=3"]), ("meta.depths=[1, 1]", ["meta.depths", "2"]),
    ("meta.width=32", ["teacher.width=16", "meta.width=32"]), ("student.kind=vmoe", "student.experts"),
    (["student.kind=vmoe", "student.experts=1"], "student.top_k=2"),
    (["student.kind=vmoe", "student.experts=2", "student.moe_blocks=[3]"], "student.moe_blocks"),
    (["student.kind=vmoe", "student.experts=2", "assemble.stitches=fold"], "assemble.stitches=fold"),
    ("student.propagators=2", "student.propagators=2"), ("student.width=18", "student.width=18"),
    (["assemble.graph=ring_of_cliques", "assemble.graph_groups=9"], "graph_groups"),
    (["assemble.graph=scale_free", "assemble.graph_m=16"], "graph_m"),
    (["assemble.graph=planted_partition", "train.student.block_groups=9"], "block_groups"),
    # what no memory holds, or would take hours to be found out
    ("meta.depths=[2000000000, 1, 1]", "meta.depths"), ("meta.width=2000000000", "meta.width"),
    ("student.tokenizer_blocks=100000000", "student.tokenizer_blocks"), ("data.workers=100000", "256"),
    ("student.latents=[4, 1000000000, 2]", "student.latents"), ("data.classes=2000000000", "data.classes"),
    ("student.capacity=1e20", "student.capacity"),
]


@pytest.mark.parametrize("words, names", BAD_OVERRIDES, ids=lambda words: ascii(words)[:40])
def test_a_bad_override_is_one_sentence(words, names):
    refused(names, *([words] if isinstance(words, str) else words))


# A key of former versions, and where the nearest one is.
GONE = {"data.set=glyphs": "data.", "target.set=cub": "", "teacher.depth=12": "teacher.depths",
        "teacher.checkpoint=t.pt": "teacher."}


@pytest.mark.parametrize("word", GONE)
def test_a_key_that_is_gone_is_refused_by_name_with_the_nearest(here, word):
    key, _, value = word.partition("=")
    near = refused(f"{key} is not a key; the nearest is ", word).split()[-1].strip(".")
    assert near in models.KEYS and near.startswith(GONE[word]), near
    block, name = key.split(".")
    (here / "old.yaml").write_text(f"{block}: {{{name}: {value}}}")
    refused(f"{key} is not a key", path="old.yaml")


def test_what_differs_in_long_lists_is_shown():
    assert data.differing("key", list("abcdefgh"), list("abcdefgx")) == ("key[7]", "'h'", "'x'")
    assert data.differing("key", [*range(9)], [*range(8)]) == ("key[8]", "8", "None")
    assert data.differing("key", [1], [2]) == ("key", "[1]", "[2]")


def test_models_that_do_not_fit_the_image_are_named():
    for role, word in (("meta", "meta.patch=5"), ("student", "data.image_size=20")):
        with pytest.raises(UserError, match=f"data.image_size=.* is not a multiple of .*{role}"):
            models.build(models.load_config("c.yaml", [word]), role)


LAUGHS = [b"%c: &%c [%s]\n" % (k, k, b"*%c, " % (k - 1) * 9) for k in range(98, 122)]
BAD_CONFIGS = {  # a file: what the sentence must name
    "an empty file": (b"", "c.yaml"), "a list": (b"- a\n- b\n", "c.yaml"), "text": (b"hello", "c.yaml"),
    "binary": (b"\xff\xfe\x00\x9f", "c.yaml"), "a control character": (b"seed: \x07", "c.yaml"),
    "bad indentation": (b"seed: 1\n  data: 2\n", "c.yaml"), "tabs": (b"data:\n\troot: a", "c.yaml"),
    "an open bracket": (b"data: {root: a", "c.yaml"), "an impossible date": (b"seed: 2024-13-45", "seed"),
    "python objects": (b"seed: !!python/object/apply:os.system ['touch pwned']", "c.yaml"),
    "itself": (b"data: &a {root: a, more: *a}", "c.yaml"), "a date": (b"seed: 2024-01-01", "seed"),
    "deep nesting": (b"seed: " + b"[" * 3000, "c.yaml"),
    "a key twice": (CONFIG.encode() + b"meta: {}", "meta stands twice"),
    "a key in two spellings": (CONFIG.encode() + b"meta.width: 16", "meta.width stands twice"),
    "an unknown block": (CONFIG.encode() + b"trian: {meta: {epochs: 1}}\n", "trian"),
    "a number for a block": (b"train: 3", "train"), "a block for a number": (b"seed: {a: 1}", "seed.a"),
    "a list as key": (b"[1, 2]: 3", "c.yaml"), "a number as key": (b"1: 2", "1"),
    "a null key": (b"~: 2", "None"), "a billion laughs": (b"a: &a [x]\n" + b"".join(LAUGHS), "a"),
    "a list for a block": (b"data: [1]", "data"), "an enormous number": (b"seed: 1" + b"0" * 5000, "c.yaml"),
    "a set": (b"meta: !!set {depths}", "meta"), "an empty key": (b"data:\n  flop:\n", "data.flop is"),
    "a long whole number for lr": (b"train: {meta: {lr: 1" + b"0" * 400 + b"}}", "train.meta.lr"),
    "bytes": (b"output_dir: !!binary aGVsbG8=", "output_dir"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_a_bad_config_is_one_sentence(here, what):
    content, names = BAD_CONFIGS[what]
    (here / "c.yaml").write_bytes(content)
    refused(names)
    assert not (here / "pwned").exists()


def test_a_runs_own_config_means_its_own_folder_wherever_it_is(here):
    assert models.load_config("c.yaml")["output_dir"] == "runs/c"
    (here / "moved").mkdir()
    (here / "moved/config.yaml").write_text(yaml.safe_dump(models.load_config("c.yaml")))
    assert models.load_config("moved/config.yaml")["output_dir"] == "moved"
    (here / "config.yaml").write_text(CONFIG + "output_dir: mine\n")  # the user's, of that name
    assert models.load_config("config.yaml")["output_dir"] == "mine"
    assert models.load_config("moved/config.yaml", ["output_dir=new"])["output_dir"] == "new"


def test_classes_are_counted_unless_they_are_given(glyphs):
    words = [f"data.root={glyphs}", "data.image_size=8"]
    assert models.load_config("c.yaml", [*words, "data.classes=null"])["data"]["classes"] == 24
    assert models.load_config("c.yaml", ["data.root=not here"])["data"]["classes"] == 4
    refused("python tools/prepare.py cub data/cub", "data.root=data/cub", "data.classes=null")
    with pytest.raises(UserError, match="data.classes=4, but data.root=.*glyphs.npz has 24 classes"):
        data.load(models.load_config("c.yaml", words), "test")


VALUES = [
    "2147483647", "1000000", "1000", "", "0", "1", "-1", "2", "3", "7", "0.5", "-0.5", "1e-3", "1e308",
    "-1e308", "1e999", "10" * 200, ".nan", ".inf", "true", "null", "~", "[]", "[1]", "[1, 2]", "[1, 1, 1]",
    "[0.1, 0.9]", "[null]", "[[1]]", "{}", "{a: 1}", "text", "'", '"', "!!binary x", "*a", "&a", "&a [*a]",
    "2024-13-01", "12:30:45", "0x1f", "!!python/none", "\x00", "é", "- 1", "? ", "|", ">", "%", "@", "`", "#",
    "a: b: c", "!!float x", "!!int ''", "!!timestamp x", "!!set 3", "<<", "=", "vmoe", "auto", "bfloat16",
    "keep", "fold"]


def mutate(text, rng):
    """A text with a few random pieces changed, moved, doubled or lost."""
    for _ in range(rng.randint(1, 3)):
        a = rng.randrange(len(text) + 1)
        b = min(len(text), a + rng.choice([1, 1, 2, 5, 20]))
        text = rng.choice([text[:a] + rng.choice(VALUES) + text[b:], text[:a] + text[b:],
                           text[:b] + text[a:b] + text[b:], text[:a] + text[b:] + text[a:b],
                           text[:a] + rng.choice("{}[]:,-#&*!|>'\"%@` \n\t01") + text[b:]])
    return text


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_mutation_of_configs_or_overrides_gives_a_traceback(here, count):
    """Each is read and checked, and every model is built, on no memory."""
    rng, good = random.Random(1), 0
    texts = [CONFIG] + [path.read_text() for path in sorted((ROOT / "configs").glob("*.yaml"))]
    for k in range(count):
        text, words = CONFIG, []
        if k % 2:
            text = mutate(rng.choice(texts), rng)
        else:
            words = rng.choices(list(models.KEYS), k=rng.randint(1, 2))
            words = [f"{word}={rng.choice(VALUES)}" for word in words]
            words = [mutate(word, rng) if rng.random() < 0.3 else word for word in words]
        (here / "c.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
        try:
            config = models.load_config("c.yaml", ["data.classes=24", *words])
            with torch.device("meta"):
                for role in ("meta", "teacher", "student"):
                    models.build(config, role)
            good += 1
        except UserError:
            pass
        except Exception as error:
            raise AssertionError((k, words, text)) from error
    assert 0.05 * count < good < 0.9 * count  # the mutations are neither all harmless nor all fatal


# ---------- 3 What its keys do in training


def test_learning_rate_by_hand(read):
    c = read("train.*.lr=1e-3", "train.*.warmup=2", "train.*.epochs=10")["train"]["meta"]

    def rate(step, **changes):  # 5 steps per epoch; peak 1e-3 · 1024/512
        return models.learning_rate(step, 5, {**c, **changes}, total_batch=1024)

    assert rate(0) == 1e-6
    assert rate(5) == pytest.approx(1e-6 + (2e-3 - 1e-6) / 2)  # half of the 10 warm-up steps
    assert rate(10) == pytest.approx(2e-3)
    # A quarter of the 40 others: cos 45°
    assert rate(20) == pytest.approx(1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + math.sqrt(0.5)))
    assert rate(30) == pytest.approx((2e-3 + 1e-5) / 2)
    assert rate(50) == pytest.approx(1e-5)
    assert rate(50, scale_min_lr=True) == pytest.approx(2e-5)
    assert rate(10, scale_min_lr=True) == pytest.approx(2e-3)
    assert rate(0, warmup=0) == pytest.approx(2e-3)
    assert rate(1, warmup=0.4) == pytest.approx((1e-6 + 2e-3) / 2)  # warm-up of 2 steps
    # timm's warmup_prefix=False: the cosine runs from step 0, and the warm-up replaces its first part.
    assert rate(5, warmup_prefix=False) == rate(5)
    for step in (10, 30, 50):
        cosine = math.cos(math.pi * step / 50)
        assert rate(step, warmup_prefix=False) == pytest.approx(1e-5 + 0.5 * (2e-3 - 1e-5) * (1 + cosine))


def test_optimizer_does_not_decay_biases_norms_and_embeddings():
    model = models.ViT(16, 4, width=8, heads=2, depths=[1, 1], classes=3, moe=dict(experts=2))
    model.head.requires_grad_(False)
    c = dict(lr=1e-3, weight_decay=0.05, decay_all=False, betas=[0.9, 0.999])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = models.optimizer(model, c).param_groups
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    decayed = {"patch_embed.proj.weight"} | {f"blocks.{k}.{name}" for k in (0, 1) for name in (
        "attn.qkv.weight", "attn.proj.weight", "moe.router.weight", "moe.fc1_weight", "moe.fc2_weight")}
    assert groups[0.05] == decayed
    assert groups[0.0] == set(names.values()) - decayed - {"head.weight", "head.bias"}
    everything = models.optimizer(model, {**c, "decay_all": True}).param_groups
    assert [group["weight_decay"] for group in everything] == [0.05]
    assert len(everything[0]["params"]) == len(names) - 2


def test_a_stage_has_its_block_and_a_baseline_the_students_without_its_alpha(read):
    c = read("distill.alpha=0.25", "train.student.alpha=0.75", "train.student.epochs=5",
             "train.baseline_epochs=9")
    stages = {name: models.schedule(c, name) for name in (*STAGES, "baseline", "baseline_kd")}
    assert {name: s["alpha"] for name, s in stages.items()} == {
        "meta": 0, "incubate": 0, "teacher": 0, "distill": 0.25, "student": 0.75, "baseline": 0,
        "baseline_kd": 0.25}
    assert [stages[name]["epochs"] for name in ("student", "baseline", "baseline_kd")] == [5, 9, 9]
    assert {stages[name]["block"] for name in ("student", "baseline", "baseline_kd")} == {"student"}
    assert models.schedule(read("train.student.epochs=5"), "baseline")["epochs"] == 5


def test_assembly_names_what_is_in_no_modules_file_and_folded_stitches_are_in_them(call, tmp_path, capsys):
    words = ["train.*.epochs=0", "distill.alpha=0", "assemble.stitches=fold"]
    assert call("finetune", "role=meta", *words) == call("distill_module", *words) == 0
    capsys.readouterr()
    assert call("assemble", *words) == 0
    names = capsys.readouterr().out.strip().split("as initialized: ")[1].split(", ")
    assert names == [*(f"{kind}_latents.signatures" for kind in ("input", "mediator", "output")),
                     *(f"{part}.attention.bandwidth" for part in ("propagators.0", "read_out"))]
    assert "stitches.1.weight" in models.read(tmp_path / "runs/c/student_assembled.pt")["model"]


@pytest.mark.parametrize("value, clip", [(torch.nan, 0), (torch.inf, 1), (1e25, 0), (3e38, 0), (1e25, 1)])
@pytest.mark.parametrize("stage", ["meta", "incubate"])
def test_a_gradient_that_overflows_is_never_saved(call, tmp_path, capsys, monkeypatch, value, clip, stage):
    """The square of 1e25 is infinite in AdamW: unseen, the parameter would never move again."""
    words = ["train.*.epochs=0", f"train.{stage}.epochs=1", f"train.{stage}.clip={clip}"]
    script, role, name = "finetune", "role=meta", "meta.pt"
    if stage == "incubate":
        assert call(script, role, *words) == 0
        script, role, name = "distill_module", "role=teacher", "teacher_modules/0.pt"
    step = models.Stage.step

    def overflow(self):
        module = next(iter(self.modules.values()))
        next(p.grad for p in module.parameters() if p.grad is not None).view(-1)[0] = value
        step(self)

    monkeypatch.setattr(models.Stage, "step", overflow)
    code = call(script, role, *words)
    file, error = tmp_path / "runs/c" / name, capsys.readouterr().err
    if value == 1e25 and clip:  # the norm is infinite too, so the clipped step is one of zeros
        assert code == 0 and all(v.isfinite().all() for v in models.read(file)["model"].values())
        return
    assert code == 2 and "not finite" in error and "step" in error
    assert not file.exists() and not list((tmp_path / "runs/c").rglob("*unfinished.pt"))


def gradients(call, model, images):
    """[output, gradient of each parameter, …] of a call of a model or of what was compiled of it."""
    torch.manual_seed(1)
    model.zero_grad()
    logits = call(images)
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def test_a_nac_compiles_into_one_graph_and_its_evaluation_into_none(monkeypatch):
    compiler, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", lambda model, **more: compiler(model, backend="eager", **more))
    torch.compiler.reset()
    counters.clear()
    model = models.NAC(16, 16, 2, 8, (4, 8, 2), 1, 3, grid_width=4, tokenizer_blocks=1, signature_width=8)
    models.set_drop_path(model.train(), 0.2)
    compiled, images = models.compile_blocks(model), torch.randn(3, 3, 16, 16)
    for eager, other in zip(gradients(model, model, images), gradients(compiled, model, images)):
        assert torch.equal(eager, other)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for batch in (3, 2, 1):
        model.eval()(images[:batch])
    gradients(compiled, model.train(), images)
    assert counters["stats"]["unique_graphs"] == 1


def test_blocks_of_ten_modules_and_their_hybrids_are_all_compiled(monkeypatch):
    """Depths and batches differ, some are frozen, some run without gradients: within torch's eight times."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    meta, teacher, student = (models.ViT(16, 8, 8, 2, depths, 3, mlp_ratio=1)
                              for depths in ([1] * 10, [2] + [1] * 8 + [2], [1] * 10))
    models.set_drop_path(student, 0.1)
    for frozen in (meta, teacher):
        models.compile_blocks(frozen.requires_grad_(False).eval())
    models.compile_blocks(student.train())
    images = torch.randn(4, 3, 16, 16)
    for i, module in enumerate(student.parts):
        with torch.no_grad():
            hidden = meta.hidden_states(images)
            meta.rest(i + 1, teacher.parts[i](hidden[i]))
        meta.rest(i + 1, module(hidden[i]))
        with torch.no_grad():
            meta.rest(i + 1, module.eval()(hidden[i][:3]))
    counters = torch._dynamo.utils.counters
    assert 0 < counters["frames"]["total"] == counters["frames"]["ok"], counters
    assert not counters["unimplemented"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nac", "vmoe"])
def test_compiled_modules_train_to_the_same_weights(call, tmp_path, kind):
    """Without drop path, because compiled code draws other random numbers."""
    weights = []
    for compiled in ("false", "true"):
        words = [f"student.kind={kind}", "student.experts=4", "train.*.epochs=1", "distill.alpha=0",
                 f"compile={compiled}", f"output_dir={compiled}"]
        assert call("finetune", "role=meta", *words) == 0
        for role in ("teacher", "student"):
            assert call("distill_module", f"role={role}", *words) == 0
        files = ["meta.pt", *(f"teacher_modules/{i}.pt" for i in range(3))]
        files += [f"student_modules/{i}.pt" for i in range(3) if kind == "vmoe"]  # a NAC's codes are shaken
        states = [models.read(tmp_path / compiled / file)["model"].values() for file in files]
        weights.append([torch.cat([value.flatten() for value in state]) for state in states])
    for eager, compiled in zip(*weights):
        assert (eager - compiled).norm() < 1e-3 * eager.norm()


@pytest.mark.slow
def test_bfloat16_and_float32_agree_on_the_demo(tmp_path):
    """Validation top-1 of the demo's meta model, after 8 epochs."""
    top1, root = {}, tmp_path / "glyphs.npz"
    assert run_main("tools/prepare", "glyphs", root) == 0
    for precision in ("float32", "bfloat16"):
        words = ["train.meta.epochs=8", f"precision={precision}", f"output_dir={tmp_path / precision}"]
        assert run_main("finetune", "--config", ROOT / "configs/demo_nac.yaml", "role=meta", *words,
                        f"data.root={root}") == 0
        lines = (tmp_path / precision / "log.jsonl").read_text().splitlines()
        top1[precision] = json.loads(lines[-1])["val_top1"]
    assert top1["float32"] > 60 and abs(top1["float32"] - top1["bfloat16"]) < 5, top1
