"""A model card: what a model is, how it was measured and on which machine, how to run it, and its licences."""

import re
from pathlib import Path

from lib.core import wording
from lib.data import records
from lib.report import lineage

# Licences that allow redistribution of derived works, as cards and configs/assets.yaml write them.
FREE = re.compile(
    r"apache-2\.0|mit|isc|bsd-[23]-clause|unlicense|odc-by|cc0-1\.0|cc-by(-sa)?-[34]\.0|text in the public domain.*",
    re.I,
)
SCORES = {"token_f1": "token F1", "exact_match": "exact match", "contained": "reference answer contained", "nll": "NLL"}
MADE_AS = {
    "base": "The 16-bit base model, as downloaded.",
    "adapter": "A trained adapter. Its base model is in `base/`.",
    "model": "The base model with a trained LoRA adapter merged into its weights, in 16 bit.",
    "quantized": "The model, quantised to {format}.",
    "gguf-f16": "The model in 16 bit, as one GGUF file.",
}


# --- licences ----------------------------------------------------------------------------------------------


def collect_licences(model: Path) -> dict[str, str | None]:
    """{source of a model: its licence, None if unknown}. The sources are its base and the data it was trained on."""
    stages, gaps, licences = {}, [], {}
    lineage.collect(model, stages, gaps)
    for place, meta in stages.items():
        source = meta.get("source", {})
        if meta["kind"] == "base":
            model = source.get("model", place.name)
            # Of a directory of the user's, the card gives the name and not the path.
            licences[f"base model {model if 'revision' in source else Path(model).name}"] = source.get("licence")
        elif (
            meta["kind"] == "data" and meta["arguments"].get("source") != "magpie"
        ):  # Magpie's come from a model that is listed here too
            licences[f"data {Path(meta['arguments'].get('source', place.name)).name}"] = source.get("licence")
    for meta in stages.values():
        for name, entry in meta["inputs"].items():
            if name in ("data", "file") and Path(entry["path"]).is_file() and meta["kind"] != "data":
                licences[f"data {Path(entry['path']).name}"] = None  # a file of rows, given to a script as it is
    return licences | {f"{gap}, so its sources are unknown": None for gap in gaps}


def find_unclear(licences: dict[str, str | None]) -> list[str]:
    """The sources without a known licence, or with one that is not known to allow redistribution of derived works."""
    return [
        f"{source}: {licence or 'licence unknown'}"
        for source, licence in licences.items()
        if not (licence and FREE.fullmatch(licence))
    ]


# --- the card ------------------------------------------------------------------------------------------------


def write_card(tree: Path, meta: dict, licences: dict, comparison: dict | None) -> str:
    """README.md of an export, whose files are in `tree`. `meta` is the artifact's metadata, `licences` the result of
    `collect_licences`, `comparison` a report's comparison.json."""
    variants = (comparison or {}).get("variants", {})
    measured_as = {meta["digest"]}
    if meta["kind"] != "adapter":  # a merge answers as its adapter does; an adapter trained further does not
        measured_as.add(meta["inputs"].get("adapter", {}).get("digest"))
    ours = next((name for name, variant in variants.items() if variant["digest"] in measured_as), None)
    form = meta.get("format", "")
    sections = [
        write_front_matter(tree, meta, licences),
        f"# {tree.name}\n\n" + (MADE_AS.get(form) or MADE_AS[meta["kind"]].format(format=form)),
        "## Results\n\n" + write_results(meta, comparison, ours),
        "## How to run it\n\n" + write_commands(tree, meta, comparison),
        "## Sources\n\n" + write_sources(meta, licences),
        "## Intended use and limits\n\n" + write_limits(meta, variants.get(ours)),
    ]
    return "\n\n".join(sections) + "\n"


def write_front_matter(tree: Path, meta: dict, licences: dict) -> str:
    """The part that the Hub reads. It has room for one licence only: the base model's."""
    from huggingface_hub import ModelCardData

    base = next(((name, licence) for name, licence in licences.items() if name.startswith("base model ")), ("", None))
    hub_id = base[0].removeprefix("base model ")
    data = ModelCardData(
        license=base[1].lower() if base[1] and FREE.fullmatch(base[1]) else "other",
        base_model=hub_id if "/" in hub_id else None,
        library_name="gguf" if any(tree.rglob("*.gguf")) else "peft" if meta["kind"] == "adapter" else "transformers",
        pipeline_tag="text-generation",
    )
    return f"---\n{data.to_yaml()}\n---"


def write_results(meta: dict, comparison: dict | None, ours: str | None) -> str:
    """The variant `ours` of a report beside the report's reference."""
    divergence = meta["metrics"].get("divergence", {})
    note = ""
    if "kl_mean" in divergence:
        note = (
            f"\n\nDivergence from the source model on {divergence['answer_positions']} answer tokens: mean KL "
            f"{divergence['kl_mean']:.2g} nats, same top token in {divergence['top1_agreement']:.1%}."
        )
    if ours is None:
        return "This model was not evaluated before the export." + note
    variants, names = comparison["variants"], dict.fromkeys([comparison["reference"], ours])
    lines = [["", *names], ["---"] * (len(names) + 1)]
    for key, title in SCORES.items():
        lines.append([title, *(wording.interval(variants[name][key]) for name in names)])
    lines.append(["size, MB", *(wording.megabytes(variants[name]["model_bytes"]) for name in names)])
    decode = [variants[name]["tokens_per_second"]["decode"] for name in names]
    lines.append(["decode, tokens/s", *(f"{d['median']:.1f} ({d['min']:.1f}–{d['max']:.1f})" for d in decode)])
    lines.append(["engine", *(variants[name]["engine"] for name in names)])
    machine = comparison["machine"]
    if variants[ours]["digest"] != meta["digest"]:
        note = " The figures are those of the adapter before merging." + note
    processor = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + f"\n\nMeasured on {comparison['rows']} held-out questions with greedy decoding, on {processor}. "
        "Brackets: 95 % interval. Parentheses: range of repeated runs." + note
    )


def write_commands(tree: Path, meta: dict, comparison: dict | None) -> str:
    """The commands to run inside the export."""
    sections = []
    if (tree / "Modelfile").is_file():
        sections.append(f"Ollama:\n\n    ollama create {tree.name} -f Modelfile\n    ollama run {tree.name}")
    if files := [path.relative_to(tree) for folder in (tree / "base", tree) for path in folder.glob("*.gguf")]:
        model, lora = files[0], f" --lora {files[1]}" if len(files) > 1 else ""
        sections.append(
            "llama.cpp, whose server answers OpenAI-style requests with the chat template in the file:\n\n"
            f"    llama-server -m {model}{lora} --jinja"
        )
    elif meta["kind"] == "adapter":
        sections.append(
            "transformers and PEFT:\n\n"
            "    from peft import AutoPeftModelForCausalLM\n"
            "    from transformers import AutoTokenizer\n\n"
            '    model = AutoPeftModelForCausalLM.from_pretrained(".")  # finds base/ from this directory alone\n'
            '    tokenizer = AutoTokenizer.from_pretrained(".")'
        )
    else:
        sections.append(
            "transformers:\n\n"
            "    from transformers import pipeline\n\n"
            '    ask = pipeline("text-generation", model=".")\n'
            '    print(ask([{"role": "user", "content": "…"}])[0]["generated_text"][-1]["content"])'
        )
    form = records.question_with_documents("…", ["…"])
    before, between, after = form.split("…")
    questions = [row["question"] for row in (comparison or {}).get("answers", [])]
    if questions and all(text.startswith(before) and between in text and text.endswith(after) for text in questions):
        sections.append("In the evaluation, each user turn had this form:\n\n    " + form.replace("\n", "\n    "))
    return "Run these commands in this directory.\n\n" + "\n\n".join(sections)


def write_sources(meta: dict, licences: dict) -> str:
    lines = [f"- {source}: {licence or 'licence unknown'}" for source, licence in licences.items()]
    commit = (meta["code"].get("commit") or "unknown")[:12]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    lines.append(f"- last step: commit {commit}, seed {meta['seed']}; {versions}")
    lines.append("- `metadata.json` contains all arguments and the SHA-256 of each file")
    return "\n".join(lines)


def write_limits(meta: dict, scores: dict | None) -> str:
    text = (
        "Intended for questions like those in its training data; it was evaluated on nothing else. Its answers may be "
        "wrong, and wrong answers sound as certain as right ones."
    )
    if meta["kind"] == "base":
        text = (
            "Intended as a base for fine-tuning. Its answers may be wrong, and wrong answers sound as certain as right "
            "ones."
        )
    if scores:
        text += f" In the evaluation, {scores['exact_match']['mean']:.0%} of its answers were exactly right."
    return text
