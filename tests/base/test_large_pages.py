"""Large pages: what the command line asks for reaches torch, and what the user has set stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import resource, sys
from deltaclip.base.device import ask_for_large_pages
ask_for_large_pages()
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(32, 1024, 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**environment):
    kept = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept | environment)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system gives no large pages to programs"
)
def test_large_tensors_take_few_page_faults():
    assert page_faults() * 10 < page_faults(THP_MEM_ALLOC_ENABLE="0")  # 128 MB: 64 pages or 32,768
