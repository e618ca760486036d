"""What the stages of a pipeline will read and write: of rows that are there counted, of others assumed.

Lengths are in tokens. An encoded row is {input_ids, labels}, see lib/model/chat.py.
"""

import random
import statistics
import time
from heapq import heapreplace
from math import ceil
from pathlib import Path

from lib.core import artifact, hardware
from lib.core.cli import InputError
from lib.forecast.plan import Plan
from lib.forecast.timing import KINDS, answer_length, matmul_tokens, padded_tokens, row_length, weight_files

# Of texts that are not there yet: the share that reaches its limit; how long the others are, as a share of the limit.
# So were instructions of at most 128 tokens, the responses to them of at most 384, and answers of at most 128 to the
# prompts of pairs, as the default model wrote them (docs/results/align-magpie/run.json).
INSTRUCTIONS, RESPONSES, ANSWERS = (0.14, 0.3), (0.47, 0.54), (0.11, 0.33)
# The share of rows that filtering left there, of those that records.split_by_group gives to training, and of prompts
# that gave a pair by gold.
FIT, TRAIN, PAIRS = 0.86, 0.8, 0.4


def count(plan: Plan, tokenizer) -> tuple[dict, dict]:
    """The work in tokens, passes and bytes, and what to time steps on."""
    from lib.data import records
    from lib.engines import opening
    from lib.model import chat
    from lib.train import length_groups

    started = time.perf_counter()
    splits = {split: records.load_split(plan.data, split) for split in records.SPLITS}
    loading = (time.perf_counter() - started) / len(splits)
    values, judge, own = plan.values, plan.judge, plan.writes_rows
    sft, seed = values["sft"], values["sft"]["seed"]
    ends = {tokenizer.eos_token_id}

    def take(split: str, samples: int) -> list[dict]:
        return [chat.encode_row(tokenizer, row, ends) for row in records.sample_rows(splits[split], samples, seed)]

    learnt = stand_ins(values, tokenizer) if own else take("train", sft["samples"])
    kept = [row for row in learnt if row_length(row) <= sft["max_length"]]
    if not kept:
        raise InputError(f"{plan.data}: all training rows are longer than --max-length {sft['max_length']}")
    order = list(
        length_groups.LengthGroupedBatches([*map(row_length, kept)], sft["batch"] * sft["accumulation"], sft["seed"])
    )
    passes = [[kept[n] for n in order[at : at + sft["batch"]]] for at in range(0, len(order), sft["batch"])]
    asked = take("test", judge["samples"])
    prompts, golds = [row_length(row) - answer_length(row) for row in asked], [*map(answer_length, asked)]
    questions = records.sample_rows(splits["test"], judge["samples"], seed)
    work = {
        "training": {
            "tokens": sum(map(padded_tokens, passes)) * sft["epochs"], "passes": len(passes) * sft["epochs"],
            "rows": len(kept), "updates": -(-len(passes) // sft["accumulation"]) * sft["epochs"],
        },
        "model": model_of(plan.model, sft, plan.method),
        "most": {
            "length": max(map(row_length, kept)), "prompt": max(prompts),
            "context": opening.context_for(questions, judge["max_new_tokens"]),
        },
    }  # fmt: skip
    timed = {"passes": passes, "asked": asked, "loading": loading}
    if "evaluate" in values:
        work["evaluation"] = evaluation_of(prompts, golds, judge, alike=not own)
    if plan.clara_data:
        more, timed["clara"] = compression(plan, work["model"], tokenizer)
    elif "dpo" in values:
        more = alignment(values, kept, asked, {split: len(rows) for split, rows in splits.items()}, own, tokenizer)
        timed["drawn"] = {kind: (calls[0]["at_once"], calls[0]["columns"]) for kind, calls in more["drawn"].items()}
    else:
        more, timed["calibration"] = comparisons(values, take, splits["validation"], seed, tokenizer)
    most = {"most": work["most"] | more.pop("most")}
    return work | more | most, timed


def comparisons(values: dict, take, validation: list[dict], seed: int, tokenizer) -> tuple[dict, list[dict]]:
    """What rounding and certificates read, and rows to time it on."""
    from lib.data import records
    from lib.model import chat
    from lib.quant import divergence

    def read(encoded: list[dict]) -> dict:
        return {
            "rows": len(encoded),
            "tokens": sum(map(row_length, encoded)),
            "answers": sum(map(answer_length, encoded)),
        }

    rounding, ends = values["quantize"], {tokenizer.eos_token_id}
    calibration = take("train", rounding["calibration_samples"]) if rounding["calibration_samples"] else []
    checked = records.sample_rows(validation, rounding["samples"], seed)
    return {
        "calibration": read(calibration), "certificate": read(take("validation", rounding["samples"])),
        "merge": read(take("validation", values["merge_lora"]["samples"])),
        "general": read([chat.encode_row(tokenizer, row, ends) for row in divergence.GENERAL]),
        "chats": sum(len(chat.prompt_ids(tokenizer, one)) for one in chat.probes(tokenizer)),
        "most": {
            "calibration": max(map(row_length, calibration), default=0),
            "positions": divergence.count_positions(tokenizer, checked),
        },
    }, calibration or take("train", 3)  # fmt: skip


def evaluation_of(prompts: list[int], golds: list[int], judge: dict, alike: bool = True) -> dict:
    """What evaluate.py reads and writes, from the lengths of prompts and accepted answers; `alike`: after fine-tuning,
    answers are as long as those."""
    batch, batches = judge["batch"], in_batches(prompts, judge["batch"])
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


def in_batches(prompts: list[int], batch: int) -> list[list[int]]:
    """The rows that are answered at once, from the lengths of their prompts."""
    batches = []
    for start in range(0, len(prompts), 4 * batch):  # as it goes: in chunks of four batches, each sorted by length
        order = sorted(range(start, min(start + 4 * batch, len(prompts))), key=lambda n: -prompts[n])
        batches += [order[at : at + batch] for at in range(0, len(order), batch)]
    return batches


def model_of(model: Path, sft: dict, method: str | None) -> dict:
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
    weights = sum(file.stat().st_size for file in weight_files(model))
    others = artifact.content_bytes(model) - weights
    rest = (parameters - matrices) * (2 if hardware.device() == "cuda" else 4)  # bitsandbytes leaves it as it is
    return {
        "parameters": parameters, "matrices": matrices, "rounded": matrices + head.weight.numel(),
        "bytes": (weights or 2 * parameters) + others, "others": others, "adapter_bytes": 4 * adapter + others,
        "int4_bytes": int(matrices * {"int8": 1}.get(method, 0.516) + rest) + others,  # a GGUF's are those of a file
    }  # fmt: skip


# --- make align: texts that are not there yet ---------------------------------------------------------------


def assumed(plan: Plan) -> list[str]:
    """What alignment reckons with, in words."""
    cut, mean = RESPONSES
    pairs = f"{PAIRS:.0%} of the prompts give a pair"
    like = "So it was with the default model; another's texts can be half as long or twice."
    said = ["Not counted: what filtering takes (seconds), and the scoring of responses."]
    if not plan.writes_rows:
        return [
            f"Assumed: filtering leaves all rows, responses are as long as accepted answers, {pairs}. {like}",
            *said,
        ]
    values = plan.values
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
    from lib.data import records
    from lib.model import chat

    return len(chat.prompt_ids(tokenizer, records.message("user", "a"))) - 1


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
    """What one call of engines/batching.py does: a text that is done gives its place to another, when an eighth of the
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
    calls, sizes, most, longest = {}, {}, {}, max(row_length(row) - answer_length(row) for row in asked)
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
    """Magpie's calls, and what estimate_sampling takes. In two rounds, the second for responses without an end."""
    asked, most = magpie["max_instruction_tokens"], magpie["max_response_tokens"]
    batch, wanted, calls = magpie["batch"], magpie["samples"], {"instructions": [], "responses": []}
    for texts in (wanted, ceil(wanted / (1 - RESPONSES[0])) - wanted):
        instructions = spread(ceil(texts / (1 - INSTRUCTIONS[0])), asked, INSTRUCTIONS)
        calls["instructions"].append(drawn(instructions, template, 1, batch))
        prompt = template + INSTRUCTIONS[1] * asked
        calls["responses"].append(drawn(spread(texts, most, RESPONSES), prompt, texts, batch))
    return calls, (min(batch, wanted), min(batch, wanted), template + asked, most)


def pairing(values: dict, asked: list[dict], rows: dict, own: bool, longest: int) -> tuple[list[dict], tuple, dict]:
    """Calls for responses, what estimate_sampling takes, and what DPO does with the pairs. In two rounds as well: as
    many prompts as pairs are wanted, then as many as it takes."""
    asking, dpo = values["generate_preferences"], values["dpo"]
    limit, of_each = asking["max_new_tokens"], asking["responses"]
    prompt = statistics.mean(row_length(row) - answer_length(row) for row in asked)
    # What was not tuned on such answers says more than is asked.
    said = spread(len(asked), limit, ANSWERS) if own else [min(limit, answer_length(row)) for row in asked]
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
    from lib.data import evaluation_sets, records
    from lib.model import chat

    samples, seed, batch, most = (forgetting[key] for key in ("samples", "seed", "batch", "max_new_tokens"))
    questions, passes, tokens = [], 0, 0
    for name in evaluation_sets.BY_OPTIONS:
        for row in records.sample_rows(evaluation_sets.load_set(name), samples, seed):
            questions.append(len(chat.prompt_ids(tokenizer, evaluation_sets.question_chat(row))))
            options = tokenizer(evaluation_sets.option_texts(row), add_special_tokens=False)["input_ids"]
            more = max(map(len, options)) - 1  # the first follows from the question, the others are read, all at once
            passes += 1 + bool(more)
            tokens += questions[-1] + len(options) * more
    rows = evaluation_sets.first_turns(forgetting["prompts"], seed)
    chats = [len(chat.prompt_ids(tokenizer, records.message("user", row["turns"][0]))) for row in rows]
    made = {
        "passes": passes,
        "tokens": tokens,
        "prompt_tokens": sum(chats),
        "steps": ceil(len(chats) / batch) * (most - 1),
    }
    return made, {"question": max(questions), "chat": max(chats, default=1)}


# --- make clara ---------------------------------------------------------------------------------------------

SHAPE = ("compress_rate", "doc_max_tokens", "lora_r", "lora_alpha", "lora_targets")
STAGES = ("train_stage1", "train_stage2", "train_stage3")


def compression(plan: Plan, model: dict, tokenizer) -> tuple[dict, dict]:
    """What CLaRa's stages and their evaluation read, and what to time steps on."""
    from dataclasses import replace

    from lib.clara import learning, network, passages
    from lib.model import directory

    values = plan.values
    first, _, third = (values[stage] for stage in STAGES)
    shape = network.ClaraConfig(*(first[key] for key in SHAPE))
    ends = directory.eos_token_ids(directory.open_directory(plan.model))
    table = learning.CandidateTable(tokenizer, replace(shape, k=third["k"]))

    def passage(row, *rebuilt):
        return learning.encode_passage(row, tokenizer, ends, shape, *rebuilt)

    def rebuilt(row):
        return passage(row, first["rebuild"], first["max_length"])

    def documents(row):
        return learning.encode_documents(row, tokenizer, ends, shape)

    def search(row):
        return table.search(passages.limit_documents(row, third["candidates"]), ends)

    work, most, timed, sizes = {}, {}, {"rows": {}, "batches": {}}, bytes_of(plan.model, shape, model["others"])
    encoders = (rebuilt, passage), (documents, documents), (search, search)
    for number, (stage, encode) in enumerate(zip(STAGES, encoders), 1):
        given, started = values[stage], time.perf_counter()
        wanted = given["samples"], given["watched"], given["seed"]
        rows, held_out = passages.load_splits(plan.clara_data, number, *wanted)
        short = 0
        if number == 1:
            rows, short = passages.put_segments_first(rows, given["short_share"], given["short_words"])
        examples, watched = [*map(encode[0], rows)], [*map(encode[1], held_out)]
        timed["rows"][stage] = time.perf_counter() - started
        kept = learning.keep_fitting(examples, given["max_length"])
        learnt, tokens, labels = learning.memory_sizes(shape, kept)
        most[stage] = min(given["batch"], len(kept)), learnt, max(tokens), labels
        before = sum(learning.fits(one, given["max_length"]) for one in examples[:short])
        work[stage], batches = stage_of(stage, kept, watched, given, shape, before)
        work[stage]["bytes"] = sizes[3 if number == 3 else 2]
        for kind in kinds_of(stage):
            timed["batches"][kind] = [(some, matmul_tokens(passes_of(kind, [some], shape), model)) for some in batches]
    pieces, batch = sorted(map(list, table.rows), key=len, reverse=True), third["batch"]
    table_read, read = compressed_in(pieces, batch, shape), work["train_stage3"]["read"]
    work["train_stage3"]["read"] = {key: read[key] + table_read[key] for key in read}
    middle = pieces[max(0, len(pieces) - batch) // 2 :][:batch]
    timed |= {
        "shape": shape,
        "pieces": pieces,
        "read": (middle, matmul_tokens(compressed_in(middle, batch, shape), model)),
    }
    work["evaluation"], longest, timed["documents"] = reading(
        plan.clara_data, values["evaluate_clara"], shape, tokenizer
    )
    return {"clara": work, "most": {"clara": most, "prompt": longest}}, timed


def kinds_of(stage: str) -> list[str]:
    return [kind for kind, one in KINDS.items() if one == stage]


def stage_of(stage: str, kept: list, watched: list, given: dict, shape, before: int) -> tuple[dict, list]:
    """What a stage reads: to learn, the first `before` rows before the others, and where it looks at its watched rows;
    and the batches that it learns from."""
    from lib.clara import learning
    from lib.train import length_groups

    batch, accumulation, updates = given["batch"], given["accumulation"], []
    lengths = [*map(learning.example_length, kept)]
    sampler = length_groups.LengthGroupedBatches(lengths, batch * accumulation, given["seed"], before)
    for epoch in range(ceil(given["epochs"])):
        sampler.set_epoch(epoch)
        passes = split_up([kept[n] for n in sampler], batch)
        updates += split_up(passes, accumulation)
    steps = ceil(given["epochs"] * ceil(ceil(len(kept) / batch) / accumulation))
    *searching, answering = kinds_of(stage)
    first = sum(n < given["contrast"] * steps for n in range(steps)) if searching else 0
    parts = {**dict.fromkeys(searching, updates[:first]), answering: updates[first:steps]}
    learnt = {kind: passes_of(kind, [one for update in some for one in update], shape) for kind, some in parts.items()}
    looks = len({1, steps, *range(given["watch_steps"], steps + 1, given["watch_steps"])})
    seen = [passes_of(kind, [[one] for one in watched], shape) for kind in searching]
    for some in (watched, learning.swap_documents(watched)):
        seen.append(passes_of(answering, split_up(some, batch), shape))
    read = {key: looks * sum(one[key] for one in seen) for key in seen[0]}
    made = {"rows": len(kept), "steps": steps, "looks": looks, "learnt": learnt, "read": read}
    return made, [one for update in updates[:steps] for one in update]


def split_up(some: list, size: int) -> list[list]:
    return [some[at : at + size] for at in range(0, len(some), size)]


def passes_of(kind: str, batches: list[list], shape) -> dict:
    """What is read of examples in batches, padding included: by the compressor or reasoner, and by the generator."""
    tokens = labels = 0
    for some in batches:
        searched = kind in ("searching", "answering")
        texts = [one.asked for one in some] if searched else [piece for one in some for piece in one.pieces]
        tokens += compressed_in(texts, len(texts), shape)["tokens"]
        if kind != "searching":
            tokens += len(some) * max(row_tokens(one, shape) for one in some)
            labels += sum(len(one.weights) for one in some)
    return {"passes": len(batches), "tokens": tokens, "labels": labels}


def compressed_in(texts: list[list[int]], batch: int, shape) -> dict:
    """What compressing reads: texts, and a place for each vector."""
    batches = split_up(texts, batch)
    tokens = sum(len(some) * (max(map(len, some)) + shape.vectors) for some in batches)
    return {"passes": len(batches), "tokens": tokens, "labels": 0}


def row_tokens(one, shape) -> int:
    """What the generator reads of an example: text, vectors, separators."""
    return sum(map(len, one.before)) + shape.vectors * sum(one.counts) + len(one.counts) + len(one.after)


def bytes_of(base: Path, shape, others: int) -> dict:
    """{adapters: bytes of a CLaRa directory that holds so many}."""
    from lib.budget import trace
    from lib.clara import network
    from lib.model import directory

    made = network.Clara(trace.build_meta_model(directory.load_config(directory.open_directory(base)), "fp32"), shape)
    each = sum(4 * p.numel() for name, p in made.named_parameters() if "lora_" in name) // len(network.ADAPTERS)
    beside = sum(tensor.nbytes for tensor in made.state_beside().values())
    return {count: count * each + beside + others for count in (2, 3)}


def reading(data: Path, judge: dict, shape, tokenizer) -> tuple[dict, int, list[str]]:
    """What evaluate_clara.py reads and writes, its longest prompt, and the documents that it searches. For what MiniLM
    and the reasoner find stands what BM25 finds: it is as long."""
    from lib.clara import network, passages
    from lib.data import records, retrieval
    from lib.model import chat

    rows, golds, documents = passages.test_questions(data, judge["samples"], judge["seed"])
    asked = [row.question for row in rows]
    ranked = retrieval.open_retriever("bm25", documents)(asked, judge["k"]).tolist()
    found = [[documents[n] for n in some] for some in ranked]
    pieces = {text: network.split_document(tokenizer, text, shape.doc_max_tokens) for text in documents}

    def cut(text: str) -> str:
        return tokenizer.decode(network.token_ids(tokenizer, text)[: shape.vectors])

    def as_text(question: str, some: list[str]) -> int:
        told = records.message("user", records.question_with_documents(question, some))
        return len(chat.prompt_ids(tokenizer, told))

    def texts(of: list) -> list[int]:
        return [as_text(*one) for one in zip(asked, of)]

    def vectors(of: list) -> list[int]:
        counts = ([len(pieces[text]) for text in some] for some in of)
        return [row_tokens(network.encode_question(tokenizer, *one), shape) for one in zip(asked, counts)]

    longest = as_text(max(asked, key=len), sorted(documents, key=len)[-judge["k"] :])
    right, near = (texts(golds), vectors(golds)), (texts(found), vectors(found))
    cut_short = texts([[*map(cut, some)] for some in golds])
    ways = [texts([[]] * len(rows)), cut_short, vectors(golds[1:] + golds[:1]), *right, *near, *near]
    answers = [min(judge["max_new_tokens"], len(network.token_ids(tokenizer, row.golds[0])) + 1) for row in rows]
    batch, timed = judge["batch"], [prompts[: judge["timed"] + 1] for prompts in (*right, *near)]
    batches = [(prompts, some) for prompts in ways for some in in_batches(prompts, batch)]
    every = sorted((piece for some in pieces.values() for piece in some), key=len, reverse=True)
    compressed = [
        compressed_in(every, batch, shape),
        compressed_in([network.token_ids(tokenizer, f" {one}") for one in asked], batch, shape),
    ]
    return {
        "rows": len(rows), "documents": len(documents), "mean": statistics.mean(answers), "passes": len(batches),
        "padded_tokens": sum(len(some) * max(prompts[n] for n in some) for prompts, some in batches),
        "steps": sum(max(answers[n] for n in some) - 1 for _, some in batches),
        "timed": {"passes": sum(map(len, timed)), "tokens": sum(map(sum, timed))},
        "compressed": {key: sum(one[key] for one in compressed) for key in compressed[0]},
        "characters": sum(map(len, [*documents, *asked])),
    }, longest, documents  # fmt: skip
