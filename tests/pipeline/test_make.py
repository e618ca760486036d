"""The real Makefile in a scratch copy: what it builds, and that it rebuilds exactly what depends on a change."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lib.core import artifact
from tests.conftest import REPOSITORY, WARM_PYTHON, warm, write_sets

TINY = [
    "ROOT=.smoke", "MODEL=tiny-random", "SOURCE=tests/data/capitals.jsonl", "SAMPLES=8", "EVAL_SAMPLES=4",
    "SFT_FLAGS=--accumulation-steps 2",  # several steps: warming up, the first one changes nothing
    "EVALUATE_FLAGS=--max-new-tokens 8 --speed-tokens 8", "QUANTIZE_FLAGS=--samples 4",
]  # fmt: skip
MODELS = ("base", "int4", "lora", "lora-merged", "lora-int4")
TRAINED = ["sft", "merge_lora", "quantize lora-int4", "evaluate lora", "evaluate lora-int4", "report"]
MEASURED = ["evaluate base", "evaluate int4", "evaluate lora", "evaluate lora-int4", "report"]
ROUNDED = ["quantize int4", "quantize lora-int4", "evaluate int4", "evaluate lora-int4", "report"]
AFTER_DATA = ["sft", "merge_lora", "quantize int4", "quantize lora-int4", *MEASURED]


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | {"HF_HUB_OFFLINE": "1"}
    environment |= warm()
    command = ["make", *words, f"PYTHON={WARM_PYTHON}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=400)


def stages(said: str) -> list[str]:
    """The stages that `make -n` would run: the script, and the variant where it has several."""
    found = []
    for line in re.sub(r"\\\n\s*", "", said).splitlines():
        if script := re.search(r"scripts/(\w+)\.py", line):
            output = re.search(r"--output \S*tiny-random-(\S+)", line)
            several = script[1] in ("quantize", "evaluate")
            found.append(f"{script[1]} {output[1]}" if several else script[1])
    return found


def copy_of_the_project(folder: Path) -> Path:
    command = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.run(command, capture_output=True, text=True).stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A scratch copy in which `make smoke` has run."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("copy"))
    done = make(folder, "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "token F1" in done.stdout
    assert "warning: undefined variable" not in done.stderr
    return folder


def would_run(folder: Path, *words: str) -> list[str]:
    done = make(folder, "-n", "all", *TINY, *words)
    assert done.returncode == 0, done.stderr
    return stages(done.stdout)


def test_smoke_makes_every_artifact_whole(copy):
    for variant in MODELS:
        assert artifact.read(copy / ".smoke" / "models" / f"tiny-random-{variant}")["metrics"]
    assert artifact.read(copy / ".smoke" / "data" / "capitals" / "raw", "data")["metrics"]["train"] > 8
    report = copy / ".smoke" / "reports" / "tiny-random"
    assert artifact.read(report)["metrics"]
    assert (report / "index.html").stat().st_size > 5000 and "lora-int4" in (report / "report.md").read_text()


def test_a_second_run_does_nothing_and_says_so_in_half_a_second(copy):
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = make(copy, "all", *TINY)
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0 and "Nothing to be done for 'all'" in done.stdout
        assert stages(done.stdout) == []
    assert min(seconds) < 0.5


@pytest.mark.slow
def test_another_machine_goes_on_from_what_was_kept(copy, tmp_path_factory):
    drive = tmp_path_factory.mktemp("my drive")
    assert make(copy, "all", *TINY, f"MIRROR_TO={drive}").returncode == 0
    assert artifact.read(drive / "models" / "tiny-random-lora")["digest"]
    shutil.rmtree(drive / "reports" / "eval-tiny-random-lora-int4")  # the machine went away before this one
    other = copy_of_the_project(tmp_path_factory.mktemp("another machine"))
    done = make(other, "all", *TINY, f"MIRROR_FROM={drive}")
    assert done.returncode == 0, done.stderr[-3000:]
    taken = re.findall(r"^\S+: copied from", done.stderr, re.M)
    assert len(taken) == 9 and "token F1" in done.stdout  # base, data, four models, three evaluations
    assert "evaluate: " in done.stderr and "sft: " not in done.stderr
    assert would_run(other) == []
    changed = make(other, "data", *TINY, "SEED=7", f"MIRROR_FROM={drive}")
    assert changed.returncode == 0 and "not used, because another command built it" in changed.stderr


def test_a_variant_is_exported_with_the_figures_of_the_report(copy):
    done = make(copy, "export-zip", *TINY, "VARIANT=lora", "EXPORT_FLAGS=--i-have-checked-the-licence")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(copy / ".smoke" / "exports" / "tiny-random-lora.zip") as archive:
        assert "held-out questions" in archive.read("tiny-random-lora/README.md").decode()
    assert would_run(copy) == []
    done = make(copy, "-n", "export-zip", *TINY, "VARIANT=magpie-dpo")  # of `make align`: no need of the four variants
    assert "--report .smoke/reports/tiny-random-magpie" in done.stdout and "scripts/quantize.py" not in done.stdout
    done = make(copy, "export-folder", *TINY)
    assert done.returncode == 2 and "TO is missing" in done.stderr


def test_doctor_finds_nothing_wrong_after_a_run(copy):
    done = make(copy, "doctor", *TINY, "AFTER=all")
    assert done.returncode == 0 and "0 bad, 0 warning" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "touched, expected",
    [
        ("scripts/report.py", ["report"]),
        ("scripts/sft.py", TRAINED),
        ("configs/sft.yaml", TRAINED),
        ("scripts/merge_lora.py", [s for s in TRAINED if s not in ("sft", "evaluate lora")]),
        ("configs/quantize.yaml", ROUNDED),
        ("scripts/lib/train/loop.py", TRAINED),
        ("scripts/lib/data/metrics.py", MEASURED),
        ("scripts/lib/quant/distillation.py", ROUNDED),
        ("scripts/lib/engines/magpie.py", []),  # rows of a file need no engine
        ("scripts/lib/budget/memory.py", []),  # what is expected of memory changes nothing that is made
        ("configs/profiles/h100.yaml", []),  # of a GPU that is not here
        ("configs/models/tiny-random.yaml", ["fetch_base", *AFTER_DATA]),
        ("tests/data/capitals.jsonl", []),  # its content is what it was
        ("scripts/lib/core/artifact.py", ["fetch_base", "generate_data", *AFTER_DATA]),
        (".smoke/models/tiny-random-lora/metadata.json", [s for s in TRAINED if s != "sft"]),
        ("README.md", []),
    ],
)  # fmt: skip
def test_touching_a_file_rebuilds_exactly_its_descendants(copy, touched, expected):
    path = copy / touched
    before = path.stat()
    try:
        os.utime(path)
        assert sorted(would_run(copy)) == sorted(expected)
    finally:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert would_run(copy) == []


@pytest.mark.parametrize(
    "value, expected",
    [
        ("SAMPLES=9", TRAINED),
        ("EPOCHS=2", TRAINED),
        ("EVAL_SAMPLES=5", MEASURED),
        ("QUANT=gguf-q8_0", ROUNDED),
        ("SEED=43", ["generate_data", *AFTER_DATA]),
    ],
)
def test_changing_a_value_rebuilds_exactly_its_descendants(copy, value, expected):
    assert sorted(would_run(copy, value)) == sorted(expected)
    assert would_run(copy) == []  # asking changed nothing


def test_beside_a_gpu_only_the_profile_that_it_gets_makes_anything_stale(copy):
    chosen = copy / ".make" / "profile.yaml"
    assert make(copy, str(chosen.relative_to(copy)), "--eval=override gpu := driver").returncode == 0
    assert chosen.read_text() == (copy / "configs" / "profiles" / "cpu.yaml").read_text()  # torch sees no GPU here
    long_ago = chosen.stat().st_mtime - 1e6
    for file in (chosen, chosen.with_name("profile.checked")):
        os.utime(file, (long_ago, long_ago))
    before = chosen.stat().st_mtime_ns
    said = make(copy, "-n", "lora", *TINY, "--eval=override gpu := driver").stdout
    assert "recognise_profile" in said  # the choice is checked again
    assert make(copy, str(chosen.relative_to(copy)), "--eval=override gpu := driver").returncode == 0
    assert chosen.stat().st_mtime_ns == before


def write_rows(file: Path, word: str, count: int = 30) -> Path:
    rows = [{"prompt": f"Which is number {n} of the {word}?", "completion": f"{word} {n}"} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_source_is_known_by_its_content_not_by_its_time(tmp_path):
    folder = copy_of_the_project(tmp_path)
    source, old, other = (folder / name for name in ("my rows, $1 & #2.jsonl", "old.jsonl", "other.jsonl"))
    words = ["data", f"SOURCE={source.name}", "DATA_NAME=mine", "ROOT=built"]
    made = folder / "built" / "data" / "mine" / "raw"

    def run() -> str:
        done = make(folder, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr + artifact.read(made)["inputs"]["file"]["digest"]

    write_rows(source, "stones")
    first = run()
    assert "done in" in first and "Nothing to be done" in make(folder, *words).stdout
    os.utime(source)
    shutil.copy(source, other)
    other.replace(source)
    assert "Nothing to be done" in make(folder, *words).stdout  # other times, another inode, the same content

    os.utime(write_rows(old, "rivers"), (1e9, 1e9))
    old.replace(source)  # as cp -p, rsync, unzip and mv leave it
    before = {path: path.read_bytes() for path in (folder / "built").rglob("*") if path.is_file()}
    assert stages(make(folder, "-n", *words).stdout) == ["generate_data"]
    assert before == {path: path.read_bytes() for path in (folder / "built").rglob("*") if path.is_file()}
    verified = make(folder, "verify", "ROOT=built").stdout
    assert "stale   built/data/mine/raw" in verified and source.name in verified
    assert "stale: " in make(folder, "doctor", *words[1:]).stdout
    second = run()
    assert "done in" in second and second[-64:] != first[-64:]

    write_rows(folder / "stones.jsonl", "stones")
    source.unlink()
    source.symlink_to("stones.jsonl")
    (folder / "stones.jsonl").rename(folder / "stones of old.jsonl")
    (folder / "stones.jsonl").symlink_to("stones of old.jsonl")
    third = run()
    assert "reused the version" in third and third[-64:] == first[-64:]
    (folder / "stones.jsonl").unlink()
    (folder / "stones.jsonl").symlink_to(write_rows(folder / "lakes.jsonl", "lakes").name)
    assert "done in" in run() and "Nothing to be done" in make(folder, *words).stdout
    source.unlink()
    assert "Nothing to be done" in make(folder, *words).stdout  # nothing to make it from
    assert "intact" in make(folder, "verify", "ROOT=built").stdout


@pytest.mark.slow
def test_a_model_directory_and_files_in_flags_are_known_by_their_content(tmp_path, base):
    folder = copy_of_the_project(tmp_path)
    model = shutil.copytree(base, folder / "my model", ignore=shutil.ignore_patterns("metadata.json"))
    write_rows(folder / "rows.jsonl", "stones")
    write_rows(folder / "held out.jsonl", "rivers")
    flags = "FILTER_FLAGS=--no-bundled --language any --evaluation='held out.jsonl'"
    words = ["MODEL=my model", "MODEL_NAME=mine", "ALIGN_DATA=rows.jsonl", flags]
    goals = ["./models/mine-base/metadata.json", "./data/mine-rows/filtered/metadata.json"]

    def run() -> list[str]:
        done = make(folder, *goals, *words, "ROOT=.", "-j2")
        assert done.returncode == 0, done.stderr[-3000:]
        return re.findall(r"(\w+) -> \S+: done in", done.stderr)

    assert sorted(run()) == ["fetch_base", "filter_data", "generate_data"]
    assert run() == []
    write_rows(folder / "new.jsonl", "lakes")
    os.utime(folder / "new.jsonl", (1e9, 1e9))
    (folder / "new.jsonl").replace(folder / "held out.jsonl")
    assert run() == ["filter_data"]
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, model / "new", {"format": "pt"})
    os.utime(model / "new", (1e9, 1e9))
    (model / "new").replace(model / "model.safetensors")
    assert run() == ["fetch_base"] and run() == []


def test_other_goals_leave_the_values_of_the_last_run_alone(copy):
    assert make(copy, "help", "SAMPLES=77", "ROOT=.smoke").returncode == 0
    assert would_run(copy) == []


@pytest.mark.parametrize(
    "gone, expected",
    [
        (".smoke/models/tiny-random-lora-merged", [s for s in TRAINED if s not in ("sft", "evaluate lora")]),
        (".smoke/reports/tiny-random", ["report"]),
    ],
)
def test_a_deleted_artifact_is_noticed(copy, gone, expected):
    aside = copy / "aside"
    (copy / gone).rename(aside)
    try:
        assert sorted(would_run(copy)) == sorted(expected)
    finally:
        aside.rename(copy / gone)


@pytest.mark.slow  # everything once more
def test_two_jobs_give_the_same_artifacts(copy):
    done = make(copy, "-j2", "all", *TINY, "ROOT=.smoke2")
    assert done.returncode == 0, done.stderr[-3000:]
    for place in [*(f"models/tiny-random-{variant}" for variant in MODELS), "data/capitals/raw"]:
        one, two = (artifact.read(copy / root / place)["files"] for root in (".smoke", ".smoke2"))
        one.pop("adapter_config.json", None), two.pop("adapter_config.json", None)  # it names its base's full path
        assert one == two, place


def test_a_wrong_value_stops_make_and_leaves_what_was_there(copy):
    report = artifact.read(copy / ".smoke" / "reports" / "tiny-random")["digest"]
    for value, words in (("SAMPLES=abc", "'abc' is not a whole number"), ("SAMPLES=0", "expected at least 1"),
                         ("QUANT=int3", "unknown method 'int3'"),
                         ("MODEL_NAME=a b", "must each be one word")):  # fmt: skip
        done = make(copy, "all", *TINY, value)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert artifact.read(copy / ".smoke" / "reports" / "tiny-random")["digest"] == report


def test_help_is_the_default_and_lists_every_goal(copy):
    said = make(copy).stdout
    assert said == make(copy, "help").stdout
    rules = "".join(file.read_text() for file in [copy / "Makefile", *copy.glob("mk/*.mk")])
    phony = " ".join(re.findall(r"^\.PHONY: (.*)$", rules, re.M)).split()
    assert {"all", "align", "clara", "quantize", "verify", "smoke"} <= {*phony}
    for goal in {*phony, "export-zip"} - {"FORCE", "$(exports)"}:
        assert re.search(rf"^  {goal} +\S", said, re.M), goal


def test_clean_keeps_models_and_data(copy, tmp_path):
    scratch = copy_of_the_project(tmp_path)
    for name in ("runs/x", "reports/x", "models/x", "data/x", ".smoke"):
        (scratch / name).mkdir(parents=True)
    assert make(scratch, "clean").returncode == 0
    assert (scratch / "models" / "x").is_dir() and (scratch / "data" / "x").is_dir()
    assert not (scratch / "runs").exists() and not (scratch / "reports").exists()


def test_distclean_deletes_what_was_built_and_nothing_of_the_users(tmp_path):
    scratch = copy_of_the_project(tmp_path)
    built = ["models/x-base", "models/x.tmp-7", "data/rows/raw", "data/both/raw", "data/assets/wheel-1", "exports/x"]
    for root in (".", "elsewhere"):
        for name in (*built, "models/.kept/x", "models/mine", "data/both"):
            (scratch / root / name).mkdir(parents=True, exist_ok=True)
        for name in ("models/x-base", "data/rows/raw", "data/both/raw"):
            (scratch / root / name / "metadata.json").write_text('{"digest": "0"}')
        for name in ("data/mine.jsonl", "data/both/mine.jsonl", "models/mine/config.json"):
            (scratch / root / name).write_text("{}")
    (scratch / "linked").mkdir()
    (scratch / "linked" / "metadata.json").write_text('{"digest": "0"}')
    (scratch / "models" / "linked").symlink_to("../linked")
    done = make(scratch, "distclean", "ROOT=elsewhere")
    assert done.returncode == 0 and "did not make it: elsewhere/models/mine, elsewhere/data/both/mine.js" in done.stdout
    assert all((scratch / name).exists() and not (scratch / "elsewhere" / name).exists() for name in built)
    done = make(scratch, "distclean")
    assert done.returncode == 0 and "models/mine, data/both/mine.jsonl, data/mine.jsonl" in done.stdout
    assert sorted(p.name for p in (scratch / "models").iterdir()) == ["README.md", "mine"]
    assert sorted(p.name for p in (scratch / "data").iterdir()) == ["README.md", "both", "mine.jsonl"]
    assert (scratch / "linked" / "metadata.json").is_file() and (scratch / "scripts" / "sft.py").is_file()


def test_make_never_deletes_the_metadata_of_an_artifact(tmp_path):
    """It would after an interrupt, or where something fails after the artifact is complete."""
    folder = copy_of_the_project(tmp_path)
    dies = folder / "dies"
    dies.write_text(f'#!/bin/bash\n{WARM_PYTHON} "$@"; exit 137\n')
    dies.chmod(0o755)
    words = ["data", "SOURCE=tests/data/capitals.jsonl", f"PYTHON={dies}"]
    command = ["make", *words]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | warm(), timeout=100)
    assert process.returncode == 2 and "Error 137" in process.stderr
    assert artifact.read(folder / "data" / "capitals" / "raw", "data")
    for goal in ("all", "align", "clara", "recipes", "pareto", "bench-memory", "estimate", "quantize METHOD=nf4"):
        rules = make(folder, "-pn", *goal.split(), "ALIGN_DATA=tests/data/capitals.jsonl").stdout
        precious = {*re.search(r"^\.PRECIOUS: (.*)$", rules, re.M)[1].split()}
        assert {*re.findall(r"^(?!reports/x)(\S+/metadata\.json):", rules, re.M)} <= precious, goal


def test_data_whose_report_would_replace_another_are_refused(tmp_path):
    done = make(copy_of_the_project(tmp_path), "-n", "align", "ALIGN_DATA=recipes.jsonl")
    assert done.returncode == 2 and "reports/smollm2-135m-recipes is the report of another pipeline" in done.stderr


@pytest.mark.slow
def test_estimate_takes_the_stages_from_make_and_the_report_gets_the_estimate(copy):
    assert make(copy, "all", *TINY).returncode == 0  # whatever the tests before have touched
    said = make(copy, "-n", "estimate", *CLARA, "PIPELINE=clara", "SAMPLES=7").stdout
    assert stages(said)[-2:] == ["generate_data", "estimate"]  # clara's rows are made before
    assert make(copy, "estimate", *TINY, "PIPELINE=everything").returncode == 2
    done = make(copy, "estimate", *TINY, "SFT_FLAGS=--lora-r 4 --lora-targets 'q_proj'", "EVAL_SAMPLES=4")
    assert done.returncode == 0, done.stderr[-3000:]
    found = artifact.read(copy / ".smoke" / "reports" / "tiny-random-estimate", "estimate")["metrics"]
    known = {Path(stage["artifact"]).name: stage for stage in found["stages"]}
    assert known["tiny-random-int4"]["status"] == "finished"
    lora = known["tiny-random-lora"]
    assert lora["status"] == "estimated" and lora["arguments"]["lora_targets"] == "q_proj"  # it is of another rank
    assert lora["arguments"]["samples"] == 8 and lora["arguments"]["lora_r"] == 4
    assert known["eval-tiny-random-lora"]["status"] == "estimated"
    assert known["eval-tiny-random-base"]["status"] == "finished"
    assert would_run(copy) == []
    shutil.rmtree(copy / ".smoke" / "reports" / "tiny-random")
    said = make(copy, "-n", "all", *TINY).stdout
    assert re.search(r"scripts/report\.py .* --estimate \S*/tiny-random-estimate ", said)


# --- values of the last run ---------------------------------------------------------------------------------

NAMED = ["ROOT=.smoke", "MODEL=tiny-random"]


def test_every_stage_has_values_and_every_macro_its_arguments(tmp_path):
    folder = copy_of_the_project(tmp_path)
    assert make(folder, "help").returncode == 0  # writes the list of imports, which are variables too
    for goal in ("all", "align", "clara", "recipes", "pareto", "bench-memory", "export-zip"):
        done = make(folder, "-n", "--warn-undefined-variables", goal)
        assert done.returncode == 0 and "undefined variable" not in done.stderr, (goal, done.stderr)


def printed(folder: Path, *words: str) -> list[str]:
    done = make(folder, "-n", *words)
    assert done.returncode == 0, done.stderr
    return stages(done.stdout)


def test_what_is_not_given_is_as_the_name_was_last_made(copy):
    assert make(copy, "all", *TINY).returncode == 0
    assert printed(copy, "all", *NAMED) == []
    assert printed(copy, "evaluate", *NAMED, "EVAL_SAMPLES=3") == MEASURED[:-1]
    assert sorted(printed(copy, "all", *NAMED, "SAMPLES=9")) == sorted(TRAINED)
    assert "generate_data" in printed(copy, "all", *NAMED, "SOURCE=elsewhere/other.jsonl")
    assert "sft" in printed(copy, "all", *NAMED, "DATA_NAME=other")


@pytest.mark.parametrize(
    "goal", ["export-zip", "export-gguf", "report", "evaluate", "quantize METHOD=gguf-q5_0", "clara"]
)
def test_a_goal_that_uses_a_model_does_not_train_it(copy, goal):
    found = printed(copy, *goal.split(), *NAMED, "SAMPLES=9", "EPOCHS=3", "QUANT=gguf-q4_0", "SFT_FLAGS=--lora-r 2")
    assert not {"sft", "merge_lora", "quantize int4", "quantize lora-int4"} & {*found}, found
    # a goal that finds none makes it
    assert "sft" in printed(copy, *goal.split(), *NAMED, "MODEL_NAME=tiny-random-new")


def remember(folder: Path, stage: str, **values) -> None:
    file = folder / ".make" / "made" / stage
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name} ?= {value}\n" for name, value in values.items()))


def test_other_pipelines_continue_with_values_of_their_own_and_then_with_those_of_all(tmp_path):
    folder = copy_of_the_project(tmp_path)
    remember(folder, "sft/smollm2-135m-lora", DATA_NAME="factbook", SAMPLES=500, SEED=7)
    remember(folder, "generate_clara_data/factbook", SEED=7, CLARA_DATA_FLAGS="--candidates 4")

    def commands(*words: str) -> str:
        return re.sub(r"\\\n\s*", "", make(folder, "-n", *words).stdout)

    assert "generate_data.py --source 'factbook' --seed 7" in commands("clara")
    assert "--candidates 4" in commands("clara") and "--samples 500" in commands("clara")
    remember(folder, "train_stage1/smollm2-135m-clara-stage1", DATA_NAME="factbook", SAMPLES=50, SEED=7)
    assert re.search(r"train_stage1\.py .*--samples 50 ", commands("clara"))
    assert re.search(r"sft\.py .*--samples 500 ", commands("all", "clara"))


def test_what_is_there_is_exported_and_not_trained_again(tmp_path):
    folder = copy_of_the_project(tmp_path)
    places = ["data/factbook/raw", "data/rows/raw", *(f"models/smollm2-135m-{name}" for name in (*MODELS, "int4-lora"))]
    for place in (*places, "models/smollm2-135m-rows-sft", "models/smollm2-135m-rows-dpo"):
        (folder / place).mkdir(parents=True)
        (folder / place / "metadata.json").write_text("{}")

    def runs(*words: str) -> set[str]:
        return {*re.findall(r"scripts/(\w+)\.py", make(folder, "-n", *words).stdout)}

    exported = runs("export-zip", "VARIANT=int4-lora", "EPOCHS=3")
    assert "export" in exported and "sft" not in exported
    aligned = runs("export-zip", "VARIANT=rows-dpo", "ALIGN_DATA=rows.jsonl", "SEED=1")
    assert "export" in aligned and not {"generate_data", "sft", "dpo"} & aligned
    assert "sft" in runs("recipes", "EPOCHS=3")  # this goal makes it
    setting = folder / "models" / "smollm2-135m-lora-gguf-q5_0"
    setting.mkdir()
    (setting / "metadata.json").write_text("{}")
    remember(folder, "setting/smollm2-135m-lora-gguf-q5_0", QUANTIZE_FLAGS="--samples 9")
    assert "quantize" not in runs("export-zip", "VARIANT=lora-gguf-q5_0", "QUANTIZE_FLAGS=--samples 3")
    assert "--samples 9" in make(folder, "-n", "quantize", "METHOD=gguf-q5_0").stdout


def test_a_deleted_merge_is_built_again_for_an_adapter_that_changed(tmp_path):
    folder = copy_of_the_project(tmp_path)
    for name in ("base", "lora", "int4", "lora-int4"):
        (folder / "models" / f"smollm2-135m-{name}").mkdir(parents=True)
        (folder / "models" / f"smollm2-135m-{name}" / "metadata.json").write_text("{}")

    def runs() -> set[str]:
        return {*re.findall(r"scripts/(\w+)\.py", make(folder, "-n", "export-zip").stdout)}

    assert not {"merge_lora", "quantize", "sft"} & runs()
    os.utime(folder / "models" / "smollm2-135m-lora" / "metadata.json", (2e9, 2e9))
    assert {"merge_lora", "quantize"} <= runs() and "sft" not in runs()


@pytest.mark.parametrize("goal", ["export-gguf VARIANT=lora", "export-zip", "quantize METHOD=gguf-q5_0"])
def test_a_goal_that_uses_a_model_derives_it_again_from_an_adapter_that_changed(copy, goal):
    assert make(copy, "all", *TINY).returncode == 0
    adapter = copy / ".smoke" / "models" / "tiny-random-lora" / "metadata.json"
    before = adapter.stat()
    os.utime(adapter)
    try:
        runs = printed(copy, *goal.split(), *NAMED, "EPOCHS=3")
    finally:
        os.utime(adapter, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "merge_lora" in runs and "sft" not in runs
    assert printed(copy, "lora", *NAMED) == []


@pytest.mark.slow
def test_earlier_values_take_back_what_they_made(copy):
    def run(*values: str) -> str:
        done = make(copy, "lora", *NAMED, "SOURCE=tests/data/capitals.jsonl", *values)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr + artifact.read(copy / ".smoke" / "models" / "tiny-random-lora")["digest"]

    assert make(copy, "all", *TINY).returncode == 0
    first, second, third = run("SAMPLES=8"), run("SAMPLES=6"), run("SAMPLES=8")
    assert len(first) == 64 and "done in" in second and "done in" not in third
    assert "[1/1] sft" in third and "reused the version that was built with the same values" in third
    assert third[-64:] == first != second[-64:]
    assert "values remembered from the last run: " in third and "EPOCHS=1" in third
    assert run() == first  # SAMPLES=8 is the last
    defaults = copy / "configs" / "sft.yaml"
    plain = defaults.read_text()
    try:  # what other defaults made is not what these would make
        defaults.write_text(plain + "\n# another comment\n")
        assert "done in" in run("SAMPLES=6")
    finally:
        defaults.write_text(plain)
    done = make(copy, "all", *TINY)  # everything is as it was, so that only the report is written again
    assert done.returncode == 0 and "sft -> " in done.stderr, done.stderr
    assert re.findall(r"(\w+) -> \S+: done in", done.stderr) == ["report"]


@pytest.mark.slow
def test_the_values_of_a_run_that_failed_are_not_remembered(copy):
    assert make(copy, "all", *TINY).returncode == 0
    assert make(copy, "all", *NAMED, "SAMPLES=many").returncode == 2
    done = make(copy, "all", *NAMED)  # Make sees that values changed, and changed back
    assert done.returncode == 0 and "sft -> " in done.stderr, done.stderr
    assert re.findall(r"(\w+) -> \S+: done in", done.stderr) == ["report"]
    assert "up to date" in done.stderr and printed(copy, "all", *NAMED) == []
    assert "done in" in make(copy, "-B", "data", *NAMED).stderr


# --- pareto and quantize ------------------------------------------------------------------------------------


def roundings(folder: Path, *words: str) -> dict[str, str]:
    """{artifact: the flags of its rounding} that `make -n` would quantise the merged model with."""
    done = make(folder, "-n", *words)
    assert done.returncode == 0, done.stderr
    lines = re.sub(r"\\\n\s*", "", done.stdout).splitlines()
    merged = [line for line in lines if re.search(r"quantize.py --model \S+-lora-merged --base \S+-base --data", line)]
    split = [re.search(r"(--method .*)--output \S*/(\S+)$", line) for line in merged]
    return {match[2]: re.sub(r" --seed \d+| --profile auto", "", " ".join(match[1].split())) for match in split}


def test_pareto_makes_each_setting_with_its_flags(tmp_path):
    folder = copy_of_the_project(tmp_path)
    settings = "gguf-q4_0 gguf-q4_0-nearest gguf-iq4_nl-q8_0 nf4 nf4"
    accept = "--accept-divergence"
    for root in (".", ".smoke"):  # make takes the ./ from a target's name
        assert roundings(folder, "pareto", "MODEL_NAME=toy", f"ROOT={root}", f"PARETO={settings}") == {
            "toy-pareto-gguf-q4_0": f"--method gguf-q4_0 {accept}",
            "toy-pareto-gguf-q4_0-nearest": f"--method gguf-q4_0-nearest {accept}",
            "toy-pareto-gguf-iq4_nl-q8_0": f"--method gguf-iq4_nl-q8_0 {accept}",
            "toy-pareto-nf4": f"--method nf4 {accept}",
        }
    assert len(roundings(folder, "pareto")) >= 6


def test_quantize_makes_one_and_without_a_method_says_which_there_are(tmp_path):
    folder = copy_of_the_project(tmp_path)
    assert roundings(folder, "quantize", "MODEL_NAME=toy", "METHOD=gguf-q5_0") == {
        "toy-lora-gguf-q5_0": "--method gguf-q5_0"  # a bad one is refused, as any other
    }
    done = make(folder, "quantize")
    assert (
        done.returncode == 2
        and "no method was given" in done.stderr
        and "gguf-q5_0" in done.stderr
        and "nf4" in done.stderr
    )
    assert not (folder / "runs").exists() and [p.name for p in (folder / ".make").iterdir()] == ["imports.mk"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["quantize", "METHOD=gguf-q9"], "unknown method 'gguf-q9'; expected one of auto, nf4"),
        (["recipes", "RECIPES=gguf-q4_0-neares"], "unknown method 'gguf-q4_0-neares'"),
        (["pareto", "PARETO=nf4-nearest"], "unknown method 'nf4-nearest'"),
        (["export-zip", "VARIANT=lora-int8"], "VARIANT=lora-int8: expected one of base int4 lora lora-int4"),
        (["all", "MODEL_NAME=org/name"], "must not contain /"),
        (["all", "MODEL_NAME=qwen2.5:0.5b"], "must not contain :"),
        (["all", "MODEL_NAME=a(b"], "must not contain ("),
        (["all", "MODEL="], "MODEL= and SOURCE=factbook must not be empty"),
        (["estimate", "PIPELINE=everything"], "PIPELINE=everything: expected all, align or clara"),
    ],
)
def test_a_mistyped_value_gets_the_choices_before_anything_is_made(tmp_path, words, said):
    folder = copy_of_the_project(tmp_path)
    done = make(folder, *words)
    assert done.returncode == 2 and said in done.stderr and "No rule to make" not in done.stderr, done.stderr
    assert sorted(p.name for p in (folder / "models").iterdir()) == ["README.md"]


@pytest.mark.slow
def test_a_stage_says_what_it_makes_and_how_long_it_took(copy):
    report = copy / ".smoke" / "reports" / "tiny-random"
    assert make(copy, "all", *TINY).returncode == 0  # whatever the tests before have left
    shutil.rmtree(report)
    plain = make(copy, "all", *TINY)
    assert re.search(r"^\[1/1\] report -> \.smoke/reports/tiny-random( \(estimate: .*\))?$", plain.stderr, re.M), (
        plain.stderr
    )
    assert re.search(r"^\[1/1\] report -> \S+: done in \d+ s; \d+ s in total$", plain.stderr, re.M), plain.stderr
    assert "scripts/report.py --evaluations" not in plain.stdout + plain.stderr
    shutil.rmtree(report)
    assert "scripts/report.py --evaluations" in make(copy, "all", *TINY, "V=1").stderr
    failed = make(copy, "report", *TINY, "EVAL_SAMPLES=0")
    assert re.search(r"^\[1/\d\] evaluate -> \S+: failed with exit code 2 after \d+ s", failed.stderr, re.M), (
        failed.stderr
    )
    assert would_run(copy) != []
    assert make(copy, "all", *TINY).returncode == 0  # as it was, for the tests that follow


def test_ways_are_made_with_their_flags_and_put_into_one_report(tmp_path):
    folder = copy_of_the_project(tmp_path)
    assert roundings(folder, "recipes", "MODEL_NAME=toy", "SAMPLES=7", "RECIPES=gguf-q4_0-nearest-q8_0") == {
        "toy-lora-int4": "--method auto",
        "toy-lora-gguf-iq4_nl-distilled": "--method gguf-iq4_nl-distilled --distil-samples 7",
        "toy-lora-gguf-q4_0-nearest-q8_0": "--method gguf-q4_0-nearest-q8_0",
    }
    said = re.sub(r"\\\n\s*", "", make(folder, "-n", "recipes", "MODEL_NAME=toy", "RECIPES=").stdout)
    assert re.search(r"scripts/sft.py --model \S+/toy-int4 .*--output \S+/toy-int4-lora", said)
    assert re.search(
        r"measure_divergence.py --reference \S+/toy-lora --model \S+/toy-int4-lora --base \S+/toy-base", said
    )
    names = ["base", "int4", "lora", "lora-int4", "lora-gguf-iq4_nl-distilled", "int4-lora"]
    given = re.search(
        r"report.py --evaluations (.*) --divergences (\S+) --model-name toy --output \S+/toy-recipes", said
    )
    assert [path.rpartition("eval-toy-")[2] for path in given[1].split()] == names
    assert given[2].endswith("/divergence-toy-int4-lora")


@pytest.mark.slow
def test_pareto_on_the_tiny_model(copy):
    one, before = "gguf-q4_0-nearest", would_run(copy)
    done = make(copy, "pareto", *TINY, f"PARETO={one}")
    assert done.returncode == 0, done.stderr[-3000:]
    meta = artifact.read(copy / ".smoke" / "reports" / "tiny-random-pareto", "pareto")
    assert set(meta["metrics"]["settings"]) == {one}
    assert "Nothing to be done" in make(copy, "pareto", *TINY, f"PARETO={one}").stdout
    more = stages(make(copy, "-n", "pareto", *TINY, f"PARETO={one} nf4").stdout)  # the one is kept
    assert more == ["quantize pareto-nf4", "pareto"]
    assert set(would_run(copy)) <= set(before)  # it leaves the values of the other goals alone


# --- align --------------------------------------------------------------------------------------------------------

ALIGN = [
    "ROOT=.smoke", "MODEL_NAME=talker", "SOURCE=tests/data/capitals.jsonl", "SAMPLES=12", "EVAL_SAMPLES=4", "PAIRS=6",
    "HELD_OUT_PAIRS=3", "EVALUATE_FLAGS=--max-new-tokens 8 --speed-tokens 8", "FILTER_FLAGS=--skip duplicate language",
    "PREFERENCES_FLAGS=--max-new-tokens 24 --min-margin 0.05 --responses 4",
    "SFT_FLAGS=--checkpoint-steps 1 --accumulation-steps 4", "DPO_FLAGS=--accumulation-steps 2",
    "GENERAL_FLAGS=--samples 2 --prompts 1 --max-new-tokens 4",
]  # fmt: skip
CHAIN = ["filter_data", "sft", "generate_preferences", "dpo", *["evaluate"] * 3, *["evaluate_general"] * 3, "report"]


def aligned(folder: Path, *words: str) -> list[str]:
    done = make(folder, "-n", "align", *ALIGN, *words)
    assert done.returncode == 0, done.stderr
    return re.findall(r"scripts/(\w+)\.py", done.stdout)


@pytest.fixture(scope="module")
def chain(talker, tmp_path_factory):
    """A scratch copy in which `make align` has run on a model that chatters, and the words that it got."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("align"))
    write_sets(folder / "data" / "assets")
    rows = [{"question": f"Which letter is number {n}?", "gold": list("bcdefghijklmnop")} for n in range(60)]
    (folder / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"MODEL={talker}", "ALIGN_DATA=letters.jsonl"]
    done = make(folder, "align", *ALIGN, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, words


def test_align_makes_every_step_whole_and_reports_base_sft_and_dpo(chain):
    folder, words = chain
    report = json.loads((folder / ".smoke" / "reports" / "talker-letters" / "comparison.json").read_text())
    assert list(report["variants"]) == ["base", "sft", "dpo"]
    assert {(d["variant"], d["against"]) for d in report["differences"]} == {
        ("sft", "base"), ("dpo", "base"), ("dpo", "sft")
    }  # fmt: skip
    found = report["alignment"]
    assert found["filtered"][0]["rows"] == 60 and found["filtered"][0]["rejected"] == 0
    (preferred,) = found["preferred"]
    assert preferred["pairs"] == 6 and 1 <= preferred["held_out"]["pairs"] <= 3 and preferred["audit"]["train"] == 6
    assert list(found["forgetting"]) == ["base", "sft", "dpo"] == list(found["conversations"][0]["answers"])
    assert found["forgetting"]["base"]["boolq"]["difference"] is None
    assert found["forgetting"]["dpo"]["boolq"]["difference"]["choice"]["n"] == 2
    page = (folder / ".smoke" / "reports" / "talker-letters" / "index.html").read_text()
    for heading in ("Filtering", "Preferences", "Forgetting", "Answers to MT-bench"):
        assert f"<h2>{heading}</h2>" in page
    done = make(folder, "doctor", "AFTER=align", *ALIGN, *words)
    assert done.returncode == 0 and "0 bad, 0 warning" in done.stdout, done.stdout
    assert make(folder, "verify", *ALIGN, *words).returncode == 0


def test_align_again_does_nothing_and_a_value_remakes_what_depends_on_it(chain):
    folder, words = chain
    assert aligned(folder, *words) == []
    assert sorted(aligned(folder, *words, "PAIRS=7")) == sorted([*CHAIN[2:4], "evaluate", "evaluate_general", "report"])
    assert aligned(folder, *words, "DPO_FLAGS=--beta 0.2") == ["dpo", "evaluate", "evaluate_general", "report"]
    assert sorted(aligned(folder, *words, "ALIGN_DATA=magpie")) == sorted(
        ["generate_data", "generate_data", *CHAIN[:-2], "report"]
    )


def test_an_aligned_adapter_is_exported_with_its_own_figures(chain):
    folder, words = chain
    given = ["VARIANT=letters-dpo", "EXPORT_FLAGS=--i-have-checked-the-licence"]
    done = make(folder, "export-zip", *ALIGN, *words, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^\[\d+/\d+\] (\w+)$", done.stderr, re.M) == ["export"], done.stderr
    with zipfile.ZipFile(folder / ".smoke" / "exports" / "talker-letters-dpo.zip") as archive:
        card = archive.read("talker-letters-dpo/README.md").decode()
    assert "|  | base | dpo |" in card


def test_data_sets_of_one_name_are_refused(chain):
    folder, words = chain
    done = make(folder, "-n", "align", *ALIGN, *words, "ALIGN_DATA=elsewhere/capitals.jsonl")
    assert done.returncode and "would both be .smoke/data/capitals/raw" in done.stderr


# --- make clara ---------------------------------------------------------------------------------------------

CLARA = [*TINY, "CLARA_DATA_FLAGS=--candidates 4",
         "STAGE1_FLAGS=--eval-samples 2 --compress-rate 4 --doc-max-tokens 16", "STAGE2_FLAGS=--eval-samples 2",
         "STAGE3_FLAGS=--eval-samples 2 --epochs 1",
         "EVALUATE_CLARA_FLAGS=--max-new-tokens 4 --timed 3 --k 2"]  # fmt: skip


@pytest.mark.slow
def test_clara_is_made_and_measured_and_only_what_a_change_touches_is_made_again(copy):
    done = make(copy, "clara", *CLARA)
    assert done.returncode == 0, done.stderr[-3000:]
    report = copy / ".smoke" / "reports" / "tiny-random-clara"
    assert artifact.read(report, "clara-evaluation")["metrics"]["questions"] == 2  # all that the data has
    assert "top 2 of the reasoner, 4x compressed" in (report / "report.md").read_text()
    assert stages(make(copy, "-n", "clara", *CLARA).stdout) == []
    changed = [*CLARA[:-2], "STAGE3_FLAGS=--eval-samples 2 --epochs 2", CLARA[-1]]
    estimate = copy / ".smoke" / "reports" / "tiny-random-clara-estimate"
    estimate.mkdir()
    (estimate / "metadata.json").touch()
    said = make(copy, "-n", "clara", *changed).stdout
    assert stages(said) == ["train_stage3", "evaluate_clara"]  # an estimate makes nothing stale
    assert re.search(r"scripts/evaluate_clara\.py [^;]* --estimate \S*/tiny-random-clara-estimate ", said)
    given = ["--root", ".smoke", "--model-name", "tiny-random", "--data", ".smoke/data/capitals/raw"]
    command = [sys.executable, "scripts/doctor.py", "--after", "clara", *given]
    after = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert after.returncode == 0 and "0 bad" in after.stdout, after.stdout
