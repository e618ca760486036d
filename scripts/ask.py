"""Ask a model a question, with or without documents.

    python scripts/ask.py --model models/smollm2-135m-lora --question "Which is its capital?" --documents peru.txt
    python scripts/ask.py --model models/smollm2-135m-clara --documents notes/ --index data/notes-index
    python scripts/ask.py --model models/smollm2-135m-clara --question "Who signed it?" --index data/notes-index

Takes a model directory of any kind. Documents are text files, a directory of text files, or JSONL with a field `text`.
A model from the train_stage scripts can read documents in three ways. `text` puts their text into the prompt.
`compressed` puts vectors into the prompt instead. `retrieve` searches an index and reads the compressed chunks that
match the question. An index is built from --documents once and kept; it works with one model only.
The answer goes to standard output, everything else to standard error. --json prints one JSON object.
"""

import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.cli import InputError
from lib.model import directory, loading
from lib.model.directory import ModelDirectory

TEXTS = (".txt", ".md", ".rst", ".text")


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="model directory of any kind")
    files.add_argument("--base", type=Path, help="base model directory (default: as recorded in the model)")
    files.add_argument("--question", help="question to ask (default: none; only the index is built)")
    files.add_argument(
        "--documents", type=Path,
        help="text file, directory of text files, or JSONL with a field `text` (default: none)",
    )  # fmt: skip
    files.add_argument("--index", type=Path, help="index to search; built from --documents if given (default: none)")
    options = parser.add_argument_group("options")
    options.add_argument(
        "--mode", choices=["auto", "text", "compressed", "retrieve"], default="auto",
        help="way to read documents; auto: retrieve with an index, else compressed if the model can, else text",
    )  # fmt: skip
    options.add_argument(
        "--k", type=cli.integer(1), help="retrieved chunks to read (default: as recorded in the model)"
    )
    options.add_argument("--max-new-tokens", type=cli.integer(1), help="maximum tokens per answer")
    options.add_argument("--batch-size", type=cli.integer(1), help="chunks per forward pass of the compressor")
    options.add_argument(
        "--json", action=cli.OnOff, default=False, help="print answer, sources and timings as one JSON object"
    )
    loading.add_load_flags(options)
    return parser


def main(args):
    # --- check the inputs before a model is loaded ----------------------------------------------------
    from lib.clara import network

    compresses = network.is_clara(args.model)
    mode = args.mode if args.mode != "auto" else "retrieve" if args.index else "compressed" if compresses else "text"
    indexed = args.documents if mode == "retrieve" and args.documents and args.documents.exists() else None
    inputs = artifact.identify_inputs({"documents": indexed, "model": args.model})
    check_flags(args, mode, compresses)
    documents = read_documents(args.documents) if args.documents else {}

    # --- read and answer --------------------------------------------------------------------------------
    model = network.open_base(args.model, args.base) if compresses else directory.open_directory(args.model, args.base)
    with redirect_stdout(sys.stderr):
        check_memory(model, args, mode, compresses, documents)
    engine = open_model(model, args, compresses, documents)
    started = time.perf_counter()
    sources, prompt = read_sources(args, mode, engine, documents, inputs)
    if not args.question:
        print(args.index)
        return
    preparation = time.perf_counter() - started
    check_context(args, len(prompt), model)
    with redirect_stdout(sys.stderr):
        engine.reserve_context(len(prompt) + args.max_new_tokens, "documents and question")
    answer = engine.generate([prompt], args.max_new_tokens)[0]
    engine.close()

    # --- print ----------------------------------------------------------------------------------------------
    reply = {
        "answer": answer.text.strip(), "question": args.question, "mode": mode, "sources": sources,
        "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens, "stopped": answer.stopped,
        "preparing_seconds": round(preparation, 3), "first_token_seconds": round(answer.prompt_seconds, 3),
    }  # fmt: skip
    if args.json:
        print(json.dumps(reply, ensure_ascii=False))
        return
    for source in sources:
        print(f"source: {source['document']}: {source['text'][:80]!r}", file=sys.stderr)
    cut = "" if answer.stopped else "; answer truncated at --max-new-tokens"
    print(
        f"prompt of {answer.prompt_tokens} tokens and vectors; preparation {preparation:.2f} s, first token after "
        f"{answer.prompt_seconds:.2f} s{cut}",
        file=sys.stderr,
    )
    print(reply["answer"])


def check_flags(args, mode: str, compresses: bool) -> None:
    """Raises InputError if flags do not go together."""
    from lib.clara import network

    if args.question is not None and not args.question.strip():
        raise InputError("--question: is empty")
    if mode != "text" and not compresses:
        raise InputError(
            f"{args.model}: cannot compress documents; --mode {mode} needs a model from train_stage1.py or a later "
            "stage. --mode text works with every model"
        )
    if mode == "retrieve" and not args.index:
        raise InputError("--mode retrieve: needs --index; if it does not exist, it is built from --documents")
    if mode != "retrieve" and args.index:
        raise InputError(f"--index: works only with --mode retrieve, not with {mode}")
    if mode == "compressed" and not args.documents:
        raise InputError("--mode compressed: needs --documents")
    if not args.question and mode != "retrieve":
        raise InputError("--question: is missing; only --documents with --index, which build an index, work without it")
    if mode == "retrieve" and not network.has_reasoner(args.model):
        raise InputError(
            f"{args.model}: has not learnt to retrieve; --mode retrieve needs a model from train_stage3.py"
        )


def read_documents(path: Path) -> dict[str, str]:
    """The text of each document by its path, in JSONL also its line."""
    from lib.data import records

    if not path.exists():
        raise InputError(f"{path} does not exist")
    suffixes = (*TEXTS, ".jsonl")
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in suffixes)
    )
    texts = {}

    def parse(n: int, place, row, notes) -> tuple:
        records.check_object(row)
        notes.update(f"rows whose field {key!r} is not used" for key in row.keys() - {"id", "text"})
        return place, records.read_text(row, "text")

    for file in files:
        if file.suffix.lower() == ".jsonl":
            rows = records.parse_stream(records.raw_rows(file), parse, file, "a field `text`")
            texts |= {str(place): text for place, text in rows}
            continue
        try:
            texts[str(file)] = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file}: is not UTF-8 text (byte {error.start}); convert the file or leave it out"
            ) from None
    texts = {name: text for name, text in texts.items() if text.strip()}
    if not texts:
        raise InputError(f"{path}: contains no text; expected files that end in {', '.join(TEXTS)} or .jsonl")
    return texts


def check_memory(model: ModelDirectory, args, mode: str, compresses: bool, documents: dict[str, str]) -> None:
    """Print the memory that reading and answering will take. Raises OutOfMemory if there is clearly less."""
    from lib.budget import memory
    from lib.clara import network
    from lib.data import records
    from lib.engines import opening

    text = records.question_with_documents(args.question or "", [*documents.values()])
    shape = network.read_config(args.model) if compresses else None
    if mode == "text":
        messages = records.message("user", text)
        rows, prompt = 1, opening.longest_prompt(model, [messages])
        context = opening.context_for([{"prompt": messages}], args.max_new_tokens)
    else:
        rows, prompt, context = args.batch_size, shape.doc_max_tokens + shape.vectors, 0

    def need(config, adapter, how, batch, new):
        if compresses:
            adapter = {"r": len(network.ADAPTERS) * shape.lora_r, "target_modules": shape.targets}
        return memory.estimate_answering(config, adapter, how, min(batch, rows), prompt, new)

    opening.check_memory(model, args, need, context, args.max_new_tokens)


def open_model(model: ModelDirectory, args, compresses: bool, documents: dict[str, str]):
    """The engine of the model, or of CLaRa on it, with room for all documents if it reads them as text."""
    from lib.engines import opening

    flags = dict(load=args.precision, threads=args.threads, batch=args.batch_size, **loading.placement_arguments(args))
    if compresses:
        from lib.clara.clara_engine import ClaraEngine

        compute.use_threads(args.threads)
        return ClaraEngine(args.model, model, **flags)
    content = "".join(documents.values()) + (args.question or "")
    context = opening.context_for([{"prompt": [{"content": content}]}], args.max_new_tokens)
    return opening.open_engine(model, context=context, **flags)


def read_sources(args, mode: str, engine, documents: dict[str, str], inputs: dict) -> tuple[list[dict], object]:
    """(the sources that are read, the prompt)."""
    from lib.data import records

    sources = [{"document": name, "text": text} for name, text in documents.items()]
    if mode == "text":
        content = records.question_with_documents(args.question, [*documents.values()])
        return sources, engine.prompt_ids(records.message("user", content))
    if mode == "compressed":
        return sources, engine.prompt(args.question, engine.compress([*documents.values()]))
    index = open_index(args, engine, documents, inputs)
    if not args.question:
        return [], None
    best = engine.search([args.question], index.vectors, args.k or engine.clara.shape.k)[0].tolist()
    return [index.pieces[n] for n in best], engine.prompt(args.question, [index.vectors[n][None] for n in best])


def open_index(args, reader, documents: dict[str, str], inputs: dict[str, dict]):
    """The index at --index. It is built from --documents if it is missing, or was built from other documents or by
    another model."""
    from lib.clara import clara_engine

    if not documents:
        return clara_engine.read_index(args.index, args.model)
    if (args.index / artifact.METADATA).is_file():
        stored = artifact.read(args.index, clara_engine.INDEX)["inputs"]
        changes = [name for name, source in inputs.items() if source["digest"] != stored[name]["digest"]]
        if not changes:
            return clara_engine.read_index(args.index, args.model)
        print(f"{args.index}: rebuilding the index, because --{' and --'.join(changes)} changed", file=sys.stderr)
    return clara_engine.write_index(reader, documents, args.index, args, inputs)


def check_context(args, tokens: int, model: ModelDirectory) -> None:
    if tokens + args.max_new_tokens > (context := directory.context_length(model)):
        raise InputError(
            f"{tokens:,} tokens of documents and question plus {args.max_new_tokens} of the answer are more than the "
            f"{context:,} tokens of {model.path}'s context; give fewer documents"
        )


if __name__ == "__main__":
    cli.run(main, make_parser)
