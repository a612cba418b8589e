"""The encoding: what goes in comes out, of the same types; whatever else comes in is refused, and cheaply."""

from __future__ import annotations

import collections
import enum
import math
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.sandbox import codec

_ATOMS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False) | st.text() | st.binary()
    | st.text(st.characters(min_codepoint=0xD700, max_codepoint=0xE100), max_size=3)  # lone surrogates among them
)  # fmt: skip
_KEYS = st.recursive(_ATOMS, lambda keys: st.lists(keys, max_size=3).map(tuple) | st.frozensets(keys, max_size=3), max_leaves=5)
VALUES = st.recursive(
    _ATOMS,
    lambda values: (
        st.lists(values, max_size=5) | st.lists(values, max_size=5).map(tuple) | st.dictionaries(_KEYS, values, max_size=5)
        | st.sets(_KEYS, max_size=5) | st.lists(st.integers(-(2**63), 2**63 - 1)) | st.lists(st.floats(allow_nan=False))
    ),
    max_leaves=20,
)  # fmt: skip


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right)  # tells -0.0 from 0.0
    if isinstance(left, dict):
        return same([list(pair) for pair in left.items()], [list(pair) for pair in right.items()])
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (set, frozenset)):
        return left == right and sorted(map(repr, map(type, left))) == sorted(map(repr, map(type, right)))
    return bool(left == right)


@given(VALUES)
def test_round_trip(value: Any) -> None:
    assert same(codec.decode(codec.encode(value)), value)


def test_nan_stays_nan() -> None:
    back = codec.decode(codec.encode([math.nan, {"x": math.nan}]))
    assert math.isnan(back[0]) and math.isnan(back[1]["x"])


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_plain(data: bytes) -> None:
    try:
        value = codec.Decoder().decode(data)
    except codec.Garbled:
        return
    codec.encode(value)  # so it is plain


@given(VALUES, st.data())
def test_damaged_bytes_are_refused_or_plain(value: Any, data: st.DataObject) -> None:
    encoded = bytearray(codec.encode(value))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.encode(codec.Decoder().decode(bytes(encoded)))
    except codec.Garbled:
        pass


@given(VALUES)
def test_cut_bytes_are_refused(value: Any) -> None:
    encoded = codec.encode(value)
    with pytest.raises(codec.Garbled):
        codec.decode(encoded[:-1])
    with pytest.raises(codec.Garbled):
        codec.decode(encoded + b"N")


class Tint(enum.IntEnum):
    red = 3


Pair = collections.namedtuple("Pair", "a b")


class Liar(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__

    def __str__(self) -> str:
        return "lie"

    def encode(self, *arguments: Any) -> bytes:
        return b"lie"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Tint.red, 3), (Pair(1, 2), (1, 2)), (collections.Counter("aab"), {"a": 2, "b": 1}), (Liar("truth"), "truth"),
        (bytearray(b"x"), b"x"), (np.int64(5), 5), (np.float32(0.5), 0.5), (np.bool_(True), True), (np.str_("a"), "a"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]), (np.array(1.5), 1.5), ([1, True], [1, True]), ([2**63], [2**63]),
    ],
)  # fmt: skip
def test_derived_types_become_their_base(value: Any, plain: Any) -> None:
    assert same(codec.decode(codec.encode(value)), plain)


@pytest.mark.parametrize("value", [object(), range(3), iter([]), {1: print}, [lambda: 0], type, np.array([object()]), ...])
def test_what_is_not_plain_is_refused(value: Any) -> None:
    with pytest.raises(codec.NotPlain):
        codec.encode(value)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def test_depth_is_bounded_both_ways() -> None:
    assert codec.decode(codec.encode(nested(codec.MAX_DEPTH))) == nested(codec.MAX_DEPTH)
    with pytest.raises(codec.NotPlain, match="200"):
        codec.encode(nested(codec.MAX_DEPTH + 1))
    one = b"l\x01\x00\x00\x00"
    with pytest.raises(codec.Garbled, match="deeper"):
        codec.decode(one * 300_000 + b"N")


def test_a_list_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(codec.NotPlain):
        codec.encode(value)


def test_size_is_bounded_both_ways() -> None:
    encoder = codec.Encoder(max_bytes=1000)
    assert encoder.encode("x" * 900)
    with pytest.raises(codec.TooLarge):
        encoder.encode("x" * 900)  # the bound is of all values together
    with pytest.raises(codec.TooLarge):
        codec.Encoder(max_bytes=10**9, max_objects=100).encode([None] * 101)
    with pytest.raises(codec.Garbled, match="more items"):
        codec.Decoder(max_objects=100).decode(codec.encode([None] * 101))
    decoder = codec.Decoder(max_objects=100)
    decoder.decode(codec.encode([None] * 60))
    with pytest.raises(codec.Garbled):
        decoder.decode(codec.encode([None] * 60))


@pytest.mark.parametrize("letter", [b"l", b"t", b"e", b"z", b"d"])
def test_an_announced_length_costs_nothing(letter: bytes) -> None:
    with pytest.raises(codec.Garbled, match="more items"):
        codec.decode(letter + b"\xff\xff\xff\x7f" + b"N" * 10)


@pytest.mark.parametrize("letter", [b"e", b"z", b"d"])
def test_equal_hashes_cost_nothing(letter: bytes) -> None:
    """hash(n) is n modulo 2**61 - 1 in CPython, so these keys have one hash, and a set of them takes quadratic time."""
    keys = [codec.encode(n * (2**61 - 1)) for n in range(1, 100_001)]
    items = b"N".join(keys) + b"N" if letter == b"d" else b"".join(keys)
    count = len(keys) * (2 if letter == b"d" else 1)
    started = time.process_time()
    with pytest.raises(codec.Garbled, match="hash"):
        codec.decode(letter + struct.pack("<I", count) + items)
    assert time.process_time() - started < 5


def test_unhashable_keys_are_refused() -> None:
    with pytest.raises(codec.Garbled):
        codec.decode(b"e\x01\x00\x00\x00" + codec.encode([]))
