"""A model card: what a model is, what was measured of it and where, how to run it, under which licences it stands."""

import re
from pathlib import Path

from lib.core import wording
from lib.data import records
from lib.report import lineage

# Licences that let what was made of a work be passed on, the way cards and configs/assets.yaml write them.
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
    """{what a model was made of: its licence, None where that is not known}: its base, the rows that it learnt from."""
    stages, gaps, found = {}, [], {}
    lineage.collect(model, stages, gaps)
    for place, meta in stages.items():
        source = meta.get("source", {})
        if meta["kind"] == "base":
            model = source.get("model", place.name)
            # Of a directory of the user's the card is to tell the name, not where it lay.
            found[f"base model {model if 'revision' in source else Path(model).name}"] = source.get("licence")
        elif meta["kind"] == "data" and meta["arguments"].get("source") != "magpie":  # of a model that stands here too
            found[f"data {Path(meta['arguments'].get('source', place.name)).name}"] = source.get("licence")
    for meta in stages.values():
        for name, given in meta["inputs"].items():
            if name in ("data", "file") and Path(given["path"]).is_file() and meta["kind"] != "data":
                found[f"data {Path(given['path']).name}"] = None  # a file of rows, given to a script as it is
    return found | {f"{gap}, so its sources are unknown": None for gap in gaps}


def find_unclear(found: dict[str, str | None]) -> list[str]:
    """What no licence is known of, or one that is not known to let what is made of it be passed on."""
    return [
        f"{what}: {licence or 'licence unknown'}"
        for what, licence in found.items()
        if not (licence and FREE.fullmatch(licence))
    ]


# --- the card ------------------------------------------------------------------------------------------------


def write_card(tree: Path, meta: dict, found: dict, comparison: dict | None) -> str:
    """README.md of an export, whose files are in `tree`. `meta` is the artifact's, `found` the result of
    `collect_licences`, `comparison` a report's comparison.json."""
    variants = (comparison or {}).get("variants", {})
    measured_as = {meta["digest"]}
    if meta["kind"] != "adapter":  # a merge answers as its adapter does; an adapter trained further does not
        measured_as.add(meta["inputs"].get("adapter", {}).get("digest"))
    ours = next((name for name, one in variants.items() if one["digest"] in measured_as), None)
    form = meta.get("format", "")
    sections = [
        write_front_matter(tree, meta, found),
        f"# {tree.name}\n\n" + (MADE_AS.get(form) or MADE_AS[meta["kind"]].format(format=form)),
        "## Results\n\n" + write_results(meta, comparison, ours),
        "## How to run it\n\n" + write_commands(tree, meta, comparison),
        "## Sources\n\n" + write_sources(meta, found),
        "## Intended use and limits\n\n" + write_limits(meta, variants.get(ours)),
    ]
    return "\n\n".join(sections) + "\n"


def write_front_matter(tree: Path, meta: dict, found: dict) -> str:
    """What the Hub reads. One licence alone can stand there: the base model's."""
    base = next(((what, licence) for what, licence in found.items() if what.startswith("base model ")), ("", None))
    lines = [f"license: {base[1].lower() if base[1] and FREE.fullmatch(base[1]) else 'other'}"]
    if "/" in (hub := base[0].removeprefix("base model ")):
        lines.append(f"base_model: {hub}")
    library = "gguf" if any(tree.rglob("*.gguf")) else "peft" if meta["kind"] == "adapter" else "transformers"
    return "\n".join(["---", *lines, f"library_name: {library}", "pipeline_tag: text-generation", "---"])


def write_results(meta: dict, comparison: dict | None, ours: str | None) -> str:
    """The variant `ours` of a report beside the report's reference."""
    divergence = meta["metrics"].get("divergence", {})
    apart = ""
    if "kl_mean" in divergence:
        apart = (
            f"\n\nDivergence from the source model on {divergence['answer_positions']} answer tokens: mean KL "
            f"{divergence['kl_mean']:.2g} nats, same top token in {divergence['top1_agreement']:.1%}."
        )
    if ours is None:
        return "This model was not evaluated before the export." + apart
    variants, shown = comparison["variants"], dict.fromkeys([comparison["reference"], ours])
    lines = [["", *shown], ["---"] * (len(shown) + 1)]
    for key, title in SCORES.items():
        lines.append([title, *(wording.interval(variants[name][key]) for name in shown)])
    lines.append(["size, MB", *(wording.megabytes(variants[name]["model_bytes"]) for name in shown)])
    decode = [variants[name]["tokens_per_second"]["decode"] for name in shown]
    lines.append(["decode, tokens/s", *(f"{d['median']:.1f} ({d['min']:.1f}–{d['max']:.1f})" for d in decode)])
    lines.append(["engine", *(variants[name]["engine"] for name in shown)])
    machine = comparison["machine"]
    if variants[ours]["digest"] != meta["digest"]:
        apart = " The figures are those of the adapter before merging." + apart
    where = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + f"\n\nMeasured on {comparison['rows']} held-out questions with greedy decoding, on {where}. "
        "Brackets: 95 % bootstrap interval. Parentheses: range of repeated runs." + apart
    )


def write_commands(tree: Path, meta: dict, comparison: dict | None) -> str:
    """The lines to type, from within the export."""
    said = []
    if (tree / "Modelfile").is_file():
        said.append(f"Ollama:\n\n    ollama create {tree.name} -f Modelfile\n    ollama run {tree.name}")
    if files := [path.relative_to(tree) for folder in (tree / "base", tree) for path in folder.glob("*.gguf")]:
        model, lora = files[0], f" --lora {files[1]}" if len(files) > 1 else ""
        said.append(
            "llama.cpp, whose server answers OpenAI-style requests with the chat template in the file:\n\n"
            f"    llama-server -m {model}{lora} --jinja"
        )
    elif meta["kind"] == "adapter":
        said.append(
            "transformers and PEFT:\n\n"
            "    from peft import AutoPeftModelForCausalLM\n"
            "    from transformers import AutoTokenizer\n\n"
            '    model = AutoPeftModelForCausalLM.from_pretrained(".")  # finds base/ from this directory alone\n'
            '    tokenizer = AutoTokenizer.from_pretrained(".")'
        )
    else:
        said.append(
            "transformers:\n\n"
            "    from transformers import pipeline\n\n"
            '    ask = pipeline("text-generation", model=".")\n'
            '    print(ask([{"role": "user", "content": "…"}])[0]["generated_text"][-1]["content"])'
        )
    form = records.question_with_documents("…", ["…"])
    before, between, after = form.split("…")
    asked = [one["question"] for one in (comparison or {}).get("answers", [])]
    if asked and all(one.startswith(before) and between in one and one.endswith(after) for one in asked):
        said.append("In the evaluation, each user turn had this form:\n\n    " + form.replace("\n", "\n    "))
    return "Run these commands in this directory.\n\n" + "\n\n".join(said)


def write_sources(meta: dict, found: dict) -> str:
    lines = [f"- {what}: {licence or 'licence unknown'}" for what, licence in found.items()]
    commit = (meta["code"].get("commit") or "unknown")[:12]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    lines.append(f"- last step: commit {commit}, seed {meta['seed']}; {versions}")
    lines.append("- `metadata.json` contains all arguments and the SHA-256 of each file")
    return "\n".join(lines)


def write_limits(meta: dict, scores: dict | None) -> str:
    said = (
        "Intended for questions like those in its training data; it was evaluated on nothing else. Its answers may be "
        "wrong, and wrong answers sound as certain as right ones."
    )
    if meta["kind"] == "base":
        said = (
            "Intended as a base for fine-tuning. Its answers may be wrong, and wrong answers sound as certain as right "
            "ones."
        )
    if scores:
        said += f" In the evaluation, {scores['exact_match']['mean']:.0%} of its answers were exactly right."
    return said
