"""Several processes that run the same program: connecting, agreeing on values, and stopping together.

JAX connects the processes and notices when one dies. This module adds what JAX leaves to the program: a process that
fails says so to the others, so that all of them stop at once and name the reason.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state  # the key-value store of the processes has no public name
from jax.experimental import multihost_utils
from rich.console import Console

from codiemb_jax.config import DistributedSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.program import exit_code

CONNECT_SECONDS = 300
"""How long to wait for other processes when a run starts."""
HEARTBEAT_SECONDS = 60
"""After so long without a heartbeat, a process is considered dead, and JAX ends all others."""
LEAVE_SECONDS = 10
"""How long the first process, which connects all others, waits for them to stop after a failure."""
MAX_TURN_SECONDS = 7 * 24 * 3600
"""How long to wait for another process that is alive, for example while it prepares data."""

FAILURE = "codiemb_jax/failure"
"""Key under which a process tells all others why it stops."""
LEFT = "codiemb_jax/left"
"""Prefix of the keys with which processes confirm that they know."""

Value = TypeVar("Value")
_exchanges = count()


@contextmanager
def connected(settings: DistributedSettings) -> Iterator[None]:
    """Connects the processes of a run in this block. If one of them fails, all stop with its exit code.

    Without settings, the processes are found as `jax.distributed.initialize` finds them: on TPUs, Slurm, Open MPI and
    Kubernetes. Where there is nothing to find, this process runs alone.

    Raises:
      UserError: If the processes cannot be connected.
    """
    if not _connect(settings):
        # JAX has replaced the handler of SIGTERM if it has found a cluster of a single process.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        yield
        return
    me = jax.process_index()
    watcher = threading.Thread(target=_stop_after_failure, args=(me,), daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            # Most likely a consequence of another process's failure or death, which is the better explanation.
            _print(me, f"lost another process; JAX says which one within {HEARTBEAT_SECONDS} seconds")
            time.sleep(HEARTBEAT_SECONDS + LEAVE_SECONDS)
        _publish_failure(me, error)
        if me == 0:
            _wait_until_left({0})
        raise
    jax.distributed.shutdown()


def _connect(settings: DistributedSettings) -> bool:
    """Connects to the other processes. Returns whether there are any."""
    if settings.num_processes == 1:
        return False
    limits: dict[str, Any] = {
        "initialization_timeout": 2 * CONNECT_SECONDS,
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": CONNECT_SECONDS,
    }
    try:
        if settings.coordinator is None:
            try:
                with _bounded_wait(CONNECT_SECONDS):
                    jax.distributed.initialize(**limits)
            except (ValueError, RuntimeError) as error:
                # Nothing found, or called from a Python program that has used JAX before.
                if any(text in str(error) for text in ("coordinator_address should be", "must be called before")):
                    return False
                raise
        else:
            started = time.monotonic()
            if settings.process_id:
                _wait_for_coordinator(settings.coordinator)
            with _bounded_wait(CONNECT_SECONDS - (time.monotonic() - started)):
                jax.distributed.initialize(
                    settings.coordinator,
                    settings.num_processes,
                    settings.process_id,
                    cluster_detection_method="deactivate",
                    **limits,
                )
    except (ValueError, RuntimeError, OSError) as error:
        reason = shorten(" ".join(str(error).split()), 300)
        raise UserError(
            f"distributed: the processes cannot be connected ({reason}); check distributed.coordinator (process 0 "
            "needs its port, which may be in use), num_processes and process_id, or set num_processes to 1 to run alone"
        ) from error
    return jax.process_count() > 1


@contextmanager
def _bounded_wait(seconds: float) -> Iterator[None]:
    """Ends this process if the others have not connected in this block after some seconds.

    JAX has a limit of its own, but ends the process with a native stack trace.
    """

    def give_up() -> None:
        print(
            f"error: distributed: other processes are missing after {CONNECT_SECONDS} seconds; start all of them at "
            "about the same time, with the same num_processes and each with its own process_id",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(max(seconds, 1), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait_for_coordinator(address: str) -> None:
    """Waits until something answers at an address, because JAX ends the program if nothing does.

    Raises:
      UserError: If nothing answers.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_SECONDS
    for attempt in count():
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"distributed.coordinator: nothing answers at {address} ({error}); start process 0 there, and "
                    "check that the other machines can reach the port"
                ) from error
            if attempt == 0:
                print(f"waiting for process 0 at {address} ({error})", file=sys.stderr, flush=True)
        time.sleep(0.5)


def _stop_after_failure(me: int) -> None:
    """Ends this process once another one has published a failure. Runs in a thread."""
    while _store() is not None:
        try:
            failure = json.loads(_store().blocking_key_value_get(FAILURE, 600_000))
        except Exception:  # no failure yet, or disconnected
            time.sleep(0.1)
            continue
        if failure["process"] != me:
            _print(me, f"stops because process {failure['process']} failed: {failure['reason']}")
            with suppress(Exception):
                _store().key_value_set(f"{LEFT}/{me}", "")
            if me == 0:
                _wait_until_left({0, failure["process"]})
            os._exit(failure["code"])
        return


def _publish_failure(me: int, error: BaseException) -> None:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}"
    failure = {"process": me, "reason": shorten(reason, 2000), "code": exit_code(error)}
    with suppress(Exception):  # another process was first, or the first process is gone
        _store().key_value_set(FAILURE, json.dumps(failure))


def _wait_until_left(others: set[int]) -> None:
    """Waits, in the first process, for all processes but `others`: JAX would end them without a reason."""
    deadline = time.monotonic() + LEAVE_SECONDS
    for process in set(range(jax.process_count())) - others:
        with suppress(Exception):
            left = max(deadline - time.monotonic(), 0.001)
            _store().blocking_key_value_get(f"{LEFT}/{process}", int(left * 1000))
    time.sleep(0.2)  # they exit right after this sign


def _store() -> Any:
    """Returns the client of the key-value store that all processes share."""
    return global_state.client


def _print(process: int, message: str) -> None:
    print(f"process {process} {message}", file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process writes the output and the log of the run."""
    return jax.process_index() == 0


def log_console() -> Console:
    """Returns a console on stderr that prints only in the first process."""
    return Console(stderr=True, quiet=not is_first_process())


def exchange(value: Value) -> list[Value]:
    """Returns the value of each process, in order. `value` must survive JSON.

    All processes must call this in the same order. They wait for each other, which makes this a barrier as well.
    """
    if jax.process_count() == 1:
        return [value]
    store, prefix = _store(), f"codiemb_jax/exchange/{next(_exchanges)}"
    store.key_value_set(f"{prefix}/{jax.process_index()}", json.dumps(value))
    return [
        json.loads(store.blocking_key_value_get(f"{prefix}/{process}", MAX_TURN_SECONDS * 1000))
        for process in range(jax.process_count())
    ]


def first_value(value: Value) -> Value:
    """Returns the value of the first process."""
    return exchange(value)[0]


def check_same(values: dict[str, str], fix: str) -> None:
    """Checks that named values are the same in all processes.

    Args:
      values: The values of this process, by name.
      fix: What to do about a difference, for the error message.

    Raises:
      UserError: If a value differs from that of the first process.
    """
    found = exchange(values)
    problems = [
        f"{name}: {shorten(str(found[0].get(name)))} in process 0, {shorten(str(other.get(name)))} in process {process}"
        for process, other in enumerate(found)
        for name in sorted(found[0].keys() | other.keys())
        if found[0].get(name) != other.get(name)
    ]
    if problems:
        raise UserError(f"the processes of this run differ; {fix}:\n{format_problems(problems)}")


def in_turns(work: Callable[[], Value]) -> Value:
    """Runs work whose result is stored on disk in one process first, so that the others find it.

    The first process starts. Then comes one process per host, which has nothing to do if the hosts share the disk, and
    then all others.
    """
    hosts = exchange(socket.gethostname())
    me = jax.process_index()
    turn = 0 if me == 0 else 1 if hosts.index(hosts[me]) == me else 2
    result: Value | None = None
    for current in range(3):
        if current == turn:
            result = work()
        exchange(None)
    assert result is not None
    return result


def to_host(tree: Any) -> Any:
    """Returns a tree of arrays as NumPy arrays in the first process, and None in all others.

    Gathers one array at a time. All processes must call this.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    first = is_first_process()
    gathered = []
    for leaf in leaves:
        whole = multihost_utils.process_allgather(leaf, tiled=True)
        gathered.append(whole if first else None)
    return jax.tree.unflatten(structure, gathered) if first else None


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a function that says whether the run is to stop, because a process has received SIGTERM.

    The function takes the number of a step and must be called for every step. It gives the same answer in all
    processes.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield lambda _: False
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda _: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, previous)
