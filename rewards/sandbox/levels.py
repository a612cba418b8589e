"""The levels of isolation, strongest first, and what each is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    name: str
    namespaces: bool = False
    own_uid: bool = False  # programs run under a uid that nobody else has
    landlock: bool = False  # without it the level does not hold
    seccomp: bool = True
    weakness: str = ""  # what it leaves open; such a level is used only when asked for


LEVELS = {
    level.name: level
    for level in (
        Level(name="namespaces", namespaces=True),
        Level(name="landlock+uid", own_uid=True, landlock=True),
        Level(name="landlock", landlock=True),
        Level(name="seccomp", weakness="programs can read and change every file that this process can"),
        Level(name="none", seccomp=False, weakness="programs can do whatever this process can; only time and memory are limited"),
    )
}
STRONG = tuple(name for name, level in LEVELS.items() if not level.weakness)
