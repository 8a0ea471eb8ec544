"""Several processes: the same training as one process, and no hang when one dies."""

import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from data import assert_close

WORKER = pathlib.Path(__file__).parent / "worker.py"


@pytest.fixture
def start():
    """Starts a worker; whatever still runs at the end is killed."""
    running = []

    def start(out, **options):
        flags = [f"--{name.replace('_', '-')}={v}" for name, v in options.items()]
        process = subprocess.Popen(
            [sys.executable, str(WORKER), f"--out={out}", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def finish(processes, timeout=60):
    end = time.monotonic() + timeout
    for process in processes:
        output, _ = process.communicate(timeout=end - time.monotonic())
        assert process.returncode == 0, output


def alone(start, tmp_path, devices):
    out = tmp_path / f"{devices}.npz"
    finish([start(out, devices=devices)])
    return out


def pair(start, out, **options):
    """Two processes with four devices each."""
    port = free_port()
    return [
        start(out, processes=2, process=i, port=port, devices=4, **options)
        for i in range(2)
    ]


def assert_same(a, b):
    with np.load(a) as a, np.load(b) as b:
        assert set(a) == set(b)
        assert len(a) == 10
        for name in a:
            assert_close(a[name], b[name], 1e-9, 1e-9, name)


def test_two_processes_train_as_one(start, tmp_path):
    out = tmp_path / "pair.npz"
    finish(pair(start, out))
    assert_same(out, alone(start, tmp_path, devices=8))
    assert_same(out, alone(start, tmp_path, devices=1))


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_training_resumes(start, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    out = tmp_path / "pair.npz"
    survivor, victim = pair(start, out, checkpoints=checkpoints, hang_at=7)
    watchdog = threading.Timer(60, victim.kill)
    watchdog.start()
    assert any("hanging" in line for line in victim.stdout)
    watchdog.cancel()
    victim.kill()
    killed = time.monotonic()
    output, _ = survivor.communicate(timeout=30)
    assert survivor.returncode != 0, output
    assert time.monotonic() - killed < 30
    assert not out.exists()

    finish(pair(start, out, checkpoints=checkpoints))
    assert_same(out, alone(start, tmp_path, devices=8))
