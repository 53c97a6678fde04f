"""The three parts of a run of a suite: generate, score and report. Each resumes where it was stopped."""

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unialign_jax import __version__
from unialign_jax.evaluation import reporting
from unialign_jax.evaluation.suite import (
    Item,
    Request,
    Score,
    Scorer,
    Suite,
    hashes,
    limited,
    read_scores,
    write_scores,
)
from unialign_jax.files import check_regular, make_folder, parse_json, read_json, replacing_file, shown, write_json
from unialign_jax.inference import job_runner, jobs
from unialign_jax.inference.options import options_of
from unialign_jax.parallel.compiled import keep_compiled

log = logging.getLogger(__name__)

SETTINGS, JOBS, JUDGEMENTS, SCORES = "settings.json", "jobs.jsonl", "judgements.jsonl", "scores.jsonl"
PARTS = ("generate", "score", "report")
# What a later run of the same folder may change: of the request, and of the model.
_FREE, _FREE_OF_MODEL = ("data", "output", "limit"), ("bundle", "unialign_jax")


@dataclasses.dataclass(frozen=True)
class Machine:
    """How the model is opened and run: what does not belong to the suite.

    Attributes are the options of launch/generate.py of the same names.
    """

    bundle: str
    batch: int = 8
    devices: int | None = None
    weights: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    low_memory: bool = False
    attention: str = "auto"
    verify: bool = True
    compilation_cache: str = "none"


# Generate


def generate(suite: Suite, request: Request, machine: Machine, *, overwrite: bool = False) -> int:
    """Makes the images or texts of a suite in the official layout. Returns how many jobs failed.

    Raises ValueError or OSError, in one line, for data or a model that cannot be read, for another suite's folder, and
    for a folder whose images were made in another way, unless `overwrite`.
    """
    from unialign_jax.inference.opening import ModelSource, devices_to_use

    source = ModelSource(machine.bundle, weights=machine.weights, verify=machine.verify)
    source.check_complete()
    request = dataclasses.replace(request, image_size=source.config.image_size)
    every = suite.items(request)
    items = limited(every, request.limit)
    stamp = source.stamp(machine.dtype, machine.quantize)
    settings = describe(suite, request) | {"model": stamp, "items": len(every), "unialign_jax": __version__}
    kept = check_settings(suite, request.output, settings, overwrite=overwrite)
    settings |= kept
    make_folder(request.output, "--output")
    write_json(request.output / SETTINGS, settings)
    suite.prepare(request, items)
    write_jobs(request, items)
    identity = f"{source.digest} {machine.dtype} {machine.quantize}"
    read = jobs.read_jobs(request.output / JOBS, identity)
    bad = next((job for job in read if isinstance(job, jobs.BadJob)), None)
    if bad:
        raise ValueError(f"{request.output / JOBS}, line {bad.line}, job {bad.id}: {bad.error}")
    results = job_runner.Results(request.made, stamp)
    todo = results.begin(read, overwrite=overwrite)
    began = time.monotonic()
    if todo:
        keep_compiled(machine.compilation_cache)
        how = {name: getattr(machine, name) for name in ("dtype", "quantize", "low_memory", "attention")}
        places = devices_to_use(machine.devices)
        pipelines = [source.open(max_batch=machine.batch, device=place, **how) for place in places]
        if not machine.low_memory:
            for pipeline in pipelines:
                pipeline.load()  # damaged weights are one error, not one for each job
        try:
            with tqdm(total=len(read), initial=len(read) - len(todo), desc=suite.name, unit="job", disable=None) as bar:
                job_runner.run(todo, pipelines, results, machine.batch, bar.update)
        except KeyboardInterrupt as stop:
            done = results.earlier + results.done
            raise type(stop)(f"{done} of {len(read)} jobs are done and kept; the same command resumes there") from None
    seconds = time.monotonic() - began
    if results.done:
        write_json(request.output / SETTINGS, settings | {"seconds_per_job": round(seconds / results.done, 3)})
    suite.arrange(request, items, read_results(request))
    done = results.earlier + results.done
    log.info("%d of %d jobs are done, %d failed: %s", done, len(read), results.failed, request.made)
    return results.failed


def adopt(suite: Suite, request: Request) -> None:
    """Makes the folder of a run whose answers are in a file of the user's (`--results`), and are not made here.

    Raises ValueError or OSError, in one line, for data or answers that cannot be read, and for another run's folder.
    """
    settings = describe(suite, request) | {"model": {"results": request.extra["results"]}}
    settings |= {"items": len(suite.items(request)), "unialign_jax": __version__}
    settings |= check_settings(suite, request.output, settings)
    make_folder(request.output, "--output")
    write_json(request.output / SETTINGS, settings)


def describe(suite: Suite, request: Request) -> dict:
    """What settings.json says of a run before its model is known."""
    asked = dataclasses.asdict(request)
    asked |= {"data": str(request.data.resolve()), "output": str(request.output.resolve())}
    return {"suite": suite.name, "request": asked, "data": hashes(request, suite.files(request))}


def check_settings(suite: Suite, output: Path, settings: dict, *, overwrite: bool = False) -> dict:
    """What stays of the settings that a folder has, if `settings` may replace them.

    Raises ValueError where the folder holds a run of another suite, or one that was made in another way.
    """
    path = output / SETTINGS
    if not path.exists():
        if output.is_dir() and any(not path.name.endswith(".partial") for path in output.iterdir()):
            raise FileExistsError(f"{output} holds what was not written by this command; choose another --output")
        return {}
    found = read_json(path)
    if found.get("suite") != settings["suite"]:
        raise ValueError(
            f"{output} holds a run of {shown(found.get('suite'))}, this is {settings['suite']}: choose another --output"
        )
    if overwrite:
        return {}
    before, after = _fixed(suite, found), _fixed(suite, json.loads(json.dumps(settings)))
    for name in after:
        if before.get(name) != after[name]:
            raise ValueError(
                f"{output} was made with {name} {shown(before.get(name))}, now it is {shown(after[name])}: choose "
                "another --output, or give --overwrite"
            )
    return {key: found[key] for key in ("seconds_per_job", "scoring") if key in found}


def _fixed(suite: Suite, settings: dict) -> dict[str, Any]:
    """What may not change between runs of a folder, by a name for messages."""
    free = _FREE if suite.made_by_mode else (*_FREE, "mode")
    request, model = settings.get("request", {}), settings.get("model", {})
    extra = {key: value for key, value in request.get("extra", {}).items() if key not in suite.scoring_options}
    fixed = {key: value for key, value in (request | {"extra": extra}).items() if key not in free}
    fixed |= {f"data {name}": digest for name, digest in settings.get("data", {}).items()}
    return fixed | {f"the model's {key}": value for key, value in model.items() if key not in _FREE_OF_MODEL}


def write_jobs(request: Request, items: Sequence[Item]) -> None:
    """Writes jobs.jsonl. A seed of the user is that of each item's first job; the others keep their distance to it."""
    lines = []
    for item in items:
        for job in item.jobs:
            takes = options_of(job["task"])
            fields = job | {key: value for key, value in request.options.items() if key in takes}
            if "seed" in request.options:
                fields["seed"] += job.get("seed", 0) - item.jobs[0].get("seed", 0)
            lines.append(json.dumps(fields))
    with replacing_file(request.output / JOBS) as scratch:
        scratch.write_text("".join(line + "\n" for line in lines))


def read_results(request: Request) -> dict[str, dict]:
    """The lines of the runner's results.jsonl of jobs that are done and whose images are there, by their ids."""
    path, found = request.made / jobs.RESULTS, {}
    if not path.exists():
        return {}
    check_regular(path)
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry = parse_json(line, f"{path}, line {number}")
        except ValueError:
            continue  # torn by a kill
        if entry.get("status") == "done" and all((request.made / name).is_file() for name in entry.get("files", ())):
            found[entry["id"]] = entry
        else:
            found.pop(entry.get("id"), None)
    return found


# Score and report


def opened(
    suite: Suite,
    output: Path,
    mode: str | None = None,
    limit: int | None = None,
    data: Path | None = None,
    extra: dict[str, Any] | None = None,
) -> Request:
    """The request that a run's folder was made by, with another mode or limit of scoring if they are named.

    Args:
      data: where the same data lie now; None for where they were.
      extra: options of the suite that were given to score by.

    Raises ValueError or OSError, in one line, for a folder that is no run of this suite, for changed data, and for
    options that differ from those that the folder was made by.
    """
    settings = read_settings(output)
    if settings.get("suite") != suite.name:
        raise ValueError(f"{output} holds a run of {shown(settings.get('suite'))}, this is {suite.name}")
    asked = settings["request"]
    for name, value in (extra or {}).items():
        if name not in suite.scoring_options and asked["extra"].get(name) != value:
            raise ValueError(
                f"{output} was made with --{name.replace('_', '-')}={asked['extra'].get(name)}, not {shown(value)}"
            )
    request = Request(
        **asked
        | {
            "data": data or Path(asked["data"]),
            "output": Path(output),
            "mode": mode or asked["mode"],
            "limit": limit or asked["limit"],
            "extra": asked["extra"] | (extra or {}),
        }
    )
    if (found := hashes(request, suite.files(request))) != settings["data"]:
        name = next(name for name in {**found, **settings["data"]} if found.get(name) != settings["data"].get(name))
        raise ValueError(
            f"{request.data}: {name} has changed since {output} was made: bring the old file back, or make a new run"
        )
    return request


def read_settings(output: Path) -> dict:
    """settings.json of a run. Raises FileNotFoundError or ValueError, in one line."""
    if not (output / SETTINGS).exists():
        raise FileNotFoundError(
            f"{output} is no run of a suite: it has no {SETTINGS} (python launch/evaluate.py SUITE generate)"
        )
    return read_json(output / SETTINGS)


def score(suite: Suite, request: Request, make_scorer: Callable[[Callable[[int], None]], Scorer]) -> list[Score]:
    """Scores what a run has made, and writes OUTPUT/MODE/scores.jsonl and, in settings.json, how it was scored.

    Args:
      make_scorer: makes the scorer, which gets the progress bar's `update`.

    Raises ValueError or OSError, in one line, where images or texts are missing, or nothing can be scored.
    """
    items, results = limited(suite.items(request), request.limit), read_results(request)
    wanted = [job["id"] for item in items for job in item.jobs] if suite.needs_results(request) else []
    missing = [name for name in wanted if name not in results]
    if len(missing) == len(wanted) and wanted:
        raise ValueError(f"{request.made} has none of the {len(wanted)} results: generate them first")
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{request.made} lacks {len(missing)} of {len(wanted)} results ({listed}): generate them, or score fewer "
            "by --limit"
        )
    with tqdm(total=len(items), desc=f"{suite.name}, scores", unit="item", disable=None) as bar:
        scorer = make_scorer(bar.update)
        scores = suite.score(request, items, results, scorer)
    folder = request.output / request.mode
    folder.mkdir(parents=True, exist_ok=True)
    write_scores(folder / SCORES, scores)
    how = {"items": len(items), "extra": {name: request.extra.get(name) for name in suite.scoring_options}}
    how |= {"failed": sum(bool(score.failed) for score in scores), **suite.describe_scoring(request)}
    if scorer.judge:
        how |= {"judge": scorer.judge.describe(), "official_guess": scorer.official_guess}
    settings = read_settings(request.output)
    write_json(request.output / SETTINGS, settings | {"scoring": settings.get("scoring", {}) | {request.mode: how}})
    log.info("%d of %d items are scored: %s", len(items) - how["failed"], len(items), folder / SCORES)
    if how["failed"]:
        reasons = collections.Counter(score.failed for score in scores if score.failed)
        log.warning("%d items have no score, such as: %s", how["failed"], reasons.most_common(1)[0][0])
    return scores


def report(suite: Suite, request: Request, *, seed: int = 0) -> dict:
    """Writes OUTPUT/MODE/report.json, report.md and report.html from the scores, and returns what report.json holds.

    Raises FileNotFoundError where there are no scores.
    """
    path = request.output / request.mode / SCORES
    if not path.exists():
        raise FileNotFoundError(f"{path}: there are no scores yet (python launch/evaluate.py {suite.name} score)")
    settings = read_settings(request.output)
    scored_by = settings.get("scoring", {}).get(request.mode, {}).get("extra", {})
    request = dataclasses.replace(request, extra=request.extra | scored_by)
    return reporting.write(suite, request, settings, read_scores(path), seed=seed)
