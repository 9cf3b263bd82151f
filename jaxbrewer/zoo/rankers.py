"""Scores of candidates for a query: by a classifier of pairs, or by two vectors.

Both return ``logits`` ``[batch, candidates]``, so that one is distilled into the other. The texts of a
query's candidates come as one array ``[batch, candidates, length]``, or as a tuple with an array
``[batch, length]`` for each, as `jaxbrewer.data.bucket_by_length` gives them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.errors import suggest
from jaxbrewer.zoo.hf import PretrainedModel
from jaxbrewer.zoo.outputs import ModelOutput, register_output
from jaxbrewer.zoo.sentence import SentenceEncoder, normalized

Texts: TypeAlias = Num[Array, "batch candidates length"] | Sequence[Num[Array, "batch length"]]
_SIMILARITIES = ("dot", "cosine")


@register_output
@dataclasses.dataclass(frozen=True)
class RankingOutput(ModelOutput):
    """What a model of scores returns."""

    logits: Float[Array, "batch candidates"]


class CrossEncoder(nnx.Module):
    """Scores each pair of a query and a candidate by a classifier of one label.

    ``model`` is such a classifier, as ``from_pretrained`` gives it of a cross-encoder's folder, and is
    kept as ``model``. Scores are its logits, without an activation.

    Raises ``TypeError`` for a model that is no classifier of sequences, ``ValueError`` for one of more
    labels.
    """

    def __init__(self, model: PretrainedModel):
        if getattr(model, "task", None) != "sequence-classification":
            raise TypeError(
                f"model is a {type(model).__name__}: give a classifier of pairs, such as "
                "BertForSequenceClassification with num_labels=1"
            )
        if model.config.num_labels != 1:
            raise ValueError(
                f"model has num_labels={model.config.num_labels}, and a pair has one score: give a "
                "classifier with num_labels=1"
            )
        self.model = model

    @property
    def id_limits(self) -> dict[str, int]:
        """By argument, the number that its ids must stay below."""
        return self.model.id_limits

    def __call__(
        self,
        input_ids: Texts,
        attention_mask: Texts | None = None,
        token_type_ids: Texts | None = None,
    ) -> RankingOutput:
        """``logits``, ``[batch, candidates]``; the texts are the pairs, tokenized as such.

        Raises ``ValueError`` for texts of another shape, and for parts that do not go together.
        """
        inputs, groups = _rows(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )
        logits = self.model(**inputs, return_dict=True).logits
        return RankingOutput(logits.reshape(groups))


class BiEncoder(nnx.Module):
    """Scores candidates for a query by the similarity of their vectors.

    ``encoder`` gives both vectors, and is kept as ``encoder``: ``model.encoder.save_pretrained(…)``
    writes it. A score is ``scale`` times the dot product (``similarity='dot'``) or the cosine.

    Raises ``TypeError`` for an encoder that is no `SentenceEncoder`, ``ValueError`` for another
    similarity and for a scale that is not above 0.
    """

    def __init__(self, encoder: SentenceEncoder, *, similarity: str = "dot", scale: float = 1.0):
        if not isinstance(encoder, SentenceEncoder):
            raise TypeError(
                f"encoder is a {type(encoder).__name__}: give a SentenceEncoder, which says how its "
                "hidden states become one vector"
            )
        if similarity not in _SIMILARITIES:
            raise ValueError(f"similarity={similarity!r}: {suggest(similarity, _SIMILARITIES)}")
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not 0 < scale < float("inf")
        ):
            raise ValueError(f"scale={scale!r}: expected a finite number above 0")
        self.encoder = encoder
        self.similarity = similarity
        self.scale = scale

    @property
    def id_limits(self) -> dict[str, int]:
        """By argument, the number that its ids must stay below."""
        limit = self.encoder.id_limits["input_ids"]
        return {"query_input_ids": limit, "input_ids": limit}

    def __call__(
        self,
        query_input_ids: Int[Array, "batch query_length"],
        input_ids: Texts,
        query_attention_mask: Num[Array, "batch query_length"] | None = None,
        attention_mask: Texts | None = None,
    ) -> RankingOutput:
        """``logits``, ``[batch, candidates]``; queries may be of another length than candidates.

        Raises ``ValueError`` for texts of another shape, and for parts that do not go together.
        """
        inputs, groups = _rows(input_ids=input_ids, attention_mask=attention_mask)
        queries = self._vectors(query_input_ids, query_attention_mask)
        if len(queries) != groups[0]:
            raise ValueError(
                f"query_input_ids holds {len(queries)} queries, and input_ids the candidates of "
                f"{groups[0]}"
            )
        candidates = self._vectors(**inputs).reshape(*groups, -1)
        return RankingOutput(self.scale * jnp.einsum("bw,bnw->bn", queries, candidates))

    def _vectors(
        self,
        input_ids: Int[Array, "texts length"],
        attention_mask: Num[Array, "texts length"] | None = None,
    ) -> Float[Array, "texts width"]:
        """In float32 or wider; unit vectors where cosines are asked for."""
        vectors = self.encoder(input_ids, attention_mask, return_dict=True).embedding
        vectors = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
        return normalized(vectors) if self.similarity == "cosine" else vectors


def _rows(**parts: Texts | None) -> tuple[dict[str, Array], tuple[int, int]]:
    """Each part that is given as ``[batch * candidates, length]``, and (batch, candidates)."""
    stacked: dict[str, Any] = {
        name: jnp.stack(texts, axis=1) if isinstance(texts, tuple | list) else jnp.asarray(texts)
        for name, texts in parts.items()
        if texts is not None
    }
    shape = stacked["input_ids"].shape
    for name, array in stacked.items():
        if array.ndim != 3:
            raise ValueError(
                f"{name} is {list(array.shape)}, expected [batch, candidates, length], or a tuple "
                "with an array [batch, length] for each candidate"
            )
        if array.shape != shape:
            raise ValueError(f"{name} is {list(array.shape)}, and input_ids {list(shape)}")
    return {name: array.reshape(-1, shape[-1]) for name, array in stacked.items()}, shape[:2]
