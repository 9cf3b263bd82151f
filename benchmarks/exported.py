"""A student's folder, run four ways: do all give the same labels, and how long does each take?

    python benchmarks/exported.py FOLDER FILE    # a student that `jaxbrewer train` left; rows to predict

From the folder alone: by transformers, by onnxruntime and by StableHLO (both written by `jaxbrewer
export`), each on batches that are padded to one length; and by `jaxbrewer.predict`, which reads the file,
cuts it into tokens and pads to few lengths. The times are of all rows once each has run on one batch (of
`predict`: with all that it does). Labels are those of the file's column `label`, where there is one.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import harness
import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

import jaxbrewer
from jaxbrewer import zoo
from jaxbrewer.data.tables import read_rows

COLUMNS = ["by", "rows", "seconds", "sentences/s", "same labels", "accuracy"]
Inputs = Mapping[str, np.ndarray]
Logits = Callable[[Inputs], np.ndarray]


def by_transformers(folder: Path, work: Path) -> Logits:
    """The class that the folder names."""
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def run(inputs: Inputs) -> np.ndarray:
        with torch.no_grad():
            given = {name: torch.tensor(value) for name, value in inputs.items()}
            return model(**given).logits.numpy()

    return run


def by_onnx(folder: Path, work: Path) -> Logits:
    """The file that ``export --to onnx`` writes."""
    import onnxruntime

    zoo.export_onnx(zoo.from_pretrained(folder), work / "student.onnx")
    session = onnxruntime.InferenceSession(str(work / "student.onnx"))
    names = [value.name for value in session.get_inputs()]
    return lambda inputs: session.run(["logits"], {name: inputs[name] for name in names})[0]


def by_stablehlo(folder: Path, work: Path) -> Logits:
    """The file that ``export --to stablehlo`` writes."""
    zoo.export_stablehlo(zoo.from_pretrained(folder), work / "student.stablehlo")
    program = jax.export.deserialize(bytearray((work / "student.stablehlo").read_bytes()))
    call = jax.jit(program.call)

    def run(inputs: Inputs) -> np.ndarray:
        given = {name: value.astype(np.int32) for name, value in inputs.items()}
        return np.asarray(call(**given)["logits"])

    return run


WAYS = {"transformers": by_transformers, "onnxruntime": by_onnx, "StableHLO": by_stablehlo}


def encoded(folder: Path, texts: list[str], length: int) -> Inputs:
    """All rows, cut and padded to one length."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    fields = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
    rows = tokenizer.encode_batch(texts)
    return {name: np.array([getattr(row, field) for row in rows]) for name, field in fields.items()}


def tiny(folder: Path) -> tuple[Path, Path]:
    """A student of random weights, and a file of made-up rows."""
    words = ["good", "bad", "film", "a", "the"]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    config = zoo.BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16, num_labels=2, label_names=("no", "yes"),
    )  # fmt: skip
    student = zoo.from_config(config, "sequence-classification", rngs=nnx.Rngs(0))
    student.save_pretrained(folder / "student")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "student" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    rows = [f"{' '.join(rng.choice(words, 4))}\t{i % 2}" for i in range(20)]
    (folder / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return folder / "student", folder / "rows.tsv"


def predicted(folder: Path, file: Path, text: str) -> tuple[np.ndarray, float]:
    """The labels by `jaxbrewer.predict`, as numbers, and the seconds."""
    start = time.perf_counter()
    found = jaxbrewer.predict(folder, file, text=text)
    seconds = time.perf_counter() - start
    names = list(found[0]["probabilities"])  # of all classes, in their order
    return np.array([names.index(row["label"]) for row in found]), seconds


def main() -> None:
    """Runs the four, and saves and shows what they gave."""
    parser = harness.parser(__doc__ or "", rounds=1)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--text", default="sentence", help="the column")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if args.smoke:
            args.folder, args.file = tiny(work)
            args.length, args.batch = 8, 8
        elif args.file is None:
            parser.error("give a student's folder and a file of rows")
        rows = read_rows(args.file)
        inputs = encoded(args.folder, [row[args.text] for row in rows], args.length)
        found = {}
        for way, make in WAYS.items():
            run = make(args.folder, work)
            starts = range(0, len(rows), args.batch)
            parts = [{k: v[i : i + args.batch] for k, v in inputs.items()} for i in starts]
            for part in (parts[0], parts[-1]):  # compiled for both shapes
                run(part)
            start = time.perf_counter()
            logits = np.concatenate([run(part) for part in parts])
            found[way] = logits.argmax(-1), time.perf_counter() - start
        found["jaxbrewer.predict"] = predicted(args.folder, args.file, args.text)
    labels = [row.get("label") for row in rows]
    first = found["transformers"][0]
    table = []
    for way, (said, seconds) in found.items():
        known = all(str(label).isdigit() for label in labels)
        right = float(np.mean(said == np.array(labels, int))) if known else None
        same = float(np.mean(said == first))
        table.append(
            dict(
                zip(
                    COLUMNS,
                    (way, len(rows), seconds, len(rows) / seconds, same, right),
                    strict=True,
                )
            )
        )
    harness.save(args, table)
    harness.show(table, COLUMNS)


if __name__ == "__main__":
    main()
