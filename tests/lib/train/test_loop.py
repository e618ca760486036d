"""Memory that runs out in training: pieces add up to the whole, nothing of a failed pass stays, what fits is kept."""

import copy
import json
import resource
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lib.core import hardware
from lib.core.cli import OutOfMemory
from lib.core.runlog import Run
from lib.model import tiny
from lib.train import back_off, length_groups, loop
from tests.conftest import beside

LORA = dict(r=4, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False, task_type="CAUSAL_LM")
BATCH, ACCUMULATION = 5, 2


class Sft(back_off.RetrySmaller, SFTTrainer):
    pass


class Dpo(back_off.RetrySmaller, DPOTrainer):
    texts_a_row = 2


@pytest.fixture
def micro_batch(tmp_path):
    return back_off.MicroBatch(Run(tmp_path / "run", {}), BATCH, ACCUMULATION, "a test")


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def made(kind, micro_batch, dropout: float = 0.0):
    """A trainer of a tiny model, and a micro batch of five rows of different lengths on its way through it."""
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    model = get_peft_model(tiny.model(len(tokenizer)), LoraConfig(**LORA | {"lora_dropout": dropout}))
    lengths = [7, 19, 5, 12, 12]
    if kind is Sft:
        rows = [{"input_ids": ids(n, n), "labels": [-100] * (n // 2) + ids(n - n // 2, n)} for n in lengths]
        how, config = SFTConfig, dict(dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    else:
        texts = [" ".join(map(str, range(n))) for n in lengths]
        rows = [{"prompt": f"count to {n}", "chosen": t, "rejected": t[: n // 2]} for n, t in zip(lengths, texts)]
        how, config = DPOConfig, {}
    shared = dict(
        output_dir=str(micro_batch.file.parent / "run"), use_cpu=True, report_to="none", bf16=False,
        per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION, activation_checkpointing=False,
    )  # fmt: skip
    trainer = kind(
        model=model, args=how(**config, **shared), train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        micro_batch=micro_batch,
    )  # fmt: skip
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    trainer.current_gradient_accumulation_steps = ACCUMULATION
    return trainer, batch


def step(trainer, batch) -> tuple[float, list]:
    """Loss and gradients of the micro batch, on top of gradients that are there already."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    for n, parameter in enumerate(trained):
        parameter.grad = torch.full_like(parameter, 1e-3 * n)
    torch.manual_seed(1)
    items = trainer._get_num_items_in_batch([batch] * ACCUMULATION, "cpu")
    loss = trainer.training_step(trainer.model, copy.copy(batch), items)
    return loss.item(), [p.grad.clone() for p in trained]


def same(one: tuple, other: tuple, within: float) -> None:
    assert one[0] == pytest.approx(other[0], abs=within)
    assert max((a - b).abs().max().item() for a, b in zip(one[1], other[1], strict=True)) <= within


@pytest.mark.parametrize("kind", [Sft, Dpo])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_pieces_add_up_to_the_micro_batch(kind, rows, micro_batch):
    """Also where they are of different sizes: the loss is a mean over tokens in SFT and over pairs in DPO."""
    trainer, batch = made(kind, micro_batch)
    whole = step(trainer, batch)
    micro_batch.rows = rows
    same(step(trainer, batch), whole, 1e-6)
    assert trainer.current_gradient_accumulation_steps == ACCUMULATION
    plain = kind.__mro__[2].training_step
    trainer.training_step = lambda *given: plain(trainer, *given)
    same(step(trainer, batch), whole, 1e-6)


def test_a_mean_over_rows_is_divided_by_the_number_of_passes_that_the_trainer_is_told(micro_batch):
    """Also where that is no whole number, which lets a piece count by its share of the rows."""
    trainer, batch = made(Dpo, micro_batch)
    whole, _ = step(trainer, batch)
    trainer.current_gradient_accumulation_steps = 2.5 * ACCUMULATION
    less, _ = step(trainer, batch)
    assert less == pytest.approx(whole / 2.5, rel=1e-6)


@pytest.mark.parametrize("outputs", [None, ("log_probs", "entropy", "is_top1")])
def test_the_fused_head_gives_what_the_logits_say_and_projects_labelled_positions_alone(outputs, monkeypatch):
    """Asked by name through PEFT's model, as dpo.py and lib/forecast/timing.py do."""
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_use_triton", lambda device: False)  # TRL's own answer on a CPU
    forward, projected = utils._ChunkedLogProbFunction.forward, []

    def counting(ctx, hidden, *given):
        projected.append(len(hidden))
        return forward(ctx, hidden, *given)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "forward", staticmethod(counting))
    plain = tiny.model(len(tiny.tokenizer())).eval()
    input_ids = torch.tensor([ids(12, 1), ids(12, 2)])
    labels = input_ids.masked_fill(torch.arange(12) < torch.tensor([[9], [6]]), -100)
    logprobs = plain(input_ids).logits[:, :-1].log_softmax(-1)
    right = logprobs.gather(2, labels[:, 1:, None].clamp(0))[..., 0].masked_fill(labels[:, 1:] == -100, 0)
    utils.add_fused_lm_head(plain, **{"outputs": outputs} if outputs else {})
    model = get_peft_model(plain, LoraConfig(**LORA | {"init_lora_weights": True})).eval()
    for expected in ([22], [22, 9]):  # every position but the last; then those with a label
        found = model(input_ids=input_ids, labels=labels, fused_lm_head=True)
        assert projected == expected
        assert found.log_probs.shape == right.shape and (found.log_probs - right).abs().max() < 1e-5
        assert found.loss.item() == pytest.approx(-right.sum().item() / 9, rel=1e-5)
        loop.project_labels_only()


def test_a_piece_is_padded_to_its_own_longest_row(micro_batch):
    for kind in (Sft, Dpo):
        trainer, batch = made(kind, micro_batch)
        assert batch["input_ids"].shape[0] == BATCH * kind.texts_a_row
        piece = trainer.piece(batch, BATCH, slice(2, 4))
        lengths = batch["attention_mask"].sum(1).unflatten(0, (-1, BATCH))[:, 2:4].flatten()
        assert piece["attention_mask"].sum(1).tolist() == lengths.tolist()
        width = int(lengths.max())
        assert all(value.shape == (2 * kind.texts_a_row, width) for value in piece.values())
        for n, row in enumerate([2, 3, 7, 8][: 2 * kind.texts_a_row]):
            assert piece["input_ids"][n, : lengths[n]].tolist() == batch["input_ids"][row, : lengths[n]].tolist()


def failing(trainer, most: int, where: str):
    """Let passes of more than `most` rows run out of memory; the gradients that were there then are noted."""
    real, seen = trainer.compute_loss, []
    layer = trainer.model.get_base_model().model.layers[0]

    def out_of_memory(*_):
        seen.append([p.grad.clone() for p in trainer.model.parameters() if p.requires_grad])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def in_the_middle(_, __, output):
        output = output if torch.is_tensor(output) else output[0]
        if output.requires_grad:  # not that of DPO's reference
            output.register_hook(out_of_memory)

    def compute_loss(model, inputs, **how):
        if len(inputs["input_ids"]) // trainer.texts_a_row <= most:
            return real(model, inputs, **how)
        if where == "forward":
            torch.rand(100)  # dropout has drawn by then
            out_of_memory()
        hook = layer.register_forward_hook(in_the_middle)
        try:
            return real(model, inputs, **how)
        finally:
            hook.remove()

    trainer.compute_loss = compute_loss
    return seen


@pytest.mark.parametrize("kind", [Sft, Dpo])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_running_out_of_memory_it_is_as_if_begun_with_less(kind, where, micro_batch, capsys):
    """Bit by bit, dropout included; a backward pass that failed had reached the later layer's gradients already."""
    trainer, batch = made(kind, micro_batch, dropout=0.1)
    micro_batch.rows = 2
    expected = step(trainer, batch)
    counted = trainer._total_train_tokens, len(trainer._metrics["train"]["entropy"])

    trainer, batch = made(kind, micro_batch, dropout=0.1)
    micro_batch.rows = BATCH
    seen = failing(trainer, 2, where)
    found = step(trainer, batch)
    assert micro_batch.rows == 2 and len(seen) == 2  # 5, then 3
    changed = [not torch.equal(p, torch.full_like(p, 1e-3 * n)) for n, p in enumerate(seen[-1])]
    assert any(changed) == (where == "backward") and not all(changed)
    same(found, expected, 0)
    assert (trainer._total_train_tokens, len(trainer._metrics["train"]["entropy"])) == counted
    said = capsys.readouterr().err
    assert "out of memory at micro-batch 5 with 2 accumulation steps; continuing with 3 and 4." in said
    assert "out of memory at micro-batch 3 with 4 accumulation steps; continuing with 2 and 6." in said
    assert said.count("The effective batch size remains 10") == 2


def test_nothing_of_a_failed_pass_stays_in_memory(micro_batch):
    """Neither through the exception nor its traceback: what is repeated needs the room."""
    trainer, batch = made(Sft, micro_batch)
    real, held = trainer.compute_loss, []

    def compute_loss(model, inputs, **how):
        if len(inputs["input_ids"]) > 2:
            activations = torch.zeros(10)
            held.append(weakref.ref(activations))
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
        assert [reference() for reference in held] == [None, None]
        return real(model, inputs, **how)

    trainer.compute_loss = compute_loss
    step(trainer, batch)


def test_other_errors_pass_and_change_nothing(micro_batch):
    trainer, batch = made(Sft, micro_batch)

    def compute_loss(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer.compute_loss = compute_loss
    with pytest.raises(RuntimeError, match="shapes"):
        step(trainer, batch)
    assert micro_batch.rows == BATCH and not micro_batch.file.exists()


def test_a_single_row_that_does_not_fit_ends_the_run(micro_batch):
    trainer, batch = made(Sft, micro_batch)
    failing(trainer, 0, "forward")
    with pytest.raises(
        OutOfMemory, match=r"in step 1 with a single example .*No step is finished yet.*--gradient-checkpointing"
    ):
        step(trainer, batch)
    assert beside(micro_batch.file.parent / "run") == ["run.json"]  # there is no step to keep


# --- what is kept for the next run ---------------------------------------------------------------------------


def test_what_fitted_is_kept_for_the_same_work_alone(tmp_path, capsys):
    run = Run(tmp_path / "run", {})

    def begin(batch=8, work="sft of a, 1024 tokens"):
        return back_off.MicroBatch(run, batch, 2, work)

    begin().halve(8)
    begin(work="dpo of a").halve(3)  # a short last batch
    assert beside(tmp_path) == ["micro_batch.json", "run"]
    assert sorted(json.loads((tmp_path / "micro_batch.json").read_bytes()).values()) == [2, 4]
    capsys.readouterr()
    assert begin(work="sft of b, 1024 tokens").rows == 8
    assert begin(batch=4).rows == 4 and begin(batch=2).rows == 2
    assert capsys.readouterr().err == ""
    assert begin().rows == 4
    said = capsys.readouterr().err
    assert "using micro-batch 4 with 4 accumulation steps, because" in said
    assert f"delete {tmp_path / 'micro_batch.json'} to try 8 with 2 again" in said
    (tmp_path / "micro_batch.json").unlink()
    assert begin().rows == 8


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"key": 0}', b'{"key": "2"}', b'{"key": null}'])
def test_a_broken_file_of_what_fitted_is_no_obstacle(tmp_path, content):
    run, file = Run(tmp_path / "run", {}), tmp_path / "micro_batch.json"
    key = back_off.MicroBatch(run, 8, 1, "w").key
    file.write_bytes(content.replace(b"key", key.encode()))
    made = back_off.MicroBatch(run, 8, 1, "w")
    assert made.rows == 8
    made.halve(8)
    assert json.loads(file.read_bytes())[key] == 4


def test_what_ulimit_allows_is_the_memory_there_is(monkeypatch):
    free = hardware.memory_bytes()
    assert 0 < free <= hardware.ram_bytes()
    limits = {resource.RLIMIT_AS: free // 2, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert hardware.memory_bytes() == free // 2


def test_changes_are_read_from_the_log():
    log = [{"step": n, "loss": 1.0, "micro_batch": rows} for n, rows in enumerate([8, 8, 4, 4, 2], start=1)]
    assert back_off.summarise_micro_batches(log) == [
        {"from_step": 1, "rows": 8}, {"from_step": 3, "rows": 4}, {"from_step": 5, "rows": 2},
    ]  # fmt: skip
    assert back_off.summarise_micro_batches([]) == []


def test_the_batches_of_a_first_part_come_before_all_others():
    order = [*length_groups.LengthGroupedBatches([n % 5 for n in range(20)], 4, 42, before=10)]
    assert sorted(order) == [*range(20)]
    assert max(order[:8]) < 10 <= min(order[8:16])  # whole batches; the rows left over come last
    assert order[:8] != sorted(order[:8])
    alone = [*length_groups.LengthGroupedBatches([n % 5 for n in range(20)], 4, 42)]
    assert sorted(alone) == [*range(20)] and max(alone[:8]) > 9


@pytest.mark.parametrize("before", [0, 8])
def test_each_batch_has_rows_of_like_length(before):
    lengths = [n * 7919 % 100 for n in range(16)]
    order = [*length_groups.LengthGroupedBatches(lengths, 4, 42, before)]
    for part in filter(None, (order[:before], order[before:])):
        batches = [sorted(lengths[n] for n in part[at : at + 4]) for at in range(0, len(part), 4)]
        assert [one for batch in sorted(batches) for one in batch] == sorted(lengths[n] for n in part)
