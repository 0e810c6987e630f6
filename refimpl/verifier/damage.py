"""What a control is: a way to break a file on purpose, and what verify must say of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from refimpl.files import imatrix
from refimpl.quants.formats import formats
from refimpl.verifier import mutate
from refimpl.verifier.mutate import Copy

UP, GATE, DOWN = (f"blk.1.ffn_{m}_exps.weight" for m in ("up", "gate", "down"))
Q6, Q5 = "blk.2.ffn_down_exps.weight", "blk.1.attn_k_b.weight"
V_B, OUT = "blk.1.attn_v_b.weight", "blk.1.attn_output.weight"
ROUTER, BIAS, NORM = "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "blk.1.attn_norm.weight"
STACKED = [GATE, UP, DOWN]
KEPT = [14, 3, 0, 9, 11, 5, 1, 15, 8, 2, 12, 6]  # 12 of 16, renumbered


@dataclass(frozen=True)
class Expect:
    """What verify has to say. The verdicts are by tensor; whatever is not listed must stay in the pass set."""

    code: str  # of the finding
    verdicts: dict[str, str]  # tensor -> verdict
    expert: int | None = None
    block: int | None = None  # within the tensor
    fits: int | None = None  # source expert that the misplaced expert really is


@dataclass
class Bench:
    """Where a control works: the golden model, a scratch directory, and what the next verify is called with."""

    golden: Path
    scratch: Path
    source: Path
    recipe: str | None = None
    imatrix: Path | None = None

    def copy(self, kind: str = "stock") -> Copy:
        """One of llama.cpp's files, in memory."""
        return Copy(self.golden / f"{kind}.gguf")

    def write(self, copy: Copy) -> Path:
        """Put a damaged copy where verify will read it."""
        return copy.write(self.scratch / "model.gguf")

    def codebook(self, given: bool = False) -> Copy:
        """A sound file with one tensor in IQ2_XS, made with an imatrix that verify is given or not."""
        path = self.golden / "imatrix.gguf"
        with imatrix.read(path) as file:
            importance = file.get(OUT)
        copy = self.copy("imatrix-quantized")
        values = mutate.source_values(self.golden, OUT)
        mutate.replace_values(copy[OUT], values, formats["iq2_xs"], importance)
        self.imatrix = path if given else None
        return copy

    def own_source(self) -> Path:
        """From now on verify against a copy of the source that may be changed."""
        self.source = mutate.copy_source(self.golden, self.scratch / "source")
        return self.source


Damage = Callable[[Bench], Expect | None]  # writes scratch/model.gguf; None: the file is sound
CONTROLS: dict[str, Damage] = {}


def control(damage: Damage) -> Damage:
    """Register a control under its function's name."""
    CONTROLS[damage.__name__.replace("_", "-")] = damage
    return damage
