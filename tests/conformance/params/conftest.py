"""Threads that end with the test."""

from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture
def concurrently():
    """Run functions at once and return their results; the first failure is raised."""

    def run(*functions):
        with ThreadPoolExecutor(len(functions)) as pool:
            return [future.result(timeout=60) for future in [pool.submit(f) for f in functions]]

    return run
