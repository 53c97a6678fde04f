"""Third stage: a vector for each image and its captions, of length 1.

Embedders are an OpenAI-compatible API (`/v1/embeddings`, asked for image and text as a chat message, as vLLM serves
GME, which the paper uses), a CLIP or SigLIP of transformers, or "histogram": colours, edges and words, which knows
little of meaning and is for trying the builder out. Every vector goes at once into OUTPUT/vectors.jsonl, and what is
there is not asked for again.
"""

import base64
import hashlib
import json
import os
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import requests
from tqdm import tqdm

from unialign_jax.data.endpoint import Endpoint, Failed, Refused, Retry, Usage, ask
from unialign_jax.data.images import load_rgb
from unialign_jax.evaluation.building.stages import Build, Stage, write_rows
from unialign_jax.evaluation.judging import data_uri
from unialign_jax.files import first_line, parse_json, sha256

VECTORS = "vectors.jsonl"
CAPTIONS = 5  # of an image at most
MAX_WIDTH = 65536  # numbers of a vector


def parameters(build: Build) -> dict:
    found, given = {}, build.settings
    if given.embedder and not is_url(given.embedder) and Path(given.embedder).is_dir():
        found = files_of(given.embedder)
    return given.part("embedder", "embedder_model") | {"files": found}


def work(build: Build, folder: Path) -> dict:
    rows = build.rows("filter/images.jsonl")
    embedder = open_embedder(build.settings.embedder, build.settings.embedder_model, build.embedder_key)
    vectors = embed_all(embedder, rows, build.folder / VECTORS)
    matrix = np.stack([vectors[vector_key(embedder.name, row)] for row in rows])
    write_rows(folder / "images.jsonl", ({"key": row["key"], "row": number} for number, row in enumerate(rows)))
    np.save(folder / "vectors.npy", matrix, allow_pickle=False)
    return {"said": f"{len(rows)} vectors of {matrix.shape[1]} numbers, {embedder.name}", "width": matrix.shape[1]}


STAGE = Stage("embed", ("filter/images.jsonl",), parameters, work)


def is_url(embedder: str) -> bool:
    return embedder.startswith(("http://", "https://"))


def text_of(row: dict) -> str:
    """The captions of an image as one text."""
    return " ".join(row["captions"][:CAPTIONS])


def vector_key(name: str, row: dict) -> str:
    """32 hexadecimal digits that stand for all that a vector depends on."""
    return hashlib.sha256(json.dumps([name, row["sha256"], text_of(row)]).encode()).hexdigest()[:32]


def normalised(vector: np.ndarray) -> np.ndarray:
    """The vector, float32, with length 1; zeros stay."""
    vector = np.asarray(vector, np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class Histogram:
    """Colours (4 x 4 x 4 bins), edges (8 directions in 2 x 2 quarters) and the hashed words of the captions."""

    name, concurrency = "histogram", 1

    def vector(self, path: str, text: str, stop: threading.Event) -> np.ndarray:
        small = np.asarray(load_rgb(path).resize((64, 64)), np.float32)
        cells = (small // 64).astype(int) @ [16, 4, 1]
        colors = np.sqrt(np.bincount(cells.ravel(), minlength=64))
        down, right = np.gradient(small.mean(-1))
        directions = ((np.arctan2(down, right) / np.pi + 1) * 4).astype(int) % 8
        quarters = np.arange(64) // 32
        bins = directions + 8 * (2 * quarters[:, None] + quarters[None, :])
        edges = np.bincount(bins.ravel(), np.hypot(down, right).ravel(), minlength=32)
        words = np.zeros(128)
        for word in text.lower().split():
            digest = hashlib.sha256(word.encode()).digest()
            words[digest[0] % 128] += 1 if digest[1] % 2 else -1
        return np.concatenate([normalised(part) for part in (colors - colors.mean(), edges - edges.mean(), words)])


class Served:
    """Vectors of an OpenAI-compatible API."""

    concurrency = 8

    def __init__(self, url: str, model: str, key: str = "", **options):
        if not model:
            raise ValueError(f"--embedder={url} needs --embedder-model=NAME, the endpoint's name of the model")
        self.name, self.endpoint = model, Endpoint(url, model, key, flag="--embedder", **options)
        self._local, self._usage = threading.local(), Usage()

    def vector(self, path: str, text: str, stop: threading.Event) -> np.ndarray:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        content = [{"type": "image_url", "image_url": {"url": data_uri(Path(path))}}]
        if text:
            content.append({"type": "text", "text": text})
        body = {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": content}],
            "encoding_format": "float",
        }
        return ask(self._local.session, self.endpoint, lambda n: body, read_vector, self._usage, stop, "embeddings")


def read_vector(content: bytes) -> np.ndarray:
    """The vector of an answer. Raises Retry for an answer without one."""
    try:
        vector = np.asarray(parse_json(content, "the answer")["data"][0]["embedding"], np.float32)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise Retry(f"an answer without a vector ({first_line(error, 80)})") from None
    if vector.ndim != 1 or not 2 <= len(vector) <= MAX_WIDTH or not np.isfinite(vector).all() or not vector.any():
        raise Retry("an answer without a vector (of another shape, not finite, or all zeros)")
    return vector


class Local:
    """Image and text vectors of a CLIP or SigLIP of transformers, one after the other. Needs PyTorch."""

    concurrency = 1

    def __init__(self, folder: str):
        try:
            import torch
            import transformers
        except ModuleNotFoundError:
            raise ValueError(f"--embedder={folder} needs PyTorch: pip install torch") from None
        digest = hashlib.sha256(json.dumps(files_of(folder)).encode()).hexdigest()
        self.name = f"{Path(folder).name} {digest[:16]}"
        self._torch, self._device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).to(self._device).eval()
            self._processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"--embedder={folder} cannot be opened by transformers: {first_line(error)}") from None
        if not hasattr(self._model, "get_image_features") or not hasattr(self._model, "get_text_features"):
            raise ValueError(f"--embedder={folder} holds a {type(self._model).__name__}, expected a CLIP or SigLIP")
        self._length = self._model.config.text_config.max_position_embeddings

    def vector(self, path: str, text: str, stop: threading.Event) -> np.ndarray:
        pictures = self._processor(images=load_rgb(path), return_tensors="pt").to(self._device)
        words = self._processor(
            text=[text], padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._device)
        with self._torch.inference_mode():
            parts = (self._model.get_image_features(**pictures), self._model.get_text_features(**words))
        # Transformers 5 gives an output with the vector in `pooler_output`, earlier ones the vector.
        image, words = (normalised(getattr(part, "pooler_output", part)[0].float().cpu().numpy()) for part in parts)
        return np.concatenate([image, words if text else 0 * words])


def files_of(folder: str) -> dict[str, str]:
    """{name: SHA-256} of a model's files."""
    return {path.name: sha256(path) for path in sorted(Path(folder).iterdir()) if path.is_file()}


def open_embedder(embedder: str, model: str, key: str = "") -> Histogram | Served | Local:
    """The embedder that an option names. Raises ValueError where there is none."""
    if embedder == "histogram":
        return Histogram()
    if is_url(embedder):
        return Served(embedder, model, key)
    if embedder and Path(embedder).is_dir():
        return Local(embedder)
    found = f"--embedder is {embedder}" if embedder else "--embedder is not given"
    raise ValueError(f"{found}: expected a URL such as http://localhost:8000/v1, the folder of a CLIP, or histogram")


def embed_all(embedder: Histogram | Served | Local, rows: list[dict], path: Path) -> dict[str, np.ndarray]:
    """{key: vector} of images; those in the file `path` are taken from there, and others added to it at once.

    Raises ValueError, in one line, where the endpoint refuses, some images got no vector, or widths differ.
    """
    found = read_vectors(path)
    keys = [vector_key(embedder.name, row) for row in rows]
    todo = [(key, row) for key, row in zip(keys, rows, strict=True) if key not in found]
    lock, stop, failed = threading.Lock(), threading.Event(), {}
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=len(rows) - len(todo), desc="embed", unit="image", disable=None) as bar,
        ThreadPoolExecutor(embedder.concurrency) as pool,
    ):

        def settle(key, row):
            if stop.is_set():
                return
            try:
                vector = normalised(embedder.vector(row["file"], text_of(row), stop))
            except Failed as error:
                failed[row["key"]] = str(error)
                return
            line = json.dumps({"key": key, "vector": base64.b64encode(vector.astype("<f4").tobytes()).decode()})
            with lock:
                found[key] = vector
                file.write(line + "\n")
                file.flush()
                bar.update()

        pending = set()
        try:
            for key, row in todo:
                pending.add(pool.submit(settle, key, row))
                if len(pending) >= 2 * embedder.concurrency:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        future.result()
            for future in pending:
                future.result()
        except BaseException as error:
            stop.set()
            for future in pending:
                future.cancel()
            if isinstance(error, Refused):
                raise ValueError(f"--embedder: {error}") from None
            raise
    if failed:
        name = min(failed)
        raise ValueError(
            f"{len(failed)} of {len(rows)} images got no vector ({name}: {failed[name]}); the others are kept, and the "
            "same command resumes"
        )
    widths = {len(found[key]) for key in keys}
    if len(widths) > 1:
        raise ValueError(f"{path} holds vectors of {sorted(widths)} numbers of one model: move the file away")
    return found


def read_vectors(path: Path) -> dict[str, np.ndarray]:
    """{key: vector} of a file of vectors; a last line that was cut off is dropped."""
    found, whole = {}, 0
    if path.exists():
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = parse_json(line, f"{path}, line {number}")
                    found[entry["key"]] = np.frombuffer(base64.b64decode(entry["vector"]), "<f4")
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path}, line {number} is no vector: move the file away") from None
                whole += len(line)
        os.truncate(path, whole)
    return found
