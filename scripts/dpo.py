"""Train a LoRA adapter on preference pairs: direct preference optimisation (DPO, arXiv 2305.18290).

    python scripts/dpo.py --model models/smollm2-135m-base --adapter models/smollm2-135m-lora \\
        --data data/factbook/preferences --output models/smollm2-135m-dpo

Takes a base model, the adapter that sft.py trained on it, and a preference artifact or a file of pairs. Leaves an
adapter of the same shape, for merge_lora.py and quantize.py.
The reference is the model at the start of training. Its log-probabilities are computed once, so no second model stays
in memory. Both answers of a pair share one forward pass over the prompt. Dropout is off, as in the paper's own code.
Checkpoints are saved in --run-dir. If the run is killed, the same command resumes it with the same losses. When memory
runs out, the micro-batch is halved; the pairs of each step stay the same.
"""

import math
import sys
from pathlib import Path

from lib.core import artifact, cli, compute
from lib.core.cli import InputError
from lib.model import directory, loading
from lib.model.directory import ModelDirectory

ANSWERS = ("chosen", "rejected")
LOGGED = ("chosen_logp", "rejected_logp", "chosen_change", "margin", "accuracy", "length_ratio")
# Nats per token by which the chosen answers' log-likelihood may fall. At ln 2 their tokens are half as likely as at the
# start. Training then pushes both answers away, the rejected one further (arXiv 2402.13228), and their probability goes
# to texts that are in no pair.
COLLAPSE = math.log(2)


def make_parser():
    parser = cli.parser(__doc__, __file__)
    files = parser.add_argument_group("inputs and outputs")
    files.add_argument("--model", type=Path, required=True, help="base model directory")
    files.add_argument("--adapter", type=Path, required=True, help="LoRA adapter to start from")
    files.add_argument("--data", type=Path, required=True, help="preference artifact, or a file of pairs")
    files.add_argument("--output", type=Path, required=True, help="adapter directory to write")
    files.add_argument(
        "--run-dir", type=Path,
        help="directory for checkpoints and logs; a command with other settings deletes these and starts over "
             "(default: runs/dpo-<name of the output>)",
    )  # fmt: skip
    train = parser.add_argument_group("training")
    cli.add_training_flags(train, "pairs")
    train.add_argument(
        "--beta", type=cli.number(0), help="DPO beta: strength of the penalty for moving away from the reference"
    )
    train.add_argument(
        "--sft-weight", type=cli.number(0), help="loss weight of the chosen answers' NLL per token; 0: none"
    )
    loading.add_load_flags(train)
    return parser


def main(args):
    # --- check the inputs before anything heavy is loaded -------------------------------------------
    from lib.data import records

    if not args.beta and not args.sft_weight:
        raise InputError("--beta 0 and --sft-weight 0 leave nothing to learn; expected one of them above 0")
    artifact.read(args.adapter, "adapter")
    inputs = artifact.identify_inputs({"base": args.model, "adapter": args.adapter, "data": args.data})
    adapter = directory.open_directory(args.adapter, args.model)
    directory.check_lora(adapter)
    if not (args.adapter / "adapter_model.safetensors").is_file():
        raise InputError(
            f"{args.adapter}: contains only a GGUF, which cannot be trained; use one on a 16-bit or NF4 base"
        )
    train = records.draw_training_rows(records.load_pairs(args.data, "train"), args.samples, args.seed)
    held_out_rows = records.load_pairs(args.data, "validation")

    # --- tokens and labels ----------------------------------------------------------------------------
    from lib.core import hardware
    from lib.train import loop

    compute.use_threads(args.threads)
    hardware.keep_freed_memory()
    tokenizer, ends = directory.load_tokenizer(adapter.base), directory.eos_token_ids(adapter.base)
    args.max_length = directory.limit_length(adapter, args.max_length)
    train, audit = audit_pairs(train, tokenizer, ends, args.max_length)
    encoded = [(encode(tokenizer, row, ends), row["group"]) for row in held_out_rows]
    fitting = [(pair, group) for pair, group in encoded if longest_tokens(pair) <= args.max_length]
    audit["held_out_left_out"] = len(encoded) - len(fitting)
    held_out, groups = [pair for pair, _ in fitting], [group for _, group in fitting]
    ids = (pair[name] for pair in train + held_out for name in ("prompt", *ANSWERS))
    directory.check_ids(adapter.base.path, directory.count_embedding_rows(adapter), tokenizer, ids)

    # --- model, adapter, trainer ----------------------------------------------------------------------
    dtype = loading.torch_dtype(args.precision)
    depends_on = {
        "adapter": inputs["adapter"]["digest"], "dtype": str(dtype), "pairs": records.digest([train, held_out])
    }  # fmt: skip
    run, micro_batch = loop.open_run(args, "dpo", inputs["base"], depends_on)
    lengths = [sum(len(pair[name]) for name in ("prompt", *ANSWERS)) for pair in train]
    micro_batch.expected_bytes = loop.check_memory(
        adapter.base, directory.read_adapter_shape(adapter), lengths, micro_batch.rows, args
    )
    model = load(adapter.base, args, dtype)
    shared = shares_prompts(model, max(train + held_out, key=longest_tokens), dtype)
    trainer = make_trainer(model, train, shared, args, dtype, run, micro_batch)

    # --- the reference ----------------------------------------------------------------------------------
    for name, pairs in (("train", train), ("held-out", held_out)):
        for pair, reference in zip(pairs, answer_logps(trainer, pairs, f"reference-{name}", run)):
            pair["reference"] = reference

    # --- train, and judge -------------------------------------------------------------------------------
    metrics = loop.fit(trainer, run)
    judgement = judge(held_out, groups, answer_logps(trainer, held_out, "held-out"), args) if held_out else None

    # --- write ------------------------------------------------------------------------------------------
    with artifact.write_artifact(args.output, "adapter", args, inputs) as build:
        loading.save_adapter(model, args.model, build.path)
        tokenizer.save_pretrained(build.path)
        build.notes["expected_memory_bytes"] = micro_batch.expected_bytes
        build.metrics = metrics | {
            "pairs": len(train),
            "labels": audit,
            "shared_prompts": shared,
            "collapsed_in_steps": [line["step"] for line in metrics["history"] if line["chosen_change"] < -COLLAPSE],
            "held_out": judgement,
        }
    run.finish()
    print(args.output)


# --- pairs as tokens --------------------------------------------------------------------------------------------


def encode(tokenizer, pair: dict, ends: set[int]) -> dict:
    """{prompt, chosen, rejected} as token ids; an answer ends with EOS."""
    from lib.model import chat

    ids = {name: chat.answer_ids(tokenizer, pair["prompt"], pair[name], ends) for name in ANSWERS}
    return {"prompt": chat.prompt_ids(tokenizer, pair["prompt"])} | ids


def longest_tokens(pair: dict) -> int:
    """Tokens of the prompt with its longer answer."""
    return len(pair["prompt"]) + max(len(pair[name]) for name in ANSWERS)


def audit_pairs(rows, tokenizer, ends, max_length) -> tuple[list[dict], dict]:
    """The pairs that fit, as tokens, and their statistics, which are also printed. InputError if none fits."""
    encoded = [encode(tokenizer, row, ends) for row in rows]
    kept = [pair for pair in encoded if longest_tokens(pair) <= max_length]
    if not kept:
        raise InputError(
            f"all {len(rows):,} pairs are longer than --max-length {max_length} (the shortest has "
            f"{min(map(longest_tokens, encoded))} tokens)"
        )
    prompts, chosen, rejected = (sum(len(pair[name]) for pair in kept) for name in ("prompt", *ANSWERS))
    tokens = 2 * prompts + chosen + rejected
    with_eos = sum(pair[name][-1] in ends for pair in kept for name in ANSWERS)
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in kept) / len(kept)
    print(f"{len(kept):,} pairs, {tokens:,} tokens, loss on {(chosen + rejected) / tokens:.1%} of them; ", end="")
    print(f"{with_eos / (2 * len(kept)):.0%} of the answers end in EOS; none truncated; ", end="")
    print(f"{len(rows) - len(kept):,} dropped (longer than {max_length} tokens)")
    print(f"tokens per answer: {chosen / len(kept):.1f} chosen, {rejected / len(kept):.1f} rejected; ", end="")
    print(f"the chosen answer is longer in {longer:.0%} of the pairs")
    print(f"prompt:   …{tokenizer.decode(kept[0]['prompt'])[-160:]!r}")
    for name in ANSWERS:
        print(f"{name + ':':10}{tokenizer.decode(kept[0][name])!r}")
    return kept, {
        "tokens": tokens, "chosen_tokens": chosen, "rejected_tokens": rejected, "chosen_longer_share": longer,
        "pairs_left_out": len(rows) - len(kept), "rows_cut": 0, "eos_labelled_share": with_eos / (2 * len(kept)),
        "longest_tokens": max(map(longest_tokens, kept)),
    }  # fmt: skip


def collate(pairs: list[dict], shared: bool) -> dict:
    """A batch: tensors of int64 [texts, tokens], padded on the right; `reference` is float32 [pairs, 2].

    A text is the prompt without its last token, then each answer after a copy of that token. `part` is 0 in the prompt,
    1 in the chosen and 2 in the rejected answer, -1 in the padding. An answer's `position_ids` continue the prompt's.
    If `shared`, a text holds both answers of its pair. Otherwise, the texts with the chosen answers come before those
    with the rejected answers.
    """
    import torch

    texts = []
    for names in [ANSWERS] if shared else [(name,) for name in ANSWERS]:
        for pair in pairs:
            *prompt, last = pair["prompt"]
            text = [(token, 0, n, -100) for n, token in enumerate(prompt)]
            for name in names:
                ids, part = [last, *pair[name]], ANSWERS.index(name) + 1
                text += [(t, part, n, t) for n, t in enumerate(ids, len(prompt))]
                text[-len(ids)] = (last, part, len(prompt), -100)
            texts.append(torch.tensor(text))
    names, padding = ("input_ids", "part", "position_ids", "labels"), (0, -1, 0, -100)
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([text[:, n] for text in texts], True, value)
        for n, (name, value) in enumerate(zip(names, padding))
    }
    batch["attention_mask"] = (batch["part"] >= 0).long()
    if "reference" in pairs[0]:
        batch["reference"] = torch.tensor([pair["reference"] for pair in pairs])
    return batch


# --- the model and its loss -------------------------------------------------------------------------------------


def load(base: ModelDirectory, args, dtype):
    """The base with the adapter to be trained. Called with `fused_lm_head`, it returns log-probabilities of labels."""
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

    from lib.core import hardware
    from lib.train import loop

    on_cpu = args.precision == "auto" and hardware.device() == "cpu"
    plain = loading.load_model(base, "fp32" if on_cpu else args.precision, **loading.placement_arguments(args))
    model = loading.attach_adapter(plain, args.adapter, args.model, trainable=True)
    if on_cpu:
        loading.cast_frozen_linears(model, dtype)
    disable_dropout_in_model(model)
    loop.project_labels_only()
    add_fused_lm_head(model.get_base_model())
    return model


def logps(model, batch: dict, pairs: int):
    """Log-probability of each pair's chosen and rejected answer; float32 [pairs, 2]."""
    import torch

    part, mask = batch["part"], batch["attention_mask"]
    if pairs == len(part):  # both answers in one text: neither sees the other
        visible = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        hidden = ~(visible & torch.ones_like(visible).tril())
        mask = torch.zeros(hidden.shape, device=part.device).masked_fill(hidden, -math.inf)[:, None]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    token_logps = model(**inputs, attention_mask=mask, fused_lm_head=True).log_probs
    return per_answer(token_logps, part[:, 1:], pairs)


def per_answer(values, part, pairs: int):
    """Sums over the positions of each pair's chosen and rejected answer; [pairs, 2]."""
    import torch

    sums = torch.stack([(values * (part == n)).sum(1) for n in (1, 2)], 1)
    return sums.unflatten(0, (-1, pairs)).sum(0)


def shares_prompts(model, pair: dict, dtype) -> bool:
    """Whether both answers of a pair can go through the model in one text. Tested on the longest pair: with attention
    that ignores the mask, a sliding window or a recurrent state, an answer would see the other or miss the prompt."""
    import torch

    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        joint, separate = (
            logps(model, {k: v.to(model.device) for k, v in collate([pair], shared).items()}, 1)
            for shared in (True, False)
        )
    lengths = torch.tensor([len(pair[name]) for name in ANSWERS], device=joint.device)
    shared = bool(((joint - separate).abs() / lengths).max() <= torch.finfo(dtype).eps ** 0.5)  # half of the digits
    if not shared:
        print("each prompt is read once per answer, because this model would mix up two answers in one text")
    return shared


def make_trainer(model, pairs, shared, args, dtype, run, micro_batch):
    """transformers' Trainer with the loss of DPO. (TRL's DPOTrainer reads each prompt twice.)"""
    import torch
    from tqdm import tqdm
    from transformers import Trainer as Plain
    from transformers import TrainingArguments

    from lib.train import loop

    class Trainer(loop.LoopMixin, Plain):
        texts_a_row = 1 if shared else 2
        loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole step
        warned = False

        def get_batch_samples(self, *arguments, **keywords):
            batches, _ = super().get_batch_samples(*arguments, **keywords)
            return batches, sum(len(batch["reference"]) for batch in batches)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            policy = logps(model, inputs, len(inputs["reference"]))
            change = policy - inputs["reference"]
            margin = args.beta * (change[:, 0] - change[:, 1])
            lengths = per_answer(inputs["labels"] != -100, inputs["part"], len(policy))
            loss = -torch.nn.functional.logsigmoid(margin)
            if self.state.global_step == 0:
                check_start(loss, change, lengths, dtype, run)
            loss = loss - args.sft_weight * policy[:, 0] / lengths[:, 0]
            self._metrics.append(torch.cat([policy, change, lengths, margin[:, None]], 1).detach())
            return loss.sum() / num_items_in_batch

        def log(self, logs, *arguments):
            if self._metrics:
                columns = torch.cat(self._metrics).T.double()
                chosen, rejected, change, rejected_change, length, rejected_length, margin = columns
                self._metrics.clear()
                values = (
                    chosen.mean(), rejected.mean(), change.sum() / length.sum(), margin.mean(),
                    (change > rejected_change).double().mean(), length.sum() / rejected_length.sum(),
                )  # fmt: skip
                logs |= dict(zip(LOGGED, torch.stack(values).tolist()))
                if logs["chosen_change"] < -COLLAPSE and not self.warned:
                    self.warned = True
                    tqdm.write(
                        f"step {self.state.global_step}: the chosen answers have lost {-logs['chosen_change']:.2f} "
                        f"nats per token (limit {COLLAPSE:.2f}), so the model is unlearning them too. Try a larger "
                        "--beta, a smaller --learning-rate or --sft-weight 1",
                        file=sys.stderr,
                    )
            super().log(logs, *arguments)

    trainer = Trainer(
        model=model, train_dataset=pairs, data_collator=lambda batch: collate(batch, shared),
        args=TrainingArguments(**loop.trainer_settings(args, dtype, run), remove_unused_columns=False),
        run=run, micro_batch=micro_batch, lengths=[*map(longest_tokens, pairs)], also=LOGGED,
    )  # fmt: skip
    trainer._metrics = []
    return trainer


# --- the reference, and the accuracy on held-out pairs ----------------------------------------------------------


def answer_logps(trainer, pairs: list[dict], name: str, run=None) -> list[list[float]]:
    """Log-probabilities [chosen, rejected] of each pair under the current model. The batches are those of the first
    epoch, since equal shapes round equally. With a run, finished batches are saved in it, and a repeated command
    continues after them."""
    from tqdm import tqdm

    from lib.core.cli import OutOfMemory
    from lib.core.kept import Kept
    from lib.train import finite, length_groups

    finished = Kept(run.path / f"{name}.jsonl", "pair") if run else {}
    args, micro_batch = trainer.args, trainer.micro_batch
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    order = length_groups.LengthGroupedBatches([*map(longest_tokens, pairs)], batch_size, args.seed)
    waiting = [n for n in order if n not in finished]
    with tqdm(total=len(pairs), initial=len(finished), unit="pair", desc=name, file=sys.stderr) as bar:
        while waiting:
            batch = waiting[: micro_batch.rows]
            values, reason = compute.call_catching_oom(batch_logps, trainer, [pairs[n] for n in batch])
            if reason and len(batch) == 1:
                raise OutOfMemory(f"out of memory with a single pair ({reason}); try a shorter --max-length")
            if reason:
                micro_batch.halve(len(batch))
                continue
            if not all(math.isfinite(value) for pair_logps in values for value in pair_logps):
                raise InputError(
                    f"{name}: the log-likelihood of an answer is NaN or infinite. "
                    f"{finite.advise(args, is_first=run is not None)}"
                )
            rows = [{"pair": n, "logps": pair_logps} for n, pair_logps in zip(batch, values)]
            if run:
                finished.add(rows)
            else:
                finished |= zip(batch, rows)
            micro_batch.return_freed_memory()
            bar.update(len(batch))
            waiting = waiting[len(batch) :]
    return [finished[n]["logps"] for n in range(len(pairs))]


def batch_logps(trainer, pairs: list[dict]) -> list[list[float]]:
    import torch

    batch = trainer._prepare_inputs(trainer.data_collator(pairs))
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        return logps(trainer.model, batch, len(pairs)).tolist()


def check_start(loss, change, lengths, dtype, run) -> None:
    """InputError unless policy and reference agree before the first step: the answers' log-likelihoods are the same, so
    the loss is ln 2. The tolerance is per token, since a long answer adds up more rounding: the same pairs round
    differently in other batches, for instance after memory ran out."""
    import torch

    error, tolerance = (change.abs().sum() / lengths.sum()).item(), torch.finfo(dtype).eps ** 0.5  # half of the digits
    if not error <= tolerance:  # NaN fails as well
        raise InputError(
            f"before the first step the loss is {loss.mean().item():.4f}, expected ln 2 = {math.log(2):.4f}: the "
            f"answers' log-likelihoods are {error:.4f} nats per token away from the reference (tolerance "
            f"{tolerance:.4f}). The reference stored in {run.path} is not the model that training starts from. Delete "
            f"{run.path} and repeat the command"
        )


def judge(pairs: list[dict], groups: list[str], policy: list[list[float]], args) -> dict:
    """Held-out preference accuracy with 95 % intervals: by the implicit reward (beta times the change in
    log-likelihood, which is 0 before training) and by plain log-likelihood, before and after. Beta does not change the
    order of rewards, so at 0 the accuracy is still that of the change."""
    from lib.core import wording
    from lib.data import metrics

    def accuracy_of(scores) -> dict:
        return metrics.interval([chosen > rejected for chosen, rejected in scores], args.seed, groups)

    reference = [pair["reference"] for pair in pairs]
    changes = [[a - b for a, b in zip(after, before)] for after, before in zip(policy, reference)]
    rewards = [[args.beta * change for change in pair] for pair in changes]
    judgement = {
        "pairs": len(pairs),
        "reward_accuracy": accuracy_of(changes),
        "margin": metrics.interval([chosen - rejected for chosen, rejected in rewards], args.seed, groups, None),
        "likelihood_accuracy": {"before": accuracy_of(reference), "after": accuracy_of(policy)},
        "chosen_change": sum(chosen for chosen, _ in changes) / sum(len(pair["chosen"]) for pair in pairs),
    }
    accuracies = {"by implicit reward": judgement["reward_accuracy"]}
    accuracies |= {f"by log-likelihood {when}": interval for when, interval in judgement["likelihood_accuracy"].items()}
    print(f"preference accuracy on {len(pairs)} held-out pairs: ", end="")
    print(", ".join(f"{wording.interval(interval)} {label}" for label, interval in accuracies.items()))
    return judgement


def estimate_cost(job):
    """Half of LoRA's training pass is the forward pass: frozen weights get no gradient."""
    from lib.budget import memory
    from lib.forecast.costs import Cost, rate_seconds, start_seconds

    args, w, rates = job.args, job.work["dpo"], job.rates
    seconds = rate_seconds(rates["train"], w["tokens"], w["passes"]) + rate_seconds(rates["update"], w["updates"])
    seconds += rate_seconds(rates["train"], w["forward_tokens"]) / 2
    seconds += start_seconds(rates, "adapter start", "training start")
    sizes = min(args.batch_size, job.work["training"]["rows"]), job.work["most"]["pair"], args.gradient_checkpointing
    peak = memory.estimate_training(job.config, job.lora, args.precision, *sizes)
    return Cost(seconds, peak, job.work["model"]["adapter_bytes"])


if __name__ == "__main__":
    cli.run(main, make_parser)
