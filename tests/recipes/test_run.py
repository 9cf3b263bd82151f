"""Recipes run from their files to the student's folder, and what is predicted from there."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxbrewer import zoo
from jaxbrewer.errors import ConfigError
from jaxbrewer.evaluation import Accuracy, Evaluator
from jaxbrewer.recipes import examples, predict, run_recipe
from jaxbrewer.recipes.jobs import prepared
from jaxbrewer.recipes.reading import read_recipe
from jaxbrewer.recipes.tokens import Tokens

from .files import CONFIG, WORDS, sentences, write_model, write_squad, write_tokenizer

TASKS = {
    "sequence-classification": {"accuracy"},
    "token-classification": {"span_f1", "span_precision", "span_recall"},
    "question-answering": {"exact_match", "f1"},
}


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_leaves_a_student_that_predicts(task, tiny, tmp_path):
    best = min(TASKS[task])
    run = run_recipe(tiny(task, best_metric=best), {"training.max_to_keep": 1})
    assert run.folder == tmp_path / "out" / "student" and run.student.keys() == TASKS[task]
    assert run.teacher.keys() == TASKS[task]
    assert [*run.evaluations.values()] == [run.student]
    student = zoo.from_pretrained(run.folder)
    assert student.task == task and student.config.num_hidden_layers == 1
    assert not student.config.output_hidden_states
    suffix = {"s": "tsv", "t": "conll", "q": "json"}[task[0]]
    found = predict(run.folder, tmp_path / f"dev.{suffix}", batch_size=3)
    assert len(found) == 10
    rows = examples.read_all([str(tmp_path / f"dev.{suffix}")], None, None)
    if task == "sequence-classification":
        right = [said["label"] == row["label"] for said, row in zip(found, rows, strict=True)]
        assert np.mean(right) == pytest.approx(run.student["accuracy"])
        assert all(sum(said["probabilities"].values()) == pytest.approx(1) for said in found)
    if task == "token-classification":
        lengths = [len(row["tokens"]) for row in rows]
        assert [len(said["tags"]) for said in found] == lengths
    if task == "question-answering":
        assert [said["id"] for said in found] == [str(i) for i in range(10)]
        assert all(said["answer"] in row["context"] for said, row in zip(found, rows, strict=True))


def test_a_student_learns_from_labels_alone_and_becomes_a_teacher(tiny, tmp_path):
    values = tiny(
        student=write_model(tmp_path / "begin", "question-answering"), teacher=None, num_epochs=30
    )
    del values["distillation"]
    run = run_recipe(values, {"training.ckpt_epoch_frequency": 30})
    assert run.student["accuracy"] >= 0.8 and run.teacher == {}
    (said,) = predict(run.folder, ["very good film"])  # of the recipe's column
    assert said["label"] == "good" and said["probability"] > 0.5
    taught = tiny(teacher=str(run.folder)) | {"training": {"output_dir": str(tmp_path / "second")}}
    again = run_recipe(taught, {"training.device": "cpu"}, max_examples=9)
    assert again.teacher["accuracy"] == pytest.approx(
        np.mean([p["label"] == r["label"] for p, r in _first(run.folder, tmp_path, 9)])
    )


def _first(folder, tmp_path, count):
    rows = examples.read_all([str(tmp_path / "dev.tsv")], None, count)
    return zip(predict(folder, rows), rows, strict=True)


def test_a_run_that_was_stopped_goes_on_and_ends_in_the_same_student(tiny, tmp_path):
    values = tiny(num_epochs=2)
    whole = run_recipe(values, {"training.output_dir": str(tmp_path / "whole")})
    run_recipe(values | {"num_epochs": 1})
    resumed = run_recipe(values, {"training.resume": True})
    same = [zoo.from_pretrained(run.folder) for run in (whole, resumed)]
    for a, b in zip(*map(jax.tree.leaves, map(_params, same)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.evaluations == whole.evaluations


def _params(model):
    from flax import nnx

    return jax.tree.map(np.asarray, nnx.state(model, nnx.Param))


def test_a_student_of_another_vocabulary_has_inputs_of_its_own(tiny, tmp_path):
    folder = write_model(tmp_path / "other", "sequence-classification", seed=3)
    write_tokenizer(folder, WORDS[::-1])
    values = tiny(student=folder, metrics=["accuracy", "agreement"])
    values["distillation"]["intermediate_matches"][0]["layer_S"] = 2
    job = prepared(read_recipe(values))
    batch = next(iter(job.train))
    assert batch.keys() == {"teacher", "student"} and "labels" not in batch["teacher"]
    assert (batch["teacher"]["input_ids"] != batch["student"]["input_ids"]).any()
    run = run_recipe(values)
    assert run.student.keys() == {"accuracy", "agreement"} and run.teacher.keys() == {"accuracy"}
    teacher = Evaluator(
        zoo.from_pretrained(tmp_path / "teacher"), zoo.adaptor("sequence-classification")
    )
    assert run.teacher == teacher(job.eval_teacher, [Accuracy()])
    with pytest.raises(ConfigError, match="only one teacher of sequence-classification"):
        tagged = write_model(tmp_path / "tagged", "token-classification")
        write_tokenizer(tagged, WORDS[::-1])
        prepared(read_recipe(tiny("token-classification", student=tagged)))


def test_what_compares_with_the_teacher_is_of_the_student_alone(tiny):
    run = run_recipe(tiny(metrics=["accuracy", "agreement", "kl"], best_metric="-kl"))
    assert run.student.keys() == {"accuracy", "agreement", "kl"}
    assert run.teacher.keys() == {"accuracy"}
    assert [*run.evaluations.values()] == [run.student]
    assert run.distiller.model_S.config.output_hidden_states  # the caller's is as it was


def test_teachers_are_averaged(tiny, tmp_path):
    both = [write_model(tmp_path / f"t{i}", "sequence-classification", seed=i) for i in range(2)]
    values = tiny(teacher=both, distillation={"temperature": 2}, student={"layers": [0, 1]})
    assert type(prepared(read_recipe(values)).distiller).__name__ == "MultiTeacherDistiller"
    assert run_recipe(values).student.keys() == {"accuracy"}
    weighted = prepared(read_recipe(values | {"teacher_weights": [1, 3]})).distiller
    assert weighted.teacher_weights == (1, 3)


def test_labels_may_be_names_numbers_and_quantities():
    of = examples.labels_of
    assert of(None, None, ["b", "a"]) == examples.Labels(("a", "b"), 2)
    assert of(None, None, ["0", "2", "1"]) == examples.Labels(None, 3)
    assert of(None, None, ["0.5", "2"]) == examples.Labels(None, 1)
    assert of(None, None, [0, 1]) == examples.Labels(None, 2)
    named = of(["bad", "good"], None, ["good"])

    def taken(labels, *values):
        return labels.of(values, "train.tsv", lambda i: f"row {i + 1}")

    assert taken(named, "good", 0, "1") == [1, 0, 1]
    with pytest.raises(ConfigError) as caught:
        taken(named, "bad", "god", "worse", "god")
    assert str(caught.value).splitlines() == [
        "train.tsv has 2 problems:",
        "  - row 2 and 1 more: the label 'god' is no class: did you mean 'good'?",
        "  - row 3: the label 'worse' is no class: choose from 'bad', 'good' (data.labels names the "
        "classes in order, where they are the same by other names)",
    ]
    with pytest.raises(
        ConfigError, match=r"train.tsv: row 1: the label 2 is no class.*data\.labels"
    ):
        taken(examples.Labels(None, 2), 2)
    with pytest.raises(ConfigError, match="and 5 other labels"):
        taken(named, *map(str, range(2, 17)))
    with pytest.raises(ConfigError, match=r"row 2: the label is 'x', expected a number$"):
        taken(examples.Labels(None, 1), 0.5, "x")
    with pytest.raises(ConfigError, match="names 3 classes, and the teacher has 2"):
        of(["a", "b", "c"], named, None)


def test_only_the_first_piece_of_a_word_has_its_tag(tmp_path, caplog):
    write_tokenizer(tmp_path, [*WORDS, "##ly", "bad"])
    rows = [
        {"tokens": ["badly", "Anna"], "tags": ["O", "B-PER"]},
        {"tokens": ["a"] * 9, "tags": ["O"] * 9},
    ]
    labels = examples.Labels(("O", "B-PER"), 2)
    with caplog.at_level(logging.WARNING):
        columns, firsts = examples.tagged(
            rows, "tokens", ("tags", labels), "dev", Tokens(tmp_path, 6)
        )
    assert columns["labels"][0] == [-100, 0, -100, 1, -100]
    assert firsts[0] == [None, 0, None, 1, None] and len(columns["input_ids"][1]) == 6
    assert "1 of 2 sentences are longer than 6 tokens" in caplog.text
    with pytest.raises(ValueError, match="sentence 1 has 2 words and 1 tags"):
        rows[0]["tags"] = ["O"]
        examples.tagged(rows, "tokens", ("tags", labels), "dev", Tokens(tmp_path, 6))


def test_an_answer_is_where_its_characters_are_in_every_window(tmp_path):
    write_tokenizer(tmp_path)
    context = " ".join(["the film"] * 6 + ["good book"])
    row = {"question": "the book", "context": context}
    answer = {"text": ["good book"], "answer_start": [context.index("good")]}
    columns, windows = examples.asked(
        [row | {"answers": answer}], "dev", Tokens(tmp_path, 12), 2, labelled=True
    )
    assert len(windows) == len(columns["input_ids"]) > 1
    for window, start, end in zip(
        windows, columns["start_positions"], columns["end_positions"], strict=True
    ):
        if start:
            said = context[window.offsets[start][0] : window.offsets[end][1]]
            assert said == "good book"
    assert any(columns["start_positions"]) and not all(columns["start_positions"])
    wrong = row | {"answers": {"text": ["good"], "answer_start": [0]}}
    with pytest.raises(ValueError, match="at 0 the context has 'the ', not the answer 'good'"):
        examples.asked([wrong], "dev", Tokens(tmp_path, 12), 2, labelled=True)


def test_questions_without_an_answer_may_get_none(tiny, tmp_path):
    values = tiny("question-answering")
    write_squad(tmp_path / "train.json", 24, impossible=True)
    write_squad(tmp_path / "dev.json", 9, impossible=True)
    run = run_recipe(values, max_examples=9)
    assert json.loads((run.folder / "jaxbrewer.json").read_text())["may_lack_answer"] is True
    assert len(predict(run.folder, tmp_path / "dev.json")) == 9


def test_an_old_folder_with_a_vocabulary_alone_is_read(tiny, tmp_path):
    values = tiny()
    tokenizer = Path(values["teacher"]) / "tokenizer.json"
    words = json.loads(tokenizer.read_text())["model"]["vocab"]
    (tokenizer.parent / "vocab.txt").write_text("\n".join(words) + "\n")
    by_file = Tokens(tokenizer.parent, 16).of_texts(["good film", "Oslo"])
    tokenizer.unlink()
    (tokenizer.parent / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    by_words = Tokens(tokenizer.parent, 16).of_texts(["good film", "Oslo"])
    assert [e.ids for e in by_words] == [e.ids for e in by_file]


def test_rows_in_python_are_texts_pairs_or_words(tmp_path):
    pairs = [("the film", "good film"), ("a", "b")]
    folder = write_model(tmp_path / "classes", "sequence-classification")
    of_rows = [{"a": a, "b": b} for a, b in pairs]
    assert predict(folder, pairs, text=["a", "b"]) == predict(folder, of_rows, text=["a", "b"])
    assert predict(folder, ["the film"]) == predict(folder, [{"text": "the film"}])
    tagger = write_model(tmp_path / "tags", "token-classification")
    (said,) = predict(tagger, [["Anna", "sings"]])
    assert len(said["tags"]) == 2
    reader = write_model(tmp_path / "answers", "question-answering")
    (said,) = predict(reader, [("the film", "a good film")])
    assert said["answer"] in "a good film"


def test_processes_share_the_batches(tiny, monkeypatch):
    values = tiny()
    alone = [batch["input_ids"] for batch in prepared(read_recipe(values)).train]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        job = prepared(read_recipe(values, [("training.local_rank", rank), ("data.batch_size", 5)]))
        shares.append([batch["input_ids"] for batch in job.train])
        assert len(job.eval) == 2
    for whole, *parts in zip(alone, *shares, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_what_cannot_be_predicted_is_told(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        predict("nowhere", ["a"])
    zoo.BertModel(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="is a BertModel: name its task"):
        predict(tmp_path, ["a"])
    folder = write_model(tmp_path / "m", "sequence-classification")
    with pytest.raises(
        ConfigError, match=r"no column 'text', as .* by text= .* did you mean 'texts'"
    ):
        predict(folder, [{"texts": "a", "number": 1}])
    assert predict(folder, [{"texts": "good"}]) == predict(folder, ["good"])  # there is but one
    with pytest.raises(ValueError, match="there are no examples"):
        predict(folder, [])
    assert len(sentences(3)) == len(predict(folder, [" ".join(w) for w, _ in sentences(3)]))
    (tmp_path / "out").mkdir()
    (tmp_path / "m").rename(tmp_path / "out" / "student")
    with pytest.raises(ConfigError, match=r"no config\.json, .*/student is one"):
        predict(tmp_path / "out", ["a"])


def test_a_teacher_without_a_head_is_told_how_to_get_one(tiny, tmp_path):
    values = tiny()
    zoo.BertModel(CONFIG, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "teacher")
    told = "no head of sequence-classification, .* jaxbrewer init sequence-classification --teacher"
    with pytest.raises(ConfigError, match=told):
        prepared(read_recipe(values))
    with pytest.raises(ConfigError, match="no head of token-classification"):
        predict(tmp_path / "teacher", [["a"]], task="token-classification")
    another = write_model(tmp_path / "another", "sequence-classification")
    with pytest.raises(ConfigError, match="no head of token-classification"):
        predict(another, [["a"]], task="token-classification")


def test_layers_that_are_not_there_are_told_with_their_field(tiny):
    with pytest.raises(ConfigError, match=r"student\.layers: layers \[7\] are not in the teacher"):
        prepared(read_recipe(tiny(student={"layers": [7]})))
