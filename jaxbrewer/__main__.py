"""The ``jaxbrewer`` command: bring TextBrewer's files over, check a job, look into folders."""

import argparse
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxbrewer import __version__
from jaxbrewer.commands import (
    UNUSABLE,
    CommandError,
    checking,
    exporting,
    inspecting,
    recipes,
    say,
    suggesting,
    weights,
)
from jaxbrewer.commands.port import documents
from jaxbrewer.commands.port.verdicts import Run
from jaxbrewer.commands.report import page
from jaxbrewer.commands.zoo_models import TASKS
from jaxbrewer.data.tables import FORMS
from jaxbrewer.files import UnreadableFileError, read_json_object
from jaxbrewer.machine.described import EXAMPLES
from jaxbrewer.recipes.reading import Setting, setting
from jaxbrewer.recipes.schema import TASKS as RECIPE_TASKS
from jaxbrewer.recipes.schema import Recipe

_MOST_STEPS = 10_000_000

_EXIT_CODES = """\
exit codes:
  0  fine
  1  something needs your hand, and the output says what
  2  wrong usage, or a file that cannot be read
  3  a loss, a gradient or a weight that is not finite; what was before is saved
130, 143: interrupted, or asked to end (SIGINT, SIGTERM); a training has saved where it was
"""

_PORT = """\
Reads TextBrewer's JSON files (training config, distillation config, intermediate matches, teachers
and student, a model's bert_config*.json) or Python files whose configs are written out (nothing in
them is run), and says field by field what each value becomes on JAX. A file is recognised by its
keys."""

_WEIGHTS = """\
Reads a torch state dict (TextBrewer's gs*.pkl, a pytorch_model.bin) without running code from it,
and writes a Hugging Face folder that jaxbrewer.zoo, and transformers, read. Needs torch. The
tokenizer's files are not written: copy them beside it."""

_CHECK = """\
Checks a distillation without training it and without weights: what is matched with what, shapes,
parameters, FLOPs and memory of a step, and when checkpoints are saved. Models are the zoo's, with
adaptors that return logits, hidden_states as 'hidden', attentions as 'attention', the loss as
'losses' and the attention_mask as 'inputs_mask'; the distiller is GeneralDistiller, the optimizer
AdamW.

Of a recipe (`jaxbrewer train`) the models and the data are read: the same report of its own job, what it is
compiled for, and how full its batches are. Fields can be set on top, as for train."""

_INSPECT = """\
Shows what a folder holds. A model's folder: its config and parameters. A checkpoint gs{step}, or an
output_dir with several: step, epoch, scores, parameters; it is read whole, to see that it can be."""


_EXPORT = """\
Writes a model's folder (Hugging Face's or sentence-transformers', as save_pretrained and export_hf leave
it) as one file, with its weights, for any batch and any length. stablehlo: run by JAX alone
(jax.export.deserialize), which reads such a file for six months after the release that wrote it. onnx:
run by onnxruntime and others, without JAX; writing it needs pip install 'jaxbrewer[onnx]', and the file
is run and compared with the model."""

_REPORT = """\
Writes one HTML page of one or several runs, by their output_dirs: curves, matched layers, configs,
checkpoints, parameters and speed. It asks nothing of a network and runs no script. The curves are those
of the log_dir that the run's config names. What is missing or damaged is said, in the page and here."""

_SUGGEST = """\
Says which of a teacher's layers to match with which of a student's: spread evenly by depth, as JSON for
intermediate_matches, and beside it how alike all layers are over some text (linear CKA). Both are
models' folders with the same tokens; needs pip install 'jaxbrewer[text]'."""

_TRAIN = """\
Trains what a recipe says, a TOML or JSON file: task, teacher, student, data, the two configs of TextBrewer,
optimizer, schedule, metrics. `jaxbrewer init` writes one with comments. Any field can be set on top:
--distillation.temperature 4, --num_epochs 1 (values are read as JSON where they are some). The student's
folder, in Hugging Face's format, is output_dir/student."""

_INIT = """\
Writes a recipe with comments, to be filled in and given to `jaxbrewer train`."""

_PREDICT = """\
Says what a model's folder, such as a recipe writes it, makes of each row of a file: a JSON object a line, in
the file's order."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `CommandError`."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}\n{self.format_usage()}try {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: its arguments; None takes the program's own.

    Returns:
        The exit code: 0 fine, 1 something needs the user's hand, 2 wrong usage or an unreadable
        file, 3 numbers that are not finite, 130 interrupted, 141 nobody reads any more. ``--help``
        and ``--version`` end the program, as argparse does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        given, settings = split_settings(sys.argv[1:] if argv is None else argv)
        options = parser().parse_args(given)
        if settings and options.command not in ("train", "check"):
            raise CommandError(
                f"--{settings[0][0]} is of train and check; {options.command} has none"
            )
        options.settings = settings
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except CommandError as error:
        say(f"jaxbrewer: {error}", file=sys.stderr)
        return error.code
    except UnreadableFileError as error:
        say(f"jaxbrewer: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("jaxbrewer: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    whole = _Parser(
        prog="jaxbrewer",
        description=__doc__,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    whole.add_argument("--version", action="version", version=f"jaxbrewer {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, description: str, run: Callable[[Any], int]) -> Any:
        command = commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    _add_init(add)
    _add_train(add)
    _add_predict(add)
    _add_port(add)
    _add_weights(add)
    _add_check(add)
    _add_inspect(add)
    _add_export(add)
    _add_report(add)
    _add_suggest(add)
    return whole


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[Setting]]:
    """The arguments, without the recipe's fields among them, ``--data.batch_size 16``; and those.

    Raises:
        CommandError: a field without a value.
    """
    rest, settings, words = [], [], iter(argv)
    fields = _fields_of(argv)
    for word in words:
        name, has_value, value = word.removeprefix("--").partition("=")
        is_field = "." in name or name in fields
        if not word.startswith("--") or not is_field:
            rest.append(word)
            continue
        text = value if has_value else next(words, None)
        if text is None:
            raise CommandError(f"{word} needs a value")
        settings.append(setting(name, text))
    return rest, settings


def _fields_of(argv: Sequence[str]) -> Collection[str]:
    """The fields of a recipe that a command's arguments may set by their bare names.

    Of ``check``, some are options too where it is given two configs.
    """
    fields = Recipe.__dataclass_fields__
    command = argv[0] if argv else ""
    if command == "train" or (command == "check" and any(map(_is_recipe, argv[1:]))):
        return fields
    return ()


def _is_recipe(word: str) -> bool:
    """Whether an argument is a recipe's file: TOML, or JSON that says a task."""
    if word.startswith("-") or not word.endswith((".toml", ".json")):
        return False
    try:
        return word.endswith(".toml") or "task" in read_json_object(Path(word))
    except UnreadableFileError:  # which is told when it is read
        return False


def _add_init(add: Callable[..., Any]) -> None:
    command = add("init", "write a recipe with comments", _INIT, _run_init)
    command.add_argument("task", choices=RECIPE_TASKS, metavar="TASK", help=", ".join(RECIPE_TASKS))
    command.add_argument(
        "--teacher", action="store_true", help="one that trains a teacher on labels"
    )
    command.add_argument(
        "--out", metavar="FILE", help="default recipe.toml, or teacher.toml of a teacher"
    )


def _add_train(add: Callable[..., Any]) -> None:
    command = add("train", "train what a recipe says", _TRAIN, _run_train)
    command.add_argument("recipe", metavar="RECIPE", help="a .toml or .json file")
    command.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in output_dir"
    )
    command.add_argument(
        "--max-examples", type=_count, metavar="N", help="rows of training, and of evaluation"
    )


def _add_predict(add: Callable[..., Any]) -> None:
    command = add("predict", "say what a model makes of a file's rows", _PREDICT, _run_predict)
    command.add_argument("folder", metavar="FOLDER", help="a model's folder, with its tokenizer")
    command.add_argument(
        "file", metavar="FILE", help="csv, tsv, jsonl, json, conll, txt or parquet"
    )
    command.add_argument("--out", metavar="FILE", help="where to; the terminal if left out")
    command.add_argument(
        "--text",
        nargs="+",
        metavar="COLUMN",
        help="one, or two of pairs; by the recipe if left out",
    )
    command.add_argument(
        "--task", choices=RECIPE_TASKS, help="by the recipe or the config if left out"
    )
    command.add_argument(
        "--form", choices=FORMS, help="how FILE is read; by its suffix if left out"
    )
    command.add_argument(
        "--max-length", type=_count, metavar="N", help="tokens; by the recipe, or 128"
    )
    command.add_argument("--batch-size", type=_count, default=32, metavar="N", help="default 32")


def _add_port(add: Callable[..., Any]) -> None:
    command = add("port", "say what TextBrewer's files become on JAX", _PORT, _run_port)
    command.add_argument("files", nargs="+", metavar="FILE", help="a .json or .py file")
    command.add_argument("--out", metavar="DIR", help="write the configs as JSON into this folder")
    _add_run(command)


def _add_weights(add: Callable[..., Any]) -> None:
    command = add(
        "port-weights", "turn a torch state dict into a Hugging Face folder", _WEIGHTS, _run_weights
    )
    command.add_argument("file", metavar="STUDENT.pkl", help="the state dict")
    command.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the model's bert_config.json or config.json",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    command.add_argument(
        "--task", choices=TASKS, help="the head; by the tensors' names if left out"
    )
    command.add_argument(
        "--num-labels", type=_count, metavar="N", help="classes; by the head's shape if left out"
    )
    command.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="TENSOR",
        help="a tensor that the model does not need; may be given several times",
    )


def _add_check(add: Callable[..., Any]) -> None:
    command = add("check", "check a distillation without training it", _CHECK, _run_check)
    command.add_argument(
        "files", nargs="+", metavar="FILE", help="RECIPE, or TRAIN.json and DISTILL.json"
    )
    for name in ("--teacher", "--student"):
        text = "a model's folder, or its config file; of the two configs"
        command.add_argument(name, metavar="DIR|FILE", help=text)
    text = f"of a recipe: devices that need not be there: {EXAMPLES}"
    command.add_argument("--on", metavar="DEVICES", help=text)
    command.add_argument("--batch-size", type=_count, metavar="N", help="default 8")
    command.add_argument("--length", type=_count, metavar="N", help="default 128")
    command.add_argument("--task", choices=TASKS, help="both heads; by the configs if left out")
    command.add_argument("--num-labels", type=_count, metavar="N", help="classes of both models")
    _add_run(command)


def _add_inspect(add: Callable[..., Any]) -> None:
    command = add("inspect", "show what a folder holds", _INSPECT, _run_inspect)
    command.add_argument(
        "folder", metavar="DIR", help="a model's folder, gs{step}, or an output_dir"
    )
    command.add_argument(
        "--max-level", type=_level, default=4, metavar="N", help="levels of the table; default 4"
    )


def _add_export(add: Callable[..., Any]) -> None:
    command = add("export", "write a model as a file that runs by itself", _EXPORT, _run_export)
    command.add_argument("folder", metavar="DIR", help="a model's folder")
    command.add_argument("--to", required=True, choices=exporting.FORMATS, help="the format")
    command.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    command.add_argument("--task", choices=TASKS, help="the head; by the config if left out")
    command.add_argument(
        "--length", type=_count, metavar="N", help="of all sequences; any if left out; stablehlo"
    )
    command.add_argument(
        "--platforms",
        nargs="+",
        metavar="NAME",
        help="cpu cuda tpu rocm; the first three if left out; stablehlo",
    )


def _add_report(add: Callable[..., Any]) -> None:
    command = add("report", "write a page of what runs have left", _REPORT, _run_report)
    command.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="of a run")
    command.add_argument("--out", required=True, metavar="FILE.html", help="the page to write")


def _add_suggest(add: Callable[..., Any]) -> None:
    command = add("suggest", "say which layers to match", _SUGGEST, _run_suggest)
    for name in ("--teacher", "--student"):
        command.add_argument(name, required=True, metavar="DIR", help="a model's folder")
    command.add_argument("--data", required=True, metavar="FILE", help="csv, tsv, jsonl, txt, …")
    command.add_argument("--text", default="text", metavar="COLUMN", help="default text")
    command.add_argument("--loss", default="hidden_mse", metavar="NAME", help="default hidden_mse")
    command.add_argument("--plot", metavar="FILE.png", help="draw the likeness, too")


def _add_run(command: argparse.ArgumentParser) -> None:
    """The length of a run, from which checkpoints' steps follow."""
    command.add_argument("--batches", type=_count, metavar="N", help="batches in an epoch")
    command.add_argument("--epochs", type=_count, metavar="N", help="epochs; default 1")
    command.add_argument("--num-steps", type=_count, metavar="N", help="optimizer steps, instead")


def _run_of(options: argparse.Namespace) -> Run:
    if options.num_steps is not None and (options.batches or options.epochs):
        raise CommandError("give --batches and --epochs, or --num-steps, not both")
    if options.epochs is not None and options.batches is None:
        raise CommandError("--epochs needs --batches, the number of batches in an epoch")
    if (options.batches or 0) * (options.epochs or 1) > _MOST_STEPS:
        raise CommandError(f"--batches times --epochs is more than {_MOST_STEPS:,}")
    return Run(options.batches, options.epochs, options.num_steps)


def _count(text: str) -> int:
    return _integer(text, 1)


def _level(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    if not text.isdecimal() or len(text) > 8 or not low <= int(text) <= _MOST_STEPS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a whole number from {low} to {_MOST_STEPS}"
        )
    return int(text)


def _run_init(options: argparse.Namespace) -> int:
    return recipes.init(options.task, options.out, teacher=options.teacher)


def _run_train(options: argparse.Namespace) -> int:
    return recipes.train(
        options.recipe,
        options.settings,
        resume=options.resume,
        max_examples=options.max_examples,
    )


def _run_predict(options: argparse.Namespace) -> int:
    return recipes.say_predictions(
        options.folder,
        options.file,
        out=options.out,
        text=options.text,
        task=options.task,
        max_length=options.max_length,
        batch_size=options.batch_size,
        form=options.form,
    )


def _run_port(options: argparse.Namespace) -> int:
    return documents.port_files(options.files, options.out, _run_of(options))


def _run_weights(options: argparse.Namespace) -> int:
    return weights.port_weights(
        options.file,
        options.config,
        options.out,
        options.task,
        options.num_labels,
        options.drop,
    )


def _run_check(options: argparse.Namespace) -> int:
    files = options.files
    given = [name for name in _OF_CONFIGS if getattr(options, name) is not None]
    if len(files) == 1:
        if given:
            raise CommandError(
                f"--{given[0].replace('_', '-')} is for two configs; fields of a recipe are set by "
                "their names: --data.batch_size 16"
            )
        if options.on is not None and os.environ.get("JAX_PLATFORMS") != "cpu":
            return _on_cpu(options.on)
        return recipes.check(files[0], options.settings, on=options.on)
    if options.on is not None:
        raise CommandError("--on is for a recipe: jaxbrewer check RECIPE --on tpu:v5e:2x4")
    if len(files) > 2 or options.settings:
        raise CommandError("check takes a recipe, with fields to set; or two configs, without")
    if options.teacher is None or options.student is None:
        raise CommandError("two configs need --teacher and --student, folders or config files")
    train, distill = files
    return checking.check(
        train,
        distill,
        options.teacher,
        options.student,
        task=options.task,
        num_labels=options.num_labels,
        batch_size=options.batch_size or 8,
        length=options.length or 128,
        run=_run_of(options),
    )


def _on_cpu(on: str) -> int:
    """The same command in a process of its own, whose devices are CPUs whatever is installed."""
    platform, _, count = on.partition(":")
    several = {"JAX_NUM_CPU_DEVICES": count} if platform == "cpu" and count.isdecimal() else {}
    command = [sys.executable, "-m", "jaxbrewer", *sys.argv[1:]]
    return subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu", **several}).returncode


_OF_CONFIGS = (
    "teacher", "student", "batch_size", "length", "task", "num_labels", "batches", "epochs",
    "num_steps",
)  # fmt: skip


def _run_inspect(options: argparse.Namespace) -> int:
    return inspecting.inspect_folder(options.folder, options.max_level)


def _run_export(options: argparse.Namespace) -> int:
    return exporting.export(
        options.folder,
        options.out,
        options.to,
        task=options.task,
        length=options.length,
        platforms=options.platforms,
    )


def _run_report(options: argparse.Namespace) -> int:
    return page.write_report(options.folders, options.out)


def _run_suggest(options: argparse.Namespace) -> int:
    return suggesting.suggest(
        options.teacher,
        options.student,
        options.data,
        options.text,
        loss=options.loss,
        plot=options.plot,
    )


if __name__ == "__main__":
    sys.exit(main())
