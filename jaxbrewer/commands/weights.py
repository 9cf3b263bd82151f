"""``jaxbrewer port-weights``: a torch state dict becomes a Hugging Face folder."""

import importlib
import inspect
import pickle
import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxbrewer import zoo
from jaxbrewer.commands import BY_HAND, FINE, CommandError, say
from jaxbrewer.commands.zoo_models import config_from, model_class, model_type_of, read_config
from jaxbrewer.errors import suggest
from jaxbrewer.zoo.hf import CONFIG, WEIGHTS, export_weights

# What torch's reader raises on a file that is not one of its own.
_UNREADABLE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    struct.error,
)  # fmt: skip


def port_weights(
    file: str,
    config_file: str,
    out: str,
    task: str | None,
    num_labels: int | None,
    drop: Sequence[str] = (),
) -> int:
    """Ports weights; see the command's help.

    Raises:
        CommandError: torch is not there, a file cannot be read, the file is no plain state dict,
            or its tensors are not those of the model.
    """
    folder = Path(out)
    if (folder / WEIGHTS).exists():
        raise CommandError(f"--out {out} holds a {WEIGHTS} already; give another folder")
    values = read_config(Path(config_file))
    tensors = _without(drop, read_state_dict(Path(file)), file)
    if task is None:
        task = _task_of(tensors)
        say(f"--task was not given; the names of the tensors say {task}")
    labels = num_labels if num_labels is not None else _labels_of(tensors, task)
    try:
        cls = model_class(model_type_of(values), task)
        config = config_from(values, num_labels=labels)
    except ValueError as error:
        raise CommandError(f"{config_file}: {error}", BY_HAND) from error
    model = _built(cls, config, tensors, file)
    try:
        model.save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CommandError(f"--out {out}: {error}") from error
    _summarise(model, tensors, folder)
    return FINE


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads a torch state dict, running no code of the file's; ``module.`` prefixes are taken off.

    Returns:
        Name → array; floating types narrower or wider than float32 become float32.

    Raises:
        CommandError: torch is not installed, or the file is no plain state dict, and why.
    """
    if not path.is_file():
        raise CommandError(f"{path}: there is no such file")
    torch = _torch()
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CommandError(
            f"{path} is not a plain state dict, and reading it would run code: {_cause(error)}. In "
            "torch, save torch.save(model.state_dict(), file) and port that file",
            BY_HAND,
        ) from error
    except _UNREADABLE as error:
        raise CommandError(
            f"{path} cannot be read as a torch file ({type(error).__name__}: {_cause(error)}); is "
            "it whole?"
        ) from error
    return _as_arrays(_checked(loaded, path, torch), path, torch)


def _without(
    drop: Sequence[str], tensors: Mapping[str, np.ndarray], file: str
) -> dict[str, np.ndarray]:
    """The tensors but those of the given names, which must be there."""
    if absent := [name for name in drop if name not in tensors]:
        raise CommandError(f"--drop {absent[0]}: {file} has none: {suggest(absent[0], tensors)}")
    return {name: array for name, array in tensors.items() if name not in drop}


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise CommandError(
            "port-weights reads torch files and needs torch, which is not installed: "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        ) from error


def _cause(error: Exception) -> str:
    """What a torch error says, without its advice to turn the protection off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = next((line for line in lines if "WeightsUnpickler error" in line), None)
    refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    if refused:
        return f"it refers to {refused[1]}"
    return (told or (lines[0] if lines else "no reason given"))[:200]


def _checked(loaded: Any, path: Path, torch: Any) -> Mapping[str, Any]:
    """A loaded object, if it is a plain state dict."""
    if not isinstance(loaded, Mapping):
        raise CommandError(
            f"{path} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()",
            BY_HAND,
        )
    inside = [str(k) for k, v in loaded.items() if isinstance(v, Mapping)]
    others = [str(k) for k, v in loaded.items() if not isinstance(v, torch.Tensor)]
    if inside and len(others) == len(loaded):
        raise CommandError(
            f"{path} is a checkpoint with {', '.join(map(repr, loaded))}, not a plain state dict. "
            f"In torch, save {inside[0]!r} alone: torch.save(torch.load(file)[{inside[0]!r}], …)",
            BY_HAND,
        )
    if others or not loaded:
        named = ", ".join(map(repr, others[:5])) or "there is nothing in it"
        raise CommandError(
            f"{path} is not a plain state dict: not tensors: {named}. Save model.state_dict()",
            BY_HAND,
        )
    return loaded


def _as_arrays(loaded: Mapping[Any, Any], path: Path, torch: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for key, tensor in loaded.items():
        name = str(key)
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in arrays:
            raise CommandError(
                f"{path}: {name} is there twice, with and without 'module.'", BY_HAND
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise CommandError(
                f"{path}: {key} is sparse, quantized or complex; save it as a dense float tensor",
                BY_HAND,
            )
        tensor = tensor.detach()
        arrays[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy().copy()
    return arrays


def _task_of(tensors: Mapping[str, np.ndarray]) -> str:
    """The task that the names of a model's tensors speak of."""
    if any(name.startswith("qa_outputs.") for name in tensors):
        return "question-answering"
    if not any(name.startswith("classifier.") for name in tensors):
        return "none"  # the head of pretraining is passed over unless it is asked for
    if any(name.startswith("head.") for name in tensors):  # ModernBERT's, whatever the task
        raise CommandError("the names of the tensors do not tell the task: give --task")
    deep = any(name.startswith(("pre_classifier.", "classifier.dense.")) for name in tensors)
    pooled = any(name.startswith("pooler.") or ".pooler." in name for name in tensors)
    return "sequence-classification" if pooled or deep else "token-classification"


def _labels_of(tensors: Mapping[str, np.ndarray], task: str) -> int | None:
    """The number of classes, from the last layer's shape; None where the config is to say it."""
    if task not in ("sequence-classification", "token-classification"):
        return None
    for name in ("classifier.out_proj.weight", "classifier.weight"):
        if name in tensors and tensors[name].ndim == 2:
            return tensors[name].shape[0]
    return None


def _built(cls: Any, config: Any, tensors: Mapping[str, np.ndarray], file: str) -> Any:
    """The model with these weights, read by the zoo from a folder made for it."""
    options: dict[str, Any] = {}
    may_pool = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    if may_pool and not any("pooler." in name for name in tensors):
        options["add_pooling_layer"] = False
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(tensors), Path(folder) / WEIGHTS)
        try:
            return cls.from_pretrained(folder, config=config, **options)
        except zoo.WeightsMismatchError as error:
            lines = str(error).replace(folder, file).splitlines()
            problems = [line for line in lines if "new_head" not in line]  # no option here
            advice = ["  is it another --task, --config or --num-labels?"]
            extra = re.findall(r"not in the model: (\S+)", str(error))
            if extra:
                drops = " ".join(f"--drop {name}" for name in extra[:8])
                advice.append(f"  to leave out what the model does not need: {drops}")
            raise CommandError("\n".join([*problems, *advice]), BY_HAND) from error
        except ValueError as error:
            raise CommandError(str(error).replace(folder, file), BY_HAND) from error


def _summarise(model: Any, tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    written = export_weights(model)
    prefix = f"{model.tensor_names.prefix}."
    bare = {name.removeprefix(prefix) for name in written}
    passed = [name for name in tensors if _canonical(name).removeprefix(prefix) not in bare]
    doubled = {second for _, second in model.tensor_names.copies}
    count = sum(array.size for name, array in written.items() if name not in doubled)
    say(f"{model.architecture}: {len(written)} tensors, {count:,} parameters in float32")
    if passed:
        say(f"passed over, of no use to this model: {', '.join(passed)}")
    say(f"written to {folder / WEIGHTS} and {folder / CONFIG}")
    say(f"read it with jaxbrewer.zoo.{model.architecture}.from_pretrained({str(folder)!r})")


def _canonical(name: str) -> str:
    """A tensor's name as it is today: norms were once called gamma and beta."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", name))
