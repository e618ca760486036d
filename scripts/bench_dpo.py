"""Time dpo.py against TRL's own DPOTrainer with a full reference model, on the same pairs, in turns.

    python scripts/bench_dpo.py --model models/smollm2-135m-base --adapter models/smollm2-135m-lora \\
        --data data/factbook/preferences --output reports/bench-dpo-smollm2-135m

Each way is a process of its own: wall-clock seconds from its start to its end, and its largest resident set (on a GPU
that is not what it takes there). DPOTrainer trains the same adapter with its own defaults, the reference is a second,
merged copy of the model; batch, beta, learning rate, epochs and dtype are those of dpo.py. Once it gets all pairs of a
step in one forward pass, as is its default, once as many as dpo.py. Leaves bench.json and bench.md.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lib import artifact, cli
from lib.page import as_markdown


def make_parser():
    parser = cli.parser(__doc__, __file__)
    what = parser.add_argument_group("what")
    what.add_argument("--model", type=Path, required=True, help="base model directory")
    what.add_argument("--adapter", type=Path, required=True, help="LoRA adapter on it: where training starts")
    what.add_argument("--data", type=Path, required=True, help="preference artifact, or a file of pairs")
    what.add_argument("--output", type=Path, required=True, help="directory to write")
    how = parser.add_argument_group("how")
    how.add_argument("--samples", type=cli.whole(1), help="pairs; more than there are: all")
    how.add_argument("--turns", type=cli.whole(1), help="times that each way is run")
    how.add_argument("--batch", type=cli.whole(1), help="pairs a forward pass of dpo.py")
    how.add_argument("--accumulation", type=cli.whole(1), help="forward passes a step of dpo.py")
    how.add_argument("--max-length", type=cli.whole(16), help="tokens a text; longer pairs are left out by both")
    how.add_argument("--seed", type=cli.whole(0), help="seed of the pairs' choice and order")
    return parser


def main(args):
    from lib import metrics, records

    pairs = records.take(records.load_pairs(args.data, "train"), args.samples, args.seed)
    inputs = {"base": args.model, "adapter": args.adapter, "data": args.data}
    ways = {
        "dpo.py": ours,
        "DPOTrainer": lambda *given: stock(*given, args.batch * args.accumulation, 1),
        f"DPOTrainer, {args.batch} at a time": lambda *given: stock(*given, args.batch, args.accumulation),
    }
    with artifact.building(args.output, "bench", args, inputs) as build:
        found = {name: [] for name in ways}
        for turn in range(args.turns):
            for name in sorted(ways, reverse=turn % 2 == 1):  # none is always the one after the same other
                with tempfile.TemporaryDirectory() as folder:
                    rows = Path(folder) / "pairs.jsonl"
                    records.write(rows, pairs)
                    found[name].append(measure(ways[name](args, rows)))
                print(f"turn {turn + 1}: {name}: {found[name][-1]}", file=sys.stderr)
    print(args.output)
