"""README.md and docs/: commands parse, code runs, links resolve, tables are generated."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import soundfile
import typer

from benchmarks.result import read
from benchmarks.speech.clips import read_manifest
from benchmarks.study.readme import PAGES, RESULTS, engines_picture, with_tables
from devices.device import RUNNER
from edgewhisper.cli import app

ROOT = Path(__file__).parent.parent
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
}
README = TEXTS["README.md"]
BLOCKS = [
    (page, language, block)
    for page, text in TEXTS.items()
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.S)
]
LINES = [
    line
    for _, language, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if not language
]
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line.startswith("edgewhisper ")]
MODULES = sorted({m for text in TEXTS.values() for m in re.findall(r"python -m ([\w.]+)", text)})
TARGETS = sorted({t for text in TEXTS.values() for t in re.findall(r"`make ([\w-]+)", text)})
LINKS = [
    (page, link)
    for page, text in TEXTS.items()
    for link in re.findall(r"\]\(([^)\s]+)\)", text)
    if not link.startswith("http")
]
OPTIONS = re.compile(r"`(--[a-z][\w-]+)")
PATHS = re.compile(r"`((?:edgewhisper|export|benchmarks|devices|tests|docs)/[\w./-]*)`")
OTHER_PROGRAMS = {"--nproc_per_node", "--keep", "--model", "--speech", "--stream"}
"""Options of `python -m` programs that the pages name."""


def blocks(language: str, holds: str = "") -> list[str]:
    return [block for _, kind, block in BLOCKS if kind == language and holds in block]


def options_of(command: click.Command) -> set[str]:
    """Return all options of a command and of its subcommands."""
    own = {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    return own.union(*(options_of(sub) for sub in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_parses(words):
    command, rest = typer.main.get_command(app), words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(command.name, rest)


def test_every_command_of_the_program_is_in_a_page():
    named = {words[1] for words in COMMANDS if len(words) > 1}
    assert set(typer.main.get_command(app).commands) <= named


@pytest.mark.parametrize("page", TEXTS)
def test_every_option_exists(page):
    known = options_of(typer.main.get_command(app)) | OTHER_PROGRAMS
    assert set(OPTIONS.findall(TEXTS[page])) <= known


@pytest.mark.parametrize("module", [name for name in MODULES if name != "runner"])
def test_every_module_that_is_run_exists(module):
    assert find_spec(module) is not None


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: value)
def test_every_link_resolves(page, link):
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    if anchor:
        titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), flags=re.M)
        assert anchor in {
            re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles
        }


@pytest.mark.parametrize("page", TEXTS)
def test_every_path_exists(page):
    if page == "CHANGELOG.md":
        return
    assert [path for path in PATHS.findall(TEXTS[page]) if not (ROOT / path).exists()] == []


def test_every_page_is_linked_from_the_readme():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README


def test_the_readme_is_short_and_has_two_commands_to_set_up():
    assert len(README.splitlines()) <= 180
    install = README.split("## Install")[1].split("## ")[0]
    assert re.findall(r"^make (\w+)", install, flags=re.M) == ["demo", "test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_are_generated_from_the_stored_results(page):
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text


def test_the_picture_shows_the_stored_results():
    results = read(RESULTS / "tiny-en.jsonl")
    shown = [re.findall(r">([^<>]*)</text>", svg) for svg in pictures(results)]
    assert shown[0] == shown[1]


def pictures(results: list[dict]) -> list[str]:
    return [engines_picture(results), (RESULTS / "tiny-en.svg").read_text(encoding="utf-8")]


def test_recipes_parse():
    from edgewhisper.recipe import parse

    recipes = blocks("toml", "[[step]]")
    assert recipes
    assert all(parse("docs", text).steps for text in recipes)


def test_the_search_is_one_that_a_recipe_takes():
    from edgewhisper.recipe import load_recipe, parse

    (search,) = blocks("toml", "[[search]]")
    steps = load_recipe("digits-tspar").text.split("[[search]]")[0]
    assert parse("mine", steps + search).knobs == load_recipe("digits-tspar").knobs


def test_the_python_for_checkpoints_runs(digits, monkeypatch, tmp_path):
    (tmp_path / "small").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python", "import edgewhisper")
    scope: dict = {}
    exec(code, scope)
    assert scope["model"].config.model_type == "whisper"


def test_the_python_for_the_device_runs(exported, clips, tmp_path):
    """The code needs only the runner's folder, an artifact and a recording."""
    (code,) = set(blocks("python", "from runner"))
    shutil.copytree(RUNNER, tmp_path / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(exported, tmp_path / "small-onnx")
    clip = next(clip for clip in read_manifest(clips) if clip.text)
    soundfile.write(tmp_path / "meeting.wav", clip.pcm(), 16_000)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={}, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert re.fullmatch(rf"0\.0 to \d+\.\d s: {clip.text}\n", done.stdout)
