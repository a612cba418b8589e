"""Units of measurement: how they are spelt, and how much of one is another.

A known unit is a factor times powers of a few base units; ``1 m`` equals ``100 cm``, and 15 cm² is not 15 m². An unknown one
(``apples``) only equals itself. An answer without a unit is compared by its number.
"""

from __future__ import annotations

from fractions import Fraction

Unit = tuple[tuple[str, Fraction], ...]  # (name, exponent), sorted by name

_INCH = Fraction(254, 10000)
_POUND = Fraction(45359237, 100000000)
# dimension → {factor to its base unit: spellings}
_TABLE: dict[str, dict[Fraction, str]] = {
    "metre": {
        Fraction(1): "m meter meters metre metres",
        Fraction(1, 10): "dm decimeter decimeters decimetre decimetres",
        Fraction(1, 100): "cm centimeter centimeters centimetre centimetres",
        Fraction(1, 1000): "mm millimeter millimeters millimetre millimetres",
        Fraction(1, 10**6): "um micrometer micrometers micron microns",
        Fraction(1, 10**9): "nm nanometer nanometers",
        Fraction(1000): "km kilometer kilometers kilometre kilometres",
        _INCH: "in inch inches",
        12 * _INCH: "ft foot feet",
        36 * _INCH: "yd yds yard yards",
        63360 * _INCH: "mi mile miles",
    },
    "second": {
        Fraction(1): "s sec secs second seconds",
        Fraction(1, 1000): "ms millisecond milliseconds",
        Fraction(60): "min mins minute minutes",
        Fraction(3600): "h hr hrs hour hours",
        Fraction(86400): "day days",
        Fraction(604800): "week weeks",
    },
    "month": {Fraction(1): "month months", Fraction(12): "yr yrs year years"},
    "kilogram": {
        Fraction(1): "kg kgs kilogram kilograms kilo kilos",
        Fraction(1, 1000): "g gram grams gm",
        Fraction(1, 10**6): "mg milligram milligrams",
        Fraction(1000): "t tonne tonnes",
        _POUND: "lb lbs pound pounds",
        _POUND / 16: "oz ounce ounces",
    },
    "ton": {Fraction(1): "ton tons"},
    "litre": {
        Fraction(1): "l liter liters litre litres",
        Fraction(1, 1000): "ml milliliter milliliters millilitre millilitres cc",
        Fraction(3785411784, 10**9): "gal gallon gallons",
        Fraction(3785411784, 4 * 10**9): "qt quart quarts",
        Fraction(3785411784, 8 * 10**9): "pt pint pints",
        Fraction(3785411784, 16 * 10**9): "cup cups",
    },
    "dollar": {Fraction(1): "$ usd dollar dollars buck bucks", Fraction(1, 100): "cent cents ¢"},
    "euro": {Fraction(1): "€ eur euro euros"},
    "gbp": {Fraction(1): "£ gbp"},
    "yen": {Fraction(1): "¥ yen"},
    "rupee": {Fraction(1): "₹ rs rupee rupees"},
    "yuan": {Fraction(1): "yuan rmb"},
    "degree": {Fraction(1): "° deg degs degree degrees"},
    "radian": {Fraction(1): "rad rads radian radians"},
    "newton": {Fraction(1): "n newton newtons", Fraction(1000): "kn"},
    "joule": {Fraction(1): "j joule joules", Fraction(1000): "kj"},
    "watt": {Fraction(1): "w watt watts", Fraction(1000): "kw kilowatt kilowatts"},
    "volt": {Fraction(1): "v volt volts"},
    "ampere": {Fraction(1): "amp amps ampere amperes"},
    "ohm": {Fraction(1): "ohm ohms"},
    "hertz": {Fraction(1): "hz hertz", Fraction(1000): "khz", Fraction(10**6): "mhz"},
    "pascal": {Fraction(1): "pa pascal pascals", Fraction(1000): "kpa"},
    "mole": {Fraction(1): "mol mole moles"},
    "kelvin": {Fraction(1): "kelvin kelvins"},
    "celsius": {Fraction(1): "celsius"},
    "fahrenheit": {Fraction(1): "fahrenheit"},
}
_KNOWN = {
    word: (dimension, factor) for dimension, by_factor in _TABLE.items() for factor, words in by_factor.items() for word in words.split()
}
_COMPOUND: dict[str, Unit] = {
    "mph": (("hour", Fraction(-1)), ("mile", Fraction(1))),
    "kph": (("hour", Fraction(-1)), ("km", Fraction(1))),
    "mps": (("m", Fraction(1)), ("s", Fraction(-1))),
    "fps": (("ft", Fraction(1)), ("s", Fraction(-1))),
    "sqft": (("ft", Fraction(2)),),
    "percent": (),
}
_COUNTLESS = frozenset(("unit", "units"))  # "6 square units" says nothing
LONE_LETTERS = frozenset("mgslLNJWVhK")  # of which a unit behind a thin space may consist


def is_unit(word: str) -> bool:
    return len(word) > 1 and (word.lower() in _KNOWN or word.lower() in _COMPOUND or word.lower() in _COUNTLESS)


def spell_out(word: str) -> Unit:
    """One word → units, e.g. ``mph`` → mile per hour."""
    lower = word.lower()
    return _COMPOUND.get(lower, ((lower, Fraction(1)),))


def combine(parts: list[tuple[str, Fraction]]) -> Unit:
    """Collect equal names, drop what says nothing."""
    exponents: dict[str, Fraction] = {}
    for name, exponent in parts:
        if name not in _COUNTLESS:
            exponents[name] = exponents.get(name, Fraction(0)) + exponent
    return tuple(sorted((name, exponent) for name, exponent in exponents.items() if exponent))


def factor_between(left: Unit, right: Unit) -> Fraction | None:
    """How many ``right`` one ``left`` is; None if they measure different things. Litres are cubic decimetres."""
    (left_dimensions, left_factor), (right_dimensions, right_factor) = _reduce(left), _reduce(right)
    return left_factor / right_factor if left_dimensions == right_dimensions else None


def _reduce(unit: Unit) -> tuple[dict[str, Fraction], Fraction]:
    dimensions: dict[str, Fraction] = {}
    total = Fraction(1)
    for name, exponent in unit:
        dimension, factor = _KNOWN.get(name, (name.removesuffix("s"), Fraction(1)))
        if dimension == "litre":
            dimension, factor, power = "metre", factor / 1000, 3 * exponent
        else:
            power = exponent
        if exponent.denominator == 1 and abs(exponent) <= 12:
            total *= factor**exponent.numerator
        dimensions[dimension] = dimensions.get(dimension, Fraction(0)) + power
    return {name: power for name, power in dimensions.items() if power}, total
