"""Where the embedded golden files lie: inside an installed wheel, or beside the package in a checkout."""

from pathlib import Path

from refimpl.errors import BadFile

PACKAGE = Path(__file__).resolve().parent.parent


def tiny_model() -> Path:
    """Directory of the embedded tiny GLM-5.1: its checkpoint and llama.cpp's quantized files."""
    for root in (PACKAGE / "golden", PACKAGE.parent / "golden"):
        if (root / "tiny-glm-dsa" / "config.json").is_file():
            return root / "tiny-glm-dsa"
    raise BadFile(
        str(PACKAGE / "golden" / "tiny-glm-dsa"), None, "the embedded tiny model is missing: reinstall"
    )
