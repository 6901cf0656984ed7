"""Rows from files of every format, folders of images and slices, and labels from their columns."""

import json
from pathlib import Path

import pytest
import transformers
from datasets import ClassLabel, Dataset

from linlora.training import Data, load_task
from linlora.training.data import has_test, load_split, notes_on_sharing
from linlora.training.labels import classes_of, is_number

ROWS = [{"text": f"the film is {mood}", "label": i % 2} for i, mood in enumerate(["bad", "good"] * 6)]
SPLITS = ("train", "validation", "test")


def write(path):
    rows = Dataset.from_list(ROWS)
    if path.suffix == ".parquet":
        rows.to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        rows.to_csv(str(path), sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_of_a_file_gives_the_same_rows(tmp_path, ending):
    data = Data(write(tmp_path / f"rows.{ending}"), validation=3)
    rows = [row for split in ("train", "validation") for row in load_split(data, split, ["text", "label"])]
    assert sorted(rows, key=str) == sorted(ROWS, key=str)


def test_a_folder_has_the_splits_its_files_are_named_by(review_files):
    data = Data(review_files, test="test")
    assert [len(load_split(data, split, ["text", "label"])) for split in SPLITS] == [48, 16, 16]


def test_a_test_split_that_is_found_is_used(tmp_path, review_files, image_folder):
    assert len(load_split(Data(review_files), "test", ["text"])) == 16
    assert len(load_split(Data(image_folder, image="image"), "test", ["image"])) == 12
    for data in (Data(review_files, test=False), Data(f"{review_files}/train.csv"), Data(str(tmp_path / "missing"))):
        assert not has_test(data)


def test_splits_may_be_slices_and_files(tmp_path, review_files):
    other = write(tmp_path / "other.csv")
    data = Data(review_files, train="train[:75%]", validation="train[75%:]", test=other)
    assert [len(load_split(data, split, ["text"])) for split in SPLITS] == [36, 12, 12]


def test_rows_held_out_of_train_are_not_trained_on_and_always_the_same(review_files):
    numbered = Dataset.from_list([{"i": i} for i in range(40)])
    path = f"{review_files}/numbered.parquet"
    numbered.to_parquet(path)
    train, held_out = (load_split(Data(path, validation=0.25), split, ["i"])["i"] for split in ("train", "validation"))
    assert len(held_out) == 10
    assert sorted([*train, *held_out]) == list(range(40))
    assert list(load_split(Data(path, validation=10), "validation", ["i"])["i"]) == list(held_out)


def test_a_folder_of_images_has_a_class_for_each_folder(image_folder):
    rows = load_split(Data(image_folder, image="image"), "train", ["image", "label"])
    assert classes_of(rows, "label").names == ("blue", "red")
    assert rows[0]["image"].size == (12, 10)


def test_what_is_not_there_is_named_with_what_is(tmp_path, review_files, image_folder):
    with pytest.raises(ValueError, match=r"no column 'sentence'; its columns are text, thing, label, word, score"):
        load_split(Data(review_files), "train", ["sentence"])
    with pytest.raises(ValueError, match=r"Unknown split \"dev\". Should be one of \['train', 'validation', 'test'\]"):
        load_split(Data(review_files, validation="dev"), "validation", ["text"])
    with pytest.raises(ValueError, match="there is no test split"):
        load_split(Data(review_files, test=False), "test", ["text"])
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of train, validation, test"):
        load_split(Data(review_files), "dev", ["text"])
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.csv"):
        load_split(Data(str(tmp_path / "missing.csv")), "train", ["text"])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_split(Data(str(tmp_path / "missing")), "train", ["text"])
    with pytest.raises(ValueError, match=r"'train\[:0\]' of .* has no data"):
        load_split(Data(review_files, validation="train[:0]"), "validation", ["text"])
    with pytest.raises(ValueError, match=r"holds out 48 rows, and .* has 48"):
        load_split(Data(review_files, validation=48), "train", ["text"])


@pytest.mark.parametrize(
    ("data", "split", "note"),
    [
        (Data("rows.csv", validation=0.2, test="rows.csv"), "test", "it is the train split, rows.csv"),
        (Data("rows.csv", validation=0.2, test="./rows.csv"), "test", "it is the train split, ./rows.csv"),
        (Data("rows.csv", validation=0.2, test="train"), "test", "it is the train split, 'train' of rows.csv"),
        (Data(train="rows.csv", validation="rows.csv"), "validation", "it is the train split, rows.csv"),
        (Data("rows.csv", validation="dev.csv", test="dev.csv"), "test", "it is the validation split, dev.csv"),
        (Data("org/set", test="validation"), "test", "it is the validation split, 'validation' of org/set"),
        (Data("rows.csv", validation=0.2, test="test.csv"), "test", None),
        (Data("rows.csv", validation=0.2), "validation", None),
        (Data("org/set", validation=0.1, test="validation"), "test", None),
        (Data("org/set", train="train[:80%]", test="train[80%:]"), "test", None),
        (Data("org/set"), "train", None),
    ],
)
def test_a_split_of_the_rows_of_another_says_so(monkeypatch, tmp_path, data, split, note):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "dev.csv", "test.csv"):
        Path(name).write_text("text,label\n")
    notes = notes_on_sharing(data, split)
    assert [found.split(":")[0] for found in notes] == ([note] if note else [])


@pytest.mark.parametrize(
    ("name", "separator", "hint"),
    [
        ("rows.csv", ";", "; the separator looks like ';': save it with commas"),
        ("rows.csv", "\t", r"; the separator looks like '\t': name it .tsv"),
        ("rows.tsv", ",", "; the separator looks like ',': name it .csv"),
        ("rows.tsv", ";", "; the separator looks like ';': save it with commas"),
        ("rows.csv", "|", ""),
    ],
)
def test_a_table_with_another_separator_says_so(tmp_path, name, separator, hint):
    (tmp_path / name).write_text("".join(f"{separator.join(row)}\n" for row in (["text", "label"], ["good", "1"])))
    with pytest.raises(ValueError, match="no column 'text', 'label'") as error:
        load_split(Data(str(tmp_path / name)), "train", ["text", "label"])
    assert str(error.value).partition("columns are ")[2].endswith(f"label{hint}" if separator != "\t" else hint)
    assert ("separator looks" in str(error.value)) == bool(hint)


def test_a_split_that_is_not_there_says_what_to_do(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\ngood,1\nbad,0\n")
    for split, data in (("train", Data(str(path), train="dev")), ("test", Data(str(path), test="test"))):
        with pytest.raises(ValueError, match=r"Should be one of \['train'\]; name one$"):
            load_split(data, split, ["text"])
    with pytest.raises(
        ValueError, match=r"name one, or hold rows out of train: --validation 0.1 \(data.validation: 0.1\)"
    ):
        load_split(Data(str(path)), "validation", ["text"])
    data = Data(str(path), train="train[:50%]", validation="train", test="train[50%:]")  # what `test: 0.5` is told
    assert [load_split(data, split, ["text"])["text"] for split in ("train", "test")] == [["good"], ["bad"]]


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"'train' of .*rows\.csv.* no data"):
        load_split(Data(str(tmp_path / "rows.csv")), "train", ["text"])


@pytest.mark.parametrize("column", ["text", "label"])
def test_empty_cells_are_refused(tmp_path, column):
    """They would be read as the word None."""
    rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no", column: None}]
    Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=rf"column '{column}' of 'train' of .*rows.csv is empty in 1 rows"):
        load_split(Data(str(tmp_path / "rows.csv")), "train", ["text", "label"])


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"text": "a", "label": ')
    with pytest.raises(ValueError, match=r"rows\.json could not be read"):
        load_split(Data(str(path)), "train", ["text"])


def column(values, feature=None):
    rows = Dataset.from_dict({"label": values})
    return rows if feature is None else rows.cast_column("label", feature)


def test_classes_are_named_by_what_the_column_holds():
    assert classes_of(column([1, 0, 2]), "label").names == ("0", "1", "2")
    assert classes_of(column(["b", "a"]), "label").names == ("a", "b")
    assert classes_of(column([0, 1], ClassLabel(names=["no", "yes"])), "label").names == ("no", "yes")
    assert classes_of(column([3, 7]), "label").index(7) == 1
    assert is_number(column([0.5, 2.0]), "label")
    assert not is_number(column([1, 2]), "label")


def test_names_that_are_given_stand_for_the_classes_in_their_order():
    assert classes_of(column([1, 0]), "label", ["no", "yes"]).index(1) == 1
    assert classes_of(column([0, 0]), "label", ["no", "yes"]).index(1) == 1  # a class may be missing in train
    given = classes_of(column(["yes", "no"]), "label", ["yes", "no"])
    assert (given.index("yes"), given.names) == (0, ("yes", "no"))
    with pytest.raises(ValueError, match="3 names were given for the 2 classes"):
        classes_of(column([5, 6]), "label", ["a", "b", "c"])


def test_named_classes_are_numbered_as_in_the_train_split(settings, tmp_path):
    """Files number them each in its own way, by the names that they hold."""
    texts = {"good": ["a", "b", "c"], "bad": ["b", "c"], "poor": ["c", "b", "a"]}
    for path, names in texts.items():
        rows = Dataset.from_dict({"text": names, "label": range(len(names))})
        rows.cast_column("label", ClassLabel(names=names)).to_parquet(tmp_path / f"{path}.parquet")
    files = {split: str(tmp_path / f"{name}.parquet") for split, name in zip(SPLITS, texts, strict=True)}
    for kind, changes in (("text", {}), ("causal", {"answers": (), "prompt": "{text}"})):
        task = load_task(settings(kind, data=Data(**files, text=("text",)), **changes))
        for split, names in zip(SPLITS, texts.values(), strict=True):
            task.check(split)
            assert [task.classes.names[task.expected(row)] for row in task.rows(split)] == names
    task = load_task(settings("text", data=Data(**files | {"train": files["validation"]}, text=("text",))))
    with pytest.raises(ValueError, match=r"the test split, .*poor.parquet: column 'label' holds 'a', which is none of"):
        task.check("test")


@pytest.mark.parametrize("order", [["NEGATIVE", "POSITIVE"], ["POSITIVE", "NEGATIVE"], ["LABEL_0", "LABEL_1"]])
def test_a_frozen_head_is_asked_for_classes_in_its_own_order(settings, checkpoints, tmp_path, review_files, order):
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        checkpoints["bert"], id2label=dict(enumerate(order)), num_labels=2, ignore_mismatched_sizes=True
    )
    base.save_pretrained(tmp_path / "head")
    transformers.AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(tmp_path / "head")
    data = Data(review_files, text=("text",))
    options = {"model": str(tmp_path / "head"), "head": "frozen", "class_names": ("negative", "positive")}
    task = load_task(settings("text", data=data, **options))
    named = order[0] != "LABEL_0"
    for label, name in enumerate(("NEGATIVE", "POSITIVE")):
        assert task.expected({"label": label}) == (order.index(name) if named else label)
    assert f"the head has '{order[0]}', '{order[1]}'" in task.labels_in_words()


def test_labels_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"holds -1, as it does where labels are withheld; choose another split"):
        classes_of(column([0, 1], ClassLabel(names=["no", "yes"])), "label").index(-1)
    with pytest.raises(ValueError, match="holds 'c', which is none of the classes of the train split: 'a', 'b'"):
        classes_of(column(["a", "b"]), "label").index("c")
    with pytest.raises(ValueError, match="holds the one value 'a'"):
        classes_of(column(["a", "a"]), "label")
    with pytest.raises(ValueError, match="is empty in some rows"):
        classes_of(column(["a", None]), "label")
