"""Parameter labels in names, such as "555B-A14B", and whether they fit the arithmetic.

    total    "754B"      all parameters, with or without the multi-token-prediction (MTP) layer
    active   "A40B"      per token: routed experts count K of E; with or without embedding, head and MTP layer
    experts  "192x22B"   as llama.cpp's converter writes size labels: E x (all shared parameters + one expert)

A label fits where the true number, rounded or cut off at the label's last digit, gives the label. Trailing
zeros beyond the second digit count as rounded ("750B" stands for 745 to 760).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal

Kind = Literal["total", "active", "experts"]
LONGEST = 1000  # characters of a name that are looked at
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LABEL = re.compile(
    r"(?<![0-9A-Za-z.])"
    r"(?:(?P<experts>\d{1,5})x|(?P<active>A))?"
    r"(?P<digits>\d{1,6}(?:\.\d{1,4})?)(?P<unit>[KMBT])"
    r"(?=A\d|(?P<after>[-_ ]?active)|(?P<tokens>[-_ ]?tok)|(?![0-9A-Za-z]))",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True)
class Numbers:
    """The true numbers behind labels: {convention: parameters}; of a GGUF or checkpoint, from its tensors."""

    total: Mapping[str, int]
    active: Mapping[str, int]
    experts: Mapping[str, int]
    n_experts: int | None


@dataclass(frozen=True)
class Claim:
    """One label, and what is true.

    text  : as written, such as "A14B"
    where : every place that says so, such as "general.name"
    fits  : the convention that it fits, None where it fits none
    true  : {convention: parameters}
    """

    text: str
    kind: Kind
    where: tuple[str, ...]
    fits: str | None
    true: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "where": list(self.where), "true": dict(self.true)}


def judge(names: Mapping[str, str], numbers: Numbers) -> list[Claim]:
    """Find the labels in some names, and hold each against the true numbers.

    names : {place: text}, such as {"general.name": "GLM-5.1-REAP-555B-A14B"}
    """
    places: dict[tuple[Kind, str], list[str]] = {}
    matches: dict[tuple[Kind, str], re.Match[str]] = {}
    for place, text in names.items():
        for match in _LABEL.finditer(text[:LONGEST]):
            kind = _kind(match)
            if kind is None or _is_about_something_else(match, numbers):
                continue
            key = kind, match[0].upper().replace("X", "x")
            if place not in places.setdefault(key, []):
                places[key].append(place)
            matches[key] = match
    return [_claim(*key, matches[key], tuple(where), numbers) for key, where in places.items()]


def _kind(match: re.Match[str]) -> Kind | None:
    if match["tokens"]:
        return None
    if match["experts"]:
        return "experts"
    return "active" if match["active"] or match["after"] else "total"


def _is_about_something_else(match: re.Match[str], numbers: Numbers) -> bool:
    """Is a number of thousands or millions a context length or the like, as the model has billions?"""
    return match["unit"].upper() in "KM" and max(numbers.total.values(), default=0) >= 10**9


def _claim(kind: Kind, text: str, match: re.Match[str], where: tuple[str, ...], numbers: Numbers) -> Claim:
    true: Mapping[str, int] = getattr(numbers, kind)
    counted = kind != "experts" or int(match["experts"]) == numbers.n_experts
    fits = next(
        (how for how, n in true.items() if counted and _fits(match["digits"], match["unit"], n)), None
    )
    return Claim(text, kind, where, fits, true)


def _fits(digits: str, unit: str, true: int) -> bool:
    """Does rounding or cutting off `true` at the label's last significant digit give the label?"""
    value = Decimal(digits) * _UNITS[unit.upper()]
    _, _, decimals = digits.partition(".")
    step = Decimal(_UNITS[unit.upper()]).scaleb(-len(decimals))
    if not decimals:
        zeros = len(digits) - len(digits.rstrip("0"))
        step *= 10 ** max(0, min(zeros, len(digits) - 2))
    return value - step / 2 <= true < value + step


def show(parameters: int) -> str:
    """A count as people write it: "562.69 B"."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:,.2f} {letter}"
    return f"{parameters:,}"


def describe(claim: Claim) -> str:
    """What a claim says and what is true, in one sentence."""
    said = {"total": "parameters in all", "active": "active parameters", "experts": "experts x parameters"}
    truths: list[str] = [f"{show(n)} {how}" for how, n in claim.true.items()]
    return (
        f"{_join(claim.where)} says {claim.text} ({said[claim.kind]}); true: {', '.join(truths) or 'unknown'}"
    )


def _join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
