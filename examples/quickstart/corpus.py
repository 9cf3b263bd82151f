"""Passages from the standard library's docstrings, and the package each comes from.

The source files are found and parsed, never imported, so nothing of them runs. Files, docstrings
and passages are visited in one fixed order: a Python version always gives the same data.
"""

import ast
import importlib.util
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

# Each has a few thousand words of docstrings in every Python since 3.11.
PACKAGES = (
    "asyncio",
    "doctest",
    "email",
    "http",
    "importlib",
    "inspect",
    "logging",
    "multiprocessing",
    "typing",
    "unittest",
    "urllib",
    "xml",
)

LONGEST = 32  # words; a longer docstring is cut into several passages
SHORTEST = 6  # words; a shorter rest is dropped
SHINGLE = 8  # docstrings with this many words in a row in common stay on one side of the split
DEV_PERCENT = 20
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True)
class Passage:
    """A few words of a docstring; passages whose docstrings repeat each other share a group."""

    text: str
    label: int
    group: int


def source_files(package: str) -> list[Path]:
    """The Python files of a module, or of a package and all beneath it, in a fixed order."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise FileNotFoundError(f"this Python lacks {package!r}: use one with all of its library")
    if spec.submodule_search_locations:
        root = Path(spec.submodule_search_locations[0])
        files = sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
    else:
        files = [Path(spec.origin or "")]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"no Python source for {package!r} at {spec.origin}: use a Python with its library's source"
        )
    return files


def docstrings(package: str) -> Iterator[str]:
    """The prose of each docstring of a package: paragraphs without doctest examples, on one line."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in source_files(package):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, documented):
                paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
                words = " ".join(p for p in paragraphs if ">>>" not in p).split()
                if len(words) >= SHORTEST:
                    yield " ".join(words)


class Groups:
    """Joins docstrings that share a run of words (a union-find over their shingles)."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.first_with: dict[tuple[str, ...], int] = {}

    def add(self, text: str) -> int:
        """Enter a docstring. Returns its number."""
        number = len(self.parent)
        self.parent.append(number)
        words = re.findall(r"\w+", text.lower())
        for start in range(len(words) - SHINGLE + 1):
            other = self.first_with.setdefault(tuple(words[start : start + SHINGLE]), number)
            a, b = self.find(number), self.find(other)
            self.parent[max(a, b)] = min(a, b)
        return number

    def find(self, number: int) -> int:
        """The smallest number among the docstrings joined, at any remove, to this one."""
        while self.parent[number] != number:
            number = self.parent[number]
        return number


def passages() -> list[Passage]:
    """All passages, none twice, with every word that has a package's name in it masked."""
    named = re.compile(rf"\w*(?:{'|'.join(PACKAGES)})\w*", re.IGNORECASE)
    groups = Groups()
    found: dict[str, tuple[int, int]] = {}
    for label, package in enumerate(PACKAGES):
        for docstring in docstrings(package):
            number = groups.add(docstring)
            words = docstring.split()
            for start in range(0, len(words), LONGEST):
                part = words[start : start + LONGEST]
                if len(part) >= SHORTEST:
                    found.setdefault(named.sub("[MASK]", " ".join(part)), (label, number))
    return [Passage(text, label, groups.find(n)) for text, (label, n) in found.items()]


def split(everything: list[Passage]) -> tuple[list[Passage], list[Passage]]:
    """Train and dev; a group falls on one side, by a checksum of its first passage."""
    first: dict[int, str] = {}
    for passage in everything:
        first.setdefault(passage.group, passage.text)
    train, dev = [], []
    for passage in everything:
        in_dev = zlib.crc32(first[passage.group].encode()) % 100 < DEV_PERCENT
        (dev if in_dev else train).append(passage)
    return train, dev


def train_tokenizer(texts: list[str], vocab_size: int, length: int) -> Tokenizer:
    """A lower-casing BPE tokenizer that cuts and pads to `length` tokens.

    BPE because its training has one outcome; that of WordPiece depends on the order of a hash map.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


def encode(tokenizer: Tokenizer, part: list[Passage]) -> dict[str, np.ndarray]:
    """The arrays a model takes: `input_ids`, `attention_mask` (passage length), `labels` (passage)."""
    encoded = tokenizer.encode_batch([passage.text for passage in part])
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int32),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int32),
        "labels": np.array([passage.label for passage in part], np.int32),
    }
