"""llama.cpp as an oracle: get it, build it, run its tools. Used by make_golden and make_llama_logs, never by a test.

Its source comes with the source package of llama-cpp-python, which any pip can fetch:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B b -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF ...
    cmake --build b --target llama-quantize llama-imatrix ...      (TOOLS; 5 to 10 minutes on two cores)

Its encoders live in ggml-base, which on x86-64 is compiled without -march, so every operation rounds once:
the build that the project calls strict.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VERSION = "0.3.36"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
DATED = f"{COMMIT}, as in the source package llama-cpp-python {VERSION}"
OFF = ("LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER", "LLAMA_BUILD_MTMD")
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-eval-callback")


@dataclass(frozen=True)
class LlamaCpp:
    """A source tree and the folder of its built tools."""

    tree: Path
    bin: Path

    def run(self, tool: str, arguments: Sequence[str], cwd: Path) -> str:
        """Run a built tool; return what it printed. Give paths relative to cwd: the tools record them."""
        environment = os.environ | {"LD_LIBRARY_PATH": str(self.bin)}
        return _run([str(self.bin / tool), *arguments], cwd, environment)

    def convert(self, arguments: Sequence[str], cwd: Path) -> str:
        """Run convert_hf_to_gguf.py with GLM-4's pre-split (see convert_with_glm4.py)."""
        script = Path(__file__).resolve().with_name("convert_with_glm4.py")
        return _run([sys.executable, str(script), str(self.tree), *arguments], cwd, dict(os.environ))


def prepare(folder: Path, tools: Sequence[str] = TOOLS) -> LlamaCpp:
    """Fetch and build those of `tools` that the folder lacks; an earlier build is taken as it is."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tree = folder / SDIST.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    if not tree.exists():
        if not (folder / SDIST).exists():
            wanted = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={VERSION}"]
            _run([sys.executable, "-m", "pip", "download", *wanted], folder, dict(os.environ))
        found = hashlib.sha256((folder / SDIST).read_bytes()).hexdigest()
        if found != SDIST_SHA256:
            raise ValueError(f"{SDIST}: sha256 {found}, expected {SDIST_SHA256}")
        with tarfile.open(folder / SDIST) as packed:
            packed.extractall(folder, filter="data")
    build = folder / "b"
    if not all((build / "bin" / tool).exists() for tool in tools):
        off = [f"-D{name}=OFF" for name in OFF]
        _run(
            ["cmake", "-S", str(tree), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *off],
            folder,
            dict(os.environ),
        )
        _run(["cmake", "--build", str(build), "-j", "2", "--target", *tools], folder, dict(os.environ))
    return LlamaCpp(tree, build / "bin")


def _run(command: Sequence[str], cwd: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout
