"""The mixture: one homogeneous batch after another from several streams, by a schedule that is a pure function."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from unialign_jax.data.streams import Stream

_MAX_WEIGHT_DENOMINATOR = 10**6


class Mixture:
    """Batch number n, on any number of hosts.

    The weights and n alone decide which stream gives batch n; the seed, the stream's name and n decide which of its
    records. There is no other state: the position in the data is the step number. Each stream is shuffled anew every
    epoch, an epoch holds every record once, and a batch may run over its end (so a data set may be smaller than a
    batch). A host reads those rows of a global batch that its devices hold; they are the same on any number of hosts.

    For grain it is one dataset: its source are the batch numbers, its map makes a batch. Beside that grain gives the
    order of each stream, as numbers. With MapDataset.mix over examples and .batch, the reading thread would copy every
    example once more, and hold two batches more (measured: 4.9 batches of memory instead of 2.8, two read ahead).
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        *,
        seed: int,
        global_batch: int,
        rows: Sequence[int] | None = None,
    ):
        """Raises ValueError for no stream of positive weight, a name twice, or rows that are not in the batch.

        Args:
          streams: with their weights in their configs; those of weight 0 are dropped.
          global_batch: examples of a batch over all hosts.
          rows: which of them this host reads; all when None.
        """
        import grain  # takes a second to import

        self.streams = {stream.config.name: stream for stream in streams if stream.config.weight > 0}
        names = [stream.config.name for stream in streams]
        if not self.streams:
            raise ValueError(f"no stream to train on: {len(names)} streams given, none with a weight above 0")
        if len(set(names)) != len(names):
            raise ValueError(f"stream names must differ, found {', '.join(names)}")
        if global_batch < 1:
            raise ValueError(f"global_batch is {global_batch}, expected at least 1")
        self._rows = [int(row) for row in (range(global_batch) if rows is None else rows)]
        if not self._rows or min(self._rows) < 0 or max(self._rows) >= global_batch:
            raise ValueError(f"this host's rows are {self._rows}, expected some of 0 to {global_batch - 1}")
        self.seed = seed
        self.global_batch = global_batch
        self._names = tuple(self.streams)
        self._shares = integer_weights([stream.config.weight for stream in self.streams.values()])
        # Without end, so that row r of a stream's k-th batch is its number k * global_batch + r.
        self._orders = {
            name: grain.MapDataset.range(len(stream)).seed(_stream_seed(seed, name)).shuffle().repeat()
            for name, stream in self.streams.items()
        }

    def schedule(self, n: int) -> tuple[str, int]:
        """(stream's name, k): batch n is the k-th batch of that stream. A few integer operations at any n."""
        index, k = interleave(n, self._shares)
        return self._names[index], k

    def epochs(self, num_steps: int) -> dict[str, float]:
        """Stream -> how often each of its records is read in `num_steps` batches."""
        batches = num_steps * self.global_batch / sum(self._shares)
        shares = zip(self.streams.items(), self._shares, strict=True)
        return {name: batches * share / len(stream) for (name, stream), share in shares}

    def batch(self, n: int, pool: ThreadPoolExecutor | None = None) -> tuple[str, dict[str, np.ndarray]]:
        """(stream's name, this host's rows of batch n): every array has a leading axis of the host's number of rows.

        The rows are read by the threads of `pool`, or one after another.
        """
        name, k = self.schedule(n)
        stream, order = self.streams[name], self._orders[name]

        def read(row):
            return stream[int(order[k * self.global_batch + row])]

        first = read(self._rows[0])
        # Each example is copied to its place at once, so that no more than the batch itself is held.
        batch = {key: np.empty((len(self._rows), *np.shape(x)), x.dtype) for key, x in first.items()}

        def put(place, example=None):
            for key, value in (example or read(self._rows[place])).items():
                batch[key][place] = value

        put(0, first)
        for _ in (pool.map if pool else map)(put, range(1, len(self._rows))):
            pass
        return name, batch

    def batches(
        self, start: int = 0, *, num_threads: int = 4, prefetch: int = 4
    ) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
        """Yields (n, stream's name, this host's rows of batch n) for n = start, start + 1, ... without end.

        Args:
          start: the first n; starting at ten million costs as little as starting at 0.
          num_threads: rows read at the same time; 0 makes each batch when it is asked for.
          prefetch: batches ready or in the making at most; `batches_ahead` finds it for a budget of memory.
        """
        import grain

        if start < 0:
            raise ValueError(f"start is {start}, expected at least 0")
        numbers = grain.MapDataset.range(start, start + 2**40)
        # As many batches in the making as keep all threads busy: one with rows for all of them, and its successor.
        making = min(1 + -(-num_threads // len(self._rows)), prefetch) if num_threads else 0
        options = grain.ReadOptions(num_threads=making, prefetch_buffer_size=prefetch if making else 0)
        pool = ThreadPoolExecutor(num_threads, "read rows") if making else None
        iterator = iter(numbers.map(lambda n: (int(n), *self.batch(int(n), pool))).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()  # stops the threads that make batches
            if pool:
                pool.shutdown(wait=False, cancel_futures=True)


# Batches in memory beside those kept ready: the one handed out, and the one before it on its way to a device.
IN_USE = 2


def batches_ahead(batch_bytes: int, budget_bytes: float, most: int) -> int:
    """How many batches to keep ready, so that they and those in use fit the budget: at least 2, at most `most`."""
    return min(most, max(2, int(budget_bytes // batch_bytes) - IN_USE))


def interleave(n: int, shares: Sequence[int]) -> tuple[int, int]:
    """(i, k): number n of the interleaved sequence is number k of component i.

    The first component takes its share evenly, ceil(n * share / total) of the first n; the numbers that it leaves go to
    the others in the same way. So at any n every component is within a few of its share, and it takes exactly its
    share of sum(shares) numbers. grain's MapDataset.mix interleaves alike, but it rounds weights otherwise.
    """
    if n < 0:
        raise ValueError(f"batch number is {n}, expected at least 0")
    total = sum(shares)
    for index, share in enumerate(shares):
        left_before = n * (total - share) // total
        left_after = (n + 1) * (total - share) // total
        if left_after == left_before:  # this component takes number n
            return index, n - left_before
        n, total = left_before, total - share
    raise ValueError(f"shares must be positive integers, found {tuple(shares)}")


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest positive integers in the ratio of `weights` (0.2 and 0.1 are 2 and 1), to six digits."""
    if any(weight <= 0 for weight in weights):
        raise ValueError(f"weights must be above 0, found {tuple(weights)}")
    largest = max(weights)
    ratios = [Fraction(weight / largest).limit_denominator(_MAX_WEIGHT_DENOMINATOR) for weight in weights]
    if any(ratio == 0 for ratio in ratios):
        raise ValueError(f"weights must be within a factor of a million of each other, found {tuple(weights)}")
    scale = math.lcm(*(ratio.denominator for ratio in ratios))
    shares = [int(ratio * scale) for ratio in ratios]
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


def _stream_seed(seed: int, name: str) -> int:
    """A 32-bit seed for a stream's order; by name, so that adding a stream leaves the others' order alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
