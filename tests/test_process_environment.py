"""Test processes compute with one thread each."""

import torch


def test_torch_was_loaded_after_the_number_of_threads_was_set() -> None:
    assert torch.get_num_threads() == 1
