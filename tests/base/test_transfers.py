"""Tensors on their way to a device and back, where there is none: the same ones there, copies here."""

from __future__ import annotations

import torch

from deltaclip.base.transfers import Leaving, Sender, fetched, overlaps


def test_on_a_cpu_what_is_sent_is_there_and_what_leaves_is_a_copy():
    tensors = [torch.arange(6).view(2, 3), torch.ones(2, 3).T, torch.tensor(1.5)]
    here = Sender(torch.device("cpu")).send(tensors).here()
    assert all(one is other for one, other in zip(here, tensors, strict=True))
    leaving = Leaving(tensors)
    tensors[0].zero_()
    first, second, _ = leaving.there()
    assert first.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.is_contiguous()
    assert [each.shape for each in fetched(*tensors)] == [(2, 3), (3, 2), ()]


def test_only_cuda_overlaps():
    assert [overlaps(name) for name in ("cpu", "mps", "cuda", torch.device("cuda:1"))] == [False, False, True, True]
