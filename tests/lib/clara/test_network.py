"""CLaRa's model on a tiny Llama: where vectors go, what learns, what is kept."""

import math

import pytest
import torch
from peft import get_peft_model_state_dict

from lib.clara import network
from lib.core.cli import InputError, OutOfMemory
from lib.model import tiny
from tests.chat_templates import make_tokenizer

SHAPE = network.ClaraConfig(compress_rate=4, doc_max_tokens=16, lora_r=2, lora_alpha=4, lora_targets="all-linear")
ENDS = {2}
PAIRS = [("What is the capital?", "Hilo", 1.0), ("Which river?", "the Wailuku river", 0.5), ("How many?", "12", 2.0)]
LONG = "the capital of the country is an island and the river of the west is in the south of the border"


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def made(words, projection: float = 0, trained: bool = True, **overrides) -> network.Clara:
    """With adapters that change something, as those of a trained model do."""
    model = network.Clara(tiny.model(len(words), **overrides).eval(), SHAPE)
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
            model.projection.normal_(std=projection)
    return model


def examples(words) -> list[network.Example]:
    return [
        network.encode_example(words, ["a mountain in the north", LONG], PAIRS, ENDS, SHAPE),
        network.encode_example(words, ["water"], PAIRS[:1], ENDS, SHAPE),
    ]


# --- texts to ids ---------------------------------------------------------------------------------------------


def test_a_prompt_reads_as_the_chat_does_and_labels_are_the_answers(words):
    one = examples(words)[0]
    assert one.counts == [1, -(-len(network.token_ids(words, f" {LONG}")) // 16)] and len(one.pieces) == sum(one.counts)
    assert words.decode(one.before[0]).endswith("user\nDocument:") and words.decode(one.before[1]) == "\n\nDocument:"
    chat = words.decode(one.after)
    assert chat.startswith(
        "\n\nQuestion: What is the capital?\n\nAnswer:<|im_end|>\n<|im_start|>assistant\nHilo<|im_end|>\n"
    )
    assert chat.endswith("How many?\n\nAnswer:<|im_end|>\n<|im_start|>assistant\n12<|im_end|>")
    learnt = words.decode([label for label in one.labels if label != -100])
    assert learnt == "Hilo<|im_end|>the Wailuku river<|im_end|>12<|im_end|>"


def test_long_documents_are_cut_and_nothing_is_lost(words):
    for text in ("a", LONG, LONG * 40):
        found = network.split_document(words, text, 16)
        assert [n for piece in found for n in piece] == network.token_ids(words, f" {text}")
        assert max(map(len, found)) <= 16 and max(map(len, found)) - min(map(len, found)) <= 1


# --- vectors --------------------------------------------------------------------------------------------------


def test_each_vector_begins_with_its_own_stretch_in_which_rare_tokens_count_more():
    rarity = torch.ones(3, 8)
    rarity[0, 0] = 3
    found = network.split_evenly(rarity, torch.tensor([8, 5, 2]), 4)
    assert found.norm(dim=-1).allclose(torch.ones(3, 4))
    assert found[0].nonzero().tolist() == [[n // 2, n] for n in range(8)] and (found[0, 0, 0] / found[0, 0, 1]) == 3
    assert found[1].argmax(-1).tolist() == [3, 4, 5, 6] and found[1][3].nonzero().flatten().tolist() == [6, 7]
    assert found[2].argmax(-1).tolist() == [6, 6, 7, 7]  # two tokens for four vectors


def test_a_document_compresses_alike_alone_and_beside_others(words):
    model, some = made(words, 0.1), [[5, 6, 7], [9], list(range(20, 36))]
    together, _ = model.compress(some)
    assert together.shape == (3, 4, 64)
    for ids, vectors in zip(some, together):
        assert model.compress([ids])[0][0].allclose(vectors, atol=1e-5)


def test_many_pieces_compress_in_batches_of_like_length_in_their_own_order(words):
    model, some = made(words, 0.1), [list(range(5, 5 + n)) for n in (9, 2, 16, 1, 7)]
    for dtype, error in ((torch.float32, 2e-3), (torch.bfloat16, 0.1)):  # autocast in bf16 stacks no float16
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = model.compressed(some, 2)
        assert found.dtype == torch.float16
        for ids, vectors in zip(some, found):
            assert model.compress([ids])[0][0].allclose(vectors.float(), atol=error)


def test_vectors_stand_where_the_text_would(words):
    """Given a document's own embeddings as its vectors, the model reads the text itself."""
    model = made(words, trained=False)
    embed = model.lm.get_input_embeddings().weight
    with torch.no_grad():
        model.separator.copy_(embed[77])
    one = network.encode_example(words, ["the river in the"], PAIRS, ENDS, SHAPE)
    (ids,) = one.pieces
    found = model.loss([one], embed[ids][None])
    whole = torch.tensor([one.before[0] + ids + [77] + one.after])
    labels = torch.tensor([-100] * (whole.shape[1] - len(one.labels)) + one.labels)
    logs = model.lm(whole).logits[0, :-1].log_softmax(-1)
    right = [logs[n, label] for n, label in enumerate(labels[1:].tolist()) if label != -100]
    wanted = -sum(weight * log.item() for weight, log in zip(one.weights, right, strict=True))
    assert found.item() == pytest.approx(wanted, rel=1e-5)


FAMILIES = {
    "llama": {}, "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {"logit_scale": 0.0625}, "cohere2": {"logit_scale": 0.25}, "gemma": {"head_dim": 16},
    "gemma2": {"final_logit_softcapping": 0.2, "head_dim": 16}, "gemma3_text": {"head_dim": 16}, "qwen3": {},
}  # fmt: skip


def of_family(words, family: str):
    """A tiny model of another architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape, **FAMILIES.get(family, {}))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_embeddings_are_those_of_the_model_itself(words, family):
    """Given a document's own embeddings as its vectors, the loss is that of the model's own logits of the text."""
    lm = of_family(words, family)
    network.check_reads_embeddings(lm, "tiny")
    model = network.Clara(lm, SHAPE)
    one = network.encode_example(words, ["the river in the"], PAIRS, ENDS, SHAPE)
    (ids,) = one.pieces
    table = lm.get_input_embeddings()(torch.arange(len(words))).detach()
    assert network.embed_vocabulary(lm).equal(table) and model.memory.allclose(table.mean(0))
    with torch.no_grad():
        model.separator.copy_(table[77])
        found = model.loss([one], table[ids][None])
        whole = torch.tensor([one.before[0] + ids + [77] + one.after])
        logits = lm(whole).logits[0, :-1]
    places = torch.arange(len(logits) - len(one.labels) + 1, len(logits))[torch.tensor(one.labels[1:]) != -100]
    right = logits.log_softmax(-1)[places, whole[0, places + 1]]
    assert found.item() == pytest.approx(-(right * torch.tensor(one.weights)).sum().item(), rel=1e-5)


def test_a_model_that_reads_embeddings_otherwise_is_refused(words):
    lm = of_family(words, "falcon_h1")
    lm.model.embedding_multiplier = 5.0
    with pytest.raises(InputError, match="tiny: FalconH1ForCausalLM computes something else from embeddings"):
        network.check_reads_embeddings(lm, "tiny")


def test_the_loss_of_a_batch_is_that_of_its_rows(words):
    model, some = made(words, 0.1), examples(words)
    assert model(some)[0].item() == pytest.approx(sum(model([one])[0].item() for one in some), rel=1e-5)


def test_vectors_begin_as_what_is_rare_in_their_stretches(words):
    model, ids = made(words), list(range(20, 36))
    model.know([ids, [20, 50], [20, 51]])
    embed, rarity = model.lm.get_input_embeddings().weight.detach(), model.rarity[ids]
    assert rarity[:2].tolist() == pytest.approx([0.3, math.log(4 / 2) + 0.3]) and rarity[1] < model.rarity[99]
    usual = embed[[*ids, 20, 50, 20, 51]].mean(0)
    weights = torch.nn.functional.normalize(rarity.reshape(4, 4), dim=1)
    own = usual + torch.einsum("vn,vnw->vw", weights, (embed[ids] - usual).reshape(4, 4, 64))
    assert model.compress([ids])[0][0].allclose(own, atol=1e-6)
    assert model.compress([ids[:4]])[0][0].allclose(embed[ids[:4]], atol=1e-6)  # a vector a token: the text itself


# --- what learns ------------------------------------------------------------------------------------------------


def gradients(model, some) -> dict[str, torch.Tensor]:
    model.zero_grad()
    answer, apart = model(some)
    (answer + 0.1 * apart).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_stage_trains_what_it_should_and_nothing_else(words):
    model = made(words, 0.1)
    model.train_only("compressor", "generator")
    found = gradients(model, examples(words))
    adapters = {n for n, _ in model.named_parameters() if ".compressor." in n or ".generator." in n}
    assert found.keys() == adapters | {"memory", "separator", "projection"}
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    model.train_only("generator")
    assert gradients(model, examples(words)).keys() == {n for n in adapters if ".generator." in n}
    model.train_only("reasoner")
    model.zero_grad()
    model.query_vectors(model.compress([[5, 6, 7]], "reasoner")[0])[0, :9].sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    reasoner = {n for n, _ in model.named_parameters() if ".reasoner." in n}
    assert found.keys() == reasoner | {"seeking", "places"} and all(g.abs().sum() > 0 for g in found.values())


def test_gradient_checkpointing_runs_each_part_again_with_its_own_adapter(words):
    model = made(words, 0.1)
    model.train_only("compressor", "generator")
    plain = gradients(model, examples(words))
    model.lm.train()
    model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, examples(words))
    assert again.keys() == plain.keys()
    for name, gradient in plain.items():
        assert again[name].allclose(gradient, atol=1e-6), name


# --- search -----------------------------------------------------------------------------------------------------


def test_a_choice_picks_the_best_in_order_and_its_gradient_is_that_of_softmaxes():
    scores = torch.tensor([0.1, 0.9, -0.4, 0.5], requires_grad=True)
    picks = network.choose_straight_through(scores, 3, 0.5)
    assert picks.detach().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    values = torch.tensor([[1.0, 2.0, 3.0, 5.0], [7.0, 11.0, 13.0, 17.0], [19.0, 23.0, 29.0, 31.0]])
    (picks * values).sum().backward()
    again, wanted = scores.detach().clone().requires_grad_(True), 0
    for row, left in zip(values, ([0, 1, 2, 3], [0, 2, 3], [0, 2])):  # a pick is a choice among those that are left
        wanted = wanted + (again[left] / 0.5).softmax(0) @ row[left]
    wanted.backward()
    assert scores.grad.allclose(again.grad, atol=1e-6)


def test_what_was_picked_is_not_picked_again_at_any_temperature():
    scores = torch.tensor([1.0, -1.0, 0.0])
    for temperature in (1, 0.02, 0.001):
        assert network.choose_straight_through(scores, 9, temperature).argmax(1).tolist() == [
            0,
            2,
            1,
        ]  # k larger than the candidates


def test_directions_are_whitened_and_a_question_begins_as_all_that_it_says(words):
    """With the whole question in each place, its cosine with a document counts the words of both, wherever they are."""
    model = made(words, trained=False)
    embed = model.lm.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # as in trained models, a few directions have most of the variance
        common = torch.randn(len(embed), 2, generator=generator) @ torch.randn(2, 64, generator=generator)
        embed.normal_(generator=generator).add_(common)
    pieces = [torch.randperm(len(embed), generator=generator)[:16].tolist() for _ in range(60)]
    model.know(pieces)
    vectors = model.compressed(pieces, 16)
    own, _ = model.compress([piece[9:12] for piece in pieces], "reasoner")
    assert own.shape == (60, 4, 64) and torch.equal(own[:, 0], own[:, 3])

    def found() -> float:
        best = (model.query_vectors(own) @ model.directions(vectors).T).argmax(1)
        return (best == torch.arange(60)).float().mean().item()

    model.centre.copy_(vectors.float().mean(0))
    plain = found()
    model.learn_to_search(vectors)
    apart = (vectors.float() - model.centre).flatten(0, 1)
    before, after = (torch.linalg.eigvalsh(x.T @ x / len(x)) for x in (apart, apart @ model.whitening))
    assert after.allclose(before / (before + before.mean()), atol=1e-4)
    assert plain < 0.3 and found() > 0.6


def test_one_piece_alone_can_be_searched(words):
    model = made(words)
    vectors = model.compressed([[5, 6, 7]], 1)
    model.learn_to_search(vectors)
    scores = model.query_vectors(model.compress([[5]], "reasoner")[0]) @ model.directions(vectors).T
    assert scores.shape == (1, 1) and scores.isfinite().all()


@pytest.mark.parametrize("words", [tiny.tokenizer(), make_tokenizer("qwen3")], ids=["chatml", "qwen3"])
def test_a_question_is_asked_as_it_was_trained(words):
    trained = network.encode_example(words, ["the river", LONG], PAIRS[:1], ENDS, SHAPE)
    asked = network.encode_question(words, PAIRS[0][0], trained.counts)
    assert asked.before == trained.before and asked.after == trained.after[: trained.labels.count(-100)]
    assert words.decode([label for label in trained.labels if label != -100]) == f"{PAIRS[0][1]}<|im_end|>"


# --- files ------------------------------------------------------------------------------------------------------


def test_what_was_saved_answers_with_the_same_bits(words, base, tmp_path):
    model, some = made(words, 0.1), examples(words)
    network.save_adapters(model, tmp_path, ["compressor", "generator"], base)
    again = network.load_clara(tmp_path, tiny.model(len(words)).eval())
    with torch.no_grad():
        assert torch.equal(again.compress(some[0].pieces)[0], model.compress(some[0].pieces)[0])
        assert torch.equal(again(some)[0], model(some)[0])
    fresh = get_peft_model_state_dict(again.lm, adapter_name="reasoner")
    assert all(not t.any() for name, t in fresh.items() if "lora_B" in name)


def test_an_adapter_of_another_base_is_refused(words, base, tmp_path):
    network.save_adapters(made(words), tmp_path, ["compressor"], base)
    with pytest.raises(InputError, match=r"does not belong to this base"):
        network.load_clara(tmp_path, tiny.model(len(words), num_hidden_layers=1).eval())


def test_documents_that_do_not_fit_into_memory_together_are_compressed_in_halves(words, monkeypatch):
    model, pieces = made(words), [[5 + n, 6, 7][: 1 + n % 3] for n in range(7)]
    expected, real = model.compressed(pieces, 8), network.Clara.compress

    def compress(self, some, *given):
        if len(some) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, some, *given)

    monkeypatch.setattr(network.Clara, "compress", compress)
    most = 2
    assert torch.allclose(model.compressed(pieces, 8), expected, atol=1e-2)
    most = 0
    with pytest.raises(OutOfMemory, match="compressing a single document"):
        model.compressed(pieces, 8)
