"""The same work as a pipeline of Apache Beam: `make_piece` and `pack_shard` on its workers.

The output must be a place that all workers reach, and workers need this package. The pipeline is started twice: for the
pieces, and for the shards, between which this process looks for duplicates.
"""

from unialign_jax.data.preparation.packing import Shard, pack_shard
from unialign_jax.data.preparation.pieces import Job, make_piece
from unialign_jax.data.sources import FORMATS, labels, locations
from unialign_jax.data.sources.parts import Part


def _import_beam():
    try:
        import apache_beam
        from apache_beam.options import pipeline_options
    except ImportError:
        raise ValueError(
            "--runner needs Apache Beam: pip install apache-beam (docs/data.md has its conflicts)"
        ) from None
    return apache_beam, pipeline_options


def check() -> None:
    """Raises ValueError where Apache Beam is not installed."""
    _import_beam()


def _parts_of(source: tuple[int, str, str], job: Job):
    """The parts of one source, with the names of their pieces."""
    number, path, label = source
    for count, part in enumerate(FORMATS[job.format].list_parts(path, label, job.source)):
        yield f"{number:08d}-{count:08d}-{part.fingerprint()}", part


def _make(named: tuple[str, Part], job: Job) -> str:
    make_piece(job, *named)
    return named[0]


def make_pieces(job: Job, paths: list[str], options: list[str]) -> list[str]:
    """Makes all pieces and gives their names in order."""
    beam, pipeline_options = _import_beam()
    sources = [(number, *both) for number, both in enumerate(zip(paths, labels(paths), strict=True))]
    with beam.Pipeline(options=pipeline_options.PipelineOptions(options)) as pipeline:
        _ = (
            pipeline
            | "sources" >> beam.Create(sources)
            | "parts" >> beam.FlatMap(_parts_of, job=job)
            | "spread" >> beam.Reshuffle()
            | "pieces" >> beam.Map(_make, job=job)
            | "names" >> beam.Map(_write_name, work=job.work)
        )
    found = locations.listing(locations.join(job.work, "names"))
    return sorted(found)


def _write_name(name: str, work: str) -> None:
    """An empty file for each piece of this run: what an earlier run left of other parts is not taken for its own."""
    with locations.writing(locations.join(work, "names", name)):
        pass


def pack_shards(job: Job, shards: list[Shard], options: list[str]) -> None:
    beam, pipeline_options = _import_beam()
    with beam.Pipeline(options=pipeline_options.PipelineOptions(options)) as pipeline:
        _ = (
            pipeline
            | "shards" >> beam.Create(shards)
            | "spread" >> beam.Reshuffle()
            | "pack" >> beam.Map(lambda shard: pack_shard(job, shard))
        )
