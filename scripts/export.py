"""Export a model: as a zip, to another folder, to the Hugging Face Hub, as a GGUF, or for Ollama.

    python scripts/export.py --format zip --model models/smollm2-135m-lora-int4 --report reports/smollm2-135m \\
        --to exports/smollm2-135m-lora-int4.zip
    python scripts/export.py --format folder --model models/smollm2-135m-lora --to /mnt/drive/smollm2-135m-lora
    python scripts/export.py --format hub --model models/smollm2-135m-lora --to user/name
    python scripts/export.py --format ollama --model models/smollm2-135m-lora-int4 --to exports/for-ollama

Takes a base model, an adapter (exported together with its base), a merged or a quantised model. Leaves files that other
programs load, with a model card, README.md. They include metadata.json, so the other scripts accept the export as an
artifact. Every export is read back file by file and must give the same answers as the source model. Existing files are
never overwritten, except an earlier export with --replace. If the export is interrupted, the same command resumes it.
"""

import json
import re
import shutil
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lib.core import artifact, assets, cli, file_errors
from lib.core.cli import InputError
from lib.model import directory
from lib.model.directory import ModelDirectory

KINDS = ("base", "adapter", "model", "quantized")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip entry: the same files make the same zip at any time


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--format", choices=["zip", "folder", "hub", "gguf", "ollama"], required=True, help="export format"
    )
    files.add_argument("--model", type=Path, required=True, help="model directory made by these scripts")
    files.add_argument("--base", type=Path, help="base model of an adapter (default: as recorded in the adapter)")
    files.add_argument("--report", type=Path, help="report whose figures go into the model card (default: none)")
    files.add_argument(
        "--to", type=cli.expand_home, required=True, help="file or directory to write, or user/name on the Hub"
    )
    files.add_argument(
        "--run-dir", type=Path, help="directory for unfinished exports (default: runs/export-<name of the model>)"
    )
    files.add_argument("--replace", action=cli.OnOff, default=False, help="replace an earlier export to the same place")
    files.add_argument(
        "--i-have-checked-the-licence", action=cli.OnOff, default=False,
        help="export a model whose licence is unknown or is not known to allow redistribution",
    )  # fmt: skip
    hub = parser.add_argument_group("Hugging Face Hub")
    hub.add_argument("--record", type=Path, help="JSON file to write repository and revision to (default: none)")
    hub.add_argument("--public", action=cli.OnOff, default=False, help="create a public repository")
    hub.add_argument("--timeout", type=cli.number(1), help="seconds to wait for a response")
    check = parser.add_argument_group("check")
    check.add_argument(
        "--data", type=Path, help="data artifact or file of examples, to compare more answers on (default: none)"
    )
    check.add_argument("--samples", type=cli.integer(1), help="validation examples of --data to compare")
    check.add_argument(
        "--max-kl",
        type=cli.number(0),
        help="reject an export whose mean KL from the source model exceeds this, in nats",
    )
    check.add_argument("--seed", type=cli.integer(0), help="random seed for the examples' choice")
    return parser


def main(args):
    # --- check --------------------------------------------------------------------------------------------
    if args.format == "hub":
        cli.go_online()  # before anything else imports huggingface_hub
    from lib.budget import memory
    from lib.core import hardware
    from lib.data import records
    from lib.export import card
    from lib.quant import divergence

    meta, model = artifact.read(args.model), directory.open_directory(args.model, args.base)
    check_model(model, meta, args)
    rows = (
        records.sample_rows(records.load_split(args.data, "validation"), args.samples, args.seed) if args.data else []
    )
    report = args.report and cli.read_json(artifact.read(args.report, "report") and args.report / "comparison.json")
    licences = card.collect_licences(args.model)
    check_licences(card.find_unclear(licences), args)
    check_target(args)
    config, positions = (
        directory.load_config(model),
        divergence.count_positions(directory.load_tokenizer(model), rows),
    )
    memory.check_fits(lambda: memory.estimate_comparison(config, positions), [], hardware.free_memory("cpu"))

    # --- lay out, write, read back ----------------------------------------------------------------------
    name = args.model.resolve().name
    with make_work_folder(args.run_dir or Path("runs") / f"export-{name}") as run:
        tree = run / name
        if args.format in ("gguf", "ollama"):
            file = lay_out_gguf(model, tree, name)
            meta = meta | {"kind": "quantized", "format": meta.get("format", "gguf-f16")}
            if args.format == "ollama":
                write_modelfile(file, model)
        else:
            lay_out(model, tree)
        (tree / "README.md").write_text(card.write_card(tree, meta, licences, report), encoding="utf-8")
        describe(tree, meta, args)
        PUT[args.format](tree, args, rows, model)
    print(args.to)


# --- check ---------------------------------------------------------------------------------------------------


def check_model(model: ModelDirectory, meta: dict, args) -> None:
    name = args.model.resolve().name
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise InputError(
            f"{args.model}: the export takes the name of this directory, but other programs reject {name!r}; rename "
            "it, using only letters, digits, '-', '_', '+' and '.'"
        )
    if meta["kind"] not in KINDS:
        raise InputError(
            f"{args.model}: is of kind {meta['kind']!r}; only a base model, an adapter, a merged or a quantised model "
            "can be exported. To copy other artifacts, use make MIRROR_TO=…"
        )
    if args.format in ("gguf", "ollama") and model.kind != "gguf":
        if meta["kind"] == "adapter":
            raise InputError(
                f"{args.model}: is an adapter; merge it (merge_lora.py; for lora, `make lora-merged`), then export the "
                "merged model"
            )
        if model.kind == "quantised":
            raise InputError(
                f"{args.model}: is {meta.get('format', 'quantised')}, which llama.cpp cannot read; quantise the 16-bit "
                "model with a gguf- method, or export the 16-bit model"
            )


def check_licences(unclear: list[str], args) -> None:
    if unclear and not args.i_have_checked_the_licence:
        raise InputError(
            f"{args.model}: redistribution may not be allowed: {'; '.join(unclear)}. Check the licence, then repeat "
            "with --i-have-checked-the-licence"
        )
    for source in unclear:
        print(f"caution, check this licence yourself: {source}", file=sys.stderr)


def check_target(args) -> None:
    """InputError, before anything is laid out, if something is at the target that may not be replaced."""
    if args.format == "hub":
        from lib.export import hub

        return hub.check_name(args.to)
    to = Path(args.to)
    if args.format == "zip":
        if to.suffix != ".zip":
            raise InputError(f"--to {to}: expected a name that ends in .zip")
        if to.exists() and not (args.replace and is_export(to)):
            replaceable = "already exists; replace it with --replace, or"
            reason = replaceable if is_export(to) else "already exists and was not exported by Quartet;"
            raise InputError(f"--to {to}: {reason} choose another destination")
    elif to.resolve() == args.model.resolve() or args.model.resolve() in to.resolve().parents:
        raise InputError(f"--to {to}: is the model itself or is inside it; choose another destination")


def is_export(file: Path) -> bool:
    """Whether a zip is one of ours."""
    try:
        with assets.open_zip(file, "") as archive:
            (name,) = (name for name in archive.namelist() if re.fullmatch(rf"[^/]+/{artifact.METADATA}", name))
            meta = json.loads(archive.read(name))
    except (OSError, InputError):
        return False
    return isinstance(meta, dict) and {"kind", "digest", "exported"} <= meta.keys()


# --- lay out -------------------------------------------------------------------------------------------------


@contextmanager
def make_work_folder(run: Path):
    """A new directory in `run`, removed at the end; any other files in `run` are the user's."""
    work = run / "export.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not any(run.iterdir()):
            run.rmdir()


def lay_out(model: ModelDirectory, tree: Path) -> None:
    """The files of an artifact; those of an adapter's base in base/, which its config then names."""
    from lib.budget import memory

    sources = {model.path: tree} | ({model.base.path: tree / "base"} if model.base else {})
    memory.check_disk(tree.parent, sum(artifact.content_bytes(source) for source in sources))
    for source, folder in sources.items():
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        (folder / artifact.METADATA).unlink(missing_ok=True)
    if model.base:
        artifact.write_json(tree / "adapter_config.json", model.config | {"base_model_name_or_path": "base"})


def lay_out_gguf(model: ModelDirectory, tree: Path, name: str) -> Path:
    """The model as one GGUF file: its own, or a new one in 16 bit."""
    from lib.budget import memory
    from lib.gguf import writing

    memory.check_disk(tree.parent, artifact.content_bytes(model.path))
    tree.mkdir()
    file = tree / f"{name}.gguf"
    if model.kind == "gguf":
        shutil.copyfile(model.gguf, file)
        return file
    directory.load_tokenizer(model)  # says what is wrong with it
    try:
        writing.write_model(model.path, file, "f16")
    except ValueError as error:
        raise InputError(str(error)) from None
    return file


def write_modelfile(file: Path, model: ModelDirectory) -> None:
    from lib.export import modelfile

    text = modelfile.write_modelfile(
        file.name, directory.load_tokenizer(model), directory.eos_token_ids(model), directory.context_length(model)
    )
    (file.parent / "Modelfile").write_text(text, encoding="utf-8")


def describe(tree: Path, meta: dict, args) -> None:
    """metadata.json of the export: the model's own, without paths of this machine or the time of exporting, so that the
    same model always makes the same bytes."""
    files = artifact.file_digests(tree)
    fields = {
        "files": files, "digest": artifact.digest_of(files), "size_bytes": artifact.content_bytes(tree),
        "command": " ".join(map(shorten_paths, meta["command"].split())),
        "exported": {"form": args.format, "of": artifact.read_metadata(args.model)["digest"]},
    }  # fmt: skip
    artifact.write_json(tree / artifact.METADATA, shorten_paths(meta) | fields)


def shorten_paths(value):
    """A value of metadata.json in which absolute paths are cut to their last name."""
    if isinstance(value, dict):
        return {key: shorten_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten_paths(item) for item in value]
    return re.sub(r"^(--[\w-]+=)?[~/].*/", r"\1", value) if isinstance(value, str) else value


# --- write ---------------------------------------------------------------------------------------------------


def put_folder(tree: Path, args, rows, model) -> None:
    from lib.core import copying

    to = Path(args.to)
    if not (copied := copying.copy_artifact(tree, to, replace=args.replace)):
        print(f"{to}: is already up to date")
    try:
        check_answers(to, args, rows, model)
    except InputError:
        if copied:
            shutil.rmtree(to)
        raise


def put_zip(tree: Path, args, rows, model) -> None:
    """Write the zip beside its place, unpack and compare it, and only then rename it."""
    from lib.budget import memory

    to = Path(args.to).resolve()
    to.parent.mkdir(parents=True, exist_ok=True)
    memory.check_disk(to, 1.01 * artifact.content_bytes(tree))
    partial = to.with_name(f"{to.name}.partial")
    try:
        pack(tree, partial)
        with TemporaryDirectory(dir=tree.parent) as folder:
            unpack(partial, Path(folder))
            check_answers(Path(folder) / tree.name, args, rows, model)
        partial.replace(to)
    except OSError as error:
        if file_errors.disk_is_full(error):
            raise
        raise InputError(
            f"{to}: writing failed: {error.strerror or error}; check that the destination is available"
        ) from None
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)


def pack(tree: Path, file: Path) -> None:
    """A directory as a zip: sorted, undated, zip64 if needed, and not compressed, which would hardly shrink weights."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(p for p in tree.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(tree.parent).as_posix(), EPOCH)
            entry.external_attr = 0o100644 << 16
            entry.file_size = path.stat().st_size
            with open(path, "rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, 2**20)
    artifact.fsync(file)


def unpack(file: Path, folder: Path) -> None:
    """Extract a zip and check each file's checksum; InputError if one differs."""
    with assets.open_zip(file, "check the disk to which it was just written") as archive:
        archive.extractall(folder)


def put_hub(tree: Path, args, rows, model) -> None:
    from lib.export import hub

    upload = hub.upload(tree, args.to, args.public, args.timeout)
    with TemporaryDirectory(dir=tree.parent) as folder:
        download = hub.fetch(args.to, upload["revision"], Path(folder) / tree.name, args.timeout)
        check_answers(download, args, rows, model)
    status = "uploaded" if upload["uploaded"] else "already up to date"
    print(f"{upload['url']}: {status}, revision {upload['revision']}")
    if args.record:
        args.record.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(args.record, upload | {"digest": artifact.read_metadata(tree)["digest"]})


PUT = {"zip": put_zip, "folder": put_folder, "hub": put_hub, "gguf": put_folder, "ollama": put_folder}


def check_answers(target: Path, args, rows: list[dict], model: ModelDirectory) -> None:
    """InputError unless the export is whole and gives the same answers as the model."""
    from lib.quant import divergence

    artifact.read(target)
    figures = divergence.compare(model, directory.open_directory(target), rows, threads=args.threads)
    if objections := divergence.find_objections(figures, args.max_kl, args.max_kl, -1):
        raise InputError(
            f"{args.to}: gives other answers than {args.model}: {'; '.join(objections)}. Do not use it; report this as "
            "a bug"
        )
    kl = max(part["kl_mean"] for part in (figures, figures["general"]) if "kl_mean" in part)
    print(f"read back from {args.to}: gives the same answers as {args.model.name}, mean KL {kl:.2g}")


if __name__ == "__main__":
    cli.run(main, make_parser)
