"""What the code of some pages of the documentation finds there: small models, data, folders."""

import functools
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxbrewer
from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig, zoo
from jaxbrewer.data import bucket_by_length

from .recipes.files import CONFIG, WORDS, write_tokenizer

OPTIMIZER = functools.partial(optax.adamw, learning_rate=1e-3)


def classifier(layers, seed):
    config = CONFIG.replace(num_hidden_layers=layers, output_hidden_states=True)
    return zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(seed))


def columns(count=8, length=6):
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(0, CONFIG.vocab_size, (count, length)).tolist(),
        "attention_mask": np.ones((count, length), int).tolist(),
        "labels": (np.arange(count) % 2).tolist(),
    }


def job():
    """A distiller of two classifiers, and what its methods are given."""
    teacher, student = classifier(2, 0), classifier(1, 1)
    adaptor = zoo.adaptor("sequence-classification")
    train_config = TrainingConfig(output_dir="out", device="cpu")
    config = DistillationConfig()
    loader = bucket_by_length(columns(), batch_size=4)
    return {
        "jaxbrewer": jaxbrewer,
        "GeneralDistiller": GeneralDistiller,
        "DistillationConfig": DistillationConfig,
        "TrainingConfig": TrainingConfig,
        "jnp": jnp,
        "np": np,
        "optax": optax,
        "train_config": train_config,
        "config": config,
        "student": student,
        "adaptor": adaptor,
        "distiller": GeneralDistiller(train_config, config, teacher, student, adaptor, adaptor),
        "optimizer": OPTIMIZER,
        "loader": loader,
        "batch": next(iter(loader)),
    }


def any_model():
    import torch

    def torch_model(**inputs):
        rows = len(inputs["input_ids"])
        return types.SimpleNamespace(logits=torch.zeros(rows, 2), hidden_states=())

    return job() | {"torch": torch, "torch_model": torch_model}


def evaluation():
    import scipy.special

    given = job()
    loader = given["loader"]
    return given | {"scipy": scipy, "train": loader, "dev": loader, "examples": columns()}


def export():
    zoo.export_onnx(classifier(1, 0), "student.onnx")
    ids = np.ones((2, 4), np.int64)
    return {"ids": ids, "mask": ids, "types": 0 * ids}


def metric_writers():
    """Something in place of wandb's module."""

    class Run:
        def log(self, values, step):
            assert values and step >= 0

        def finish(self):
            pass

    sys.modules["wandb"] = types.SimpleNamespace(init=lambda **options: Run())
    return job()


def sentence_folder():
    """A small sentence encoder, under the name that pages read."""
    config = CONFIG.replace(num_hidden_layers=6, max_position_embeddings=128)
    zoo.SentenceEncoder(zoo.BertModel(config, rngs=nnx.Rngs(0))).save_pretrained("all-MiniLM-L6-v2")
    write_tokenizer("all-MiniLM-L6-v2")
    return {}


def sentence_encoders():
    from transformers import AutoTokenizer

    sentence_folder()
    one_label = CONFIG.replace(num_labels=1)
    scorer = zoo.BertForSequenceClassification(one_label, rngs=nnx.Rngs(0))
    scorer.save_pretrained("ms-marco-MiniLM-L6-v2")
    zoo.BertModel(CONFIG, rngs=nnx.Rngs(0)).save_pretrained("microsoft-MiniLM")
    tokenizer = AutoTokenizer.from_pretrained("all-MiniLM-L6-v2")
    ids = np.ones((3, 4), int).tolist()
    candidates = {"input_ids": tuple(ids), "attention_mask": tuple(ids)}
    example = {
        "teacher": candidates,
        "student": candidates | {"query_input_ids": ids[0], "query_attention_mask": ids[0]},
    }
    return {
        "tokenizer_T": tokenizer,
        "tokenizer_S": tokenizer,
        "query": "good film",
        "positive": "a very good film",
        "negatives": ["bad", "the book"],
        "examples": [example] * 16,
    }


def task_agnostic():
    config = CONFIG.replace(num_hidden_layers=12, max_position_embeddings=128)
    zoo.BertForMaskedLM(config, rngs=nnx.Rngs(0)).save_pretrained("bert-base-uncased")
    write_tokenizer("bert-base-uncased")
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    path = Path("bert-base-uncased/tokenizer_config.json")
    path.write_text(json.dumps(special | {"sep_token": "[SEP]", "unk_token": "[UNK]"}))
    Path("corpus.txt").write_text("\n".join([" ".join(WORDS)] * 32), encoding="utf-8")
    return {}


def using():
    def tokenizer(texts, **how):
        return {"input_ids": [[1, 2, 3] for _ in texts], "attention_mask": [[1] * 3 for _ in texts]}

    return {"tokenizer": tokenizer, "sentences": ["a"] * 32, "labels": [0] * 32}
