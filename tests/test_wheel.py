"""The wheel installs one top-level package, and works in an environment without the checkout."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("edgewhisper", "export", "benchmarks", "devices")

pytestmark = pytest.mark.slow


def run(argv: list[str | Path], folder: Path) -> str:
    """Run a command in a folder; return its output, or fail with it."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in argv], cwd=folder, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the files that are packaged: a build leaves folders in its checkout."""
    place = tmp_path_factory.mktemp("checkout")
    for name in PACKAGES:
        skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, place / name, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, place)
    return place


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", "out"]
    run([sys.executable, "-m", "pip", "wheel", *options, "."], checkout)
    (built,) = (checkout / "out").glob("edgewhisper-*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel. It shares the dependencies with this one, by a .pth
    file: a folder that is added in this way does not have its own .pth files read, so that an
    editable install of the project is not seen."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", place / "bin" / "python", "install"]
    run([*pip, "--no-deps", "--no-index", "-q", wheel], place)
    shared = sysconfig.get_path("platlib")
    (site_packages(place) / "dependencies.pth").write_text(f"{shared}\n")
    return place


def site_packages(place: Path) -> Path:
    (found,) = place.glob("lib/python*/site-packages")
    return found


def test_it_installs_one_top_level_package(environment):
    names = {path.name for path in site_packages(environment).iterdir()}
    assert not names & set(PACKAGES[1:])
    (metadata,) = site_packages(environment).glob("edgewhisper-*.dist-info")
    assert (metadata / "top_level.txt").read_text().split() == ["edgewhisper"]
    installed = "import edgewhisper; print(edgewhisper.__file__)"
    place = run([environment / "bin/python", "-c", installed], environment).strip()
    assert Path(place).is_relative_to(environment)


def test_every_module_of_it_names_modules_that_it_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sources = {name: archive.read(name) for name in archive.namelist() if name[-3:] == ".py"}
    held = {name[:-3].replace("/", ".").removesuffix(".__init__") for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.partition(".")[0] not in PACKAGES[1:], name
                if node.module.partition(".")[0] == "edgewhisper":
                    assert node.module in held, f"{name} imports {node.module}"


def test_the_study_is_not_in_it_and_data_files_are(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if "study" in name or "aarch64" in name]
    for needed in ("_devices/profiles/rpi4.toml", "_benchmarks/rivals/requirements.txt"):
        assert f"edgewhisper/{needed}" in names


def test_its_command_exports_transcribes_and_measures(environment, digits, clips, tmp_path):
    command = environment / "bin" / "edgewhisper"
    assert "compress" in run([command, "--help"], tmp_path)
    run([command, "export", digits, "--gate", "off", "--out", "small-onnx"], tmp_path)
    clip = next(json.loads(line) for line in clips.read_text().splitlines())
    output = run([command, "transcribe", "small-onnx", clips.parent / clip["audio"]], tmp_path)
    assert clip["text"] in output
    (tmp_path / "one.jsonl").write_text(
        json.dumps({**clip, "audio": str(clips.parent / clip["audio"])}) + "\n"
    )
    bench = [command, "bench", "small-onnx", "--speech", "one.jsonl", "--repeats", "1"]
    results = json.loads(run([*bench, "--baseline", digits, "--json", "-"], tmp_path))
    assert [result["rival"] for result in results] == ["transformers", None]


def test_an_editable_install_uses_the_checkout(checkout, tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "--prefix", tmp_path]
    pip = [sys.executable, "-m", "pip", "install", "--ignore-installed", *options]
    run([*pip, "-e", checkout], tmp_path)
    (finder,) = site_packages(tmp_path).glob("__editable__*finder.py")
    assert all(f"'{name}': '{checkout / name}'" in finder.read_text() for name in PACKAGES)
