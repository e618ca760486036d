"""How fast this machine is: a few steps of each kind, timed.

A rate is {seconds: of one unit (a token, a step, a weight), pass: what a pass takes beside its units, repeats}.
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

# As deep as a model and otherwise next to nothing: what its passes take is what launching them takes.
THIN = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
# Rounding to these is quick; the others can take a minute, and llama.cpp runs them about as fast as Q4_0.
QUICK = ("q4_0", "q4_1", "q5_0", "q8_0", "f16")
# What CLaRa learns from, and its stage: of the third in the first steps it searches alone.
KINDS = {
    "passages": "train_stage1", "questions": "train_stage2", "searching": "train_stage3", "answering": "train_stage3",
}  # fmt: skip
ROWS = 4096  # of a matrix whose rounding is timed: an embedding has ten times as many, all alike


def row_length(row: dict) -> int:
    return len(row["input_ids"])


def answer_length(row: dict) -> int:
    return sum(label != -100 for label in row["labels"])


def padded_tokens(rows: list[dict]) -> int:
    return len(rows) * max(map(row_length, rows))


def matmul_tokens(read: dict, model: dict) -> float:
    """Tokens that take as long as what a pass of CLaRa reads: a label goes through the output matrix as well."""
    return read["tokens"] + read["labels"] * (model["rounded"] / model["matrices"] - 1)


def weight_files(model: Path) -> list[Path]:
    return [*model.glob("*.safetensors"), *model.glob("*.bin")]


def rate(repeats: list[float], beside: float = 0.0) -> dict:
    """Seconds of one unit (a token, a step, a weight …), and what a pass takes beside its units."""
    return {"seconds": statistics.median(repeats), "pass": beside, "repeats": repeats}


def time_work(work: Callable, units: float = 1) -> float:
    """Seconds a unit."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) / units


def pick_evenly(rows: list, size: Callable, wanted: int) -> list:
    """Some of the rows, short and long ones as they are shared out."""
    ordered, wanted = sorted(rows, key=size), min(wanted, len(rows))
    return [ordered[int((n + 0.5) * len(ordered) / wanted)] for n in range(wanted)]


def measure(plan: Plan, rows: dict, threads: int, elsewhere: bool, imports: float) -> dict:
    """The rates of this machine. For a GPU elsewhere, what launching a pass takes, and what stages do on the CPU."""
    with tempfile.TemporaryDirectory(prefix="estimate-") as scratch:
        started, folder = time.perf_counter(), Path(scratch)
        found = measure_in(folder, plan, rows, threads, elsewhere, imports)
    print(f"steps of each kind timed in {duration(time.perf_counter() - started)}")
    return found


def measure_in(folder: Path, plan: Plan, rows: dict, threads: int, elsewhere: bool, imports: float) -> dict:
    from lib.core import compute
    from lib.engines.opening import open_engine
    from lib.gguf import writing
    from lib.model import loading
    from lib.model.directory import open_directory
    from lib.quant import divergence

    values, judge, method, found = plan.values, plan.judge, plan.method, {"rows": rate([rows["loading"]])}
    real = plan.model if weight_files(plan.model) else make_random_model(plan.model, folder / "random", {})
    model = make_random_model(plan.model, folder / "thin", THIN) if elsewhere else real
    room = dict(batch=judge["batch"], threads=threads)
    prompts = sorted((row["input_ids"][: -answer_length(row)] for row in rows["asked"]), key=len)

    # Answers of the base, then with an adapter.
    started = time.perf_counter()
    engine = open_engine(open_directory(model), load="auto" if elsewhere else judge["load"], **room)
    first = time.perf_counter() - started
    found["base"] = time_answers(engine, prompts)
    found |= {"sample": {name: time_drawing(engine.model, *sizes) for name, sizes in rows.get("drawn", {}).items()}}
    started = time.perf_counter()
    engine.model = attach_adapter(engine.model, values["sft"]).eval()
    found["adapter start"] = rate([time.perf_counter() - started])
    found["lora"] = time_answers(engine, prompts)
    engine.close()

    # Certificates and rounding.
    started = time.perf_counter()
    plain = loading.load_model(open_directory(real), "fp32", device="cpu")
    found["load"] = rate([time.perf_counter() - started])
    found["start"] = rate([max(0.0, imports + first - found["load"]["seconds"])])
    if some := rows.get("calibration"):
        found["read on CPU"] = found["read"] = time_reading(plain, some)
    if some and values["quantize"]["calibration_samples"]:
        found |= time_rounding(plain, some, method.removeprefix("gguf-"), values["quantize"]["seed"])
    del plain
    compute.release_memory()
    if some and hardware.device() == "cuda":
        found["read"] = time_reading(loading.load_model(open_directory(real), "fp32"), some)

    # The quantised model, and training. In a process of its own each: memory and threads are as in that script's.
    if some and method.startswith("gguf-"):
        file, quantisation = folder / "model.gguf", timed_quantisation(method)
        try:
            found["write"] = rate([time_work(lambda: writing.write_model(real, file, quantisation))])
        except ValueError as error:
            raise InputError(f"{error}; --method nf4 (make INT4=nf4) does without") from None
        # Beside torch, llama.cpp writes at half its speed: evaluate.py runs it alone, a certificate does not.
        alone = divergence.run_in_fresh_process(time_llamacpp, file, prompts, judge["batch"], threads)
        found["int4"] = alone | time_distributions(file, threads) | {"bytes": file.stat().st_size}
    elif some and not elsewhere:
        engine = open_engine(open_directory(real), load=method, **room)
        found["int4"] = time_answers(engine, prompts)
        engine.close()
    found |= divergence.run_in_fresh_process(time_training, model, values["sft"], rows["passes"], threads)
    if clara := rows.get("clara"):
        found |= time_embedding(clara["documents"])
        if elsewhere:  # of a single row: what it takes is little beside its launching
            clara["batches"] = {
                kind: [(some[:1], n) for some, n in batches] for kind, batches in clara["batches"].items()
            }
            clara["read"] = clara["read"][0][:1], clara["read"][1]
        found["clara"] = divergence.run_in_fresh_process(time_clara, model, values, clara, folder, threads)
        found["clara"]["rows"] = {stage: rate([seconds]) for stage, seconds in clara["rows"].items()}
    return found


def make_random_model(source: Path, folder: Path, smaller: dict) -> Path:
    """A model directory with random weights, of a config's shape but for what is to be smaller."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lib.model import directory

    config = AutoConfig.from_pretrained(source)
    config.update({key: value for key, value in smaller.items() if getattr(config, key, None)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    directory.load_tokenizer(directory.open_directory(source)).save_pretrained(folder)
    return folder


def timed_quantisation(method: str) -> str:
    """The quantisation that is timed in the place of one that is slow to write."""
    quantisation = method.removeprefix("gguf-")
    return quantisation if quantisation in QUICK else "q4_0"


def attach_adapter(model, sft: dict):
    from peft import LoraConfig, get_peft_model

    targets = sft["lora_targets"] if sft["lora_targets"] == "all-linear" else sft["lora_targets"].split(",")
    return get_peft_model(model, LoraConfig(r=sft["lora_r"], target_modules=targets, task_type="CAUSAL_LM"))


def time_answers(engine, prompts: list[list[int]], tokens: int = 5) -> dict:
    """Reading and writing through transformers, of one row and of a batch of rows of like length."""
    found, batch, at = {}, engine.batch, max(0, (len(prompts) - engine.batch) // 2)
    one, many = [prompts[len(prompts) // 2]], (prompts[at : at + batch] * batch)[:batch]
    engine.generate_batch(one, 2, True)  # the first pass takes longer than all others
    for some, end, repeats in ((one, "", 3), (many, " batch", 1)):
        ticks = [engine.generate_batch(some, 1 + tokens, True)[1:] for _ in range(repeats)]
        found[f"read{end}"] = rate([read / len(some) / max(map(len, some)) for read, _ in ticks])
        found[f"step{end}"] = rate([write / tokens for _, write in ticks])
    return found


def time_drawing(model, rows: int, columns: int) -> dict:
    """What a step of lib/engines/batching.py takes with one text of so many tokens, and beside it with each other of
    `rows`."""
    import random

    from lib.budget.memory import CACHE_BLOCK
    from lib.engines import batching

    def steps(count: int, repeats: int = 3) -> list[float]:
        held, randoms = batching.Batch(model, count), [random.Random(n) for n in range(count)]
        held.read([*range(count)], [[1] * columns] * count, 0)
        tokens = [1] * count

        def step():
            nonlocal tokens
            held.step(tokens)
            tokens = batching.draw_tokens(held.logits, randoms, 1.0, 0.95)

        step()  # the first takes longer
        found = [time_work(step) for _ in range(repeats)]
        return [seconds + time_work(partial(held.move, slice(None)), CACHE_BLOCK) for seconds in found]

    alone = statistics.median(steps(1))
    return rate([max(0.0, seconds - alone) / max(1, rows - 1) for seconds in steps(rows)], alone)


def time_reading(model, encoded: list[dict]) -> dict:
    """A token of what certificates read."""
    import torch

    def read(row):
        with torch.inference_mode():
            ids = torch.tensor([row["input_ids"]], device=model.device)
            model(ids, logits_to_keep=answer_length(row) + 1, use_cache=False).logits.float().log_softmax(-1).cpu()

    chosen = pick_evenly(encoded, row_length, 3)
    read(chosen[0])
    return rate([time_work(partial(read, row), row_length(row)) for row in chosen])


def time_rounding(model, encoded: list[dict], quantisation: str, seed: int) -> dict:
    """A token of what is gathered for the rounding, and a weight of the rounding itself."""
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
    each = {}
    for shape in sorted(weights, key=weights.get)[-3:]:  # the shapes that most weights are in
        some, moment = shapes[shape].weight.data[:ROWS], moments[shapes[shape]]
        each[shape] = time_work(
            lambda w=some, h=moment: rounding.round_calibrated(w, h, rounding.LEVELS[quantisation]), some.numel()
        )
    mean = sum(each[shape] * weights[shape] for shape in each) / sum(weights[shape] for shape in each)
    return {"gather": rate(gathering), "round": rate([*each.values()]) | {"seconds": mean}}


def time_llamacpp(file: Path, prompts: list[list[int]], streams: int, threads: int) -> dict:
    """Reading and writing through llama.cpp, of one row and of several at once."""
    started = time.perf_counter()
    from lib.engines.llamacpp import LlamaCpp

    one, short, tokens = prompts[len(prompts) // 2], [prompt[:16] for prompt in (prompts * streams)[:streams]], 24
    engine = LlamaCpp(file, context=len(prompts[-1]) + 64, parallel=streams, threads=threads or None)
    found = {"start": rate([time.perf_counter() - started])}
    engine.generate(short, 2, exact=True)
    alone = [engine.generate([one], tokens, exact=True)[0] for _ in range(3)]
    found["read"] = rate([done.prompt_seconds / len(one) for done in alone])
    found["step"] = rate([done.decode_seconds / (tokens - 1) for done in alone])
    reading = sum(map(len, short)) * found["read"]["seconds"]
    many = [time_work(lambda: engine.generate(short, tokens, exact=True)) - reading for _ in range(2)]
    engine.close()
    return found | {"write": rate([max(0.0, seconds) / streams / tokens for seconds in many])}


def time_distributions(file: Path, threads: int) -> dict:
    """What a certificate asks llama.cpp for, beside torch: whole distributions, and the reading before them."""
    from lib.engines.llamacpp import LlamaCpp
    from lib.quant import divergence

    engine = LlamaCpp(file, parallel=2, threads=threads or None)
    asked = [(engine.prompt_ids(r["prompt"]), engine.answer_ids(r["gold"][0])) for r in divergence.GENERAL[:1]]
    prompt = (asked[0][0] * 8)[:256]
    reading = time_work(lambda: engine.generate([prompt], 1), len(prompt))
    seconds = time_work(lambda: divergence.answer_distributions(engine, asked)) - reading * sum(
        len(ids) for ids, _ in asked
    )
    each = max(0.0, seconds) / sum(len(gold) for _, gold in asked)
    return {"read beside torch": rate([reading]), "distribution": rate([each])}


def time_training(model: Path, sft: dict, passes: list[list[dict]], threads: int) -> dict:
    """A token of a training pass, forward and backward as in sft.py, and an update of the adapter."""
    started = time.perf_counter()
    import torch
    from trl import SFTConfig, SFTTrainer  # noqa: F401
    from trl.trainer.utils import add_fused_lm_head

    from lib.core import compute
    from lib.model import directory, loading
    from lib.train import loop

    found = {"training start": rate([time.perf_counter() - started])}
    compute.use_threads(threads)
    hardware.keep_freed_memory()
    on_cpu = sft["load"] == "auto" and hardware.device() == "cpu"
    base = loading.load_model(directory.open_directory(model), "fp32" if on_cpu else sft["load"])
    loop.project_labels_only()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does
    adapted = attach_adapter(base.train(), sft)
    if on_cpu:
        loading.cast_frozen_linears(adapted, loading.torch_dtype("auto"))
    if sft["gradient_checkpointing"]:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained)

    def forward_and_backward(rows):
        longest = max(map(row_length, rows))
        ids, labels = (
            torch.tensor([row[key] + [fill] * (longest - row_length(row)) for row in rows], device=base.device)
            for key, fill in (("input_ids", 0), ("labels", -100))
        )
        with hardware.autocast():
            loss = adapted(input_ids=ids, labels=labels, fused_lm_head=True).loss
        loss.backward()
        loss.item()  # waits for a GPU

    def update():
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        hardware.return_freed_memory()

    chosen = pick_evenly(passes, padded_tokens, 4)
    forward_and_backward(chosen[0])
    seconds, tokens = [time_work(partial(forward_and_backward, rows)) for rows in chosen], [*map(padded_tokens, chosen)]
    each = rate([s / t for s, t in zip(seconds, tokens)])
    found["train"] = each | {"seconds": sum(seconds) / sum(tokens), "of_a_pass": statistics.median(seconds)}
    return found | {"update": rate([time_work(update)])}


def time_embedding(documents: list[str]) -> dict:
    """Opening MiniLM, and a character that it reads."""
    from lib.data import embedding

    started = time.perf_counter()
    embed = embedding.open_embedding()
    some = sorted(documents, key=len)[max(0, len(documents) - 32) // 2 :][:32]  # a batch of it
    found = {"embedding start": rate([time.perf_counter() - started])}
    embed(some[:1])
    return found | {"embedding": rate([time_work(partial(embed, some), sum(map(len, some)))])}


def time_clara(model: Path, values: dict, timed: dict, folder: Path, threads: int) -> dict:
    """A token of a pass of each kind, forward and backward, by the trainers of CLaRa's stages; an update; a token that
    is compressed; and the beginning of the search."""
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
    given = {stage: Namespace(**values[stage]) for stage in KINDS.values()}
    lm, dtype = learning.load_base(open_directory(model), given["train_stage1"])
    started = time.perf_counter()
    made = network.Clara(lm, timed["shape"])
    found = {"start": rate([imports + time.perf_counter() - started])}
    made.know(timed["pieces"])

    def trainer_of(stage: str, batches: list, **how):
        settings = TrainingArguments(**loop.trainer_settings(given[stage], dtype, SimpleNamespace(path=folder)))
        trainer_class = learning.SearchTrainer if how else learning.ClaraTrainer
        if given[stage].gradient_checkpointing:
            made.activation_checkpointing_enable()
        examples = [one for some, _ in batches for one in some]
        trainer = trainer_class(
            model=made, args=settings, run=None, micro_batch=None, examples=examples, watched=[], watch_steps=1,
            dtype=dtype, **how,
        )  # fmt: skip
        trainer.state.max_steps = 1  # of which `contrast` are to search
        return trainer

    def forward_and_backward(trainer, some: list):
        trainer.rows = len(some)
        with learning.autocast_to(dtype, made):
            loss = trainer.compute_loss(made, {"examples": some}, num_items_in_batch=learning.total_weight(some))
        loss.backward()
        loss.item()  # waits for a GPU

    updates = []

    def time_kind(kind: str, wanted: int, **how) -> dict:
        trainer, seconds = trainer_of(KINDS[kind], timed["batches"][kind], **how), []
        chosen = pick_evenly(timed["batches"][kind], lambda one: one[1], wanted)
        trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained)
        if not updates:
            forward_and_backward(trainer, chosen[0][0][:1])  # the first pass takes longer
            optimiser.step()

        def update():
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            hardware.return_freed_memory()

        for some, _ in chosen:
            seconds.append(time_work(partial(forward_and_backward, trainer, some)))
            updates.append(time_work(update))
        units = [units for _, units in chosen]
        each = rate([s / u for s, u in zip(seconds, units)])
        return each | {"seconds": sum(seconds) / sum(units), "of_a_pass": statistics.median(seconds)}

    made.train_only("compressor", "generator")
    found |= {"passages": time_kind("passages", 2), "questions": time_kind("questions", 1)}
    (pieces, units), read = timed["read"], []
    with learning.autocast_to(dtype, made):
        seconds = [time_work(lambda: read.append(made.compressed(pieces, len(pieces)))) for _ in range(2)]
    found["read"] = rate([s / units for s in seconds]) | {"of_a_pass": statistics.median(seconds)}
    table = read[0][torch.arange(len(timed["pieces"])) % len(pieces)]  # as many as there are
    found["search start"] = rate([time_work(lambda: made.learn_to_search(table))])
    made.train_only("reasoner", "generator")
    how = {"table": table, "temperature": given["train_stage3"].temperature}
    found |= {"searching": time_kind("searching", 1, contrast=1, **how)}
    found |= {"answering": time_kind("answering", 1, contrast=0, **how)}
    return found | {"update": rate(updates)}
