"""Recipes give the types that llama-quantize gives, and weigh what it weighs."""

from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from math import prod

import pytest
from glm51 import Sizes, shapes

from refimpl import recipes
from refimpl.errors import BadFile, Usage
from refimpl.quants.formats import Format
from refimpl.recipes.recipe import bytes_of, fall_back, format_of, is_kept, use_more_bits

STOCK, PROTECTED, LITERAL = recipes.names()[:3]


@dataclass(frozen=True)
class Stored:
    shape: tuple[int, ...]
    format: Format

    @property
    def nbytes(self) -> int:
        return bytes_of(self.format.name, self.shape)


def store(types: dict[str, str], tensors: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    return {name: Stored(shape, format_of(types[name])) for name, shape in tensors.items()}


def weigh(name: str, experts: int = 192, mtp: bool = False) -> int:
    tensors = shapes(experts, mtp)
    types = recipes.load(name).types(Sizes(experts, int(mtp)), tensors)
    return sum(bytes_of(types[tensor], shape) for tensor, shape in tensors.items())


def write(tmp_path, text: str) -> str:
    path = tmp_path / "my.toml"
    path.write_text(text)
    return str(path)


# llama-quantize --dry-run of 0c1e570 on a file of these 1,782 tensors says the same, byte by byte
@pytest.mark.parametrize(
    ("name", "size"), [(STOCK, 339_098_630_400), (PROTECTED, 348_128_184_576), (LITERAL, 373_042_350_336)]
)
def test_recipes_weigh_what_llama_quantize_writes_at_192_experts(name, size):
    assert weigh(name) == size


# sha256 of the sorted lines "name type" that the same dry-runs print, without and with the MTP layer
@pytest.mark.parametrize(
    ("name", "mtp", "digest"),
    [
        (STOCK, False, "baa6314c8b24766b375973c2003cee4238a245a1641e3bded8ad2cbdd5b415ba"),
        (STOCK, True, "dafe9a90cc28f2f8c4cb18a1a99f4b19ebcc9966b69652019ee04d1a22750ebe"),
        (PROTECTED, False, "ba27ba3bbb14cc1e3eb7fa3b8bd6e34d5395a9622e8a034abdcde84d84ee415b"),
        (PROTECTED, True, "698b2122a0ebe94aefb5f1cfcef61e362203adc2d51d29c1a20601206281c661"),
        (LITERAL, False, "ce205c36c819363c2652708eeb79fa27a8e06fc89c5e9aa66bd26778e75a9e5d"),
        (LITERAL, True, "d2bbcae9188e4bb90d6366db301deb71083fd09e55e47b272ff8c0691f1776cd"),
    ],
)
def test_every_tensor_gets_the_type_that_llama_quantize_gives_it(name, mtp, digest):
    types = recipes.load(name).types(Sizes(192, int(mtp)), shapes(192, mtp))
    lines = "".join(f"{tensor} {type}\n" for tensor, type in sorted(types.items()))
    assert sha256(lines.encode()).hexdigest() == digest


def test_a_file_of_all_routed_experts_in_q4_k_weighs_what_llama_quantize_writes(tmp_path):
    path = write(tmp_path, 'base = "q4_k_m-protected"\n[[rule]]\nmatch = "_exps"\ntype = "q4_K"\n')
    assert weigh(path) == 326_328_289_536


@pytest.mark.parametrize(
    ("name", "size"), [(STOCK, 343_969_028_096), (PROTECTED, 353_100_621_824), (LITERAL, 378_014_787_584)]
)
def test_recipes_weigh_what_llama_quantize_writes_with_the_mtp_layer(name, size):
    assert weigh(name, mtp=True) == size


def test_the_real_model_has_1782_tensors():
    assert len(shapes()) == 1782


def test_protected_spares_only_the_routed_experts_and_the_router():
    tensors = shapes()
    types = recipes.load(PROTECTED).types(Sizes(), tensors)
    routed = {name for name in tensors if "_exps." in name}
    assert Counter(types[name] for name in routed) == {"q4_k": 190, "q6_k": 35}
    rest = {name for name in tensors if name not in routed and types[name] != "q8_0"}
    assert {types[name] for name in rest} == {"f32"}
    large = {name.split(".", 2)[2] for name in rest if prod(tensors[name]) > 16384}
    assert large == {"ffn_gate_inp.weight"}
    assert types["blk.5.indexer.proj.weight"] == types["blk.5.attn_k_b.weight"] == "q8_0"


def test_stock_gives_key_rows_of_192_weights_the_fallback():
    types = recipes.load(STOCK).types(Sizes(), shapes())
    assert types["blk.0.attn_k_b.weight"] == "q5_0"
    assert types["blk.0.attn_v_b.weight"] == types["token_embd.weight"] == "q4_k"
    assert types["blk.0.indexer.proj.weight"] == "q4_k"
    assert types["output.weight"] == "q6_k"


def test_down_is_q6_k_in_the_layers_with_more_bits():
    types = recipes.load(STOCK).types(Sizes(), shapes())
    down = [layer for layer in range(3, 78) if types[f"blk.{layer}.ffn_down_exps.weight"] == "q6_k"]
    assert down == [*range(3, 9), *range(11, 68, 3), *range(68, 78)]


def test_the_mtp_block_counts_for_the_layers_with_more_bits():
    without = recipes.load(STOCK).types(Sizes(), shapes())
    with_it = recipes.load(STOCK).types(Sizes(num_nextn_predict_layers=1), shapes(mtp=True))
    assert without["blk.68.ffn_down_exps.weight"] == "q6_k"
    assert not use_more_bits(67, 79) and not use_more_bits(67, 78)
    # the last eighth now starts at 69, but 68 is also a third layer after the first 9
    assert all(with_it[name] == type for name, type in without.items())
    assert with_it["blk.78.ffn_down_exps.weight"] == "q6_k"


def test_eight_experts_have_rules_of_their_own():
    types = recipes.load(STOCK).types(Sizes(8), shapes(8))
    assert types["blk.4.attn_output.weight"] == "q5_k"
    assert types["blk.4.indexer.attn_k.weight"] == "q8_0"


@pytest.mark.parametrize(
    ("type", "n", "want"),
    [
        ("q4_k", 256, "q4_k"),
        ("q4_k", 192, "q5_0"),
        ("q5_k", 192, "q5_1"),
        ("q6_k", 96, "q8_0"),
        ("q4_k", 100, "f16"),
        ("q8_0", 48, "f16"),
        ("bf16", 7, "bf16"),
        ("iq3_xxs", 32, "iq4_nl"),
        ("q2_0", 192, "q2_0"),
        ("q2_0", 96, "q4_0"),
    ],
)
def test_types_that_do_not_divide_the_row_fall_back(type, n, want):
    assert fall_back(type, n) == want


@pytest.mark.parametrize("type", ["q1_0", "nvfp4"])
def test_types_without_a_fallback_are_refused_as_llama_quantize_does(type):
    with pytest.raises(Usage, match=f"rows of 96 weights are no whole blocks of {type}"):
        fall_back(type, 96)


@pytest.mark.parametrize(
    ("name", "shape", "kept"),
    [
        ("blk.0.attn_q_a.weight", (4, 256), False),
        ("blk.0.attn_q_a.weight", (1, 256), True),  # ggml counts no outer axes of length 1
        ("blk.0.attn_q_a.weight", (256, 1), False),
        ("blk.0.attn_q_a.bias", (4, 256), True),
        ("blk.0.attn_q_a_norm.weight", (4, 256), True),
        ("blk.0.ffn_gate_inp.weight", (4, 256), True),
    ],
)
def test_llama_quantize_keeps_norms_routers_and_rows(name, shape, kept):
    assert is_kept(name, shape, recipes.load(STOCK).keep) is kept


@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("layers", [12, 78])
def test_a_file_made_by_a_recipe_conforms_and_is_recognised(name, layers):
    tensors = {n: s for n, s in shapes().items() if not n.startswith("blk.") or int(n.split(".")[1]) < layers}
    sizes = Sizes(num_hidden_layers=layers)
    stored = store(recipes.load(name).types(sizes, tensors), tensors)
    assert recipes.conform(recipes.load(name), sizes, stored) == []
    found, mismatches = recipes.best(sizes, stored)
    assert (found.name, mismatches) == (name, [])


def test_a_mismatch_names_types_and_what_the_difference_weighs():
    tensors = shapes()
    types = recipes.load(PROTECTED).types(Sizes(), tensors)
    types["blk.11.ffn_down_exps.weight"] = "q4_k"
    types["blk.7.attn_k_b.weight"] = "q5_0"
    found, (first, second) = recipes.best(Sizes(), store(types, tensors))
    assert found.name == PROTECTED
    assert (first.tensor, first.expected, first.found) == ("blk.7.attn_k_b.weight", "q8_0", "q5_0")
    assert first.bytes_delta == 64 * 512 * 192 // 32 * (22 - 34)
    assert (second.tensor, second.expected, second.found) == ("blk.11.ffn_down_exps.weight", "q6_k", "q4_k")
    assert second.bytes_delta == 192 * 6144 * 2048 // 256 * (144 - 210)


def test_the_literal_recipe_differs_from_the_protected_in_40_down_tensors():
    tensors = shapes()
    stored = store(recipes.load(LITERAL).types(Sizes(), tensors), tensors)
    mismatches = recipes.conform(recipes.load(PROTECTED), Sizes(), stored)
    assert len(mismatches) == 40
    assert all(m.tensor.endswith("ffn_down_exps.weight") for m in mismatches)
    assert sum(m.bytes_delta for m in mismatches) == 373_042_350_336 - 348_128_184_576


def test_the_first_rule_that_matches_wins(tmp_path):
    rules = [("attn_q", "q6_K"), ("ATTN_", "Q8_0")]  # lower-cased, as llama-quantize does
    text = 'default = "q4_K"\n' + "".join(f'[[rule]]\nmatch = "{m}"\ntype = "{t}"\n' for m, t in rules)
    recipe = recipes.load(write(tmp_path, text))
    tensors = {f"blk.0.{name}.weight": (8, 256) for name in ("attn_q_a", "attn_v_b", "x")}
    assert list(recipe.types(Sizes(), tensors).values()) == ["q6_k", "q8_0", "q4_k"]
    assert recipe.name == "my"


def test_a_rule_can_be_bound_to_layers(tmp_path):
    text = 'default = "q4_k"\n[[rule]]\nmatch = "x"\ntype = "q6_k"\nlayers = "0, 3:5"\n'
    recipe = recipes.load(write(tmp_path, text))
    types = recipe.types(Sizes(), {f"blk.{i}.x.weight": (8, 256) for i in range(6)} | {"x.weight": (8, 256)})
    assert list(types.values()) == ["q6_k", "q4_k", "q4_k", "q6_k", "q6_k", "q4_k", "q4_k"]


def test_a_recipe_file_inherits_rules_default_and_keep(tmp_path):
    recipe = recipes.load(write(tmp_path, 'name = "mine"\nbase = "q4_k_m"\nkeep = []\n'))
    assert recipe.types(Sizes(), {"blk.0.ffn_gate_inp.weight": (192, 6144)}) == {
        "blk.0.ffn_gate_inp.weight": "q4_k"
    }
    assert (recipe.name, recipe.version) == ("mine", "llama.cpp 0c1e570")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs `base` or `default`"),
        ("default = 3", "a type is a name"),
        ('default = "q9_k"', "no tensor type 'q9_k'"),
        ('base = "q9"', "base is 'q9'"),
        ('default = "f16"\nrules = []', "no key 'rules'"),
        ('default = "f16"\nrule = 3', r"\[\[rule\]\] tables"),
        ('default = "f16"\n[[rule]]\nmatch = "a"', "needs `match` and `type`"),
        ('default = "f16"\n[[rule]]\nmatch = "("\ntype = "f16"', "no regular expression"),
        ('default = "f16"\n[[rule]]\nmatch = "a"\ntype = "f16"\nlayers = "3-5"', "ranges such as"),
        ('default = "f16"\n[[rule]]\nmatch = "a"\ntype = "f16"\nexperts = true', "experts is a number"),
        ('default = "f16"\nkeep = "a"', "keep is a list"),
        ('default = "f16"\nname = 3', "name is a text"),
        ("default = ", "not TOML"),
        (f'default = "f16"\nkeep = ["{"a" * 1001}"]', "at most 1,000 characters"),
        ("#" * (1 << 20) + '\ndefault = "f16"', "too long for a recipe"),
    ],
)
def test_a_broken_recipe_file_is_one_clear_error(tmp_path, text, words):
    with pytest.raises(BadFile, match=words):
        recipes.load(write(tmp_path, text))


def test_a_recipe_that_does_not_exist_is_a_usage_error():
    with pytest.raises(Usage, match="known: q4_k_m, "):
        recipes.load("q9_k_m")
    with pytest.raises(BadFile, match="no such file"):
        recipes.load("no/such.toml")
