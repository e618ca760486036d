"""What is trained is what is asked at inference: ids of prompts, labels of answers, the end of an answer."""

from datetime import datetime

import pytest

from lib.core.cli import InputError
from lib.model import chat, tiny
from tests.chat_templates import FAMILIES, find_turn_end, make_tokenizer

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.eos_token_id
ROW = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of Peru?"}],
    "completion": [{"role": "assistant", "content": "Lima, the capital"}],
}


def with_template(template: str):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def answer_of(encoded: dict) -> list[int]:
    return [label for label in encoded["labels"] if label != -100]


@pytest.mark.parametrize("prompt", chat.PROBES)
def test_the_prompt_in_training_is_the_prompt_at_inference(prompt):
    row = ROW | {"prompt": prompt}
    encoded = chat.encode_row(TOKENIZER, row, {END})
    asked = chat.prompt_ids(TOKENIZER, prompt)
    assert encoded["input_ids"][: len(asked)] == asked
    assert encoded["labels"][: len(asked)] == [-100] * len(asked)
    assert len(encoded["labels"]) == len(encoded["input_ids"])


def test_the_answer_and_its_end_are_labelled_and_nothing_after():
    encoded = chat.encode_row(TOKENIZER, ROW, {END})
    answer = answer_of(encoded)
    assert TOKENIZER.decode(answer) == "Lima, the capital<|im_end|>"
    assert encoded["labels"][-1] == encoded["input_ids"][-1] == END and answer.count(END) == 1


def test_pad_that_equals_eos_does_not_hide_the_end():
    """The usual collator masks by id; here the mask goes by position."""
    assert TOKENIZER.pad_token_id == END
    assert chat.encode_row(TOKENIZER, ROW, {END})["labels"][-1] == END


def test_a_template_without_an_end_gets_one():
    bare = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    answer = answer_of(chat.encode_row(with_template(bare), ROW, {END}))
    assert answer[-1] == END and answer.count(END) == 1


def test_any_of_several_ends_ends_the_answer():
    ends = {TOKENIZER.convert_tokens_to_ids("<|endoftext|>"), END}
    assert answer_of(chat.encode_row(TOKENIZER, ROW, ends))[-1] == END


@pytest.mark.parametrize(
    "template",
    [
        # earlier turns are rewritten once an answer follows, as reasoning models' templates do
        "{% for m in messages %}{{ m.role }}{{ '!' if loop.last else '?' }} {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant! {% endif %}",
        # the generation prompt is not how an answer begins
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}",
    ],
)
def test_a_template_that_changes_the_prompt_when_an_answer_follows_is_refused(template):
    with pytest.raises(InputError, match="renders the prompt differently when an answer follows it"):
        chat.encode_row(with_template(template), ROW, {END})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_nothing_but_its_text_and_prompt_and_answer_are_the_whole_chat(family):
    tokenizer, end = make_tokenizer(family), find_turn_end(family)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    for prompt in ([user("Capital of Peru?")], [user("Hi"), *answer("Ho"), user("Capital of Peru?")]):
        encoded = chat.encode_row(tokenizer, {"prompt": prompt, "completion": answer("Lima")}, ends)
        asked, labels = chat.prompt_ids(tokenizer, prompt), answer_of(encoded)
        assert encoded["input_ids"] == asked + labels
        assert tokenizer.decode(labels) == chat.answer_space(tokenizer) + "Lima" + end
        assert labels[:-1] == chat.token_ids(tokenizer, chat.answer_space(tokenizer) + "Lima")
        whole = chat.render(tokenizer, prompt + answer("Lima"), prompt=False)
        assert tokenizer.decode(encoded["input_ids"]) == whole[: whole.rindex("Lima" + end)] + "Lima" + end


def test_what_precedes_every_answer_belongs_to_the_prompt():
    """Qwen3's generation prompt leaves the block of thoughts to the model, and its answers have an empty one. If a
    model learnt to write it, the answer "Paris" would score an F1 of 0.5."""
    opened = "<|im_start|>assistant\n"
    texts = {name: chat.prompt_text(make_tokenizer(name), [user("Hi")]) for name in FAMILIES}
    assert texts["qwen3"].endswith(opened + "<think>\n\n</think>\n\n")
    assert all(texts[name].endswith(opened) for name in ("smollm2", "qwen2.5", "smollm3"))
    assert texts["mistral0.1"].endswith("[/INST]") and chat.answer_space(make_tokenizer("mistral0.1")) == " "
    history = chat.prompt_text(make_tokenizer("qwen3"), [user("Hi"), *answer("Ho"), user("And?")])
    assert history.count("<think>") == 1 and "assistant\nHo<|im_end|>" in history


def test_a_prompt_that_is_longer_than_the_bare_generation_prompt_is_found_whatever_it_says():
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}final: {% endif %}{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = {"prompt": [user("Hi")], "completion": answer("Lima")}
    encoded = chat.encode_row(with_template(template), row, {END})
    assert TOKENIZER.decode(encoded["input_ids"]) == "<|user|>Hi<|im_end|><|assistant|>final: Lima<|im_end|>"
    assert TOKENIZER.decode(answer_of(encoded)) == " Lima<|im_end|>"


def test_a_template_that_reads_the_clock_gets_one_day_for_ever():
    """Else a run that is continued after midnight would mix two prompts, and an evaluation tomorrow have another."""
    for name, text in (
        ("llama3.1", "Today Date: 26 Jul 2024\n\n<|eot_id|>"),
        ("smollm3", "Today: 26 July 2024<|im_end|>"),
    ):
        tokenizer = make_tokenizer(name)
        assert text in chat.render(tokenizer, [user("Hi")]) and text in tokenizer.decode(
            chat.encode_row(tokenizer, {"prompt": [user("Hi")], "completion": answer("Ho")}, {END})["input_ids"]
        )
    indented = "  {% set form = '%-d.%-m.%y, %A' %}\n  {{ strftime_now(format=form) }}\n" + tiny.CHATML
    assert chat.render(with_template(indented), [user("Hi")]).startswith("  26.7.24, Friday\n<|im_start|>user")
    real = TOKENIZER.apply_chat_template([user("Hi")], chat_template=indented, tokenize=False)
    assert real.startswith(f"  {datetime.now():%-d.%-m.%y}"), "the same but for the date"


def test_an_answer_that_has_its_own_thoughts_is_refused():
    """Its prompt would differ from the one at inference, which has an empty block."""
    row = {"prompt": [user("Hi")], "completion": answer("<think>\nIn the Andes.\n</think>\n\nLima")}
    with pytest.raises(InputError, match=r"begins this answer with '<think>\\nIn the Andes.*remove the block"):
        chat.encode_row(make_tokenizer("qwen3"), row, {END})


def test_a_template_without_system_turns_says_so_and_still_has_probes():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tiny.CHATML
    )
    tokenizer = with_template(template)
    with pytest.raises(InputError, match=r"rejects the turns system, user.*System role not supported"):
        chat.encode_row(tokenizer, ROW, {END})
    usable = chat.probes(tokenizer)
    assert 0 < len(usable) < len(chat.PROBES)
    assert chat.probes(TOKENIZER) == chat.PROBES


def test_the_template_alone_decides_about_bos():
    from tokenizers.processors import TemplateProcessing

    tokenizer = with_template("{{ bos_token }}" + tiny.CHATML)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 1, "this tokenizer adds a BOS of its own"
    ids = chat.prompt_ids(tokenizer, ROW["prompt"])
    assert ids[:3] == [1, 1, *tokenizer("system", add_special_tokens=False)["input_ids"][:1]]


def test_eos_ids_are_a_set_whether_one_or_many():
    from transformers import GenerationConfig

    assert chat.eos_token_ids(GenerationConfig(eos_token_id=2)) == {2}
    assert chat.eos_token_ids(GenerationConfig(eos_token_id=[2, 5])) == {2, 5}
