"""Metrics of a model over a loader, alone and by a distiller."""

import jax
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.evaluation import Accuracy, Agreement, Divergence, Evaluator, Pearson
from tests import fn_job, nnx_job


def accuracy_by_hand(model, batches):
    right = [np.argmax(model(**b)["logits"], -1) == b["labels"] for b in batches]
    return float(np.mean(np.concatenate(right)))


def uneven():
    """Batches of two shapes, the last with fewer rows."""
    return [*nnx_job.loader(5), *nnx_job.loader(1, size=3, seed=9)]


def test_a_models_accuracy():
    model = nnx_job.Encoder(1, 8, dropout=0.5)
    model.train()
    evaluate = Evaluator(model, nnx_job.adaptor)
    got = evaluate(iter(uneven()), [Accuracy()])
    assert not model.dropout.deterministic  # left as it was
    model.eval()
    assert got == {"accuracy": pytest.approx(accuracy_by_hand(model, uneven()))}


def test_it_sees_the_weights_of_the_moment_and_compiles_once_a_shape():
    traced = []

    def adaptor(batch, outputs):
        traced.append(batch["input_ids"].shape)
        return nnx_job.adaptor(batch, outputs)

    model = nnx_job.Encoder(1, 8)
    evaluate = Evaluator(model, adaptor)
    before = evaluate(uneven(), [Accuracy()])
    model.head.kernel[...] = -model.head.kernel[...]
    after = evaluate(uneven(), [Accuracy()])
    assert after == {"accuracy": pytest.approx(accuracy_by_hand(model, uneven()))}
    assert after != before
    assert traced == [(4, 5), (3, 5)]


def test_a_model_of_another_structure_is_compiled_anew():
    model = nnx_job.Encoder(1, 8)
    evaluate = Evaluator(model, nnx_job.adaptor)
    evaluate(uneven(), [Accuracy()])
    model.layers.append(nnx_job.Encoder(1, 8, seed=3).layers[0])
    got = evaluate(uneven(), [Accuracy()])
    assert got == {"accuracy": pytest.approx(accuracy_by_hand(model, uneven()))}


class Loss:
    """The loss that the model computes."""

    def update(self, batch, results):
        self.loss = float(results["losses"])

    def compute(self):
        return {"loss": self.loss}


def test_what_is_not_a_shape_is_not_taken_from_before(tmp_path):
    """Other arguments, another adaptor, another function of a module, another teacher."""
    trained, batches = distiller(tmp_path), nnx_job.loader(1)
    plain = trained.evaluate(batches, [Loss()])["loss"]
    louder = trained.evaluate(batches, [Loss()], noise=2.0)["loss"]
    assert louder == pytest.approx(plain + 2)
    assert trained.evaluate(batches, [Loss()])["loss"] == plain
    trained.adaptor_S = lambda *given: nnx_job.adaptor(*given) | {"losses": given[1]["loss"] * 3}
    assert trained.evaluate(batches, [Loss()])["loss"] == pytest.approx(3 * plain)

    model = nnx_job.Encoder(1, 8)
    evaluate = Evaluator(model, nnx_job.adaptor)
    before = evaluate(batches, [Loss()])
    model.layers[0].use_bias, model.layers[0].promote_dtype = (
        True,
        lambda args, dtype: [2 * x for x in args],
    )
    assert evaluate(batches, [Loss()]) != before

    distances = []
    for seed in (5, 6):
        trained.model_T = nnx_job.Encoder(2, 8, seed=seed)
        distances.append(trained.evaluate(uneven(), [Divergence()])["kl"])
    assert distances[0] != distances[1]


def test_metrics_stay_as_they_are():
    metric, model = Accuracy(), nnx_job.Encoder(1, 8)
    evaluate = Evaluator(model, nnx_job.adaptor)
    assert evaluate(uneven(), [metric]) == evaluate(uneven(), [metric])


def test_what_a_metric_is_given():
    seen = []

    class Look:
        def update(self, batch, results):
            seen.append((batch, results))

        def compute(self):
            return {"batches": len(seen)}

    model = nnx_job.Encoder(2, 8)
    assert Evaluator(model, nnx_job.adaptor)(nnx_job.loader(2), [Look()]) == {"batches": 2}
    batch, results = seen[0]
    assert sorted(results) == ["inputs_mask", "labels", "logits", "losses"]
    assert all(isinstance(x, np.ndarray) for x in (*batch.values(), results["logits"]))
    np.testing.assert_array_equal(results["labels"], batch["labels"])


def test_beside_a_teacher():
    student, teacher = nnx_job.Encoder(1, 8), nnx_job.Encoder(2, 8, seed=5)
    evaluate = Evaluator(student, nnx_job.adaptor, teacher=teacher)
    got = evaluate(uneven(), [Agreement(), Divergence(), Accuracy()])
    same = [
        np.argmax(student(**b)["logits"], -1) == np.argmax(teacher(**b)["logits"], -1)
        for b in uneven()
    ]
    assert got["agreement"] == pytest.approx(np.mean(np.concatenate(same)))
    assert got["kl"] > 0
    itself = Evaluator(teacher, nnx_job.adaptor, teacher=teacher)
    assert itself(uneven(), [Agreement(), Divergence()]) == pytest.approx({"agreement": 1, "kl": 0})


def test_functions_and_each_sides_own_batch(tmp_path):
    job = fn_job.distiller(tmp_path)
    batches = fn_job.batches(3)
    alone = Evaluator(job.model_S, job.adaptor_S)(batches, [Accuracy()])
    own = [{"teacher": {"nonsense": np.zeros(2)}, "student": b} for b in batches]
    assert Evaluator(job.model_S, job.adaptor_S)(own, [Accuracy()]) == alone


def distiller(folder, **config):
    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(output_dir=str(folder), device="cpu", **config),
        jaxbrewer.DistillationConfig(temperature=2),
        nnx_job.Encoder(2, 8, seed=5),
        nnx_job.Encoder(1, 8, dropout=0.2),
        nnx_job.adaptor,
        nnx_job.adaptor,
    )


def weights(trained):
    return [
        np.asarray(x)
        for x in jax.tree.leaves(jaxbrewer.models.wrap.as_model(trained.model_S).params)
    ]


def test_a_distiller_evaluates_in_a_callback_and_trains_as_without(tmp_path):
    scores, dev = [], uneven()

    def callback(model, step):
        found = evaluating.evaluate(dev, [Accuracy(), Agreement()])
        scores.append(found["agreement"])
        assert found["accuracy"] == pytest.approx(
            Evaluator(model, nnx_job.adaptor)(dev, [Accuracy()])["accuracy"]
        )
        return jaxbrewer.CallbackResult(score=found["agreement"])

    evaluating, plain = distiller(tmp_path / "a", max_to_keep=1), distiller(tmp_path / "b")
    for each, called in ((evaluating, callback), (plain, None)):
        with each:
            each.train(optax.sgd(0.5), nnx_job.loader(6), num_epochs=3, callback=called)
    assert len(scores) == 3
    best = 6 * (1 + int(np.argmax(scores)))
    assert evaluating.best_checkpoint.name == f"gs{best}"
    for a, b in zip(weights(evaluating), weights(plain), strict=True):
        np.testing.assert_array_equal(a, b)


def test_several_tasks(tmp_path):
    student = nnx_job.Encoder(1, 8)
    tasks = {name: nnx_job.Encoder(2, 8, seed=i) for i, name in enumerate("ab")}
    several = jaxbrewer.MultiTaskDistiller(
        jaxbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu"),
        jaxbrewer.DistillationConfig(),
        tasks,
        student,
        {name: nnx_job.adaptor for name in tasks},
        {name: nnx_job.adaptor for name in tasks},
    )
    loaders = {"a": nnx_job.loader(2), "b": nnx_job.loader(3, seed=4)}
    got = several.evaluate(loaders, {"a": [Accuracy()], "b": [Accuracy(), Agreement()]})
    assert sorted(got) == ["a/accuracy", "b/accuracy", "b/agreement"]
    assert got["b/accuracy"] == pytest.approx(accuracy_by_hand(student, loaders["b"]))
    with pytest.raises(
        ValueError,
        match="expected a dict of loaders by task, of the tasks a, b; it was given \\['c'\\]",
    ):
        several.evaluate({"c": []}, [Accuracy()])


@pytest.mark.parametrize(
    ("batches", "metrics", "message"),
    [
        ([], [Accuracy()], "the loader gave no batch"),
        (None, [], r"metrics is \[\]; expected a list such as"),
        (None, Accuracy(), "expected a list such as"),
        (None, [Accuracy], r"Accuracy is a class: write Accuracy\(\)"),
        (None, [max], r"is no metric: one has update\(batch, results\) and compute\(\)"),
        (None, [Accuracy(), Accuracy()], "two metrics give 'accuracy'"),
        (None, [Agreement()], "Agreement compares with a teacher, and there is none"),
        (None, [Pearson()], r"one number for each example; logits are \[4, 3\]"),
    ],
)
def test_mistakes(batches, metrics, message):
    evaluate = Evaluator(nnx_job.Encoder(1, 8), nnx_job.adaptor)
    with pytest.raises(ValueError, match=message):
        evaluate(nnx_job.loader(1) if batches is None else batches, metrics)


def test_an_adaptors_mistake_is_told_as_in_training():
    with pytest.raises(jaxbrewer.errors.AdaptorError, match="unknown key 'logit'"):
        Evaluator(nnx_job.Encoder(1, 8), lambda batch, outputs: {"logit": outputs["logits"]})(
            nnx_job.loader(1), [Accuracy()]
        )
