"""Checkpoints: a Hugging Face folder that transformers and vLLM load as it is, beside the state that training goes on from.

Written next to its place, synced and renamed: a folder that has the name of a checkpoint is whole. What a disk does to it later is
found by the checksums in it; then the checkpoint before is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from grpo import randomness
from grpo.best import BEST_FILE, Best
from grpo.config import ConfigError
from grpo.policy import Policy
from grpo.run import RunFolder
from grpo.storage import StorageError, storage, sync, write_text

STATE_FILE = "trainer_state.pt"
CHECKSUM_FILE = "checksums.json"
MISSING = "is missing"
FORMAT = 4  # of the state; one with another number was written by another version of this package


def save_best(run: RunFolder, policy: Policy, best: Best) -> None:
    """The model alone and, beside it, what makes it the best; replaces the one before at once.

    Raises:
        StorageError: the disk is full or cannot be written; what was there is untouched.
    """

    def write(beside: Path) -> None:
        policy.save(beside)
        (beside / BEST_FILE).write_text(best.to_json(), encoding="utf-8")

    _write(run.best_checkpoint, write)


def save(run: RunFolder, step: int, policy: Policy, state: Mapping[str, Any], keep: int) -> None:
    """The model and everything needed to go on after ``step``; older ones beyond ``keep`` lose their place.

    While it is written there are ``keep`` older ones at most, also in a run that kept more: one that has filled its disk can go on so.

    Raises:
        StorageError: the disk is full or cannot be written; the ``keep`` newest checkpoints are untouched.
    """
    run.sync_metrics()  # the rows up to here are on disk before the checkpoint that builds on them
    whole = {"format": FORMAT, "step": step, "run": run.facts(), "random": randomness.states(), "policy": policy.state(), **state}

    def write(beside: Path) -> None:
        policy.save(beside)
        with (beside / STATE_FILE).open("wb") as file:  # through a file of Python's: torch's own does not say why it failed
            torch.save(whole, file)

    older = [s for s in steps(run) if s < step]
    surplus, rest = older[:-keep], older[-keep:]
    if surplus and any(damaged_file(run.checkpoint(s)) is None for s in reversed(rest)):  # else it may be all that is sound
        _remove_all(run, surplus)
    _write(run.checkpoint(step), write)
    if not run.saved_mark.exists():  # after the checkpoint: a mark alone says that one is gone
        write_text(run.saved_mark, "")
    _remove_all(run, [s for s in steps(run) if s <= step][:-keep])


def little_room(run: RunFolder, num_weights: int, precision: str, moments: int, keep: int, *, best: bool) -> str | None:
    """What there is to say before a run whose checkpoints will not fit on its disk; None: they will.

    A checkpoint has a weight as it is computed with (``precision``) and in fp32, and ``moments`` fp32 numbers of the optimiser's. A new one
    is written before an old one goes. ``best``: the run evaluates, and keeps the model of its best evaluation too, alone. While that is
    replaced there are two of it, but no checkpoint is written then.
    """
    width: int = getattr(torch, precision).itemsize
    one, model = num_weights * (width + 4 + 4 * moments), num_weights * width * best
    folders = [*map(run.checkpoint, steps(run)), run.best_checkpoint]
    there = sum(file.stat().st_size for folder in folders for file in _files(folder).values())
    needed, free = (keep + 1) * one + model - there, shutil.disk_usage(run.path).free
    if needed <= free:
        return None
    beside = f", and {model / 2**20:,.0f} MiB of the best model" if best else ""
    return (
        f"run.dir: {run.path} has {free / 2**20:,.0f} MiB of disk free, and checkpoints will take {needed / 2**20:,.0f} MiB "
        f"({keep} that are kept and one that is written, {one / 2**20:,.0f} MiB each{beside}): the run will end when it is full\n"
        "  → make room, keep fewer (run.keep_checkpoints), or choose another run.dir"
    )


def steps(run: RunFolder) -> list[int]:
    """Steps that have a checkpoint, sound or not, in order."""
    names = (re.fullmatch(r"step_(\d+)", folder.name) for folder in run.checkpoints.glob("step_*") if folder.is_dir())
    return sorted(int(match[1]) for match in names if match)


def last_sound_step(run: RunFolder) -> int:
    """The step that this run goes on from: the last whose files are what they were when written. Warns of those that are not.

    0 if none was due before the run was stopped: it goes on from its beginning.

    Raises:
        ConfigError: its checkpoints are gone, or none of them is sound.
    """
    found = steps(run)
    if not found and (run.saved_mark.exists() or any("time/checkpoint" in row for row in run.read_metrics())):  # a copy may lack the mark
        raise ConfigError("run.resume", f"the checkpoints of {run.path} are gone", "put them back, or start anew under another run.name")
    for step in reversed(found):
        damage = damaged_file(run.checkpoint(step)) or _misplaced(run, step)
        if damage is None:
            return step
        warnings.warn(f"checkpoint of step {step}: {damage}; going back to the one before", stacklevel=2)
    if found:
        remedy = "make one what it was, or start anew under another run.name"
        raise ConfigError("run.resume", f"none of the checkpoints in {run.checkpoints} is sound", remedy)
    return 0


def rewind(run: RunFolder, step: int) -> None:
    """Make the run folder what it was when the checkpoint of ``step`` was written, so that what follows is recorded once.

    Damaged checkpoints of later steps are moved aside, to ``damaged_step_…``.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage(run.path):
        _tidy(run.checkpoints)
        for later in steps(run):
            if later > step:
                aside = run.checkpoints / f"damaged_{run.checkpoint(later).name}"
                shutil.rmtree(aside, ignore_errors=True)
                run.checkpoint(later).rename(aside)
    run.rewind(step, load(run, step)["run"] if step else {})


def damaged_file(folder: Path, needed: str = STATE_FILE) -> str | None:
    """What is wrong with a checkpoint's files, or None: ``needed`` is among them, and all are what was written."""
    try:
        expected = _written(folder)
        there = _files(folder)
    except (OSError, ValueError) as error:
        return str(error)
    there.pop(CHECKSUM_FILE, None)
    for name in dict.fromkeys([needed, *expected]):
        if name not in there:
            return f"{name} {MISSING}"
    for name, file in there.items():
        if name not in expected:
            if file.suffix in (".safetensors", ".pt"):  # what training goes on from; anything else may be a note of the user's
                return f"{name} is not in {CHECKSUM_FILE}"
        elif damage := _damage(file, expected[name]):
            return f"{name} {damage}"
    return None


def damaged_model(folder: Path) -> str | None:
    """Why a checkpoint, or a copy of one, is not the model that was written; None: it is. Warns of what else is not as it was.

    It is its owner's to edit or to ship without the state of training: what may not differ are the weights. Other files that cannot be
    spared must be there.
    """
    try:
        expected = _written(folder)
    except ValueError as error:
        warnings.warn(f"{folder}: {error}: whether the weights are what was written is not known", stacklevel=2)
        return None
    for name in sorted(expected.keys() - {STATE_FILE}):
        if damage := _damage(folder / name, expected[name]):
            if name.endswith(".safetensors") or (damage == MISSING and name.startswith(("config", "tokenizer"))):
                return f"{name} {damage}"
            warnings.warn(f"{folder / name} {damage}", stacklevel=2)
    for weights in sorted(folder.glob("*.safetensors")):
        if weights.name not in expected:  # vLLM would load it with the others
            warnings.warn(f"{weights} is not in {CHECKSUM_FILE}", stacklevel=2)
    return None


def _misplaced(run: RunFolder, step: int) -> str | None:
    """A copy under another step's name is sound, and not what its name says."""
    made = load(run, step)["step"]
    return None if made == step else f"it is that of step {made}, under another name"


def _written(folder: Path) -> dict[str, str]:
    """The checksums of the files that were written, by name.

    Raises:
        ValueError: they are damaged themselves.
    """
    try:
        checksums = json.loads((folder / CHECKSUM_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{CHECKSUM_FILE} cannot be read ({error})") from error
    if not isinstance(checksums, dict):
        raise ValueError(f"{CHECKSUM_FILE} holds no names of files")
    return checksums


def _damage(file: Path, written: str) -> str | None:
    """What has become of a file with this checksum."""
    try:
        return None if _checksum(file) == written else "is not what was written"
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def load(run: RunFolder, step: int) -> dict[str, Any]:
    """The state that ``save`` was given, and what it added: the policy's, the random states, facts of the run folder.

    Raises:
        ConfigError: it was written by a version of this package that keeps other things in it.
    """
    file = run.checkpoint(step) / STATE_FILE
    state: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if state.get("format") != FORMAT:
        remedy = f"go on with that version, or start a new run from its weights: model.path={file.parent}"
        raise ConfigError("run.resume", f"the checkpoint of step {step} was written by another version of grpo-toolkit", remedy)
    return state


def _files(folder: Path) -> dict[str, Path]:
    """Every file below, by its name in the checksums. A tokenizer with several chat templates has a folder for them."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)  # left by a crash
    with storage(folder):
        beside.mkdir(parents=True)
        try:
            write(beside)
            checksums = {name: _checksum(file) for name, file in _files(beside).items()}
            (beside / CHECKSUM_FILE).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
            for written in (*beside.rglob("*"), beside):  # folders too: the names in them
                sync(written)
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)  # on a full disk, give the space back
            if (cause := _disk_error(error)) is not None:
                raise StorageError(folder, cause) from error
            raise
        _put(beside, folder)


def _disk_error(error: BaseException) -> OSError | None:
    """What the disk said, behind what a library made of it."""
    for link in _chain(error):
        if isinstance(link, OSError):
            return link
        if match := re.search(r"\(os error (\d+)\)", str(link)):  # Rust's, as safetensors passes it on
            return OSError(int(match[1]), os.strerror(int(match[1])))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _put(beside: Path, folder: Path) -> None:
    """Give ``beside`` the name ``folder``. What had that name goes, and at no moment does nothing have it."""
    if not folder.exists():
        beside.rename(folder)
        sync(folder.parent)
        return
    old = beside
    try:
        _exchange(beside, folder)
    except OSError:  # a file system or a C library that cannot; a crash between the two lines is mended by ``_tidy``
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        beside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step of the file system: renameat2(2), Linux."""
    at_cwd, exchange = -100, 2  # fcntl.h, stdio.h
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError("no renameat2") from error
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _remove_all(run: RunFolder, old: Iterable[int]) -> None:
    with storage(run.checkpoints):
        for step in old:
            _remove(run.checkpoint(step))


def _remove(folder: Path) -> None:
    """First the name, at once: half a folder must not stand under the name of a checkpoint."""
    going = folder.with_name(f".{folder.name}.going")
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def _tidy(checkpoints: Path) -> None:
    """Put back what a crash left between two renames, and remove what it left half written or half removed."""
    for left in checkpoints.glob(".*.old"):
        place = left.with_name(left.name.removeprefix(".").removesuffix(".old"))
        if not place.exists():
            left.rename(place)
    for suffix in ("old", "writing", "going"):
        for left in checkpoints.glob(f".*.{suffix}"):
            shutil.rmtree(left)
