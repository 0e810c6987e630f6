"""A checkpoint's tensors in the order in which convert_hf_to_gguf writes them, with nothing missing or unknown.

That order is the shards' by name, and within a shard the tensors' by name. The three stacks of a layer's experts
come where its last expert comes, down before gate before up; kv_b_proj becomes attn_k_b and attn_v_b.
Source: conversion/base.py index_tensors and conversion/deepseek.py modify_tensors, llama.cpp 0c1e570.
"""

from collections import Counter
from dataclasses import replace

from refimpl.errors import BadFile, Unsupported
from refimpl.files import names
from refimpl.files.names import Hparams, Link
from refimpl.files.safetensors import Checkpoint

_LEFT_OUT = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")  # buffers, not weights
_STACKS = ("down", "gate", "up")


def ordered_links(source: Checkpoint, hp: Hparams) -> list[Link]:
    """The GGUF tensors that this checkpoint makes, in the converter's order.

    hp : with num_nextn_predict_layers 0, the tensors of a multi-token-prediction block are passed over

    Raises BadFile for a tensor that is missing, has another shape than the config implies or no place in the
    model, Unsupported for one that is no float.
    """
    links: list[Link] = []
    experts: Counter[int] = Counter()
    for name in _names(source, hp):
        found = names.from_hf(name, hp)
        if found is None:
            raise _bad(source, name, "has no place in the model that the config describes")
        link, expert = found
        if source.tensors[name].format.id < 0:
            kind = source.tensors[name].format.name
            raise Unsupported(f"{source.path}: {name} is of dtype {kind}; f32, f16 and bf16 are read")
        if expert is None:
            links.append(link)
            if link.transform == "k_b":
                links.append(_sibling(link, "attn_k_b", "attn_v_b", hp))
            continue
        if expert >= hp.n_routed_experts or link.layer is None:
            raise _bad(source, name, f"is expert {expert} of {hp.n_routed_experts:,} by the config")
        experts[link.layer] += 1
        if experts[link.layer] == 3 * hp.n_routed_experts:
            links += [_sibling(link, f"ffn_{link.matrix}", f"ffn_{m}", hp) for m in _STACKS]
    _check_shapes(source, links, hp)
    return links


def without_mtp(hp: Hparams) -> Hparams:
    """The same model without its multi-token-prediction block."""
    return replace(hp, num_nextn_predict_layers=0)


def _names(source: Checkpoint, hp: Hparams) -> list[str]:
    """Tensor names in the converter's order, but for buffers and for layers behind the last."""
    found = []
    for part in range(len(source.parts)):
        found += sorted(name for name, tensor in source.tensors.items() if tensor.part == part)
    return [name for name in found if not name.endswith(_LEFT_OUT) and not _is_behind(name, hp)]


def _is_behind(name: str, hp: Hparams) -> bool:
    """Is it of a layer behind the trunk, in a model that is to have none?"""
    head, _, rest = name.partition("model.layers.")
    layer = rest.split(".", 1)[0]
    behind = not head and layer.isdecimal() and int(layer) >= hp.num_hidden_layers
    return behind and hp.num_nextn_predict_layers == 0


def _sibling(link: Link, mine: str, other: str, hp: Hparams) -> Link:
    found = names.link(link.gguf.replace(mine, other), hp)
    assert found is not None, link
    return found


def _check_shapes(source: Checkpoint, links: list[Link], hp: Hparams) -> None:
    """Every tensor that the config implies must be there, in its shape."""
    have = {link.gguf for link in links}
    lacking = [link for link, _ in names.expected(hp) if link.gguf not in have]
    if lacking:
        hint = "; --no-mtp leaves that block out" if _only_mtp(lacking, hp) else ""
        absent = [name for link in lacking for name in _sources(link, hp) if name not in source.tensors]
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise BadFile(source.path, None, f"{absent[0]}{more} is missing for {lacking[0].gguf}{hint}")
    for link in links:
        want, got = names.shape(link, hp), names.source_shape(source, link, hp)
        if got != want:
            name = link.hf.format(e=0)
            raise _bad(source, name, f"makes a tensor {list(got or ())}, the config implies {list(want)}")


def _sources(link: Link, hp: Hparams) -> list[str]:
    return (
        [link.hf.format(e=e) for e in range(hp.n_routed_experts)] if link.transform == "stack" else [link.hf]
    )


def _only_mtp(links: list[Link], hp: Hparams) -> bool:
    return all(link.layer is not None and link.layer >= hp.num_hidden_layers for link in links)


def _bad(source: Checkpoint, name: str, words: str) -> BadFile:
    tensor = source.tensors[name]
    return BadFile(source.parts[tensor.part], tensor.offset, f"{name} {words}")
