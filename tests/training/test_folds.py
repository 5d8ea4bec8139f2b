"""Shares and folds: every clip in one of them, classes alike, groups whole, always the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.folds import group_folds, stratified_folds, stratified_share

LABELS = st.lists(st.integers(0, 4), min_size=4, max_size=60).map(lambda labels: np.array(labels, np.int64))


@settings(deadline=None, max_examples=60)
@given(labels=LABELS, folds=st.integers(2, 4))
def test_stratified_folds_differ_by_at_most_one_clip_overall_and_in_each_class(labels: np.ndarray, folds: int) -> None:
    fold = stratified_folds(labels, folds)
    for chosen in (np.ones(len(labels), bool), *(labels == label for label in np.unique(labels))):
        counts = np.bincount(fold[chosen], minlength=folds)
        assert len(counts) == folds
        assert counts.max() - counts.min() <= 1
    assert np.array_equal(fold, stratified_folds(labels, folds))


@settings(deadline=None, max_examples=60)
@given(labels=LABELS, share=st.floats(0.01, 0.99))
def test_a_share_takes_from_every_class_and_leaves_some(labels: np.ndarray, share: float) -> None:
    held_out = stratified_share(labels, share)
    for label in np.unique(labels):
        count, taken = (labels == label).sum(), held_out[labels == label].sum()
        assert taken < count
        assert count == 1 or taken >= 1
        assert abs(taken - share * count) <= 1


@settings(deadline=None, max_examples=60)
@given(groups=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60).map(np.array), folds=st.integers(2, 7))
def test_group_folds_keep_groups_whole_and_use_every_fold(groups: np.ndarray, folds: int) -> None:
    names = set(groups.tolist())
    if len(names) < folds:
        with pytest.raises(ValueError, match=f"{folds} folds of {len(names)} groups"):
            group_folds(groups, folds)
        return
    fold = group_folds(groups, folds)
    assert all(len(set(fold[groups == name])) == 1 for name in names)
    assert set(fold.tolist()) == set(range(folds))
    if folds == len(names):
        assert all(len(set(groups[fold == i])) == 1 for i in range(folds))  # leave one group out


def test_group_folds_are_of_similar_size() -> None:
    groups = np.repeat(list("abcdef"), [30, 20, 10, 10, 10, 10])
    assert sorted(np.bincount(group_folds(groups, 3)).tolist()) == [30, 30, 30]
