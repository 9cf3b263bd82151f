"""A teacher that is no JAX model: a torch model, an API, a file of scores."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import AdaptorError
from .adaptors import adaptor_keys
from .function_model import FunctionModel


class OutsideTeacher(FunctionModel):
    """A teacher whose outputs come with each batch.

    It is the distiller's teacher, with `adaptor` as its adaptor, and the ``batch_postprocessor`` of
    ``train``: there it asks `teach` for what the teacher says of the batch, on the host, before the
    batch goes to the device, while the step before is computed. With ``is_caching_logits`` each batch
    is asked once.

    >>> teacher = OutsideTeacher(lambda batch: {"logits": ask_api(batch["input_ids"])})
    >>> distiller = GeneralDistiller(train_config, config, teacher, student, teacher.adaptor, adaptor)
    >>> distiller.check(teacher(batch))
    >>> distiller.train(optimizer, loader, num_epochs=3, batch_postprocessor=teacher)

    Args:
        teach: a batch, as the loader gives it → what an adaptor returns: ``logits``, and if matched
            ``hidden``, ``attention`` and so on, tuples with an array for each layer; numpy, JAX or torch
            arrays of shapes that do not differ between batches of one shape.
    """

    def __init__(self, teach: Callable[[Any], Mapping[str, Any]]):
        super().__init__(_handed_on, {})
        self.teach = teach

    def __call__(self, batch: Any) -> dict[str, Any]:
        """The batch for the student, with what the teacher says of it.

        Raises:
            AdaptorError: what `teach` returned is not a dict, or has keys that no adaptor returns.
        """
        said = self.teach(batch)
        if not isinstance(said, Mapping) or not said:
            raise AdaptorError(
                f"the function of OutsideTeacher returned a {type(said).__name__}, expected a dict such "
                "as {'logits': array}"
            )
        if unknown := [key for key in said if key not in adaptor_keys()]:
            raise AdaptorError(
                f"the function of OutsideTeacher returned {unknown[0]!r}; expected some of "
                f"{', '.join(adaptor_keys())}"
            )
        return {"teacher": dict(said), "student": batch}

    @staticmethod
    def adaptor(batch: Any, outputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hands on what the batch has brought.

        Raises:
            AdaptorError: the batch has brought no outputs.
        """
        if not set(outputs) <= set(adaptor_keys()):
            raise AdaptorError(
                f"the batch holds {', '.join(outputs)} and nothing from the teacher: give the teacher to "
                "train as batch_postprocessor=teacher, and to check as check(teacher(batch))"
            )
        return outputs


def _handed_on(params: Any, **outputs: Any) -> dict[str, Any]:
    return outputs
