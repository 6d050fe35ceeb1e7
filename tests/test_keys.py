"""Promise: a key works, or is refused in one sentence: its value, what is allowed, or the nearest right key.

No mutation of a config or an override gives a traceback.
"""

import random
import re

import pytest
import torch

import data
import models
from conftest import ROOT
from models import UserError

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


def refused(names, *words, path="c.yaml"):
    """The config must be refused with a sentence that holds each of the names -> the sentence."""
    with pytest.raises(UserError) as refusal:
        models.load_config(path, words)
    text = " ".join(str(refusal.value).split())  # as models.run prints it
    assert all(name in text for name in ([names] if isinstance(names, str) else names)), text
    return text


# override(s): what the sentence must name (key, value or what is allowed)
BAD_OVERRIDES = [
    ("distill.alpa=1", ["distill.alpa", "distill.alpha"]), ("train.meta.epoch=1", "train.meta.epochs"),
    ("alpha=1", ["alpha", "distill.alpha"]), ("train=1", "train"), ("=1", "nearest"), ("force=true", "force"),
    ("seed", ["'seed'", "override"]), ("train.*.epoch=1", "train.*.epoch"), ("data.root=[1", "data.root=[1"),
    ("data.image_size=0", ["data.image_size=0", "int from 1 to 4096"]),
    ("data.image_size=big", ["big", "int"]), ("data.image_size=16.5", "16.5"),
    ("data.train_images=-1", "data.train_images=-1"),
    ("data.train_images=1000000000000", "data.train_images"), ("data.classes=1", "data.classes=1"),
    ("data.flip=2", ["data.flip=2", "float from 0 to 1"]), ("data.flip=yes", "data.flip='yes'"),
    ("data.smoothing=1", "0 to 0.999"), ("data.randaugment=11", "data.randaugment"),
    ("data.resized_crop=0.5", "[float from 0 to 1, float from 0 to 1] or null"),
    ("data.resized_crop=[0.1]", "data.resized_crop"), ("data.mixup=-1", "float from 0"),
    ("data.mixup=.nan", "data.mixup"), ("data.cutmix=.inf", "data.cutmix"), ("data.workers=-2", "workers"),
    ("data.robustness=renditions", "a list of a text"), ("data.repeats=0", "data.repeats"),
    ("data.mean=imagenet21k", "imagenet or half or [float"), ("data.std=[1, 1]", "data.std"),
    ("data.std=null", "data.std"), ("seed=-1", "seed=-1"), ("seed=1.5", "seed=1.5"),
    ("seed=123456789012345678901234567890", "seed"), ("device=gpu", "auto or cpu or cuda or mps"),
    ("precision=fp16", ["fp16", "bfloat16"]), ("compile=1", "true or false"),
    ("meta.heads=3", ["meta.width=16", "meta.heads=3"]), ("meta.depths=[1, 1]", ["meta.depths", "2"]),
    ("meta.depths=[]", "meta.depths"), ("meta.depths=3", "a list of int from 1 to 1000"),
    ("meta.depths=[1, 0, 1]", "meta.depths"), ("meta.width=32", ["teacher.width=16", "meta.width=32"]),
    ("meta.eps=0", "meta.eps"), ("meta.qkv_bias=1", ["meta.qkv_bias=1", "true or false"]),
    ("meta.mlp_ratio=0", "meta.mlp_ratio"), ("meta.mlp_ratio=1e300", "meta.mlp_ratio"),
    ("student.kind=cnn", ["cnn", "must be nac or vmoe"]), ("student.kind=vmoe", "student.experts"),
    (["student.kind=vmoe", "student.experts=1"], "student.top_k=2"),
    (["student.kind=vmoe", "student.experts=2", "student.moe_blocks=[3]"], "student.moe_blocks"),
    (["student.kind=vmoe", "student.experts=2", "assemble.stitches=fold"], "assemble.stitches=fold"),
    ("student.propagators=2", "student.propagators=2"), ("student.width=18", "student.width=18"),
    ("student.latents=[4, 16]", "student.latents"), ("student.latents=[4, 0, 2]", "student.latents"),
    ("student.tokenizer_stages=4", "int from 2 to 3"), ("assemble.graph=ring", "or ring_of_cliques or"),
    (["assemble.graph=ring_of_cliques", "assemble.graph_groups=9"], "graph_groups"),
    (["assemble.graph=scale_free", "assemble.graph_m=16"], "graph_m"),
    (["assemble.graph=planted_partition", "train.student.block_groups=9"], "block_groups"),
    ("distill.alpha=1.01", ["distill.alpha=1.01", "0 to 1"]), ("distill.tau=0", "distill.tau"),
    ("distill.kind=medium", "it must be soft or hard"), ("distill.reduction=sum", ["batchmean", "mean"]),
    ("distill.codes=mine", "own or original"), ("assemble.stitches=glue", "drop or keep or fold"),
    ("train.meta.batch=0", "train.meta.batch=0"), ("train.meta.lr=-1", "train.meta.lr"),
    ("train.meta.lr=fast", "train.meta.lr='fast'"), ("train.meta.betas=[0.9, 1]", "betas"),
    ("train.meta.drop_path=1", "drop_path"), ("train.meta.images=[0]", "[int from 0, int from 0]"),
    ("few_shot.shots=[]", "few_shot.shots"), ("few_shot.shots=[0]", "a list of int from 1"),
    ("output_dir=" + "x" * 300, "output_dir"), ("output_dir=a\0b", "output_dir"), ("share=a\0b", "share"),
    # what no memory holds, or would take hours to be found out
    ("meta.depths=[2000000000, 1, 1]", "meta.depths"), ("meta.width=2000000000", "meta.width"),
    ("student.tokenizer_blocks=100000000", "student.tokenizer_blocks"), ("data.workers=100000", "256"),
    ("student.latents=[4, 1000000000, 2]", "student.latents"), ("data.classes=2000000000", "data.classes"),
]


def brief(value):
    return None if isinstance(value, list) else ascii(value)[:40]


@pytest.mark.parametrize("words, names", BAD_OVERRIDES, ids=brief)
def test_a_bad_override_is_one_sentence(words, names):
    refused(names, *([words] if isinstance(words, str) else words))


def test_every_key_says_in_words_what_it_allows():
    for key, (kind, _) in models.KEYS.items():
        words = models.describe(kind)
        assert not re.search(r"[A-Z<|(]|class|bool|str\b|typing", words), words
        with pytest.raises(UserError, match=re.escape(f"{key}=Ellipsis is not allowed: it must be {words}.")):
            models.check_key(key, ...)


# A key of former versions, and where the nearest one is.
GONE = {"data.set=glyphs": "data.", "target.set=cub": "", "target.root=x": "", "meta.arch=vit_tiny": "meta.",
        "teacher.depth=12": "teacher.depths", "meta.checkpoint=m.pt": "meta.", "teacher.start=t": "teacher.",
        "teacher.checkpoint=t.pt": "teacher.", "student.start=s.pt": "student.",
        "student.modules=folder": "student.", "few_shot.set=cub": "few_shot."}


@pytest.mark.parametrize("word", GONE)
def test_a_key_that_is_gone_is_refused_by_name_with_the_nearest(here, word):
    key, _, value = word.partition("=")
    near = refused(f"{key} is not a key; the nearest is ", word).split()[-1].strip(".")
    assert near in models.KEYS and near.startswith(GONE[word]), near
    block, name = key.split(".")
    (here / "old.yaml").write_text(f"{block}: {{{name}: {value}}}")
    refused(f"{key} is not a key", path="old.yaml")


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


def test_a_config_that_is_no_file_is_named(here):
    for path in ("none.yaml", str(here), "x" * 300):
        refused(path[:20], path=path)


def test_a_runs_own_config_means_its_own_folder_wherever_it_is(here):
    assert models.load_config("c.yaml")["output_dir"] == "runs/c"
    (here / "moved").mkdir()
    (here / "moved/config.yaml").write_text(CONFIG + "output_dir: runs/old\n")
    assert models.load_config("moved/config.yaml")["output_dir"] == "moved"
    assert models.load_config("moved/config.yaml", ["output_dir=new"])["output_dir"] == "new"


def test_classes_are_counted_unless_they_are_given(glyphs):
    words = [f"data.root={glyphs}", "data.image_size=8"]
    assert models.load_config("c.yaml", [*words, "data.classes=null"])["data"]["classes"] == 24
    assert models.load_config("c.yaml", ["data.root=not here"])["data"]["classes"] == 4
    refused("python tools/prepare.py cub data/cub", "data.root=data/cub", "data.classes=null")
    with pytest.raises(UserError, match="data.classes=4, but data.root=.*glyphs.npz has 24 classes"):
        data.load(models.load_config("c.yaml", words), "test")


# ---------- Fuzz

COUNTS = [300, pytest.param(3000, marks=pytest.mark.slow)]
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


@pytest.mark.parametrize("count", COUNTS)
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
    assert 0.1 * count < good < 0.9 * count  # the mutations are neither all harmless nor all fatal
