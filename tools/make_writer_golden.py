"""Make golden/writers.json: what llama.cpp's converter and quantizer write, as sha256, for every mix.

python -m tools.make_writer_golden --llama build/llama
python -m tools.make_writer_golden --mix Q2_0      # only this mix, into the file that is there

convert  : variant of the tiny checkpoint, flags -> sha256 of the file that convert_hf_to_gguf writes
mixes    : mix -> plain, imatrix, eight (8 experts, imatrix) -> sha256 of llama-quantize's file, types of its tensors
tensors  : tensor -> type -> plain, imatrix -> sha256 of the tensor's bytes
options  : further runs: the legacy imatrix, --tensor-type
real     : GLM-5.1's header, experts and MTP -> mix -> plain, imatrix -> what llama-quantize --dry-run says
"""

import argparse
import hashlib
import json
import platform
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from refimpl.files.gguf import Gguf
from refimpl.recipes.read import NAMES
from tools import llama_cpp, manifest, variants

MIXES = [name.upper() for name in NAMES if "-" not in name]
CONVERSIONS = (
    ("plain", "f16", ()), ("plain", "f32", ()),
    ("mtp", "bf16", ()), ("mtp", "bf16", ("--no-mtp",)), ("mtp", "f16", ()),
)  # fmt: skip
OPTIONS = {
    "legacy": ("--imatrix", "legacy.dat", "Q4_K_M"),
    "overrides": ("--tensor-type", "FFN_DOWN_EXPS=q8_0", "--tensor-type", "ffn_down=q5_0", "Q4_K_M"),
    "counted": ("--imatrix", "imatrix.gguf", "--tensor-type", "blk.1.ffn_down_shexp=f16", "IQ2_M"),
    "unquantized": ("--tensor-type", "attn_v_b=bf16", "--tensor-type", "attn_k_b=f32", "Q8_0"),
}
REALS = {"192": (192, False), "256-mtp": (256, True), "8": (8, False)}
LINE = re.compile(r"\]\s+(\S+)\s+- \[.*?\], type = +(\w+), size = .*?(?:\((\w+)\))?$")


def sha256(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def convert_all(llama: llama_cpp.LlamaCpp, golden: Path, work: Path) -> list[dict[str, Any]]:
    """Run the converter on the variants; their files stay in `work` for the quantizer."""
    made = []
    for variant, outtype, flags in CONVERSIONS:
        arguments = [variant, "--outtype", outtype, "--outfile", "out.gguf", *flags]
        llama.convert(arguments, work)
        entry = {"variant": variant, "outtype": outtype, "flags": list(flags)}
        made.append({**entry, "sha256": sha256((work / "out.gguf").read_bytes())})
    for variant, name in (("plain", "bf16.gguf"), ("eight", "eight.gguf")):
        llama.convert([variant, "--outtype", "bf16", "--outfile", name, "--model-name", "tiny-glm-dsa"], work)
    return made


def quantize(llama: llama_cpp.LlamaCpp, work: Path, source: str, *arguments: str) -> Gguf | None:
    """Run the quantizer; None where it refuses for want of an imatrix."""
    try:
        llama.run("llama-quantize", [*arguments[:-1], source, "out.gguf", arguments[-1], "2"], work)
    except RuntimeError as error:
        if "requires an importance matrix" in str(error) or "Missing importance matrix" in str(error):
            return None
        raise
    return Gguf(work / "out.gguf")


def quantize_all(
    llama: llama_cpp.LlamaCpp, work: Path, chosen: list[str], mixes: dict[str, Any], tensors: dict[str, Any]
) -> None:
    """Add some mixes, and every tensor of every type that a mix gives it."""
    for mix in chosen:
        mixes[mix] = {}
        for case, source, flags in (
            ("plain", "bf16.gguf", ()),
            ("imatrix", "bf16.gguf", ("--imatrix", "imatrix.gguf")),
            ("eight", "eight.gguf", ()),
        ):
            file = quantize(llama, work, source, *flags, mix)
            if file is None:
                mixes[mix][case] = None
                continue
            entry: dict[str, Any] = {"sha256": sha256((work / "out.gguf").read_bytes())}
            if case != "eight":
                entry["types"] = " ".join(t.format.name for t in file.tensors.values())
                for t in file.tensors.values():
                    kinds = tensors.setdefault(t.name, {}).setdefault(t.format.name, {})
                    digest = sha256(file.read(t.name).tobytes())[:32]
                    assert kinds.setdefault(case, digest) == digest, (mix, t.name)
            file.close()
            mixes[mix][case] = entry


def dry_run(llama: llama_cpp.LlamaCpp, work: Path, file: str, *flags: str) -> dict[str, Any]:
    """The type that the quantizer would give each tensor: a digest of sorted lines "name type", and counts."""
    said = llama.run("llama-quantize", ["--dry-run", *flags[:-1], file, flags[-1]], work)
    found = [match for line in said.splitlines() if (match := LINE.search(line.rstrip()))]
    types = {match[1]: (match[3] or match[2]).lower() for match in found}
    lines = "".join(f"{name} {kind}\n" for name, kind in sorted(types.items()))
    return {"sha256": sha256(lines.encode()), "types": dict(sorted(Counter(types.values()).items()))}


def price_all(llama: llama_cpp.LlamaCpp, work: Path, chosen: list[str], made: dict[str, Any]) -> None:
    """Add some mixes on the real model's header."""
    for label, (experts, mtp) in REALS.items():
        variants.real_header(work / "real.gguf", experts, mtp)
        made.setdefault(label, {}).update(
            {
                mix: {
                    "plain": dry_run(llama, work, "real.gguf", mix),
                    "imatrix": dry_run(llama, work, "real.gguf", "--imatrix", "imatrix.gguf", mix),
                }
                for mix in chosen
            }
        )
        (work / "real.gguf").unlink()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--llama", type=Path, default=Path("build/llama"), help="llama.cpp's folder")
    options.add_argument("--golden", type=Path, default=Path("golden"), help="where the result goes")
    options.add_argument(
        "--mix", choices=MIXES, action="append", help="only this; the other entries are kept"
    )
    given = options.parse_args()
    llama, golden = llama_cpp.prepare(given.llama, ["llama-quantize"]), given.golden
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        variants.plain(golden, work / "plain")
        variants.with_mtp(golden, work / "mtp")
        variants.with_eight_experts(golden, work / "eight")
        variants.legacy_imatrix(golden, work / "legacy.dat")
        shutil.copyfile(golden / "tiny-glm-dsa" / "imatrix.gguf", work / "imatrix.gguf")
        kept = json.loads((golden / "writers.json").read_text()) if given.mix else {}
        made: dict[str, Any] = {
            "convert": convert_all(llama, golden, work),
            "mixes": {},
            "tensors": {},
        } | kept
        quantize_all(llama, work, given.mix or MIXES, made["mixes"], made["tensors"])
        made.setdefault("options", {})
        for label, arguments in OPTIONS.items():
            assert quantize(llama, work, "bf16.gguf", *arguments) is not None, label
            digest = sha256((work / "out.gguf").read_bytes())
            made["options"][label] = {"arguments": list(arguments), "sha256": digest}
        price_all(llama, work, given.mix or MIXES, made.setdefault("real", {}))
    (golden / "writers.json").write_text(json.dumps(made, indent=1) + "\n")
    facts = {"oracle": "llama.cpp's convert_hf_to_gguf.py and llama-quantize", "version": llama_cpp.DATED}
    facts |= {"command": "python -m tools.make_writer_golden", "machine": platform.machine()}
    entry = manifest.describe(golden, "writers.json", **facts, licence="Apache-2.0")
    manifest.update(golden, "writers", entry)


if __name__ == "__main__":
    main()
