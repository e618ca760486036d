"""The text before a user's turn, found in templates of several families; what counts as an instruction."""

import pytest

from lib.core.cli import InputError
from lib.engines import magpie
from lib.engines.llamacpp import LlamaCpp
from lib.engines.openai_client import OpenAiClient
from lib.engines.sampling import Sample, Settings
from lib.gguf import writing
from lib.model import chat, tiny
from tests.chat_templates import make_tokenizer

LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
VICUNA = "A chat. {% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}ASSISTANT:"


def with_template(template: str, *special: str):
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": list(special)})
    words.chat_template = template
    return words


@pytest.mark.parametrize(
    ("words", "text", "end"),
    [
        (tiny.tokenizer(), "<|im_start|>user\n", "<|im_end|>"),
        (
            with_template(LLAMA3, "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "<s><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        (with_template(PHI3, "<|user|>", "<|end|>", "<|assistant|>"), "<|user|>\n", "<|end|>"),
        (with_template(MISTRAL, "<s>", "</s>", "[INST]", "[/INST]"), "<s>[INST]", "[/INST]"),
    ],
    ids=["chatml", "llama 3", "phi 3", "mistral"],
)
def test_the_text_before_the_users_is_found_with_the_token_that_ends_it(words, text, end):
    query = magpie.build_pre_query(words)
    assert (query.text, query.end, query.end_text) == (text, words.convert_tokens_to_ids(end), end)
    turns = [{"role": "user", "content": "the capital of a country"}]
    assert chat.prompt_ids(words, turns)[: len(query.ids)] == query.ids
    assert words.decode(query.ids) == text


def test_a_template_may_end_the_users_text_in_plain_words():
    words = with_template(VICUNA)
    query = magpie.build_pre_query(words)
    assert (query.text, query.end, query.end_text) == ("A chat. USER:", None, "ASSISTANT:")
    said = " what is the capital?\nASSISTANT: a river\nUSER:"
    assert magpie.parse_instruction(Sample(said, [300], 9, False), query, words) == ("what is the capital?", "")
    assert magpie.parse_instruction(Sample(" what is", [300], 9, False), query, words)[0] == ""


def test_a_server_that_puts_a_bos_gets_the_text_without():
    words = with_template(LLAMA3, "<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    words.bos_token = "<s>"
    assert magpie.build_pre_query(words).text.startswith("<s>")
    from tokenizers.processors import TemplateProcessing

    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.bos_token_id)]
    )
    query = magpie.build_pre_query(words)
    assert not query.text.startswith("<s>") and query.ids[0] == words.bos_token_id


def test_a_system_turn_stands_before_it_or_is_refused():
    assert magpie.build_pre_query(tiny.tokenizer(), "Talk of rivers.").text == (
        "<|im_start|>system\nTalk of rivers.<|im_end|>\n<|im_start|>user\n"
    )
    with pytest.raises(InputError, match="rejects the turns system, user"):
        magpie.build_pre_query(with_template(MISTRAL, "<s>", "[INST]", "[/INST]"), "Talk of rivers.")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}user: something\n{% endfor %}bot:",
        "{% for m in messages %}user: {{ m.content }} {{ m.content }}\n{% endfor %}bot:",
        "{% for m in messages %}user: {{ m.content | upper }}\n{% endfor %}bot:",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}user: {{ m.content }}{% endfor %}",
    ],
    ids=["ignores it", "repeats it", "changes it", "nothing around it", "nothing after it"],
)
def test_a_template_that_does_not_mark_the_users_text_is_refused(template):
    with pytest.raises(InputError, match="does not mark where a user's text begins and ends"):
        magpie.build_pre_query(with_template(template))


def test_tokens_that_depend_on_what_follows_are_refused():
    words = with_template("{% for m in messages %}user th{{ m.content }} <|im_end|>{% endfor %}")
    words.add_tokens(["thWhat"])
    with pytest.raises(InputError, match="depend on that text"):
        magpie.build_pre_query(words)


def test_only_what_the_end_of_turn_ends_is_an_instruction():
    words = tiny.tokenizer()
    query = magpie.build_pre_query(words)
    ids = magpie.token_ids(words, "\nthe capital of a country ")
    end, other = query.end, words.unk_token_id

    def found(*ids, end):
        return magpie.parse_instruction(
            Sample(words.decode(ids), list(ids), len(ids) + 1, end is not None, end), query, words
        )

    assert found(*ids, end=end) == ("the capital of a country", "")
    assert found(*ids, end, *ids, end=None) == ("the capital of a country", "")  # an engine that knows no other end
    assert found(*ids, end=other) == found(*ids, end=None) == ("", "without an end of turn")
    assert found(*ids, words.bos_token_id, *ids, end=end) == ("", "with template tokens inside")
    assert found(end=end) == ("", "empty")
    assert magpie.parse_instruction(Sample(" a river ", [], 3, True), query, words) == ("a river", "")  # from a server
    assert magpie.parse_instruction(Sample(" a river ", [], 3, False), query, words)[0] == ""


def test_an_added_token_that_is_text_may_be_in_an_instruction():
    """Gemma 2's line ends are tokens of their own, which are not special."""
    words = make_tokenizer("gemma2")
    query = magpie.build_pre_query(words)
    assert query.end_text == "<end_of_turn>"
    ids = magpie.token_ids(words, "the capital:\na river")
    sample = Sample(words.decode(ids), ids, len(ids) + 1, True, query.end)
    assert magpie.parse_instruction(sample, query, words) == ("the capital:\na river", "")


@pytest.mark.parametrize(
    ("family", "end"), [("mistral0.1", "[/INST]"), ("vicuna", "ASSISTANT:"), ("olmo2", "<|assistant|>")]
)
def test_a_text_that_ends_in_plain_words_and_goes_on_to_eos_is_an_instruction(family, end):
    words = make_tokenizer(family)
    query = magpie.build_pre_query(words)
    assert (query.end, query.end_text) == (None, end)

    def parse(text: str, end: int | None = words.eos_token_id) -> tuple[str, str]:
        ids = magpie.token_ids(words, text)
        return magpie.parse_instruction(Sample(text, ids, len(ids) + 1, end is not None, end), query, words)

    assert parse(f" what is the capital?\n{end} Lima") == ("what is the capital?", "")
    assert parse(f" what is the capital?\n{end} Lima", None) == ("what is the capital?", "")
    assert parse(" what is the capital?") == ("", "without an end of turn")
    assert parse(f" what is {words.eos_token} the capital?\n{end} Lima") == ("", "with template tokens inside")
    from_server = Sample(" what is the capital?\n", [], 9, True)  # it takes the stop string off
    assert magpie.parse_instruction(from_server, query, words) == ("what is the capital?", "")
    assert magpie.parse_instruction(from_server._replace(stopped=False), query, words)[0] == ""


def test_plain_words_before_a_special_token_end_a_text_by_themselves():
    template = "{% for m in messages %}<|im_start|>{{ m.content }} [end]<|im_end|>{% endfor %}"
    assert magpie.build_pre_query(with_template(template)).end_text == "[end]"


def test_a_server_stops_at_a_special_token_that_is_not_eos(tmp_path):
    """Mistral's [/INST]: it never is in the text of llama.cpp's server, so no stop string would find it there."""
    words = make_tokenizer("mistral0.3")
    tiny.model(len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    writing.write_model(tmp_path, tmp_path / "model.gguf", "f16")
    query = magpie.build_pre_query(words)
    assert query.end == words.convert_tokens_to_ids("[/INST]")
    engine = LlamaCpp(tmp_path / "model.gguf", context=64, parallel=1, threads=1)
    try:
        server = OpenAiClient(f"http://{engine.address}/v1", model=None, key=engine.key, batch=1, timeout=60, retries=0)
        ends = Settings(8, 1.0, 1.0, query.end, query.end_text)
        assert server.stops_at_end(query.text, ends)
        assert not server.stops_at_end(query.text, ends._replace(end_text="elsewhere"))
    finally:
        engine.close()
