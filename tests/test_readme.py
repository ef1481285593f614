"""The README is executed: its commands exist, its tables come from stored results."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import typer

from benchmarks.speech.clips import read_manifest
from benchmarks.study.readme import PAGES, with_tables
from devices.device import RUNNER
from edgewhisper.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
RECIPES = [block for language, block in BLOCKS if language == "toml" and "[[step]]" in block]
SEARCHES = [block for language, block in BLOCKS if language == "toml" and "[[search]]" in block]
PYTHON = [block for language, block in BLOCKS if language == "python"]
COMMANDS = [
    line.split("#")[0].split()
    for language, block in BLOCKS
    for line in block.splitlines()
    if not language and line.startswith("edgewhisper ")
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_in_it_parses(words):
    command = typer.main.get_command(app).commands[words[1]]
    command.make_context(words[1], words[2:])


def test_its_recipes_are_read():
    from edgewhisper.recipe import parse

    assert RECIPES
    assert all(parse("README", text).steps for text in RECIPES)


def test_it_names_the_two_commands_and_no_other_way_to_set_up():
    set_up = README.split("## Set up")[1].split("## ")[0]
    commands = re.findall(r"^make (\w+)", set_up, flags=re.M)
    assert commands == ["demo", "test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_its_tables_are_made_from_the_stored_results(page):
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text


def test_its_search_is_one_that_a_recipe_takes():
    from edgewhisper.recipe import load_recipe, parse

    (search,) = SEARCHES
    steps = load_recipe("digits-tspar").text.split("[[search]]")[0]
    assert parse("mine", steps + search).knobs == load_recipe("digits-tspar").knobs


def test_its_python_runs(digits, monkeypatch, tmp_path):
    (tmp_path / "small").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(PYTHON[0], scope)
    assert scope["model"].config.model_type == "whisper"


def test_its_python_for_the_device_runs_there(exported, clips, tmp_path):
    """With nothing but the runner's folder, an artifact and a recording."""
    shutil.copytree(RUNNER, tmp_path / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(exported, tmp_path / "small-onnx")
    clip = next(clip for clip in read_manifest(clips) if clip.text)
    soundfile.write(tmp_path / "meeting.wav", clip.pcm(), 16_000)
    done = subprocess.run(
        [sys.executable, "-c", PYTHON[1]], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert re.fullmatch(rf"0\.0 to \d+\.\d s: {clip.text}\n", done.stdout)
