"""The tensors of the real GLM-5.1 as convert writes them to GGUF, from its config: {name: shape}."""

from dataclasses import dataclass
from types import MappingProxyType

HIDDEN, VOCAB, LAYERS, DENSE = 6144, 154_880, 78, 3

ATTENTION = MappingProxyType(
    {
        "attn_norm.weight": (HIDDEN,),
        "attn_q_a.weight": (2048, HIDDEN),
        "attn_q_a_norm.weight": (2048,),
        "attn_q_b.weight": (16384, 2048),
        "attn_kv_a_mqa.weight": (576, HIDDEN),
        "attn_kv_a_norm.weight": (512,),
        "attn_k_b.weight": (64, 512, 192),
        "attn_v_b.weight": (64, 256, 512),
        "attn_output.weight": (HIDDEN, 16384),
        "indexer.attn_q_b.weight": (4096, 2048),
        "indexer.attn_k.weight": (128, HIDDEN),
        "indexer.k_norm.weight": (128,),
        "indexer.k_norm.bias": (128,),
        "indexer.proj.weight": (32, HIDDEN),
        "ffn_norm.weight": (HIDDEN,),
    }
)
DENSE_MLP = MappingProxyType(
    {
        "ffn_gate.weight": (12288, HIDDEN),
        "ffn_up.weight": (12288, HIDDEN),
        "ffn_down.weight": (HIDDEN, 12288),
    }
)
NEXTN = MappingProxyType(
    {
        "nextn.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
        "nextn.enorm.weight": (HIDDEN,),
        "nextn.hnorm.weight": (HIDDEN,),
        "nextn.shared_head_norm.weight": (HIDDEN,),
    }
)


def moe(experts: int) -> dict[str, tuple[int, ...]]:
    """Tensors of one mixture-of-experts layer."""
    return {
        "ffn_gate_inp.weight": (experts, HIDDEN),
        "exp_probs_b.bias": (experts,),
        "ffn_gate_exps.weight": (experts, 2048, HIDDEN),
        "ffn_up_exps.weight": (experts, 2048, HIDDEN),
        "ffn_down_exps.weight": (experts, HIDDEN, 2048),
        "ffn_gate_shexp.weight": (2048, HIDDEN),
        "ffn_up_shexp.weight": (2048, HIDDEN),
        "ffn_down_shexp.weight": (HIDDEN, 2048),
    }


def shapes(experts: int = 192, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """All tensors: 1,782 without the multi-token-prediction layer."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS + mtp):
        block = {**ATTENTION, **(DENSE_MLP if layer < DENSE else moe(experts))}
        if layer == LAYERS:
            block |= NEXTN
        found |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return found


@dataclass(frozen=True)
class Sizes:
    """The few hyperparameters that a recipe looks at."""

    n_routed_experts: int = 192
    num_nextn_predict_layers: int = 0
    num_hidden_layers: int = LAYERS
