"""Starts the processes of a run on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port() -> int:
    """Returns a port of this machine that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """The processes of one run. Ends them at the end of a `with` block."""

    def __init__(
        self, folder: Path, config: Path, name: str, processes: int, devices: int, *flags: str, output: str = ""
    ):
        """Starts them.

        Args:
          folder: Folder of the output, `NAME`, of the records, `NAME-PROCESS.jsonl`, and of the cache.
          config: The settings.
          name: Name of the run.
          processes: Number of processes.
          devices: Number of simulated devices of each process.
          *flags: Flags of `tests.recorded_train`.
          output: The `output_dir`, if it is not in the folder.
        """
        self.output = folder / name
        self.records = [folder / f"{name}-{i}.jsonl" for i in range(processes)]
        self.address = f"localhost:{free_port()}"
        cache = {"CODIEMB_JAX_CACHE": str(folder / "cache")}
        environment = {
            **os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", **cache
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.recorded_train"]
        self.processes = []
        for i, record in enumerate(self.records):
            own = [str(record), *flags, "--config", str(config), "--output_dir", output or str(self.output)]
            if processes > 1:
                own += ["--distributed.coordinator", self.address, "--distributed.num_processes", str(processes)]
                own += ["--distributed.process_id", str(i)]
            self.processes.append(
                subprocess.Popen(
                    [*command, *own], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout: float = 300) -> list[tuple[int, str]]:
        """Returns the exit code and the output of each process."""
        deadline = time.monotonic() + timeout
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in self.processes]
        return [(process.returncode, output) for process, output in zip(self.processes, outputs, strict=True)]

    def finish(self) -> list[str]:
        """Waits until the run has ended well, and returns the output of each process."""
        ended = self.wait()
        assert all(code == 0 for code, _ in ended), "\n".join(output for _, output in ended)
        return [output for _, output in ended]

    def wait_for_lines(self, count: int) -> None:
        """Waits until `count` steps have been logged."""
        deadline = time.monotonic() + 200
        metrics = self.output / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
            assert all(process.poll() is None for process in self.processes), self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.01)
