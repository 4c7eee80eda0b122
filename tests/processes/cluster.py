"""Several real processes on one machine, each with its own virtual devices."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "worker.py"
DEVICES = 4  # in all, however many processes there are
HEARTBEAT_SECONDS = 6
LIMIT_SECONDS = 150  # of a scenario: nothing hangs


class Cluster:
    """`count` processes that train together."""

    def __init__(self, count, kept, *flags, slow_data=0.0, own_flags=None):
        """Starts them; `kept` is a folder for the rows each reads, `own_flags` are {process: flags}."""
        kept.mkdir(exist_ok=True)
        address = f"127.0.0.1:{free_port()}"
        shared = {
            "PYTHONPATH": str(REPOSITORY),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} "
            "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false",
            "KEPT_BATCHES": str(kept),
            "SLOW_DATA": str(slow_data),
        }
        self.processes = []
        for index in range(count):
            joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), f"--heartbeat_seconds={HEARTBEAT_SECONDS}", *flags]
                    + (own_flags or {}).get(index, []),
                    env={**os.environ, **shared, **(joined if count > 1 else {})},
                    cwd=REPOSITORY,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def wait_for(self, condition):
        """Returns when `condition` holds, or a process has ended, or time is up."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition() and self.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert condition(), self.finish()

    def alive(self):
        return all(process.poll() is None for process in self.processes)

    def finish(self):
        """[(exit status, stdout, stderr)] of all; those that do not end in time are killed, and fail the test."""
        deadline = time.monotonic() + LIMIT_SECONDS
        results = []
        try:
            for process in self.processes:
                out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
                results.append((process.returncode, out, err))
        finally:
            for process in self.processes:
                process.kill()
        return results


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]
