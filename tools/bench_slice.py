"""A slice of GLM-5.1's real widths for the benchmark of verify: a BF16 checkpoint, and what quantize makes of it."""

from pathlib import Path

from refimpl.writers.quantize import quantize
from tools import synthetic

SIZES = {
    "intermediate_size": 2048, "num_attention_heads": 8, "q_lora_rank": 512, "vocab_size": 2048,
}  # fmt: skip


def make(place: Path, experts: int, recipe: str = "q4_k_m-protected") -> tuple[Path, Path]:
    """Write both; they are kept when they are already there. Returns (GGUF, checkpoint directory)."""
    source = synthetic.make(place / f"slice-{experts}", n_routed_experts=experts, **SIZES)
    file = place / f"slice-{experts}-{recipe}.gguf"
    if not file.exists():
        quantize(source, file, recipe)
    return file, source
