"""``jaxbrewer port``: read TextBrewer's files, say what becomes of each setting, write JSON."""

import ast
import dataclasses
import difflib
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxbrewer import presets
from jaxbrewer.commands import (
    BY_HAND,
    FINE,
    CommandError,
    make_folder,
    say,
    zoo_models,
)
from jaxbrewer.commands.port import verdicts
from jaxbrewer.commands.port.advice import advise
from jaxbrewer.commands.port.literals import Written, parse, written_configs
from jaxbrewer.commands.port.verdicts import Finding, Ported, Run, Verdict
from jaxbrewer.configurations.checks import short
from jaxbrewer.configurations.configs import DistillationConfig, IntermediateMatch, TrainingConfig
from jaxbrewer.errors import suggest
from jaxbrewer.files import read_json, read_text, write_json

_TRAINING = [f.name for f in dataclasses.fields(TrainingConfig)]
_DISTILLATION = [f.name for f in dataclasses.fields(DistillationConfig)]
_MATCH = [f.name for f in dataclasses.fields(IntermediateMatch)]
_MODEL = (
    "model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "intermediate_size", "max_position_embeddings", "hidden_act", "dim",
    "n_layers", "n_heads", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "type_vocab_size", "embedding_size",
)  # fmt: skip
_EXPECTED = (
    "expected TextBrewer's training config, distillation config, intermediate matches, teachers "
    "and student, or a model's config"
)
_NESTED = 4


@dataclass(frozen=True)
class Document:
    """One thing in a file.

    Attributes:
        label: where it is, below the file's name.
        kind: short, for the name of what is written.
        ported: what becomes of it.
    """

    label: str
    kind: str
    ported: Ported


def port_files(files: Sequence[str], out: str | None, run: Run) -> int:
    """Ports files; see the command's help.

    Raises:
        CommandError: a file cannot be read, or nothing in it is TextBrewer's, or what is to be
            written would stand in the place of an input.
    """
    paths = [Path(name) for name in files]
    found = [(path, document) for path in paths for document in _documents(path, run)]
    targets = [[] for _ in found] if out is None else _targets(found, Path(out), paths)
    if out is not None:
        make_folder(out)
    say(f"{_legend()}\n")
    for (path, document), results in zip(found, targets, strict=True):
        label = f", {document.label}" if document.label else ""
        say(f"{path}{label}: {document.ported.what}")
        _print(document.ported)
        for file, result in results:
            _write(result, file)
        say()
    verdicts = [finding.verdict for _, document in found for finding in document.ported.findings]
    hands = verdicts.count(Verdict.BY_HAND)
    if hands:
        say(f"{hands} line{'s' if hands > 1 else ''} marked ! need your hand.")
        return BY_HAND
    say("Nothing of the configs needs your hand.")
    if any(str(path).endswith(".py") for path, _ in found):
        say(
            "The rest of a script was not looked at: its imports, models and optimizer, line by line in "
            "docs/porting.md, section 'Scripts, before and after'."
        )
    return FINE


def _legend() -> str:
    return "=  the same   ~  another thing here   -  no meaning here   !  needs your hand"


def _print(ported: Ported) -> None:
    for finding in ported.findings:
        value = f" {finding.value}" if finding.value else ""
        equals = " =" if value and not finding.name.startswith("match ") else ":" if value else ""
        head = f"  {finding.verdict.value} {finding.name}{equals}{value}"
        say(textwrap.fill(head, 100, subsequent_indent="      "))
        if finding.text:
            say(textwrap.fill(finding.text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if ported.defaults:
        text = "at TextBrewer's defaults, the same here: " + ", ".join(ported.defaults)
        say(textwrap.fill(text, 100, initial_indent="  = ", subsequent_indent=" " * 6))


# ----------------------------------------------------------------------------------- what is in a file


def _documents(path: Path, run: Run) -> Iterator[Document]:
    if path.suffix.lower() == ".py":
        yield from _in_python(path, run)
        return
    found = list(_in_json(read_json(path), "", path.parent, run, 0))
    if not found:
        raise CommandError(f"{path}: nothing of TextBrewer's was found; {_EXPECTED}")
    yield from found


def _in_json(value: Any, label: str, folder: Path, run: Run, depth: int) -> Iterator[Document]:
    """Everything in a JSON value that is recognised by its keys."""
    if isinstance(value, list):
        if value and all(isinstance(item, Mapping) and set(item) & set(_MATCH) for item in value):
            yield Document(label, "matches", verdicts.matches(value))
        return
    if not isinstance(value, Mapping):
        return
    if isinstance(value.get("student"), Mapping) or isinstance(value.get("teachers"), list):
        yield Document(label, "models", port_job(value, folder))
    elif {"layer_num_S", "layer_num_T"} & set(value):
        yield Document(label, "emd", verdicts.emd(value))
    elif {"layer_T", "layer_S"} & set(value):
        yield Document(label, "matches", verdicts.matches([value]))
    elif len(set(_MODEL) & set(value)) >= 2:
        yield Document(label, "config", port_model(value))
    elif any(_near(key, _TRAINING + _DISTILLATION) for key in value):
        yield from _configs(value, label, run)
    elif depth < _NESTED:
        yield from _nested(value, label, folder, run, depth)


def _nested(
    value: Mapping[str, Any], label: str, folder: Path, run: Run, depth: int
) -> Iterator[Document]:
    """What the values of an object are, one by one, and which of them are nothing known."""
    passed = Ported("other keys")
    found = []
    for key, item in value.items():
        below = list(_in_json(item, f"{label}.{key}" if label else key, folder, run, depth + 1))
        found += below
        if not below:
            passed.add(repr(key), "", Verdict.MEANINGLESS, "not TextBrewer's; left to you")
    yield from found
    if found and passed.findings:
        yield Document(label, "other", passed)


def _near(key: str, names: Sequence[str]) -> bool:
    return key in names or bool(difflib.get_close_matches(key.casefold(), names, 1, 0.85))


def _configs(value: Mapping[str, Any], label: str, run: Run) -> Iterator[Document]:
    """A training or distillation config, or one object that holds the keys of both."""
    exact = {"training": 0, "distillation": 0}
    parts: dict[str, dict[str, Any]] = {"training": {}, "distillation": {}}
    strange = {}
    for key, item in value.items():
        for kind, names in (("training", _TRAINING), ("distillation", _DISTILLATION)):
            if _near(key, names):
                parts[kind][key] = item
                exact[kind] += key in names
                break
        else:
            strange[key] = item
    main = max(exact, key=lambda kind: (exact[kind], len(parts[kind])))
    parts[main] |= strange
    if parts["training"]:
        yield Document(label, "training", verdicts.training_config(parts["training"], run))
    if parts["distillation"]:
        yield Document(label, "distillation", verdicts.distillation_config(parts["distillation"]))


def _in_python(path: Path, run: Run) -> Iterator[Document]:
    text = read_text(path)
    try:
        tree = parse(text)
        written = written_configs(tree)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error
    for item in written:
        label = f"line {item.line}" + (f" ({item.name})" if item.name else "")
        yield Document(label, item.kind, _port_written(item, run))
    script = _script(tree)
    if script.findings:
        yield Document("", "script", script)
    elif not written:
        raise CommandError(
            f"{path}: neither TrainingConfig(…) nor DistillationConfig(…) nor intermediate matches "
            "are written out in it"
        )


def _port_written(item: Written, run: Run) -> Ported:
    if item.kind == "file":
        ported = Ported(f"{item.name} config read from a file")
        text = "run  jaxbrewer port  on that file too"
        ported.by_hand("from_json_file", text, repr(item.values))
        return ported
    make: Mapping[str, Any] = {
        "training": lambda: verdicts.training_config(item.values, run),
        "distillation": lambda: verdicts.distillation_config(item.values),
        "matches": lambda: verdicts.matches(item.values),
        "emd": lambda: verdicts.emd(item.values),
    }
    ported = make[item.kind]() if item.values or not item.unread else Ported(item.kind)
    for unread in item.unread:
        named = next((name for name in presets.MATCHES if repr(name) in unread.why), None)
        hint = f"; presets.MATCHES has {named!r}" if named else ""
        text = f"line {unread.line}: {unread.why}; left out of what is written, so add it yourself"
        text += hint
        ported.findings = [f for f in ported.findings if f.name != unread.name]
        ported.by_hand(unread.name, text)
        ported.defaults = [d for d in ported.defaults if not d.startswith(f"{unread.name}=")]
    return ported


def _script(tree: ast.Module) -> Ported:
    ported = Ported("the rest of the script")
    for line, finding in advise(tree):
        name = f"line {line}: {finding.name}"
        ported.findings.append(Finding(name, finding.value, finding.verdict, finding.text))
    return ported


# ------------------------------------------------------------------------------------------- models


def port_model(values: Mapping[str, Any]) -> Ported:
    """Ports a model's config file, TextBrewer's ``bert_config*.json`` or Hugging Face's."""
    ported = Ported("model config")
    try:
        config = zoo_models.config_from(values)
    except ValueError as error:
        return verdicts.as_invalid(ported, error)
    ported.what = f"model config ({type(config).__name__})"
    ported.result = config
    read = {f.name for f in dataclasses.fields(config)} & set(values)
    labels = {"id2label", "label2id", "_num_labels"} & set(values)
    ported.add(
        "read",
        ", ".join(f"{name} {short(values[name])}" for name in values if name in read)
        or "nothing but defaults",
        Verdict.SAME,
        "",
    )
    if labels:
        ported.add(", ".join(sorted(labels)), "", Verdict.SAME, f"num_labels={config.num_labels}")
    rest = [name for name in values if name not in read | labels | {"model_type"}]
    if rest:
        ported.add(", ".join(map(str, rest)), "", Verdict.MEANINGLESS, "changes nothing here")
    ported.add(
        "config",
        "",
        Verdict.CHANGED,
        "frozen: in place of config.output_hidden_states = True, say "
        "config.replace(output_hidden_states=True)",
    )
    return ported


_PAIR_KEYS = (
    "model_type", "prefix", "vocab_file", "config_file", "checkpoint", "tokenizer_kwargs",
    "disable", "num_hidden_layers",
)  # fmt: skip


def port_job(values: Mapping[str, Any], folder: Path) -> Ported:
    """Ports the ``teachers`` and ``student`` file of TextBrewer's MNLI example.

    Args:
        values: the JSON object.
        folder: where the file lies; its relative paths are looked up there, then in the working
            folder.
    """
    ported = Ported("teachers and student")
    teachers, student = values.get("teachers", []), values.get("student")
    if not isinstance(teachers, list) or not all(isinstance(t, Mapping) for t in teachers):
        ported.by_hand("teachers", "expected a list of objects", short(teachers))
        teachers = []
    for name in values:
        if name not in ("teachers", "student"):
            ported.by_hand(str(name), "unknown key; " + suggest(name, ("teachers", "student")))
    used = [t for t in teachers if not t.get("disable")]
    ported.add("teachers", str(len(used)), Verdict.SAME, _distiller_for(len(used)))
    configs: dict[str, Any] = {}
    for i, teacher in enumerate(teachers, 1):
        _add_member(ported, f"teacher {i}", teacher, folder, configs)
    if student is None:
        ported.by_hand("student", "there is none")
    elif not isinstance(student, Mapping):
        ported.by_hand("student", "expected an object", short(student))
    else:
        _add_member(ported, "student", student, folder, configs)
    ported.result = configs or None
    return ported


def _distiller_for(teachers: int) -> str:
    if teachers == 0:
        return "none: train the model with BasicTrainer"
    if teachers == 1:
        return "one: GeneralDistiller (or BasicDistiller, EMDDistiller)"
    return "several: MultiTeacherDistiller, with the models as a list"


def _add_member(
    ported: Ported, who: str, member: Mapping[str, Any], folder: Path, configs: dict[str, Any]
) -> None:
    """Adds the findings on one teacher or student; its config, if it can be read, to ``configs``."""
    if member.get("disable"):
        ported.add(f"{who}: disable", "true", Verdict.SAME, "left out")
        return
    for name in member:
        if name not in _PAIR_KEYS:
            ported.by_hand(f"{who}: {name}", f"unknown key; {suggest(name, _PAIR_KEYS)}")
    try:
        model_type = zoo_models.model_type_of(member)
        text = f"jaxbrewer.zoo.{zoo_models.config_class(model_type).__name__} and its models"
        ported.add(f"{who}: model_type", repr(model_type), Verdict.SAME, text)
    except ValueError as error:
        ported.by_hand(f"{who}: model_type", str(error))
    _add_files(ported, who, member, folder, configs)
    if "tokenizer_kwargs" in member or member.get("vocab_file") is not None:
        ported.add(
            f"{who}: vocab_file",
            short(member.get("vocab_file")),
            Verdict.SAME,
            "tokenize as before; batches of numpy arrays or torch tensors are both taken",
        )
    if "prefix" in member:
        value = short(member["prefix"])
        text = "names the example's feature cache"
        ported.add(f"{who}: prefix", value, Verdict.MEANINGLESS, text)


def _add_files(
    ported: Ported, who: str, member: Mapping[str, Any], folder: Path, configs: dict[str, Any]
) -> None:
    config_file, checkpoint = member.get("config_file"), member.get("checkpoint")
    if config_file is not None:
        _add_config_file(ported, who, member, folder, configs)
    if checkpoint is None:
        ported.add(f"{who}: checkpoint", "null", Verdict.SAME, "weights start at random")
        return
    ported.by_hand(
        f"{who}: checkpoint",
        f"torch weights: run  jaxbrewer port-weights {checkpoint} --config {config_file} --out "
        "FOLDER  and read them with from_pretrained(FOLDER)",
        short(checkpoint),
    )


def _add_config_file(
    ported: Ported, who: str, member: Mapping[str, Any], folder: Path, configs: dict[str, Any]
) -> None:
    name, value = f"{who}: config_file", member["config_file"]
    path = _find(value, folder) if isinstance(value, str) else None
    if path is None:
        ported.by_hand(name, "there is no such file here; port it where it is", short(value))
        return
    try:
        read = dict(zoo_models.read_config(path))
        config = zoo_models.config_from(
            read
            if "model_type" in read
            else {**read, "model_type": member.get("model_type", "bert")},
            num_hidden_layers=member.get("num_hidden_layers"),
        )
    except (CommandError, ValueError) as error:
        ported.by_hand(name, str(error), short(value))
        return
    configs[who.replace(" ", "")] = config
    changed = "num_hidden_layers" in member
    text = f"num_hidden_layers={member['num_hidden_layers']} set on it" if changed else ""
    ported.add(name, short(value), Verdict.SAME, text)


def _find(name: str, folder: Path) -> Path | None:
    for path in (folder / name, Path(name)):
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):  # a name no file can have
            return None
    return None


# ----------------------------------------------------------------------------------------- writing


def _targets(
    found: Sequence[tuple[Path, Document]], folder: Path, inputs: Sequence[Path]
) -> list[list[tuple[Path, Any]]]:
    """For each document, the files to write and what goes into them.

    Raises:
        CommandError: one of the files is an input.
    """
    read = {path.resolve() for path in inputs}
    counts = Counter(path for path, _ in found)
    taken: set[Path] = set()
    targets = []
    for path, document in found:
        plain = counts[path] == 1 and path.suffix.lower() != ".py"
        results = []
        for kind, result in _results(document):
            stem = path.stem if plain and not kind.startswith("models.") else f"{path.stem}.{kind}"
            file = folder / f"{stem}.json"
            n = 1
            while file in taken:
                n += 1
                file = folder / f"{stem}.{n}.json"
            if file.resolve() in read:
                raise CommandError(f"--out {folder}: {file} is an input; give another folder")
            taken.add(file)
            results.append((file, result))
        targets.append(results)
    return targets


def _results(document: Document) -> list[tuple[str, Any]]:
    """What a document gives to write, each with its kind."""
    result = document.ported.result
    if result is None:
        return []
    if document.kind == "models":
        return [(f"models.{name}", config) for name, config in result.items()]
    return [(document.kind, result)]


def _write(result: Any, file: Path) -> None:
    try:
        if hasattr(result, "to_json_file"):
            result.to_json_file(file)
        else:
            write_json(file, result)
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error}") from error
    say(f"  written to {file}")
