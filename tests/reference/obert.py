"""oBERT in plain NumPy, block by block and weight by weight: an explicit Fisher matrix, inverted."""

import numpy as np


def explicit(gradients, damping, block):
    """The inverse of each block (list of square arrays) of ``damping I + mean g g^T``; gradients (m, D)."""
    found = []
    for start in range(0, gradients.shape[1], block):
        g = gradients[:, start : start + block]
        found.append(np.linalg.inv(damping * np.eye(g.shape[1]) + g.T @ g / len(g)))
    return found


def saliency(weights, inverses, run=1):
    """What each run of neighbors costs."""
    found, start = [], 0
    for inverse in inverses:
        for at in range(0, len(inverse), run):
            w = weights[start + at : start + at + run]
            found.append(0.5 * w @ np.linalg.inv(inverse[at : at + run, at : at + run]) @ w)
        start += len(inverse)
    return np.array(found)


def added_up(weights, pruned, inverses):
    """The source's update: one weight's correction after another, added up, zeros set at the end."""
    found, start = weights.copy(), 0
    for inverse in inverses:
        for at in range(len(inverse)):
            if pruned[start + at]:
                found[start : start + len(inverse)] -= weights[start + at] / inverse[at, at] * inverse[:, at]
        start += len(inverse)
    found[pruned] = 0
    return found
