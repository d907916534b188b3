"""Devices that are not there are refused in one line."""

from __future__ import annotations

import pytest
import torch

from deltaclip.base.device import check_precision, choose_device
from deltaclip.base.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_no_gpu(name):
    with pytest.raises(UserError) as caught:
        choose_device(name)
    assert str(caught.value) == "--device: no CUDA GPU is present; give cpu or auto"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_with_too_high_a_number():
    count = torch.cuda.device_count()
    with pytest.raises(UserError) as caught:
        choose_device(f"cuda:{count}")
    assert str(caught.value) == f"--device: there is no cuda:{count}; the last GPU is cuda:{count - 1}"
    assert choose_device(f"cuda:{count - 1}") == f"cuda:{count - 1}"


def test_devices_of_torch_and_of_other_makers():
    assert choose_device(torch.device("cpu")) == "cpu"
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match=r"^--device: no device mps is present; give cpu or auto$"):
            choose_device("mps")


def test_number_formats_of_a_model():
    check_precision(None)
    check_precision("bf16")
    for wrong in ("fp8", "auto", torch.float32):
        with pytest.raises(UserError, match=r"is no number format; (did you mean|known)"):
            check_precision(wrong)
