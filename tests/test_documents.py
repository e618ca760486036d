"""The documents: figures stand in docs/results/, commands and messages exist."""

import json
import re

import evaluate_clara
import pytest

from lib.forecast import workload
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
ALIGNMENT = (REPOSITORY / "docs" / "alignment.md").read_text()
EXAMPLES = REPOSITORY / "docs" / "adding.md"  # of what is not there yet; tests/test_adding.py carries them out
PAGES = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"), *REPOSITORY.glob("*/README.md")]
COMMANDS = [page for page in PAGES if page != EXAMPLES]
RESULTS = REPOSITORY / "docs" / "results" / "make-all-200"
MAKEFILE = "".join(file.read_text() for file in [REPOSITORY / "Makefile", *sorted(REPOSITORY.glob("mk/*.mk"))])


def between(text: str, start: str, end: str) -> str:
    return text.split(start, 1)[1].split(end, 1)[0].strip()


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_the_table_of_the_readme_is_the_measured_one():
    """Some of the report's columns, with its headings and its cells."""
    header, _, *rows = between(README, "<!-- table -->", "<!-- /table -->").splitlines()
    lines = (RESULTS / "report.md").read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| variant | size"))
    columns = [cells(lines[start]).index(name) for name in cells(header)]
    measured = [[cells(line)[n] for n in columns] for line in lines[start + 2 : start + 6]]
    assert len(columns) >= 5 and len(measured) == 4
    assert [cells(row) for row in rows] == measured


def test_the_example_of_the_readme_was_answered_so():
    (question, _), _, *answers = map(cells, between(README, "<!-- example -->", "<!-- /example -->").splitlines())
    report = (RESULTS / "report.md").read_text().splitlines()
    _, _, base, _, lora, _ = cells(next(line for line in report if line.startswith(f"| {question} |")))
    assert [answer for _, answer in answers] == [base.split(" ", 1)[1], lora.split(" ", 1)[1]]


def test_the_measured_table_is_what_its_json_holds():
    """report.md could be edited by hand as well: its figures are those of comparison.json."""
    comparison = json.loads((RESULTS / "comparison.json").read_text())
    report = (RESULTS / "report.md").read_text()
    for variant in ("base", "int4", "lora", "lora-int4"):
        f1 = comparison["variants"][variant]["token_f1"]
        row = next(line for line in report.splitlines() if line.startswith(f"| {variant} |"))
        assert f"{f1['mean']:.3f} [{f1['low']:.3f}, {f1['high']:.3f}]" in row


def test_the_table_of_quantisations_is_the_measured_one():
    table = between((REPOSITORY / "docs" / "quantisation.md").read_text(), "<!-- pareto -->", "<!-- /pareto -->")
    measured = REPOSITORY / "docs" / "results" / "pareto-200"
    assert table in (measured / "pareto.md").read_text()
    settings = json.loads((measured / "pareto.json").read_text())["settings"]
    assert len(settings) >= 5 and len(table.splitlines()) == len(settings) + 2
    for name, setting in settings.items():
        row = next(line for line in table.splitlines() if line.startswith("| " + name.replace("_", r"\_") + " |"))
        assert f"| {setting['kl_mean']:.4f} |" in row


def test_the_table_of_ways_is_the_measured_one():
    guide = (REPOSITORY / "docs" / "quantisation.md").read_text()
    comparison = json.loads((REPOSITORY / "docs" / "results" / "ways-500" / "comparison.json").read_text())
    paired = {d["variant"]: d["token_f1"] for d in comparison["differences"] if d["against"] == "lora"}
    rows = [
        line.strip("| ").split(" | ")
        for line in between(guide, "<!-- recipes -->", "<!-- /recipes -->").splitlines()[2:]
    ]
    assert {row[1].strip("`") for row in rows} == set(paired) - {"base"}
    for _, name, size, f1, against, kl, minutes in rows:
        variant, gap = comparison["variants"][name.strip("`")], paired[name.strip("`")]
        said = [f"{100 * gap[key]:+.1f}".replace("-", "−") for key in ("mean", "low", "high")]
        assert size == f"{variant['model_bytes'] / 1e6:.1f} ({variant['size_ratio']:.2f}×)"
        assert f1 == f"{variant['token_f1']['mean']:.3f}" and against == f"{said[0]} [{said[1]}, {said[2]}]"
        assert kl == f"{variant['divergence']['kl_mean']:.4f}" and minutes == f"{variant['made_seconds'] / 60:.1f}"


def test_speeds_in_the_guide_are_measured():
    guide = (REPOSITORY / "docs" / "quantisation.md").read_text()
    ratios = json.loads((REPOSITORY / "docs" / "results" / "decode-in-turns" / "speeds.json").read_text())["ratio"]
    for name in ("lora-int4", "lora-gguf-iq4_nl-q5_0", "lora-gguf-q5_0"):
        found = ratios[f"smollm2-135m-{name}"]
        assert f"{found['median']:.2f} times" in guide and f"{found['min']:.2f}–{found['max']:.2f}" in guide, name


def test_times_in_the_readme_are_measured():
    run = json.loads((RESULTS / "run.json").read_text())
    section = between(README, "## Results", "## Your model")
    for key in ("make_all_minutes", "install_minutes", "second_run_seconds"):
        assert str(run[key]) in section, key


def test_sizes_of_the_packages_are_measured():
    builds = json.loads((REPOSITORY / "docs" / "results" / "install.json").read_text())["builds"]
    needed = " ".join(between(README, "## What you need", "## Quick start").split())
    script = (REPOSITORY / "mk" / "install.py").read_text()
    for name, words in (("cpu", "take {disk} GB ({download} GB to download)"),
                        ("cuda", "or {disk} GB ({download} GB to download)")):  # fmt: skip
        sizes = builds[name]
        gigabytes = dict(download=f"{sizes['download_bytes'] / 1e9:.2f}", disk=f"{sizes['disk_bytes'] / 1e9:.1f}")
        assert words.format(**gigabytes) in needed
        assert '{{"download": {download}, "disk": {disk}}}'.format(**gigabytes) in script


def test_what_was_expected_of_memory_and_time_is_near_what_happened():
    results = REPOSITORY / "docs" / "results"
    memory = json.loads((results / "memory" / "memory.json").read_text())
    for step in memory["steps"]:
        assert abs(step["expected_bytes"] / step["peak_bytes"] - 1) <= 0.2, step
    assert {step["step"] for step in memory["steps"]} == {"sft", "evaluate", "merge_lora", "quantize"}
    # Four models in one process: the largest and the other engine's libraries, not the sum.
    assert memory["one_after_another"] <= 1.25 * max(memory["alone"].values()) <= sum(memory["alone"].values()) / 2
    forecast = json.loads((results / "forecast.json").read_text())
    assert abs(forecast["happened"]["total"]["ratio"] - 1) <= 0.25
    assert f"{forecast['said']['seconds'] / 60:.1f}" in between(README, "## Results", "## Your model")


def test_the_table_of_clara_is_the_measured_one():
    guide = (REPOSITORY / "docs" / "clara.md").read_text()
    results = REPOSITORY / "docs" / "results" / "clara"
    found, run = (json.loads((results / f"{name}.json").read_text()) for name in ("comparison", "run"))
    rows = [
        row.strip("| ").split(" | ") for row in between(guide, "<!-- clara -->", "<!-- /clara -->").splitlines()[2:]
    ]
    words = [evaluate_clara.describe_key(way, found["k"]) for way in found["ways"]]
    assert [row[0] for row in rows] == words and found["questions"] >= 300
    for (_, tokens, f1, share, *_), way in zip(rows, found["ways"].values()):
        assert f1 == "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**way["token_f1"])
        assert (tokens, share) == (f"{way['prompt_tokens']:.0f}", f"{way['of_full_text']['mean']:.2f}")
    said = " ".join(between(guide, "## What was reached", "## Using it").split())
    for target in found["targets"]:
        assert f"{target['mean']:.2f}" in said, target
    for way in ("gold-compressed/16x", "other-compressed/16x"):
        for kind in found["ways"][way]["by_kind"].values():
            assert f"{kind['mean']:.3f}" in said, kind
    for name in ("right", "shuffled"):
        assert f"{run['watched_nats']['stage1'][name]:.2f}" in said
    assert run["command"] in said


def test_the_steps_of_clara_are_the_measured_ones():
    table = between((REPOSITORY / "docs" / "clara.md").read_text(), "<!-- steps -->", "<!-- /steps -->")
    runs = json.loads((REPOSITORY / "docs" / "results" / "clara" / "steps.json").read_text())["runs"]
    assert table.splitlines()[2:] == [
        "| {batch} | {short_share:g} | {steps} | {right:.3f} | {shuffled:.3f} |".format(**run) for run in runs
    ]


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_in_documents_exist(page):
    text = page.read_text()
    goals = set(re.findall(r"^([a-z][a-z0-9-]*):", MAKEFILE, re.M))
    for goal in re.findall(r"(?:`|^)make ([a-z][a-z0-9-]*)", text, re.M):
        assert goal in goals, goal
    for script in re.findall(r"(?:`|scripts/)(\w+\.py)", text):
        assert (REPOSITORY / "scripts" / script).is_file(), script
    for variable in re.findall(r"\b([A-Z0-9_]{3,})=", text):
        assert re.search(rf"^{variable} \?=", MAKEFILE, re.M), variable


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_scripts_in_documents_are_called_with_the_python_that_has_the_packages(page):
    calls = re.findall(r"(\S*)python3? scripts/", page.read_text())
    assert {call.strip("(`") for call in calls} <= {".venv/bin/"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_in_documents_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_layout_in_the_readme_has_every_room():
    layout = between(README, "## Layout and documents", "| document |")
    rooms = {path.parent.name for path in (REPOSITORY / "scripts" / "lib").glob("*/__init__.py")}
    assert set(re.findall(r"^  lib/(\w+) ", layout, re.M)) == rooms


def test_every_script_is_in_the_readme():
    scripts = {path.name for path in (REPOSITORY / "scripts").glob("*.py")}
    assert scripts <= set(re.findall(r"\w+\.py", README))
    assert f"{len(scripts)} standalone scripts" in README


def test_messages_in_the_troubleshooting_guide_are_ours_and_each_is_provoked_by_a_test():
    guide = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", guide, re.M)
    files = [*(REPOSITORY / "scripts").rglob("*.py"), *(REPOSITORY / "mk").iterdir()]
    sources = "".join(path.read_text() for path in files if path.is_file())
    tests = "".join(p.read_text() for p in (REPOSITORY / "tests").rglob("test_*.py") if p.name != "test_documents.py")
    assert len(messages) > 20
    for message in messages:
        parts = [part.strip() for part in re.split(r"\d+", message)]  # numbers are a run's own
        assert all(part in re.sub(r'"\s*(?:\n\s*)?f?"', "", sources) for part in parts), message
        assert message in tests, message


def test_what_align_saves_is_said_as_it_was_measured():
    results = REPOSITORY / "docs" / "results"
    to = json.loads((results / "dpo-in-turns" / "bench.json").read_text())["dpo.py_to"]["DPOTrainer"]
    said = " ".join(ALIGNMENT.split())
    time, memory = (f"{100 * to[what]['median']:.0f} %" for what in ("seconds", "peak_bytes"))
    assert f"{time} of DPOTrainer's time and {memory} of its memory" in said
    ratio = json.loads((results / "magpie-in-turns" / "speeds.json").read_text())["ratio"]["smollm2-135m-base"][
        "median"
    ]
    assert f"{ratio:.1f}× faster" in said
    run = json.loads((results / "align-magpie" / "run.json").read_text())
    assert f"in {run['minutes']} minutes" in " ".join(README.split())


@pytest.mark.parametrize("name", ["align-magpie", "align-factbook"])
def test_the_table_of_align_is_the_measured_one(name):
    folder = REPOSITORY / "docs" / "results" / name
    run, found = (json.loads((folder / f"{what}.json").read_text()) for what in ("run", "comparison"))
    (_, minutes, preferred, *f1, against) = (
        next(line for line in ALIGNMENT.splitlines() if f"(results/{name}/report.md)" in line).strip("| ").split(" | ")
    )
    assert float(minutes) == run["minutes"]
    held_out = found["alignment"]["preferred"][0]["held_out"]["reward_accuracy"]
    assert preferred == "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**held_out)
    assert f1 == [f"{found['variants'][step]['token_f1']['mean']:.3f}" for step in ("base", "sft", "dpo")]
    gap = next(d["token_f1"] for d in found["differences"] if (d["variant"], d["against"]) == ("dpo", "sft"))
    points = [f"{100 * gap[key]:+.1f}".replace("-", "−") for key in ("mean", "low", "high")]
    assert against == f"{gap['verdict']}, {points[0]} points [{points[1]}, {points[2]}]"


def test_what_the_forecast_of_align_reckons_with_was_measured():
    measured = json.loads((REPOSITORY / "docs" / "results" / "align-magpie" / "run.json").read_text())["shares"]
    for what, shares in (
        ("instructions", workload.INSTRUCTIONS), ("responses", workload.RESPONSES), ("answers", workload.ANSWERS),
        ("rows that filtering left", workload.FIT), ("prompts that gave a pair", workload.PAIRS),
    ):  # fmt: skip
        found = measured[what] if isinstance(measured[what], dict) else {what: measured[what]}
        assert [round(share, 2) for share in found.values()] == (
            [shares] if isinstance(shares, float) else [*shares]
        ), what
