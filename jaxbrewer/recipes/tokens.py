"""Text into tokens, by the tokenizer that lies in a model's folder."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import told
from ..files import UnreadableFileError, read_json_object


class Tokens:
    """The tokenizer of a folder, which cuts texts to a length and does not pad them.

    Args:
        folder: has a ``tokenizer.json``, or a ``vocab.txt`` of BERT's word pieces.
        max_length: tokens of an example, with the special ones.

    Attributes:
        rules: all that the tokenizer does, as text: equal ones give equal tokens.

    Raises:
        UnreadableFileError: the tokenizer cannot be read.
        ImportError: tokenizers is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], max_length: int):
        self.folder = Path(folder)
        self.max_length = max_length
        self._tokenizer = _read(self.folder)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.rules: str = self._tokenizer.to_str()

    def of_texts(self, texts: Sequence[Any]) -> list[Any]:
        """The encodings of texts, or of pairs of texts; the longer of two is cut first."""
        self._tokenizer.enable_truncation(self.max_length)
        return self._tokenizer.encode_batch(list(texts))

    def of_words(self, sentences: Sequence[Sequence[str]]) -> list[Any]:
        """The encodings of sentences in words; `encoding.word_ids` leads back to them."""
        self._tokenizer.enable_truncation(self.max_length)
        before: Any = getattr(self._tokenizer, "pre_tokenizer", None)
        if getattr(before, "add_prefix_space", None) is False:
            # Such a tokenizer would join words that have no blank before them.
            before.add_prefix_space = True
            self._tokenizer.pre_tokenizer = before
        return self._tokenizer.encode_batch(
            [list(words) for words in sentences], is_pretokenized=True
        )

    def of_questions(self, questions: Sequence[tuple[str, str]], stride: int) -> list[list[Any]]:
        """Each question's windows: its encodings with as many parts of the context as it takes."""
        self._tokenizer.enable_truncation(self.max_length, stride=stride, strategy="only_second")
        encodings = self._tokenizer.encode_batch(list(questions))
        return [[encoding, *encoding.overflowing] for encoding in encodings]


def _read(folder: Path) -> Any:
    tokenizers: Any = importlib.import_module("tokenizers")
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        file = folder / "vocab.txt"
        settings = folder / "tokenizer_config.json"
        values = read_json_object(settings) if settings.is_file() else {}
        lowercase = values.get("do_lower_case", True) is not False
        return tokenizers.BertWordPieceTokenizer(str(file), lowercase=lowercase)
    except UnreadableFileError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise UnreadableFileError(
            file, f"is no tokenizer that can be read: {told(error)}"
        ) from error
