"""One run in several processes: how they find one another, and how they agree on what one of them does for all."""

import contextlib
import itertools
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

from t5x_domain.errors import UserError
from t5x_domain.parallel.peers import DAY, EXIT_PREEMPTED, Peers, on_abort

HEARTBEAT_SECONDS = 60.0
_MEET_SECONDS = 300  # for the slowest host to come up
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PEERS: Peers | None = None  # None where this process is the only one
_CALLS = itertools.count()


def start(heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
    """Joins the other processes of the run, if the environment describes some; to be called before JAX has devices.

    They are described by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by a cluster that JAX knows
    (SLURM, Open MPI, Cloud TPU, GKE). On CPUs they talk through gloo. Where another one cannot be reached the process
    ends with EXIT_PREEMPTED.

    Args:
      heartbeat_seconds: a process that has not been heard of for so long is lost, see `peers.Peers`.

    Raises:
      UserError: the environment describes them in part only, or in a way that cannot be.
    """
    global _PEERS
    described = _described()
    if described is None:
        return
    if heartbeat_seconds < 1:
        raise UserError(f"--heartbeat_seconds={heartbeat_seconds:g}: it must be at least 1.")
    if described.get("process_id") == 0:
        _require_free_port(int(described["coordinator_address"].rpartition(":")[2]))
    import jax
    from jax._src.distributed import global_state  # its client has no public name

    # By default JAX ends all processes from C++ when one is lost; so Python is told, and may say which.
    jax.config.update("jax_enable_recoverability", True)
    on_abort(_explain_absence)
    try:
        jax.distributed.initialize(
            **described, heartbeat_timeout_seconds=round(heartbeat_seconds), initialization_timeout=_MEET_SECONDS
        )
    except RuntimeError as error:
        if "coordinator address" in str(error):  # the host of process 0 has no address before it is there
            _explain_absence()
        raise
    on_abort(None)  # all have come together
    _PEERS = Peers(
        global_state.client, global_state.coordinator_address, jax.process_index(), jax.process_count(),
        heartbeat_seconds,
    )  # fmt: skip


def peers() -> Peers | None:
    """The other processes of the run; None if there are none."""
    return _PEERS


def is_first() -> bool:
    """Whether this is process 0, the only one that writes what is written once."""
    return _PEERS is None or _PEERS.index == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around all that the processes of a run do, after `start`: they end together, whatever ends one of them."""
    if _PEERS is None:
        yield
        return
    try:
        yield
        _PEERS.finish()
    except BaseException as error:
        _PEERS.fail(error)
        raise


def first_does[T](action: Callable[[], T]) -> T:
    """What `action` returns in process 0, in all processes; it runs in process 0 only, and the others wait for it.

    Raises:
      UserError: `action` raised it, in all processes then.
    """
    if _PEERS is None:
        return action()
    key = f"t5x_domain/first/{next(_CALLS)}"
    if _PEERS.index == 0:
        try:
            outcome: tuple[Any, str | None] = action(), None
        except UserError as error:
            outcome = None, str(error)
        _PEERS.client.key_value_set_bytes(key, pickle.dumps(outcome))
    else:
        outcome = pickle.loads(_PEERS.client.blocking_key_value_get_bytes(key, DAY))
    result, refused = outcome
    if refused is not None:
        raise UserError(refused)
    return result


def wait_for_all(what: str) -> None:
    """Returns when all processes have called it with the same `what`, which no other call has."""
    if _PEERS is not None:
        _PEERS.client.wait_at_barrier(f"t5x_domain/all/{what}", DAY)


def require_joined() -> None:
    """Raises UserError if JAX has found processes that `start` did not: each would take itself for the only one."""
    import jax

    if _PEERS is None and jax.process_count() > 1:
        raise UserError(
            f"JAX has found {jax.process_count()} processes, but the environment does not tell them of one another; "
            f"set {', '.join(_VARIABLES)} in each."
        )


def require_one(verb: str) -> None:
    """For what runs in one process. Raises UserError if the environment describes several."""
    if _described() is not None:
        raise UserError(
            f"{verb} runs in one process, but the environment describes several ({', '.join(_VARIABLES)}, or a "
            "cluster's own variables); start it on one host without them, or with JAX_NUM_PROCESSES=1, "
            "JAX_PROCESS_ID=0 and any JAX_COORDINATOR_ADDRESS."
        )


def _explain_absence() -> None:
    """JAX aborts a process that waits for others in vain: more often than not their machines are still to come."""
    print(
        f"t5x-domain: the processes of this run did not all come together within {_MEET_SECONDS} s; see that all are "
        "started and reach the host and port of process 0",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_PREEMPTED)


def _require_free_port(port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError as error:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS: port {port} of this host cannot be used ({error.strerror}); choose another."
            ) from error


def _described() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None if this process is the only one."""
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if not given:
        return {} if _in_cluster() else None
    if missing := [name for name in _VARIABLES if name not in given]:
        raise UserError(f"{' and '.join(given)} set, but not {' and '.join(missing)}; set all three or none.")
    address, count, index = (given[name] for name in _VARIABLES)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(
            f"JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={index}: processes are numbered from 0 to one less than "
            "their number."
        )
    if not address.rpartition(":")[2].isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: write it as HOST:PORT, the host that of process 0.")
    if int(count) == 1:
        return None
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",  # these variables say all, even inside of a cluster's job
    }


def _in_cluster() -> bool:
    """Whether JAX finds itself one of several processes of a cluster."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; it does not tell how many

    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ:
        return False  # not an indexed job, so no pod knows its number
    found = (c for c in ClusterEnv._cluster_types if not c.opt_in_only_method and c.is_env_present())
    cluster = next(found, None)
    return cluster is not None and cluster.get_process_count() > 1
