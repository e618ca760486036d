"""pareto.py on artifacts that are made up here: the front, the refusals, the page."""

import argparse
import json
import math
from xml.etree import ElementTree

import pareto
import pytest

from lib.core import artifact
from tests.conftest import call, refused, script

# {setting: (bytes, mean KL)}: q4_1 is larger and farther than q4_0, nf4 as large as q5_0 and farther.
FIGURES = {
    "gguf-q8_0": (1_450_000, 0.001), "gguf-q5_0": (930_000, 0.05), "gguf-q4_1": (850_000, 0.30),
    "gguf-q4_0": (776_000, 0.20), "nf4": (930_000, 0.06), "gguf-q4_k": (700_000, 1.5),
}  # fmt: skip


def plain(path, text):
    path.mkdir(parents=True)
    (path / "content").write_text(text)
    return path


@pytest.fixture
def sources(tmp_path):
    return plain(tmp_path / "merged", "weights"), plain(tmp_path / "rows", "rows")


def quantized(path, sources, size, kl, *, samples=32, seed=42, objections=()):
    model, data = sources
    args = argparse.Namespace(method="gguf-q4_0", samples=samples, seed=seed, calibration_samples=0, embedding=None)
    with artifact.write_artifact(path, "quantized", args, {"model": model, "data": data}) as build:
        (build.path / "model.gguf").write_bytes(bytes(size))
        build.notes = {"format": path.name.partition("-pareto-")[2], "seconds": 5.0}
        build.metrics = {
            "ratio": 2_726_000 / size, "input_bytes": 2_726_000, "objections": list(objections),
            "divergence": {
                "rows": 32, "answer_positions": 99, "kl_mean": kl, "kl_p99": 3 * kl, "top1_agreement": 0.9,
                "nll_reference": 0.4, "nll": 0.5, "nll_base": 1.7, "gain_kept": 0.92,
            },
        }  # fmt: skip
    return path


@pytest.fixture
def models(tmp_path, sources):
    return [
        quantized(tmp_path / "models" / f"toy-pareto-{name}", sources, *figures,
                  objections=["mean KL 1.5 nats (limit 1)"] if figures[1] > 1 else ())
        for name, figures in FIGURES.items()
    ]  # fmt: skip


def settings_of(output):
    return json.loads((output / "pareto.json").read_text())["settings"]


def test_table_and_picture_hold_every_setting(models, tmp_path):
    output = tmp_path / "toy-pareto"
    done = script("pareto", "--models", *models, "--output", output)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == str(output)
    found = settings_of(output)
    assert list(found) == ["gguf-q4_k", "gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "nf4", "gguf-q8_0"]
    assert [name for name, s in found.items() if s["front"]] == ["gguf-q4_k", "gguf-q4_0", "gguf-q5_0", "gguf-q8_0"]
    assert artifact.read(output, "pareto")["metrics"]["settings"] == found
    table = [line for line in (output / "pareto.md").read_text().splitlines() if line.startswith("| ")][2:]
    for line, (name, s) in zip(table, found.items(), strict=True):
        cells = line.replace("\\", "").strip("| ").split(" | ")
        assert cells[0] == name and float(cells[1]) == pytest.approx(s["size_bytes"] / 1e6, abs=0.051)
        assert float(cells[3]) == pytest.approx(s["kl_mean"], abs=5e-5) and cells[8] == "92%"
        assert cells[-2:] == ["exceeded" if name == "gguf-q4_k" else "met", "yes" if s["front"] else "no"]
    svg = ElementTree.parse(output / "pareto.svg")
    texts = ["".join(e.itertext()).strip() for e in svg.iter() if e.tag.endswith("}text")]
    assert set(FIGURES) <= set(texts)


@pytest.mark.parametrize(
    "points, front",
    [
        ([(1, 0.5), (2, 0.1)], [True, True]),
        ([(1, 0.1), (2, 0.5)], [True, False]),
        ([(1, 0.1), (1, 0.5)], [True, False]),  # as small, farther
        ([(1, 0.1), (2, 0.1)], [True, False]),  # as near, larger
        ([(1, 0.1), (1, 0.1)], [True, True]),
        ([(1, math.nan), (2, 0.1)], [False, True]),
    ],
)
def test_the_front(points, front):
    settings = [{"size_bytes": size, "kl_mean": kl} for size, kl in points]
    assert [pareto.is_on_front(setting, settings) for setting in settings] == front


@pytest.mark.parametrize("kl", [0.0, -1e-9, 0.3, math.nan])
def test_one_alone_and_a_divergence_that_has_no_logarithm(sources, tmp_path, kl):
    one = quantized(tmp_path / "toy-pareto-gguf-f16", sources, 900, kl)
    done = call("pareto", "--models", one, "--output", tmp_path / "toy-pareto")
    assert done.code == 0, done.err
    svg = (tmp_path / "toy-pareto" / "pareto.svg").read_text()
    assert ("gguf-f16 (0)" in svg) == (kl <= 0) and ("gguf-f16" in svg) == (not math.isnan(kl))
    assert ElementTree.fromstring(svg) is not None and list(settings_of(tmp_path / "toy-pareto")) == ["gguf-f16"]


def test_labels_at_one_place_do_not_lie_on_each_other(sources, tmp_path):
    paths = [quantized(tmp_path / f"toy-pareto-s{n}", sources, 900, 0.1) for n in range(3)]
    assert call("pareto", "--models", *paths, "--output", tmp_path / "toy-pareto").code == 0
    svg = ElementTree.parse(tmp_path / "toy-pareto" / "pareto.svg")
    labels = [e for e in svg.iter() if e.tag.endswith("}text") and "".join(e.itertext()).strip() in ("s0", "s1", "s2")]
    assert len({e.get("transform") or e.get("y") for e in labels}) == 3


def test_what_cannot_be_compared_is_refused_with_both_names(models, sources, tmp_path):
    model, data = sources
    other = quantized(tmp_path / "a", (plain(tmp_path / "other", "others"), data), 900, 0.1)
    rows = quantized(tmp_path / "b", (model, plain(tmp_path / "more", "more")), 900, 0.1)
    fewer = quantized(tmp_path / "c", sources, 900, 0.1, samples=16, seed=7)
    words = {other: ["source models differ"], rows: ["--data"], fewer: ["--samples 16 and 32", "--seed 7 and 42"]}
    for path, said in words.items():
        done = call("pareto", "--models", models[0], path, "--output", tmp_path / "toy-pareto")
        refused(done, str(models[0]), str(path), *said)
        assert not (tmp_path / "toy-pareto").exists()


def test_missing_double_changed_and_other_artifacts_are_refused(models, sources, tmp_path):
    output = ("--output", tmp_path / "toy-pareto")
    refused(call("pareto", "--models", tmp_path / "none", *output), "does not exist", "make pareto")
    refused(call("pareto", "--models", models[0], models[0], *output), "more than once")
    refused(call("pareto", "--models", sources[0], *output), "not an artifact", "make pareto")
    with artifact.write_artifact(tmp_path / "base", "base", argparse.Namespace()) as build:
        (build.path / "content").write_text("x")
    refused(call("pareto", "--models", tmp_path / "base", *output), "'base'", "quantize.py")
    (models[0] / "model.gguf").write_bytes(b"changed")
    refused(call("pareto", "--models", *models, *output), "checksum mismatch", str(models[0]))
