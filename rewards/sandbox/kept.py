"""Modules kept in memory, for programs whose uid may not reach the installation that they are part of (a Python under ``/root``).

Without a mount namespace nothing else can show those files to them and not to everybody.
"""

from __future__ import annotations

import importlib
import marshal
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType

_NOT_FOR_PROGRAMS = {
    "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo", "venv", "__pycache__",
}  # fmt: skip


class KeptModules(MetaPathFinder, Loader):
    """Finds what is kept, where no other finder does."""

    def __init__(self) -> None:
        self._modules: dict[str, tuple[bytes, str, bool]] = {}  # compressed code, file, whether it is a package

    def keep(self, directory: Path, prefix: str = "") -> None:
        """Keep the Python modules in a directory, with their packages, and import the extension modules, which cannot be kept."""
        extensions = []
        for name, path in _modules(directory, prefix):
            if path.suffix == ".py":
                self._keep_source(name, path)
            else:
                extensions.append(name)
        for name in extensions:
            _try_import(name)

    def _keep_source(self, name: str, path: Path) -> None:
        package = name.endswith(".__init__")
        name = name.removesuffix(".__init__")
        try:
            code = SourceFileLoader(name, str(path)).get_code(name)
        except (SyntaxError, ValueError):
            return  # an example of one, or a template
        self._modules[name] = zlib.compress(marshal.dumps(code), 1), str(path), package

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self._modules:
            return None
        _, file, package = self._modules[fullname]
        spec = ModuleSpec(fullname, self, origin=file, is_package=package)
        if package:
            spec.submodule_search_locations = [os.path.dirname(file)]
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        exec(marshal.loads(zlib.decompress(self._modules[module.__name__][0])), module.__dict__)


def reachable(path: str) -> bool:
    """Whether everybody may read this file or directory."""
    target = Path(path).resolve()
    return bool(target.stat().st_mode & stat.S_IROTH) and all(each.stat().st_mode & stat.S_IXOTH for each in target.parents)


def keep_unreachable(imports: Sequence[str]) -> None:
    """Keep the standard library, and the packages among ``imports``, if programs may not reach them."""
    kept = KeptModules()
    stdlib = Path(os.__file__).parent
    if not reachable(os.__file__):
        kept.keep(stdlib)
        kept.keep(stdlib / "lib-dynload")
    for name in imports:
        file = importlib.import_module(name).__file__ if name in _PACKAGES else None
        if file is not None and not reachable(file):
            kept.keep(Path(file).parent, f"{name}.")
    sys.meta_path.append(kept)


_PACKAGES = ("numpy",)  # of those that a fork-server may import, the ones that are not in the standard library


def _modules(directory: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            if entry.name.isidentifier() and entry.name not in _NOT_FOR_PROGRAMS:
                yield from _modules(entry, f"{prefix}{entry.name}.")
        else:
            suffix = next((suffix for suffix in (".py", *EXTENSION_SUFFIXES) if entry.name.endswith(suffix)), None)
            name = entry.name.removesuffix(suffix) if suffix else ""
            if name.isidentifier() and not name.startswith(("_test", "xx")):
                yield prefix + name, entry


def _try_import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # it needs a library that is not installed, or belongs to a package's tests
