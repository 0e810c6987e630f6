"""What one forward pass depends on beside the weights: the sizes (files/hparams.py), and whose conventions.

The engines that run GLM-5.1 agree on the mathematics and differ in constants, in precision and in order. Each
difference is one field below, each engine one row of ENGINES; the README prints the same table.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from refimpl.errors import Usage

Precision = Literal["f32", "f16", "q8_0"]


@dataclass(frozen=True)
class Conventions:
    """One engine's choices.

    latent_eps   : eps of the norms inside attention (q_a, kv_a); None: rms_norm_eps of the config
    key_eps      : eps of the LayerNorm on the indexer's keys
    denominator  : the chosen experts' weights are divided by "sum", "sum + 1e-20" or "max(sum, 2^-14)"
    expert_sum   : the experts' outputs are added by descending "choice" or ascending "index"
    angles       : rotary angles in "f64", as a "f32" product, or by "f32-steps", each theta from the one before
    hadamard     : rotate the indexer's queries and keys by a Hadamard matrix
    index        : precision of the indexer's dot products; fp8: e4m3, a scale for each vector; ue8m0: a power of two
    attention    : "absorbed" works on the latent itself, "expanded" restores keys and values first
    dense        : ignore the indexer and look at every earlier token (engines before mid-2026)
    kv           : what the caches store
    activations  : "float": weights are decoded; "ggml": inputs of quantized matrices are quantized, as on a CPU
    order        : of additions in products with quantized inputs (dots.ORDERS); "ggml": avx2 to 7 tokens, then tiled
    jobs         : threads; they change nothing but the time
    """

    latent_eps: float | None = None
    key_eps: float = 1e-6
    denominator: Literal["sum", "sum + 1e-20", "max(sum, 2^-14)"] = "sum + 1e-20"
    expert_sum: Literal["choice", "index"] = "choice"
    angles: Literal["f64", "f32", "f32-steps"] = "f64"
    hadamard: bool = False
    index: Literal["f32", "fp8", "fp8-ue8m0"] = "f32"
    attention: Literal["absorbed", "expanded"] = "absorbed"
    dense: bool = False
    kv: Precision = "f32"
    activations: Literal["float", "ggml"] = "float"
    order: str = "generic"
    jobs: int = 1


# refimpl: eps from the config, no Hadamard, lower index on ties, our own orders of addition.
# Sources: transformers 5.24 modeling_glm_moe_dsa.py; llama.cpp 0c1e570 src/models/glm-dsa.cpp and
# llama-graph.cpp; DeepSeek-V3.2-Exp 3b99a53 inference/model.py.
ENGINES = MappingProxyType(
    {
        "refimpl": Conventions(),
        "transformers": Conventions(
            latent_eps=1e-6, expert_sum="index", angles="f32", attention="expanded"
        ),
        "llama.cpp": Conventions(
            key_eps=0.0, denominator="max(sum, 2^-14)", angles="f32-steps", hadamard=True, kv="f16",
            activations="ggml", order="ggml",
        ),
        "deepseek": Conventions(
            latent_eps=1e-6, denominator="sum", expert_sum="index", angles="f32", hadamard=True, index="fp8-ue8m0"
        ),
    }
)  # fmt: skip


def conventions(engine: str | Conventions, **changes: Any) -> Conventions:
    """An engine's conventions, some of them changed. Raises Usage for an engine we have no row for."""
    if isinstance(engine, Conventions):
        return replace(engine, **changes)
    if engine not in ENGINES:
        raise Usage(f"no engine {engine!r}; there are {', '.join(ENGINES)}")
    return replace(ENGINES[engine], **changes)
