"""Do jaxbrewer and TextBrewer train the same student, where no chance parts them?

A job of `study.py` on its first rows, with the student's dropout at 0: both begin with the same
weights and have the same batches, losses and rates, so that what they end with may differ by
rounding alone. Prints, for each kind of array, how far each moved it and how far apart they end (the
mean absolute difference, the largest over arrays), and how many held-out rows get the same label. The
gradient of the keys' biases is zero, so Adam divides rounding by rounding there and they differ.

    python benchmarks/same_weights.py --model minilm --data data     # some four minutes of two cores
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import harness
import numpy as np
import study_runs
from study_runs import ENGINES, JAXBREWER, TEXTBREWER, Run, Settings

ROWS = 640
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder of an encoder, as study.py's")
    add("--data", type=Path, required=True, help="the folder with the data sets")
    add("--task", default="sst2", choices=tuple(study_runs.TASKS))
    add("--rows", type=int, default=ROWS, help="to train on, and to be asked about at most")
    args = parser.parse_args()
    epochs = 1 if args.smoke else study_runs.EPOCHS
    runs = {by: Run(args.task, "distilled", 1, by) for by in ENGINES}
    with tempfile.TemporaryDirectory() as out:
        folders = (path.resolve() for path in (args.model, args.data, Path(out)))
        settings = Settings(*folders, "cpu", args.rows, epochs)
        study_runs.perform(runs[JAXBREWER].teacher, settings)
        _without_dropout(settings.beginning(runs[JAXBREWER]))
        for run in runs.values():
            study_runs.perform(run, settings)
        rows = compared(settings, runs)
        found = [json.loads(settings.result(run).read_text()) for run in runs.values()]
    harness.show(rows)
    labels = [each["predictions"] for each in found]
    same = sum(one == other for one, other in zip(*labels, strict=True))
    print(f"\nthe same labels in {same} of {len(labels[0])} held-out rows")
    harness.save(args, rows, same_labels=[same, len(labels[0])])


def _without_dropout(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(DROPOUT, 0.0)))


def compared(settings: Settings, runs: Mapping[str, Run]) -> list[harness.Row]:
    """The rows: arrays of one kind are those of one name in all layers."""
    from safetensors.numpy import load_file

    began, ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (
            settings.beginning(runs[JAXBREWER]),
            settings.student(runs[JAXBREWER]),
            settings.student(runs[TEXTBREWER]),
        )
    )
    if began.keys() != ours.keys() or began.keys() != theirs.keys():
        raise ValueError(f"not the same arrays: {began.keys()}, {ours.keys()}, {theirs.keys()}")
    kinds: dict[str, list[str]] = {}
    for name in sorted(began):
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    return [
        {
            "arrays": kind,
            "moved by jaxbrewer": _farthest(began, ours, names),
            "by TextBrewer": _farthest(began, theirs, names),
            "apart": _farthest(ours, theirs, names),
        }
        for kind, names in kinds.items()
    ]


def _farthest(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], names: list[str]
) -> float:
    return max(float(np.abs(one[name] - other[name]).mean()) for name in names)


if __name__ == "__main__":
    main()
