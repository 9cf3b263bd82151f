"""What do length buckets save, against padding every sentence to 128 as TextBrewer's scripts do?

BERT-base to T3 on sentences as long as SST-2's: `jaxbrewer.data.bucket_by_length` in
`distiller.train`, the same `train` on batches padded to 128, and TextBrewer on batches padded to
128, in turn. A turn of the first is a pass over the sample, in which every shape comes; nothing is
compiled in a turn.

    python benchmarks/buckets.py                         # lengths drawn like SST-2's; ten minutes
    python benchmarks/buckets.py --data SST-2/train.tsv --vocab bert-base-uncased/vocab.txt
"""

import csv
import tempfile
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import turns
import workloads

from jaxbrewer.data.buckets import bucket_by_length


def sentences(args: Any, vocab_size: int) -> list[dict[str, Any]]:
    """The sample, tokenised."""
    rng = np.random.default_rng(0)
    if args.data is None:
        lengths = workloads.draw_lengths(args.sentences, args.length, args.lengths)
        ids = [rng.integers(1, vocab_size, length) for length in lengths]
    else:
        ids = tokenised(args.data, args.vocab, args.length)
        ids = [ids[i] for i in rng.permutation(len(ids))[: args.sentences]]
    return [
        {
            "input_ids": np.asarray(each, np.int32),
            "token_type_ids": np.zeros(len(each), np.int32),
            "labels": np.int32(rng.integers(0, 2)),
        }
        for each in ids
    ]


def tokenised(path: str, vocab: str, longest: int) -> list[list[int]]:
    """The sentences of a TSV file in word pieces of a BERT vocabulary."""
    from tokenizers import BertWordPieceTokenizer

    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        texts = [row["sentence"].strip() for row in rows]
    tokenizer = BertWordPieceTokenizer(vocab, lowercase=True)
    tokenizer.enable_truncation(longest)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def padded(examples: list[dict[str, Any]], args: Any) -> list[dict[str, np.ndarray]]:
    """The same in batches of one length, whole batches only."""
    loader = bucket_by_length(
        examples, args.batch, [args.length], mask="attention_mask", drop_last=True
    )
    return list(loader)


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=3, steps=1)
    parser.add_argument("--data", help="a TSV file with the column 'sentence'")
    parser.add_argument("--vocab", help="with --data, BERT's vocab.txt")
    parser.add_argument("--lengths", help="a file with one length a line, to draw from")
    parser.add_argument("--sentences", type=int, default=384, help="sentences in the sample")
    parser.add_argument("--student", choices=list(workloads.MATCHED), default="T3")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--buckets", type=int, default=8, help="how many lengths, at most")
    parser.add_argument("--device", default="cpu")
    harness.add_precision(parser)
    args = parser.parse_args()
    if (args.data is None) != (args.vocab is None):
        parser.error("--data FILE and --vocab FILE go together: give both or neither")
    if args.smoke:
        args.rounds, args.sentences, args.batch, args.buckets = 1, 11, 4, 1
    job = turns.job(args.student, args.smoke)
    examples = sentences(args, job.vocab_size)
    loader = bucket_by_length(examples, args.batch, args.buckets, mask="attention_mask")
    print(loader)
    fixed = padded(examples, args)
    rows = compare(args, job, loader, fixed)
    harness.show(rows)
    shapes = [list(shape) for shape in loader.shapes]
    print(harness.save(args, rows, shapes=shapes, fullness=loader.fullness))


def textbrewer(work: workloads.Work, batch: Any, device: str, half: str | None) -> harness.Run:
    """TextBrewer's loop over one batch of the fixed length."""
    import torch

    harness.set_torch_threads()
    device = "cuda" if device == "gpu" else device
    half_type = getattr(torch, half) if half else None
    return workloads.TextBrewerStep(work, batch, device, half_type).run


def compare(args: Any, job: turns.Job, loader: Any, fixed: list[Any]) -> list[harness.Row]:
    """A row for each program."""
    work = workloads.work(args.student, smoke=args.smoke)
    theirs = harness.Elsewhere(textbrewer, work, fixed[0], args.device, args.half)
    # A turn is an untimed and a timed run; one more run comes before the first turn.
    total = (2 * args.rounds + 1) * max(len(loader), args.steps)
    with tempfile.TemporaryDirectory() as folder:

        def start(name: str, batches: Any) -> tuple[Any, Any, dict[str, int]]:
            distiller = job.distiller(
                output_dir=f"{folder}/{name}",
                device=args.device,
                ckpt_steps=turns.NEVER,
                **harness.precision(args),
            )
            return distiller, batches, {"num_steps": total}

        jobs = {"jaxbrewer, buckets": start("buckets", loader), "jaxbrewer": start("fixed", fixed)}

        def play(runs: dict[str, Callable[[int], None]]) -> dict[str, harness.Timing]:
            buckets = runs["jaxbrewer, buckets"]
            programs = {
                "jaxbrewer, buckets": lambda steps: buckets(steps * len(loader)),
                "jaxbrewer": runs["jaxbrewer"],
                "TextBrewer": theirs,
            }
            return harness.take_turns(
                programs, rounds=args.rounds, steps=args.steps, warmup=1, lead=args.steps
            )

        timings = turns.all_in_turns(jobs, play)
    theirs.close()
    in_a_step = {name: args.batch for name in timings}
    in_a_step["jaxbrewer, buckets"] = args.sentences
    each = {
        name: harness.Timing(tuple(s / in_a_step[name] for s in timing.seconds))
        for name, timing in timings.items()
    }
    rows = []
    for name, timing in each.items():
        ratio, low, high = timing.faster_than(each["TextBrewer"])
        row = {"program": name, "sentences/s": 1 / timing.median}
        rows.append(row | {"× TextBrewer": ratio, "× q1": low, "× q3": high})
    return rows


if __name__ == "__main__":
    main()
