"""The tokenizer's files, which travel from the folder that a model came from to those it is saved in.

A model's config remembers the folder (`ModelConfig.source_folder`), not the files: they are copied
when a folder is written, one by one, and no more than that is known of them here.
"""

import filecmp
import logging
import os
import shutil
from pathlib import Path

from jaxbrewer.files import replacing
from jaxbrewer.zoo.folders import outside_of

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)
"""What tokenizers of Hugging Face are kept in; a folder has some of them."""


def tokenizer_files(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the tokenizer's files in a folder, none where there is no such folder."""
    return [name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]


def copy_tokenizer(source: str | os.PathLike[str] | None, folder: Path) -> None:
    """Copies the tokenizer's files from the folder a model came from to one it was saved in.

    Files that are there already stay, all of them; a line in the log says so where they differ.
    Where there is nothing to copy, a line says what the folder lacks.
    """
    there = tokenizer_files(folder)
    found = [] if source is None else tokenizer_files(source)
    if there:
        if source is not None and _differ(Path(source), folder, found):
            logger.warning(
                "%s keeps the tokenizer's files that it has, which are not those of %s",
                folder,
                source,
            )
        return
    if source is None or not found:
        _say_what_is_missing(source, folder)
        return
    for name in found:
        file = Path(source) / name
        if problem := outside_of(Path(source), file):
            logger.warning("%s is not copied to %s: it is %s", file, folder, problem)
            continue
        with replacing(folder / name) as copy:
            shutil.copyfile(file, copy)


def _differ(source: Path, folder: Path, found: list[str]) -> bool:
    """Whether a file of the source's is not in the folder as it is there."""
    return any(
        not (folder / name).is_file()
        or not filecmp.cmp(source / name, folder / name, shallow=False)
        for name in found
    )


def _say_what_is_missing(source: str | os.PathLike[str] | None, folder: Path) -> None:
    if source is None:
        why = "the model was not read from a folder"
    elif not Path(source).is_dir():
        why = f"{source}, which the model came from, is no longer there"
    else:
        why = f"{source}, which the model came from, has none"
    # A model that was made here may have no tokenizer at all; one that was read is missing its own.
    level = logging.INFO if source is None else logging.WARNING
    logger.log(
        level,
        "%s has no tokenizer (%s): copy there what there is of %s",
        folder,
        why,
        ", ".join(TOKENIZER_FILES),
    )
