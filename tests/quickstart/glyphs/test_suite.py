"""The glyphs as data of an experiment."""

import torch

from linlora.experiments.image_suite import features
from linlora.quickstart.glyphs import Glyphs, head, network, tasks


@torch.no_grad()
def test_the_suite_is_the_network_with_the_images_and_head_of_each_task(tmp_path):
    data = Glyphs(("lao", "georgian"))
    suite = data.open(tmp_path)
    assert data.names == tuple(suite.splits) == tuple(suite.heads) == ("georgian", "lao")
    for task in tasks(data.names):
        images = suite.splits[task.name]["test"].images
        assert torch.equal(images, task.test.images)
        scores = suite.heads[task.name](features(suite.network, images[:5]))
        torch.testing.assert_close(scores, head(task)(network()(task.test.images[:5])))
    assert all(0.3 < accuracy < 0.6 for accuracy in suite.scores(suite.network, "validation"))


def test_nothing_has_to_be_prepared(tmp_path):
    assert Glyphs().files == ()
    Glyphs().prepare(tmp_path / "backbone", "cpu")
    assert not list(tmp_path.iterdir())


def test_equal_data_are_equal_settings():
    assert Glyphs(("lao",)) == Glyphs(("lao",))
    assert hash(Glyphs()) != hash(Glyphs(("lao",)))
