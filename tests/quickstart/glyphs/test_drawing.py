"""Fonts, bitmaps and what is drawn of them."""

import pytest
import torch
from torch import Generator

from linlora.quickstart.glyphs.drawing import PAPERS, plain, printed, warped
from linlora.quickstart.glyphs.fonts import CANVAS, TEST_FACES, TRAINING_FACES, Characters, bitmaps, faces_with
from linlora.quickstart.glyphs.letters import ALIKE, appearance, distinct
from linlora.quickstart.glyphs.scripts import SCRIPTS, draw


def test_no_face_is_for_training_and_for_the_test():
    assert not set(TRAINING_FACES) & set(TEST_FACES)


def test_ink_is_centred_and_three_quarters_of_the_canvas():
    [drawn] = bitmaps("H", ["DejaVuSans"])
    rows, columns = drawn.any(1).nonzero().flatten(), drawn.any(0).nonzero().flatten()
    assert len(rows) == 0.75 * CANVAS
    assert rows[0] == CANVAS - 1 - rows[-1]
    assert abs(int(columns[0]) - (CANVAS - 1 - int(columns[-1]))) <= 1


def test_a_face_without_the_glyph_is_refused_by_name():
    with pytest.raises(ValueError, match=r"cmr10 has no glyph for 'ა' \(U\+10D0\)"):
        bitmaps("ა", ["cmr10"])


def test_computer_modern_is_used_for_letters_and_digits_alone():
    assert "cmr10" in faces_with("a", TRAINING_FACES)
    assert "cmr10" not in faces_with("<", TRAINING_FACES)


def test_characters_are_drawn_in_all_their_faces_and_no_others():
    characters = Characters("אა", TRAINING_FACES)
    own = bitmaps("ა", faces_with("ა", TRAINING_FACES))
    drawn = characters.draw(torch.ones(200, dtype=torch.int64), Generator().manual_seed(0))
    assert set(map(bytes, drawn.flatten(1).numpy())) == set(map(bytes, own.flatten(1).numpy()))


def test_a_warp_keeps_the_ink_and_moves_it():
    bitmap = bitmaps("H", ["DejaVuSans"]).expand(50, -1, -1)
    images = warped(bitmap, Generator().manual_seed(0))
    ink = images.flatten(1).mean(1) / (bitmap[0].double().mean() / 255)
    assert images.shape == (50, 1, 16, 16)
    assert (ink > 1 / 1.35).all()
    assert (ink < 1 / 0.7).all()
    assert len(images.unique(dim=0)) == 50


@pytest.mark.parametrize("paper", PAPERS)
def test_a_paper_covers_a_part_of_every_image_and_glyphs_stand_out_of_it(paper):
    blank = torch.zeros(20, CANVAS, CANVAS, dtype=torch.uint8)
    covered = (printed(blank, PAPERS[paper], Generator().manual_seed(0)) > -0.4).double().mean((1, 2, 3))
    assert (covered > 0.2).all()
    assert (covered < 0.65).all()
    glyphs = printed(torch.full_like(blank, 255), PAPERS[paper], Generator().manual_seed(0))
    assert (glyphs[:, :, 4:12, 4:12].mean((1, 2, 3)) > 0.5).all()


def test_images_are_whole_gray_levels():
    images = plain(bitmaps("A", ["DejaVuSans", "STIXGeneral"]), Generator().manual_seed(0))
    levels = (images.double() + 1) * 127.5
    assert images.dtype == torch.float32
    assert (levels - levels.round()).abs().max() < 1e-4
    assert images.min() >= -1
    assert images.max() <= 1


def test_characters_that_look_alike_are_one():
    assert appearance("A") @ appearance("Α") > ALIKE  # Latin and Greek
    assert distinct("AΑBX", unlike="Х") == ["A", "B"]  # Cyrillic Х
    assert distinct("ABX", count=2) == ["A", "B"]


def test_letters_and_papers_are_as_the_rule_draws_them():
    assert draw() == {script.name: (script.letters, script.paper) for script in SCRIPTS if script.paper}
