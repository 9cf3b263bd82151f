"""The student models of TextBrewer's experiments, by the names its README gives them."""

from collections.abc import Mapping
from typing import Any

from jaxbrewer.zoo.bert import BertConfig
from jaxbrewer.zoo.bigru import BiGRUConfig
from jaxbrewer.zoo.configuration import ModelConfig
from jaxbrewer.zoo.deberta_v2 import DisentangledConfig
from jaxbrewer.zoo.electra import ElectraConfig
from jaxbrewer.zoo.mpnet import MPNetConfig
from jaxbrewer.zoo.roberta import RobertaConfig

BASES: Mapping[str, int] = {
    "bert-base-cased": 28996,
    "bert-base-uncased": 30522,
    "roberta-wwm-ext": 21128,
}
"""Vocabulary sizes by the name of a teacher.

TextBrewer's English teacher is BERT-base-cased (uncased in the MNLI and the random-tokens example),
its Chinese ones RoBERTa-wwm-ext and ELECTRA-base, which share Google's Chinese vocabulary.
"""


def _transformer(layers: int, width: int, inner: int, heads: int = 12) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
    }


_SHAPES: Mapping[str, dict[str, Any]] = {
    "T6": _transformer(6, 768, 3072),
    "T3": _transformer(3, 768, 3072),
    "T3-small": _transformer(3, 384, 1536),
    "T4-tiny": _transformer(4, 312, 1200),
    "T12-nano": _transformer(12, 256, 1024, heads=4),
    "Electra-small": {**_transformer(12, 256, 1024, heads=4), "embedding_size": 128},
    "BiGRU": {"embedding_size": 768, "hidden_size": 768},
}
# The classes of config that have BERT's shapes, and those that have the others.
_LIKE_BERT = (BertConfig, RobertaConfig, MPNetConfig, DisentangledConfig)
_CLASSES: Mapping[str, tuple[type[ModelConfig], ...]] = {
    "Electra-small": (ElectraConfig,),
    "BiGRU": (BiGRUConfig,),
}

STUDENTS: tuple[str, ...] = tuple(_SHAPES)
"""The names that `student_config` knows."""


def student_config(
    name: str, base: str | ModelConfig = "bert-base-cased", **changes: Any
) -> ModelConfig:
    """The config of a student of TextBrewer's.

    ============= ====== ===== ===== =====================================================
    name          layers width inner values from
    ============= ====== ===== ===== =====================================================
    T6            6      768   3072  ``bert_config_L6.json``
    T3            3      768   3072  ``bert_config_L3.json``
    T3-small      3      384   1536  ``bert_config_L3n.json``
    T4-tiny       4      312   1200  ``bert_config_L4t.json``
    T12-nano      12     256   1024  the README's table
    Electra-small 12     256   1024  the README's table; the embeddings are 128 wide
    BiGRU                768         the README's table: one layer, 768 each way
    ============= ====== ===== ===== =====================================================

    The transformers with a file have 12 heads. The table does not tell T12-nano's; its README calls
    the structure similar to ELECTRA-small's, which has 4. Nor is there code for the BiGRU, so its
    size (29 million parameters here, 31 there) is met roughly.

    Args:
        name: one of the names above, in any letter case.
        base: whose vocabulary the student shares: a name in `BASES`, or a config, such as the
            teacher's, whose other fields (labels, positions, token types) the student takes too.
            A T student is then of that config's class: BERT, RoBERTa, MPNet or DeBERTa, or one
            made from them.
        changes: fields to set on top, such as ``num_labels=3`` or ``output_hidden_states=True``.

    Raises:
        ValueError: the name or the base is not known (lists those that are), or the base is a
            config that has no such shape.
    """
    known = {shape.casefold(): shape for shape in _SHAPES}
    if not isinstance(name, str) or name.casefold() not in known:
        raise ValueError(f"no student {name!r}: choose from {', '.join(_SHAPES)}")
    name = known[name.casefold()]
    classes = _CLASSES.get(name, _LIKE_BERT)
    if isinstance(base, str):
        if base not in BASES:
            raise ValueError(f"no base {base!r}: choose from {', '.join(BASES)}, or give a config")
        return classes[0](vocab_size=BASES[base], **_SHAPES[name]).replace(**changes)
    if not isinstance(base, classes):
        raise ValueError(
            f"base is a {type(base).__name__}, which has no {name}: give the name of a base "
            f"({', '.join(BASES)}) and the fields to share"
        )
    return base.replace(**_SHAPES[name], **changes)
