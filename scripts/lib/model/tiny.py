"""A tiny random Llama and its tokenizer, made on the spot: enough to run every script in seconds."""

import string

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "the of and in is to a country capital population area document question answer what which has "
    "government language currency river mountain north south east west million percent island border"
)


def tokenizer(words: str = WORDS):
    """A byte-level BPE with ChatML turns: GPT-2's pre-tokenizer, 256 bytes, and merges that spell `words`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator([f" {word}" for word in words.split()] + list(string.ascii_lowercase), trainer)
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2],
        unk_token=SPECIAL[0], model_max_length=2048,
    )  # fmt: skip
    fast_tokenizer.chat_template = CHATML
    return fast_tokenizer


def model(vocab_size: int, seed: int = 0, **overrides):
    """LlamaForCausalLM in fp32: 2 layers of width 64, 4 heads over 2 key-value heads, tied embedding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | overrides)))
