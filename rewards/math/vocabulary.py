"""Which words mean what: functions, letters, LaTeX commands, numbers in words, and the words that take an answer back."""

from __future__ import annotations


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = names(
    "sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan sinh cosh tanh coth sech csch arsinh arcosh artanh ln lg log exp "
    "max min gcd lcm abs floor ceil sgn cis"
)
GREEK = names(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega Gamma Delta Theta "
    "Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
)
DECORATIONS = names("overline vec hat overrightarrow tilde dot mathcal mathscr mathbf")  # of a letter, which is another one with it
FIGURES = names("angle triangle odot measuredangle")  # before the points that name it
STARTS = (
    FUNCTIONS | GREEK | DECORATIONS | FIGURES | names("frac sqrt binom pi infty lfloor lceil begin sum prod mathbb ldots")
)  # of a factor
COMMANDS = STARTS | names(
    "rfloor rceil langle rangle in notin cup cap setminus emptyset pm mp le ge ne approx equiv over choose end hline to"
)
PLAIN_NAMES = FUNCTIONS | GREEK | names("pi sqrt infty")  # those that also count without a backslash
PREFIXES = ("arcsin", "arccos", "arctan", "sqrt", "sin", "cos", "tan", "cot", "log", "ln", "pi")  # sqrtx, pir
SEPARATORS = names("and or")

SYNONYMS = {
    **{"varphi": "phi", "varepsilon": "epsilon", "vartheta": "theta", "varrho": "rho", "varsigma": "sigma"},
    **{"infinity": "infty", "inf": "infty", "oo": "infty", "varnothing": "emptyset", "backslash": "setminus", "union": "cup"},
    **{"dots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "cdots": "ldots", "vdots": "ldots", "ddots": "ldots"},
    **{"tg": "tan", "ctg": "cot", "cosec": "csc", "arctg": "arctan", "asin": "arcsin", "acos": "arccos", "atan": "arctan"},
    **{"land": "and", "wedge": "and", "lor": "or", "vee": "or", "bar": "overline", "widehat": "hat", "simeq": "approx"},
}
SCALES = {
    **{"dozen": 12, "hundred": 10**2, "thousand": 10**3, "trillion": 10**12},
    **{"million": 10**6, "millions": 10**6, "billion": 10**9, "billions": 10**9},
}
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBER_WORDS = {word: number for number, word in enumerate(_COUNTED)} | {"sixteen": 16, "twenty": 20}
KNOWN_WORDS = PLAIN_NAMES | frozenset(SYNONYMS) | names("percent deg")

MEANINGS = {  # of a whole answer in words
    **dict.fromkeys(("all real numbers", "all reals", "real numbers", "any real number"), r"\mathbb{R}"),
    **dict.fromkeys(("no solution", "no solutions", "no real solution", "no real solutions", "empty set"), r"\emptyset"),
    "dne": "does not exist",
    **{word: str(number) for word, number in NUMBER_WORDS.items()},
}
NOT_UNITS = names(  # words that take an answer back, or join it to another
    "and or not no about around approx maybe perhaps almost more less than least most at if else either neither nor none between but also "
    "both is are was be the to from by for with without wrong incorrect false guess unsure uncertain unknown invalid impossible never "
    "estimate since because lambda import eval exec open"
)
