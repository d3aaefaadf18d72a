"""The linear assignment problem: who gets which place, so that the sum of what each gains there is the largest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def best_assignment(gains: Tensor) -> Tensor:
    """The place of everyone, (n,) int64, all different, with the largest sum of `gains`, (n, n): [who, place].

    By shortest augmenting paths, O(n³) at worst and far less as a rule; on the CPU, in float64.

    Jonker & Volgenant, 1987, https://doi.org/10.1007/BF02278710; Crouse, 2016, https://doi.org/10.1109/TAES.2016.140952.
    """
    costs = -gains.detach().double().cpu().numpy()
    count = len(costs)
    of_row, of_column = np.zeros(count), costs.min(axis=0)
    place, owner = np.full(count, -1), np.full(count, -1)
    for row in range(count):
        shortest, came = np.full(count, np.inf), np.full(count, -1)
        done = np.zeros(count, dtype=bool)
        at, length, rows = row, 0.0, [row]
        while True:
            reach = length + costs[at] - of_row[at] - of_column
            nearer = ~done & (reach < shortest)
            shortest[nearer], came[nearer] = reach[nearer], at
            column = int(np.where(done, np.inf, shortest).argmin())
            length = shortest[column]
            done[column] = True
            if owner[column] < 0:
                break
            at = owner[column]
            rows.append(at)
        # Prices stay below every cost, and equal to it along what is assigned.
        of_row[row] += length
        others = np.array(rows[1:], dtype=int)
        of_row[others] += length - shortest[place[others]]
        of_column[done] -= length - shortest[done]
        while True:
            at = came[column]
            owner[column] = at
            place[at], column = column, place[at]
            if at == row:
                break
    return torch.from_numpy(place).to(gains.device)
