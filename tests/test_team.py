# Copyright 2026 The MambaFormer developers. Licensed under the Apache License, Version 2.0.
"""Threads that have to share their processors become fewer, and more again, and say the same throughout."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY

SHARED = """
import os, time, torch
from transformers import AutoTokenizer
from mambaformer import MambaFormerForConditionalGeneration, embedded_checkpoint
from mambaformer.modeling_mambaformer.packed_weights import DECODE_LIBRARY

def run_on(processors):
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), processors)

def answer():
    return model.generate(**source, max_new_tokens=48, min_new_tokens=48).tolist()

def answers(seconds, until=None):
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end and until not in found:
        said.add(str(answer()))
        found.append(DECODE_LIBRARY.mambaformer_team_halvings())
    return found

torch.set_num_threads(2)
folder, said = embedded_checkpoint(), set()
model = MambaFormerForConditionalGeneration.from_pretrained(folder).eval()
source = AutoTokenizer.from_pretrained(folder)("question: What is pulpitis?", return_tensors="pt")
answer()
every = os.sched_getaffinity(0)
run_on({min(every)})
crowded = answers(2.0)
run_on(every)
free = answers(20.0, until=0)
assert len(said) == 1, said
print(sum(x > 0 for x in crowded) / len(crowded), min(free), max(crowded))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors of Linux"
)
@pytest.mark.skipif(DECODE_LIBRARY is None, reason="the compiled library was not built here")
def test_two_threads_on_one_processor_become_one_for_as_long_as_that_lasts():
    done = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, least, most = (float(x) for x in done.stdout.split())
    assert alone > 0.5, done.stdout  # of the answers that had one processor
    assert most <= 2, done.stdout  # halving one thread has no effect, and takes long to undo
    if least and os.getloadavg()[0] > len(os.sched_getaffinity(0)) + 1:
        pytest.skip("other processes keep the processors busy, so that one thread is right")
    assert least == 0, done.stdout  # with two again
