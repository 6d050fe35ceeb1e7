"""Promises of the README: the lines that it quotes stand in the files, and what it names is there."""

import re
import subprocess
from pathlib import Path

import pytest

import models
from conftest import ROOT

README = (ROOT / "README.md").read_text()
QUOTED = re.findall(r"\| (\w+\.py): `(.+?)` \|", README)


def test_the_equations_table_is_found():
    assert len(QUOTED) > 15


@pytest.mark.parametrize("file, line", QUOTED)
def test_a_quoted_line_of_code_stands_in_its_file(file, line):
    assert any(text.strip().split("  # ")[0] == line for text in (ROOT / file).read_text().splitlines())


def test_every_key_that_an_override_in_the_readme_sets_exists():
    keys = set(re.findall(r"\b((?:data|target|meta|teacher|student|few_shot|distill|train)\.[a-z_]+(?:\.[a-z_]+)?)=", README))
    assert len(keys) > 10 and keys <= set(models.KEYS), keys - set(models.KEYS)


def test_every_config_in_the_readme_exists():
    assert all((ROOT / name).is_file() for name in re.findall(r"configs/\w+\.yaml", README))


def test_the_patch_fits_its_file():
    patch = re.search(r"```diff\n--- a/(\w+\.py)\n.*?\n(@@.*?)```", README, re.S)
    text = (ROOT / patch[1]).read_text()
    for hunk in re.split(r"^@@.*\n", patch[2], flags=re.M)[1:]:
        old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in " -")
        assert text.count(old) == 1, old


def test_every_command_of_the_readme_s_loops_has_a_config_that_is_accepted(tmp_path, monkeypatch):
    loops = re.search(r"<summary><b>The commands.*?```\n(.*?)```", README, re.S)[1]
    stubs = 'python() { echo "$@" >> all; }\nbash() { echo "$@" >> all; }\n'
    subprocess.run(["bash", "-euc", stubs + loops], cwd=tmp_path, check=True)
    commands = {line for line in (tmp_path / "all").read_text().splitlines() if re.search(r" seed=[13] ", line)}
    assert len(commands) > 100
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # the runs that are shared
    for script, *words in map(str.split, commands):
        (config,) = (word for word in words if word.startswith("configs/"))
        overrides = [w for w in words if w not in ("--config", config) and not w.startswith("role=")]
        assert (ROOT / script).is_file()
        models.load_config(ROOT / config, overrides)
