"""README and docs: what they quote stands in the files, what they name exists, their commands work."""

import re
import statistics
import subprocess

import pytest

import models
from conftest import ROOT

PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
CONFIGS = {path.name: path.read_text() for path in (ROOT / "configs").glob("*.yaml")}
QUOTED = re.findall(r"\| (\w+\.py): `(.+?)` \|", PAGES["equations.md"])


def test_the_readme_is_one_sitting():
    assert PAGES["README.md"].count("\n") <= 200 and len(PAGES["README.md"].split()) <= 2000


@pytest.mark.parametrize("file, line", QUOTED)
def test_a_quoted_line_of_code_stands_in_its_file(file, line):
    assert len(QUOTED) > 15
    assert any(text.strip().split("  # ")[0] == line for text in (ROOT / file).read_text().splitlines())


def check_command(words):
    """The config of a command must exist and load with those of its words that are keys of a config."""
    (file,) = (word for word in words if word.startswith("configs/"))
    overrides = [word.strip("\"'") for word in words if "=" in word and not word.startswith("--")]
    keys = [word for word in overrides if "." in word.split("=")[0] or word.split("=")[0] in models.KEYS]
    return models.load_config(ROOT / file, ["data.classes=24", *keys])  # so that no set need be there


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS])
def test_commands_have_a_config_that_is_accepted_and_tools_that_exist(page):
    text = PAGES.get(page) or "\n".join(re.findall(r"#  ? ?(.*)", CONFIGS[page]))
    for tool in re.findall(r"python3? ((?:tools/|docs/|tests/)?\w+\.py)", text):
        assert (ROOT / tool).is_file(), tool
    for line in text.replace("\\\n", " ").splitlines():
        for words in re.findall(r"(?:run\.sh|--config) (configs/\w+\.yaml[^`|;&#(]*)", line):
            check_command([word for word in words.split() if "$" not in word])


@pytest.mark.parametrize("page", PAGES)
def test_keys_files_and_links_exist(page):
    text = PAGES[page]
    blocks = "|".join(block[:-1] for block in models.BLOCKS if block.count(".") == 1) + "|train"
    keys = set(re.findall(rf"\b((?:{blocks})\.[a-z_]+(?:\.[a-z_]+)?)=", text))
    assert keys <= set(models.KEYS), keys - set(models.KEYS)
    for name in re.findall(r"\b(?:configs|docs|tests|tools)/\w+\.\w+|\b[a-z_]+\.py\b", text):
        assert any((ROOT / folder / name).is_file() for folder in ("", "tests", "tools")), name
    folder = ROOT if page == "README.md" else ROOT / "docs"
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", prose):
        assert not link or (folder / link).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", (folder / link).read_text() if link else text, re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def test_the_patches_fit_their_files():
    states = re.search(r"```diff\n(--- a/.*?)```", PAGES["extend.md"], re.S)[1]
    for patch in (states, (ROOT / "docs/nac_cuda_graph.patch").read_text()):
        subprocess.run(["git", "apply", "--check", "-"], cwd=ROOT, input=patch, text=True, check=True)


def test_every_command_of_reproduce_sh_has_a_config_that_is_accepted(tmp_path):
    script = (ROOT / "docs/reproduce.sh").read_text().replace("docs/extend.md's patch", "")
    # The script itself, with commands that only say how they were called.
    stubs = f'python() {{ echo "$@" >> {tmp_path}/all; }}\nbash() {{ echo "$@" >> {tmp_path}/all; }}\n'
    stubs += "mkdir() { :; }\ngrep() { :; }\n"
    script = script.replace("set -euo pipefail\n", "set -euo pipefail\n" + stubs, 1)
    sections = re.findall(r"^(\w+)\(\) \{  ?(?:#.*)?$|^(\w+)\(\) \{$", script, re.M)
    names = re.search(r"^  ([\w |\\\n]+)\)\s+\"\$section\"", script, re.M)[1]
    for section in re.findall(r"\w+", names):
        assert section in {name for pair in sections for name in pair}
        subprocess.run(["bash", "-c", script, str(ROOT / "docs/reproduce.sh"), section], cwd=ROOT, check=True)
    commands = set(re.findall(r"^.* seed=(?:1|3|30) .*$", (tmp_path / "all").read_text(), re.M))
    assert len(commands) > 100
    for script, *words in map(str.split, commands):
        assert (ROOT / script).is_file()
        check_command(words)


def figure(values):
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_the_figures_of_readme_and_configs_are_those_of_results_csv():
    results = {}  # (run, role, set): {seed: top-1}
    for line in (ROOT / "docs/results.csv").read_text().splitlines()[1:]:
        run, seed, role, name, top1 = line.split(",")
        results.setdefault((run, role, name), {})[seed] = float(top1)
    known = {figure(seeds.values()) for seeds in results.values() if len(seeds) > 1}
    # Of ten seeds, the first five are those of the tables.
    known |= {figure([*seeds.values()][:5]) for seeds in results.values() if len(seeds) == 10}
    # Differences are paired within the seeds that both have.
    pairs = [(a, b) for a in results for b in results if a[2] == b[2] and a[:2] != b[:2]]
    common = [(results[a], results[b], sorted(results[a].keys() & results[b].keys())) for a, b in pairs]
    differences = {figure([a[s] - b[s] for s in seeds]) for a, b, seeds in common if len(seeds) > 2}
    for name, text in [("README.md", PAGES["README.md"]), *CONFIGS.items()]:
        for sign, shown in re.findall(r"([+-]?)(\d+\.\d ± \d+\.\d)", text):
            assert shown in known if not sign else sign.strip("+") + shown in differences, (name, shown)
