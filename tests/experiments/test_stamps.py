"""Stamps tell files that have changed, wherever `datasets` finds them, and nothing else."""

import pytest
from PIL import Image

from linlora.experiments.stamps import stamps
from linlora.training import Data, Settings


@pytest.mark.parametrize("place", ["train.csv", "data/train.csv"])
def test_rows_of_a_folder_that_change_are_told_from_what_lies_beside_them(tmp_path, place):
    task = Settings("model", "classification", Data(str(tmp_path), validation=0.5, text=("text",)))
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("text,label\ngood,1\nbad,0\n")
    before = stamps(task)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.log").write_text("0.5")
    assert stamps(task) == before
    (tmp_path / place).write_text("text,label\ngood,1\nbad,1\nso-so,0\n")
    assert stamps(task) != before


def test_images_of_a_folder_that_change_are_told(tmp_path):
    task = Settings("model", "zero-shot", Data(str(tmp_path), validation=0.5, image="image"))
    for colour in ("red", "blue"):
        (tmp_path / "train" / colour).mkdir(parents=True)
        Image.new("RGB", (4, 4), colour).save(tmp_path / "train" / colour / "0.png")
    before = stamps(task)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "train" / "red" / "0.png")
    assert stamps(task) != before
