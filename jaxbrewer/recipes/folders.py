"""Folders of models and of tokenizers: those on disk, and those of the Hugging Face Hub."""

import importlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from ..errors import told
from ..zoo.folders import config_file
from ..zoo.tokenizer_files import tokenizer_files

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# What a model is read from; others that lie beside it are not fetched.
_WANTED = ("*.json", "*.txt", "*.safetensors", "*.model")


def folder_problem(folder: str) -> str | None:
    """What is wrong with a folder of a model, or None; looks at what is there, fetches nothing."""
    if not os.path.isdir(folder):
        if not is_hub_name(folder):
            return f"there is no folder {folder!r} ({Path(folder).absolute()})"
        try:
            importlib.import_module("huggingface_hub")
        except ImportError:
            return (
                f"there is no folder {folder!r}; to fetch a model of this name from the Hugging Face "
                "Hub, pip install 'jaxbrewer[hub]'"
            )
        return None
    if not config_file(folder).is_file():
        within = Path(folder) / "student"
        there = f"; {within} is one" if config_file(within).is_file() else ""
        return f"{folder} has no config.json, so it is no folder of a model{there}"
    return None


def tokenizer_problem(folder: str) -> str | None:
    """What is wrong with a folder of a tokenizer, or None."""
    try:
        importlib.import_module("tokenizers")
    except ImportError:
        return "text is cut into tokens by tokenizers: pip install 'jaxbrewer[text]'"
    if not os.path.isdir(folder):
        return None if is_hub_name(folder) else f"there is no folder {folder!r}"
    if {"tokenizer.json", "vocab.txt"}.isdisjoint(tokenizer_files(folder)):
        return (
            f"{folder} has no tokenizer.json and no vocab.txt: copy there what its model came with, or "
            "write it by transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    return None


def is_hub_name(name: str) -> bool:
    """Whether text is shaped as a name of the Hub, ``organisation/model``."""
    return _HUB_NAME.fullmatch(name) is not None


def on_disk(folder: str) -> str:
    """The folder itself, or where a model of the Hub lies after it was fetched.

    Raises:
        ValueError: it cannot be fetched.
    """
    if os.path.isdir(folder):
        return folder
    hub: Any = importlib.import_module("huggingface_hub")
    logger.info("Fetching %s from the Hugging Face Hub, unless it is here already", folder)
    try:
        return hub.snapshot_download(folder, allow_patterns=list(_WANTED))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{folder} cannot be fetched from the Hugging Face Hub: {told(error)}. Without a network name "
            "a folder on disk"
        ) from error
