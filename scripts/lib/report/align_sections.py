"""What report.py shows of `make align` besides the evaluations: what was filtered out, whether training prefers what it
was to prefer, what was forgotten, and answers to read."""

import json
from pathlib import Path

from lib.core import artifact
from lib.core.cli import InputError
from lib.core.wording import difference, interval, shorten
from lib.data import metrics

CHOICES = {"choice": "by log-likelihood", "choice_per_byte": "by byte-normalised log-likelihood"}
SET_NAMES = {"commonsense_qa": "CommonsenseQA", "boolq": "BoolQ"}


# --- gathering ---------------------------------------------------------------------------------------------


def read_forgetting(paths: list[Path], evaluations: dict[str, dict]) -> dict[str, dict]:
    """{variant: {metrics, options by id, answers}}, in the order of the evaluations. InputError for a model that was
    not evaluated, or that was asked other questions."""
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
        found = {"path": path, "metrics": meta["metrics"], "options": options, "answers": lines["answers"]}
        by_digest[meta["inputs"]["model"]["digest"]] = found
        first = next(iter(by_digest.values()))
        if first["options"].keys() != options.keys() or list_prompts(first) != list_prompts(found):
            raise InputError(
                f"{path} and {first['path']} cannot be compared: their questions differ; evaluate both with the same "
                "--samples, --prompts and --seed"
            )
    known = {meta["variant"]["digest"]: name for name, meta in evaluations.items()}
    for digest, found in by_digest.items():
        if digest not in known:
            raise InputError(f"{found['path']}: belongs to a model that none of --evaluations measured")
    return {name: by_digest[digest] for digest, name in known.items() if digest in by_digest}


def list_prompts(found: dict) -> list[str]:
    return [row["prompt"] for row in found["answers"]]


def gather(stages: dict, names: dict, forgetting: dict, seed: int) -> dict:
    """What `build_blocks` shows; `stages` is {path: metadata}, `names` how the paths are called."""
    filtered, preferred = [], []
    for path, meta in stages.items():
        if meta["kind"] == "data" and "rules" in meta["metrics"]:
            filtered.append({"artifact": names[path]} | {k: meta["metrics"][k] for k in ("rows", "rejected", "rules")})
        if held_out := meta["metrics"].get("held_out"):
            pairs = [one["metrics"] for one in stages.values() if one["digest"] == meta["inputs"]["data"]["digest"]]
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
            for rows in zip(*(found["answers"] for found in forgetting.values()))
        ],
    }  # fmt: skip


def describe_accuracy(accuracy: dict) -> str:
    """Of a held-out preference accuracy: half is what the reference reaches, whose implicit reward is always 0."""
    if accuracy["low"] <= 0.5 <= accuracy["high"] or accuracy["n"] < metrics.LEAST_DIFFERING:
        return metrics.NOISE
    return "better" if accuracy["mean"] > 0.5 else "worse"


def compare_forgetting(forgetting: dict, seed: int) -> dict:
    """{variant: {set: its figures, and the paired difference to the first variant}}."""
    right = {
        name: {
            key: {choice: float(row[choice] == row["gold"]) for choice in CHOICES}
            for key, row in found["options"].items()
        }
        for name, found in forgetting.items()
    }
    first, compared = next(iter(right), None), {}
    for name, found in forgetting.items():
        compared[name] = {}
        for questions, figures in found["metrics"].items():
            ours, theirs = (
                {key: row for key, row in right[variant].items() if key.startswith(questions)}
                for variant in (name, first)
            )
            gaps = {choice: metrics.compare_paired(ours, theirs, choice, seed) for choice in CHOICES}
            compared[name][questions] = figures | {"difference": None if name == first else gaps}
    return compared


# --- writing -----------------------------------------------------------------------------------------------


def build_blocks(found: dict) -> list[tuple]:
    made = []
    for one in found["filtered"]:
        rules = {rule: took["rows"] for rule, took in one["rules"].items() if took["rows"]}
        rows = [[rule, f"{n:,}", f"{n / one['rows']:.1%}"] for rule, n in rules.items()]
        said = f"{one['artifact']}: {one['rows'] - one['rejected']:,} of {one['rows']:,} examples passed."
        made += [("heading", "Filtering"), ("text", said)]
        made += [("table", "numbers", ["rule", "rejected", "share"], rows)] if rows else []
    if found["preferred"]:
        made += build_preference_blocks(found["preferred"])
    if found["forgetting"]:
        made += build_forgetting_blocks(found["forgetting"])
    if found["conversations"]:
        rule = "Greedy answers to the first turns of MT-bench. There was no judge, so they are not scored."
        header = ["prompt", *found["conversations"][0]["answers"]]
        rows = [
            [
                shorten(f"{row['category']}: {row['prompt']}", 300),
                *(shorten(text, 500) or "(nothing)" for text in row["answers"].values()),
            ]
            for row in found["conversations"]
        ]
        made += [("heading", "Answers to MT-bench"), ("text", rule), ("table", "answers", header, rows)]
    return made


def build_preference_blocks(preferred: list[dict]) -> list[tuple]:
    header = [
        "adapter", "held-out pairs", "preference accuracy, by implicit reward", "by log-likelihood, before training",
        "by log-likelihood, after", "reward margin", "change of the chosen answers, nats per token",
    ]  # fmt: skip
    rows, said = [], []
    for one in preferred:
        held = one["held_out"]
        before, after = (held["likelihood_accuracy"][when] for when in ("before", "after"))
        rows.append([
            one["adapter"], f"{held['pairs']:,}", f"{one['verdict']}, {interval(held['reward_accuracy'])}",
            interval(before), interval(after), interval(held["margin"]), f"{held['chosen_change']:+.3f}",
        ])  # fmt: skip
        if one["collapsed_in_steps"]:
            said.append(
                f"{one['adapter']}: the likelihood of the chosen answers fell too, in steps {one['collapsed_in_steps']}"
            )
        if audit := one["audit"]:
            reasons = ", ".join(f"{n} {why}" for why, n in audit["without_pair"].items()) or "none"
            said.append(f"{audit['prompts']:,} prompts were answered; prompts without a pair: {reasons}.")
            said += [
                f"The {which} of two responses was chosen in {interval(audit[f'{rule}_wins'])} of the pairs, "
                f"{'so the choice can be guessed without reading' if tells else 'so it does not predict the choice'}."
                for rule, which in (("longer", "longer"), ("first", "earlier"))
                if audit[f"{rule}_wins"]
                for tells in [describe_accuracy(audit[f"{rule}_wins"]) != metrics.NOISE]
            ]
    rule = (
        "The result of preference optimisation on held-out pairs. The implicit reward is beta times the change in an "
        "answer's log-likelihood through training. Before training all rewards are 0, and chance is 0.5. Better or "
        "worse: the 95 % interval excludes 0.5."
    )
    return [
        ("heading", "Preferences"), ("text", rule), ("table", "numbers", header, rows), *[("points", said)] * bool(said)
    ]  # fmt: skip


def build_forgetting_blocks(forgetting: dict) -> list[tuple]:
    header = ["variant", "questions"]
    header += [f"{what} {how}" for how in CHOICES.values() for what in ("accuracy", f"vs {next(iter(forgetting))},")]
    header += ["guessing", "same choice"]
    rows = []
    for name, sets in forgetting.items():
        for questions, one in sets.items():
            cells = []
            for choice in CHOICES:
                cells += [interval(one[choice]), difference(one["difference"][choice]) if one["difference"] else "–"]
            cells += [f"{one['guessing']:.3f}", f"{one['same_choice']:.3f}"]
            rows.append([name, f"{SET_NAMES.get(questions, questions)} ({one['choice']['n']})", *cells])
    rule = (
        "General questions that are unrelated to the fine-tuning. The model's answer is the option with the highest "
        "likelihood. Guessing: the share of the most frequent right option. Same choice: the share of the option that "
        "the model chose most often. If same choice is near 1 and accuracy is near guessing, the model did not answer "
        "the questions."
    )
    return [("heading", "Forgetting"), ("text", rule), ("table", "numbers", header, rows)]
