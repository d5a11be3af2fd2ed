"""Fingerprints of runs, which decide whether a run can be resumed."""

from __future__ import annotations

import numpy as np
import torch
from transformers import BatchEncoding

from symprune_lightning.engine.distributed.communicator import SINGLE_PROCESS
from symprune_lightning.engine.fingerprint import _hash_batches


def test_batches_of_a_tokenizer_are_compared_by_all_their_values():
    """Their repr shows the first and last values only."""

    def hash_of(middle: int, kind) -> str:
        ids = torch.arange(3000).view(1, -1)
        ids[0, 1500] = middle
        return _hash_batches([kind({"input_ids": ids}), [kind({"x": [ids]})]], SINGLE_PROCESS)

    assert hash_of(1, BatchEncoding) == hash_of(1, dict)
    assert hash_of(1, BatchEncoding) != hash_of(2, BatchEncoding)


def test_arrays_are_compared_by_all_their_values():
    arrays = [np.zeros(3000) for _ in range(2)]
    arrays[1][1500] = 1
    first, second = (_hash_batches([{"x": array}], SINGLE_PROCESS) for array in arrays)
    assert first != second


def test_objects_are_compared_without_their_addresses():
    first, second = (_hash_batches([{"x": object()}], SINGLE_PROCESS) for _ in range(2))
    assert first == second
