"""Visual tokens in closed form: which words they come to hold, and that an image gives its own words back."""

import pytest
import torch

from train.visual_words import rarest, visual_words

KINDS, EACH, FILLERS = 3, 6, 4


def world(m=1500, seed=0):
    """Captions of one word of each of three kinds, in two orders among words that say nothing; images of the three."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.Generator().manual_seed(9)
    table = torch.randn(KINDS * EACH + FILLERS, 24, generator=mix) + 1
    mixing = torch.randn(KINDS * EACH, 20, generator=mix)
    of_kind = torch.randint(EACH, (m, KINDS), generator=rng) + torch.arange(KINDS) * EACH
    features = mixing[of_kind].sum(1) + 0.1 * torch.randn(m, 20, generator=rng) + 5
    captions = []
    for words in of_kind.tolist():
        a, b, c = (torch.randint(FILLERS, (3,), generator=rng) + KINDS * EACH).tolist()
        x, y, z = words
        captions.append([a, x, b, y, c, z] if torch.rand((), generator=rng) < 0.5 else [z, a, b, x, y, c])
    return features, captions, table, of_kind


def held_by(weight, bias, features, table):
    """The nearest word `(m, n)` to each visual token."""
    tokens = (features @ weight.T + bias).view(len(features), -1, table.shape[1])
    return torch.cdist(tokens, table.expand(len(features), -1, -1)).argmin(-1)


def test_each_token_holds_a_kind_and_new_images_give_their_words():
    features, captions, table, _ = world()
    new, _, _, of_kind = world(m=300, seed=1)
    shares = {}
    for rounds in (0, 8):
        weight, bias = visual_words(features, captions, table, KINDS, rounds=rounds)
        assert weight.shape == (KINDS * 24, 20) and bias.shape == (KINDS * 24,) and weight.dtype == torch.float32
        read = held_by(weight, bias, new, table)
        kinds = [row.bincount(minlength=KINDS + 1).max() / len(new) for row in (read // EACH).T]
        right = (of_kind[:, :, None] == read[:, None, :]).any(-1).float().mean()
        shares[rounds] = (min(kinds), right)
    assert shares[8][0] > 0.95 and shares[8][1] > 0.9
    assert shares[0][1] < 0.9  # the rarest words in their order alone do not


def test_it_is_the_ridge_regression_of_the_words_held():
    features, _, table, of_kind = world(m=200)
    ordered = of_kind.tolist()  # one word a kind, always in order: nothing to share out
    weight, bias = visual_words(features, ordered, table, KINDS, ridge=0.0, rounds=0)
    x = torch.cat([features, torch.ones(200, 1)], 1).double()
    expected = torch.linalg.lstsq(x, table[of_kind].flatten(1).double()).solution
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1).T.double(), expected, atol=1e-4, rtol=1e-3)


def test_the_rarest_words_stand_in_the_captions_order_and_short_captions_repeat_theirs():
    captions = [[7, 1, 8, 1], [1, 9], [1, 7]]
    assert rarest(captions, 2).tolist() == [[7, 8], [1, 9], [1, 7]]
    assert rarest(captions, 3)[1].tolist() == [1, 9, 9]
    features, _, table, _ = world(m=3)
    weight, _ = visual_words(features, captions, table, 4)
    assert torch.isfinite(weight).all()


def test_what_cannot_be_solved_is_refused():
    features, captions, table, _ = world(m=5)
    with pytest.raises(ValueError, match="at least one token"):
        visual_words(features, [*captions[:4], []], table, 2)
    with pytest.raises(ValueError, match="the image's feature does not vary"):
        visual_words(features[:1].expand(5, -1), captions, table, 2)
