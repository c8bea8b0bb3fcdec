"""Wrong labels are found by a classifier that did not see them; right ones are left alone."""

from __future__ import annotations

import random

import pytest
import torch

from deal_core.selection.label_noise import MAX_SHARE, MIN_SKILL, suspected_labels

NAMES = ("a", "b", "c")


def clusters(num_rows: int, distance: float) -> tuple[torch.Tensor, list[str]]:
    """Features of three labels around three centres."""
    generator = torch.Generator().manual_seed(0)
    kinds = [row % 3 for row in range(num_rows)]
    centres_3D = distance * torch.eye(3, 8)
    return centres_3D[kinds] + torch.randn(num_rows, 8, generator=generator), [NAMES[kind] for kind in kinds]


def test_swapped_labels_are_found_with_their_likelier_label():
    features_ND, right = clusters(150, distance=6)
    swapped = {7: "a", 30: "c", 77: "b", 100: "c"}
    assert all(right[row] != label for row, label in swapped.items())
    given = [swapped.get(row, label) for row, label in enumerate(right)]
    found = suspected_labels(features_ND, given, seed=0)
    assert {each.row for each in found.suspects} == set(swapped) and found.num_checked == 150
    assert all(each.label == swapped[each.row] and each.likelier == right[each.row] for each in found.suspects)
    shares = [each.share for each in found.suspects]
    assert shares == sorted(shares) and shares[-1] <= MAX_SHARE
    assert found.agreement == pytest.approx(146 / 150)
    assert "4 of 150 labels that were checked are probably wrong" in found.describe()
    assert not suspected_labels(features_ND, right, seed=0).suspects


def test_of_a_third_of_wrong_labels_some_are_named_and_few_right_ones():
    """A label that every seventh row of a kind has by mistake is not rare enough to be named each time."""
    features_ND, right = clusters(300, distance=6)
    generator = random.Random(0)
    given = [
        generator.choice([n for n in NAMES if n != label]) if generator.random() < 0.3 else label for label in right
    ]
    is_wrong = [one != other for one, other in zip(given, right, strict=True)]
    found = suspected_labels(features_ND, given, seed=0).suspects
    assert len(found) >= 0.1 * sum(is_wrong) and sum(is_wrong[each.row] for each in found) >= 0.9 * len(found)


def test_features_that_say_little_condemn_no_row():
    features_ND, labels = clusters(300, distance=0.4)
    found = suspected_labels(features_ND, labels, seed=0)
    assert not found.suspects and 0 < found.skill < MIN_SKILL and "no label could be checked" in found.describe()


def test_a_rare_label_is_not_condemned_for_being_rare():
    features_ND, labels = clusters(300, distance=6)
    for row in range(0, 300, 25):
        labels[row] = "rare"
        features_ND[row, 3] = 1.0
    found = suspected_labels(features_ND, labels, seed=0)
    assert sum(each.label == "rare" for each in found.suspects) <= 4


def test_labels_with_too_few_rows_are_not_checked():
    features_ND, labels = clusters(60, distance=6)
    labels[:3] = ["rare"] * 3
    found = suspected_labels(features_ND, labels, seed=0)
    assert found.num_checked == 57 and not {0, 1, 2} & {each.row for each in found.suspects}
    one_label = suspected_labels(features_ND[:6], ["a"] * 6, seed=0)
    assert one_label.num_checked == 0 and not one_label.suspects
