"""What report.py shows of `make align` besides the evaluations: the filtered rows, whether the trained model prefers
the chosen answers, what it has forgotten, and answers to read."""

import json
from pathlib import Path

from lib.core import artifact
from lib.core.cli import InputError
from lib.core.wording import difference, interval, shorten
from lib.data import metrics
from lib.data.metrics import DESCRIPTION

CHOICES = {"choice": "by log-likelihood", "choice_per_byte": "by byte-normalised log-likelihood"}
SET_NAMES = {"commonsense_qa": "CommonsenseQA", "boolq": "BoolQ"}


# --- gathering ---------------------------------------------------------------------------------------------


def read_forgetting(paths: list[Path], evaluations: dict[str, dict]) -> dict[str, dict]:
    """{variant: {path, metrics, options by id, answers}}, in the order of the evaluations. InputError for a model that
    was not evaluated, or if the questions differ."""
    by_digest = {}
    for path in paths:
        meta = artifact.read(path, "forgetting")
        lines = {
            name: [
                json.loads(line) for line in (path / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line
            ]
            for name in ("options", "answers")
        }
        options = {row["id"]: row for row in lines["options"]}
        benchmark = {"path": path, "metrics": meta["metrics"], "options": options, "answers": lines["answers"]}
        by_digest[meta["inputs"]["model"]["digest"]] = benchmark
        first = next(iter(by_digest.values()))
        if first["options"].keys() != options.keys() or list_prompts(first) != list_prompts(benchmark):
            raise InputError(
                f"{path} and {first['path']} cannot be compared: their questions differ; evaluate both with the same "
                "--samples, --prompts and --seed"
            )
    names = {meta["variant"]["digest"]: name for name, meta in evaluations.items()}
    for digest, benchmark in by_digest.items():
        if digest not in names:
            raise InputError(f"{benchmark['path']}: belongs to a model that none of --evaluations measured")
    return {name: by_digest[digest] for digest, name in names.items() if digest in by_digest}


def list_prompts(benchmark: dict) -> list[str]:
    return [row["prompt"] for row in benchmark["answers"]]


def gather(stages: dict, names: dict, forgetting: dict, seed: int) -> dict:
    """What `build_blocks` shows; `stages` is {path: metadata}, `names` {path: how it is displayed}."""
    filtered, preferred = [], []
    for path, meta in stages.items():
        if meta["kind"] == "data" and "rules" in meta["metrics"]:
            filtered.append({"artifact": names[path]} | {k: meta["metrics"][k] for k in ("rows", "rejected", "rules")})
        if held_out := meta["metrics"].get("held_out"):
            pairs = [
                stage["metrics"] for stage in stages.values() if stage["digest"] == meta["inputs"]["data"]["digest"]
            ]
            collapsed = meta["metrics"]["collapsed_in_steps"]
            preferred.append(
                {"adapter": names[path], "pairs": meta["metrics"]["pairs"], "collapsed_in_steps": collapsed}
                | {"held_out": held_out, "verdict": describe_accuracy(held_out["reward_accuracy"])}
                | {"audit": {k: v for k, v in pairs[0].items() if k != "history"} if pairs else None}
            )
    return {
        "filtered": filtered, "preferred": preferred, "forgetting": compare_forgetting(forgetting, seed),
        "conversations": [
            {"prompt": rows[0]["prompt"], "category": rows[0]["category"],
             "answers": dict(zip(forgetting, (row["answer"] for row in rows)))}
            for rows in zip(*(benchmark["answers"] for benchmark in forgetting.values()))
        ],
    }  # fmt: skip


def describe_accuracy(accuracy: dict) -> str:
    """The verdict on a held-out preference accuracy, against 0.5: the reference's implicit rewards are all 0."""
    if metrics.has_few_groups(accuracy):
        return metrics.TOO_FEW
    if not metrics.excludes(accuracy, 0.5):
        return metrics.NOISE
    return "better" if accuracy["mean"] > 0.5 else "worse"


def describe_shortcut(wins: dict) -> str:
    """What follows from how often a rule that reads nothing names the chosen answer."""
    unproven = {
        metrics.NOISE: "so it does not predict the choice",
        metrics.TOO_FEW: "too few to tell whether it predicts the choice",
    }
    return unproven.get(describe_accuracy(wins), "so the choice can be guessed without reading")


def compare_forgetting(forgetting: dict, seed: int) -> dict:
    """{variant: {set: its figures, with the paired difference to the first variant}}."""
    correct = {
        name: {
            key: {choice: float(row[choice] == row["gold"]) for choice in CHOICES} | {"group": row.get("group")}
            for key, row in benchmark["options"].items()
        }
        for name, benchmark in forgetting.items()
    }
    first, compared = next(iter(correct), None), {}
    for name, benchmark in forgetting.items():
        compared[name] = {}
        for questions, figures in benchmark["metrics"].items():
            ours, theirs = (
                {key: row for key, row in correct[variant].items() if key.startswith(questions)}
                for variant in (name, first)
            )
            gaps = {choice: metrics.compare_paired(ours, theirs, choice, seed) for choice in CHOICES}
            compared[name][questions] = figures | {"difference": None if name == first else gaps}
    return compared


# --- writing -----------------------------------------------------------------------------------------------


def build_blocks(sections: dict) -> list[tuple]:
    blocks = []
    for stage in sections["filtered"]:
        rules = {rule: counts["rows"] for rule, counts in stage["rules"].items() if counts["rows"]}
        rows = [[rule, f"{n:,}", f"{n / stage['rows']:.1%}"] for rule, n in rules.items()]
        summary = f"{stage['artifact']}: {stage['rows'] - stage['rejected']:,} of {stage['rows']:,} examples passed."
        blocks += [("heading", "Filtering"), ("text", summary)]
        blocks += [("table", "numbers", ["rule", "rejected", "share"], rows)] if rows else []
    if sections["preferred"]:
        blocks += build_preference_blocks(sections["preferred"])
    if sections["forgetting"]:
        blocks += build_forgetting_blocks(sections["forgetting"])
    if sections["conversations"]:
        rule = "Greedy answers to the first turns of MT-bench. There was no judge, so they are not scored."
        header = ["prompt", *sections["conversations"][0]["answers"]]
        rows = [
            [
                shorten(f"{row['category']}: {row['prompt']}", 300),
                *(shorten(text, 500) or "(nothing)" for text in row["answers"].values()),
            ]
            for row in sections["conversations"]
        ]
        blocks += [("heading", "Answers to MT-bench"), ("text", rule), ("table", "answers", header, rows)]
    return blocks


def build_preference_blocks(preferred: list[dict]) -> list[tuple]:
    header = [
        "adapter", "held-out pairs", "preference accuracy, by implicit reward", "by log-likelihood, before training",
        "by log-likelihood, after", "reward margin", "change of the chosen answers, nats per token",
    ]  # fmt: skip
    rows, points = [], []
    for run in preferred:
        held_out = run["held_out"]
        before, after = (held_out["likelihood_accuracy"][when] for when in ("before", "after"))
        rows.append([
            run["adapter"], f"{held_out['pairs']:,}", f"{run['verdict']}, {interval(held_out['reward_accuracy'])}",
            interval(before), interval(after), interval(held_out["margin"]), f"{held_out['chosen_change']:+.3f}",
        ])  # fmt: skip
        if run["collapsed_in_steps"]:
            points.append(
                f"{run['adapter']}: the likelihood of the chosen answers fell too, in steps {run['collapsed_in_steps']}"
            )
        if audit := run["audit"]:
            reasons = ", ".join(f"{n} {reason}" for reason, n in audit["without_pair"].items()) or "none"
            points.append(f"{audit['prompts']:,} prompts were answered; prompts without a pair: {reasons}.")
            points += [
                f"The {word} of two responses was chosen in {interval(wins)} of the pairs, {describe_shortcut(wins)}."
                for rule, word in (("longer", "longer"), ("first", "earlier"))
                if (wins := audit[f"{rule}_wins"])
            ]
    rule = (
        "The result of preference optimisation on held-out pairs. The implicit reward is beta times the change in an "
        "answer's log-likelihood through training. Before training all rewards are 0, and chance is 0.5. Better or "
        f"worse: the 95 % interval excludes 0.5. {DESCRIPTION}."
    )
    return [
        ("heading", "Preferences"), ("text", rule), ("table", "numbers", header, rows),
        *[("points", points)] * bool(points),
    ]  # fmt: skip


def build_forgetting_blocks(forgetting: dict) -> list[tuple]:
    header = ["variant", "questions"]
    header += [
        f"{measure} {label}" for label in CHOICES.values() for measure in ("accuracy", f"vs {next(iter(forgetting))},")
    ]
    header += ["guessing", "same choice"]
    rows = []
    for name, sets in forgetting.items():
        for questions, figures in sets.items():
            cells = []
            for choice in CHOICES:
                cells += [
                    interval(figures[choice]),
                    difference(figures["difference"][choice]) if figures["difference"] else "–",
                ]
            cells += [f"{figures['guessing']:.3f}", f"{figures['same_choice']:.3f}"]
            rows.append([name, f"{SET_NAMES.get(questions, questions)} ({figures['choice']['n']})", *cells])
    rule = (
        "General questions that are unrelated to the fine-tuning. The model's answer is the option with the highest "
        "likelihood. Guessing: the share of the most frequent right option. Same choice: the share of the option that "
        "the model chose most often. If same choice is near 1 and accuracy is near guessing, the model did not answer "
        f"the questions. {DESCRIPTION}."
    )
    return [("heading", "Forgetting"), ("text", rule), ("table", "numbers", header, rows)]
