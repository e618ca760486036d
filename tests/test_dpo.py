"""dpo.py on a tiny model: its loss against TRL's and the formula, what it leaves and refuses, kills and full memory."""

import argparse
import json
import math
import shutil
from collections import Counter

import dpo
import pytest

from lib.core import artifact, runlog
from lib.core.cli import InputError
from lib.data import records
from lib.model import directory, loading
from lib.model.directory import open_directory
from tests.conftest import beside, call, killed_at_checkpoint, refused, row

FLAGS = ["--samples", 16, "--batch-size", 2, "--accumulation-steps", 2, "--learning-rate", 3e-3, "--precision", "fp32",
         "--threads", 1]  # fmt: skip


def pair(n: int) -> dict:
    """The town of the document, and a longer one that is not in it."""
    asked = row(n)
    prompt = records.question_with_documents(asked["question"], asked["documents"])
    return {"prompt": prompt, "chosen": asked["gold"][0], "rejected": f"somewhere north of town {(n + 3) % 7}"}


@pytest.fixture(scope="module")
def adapter(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    how = ["--samples", 16, "--batch-size", 4, "--accumulation-steps", 1, "--epochs", 4, "--precision", "fp32",
           "--threads", 1]  # fmt: skip
    done = call("sft", "--model", base, "--data", data, "--output", folder / "lora", "--run-dir", folder / "run", *how)
    assert done.code == 0, done.err
    return folder / "lora"


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "preferences"
    with artifact.write_artifact(folder, "preferences", argparse.Namespace(seed=0)) as build:
        for name, numbers in (("train", range(20)), ("validation", range(20, 28))):
            records.write(build.path / f"{name}.jsonl", [pair(n) for n in numbers])
    return folder


def flags(base, adapter, data, folder, *more):
    given = ["--model", base, "--adapter", adapter, "--data", data, "--output", folder / "dpo", "--run-dir",
             folder / "run"]  # fmt: skip
    return [*given, *FLAGS, *more]


def metrics_of(folder) -> dict:
    return artifact.read(folder / "dpo", "adapter")["metrics"]


def losses(folder) -> list[float]:
    return [event["loss"] for event in metrics_of(folder)["history"]]


@pytest.fixture(scope="module")
def trained(base, adapter, preferences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    before = artifact.read(base)["digest"], artifact.read(adapter)["digest"]
    done = call("dpo", *flags(base, adapter, preferences, folder, "--epochs", 4, "--checkpoint-steps", 2))
    assert done.code == 0, done.err
    assert (artifact.read(base)["digest"], artifact.read(adapter)["digest"]) == before
    return folder, done


# --- what it computes ------------------------------------------------------------------------------------------


def trainer_of(base, adapter, folder, shared: bool, sft_weight: float = 0.0):
    """Tokenised pairs of different lengths, and the trainer that main would make of them."""
    from lib.core import runlog
    from lib.train import back_off

    given = flags(base, adapter, folder, folder, "--sft-weight", sft_weight, "--epochs", 1, "--profile", "none")
    args = dpo.cli.parse(dpo.make_parser(), [*map(str, given)])
    model = open_directory(base)
    tokenizer, ends = directory.load_tokenizer(model), directory.eos_token_ids(model)
    rows = [records.normalise_pair(pair(n), Counter()) for n in range(3)]
    rows[1]["rejected"][0]["content"] = "no"
    rows[2]["prompt"][0]["content"] = "Where?"
    pairs = [dpo.encode(tokenizer, one, ends) for one in rows]
    dtype = loading.torch_dtype("fp32")
    run = runlog.Run(folder / "run", {})
    made = back_off.MicroBatch(run, 3, 1, "a test")
    return dpo.make_trainer(dpo.load(model, args, dtype), pairs, shared, args, dtype, run, made), pairs


def disturb(model) -> None:
    """Move the policy away from its reference, the same way each time."""
    import torch

    torch.manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if ".default." in name:
            parameter.data += 0.05 * torch.randn(parameter.shape)


def loss_and_gradients(trainer, batch, **how) -> tuple[float, dict]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, **how)
    loss.backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad and ".default." in name}
    assert len(found) > 20
    return loss.item(), found


@pytest.mark.parametrize("shared", [True, False])
def test_loss_and_gradients_are_those_of_trl_and_of_the_formula(base, adapter, tmp_path, shared):
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer, pairs = trainer_of(base, adapter, tmp_path, shared)
    before = dpo.answer_logps(trainer, pairs, "reference")
    for one, logps in zip(pairs, before):
        one["reference"] = logps
    opened = open_directory(base)
    plain = loading.attach_adapter(loading.load_model(opened, "fp32"), adapter, base, trainable=True)

    def by_hand() -> list[list[float]]:
        found = []
        for one in pairs:
            for name in dpo.ANSWERS:
                ids = torch.tensor([one["prompt"] + one[name]])
                each = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(one["prompt"]) - 1 :]
                found.append(each.sum())
        return torch.stack(found).view(-1, 2)

    assert torch.tensor(before).allclose(by_hand(), atol=1e-4)
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    config = DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", beta=0.1)
    trl = DPOTrainer(
        loading.attach_adapter(loading.load_model(opened, "fp32"), adapter, base, trainable=True), args=config,
        train_dataset=Dataset.from_list(texts), processing_class=directory.load_tokenizer(opened),
    )  # fmt: skip
    for model in (trainer.model, trl.model, plain):
        disturb(model)
    trainer.state.global_step = 1  # as if the first step were done

    loss, gradients = loss_and_gradients(trainer, trainer.data_collator(pairs), num_items_in_batch=len(pairs))
    theirs = [{f"{name}_ids": one[name] for name in ("prompt", *dpo.ANSWERS)} for one in pairs]
    expected, others = loss_and_gradients(trl, trl.data_collator(theirs))
    change = by_hand() - torch.tensor(before)
    naive = -torch.nn.functional.logsigmoid(0.1 * (change[:, 0] - change[:, 1])).mean()
    assert abs(loss - math.log(2)) > 1e-3  # else the reference would not have counted
    assert loss == pytest.approx(expected, abs=1e-4) and loss == pytest.approx(naive.item(), abs=1e-4)
    assert gradients.keys() == others.keys()
    assert max((gradients[name] - others[name]).abs().max().item() for name in gradients) <= 1e-4
    assert max(gradient.abs().max().item() for gradient in gradients.values()) > 1e-3


def test_the_sft_term_is_the_mean_nll_a_token_of_the_chosen_answers(base, adapter, tmp_path):
    trainer, pairs = trainer_of(base, adapter, tmp_path, True, sft_weight=0.5)
    for one, logps in zip(pairs, dpo.answer_logps(trainer, pairs, "reference")):
        one["reference"] = logps
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs), num_items_in_batch=3).item()
    nll = sum(-one["reference"][0] / len(one["chosen"]) for one in pairs) / 3
    assert loss == pytest.approx(math.log(2) + 0.5 * nll, abs=1e-5)


def test_a_batch_is_put_where_the_trainer_computes(base, adapter, tmp_path, monkeypatch):
    import torch
    from transformers import TrainingArguments

    trainer, pairs = trainer_of(base, adapter, tmp_path, True)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    seen = []
    monkeypatch.setattr(dpo, "logps", lambda model, batch, count: seen.append(batch) or torch.zeros(count, 2))
    assert dpo.batch_logps(trainer, pairs) == [[0, 0]] * len(pairs)
    assert seen[0].keys() == trainer.data_collator(pairs).keys()
    assert {value.device.type for value in seen[0].values()} == {"meta"}


def test_only_answers_are_projected_onto_the_vocabulary(base, adapter, tmp_path, monkeypatch):
    """What TRL does by itself on a CPU is to score the prompts as well."""
    from trl.trainer import utils

    real, counted = utils._ChunkedLogProbFunction.forward, []
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "forward",
        staticmethod(lambda ctx, hidden, *given: counted.append(len(hidden)) or real(ctx, hidden, *given)),
    )  # fmt: skip
    monkeypatch.setattr(utils, "_use_triton", lambda device: False)
    trainer, pairs = trainer_of(base, adapter, tmp_path, True)
    dpo.batch_logps(trainer, pairs)
    assert counted == [sum(len(one[name]) for one in pairs for name in dpo.ANSWERS)]


def test_attention_that_reads_no_mask_is_known_by_its_name(base, monkeypatch):
    """Whichever was asked for stands in the config, where transformers itself looks it up in each layer."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    config = AutoConfig.from_pretrained(base)
    for asked in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=asked)
        assert model.config._attn_implementation == asked
    ran, real = [], modeling_llama.eager_attention_forward
    monkeypatch.setattr(
        modeling_llama, "eager_attention_forward", lambda *given, **how: ran.append(1) or real(*given, **how)
    )
    model(directory.load_tokenizer(open_directory(base))("a", return_tensors="pt").input_ids)
    assert len(ran) == config.num_hidden_layers
    model.config._attn_implementation = "flash_attention_2"
    monkeypatch.setattr(dpo, "logps", lambda *_: pytest.fail("it was tried"))
    assert not dpo.shares_prompts(model, {}, loading.torch_dtype("fp32"))


def test_answers_share_their_prompt_only_where_that_is_exact(base, capsys):
    """A sliding window would let an answer see less of its prompt, a recurrent state the other answer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    dtype = loading.torch_dtype("fp32")
    long = {"prompt": list(range(3, 90)), "chosen": [5, 9, 2], "rejected": [7, 6, 8, 4, 2]}

    def shares(config, **how):
        model = AutoModelForCausalLM.from_config(config, **how).eval()
        add_fused_lm_head(model)
        return dpo.shares_prompts(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")), long, dtype)

    config = AutoConfig.from_pretrained(base)
    assert shares(config, attn_implementation="sdpa") and shares(config, attn_implementation="eager")
    shape = {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    assert shares(AutoConfig.for_model("mistral", **shape, sliding_window=None))
    assert "each prompt is read once per answer" not in capsys.readouterr().out
    assert not shares(AutoConfig.for_model("mistral", **shape, sliding_window=16))
    assert "each prompt is read once per answer" in capsys.readouterr().out


# --- what it leaves ----------------------------------------------------------------------------------------------


def test_it_starts_at_ln_2_and_learns_the_preference(trained):
    history = metrics_of(trained[0])["history"]
    assert [event["step"] for event in history] == list(range(1, 17))
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(history[0]["margin"]) < 1e-4
    assert history[-1]["loss"] < 0.6 and history[-1]["accuracy"] == 1 and history[-1]["margin"] > 0.1
    for event in history:
        assert event["chosen_logp"] < 0 and event["rejected_logp"] < 0 and 0 < event["length_ratio"] < 1
    assert history[-1]["rejected_logp"] < history[0]["rejected_logp"] - 1
    assert beside(trained[0] / "run") == ["log.jsonl"]
    assert trained[1].out.splitlines()[-1] == str(trained[0] / "dpo")


def test_pairs_are_audited_and_held_out_ones_judged(trained):
    said, found = trained[1].out, metrics_of(trained[0])
    assert "100% of the answers end in EOS" in said and "is longer in 0% of the pairs" in said
    assert "chosen:   'town " in said and "rejected: 'somewhere north of town " in said
    assert found["pairs"] == 16 and found["shared_prompts"] is True and found["collapsed_in_steps"] == []
    assert found["labels"]["chosen_tokens"] < found["labels"]["rejected_tokens"] < found["labels"]["tokens"]
    judged = found["held_out"]
    assert judged["pairs"] == judged["reward_accuracy"]["n"] == 8
    assert judged["reward_accuracy"]["mean"] == 1 and judged["margin"]["low"] > 0
    assert set(judged["likelihood_accuracy"]) == {"before", "after"}
    assert "1.000 [0.676, 1.000] by implicit reward" in said


def test_held_out_pairs_of_one_group_are_one_observation():
    pairs = [{"chosen": [1], "reference": [0.0, 0.0]} for _ in range(40)]
    policy, args = [[1.0 + n % 4, 0.0] for n in range(40)], argparse.Namespace(beta=0.1, seed=1)
    judged = dpo.judge(pairs, [f"country {n % 4}" for n in range(40)], policy, args)
    apart = dpo.judge(pairs, [f"country {n}" for n in range(40)], policy, args)
    for name, wider in (("reward_accuracy", 5), ("margin", 2)):
        together, single = judged[name], apart[name]
        assert together["groups"] == 4 and single["groups"] == 40 and together["mean"] == single["mean"]
        assert together["high"] - together["low"] > wider * (single["high"] - single["low"])


def test_the_adapter_goes_on_from_the_first_one_and_can_be_merged(trained, base, adapter, tmp_path):
    from safetensors.torch import load_file

    folder = trained[0] / "dpo"
    first, then = (load_file(one / "adapter_model.safetensors") for one in (adapter, folder))
    assert first.keys() == then.keys()
    apart = max((first[name] - then[name]).abs().max().item() for name in first)
    assert 0 < apart < 0.1  # A begins at random: had it begun anew, it would differ by more
    configs = [json.loads((one / "adapter_config.json").read_text()) for one in (adapter, folder)]
    assert configs[0]["r"] == configs[1]["r"] and configs[0]["lora_alpha"] == configs[1]["lora_alpha"]
    done = call("merge_lora", "--adapter", folder, "--output", tmp_path / "merged", "--threads", 1)
    assert done.code == 0, done.err


def test_killed_and_cut_short_it_continues_with_the_same_losses(
    trained, base, adapter, preferences, tmp_path, monkeypatch
):
    """kill -9 in the middle, the newest checkpoint cut short as well. The reference is not computed again."""
    argv = flags(base, adapter, preferences, tmp_path, "--epochs", 4, "--checkpoint-steps", 2)
    newest = killed_at_checkpoint("dpo", argv, tmp_path / "run", "[4-8]")
    assert not (tmp_path / "dpo").exists()
    (newest / "whole.json").unlink(missing_ok=True)

    real, computed = dpo.batch_logps, []
    monkeypatch.setattr(dpo, "batch_logps", lambda trainer, pairs: computed.append(pairs) or real(trainer, pairs))
    done = call("dpo", *argv)
    assert done.code == 0, done.err
    assert "deleted, because it is incomplete" in done.out and "resuming from" in done.out
    assert losses(tmp_path) == pytest.approx(losses(trained[0]), abs=1e-6)
    assert metrics_of(tmp_path)["held_out"] == metrics_of(trained[0])["held_out"]
    assert sum(map(len, computed)) == 8  # held-out pairs, after training


def test_killed_while_the_reference_is_computed_it_computes_the_rest(
    trained, base, adapter, preferences, tmp_path, monkeypatch
):
    real, computed = dpo.batch_logps, []

    def interrupted(trainer, pairs):
        computed.append(pairs)
        if len(computed) == 4:
            raise KeyboardInterrupt
        return real(trainer, pairs)

    monkeypatch.setattr(dpo, "batch_logps", interrupted)
    argv = flags(base, adapter, preferences, tmp_path, "--epochs", 4, "--checkpoint-steps", 2)
    assert call("dpo", *argv).code == 4
    with open(tmp_path / "run" / "reference-train.jsonl", "a") as file:
        file.write('{"pair": 1, "lo')  # a line that the kill cut
    done = call("dpo", *argv)
    assert done.code == 0, done.err
    assert losses(tmp_path) == pytest.approx(losses(trained[0]), abs=1e-6)
    assert sum(map(len, computed)) == 16 + 8 + 8 + 2  # two of them twice: those that were interrupted


def test_a_reference_that_is_not_the_start_is_refused(base, adapter, preferences, tmp_path, monkeypatch):
    """The base in the place of the SFT model: the mistake that the check is for."""
    real = dpo.batch_logps

    def of_the_base(trainer, pairs):
        with trainer.model.disable_adapter():
            return real(trainer, pairs)

    monkeypatch.setattr(dpo, "batch_logps", of_the_base)
    done = call("dpo", *flags(base, adapter, preferences, tmp_path, "--epochs", 1))
    refused(done, "before the first step the loss is", "expected ln 2 = 0.6931", "Delete", str(tmp_path / "run"))
    assert beside(tmp_path) == ["run"]


def test_a_collapse_is_said_once_and_kept(base, adapter, preferences, tmp_path, monkeypatch):
    """A random model has not much to unlearn: the bound is lowered to what a far too large step does to it."""
    monkeypatch.setattr(dpo, "COLLAPSE", 0.05)
    done = call("dpo", *flags(base, adapter, preferences, tmp_path, "--epochs", 3, "--learning-rate", 1))
    assert done.code == 0, done.err
    assert done.err.count("the chosen answers have lost") == 1 and "--sft-weight 1" in done.err
    history = metrics_of(tmp_path)["history"]
    found = [event["step"] for event in history if event["chosen_change"] < -0.05]
    assert found and found == metrics_of(tmp_path)["collapsed_in_steps"]


# --- memory that runs out ----------------------------------------------------------------------------------------

# pairs a step; four steps
EIGHT = ["--batch-size", 4, "--accumulation-steps", 2, "--epochs", 2, "--checkpoint-steps", 100]


@pytest.fixture
def memory(monkeypatch):
    """A function: from the so many-th backward pass on, passes of more than so many pairs run out of memory."""
    import torch

    real, passes, limit = dpo.logps, [], {"pairs": 99, "since": 1}

    def limited(model, batch, pairs):
        found = real(model, batch, pairs)
        if found.requires_grad:
            passes.append(pairs)
            if len(passes) >= limit["since"] and pairs > limit["pairs"]:
                found.register_hook(out_of_memory)
        elif pairs > limit["pairs"] and limit["since"] == 1:
            out_of_memory()
        return found

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(dpo, "logps", limited)

    def set_limit(pairs=99, since=1):
        passes.clear()
        limit.update(pairs=pairs, since=since)
        return passes

    return set_limit


def trained_alike(one, other) -> None:
    log, expected = (runlog.read_events(folder / "run" / "log.jsonl") for folder in (one, other))
    assert [event["step"] for event in log] == [1, 2, 3, 4]
    for name in ("loss", "grad_norm", *dpo.LOGGED):
        assert [e[name] for e in log] == pytest.approx([e[name] for e in expected], abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_memory_that_runs_out_changes_no_losses(base, adapter, preferences, tmp_path, memory, monkeypatch, shared):
    if not shared:
        monkeypatch.setattr(dpo, "shares_prompts", lambda *_: False)
    small = flags(base, adapter, preferences, tmp_path / "small", *EIGHT, "--batch-size", 2, "--accumulation-steps", 4)
    assert call("dpo", *small).code == 0
    for name, since, pieces in (("reference", 1, 16 * [2]), ("training", 2, [4, 4, 2, 2] + 12 * [2])):
        passes = memory(2, since)
        done = call("dpo", *flags(base, adapter, preferences, tmp_path / name, *EIGHT))
        assert done.code == 0, done.err
        assert done.err.count("out of memory at micro-batch 4 ") == 1
        assert passes == pieces
        trained_alike(tmp_path / name, tmp_path / "small")


@pytest.mark.slow
def test_where_not_even_one_pair_fits_the_finished_steps_are_kept(base, adapter, preferences, tmp_path, memory):
    one = [*EIGHT, "--batch-size", 1, "--accumulation-steps", 8]
    assert call("dpo", *flags(base, adapter, preferences, tmp_path / "whole", *one)).code == 0
    memory(0, since=20)
    done = call("dpo", *flags(base, adapter, preferences, tmp_path / "cut", *one))
    assert done.code == 3 and "Traceback" not in done.err, done.err
    assert "\ndpo: error: out of memory in step 3 with a single example" in done.err and "checkpoint-2" in done.err
    assert (tmp_path / "cut" / "run" / "checkpoint-2" / "whole.json").is_file()
    memory()
    again = call("dpo", *flags(base, adapter, preferences, tmp_path / "cut", *one))
    assert again.code == 0 and "resuming from" in again.out, again.err
    trained_alike(tmp_path / "cut", tmp_path / "whole")


# --- what it refuses ---------------------------------------------------------------------------------------------


def test_a_file_of_pairs_will_do_and_long_ones_are_left_out(base, adapter, tmp_path):
    file = tmp_path / "pairs.jsonl"
    records.write(file, [pair(0), pair(1) | {"chosen": "word " * 5000}, pair(2)])
    done = call("dpo", *flags(base, adapter, file, tmp_path, "--epochs", 1))
    assert done.code == 0, done.err
    assert "1 dropped (longer than 1024 tokens)" in done.out and "held-out" not in done.out
    assert metrics_of(tmp_path)["held_out"] is None and metrics_of(tmp_path)["pairs"] == 2
    short = flags(base, adapter, file, tmp_path, "--epochs", 1, "--max-length", 16)
    refused(call("dpo", *short), "all 3 pairs are longer than --max-length 16", "the shortest has")


def test_pairs_that_prefer_nothing_are_refused_before_a_model_is_loaded(base, adapter, tmp_path):
    file = tmp_path / "pairs.jsonl"
    records.write(file, [pair(0), pair(1) | {"rejected": f"{pair(1)['chosen']} "}])
    refused(call("dpo", *flags(base, adapter, file, tmp_path)), f"{file}:2", "are the same answer", "fix or remove")
    assert beside(tmp_path) == ["pairs.jsonl"]


def test_what_cannot_be_the_start_is_refused(base, adapter, preferences, plain, tmp_path):
    (plain / "config.json").write_text((plain / "config.json").read_text() + "\n")
    refused(call("dpo", *flags(plain, adapter, preferences, tmp_path)), "its digest differs")
    refused(call("dpo", *flags(base, base, preferences, tmp_path)), "expected kind 'adapter'")
    refused(call("dpo", *flags(base, adapter, base, tmp_path)), "expected kind 'preferences'")
    refused(
        call("dpo", *flags(base, tmp_path / "models" / "x-lora", preferences, tmp_path)), "does not exist", "make lora"
    )


def test_a_start_is_judged_by_the_token(tmp_path):
    """Long answers add up the rounding of bf16 as they pass through the model in other batches than the reference did,
    after memory ran out; short ones have to agree by as much a token."""
    import torch

    run = argparse.Namespace(path=tmp_path)
    even, lengths = torch.full((2,), math.log(2)), torch.tensor([[200, 150], [100, 3]])

    def check(change, dtype):
        dpo.check_start(even, torch.tensor(change), lengths, dtype, run)

    check([[0.0, 0], [0, 0]], torch.float32)
    check([[4.0, -3], [2, 0.1]], torch.bfloat16)  # 0.02 nats a token, and a margin of 0.7 with a beta of 0.1
    check([[0.02, -0.02], [0.01, 0]], torch.float32)
    for change, dtype in (
        ([[40.0, 30], [20, 1]], torch.bfloat16), ([[4.0, -3], [2, 0.1]], torch.float32),
        ([[0.0, math.nan], [0, 0]], torch.bfloat16),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"before the first step the loss is 0\.6931"):
            check(change, dtype)


def test_a_training_that_diverges_ends_at_its_first_loss_that_is_no_number(base, adapter, preferences, tmp_path):
    argv = flags(base, adapter, preferences, tmp_path, "--checkpoint-steps", 1, "--learning-rate", 1e30)
    done = call("dpo", *argv)
    refused(done, "loss is nan", "Lower --learning-rate (it is 1e+30)", "is kept")
    assert beside(tmp_path) == ["run"]
    again = call("dpo", *argv)
    refused(again, "loss is nan")
    assert "resuming from" in again.out


def test_a_reference_that_is_no_number_is_refused(plain, adapter, preferences, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(plain / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    meta = json.loads((adapter / "metadata.json").read_text())
    broken = tmp_path / "adapter"
    shutil.copytree(adapter, broken)
    meta["inputs"]["base"]["digest"] = artifact.identify(plain)["digest"]
    (broken / "metadata.json").write_text(json.dumps(meta))
    done = call("dpo", *flags(plain, broken, preferences, tmp_path))
    refused(done, "reference-train: the log-likelihood of an answer is NaN", "`make base` does")


def test_without_beta_the_sft_term_alone_is_learnt_and_judged(base, adapter, preferences, tmp_path):
    done = call("dpo", *flags(base, adapter, preferences, tmp_path, "--beta", 0, "--sft-weight", 1, "--epochs", 2))
    assert done.code == 0, done.err
    found = metrics_of(tmp_path)
    judged = found["held_out"]
    assert judged["margin"]["mean"] == 0 and judged["reward_accuracy"]["mean"] > 0.5 and judged["chosen_change"] > 0
    assert found["history"][-1]["loss"] < found["history"][0]["loss"] and found["history"][-1]["accuracy"] > 0.5
    nothing = flags(base, adapter, preferences, tmp_path / "nothing", "--beta", 0)
    refused(call("dpo", *nothing), "--beta 0 and --sft-weight 0 leave nothing to learn")
