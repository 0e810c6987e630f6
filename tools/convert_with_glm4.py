"""Run llama.cpp's convert_hf_to_gguf.py on a tokenizer that it does not know.

python tools/convert_with_glm4.py <llama.cpp tree> <arguments of convert_hf_to_gguf.py>

The converter recognises a pre-tokenizer by a hash over sample tokens, which a newly trained vocabulary cannot
match. Ours is GLM-4's pre-split, so that question is answered here; nothing else of the converter is touched.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    tree = Path(sys.argv.pop(1))
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    sys.argv[0] = str(tree / "convert_hf_to_gguf.py")
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "glm4"
    runpy.run_path(sys.argv[0], run_name="__main__")
