"""What the stages of a pipeline will read and write: of rows that are there counted, of others assumed.

Lengths are in tokens. An encoded row is {input_ids, labels}, see lib/chat.py.
"""

import random
import statistics
import time
from heapq import heapreplace
from math import ceil
from pathlib import Path

from lib import artifact, hardware
from lib.cli import InputError
from lib.probe import answer, length, padded, weights_of

# Of texts that are not there yet: the share that reaches its limit; how long the others are, as a share of the limit.
# So were instructions of at most 128 tokens, the responses to them of at most 384, and answers of at most 128 to the
# prompts of pairs, as the default model wrote them (docs/results/align-magpie/run.json).
INSTRUCTIONS, RESPONSES, ANSWERS = (0.14, 0.3), (0.47, 0.54), (0.11, 0.33)
# The share of rows that filtering left there, of those that records.split_by_group gives to training, and of prompts
# that gave a pair by gold.
FIT, TRAIN, PAIRS = 0.86, 0.8, 0.4


def writes_its_own(args) -> bool:
    """Is what is learnt from to be written first?"""
    return args.goal == "align" and args.align_data == "magpie"


def count(args, values: dict, tokenizer) -> tuple[dict, dict]:
    """The work in tokens, passes and bytes, and what to time steps on."""
    from lib import chat, generation, records, training

    started = time.perf_counter()
    splits = {split: records.load(args.data, split) for split in records.SPLITS}
    loading = (time.perf_counter() - started) / len(splits)
    sft, judge, own = values["sft"], values["evaluate"], writes_its_own(args)
    ends = {tokenizer.eos_token_id}

    def take(split: str, samples: int) -> list[dict]:
        return [chat.encode(tokenizer, row, ends) for row in records.take(splits[split], samples, args.seed)]

    learnt = stand_ins(values, tokenizer) if own else take("train", sft["samples"])
    kept = [row for row in learnt if length(row) <= sft["max_length"]]
    if not kept:
        raise InputError(f"{args.data}: all training rows are longer than --max-length {sft['max_length']}")
    order = list(training.LikeLengthSampler([*map(length, kept)], sft["batch"] * sft["accumulation"], sft["seed"]))
    passes = [[kept[n] for n in order[at : at + sft["batch"]]] for at in range(0, len(order), sft["batch"])]
    asked = take("test", judge["samples"])
    prompts, golds = [length(row) - answer(row) for row in asked], [*map(answer, asked)]
    questions = records.take(splits["test"], judge["samples"], args.seed)
    work = {
        "training": {
            "tokens": sum(map(padded, passes)) * sft["epochs"], "passes": len(passes) * sft["epochs"],
            "rows": len(kept), "updates": -(-len(passes) // sft["accumulation"]) * sft["epochs"],
        },
        "evaluation": evaluation_of(prompts, golds, judge, alike=not own),
        "model": model_of(args.model, sft, values["quantize"]["method"]),
        "most": {
            "length": max(map(length, kept)), "prompt": max(prompts),
            "context": generation.context_for(questions, judge["max_new_tokens"]),
        },
    }  # fmt: skip
    timed = {"passes": passes, "asked": asked, "loading": loading}
    if args.goal == "align":
        more = alignment(values, kept, asked, {split: len(rows) for split, rows in splits.items()}, own, tokenizer)
        timed["drawn"] = {kind: (calls[0]["at_once"], calls[0]["columns"]) for kind, calls in more["drawn"].items()}
    else:
        more, timed["calibration"] = comparisons(values, take, splits["validation"], args.seed, tokenizer)
    most = {"most": work["most"] | more.pop("most")}
    return work | more | most, timed


def comparisons(values: dict, take, validation: list[dict], seed: int, tokenizer) -> tuple[dict, list[dict]]:
    """What rounding and certificates read, and rows to time it on."""
    from lib import certificate, chat, records

    def read(encoded: list[dict]) -> dict:
        return {"rows": len(encoded), "tokens": sum(map(length, encoded)), "answers": sum(map(answer, encoded))}

    rounding, ends = values["quantize"], {tokenizer.eos_token_id}
    calibration = take("train", rounding["calibration_samples"]) if rounding["calibration_samples"] else []
    checked = records.take(validation, rounding["samples"], seed)
    return {
        "calibration": read(calibration), "certificate": read(take("validation", rounding["samples"])),
        "merge": read(take("validation", values["merge_lora"]["samples"])),
        "general": read([chat.encode(tokenizer, row, ends) for row in certificate.GENERAL]),
        "chats": sum(len(chat.prompt_ids(tokenizer, one)) for one in chat.probes(tokenizer)),
        "most": {
            "calibration": max(map(length, calibration), default=0),
            "positions": certificate.positions(tokenizer, checked),
        },
    }, calibration or take("train", 3)  # fmt: skip


def evaluation_of(prompts: list[int], golds: list[int], judge: dict, alike: bool = True) -> dict:
    """What evaluate.py reads and writes, from the lengths of prompts and accepted answers; `alike`: after fine-tuning,
    answers are as long as those."""
    batch, batches = judge["batch"], []
    for start in range(0, len(prompts), 4 * batch):  # as it goes: in chunks of four batches, each sorted by length
        order = sorted(range(start, min(start + 4 * batch, len(prompts))), key=lambda n: -prompts[n])
        batches += [order[at : at + batch] for at in range(0, len(order), batch)]
    many = (prompts * batch)[:batch]
    made = {
        "rows": len(prompts), "prompt_tokens": sum(prompts), "gold_tokens": sum(golds), "passes": len(batches),
        "padded_tokens": sum(len(some) * max(prompts[n] for n in some) for some in batches),
        "speed": {
            "repeats": judge["repeats"] + 1, "new_tokens": judge["speed_tokens"], "streams": batch,
            "prompt_tokens": prompts[0], "batch_tokens": sum(many), "padded_tokens": batch * max(many),
        },
    }  # fmt: skip
    most = judge["max_new_tokens"]
    for kind, lengths in (
        ("untuned", [most] * len(golds)),
        ("tuned", [min(most, gold) if alike else most for gold in golds]),
    ):
        steps = sum(max(lengths[n] for n in some) - 1 for some in batches)
        made[kind] = {"new_tokens": sum(lengths), "mean": statistics.mean(lengths), "steps": steps}
    return made


def model_of(model: Path, sft: dict, method: str) -> dict:
    """Parameters and bytes of the model, its adapter and its quantisation, from the config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head, targets = made.get_output_embeddings(), sft["lora_targets"].split(",")
    linear = {name: m for name, m in made.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    adapted = [m for name, m in linear.items() if targets == ["all-linear"] or name.split(".")[-1] in targets]
    parameters, matrices = made.num_parameters(), sum(m.weight.numel() for m in linear.values())
    adapter = sft["lora_r"] * sum(m.in_features + m.out_features for m in adapted)
    weights = sum(file.stat().st_size for file in weights_of(model))
    others = artifact.content_bytes(model) - weights
    rest = (parameters - matrices) * (2 if hardware.device() == "cuda" else 4)  # bitsandbytes leaves it as it is
    return {
        "parameters": parameters, "matrices": matrices, "rounded": matrices + head.weight.numel(),
        "bytes": (weights or 2 * parameters) + others, "adapter_bytes": 4 * adapter + others,
        "int4_bytes": int(matrices * {"int8": 1}.get(method, 0.516) + rest) + others,  # a GGUF's are those of a file
    }  # fmt: skip


# --- make align: texts that are not there yet ---------------------------------------------------------------


def assumed(values: dict, own: bool) -> list[str]:
    """What alignment reckons with, in words."""
    cut, mean = RESPONSES
    pairs = f"{PAIRS:.0%} of the prompts give a pair"
    like = "So it was with the default model; another's texts can be half as long or twice."
    said = ["Not counted: what filtering takes (seconds), and the scoring of responses."]
    if not own:
        return [
            f"Assumed: filtering leaves all rows, responses are as long as accepted answers, {pairs}. {like}",
            *said,
        ]
    magpie = values["generate_data"]
    asked, most = INSTRUCTIONS[1] * magpie["max_instruction_tokens"], magpie["max_response_tokens"]
    teacher = ["Responses were timed as if --teacher were as fast as --model."] if magpie.get("teacher") else []
    return [
        f"What the model will write is not known. Assumed: instructions have {asked:.0f} tokens; {cut:.0%} of the "
        f"responses reach --max-response-tokens {most} and are dropped, the others have {mean * most:.0f}; filtering "
        f"leaves {FIT:.0%} of the rows; answers to the prompts of pairs have "
        f"{ANSWERS[1] * values['generate_preferences']['max_new_tokens']:.0f}, and {pairs}. {like}",
        *teacher,
        *said,
    ]


def template_tokens(tokenizer) -> int:
    """What a chat template puts around a question."""
    from lib import chat, records

    return len(chat.prompt_ids(tokenizer, records.said("user", "a"))) - 1


def stand_ins(values: dict, tokenizer) -> list[dict]:
    """Training rows in the place of those that magpie will write, as encoded ones: as many, about as long."""
    magpie = values["generate_data"]
    prompt = template_tokens(tokenizer) + round(INSTRUCTIONS[1] * magpie["max_instruction_tokens"])
    rows = min(values["sft"]["samples"], round(FIT * TRAIN * magpie["samples"]))
    whole = spread(max(1, rows), magpie["max_response_tokens"], (0, RESPONSES[1]))
    return [{"input_ids": [1] * (prompt + n), "labels": [-100] * prompt + [1] * n} for n in whole]


def spread(texts: int, limit: int, shares: tuple[float, float]) -> list[int]:
    """Assumed lengths: a share reaches the limit, the others are spread evenly around their mean."""
    cut, mean = shares
    whole = texts - round(cut * texts)
    found = [max(1, round(2 * mean * limit * (n + 0.5) / whole)) for n in range(whole)] + [limit] * (texts - whole)
    random.Random(0).shuffle(found)
    return found


def drawn(lengths: list[int], prompt: float, prompts: float, batch: int) -> dict:
    """What one call of lib/batching.py does: a text that is done gives its place to another, when an eighth of the
    places are free. A batch's longest text is on average four fifths as long as any: it begins with none."""
    places = [0] * min(batch, len(lengths))
    for tokens in lengths:
        heapreplace(places, places[0] + tokens)
    at_once, steps = len(places), max(places, default=0)
    return {
        "texts": len(lengths), "tokens": sum(lengths) + at_once // 16 * steps, "steps": steps, "at_once": at_once,
        "prompt_tokens": prompts * prompt, "columns": round(prompt + 0.8 * max(lengths, default=0)),
    }  # fmt: skip


def alignment(values: dict, kept: list[dict], asked: list[dict], rows: dict[str, int], own: bool, tokenizer) -> dict:
    """Drawing, DPO, and what was forgotten. `kept` are the training rows, `asked` are like the prompts of the pairs,
    `rows` says how many of those each split has."""
    calls, sizes, most, longest = {}, {}, {}, max(length(row) - answer(row) for row in asked)
    if own:
        magpie, template = values["generate_data"], template_tokens(tokenizer)
        calls, sizes["magpie"] = writing(magpie, template)
        written = template + magpie["max_instruction_tokens"] + magpie["max_response_tokens"]
        most["length"] = min(values["sft"]["max_length"], written)
    calls["preferences"], sizes["preferences"], preferring = pairing(values, asked, rows, own, longest)
    weighed, questions = weighing(values["forgetting"], tokenizer)
    most |= questions | {"drawn": sizes, "pair": longest + 2 * values["generate_preferences"]["max_new_tokens"]}
    return {"drawn": calls, "preferring": preferring, "weighing": weighed, "most": most}


def writing(magpie: dict, template: int) -> tuple[dict[str, list], tuple]:
    """Magpie's calls, and what budget.sampling takes. In two rounds, the second for responses without an end."""
    asked, most = magpie["max_instruction_tokens"], magpie["max_response_tokens"]
    batch, wanted, calls = magpie["batch"], magpie["samples"], {"instructions": [], "responses": []}
    for texts in (wanted, ceil(wanted / (1 - RESPONSES[0])) - wanted):
        instructions = spread(ceil(texts / (1 - INSTRUCTIONS[0])), asked, INSTRUCTIONS)
        calls["instructions"].append(drawn(instructions, template, 1, batch))
        prompt = template + INSTRUCTIONS[1] * asked
        calls["responses"].append(drawn(spread(texts, most, RESPONSES), prompt, texts, batch))
    return calls, (min(batch, wanted), min(batch, wanted), template + asked, most)


def pairing(values: dict, asked: list[dict], rows: dict, own: bool, longest: int) -> tuple[list[dict], tuple, dict]:
    """Calls for responses, what budget.sampling takes, and what DPO does with the pairs. In two rounds as well: as many
    prompts as pairs are wanted, then as many as it takes."""
    asking, dpo = values["generate_preferences"], values["dpo"]
    limit, of_each = asking["max_new_tokens"], asking["responses"]
    prompt = statistics.mean(length(row) - answer(row) for row in asked)
    # What was not tuned on such answers says more than is asked.
    said = spread(len(asked), limit, ANSWERS) if own else [min(limit, answer(row)) for row in asked]
    pair = prompt + 2 * (ANSWERS[1] * limit if own else statistics.mean(said))
    wanted, there = (asking["samples"], asking["validation_samples"]), (rows["train"], rows["validation"])
    train, held = (min(most, ceil(PAIRS * some)) for most, some in zip(wanted, there))
    first = sum(map(min, wanted, there))
    more = sum(min(ceil(most / PAIRS), some) for most, some in zip(wanted, there)) - first
    calls = []
    for texts in (first * of_each, more * of_each):
        lengths = [said[n % len(said)] for n in range(texts)]
        calls.append(drawn(lengths, prompt, texts / of_each, asking["batch"]))
    at_once, epochs = min(asking["batch"], first * of_each), dpo["epochs"]
    return calls, (at_once, ceil(at_once / of_each), longest, limit), {
        "tokens": train * pair * epochs, "passes": ceil(train / dpo["batch"]) * epochs,
        "updates": ceil(train / (dpo["batch"] * dpo["accumulation"])) * epochs,
        "forward_tokens": (train + 2 * held) * pair,  # the reference, and the result on those held out
    }  # fmt: skip


def weighing(forgetting: dict, tokenizer) -> tuple[dict, dict]:
    """What forgetting.py reads and writes, and its longest texts."""
    from lib import chat, evaluation_sets, records

    samples, seed, batch, most = (forgetting[key] for key in ("samples", "seed", "batch", "max_new_tokens"))
    questions, passes, tokens = [], 0, 0
    for name in evaluation_sets.BY_OPTIONS:
        for row in records.take(evaluation_sets.load(name), samples, seed):
            questions.append(len(chat.prompt_ids(tokenizer, evaluation_sets.asked(row))))
            options = tokenizer(evaluation_sets.answers(row), add_special_tokens=False)["input_ids"]
            more = max(map(len, options)) - 1  # the first follows from the question, the others are read, all at once
            passes += 1 + bool(more)
            tokens += questions[-1] + len(options) * more
    rows = evaluation_sets.first_turns(forgetting["prompts"], seed)
    chats = [len(chat.prompt_ids(tokenizer, records.said("user", row["turns"][0]))) for row in rows]
    made = {
        "passes": passes,
        "tokens": tokens,
        "prompt_tokens": sum(chats),
        "steps": ceil(len(chats) / batch) * (most - 1),
    }
    return made, {"question": max(questions), "chat": max(chats, default=1)}
