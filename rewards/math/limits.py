"""How large an answer may be. Every stage asks before it computes; nothing here is ever measured by computing it."""

from __future__ import annotations

MAX_CHARS = 2_000  # of an answer
MAX_NESTING = 40  # of brackets, exponents and arguments
MAX_DEPTH = 200  # of a syntax tree
MAX_ITEMS = 200  # of a list, set, tuple or matrix
MAX_DIGITS = 4_300  # of a number as it is written: Python's own limit for text → int
MAX_EXACT_BITS = 80_000  # of an exact number as it is computed, some 24,000 decimal digits: 2004! has 5,749
MAX_PRECISION = 12_000  # bits of a numeric probe
MAX_LOG2 = 1_000_000  # of an inexact number: e^{500000} is compared, e^{e^{20}} is not
MAX_SERIES = 2_000  # terms of a sum or product with bounds
MAX_STEPS = 20_000  # of one evaluation; a step is some 10 µs


class NotUnderstood(ValueError):
    """The text is not an answer in the language of ``parse``."""


class TooLarge(ValueError):
    """The text is an answer, but one that nobody should compute."""
