"""Classifiers on frozen features, and what they are measured by. Nothing here knows files.

1. `linear_scores`: logistic regression with an L2 penalty, by L-BFGS. The penalty is chosen by a cross-validation
   within the training volumes.
2. `neighbour_scores`: the nearest neighbours by cosine similarity vote.
3. `auc` and `balanced_accuracy`, of the volumes and of bootstrap samples of them at once.

Features are standardised by the training volumes. In both classifiers all classes count alike, however many volumes
they have.

Letters: N volumes, E features, R training volumes, C classes, W sets of weights (bootstrap samples).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import optimize

PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)
"""Penalties that are tried, from strong to weak, relative to the mean loss of a volume."""
SEARCH = {"maxiter": 300, "ftol": 1e-8}
"""When L-BFGS ends."""
USUAL = 0.1
"""Penalty where there are too few volumes to choose it."""
INNER_FOLDS = 3
"""Folds of the choice; each class needs as many volumes."""
TEMPERATURE = 0.07
"""A neighbour's vote is exp(similarity / this), as is usual for features of self-supervised models."""
SMALLEST = 1e-6
"""Least standard deviation to divide by: constant features become 0."""


def standardised(train_RE: np.ndarray, test_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both with the mean and the standard deviation of the training volumes removed."""
    mean_E, spread_E = train_RE.mean(axis=0), np.maximum(train_RE.std(axis=0), SMALLEST)
    return (train_RE - mean_E) / spread_E, (test_NE - mean_E) / spread_E


def linear_scores(
    train_RE: np.ndarray, label_R: np.ndarray, test_NE: np.ndarray, classes: int, penalty: float
) -> np.ndarray:
    """Return log probabilities (N,C) of the test volumes by logistic regression.

    Args:
        train_RE: Features to train on.
        label_R: Their classes, each at least once.
        test_NE: Features to classify.
        classes: Number of classes.
        penalty: See `chosen_penalty`.
    """
    train, test = standardised(train_RE, test_NE)
    return _log_probabilities(test, next(_fits(train, label_R, classes, (penalty,))))


def chosen_penalty(train_RE: np.ndarray, label_R: np.ndarray, classes: int, rng: np.random.Generator) -> float:
    """Choose the penalty of the least log loss in a cross-validation; `USUAL` if a class has too few volumes.

    Arguments as in `linear_scores`; rng draws the folds.
    """
    if np.bincount(label_R, minlength=classes).min() < INNER_FOLDS:
        return USUAL
    fold_R = stratified_folds(label_R, np.arange(len(label_R)), INNER_FOLDS, rng)
    losses = np.zeros(len(PENALTIES))
    for fold in range(INNER_FOLDS):
        inner, outer = standardised(train_RE[fold_R != fold], train_RE[fold_R == fold])
        truth_R = label_R[fold_R == fold]
        weight_R = _class_weights(truth_R, classes)
        for place, weights in enumerate(_fits(inner, label_R[fold_R != fold], classes, PENALTIES)):
            log_RC = _log_probabilities(outer, weights)
            losses[place] -= (weight_R * log_RC[np.arange(len(log_RC)), truth_R]).sum()
    return PENALTIES[int(np.argmin(losses))]


def _class_weights(label_R: np.ndarray, classes: int) -> np.ndarray:
    """Weights that sum to 1, with the same sum in every class that occurs."""
    count_C = np.bincount(label_R, minlength=classes)
    weight_R: np.ndarray = 1 / (count_C[label_R] * np.count_nonzero(count_C))
    return weight_R


def _fits(
    train_RE: np.ndarray, label_R: np.ndarray, classes: int, penalties: tuple[float, ...]
) -> Iterator[np.ndarray]:
    """Weights (E+1,C) of each penalty in turn, the last row the offsets, which are not penalised."""
    # With a penalty the weights lie in the span of the volumes: few volumes of many features are cheap.
    basis_KE = None
    if len(train_RE) < train_RE.shape[1]:
        left, sizes, basis_KE = np.linalg.svd(train_RE, full_matrices=False)
        train_RE = left * sizes
    held = np.column_stack([train_RE, np.ones(len(train_RE))])
    truth_RC = np.eye(classes)[label_R]
    weight_R1 = _class_weights(label_R, classes)[:, None]
    found = np.zeros(held.shape[1] * classes)
    for penalty in penalties:
        # Each search starts from the weights of the stronger penalty before it.
        found = optimize.minimize(
            _loss, found, (held, truth_RC, weight_R1, penalty), method="L-BFGS-B", jac=True, options=SEARCH
        ).x
        weights = found.reshape(-1, classes)
        yield weights if basis_KE is None else np.vstack([basis_KE.T @ weights[:-1], weights[-1:]])


def _loss(
    flat: np.ndarray, held_RE: np.ndarray, truth_RC: np.ndarray, weight_R1: np.ndarray, penalty: float
) -> tuple[float, np.ndarray]:
    """The penalised mean log loss, and its gradient."""
    weights = flat.reshape(held_RE.shape[1], -1)
    log_RC = _log_softmax(held_RE @ weights)
    slope = held_RE.T @ (weight_R1 * (np.exp(log_RC) - truth_RC))
    slope[:-1] += penalty * weights[:-1]
    return float(-(weight_R1 * truth_RC * log_RC).sum() + penalty / 2 * (weights[:-1] ** 2).sum()), slope.ravel()


def _log_probabilities(features_NE: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _log_softmax(features_NE @ weights[:-1] + weights[-1])


def _log_softmax(logit_NC: np.ndarray) -> np.ndarray:
    # Several times faster than scipy's, which takes most of the time of a small fit.
    logit_NC = logit_NC - logit_NC.max(axis=1, keepdims=True)
    log_NC: np.ndarray = logit_NC - np.log(np.exp(logit_NC).sum(axis=1, keepdims=True))
    return log_NC


def neighbour_scores(
    train_RE: np.ndarray, label_R: np.ndarray, test_NE: np.ndarray, classes: int, count: int
) -> np.ndarray:
    """Return the votes (N,C) of the `count` nearest training volumes, or of all if there are fewer. Args as above."""
    train, test = (_unit(array) for array in standardised(train_RE, test_NE))
    near_NR = test @ train.T
    count = min(count, len(train))
    chosen_NK = np.argpartition(-near_NR, count - 1, axis=1)[:, :count]
    vote_NK = np.exp(np.take_along_axis(near_NR, chosen_NK, axis=1) / TEMPERATURE)
    vote_NK = vote_NK * _class_weights(label_R, classes)[chosen_NK]
    votes_NC: np.ndarray = np.einsum("nk,nkc->nc", vote_NK, np.eye(classes)[label_R[chosen_NK]])
    votes_NC /= votes_NC.sum(axis=1, keepdims=True)
    return votes_NC


def _unit(array_NE: np.ndarray) -> np.ndarray:
    unit_NE: np.ndarray = array_NE / np.maximum(np.linalg.norm(array_NE, axis=1, keepdims=True), SMALLEST)
    return unit_NE


def stratified_folds(label_N: np.ndarray, group_N: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Deal groups to folds so that each class is spread over all of them; return the fold of each volume, (N,).

    A group counts as the class of its first volume.
    """
    groups, first, which_N = np.unique(group_N, return_index=True, return_inverse=True)
    order = rng.permutation(len(groups))
    order = order[np.argsort(label_N[first][order], kind="stable")]
    fold_G = np.empty(len(groups), np.int64)
    fold_G[order] = np.arange(len(groups)) % folds
    fold_N: np.ndarray = fold_G[which_N.reshape(-1)]
    return fold_N


def auc(score_N: np.ndarray, positive_N: np.ndarray, fold_N: np.ndarray, weight_WN: np.ndarray) -> np.ndarray:
    """Area under the ROC curve, (W,): the share of pairs of a positive and a negative volume that are in order.

    Only pairs within a fold are compared, as each fold has a classifier of its own: compared across folds, features
    without information would score below 0.5. NaN if there is no pair.

    Args:
        score_N: Higher is more positive; equal scores count half.
        positive_N: bool.
        fold_N: Fold in which each volume was tested.
        weight_WN: How often each volume counts.
    """
    right, pairs = np.zeros(len(weight_WN)), np.zeros(len(weight_WN))
    for fold in np.unique(fold_N):
        mine = fold_N == fold
        negative, positive = mine & ~positive_N, mine & positive_N
        order = np.argsort(score_N[negative], kind="stable")
        below = np.zeros((len(weight_WN), len(order) + 1))
        np.cumsum(weight_WN[:, negative][:, order], axis=1, out=below[:, 1:])
        ordered = score_N[negative][order]
        low, high = (np.searchsorted(ordered, score_N[positive], side) for side in ("left", "right"))
        right += (weight_WN[:, positive] * (below[:, low] + below[:, high]) / 2).sum(axis=1)
        pairs += weight_WN[:, positive].sum(axis=1) * below[:, -1]
    share_W = np.full(len(pairs), np.nan)
    np.divide(right, pairs, out=share_W, where=pairs > 0)
    return share_W


def balanced_accuracy(score_NC: np.ndarray, label_N: np.ndarray, weight_WN: np.ndarray) -> np.ndarray:
    """Mean over the classes of the share of their volumes that are recognised, (W,). Arguments as in `auc`."""
    truth_NC = np.eye(score_NC.shape[1])[label_N]
    hit_N1 = (score_NC.argmax(axis=1) == label_N)[:, None]
    held_WC, right_WC = weight_WN @ truth_NC, weight_WN @ (truth_NC * hit_N1)
    recall_WC = np.divide(right_WC, held_WC, out=np.zeros(held_WC.shape), where=held_WC > 0)
    mean_W: np.ndarray = recall_WC.sum(axis=1) / np.maximum((held_WC > 0).sum(axis=1), 1)
    return mean_W
