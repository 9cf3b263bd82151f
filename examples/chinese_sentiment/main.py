"""A Chinese encoder of random weights, for want of a pretrained one: `teacher.toml` begins with it.

    python main.py --text FILE

The vocabulary is the characters of the file's column ``text_a``.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from tokenizers import BertWordPieceTokenizer

from jaxbrewer.data.tables import column, read_rows
from jaxbrewer.zoo import BertConfig, BertModel

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="a tsv file with the column text_a")
    parser.add_argument("--characters", type=int, default=4000, help="the most frequent ones")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--out", default="out/pretrained")
    args = parser.parse_args(argv)

    texts = column(read_rows(args.text), "text_a", args.text)
    counts = Counter(character for text in texts for character in text.lower())
    frequent = [c for c, _ in counts.most_common(args.characters) if not c.isspace()]
    # A word in Latin letters, or a number, goes on in pieces: "a", "##b".
    latin = [f"##{c}" for c in frequent if c.isascii() and c.isalnum()]
    vocabulary = [*SPECIAL, *frequent, *latin]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.width // 32),
        intermediate_size=4 * args.width,
        max_position_embeddings=128,
    )
    BertModel(config, rngs=nnx.Rngs(0)).save_pretrained(args.out)
    numbers = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = BertWordPieceTokenizer(numbers)  # parts Chinese text into its characters
    tokenizer.save(str(Path(args.out) / "tokenizer.json"))
    print(f"{args.out}: {len(vocabulary):,} tokens, {args.layers} layers of width {args.width}")
    return {"tokens": len(vocabulary)}


if __name__ == "__main__":
    main()
