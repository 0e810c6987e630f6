"""inspect as users meet it: a process with arguments, an exit code, and a report or a JSON document."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import resources

import jsonschema
import models
import numpy as np
import pytest
from models import REAL, TINY
from rich.cells import cell_len
from rich.console import Console
from safetensors.numpy import save_file

from refimpl.cli.main import run
from refimpl.files import names, source
from refimpl.files.gguf import GGUFValueType as T
from refimpl.report.inspect import print_inspection
from refimpl.verifier.inspection import inspect

SCHEMA = json.loads(resources.files("refimpl").joinpath("report/schemas/inspect.json").read_text())


def ask(capsys, *args):
    """Run inspect --json; the exit code and the document, which fits the schema."""
    code = run(["inspect", "--json", *map(str, args)])
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, SCHEMA)
    return code, document


def tell(capsys, *args):
    """Run inspect; the exit code and what it prints."""
    code = run(["inspect", *map(str, args)])
    return code, capsys.readouterr().out


def show(path, width=80, raw=False):
    """The report as a terminal of some width gets it, without its colours."""
    file = io.StringIO()
    print_inspection(inspect(path, raw), Console(file=file, width=width, markup=False, highlight=False))
    return file.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The header of the published file: 192 experts, 348 GB, the full vocabulary, and its wrong label."""
    keys = models.metadata(REAL, name="GLM-5.1-REAP-555B-A14B") | models.vocabulary(REAL.vocab_size)
    path = tmp_path_factory.mktemp("real") / "GLM-5.1-REAP-Q4_K_M.gguf"
    return models.write(path, REAL, keys)


def test_the_published_file_is_answered_by_a_whole_process_that_compiles_nothing(published):
    assert 348.1e9 < published.stat().st_size < 348.2e9
    code = "import sys; from refimpl.cli.main import run; run(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "inspect", str(published), "--json"]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert not {"numba", "scipy", "tokenizers", "jinja2"} & set(done.stderr.split())
    found = json.loads(done.stdout)
    assert found["census"]["tensors"] == 1782
    assert found["census"]["parameters"]["total"] == 562_687_789_632
    assert found["census"]["parameters"]["active"] == 40_803_650_112
    assert {c["text"]: c["fits"] for c in found["census"]["labels"]} == {"555B": None, "A14B": None}
    assert (found["recipe"]["name"], found["recipe"]["conforms"]) == ("q4_k_m-protected", True)


def test_the_published_file_on_80_columns(published):
    text = show(published)
    assert max(cell_len(line) for line in text.splitlines()) <= 80
    assert "348.14 GB · 1,782 tensors · 562.69 B weights, 40.80 B active · 4.95 bits/weight" in text
    assert re.search(r"routed +225 +Q4_K 190 · Q6_K 35 +543.58 B", text)
    assert re.search(r"555B +does not fit +562.69 B to 570.22 B in all", text)
    assert re.search(r"A14B +does not fit +39.85 B to 42.35 B active", text)
    assert "q4_k_m-protected: all 1,782 tensors" in text
    assert "ok  header, 1,782 regions" in text


def test_every_document_fits_the_schema(capsys, tmp_path):
    path = models.write(tmp_path / "a.gguf", keys=models.metadata(TINY) | models.vocabulary(1280))
    code, document = ask(capsys, path, "--raw")
    assert code == 0
    assert document["hyperparameters"]["n_routed_experts"] == 16
    assert document["raw"]["tensors"][0]["stored_shape"] == [256, 1280]  # innermost first, as in the file
    tokens = next(e for e in document["raw"]["metadata"] if e["key"] == "tokenizer.ggml.tokens")
    assert tokens["value"] == {"array": "string", "length": 1280, "first": [f"token{i}" for i in range(8)]}
    assert "raw" not in ask(capsys, path)[1]


def test_the_schema_refuses_what_it_does_not_know(capsys, tmp_path):
    _, document = ask(capsys, models.write(tmp_path / "a.gguf"))
    for broken in (document | {"more": 1}, {k: v for k, v in document.items() if k != "census"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


@pytest.fixture
def split(tmp_path):
    """A model in two files; the path of the second."""
    rows = [*models.shapes(TINY).items()]
    for part, some in enumerate((rows[:30], rows[30:])):
        keys = models.metadata(TINY) if part == 0 else {}
        split = {"split.no": part, "split.count": 2, "split.tensors.count": len(rows)}
        keys |= {k: (T.INT32 if k.endswith("tensors.count") else T.UINT16, v) for k, v in split.items()}
        path = models.write(tmp_path / f"a-0000{part + 1}-of-00002.gguf", TINY, keys, dict(some))
    return path


def test_a_split_file_is_one_model(capsys, split):
    code, document = ask(capsys, split)
    assert code == 0
    assert len(document["file"]["parts"]) == 2
    assert document["census"]["tensors"] == 67


def test_a_defect_in_one_part_of_a_split_names_that_part(capsys, split):
    with open(split, "r+b") as file:
        file.truncate(split.stat().st_size - 1000)
    code, document = ask(capsys, split.with_name("a-00001-of-00002.gguf"))
    assert code == 3
    assert document["error"]["file"] == str(split)


@pytest.fixture
def checkpoint(tmp_path):
    """An HF directory of a tiny model."""
    folder = tmp_path / "GLM-tiny-99M"
    folder.mkdir()
    tensors = {}
    for link, shape in names.expected(TINY):
        if link.transform == "stack":
            tensors |= {link.hf.format(e=e): np.zeros(shape[1:], np.float16) for e in range(shape[0])}
        elif link.transform == "k_b":
            tensors[link.hf] = np.zeros(
                (TINY.num_attention_heads * (192 + 256), TINY.kv_lora_rank), np.float16
            )
        elif link.transform == "same":
            tensors[link.hf] = np.zeros(shape, np.float16)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(models.config(TINY)))
    return folder


def test_a_checkpoint_has_the_parameters_of_its_gguf(capsys, checkpoint, tmp_path):
    code, document = ask(capsys, checkpoint)
    _, other = ask(capsys, models.write(tmp_path / "a.gguf"))
    assert code == 0
    assert document["census"]["parameters"] == other["census"]["parameters"]
    assert (document["header"], document["recipe"]) == (None, None)
    (label,) = document["census"]["labels"]
    assert (label["text"], label["where"], label["fits"]) == ("99M", ["the file name"], None)
    assert "GLM-tiny-99M" in show(checkpoint)


def test_a_single_safetensors_file_is_counted(capsys, checkpoint):
    code, document = ask(capsys, checkpoint / "model.safetensors")
    assert code == 0
    assert document["file"]["kind"] == "safetensors"
    assert document["census"]["tensors"] > 67
    assert "no config.json" in show(checkpoint / "model.safetensors")


def test_another_architecture_shows_header_and_types(capsys, tmp_path):
    keys = models.metadata(TINY) | {"general.architecture": (T.STRING, "llama")}
    path = models.write(tmp_path / "a.gguf", keys=keys)
    code, document = ask(capsys, path)
    assert code == 0
    assert document["hyperparameters"] is None
    assert "architecture 'llama'" in show(path)


@pytest.mark.parametrize(
    ("key", "code", "finding"), [("vocab_size", 1, "vocab-size"), ("block_count", 3, "hyperparameters")]
)
def test_metadata_that_disagree_fail(capsys, tmp_path, key, code, finding):
    keys = models.metadata(TINY) | {f"glm-dsa.{key}": (T.UINT32, 5000)}
    got, document = ask(capsys, models.write(tmp_path / "a.gguf", keys=keys))
    assert got == code
    assert finding in [f["code"] for f in document["findings"]]
    assert ("error" in document) == (code == 3)


def test_broken_regions_are_a_bad_file_and_still_told(capsys, tmp_path):
    path = models.write(tmp_path / "a.gguf")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    code, document = ask(capsys, path)
    assert code == 3
    assert document["error"]["code"] == "bad-file"
    assert document["error"]["offset"] > 0
    assert "output.weight" in [f["tensor"] for f in document["findings"]]
    code, text = tell(capsys, path)
    assert code == 3
    assert "region-past-end  output.weight: " in text


def test_a_header_that_cannot_be_read_is_an_error_alone(capsys, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(models.write(tmp_path / "b.gguf").read_bytes()[:1000])
    code, document = ask(capsys, path)
    assert code == 3
    assert list(document) == ["error"]


def test_a_recipe_that_nearly_fits_is_named_with_what_differs(tmp_path):
    types = {f"blk.{layer}.ffn_up_exps.weight": "q6_k" for layer in (1, 2)} | {"output.weight": "q6_k"}
    path = models.write(tmp_path / "a.gguf", types=types)
    text = show(path)
    assert re.search(r"q4_k_m-protected but for 3 of 67 tensors, \+\d", text)
    assert "ffn_up_exps.weight in 2 layers: Q6_K, not Q4_K, +540.67 kB" in text
    assert "output.weight: Q6_K, not Q8_0, −79.36 kB" in text


def test_a_file_far_from_every_recipe_is_not_given_one(tmp_path):
    types = dict.fromkeys(models.shapes(TINY), "f32") | {"output.weight": "q8_0"}
    text = show(models.write(tmp_path / "a.gguf", types=types))
    assert "none that is known; closest" in text


def test_an_unquantized_file_has_no_recipe(capsys, tmp_path):
    path = models.write(tmp_path / "a.gguf", types=dict.fromkeys(models.shapes(TINY), "bf16"))
    assert ask(capsys, path)[1]["recipe"] is None
    assert "nothing in it is quantized" in show(path)


HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202egnp.exe[bold]\u200b\ufeff\U000e0041"


@pytest.mark.parametrize("raw", [False, True])
def test_names_and_metadata_cannot_steer_the_terminal(tmp_path, raw):
    tensors = models.shapes(TINY) | {"\x1b[2Jblk.0.evil": (256,)}
    del tensors["output_norm.weight"]
    keys = models.metadata(TINY, name=HOSTILE) | {"general.\x1b[2J": (T.STRING, HOSTILE)}
    keys |= {
        "tokenizer.ggml.tokens": (T.ARRAY, [HOSTILE] * 9),
        "tokenizer.ggml.eos_token_id": (T.STRING, HOSTILE),
    }
    path = models.write(tmp_path / "\x1b[2J.gguf", keys=keys, tensors=tensors)
    text = show(path, raw=raw)
    assert {c for c in text if not c.isprintable()} <= {"\n"}
    assert "\\x1b[31mred" in text
    assert "[bold]" in text


def test_a_pipe_gets_plain_text(capsys, tmp_path):
    path = models.write(tmp_path / "a.gguf", TINY)
    code, text = tell(capsys, path)
    assert code == 0
    assert "\x1b" not in text


def test_raw_lists_every_key_and_tensor(tmp_path):
    text = show(models.write(tmp_path / "a.gguf"), width=200, raw=True)
    assert "glm-dsa.attention.key_length_mla uint32  256" in text
    assert re.search(r"q8_0 +\[192,320,2\] +blk\.0\.attn_k_b\.weight", text)
    assert len(re.findall(r"^ +[\d,]+ +[\d,]+ +\w+ +\[", text, re.MULTILINE)) == 67


@pytest.mark.parametrize("mtp", [0, 1])
def test_the_real_sizes_are_told(tmp_path, mtp):
    hp = replace(REAL, num_nextn_predict_layers=mtp)
    text = show(models.write(tmp_path / "a.gguf", hp))
    assert "78 layers, 3 dense and 75 sparse" in text
    assert ("multi-token prediction" in text) == bool(mtp)
    with source.open(tmp_path / "a.gguf") as f:
        assert len(f.tensors) == (1809 if mtp else 1782)
