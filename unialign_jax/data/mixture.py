"""The mixture: one homogeneous batch after another from several streams, by a schedule that is a pure function."""

import hashlib
import math
from collections.abc import Iterator, Sequence
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

    For grain it is one dataset, of this host's examples in the order in which they are trained on.
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
          seed: of the order of records.
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
        shuffled = [
            grain.MapDataset.source(stream).seed(_stream_seed(seed, name)).shuffle().repeat()
            for name, stream in self.streams.items()
        ]
        self._examples = grain.MapDataset.select_from_datasets(shuffled, _Order(self._shares, global_batch, self._rows))

    def schedule(self, n: int) -> tuple[str, int]:
        """(stream's name, k): batch n is the k-th batch of that stream. A few integer operations at any n."""
        index, k = interleave(n, self._shares)
        return self._names[index], k

    def batch(self, n: int) -> tuple[str, dict[str, np.ndarray]]:
        """(stream's name, this host's rows of batch n): every array has a leading axis of the host's number of rows."""
        count = len(self._rows)
        return self.schedule(n)[0], _stack([self._examples[i] for i in range(n * count, (n + 1) * count)])

    def batches(
        self, start: int = 0, *, num_threads: int = 4, prefetch: int = 4
    ) -> Iterator[tuple[int, str, dict[str, np.ndarray]]]:
        """Yields (n, stream's name, this host's rows of batch n) for n = start, start + 1, ... without end.

        Args:
          start: the first n; starting at ten million costs as little as starting at 0.
          num_threads: rows read at the same time; 0 reads each batch when it is asked for.
          prefetch: batches whose rows are read ahead; `batches_ahead` finds it for a budget of memory.
        """
        import grain

        if start < 0:
            raise ValueError(f"start is {start}, expected at least 0")
        count = len(self._rows)
        ahead = prefetch * count if num_threads else 0  # in examples
        options = grain.ReadOptions(num_threads=min(num_threads, ahead), prefetch_buffer_size=ahead)
        examples = self._examples[start * count :].to_iter_dataset(options)
        iterator = iter(examples.batch(count, batch_fn=_stack))
        try:
            for n, batch in enumerate(iterator, start):
                yield n, self.schedule(n)[0], batch
        finally:
            iterator.close()  # stops the threads that read


class _Order:
    """Example number -> (index of its stream, its number there): a grain.transforms.DatasetSelectionMap."""

    def __init__(self, shares: tuple[int, ...], global_batch: int, rows: list[int]):
        self._shares, self._global_batch, self._rows = shares, global_batch, rows

    def __len__(self) -> int:
        return 2**62  # without end

    def __getitem__(self, number: int) -> tuple[int, int]:
        n, place = divmod(number, len(self._rows))
        index, k = interleave(n, self._shares)
        return index, k * self._global_batch + self._rows[place]


def _stack(examples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Examples as one batch. Each is let go as soon as it is copied, so that the batch is not held twice."""
    batch = {key: np.empty((len(examples), *np.shape(value)), value.dtype) for key, value in examples[0].items()}
    while examples:
        example = examples.pop()
        for key, array in batch.items():
            array[len(examples)] = example[key]
    return batch


# Batches in memory beside those read ahead: the one handed out, and the one before it on its way to a device.
IN_USE = 2


def batches_ahead(batch_bytes: int, budget_bytes: float, most: int) -> int:
    """How many batches to read ahead, so that they and those in use fit the budget: at least 2, at most `most`."""
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
