"""TextBrewer's random-tokens job, ported: a BERT-base teacher, a 3-layer student, random data.

    python examples/random_tokens/distill.py            # about 8 minutes on two CPU cores
    python examples/random_tokens/distill.py --epochs 1 # under a minute of training

Expected: both models' parameter tables, the preflight's report, a falling loss, and an accuracy
near 0.5 after each epoch (labels are random; the job shows the steps of a distillation, not its
use). Checkpoints go to ``saved_models``.
"""

import argparse
import functools
import logging

import jax
import numpy as np
import optax
from flax import nnx

import jaxbrewer
from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import BertConfig, BertForSequenceClassification

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--output_dir", default="saved_models")
options = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("absl").setLevel(logging.WARNING)

# Models. The teacher would be a fine-tuned one: BertForSequenceClassification.from_pretrained(folder)
teacher_config = BertConfig(output_hidden_states=True)
student_config = teacher_config.replace(num_hidden_layers=3)
teacher_model = BertForSequenceClassification(teacher_config, rngs=nnx.Rngs(0))
student_model = BertForSequenceClassification(student_config, rngs=nnx.Rngs(1))

# Data: 100 examples of 128 tokens, in batches of 32. A batch is a dict of arrays.
rng = np.random.default_rng(0)
data = {
    "input_ids": rng.integers(0, 100, (100, 128)),
    "attention_mask": np.ones((100, 128), np.int32),
    "labels": rng.integers(0, 2, 100),
}
dataloader = [{k: v[i : i + 32] for k, v in data.items()} for i in range(0, 100, 32)]
num_training_steps = len(dataloader) * options.epochs

# transformers' old AdamW, which TextBrewer's scripts use, has eps=1e-6 and no weight decay.
optimizer = functools.partial(optax.adamw, learning_rate=1e-4, eps=1e-6, weight_decay=0.0)
scheduler_args = {
    "num_warmup_steps": int(0.1 * num_training_steps),
    "num_training_steps": num_training_steps,
}

for name, model in (("teacher", teacher_model), ("student", student_model)):
    print(f"{name}'s parameters:")
    print(jaxbrewer.utils.display_parameters(model, max_level=3)[0])


def simple_adaptor(batch, model_outputs):
    return {
        "logits": model_outputs.logits,
        "hidden": model_outputs.hidden_states,
        "inputs_mask": batch["attention_mask"],
    }


@nnx.jit
def predict(model, input_ids, attention_mask):
    return model(input_ids, attention_mask).logits.argmax(-1)


def callback(model, step):
    model.eval()
    hits = [
        np.asarray(predict(model, batch["input_ids"], batch["attention_mask"])) == batch["labels"]
        for batch in dataloader
    ]
    model.train()
    print(f"step {step}: accuracy {np.concatenate(hits).mean():.2f}")


train_config = TrainingConfig(device=jax.devices()[0], output_dir=options.output_dir)
distill_config = DistillationConfig(
    temperature=8,
    hard_label_weight=0,
    kd_loss_type="ce",
    probability_shift=False,
    intermediate_matches=[
        {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
        {"layer_T": 8, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1},
        {"layer_T": [0, 0], "layer_S": [0, 0], "feature": "hidden", "loss": "nst", "weight": 1},
        {"layer_T": [8, 8], "layer_S": [2, 2], "feature": "hidden", "loss": "nst", "weight": 1},
    ],
)
print(train_config)
print(distill_config)

distiller = GeneralDistiller(
    train_config, distill_config, teacher_model, student_model, simple_adaptor, simple_adaptor
)
distiller.check(dataloader[0], optimizer)
with distiller:
    distiller.train(
        optimizer,
        dataloader,
        num_epochs=options.epochs,
        scheduler_class=get_linear_schedule_with_warmup,
        scheduler_args=scheduler_args,
        callback=callback,
    )
