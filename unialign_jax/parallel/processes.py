"""Several processes as one run: how they find one another, what each reads, and how they stop or fail together."""

import contextlib
import faulthandler
import importlib.util
import inspect
import os
import re
import socket
import subprocess
import urllib.request
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from unialign_jax.files import first_line

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
LOST = os.EX_TEMPFAIL  # 75: the exit status of a process that ends because another was lost; to be started again
AGAIN = "The same command goes on from the last checkpoint, on this or another number of processes"


def start(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout=60,
    initialization_timeout=300,
) -> "LastWords | None":
    """Joins the other processes of the run, if there are any; to be called before JAX touches a device.

    They are there when a coordinator is given, in a SLURM step of several tasks, and on a TPU slice of several hosts.

    Args:
      environ: the process's environment.
      coordinator: HOST:PORT where process 0 is reached; with it go `num_processes` and `process_id`.
      heartbeat_timeout: seconds of silence after which a process counts as lost, and the others end.
      initialization_timeout: seconds to wait for the others at the start.

    Returns None where there is one process; else the last words of this one, to be taken back at a good end: JAX's
    runtime ends it from within when another is lost or cannot be reached. Raises ValueError for arguments that do not
    go together, OSError when the service cannot be started.
    """
    explicit = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in explicit.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError("--coordinator=HOST:PORT, --num-processes and --process-id go together")
    if missing:
        if not (in_slurm_step(environ) or on_tpu_pod(environ)):
            return None
        explicit = {}  # JAX finds them out as we have
    else:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"--coordinator is {coordinator!r}, expected HOST:PORT")
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process-id is {process_id}, expected 0 to {num_processes - 1} (--num-processes less 1)"
            )
        if num_processes == 1:
            return None
        explicit["cluster_detection_method"] = "deactivate"
    # JAX's own notice of a preemption would take SIGTERM away from ours, and knows nothing of Ctrl-C.
    _set_if_known("jax_enable_preemption_service", False)
    _set_if_known("jax_cpu_collectives_implementation", "gloo")
    timeouts = {
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "initialization_timeout": initialization_timeout,
        "shutdown_timeout_seconds": 300,  # that a process which is done waits for the others
    }
    known = inspect.signature(jax.distributed.initialize).parameters
    last_words = LastWords(
        "error: this process ended before the run did: another was lost or could not be reached (the lines above say "
        f"more), or this one was killed. {AGAIN}"
    )
    try:
        jax.distributed.initialize(**explicit, **{name: value for name, value in timeouts.items() if name in known})
    except RuntimeError as error:
        last_words.take_back()
        raise OSError(
            f"the processes of the run cannot find one another ({first_line(error)}): start train.py on all of them, "
            "with the same --coordinator if it is given, and look at ports, firewalls and proxies"
        ) from error
    return last_words


def take_gpu_memory(environ: MutableMapping[str, str]):
    """Lets JAX take 95% of a GPU's memory instead of its three quarters; to be called before it touches a device.

    What the environment itself says of it holds.
    """
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & environ.keys():  # JAX refuses both at once
        environ["XLA_CLIENT_MEM_FRACTION"] = "0.95"


def _set_if_known(option: str, value):
    with contextlib.suppress(AttributeError):  # what a version of JAX does not know
        jax.config.update(option, value)


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several that srun started."""
    return "SLURM_STEP_NODELIST" in environ and "SLURM_LOCALID" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1


def on_tpu_pod(environ: Mapping[str, str], attribute: Callable[[str], str] | None = None) -> bool:
    """Whether this host is one of several of a TPU slice, or its slice one of several.

    GKE says so in the environment, a Cloud TPU VM in its metadata (`attribute` reads one of them, "" where there is
    none). Where there is no TPU nothing is asked.
    """
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if hosts or "MEGASCALE_NUM_SLICES" in environ:
        return "," in (hosts or "") or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1
    if attribute is None:
        if "TPU_SKIP_MDS_QUERY" in environ or not _has_tpu():
            return False
        attribute = _metadata
    slices = re.search(r"^MEGASCALE_NUM_SLICES:\s*'?(\d+)", attribute("tpu-env"), re.MULTILINE)
    return "," in attribute("worker-network-endpoints") or bool(slices and int(slices[1]) > 1)


def _has_tpu() -> bool:
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _metadata(name: str) -> str:
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as reply:
            return reply.read().decode()
    except OSError:
        return ""


class LastWords:
    """A line that is printed when this process ends without having taken it back.

    When another process is lost, JAX's runtime ends this one from native code: nothing of Python runs then, so a shell
    that waits for our end of a pipe to close says what the user should know.
    """

    def __init__(self, text: str):
        script = 'trap "" INT TERM HUP; read -r taken_back || echo "$0" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script, text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def take_back(self):
        with contextlib.suppress(OSError):
            self._shell.communicate(b"\n")


@contextlib.contextmanager
def ending_when_stuck(seconds: float):
    """Gives a function to call at every sign of progress: `seconds` without one end the process, telling where it is.

    A host that waits for its disk for ever still sends heartbeats. It counts from the first call on; 0 never ends it.
    """
    if not seconds:
        yield lambda: None
        return
    try:
        yield lambda: faulthandler.dump_traceback_later(seconds, exit=True)
    finally:
        faulthandler.cancel_dump_traceback_later()


class Vote:
    """The largest number that any process gives at a step, known to all of them at the next one.

    It is in the devices' queue before the step, so that asking for it waits for nothing that is not done.
    """

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("device",))
        self._place = NamedSharding(mesh, P("device"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._pending = None

    def __call__(self, number: int) -> int:
        """Gives this process's number (0 to 127); returns the largest of the call before."""
        before = self._pending
        shape = (self._place.mesh.size,)
        numbers = jax.make_array_from_callback(shape, self._place, lambda _: np.array([number], np.int32))
        self._pending = self._largest(numbers)
        return 0 if before is None else int(before)


def local_rows(sharding: Sharding, batch_size: int) -> np.ndarray:
    """Which rows of a global batch live on this process's devices, in order: all that it has to read.

    They follow from the order of devices in the mesh, which on a TPU follows the torus and not the hosts, so they need
    be neither in the order of processes nor in one piece.
    """
    pieces = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.array(sorted({row for (piece,) in pieces for row in range(*piece.indices(batch_size))}))


def put_rows(sharding: Sharding, batch_size: int, rows: np.ndarray, values: np.ndarray) -> jax.Array:
    """The global array of which this process has `values` [len(rows), ...], those `rows` of `local_rows`."""
    shape = (batch_size, *values.shape[1:])

    def piece(index):
        start, stop, _ = index[0].indices(batch_size)
        first = np.searchsorted(rows, start)
        return values[first : first + stop - start]

    return jax.make_array_from_callback(shape, sharding, piece)


def lost_another(error: BaseException) -> bool:
    """Whether an error comes from the runtime: in a run of several processes, most likely from one that is gone.

    So does one of waiting in vain: a save ends in a TimeoutError when another process does not come to its barriers.
    Not so one that would come without the others too: memory that does not suffice, and what the program itself asks.
    """
    chain, runtime = _chain(error), jax.errors.JaxRuntimeError
    if out_of_memory(error) or any(isinstance(x, runtime) and str(x).startswith("INVALID_ARGUMENT") for x in chain):
        return False
    # What fails while a program is started, rather than when its result is asked for, comes as a ValueError.
    status = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
    # With an errno it is the disk's.
    in_vain = any(isinstance(link, TimeoutError) and link.errno is None for link in chain)
    return in_vain or any(isinstance(link, runtime) or status.match(str(link)) for link in chain)


def out_of_memory(error: BaseException) -> str | None:
    """What the runtime says, in a line, when memory did not suffice; None for every other error."""
    told = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
    for link in _chain(error):
        # A full disk is RESOURCE_EXHAUSTED too, but not an error of the runtime.
        if isinstance(link, jax.errors.JaxRuntimeError) and told.search(str(link)):
            return first_line(link)
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, and those that it came from."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def anywhere(condition: bool) -> bool:
    """Whether it holds in any process; all of them ask."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.array(condition))))


def from_first(numbers: list[int]) -> list[int]:
    """The numbers of process 0, whatever the others give; all of them ask."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    own = np.array((numbers + [0] * count)[:count], np.int32)
    return multihost_utils.broadcast_one_to_all(own).tolist() if count else []


def text_from_first(text: str) -> str:
    """The text of process 0, whatever the others give; all of them ask."""
    return bytes(from_first(list(text.encode(errors="replace")))).decode()


def processes_on_this_host() -> int:
    """How many processes of the run share this host; all of them ask."""
    if jax.process_count() == 1:
        return 1
    own = np.uint32(zlib.crc32(socket.gethostname().encode()))
    return int(np.sum(multihost_utils.process_allgather(own) == own))


def wait_for_all(what: str):
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
