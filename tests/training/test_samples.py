import numpy as np

from unialign_jax.training.samples import draw_sheet


def flat(color, size=32):
    return np.broadcast_to(np.array(color, np.uint8), (size, size, 3))


def test_sheet_shows_every_picture_of_every_card():
    colors = [(200, 10 * i, 30) for i in range(6)]
    cards = [(f"prompt {i}", [("real", flat(colors[2 * i])), ("generated", flat(colors[2 * i + 1]))]) for i in range(3)]
    sheet = np.asarray(draw_sheet(cards, columns=2, smallest=64))
    found = {tuple(c): np.argwhere((sheet == c).all(-1)) for c in colors}
    for color, places in found.items():
        assert len(places) == 64 * 64, color  # enlarged to 64 pixels, nothing drawn over it
    corner = [tuple(places.min(axis=0)) for places in found.values()]
    assert corner[0][0] == corner[1][0] and corner[0][1] < corner[1][1]  # real left of generated
    assert corner[2][0] == corner[0][0] and corner[2][1] > corner[1][1]  # the second card beside the first
    assert corner[4][0] > corner[0][0] and corner[4][1] == corner[0][1]  # the third below
    assert (sheet[: corner[0][0], : corner[1][1]] == 0).all(-1).any()  # black ink above: the prompt


def test_long_prompts_are_wrapped_not_cut_off_at_the_side():
    short = draw_sheet([("a", [("real", flat((1, 2, 3)))])], columns=1)
    long = draw_sheet([("many words " * 12, [("real", flat((1, 2, 3)))])], columns=1)
    assert long.width == short.width and long.height > short.height
