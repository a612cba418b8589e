"""Digests of what a run's settings name and do not hold – the files of functions, the problems – so that a change under the run is noticed.

A digest is the same in every process for the same content. So it is made of content alone: the order of a set or of keys is none, nor
is an object's place in memory. Of what cannot be looked into, the type alone counts: a change that is missed is better than a run
that cannot be gone on with though nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from typing import Any
from uuid import UUID

import xxhash

from grpo.config import Config
from grpo.imports import FunctionRef
from grpo.types import Problem

_TOLD_BY_THEIR_TEXT = (complex, date, time, timedelta, Decimal, Fraction, PurePath, UUID)
_DEEPEST = 100  # levels; what is deeper is no data, or has no end


class _Endless(Exception):
    """A value holds itself."""


def inputs(config: Config, functions: Iterable[Any], problems: Mapping[str, Sequence[Problem]]) -> dict[str, Any]:
    """What ``changed`` compares.

    Functions are looked at by target, not by file: a function that is typed anew is a decision, whatever its file was before.
    The digests of problems are of use beside that of the settings they were made by: with other settings they may well be others.

    Args:
        config: its paths absolute.
        functions: ``FunctionRef``s, however deep in lists and mappings.
        problems: by split.
    """
    settings = {"data": asdict(config.data), "seed": config.run.seed}
    made = {split: _of_problems(found) for split, found in problems.items() if found}
    return {"functions": dict(_sources(list(functions))), "problems": {"settings": digest(settings).hex(), **made}}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What is other than it was though the settings name the same → what to do, both in words.

    What one of the two does not have, a setting has brought or taken.
    """
    old, new = before.get("functions", {}), now.get("functions", {})
    edited = (target.rpartition(":")[0] for target in old if target in new and old[target] != new[target])
    found = {f"{path} was edited": "put back what it was" for path in edited}
    then, here = before.get("problems", {}), now.get("problems", {})
    if then.get("settings") == here.get("settings"):
        others = [split for split in then if split in here and then[split] != here[split]]
        drawn = "a function that draws them must draw from its argument seed, or they are others at each start"
        found |= {f"the {split} problems are others": f"put back what they were ({drawn})" for split in others}
    return found


def digest(value: Any) -> bytes:
    """The same in every process for the same content; of what holds itself, the type alone."""
    try:
        return _digest(value, ())
    except _Endless:
        return _hash(b"endless:", type(value).__qualname__.encode())


def _of_problems(problems: Sequence[Problem]) -> str:
    """Row by row: a data set may be large."""
    whole = xxhash.xxh3_128()
    for problem in problems:
        columns = {name: digest(value) for name, value in problem.columns.items()}  # each alone: one that is endless hides no other
        whole.update(digest([problem.id, problem.prompt, problem.answer, columns]))
    return whole.hexdigest()


def _sources(value: Any) -> Iterator[tuple[str, str]]:
    """(target, digest of its file's text) of every function from a file of the user's."""
    if isinstance(value, FunctionRef):
        if value.source is not None:
            yield value.target, digest(value.source).hex()
        yield from _sources(value.kwargs)
    elif isinstance(value, Mapping):
        yield from _sources(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sources(item)


def _digest(value: Any, around: tuple[int, ...]) -> bytes:
    """Of a leaf's content, or of the digests of the parts. ``around``: the ids of the values that this one stands in."""
    if isinstance(value, str):
        return _hash(b"str:", value.encode("utf-8", "surrogatepass"))
    if value is None or isinstance(value, bool):
        return _hash(b"constant:", repr(value).encode())
    if isinstance(value, int):
        return _hash(b"int:", hex(value).encode())
    if isinstance(value, float):
        return _hash(b"float:", float.hex(value).encode())
    if isinstance(value, bytes | bytearray | memoryview):
        return _hash(b"bytes:", bytes(value))
    if id(value) in around or len(around) == _DEEPEST:
        raise _Endless
    inside = (*around, id(value))
    if isinstance(value, Mapping):
        return _hash(b"mapping:", *sorted(_digest(key, inside) + _digest(item, inside) for key, item in value.items()))
    if isinstance(value, Set):
        return _hash(b"set:", *sorted(_digest(item, inside) for item in value))
    if isinstance(value, list | tuple):
        return _hash(b"list:", *(_digest(item, inside) for item in value))
    return _hash(b"object:", *(_digest(part, inside) for part in (type(value).__qualname__, *_parts(value))))


def _parts(value: Any) -> tuple[Any, ...]:
    """What an object is made of; nothing where it does not say. Arrays and images are known by what they have: no library is imported."""
    try:
        if is_dataclass(value) and not isinstance(value, type):
            return tuple((field.name, getattr(value, field.name)) for field in fields(value))
        if isinstance(value, Enum):
            return (value.name,)
        if isinstance(value, _TOLD_BY_THEIR_TEXT):
            return (str(value),)
        if _has(value, "dtype", "shape", "untyped_storage"):
            return str(value.dtype), tuple(value.shape), _bytes_of_tensor(value)
        if _has(value, "dtype", "shape", "tobytes"):
            holds_objects = getattr(value.dtype, "hasobject", False)  # their bytes would be addresses
            return str(value.dtype), tuple(value.shape), value.tolist() if holds_objects else value.tobytes()
        if _has(value, "mode", "size", "tobytes"):
            return value.mode, tuple(value.size), value.tobytes()
    except Exception:  # somebody else's code: an image whose file is gone, a tensor without values. No reason not to start
        pass
    return ()


def _has(value: Any, *names: str) -> bool:
    return not isinstance(value, type) and all(hasattr(value, name) for name in names)


def _bytes_of_tensor(tensor: Any) -> bytes:
    import torch  # where there is a tensor, it is imported already

    content: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return content


def _hash(kind: bytes, *parts: bytes) -> bytes:
    return xxhash.xxh3_128_digest(b"".join((kind, *parts)))
