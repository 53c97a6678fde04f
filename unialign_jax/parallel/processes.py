"""Several processes as one run: how they find one another, which rows each reads, how they stop or fail together."""

import contextlib
import ctypes
import faulthandler
import importlib.util
import os
import platform
import re
import socket
import subprocess
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from unialign_jax.files import first_line

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # options of mallopt (glibc's malloc.h)
LOST = os.EX_TEMPFAIL  # 75: the exit status of a process that ends because another was lost; start it again
AGAIN = "The same command resumes from the last checkpoint, on this or another number of processes"


def start(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout: int = 60,
    initialization_timeout: int = 300,
) -> "ExitMessage | None":
    """Joins the other processes of the run, if there are any. Call it before JAX touches a device.

    There are others when a coordinator is given, in a SLURM step of several tasks, and on a TPU slice of several hosts.
    JAX's runtime ends this process from native code when another is lost or cannot be reached. So with several
    processes this returns the message to print then, to be taken back at a normal exit; with one it returns None.

    Args:
      coordinator: HOST:PORT of process 0; needs `num_processes` and `process_id` too.
      heartbeat_timeout: seconds of silence after which a process counts as lost, and the others end.
      initialization_timeout: seconds to wait for the others at the start.

    Raises ValueError for arguments that do not go together, OSError when the service cannot be started.
    """
    explicit = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in explicit.items() if value is None]
    if missing and len(missing) < 3:
        raise ValueError("--coordinator=HOST:PORT, --num-processes and --process-id go together")
    if missing:
        if not (in_slurm_step(environ) or on_tpu_pod(environ)):
            return None
        explicit = {}  # JAX detects them the same way
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
    # JAX's preemption service would replace our handler of SIGTERM, and does not handle Ctrl-C.
    _set_if_known("jax_enable_preemption_service", False)
    _set_if_known("jax_cpu_collectives_implementation", "gloo")
    message = ExitMessage(
        "error: this process ended before the run did: another was lost or could not be reached (the lines above say "
        f"more), or this one was killed. {AGAIN}"
    )
    try:
        jax.distributed.initialize(
            **explicit, heartbeat_timeout_seconds=heartbeat_timeout, initialization_timeout=initialization_timeout
        )
    except RuntimeError as error:
        message.take_back()
        raise OSError(
            f"the processes of the run cannot find one another ({first_line(error)}): start train.py on all of them, "
            "with the same --coordinator if it is given, and look at ports, firewalls and proxies"
        ) from error
    return message


def take_gpu_memory(environ: MutableMapping[str, str]) -> None:
    """Lets JAX take 95% of a GPU's memory instead of 75%, unless the environment sets the fraction.

    Call it before JAX touches a device.
    """
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & environ.keys():  # JAX refuses both at once
        environ["XLA_CLIENT_MEM_FRACTION"] = "0.95"


def prepare_memory(environ: MutableMapping[str, str]) -> None:
    """Sets up the memory of a process that trains. Call it before JAX touches a device.

    On a GPU see `take_gpu_memory`. On a host without an accelerator, memory that JAX frees stays with the process: the
    buffers of each step would otherwise go back to the kernel and be taken again, page by page. Compiling, by threads
    that share one arena then, takes some tenth longer.
    """
    take_gpu_memory(environ)
    if environ.get("JAX_PLATFORMS", "cpu") == "cpu" and not (_has_tpu() or list(Path("/dev").glob("nvidia[0-9]*"))):
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed: nothing by mmap, no trimming, one arena. Only glibc can."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            library.mallopt(option, value)


def _set_if_known(option: str, value):
    with contextlib.suppress(AttributeError):  # an option that this version of JAX lacks
        jax.config.update(option, value)


def in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several that srun started."""
    return "SLURM_STEP_NODELIST" in environ and "SLURM_LOCALID" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1


def on_tpu_pod(environ: Mapping[str, str], attribute: Callable[[str], str] | None = None) -> bool:
    """Whether this host is one of several in a TPU slice, or its slice one of several.

    GKE says so in the environment, a Cloud TPU VM in its metadata. A host without a TPU does not query the metadata.

    Args:
      attribute: reads an attribute of the metadata by name, "" for one that is missing.
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


class ExitMessage:
    """A line that is printed when this process ends without taking it back.

    When another process is lost, JAX's runtime ends this one from native code, where no Python runs. So a shell waits
    for our end of a pipe to close, and prints the line.
    """

    def __init__(self, text: str):
        script = 'trap "" INT TERM HUP; read -r taken_back || echo "$0" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script, text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def take_back(self) -> None:
        with contextlib.suppress(OSError):
            self._shell.communicate(b"\n")


@contextlib.contextmanager
def ending_when_stuck(seconds: float) -> Iterator[Callable[[], None]]:
    """Ends the process, with a traceback, `seconds` after the last call of the yielded function; 0 never ends it.

    The clock starts with the first call. JAX's own heartbeats do not notice a host that waits for its disk forever.
    """
    if not seconds:
        yield lambda: None
        return
    try:
        yield lambda: faulthandler.dump_traceback_later(seconds, exit=True)
    finally:
        faulthandler.cancel_dump_traceback_later()


class DelayedMax:
    """The largest number that any process gives at a step; all processes learn it at the next step.

    The reduction is enqueued before the step, so reading the previous result never waits for the step in flight.
    """

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), ("device",))
        self._place = NamedSharding(mesh, P("device"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
        self._pending = None

    def __call__(self, number: int) -> int:
        """Takes this process's number (0 to 127); returns the largest number of the previous call."""
        before = self._pending
        shape = (self._place.mesh.size,)
        numbers = jax.make_array_from_callback(shape, self._place, lambda _: np.array([number], np.int32))
        self._pending = self._largest(numbers)
        return 0 if before is None else int(before)


def local_rows(sharding: Sharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that live on this process's devices, in order: the process reads no others.

    A mesh on a TPU follows the torus, not the hosts: the rows may be neither contiguous nor in the processes' order.
    """
    pieces = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.array(sorted({row for (piece,) in pieces for row in range(*piece.indices(batch_size))}))


def put_rows(sharding: Sharding, batch_size: int, rows: np.ndarray, values: np.ndarray) -> jax.Array:
    """The global array from this process's `values` [len(rows), ...]; `rows` are those of `local_rows`."""
    shape = (batch_size, *values.shape[1:])

    def piece(index):
        start, stop, _ = index[0].indices(batch_size)
        first = np.searchsorted(rows, start)
        return values[first : first + stop - start]

    return jax.make_array_from_callback(shape, sharding, piece)


def lost_another(error: BaseException) -> bool:
    """Whether an error of a run of several processes most likely means that another process is gone.

    True for errors of the runtime, and for a TimeoutError: a save ends in one when another process never reaches its
    barriers. False for errors that a single process would raise too: out of memory, invalid arguments.
    """
    chain, runtime = _chain(error), jax.errors.JaxRuntimeError
    if out_of_memory(error) or any(isinstance(x, runtime) and str(x).startswith("INVALID_ARGUMENT") for x in chain):
        return False
    # An error at the start of a program, rather than at the fetch of its result, comes as a ValueError.
    status = re.compile("(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
    # A TimeoutError with an errno is the disk's.
    timed_out = any(isinstance(link, TimeoutError) and link.errno is None for link in chain)
    return timed_out or any(isinstance(link, runtime) or status.match(str(link)) for link in chain)


def out_of_memory(error: BaseException) -> str | None:
    """The runtime's message, in a line, if an error is one of memory; else None."""
    pattern = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
    for link in _chain(error):
        # A full disk is RESOURCE_EXHAUSTED too, but not an error of the runtime.
        if isinstance(link, jax.errors.JaxRuntimeError) and pattern.search(str(link)):
            return first_line(link)
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and its causes."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def anywhere(condition: bool) -> bool:
    """Whether a condition holds in any process. All of them must call this."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.array(condition))))


def from_first(numbers: list[int]) -> list[int]:
    """The numbers of process 0, whatever the others give. All of them must call this."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    own = np.array((numbers + [0] * count)[:count], np.int32)
    return multihost_utils.broadcast_one_to_all(own).tolist() if count else []


def text_from_first(text: str) -> str:
    """The text of process 0, whatever the others give. All of them must call this."""
    return bytes(from_first(list(text.encode(errors="replace")))).decode()


def processes_on_this_host() -> int:
    """How many processes of the run share this host. All of them must call this."""
    if jax.process_count() == 1:
        return 1
    own = np.uint32(zlib.crc32(socket.gethostname().encode()))
    return int(np.sum(multihost_utils.process_allgather(own) == own))


def wait_for_all(what: str) -> None:
    """Returns when every process has called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
