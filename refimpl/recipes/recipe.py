"""A recipe as data: which type each tensor gets, by llama-quantize's order of rules.

For every tensor, the first of these that applies:

1. llama-quantize never quantizes it (one axis, a name that does not end in "weight", or one of `keep`): f32
2. the first rule whose pattern is found in its name, and whose layers and expert count fit: the rule's type
3. the recipe's default type

A type of 2 or 3 whose blocks do not divide the rows then falls back to one that fits (FALLBACK, else f16).
Source: llama_tensor_get_type and tensor_type_fallback, src/llama-quant.cpp, llama.cpp 0c1e570.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Literal, Protocol

from refimpl.quants.formats import Format, formats, known

KEPT = "f32"  # what convert writes for everything that llama-quantize then leaves alone
KEEP = (r"_norm\.weight", r"ffn_gate_inp\.weight")
FALLBACK = MappingProxyType(
    {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "q2_k": "q4_0", "q3_k": "q4_0", "tq1_0": "q4_0"}
    | {"tq2_0": "q4_0", "iq1_s": "iq4_nl", "iq1_m": "iq4_nl", "iq2_xxs": "iq4_nl", "iq2_xs": "iq4_nl"}
    | {"iq2_s": "iq4_nl", "iq3_xxs": "iq4_nl", "iq3_s": "iq4_nl", "iq4_xs": "iq4_nl"}
)

_LAYER = re.compile(r"blk\.(\d{1,9})\.", re.ASCII)

Layers = Literal["more_bits"] | tuple[range, ...]


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

    pattern : searched anywhere in the tensor's name
    type    : name of the format that a match gets
    layers  : None: in every layer; "more_bits": use_more_bits; or half-open ranges of layers
    experts : None: whatever the model; else only where it has this many routed experts
    """

    pattern: re.Pattern[str]
    type: str
    layers: Layers | None = None
    experts: int | None = None

    def applies(self, name: str, hp: Sizes) -> bool:
        """Does this rule decide about the tensor `name` of a model like `hp`?"""
        if self.experts not in (None, hp.n_routed_experts) or not self.pattern.search(name):
            return False
        if self.layers is None:
            return True
        match = _LAYER.match(name)
        if match is None:
            return False
        layer = int(match[1])
        if self.layers == "more_bits":
            return use_more_bits(layer, hp.num_hidden_layers + hp.num_nextn_predict_layers)
        return any(layer in one for one in self.layers)


@dataclass(frozen=True)
class Recipe:
    """A named, versioned list of rules (recipes/*.toml, or a file of the user's own)."""

    name: str
    version: str
    about: str
    rules: tuple[Rule, ...]
    default: str
    keep: tuple[re.Pattern[str], ...]

    def type_of(self, name: str, shape: Sequence[int], hp: Sizes) -> str:
        """The format name of one tensor, after the fallback."""
        if is_kept(name, shape, self.keep):
            return KEPT
        rule = next((rule for rule in self.rules if rule.applies(name, hp)), None)
        return fall_back(self.default if rule is None else rule.type, shape[-1])

    def types(self, hp: Sizes, tensors: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """Format names by tensor name.

        tensors : {GGUF name: shape in NumPy order}
        """
        return {name: self.type_of(name, shape, hp) for name, shape in tensors.items()}


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


def is_kept(name: str, shape: Sequence[int], keep: Sequence[re.Pattern[str]]) -> bool:
    """Does llama-quantize leave this tensor as it is?"""
    axes = len(shape)
    while axes > 1 and shape[-axes] == 1:
        axes -= 1  # as ggml_n_dims: outer axes of length 1 do not count
    return axes < 2 or not name.endswith("weight") or any(pattern.search(name) for pattern in keep)


def fall_back(type: str, n: int) -> str:
    """The type, or what llama-quantize takes instead where rows of n weights are no whole blocks of it."""
    if n % format_of(type).weights == 0:
        return type
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


def conform(recipe: Recipe, hp: Sizes, tensors: Mapping[str, Stored]) -> list[Mismatch]:
    """The tensors that have another type than the recipe gives them, in file order."""
    found = []
    for name, tensor in tensors.items():
        want = recipe.type_of(name, tensor.shape, hp)
        if want != tensor.format.name:
            delta = tensor.nbytes - bytes_of(want, tensor.shape)
            found.append(Mismatch(name, want, tensor.format.name, delta))
    return found
