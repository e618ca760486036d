"""Chat templates that behave like those of public model families, in few words, on the tiny model's tokenizer."""

from typing import NamedTuple

from lib.model import tiny


class Family(NamedTuple):
    template: str
    special: str = ""  # tokens that no text contains
    text: tuple[str, ...] = ()  # added tokens that are ordinary text
    bos: str | None = None
    eos: str = "</s>"
    turn_end: str | None = None  # the token that ends an answer (None: eos)


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
# Only an answer after the last question has a block for thoughts; the generation prompt leaves it to the model.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content %}"
    "{% set thoughts = '' %}{% if '</think>' in text %}"
    "{% set thoughts = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + text }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATE = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
)
TODAY = "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}"
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (  # with [INST] as text it is Llama 2's and Mistral 0.1's, with tokens of that name Mistral 0.3's
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}A chat.{% for m in messages %}{% if m.role == 'user' %} USER: {{ m.content }}"
    "{% else %} ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{{ '' if loop.last else '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
HEADERS = "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"

FAMILIES = {
    "smollm2": Family(CHATML, eos="<|im_end|>"),
    "qwen2.5": Family(CHATML, text=("<tool_call>", "</tool_call>"), eos="<|im_end|>"),
    "qwen3": Family(QWEN3, text=("<think>", "</think>"), eos="<|im_end|>"),
    "llama3": Family(LLAMA3, HEADERS, (), "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "llama3.1": Family(
        DATE + LLAMA3.replace("{% for", TODAY + "{% for", 1),
        HEADERS, (), "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
    ),
    "smollm3": Family(
        "{% set today = strftime_now('%d %B %Y') %}<|im_start|>system\nToday: {{ today }}<|im_end|>\n" + tiny.CHATML,
        text=("<think>", "</think>"), eos="<|im_end|>",
    ),
    "gemma2": Family(
        GEMMA2, "<bos> <eos> <start_of_turn> <end_of_turn>", ("\n", "\n\n"), "<bos>", "<eos>", "<end_of_turn>"
    ),
    "mistral0.1": Family(MISTRAL, "<s> </s>", (), "<s>"),
    "mistral0.3": Family(MISTRAL, "<s> </s> [INST] [/INST]", (), "<s>"),
    "phi3": Family(PHI3, "<|user|> <|assistant|> <|end|> <|system|>", (), None, "<|endoftext|>", "<|end|>"),
    "vicuna": Family(VICUNA, "<s> </s>", (), "<s>"),
    "olmo2": Family(OLMO2, bos="<|endoftext|>", eos="<|endoftext|>"),
}  # fmt: skip


def make_tokenizer(name: str):
    family, words = FAMILIES[name], tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": family.special.split()})
    words.add_tokens(list(family.text))
    words.bos_token, words.eos_token, words.chat_template = family.bos, family.eos, family.template
    return words


def find_turn_end(name: str) -> str:
    return FAMILIES[name].turn_end or FAMILIES[name].eos
