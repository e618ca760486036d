"""Ollama's template gives what Jinja gives, byte for byte, or there is none."""

import re

import pytest
from fetch_base import PLAIN_TEMPLATE

from lib.core.cli import InputError
from lib.export.modelfile import LONGER, go_template, render, render_prompt, split_template, write_modelfile
from lib.model import chat, tiny

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first else '' }}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (  # the system text goes into the first user turn, and nothing opens an answer
    "{% for m in messages %}{% if m.role == 'system' %}[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}{{ '' if loop.index == 2 and messages[0].role == 'system' else '[INST] ' }}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (  # ends a chat that opens no answer with a token that stands nowhere else
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ODD = (
    '{% for m in messages %}{{ \'{{\' }}{{ m.role }}{{ \'}} {{- x -}} `raw` \\\\ """\n"" \u00a0\u200b\t\r\n {\' }}'
    '{{ m.content }}{{ \'}"{"""\n\' }}{% endfor %}'
    '{% if add_generation_prompt %}{{ \'"""\n{{assistant}}"\' }}{% endif %}'
)
LAST = tiny.CHATML.replace("<|im_end|>", "{{ '<|go|>' if loop.last else '<|im_end|>' }}")  # the question, that is
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + SMOLLM2
IGNORES_SYSTEM = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + tiny.CHATML
WITH_BOS = "{{ bos_token }}" + PLAIN_TEMPLATE
KNOWN = [tiny.CHATML, SMOLLM2, PLAIN_TEMPLATE, LLAMA3, LLAMA2, PHI3, ODD, LAST, NO_SYSTEM, IGNORES_SYSTEM, WITH_BOS]


def tokenizer_with(template: str, adds_bos: bool = False):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    return tokenizer


def chatml_with(content: str) -> str:
    return tiny.CHATML.replace("{{ message['content'] }}", "{{ " + content + " }}")


def template_in(text: str) -> str:
    """What Ollama reads: it drops what cannot be printed, and ends at three quotes before white space."""
    template = text.split('TEMPLATE """')[1].split('"""\nPARAMETER')[0]
    assert template.replace("\n", "").isprintable() and '"""' not in template
    return template


def executed(template: str, chat: list[dict]) -> str:
    """A Go template of ours, in the words of Jinja."""
    from jinja2 import Environment

    template = "{% endfor %}".join(template.rsplit("{{ end }}", 1))
    for go, jinja in (
        (r"{{ range .*?}}", "{% for turn in messages %}"),
        (r'{{ if and \(eq \$i 0\) \(ne .Role "system"\) }}', "{% if loop.first and turn.role != 'system' %}"),
        (r'{{ (else )?if eq .Role ("\w+") }}', lambda m: f"{{% {'elif' if m[1] else 'if'} turn.role == {m[2]} %}}"),
        (r"{{ .Content }}", "{{ turn.content }}"),
        (r"{{ end }}", "{% endif %}"),
    ):
        template = re.sub(go, jinja, template)
    return Environment(keep_trailing_newline=True, newline_sequence="\n").from_string(template).render(messages=chat)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", KNOWN)
def test_all_chats_are_what_jinja_makes_of_them(template, adds_bos):
    tokenizer = tokenizer_with(template, adds_bos)
    if adds_bos and not chat.render(tokenizer, chat.PROBES[0]).startswith(tokenizer.bos_token):
        with pytest.raises(InputError, match=r"does not begin with '<\|im_start\|>', which the tokenizer puts"):
            write_modelfile("model.gguf", tokenizer, {2}, 2048)
        return
    go = template_in(write_modelfile("model.gguf", tokenizer, {2}, 2048))
    pieces = split_template(tokenizer)
    for turns in chat.probes(tokenizer) + [long for long in LONGER if long[0]["role"] in pieces.around]:
        expected = chat.render(tokenizer, turns).removeprefix(tokenizer.bos_token if adds_bos else "")
        assert executed(go, turns) == render(pieces, turns) == expected


def test_the_whole_file_for_smollm2():
    assert write_modelfile("model-q4.gguf", tokenizer_with(SMOLLM2), {2, 0, 100_000}, 2048) == (
        "FROM ./model-q4.gguf\n"
        'TEMPLATE """{{ range $i, $_ := .Messages }}{{ if and (eq $i 0) (ne .Role "system") }}<|im_start|>system\n'
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        '{{ end }}{{ if eq .Role "system" }}<|im_start|>system\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "user" }}<|im_start|>user\n'
        "{{ .Content }}<|im_end|>\n"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}{{ end }}<|im_start|>assistant\n"
        '"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 2048\n"
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1\n"
    )


def test_what_precedes_every_answer_opens_the_answer():
    """The model was trained and measured with it in the prompt."""
    opens = tiny.CHATML.replace("}}\n{{ message['content']", "}}\n{{ 'Final: ' if message.role == 'assistant' }}"
                                "{{ message['content']")  # fmt: skip
    go = go_template(split_template(tokenizer_with(opens)))
    assert executed(go, chat.PROBES[0]).endswith("<|im_start|>assistant\nFinal:")


def test_an_empty_system_turn_is_one_and_takes_the_place_of_the_default():
    go = go_template(split_template(tokenizer_with(SMOLLM2)))
    silent = [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}]
    assert executed(go, silent).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHello")
    assert executed(go, silent[1:]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES_SYSTEM])
def test_system_turns_that_the_template_does_not_know_are_left_out(template):
    go = go_template(split_template(tokenizer_with(template)))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert executed(go, asked) == executed(go, asked[1:]) and "Hello" in executed(go, asked)


def test_a_bos_is_left_to_the_runner_that_adds_it_and_to_it_alone():
    assert render_prompt(tokenizer_with(LLAMA3, adds_bos=True), chat.PROBES[0]).startswith("<|start_header_id|>user")
    assert split_template(tokenizer_with(LLAMA3, adds_bos=True)).before == ""
    assert split_template(tokenizer_with(LLAMA3)).before == "<|im_start|>"
    twice = split_template(tokenizer_with("{{ bos_token }}" + LLAMA3, adds_bos=True))
    assert twice.before == "<|im_start|>", "only one is added"


def test_pieces_go_with_the_turns_that_they_belong_to():
    turns = {"system": "<|system|>\n", "user": "<|user|>\n"}
    pieces = split_template(tokenizer_with(PHI3))
    assert pieces.before == "" and {role: pieces.around[role][0] for role in turns} == turns
    assert split_template(tokenizer_with(PLAIN_TEMPLATE)) == (
        "",
        {"system": ("", "\n"), "user": ("User: ", "\n"), "assistant": ("Assistant: ", "<|im_end|>\n")},
        "Assistant: ",
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (chatml_with("message['content'] | trim"), "it renders 'two spaces"),
        (LLAMA3.replace("m['content']", "m['content'] | trim"), "it renders 'two spaces"),
        (chatml_with("message['content'] if loop.last else message['content'] | trim"), "it renders"),
        (chatml_with("message['content'] | upper"), "does not contain the texts of user, assistant, user"),
        # reasoning models' templates: what an earlier turn thought is taken out of it
        (chatml_with("message['content'].split('</think>')[-1]"), r"renders '\n\n4"),
        ("{% if messages | length > 4 %}Long. {% endif %}" + tiny.CHATML, "it renders 'Long"),
        ("{% if messages | length == 2 %}{{ messages[0].content }}{% endif %}" + tiny.CHATML, "once and in order"),
        ("{{ strftime_now('%d %b %Y') }}\n" + tiny.CHATML, "it inserts the date"),
    ],
)
def test_what_cannot_be_said_in_pieces_is_refused(template, why):
    with pytest.raises(InputError, match=re.escape(why)) as refused:
        write_modelfile("model.gguf", tokenizer_with(template), {2}, 2048)
    assert "cannot be put in an Ollama Modelfile" in str(refused.value)
    assert "Use llama.cpp's server" in str(refused.value)
