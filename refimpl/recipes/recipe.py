"""A recipe as data: which type each tensor gets, by llama-quantize's order of rules.

For every tensor, the first of these that applies:

1. llama-quantize never quantizes it (one axis, a name that does not end in "weight", or one of `keep`): f32
2. the first rule whose pattern is found in its name, and whose conditions hold: the rule's type
3. the recipe's default type

Tensors are asked for in llama-quantize's order, since one kind of rule counts those it has met.

A type of 2 or 3 whose blocks do not divide the rows then falls back to one that fits (FALLBACK, else f16).
Source: llama_tensor_get_type and tensor_type_fallback, src/llama-quant.cpp, llama.cpp 0c1e570.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Literal, Protocol

from refimpl.errors import Usage
from refimpl.quants.formats import Format, formats, known

KEPT = "f32"  # what convert writes for everything that llama-quantize then leaves alone
KEEP = (r"_norm\.weight", r"ffn_gate_inp\.weight")
FALLBACK = MappingProxyType(
    {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
    | dict.fromkeys(("q2_k", "q3_k", "q2_0", "tq1_0", "tq2_0"), "q4_0")
    | {"iq1_s": "iq4_nl", "iq1_m": "iq4_nl", "iq2_xxs": "iq4_nl", "iq2_xs": "iq4_nl"}
    | {"iq2_s": "iq4_nl", "iq3_xxs": "iq4_nl", "iq3_s": "iq4_nl", "iq4_xs": "iq4_nl"}
)

NEEDS_IMATRIX = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"})
NEVER_NEED_IT = ("token_embd.weight", "output.weight")

_LAYER = re.compile(r"blk\.(\d{1,9})\.", re.ASCII)

Place = Literal["more_bits", "first_eighth", "first_sixteenth", "middle", "first_met"]
Layers = Place | tuple[range, ...]


class Sizes(Protocol):
    """What a recipe needs to know of a model's hyperparameters."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_nextn_predict_layers(self) -> int: ...
    @property
    def n_routed_experts(self) -> int: ...


class Stored(Protocol):
    """What a recipe needs to know of a tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> Format: ...
    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    pattern   : searched anywhere in the tensor's name
    type      : name of the format that a match gets
    layers    : None: in every layer; a name of PLACES; or half-open ranges of layers
    experts   : None: whatever the model; else only where it has this many routed experts
    imatrix   : None: always; else only with an imatrix (True) or without one (False)
    axes      : None: any; else only for tensors of so many axes, outer ones of length 1 not counted
    otherwise : the type instead, where the rows are no whole blocks of the recipe's default type
    """

    pattern: re.Pattern[str]
    type: str
    layers: Layers | None = None
    experts: int | None = None
    imatrix: bool | None = None
    axes: int | None = None
    otherwise: str | None = None

    def matches(self, name: str, shape: Sequence[int], experts: int, imatrix: bool) -> bool:
        """Does this rule speak of the tensor `name`, whatever its layer?"""
        return (
            self.experts in (None, experts)
            and self.imatrix in (None, imatrix)
            and self.axes in (None, _axes(shape))
            and self.pattern.search(name) is not None
        )

    def covers(self, name: str, layers: int, met: int) -> bool:
        """Is the tensor's layer one of the rule's? met: tensors that the rule has matched before."""
        if self.layers is None:
            return True
        if self.layers == "first_met":
            return met < layers // 8
        match = _LAYER.match(name)
        if match is None:
            return False
        layer = int(match[1])
        if isinstance(self.layers, str):
            return PLACES[self.layers](layer, layers)
        return any(layer in one for one in self.layers)


@dataclass(frozen=True)
class Choice:
    """The type that a tensor gets, and the one that the recipe wanted: another, where its rows are no whole blocks.

    kept : llama-quantize leaves the tensor as it is, f32 in any file that convert wrote
    """

    type: str
    wanted: str
    kept: bool = False


@dataclass(frozen=True)
class Recipe:
    """A named, versioned list of rules (recipes/*.toml, or a file of the user's own).

    file_type     : general.file_type of what llama-quantize writes by it
    needs_imatrix : types that it does not give without an imatrix, besides NEEDS_IMATRIX
    """

    name: str
    version: str
    about: str
    rules: tuple[Rule, ...]
    default: str
    keep: tuple[re.Pattern[str], ...]
    file_type: int = 0
    needs_imatrix: frozenset[str] = frozenset()

    def choices(
        self, hp: Sizes, tensors: Mapping[str, Sequence[int]], imatrix: bool = False
    ) -> Iterator[tuple[str, Choice]]:
        """What each tensor gets, in llama-quantize's order; arguments as of `choose`."""
        layers = hp.num_hidden_layers + hp.num_nextn_predict_layers
        met: Counter[int] = Counter()
        for name in sorted(tensors, key=quantizing_order):
            shape = tensors[name]
            if is_kept(name, shape, self.keep):
                yield name, Choice(KEPT, KEPT, kept=True)
                continue
            wanted = self.default
            for i, rule in enumerate(self.rules):
                if rule.matches(name, shape, hp.n_routed_experts, imatrix):
                    met[i] += 1
                    if rule.covers(name, layers, met[i] - 1):
                        odd = rule.otherwise is not None and shape[-1] % format_of(self.default).weights
                        wanted = rule.otherwise if odd and rule.otherwise else rule.type
                        break
            yield name, Choice(fall_back(wanted, shape[-1]), wanted)

    def choose(
        self, hp: Sizes, tensors: Mapping[str, Sequence[int]], imatrix: bool = False
    ) -> dict[str, Choice]:
        """What each tensor gets, by name.

        tensors : {GGUF name: shape in NumPy order}
        imatrix : is it quantized with an imatrix?
        """
        found = dict(self.choices(hp, tensors, imatrix))
        return {name: found[name] for name in tensors}

    def types(self, hp: Sizes, tensors: Mapping[str, Sequence[int]], imatrix: bool = False) -> dict[str, str]:
        """Format names by tensor name; arguments as of `choose`."""
        return {name: choice.type for name, choice in self.choose(hp, tensors, imatrix).items()}

    def requires_imatrix(self, name: str, type: str) -> bool:
        """Does llama-quantize refuse to give the tensor this type without an imatrix?"""
        return name not in NEVER_NEED_IT and type in NEEDS_IMATRIX | self.needs_imatrix


@dataclass(frozen=True)
class Mismatch:
    """A tensor that has another type than the recipe gives it; bytes_delta: found less expected."""

    tensor: str
    expected: str
    found: str
    bytes_delta: int


def use_more_bits(layer: int, layers: int) -> bool:
    """Do the _M mixes give this layer more bits? Yes in the first and last eighth, and each third between.

    layers counts all blocks, multi-token prediction (MTP) included: llama.cpp's n_layer_all.
    """
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


PLACES: Mapping[str, Callable[[int, int], bool]] = MappingProxyType(
    {
        "more_bits": use_more_bits,
        "first_eighth": lambda layer, layers: layer < layers // 8,
        "first_sixteenth": lambda layer, layers: layer < layers // 16,
        "middle": lambda layer, layers: layers // 8 <= layer < 7 * layers // 8,
    }
)


def quantizing_order(name: str) -> tuple[int, bytes]:
    """Sort key of llama-quantize's order: what belongs to no layer, then layer by layer, by name."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1, name.encode()


def is_kept(name: str, shape: Sequence[int], keep: Sequence[re.Pattern[str]]) -> bool:
    """Does llama-quantize leave this tensor as it is?"""
    return _axes(shape) < 2 or not name.endswith("weight") or any(pattern.search(name) for pattern in keep)


def _axes(shape: Sequence[int]) -> int:
    """As ggml_n_dims: outer axes of length 1 do not count."""
    axes = len(shape)
    while axes > 1 and shape[-axes] == 1:
        axes -= 1
    return axes


def fall_back(type: str, n: int) -> str:
    """The type, or what llama-quantize takes instead where rows of n weights are no whole blocks of it.

    Raises Usage where it refuses: a type of more than 32 weights a block that has no fallback.
    """
    weights = format_of(type).weights
    if n % weights == 0:
        return type
    if weights > 32 and type not in FALLBACK:
        raise Usage(f"rows of {n} weights are no whole blocks of {type}, which has no fallback")
    other = FALLBACK.get(type, type)
    return other if n % format_of(other).weights == 0 else "f16"


@cache
def format_of(name: str) -> Format:
    """The format of this name, also one that refimpl only measures. Raises ValueError for an unknown one."""
    if name in formats:
        return formats[name]
    from gguf.constants import GGMLQuantizationType

    try:
        found = known(GGMLQuantizationType[name.upper()].value)
    except KeyError:
        found = None
    if found is None:
        raise ValueError(f"there is no tensor type {name!r}")
    return found


def bytes_of(type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this shape in this type."""
    return prod(shape[:-1]) * format_of(type).row_bytes(shape[-1])


def conform(
    recipe: Recipe, hp: Sizes, tensors: Mapping[str, Stored], imatrix: bool = False
) -> list[Mismatch]:
    """The tensors that have another type than the recipe gives them, in file order."""
    found = mismatches(recipe, hp, tensors, imatrix, len(tensors))
    assert found is not None
    return found


def mismatches(
    recipe: Recipe, hp: Sizes, tensors: Mapping[str, Stored], imatrix: bool, most: int
) -> list[Mismatch] | None:
    """As `conform`; None as soon as there are more than `most`."""
    found = {}
    for name, choice in recipe.choices(hp, {name: t.shape for name, t in tensors.items()}, imatrix):
        tensor = tensors[name]
        if choice.type != tensor.format.name:
            delta = tensor.nbytes - bytes_of(choice.type, tensor.shape)
            found[name] = Mismatch(name, choice.type, tensor.format.name, delta)
            if len(found) > most:
                return None
    return [found[name] for name in tensors if name in found]
