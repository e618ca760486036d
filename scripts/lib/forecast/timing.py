"""Measure how fast this machine is, by timing a few steps of each kind.

A rate is {seconds: per unit (a token, a step, a weight), pass: fixed seconds per pass, repeats: the measurements}.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.core import hardware
from lib.core.cli import InputError
from lib.core.wording import duration
from lib.forecast.plan import Plan

# A model as deep as the real one, but tiny in every other dimension: the time of its passes is the time to launch them.
THIN = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
# Quantising to these is quick. The others can take a minute, and llama.cpp runs them about as fast as Q4_0.
QUICK = ("q4_0", "q4_1", "q5_0", "q8_0", "f16")
# What CLaRa is trained on, and in which stage. The first steps of stage 3 train retrieval only.
KINDS = {
    "passages": "train_stage1", "questions": "train_stage2", "searching": "train_stage3", "answering": "train_stage3",
}  # fmt: skip
ROWS = 4096  # rows of a matrix whose quantisation is timed; an embedding has ten times as many of the same kind


def row_length(row: dict) -> int:
    return len(row["input_ids"])


def answer_length(row: dict) -> int:
    return sum(label != -100 for label in row["labels"])


def padded_tokens(rows: list[dict]) -> int:
    return len(rows) * max(map(row_length, rows))


def matmul_tokens(work: dict, model: dict) -> float:
    """The matrix multiplications of a pass of CLaRa, in tokens. A label also goes through the LM head."""
    return work["tokens"] + work["labels"] * (model["rounded"] / model["matrices"] - 1)


def find_weight_files(model: Path) -> list[Path]:
    return [*model.glob("*.safetensors"), *model.glob("*.bin")]


def make_rate(repeats: list[float], per_pass: float = 0.0) -> dict:
    """Seconds per unit (a token, a step, a weight …), and fixed seconds per pass."""
    return {"seconds": statistics.median(repeats), "pass": per_pass, "repeats": repeats}


def time_work(work: Callable, units: float = 1) -> float:
    """Seconds per unit."""
    hardware.synchronise()
    started = time.perf_counter()
    work()
    hardware.synchronise()
    return (time.perf_counter() - started) / units


def pick_evenly(rows: list, size: Callable, count: int) -> list:
    """A few of the rows, at evenly spaced quantiles of their size."""
    ordered, count = sorted(rows, key=size), min(count, len(rows))
    return [ordered[int((n + 0.5) * len(ordered) / count)] for n in range(count)]


def measure(plan: Plan, samples: dict, threads: int, elsewhere: bool, imports: float) -> dict:
    """The rates of this machine. For a GPU elsewhere: the time to launch a pass, and the rates of work on the CPU."""
    with tempfile.TemporaryDirectory(prefix="estimate-") as scratch:
        started, folder = time.perf_counter(), Path(scratch)
        rates = measure_in(folder, plan, samples, threads, elsewhere, imports)
    print(f"timing a few steps of each kind took {duration(time.perf_counter() - started)}")
    return rates


def measure_in(folder: Path, plan: Plan, samples: dict, threads: int, elsewhere: bool, imports: float) -> dict:
    from lib.core import compute
    from lib.engines.opening import open_engine
    from lib.gguf import writing
    from lib.model import loading
    from lib.model.directory import open_directory
    from lib.quant import divergence

    values, evaluation, method = plan.values, plan.evaluation, plan.method
    rates = {"rows": make_rate([samples["loading"]])}
    real = plan.model if find_weight_files(plan.model) else make_random_model(plan.model, folder / "random", {})
    model = make_random_model(plan.model, folder / "thin", THIN) if elsewhere else real
    settings = dict(batch=evaluation["batch_size"], threads=threads)
    prompts = sorted((row["input_ids"][: -answer_length(row)] for row in samples["test"]), key=len)

    # Answers of the base, then with an adapter.
    started = time.perf_counter()
    engine = open_engine(open_directory(model), load="auto" if elsewhere else evaluation["precision"], **settings)
    open_seconds = time.perf_counter() - started
    rates["base"] = time_answers(engine, prompts)
    sampling = samples.get("sampling", {})
    rates["sample"] = {kind: time_sampling(engine.model, *sampling[kind]) for kind in sampling}
    started = time.perf_counter()
    engine.model = attach_adapter(engine.model, values["sft"]).eval()
    rates["adapter start"] = make_rate([time.perf_counter() - started])
    rates["lora"] = time_answers(engine, prompts)
    engine.close()

    # Divergence checks and quantisation.
    started = time.perf_counter()
    reference = loading.load_model(open_directory(real), "fp32", device="cpu")
    rates["load"] = make_rate([time.perf_counter() - started])
    rates["start"] = make_rate([max(0.0, imports + open_seconds - rates["load"]["seconds"])])
    if calibration := samples.get("calibration"):
        rates["read on CPU"] = rates["read"] = time_reading(reference, calibration)
    if calibration and values["quantize"]["calibration_samples"]:
        rates |= time_quantising(reference, calibration, method.removeprefix("gguf-"), values["quantize"]["seed"])
    del reference
    compute.release_memory()
    if calibration and hardware.device() == "cuda":
        rates["read"] = time_reading(loading.load_model(open_directory(real), "fp32"), calibration)

    # The quantised model, and training. Each runs in its own process, with memory and threads as in its script.
    if calibration and method.startswith("gguf-"):
        file, quantisation = folder / "model.gguf", choose_timed_quantisation(method)
        try:
            rates["write"] = make_rate([time_work(lambda: writing.write_model(real, file, quantisation))])
        except ValueError as error:
            raise InputError(f"{error}; --method nf4 (make QUANT=nf4) needs no GGUF") from None
        # With torch in the same process, llama.cpp generates at half its speed. A divergence check loads both,
        # evaluate.py does not.
        llama_rates = divergence.run_in_fresh_process(time_llamacpp, file, prompts, evaluation["batch_size"], threads)
        rates["int4"] = llama_rates | time_distributions(file, threads) | {"bytes": file.stat().st_size}
    elif calibration and not elsewhere:
        engine = open_engine(open_directory(real), load=method, **settings)
        rates["int4"] = time_answers(engine, prompts)
        engine.close()
    rates |= divergence.run_in_fresh_process(time_training, model, values["sft"], samples["passes"], threads)
    if clara := samples.get("clara"):
        rates |= time_embedding(clara["documents"])
        if elsewhere:  # a single example, so that the time to launch the pass dominates
            clara["batches"] = {
                kind: [(batch[:1], n) for batch, n in batches] for kind, batches in clara["batches"].items()
            }
            clara["read"] = clara["read"][0][:1], clara["read"][1]
        rates["clara"] = divergence.run_in_fresh_process(time_clara, model, values, clara, folder, threads)
        rates["clara"]["rows"] = {stage: make_rate([seconds]) for stage, seconds in clara["rows"].items()}
    return rates


def make_random_model(source: Path, folder: Path, overrides: dict) -> Path:
    """A model directory with random weights and the config of `source`, except for the values in `overrides`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lib.model import directory

    config = AutoConfig.from_pretrained(source)
    config.update({key: value for key, value in overrides.items() if getattr(config, key, None)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    directory.load_tokenizer(directory.open_directory(source)).save_pretrained(folder)
    return folder


def choose_timed_quantisation(method: str) -> str:
    """The quantisation to time: a quick one instead of one that is slow to write."""
    quantisation = method.removeprefix("gguf-")
    return quantisation if quantisation in QUICK else "q4_0"


def attach_adapter(model, sft: dict):
    from peft import LoraConfig, get_peft_model

    targets = sft["lora_targets"] if sft["lora_targets"] == "all-linear" else sft["lora_targets"].split(",")
    return get_peft_model(model, LoraConfig(r=sft["lora_r"], target_modules=targets, task_type="CAUSAL_LM"))


def time_answers(engine, prompts: list[list[int]], tokens: int = 5) -> dict:
    """Prefill and decoding with transformers: of one prompt, and of a batch of prompts of similar length."""
    rates, batch, start = {}, engine.batch, max(0, (len(prompts) - engine.batch) // 2)
    single, prompt_batch = [prompts[len(prompts) // 2]], (prompts[start : start + batch] * batch)[:batch]
    engine.generate_batch(single, 2, True)  # the first pass takes longer than all others
    for group, suffix, repeats in ((single, "", 3), (prompt_batch, " batch", 1)):
        ticks = [engine.generate_batch(group, 1 + tokens, True)[1:] for _ in range(repeats)]
        rates[f"read{suffix}"] = make_rate([prefill / len(group) / max(map(len, group)) for prefill, _ in ticks])
        rates[f"step{suffix}"] = make_rate([decode / tokens for _, decode in ticks])
    return rates


def time_sampling(model, rows: int, columns: int) -> dict:
    """A step of lib/engines/batching.py with one text of `columns` tokens (`pass`), and the additional time for each
    of the other `rows` (`seconds`)."""
    import random

    from lib.budget.memory import CACHE_BLOCK
    from lib.engines import batching

    def steps(count: int, repeats: int = 3) -> list[float]:
        batch, randoms = batching.Batch(model, count), [random.Random(n) for n in range(count)]
        batch.read([*range(count)], [[1] * columns] * count, 0)
        tokens = [1] * count

        def step():
            nonlocal tokens
            batch.step(tokens)
            tokens = batching.draw_tokens(batch.logits, randoms, 1.0, 0.95)

        step()  # the first step takes longer
        times = [time_work(step) for _ in range(repeats)]
        return [seconds + time_work(partial(batch.move, slice(None)), CACHE_BLOCK) for seconds in times]

    single_seconds = statistics.median(steps(1))
    return make_rate([max(0.0, seconds - single_seconds) / max(1, rows - 1) for seconds in steps(rows)], single_seconds)


def time_reading(model, encoded: list[dict]) -> dict:
    """Seconds per token of a divergence check."""
    import torch

    def read(row):
        with torch.inference_mode():
            ids = torch.tensor([row["input_ids"]], device=model.device)
            model(ids, logits_to_keep=answer_length(row) + 1, use_cache=False).logits.float().log_softmax(-1).cpu()

    rows = pick_evenly(encoded, row_length, 3)
    read(rows[0])
    return make_rate([time_work(partial(read, row), row_length(row)) for row in rows])


def time_quantising(model, encoded: list[dict], quantisation: str, seed: int) -> dict:
    """Seconds per token of gathering calibration statistics, and per weight of calibrated quantisation."""
    import torch

    from lib.quant import rounding

    head, moments = model.get_output_embeddings(), {}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]

    def gather(row):
        moments.update(rounding.second_moments(model, head, layers, [row], seed))

    gathering = [time_work(partial(gather, row), row_length(row)) for row in pick_evenly(encoded, row_length, 2)]
    shapes = {tuple(layer.weight.shape): layer for layer in [*layers, head]}
    weights = dict.fromkeys(shapes, 0)
    for layer in [*layers, head]:
        weights[tuple(layer.weight.shape)] += layer.weight.numel()
    seconds = {}
    for shape in sorted(weights, key=weights.get)[-3:]:  # the shapes with the most weights
        matrix, moment = shapes[shape].weight.data[:ROWS], moments[shapes[shape]]
        seconds[shape] = time_work(
            lambda w=matrix, h=moment: rounding.round_calibrated(w, h, rounding.LEVELS[quantisation]), matrix.numel()
        )
    mean = sum(seconds[shape] * weights[shape] for shape in seconds) / sum(weights[shape] for shape in seconds)
    return {"gather": make_rate(gathering), "round": make_rate([*seconds.values()]) | {"seconds": mean}}


def time_llamacpp(file: Path, prompts: list[list[int]], streams: int, threads: int) -> dict:
    """Prefill and decoding with llama.cpp, of one prompt and of several at once."""
    started = time.perf_counter()
    from lib.engines.llamacpp import LlamaCpp

    prompt, short_prompts, tokens = prompts[len(prompts) // 2], [ids[:16] for ids in (prompts * streams)[:streams]], 24
    engine = LlamaCpp(file, context=len(prompts[-1]) + 64, parallel=streams, threads=threads or None)
    rates = {"start": make_rate([time.perf_counter() - started])}
    engine.generate(short_prompts, 2, exact=True)
    answers = [engine.generate([prompt], tokens, exact=True)[0] for _ in range(3)]
    rates["read"] = make_rate([answer.prompt_seconds / len(prompt) for answer in answers])
    rates["step"] = make_rate([answer.decode_seconds / (tokens - 1) for answer in answers])
    prefill = sum(map(len, short_prompts)) * rates["read"]["seconds"]
    decode_seconds = [time_work(lambda: engine.generate(short_prompts, tokens, exact=True)) - prefill for _ in range(2)]
    engine.close()
    return rates | {"write": make_rate([max(0.0, seconds) / streams / tokens for seconds in decode_seconds])}


def time_distributions(file: Path, threads: int) -> dict:
    """llama.cpp in a divergence check, in one process with torch: prefill, and full token distributions."""
    from lib.engines.llamacpp import LlamaCpp
    from lib.quant import divergence

    engine = LlamaCpp(file, parallel=2, threads=threads or None)
    pairs = [(engine.prompt_ids(r["prompt"]), engine.answer_ids(r["gold"][0])) for r in divergence.GENERAL[:1]]
    prompt = (pairs[0][0] * 8)[:256]
    prefill = time_work(lambda: engine.generate([prompt], 1), len(prompt))
    seconds = time_work(lambda: divergence.answer_distributions(engine, pairs))
    seconds = max(0.0, seconds - prefill * sum(len(ids) for ids, _ in pairs))
    per_token = seconds / sum(len(answer) for _, answer in pairs)
    return {"read beside torch": make_rate([prefill]), "distribution": make_rate([per_token])}


def time_training(model: Path, sft: dict, passes: list[list[dict]], threads: int) -> dict:
    """Seconds per token of a training pass (forward and backward, as in sft.py), and per update of the adapter."""
    started = time.perf_counter()
    import torch
    from trl import SFTConfig, SFTTrainer  # noqa: F401
    from trl.trainer.utils import add_fused_lm_head

    from lib.core import compute
    from lib.model import directory, loading
    from lib.train import loop

    rates = {"training start": make_rate([time.perf_counter() - started])}
    compute.use_threads(threads)
    hardware.keep_freed_memory()
    on_cpu = sft["precision"] == "auto" and hardware.device() == "cpu"
    base = loading.load_model(directory.open_directory(model), "fp32" if on_cpu else sft["precision"])
    loop.project_labels_only()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    lora_model = attach_adapter(base.train(), sft)
    if on_cpu:
        loading.cast_frozen_linears(lora_model, loading.torch_dtype("auto"))
    if sft["gradient_checkpointing"]:
        lora_model.enable_input_require_grads()
        lora_model.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = [parameter for parameter in lora_model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable)

    def forward_and_backward(rows):
        longest = max(map(row_length, rows))
        ids, labels = (
            torch.tensor([row[key] + [fill] * (longest - row_length(row)) for row in rows], device=base.device)
            for key, fill in (("input_ids", 0), ("labels", -100))
        )
        with hardware.autocast():
            loss = lora_model(input_ids=ids, labels=labels, fused_lm_head=True).loss
        loss.backward()
        loss.item()  # waits for a GPU

    def update():
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        hardware.return_freed_memory()

    batches = pick_evenly(passes, padded_tokens, 4)
    forward_and_backward(batches[0])
    seconds = [time_work(partial(forward_and_backward, batch)) for batch in batches]
    tokens = [*map(padded_tokens, batches)]
    per_token = make_rate([s / t for s, t in zip(seconds, tokens)])
    rates["train"] = per_token | {"seconds": sum(seconds) / sum(tokens), "of_a_pass": statistics.median(seconds)}
    return rates | {"update": make_rate([time_work(update)])}


def time_embedding(documents: list[str]) -> dict:
    """Seconds to load MiniLM, and per character that it embeds."""
    from lib.data import embedding

    started = time.perf_counter()
    embed = embedding.open_embedding()
    batch = sorted(documents, key=len)[max(0, len(documents) - 32) // 2 :][:32]
    rates = {"embedding start": make_rate([time.perf_counter() - started])}
    embed(batch[:1])
    return rates | {"embedding": make_rate([time_work(partial(embed, batch), sum(map(len, batch)))])}


def time_clara(model: Path, values: dict, samples: dict, folder: Path, threads: int) -> dict:
    """Rates of CLaRa's trainers: seconds per token of a training pass of each kind, per update, per compressed token,
    and to start the search."""
    from argparse import Namespace
    from types import SimpleNamespace

    started = time.perf_counter()
    import torch
    from transformers import TrainingArguments

    from lib.clara import learning, network
    from lib.core import compute
    from lib.model.directory import open_directory
    from lib.train import loop

    imports = time.perf_counter() - started
    compute.use_threads(threads)
    hardware.keep_freed_memory()
    arguments = {stage: Namespace(**values[stage]) for stage in KINDS.values()}
    lm, dtype = learning.load_base(open_directory(model), arguments["train_stage1"])
    started = time.perf_counter()
    clara = network.Clara(lm, samples["shape"])
    rates = {"start": make_rate([imports + time.perf_counter() - started])}
    clara.know(samples["pieces"])

    def make_trainer(stage: str, batches: list, **options):
        settings = TrainingArguments(**loop.trainer_settings(arguments[stage], dtype, SimpleNamespace(path=folder)))
        trainer_class = learning.SearchTrainer if options else learning.ClaraTrainer
        if arguments[stage].gradient_checkpointing:
            clara.activation_checkpointing_enable()
        examples = [example for batch, _ in batches for example in batch]
        trainer = trainer_class(
            model=clara, args=settings, run=None, micro_batch=None, examples=examples, watched=[], eval_steps=1,
            dtype=dtype, **options,
        )  # fmt: skip
        trainer.state.max_steps = 1  # with a retrieval share of 1, this step trains retrieval only
        return trainer

    def forward_and_backward(trainer, batch: list):
        trainer.rows = len(batch)
        with learning.autocast_to(dtype, clara):
            loss = trainer.compute_loss(clara, {"examples": batch}, num_items_in_batch=learning.total_weight(batch))
        loss.backward()
        loss.item()  # waits for a GPU

    updates = []

    def time_kind(kind: str, count: int, **options) -> dict:
        trainer, seconds = make_trainer(KINDS[kind], samples["batches"][kind], **options), []
        batches = pick_evenly(samples["batches"][kind], lambda batch: batch[1], count)
        trainable = [parameter for parameter in clara.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trainable)
        if not updates:
            forward_and_backward(trainer, batches[0][0][:1])  # the first pass takes longer
            optimiser.step()

        def update():
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            hardware.return_freed_memory()

        for batch, _ in batches:
            seconds.append(time_work(partial(forward_and_backward, trainer, batch)))
            updates.append(time_work(update))
        tokens = [count for _, count in batches]
        per_token = make_rate([s / t for s, t in zip(seconds, tokens)])
        return per_token | {"seconds": sum(seconds) / sum(tokens), "of_a_pass": statistics.median(seconds)}

    clara.train_only("compressor", "generator")
    rates |= {"passages": time_kind("passages", 2), "questions": time_kind("questions", 1)}
    (pieces, tokens), vectors = samples["read"], []
    with learning.autocast_to(dtype, clara):
        seconds = [time_work(lambda: vectors.append(clara.compressed(pieces, len(pieces)))) for _ in range(2)]
    rates["read"] = make_rate([s / tokens for s in seconds]) | {"of_a_pass": statistics.median(seconds)}
    table = vectors[0][torch.arange(len(samples["pieces"])) % len(pieces)]  # a full-size table of repeated vectors
    rates["search start"] = make_rate([time_work(lambda: clara.learn_to_search(table))])
    clara.train_only("reasoner", "generator")
    options = {"table": table, "temperature": arguments["train_stage3"].temperature}
    rates |= {"searching": time_kind("searching", 1, retrieval_share=1, **options)}
    rates |= {"answering": time_kind("answering", 1, retrieval_share=0, **options)}
    return rates | {"update": make_rate(updates)}
