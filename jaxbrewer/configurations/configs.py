"""The configs: what to train and how, as frozen text and numbers.

A config is TextBrewer's: the same names, order and defaults, from a dict or a JSON file. Making one
checks it whole and reports every problem in one :class:`~jaxbrewer.errors.ConfigError`; it touches
no disk and no device. Schedulers stay names here, and nothing the caller gave is kept or changed.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, cast

from jaxbrewer import presets
from jaxbrewer.configurations import checks
from jaxbrewer.configurations.checks import device_name
from jaxbrewer.errors import ConfigError, PortingWarning, warn

from .schema import Config, _thawed

PARTS = (
    "batch", "class", "data", "loss", "max_grad_norm", "optimizer", "schedule", "student", "tasks", "tau",
    "teacher", "train_mode", "trainable",
)  # fmt: skip
"""What a job is made of beside its configs; see `training.comparison`."""

FREE = (
    "ckpt_frequency", "ckpt_epoch_frequency", "ckpt_steps", "log_dir", "output_dir", "device",
    "data_parallel", "local_rank", "resume", "max_to_keep", "mapping", "sharding",
    "max_nonfinite_steps", "resume_changes", "cache_dir", "monitor",
)  # fmt: skip
"""Fields that may differ where a run is resumed: they change no number of a run on sound data."""

ANY = "any"


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How to train, save and log.

    Args:
        gradient_accumulation_steps: batches for one optimizer step.
        ckpt_frequency: checkpoints in an epoch.
        ckpt_epoch_frequency: epochs from one with checkpoints to the next.
        ckpt_steps: optimizer steps from one checkpoint to the next when training by ``num_steps``;
            None: one, at the end.
        log_dir: folder for tensorboard files and ``metrics.jsonl``; None: none are written.
        output_dir: folder for checkpoints. It is made when training starts, not here.
        device: ``'cuda'``, ``'gpu'``, ``'tpu'``, ``'cpu'``, with an index where one is meant
            (``'cuda:1'``), a ``jax.Device``, or anything whose ``str()`` is such a text. Kept as
            text; see :func:`~jaxbrewer.machine.devices.resolve_device` for what it means on a machine.
        fp16: half precision, as far as the level says.
        fp16_opt_level: Apex's level of it, ``'O0'`` to ``'O3'``; see `jaxbrewer.models.precision`.
        data_parallel: share each batch out over this process's devices.
        local_rank: −1: one process; 0 or more: this process's rank on its machine.
        seed: of every random number of the training, from 0 to 2³² − 1.
        half_dtype: the half type of ``fp16``: ``'bfloat16'``, ``'float16'``, or ``'auto'``:
            bfloat16 where the hardware has it, else float16.
        resume: True: go on from the newest checkpoint in ``output_dir`` that is whole, if there is
            one; ``'gs1200'`` or a path with a slash: from that one, and no other. What is newer
            there is moved aside.
        max_to_keep: checkpoints to keep: the newest, and of the others the best-scored and then the
            newest; None: all. While one is written, the disk holds one more than this.
        mapping: how several devices share a batch. ``'sharded'``: one program sees the batch whole,
            and the numbers do not depend on how many devices there are. ``'pmap'``: each device
            computes the loss of its own rows, and gradients and metrics are averaged, as torch's
            DistributedDataParallel does.
        sharding: what is cut into pieces over the devices, for models larger than one of them:
            ``'teacher'``; ``'optimizer'``, which is its state, of an open accumulation window too;
            ``'all'``, which is these and the student's parameters; None: nothing, each device holds
            everything.
        max_nonfinite_steps: how many optimizer steps in a row may meet a loss or gradient that is not
            finite before training ends with an error, which names the step, the batch, the term and
            the parameter. Such a step changes no weight and no moment; schedules go on. 1: the first
            one ends it; None: none does, each is dropped with a warning. At the end the state of before
            the last of them is saved, unless it is there already: resuming on clean data gives the bits
            of a run that had clean data there. float16's overflows do not count: the loss scale sees to
            them.
        resume_changes: what may have changed since the checkpoint that a run goes on from, by the names
            that the error gives: fields of the configs, and `PARTS` (``['temperature', 'teacher']``);
            ``'any'``: everything. By default nothing may.
        gradient_accumulation: what the micro-batches of an optimizer step add up to. ``'means'``: the
            mean of their losses, as in torch, which depends on how examples fell into them where
            masks or sizes differ. ``'exact'``: the loss of all their examples as one batch; what is
            no mean over examples, positions or labels is refused.

    Raises:
        ConfigError: a ValueError that lists everything wrong.
        TypeError: an unknown keyword; the message names the nearest.
    """

    gradient_accumulation_steps: int = 1
    ckpt_frequency: int = 1
    ckpt_epoch_frequency: int = 1
    ckpt_steps: int | None = None
    log_dir: str | os.PathLike[str] | None = None
    output_dir: str | os.PathLike[str] = "./saved_models"
    device: Any = "cuda"
    fp16: bool = False
    fp16_opt_level: str = "O1"
    data_parallel: bool = False
    local_rank: int = -1
    _: KW_ONLY
    seed: int = 0
    half_dtype: str = "auto"
    resume: bool | str = False
    max_to_keep: int | None = None
    mapping: str = "sharded"
    sharding: str | None = None
    max_nonfinite_steps: int | None = 1
    resume_changes: Any = ()
    gradient_accumulation: str = "means"

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "gradient_accumulation_steps": checks.integer(1),
        "ckpt_frequency": checks.integer(1),
        "ckpt_epoch_frequency": checks.integer(1),
        "ckpt_steps": checks.optional(checks.integer(1)),
        "log_dir": checks.optional(checks.folder),
        "output_dir": checks.folder,
        "device": device_name,
        "fp16": checks.boolean,
        "fp16_opt_level": checks.one_of(("O0", "O1", "O2", "O3")),
        "data_parallel": checks.boolean,
        "local_rank": checks.integer(-1),
        "seed": checks.integer(0, 2**32 - 1),
        "half_dtype": checks.one_of(("auto", "bfloat16", "float16")),
        "resume": checks.checkpoint,
        "max_to_keep": checks.optional(checks.integer(1)),
        "mapping": checks.one_of(("sharded", "pmap")),
        "sharding": checks.optional(checks.one_of(("teacher", "optimizer", "all"))),
        "max_nonfinite_steps": checks.optional(checks.integer(1)),
        "resume_changes": checks.names(lambda: names_of_changes()),
        "gradient_accumulation": checks.one_of(("means", "exact")),
    }

    @classmethod
    def _check_together(cls, kept: Mapping[str, Any]) -> list[str]:
        problems = []
        half = kept.get("half_dtype", "auto")
        if half != "auto" and not kept.get("fp16", True):
            problems.append(
                f"half_dtype is {half!r}, but fp16 is False: set it to train in a half type"
            )
        parallel, rank = kept.get("data_parallel"), kept.get("local_rank", -1)
        if parallel and rank >= 0:
            problems.append(
                f"data_parallel is True and local_rank is {rank}: expected one of them; with "
                "local_rank, all devices of all processes are used, so leave data_parallel out"
            )
        alone = parallel is False and rank < 0
        several = "several devices: set data_parallel=True, or local_rank where there are several processes"
        if kept.get("mapping") == "pmap" and alone:
            problems.append(f"mapping is 'pmap', which is for {several}")
        if kept.get("sharding") and alone:
            problems.append(f"sharding is {kept['sharding']!r}, which is for {several}")
        if kept.get("sharding") and kept.get("mapping") == "pmap":
            problems.append(
                f"sharding is {kept['sharding']!r} and mapping is 'pmap', in which each device "
                "holds everything: expected mapping='sharded'"
            )
        if kept.get("gradient_accumulation") == "exact" and kept.get("mapping") == "pmap":
            problems.append(
                "gradient_accumulation is 'exact' and mapping is 'pmap', in which the mean of the "
                "devices' losses is taken: expected mapping='sharded'"
            )
        return problems


@dataclass(frozen=True)
class IntermediateMatch(Config):
    """One feature of the student to be drawn towards one of the teacher.

    Args:
        layer_T: index into the teacher's list of that feature (a negative one counts from its
            end), or two of them for the losses that take two layers (``fsp``, ``nst``).
        layer_S: the same for the student.
        weight: of this loss in the total.
        loss: a name in ``presets.MATCH_LOSS_MAP``, looked up when a distiller is built; or a list of
            a name and its options: ``['infonce', 0.05]``, ``['infonce', {'temperature': 0.05}]``.
        feature: a name in ``presets.FEATURES``.
        proj: ``[name, student's width, teacher's width]``, and a dict of optimizer options for it
            if wanted: a projection in ``presets.PROJ_MAP`` for widths that differ. Kept as a tuple
            of four, the last a (perhaps empty) read-only dict.
        weight_scheduler: ``'none'``, or a name in ``presets.WEIGHT_SCHEDULER``, with options in a list if
            wanted: ``['step', {'at': 0.3}]``. The first update uses ``weight``, the one after k updates
            ``scheduler(k / all)``.

    Raises:
        ConfigError: a ValueError that lists everything wrong.
        TypeError: an unknown keyword; the message names the nearest.
    """

    layer_T: int | Sequence[int]
    layer_S: int | Sequence[int]
    weight: float
    loss: str | Sequence[Any]
    feature: str
    proj: Any = None
    _: KW_ONLY
    weight_scheduler: str | Sequence[Any] | None = "none"

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "layer_T": checks.layers,
        "layer_S": checks.layers,
        "weight": checks.number,
        "loss": checks.named,
        "feature": checks.one_of(presets.FEATURES),
        "proj": checks.projection,
        "weight_scheduler": checks.weight_scheduler,
    }

    @classmethod
    def _check_together(cls, kept: Mapping[str, Any]) -> list[str]:
        layers = [(name, kept[name]) for name in ("layer_T", "layer_S") if name in kept]
        if len({isinstance(layer, tuple) for _, layer in layers}) < 2:
            return []
        given = " and ".join(f"{name} is {_thawed(layer)}" for name, layer in layers)
        return [f"{given}: expected one layer on both sides, or two on both"]

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict in TextBrewer's form, from which :meth:`from_dict` makes an equal."""
        found = super().to_dict()
        if self.proj is None:
            del found["proj"]
        elif not self.proj[3]:
            found["proj"].pop()
        return found

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.to_dict().items())


def _matches(value: Any) -> tuple["IntermediateMatch", ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ConfigError("", ["intermediate_matches must be a list of dicts"])
    matches, problems = [], []
    for i, item in enumerate(value):
        try:
            given = isinstance(item, IntermediateMatch)
            matches.append(item if given else IntermediateMatch.from_dict(item))
        except ConfigError as error:
            problems += [f"intermediate_matches[{i}]: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError("", problems)
    return tuple(matches)


@dataclass(frozen=True)
class DistillationConfig(Config):
    """What the student is trained on.

    The loss is kd_loss_weight · KD + hard_label_weight · (sum of the adaptor's losses) + the sum of
    the matches, each with its weight. The KD loss has no factor of temperature².

    Args:
        temperature: divides both sides' logits in the KD loss.
        temperature_scheduler: ``'none'``, a name in ``presets.TEMPERATURE_SCHEDULER``, or a list
            of a name and its arguments: ``['flsw', 1, 2]``, ``['cwsm', {'beta': 1}]``. A list is
            kept as a tuple.
        hard_label_weight: weight of the adaptor's ``losses``.
        hard_label_weight_scheduler: ``'none'`` or a name in ``presets.WEIGHT_SCHEDULER``, with options in
            a list if wanted: ``['cosine', {'start': 1, 'end': 0}]``.
        kd_loss_type: a name in ``presets.KD_LOSS_MAP``, looked up when a distiller is built; or a list
            of a name and its options: ``['jsd', 0.1]``, ``['kl', {'scale_by_t2': True}]``.
        kd_loss_weight: weight of the KD loss.
        kd_loss_weight_scheduler: as for the hard labels.
        probability_shift: swap the teacher's largest logit with the label's.
        intermediate_matches: a list of :class:`IntermediateMatch` or dicts of its fields. Kept as
            a tuple.
        is_caching_logits: run the teacher once over the data, keep what the objective uses of its
            results, and draw the batches' order anew each epoch. Not with ``num_steps``.
        cache_dir: folder to keep them in, and to find them in again; None: host memory. Only with
            ``is_caching_logits``.
        cache_dtype: the type their floats are kept in: ``'float32'`` (as the teacher gives them),
            ``'float16'`` or ``'bfloat16'``.
        base_temperature_scheduler: schedules ``temperature`` by the finished part of the training, as a
            weight is scheduled: ``['linear', {'start': 8, 'end': 2}]``. What it gives is the base of
            ``temperature_scheduler``, if there is one.
        monitor: log how far the student is from the teacher, under ``monitor/``: KL divergence, agreement
            and both sides' entropies at temperature 1, and the teacher's own loss on the labels.
        balance: ``'hard_label'``: the KD loss and each match are scaled, before their weights, to the size
            of the hard labels' loss: by running means over the optimizer steps so far, with a decay of
            0.99. ``'none'``: they are not.

    Raises:
        ConfigError: a ValueError that lists everything wrong.
        TypeError: an unknown keyword; the message names the nearest.
    """

    temperature: float = 4
    temperature_scheduler: str | Sequence[Any] | None = "none"
    hard_label_weight: float = 0
    hard_label_weight_scheduler: str | Sequence[Any] | None = "none"
    kd_loss_type: str | Sequence[Any] = "ce"
    kd_loss_weight: float = 1
    kd_loss_weight_scheduler: str | Sequence[Any] | None = "none"
    probability_shift: bool = False
    intermediate_matches: Any = None
    is_caching_logits: bool = False
    _: KW_ONLY
    cache_dir: str | os.PathLike[str] | None = None
    cache_dtype: str = "float32"
    base_temperature_scheduler: str | Sequence[Any] | None = "none"
    monitor: bool = False
    balance: str = "none"

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "temperature": checks.positive,
        "temperature_scheduler": checks.temperature_scheduler,
        "hard_label_weight": checks.number,
        "hard_label_weight_scheduler": checks.weight_scheduler,
        "kd_loss_type": checks.named,
        "kd_loss_weight": checks.number,
        "kd_loss_weight_scheduler": checks.weight_scheduler,
        "probability_shift": checks.boolean,
        "intermediate_matches": _matches,
        "is_caching_logits": checks.boolean,
        "cache_dir": checks.optional(checks.folder),
        "cache_dtype": checks.one_of(("float32", "float16", "bfloat16")),
        "base_temperature_scheduler": checks.weight_scheduler,
        "monitor": checks.boolean,
        "balance": checks.one_of(("none", "hard_label")),
    }

    def to_json_file(self, json_filename: str | os.PathLike[str]) -> None:
        """Writes the config as JSON: the whole file or, if that fails, nothing.

        What TextBrewer does not have and could not read is named in a `PortingWarning`.

        Raises:
            OSError: the file cannot be written.
        """
        super().to_json_file(json_filename)
        ours = _only_here(self, "")
        for i, match in enumerate(self.intermediate_matches):
            ours += _only_here(match, f"intermediate_matches[{i}].")
        if ours:
            warn(
                f"TextBrewer cannot read {os.fspath(json_filename)}: only jaxbrewer has {', '.join(ours)}",
                PortingWarning,
            )

    @classmethod
    def _check_together(cls, kept: Mapping[str, Any]) -> list[str]:
        if kept.get("cache_dir") is None or kept.get("is_caching_logits", True):
            return []
        return ["cache_dir is given, but is_caching_logits is False: set it to use the cache"]


_PLAIN = ("loss", "kd_loss_type", "kd_loss_weight_scheduler", "hard_label_weight_scheduler")


def _only_here(config: Config, where: str) -> list[str]:
    """The fields that TextBrewer has not, and those that it wants as one name."""
    given = config.to_dict()
    own = [f.name for f in fields(cast(Any, config)) if f.kw_only and f.name in given]
    lists = [f"a list as {where}{name}" for name in _PLAIN if isinstance(given.get(name), list)]
    return [where + name for name in own] + lists


def names_of_changes() -> tuple[str, ...]:
    """What `TrainingConfig.resume_changes` may name; another accumulation is always refused."""
    apart = (*FREE, "gradient_accumulation_steps")
    named = [f.name for cls in (TrainingConfig, DistillationConfig) for f in fields(cls)]
    return (*sorted({*named, *PARTS} - {*apart}), ANY)
