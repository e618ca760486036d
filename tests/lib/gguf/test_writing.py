"""GGUF files against transformers and llama.cpp, on tiny random models."""

import json

import gguf as package
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from lib.engines.llamacpp import LlamaCpp
from lib.engines.sampling import EngineError
from lib.gguf import families, packing, reading, vocabulary, writing
from lib.model import chat, tiny
from lib.quant import same_tokens

PROMPT = [1, 77, 90, 300, 12, 200, 150, 42, 99]
ANSWER = [5, 260, 33]


FAMILIES = {  # with what their config has of its own
    "llama": ("Llama", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi": (
        "Phi",
        {"tie_word_embeddings": False, "hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 0.05},
    ),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.75, "sliding_window": 100}),
}


SHAPE = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, initializer_range=0.2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    pad_token_id=2, rope_theta=5000.0, rms_norm_eps=0.05,
)  # fmt: skip


def save(path, family="llama", **overrides):
    """A tiny model directory of one family; initial weights so large that attention and its rotation matter, biases
    and norms that are neither 0 nor 1."""
    words = tiny.tokenizer()
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SHAPE | {"vocab_size": len(words)} | own | overrides)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.5 * torch.randn_like(parameter)
    model.half().save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny") / "model")


def edit(directory, name, change):
    """Apply `change` to one tensor of a saved model, on disk."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors[name])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def reference(path, adapter=None):
    """Log-probabilities at the answer's positions by transformers in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return log_probabilities(PeftModel.from_pretrained(model, adapter).eval() if adapter else model)


def log_probabilities(model):
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + ANSWER[:-1]])).logits[0, len(PROMPT) - 1 :]
    return logits.log_softmax(-1).numpy()


def by_llama_cpp(file, adapter=None):
    engine = LlamaCpp(file, context=128, parallel=1, threads=1, adapter=adapter)
    try:
        return engine.answer_distributions(PROMPT, ANSWER)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in FAMILIES for tied in (True, False) if (family, tied) != ("phi", True)],
)
def test_f16_file_computes_what_transformers_computes(tmp_path, family, tied):
    model = save(tmp_path / "model", family, tie_word_embeddings=tied)
    writing.write_model(model, tmp_path / "model.gguf", "f16")
    assert np.abs(by_llama_cpp(tmp_path / "model.gguf") - reference(model)).max() < 0.03
    names = [t.name for t in package.GGUFReader(tmp_path / "model.gguf").tensors]
    assert ("output.weight" in names) is not tied


@pytest.mark.parametrize("family", FAMILIES)
def test_q4_0_file_computes_what_its_weights_read_back_compute(tmp_path, family):
    model, file = save(tmp_path / "model", family), tmp_path / "model.gguf"
    writing.write_model(model, file, "q4_0")
    config = transformers.AutoConfig.from_pretrained(model)
    read = reading.load_dequantised(file, config if family == "phi" else None)
    original = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, weights in original.named_parameters():
        difference = (weights - dict(read.named_parameters())[name]).abs().detach().numpy()
        most = largest_error(weights.detach().numpy(), "q4_0") if weights.ndim == 2 else 0
        assert (difference <= most).all(), name
    # llama.cpp multiplies 4-bit blocks with activations that it rounds to 8 bits.
    assert np.abs(by_llama_cpp(file) - log_probabilities(read)).max() < 0.5
    assert np.abs(reference(model) - log_probabilities(read)).max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_those_comparisons_would_notice_any_norm_bias_epsilon_or_rotation(tmp_path, family):
    path = save(tmp_path / "model", family)
    right = reference(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, vector in model.named_parameters():
        if vector.ndim == 1:
            kept = vector.detach().clone()
            vector.data.fill_(0 if name.endswith("bias") else 1)
            assert np.abs(log_probabilities(model) - right).max() > 0.06, name
            vector.data.copy_(kept)
    settings = json.loads((path / "config.json").read_text())
    epsilon = "layer_norm_eps" if family == "phi" else "rms_norm_eps"
    (path / "config.json").write_text(json.dumps(settings | {epsilon: 1e-6}))
    assert np.abs(reference(path) - right).max() > 0.06
    for key, value in {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}.items():
        if settings["rope_parameters"].get(key, value) != value:
            changed = settings | {"rope_parameters": settings["rope_parameters"] | {key: value}}
            (path / "config.json").write_text(json.dumps(changed))
            assert np.abs(reference(path) - right).max() > 0.06, key


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_can_be_kept_finer_than_the_rest(tmp_path, tied):
    model, file = save(tmp_path / "model", "qwen2", tie_word_embeddings=tied), tmp_path / "model.gguf"
    writing.write_model(model, file, "q4_0", embedding="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in package.GGUFReader(file).tensors}
    finer = {name for name, kind in types.items() if kind == "Q8_0"}
    assert finer == {"token_embd.weight"} | (set() if tied else {"output.weight"})
    assert types["blk.0.attn_q.weight"] == "Q4_0" and types["blk.0.attn_q.bias"] == "F32"
    assert np.abs(by_llama_cpp(file) - log_probabilities(reading.load_dequantised(file))).max() < 0.5
    assert "q3" in refused(model, tmp_path / "none.gguf", embedding="q3")


@pytest.mark.parametrize("wrong", ["q_proj", "k_proj"])
def test_that_comparison_notices_a_wrong_order_of_rows(tmp_path, directory, monkeypatch, wrong):
    right = families.permute

    def broken(rows, name, config):
        return rows if wrong in name else right(rows, name, config)

    monkeypatch.setattr(families, "permute", broken)
    writing.write_model(directory, tmp_path / "model.gguf", "f16")
    assert np.abs(by_llama_cpp(tmp_path / "model.gguf") - reference(directory)).max() > 0.2


K_QUANTS = ("q4_k", "q5_k", "q6_k")  # blocks of 256: wider than the tiny model


@pytest.mark.parametrize("quantisation", sorted(set(packing.QUANTISATIONS) - set(K_QUANTS)))
def test_tokens_and_weights_come_back(tmp_path, directory, quantisation):
    file = tmp_path / "model.gguf"
    writing.write_model(directory, file, quantisation)
    words = tiny.tokenizer()
    assert same_tokens.compare_token_ids(file, words) == []
    assert vocabulary.read_tokenizer(file).chat_template == words.chat_template
    assert vocabulary.read_tokenizer(file)("In 2024  7 the\n").input_ids == words("In 2024  7 the\n").input_ids

    read = reading.load_dequantised(file)
    original = load_file(directory / "model.safetensors")
    assert read.config.eos_token_id == 2 and read.config.tie_word_embeddings
    for name, weights in read.named_parameters():
        difference = np.abs(weights.detach().numpy() - original[name].float().numpy())
        if quantisation == "f16" or weights.ndim == 1:
            assert difference.max() == 0, name
        else:
            assert (difference <= largest_error(original[name].float().numpy(), quantisation)).all(), name
    read.save_pretrained(tmp_path / "again")  # it is no longer marked as quantised


def largest_error(weights, quantisation):
    """Half of the widest step of each block, and what rounding the scale itself to fp16 adds."""
    blocks = weights.reshape(-1, packing.BLOCK)
    top, low, high = np.abs(blocks).max(1), blocks.min(1), blocks.max(1)
    steps = {"q4_0": top / 8, "q4_1": (high - low) / 15, "q5_0": top / 16, "q8_0": top / 127, "iq4_nl": top / 4}
    step = steps[quantisation][:, None]
    error = step / 2 + np.abs(blocks) * 2**-10 + 2**-10 * top[:, None]
    if quantisation in ("q4_0", "q5_0"):  # codes reach from -8 to 7: the far end, opposite to the largest, is cut
        sign = np.sign(np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1))
        error += np.maximum(-sign * blocks - (7.5 if quantisation == "q4_0" else 15.5) * step, 0)
    return error.reshape(weights.shape)


@pytest.mark.parametrize("quantisation", K_QUANTS)
def test_k_quants_of_a_wider_model(tmp_path, directory, quantisation):
    assert "width 64 is not a multiple of 256" in refused(directory, tmp_path / "model.gguf", quantisation)
    model = save(tmp_path / "wide", hidden_size=256, intermediate_size=256, head_dim=64, initializer_range=0.1)
    writing.write_model(model, tmp_path / "model.gguf", quantisation)
    original = load_file(model / "model.safetensors")
    read = reading.load_dequantised(tmp_path / "model.gguf")
    read.save_pretrained(tmp_path / "read")
    weights = dict(read.named_parameters())
    error = {n: (w.detach() - original[n].float()).square().mean() ** 0.5 for n, w in weights.items() if w.ndim == 2}
    bits = int(quantisation[1])
    assert max(error.values()) < 0.1 * 1.6 * 2**-bits  # of weights with a standard deviation of 0.1
    assert np.abs(by_llama_cpp(tmp_path / "model.gguf") - reference(tmp_path / "read")).max() < 0.5


def test_blocks_made_elsewhere_are_written_as_they_are(tmp_path, directory):
    generator = np.random.default_rng(0)
    name = "model.layers.1.self_attn.k_proj.weight"
    codes = generator.integers(0, 16, (64, 64))
    scales = generator.uniform(0.01, 0.1, (64, 2)).astype(np.float16)
    writing.write_model(directory, tmp_path / "model.gguf", "q4_0", {name: packing.pack_codes(scales, codes)})
    expected = np.repeat(scales.astype(np.float32), packing.BLOCK, axis=1) * (codes - 8)
    read = dict(reading.load_dequantised(tmp_path / "model.gguf").named_parameters())
    assert np.array_equal(read[name].detach().numpy(), expected)

    for wrong in (
        {name: packing.pack_codes(scales[1:], codes[1:])},
        {"model.rotary.weight": np.zeros((64, 36), np.uint8)},
    ):
        assert "blocks for " + next(iter(wrong)) in refused(directory, tmp_path / "none.gguf", blocks=wrong)


def test_a_tokenizer_with_other_merges_is_noticed(tmp_path, directory):
    writing.write_model(directory, tmp_path / "model.gguf", "q8_0")
    other = tiny.tokenizer("zebra quark vexing jumps")
    assert any("Hugging Face" in line for line in same_tokens.compare_token_ids(tmp_path / "model.gguf", other))


def test_a_tokenizer_that_adds_a_bos_must_do_so_in_both_though_the_template_writes_one(tmp_path, monkeypatch):
    """As Llama 3 has it. Hugging Face's chats are tokenised without, and llama.cpp's server takes one away."""
    from tokenizers.processors import TemplateProcessing

    words = tiny.tokenizer()
    adds = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    words.backend_tokenizer.post_processor = adds
    words.save_pretrained(save(tmp_path / "model"))
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert words("a")["input_ids"][0] == 1
    writing.write_model(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert same_tokens.compare_token_ids(tmp_path / "model.gguf", words) == []
    monkeypatch.setattr(
        package.GGUFWriter, "add_add_bos_token", lambda self, _: self.add_bool(package.Keys.Tokenizer.ADD_BOS, False)
    )
    writing.write_model(tmp_path / "model", tmp_path / "without.gguf", "f16")
    assert any("BOS" in line for line in same_tokens.compare_token_ids(tmp_path / "without.gguf", words))


def split_as(name):
    """A tokenizer trained on the chats' own texts behind one of the pre-tokenizers that llama.cpp knows."""
    from tokenizers import trainers
    from transformers import PreTrainedTokenizerFast

    raw = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    splits = vocabulary.PRE_TOKENIZERS[name]
    steps = [step | {"trim_offsets": True} for step in splits.steps]
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    raw["normalizer"] = splits.normaliser
    raw["model"] |= {"vocab": {}, "merges": [], "ignore_merges": splits.ignore_merges}
    made = Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))
    alphabet = sorted(tiny.tokenizer().backend_tokenizer.pre_tokenizer.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=tiny.SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([turn["content"] for probe in chat.PROBES for turn in probe] * 5, trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=tiny.SPECIAL[1], eos_token=tiny.SPECIAL[2])
    words.chat_template = tiny.CHATML
    return words


@pytest.mark.parametrize("name", vocabulary.PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_gives_the_same_ids(tmp_path, name):
    words, file = split_as(name), tmp_path / "model.gguf"
    words.save_pretrained(tmp_path)
    tiny.model(len(words)).save_pretrained(tmp_path)
    writing.write_model(tmp_path, file, "f16")
    assert package.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    assert same_tokens.compare_token_ids(file, words) == []
    assert same_tokens.compare_token_ids(file, vocabulary.read_tokenizer(file)) == []
    other = "gpt-2" if name != "gpt-2" else "smollm"
    assert same_tokens.compare_token_ids(file, split_as(other))


def sentencepiece(form, rstrip=False):
    """tokenizer.json of a BPE with byte fallback, its merges made of the scores as converters of SentencePiece do it:
    every pair that makes a token, in the order of the tokens made."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "<|endoftext|>", "</s>", "<|user|>", "<|end|>", "<|assistant|>"]
    normaliser, splits, _ = form
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()  # to train on words
    first = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=first, show_progress=False)
    made.train_from_iterator(tiny.WORDS.split() * 2, trainer)
    raw = json.loads(made.to_str()) | {"normalizer": normaliser, "pre_tokenizer": splits}
    vocab = raw["model"]["vocab"]
    pairs = [(text, [text[:n], text[n:]]) for text in vocab for n in range(1, len(text)) if text not in first]
    pairs = [(text, pair) for text, pair in pairs if pair[0] in vocab and pair[1] in vocab]
    raw["model"]["merges"] = [pair for _, pair in sorted(pairs, key=lambda one: vocab[one[0]])]
    raw["added_tokens"] = [added for added in raw["added_tokens"] if added["content"] in special]
    for added in raw["added_tokens"]:
        added["rstrip"] = rstrip and added["content"] not in special[:3]
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    words.chat_template = (
        "{{ '<s>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return words


@pytest.mark.parametrize("number", range(len(vocabulary.SENTENCEPIECE)))
@pytest.mark.parametrize(("family", "rstrip"), [("mistral", False), ("phi3", True)])
def test_sentencepiece_like_tokenizers_give_the_same_ids(tmp_path, number, family, rstrip):
    words = sentencepiece(vocabulary.SENTENCEPIECE[number], rstrip)
    model, file = save(tmp_path / "phi3-of-mine", family, vocab_size=len(words) + 3), tmp_path / "model.gguf"
    words.save_pretrained(model)
    loaded = transformers.AutoTokenizer.from_pretrained(model)
    writing.write_model(model, file, "f16")
    assert same_tokens.compare_token_ids(file, loaded) == []
    raw = json.loads(loaded.backend_tokenizer.to_str())
    raw["model"]["merges"].reverse()
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), chat_template=words.chat_template
    )
    assert same_tokens.compare_token_ids(file, other)
    with pytest.raises(ValueError, match="cannot read a tokenizer 'llama'"):
        vocabulary.read_tokenizer(file)


def test_a_sentencepiece_tokenizer_with_other_spaces_or_bytes_is_refused(tmp_path):
    words = sentencepiece(vocabulary.SENTENCEPIECE[0])
    model, out = save(tmp_path / "model", "mistral", vocab_size=len(words)), tmp_path / "model.gguf"
    raw = json.loads(words.backend_tokenizer.to_str())
    for change in ({"normalizer": {"type": "NFKC"}}, {"pre_tokenizer": vocabulary.METASPACE | {"split": True}}):
        words.save_pretrained(model)
        (model / "tokenizer.json").write_text(json.dumps(raw | change))
        assert "byte fallback" in refused(model, out)
    index = raw["model"]["vocab"].pop("<0x41>")
    (model / "tokenizer.json").write_text(
        json.dumps(raw | {"model": raw["model"] | {"vocab": raw["model"]["vocab"] | {"spare": index}}})
    )
    assert "<0x41>" in refused(model, out)


def test_a_space_before_the_first_text_alone_is_noticed_where_a_chat_begins_with_text(tmp_path):
    words = sentencepiece((None, vocabulary.METASPACE | {"prepend_scheme": "first"}, False))
    words.chat_template = words.chat_template.removeprefix("{{ '<s>' }}").replace("'<|' + m['role']", "m['role']")
    model = save(tmp_path / "model", "mistral", vocab_size=len(words))
    words.save_pretrained(model)
    writing.write_model(model, tmp_path / "model.gguf", "f16")
    assert same_tokens.compare_token_ids(tmp_path / "model.gguf", words)


def test_special_tokens_that_swallow_white_space_as_phi3_does_not_are_refused(tmp_path):
    words = sentencepiece(vocabulary.SENTENCEPIECE[0], rstrip=True)
    words.add_tokens([transformers.AddedToken("<|tool|>", special=True)])
    model = save(tmp_path / "model", "phi3", vocab_size=len(words))
    words.save_pretrained(model)
    assert "white space after <|tool|>" in refused(model, tmp_path / "model.gguf")


def test_the_tokenizers_that_the_families_come_with_give_the_same_ids(tmp_path):
    raw = json.loads(split_as("gpt-2").backend_tokenizer.to_str())
    parts = {"vocab": raw["model"]["vocab"], "merges": [tuple(pair) for pair in raw["model"]["merges"]]}
    spaces = [transformers.AddedToken(" " * n, normalized=True) for n in range(31, 1, -1)]  # as Phi-2 has them
    ends = {f"{name}_token": tiny.SPECIAL[0] for name in ("bos", "eos", "unk")}
    for family, words in {
        "phi": transformers.CodeGenTokenizer(**parts, **ends, extra_special_tokens=tiny.SPECIAL),
        "qwen3": transformers.Qwen2Tokenizer(**parts, extra_special_tokens=tiny.SPECIAL),
    }.items():
        words.add_tokens(spaces if family == "phi" else ["<think>", "</think>"])
        words.chat_template = tiny.CHATML
        model, file = save(tmp_path / family, family, vocab_size=len(words) + 5), tmp_path / f"{family}.gguf"
        words.save_pretrained(model)
        words = transformers.AutoTokenizer.from_pretrained(model)
        writing.write_model(model, file, "f16")
        chats = [*chat.PROBES, [{"role": "user", "content": "<think>a" + " " * 35 + "b  c" + " " * 70 + "</think>"}]]
        assert same_tokens.compare_token_ids(file, words, chats) == []
        assert same_tokens.compare_token_ids(file, vocabulary.read_tokenizer(file), chats) == []


def refused(directory, out, quantisation="q4_0", **how):
    with pytest.raises(ValueError) as caught:
        writing.write_model(directory, out, quantisation, **how)
    assert not out.exists()
    return str(caught.value)


def test_refusals_name_what_is_wrong(tmp_path):
    model, out = save(tmp_path / "model"), tmp_path / "model.gguf"
    assert "q3_k" in refused(model, out, "q3_k")

    edit(model, "model.layers.1.mlp.up_proj.weight", lambda w: w[3, 4].fill_(float("nan")))
    assert "model.layers.1.mlp.up_proj.weight contains 1 NaN" in refused(model, out)

    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "Whitespace" in refused(model, out)
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": unigram, "added_tokens": []}))
    assert "Unigram" in refused(model, out)

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel" in refused(model, out)


def test_a_width_that_blocks_do_not_divide_is_refused(tmp_path):
    model = save(tmp_path / "model", intermediate_size=72)
    message = refused(model, tmp_path / "model.gguf")
    assert "model.layers.0.mlp.down_proj.weight: width 72" in message


def test_a_missing_tensor_is_named(tmp_path):
    model = save(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(model, tmp_path / "model.gguf")


def adapter_of(directory, path, **overrides):
    """A random adapter, large enough to matter, on every linear layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    how = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | overrides
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**how))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("family", "rslora"),
    [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False), ("phi", False), ("phi3", False)],
)
def test_an_adapter_file_computes_what_peft_computes(tmp_path, family, rslora):
    model, file, lora = save(tmp_path / "model", family), tmp_path / "model.gguf", tmp_path / "lora.gguf"
    adapter = adapter_of(model, tmp_path / "adapter", use_rslora=rslora)
    writing.write_model(model, file, "f16")
    writing.write_adapter(adapter, lora, transformers.AutoConfig.from_pretrained(model))
    assert np.abs(by_llama_cpp(file, lora) - reference(model, adapter)).max() < 0.06
    assert np.abs(reference(model) - reference(model, adapter)).max() > 0.5


@pytest.mark.parametrize(
    ("named", "more"),
    [
        ("use_dora", {"use_dora": True}),
        ("bias 'all'", {"bias": "all"}),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}),
        ("embed_tokens", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("lm_head", {"target_modules": ["q_proj", "lm_head"]}),
        ("alpha_pattern", {"alpha_pattern": {"q_proj": 3}}),
        ("rank_pattern", {"rank_pattern": {"q_proj": 2}}),
        ("lora_alpha", {"lora_alpha": 0}),
        ("olora", {"init_lora_weights": "olora"}),
        ("SEQ_CLS", {"task_type": "SEQ_CLS"}),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused_by_name(tmp_path, directory, named, more):
    task = more.pop("task_type", "CAUSAL_LM")
    adapter, out = adapter_of(directory, tmp_path / "adapter", **more), tmp_path / "lora.gguf"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"task_type": task}))
    with pytest.raises(ValueError, match=named) as caught:
        writing.write_adapter(adapter, out, transformers.AutoConfig.from_pretrained(directory))
    assert not out.exists() and str(adapter) in str(caught.value)


def test_an_adapter_of_another_shape_or_with_half_a_pair_is_refused(tmp_path, directory):
    adapter, out = adapter_of(directory, tmp_path / "adapter"), tmp_path / "lora.gguf"
    other = transformers.AutoConfig.from_pretrained(directory)
    other.intermediate_size *= 2
    with pytest.raises(ValueError, match=r"but config\.json requires"):
        writing.write_adapter(adapter, out, other)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.lora_B.weight: expected only the A and B"):
        writing.write_adapter(adapter, out, transformers.AutoConfig.from_pretrained(directory))
    file.unlink()
    with pytest.raises(ValueError, match="expected only the A and B"):
        writing.write_adapter(adapter, out, transformers.AutoConfig.from_pretrained(directory))
    assert not out.exists()


@pytest.mark.parametrize(
    ("family", "named", "change"),
    [
        ("llama", "rope type 'linear'", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", "rotation of 0.5", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}),
        ("llama", "biases", {"attention_bias": True}),
        ("llama", "biases", {"mlp_bias": True}),
        ("llama", "activation 'gelu'", {"hidden_act": "gelu"}),
        ("llama", "LlamaForTokenClassification", {"architectures": ["LlamaForTokenClassification"]}),
        ("mistral", "sliding window of 512", {"sliding_window": 512}),
        ("qwen2", "sliding window of 512", {"sliding_window": 512, "use_sliding_window": True}),
        ("qwen2", "heads of 32", {"head_dim": 32}),
        ("qwen3", "biases", {"attention_bias": True}),
        ("phi", "queries", {"qk_layernorm": True}),
        ("phi", "tied", {"tie_word_embeddings": True}),
        ("phi", "activation 'silu'", {"hidden_act": "silu"}),
        (
            "phi3",
            "rope type 'longrope'",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
             "partial_rotary_factor": 1.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024}},
        ),
        ("phi3", "activation 'gelu'", {"hidden_act": "gelu"}),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_differently_is_refused(tmp_path, family, named, change):
    model = save(tmp_path / "model", family)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | change))
    assert named in refused(model, tmp_path / "model.gguf")


def test_phi3_is_written_with_a_context_that_its_window_covers(tmp_path):
    model, file = save(tmp_path / "model", "phi3"), tmp_path / "model.gguf"
    writing.write_model(model, file, "f16")
    assert package.GGUFReader(file).fields["phi3.context_length"].contents() == 100
    engine = LlamaCpp(file, context=512, parallel=1, threads=1)
    try:
        engine.generate([PROMPT * 10], 1)
        with pytest.raises(EngineError, match="context"):
            engine.generate([PROMPT * 12], 1)  # where the model would have forgotten the first tokens
    finally:
        engine.close()
