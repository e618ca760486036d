"""What report.py shows of `make align` besides the evaluations: what was filtered out, whether training prefers what it
was to prefer, what was forgotten, and answers to read."""

import json
from pathlib import Path

from lib.core import artifact
from lib.core.cli import InputError
from lib.core.wording import difference, interval, shorten
from lib.data import metrics

CHOICES = {"choice": "by likelihood", "choice_per_byte": "by likelihood a byte"}
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
                f"{path} and {first['path']} cannot be compared: their questions differ; measure both with the same "
                "--samples, --prompts and --seed"
            )
    known = {meta["variant"]["digest"]: name for name, meta in evaluations.items()}
    for digest, found in by_digest.items():
        if digest not in known:
            raise InputError(f"{found['path']}: is of a model that none of --evaluations measured")
    return {name: by_digest[digest] for digest, name in known.items() if digest in by_digest}


def list_prompts(found: dict) -> list[str]:
    return [row["prompt"] for row in found["answers"]]


def gather(stages: dict, names: dict, forgetting: dict, seed: int) -> dict:
    """What `blocks` shows; `stages` is {path: metadata}, `names` how the paths are called."""
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
            gaps = {choice: metrics.paired(ours, theirs, choice, seed) for choice in CHOICES}
            compared[name][questions] = figures | {"difference": None if name == first else gaps}
    return compared


# --- writing -----------------------------------------------------------------------------------------------


def build_blocks(found: dict) -> list[tuple]:
    made = []
    for one in found["filtered"]:
        rules = {rule: took["rows"] for rule, took in one["rules"].items() if took["rows"]}
        rows = [[rule, f"{n:,}", f"{n / one['rows']:.1%}"] for rule, n in rules.items()]
        said = f"{one['artifact']}: {one['rows'] - one['rejected']:,} of {one['rows']:,} rows passed."
        made += [("heading", "What was filtered out"), ("text", said)]
        made += [("table", "numbers", ["rule", "rows", "share"], rows)] if rows else []
    if found["preferred"]:
        made += build_preference_blocks(found["preferred"])
    if found["forgetting"]:
        made += build_forgetting_blocks(found["forgetting"])
    if found["conversations"]:
        rule = "Greedy answers to first turns of MT-bench, side by side. Nobody scored them: there was no judge."
        header = ["prompt", *found["conversations"][0]["answers"]]
        rows = [
            [
                shorten(f"{row['category']}: {row['prompt']}", 300),
                *(shorten(text, 500) or "(nothing)" for text in row["answers"].values()),
            ]
            for row in found["conversations"]
        ]
        made += [("heading", "Answers to read"), ("text", rule), ("table", "answers", header, rows)]
    return made


def build_preference_blocks(preferred: list[dict]) -> list[tuple]:
    header = [
        "adapter", "held-out pairs", "chosen answer preferred, by implicit reward", "by log-likelihood, before",
        "and after", "margin of rewards", "chosen answers, nats a token",
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
                f"{one['adapter']}: the chosen answers lost likelihood too, in steps {one['collapsed_in_steps']}"
            )
        if audit := one["audit"]:
            reasons = ", ".join(f"{n} {why}" for why, n in audit["without_pair"].items()) or "none"
            said.append(f"{audit['prompts']:,} prompts were answered; those without a pair: {reasons}.")
            said += [
                f"The {which} of two responses was chosen in {interval(audit[f'{rule}_wins'])} of the pairs: "
                f"{'a label that could be guessed without reading' if tells else 'no hint of the label'}."
                for rule, which in (("longer", "longer"), ("first", "earlier"))
                if audit[f"{rule}_wins"]
                for tells in [describe_accuracy(audit[f"{rule}_wins"]) != metrics.NOISE]
            ]
    rule = (
        "What the preference optimisation was to reach, on pairs that it had not seen. The implicit reward is beta "
        "times what training has changed in an answer's log-likelihood; before it all rewards are 0, and half of the "
        "pairs are right by chance. Better or worse: the 95 % interval excludes one half."
    )
    return [
        ("heading", "Preferences"), ("text", rule), ("table", "numbers", header, rows), *[("points", said)] * bool(said)
    ]  # fmt: skip


def build_forgetting_blocks(forgetting: dict) -> list[tuple]:
    header = ["variant", "questions"]
    header += [
        f"{what} {how}" for how in CHOICES.values() for what in ("accuracy", f"against {next(iter(forgetting))},")
    ]
    header += ["guessing reaches", "same choice"]
    rows = []
    for name, sets in forgetting.items():
        for questions, one in sets.items():
            cells = []
            for choice in CHOICES:
                cells += [interval(one[choice]), difference(one["difference"][choice]) if one["difference"] else "–"]
            cells += [f"{one['guessing']:.3f}", f"{one['same_choice']:.3f}"]
            rows.append([name, f"{SET_NAMES.get(questions, questions)} ({one['choice']['n']})", *cells])
    rule = (
        "Questions that the fine-tuning had nothing to do with, answered with the option that the model finds "
        "likeliest. Guessing: the share of the commonest right option; same choice: how often the model takes the same "
        "side. Where that is near 1 and the accuracy near guessing, the set tells nothing about this model."
    )
    return [("heading", "What was forgotten"), ("text", rule), ("table", "numbers", header, rows)]
