"""Plain values as bytes, for both directions between the owner and a program.

What comes from a program is hostile until shown otherwise. Decoding makes builtin values only, calls nothing of anybody's, and is
bounded in bytes, objects, depth, and in what colliding hashes can cost. Format: a letter and what it needs; lengths are 32-bit,
little-endian. A list of small integers or of floats is one block of 64-bit numbers.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Iterable
from typing import Any

MAX_DEPTH = 200
MAX_OBJECTS = 500_000  # in one value, blocks of numbers counted as one
MAX_INT_BYTES = 1 << 20
_MAX_EQUAL_HASHES = 1_000
_LENGTH = struct.Struct("<I")
_FLOAT = struct.Struct("<d")
_COMPLEX = struct.Struct("<dd")
_BIG_ENDIAN = sys.byteorder == "big"


class NotPlain(TypeError):
    """The value holds something that is not of a builtin plain type, or is nested too deeply."""


class TooLarge(ValueError):
    """The value has more bytes or objects than are allowed."""


class Garbled(ValueError):
    """These bytes are no encoded value."""


def encode(value: Any) -> bytes:
    """``Encoder.encode`` of one trusted value, which may be large."""
    return Encoder(max_bytes=1 << 31, max_objects=sys.maxsize).encode(value)


class Encoder:
    """Encodes values as long as bytes and objects last, which all of them share."""

    def __init__(self, max_bytes: int, max_objects: int = MAX_OBJECTS) -> None:
        self._out = bytearray()
        self._bytes_left = max_bytes
        self._objects_left = max_objects

    def encode(self, value: Any) -> bytes:
        """
        Subclasses are encoded as the builtin type they derive from, by that type's own methods; NumPy scalars and arrays as what
        their ``tolist`` gives.

        Raises:
            NotPlain, TooLarge: see there.
        """
        self._out = bytearray()
        self._put(value, 0)
        self._bytes_left -= len(self._out)
        return bytes(self._out)

    def _put(self, value: Any, depth: int) -> None:
        self._objects_left -= 1
        if self._objects_left < 0:
            raise TooLarge("it has too many objects")
        if depth > MAX_DEPTH:
            raise NotPlain(f"it is nested deeper than {MAX_DEPTH} levels")
        kind = type(value)
        put = _PUT.get(kind) or _put_of_base(kind)
        if put is None:
            return self._put(_from_numpy(value), depth + 1)
        put(self, value, depth)
        if len(self._out) > self._bytes_left:
            raise TooLarge(f"it has more than {self._bytes_left:,} bytes")

    def _none(self, value: Any, depth: int) -> None:
        self._out += b"N"

    def _bool(self, value: Any, depth: int) -> None:
        self._out += b"T" if value else b"F"

    def _int(self, value: Any, depth: int) -> None:
        value = int.__pos__(value)
        self._sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))

    def _float(self, value: Any, depth: int) -> None:
        self._out += b"f" + _FLOAT.pack(float.__float__(value))

    def _complex(self, value: Any, depth: int) -> None:
        self._out += b"c" + _COMPLEX.pack(value.real, value.imag)

    def _str(self, value: Any, depth: int) -> None:
        self._sized(b"s", str.encode(value, "utf-8", "surrogatepass"))

    def _bytes(self, value: Any, depth: int) -> None:
        self._sized(b"b", bytes(memoryview(value)))

    def _sized(self, letter: bytes, content: bytes) -> None:
        if len(self._out) + len(content) > self._bytes_left:
            raise TooLarge(f"it has more than {self._bytes_left:,} bytes")
        self._out += letter + _LENGTH.pack(len(content)) + content

    def _list(self, value: Any, depth: int) -> None:
        items = list(list.__iter__(value))
        block = _block(items)
        if block is None:
            self._items(b"l", items, depth)
        else:
            self._sized(*block)

    def _tuple(self, value: Any, depth: int) -> None:
        self._items(b"t", list(tuple.__iter__(value)), depth)

    def _set(self, value: Any, depth: int) -> None:
        self._items(b"e", list(set.__iter__(value)), depth)

    def _frozenset(self, value: Any, depth: int) -> None:
        self._items(b"z", list(frozenset.__iter__(value)), depth)

    def _dict(self, value: Any, depth: int) -> None:
        pairs = list(dict.items(value))
        self._items(b"d", [item for pair in pairs for item in pair], depth)

    def _items(self, letter: bytes, items: list[Any], depth: int) -> None:
        self._out += letter + _LENGTH.pack(len(items))
        for item in items:
            self._put(item, depth + 1)


_Put = Callable[[Encoder, Any, int], None]
_PUT: dict[type, _Put] = {
    type(None): Encoder._none,
    bool: Encoder._bool,
    int: Encoder._int,
    float: Encoder._float,
    complex: Encoder._complex,
    str: Encoder._str,
    bytes: Encoder._bytes,
    bytearray: Encoder._bytes,
    list: Encoder._list,
    tuple: Encoder._tuple,
    set: Encoder._set,
    frozenset: Encoder._frozenset,
    dict: Encoder._dict,
}


def _put_of_base(kind: type) -> _Put | None:
    return None if _is_numpy(kind) else next((_PUT[base] for base in type.mro(kind) if base in _PUT), None)


def _is_numpy(kind: type) -> bool:
    return str(kind.__module__).partition(".")[0] == "numpy"


def _from_numpy(value: Any) -> Any:
    kind = type(value)
    if not _is_numpy(kind) or not hasattr(kind, "tolist"):
        raise NotPlain(f"it holds an object of type {kind.__name__}")
    return kind.tolist(value)


def _block(items: list[Any]) -> tuple[bytes, bytes] | None:
    """The list as a block of numbers, if it is one."""
    kinds = set(map(type, items))
    if kinds == {int}:
        try:
            numbers = array("q", items)
        except OverflowError:
            return None
        letter = b"I"
    elif kinds == {float}:
        numbers, letter = array("d", items), b"D"
    else:
        return None
    if _BIG_ENDIAN:
        numbers.byteswap()
    return letter, numbers.tobytes()


def decode(data: bytes | memoryview) -> Any:
    """``Decoder.decode`` of one trusted value, which may be large."""
    return Decoder(max_objects=sys.maxsize).decode(data)


class Decoder:
    """Decodes values as long as objects last, which all of them share."""

    def __init__(self, max_objects: int = MAX_OBJECTS) -> None:
        self._data = memoryview(b"")
        self._objects_left = max_objects
        self.position = 0

    def decode(self, data: bytes | memoryview) -> Any:
        """
        Raises:
            Garbled: anything is wrong with it.
        """
        self._data, self.position = memoryview(data), 0
        try:
            value = self.value(0)
        except (struct.error, TypeError, OverflowError, RecursionError, MemoryError) as error:
            raise Garbled(str(error)) from None
        except UnicodeDecodeError as error:
            raise Garbled(f"a string is not UTF-8: {error.reason}") from None
        if self.position != len(data):
            raise Garbled("there are bytes behind the value")
        return value

    def value(self, depth: int) -> Any:
        self._objects_left -= 1
        if self._objects_left < 0:
            raise Garbled("it has too many objects")
        if depth > MAX_DEPTH:
            raise Garbled(f"it is nested deeper than {MAX_DEPTH} levels")
        letter = bytes(self._take(1))
        if letter in _CONSTANTS:
            return _CONSTANTS[letter]
        if letter in _FIXED:
            return _FIXED[letter](self)
        if letter in _SIZED:
            return _SIZED[letter](self._take(self._length()))
        if letter in _CONTAINERS:
            return _CONTAINERS[letter]([self.value(depth + 1) for _ in range(self._count())])
        raise Garbled(f"unknown letter {letter!r}")

    def _take(self, size: int) -> memoryview:
        end = self.position + size
        if end > len(self._data):
            raise Garbled("it ends too soon")
        part = self._data[self.position : end]
        self.position = end
        return part

    def _length(self) -> int:
        return int(_LENGTH.unpack(self._take(_LENGTH.size))[0])

    def _count(self) -> int:
        count = self._length()
        if count > min(len(self._data) - self.position, self._objects_left):
            raise Garbled("it announces more items than there can be")
        return count

    def float(self) -> float:
        return float(_FLOAT.unpack(self._take(_FLOAT.size))[0])

    def complex(self) -> complex:
        return complex(*_COMPLEX.unpack(self._take(_COMPLEX.size)))


def _int(content: memoryview) -> int:
    if len(content) > MAX_INT_BYTES:
        raise Garbled(f"an integer has more than {MAX_INT_BYTES:,} bytes")
    return int.from_bytes(content, "little", signed=True)


def _numbers(kind: str) -> Callable[[memoryview], list[Any]]:
    def read(content: memoryview) -> list[Any]:
        if len(content) % 8:
            raise Garbled("a block of numbers has a part of a number")
        numbers = array(kind)
        numbers.frombytes(content)
        if _BIG_ENDIAN:
            numbers.byteswap()
        return numbers.tolist()

    return read


def _check_hashes(keys: Iterable[Any], num: int) -> None:
    """A set of a million integers that all have one hash takes hours to build."""
    if num - len(set(map(hash, keys))) > _MAX_EQUAL_HASHES:
        raise Garbled("too many keys have the same hash")


def _as_set(items: list[Any]) -> set[Any]:
    _check_hashes(items, len(items))
    return set(items)


def _as_dict(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise Garbled("a key has no value")
    _check_hashes(items[::2], len(items) // 2)
    return dict(zip(items[::2], items[1::2], strict=True))


_CONSTANTS: dict[bytes, Any] = {b"N": None, b"T": True, b"F": False}
_FIXED: dict[bytes, Callable[[Decoder], Any]] = {b"f": Decoder.float, b"c": Decoder.complex}
_SIZED: dict[bytes, Callable[[memoryview], Any]] = {
    b"i": _int,
    b"s": lambda content: str(content, "utf-8", "surrogatepass"),
    b"b": bytes,
    b"I": _numbers("q"),
    b"D": _numbers("d"),
}
_CONTAINERS: dict[bytes, Callable[[list[Any]], Any]] = {
    b"l": lambda items: items,
    b"t": tuple,
    b"e": _as_set,
    b"z": lambda items: frozenset(_as_set(items)),
    b"d": _as_dict,
}
