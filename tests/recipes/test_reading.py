"""What a recipe may say: everything that is wrong with it is told in one report."""

import json

import pytest

from jaxbrewer.errors import ConfigError
from jaxbrewer.files import UnreadableFileError
from jaxbrewer.recipes import folders
from jaxbrewer.recipes.reading import read_recipe, setting
from jaxbrewer.recipes.schema import TASKS
from jaxbrewer.recipes.template import template

from .files import write_model, write_tokenizer


def problems(values, settings=()):
    with pytest.raises(ConfigError) as caught:
        read_recipe(values, settings)
    return str(caught.value)


def test_a_recipe_is_read_from_toml_json_and_a_dict(tiny, tmp_path):
    values = tiny()
    (tmp_path / "r.json").write_text(json.dumps(values))
    (tmp_path / "r.toml").write_text(
        'task = "sequence-classification"\nteacher = "teacher"\nnum_epochs = 1\n'
        "student = { layers = [1] }\n"
        '[data]\ntrain = "train.tsv"\neval = ["dev.tsv"]\ntext = "text"\nmax_length = 16\n'
        "batch_size = 10\nbuckets = [16]\n"
        '[training]\noutput_dir = "out"\ndevice = "cpu"\n'
        "[distillation]\ntemperature = 2\nhard_label_weight = 1\n"
        "[[distillation.intermediate_matches]]\nlayer_T = 2\nlayer_S = 1\n"
        'feature = "hidden"\nloss = "hidden_mse"\nweight = 1\n'
        '[optimizer]\nname = "adamw"\nlearning_rate = 1e-2\n'
    )
    found = [read_recipe(x) for x in (values, tmp_path / "r.json", str(tmp_path / "r.toml"))]
    assert found[0] == found[1] == found[2]
    assert values == tiny()  # nothing that was given is changed


def test_the_two_configs_may_be_files_of_their_own(tiny, tmp_path):
    values = tiny()
    for name in ("training", "distillation"):
        (tmp_path / f"{name}.json").write_text(json.dumps(values[name]))
    apart = values | {"training": str(tmp_path / "training.json")}
    apart["distillation"] = str(tmp_path / "distillation.json")
    assert read_recipe(apart) == read_recipe(values)
    changed = read_recipe(apart, [("distillation.temperature", 3)])
    assert changed.distillation.temperature == 3


def test_fields_are_set_on_top(tiny):
    given = ["8", "1e-3", '"x"', "x", "[1, 2]", "true", "tests"]
    assert [setting("f", text)[1] for text in given] == [8, 1e-3, "x", "x", [1, 2], True, "tests"]
    found = read_recipe(tiny(), [("data.batch_size", 4), ("num_steps", 3), ("num_epochs", None)])
    assert found.data.batch_size == 4 and found.num_steps == 3
    assert "task is 'sequence-classification', not a table" in problems(tiny(), [("task.x", 1)])


WRONG = {
    "tsk": ({"tsk": 1}, "unknown key 'tsk'; did you mean 'task'"),
    "no such task": ({"task": "tagging"}, "task is 'tagging': choose from"),
    "both lengths": ({"num_steps": 3}, "expected one of num_epochs and num_steps, not both"),
    "no length": ({"num_epochs": None}, "expected one of num_epochs and num_steps, not none"),
    "no teacher": ({"teacher": None}, "distillation is there, but no teacher"),
    "no student": ({"student": {}}, "student: expected one of folder, layers and shape, not none"),
    "two students": (
        {"student": {"layers": [1], "shape": "T3"}},
        "expected one of folder, layers and shape, not layers, shape",
    ),
    "no layers": ({"student": {"layers": []}}, "expected a list of the teacher's layers"),
    "an optimizer": ({"optimizer": "adamv"}, "no optimizer of optax 'adamv': did you mean"),
    "no rate": ({"optimizer": "adamw"}, "adamw needs learning_rate"),
    "a rate in words": (
        {"optimizer": {"name": "sgd", "learning_rate": "1e-4"}},
        "learning_rate is '1e-4': expected a number above 0",
    ),
    "a mask": (
        {"optimizer": {"name": "adamw", "learning_rate": 1, "mask": "all"}},
        "expected 'decay_mask'",
    ),
    "an argument": (
        {"optimizer": {"name": "sgd", "learning_rate": 1, "momentums": 1}},
        "sgd takes no 'momentums': did you mean 'momentum'",
    ),
    "a rate by another name": (
        {"optimizer": {"name": "adamw", "lr": 1e-4}},
        "adamw takes no 'lr': did you mean 'learning_rate'?",
    ),
    "a key of a config": (
        {"distillation.temprature": 4},
        "the recipe: distillation: unknown key 'temprature'; did you mean 'temperature'?",
    ),
    "below a table": (
        {"optimizer": {"name": "sgd", "learning_rate": 1, "num_epochs": 1}},
        "sgd takes no 'num_epochs': it stands beside the tables: in TOML above the first",
    ),
    "a schedule": ({"scheduler": "linear"}, "there is no schedule 'linear': choose from"),
    "a warm-up": (
        {"scheduler": {"name": "get_linear_schedule_with_warmup", "num_warmup_steps": -1}},
        "expected steps, or a part of all below 1",
    ),
    "a rate in a config": (
        {"training": {"learning_rate": 1}},
        "training: unknown key 'learning_rate': learning_rate belongs in the table optimizer",
    ),
    "a table's field": ({"temperature": 8}, "'temperature': it belongs in the table distillation"),
    "a metric": ({"metrics": ["acuracy"]}, "no metric 'acuracy': did you mean 'accuracy'"),
    "a best metric": ({"best_metric": "f1"}, "best_metric is 'f1': choose from 'accuracy'"),
    "a column": ({"data.text": "txt"}, "row 1 has no column 'txt': did you mean 'text'"),
    "no text": ({"data.text": None}, "data: missing key 'text'"),
    "a file": ({"data.train": "x.tsv"}, "there is no such file"),
    "a form": ({"data.form": "xls"}, "form is 'xls'"),
    "nothing to measure on": (
        {"data.eval": None, "best_metric": "accuracy"},
        "best_metric is there, but no data.eval",
    ),
    "a folder": ({"teacher": "nowhere"}, "teacher: there is no folder 'nowhere'"),
    "weights of one teacher": (
        {"teacher_weights": [1, 2]},
        "teacher_weights has 2 numbers for 1 teachers",
    ),
    "weights of nothing": (
        {"teacher_weights": [0]},
        "teacher_weights is [0]: expected a list of numbers of 0 or more, one at",
    ),
    "several teachers": ({"teacher": ["a", "b"]}, "no intermediate_matches go with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_the_way_out(name, tiny):
    changes, expected = WRONG[name]
    settings = [(k, v) for k, v in changes.items() if "." in k]
    told = problems(tiny() | {k: v for k, v in changes.items() if "." not in k}, settings)
    assert expected in told


def test_all_is_told_at_once(tiny):
    wrong = {"task": "x", "optimizer": "y", "num_steps": -1, "metrics": "z", "training": {"w": 1}}
    assert problems(tiny() | wrong).startswith("the recipe has 5 problems:\n  - task is 'x'")


def test_words_of_other_tasks_are_refused(tiny):
    told = problems(tiny("question-answering"), [("data.text", "q"), ("data.labels", ["a"])])
    assert "data.text: questions have the columns question, context and answers" in told
    assert "data.labels" in told
    told = problems(tiny("token-classification"), [("data.text", ["a", "b"])])
    assert "expected one column, of lists of words" in told


def test_a_file_that_is_no_toml_is_named_with_the_line(tmp_path):
    (tmp_path / "r.toml").write_text("task = \n")
    with pytest.raises(UnreadableFileError, match=r"r\.toml: is not TOML: .*line 1"):
        read_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("task", TASKS)
def test_the_template_is_a_recipe_but_for_its_files(task, tmp_path):
    (tmp_path / "r.toml").write_text(template(task))
    told = problems(str(tmp_path / "r.toml"))
    assert told.count("\n  - ") == 3 and "no folder 'out/teacher/student'" in told
    assert told.count("there is no such file") == 2
    (tmp_path / "t.toml").write_text(template(task, teacher=True))
    told = problems(str(tmp_path / "t.toml"))
    assert told.count("\n  - ") == 3 and "student: there is no folder 'pretrained'" in told
    with pytest.raises(ValueError, match="no task 'tagging'"):
        template("tagging")


def test_a_folder_without_a_tokenizer_is_named(tiny, tmp_path):
    values = tiny()
    (tmp_path / "teacher" / "tokenizer.json").unlink()
    assert "has no tokenizer.json and no vocab.txt" in problems(values)
    write_tokenizer(tmp_path / "apart")
    apart = str(tmp_path / "apart")
    assert read_recipe(values, [("data.tokenizer", apart)]).data.tokenizer == apart
    assert "data.tokenizer: there is no folder" in problems(values, [("data.tokenizer", "x")])


@pytest.mark.torch  # huggingface_hub comes with transformers
def test_a_model_of_the_hub_is_found_in_its_cache(tiny, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--some-one--bert"
    commit = "0" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    write_model(place / "snapshots" / commit, "sequence-classification")
    recipe = read_recipe(tiny(teacher="some-one/bert"))
    assert recipe.teacher == ("some-one/bert",)
    assert folders.on_disk("some-one/bert") == str(place / "snapshots" / commit)
    with pytest.raises(
        ValueError, match=r"no-one/bert cannot be fetched from the Hugging Face Hub"
    ):
        folders.on_disk("no-one/bert")


def test_names_of_the_hub_are_known_by_their_shape(monkeypatch):
    assert folders.is_hub_name("google-bert/bert-base-cased")
    assert not folders.is_hub_name("teacher") and not folders.is_hub_name("a/b/c")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    told = folders.folder_problem("google-bert/bert-base-cased")
    assert "pip install 'jaxbrewer[hub]'" in told
