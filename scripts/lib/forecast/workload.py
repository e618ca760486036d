"""Count what the stages of a pipeline will read and write. Texts that do not exist yet have assumed lengths.

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
from lib.forecast.timing import KINDS, answer_length, find_weight_files, matmul_tokens, padded_tokens, row_length

# Texts that do not exist yet: the share that reaches its token limit, and the mean length of the others as a share of
# the limit. Measured with the default model: instructions (limit 128), responses to them (limit 384), answers to the
# prompts of preference pairs (limit 128); see docs/results/align-magpie/run.json.
INSTRUCTIONS, RESPONSES, ANSWERS = (0.14, 0.3), (0.47, 0.54), (0.11, 0.33)
# The share of examples that passed the filter in that run, the share that records.split_by_group gives to training, and
# the share of prompts that gave a pair when reference answers scored the responses.
FIT, TRAIN, PAIRS = 0.86, 0.8, 0.4


def count_work(plan: Plan, tokenizer) -> tuple[dict, dict]:
    """The work in tokens, passes and bytes, and samples to time steps with."""
    from lib.data import records
    from lib.engines import opening
    from lib.model import chat
    from lib.train import length_groups

    started = time.perf_counter()
    splits = {split: records.load_split(plan.data, split) for split in records.SPLITS}
    loading = (time.perf_counter() - started) / len(splits)
    values, evaluation, writes_rows = plan.values, plan.evaluation, plan.writes_rows
    sft, seed = values["sft"], values["sft"]["seed"]
    ends = {tokenizer.eos_token_id}

    def encode_sample(split: str, samples: int) -> list[dict]:
        return [chat.encode_row(tokenizer, row, ends) for row in records.sample_rows(splits[split], samples, seed)]

    candidates = make_placeholder_rows(values, tokenizer) if writes_rows else encode_sample("train", sft["samples"])
    training = [row for row in candidates if row_length(row) <= sft["max_length"]]
    if not training:
        raise InputError(f"{plan.data}: all training examples are longer than --max-length {sft['max_length']}")
    order = list(
        length_groups.LengthGroupedBatches(
            [*map(row_length, training)], sft["batch_size"] * sft["accumulation_steps"], sft["seed"]
        )
    )
    passes = [
        [training[n] for n in order[at : at + sft["batch_size"]]] for at in range(0, len(order), sft["batch_size"])
    ]
    test = encode_sample("test", evaluation["samples"])
    prompts, answers = [row_length(row) - answer_length(row) for row in test], [*map(answer_length, test)]
    questions = records.sample_rows(splits["test"], evaluation["samples"], seed)
    work = {
        "training": {
            "tokens": sum(map(padded_tokens, passes)) * sft["epochs"], "passes": len(passes) * sft["epochs"],
            "rows": len(training), "updates": -(-len(passes) // sft["accumulation_steps"]) * sft["epochs"],
        },
        "model": measure_model(plan.model, sft, plan.method),
        "most": {
            "length": max(map(row_length, training)), "prompt": max(prompts),
            "context": opening.context_for(questions, evaluation["max_new_tokens"]),
        },
    }  # fmt: skip
    samples = {"passes": passes, "test": test, "loading": loading}
    if "evaluate" in values:
        work["evaluation"] = count_evaluation(prompts, answers, evaluation, as_reference=not writes_rows)
    if plan.clara_data:
        counts, samples["clara"] = count_clara(plan, work["model"], tokenizer)
    elif "dpo" in values:
        counts = count_alignment(
            values, test, {split: len(rows) for split, rows in splits.items()}, writes_rows, tokenizer
        )
        samples["sampling"] = {
            kind: (calls[0]["at_once"], calls[0]["columns"]) for kind, calls in counts["sampling"].items()
        }
    else:
        counts, samples["calibration"] = count_quantisation(
            values, encode_sample, splits["validation"], seed, tokenizer
        )
    maxima = {"most": work["most"] | counts.pop("most")}
    return work | counts | maxima, samples


def count_quantisation(
    values: dict, encode_sample, validation: list[dict], seed: int, tokenizer
) -> tuple[dict, list[dict]]:
    """What quantisation and divergence checks read, and examples to time them with."""
    from lib.data import records
    from lib.model import chat
    from lib.quant import divergence

    def count_rows(encoded: list[dict]) -> dict:
        return {
            "rows": len(encoded),
            "tokens": sum(map(row_length, encoded)),
            "answers": sum(map(answer_length, encoded)),
        }

    rounding, ends = values["quantize"], {tokenizer.eos_token_id}
    calibration = encode_sample("train", rounding["calibration_samples"]) if rounding["calibration_samples"] else []
    checked = records.sample_rows(validation, rounding["samples"], seed)
    return {
        "calibration": count_rows(calibration),
        "divergence": count_rows(encode_sample("validation", rounding["samples"])),
        "merge": count_rows(encode_sample("validation", values["merge_lora"]["samples"])),
        "general": count_rows([chat.encode_row(tokenizer, row, ends) for row in divergence.GENERAL]),
        "chats": sum(len(chat.prompt_ids(tokenizer, probe)) for probe in chat.probes(tokenizer)),
        "most": {
            "calibration": max(map(row_length, calibration), default=0),
            "positions": divergence.count_positions(tokenizer, checked),
        },
    }, calibration or encode_sample("train", 3)  # fmt: skip


def count_evaluation(prompts: list[int], answers: list[int], arguments: dict, as_reference: bool = True) -> dict:
    """What evaluate.py reads and writes, from the lengths of prompts and reference answers. With `as_reference`, a
    fine-tuned model's answers are as long as the reference answers."""
    batch, batches = arguments["batch_size"], split_by_length(prompts, arguments["batch_size"])
    streams = (prompts * batch)[:batch]
    work = {
        "rows": len(prompts), "prompt_tokens": sum(prompts), "gold_tokens": sum(answers), "passes": len(batches),
        "padded_tokens": sum(len(group) * max(prompts[n] for n in group) for group in batches),
        "speed": {
            "repeats": arguments["repeats"] + 1, "new_tokens": arguments["speed_tokens"], "streams": batch,
            "prompt_tokens": prompts[0], "batch_tokens": sum(streams), "padded_tokens": batch * max(streams),
        },
    }  # fmt: skip
    limit = arguments["max_new_tokens"]
    for kind, lengths in (
        ("untuned", [limit] * len(answers)),
        ("tuned", [min(limit, answer) if as_reference else limit for answer in answers]),
    ):
        steps = sum(max(lengths[n] for n in group) - 1 for group in batches)
        work[kind] = {"new_tokens": sum(lengths), "mean": statistics.mean(lengths), "steps": steps}
    return work


def split_by_length(prompts: list[int], batch: int) -> list[list[int]]:
    """The indices of the prompts in each batch, from the lengths of the prompts."""
    batches = []
    for start in range(0, len(prompts), 4 * batch):  # like the engines: in chunks of four batches, sorted by length
        order = sorted(range(start, min(start + 4 * batch, len(prompts))), key=lambda n: -prompts[n])
        batches += [order[at : at + batch] for at in range(0, len(order), batch)]
    return batches


def measure_model(model: Path, sft: dict, method: str | None) -> dict:
    """Parameters and bytes of the model, its adapter and its quantised form, from the config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head, targets = meta.get_output_embeddings(), sft["lora_targets"].split(",")
    linear = {name: m for name, m in meta.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    target_modules = [m for name, m in linear.items() if targets == ["all-linear"] or name.split(".")[-1] in targets]
    parameters, matrices = meta.num_parameters(), sum(m.weight.numel() for m in linear.values())
    adapter = sft["lora_r"] * sum(m.in_features + m.out_features for m in target_modules)
    weights = sum(file.stat().st_size for file in find_weight_files(model))
    extras = artifact.content_bytes(model) - weights  # bytes of the configs and the tokenizer
    unquantised = (parameters - matrices) * (2 if hardware.device() == "cuda" else 4)  # bitsandbytes keeps these
    return {
        "parameters": parameters, "matrices": matrices, "rounded": matrices + head.weight.numel(),
        "bytes": (weights or 2 * parameters) + extras, "others": extras, "adapter_bytes": 4 * adapter + extras,
        "int4_bytes": int(matrices * {"int8": 1}.get(method, 0.516) + unquantised) + extras,  # a GGUF is measured
    }  # fmt: skip


# --- make align: texts that do not exist yet ----------------------------------------------------------------


def list_assumptions(plan: Plan) -> list[str]:
    """The assumptions about `make align`, in words."""
    limit_share, mean = RESPONSES
    pairs = f"{PAIRS:.0%} of the prompts give a pair"
    origin = "The default model gave these figures; texts of another model can be half or twice as long."
    not_counted = "Not counted: filtering (seconds), and scoring the responses."
    if not plan.writes_rows:
        assumption = "all examples pass the filter, responses are as long as the reference answers"
        return [f"Assumed: {assumption}, and {pairs}. {origin}", not_counted]
    values = plan.values
    magpie = values["generate_data"]
    instruction, limit = INSTRUCTIONS[1] * magpie["max_instruction_tokens"], magpie["max_response_tokens"]
    answer = ANSWERS[1] * values["generate_preferences"]["max_new_tokens"]
    teacher = ["Responses were timed as if --teacher were as fast as --model."] if magpie.get("teacher") else []
    return [
        f"The texts that the model will write are unknown. Assumed: instructions have {instruction:.0f} tokens; "
        f"{limit_share:.0%} of the responses reach --max-response-tokens {limit} and are dropped, the others have "
        f"{mean * limit:.0f} tokens; {FIT:.0%} of the examples pass the filter; {pairs}, with answers of {answer:.0f} "
        f"tokens. {origin}",
        *teacher,
        not_counted,
    ]


def template_tokens(tokenizer) -> int:
    """The number of tokens that the chat template adds to a question."""
    from lib.data import records
    from lib.model import chat

    return len(chat.prompt_ids(tokenizer, records.message("user", "a"))) - 1


def make_placeholder_rows(values: dict, tokenizer) -> list[dict]:
    """Encoded rows in place of the training examples that Magpie will write: as many, and about as long."""
    magpie = values["generate_data"]
    prompt = template_tokens(tokenizer) + round(INSTRUCTIONS[1] * magpie["max_instruction_tokens"])
    rows = min(values["sft"]["samples"], round(FIT * TRAIN * magpie["samples"]))
    responses = assume_lengths(max(1, rows), magpie["max_response_tokens"], (0, RESPONSES[1]))
    return [{"input_ids": [1] * (prompt + n), "labels": [-100] * prompt + [1] * n} for n in responses]


def assume_lengths(texts: int, limit: int, shares: tuple[float, float]) -> list[int]:
    """Assumed lengths: a share of the texts reaches the limit, the others are spread evenly around their mean."""
    limit_share, mean = shares
    shorter = texts - round(limit_share * texts)
    lengths = [max(1, round(2 * mean * limit * (n + 0.5) / shorter)) for n in range(shorter)]
    lengths += [limit] * (texts - shorter)
    random.Random(0).shuffle(lengths)
    return lengths


def count_sampling(lengths: list[int], prompt: float, prompts: float, batch: int) -> dict:
    """The work of one call of engines/batching.py, where new texts fill the free slots once an eighth of the slots is
    free. The batch starts empty, so its longest text is on average four fifths as long as the longest of all."""
    slots = [0] * min(batch, len(lengths))
    for tokens in lengths:
        heapreplace(slots, slots[0] + tokens)
    at_once, steps = len(slots), max(slots, default=0)
    return {
        "texts": len(lengths), "tokens": sum(lengths) + at_once // 16 * steps, "steps": steps, "at_once": at_once,
        "prompt_tokens": prompts * prompt, "columns": round(prompt + 0.8 * max(lengths, default=0)),
    }  # fmt: skip


def count_alignment(values: dict, test: list[dict], rows: dict[str, int], writes_rows: bool, tokenizer) -> dict:
    """The work of sampling, DPO and the general benchmarks. The encoded `test` examples represent the prompts of the
    pairs, of which each split has as many as `rows` says."""
    calls, sizes, maxima, longest = {}, {}, {}, max(row_length(row) - answer_length(row) for row in test)
    if writes_rows:
        magpie, template = values["generate_data"], template_tokens(tokenizer)
        calls, sizes["magpie"] = count_magpie(magpie, template)
        longest_example = template + magpie["max_instruction_tokens"] + magpie["max_response_tokens"]
        maxima["length"] = min(values["sft"]["max_length"], longest_example)
    calls["preferences"], sizes["preferences"], dpo = count_pairs(values, test, rows, writes_rows, longest)
    forgetting, questions = count_forgetting(values["evaluate_general"], tokenizer)
    maxima |= questions | {"sampling": sizes, "pair": longest + 2 * values["generate_preferences"]["max_new_tokens"]}
    return {"sampling": calls, "dpo": dpo, "forgetting": forgetting, "most": maxima}


def count_magpie(magpie: dict, template: int) -> tuple[dict[str, list], tuple]:
    """Magpie's sampling calls, and the sizes for memory.estimate_sampling. There are two rounds; the second replaces
    responses that reached the limit."""
    instruction, response = magpie["max_instruction_tokens"], magpie["max_response_tokens"]
    batch, samples, calls = magpie["batch_size"], magpie["samples"], {"instructions": [], "responses": []}
    for texts in (samples, ceil(samples / (1 - RESPONSES[0])) - samples):
        instructions = assume_lengths(ceil(texts / (1 - INSTRUCTIONS[0])), instruction, INSTRUCTIONS)
        calls["instructions"].append(count_sampling(instructions, template, 1, batch))
        prompt, responses = template + INSTRUCTIONS[1] * instruction, assume_lengths(texts, response, RESPONSES)
        calls["responses"].append(count_sampling(responses, prompt, texts, batch))
    return calls, (min(batch, samples), min(batch, samples), template + instruction, response)


def count_pairs(
    values: dict, test: list[dict], rows: dict[str, int], writes_rows: bool, longest: int
) -> tuple[list[dict], tuple, dict]:
    """The sampling calls for responses, the sizes for memory.estimate_sampling, and the work of DPO. There are two
    rounds of sampling: first as many prompts as pairs, then as many more as are needed."""
    sampling, dpo = values["generate_preferences"], values["dpo"]
    limit, responses = sampling["max_new_tokens"], sampling["responses"]
    prompt = statistics.mean(row_length(row) - answer_length(row) for row in test)
    # A model that was not trained on the reference answers gives longer ones.
    answers = (
        assume_lengths(len(test), limit, ANSWERS) if writes_rows else [min(limit, answer_length(row)) for row in test]
    )
    pair = prompt + 2 * (ANSWERS[1] * limit if writes_rows else statistics.mean(answers))
    requested, available = (sampling["samples"], sampling["validation_samples"]), (rows["train"], rows["validation"])
    train, held_out = (min(pairs, ceil(PAIRS * prompts)) for pairs, prompts in zip(requested, available))
    round1 = sum(map(min, requested, available))
    round2 = sum(min(ceil(pairs / PAIRS), prompts) for pairs, prompts in zip(requested, available)) - round1
    calls = []
    for texts in (round1 * responses, round2 * responses):
        lengths = [answers[n % len(answers)] for n in range(texts)]
        calls.append(count_sampling(lengths, prompt, texts / responses, sampling["batch_size"]))
    at_once, epochs = min(sampling["batch_size"], round1 * responses), dpo["epochs"]
    return calls, (at_once, ceil(at_once / responses), longest, limit), {
        "tokens": train * pair * epochs, "passes": ceil(train / dpo["batch_size"]) * epochs,
        "updates": ceil(train / (dpo["batch_size"] * dpo["accumulation_steps"])) * epochs,
        "forward_tokens": (train + 2 * held_out) * pair,  # by the reference, and the held-out pairs by the result
    }  # fmt: skip


def count_forgetting(arguments: dict, tokenizer) -> tuple[dict, dict]:
    """What evaluate_general.py reads and writes, and the lengths of its longest texts."""
    from lib.data import evaluation_sets, records
    from lib.model import chat

    samples, seed, batch, limit = (arguments[key] for key in ("samples", "seed", "batch_size", "max_new_tokens"))
    questions, passes, tokens = [], 0, 0
    for name in evaluation_sets.BY_OPTIONS:
        for row in records.sample_rows(evaluation_sets.load_set(name), samples, seed):
            questions.append(len(chat.prompt_ids(tokenizer, evaluation_sets.question_chat(row))))
            options = tokenizer(evaluation_sets.option_texts(row), add_special_tokens=False)["input_ids"]
            remainder = max(map(len, options)) - 1  # the question gives the first token; one more pass reads the others
            passes += 1 + bool(remainder)
            tokens += questions[-1] + len(options) * remainder
    rows = evaluation_sets.first_turns(arguments["prompts"], seed)
    chats = [len(chat.prompt_ids(tokenizer, records.message("user", row["turns"][0]))) for row in rows]
    work = {
        "passes": passes,
        "tokens": tokens,
        "prompt_tokens": sum(chats),
        "steps": ceil(len(chats) / batch) * (limit - 1),
    }
    return work, {"question": max(questions), "chat": max(chats, default=1)}


# --- make clara ---------------------------------------------------------------------------------------------

SHAPE = ("compress_rate", "doc_max_tokens", "lora_r", "lora_alpha", "lora_targets")
STAGES = ("train_stage1", "train_stage2", "train_stage3")


def count_clara(plan: Plan, model: dict, tokenizer) -> tuple[dict, dict]:
    """What CLaRa's stages and their evaluation read, and samples to time steps with."""
    from dataclasses import replace

    from lib.clara import learning, network, passages
    from lib.model import directory

    values = plan.values
    stage1, _, stage3 = (values[stage] for stage in STAGES)
    shape = network.ClaraConfig(*(stage1[key] for key in SHAPE))
    ends = directory.eos_token_ids(directory.open_directory(plan.model))
    table = learning.CandidateTable(tokenizer, replace(shape, k=stage3["k"]))

    def encode_passage(row, *reconstruction):
        return learning.encode_passage(row, tokenizer, ends, shape, *reconstruction)

    def encode_reconstruction(row):
        return encode_passage(row, stage1["reconstruction_weight"], stage1["max_length"])

    def encode_documents(row):
        return learning.encode_documents(row, tokenizer, ends, shape)

    def encode_search(row):
        return table.search(passages.limit_documents(row, stage3["candidates"]), ends)

    work, maxima, samples = {}, {}, {"rows": {}, "batches": {}}
    sizes = estimate_sizes(plan.model, shape, model["others"])
    encoders = (
        (encode_reconstruction, encode_passage), (encode_documents, encode_documents), (encode_search, encode_search),
    )  # fmt: skip
    for number, (stage, (encode, encode_held_out)) in enumerate(zip(STAGES, encoders), 1):
        arguments, started = values[stage], time.perf_counter()
        counts = arguments["samples"], arguments["eval_samples"], arguments["seed"]
        rows, held_out = passages.load_splits(plan.clara_data, number, *counts)
        segment_count = 0
        if number == 1:
            rows, segment_count = passages.put_segments_first(rows, arguments["short_share"], arguments["short_words"])
        examples, validation = [*map(encode, rows)], [*map(encode_held_out, held_out)]
        samples["rows"][stage] = time.perf_counter() - started
        training = learning.keep_fitting(examples, arguments["max_length"])
        adapters, tokens, labels = learning.memory_sizes(shape, training)
        maxima[stage] = min(arguments["batch_size"], len(training)), adapters, max(tokens), labels
        segments = sum(learning.fits(example, arguments["max_length"]) for example in examples[:segment_count])
        work[stage], batches = count_stage(stage, training, validation, arguments, shape, segments)
        work[stage]["bytes"] = sizes[3 if number == 3 else 2]
        for kind in list_kinds(stage):
            samples["batches"][kind] = [
                (batch, matmul_tokens(count_passes(kind, [batch], shape), model)) for batch in batches
            ]
    pieces, batch = sorted(map(list, table.rows), key=len, reverse=True), stage3["batch_size"]
    table_work, validation_work = count_compression(pieces, batch, shape), work["train_stage3"]["read"]
    work["train_stage3"]["read"] = {key: validation_work[key] + table_work[key] for key in validation_work}
    median_pieces = pieces[max(0, len(pieces) - batch) // 2 :][:batch]
    samples |= {
        "shape": shape,
        "pieces": pieces,
        "read": (median_pieces, matmul_tokens(count_compression(median_pieces, batch, shape), model)),
    }
    work["evaluation"], longest, samples["documents"] = count_clara_evaluation(
        plan.clara_data, values["evaluate_clara"], shape, tokenizer
    )
    return {"clara": work, "most": {"clara": maxima, "prompt": longest}}, samples


def list_kinds(stage: str) -> list[str]:
    return [kind for kind, script in KINDS.items() if script == stage]


def count_stage(
    stage: str, training: list, validation: list, arguments: dict, shape, segments: int
) -> tuple[dict, list]:
    """What a stage reads in training and in its validation passes, and its training batches. The first `segments`
    examples are trained before the others."""
    from lib.clara import learning
    from lib.train import length_groups

    batch, accumulation, updates = arguments["batch_size"], arguments["accumulation_steps"], []
    lengths = [*map(learning.example_length, training)]
    sampler = length_groups.LengthGroupedBatches(lengths, batch * accumulation, arguments["seed"], segments)
    for epoch in range(ceil(arguments["epochs"])):
        sampler.set_epoch(epoch)
        passes = split_into_batches([training[n] for n in sampler], batch)
        updates += split_into_batches(passes, accumulation)
    steps = ceil(arguments["epochs"] * ceil(ceil(len(training) / batch) / accumulation))
    *searching, answering = list_kinds(stage)
    retrieval_steps = sum(n < arguments["retrieval_share"] * steps for n in range(steps)) if searching else 0
    parts = {**dict.fromkeys(searching, updates[:retrieval_steps]), answering: updates[retrieval_steps:steps]}
    training_work = {
        kind: count_passes(kind, [batch for update in part for batch in update], shape) for kind, part in parts.items()
    }
    looks = len({1, steps, *range(arguments["eval_steps"], steps + 1, arguments["eval_steps"])})
    counts = [count_passes(kind, [[example] for example in validation], shape) for kind in searching]
    for examples in (validation, learning.swap_documents(validation)):
        counts.append(count_passes(answering, split_into_batches(examples, batch), shape))
    validation_work = {key: looks * sum(part[key] for part in counts) for key in counts[0]}
    work = {"rows": len(training), "steps": steps, "looks": looks, "learnt": training_work, "read": validation_work}
    return work, [batch for update in updates[:steps] for batch in update]


def split_into_batches(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def count_passes(kind: str, batches: list[list], shape) -> dict:
    """What the compressor or the reasoner and then the generator read of batches of examples, padding included."""
    tokens = labels = 0
    for batch in batches:
        searches = kind in ("searching", "answering")
        texts = [row.asked for row in batch] if searches else [piece for row in batch for piece in row.pieces]
        tokens += count_compression(texts, len(texts), shape)["tokens"]
        if kind != "searching":
            tokens += len(batch) * max(count_generator_tokens(row, shape) for row in batch)
            labels += sum(len(row.weights) for row in batch)
    return {"passes": len(batches), "tokens": tokens, "labels": labels}


def count_compression(texts: list[list[int]], batch: int, shape) -> dict:
    """What compression reads: the texts, and one token per vector."""
    batches = split_into_batches(texts, batch)
    tokens = sum(len(group) * (max(map(len, group)) + shape.vectors) for group in batches)
    return {"passes": len(batches), "tokens": tokens, "labels": 0}


def count_generator_tokens(row, shape) -> int:
    """What the generator reads of an example: text, vectors, separators."""
    return sum(map(len, row.before)) + shape.vectors * sum(row.counts) + len(row.counts) + len(row.after)


def estimate_sizes(base: Path, shape, extras: int) -> dict:
    """{number of adapters: bytes of a CLaRa directory with that many}."""
    from lib.budget import trace
    from lib.clara import network
    from lib.model import directory

    clara = network.Clara(trace.build_meta_model(directory.load_config(directory.open_directory(base)), "fp32"), shape)
    adapter = sum(4 * p.numel() for name, p in clara.named_parameters() if "lora_" in name) // len(network.ADAPTERS)
    shared_bytes = sum(tensor.nbytes for tensor in clara.state_beside().values()) + extras
    return {count: count * adapter + shared_bytes for count in (2, 3)}


def count_clara_evaluation(data: Path, arguments: dict, shape, tokenizer) -> tuple[dict, int, list[str]]:
    """What evaluate_clara.py reads and writes, its longest prompt, and the documents that it searches. Documents found
    by MiniLM and the reasoner are assumed to be as long as those found by BM25."""
    from lib.clara import network, passages
    from lib.data import records, retrieval
    from lib.model import chat

    rows, golds, documents = passages.test_questions(data, arguments["samples"], arguments["seed"])
    questions = [row.question for row in rows]
    ranked = retrieval.open_retriever("bm25", documents)(questions, arguments["k"]).tolist()
    hits = [[documents[n] for n in indices] for indices in ranked]
    pieces = {text: network.split_document(tokenizer, text, shape.doc_max_tokens) for text in documents}

    def cut(text: str) -> str:
        return tokenizer.decode(network.token_ids(tokenizer, text)[: len(pieces[text]) * shape.vectors])

    def count_text(question: str, texts: list[str]) -> int:
        message = records.message("user", records.question_with_documents(question, texts))
        return len(chat.prompt_ids(tokenizer, message))

    def text_lengths(documents: list[list[str]]) -> list[int]:
        return [count_text(*pair) for pair in zip(questions, documents)]

    def vector_lengths(documents: list[list[str]]) -> list[int]:
        counts = ([len(pieces[text]) for text in texts] for texts in documents)
        prompts = (network.encode_question(tokenizer, *pair) for pair in zip(questions, counts))
        return [count_generator_tokens(prompt, shape) for prompt in prompts]

    longest = count_text(max(questions, key=len), sorted(documents, key=len)[-arguments["k"] :])
    with_golds, with_hits = (text_lengths(golds), vector_lengths(golds)), (text_lengths(hits), vector_lengths(hits))
    truncated, bare = text_lengths([[*map(cut, texts)] for texts in golds]), text_lengths([[]] * len(rows))
    settings = [bare, truncated, vector_lengths(golds[1:] + golds[:1]), *with_golds, *with_hits, *with_hits]
    answers = [min(arguments["max_new_tokens"], len(network.token_ids(tokenizer, row.golds[0])) + 1) for row in rows]
    batch, timed = arguments["batch_size"], [prompts[: arguments["timed"] + 1] for prompts in (*with_golds, *with_hits)]
    batches = [(prompts, group) for prompts in settings for group in split_by_length(prompts, batch)]
    longest_first = sorted((piece for group in pieces.values() for piece in group), key=len, reverse=True)
    compressions = [
        count_compression(longest_first, batch, shape),
        count_compression([network.token_ids(tokenizer, f" {question}") for question in questions], batch, shape),
    ]
    return {
        "rows": len(rows), "documents": len(documents), "mean": statistics.mean(answers), "passes": len(batches),
        "padded_tokens": sum(len(group) * max(prompts[n] for n in group) for prompts, group in batches),
        "steps": sum(max(answers[n] for n in group) - 1 for _, group in batches),
        "timed": {"passes": sum(map(len, timed)), "tokens": sum(map(sum, timed))},
        "compressed": {key: sum(part[key] for part in compressions) for key in compressions[0]},
        "characters": sum(map(len, [*documents, *questions])),
    }, longest, documents  # fmt: skip
