"""What every trainer and distiller shares: ``train``, ``check``, and the ``with`` block."""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from flax import nnx

from .. import training
from ..configurations.configs import TrainingConfig
from ..data.batches import Batch, own
from ..errors import afterwards
from ..evaluation.evaluator import Forward
from ..models.adaptors import Adaptor, Results, check_adaptor
from ..models.trainable import Selection
from ..models.wrap import as_model
from ..objective.loss import Loss, Project, Weights
from ..objective.objectives import Objective, Overridden, base_loss
from ..preflight.job import Job, Projections, Task
from ..step.optimizer import Optimizer
from ..training.request import Evaluation, Feed, Request
from ..training.run import Outcome
from ..training.writers import ScalarWriter, close_all, given

logger = logging.getLogger(__name__)


class Trainable:
    """What every trainer and distiller shares: `train`, `check`, and the ``with`` block.

    Inside ``with`` the student runs in train mode (dropout on, batch statistics updated); outside
    it, in evaluation mode, with a warning. Teachers always run in evaluation mode.

    Attributes:
        t_config: the `TrainingConfig`.
        model_S: the student (or the model to train), as it was passed.
        projs: the projections' modules, one for each intermediate match, None where it has none.
        projs_group: their optimizer options, likewise.
        best_checkpoint: the folder of the best-scored checkpoint, see `loop.CallbackResult`.
        evaluations: step → name → number: what `train` has evaluated, before a resume too.
        print_freq: log lines in an epoch.
        rank: this process; 0 is the one that logs.
    """

    replaced: ClassVar[Mapping[str, str]] = {
        "train_on_batch": "override compute_loss (the pure part), or wrap the models",
        "save_and_callback": "pass train(…, callback=…); checkpoints are written before it runs",
        "initialize_training": "pass an optimizer factory; projections get their own groups",
        "write_loss": "terms returned by compute_loss are logged by their names",
        "train_with_num_steps": "pass train(…, num_steps=…)",
        "train_with_num_epochs": "pass train(…, num_epochs=…)",
        "cache_logits": "set is_caching_logits in DistillationConfig",
    }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses methods of TextBrewer's that would never be called here."""
        super().__init_subclass__(**kwargs)
        for name, instead in cls.replaced.items():
            if name in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__} overrides {name}, which does not exist here and would never "
                    f"run. Instead: {instead}"
                )
        if "compute_loss" in cls.__dict__:
            _check_compute_loss(cls.compute_loss, cls.__name__, "self")

    def __init__(self, train_config: TrainingConfig, model_S: Any, adaptor_S: Adaptor):
        if not isinstance(train_config, TrainingConfig):
            raise TypeError(
                f"train_config is a {type(train_config).__name__}, not a TrainingConfig"
            )
        as_model(model_S, self._student_name)
        self.t_config = train_config
        self.model_S = model_S
        self.adaptor_S: Any = adaptor_S
        self._check_adaptor()
        self.projs: list[nnx.Module | None] = []
        self.projs_group: list[Mapping[str, Any] | None] = []
        self.best_checkpoint: Path | None = None
        self.evaluations: dict[int, dict[str, float]] = {}
        self.print_freq = 20
        self.rank = 0
        self.local_rank = train_config.local_rank
        self._in_context = False
        self._tb_writer: Any = None
        self._forwards: dict[str, Forward] = {}

    _student_name: ClassVar[str] = "model_S"

    def _check_adaptor(self) -> None:
        check_adaptor(self.adaptor_S, self._student_name.replace("model", "adaptor"))

    def __enter__(self) -> Self:
        """Turns train mode on."""
        self._in_context = True
        return self

    def __exit__(self, *exception: Any) -> None:
        """Turns train mode off."""
        self._in_context = False

    @property
    def tb_writer(self) -> Any:
        """The tensorboard writer, opened when asked for; None without ``log_dir``.

        It is a `tensorboardX.SummaryWriter`. A training closes it at its end if it was opened
        there, by it or by a callback. One that was opened outside serves the trainings that follow,
        and is its user's to close.
        """
        if self._tb_writer is None and self.t_config.log_dir is not None:
            from ..training.event_files import EventWriter  # only who writes waits for its imports

            self._tb_writer = EventWriter(str(self.t_config.log_dir))
        return self._tb_writer

    # What subclasses fill in ------------------------------------------------------------------

    def _tasks(self, args: Mapping[str, Any]) -> dict[str, Task]:
        """Task → its sides, with `args` for their models; a job of one task has one, named ''."""
        raise TypeError(f"{type(self).__name__} is a base class; use one of the distillers")

    def _objective(self) -> Objective:
        """What the config asks for; names are looked up anew, since presets may have changed."""
        raise TypeError(f"{type(self).__name__} has no objective; override compute_loss")

    def compute_loss(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """The loss of a batch: override it for an objective of your own.

        Must be a pure function of its arguments, since it is compiled.

        Args:
            results_S: what adaptor_S returned, checked (`adaptors.freeze`): lists are tuples.
            results_T: what adaptor_T returned.
            project: ``project(str(i), feature)`` applies the projection of match i.
            weights: the scheduled ``kd`` and ``hard_label`` weights at this update, and what else is
                scheduled; ``weights.state`` is what `init_loss_state` began.

        Returns:
            A `Loss`, or the pair ``(total, {name: term})``; the terms are logged.

        ``super().compute_loss(…)`` gives the loss of the distiller's own objective.

        Raises:
            ValueError: when called outside of training.
        """
        return base_loss(results_S, results_T, project, weights)

    def init_loss_state(self) -> Any:
        """The state that an objective of your own starts with: a pytree of arrays; it has none.

        In `compute_loss` it is ``weights.state``; `advance_loss_state` moves it on, once an optimizer
        step. It is saved in checkpoints.
        """
        return ()

    def advance_loss_state(self, state: Any, means: Mapping[str, Any], weights: Weights) -> Any:
        """The state after an optimizer step: override it beside `init_loss_state`.

        Must be a pure function of its arguments, since it is compiled. A step that is dropped for a
        number that is not finite leaves the state as it was.

        Args:
            state: before the step.
            means: term → the mean of its values over the step's micro-batches and all devices, ``total``
                among them; NaN where no micro-batch had it, in another task.
            weights: as for `compute_loss`; ``weights.progress`` is the finished part of the training.
        """
        return state

    # The surface ------------------------------------------------------------------------------

    def train(
        self,
        optimizer: Optimizer,
        dataloader: Iterable,
        num_epochs: int | None = None,
        scheduler_class: Callable[..., Any] | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        scheduler: None = None,
        max_grad_norm: float = -1.0,
        num_steps: int | None = None,
        callback: Callable[..., Any] | None = None,
        batch_postprocessor: Callable[[Any], Any] | None = None,
        *,
        trainable: Selection | None = None,
        eval_loader: Any = None,
        metrics: Any = None,
        best_metric: str | None = None,
        eval_steps: int | None = None,
        writers: Sequence[ScalarWriter] = (),
        **args: Any,
    ) -> None:
        """Trains the student; afterwards the object that was passed holds the trained weights.

        Args:
            optimizer: an `optax.GradientTransformation`, or a factory of one such as
                ``functools.partial(optax.adamw, learning_rate=1e-4)``. Torch's AdamW decays by
                0.01, Optax's by 1e-4, transformers' old one by 0: state it.
            dataloader: an iterable of batches, dicts or tuples of numpy, JAX or torch arrays.
            num_epochs: passes over it; it must have a length. An accumulation window that an
                epoch leaves incomplete is dropped.
            scheduler_class: called with `scheduler_args`, returns the learning-rate *factor* as a
                function of the optimizer step; see `jaxbrewer.schedulers`.
            scheduler_args: its arguments.
            scheduler: always None (TextBrewer's deprecated argument).
            max_grad_norm: clips the norm of the student's gradient, if positive.
            num_steps: optimizer steps to train for, instead of `num_epochs`; the loader is cycled
                and needs no length.
            callback: called as ``callback(model=student, step=step)`` after each checkpoint, with
                the weights of that step; may return a `CallbackResult`. What it does to the
                weights is not kept.
            batch_postprocessor: applied to each batch.
            trainable: which of the student's parameters are trained: paths, patterns
                (``'encoder.layers.*.attention*'``), an NNX filter such as ``nnx.LoRAParam``, or a
                sequence of these, see `models.trainable`; None: all. The others keep their bits.
                Projections are trained in any case.
            eval_loader: batches to evaluate on at each checkpoint, before the callback; it is iterated
                anew each time. Every process gets all of it.
            metrics: what is computed on it, see `evaluate`. The numbers are logged as
                ``eval/accuracy``, told in a line, and kept in `evaluations`.
            best_metric: the one that is the checkpoint's score, as a `CallbackResult` may give it:
                ``'accuracy'``; ``'-kl'`` where lower is better. A callback's own score counts
                before it.
            eval_steps: evaluates after every so many optimizer steps as well.
            writers: your own, which are given each number that the logs get, see
                `training.ScalarWriter`. They are closed at the end, however the training ends.
            **args: further keyword arguments for the models.

        Raises:
            PreflightError: all that is wrong, found on the first batch before compiling.
            FloatingPointError: a loss that is not finite, with the term and the step.
        """
        feeds = {"": Feed.of(dataloader, batch_postprocessor)}
        schedule = (scheduler_class, scheduler_args, scheduler)
        evaluation = self._evaluation(eval_loader, metrics, best_metric, eval_steps, args)
        request = Request(
            optimizer,
            feeds,
            num_epochs,
            num_steps,
            *schedule,
            max_grad_norm,
            callback,
            evaluation=evaluation,
            writers=given(writers),
        )
        self._train(request, {"trainable": trainable, **args})

    def check(
        self,
        batch: Any,
        optimizer: Optimizer | None = None,
        *,
        on: str | None = None,
        trainable: Selection | None = None,
        **args: Any,
    ) -> str:
        """Checks everything by shape, and tells what would be trained and at what cost.

        Args:
            batch: as the loader would give it.
            optimizer: as for `train`; without it, its state is left out of the memory.
            on: devices that need not be there, for which the step is compiled too: ``'tpu:v5e:2x4'``,
                ``'gpu:h100:8'``, ``'cpu:8'``; see `machine.described`. Needs the optimizer.
            trainable: as for `train`.
            **args: as for `train`.

        Returns:
            The report, which is also printed.

        The batch is taken as it is: what a ``batch_postprocessor`` would do to it must be done.

        Raises:
            PreflightError: all that is wrong, or that it does not fit on these devices.
            ValueError: nothing here compiles for them.
        """
        return self._report({"": own(batch)}, optimizer, {"trainable": trainable, **args}, on)

    def evaluate(self, dataloader: Any, metrics: Any, **args: Any) -> dict[str, float]:
        """Computes metrics of the student as it is now, in evaluation mode; in a callback too.

        Args:
            dataloader: batches as for `train`; with several tasks a dict of loaders by task.
            metrics: a list such as ``[Accuracy()]``, see `jaxbrewer.evaluation`; with several tasks
                a dict of lists by task, or one list for all.
            **args: as for `train`.

        Returns:
            Name → number; with several tasks the names are ``task/name``.

        What was compiled for a shape serves later evaluations. Training is not touched.

        Raises:
            ValueError: no batch, a metric that misses something, or a task that there is not.
        """
        return self._over_tasks(Forward.evaluate, dataloader, metrics, args)

    def predict(self, dataloader: Any, **args: Any) -> dict[str, Any]:
        """What adaptor_S returns of every example, by the student as it is now, in evaluation mode.

        Args:
            dataloader: batches as for `train`; with several tasks a dict of loaders by task. One of
                `bucket_by_length` gives predictions in the order of its examples, shuffled or not;
                another one in its own order.
            **args: as for `train`.

        Returns:
            Name (``logits``, ``embedding``, …) → numpy array ``[examples, …]``, with several tasks by
            task. Where batches are padded to different lengths, what is by position is a list with
            an array ``[length, …]`` for each example, of what ``logits_mask``, or else
            ``inputs_mask`` or the batch's ``attention_mask`` keeps. Losses that are not by example
            and features of layers are left out.

        Raises:
            ValueError: no batch, lengths without a mask, or a loader that leaves examples out.
        """
        found = {
            name: self._forward(name).predict(task.student, loader)
            for name, (task, loader) in self._with_loaders(dataloader, args).items()
        }
        return found[""] if list(found) == [""] else found

    def _over_tasks(self, how: Any, dataloader: Any, metrics: Any, args: Mapping[str, Any]) -> Any:
        """Calls a method of `Forward` for each task that has a loader."""
        found: dict[str, float] = {}
        for name, (task, loader) in self._with_loaders(dataloader, args).items():
            mine = metrics.get(name) if name and isinstance(metrics, Mapping) else metrics
            scores = how(self._forward(name), task.student, task.teacher, loader, mine)
            if scores is None:
                return None
            prefix = f"{name}/" if name else ""
            found |= {prefix + metric: value for metric, value in scores.items()}
        return found

    def _with_loaders(
        self, dataloader: Any, args: Mapping[str, Any]
    ) -> dict[str, tuple[Task, Any]]:
        """Task → the task, and its loader."""
        tasks = self._tasks(args)
        if list(tasks) == [""]:
            return {"": (tasks[""], dataloader)}
        if not isinstance(dataloader, Mapping) or not dataloader.keys() <= tasks.keys():
            raise ValueError(
                f"expected a dict of loaders by task, of the tasks {', '.join(tasks)}; it was "
                f"given {list(dataloader) if isinstance(dataloader, Mapping) else dataloader!r}"
            )
        return {name: (tasks[name], loader) for name, loader in dataloader.items()}

    def _forward(self, name: str) -> Forward:
        return self._forwards.setdefault(name, Forward())

    def _evaluation(
        self, loader: Any, metrics: Any, best: Any, steps: Any, args: Mapping[str, Any]
    ) -> Evaluation | None:
        """What `train` is asked to evaluate; None: nothing."""
        if all(x is None for x in (loader, metrics, best, steps)):
            return None
        compute, rehearse = (
            functools.partial(self._over_tasks, how, loader, metrics, args)
            for how in (Forward.evaluate, Forward.rehearse)
        )
        return Evaluation(loader, metrics, best, steps, compute, rehearse)

    def job(self, *, trainable: Selection | None = None, **args: Any) -> Job:
        """All that is to be trained, as the engine takes it.

        Args:
            trainable: as for `train`.
            **args: as for `train`.
        """
        objective = self._objective()
        named = (vars(self), *(vars(c) for c in type(self).__mro__ if c is not Trainable))
        own = ("compute_loss", "init_loss_state", "advance_loss_state")
        if any(name in names for names in named for name in own):
            _check_compute_loss(self.compute_loss, type(self).__name__)
            objective = Overridden(
                objective, self.compute_loss, self.init_loss_state, self.advance_loss_state
            )
        return Job(
            config=self.t_config,
            tasks=self._tasks(args),
            objective=objective,
            projections=Projections(tuple(self.projs), tuple(self.projs_group)),
            train_mode=self._in_context,
            about={"class": type(self).__name__, "train_config": self.t_config.to_dict()},
            keywords=tuple(inspect.signature(type(self).train).parameters)[1:-1],
            open_writer=lambda: self.tb_writer,
            print_freq=self.print_freq,
            trainable=trainable,
        )

    # Down to the engine, and back ---------------------------------------------------------------

    def _train(self, request: Request, args: Mapping[str, Any]) -> None:
        close = functools.partial(close_all, request.writers)  # where a run has not come to that
        with afterwards("closing the writers", close), self._own_writer():
            outcome = training.train(self.job(**args), request, self._take)
            self._take(outcome)
            if outcome.error is not None:
                raise outcome.error

    def _take(self, outcome: Outcome) -> Any:
        """Writes what a run has come to into what the user holds; returns the student."""
        self.rank = outcome.rank
        self.projs[:] = outcome.job.projections.modules
        self.projs_group[:] = outcome.job.projections.options
        if outcome.error is None or outcome.best_checkpoint is not None:
            self.best_checkpoint = outcome.best_checkpoint
        if outcome.error is None or outcome.evaluations:
            self.evaluations = {step: dict(found) for step, found in outcome.evaluations.items()}
        outcome.write()
        return self.model_S

    def _report(
        self,
        batches: Mapping[str, Batch],
        optimizer: Optimizer | None,
        args: Mapping[str, Any],
        on: str | None,
    ) -> str:
        report = training.report(self.job(**args), batches, optimizer, on)
        print(report)
        return report

    @contextlib.contextmanager
    def _own_writer(self) -> Iterator[None]:
        """Closes, at the end of a block, the tensorboard writer that was opened in it."""
        if self._tb_writer is not None and self._tb_writer.file_writer is not None:
            yield
            return
        with afterwards("closing the tensorboard file", self._close_writer):
            yield

    def _close_writer(self) -> None:
        writer, self._tb_writer = self._tb_writer, None
        if writer is not None:
            writer.close()


def _check_compute_loss(function: Any, owner: str, *bound: str) -> None:
    """Refuses a ``compute_loss`` that cannot be called as it will be."""
    wanted = (*bound, "results_S", "results_T", "project", "weights")
    if not callable(function):
        raise TypeError(
            f"{owner}.compute_loss is a {type(function).__name__}, not a function of "
            f"({', '.join(wanted)})"
        )
    signature = inspect.signature(function)
    try:
        signature.bind(*wanted)
    except TypeError as error:
        raise TypeError(
            f"{owner}.compute_loss must take ({', '.join(wanted)}), not {signature}. (TextBrewer's "
            "takes the two results only; project applies the projection of a match, weights holds "
            "the scheduled weights)"
        ) from error
