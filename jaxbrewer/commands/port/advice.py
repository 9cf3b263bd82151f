"""What else in a TextBrewer script becomes something here: calls, subclasses, assignments."""

import ast
from collections.abc import Iterator

from jaxbrewer.commands import zoo_models
from jaxbrewer.commands.port.verdicts import Finding, Verdict
from jaxbrewer.distillers.base import Trainable

_FACTORY = "pass a factory: functools.partial(optax.{}, learning_rate=…)"
_SCHEDULE = (
    "jaxbrewer.schedulers has one of this name, without the optimizer: pass it as scheduler_class; "
    "it returns a factor of the optimizer's rate"
)
_MODEL = (
    "jaxbrewer.zoo has a class of this name: {0}(config, rngs=nnx.Rngs(0)) or "
    "{0}.from_pretrained(folder); no .to(device)"
)

CALLS: dict[str, tuple[Verdict, str]] = {
    "AdamW": (
        Verdict.CHANGED,
        "say the decay: torch's default is 0.01, transformers' old one has 0 and eps=1e-6, optax's "
        "is 1e-4. " + _FACTORY.format("adamw") + ", without the model's parameters; a group "
        "without decay for ['bias', 'LayerNorm.weight'] is mask=jaxbrewer.decay_mask",
    ),
    "BERTAdam": (
        Verdict.CHANGED,
        "Adam without bias correction and with its own schedule: optax.adamw and scheduler_class "
        "come close. " + _FACTORY.format("adamw"),
    ),
    "Adam": (Verdict.CHANGED, _FACTORY.format("adam")),
    "SGD": (Verdict.CHANGED, _FACTORY.format("sgd")),
    "LambdaLR": (
        Verdict.CHANGED,
        "scheduler_class is called with scheduler_args and returns step -> factor: "
        "scheduler_class=lambda: lr_lambda",
    ),
    "DataParallel": (Verdict.CHANGED, "wrap nothing; say data_parallel=True"),
    "DistributedDataParallel": (Verdict.CHANGED, "wrap nothing; say local_rank"),
    "init_process_group": (Verdict.CHANGED, "jax.distributed.initialize()"),
    "load_state_dict": (
        Verdict.CHANGED,
        "weights trained here: load_student(folder, model); torch's: jaxbrewer port-weights",
    ),
    "manual_seed": (
        Verdict.CHANGED,
        "TrainingConfig(seed=…) and nnx.Rngs(…) of each model; numpy's and Python's own are as ever",
    ),
    "CustomMatch": (
        Verdict.CHANGED,
        "the same arguments, and it runs, which TextBrewer's does not. Modules by path, pattern or "
        "object; proj_func is [name, dim_S, dim_T] or an nnx.Module",
    ),
}
CALLS |= {
    name: (Verdict.CHANGED, _SCHEDULE)
    for name in (
        "get_constant_schedule",
        "get_constant_schedule_with_warmup",
        "get_linear_schedule_with_warmup",
        "get_cosine_schedule_with_warmup",
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "get_polynomial_decay_schedule_with_warmup",
    )
}
CALLS |= {
    cls.__name__: (Verdict.CHANGED, _MODEL.format(cls.__name__)) for cls in zoo_models.models()
}

_DISTILLERS = {
    "BasicTrainer", "BasicDistiller", "GeneralDistiller", "MultiTeacherDistiller",
    "MultiTaskDistiller", "EMDDistiller",
}  # fmt: skip
_OUTPUTS = {"output_hidden_states", "output_attentions"}


def advise(tree: ast.Module) -> list[tuple[int, Finding]]:
    """What to say of a script beside its configs: line and finding, each thing once."""
    found: dict[tuple[str, str], tuple[int, Finding]] = {}
    trains, enters = 0, False
    for node in ast.walk(tree):
        for line, finding in _of(node):
            key = (finding.name, finding.text)
            if key not in found or line < found[key][0]:
                found[key] = line, finding
        if isinstance(node, ast.Call) and _called(node) == "train" and node.keywords:
            trains = trains or node.lineno
        enters = enters or isinstance(node, ast.With)
    if trains and not enters:
        text = (
            "outside `with distiller:` the student trains in evaluation mode, without dropout, and a "
            "warning says so (TextBrewer leaves it in the mode it is in)"
        )
        found["train", text] = trains, Finding("train", "", Verdict.CHANGED, text)
    return sorted(found.values(), key=lambda item: (item[0], item[1].name))


def _of(node: ast.AST) -> Iterator[tuple[int, Finding]]:
    if isinstance(node, ast.Call):
        name = _called(node)
        if name in CALLS:
            yield node.lineno, Finding(name, "", *CALLS[name])
        if name == "train":
            yield from _train(node)
    elif isinstance(node, ast.Attribute | ast.Name) and not isinstance(node.ctx, ast.Load):
        yield from _assigned(node)
    elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Name | ast.Attribute):
        value = node.value
        name = value.id if isinstance(value, ast.Name) else value.attr
        if node.arg == "scheduler_class" and name in CALLS:
            yield value.lineno, Finding(name, "", *CALLS[name])
    elif isinstance(node, ast.ClassDef) and any(_name(base) in _DISTILLERS for base in node.bases):
        yield from _subclass(node)


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _called(node: ast.Call) -> str:
    """The name of what is called; ``Model.from_pretrained(…)`` is a call of ``Model``."""
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr == "from_pretrained":
        return _name(function.value)
    return _name(function)


def _train(call: ast.Call) -> Iterator[tuple[int, Finding]]:
    for keyword in call.keywords:
        is_none = isinstance(keyword.value, ast.Constant) and keyword.value.value is None
        if keyword.arg == "scheduler" and not is_none:
            text = "built for a torch optimizer; pass scheduler_class and scheduler_args"
            yield keyword.value.lineno, Finding("train: scheduler", "", Verdict.BY_HAND, text)


def _assigned(node: ast.Attribute | ast.Name) -> Iterator[tuple[int, Finding]]:
    if isinstance(node, ast.Attribute) and node.attr in _OUTPUTS:
        text = f"configs are frozen: config = config.replace({node.attr}=True)"
        yield node.lineno, Finding(f".{node.attr} =", "", Verdict.CHANGED, text)


def _subclass(node: ast.ClassDef) -> Iterator[tuple[int, Finding]]:
    for item in node.body:
        if not isinstance(item, ast.FunctionDef):
            continue
        if item.name in Trainable.replaced:
            text = f"never called here, and refused. Instead: {Trainable.replaced[item.name]}"
            yield item.lineno, Finding(f"{node.name}.{item.name}", "", Verdict.BY_HAND, text)
        elif item.name == "compute_loss":
            text = (
                "a pure function here: compute_loss(self, results_S, results_T, project, weights), "
                "which returns (total, {name: term})"
            )
            yield item.lineno, Finding(f"{node.name}.compute_loss", "", Verdict.BY_HAND, text)
