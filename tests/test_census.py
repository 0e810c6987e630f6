"""Counting parameters, and holding the labels of names against the counts."""

from dataclasses import replace

import glm51
import models
import pytest
from models import REAL, TINY

from refimpl.files import names, source
from refimpl.verifier import labels
from refimpl.verifier.census import census


def count(path, hp, file_name="model.gguf"):
    with source.open(path) as f:
        return census(f, hp, file_name)


def count_header(hp, keys=None, file_name="model.gguf", tmp=None):
    path = models.write(tmp / "model.gguf", hp, keys)
    return count(path, hp, file_name)


@pytest.fixture
def counted(tmp_path):
    """Counts a model of these experts, with names, MTP layer or not."""

    def run(experts=192, mtp=0, file_name="model.gguf", **names_of):
        hp = replace(REAL, n_routed_experts=experts, num_nextn_predict_layers=mtp)
        return count_header(hp, models.metadata(hp, **names_of), file_name, tmp_path)

    return run


@pytest.mark.parametrize("mtp", [False, True])
def test_the_name_map_expects_the_tensors_of_the_real_model(mtp):
    hp = replace(REAL, num_nextn_predict_layers=int(mtp))
    assert {link.gguf: shape for link, shape in names.expected(hp)} == glm51.shapes(192, mtp)


# in 1e9; 754 is what Hugging Face shows for GLM-5.1, 478.4 what the card of its child with 160 experts says
@pytest.mark.parametrize(
    ("experts", "total", "with_mtp", "active"),
    [
        (256, 743.911, 753.864, (39.88, 40.83, 41.78, 42.38)),
        (192, 562.688, 570.224, (39.85, 40.80, 41.76, 42.35)),
        (160, 472.076, 478.405, (39.84, 40.79, 41.74, 42.33)),
        (154, 455.086, 461.188, (39.83, 40.79, 41.74, 42.33)),
    ],
)
@pytest.mark.parametrize("mtp", [0, 1])
def test_parameters_follow_from_the_tensors(counted, experts, total, with_mtp, active, mtp):
    c = counted(experts, mtp)
    assert round(c.total / 1e9, 3) == total
    assert round(c.numbers.total["with an MTP layer"] / 1e9, 3) == with_mtp
    assert (c.mtp > 0) == bool(mtp)
    assert c.weights == c.total + c.mtp
    how = ("without head", "with head", "with head and embedding", "with head, embedding and MTP layer")
    assert tuple(round(c.numbers.active[one] / 1e9, 2) for one in how) == active
    assert c.active == c.numbers.active["with head"]


def test_the_arithmetic_of_the_real_model_by_hand(counted):
    c = counted(192)
    attention = 2048 * 6144 + 16384 * 2048 + 576 * 6144 + 28672 * 512 + 6144 * 16384 + 2048 + 512
    indexer = 4096 * 2048 + 128 * 6144 + 32 * 6144 + 2 * 128
    expert, dense, router = 3 * 2048 * 6144, 3 * 12288 * 6144, 192 * 6144 + 192
    head = embed = 154_880 * 6144
    around = 78 * (attention + indexer + 2 * 6144) + 3 * dense + 75 * (expert + router) + 6144 + head
    assert c.total == around + embed + 75 * 192 * expert
    assert c.active == around + 75 * 8 * expert


def test_the_census_of_the_published_file(counted):
    c = counted()
    by_name = {one.name: one for one in c.classes}
    assert (c.tensors, c.bytes) == (1782, 348_128_184_576)
    assert round(c.bits_per_weight, 2) == 4.95
    assert dict(by_name["routed"].types) == {"q4_k": 190, "q6_k": 35}
    assert {name: one.tensors for name, one in by_name.items()} == {
        "routed": 225,
        "shared": 225,
        "dense": 9,
        "attention": 78 * 6,
        "indexer": 78 * 3,
        "router": 150,
        "embed": 1,
        "head": 1,
        "norm": 78 * 6 + 1,
    }


def test_one_pruned_layer_changes_the_active_parameters_by_its_own_experts_only(tmp_path):
    tensors = models.shapes(TINY)
    path = models.write(tmp_path / "a.gguf", tensors=tensors)
    whole = count(path, TINY)
    for name in ("gate", "up", "down"):
        tensors[f"blk.1.ffn_{name}_exps.weight"] = (12, 256, 256)
    pruned = count(models.write(tmp_path / "b.gguf", tensors=tensors), TINY)
    assert whole.total - pruned.total == 3 * 4 * 256 * 256
    assert whole.active == pruned.active


def test_an_unknown_architecture_is_counted_as_a_whole(tmp_path):
    c = count(models.write(tmp_path / "a.gguf"), None)
    assert [one.name for one in c.classes] == ["other"]
    assert c.active is None
    assert c.total == c.weights


@pytest.mark.parametrize(
    ("label", "experts"),
    [
        ("744B-A40B", 256),
        ("GLM-5.1-754B", 256),
        ("753B-A42B", 256),
        ("750B", 256),
        ("478B-A42B", 160),
        ("472B-A41B", 160),
        ("478.4B-A40.8B", 160),
        ("562.7B-A40.8B", 192),
        ("563B-A41B", 192),
        ("570B", 192),
        ("0.56T", 192),
        ("562b_a40b", 192),
        ("GLM-5.1-562B-40B-active", 192),
        ("256x22B", 256),
        ("192x22B", 192),
    ],
)
def test_labels_that_are_right_fit(counted, label, experts):
    claims = counted(experts, name=label).claims
    assert claims
    assert all(claim.fits for claim in claims)


@pytest.mark.parametrize(
    ("label", "experts", "wrong"),
    [
        ("GLM-5.1-REAP-555B-A14B", 192, ["555B", "A14B"]),
        ("GLM-5.1-444B-A14B-REAP", 154, ["444B", "A14B"]),
        ("GLM-5.1-754B", 192, ["754B"]),
        ("744B-A40B", 192, ["744B"]),
        ("562.5B", 192, ["562.5B"]),
        ("A43B", 256, ["A43B"]),
        ("256x22B", 192, ["256x22B"]),
        ("192x7B", 192, ["192x7B"]),
    ],
)
def test_labels_that_are_wrong_do_not_fit(counted, label, experts, wrong):
    c = counted(experts, name=label)
    assert [claim.text for claim in c.claims if claim.fits is None] == wrong
    assert [finding.severity for finding in c.findings] == ["warning"] * len(wrong)


def test_a_label_is_found_in_each_name_and_its_places_are_told_together(counted):
    c = counted(name="x-555B-A14B", basename="GLM-5.1", size_label="555B", file_name="GLM-555B-Q4_K_M.gguf")
    total, active = c.claims
    assert (total.text, total.where) == ("555B", ("general.name", "general.size_label", "the file name"))
    assert (active.text, active.where) == ("A14B", ("general.name",))
    assert [finding.code for finding in c.findings] == ["label-total", "label-active"]
    assert "562.69 B" in c.findings[0].message and "570.22 B" in c.findings[0].message
    assert "40.80 B" in c.findings[1].message


def test_a_size_label_of_experts_is_no_total(counted):
    (claim,) = counted(256, size_label="256x22B").claims
    assert (claim.kind, claim.fits) == ("experts", "without MTP layer")
    assert round(claim.true["without MTP layer"] / 1e9, 2) == 21.97


@pytest.mark.parametrize(
    "name",
    [
        "GLM-5.1-Q4_K_M-00001-of-00008",
        "GLM-5.1-4bit-128k",
        "glm-IQ3_M-1M",
        "pruned-on-100B-tokens",
        "0xB-A-B-5.1BX-5B2-x12B-1.2.3B",
        "B200-fp8-e4m3",
        "562\u212a-\u0665\u0665\u0665B",
    ],
)
def test_other_numbers_in_names_are_no_labels(counted, name):
    assert counted(name=name).claims == []


def test_a_small_model_may_be_labelled_in_millions(tmp_path):
    path = models.write(
        tmp_path / "a.gguf", TINY, models.metadata(TINY, name="tiny-13M-A8M", size_label="99M")
    )
    fits = {claim.text: claim.fits is not None for claim in count(path, TINY).claims}
    assert fits == {"13M": True, "A8M": True, "99M": False}


def test_a_label_is_rounded_or_cut_off_never_up():
    true = labels.Numbers({"in all": 40_800_000_000}, {}, {}, None)
    fits = {
        text
        for text in ("39B", "40B", "41B", "42B", "40.8B", "40.7B", "40.80B", "40.81B")
        if fits_one(text, true)
    }
    assert fits == {"40B", "41B", "40.8B", "40.80B"}


def fits_one(text, true):
    (claim,) = labels.judge({"name": text}, true)
    return claim.fits is not None


def test_only_the_start_of_a_long_name_is_searched():
    true = labels.Numbers({"in all": 1}, {}, {}, None)
    assert labels.judge({"name": "1" * 10_000_000 + "B"}, true) == []
