"""What programs need of the Python installation that runs this process: where it stands, and which modules to have ready."""

from __future__ import annotations

import os
import site
import sys
import sysconfig

#: The environment that every program sees, and nothing more; HOME and TMPDIR, both the scratch directory, are added.
ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # else each thread reserves address space, which is limited
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    "TZ": "UTC",
}

IMPORTS = (  # what programs often use; each module more makes every fork dearer
    "abc", "array", "bisect", "cmath", "collections.abc", "contextlib", "copy", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "heapq", "inspect", "io", "itertools", "json", "linecache", "math", "numbers", "operator",
    "os.path", "queue", "random", "re", "signal", "string", "struct", "sys", "threading", "time", "traceback", "types", "typing",
    "warnings", "weakref",
)  # fmt: skip

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_DATA = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")


def site_packages() -> tuple[str, ...]:
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
    return tuple(path for path in paths if os.path.isdir(path))


def readable() -> tuple[str, ...]:
    """Paths that programs may read: the standard library, installed packages, shared libraries, time zones. Short ones first."""
    bases = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    stdlib = [sysconfig.get_path(name, vars=bases) for name in ("stdlib", "platstdlib")]
    prefixes = [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    wanted = [*_LIBRARIES, *_DATA, *stdlib, *prefixes, *site_packages()]
    paths = {each for path in wanted for each in (os.path.normpath(path), os.path.realpath(path)) if os.path.exists(path)}
    return tuple(sorted(paths, key=lambda path: (len(path), path)))
