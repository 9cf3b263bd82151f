"""What TextBrewer's settings become on JAX, field by field.

Each function takes the plain values of one document (a training config, a distillation config,
matches, an ``emd`` dict) and returns a `Ported`: the object here, if there can be one, and a
`Finding` for every field that says something.
"""

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxbrewer import presets
from jaxbrewer.configurations import checks
from jaxbrewer.configurations.configs import DistillationConfig, IntermediateMatch, TrainingConfig
from jaxbrewer.errors import ConfigError, suggest
from jaxbrewer.losses.hidden import fsp_loss, mmd_loss
from jaxbrewer.training.timeline import Timeline


class Verdict(enum.Enum):
    """What becomes of a field; the value is the mark it is printed with."""

    SAME = "="
    CHANGED = "~"
    MEANINGLESS = "-"
    BY_HAND = "!"


@dataclass(frozen=True)
class Finding:
    """One field.

    Attributes:
        name: the field, or what else is spoken of.
        value: its value as text; empty where there is none.
        verdict: what becomes of it.
        text: what that means, or what to do.
    """

    name: str
    value: str
    verdict: Verdict
    text: str


@dataclass
class Ported:
    """A document after porting.

    Attributes:
        what: what it is, such as ``training config``.
        findings: what there is to say.
        result: what stands for it here and can be written as JSON; None if there can be none.
        defaults: fields that are left out or at their defaults.
    """

    what: str
    findings: list[Finding] = field(default_factory=list)
    result: Any = None
    defaults: list[str] = field(default_factory=list)

    def add(self, name: str, value: Any, verdict: Verdict, text: str) -> None:
        """Adds a finding."""
        self.findings.append(Finding(name, value, verdict, text))

    def by_hand(self, name: str, text: str, value: str = "") -> None:
        """Adds something for the user to do."""
        self.add(name, value, Verdict.BY_HAND, text)


@dataclass(frozen=True)
class Run:
    """How long a run is, as far as it is known: what turns frequencies into steps.

    Attributes:
        batches: in an epoch.
        epochs: of the run.
        steps: optimizer steps, for a run by steps.
    """

    batches: int | None = None
    epochs: int | None = None
    steps: int | None = None

    def timeline(self, config: TrainingConfig) -> Timeline | None:
        """The timeline, or None if too little is known.

        Raises:
            ValueError: an epoch has no whole accumulation window, so that nothing is trained.
        """
        if self.steps is not None:
            return Timeline.by_steps(config, self.steps)
        if self.batches is None:
            return None
        window = config.gradient_accumulation_steps
        if self.batches < window:
            raise ValueError(
                f"an epoch of {self.batches} batches is shorter than one accumulation window of "
                f"{window}, so nothing would be trained"
            )
        return Timeline.by_epochs(config, self.epochs or 1, self.batches)


def as_invalid(ported: Ported, error: ValueError) -> Ported:
    """Notes every problem of a config that cannot be made."""
    problems = error.problems if isinstance(error, ConfigError) else (str(error),)
    for problem in problems:
        ported.by_hand("not usable", problem)
    return ported


# These mean another thing here even at TextBrewer's defaults.
_ALWAYS = ("output_dir", "device")


def _split_defaults(cls: Any, values: Mapping[str, Any], config: Any) -> tuple[list[str], list]:
    """The fields at their defaults as ``name=value``, and those that differ."""
    defaults, given = [], []
    for f in dataclasses.fields(cls):
        value = getattr(config, f.name)
        ours_alone = f.kw_only and f.name not in values
        if ours_alone:
            continue
        is_default = value == f.default or (value == () and f.default is None)
        if is_default and f.name not in _ALWAYS:
            defaults.append(f"{f.name}={f.default!r}")
        else:
            given.append(f)
    return defaults, given


# ------------------------------------------------------------------------------- the training config


def training_config(values: Mapping[str, Any], run: Run | None = None) -> Ported:
    """Ports the arguments of a `TrainingConfig`."""
    ported = Ported("training config (TrainingConfig)")
    try:
        config = TrainingConfig.from_dict(values)
    except ConfigError as error:
        return as_invalid(ported, error)
    ported.result = config
    ported.defaults, given = _split_defaults(TrainingConfig, values, config)
    for f in given:
        value = getattr(config, f.name)
        verdict, text = _TRAINING.get(f.name, _ours)(value, config)
        ported.add(f.name, repr(value), verdict, text)
    _add_checkpoints(ported, config, run)
    return ported


def _add_checkpoints(ported: Ported, config: TrainingConfig, run: Run | None) -> None:
    frequency, every = config.ckpt_frequency, config.ckpt_epoch_frequency
    if run is None or (run.steps is None and run.batches is None):
        shares = ", ".join(f"int({i}·n/{frequency})" for i in range(1, min(frequency, 5)))
        inside = f"{shares}{', …' if frequency > 5 else ''} and n" if shares else "n"
        turn = "" if every == 1 else f", in every {_ordinal(every)} epoch and the last"
        steps = "at the end" if config.ckpt_steps is None else f"every {config.ckpt_steps} steps"
        ported.add(
            "checkpoints",
            "",
            Verdict.SAME,
            f"with n optimizer steps an epoch: at step {inside} of an epoch{turn}. With num_steps: "
            f"{steps}{'' if config.ckpt_steps is None else ' and at the end'}. Tell --batches and "
            "--epochs, or --num-steps, to see the step numbers",
        )
        return
    try:
        timeline = run.timeline(config)
    except ValueError as error:
        ported.by_hand(
            "checkpoints", f"{error}. Lower gradient_accumulation_steps, or use num_steps"
        )
        return
    if timeline is not None:
        ported.add("checkpoints", "", Verdict.SAME, describe_timeline(timeline))


def describe_timeline(timeline: Timeline) -> str:
    """The step numbers of a timeline's checkpoints, in a sentence."""
    steps = timeline.checkpoints()
    shown = ", ".join(map(str, steps[:12])) + (" …" if len(steps) > 12 else "")
    return f"{len(steps)} in {timeline.total_steps} optimizer steps: at step {shown}"


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


def _device(value: str, config: TrainingConfig) -> tuple[Verdict, str]:
    platform, _, index = value.partition(":")
    which = f"number {index} (from 0) of this process" if index else "the first of this process"
    if platform in ("cuda", "gpu"):
        return Verdict.CHANGED, f"{which}: the accelerator there is, of any make; else the CPU"
    return Verdict.SAME, f"a {platform.upper()} device, {which}; an error if there is none"


def _ours(value: Any, config: Any) -> tuple[Verdict, str]:
    return Verdict.SAME, "jaxbrewer's own; TextBrewer does not know it"


_LEVELS = {
    "O0": "O0: everything in float32",
    "O1": (
        "O1: parameters float32, products in half precision, norms, softmax and losses in float32"
    ),
    "O2": "O2: half precision in the forward pass, float32 master weights, norms in float32",
    "O3": "O3: everything but losses in half precision, without master weights",
}


def _fp16(value: bool, config: TrainingConfig) -> tuple[Verdict, str]:
    level = _LEVELS[config.fp16_opt_level]
    if config.fp16_opt_level == "O0":
        return Verdict.SAME, level
    return Verdict.CHANGED, (
        f"no Apex: {level}. Half means bfloat16 where the hardware has it, which needs no loss "
        "scale, else float16 with a dynamic one"
    )


def _level(value: str, config: TrainingConfig) -> tuple[Verdict, str]:
    if not config.fp16:
        return Verdict.MEANINGLESS, "counts with fp16=True only, as in TextBrewer"
    return Verdict.SAME, _LEVELS[value]


_TRAINING: Mapping[str, Any] = {
    "gradient_accumulation_steps": lambda value, config: (
        Verdict.SAME,
        f"the mean gradient of {value} batches makes one optimizer step; by epochs, a window that "
        "an epoch leaves open is dropped",
    ),
    "ckpt_frequency": lambda value, config: (Verdict.SAME, f"{value} checkpoints an epoch"),
    "ckpt_epoch_frequency": lambda value, config: (
        Verdict.SAME,
        f"checkpoints in every {_ordinal(value)} epoch, and in the last",
    ),
    "ckpt_steps": lambda value, config: (
        Verdict.SAME,
        f"with num_steps, a checkpoint every {value} optimizer steps and one at the end",
    ),
    "log_dir": lambda value, config: (Verdict.SAME, "tensorboard files, with the same tags"),
    "output_dir": lambda value, config: (
        Verdict.CHANGED,
        "made when training starts. Checkpoints are folders gs{step} with the whole state, read "
        "with load_student; those of an earlier run are moved aside",
    ),
    "device": _device,
    "fp16": _fp16,
    "fp16_opt_level": _level,
    "data_parallel": lambda value, config: (
        Verdict.CHANGED,
        "nothing is wrapped: the batch is laid over a mesh of this process's devices, and the loss "
        "is that of the whole batch, as DataParallel computes it on gathered outputs",
    ),
    "local_rank": lambda value, config: (
        Verdict.CHANGED,
        "call jax.distributed.initialize() in place of torch.distributed.init_process_group; "
        "every process feeds its own part of the data. Losses are those of the global batch; "
        "mapping='pmap' averages each process's own, as DDP does",
    ),
}


# --------------------------------------------------------------------------- the distillation config


def distillation_config(values: Mapping[str, Any]) -> Ported:
    """Ports the arguments of a `DistillationConfig`."""
    ported = Ported("distillation config (DistillationConfig)")
    try:
        config = DistillationConfig.from_dict(values)
    except ConfigError as error:
        return as_invalid(ported, error)
    ported.result = config
    ported.defaults, given = _split_defaults(DistillationConfig, values, config)
    for f in given:
        value = getattr(config, f.name)
        if f.name == "intermediate_matches":
            _add_matches(ported, value)
            continue
        verdict, text = _DISTILLATION.get(f.name, _ours)(value, config)
        ported.add(f.name, repr(list(value) if isinstance(value, tuple) else value), verdict, text)
    return ported


_THEIR_KD_LOSSES = ("ce", "mse")
_THEIR_MATCH_LOSSES = (
    *("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"),
    *("hidden_mse", "cos", "pkd", "gram", "fsp", "mmd", "nst"),
)


def _kd_loss(value: str, config: DistillationConfig) -> tuple[Verdict, str]:
    name = value if isinstance(value, str) else value[0]
    if name not in presets.KD_LOSS_MAP:
        return Verdict.BY_HAND, (
            f"no KD loss of this name ({suggest(name, presets.KD_LOSS_MAP)}). If it is yours, "
            f"write it in jax.numpy and set KD_LOSS_MAP[{name!r}] before the distiller is built"
        )
    if name not in _THEIR_KD_LOSSES and presets.KD_LOSS_MAP[name].__module__.startswith(
        "jaxbrewer."
    ):
        return Verdict.CHANGED, (
            f"TextBrewer has no KD loss of this name: jaxbrewer's own is taken. If you registered "
            f"another, set KD_LOSS_MAP[{name!r}] before the distiller is built"
        )
    return Verdict.SAME, "the same value and gradient"


def _scheduled(of: str, initial: str) -> Any:
    def describe(value: str, config: DistillationConfig) -> tuple[Verdict, str]:
        return Verdict.SAME, (
            f"the first update uses {initial}={getattr(config, initial):g}; after update k the "
            f"weight of {of} is {value}(k / total)"
        )

    return describe


_DISTILLATION: Mapping[str, Any] = {
    "temperature": lambda value, config: (
        Verdict.SAME,
        "divides both sides' logits; no factor of temperature²",
    ),
    "temperature_scheduler": lambda value, config: (
        Verdict.SAME,
        "one temperature a position, without a gradient",
    ),
    "hard_label_weight": lambda value, config: (
        Verdict.SAME,
        "× the sum of the means of adaptor_S's 'losses', which must be there if it is not 0",
    ),
    "hard_label_weight_scheduler": _scheduled("the hard labels", "hard_label_weight"),
    "kd_loss_type": _kd_loss,
    "kd_loss_weight": lambda value, config: (Verdict.SAME, "× the KD loss"),
    "kd_loss_weight_scheduler": _scheduled("the KD loss", "kd_loss_weight"),
    "probability_shift": lambda value, config: (
        Verdict.CHANGED,
        "the same swap, without writing into the teacher's logits; works with logits_mask too",
    ),
    "is_caching_logits": lambda value, config: (
        Verdict.CHANGED,
        "the teacher runs once over the data; what the loss needs of its results is kept in host "
        "memory, or in cache_dir. GeneralDistiller caches too, where TextBrewer's turns it off "
        "without a word. Not with num_steps",
    ),
}


def matches(items: Sequence[Any], what: str = "intermediate matches") -> Ported:
    """Ports a list of intermediate matches by themselves."""
    ported = Ported(what)
    made, problems = [], []
    for i, item in enumerate(items):
        try:
            made.append(IntermediateMatch.from_dict(item))
        except ConfigError as error:
            problems += [f"[{i}]: {problem}" for problem in error.problems]
    if problems:
        return as_invalid(ported, ConfigError(what, problems))
    ported.result = [match.to_dict() for match in made]
    _add_matches(ported, made)
    return ported


def _add_matches(ported: Ported, items: Sequence[IntermediateMatch]) -> None:
    for i, match in enumerate(items):
        verdict, text = _match(match)
        ported.add(f"match {i}", _described(match), verdict, text)
    if any(match.feature == "attention" for match in items):
        ported.add(
            "attention",
            "",
            Verdict.SAME,
            "a layer is an index into the list your adaptor returns. From the zoo's (and Hugging "
            "Face's) outputs, 0 is the first layer, and they are probabilities unless the config "
            "says output_attention_scores=True; TextBrewer's examples count from 1 over a list "
            "that begins with None, and match scores",
        )


def _described(match: IntermediateMatch) -> str:
    sides = " → ".join(
        f"{side}{list(layer) if isinstance(layer, tuple) else layer}"
        for side, layer in (("T", match.layer_T), ("S", match.layer_S))
    )
    return f"{match.feature} {sides} by {presets.in_words(match.loss)}, weight {match.weight:g}"


def _match(match: IntermediateMatch) -> tuple[Verdict, str]:
    name = match.loss if isinstance(match.loss, str) else match.loss[0]
    loss = presets.MATCH_LOSS_MAP.get(name)
    if loss is None:
        return Verdict.BY_HAND, (
            f"no match loss {name!r} ({suggest(name, presets.MATCH_LOSS_MAP)}). If it "
            "is yours, write loss(S, T, mask=None) in jax.numpy and set it in MATCH_LOSS_MAP"
        )
    if name not in _THEIR_MATCH_LOSSES and loss.__module__.startswith("jaxbrewer."):
        return Verdict.CHANGED, (
            f"TextBrewer has no match loss {name!r}: jaxbrewer's own is taken. If you registered another, "
            f"set MATCH_LOSS_MAP[{name!r}] before the distiller is built"
        )
    wants_two = loss in (fsp_loss, mmd_loss)
    has_two = isinstance(match.layer_S, tuple)
    if wants_two and not has_two:
        return Verdict.BY_HAND, (
            f"{match.loss!r} takes two layers a side: 'layer_T': [{match.layer_T}, {match.layer_T}]"
            f", 'layer_S': [{match.layer_S}, {match.layer_S}]"
        )
    if has_two and not wants_two and loss.__module__ == fsp_loss.__module__:
        return Verdict.BY_HAND, f"{match.loss!r} takes one layer a side, not two"
    notes = [_NST] if loss is mmd_loss else []
    verdict = Verdict.CHANGED if notes else Verdict.SAME
    if match.proj is not None:
        kind, dim_S, dim_T, options = match.proj
        said = f"{kind} projection of the student's {dim_S} to the teacher's {dim_T}"
        if options:
            verdict = Verdict.CHANGED
            said += (
                f". Its options {dict(options)} are given to your optimizer's factory, so pass a "
                "factory: functools.partial(optax.adamw, learning_rate=…)"
            )
        notes.insert(0, said)
    return verdict, ". ".join(notes)


_NST = (
    "With an inputs_mask TextBrewer's package divides the products of positions by the length, here and in "
    "its repository the width divides them. For the package's objective, where both sides are equally "
    "wide, multiply the weight by (width / length)²"
)


def emd(values: Mapping[str, Any]) -> Ported:
    """Ports the ``emd`` argument of TextBrewer's EMD example."""
    ported = Ported("EMD matching (EMDDistiller's emd)")
    known = ("layer_num_S", "layer_num_T", "feature", "loss", "weight", "proj")
    for name in values:
        if name not in known:
            ported.by_hand(str(name), f"unknown key; {suggest(name, known)}", _short(values[name]))
    missing = [name for name in known[:-1] if name not in values]
    if missing:
        ported.by_hand("not usable", f"missing keys: {', '.join(missing)}")
    if not ported.findings:
        ported.result = dict(values)
        text = ", ".join(f"{name}: {_short(value)}" for name, value in values.items())
        ported.add(
            "emd",
            text,
            Verdict.SAME,
            "jaxbrewer.EMDDistiller(…, emd={…}); the transport is solved exactly inside the "
            "compiled step, so pyemd is not needed",
        )
    return ported


def _short(value: Any) -> str:
    return checks.short(value)
