"""A model and its adaptor over a loader's batches, in evaluation mode."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..data.batches import Batch, own, plain, sides
from ..machine.memory import kept_memory
from ..models.adaptors import Adaptor, Side, check_adaptor
from ..models.teachers import Teacher
from ..models.wrap import as_model
from .metrics import Metric
from .predictions import gathered, order_of

# What leaves the device; lists of layers do not.
GIVEN = ("logits", "logits_mask", "losses", "labels", "inputs_mask", "embedding")

_EMPTY = "the loader gave no batch to evaluate on"


class Evaluator:
    """Computes metrics of a model; what it has compiled for a shape serves the next evaluations too.

    Args:
        model: an `nnx.Module`, a `LinenModel` or a `FunctionModel`; its weights are those that it has
            at each call, in their own type.
        adaptor: its adaptor.
        teacher: a teacher, for metrics that compare with one.
        adaptor_T: the teacher's adaptor; without it, the same one.
        **args: further keyword arguments for the models, as for ``train``.

    >>> evaluate = Evaluator(student, adaptor)
    >>> evaluate(dev, [Accuracy(), Matthews()])
    {'accuracy': 0.91, 'matthews': 0.82}

    A distiller has all this: ``distiller.evaluate(dev, [Accuracy()])``.
    """

    def __init__(
        self,
        model: Any,
        adaptor: Adaptor,
        *,
        teacher: Any = None,
        adaptor_T: Adaptor | None = None,
        **args: Any,
    ):
        check_adaptor(adaptor, "adaptor")
        as_model(model)
        self._model, self._adaptor, self._args = model, adaptor, args
        self._teacher = Teacher()
        if teacher is not None:
            adaptor_T = adaptor if adaptor_T is None else adaptor_T
            check_adaptor(adaptor_T, "adaptor_T")
            self._teacher = Teacher((Side("T", as_model(teacher, "teacher"), adaptor_T, args),))
        self._forward = Forward()

    def __call__(self, loader: Iterable[Any], metrics: Sequence[Metric]) -> dict[str, float]:
        """Runs over all batches of a loader; see `Forward.evaluate`."""
        side = Side("", as_model(self._model), self._adaptor, self._args)
        return self._forward.evaluate(side, self._teacher, loader, metrics)

    def predict(self, loader: Iterable[Any]) -> dict[str, Any]:
        """What the adaptor returns of every example; see `Forward.predict`."""
        side = Side("", as_model(self._model), self._adaptor, self._args)
        return self._forward.predict(side, loader)


class Forward:
    """Two sides forwards, compiled anew only where a shape or the model's structure is new."""

    def __init__(self) -> None:
        self._compiled: Any = None
        self._structure: Any = None

    def evaluate(
        self, student: Side, teacher: Teacher, loader: Iterable[Any], metrics: Sequence[Metric]
    ) -> dict[str, float]:
        """Runs over all batches, in evaluation mode.

        Args:
            student: what is evaluated.
            teacher: what metrics with ``reads_teacher`` compare it with; it runs only for them.
            loader: batches, as for ``train``; of several processes each evaluates its own. It is
                iterated once, so one that shuffles by a state of its own moves on.
            metrics: what to compute; they are copied, and stay as they are.

        Returns:
            All metrics' numbers by name.

        Raises:
            ValueError: no batch, a metric that misses something, or two numbers of one name.
            AdaptorError, BatchError: as in training.
        """
        metrics, teacher = _fresh(metrics, teacher)
        count = 0
        with kept_memory(jax.default_backend()) as bound_memory:
            for batch, results in self._run(student, teacher, loader, bound_memory):
                count += 1
                for metric in metrics:
                    metric.update(batch, results)
        if not count:
            raise ValueError(_EMPTY)
        return _together([metric.compute() for metric in metrics])

    def predict(self, student: Side, loader: Iterable[Any]) -> dict[str, Any]:
        """What the adaptor returns of every example, but for features of layers.

        Args:
            student: the model.
            loader: batches; where it has an ``order``, the example number of each row, as
                `BucketedLoader` has, predictions come in the examples' order, otherwise in its own.

        Returns:
            See `predictions.gathered`; with the batches' labels, where the adaptor gives none.

        Raises:
            ValueError: see `predictions.gathered`.
            AdaptorError, BatchError: as in training.
        """
        order = order_of(loader)
        with kept_memory(jax.default_backend()) as bound_memory:
            return gathered(self._run(student, Teacher(), loader, bound_memory), order)

    def rehearse(
        self, student: Side, teacher: Teacher, loader: Iterable[Any], metrics: Sequence[Metric]
    ) -> dict[str, float] | None:
        """As `evaluate`, by the first batch's shapes, with made-up results: nothing is compiled.

        Returns:
            The names, of numbers without meaning; None where a metric cannot compute them from this.

        Raises:
            As `evaluate`.
        """
        metrics, teacher = _fresh(metrics, teacher)
        first = next(iter(loader), None)
        if first is None:
            raise ValueError(_EMPTY)
        batch, variables = own(first), self._compile(student, teacher)
        results = jax.tree.map(_made_up, self._compiled.eval_shape(*variables, batch))
        batch, results = _on_host(batch, results)
        for metric in metrics:
            try:
                metric.update(batch, results)
            except Exception as error:
                error.add_note("It was given the first batch, and made-up results of their shapes")
                raise
        try:
            computed = [metric.compute() for metric in metrics]
        except Exception:  # noqa: BLE001  one batch, or numbers that are made up, may not be enough
            return None
        return _together(computed)

    def _run(
        self,
        student: Side,
        teacher: Teacher,
        loader: Iterable[Any],
        after_batch: Callable[[], None],
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each batch with its results; the next one computes while the last is looked at."""
        variables = self._compile(student, teacher)
        waiting: list[Any] = []
        for given in loader:
            batch = own(given)
            waiting.append((batch, self._compiled(*variables, batch)))
            if len(waiting) > 1:
                yield _on_host(*waiting.pop(0))
                after_batch()
        for batch, results in waiting:
            yield _on_host(batch, results)

    def _compile(self, student: Side, teacher: Teacher) -> tuple[Any, Any]:
        """Makes the compiled function that of these sides; returns the arrays it takes."""
        variables = (student.model.params, student.model.state), teacher.variables
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), variables)
        structure = shapes, *map(_program, (student, *teacher.sides))
        if structure != self._structure:
            self._structure = structure
            self._compiled = jax.jit(functools.partial(_results, student, teacher))
        return variables


def _program(side: Side) -> tuple[Any, ...]:
    """What a compiled side depends on, beside the shapes of its arrays."""
    return getattr(side.model, "graph", side.model), side.adaptor, dict(side.args)


def _results(student: Side, teacher: Teacher, mine: Any, theirs: Any, batch: Batch) -> Any:
    """What both adaptors return, as far as it leaves the device."""
    batch_T, batch_S, cache = sides(batch)
    params, state = mine
    found, _ = student(params, state, jax.random.key(0), batch_S, False)
    results: dict[str, Any] = {name: found[name] for name in GIVEN if name in found}
    if teacher.sides:
        of_teacher = teacher(theirs, batch_T, cache)
        results["teacher"] = {name: of_teacher[name] for name in GIVEN if name in of_teacher}
    return results


def _on_host(batch: Batch, results: Any) -> tuple[Any, dict[str, Any]]:
    """A batch and its results in numpy arrays, lists of one opened, with the batch's labels."""
    batch = jax.device_get(plain(sides(batch)[1]))
    given = _opened(jax.device_get(results))
    if "labels" not in given and isinstance(batch, dict) and batch.get("labels") is not None:
        given["labels"] = np.asarray(batch["labels"])
    return batch, given


def _opened(results: Mapping[str, Any]) -> dict[str, Any]:
    opened: dict[str, Any] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            opened[name] = _opened(value)
        elif isinstance(value, tuple | list):
            opened[name] = value[0] if len(value) == 1 else list(value)
        else:
            opened[name] = value
    return opened


def _made_up(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Numbers in place of results: floats of all kinds; 1 for classes and masks."""
    if jax.numpy.issubdtype(shape.dtype, jax.numpy.floating):
        return np.random.default_rng(0).standard_normal(shape.shape).astype(shape.dtype)
    return np.ones(shape.shape, shape.dtype)


def _fresh(metrics: Any, teacher: Teacher) -> tuple[list[Any], Teacher]:
    """Copies of the metrics, and the teacher if they ask for it."""
    if isinstance(metrics, Mapping | str) or not isinstance(metrics, Iterable) or not metrics:
        raise ValueError(f"metrics is {metrics!r}; expected a list such as [Accuracy()]")
    copies = [_copy(metric) for metric in metrics]
    asking = [type(m).__name__ for m in copies if getattr(m, "reads_teacher", False)]
    if asking and not teacher.sides:
        raise ValueError(f"{', '.join(asking)} compares with a teacher, and there is none")
    return copies, teacher if asking else Teacher()


def _copy(metric: Any) -> Any:
    if isinstance(metric, type):
        raise ValueError(f"{metric.__name__} is a class: write {metric.__name__}()")
    if not (hasattr(metric, "update") and hasattr(metric, "compute")):
        raise ValueError(
            f"a {type(metric).__name__} is no metric: one has update(batch, results) and compute()"
        )
    return copy.deepcopy(metric)


def _together(computed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in computed:
        for name, value in each.items():
            if name in found:
                raise ValueError(
                    f"two metrics give {name!r}: evaluate them one after the other, or let one of "
                    "your own give another name"
                )
            found[name] = float(value)
    return found
