"""The stages of the builder, one after another. Each has a folder in OUTPUT, written whole or not at all:

    ingest/ filter/ embed/ select/ draft/ validate/ export/

with JSON lists (JSONL) and a manifest.json: what went in and what came out, by SHA-256, and the parameters. A stage
whose manifest still says the same is not done again. Beside them lie settings.json, vectors.jsonl and answers.jsonl
(what endpoints answered, at once), review/ (sheets for people, and what they decided) and benchmark/, the result.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from unialign_jax import __version__
from unialign_jax.evaluation.building.settings import Settings
from unialign_jax.evaluation.judging import Judge
from unialign_jax.files import check_regular, parse_json, read_json, replacing_folder, sha256, shown, write_json

MANIFEST = "manifest.json"
NAMES = ("ingest", "filter", "embed", "select", "draft", "validate", "export")
FORMAT = 1  # another number makes every stage be done again


class Build:
    """A builder's folder, with its settings.

    Attributes:
      make_judge: opens the model that drafts; called where it is needed.
      embedder_key: of the embedder's API; "" without one.
      say: prints a line for the user.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        make_judge: Callable[[], Judge] | None = None,
        embedder_key: str = "",
        say: Callable[[str], None] = print,
    ):
        self.folder, self.settings, self.make_judge, self.say = folder, settings, make_judge, say
        self.embedder_key = embedder_key

    def path(self, name: str) -> Path:
        """The file "STAGE/FILE"."""
        return self.folder / name

    def rows(self, name: str) -> list[dict]:
        """The objects of a JSON list of a stage, "STAGE/FILE"."""
        return read_rows(self.path(name))


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      needs: files of earlier stages that it reads, "STAGE/FILE".
      parameters: all else that its result depends on.
      work: writes its files into a folder, and returns figures for the manifest; "said" is a line for the user.
    """

    name: str
    needs: tuple[str, ...]
    parameters: Callable[[Build], dict]
    work: Callable[[Build, Path], dict]


def run(build: Build, stages: Iterable[Stage], until: str = NAMES[-1]) -> None:
    """Does the stages that are not done, as far as the stage `until`.

    Raises ValueError or OSError, in one line, where one cannot be done; those before it stay done.
    """
    for stage in stages:
        parameters = json.loads(json.dumps(stage.parameters(build)))
        inputs = {name: sha256(build.path(name)) for name in stage.needs}
        folder = build.folder / stage.name
        changed = difference(folder, parameters, inputs)
        if changed is None:
            build.say(f"{stage.name}: done before, {read_json(folder / MANIFEST)['said']}")
        else:
            if changed:
                build.say(f"{stage.name}: done again, since {changed}")
            with replacing_folder(folder, overwrite=True) as scratch:
                facts = stage.work(build, scratch)
                outputs = {path.name: sha256(path) for path in sorted(scratch.iterdir()) if path.suffix != ".png"}
                outputs.pop(".being-written", None)
                manifest = {
                    "stage": stage.name,
                    "format": FORMAT,
                    "unialign_jax": __version__,
                    "created": now(),
                    "parameters": parameters,
                    "inputs": inputs,
                    "outputs": outputs,
                }
                write_json(scratch / MANIFEST, manifest | facts)
            build.say(f"{stage.name}: {facts['said']}")
        if stage.name == until:
            return


def difference(folder: Path, parameters: dict, inputs: dict) -> str | None:
    """Why a stage must be done: "" when it never was, a reason when something changed, None when it need not."""
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return ""
    if manifest.get("format") != FORMAT:
        return "it was made by another version"
    for kind, now_is in (("parameters", parameters), ("inputs", inputs)):
        was = manifest.get(kind)
        for name in {**was, **now_is}:
            if was.get(name) != now_is.get(name):
                if kind == "inputs":
                    return f"{name} has changed"
                return f"{name} was {shown(was.get(name))} and is {shown(now_is.get(name))}"
    for name, digest in manifest["outputs"].items():
        if not (folder / name).is_file():
            return f"{folder.name}/{name} is gone"
        if sha256(folder / name) != digest:
            return f"{folder.name}/{name} was changed after it was written"
    return None


def check_done(build: Build, stages: Iterable[Stage]) -> Settings:
    """The settings by which the stages were done.

    Raises ValueError, in one line, unless every stage is done, from what the one before it has now.
    """
    used = {}
    for stage in stages:
        folder = build.folder / stage.name
        try:
            manifest = read_json(folder / MANIFEST)
            inputs = {name: sha256(build.path(name)) for name in stage.needs}
            reason = difference(folder, manifest["parameters"], inputs)
        except FileNotFoundError:
            reason = "it is not done"
        if reason is not None:
            raise ValueError(
                f"{build.folder}: the stage {stage.name} is to be done first: {reason} "
                f"(python launch/evaluate.py build-semgen --output={build.folder})"
            )
        used |= manifest["parameters"]
    names = {field.name for field in dataclasses.fields(Settings)}
    return dataclasses.replace(build.settings, **{name: value for name, value in used.items() if name in names})


def now() -> str:
    """The time, as manifests have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes objects as a JSON list, one a line."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON list. Raises ValueError or OSError, in one line."""
    check_regular(path)
    with open(path, "rb") as file:
        return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(file, 1) if line.strip()]
