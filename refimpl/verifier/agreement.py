"""Metadata against tensors: the counts and lengths that a glm-dsa GGUF's keys state, looked up in shapes.

Each axis of each tensor is one quantity, and each quantity follows from one or more keys. Where most tensors
contradict a key, the key is wrong: it is named once, with the first of these tensors, and quantities that
also depend on it are not judged. Where few do, they are wrong themselves; the finding names the first.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from refimpl.files.gguf import Gguf
from refimpl.files.metadata import Array
from refimpl.files.source import Tensor
from refimpl.verifier.findings import Finding

ARCHITECTURE = "glm-dsa"
MOST_NAMED = 3
_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(.+)", re.ASCII)


@dataclass(frozen=True)
class Quantity:
    """What one axis of a tensor must be.

    code : of the finding where it is not
    keys : metadata keys it follows from, below the architecture's prefix
    size : their values -> the axis' length
    """

    code: str
    keys: tuple[str, ...]
    size: Callable[..., int] = lambda one: int(one)

    def explain(self, values: Iterable[int]) -> str:
        return " and ".join(f"{key} is {value:,}" for key, value in zip(self.keys, values, strict=True))


def _times(a: int, b: int) -> int:
    return a * b


# A quantity of several keys comes after the ones that prove each key alone.
QUANTITIES = {
    "D": Quantity("embedding-length", ("embedding_length",)),
    "2D": Quantity("embedding-length", ("embedding_length",), lambda d: 2 * d),
    "vocab": Quantity("vocab-size", ("vocab_size",)),
    "E": Quantity("expert-count", ("expert_count",)),
    "I": Quantity("expert-feed-forward-length", ("expert_feed_forward_length",)),
    "S": Quantity("expert-shared-count", ("expert_feed_forward_length", "expert_shared_count"), _times),
    "F": Quantity("feed-forward-length", ("feed_forward_length",)),
    "H": Quantity("head-count", ("attention.head_count",)),
    "q_rank": Quantity("q-lora-rank", ("attention.q_lora_rank",)),
    "rank": Quantity("kv-lora-rank", ("attention.kv_lora_rank",)),
    "kv": Quantity("key-length", ("attention.key_length",)),
    "v": Quantity("value-length-mla", ("attention.value_length_mla",)),
    "q": Quantity("key-length-mla", ("attention.head_count", "attention.key_length_mla"), _times),
    "nope": Quantity(
        "rope-dimension-count", ("attention.key_length_mla", "rope.dimension_count"), lambda k, r: k - r
    ),
    "o": Quantity("value-length-mla", ("attention.head_count", "attention.value_length_mla"), _times),
    "ih": Quantity("indexer-head-count", ("attention.indexer.head_count",)),
    "ik": Quantity("indexer-key-length", ("attention.indexer.key_length",)),
    "iq": Quantity(
        "indexer-head-count", ("attention.indexer.head_count", "attention.indexer.key_length"), _times
    ),
}

MODEL = {"token_embd.weight": "vocab D", "output_norm.weight": "D", "output.weight": "vocab D"}
EVERY = {
    "attn_norm.weight": "D", "attn_q_a.weight": "q_rank D", "attn_q_a_norm.weight": "q_rank",
    "attn_q_b.weight": "q q_rank", "attn_kv_a_mqa.weight": "kv D", "attn_kv_a_norm.weight": "rank",
    "attn_k_b.weight": "H rank nope", "attn_v_b.weight": "H v rank", "attn_output.weight": "D o",
    "ffn_norm.weight": "D",
}  # fmt: skip
INDEXER = {
    "indexer.attn_q_b.weight": "iq q_rank", "indexer.attn_k.weight": "ik D", "indexer.k_norm.weight": "ik",
    "indexer.k_norm.bias": "ik", "indexer.proj.weight": "ih D",
}  # fmt: skip
DENSE = {"ffn_gate.weight": "F D", "ffn_up.weight": "F D", "ffn_down.weight": "D F"}
SPARSE = {
    "ffn_gate_inp.weight": "E D", "exp_probs_b.bias": "E", "ffn_gate_exps.weight": "E I D",
    "ffn_up_exps.weight": "E I D", "ffn_down_exps.weight": "E D I", "ffn_gate_shexp.weight": "S D",
    "ffn_up_shexp.weight": "S D", "ffn_down_shexp.weight": "D S",
}  # fmt: skip
NEXTN = {
    "nextn.eh_proj.weight": "D 2D", "nextn.enorm.weight": "D", "nextn.hnorm.weight": "D",
    "nextn.shared_head_norm.weight": "D",
}  # fmt: skip
OPTIONAL = {
    "attn_kv_b.weight": "kv_b rank", "nextn.embed_tokens.weight": "vocab D",
    "nextn.shared_head_head.weight": "vocab D",
}  # fmt: skip
AXES = MODEL | EVERY | INDEXER | DENSE | SPARSE | NEXTN | OPTIONAL


def compare_metadata(f: Gguf) -> list[Finding]:
    """All contradictions between the keys and the tensors of a glm-dsa GGUF (of another one: none)."""
    if f.metadata.get("general.architecture") != ARCHITECTURE:
        return []
    return _Comparison(f).run()


class _Comparison:
    """One file's keys and tensors, and what was found so far."""

    def __init__(self, f: Gguf) -> None:
        self.f = f
        self.found: list[Finding] = []
        self.blamed: set[str] = set()
        self.layers: dict[int, dict[str, Tensor]] = {}
        self.model: dict[str, Tensor] = {}
        for name, tensor in f.tensors.items():
            match = _LAYER.fullmatch(name)
            if match:
                self.layers.setdefault(int(match[1]), {})[match[2]] = tensor
            else:
                self.model[name] = tensor

    def run(self) -> list[Finding]:
        keys = {key for quantity in QUANTITIES.values() for key in quantity.keys}
        for key in sorted(keys | {"block_count", "expert_used_count"}):
            if self.value(key) is None:
                self.blamed.add(key)
                words = f"{ARCHITECTURE}.{key} is missing or no count"
                self.say("key-missing", words, None, key)
        self.compare_axes()
        self.compare_layers()
        self.compare_keys()
        self.compare_tokens()
        return self.found

    def value(self, key: str, absent: int | None = None) -> int | None:
        """An integer of the architecture's keys; None where it is none."""
        got: Any = self.f.metadata.get(f"{ARCHITECTURE}.{key}", absent)
        return got if isinstance(got, int) and not isinstance(got, bool) and got >= 0 else None

    def say(self, code: str, words: str, tensor: str | None, key: str | None = None) -> None:
        """Note an error, at the key's place in the file where a key is named."""
        offset = self.f.metadata.offsets.get(f"{ARCHITECTURE}.{key}") if key else None
        self.found.append(Finding(code, "error", words, tensor=tensor, offset=offset))

    def compare_axes(self) -> None:
        """Look every axis of every tensor up."""
        seen: dict[str, list[tuple[Tensor, int]]] = {letter: [] for letter in QUANTITIES}
        for name, tensor in self.f.tensors.items():
            match = _LAYER.fullmatch(name)
            letters = AXES.get(match[2] if match else name, "").split()
            if letters and len(letters) != len(tensor.shape):
                words = f"it has {len(tensor.shape)} axes, not {len(letters)}"
                self.found.append(Finding("tensor-shape", "error", words, tensor=name))
                continue
            for axis, letter in enumerate(letters):
                if letter in seen:
                    seen[letter].append((tensor, axis))
        for letter, quantity in QUANTITIES.items():
            if not self.blamed.intersection(quantity.keys):
                self.compare_quantity(quantity, seen[letter])

    def compare_quantity(self, quantity: Quantity, places: list[tuple[Tensor, int]]) -> None:
        """Look one quantity up, wherever it occurs."""
        values = [self.value(key) for key in quantity.keys]
        counts = [value for value in values if value is not None]
        want = quantity.size(*counts)
        wrong = [(tensor, axis) for tensor, axis in places if tensor.shape[axis] != want]
        if not wrong:
            return
        first, axis = wrong[0]
        words = (
            f"{quantity.explain(counts)}, but axis {axis} of its shape {list(first.shape)} is not {want:,}"
        )
        others = len({tensor.name for tensor, _ in wrong}) - 1
        if others:
            words += f" (nor in {others:,} other tensor{'s' * (others > 1)})"
        self.say(quantity.code, words, first.name, quantity.keys[-1])
        if 2 * len(wrong) > len(places):
            self.blamed.update(quantity.keys)

    def compare_layers(self) -> None:
        """Which layers are there, which of them are dense, sparse, or for multi-token prediction."""
        count, dense = self.value("block_count"), self.value("leading_dense_block_count", 0)
        nextn = self.value("nextn_predict_layers", 0)
        if count is None:
            return
        for layer in sorted(self.layers):
            if layer >= count:
                first = next(iter(self.layers[layer].values())).name
                self.say(
                    "block-count",
                    f"block_count is {count:,}, the tensor's layer is {layer:,}",
                    first,
                    "block_count",
                )
                break
        present = [layer for layer in sorted(self.layers) if layer < count]
        if len(present) < count:
            first_gap = next(i for i in range(count) if i not in self.layers)
            words = f"block_count is {count:,}, but only {len(present):,} layers are in the file"
            self.say("block-count", words, f"blk.{first_gap}.attn_norm.weight", "block_count")
        for layer in present:
            sparse = any(name in self.layers[layer] for name in SPARSE)
            if dense is not None and sparse != (layer >= dense) and layer < count - (nextn or 0):
                shown = next((t.name for n, t in self.layers[layer].items() if n in (SPARSE | DENSE)), None)
                kind = "sparse" if sparse else "dense"
                words = f"leading_dense_block_count is {dense:,}, but layer {layer:,} is {kind}"
                self.say("leading-dense-block-count", words, shown, "leading_dense_block_count")
                break
        self.compare_nextn(count, nextn)
        self.find_missing(present)

    def compare_nextn(self, count: int, nextn: int | None) -> None:
        """The last nextn_predict_layers of block_count layers, and no others, carry nextn tensors."""
        if nextn is None:
            return
        for layer, tensors in sorted(self.layers.items()):
            carries = next((t.name for n, t in tensors.items() if n.startswith("nextn.")), None)
            if (carries is not None) != (count - nextn <= layer < count):
                shown = carries or f"blk.{layer}.nextn.eh_proj.weight"
                words = f"nextn_predict_layers is {nextn:,} of {count:,}, but layer {layer:,} "
                words += "has no nextn tensors" if carries is None else "has nextn tensors"
                self.say("nextn-predict-layers", words, shown, "nextn_predict_layers")
                return

    def find_missing(self, present: list[int]) -> None:
        """Tensors that layers of their kind must have; the indexer is in every layer."""
        missing = [name for name in MODEL if name not in self.model]
        for layer in present:
            tensors = self.layers[layer]
            kinds = [EVERY, SPARSE if any(name in tensors for name in SPARSE) else DENSE]
            if any(name.startswith("nextn.") for name in tensors):
                kinds.append(NEXTN)
            names = [name for kind in kinds for name in kind]
            if "attn_kv_b.weight" in tensors:  # as files before the split of kv_b have it
                names = [name for name in names if name not in ("attn_k_b.weight", "attn_v_b.weight")]
            missing += [f"blk.{layer}.{name}" for name in names if name not in tensors]
        lacking = [f"blk.{n}.{name}" for n in present for name in INDEXER if name not in self.layers[n]]
        for code, names in (("tensor-missing", missing), ("indexer-missing", lacking)):
            for name in names[:MOST_NAMED]:
                more = f" (one of {len(names):,})" if len(names) > 1 else ""
                self.say(code, f"the tensor is not in the file{more}", name)

    def compare_keys(self) -> None:
        """Keys that other keys bind."""
        router = next((name for name in self.f.tensors if name.endswith("ffn_gate_inp.weight")), None)
        latent = next((name for name in self.f.tensors if name.endswith("attn_kv_a_mqa.weight")), None)
        used, experts = self.value("expert_used_count"), self.value("expert_count")
        if "expert_count" in self.blamed:
            experts = None
        if used is not None and experts is not None and not 1 <= used <= experts:
            self.say(
                "expert-used-count",
                f"expert_used_count is {used:,} of {experts:,} experts",
                router,
                "expert_used_count",
            )
        heads = self.value("attention.head_count_kv")
        if heads != 1:
            words = f"attention.head_count_kv is {heads}, but the tensor holds the one latent head of MLA"
            self.say("head-count-kv", words, latent, "attention.head_count_kv")
        rank, rope = self.value("attention.kv_lora_rank"), self.value("rope.dimension_count")
        for key, code, want, what in (
            ("attention.value_length", "value-length", rank, "the latent's"),
            ("attention.key_length", "key-length", (rank or 0) + (rope or 0), "latent and rotary part's"),
        ):
            got = self.value(key)
            if got != want and not self.blamed.intersection(
                (key, "attention.kv_lora_rank", "rope.dimension_count")
            ):
                words = f"{key} is {got}, not {want:,}, {what} length"
                self.say(code, words, latent, key)

    def compare_tokens(self) -> None:
        """The tokenizer's lists are as long as the vocabulary, and its special ids are in it."""
        vocab = self.value("vocab_size")
        for key in ("tokens", "scores", "token_type"):
            values = self.f.metadata.get(f"tokenizer.ggml.{key}")
            count = len(values) if isinstance(values, Array) else 0
            if vocab is not None and values is not None and count != vocab:
                words = f"tokenizer.ggml.{key} has {count:,} entries, vocab_size is {vocab:,}"
                self.say("token-count", words, "token_embd.weight", "vocab_size")
        for key in self.f.metadata:
            if vocab is None or not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
                continue
            value = self.f.metadata[key]
            if not isinstance(value, int) or not 0 <= value < vocab:
                self.found.append(
                    Finding("token-id", "error", f"{key} is {value!r}, the vocabulary has {vocab:,} tokens",
                            tensor="token_embd.weight", offset=self.f.metadata.offsets.get(key))
                )  # fmt: skip
