"""Dividing clips by chance or by group: shares and folds, every class alike, or groups such as subjects kept whole."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
SEED = 20180301  # of divisions: the same for every seed of training, so that runs are compared on the same clips


def stratified_share(labels: Labels, share: float) -> npt.NDArray[np.bool_]:
    """Which clips make up this share of every class, (N,) bool: at least one clip of each class that has two, never all of them."""
    rng, chosen = np.random.default_rng(SEED), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        chosen[of_class[:count]] = True
    return chosen


def stratified_folds(labels: Labels, folds: int) -> Labels:
    """The fold of each clip, (N,) in 0..folds - 1: sizes differ by at most one, over all clips and within each class."""
    rng, fold_of = np.random.default_rng(SEED), np.zeros(len(labels), np.int64)
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)])
    fold_of[order] = np.arange(len(order)) % folds  # dealt like cards, class after class
    return fold_of


def group_folds(groups: npt.NDArray[np.str_], folds: int) -> Labels:
    """The fold of each clip where a group is never divided: large groups first, each to the fold with fewest clips so far.

    With as many folds as groups, each fold is one group. Raises `ValueError` when there are fewer groups than folds.
    """
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < folds:
        raise ValueError(f"{folds} folds of {len(names)} groups ({', '.join(names.tolist())}): give at most as many folds")
    filled, fold_of_name = np.zeros(folds, np.int64), dict[str, int]()
    for i in np.argsort(-sizes, kind="stable"):
        fold = int(filled.argmin())
        fold_of_name[str(names[i])] = fold
        filled[fold] += sizes[i]
    return np.array([fold_of_name[str(name)] for name in groups], np.int64)
