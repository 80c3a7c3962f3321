"""Memory that a process frees stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from system.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = keep_freed_memory()
for _ in range(3):
    parts = [np.ones(2_000_000) for _ in range(4)]  # 64 MB
    del parts
    before = faults()
parts = [np.ones(2_000_000) for _ in range(4)]
print(kept, keep_freed_memory(), faults() - before)
"""


def outcome(**settings):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | settings, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    kept, again, faults = done.stdout.split()
    assert kept == again
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_taken_again_is_not_handed_out_anew():
    kept, faults = outcome()
    assert kept
    assert faults < 4000  # of 15,625 pages


def test_settings_made_by_hand_are_left_alone():
    assert outcome(MALLOC_TRIM_THRESHOLD_="1000000")[0] is False
