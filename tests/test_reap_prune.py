"""Pruning and its audit: what stays keeps its bytes, and every way in which it goes wrong is named."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import refimpl
import refimpl.report
from refimpl.cli.main import run as refimpl_command
from refimpl.errors import Unsupported, Usage
from refimpl.files import source as model_files
from refimpl.reap import kept as kept_file
from refimpl.reap import state
from refimpl.reap.audit import audit
from refimpl.reap.prune import prune, read_provenance
from refimpl.reap.saliency import Saliency
from tests import float_gguf
from tests.tiny_checkpoint import CONFIG, write_checkpoint

TINY = Path(__file__).resolve().parent.parent / "golden" / "tiny-glm-dsa"
KEPT = {1: [0, 2, 3, 5], 2: [1, 2, 4, 5]}
TWELVE = {layer: [0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15] for layer in (1, 2)}


def write_list(path, model, lists):
    with model_files.open(model) as opened:
        identity = state.identify(opened)
    document = {
        "model": identity.__dict__ | {"layers": list(identity.layers)},
        "criterion": "reap",
        "kept": {str(layer): experts for layer, experts in lists.items()},
    }
    path.write_text(kept_file.dump(document))
    return path


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reap") / "parent"
    write_checkpoint(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def child(parent):
    prune(parent, parent.parent / "child", write_list(parent.parent / "kept.json", parent, KEPT))
    return parent.parent / "child"


def read_all(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_what_stays_keeps_its_bytes_under_its_new_number(parent, child):
    before, after = read_all(parent), read_all(child)
    for name, value in after.items():
        parts = name.split(".")
        kept = KEPT.get(int(parts[2])) if parts[1] == "layers" else None
        if kept and "experts" in parts and "shared_experts" not in parts:
            parts[5] = str(kept[int(parts[5])])
            want = before[".".join(parts)]
        elif kept and parts[3:5] == ["mlp", "gate"]:
            want = before[name][kept]
        else:
            want = before[name]
        assert value.dtype == want.dtype and value.tobytes() == want.tobytes(), name
    gone = 2 * 2 * 3  # two experts of two layers, three matrices each
    assert len(before) - len(after) == gone
    assert json.loads((child / "config.json").read_text()) == CONFIG | {"n_routed_experts": 4}
    assert (child / "tokenizer.json").read_text() == "{}"
    with refimpl.open(child) as opened:  # the index agrees with the shards, or it would not open
        assert not opened.defects


def test_a_child_passes_its_audit_and_its_map_is_found(parent, child):
    found = audit(child, parent)
    assert (found.how, found.kept, found.findings) == ("bytes", KEPT, [])
    assert found.passed and (found.experts, found.parent_experts) == (4, 6)


def test_a_second_prune_composes_the_maps(parent, child, tmp_path):
    second = write_list(tmp_path / "second.json", child, {1: [1, 3], 2: [0, 2]})
    document = prune(child, tmp_path / "grandchild", second)
    assert document["kept"] == {"1": [2, 5], "2": [1, 4]}
    assert [step["1"] for step in document["steps"]] == [[0, 2, 3, 5], [1, 3]]
    assert audit(tmp_path / "grandchild", parent).kept == {1: [2, 5], 2: [1, 4]}
    with refimpl.open(tmp_path / "grandchild") as opened:
        assert read_provenance(opened) == json.loads((tmp_path / "grandchild" / "reap.json").read_text())


def test_a_list_for_another_model_is_refused(parent, tmp_path):
    write_checkpoint(tmp_path / "other", weights=None, config=CONFIG | {"vocab_size": 41})
    kept = write_list(tmp_path / "kept.json", tmp_path / "other", KEPT)
    with pytest.raises(Usage, match="another model"):
        prune(parent, tmp_path / "out", kept)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lists", "error", "word"),
    [
        ({1: [0, 2, 3, 5]}, Usage, "no experts for layer 2"),
        ({1: [0, 2, 3, 5], 2: [0, 1, 2]}, Unsupported, "one number for all layers"),
        ({1: [0], 2: [1]}, Usage, "fewer than the 2"),
        (KEPT | {7: [0, 1, 2, 3]}, Usage, "layer 7"),
    ],
)
def test_a_list_that_no_model_can_follow_is_refused(parent, tmp_path, lists, error, word):
    with pytest.raises(error, match=word):
        prune(parent, tmp_path / "out", write_list(tmp_path / "kept.json", parent, lists))
    assert list(tmp_path.iterdir()) == [tmp_path / "kept.json"]


def test_experts_of_a_grouped_router_leave_every_group_alike(tmp_path):
    parent, config = tmp_path / "parent", CONFIG | {"n_group": 2, "topk_group": 1}
    write_checkpoint(parent, config)
    with pytest.raises(Usage, match="select --groups 2"):
        prune(parent, tmp_path / "out", write_list(tmp_path / "kept.json", parent, KEPT | {2: [0, 1, 2, 5]}))
    prune(parent, tmp_path / "out", write_list(tmp_path / "kept.json", parent, KEPT))
    assert audit(tmp_path / "out", parent).kept == KEPT


def test_lists_of_the_wrong_layers_are_refused_or_seen(parent, tmp_path):
    kept = write_list(tmp_path / "kept.json", parent, {layer + 1: experts for layer, experts in KEPT.items()})
    with pytest.raises(Usage, match="no experts for layer 1"):
        prune(parent, tmp_path / "out", kept)
    prune(parent, tmp_path / "out", write_list(tmp_path / "swapped.json", parent, {1: KEPT[2], 2: KEPT[1]}))
    with refimpl.open(parent) as opened:
        run = state.Run(
            state.identify(opened), {"name": "paper"}, ({"name": "x", "sha256": "0", "tokens": 30},)
        )
    layers = {}
    for layer, experts in KEPT.items():
        layers[layer] = saliency = Saliency(6, 32)
        saliency.tokens = 30
        saliency.sums["frequency"][:] = 10
        saliency.sums["weighted_ean_sum"][experts] = 1
    state.save(tmp_path / "s.safetensors", run, layers)
    choice = audit(tmp_path / "out", parent, tmp_path / "s.safetensors").choices
    assert not next(one for one in choice if one.criterion == "reap").same


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(parent, tmp_path, monkeypatch):
    kept = write_list(tmp_path / "kept.json", parent, KEPT)
    (tmp_path / "out").mkdir()
    with pytest.raises(Usage, match="exists"):
        prune(parent, tmp_path / "out", kept)
    with pytest.raises(Usage, match="source itself"):
        prune(parent, parent, kept, force=True)
    monkeypatch.setattr("refimpl.reap.shards._copy_rest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(parent, tmp_path / "out", kept, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.json", "out"]
    monkeypatch.undo()
    prune(parent, tmp_path / "out", kept, force=True)
    assert audit(tmp_path / "out", parent).passed


@pytest.mark.parametrize("mtp", ["drop", "alike"])
def test_the_mtp_block_is_dropped_with_its_config_or_pruned_alike(tmp_path, mtp):
    parent, child = tmp_path / "parent", tmp_path / "child"
    write_checkpoint(parent, CONFIG | {"num_nextn_predict_layers": 1})
    prune(parent, child, write_list(tmp_path / "kept.json", parent, KEPT), mtp=mtp)
    config = json.loads((child / "config.json").read_text())
    found = audit(child, parent)
    assert found.findings == [] and found.mtp == {"drop": "dropped", "alike": "kept"}[mtp]
    assert config["num_nextn_predict_layers"] == (0 if mtp == "drop" else 1)
    assert any(".layers.3." in name for name in read_all(child)) == (mtp == "alike")
    if mtp == "alike":
        assert found.kept[3] == KEPT[2]


@pytest.mark.parametrize("mtp", ["drop", "alike"])
def test_a_ggufs_mtp_block_goes_or_is_pruned_alike(tmp_path, mtp):
    write_checkpoint(tmp_path / "parent", CONFIG | {"num_nextn_predict_layers": 1})
    whole, child = float_gguf.write(tmp_path / "whole.gguf", tmp_path / "parent"), tmp_path / "child.gguf"
    prune(whole, child, write_list(tmp_path / "kept.json", whole, KEPT), mtp=mtp)
    found = audit(child, whole)
    assert found.findings == [] and found.mtp == {"drop": "dropped", "alike": "kept"}[mtp]
    with refimpl.open(child) as opened:
        assert opened.metadata["glm-dsa.block_count"] == (3 if mtp == "drop" else 4)
        assert any(name.startswith("blk.3.") for name in opened.tensors) == (mtp == "alike")


def test_a_second_prune_of_a_gguf_composes_the_maps(tmp_path):
    """16 -> 12 -> 10, as 256 -> 192 -> 160."""
    whole, first, second = (tmp_path / f"{n}.gguf" for n in (16, 12, 10))
    whole.symlink_to(TINY / "stock.gguf")
    prune(whole, first, write_list(tmp_path / "12.json", whole, TWELVE))
    some = {1: [0, 1, 3, 4, 5, 6, 7, 8, 9, 11], 2: list(range(2, 12))}
    document = prune(first, second, write_list(tmp_path / "10.json", first, some))
    want = {layer: [TWELVE[layer][e] for e in experts] for layer, experts in some.items()}
    assert document["kept"] == {str(layer): experts for layer, experts in want.items()}
    found = audit(second, whole)
    assert (found.kept, found.findings, found.experts) == (want, [], 10)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_pruning_holds_no_more_than_a_piece(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("refimpl.reap.shards.PIECE", 1 << 12)
    size = {"hidden_size": 128, "moe_intermediate_size": 512, "n_routed_experts": 16}
    write_checkpoint(tmp_path / "parent", CONFIG | size)
    whole = tmp_path / "parent"
    if kind == "gguf":
        whole = float_gguf.write(tmp_path / "whole.gguf", whole)
    kept = write_list(tmp_path / "kept.json", whole, {layer: list(range(1, 16)) for layer in (1, 2)})
    layer = 3 * 16 * 128 * 512 * (4 if kind == "gguf" else 2)  # bytes of its experts
    peaks = []
    for out in ("first", "second"):  # the first run also imports and opens for the first time
        tracemalloc.start()
        prune(whole, tmp_path / out, kept)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2_500_000 < layer / 2  # most of it the window through which a header is read


def damaged(child, tmp_path, change):
    """A copy of the child with other tensors."""
    out = tmp_path / "damaged"
    shutil.copytree(child, out)
    tensors = read_all(out)
    for path in out.glob("*.safetensors*"):
        path.unlink()
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


L1, L2 = "model.layers.1.mlp.", "model.layers.2.mlp."


def swap_rows(t):
    t[f"{L1}gate.weight"] = t[f"{L1}gate.weight"][[1, 0, 2, 3]]


def shift_layer(t):
    t[f"{L1}gate.weight"], t[f"{L2}gate.weight"] = t[f"{L2}gate.weight"], t[f"{L1}gate.weight"]


def duplicate(t):
    for matrix in ("gate", "up", "down"):
        t[f"{L1}experts.1.{matrix}_proj.weight"] = t[f"{L1}experts.0.{matrix}_proj.weight"]
    t[f"{L1}gate.weight"][1] = t[f"{L1}gate.weight"][0]


def swap_bias(t):
    bias = t[f"{L1}gate.e_score_correction_bias"]
    bias[[0, 1]] = bias[[1, 0]]


def change_shared(t):
    t[f"{L1}shared_experts.up_proj.weight"].view(np.uint16)[0, 0] ^= 1


def change_expert(t):
    t[f"{L2}experts.3.up_proj.weight"].view(np.uint16)[1, 2] ^= 1


@pytest.mark.parametrize(
    ("change", "code", "tensor", "word"),
    [
        (swap_rows, "expert-differs", f"{L1}experts.0.up_proj.weight", "parent's expert 0, the router says expert 2"),
        (shift_layer, "router-row-unknown", f"{L1}gate.weight", "of layer 2"),
        (duplicate, "expert-duplicated", f"{L1}gate.weight", "expert 0, which stands in row 0 already"),
        (swap_bias, "bias-differs", f"{L1}gate.e_score_correction_bias", "entry 0 is not the parent's entry 0"),
        (change_shared, "tensor-changed", f"{L1}shared_experts.up_proj.weight", "pruning does not touch"),
        (change_expert, "expert-differs", f"{L2}experts.3.up_proj.weight", "no expert of the parent"),
        (lambda t: t.pop("model.norm.weight"), "missing", "model.norm.weight", "does not"),
    ],
)  # fmt: skip
def test_damage_is_named(parent, child, tmp_path, change, code, tensor, word):
    found = audit(damaged(child, tmp_path, change), parent)
    assert not found.passed
    assert [f for f in found.findings if f.code == code and f.tensor == tensor and word in f.message], (
        found.findings
    )


def test_an_unpruned_bias_is_named(parent, child, tmp_path):
    name = f"{L1}gate.e_score_correction_bias"
    whole = read_all(parent)[name]
    found = audit(damaged(child, tmp_path, lambda t: t.update({name: whole})), parent)
    assert [f.message for f in found.findings if f.tensor == name] == [
        "it has 6 entries, the router 4 rows: it was left unpruned"
    ]


def test_a_changed_hyperparameter_is_named(parent, child, tmp_path):
    out = damaged(child, tmp_path, lambda t: None)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.0}))
    assert [f.code for f in audit(out, parent).findings] == ["hparam-differs"]


@pytest.mark.parametrize("file", ["stock", "imatrix-quantized"])
def test_a_quantized_model_is_pruned_without_quantizing_anew(tmp_path, file):
    whole, out = TINY / f"{file}.gguf", tmp_path / "child.gguf"
    document = prune(whole, out, write_list(tmp_path / "kept.json", whole, TWELVE))
    with refimpl.open(whole) as a, refimpl.open(out) as b:
        assert (b.metadata["glm-dsa.expert_count"], len(b.tensors)) == (12, len(a.tensors))
        assert json.loads(b.metadata["refimpl.reap"]) == document
        name = "blk.2.ffn_down_exps.weight"
        want = a.read(name).reshape(16, -1)[TWELVE[2]]
        assert b.tensors[name].format == a.tensors[name].format
        assert b.read(name).reshape(12, -1).tobytes() == want.tobytes()
    by_bytes = audit(out, whole)
    assert (by_bytes.how, by_bytes.kept, by_bytes.findings) == ("bytes", TWELVE, [])
    by_content = audit(out, TINY)
    assert (by_content.how, by_content.kept, by_content.passed) == ("verify", TWELVE, True)


def test_the_same_list_fits_checkpoint_and_gguf(tmp_path):
    with refimpl.open(TINY) as a, refimpl.open(TINY / "stock.gguf") as b:
        assert state.identify(a) == state.identify(b)


def test_the_audit_says_what_was_lost_and_by_whose_choice(parent, child, tmp_path):
    with refimpl.open(parent) as opened:
        identity = state.identify(opened)
    layers = {}
    for layer, kept in KEPT.items():
        saliency = Saliency(6, 32)
        saliency.tokens = 30
        saliency.sums["frequency"][:] = 10
        saliency.sums["weighted_ean_sum"][:] = [80 if e in kept else 40 for e in range(6)]
        saliency.sums["ean_sum"][:] = [1 if e in kept else 2 for e in range(6)]
        layers[layer] = saliency
    run = state.Run(identity, {"name": "paper"}, ({"name": "x", "sha256": "0", "tokens": 30},))
    state.save(tmp_path / "s.safetensors", run, layers)
    found = audit(child, parent, tmp_path / "s.safetensors")
    first = found.choices[0]
    assert (first.criterion, first.same, first.regret) == ("reap", True, 0)
    assert first.lost == pytest.approx(80 / 400)
    ean = next(one for one in found.choices if one.criterion == "ean_sum")
    assert not ean.same and ean.layers[0].tau == pytest.approx(-1)
    with pytest.raises(Usage, match="another model"):
        audit(child, child, tmp_path / "s.safetensors")


def check_schema(name, text):
    schema = Path(refimpl.report.__file__).parent / "schemas" / f"{name}.json"
    document = json.loads(text)
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(document)
    return document


def score(model, path, seed, preset="paper"):
    """Statistics of a model, drawn at random."""
    with model_files.open(model) as opened:
        identity = state.identify(opened)
    layers = {}
    for layer in identity.layers:
        random = np.random.default_rng([seed, layer])
        layers[layer] = saliency = Saliency(identity.experts, 32)
        for values in saliency.sums.values():
            values[:] = random.uniform(1, 2, values.shape)
        saliency.tokens = 30
        saliency.sums["frequency"][:] = saliency.tokens * identity.top_k // identity.experts
    data = ({"name": "x", "sha256": str(seed), "tokens": 30},)
    state.save(path, state.Run(identity, {"name": preset}, data), layers)
    return path


def test_the_commands_lead_from_statistics_to_an_audited_child(capsys, parent, tmp_path):
    one, two = (str(score(parent, tmp_path / f"{i}.safetensors", i)) for i in (1, 2))
    both, kept, out = (str(tmp_path / name) for name in ("both.safetensors", "kept.json", "out"))
    assert refimpl_command(["reap", "merge", one, two, "-o", both]) == 0
    assert refimpl_command(["reap", "merge", one, two, "-o", both]) == 2
    assert "--force" in capsys.readouterr().err
    assert refimpl_command(["reap", "select", both, "--keep", "4"]) == 0
    document = check_schema("kept", capsys.readouterr().out)
    assert all(len(experts) == 4 for experts in document["kept"].values())
    assert [entry["sha256"] for entry in document["data"]] == ["1", "2"]
    assert refimpl_command(["reap", "select", both, "--ratio", "0.4", "-o", kept]) == 0
    assert json.loads(Path(kept).read_text())["kept"] == document["kept"]
    assert refimpl_command(["reap", "prune", str(parent), out, "--kept", kept, "--quiet"]) == 0
    capsys.readouterr()
    assert refimpl_command(["reap", "audit", out, "--parent", str(parent), "--scores", both, "--json"]) == 0
    found = check_schema("audit", capsys.readouterr().out)
    assert found["kept"] == document["kept"]
    assert [c["same"] for c in found["choices"] if c["criterion"] == "reap"] == [True]
    assert refimpl_command(["reap", "audit", out, "--parent", str(parent), "--scores", both]) == 0
    said = capsys.readouterr().out
    assert "PASS" in said and "4 of 6 in each of 2 layers" in said and "regret" in said


def test_the_commands_refuse_what_does_not_belong_together(capsys, parent, child, tmp_path):
    one = str(score(parent, tmp_path / "1.safetensors", 1))
    other = str(score(parent, tmp_path / "2.safetensors", 2, preset="model"))
    kept, out = str(tmp_path / "kept.json"), str(tmp_path / "out")
    assert refimpl_command(["reap", "merge", one, other, "-o", out]) == 2
    assert "two presets" in capsys.readouterr().err
    assert refimpl_command(["reap", "select", one, "--keep", "1"]) == 2
    assert "a token needs 2" in capsys.readouterr().err
    assert refimpl_command(["reap", "select", one, "--keep", "3", "--criterion", "seer"]) == 2
    assert refimpl_command(["reap", "select", str(parent / "config.json"), "--keep", "3"]) == 3
    assert refimpl_command(["reap", "select", one, "--keep", "3", "-o", kept]) == 0
    assert refimpl_command(["reap", "prune", str(child), out, "--kept", kept, "--quiet"]) == 2
    assert "another model" in capsys.readouterr().err
    assert not Path(out).exists()


def test_the_audit_of_a_damaged_child_exits_1_with_the_damage_on_top(capsys, parent, child, tmp_path):
    bad = damaged(child, tmp_path, change_expert)
    assert refimpl_command(["reap", "audit", str(bad), "--parent", str(parent)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("expert-differs") and "FAIL" in said[-1]


def test_experts_that_must_stay_come_from_a_file_or_from_their_activations(capsys, parent, tmp_path):
    one = str(score(parent, tmp_path / "1.safetensors", 1))
    always = tmp_path / "always.json"
    always.write_text('{"1": [0, 1, 2]}')
    assert refimpl_command(["reap", "select", one, "--keep", "3", "--preserve", str(always)]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]["1"] == [0, 1, 2]
    assert refimpl_command(["reap", "select", one, "--keep", "3", "--preserve", "outliers"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(map(len, document["preserved"].values())) == 1  # one stands above the 99.5th percentile
    always.write_text('{"1": 7}')
    assert refimpl_command(["reap", "select", one, "--keep", "3", "--preserve", str(always)]) == 3
