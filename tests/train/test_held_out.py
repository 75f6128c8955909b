"""What is held out: the same whatever the order and the processes; and the recall that chooses."""

import torch

from train.held_out import HeldOut, Replies, document_replies, first, pair_replies


def states(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_the_items_with_the_smallest_hashes_stay_whatever_the_order():
    names = [f"pair {i}" for i in range(3000)]
    kept = []
    for order in (names, names[::-1]):
        held, surplus = HeldOut(size=50), []
        for name in order:
            number = held.number(name)
            if number is not None:
                held.add(number, {"name": name})
                surplus += held.surplus(slack=20)
        surplus += held.surplus()
        kept.append([row["name"] for row in held.rows()])
        # One in ten of 3,000, of which 50 stay and the others come back to be fitted.
        assert len(kept[-1]) == 50 and 150 < len(surplus) < 350
        assert not {row["name"] for row in surplus} & set(kept[-1])
    assert kept[0] == kept[1]


def test_recall_counts_texts_and_the_images_that_are_shown():
    # Queries ask for image i and text i; the map is the identity.
    eye = torch.eye(3)
    everything = torch.ones(3, dtype=torch.bool)
    same = lambda rows: rows  # noqa: E731
    sure = Replies(eye, eye * 0.5 + 0.1, {"pooled": eye}, everything, everything)
    assert sure.recall(same, same, "pooled") == 1
    # A second text that scores above every image hides it, however well it ranks among images.
    hidden = Replies(eye, eye * 0.1 + 0.9, {"pooled": eye - 0.8}, everything, everything)
    assert hidden.recall(same, same, "pooled") == 0.5
    # Without a text every image counts as shown.
    alone = Replies(eye, eye, {"pooled": eye - 0.8}, ~everything, everything)
    assert alone.recall(same, same, "pooled") == 1
    # A reply without an image is judged by its words, and its zero row is in no pool.
    one = torch.tensor([True, False, False])
    mixed = Replies(eye, eye * 0.5 + 0.1, {"pooled": eye * one[:, None]}, everything, one)
    assert mixed.recall(same, same, "pooled") == 1
    assert mixed.image_recall(same, "pooled") == 1


def test_ties_are_misses():
    assert first(torch.eye(4)).all() and not first(torch.ones(4, 4)).any()
    assert first(torch.eye(4)[[0, 2, 1, 3]]).tolist() == [True, False, False, True]


def test_pairs_and_documents_become_replies():
    held = HeldOut()
    image = {"pooled": states([1, 0]), "projected": states([0, 1])}
    held.add(2, {"state": states([1, 2], [3, 4], [5, 6]), "pooled": states([7, 8]).repeat(3, 1),
                 "projected": states([9, 9]).repeat(3, 1)})  # fmt: skip
    held.add(1, {"state": states([0, 1]), **image})
    replies = pair_replies(held.rows())
    assert replies.queries.tolist() == [[0, 1], [1, 2]]  # by their hash
    assert replies.has_text.tolist() == [False, True] and replies.texts.tolist() == [[0, 0], [3, 4]]
    assert replies.images["pooled"].tolist() == [[1, 0], [7, 8]] and replies.has_image.all()

    held = HeldOut()
    held.add(1, {"state": states(1, 2), "reply": states(3, 4)})
    held.add(2, {"state": states(5, 6), "pooled": states(7, 8), "projected": states(9, 9)})
    replies = document_replies(held.rows())
    assert replies.has_text.tolist() == [True, False] and replies.has_image.tolist() == [False, True]
    assert replies.images["pooled"].tolist() == [[0, 0], [7, 8]]
    assert pair_replies([]) is None
