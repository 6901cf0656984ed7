"""The tasks: balanced, apart, and the same wherever they are drawn."""

import hashlib

import PIL
import pytest
import torch
from PIL import features

from linlora.quickstart.glyphs import Task, contact_sheet, tasks
from linlora.quickstart.glyphs.images import IMAGES

# Of all images of a task, drawn with Pillow 13.0.0 and FreeType 2.14.3; their mean gray level, with any.
DRAWN = {
    "digits": ("23cafe8d5db98a0c", 77.69),
    "arabic": ("ee1d09d45e35c807", 101.78),
    "syllabics": ("a78e6fb9cebb25f3", 86.63),
    "georgian": ("6d05dc70d9d7d5ac", 84.39),
    "hebrew": ("97ac74fe3eb2b996", 102.54),
    "lao": ("f130b4af6f42a5d8", 104.17),
}  # fmt: skip


def test_every_split_has_its_images_and_every_class_in_equal_shares():
    for task in tasks():
        assert len(task.classes) == 10
        for name, split in task.splits.items():
            assert split.images.shape == (IMAGES[name], 1, 16, 16)
            assert split.images.dtype == torch.float32
            assert (split.labels.bincount(minlength=10) - IMAGES[name] / 10).abs().max() <= 3, task.name


def test_no_image_is_in_two_splits():
    for task in tasks():
        images = torch.cat([split.images for split in task.splits.values()])
        assert len(images.unique(dim=0)) == len(images)


@pytest.mark.parametrize("name", DRAWN)
def test_a_task_is_drawn_as_it_was_measured(name):
    [task] = tasks([name])
    levels = ((torch.cat([split.images for split in task.splits.values()]) + 1) * 127.5).round().to(torch.uint8)
    digest, mean = DRAWN[name]
    assert levels.double().mean().item() == pytest.approx(mean, abs=0.5)
    if (PIL.__version__, features.version("freetype2")) == ("13.0.0", "2.14.3"):
        assert hashlib.sha256(levels.numpy().tobytes()).hexdigest()[:16] == digest


def test_tasks_are_chosen_by_name():
    assert [task.name for task in tasks(["lao", "digits"])] == ["digits", "lao"]
    with pytest.raises(ValueError, match="no task 'greek'; choose from digits, arabic"):
        tasks(["lao", "greek"])


def test_a_task_moves_to_a_device_as_a_whole(device):
    [task] = tasks(["hebrew"])
    moved = task.to(device)
    assert isinstance(moved, Task)
    assert {split.images.device.type for split in moved.splits.values()} == {device}
    assert torch.equal(moved.test.first(3).labels.cpu(), task.test.labels[:3])


def test_the_contact_sheet_is_a_picture(tmp_path):
    contact_sheet(tasks(["hebrew", "lao"]), tmp_path / "tasks.png")
    assert PIL.Image.open(tmp_path / "tasks.png").size[0] > 1000
