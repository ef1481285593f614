"""Build wheels that install one top-level package, `edgewhisper`.

A checkout has four packages beside each other: `edgewhisper`, `export`, `benchmarks` and `devices`.
The names of the last three are too common for a user's site-packages. A wheel therefore holds them
as private subpackages (`edgewhisper._export`, ...), and every reference to them is rewritten:

- import statements, by their position in the syntax tree
- strings that are the dotted name of a module, as `python -m` and `import_module` take them

An editable install (`pip install -e .`) uses the checkout as it is.
"""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PRIVATE = {name: f"edgewhisper._{name}" for name in ("export", "benchmarks", "devices")}


def private(name: str) -> str:
    """Return the name of a package or module inside a wheel."""
    top, dot, rest = name.partition(".")
    return PRIVATE.get(top, top) + dot + rest


class BuildPackages(build_py):
    """Copies the packages; for a wheel, under their private names."""

    def run(self) -> None:
        self.modules: set[str] = set()
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)  # modules of an older build
            self.modules = {f"{package}.{name}" for package, name, _ in self.find_all_modules()}
            self.modules |= set(self.packages)
            self.rename()
        super().run()

    def rename(self) -> None:
        """Give packages, folders and data files their private names."""
        self.packages = [private(name) for name in self.packages]
        self.package_dir = {**(self.package_dir or {}), **{v: k for k, v in PRIVATE.items()}}
        self.package_data = {private(name): glob for name, glob in self.package_data.items()}

    def build_module(self, module: str, module_file: str, package: str) -> Any:
        outfile, copied = super().build_module(module, module_file, package)
        if self.modules:
            path = Path(outfile)
            path.write_bytes(rewritten(path.read_bytes(), self.modules, module_file))
        return outfile, copied


class BuildWheel(bdist_wheel):
    """Names `edgewhisper` as the only top-level package."""

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        super().egg2dist(egginfo_path, distinfo_path)
        Path(distinfo_path, "top_level.txt").write_text("edgewhisper\n", encoding="utf-8")


def rewritten(source: bytes, modules: set[str], place: str) -> bytes:
    """Return a module's source with private names; raise ValueError for an `import export`."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    edits = []
    for node, name in references(ast.parse(source), modules, place):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        at = source.find(name.encode(), start, end)
        if at < 0:
            raise ValueError(f"{place}:{node.lineno}: {name} is not written in one piece")
        edits.append((at, len(name)))
    for at, size in sorted(set(edits), reverse=True):
        name = source[at : at + size].decode()
        source = source[:at] + private(name).encode() + source[at + size :]
    return source


def references(tree: ast.AST, modules: set[str], place: str) -> Iterator[tuple[Any, str]]:
    """Yield the nodes that name a private module, and the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if node.module.partition(".")[0] in PRIVATE:
                yield node, node.module
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in PRIVATE:
                    if alias.asname is None:
                        raise ValueError(f"{place}:{node.lineno}: write `from {alias.name} import`")
                    yield alias, alias.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "devices.ssh:SshDevice" names a class, f"benchmarks.rivals.{name}" a module
            name = node.value.partition(":")[0].removesuffix(".")
            if "." in name and name.partition(".")[0] in PRIVATE and name in modules:
                yield node, name


setup(cmdclass={"build_py": BuildPackages, "bdist_wheel": BuildWheel})
