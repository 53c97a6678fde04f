"""Jobs: what a jobs file may say, how it is refused, how jobs are batched, done, kept and taken up again."""

import json
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax.inference import job_runner
from unialign_jax.inference.job_runner import Results, batches, run
from unialign_jax.inference.jobs import BadJob, Job, make_job, read_jobs
from unialign_jax.models.sizes import ImageSizes


class FakePipeline:
    """Stands in for a `Pipeline`: colours by seed for images, echoes for texts; trips over the words it is told to."""

    sizes, edit_limit = ImageSizes(16, 64), 64

    def __init__(self, *, fails=(), stops=()):
        self.calls, self._fails, self._stops = [], fails, stops

    def _images(self, task, texts, images, seeds, **options):
        if options.get("height"):
            self.sizes.check("height", options["height"])
        self.calls.append((task, list(seeds)))
        for text in texts:
            if text in self._fails:
                raise ValueError(f"{text} cannot be drawn")
            if text in self._stops:
                raise KeyboardInterrupt
        return [Image.new("RGB", (16, 16), (seed % 256, len(text), 0)) for text, seed in zip(texts, seeds, strict=True)]

    def generate(self, prompts, *, seed, **options):
        return self._images("text_to_image", prompts, None, seed, **options)

    def edit(self, instructions, images, *, seed, **options):
        assert len(images) == len(instructions) and all(image.mode == "RGB" for image in images)
        return self._images("edit", instructions, images, seed, **options)

    def perceive(self, kind, images, *, instruction, seed, **options):
        return self._images(kind, [instruction or kind] * len(images), images, seed, **options)

    def personalize(self, prompts, references, *, seed, **options):
        assert all(isinstance(images, list) for images in references)
        return self._images("personalization", prompts, references, seed, **options)

    def caption(self, images, *, seed, **options):
        self.calls.append(("caption", list(seed)))
        return [f"{image.width} wide" for image in images]

    def answer(self, images, questions, *, seed, **options):
        self.calls.append(("vqa", list(seed)))
        return [question.upper() for question in questions]


@pytest.fixture
def folder(tmp_path):
    """A folder with two images (one of them turned by its EXIF data) and a file that is none."""
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 48), "blue").save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("L", (300, 1)).save(tmp_path / "thread.png")
    (tmp_path / "bomb.png").write_bytes(png_of_size(2**15, 2**15))
    return tmp_path


def png_of_size(width, height):
    """A PNG whose header promises that size, and which has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def write(folder, *rows):
    path = folder / "jobs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines_of(folder):
    return {entry["id"]: entry for entry in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}


def work(jobs_path, output, pipeline=None, batch=4, model="", overwrite=False):
    """One run of the command's inside; the results and the pipeline."""
    pipeline = pipeline or FakePipeline()
    results = Results(output)
    todo = results.begin(read_jobs(jobs_path, model), overwrite=overwrite)
    run(todo, pipeline if isinstance(pipeline, list) else [pipeline], results, batch)
    return results, pipeline


# What a job may be


def test_every_task_reads(folder):
    rows = [
        {"task": "text_to_image", "prompt": "a", "height": 32, "guidance_interval": [0.1, 1], "negative_prompt": ""},
        {"id": "e-1", "task": "edit", "instruction": "b", "image": "red.png", "image_guidance_scale": 1.5, "seed": 7},
        {"task": "edit", "prompt": "b", "images": ["turned.jpg"], "steps": None},
        {"task": "perception", "kind": "depth", "image": "red.png"},
        {"task": "personalization", "prompt": "c", "images": ["red.png", "turned.jpg"], "slots": 2, "count": 2},
        {"task": "caption", "image": str(folder / "red.png"), "max_tokens": 5},
        {"task": "vqa", "question": "d?", "image": "red.png", "decoding": "entropy", "temperature": 0},
    ]
    path = write(folder, *rows[:2], "", *rows[2:])
    read = read_jobs(path)
    assert all(isinstance(job, Job) for job in read)
    assert [job.id for job in read] == ["000001", "e-1", "000004", "000005", "000006", "000007", "000008"]
    assert [job.task for job in read] == [row["task"] for row in rows]
    assert [job.text for job in read] == ["a", "b", "b", None, "c", None, "d?"]
    assert read[0].options == {"height": 32, "guidance_interval": (0.1, 1)}
    assert (read[1].seed, read[2].seed, read[2].options) == (7, 0, {})
    assert read[2].sizes == ((48, 32),)  # upright
    assert read[4].files == ["000006_0.png", "000006_1.png"] and read[1].files == ["e-1.png"] and not read[6].files


T2I = {"task": "text_to_image", "prompt": "a"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "row, message",
    [
        ('{"task": "text_to_image", "prompt": "a"', "is no JSON: Expecting ',' delimiter at column 40"),
        ('["text_to_image"]', "expected a JSON object"),
        ('{"task": "text_to_image", "prompt": "a", "guidance_scale": NaN}', "has NaN, which is no JSON number"),
        ('{"task": "text_to_image", "prompt": "a", "prompt": "b"}', "has the key 'prompt' twice"),
        ("[" * 100_000, "is nested too deeply"),
        ({"task": "text_to_image", "prompt": "\ud800"}, 'prompt is "\\ud800", expected a text'),
        ({"task": "text_to_image", "prompt": "a", "shift": 10**400}, "expected a number from 0.01 to 100"),
        ({"task": "caption", "image": "red.png", "entropy_bound": 10**400}, "expected a number of at least 0"),
        (T2I | {"seed": 2**70}, "seed is 1180591620717411303424, expected a whole number from 0 to 4294967295"),
        (T2I | {"seed": -1}, "seed is -1, expected a whole number from 0"),
        ('{"task": "text_to_image", "prompt": "a", "seed": ' + "9" * 5000 + "}", "digits"),
        (T2I | {"seed": "7"}, 'seed is "7", expected a whole number'),
        (T2I | {"seed": [1, 2]}, "seed is [1, 2], expected a whole number"),
        (T2I | {"count": 10**9}, "images_per_prompt is 1000000000, expected a whole number from 1 to 65536"),
        (T2I | {"height": -16}, "height is -16, expected a whole number of at least 1"),
        (T2I | {"height": 2**64 + 0.5}, "expected a whole number of at least 1"),
        (T2I | {"prompt": "x" * 2**21}, "expected a text that is not empty"),
        (T2I | {"prompt": ["a", "b"]}, "expected a text"),
        (T2I | {"prompt": {"text": "a"}}, "expected a text"),
        (T2I | {"negative_prompt": 5}, "negative_prompt is 5, expected a text"),
        (T2I | {"negative_prompt": "\udfff"}, "expected a text"),
        (T2I | {"guidance_interval": [[0], 1]}, "expected two numbers"),
        (T2I | {"guidance_interval": [0, 1, 2]}, "expected two numbers"),
        (T2I | {"solver": {"euler": 1}}, "expected one of euler"),
        (T2I | {"task": ["text_to_image"]}, 'task is ["text_to_image"], expected one of'),
        (T2I | {"x" * 10_000: 1}, "text_to_image takes no xxx"),
        ('{"task": "text_to_image", "prompt": "a", "steps": 1e999}', "steps is Infinity, expected a whole number"),
        (
            '{"task": "text_to_image", "prompt": "a", "options": ' + "[" * 50_000 + "]" * 50_000 + "}",
            "is nested too deeply",
        ),
        ("null", "expected a JSON object"),
        ({"task": "caption", "image": "."}, "is a folder, expected a file"),
        ({"task": "caption", "image": "a\0b.png"}, "cannot be opened"),
        ({"task": "caption", "image": "\ud800.png"}, "cannot be opened"),
        ({"task": "caption", "image": "x" * 5000 + ".png"}, "File name too long"),
        ({"task": "caption", "image": "/dev/zero"}, "is a device, pipe or socket"),
        ({"task": "caption", "image": "pipe.png"}, "is a device, pipe or socket"),
        ({"task": "caption", "image": "empty.png"}, "it is empty"),
        ({"task": "caption", "image": "page.eps"}, "it is no image of a known format"),
        ({"task": "caption", "image": "bomb.png"}, "it has more than 67,108,864 pixels"),
        ({"task": "caption", "image": "thread.png"}, "expected sides that differ by a factor of 100 at most"),
        ({"task": "caption", "image": "red.png", "text_length": 10**6}, "text_length is 1000000, expected"),
        ({"prompt": "a"}, "task not given, expected one of text_to_image, edit"),
        ({"task": "draw", "prompt": "a"}, 'task is "draw", expected one of text_to_image'),
        ({"task": "text_to_image"}, "prompt is not given; text_to_image needs one"),
        ({"task": "text_to_image", "prompt": " "}, 'prompt is " ", expected a text that is not empty'),
        ({"task": "text_to_image", "prompt": 3}, "prompt is 3, expected a text"),
        ({"task": "text_to_image", "prompt": "a", "promt": 1}, "text_to_image takes no promt; it takes prompt, seed"),
        ({"task": "text_to_image", "prompt": "a", "image": "red.png"}, "text_to_image takes no image"),
        (
            {"task": "caption", "image": "red.png", "count": 2},
            "caption takes no images_per_prompt; it takes image, images, seed",
        ),
        ({"task": "edit", "prompt": "a", "instruction": "b", "image": "red.png"}, "instruction and prompt are both"),
        ({"task": "edit", "prompt": "a"}, "edit needs 1 image (image), 0 given"),
        ({"task": "edit", "prompt": "a", "image": "gone.png"}, "gone.png: there is no such file"),
        ({"task": "edit", "prompt": "a", "image": "text.png"}, "text.png cannot be decoded: it is no image of a"),
        ({"task": "edit", "prompt": "a", "image": ["red.png"]}, "expected paths of image files"),
        ({"task": "personalization", "prompt": "a", "images": ["red.png"] * 5}, "needs 1 to 4 images (image), 5 given"),
        ({"task": "perception", "image": "red.png"}, "kind is not given, expected one of canny, depth, pose"),
        ({"task": "text_to_image", "prompt": "a", "steps": 0}, "steps is 0, expected a whole number from 1 to 1000"),
        ({"task": "text_to_image", "prompt": "a", "steps": 2.5}, "steps is 2.5, expected a whole number"),
        ({"task": "text_to_image", "prompt": "a", "steps": True}, "steps is true, expected a whole number"),
        (
            {"task": "text_to_image", "prompt": "a", "guidance_scale": -1},
            "guidance_scale is -1, expected a number from 0 to 100",
        ),
        (
            {"task": "text_to_image", "prompt": "a", "guidance_interval": [0.9, 0.1]},
            "expected two numbers, 0 <= low <= high",
        ),
        ({"task": "text_to_image", "prompt": "a", "solver": "rk4"}, 'solver is "rk4", expected one of euler, heun'),
        (
            {"task": "text_to_image", "prompt": "a", "seed": 2**32 - 1, "count": 2},
            "seed is 4294967295, too large for 2 images",
        ),
        ({"id": "../a", "task": "text_to_image", "prompt": "a"}, 'id is "../a", expected a file name'),
        ({"id": ".a", "task": "text_to_image", "prompt": "a"}, 'id is ".a", expected a file name'),
        (T2I | {"id": "/etc/a"}, 'id is "/etc/a", expected a file name'),
        (T2I | {"id": "a/../../b"}, 'id is "a/../../b", expected a file name'),
        (T2I | {"id": "a/.."}, "expected a file name"),
        (T2I | {"id": "a//b"}, "expected a file name"),
        (T2I | {"id": "a/"}, "expected a file name"),
        (T2I | {"id": "a/./b"}, "expected a file name"),
        (T2I | {"id": "a\\b"}, "expected a file name"),
        (T2I | {"id": "a\n"}, "expected a file name"),
        (T2I | {"id": "a\0"}, "expected a file name"),
        (T2I | {"id": ""}, "expected a file name"),
        (T2I | {"id": "x" * 300}, "at most 200 characters"),
        (T2I | {"id": "a/" * 20 + "b"}, "expected a file name"),
        (T2I | {"id": "results.jsonl"}, "is the file of all results"),
        (T2I | {"id": "Results.JSONL/a"}, "is the file of all results"),
        ({"id": 3, "task": "text_to_image", "prompt": "a"}, "id is 3, expected a file name"),
    ],
)
def test_what_is_no_job_is_said_in_one_line(folder, row, message):
    bad, good = read_jobs(write(folder, row, {"task": "text_to_image", "prompt": "fine"}))
    assert isinstance(bad, BadJob) and isinstance(good, Job)
    assert message in bad.error and "\n" not in bad.error
    assert (bad.id, bad.line, good.id, good.line) == ("000001", 1, "000002", 2)


def test_bytes_that_are_no_text_spoil_their_line_alone(folder):
    path = folder / "jobs.jsonl"
    rows = [b'{"task": "text_to_image", "prompt": "a"}\r', b'{"task": "\xff"}', b'{"task": "t2i", "prompt": "b"}']
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows))
    first, second, third = read_jobs(path)
    assert (first.text, second.error, third.text) == ("a", "is not UTF-8", "b")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "first, second, message",
    [
        ({"id": "x"}, {"id": "x"}, "line 1 has the id 'x' already; give this one another id"),
        ({"id": "x", "count": 2}, {"id": "x_0"}, "line 1 has the file x_0.png already"),
        ({"id": "x_0"}, {"id": "x", "count": 2}, "line 1 has the file x_0.png already"),
        ({"id": "000002"}, {}, "line 1 has the id '000002' already"),
        ({"id": "a"}, {"id": "a.png/b"}, "a.png would be a file and a folder"),
        ({"id": "a.png/b"}, {"id": "a"}, "a.png would be a file and a folder"),
    ],
)
def test_a_job_that_would_write_anothers_file_is_bad_and_the_others_are_not(folder, first, second, message):
    read = read_jobs(write(folder, T2I | first, T2I | second, T2I | {"id": "fine"}))
    assert [type(job) for job in read] == [Job, BadJob, Job]
    assert message in read[1].error and read[1].id == "line 2"


def test_a_job_beside_its_duplicate_is_done_once(folder):
    rows = [T2I | {"id": "x"}, T2I | {"id": "x", "seed": 4}, T2I | {"id": "y"}]
    for _ in range(2):
        results, _ = work(write(folder, *rows), folder / "out")
    assert (results.earlier, results.failed) == (2, 1)
    lines = lines_of(folder / "out")
    assert {name: line["status"] for name, line in lines.items()} == {"x": "done", "y": "done", "line 2": "failed"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, words",
    [
        ("gone.jsonl", "there is no such jobs file"),
        ("empty.png", "has no jobs"),
        (".", "is a folder, expected a file"),
        ("pipe.png", "is a device, pipe or socket"),
        ("/dev/zero", "is a device, pipe or socket"),
    ],
)
def test_a_file_that_has_no_jobs(folder, refuses, name, words):
    refuses(lambda: read_jobs(folder / name), words)


def test_ids_may_name_folders_inside_the_output(folder):
    rows = [T2I | {"id": "animals/fox/1"}, T2I | {"id": "animals/owl", "count": 2}, T2I | {"id": "animals"}]
    work(write(folder, *rows), folder / "out")
    written = sorted(path.relative_to(folder / "out").as_posix() for path in (folder / "out").rglob("*.png"))
    assert written == ["animals.png", "animals/fox/1.png", "animals/owl_0.png", "animals/owl_1.png"]
    results, pipeline = work(write(folder, *rows), folder / "out")
    assert (results.earlier, pipeline.calls) == (3, [])


def test_a_link_or_a_file_in_the_way_of_a_folder_fails_its_job_alone(folder):
    (folder / "outside").mkdir()
    (folder / "out").mkdir()
    (folder / "out/link").symlink_to(folder / "outside")
    (folder / "out/file").write_text("mine")
    rows = [T2I | {"id": name} for name in ("link/a", "file/b", "c")]
    results, _ = work(write(folder, *rows), folder / "out")
    assert (results.done, results.failed) == (1, 2)
    errors = {name: line.get("error", "") for name, line in lines_of(folder / "out").items()}
    assert "leads out of the output" in errors["link/a"] and "is a file" in errors["file/b"]
    assert not list((folder / "outside").iterdir()) and (folder / "out/file").read_text() == "mine"


def test_a_hash_says_what_a_result_depends_on(folder):
    def hash_of(model="m", id="a", **fields):
        fields = {"task": "edit", "prompt": "p", "image": "red.png"} | fields
        return make_job(fields, folder, id=id, model=model).hash

    same = hash_of()
    assert hash_of(id="b") == same
    assert hash_of(guidance_scale=7) == hash_of(guidance_scale=7.0)
    others = [hash_of(prompt="q"), hash_of(seed=1), hash_of(steps=3), hash_of(model="n"), hash_of(image="turned.jpg")]
    assert len({same, *others}) == 6
    (folder / "red.png").rename(folder / "crimson.png")
    assert hash_of(image="crimson.png") == same
    Image.new("RGB", (48, 32), "green").save(folder / "crimson.png")
    assert hash_of(image="crimson.png") != same


def test_old_names_of_tasks_and_options_stand_for_the_new_ones(folder):
    old = [
        {"task": "t2i", "prompt": "a", "count": 2, "seed": 3},
        {"task": "generate", "prompt": "a", "num_images_per_prompt": 2, "seeds": 3},
        {"task": "perceive", "kind": "depth", "image": "red.png", "num_inference_steps": 4},
        {"task": "personalize", "prompt": "b", "image": "red.png"},
        {"task": "answer", "question": "c?", "image": "red.png"},
    ]
    new = [
        {"task": "text_to_image", "prompt": "a", "images_per_prompt": 2, "seed": 3},
        {"task": "text_to_image", "prompt": "a", "images_per_prompt": 2, "seed": 3},
        {"task": "perception", "kind": "depth", "image": "red.png", "steps": 4},
        {"task": "personalization", "prompt": "b", "image": "red.png"},
        {"task": "vqa", "question": "c?", "image": "red.png"},
    ]
    for before, after in zip(old, new, strict=True):
        assert vars(make_job(before, folder)) == vars(make_job(after, folder))
    with pytest.raises(ValueError, match="images_per_prompt is given twice, also as count"):
        make_job(old[0] | {"images_per_prompt": 2}, folder)


def test_hashes_are_those_of_earlier_versions(folder):
    """Results of a run before the names changed count as done."""
    fields = {"task": "t2i", "prompt": "a", "count": 2, "seed": 3, "guidance_interval": [0, 1], "guidance_scale": 7}
    assert make_job(fields | {"negative_prompt": "x"}, folder, model="m").hash == "99a33b050b03826e"


# Batches


def test_jobs_of_one_shape_fill_batches(folder):
    rows = [{"task": "text_to_image", "prompt": f"p{i}", "seed": i} for i in range(5)]
    rows.insert(2, {"task": "caption", "image": "red.png"})
    rows.insert(3, {"task": "text_to_image", "prompt": "other steps", "steps": 3})
    rows.append({"task": "text_to_image", "prompt": "four", "count": 4, "seed": 20, "negative_prompt": "n"})
    made = batches(read_jobs(write(folder, *rows)), 4, FakePipeline())
    assert [[sample.seed for sample in batch] for batch in made] == [[0, 1, 2, 3], [4, 20, 21, 22], [23], [0], [0]]
    assert [batch[0].job.task for batch in made] == ["text_to_image"] * 3 + ["caption", "text_to_image"]
    assert made[4][0].job.text == "other steps"


def test_images_of_one_working_size_go_together(folder):
    for width in (50, 100, 200):  # 16 pixels a patch, at most 64: all three are worked on at 48 x 32 or 64 x 43
        Image.new("RGB", (width, width * 2 // 3)).save(folder / f"{width}.png")
    names = ["red.png", "turned.jpg", "50.png", "100.png", "200.png"]
    edits = [{"task": "edit", "prompt": "x", "image": name} for name in names]
    edits += [edit | {"height": 16, "width": 16} for edit in edits]
    made = batches(read_jobs(write(folder, *edits)), 8, FakePipeline())
    assert [len(batch) for batch in made] == [3, 2, 5]
    references = [{"task": "personalization", "prompt": "x", "images": ["red.png"] * count} for count in (1, 2, 3, 4)]
    made = batches(read_jobs(write(folder, *references)), 8, FakePipeline())
    assert [len(batch) for batch in made] == [3, 1]  # fewer than three are repeated to three
    asked = [{"task": "perception", "kind": "pose", "image": "red.png"}]
    asked += [asked[0] | {"instruction": "the dog's pose"}, asked[0]]
    assert [len(batch) for batch in batches(read_jobs(write(folder, *asked)), 8, FakePipeline())] == [2, 1]


# Runs


def test_a_run_of_all_tasks(folder):
    rows = [
        {"id": "t", "task": "text_to_image", "prompt": "été", "seed": 5, "count": 3},
        {"id": "e", "task": "edit", "instruction": "b", "image": "turned.jpg"},
        {"id": "p", "task": "perception", "kind": "canny", "image": "red.png"},
        {"id": "r", "task": "personalization", "prompt": "c", "images": ["red.png", "turned.jpg"]},
        {"id": "c", "task": "caption", "image": "turned.jpg"},
        {"id": "v", "task": "vqa", "question": "où?", "image": "red.png", "seed": 9},
    ]
    jobs_path = write(folder, *rows)
    results, pipeline = work(jobs_path, folder / "out", batch=2)
    assert (results.done, results.failed, results.earlier) == (6, 0, 0)
    lines = lines_of(folder / "out")
    assert {entry["status"] for entry in lines.values()} == {"done"}
    assert lines["t"]["files"] == ["t_0.png", "t_1.png", "t_2.png"] and lines["e"]["files"] == ["e.png"]
    assert (lines["c"]["text"], lines["v"]["text"], lines["v"]["seed"]) == ("48 wide", "OÙ?", 9)
    assert [entry["line"] for entry in lines.values()] == [1, 2, 3, 4, 5, 6]
    assert all(entry["seconds"] >= 0 and len(entry["hash"]) == 16 for entry in lines.values())
    assert pipeline.calls[:2] == [("text_to_image", [5, 6]), ("text_to_image", [7])]
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {"results.jsonl", "t_0.png", "t_1.png", "t_2.png", "e.png", "p.png", "r.png"}
    with Image.open(folder / "out/t_1.png") as image:
        assert image.getpixel((0, 0)) == (6, 3, 0)
        assert json.loads(image.text["parameters"]) == {"id": "t", "job_hash": lines["t"]["hash"]}


def test_what_is_done_is_not_done_again(folder):
    rows = [{"id": name, "task": "text_to_image", "prompt": name} for name in "abcd"]
    work(write(folder, *rows), folder / "out")
    results, pipeline = work(write(folder, *rows), folder / "out")
    assert (results.earlier, pipeline.calls) == (4, [])

    (folder / "out/a.png").unlink()  # its file is gone
    rows[1]["seed"] = 3  # its job has changed
    rows[2]["id"] = "c2"  # its name has: the old results stay
    rows.append({"id": "e", "task": "text_to_image", "prompt": "e"})
    before = (folder / "out/results.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="holds 1 results that other jobs made.* the first b.png; .*--overwrite"):
        work(write(folder, *rows), folder / "out")
    assert (folder / "out/results.jsonl").read_bytes() == before
    results, pipeline = work(write(folder, *rows), folder / "out", overwrite=True)
    assert (results.earlier, results.done, pipeline.calls) == (1, 4, [("text_to_image", [0, 3, 0, 0])])
    assert list(lines_of(folder / "out")) == ["c", "d", "a", "b", "c2", "e"]
    results, pipeline = work(write(folder, *rows), folder / "out", model="another", overwrite=True)
    assert results.done == 5


def test_what_others_left_is_not_replaced_unasked(folder):
    (folder / "out").mkdir()
    Image.new("RGB", (8, 8), "green").save(folder / "out/a.png")
    mine = (folder / "out/a.png").read_bytes()
    with pytest.raises(FileExistsError, match="the first a.png"):
        work(write(folder, T2I | {"id": "a"}), folder / "out")
    assert (folder / "out/a.png").read_bytes() == mine
    work(write(folder, T2I | {"id": "a"}), folder / "out", overwrite=True)
    assert (folder / "out/a.png").read_bytes() != mine
    # Texts are kept in results.jsonl alone.
    work(write(folder, {"id": "t", "task": "caption", "image": "red.png"}), folder / "texts")
    with pytest.raises(FileExistsError, match="the first the text of t"):
        work(write(folder, {"id": "t", "task": "caption", "image": "red.png", "seed": 1}), folder / "texts")
    # A line that became bad does not take away what it made before.
    results, _ = work(write(folder, {"id": "t", "task": "caption"}), folder / "texts")
    lines = lines_of(folder / "texts")
    assert (lines["t"]["status"], lines["line 1"]["status"]) == ("done", "failed")


def test_a_picture_whose_line_a_kill_prevented_is_made_again(folder):
    jobs_path = write(folder, *(T2I | {"id": name} for name in "ab"))
    work(jobs_path, folder / "out")
    first, _ = (folder / "out/results.jsonl").read_text().splitlines()
    (folder / "out/results.jsonl").write_text(first + "\n")
    results, _ = work(jobs_path, folder / "out")
    assert (results.earlier, results.done) == (1, 1)


def test_one_bad_job_takes_no_other_down(folder, caplog):
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:60])  # the header is whole, the pixels are not
    rows = [{"task": "text_to_image", "prompt": prompt} for prompt in ("a", "b", "bad", "c")]
    rows[1]["\ud800"] = "half a character"
    rows += [{"task": "edit", "prompt": "d", "image": name} for name in ("red.png", "cut.png", "red.png")]
    rows += [{"task": "text_to_image", "prompt": "e", "height": 40}]
    jobs_path = write(folder, *rows)
    results, pipeline = work(jobs_path, folder / "out", FakePipeline(fails=("bad",)))
    assert (results.done, results.failed) == (4, 4)
    lines = lines_of(folder / "out")
    failed = {name: entry["error"] for name, entry in lines.items() if entry["status"] == "failed"}
    assert list(failed) == ["000002", "000003", "000006", "000008"]
    assert failed["000003"] == "bad cannot be drawn"
    assert "cut.png cannot be decoded" in failed["000006"]
    assert failed["000008"] == "height is 40, expected a multiple of 16 up to 64, such as 32"
    assert "line 3, job 000003: bad cannot be drawn" in caplog.messages
    assert pipeline.calls == [("text_to_image", [0, 0, 0])] + [("text_to_image", [0])] * 3 + [("edit", [0, 0])]

    results, pipeline = work(jobs_path, folder / "out")  # tried again, now without its fault
    assert (results.earlier, results.done, results.failed, pipeline.calls) == (4, 1, 3, [("text_to_image", [0])])
    assert len((folder / "out/results.jsonl").read_text().splitlines()) == len(rows)


def test_a_count_with_a_failure_has_failed(folder):
    class Forgetful(FakePipeline):
        def generate(self, prompts, *, seed, **options):
            if 3 in seed:
                raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand pages more")
            return super().generate(prompts, seed=seed, **options)

    jobs_path = write(folder, {"id": "a", "task": "text_to_image", "prompt": "a", "seed": 0, "count": 5})
    work(jobs_path, folder / "out", Forgetful(), batch=2)
    assert lines_of(folder / "out")["a"]["error"] == "RESOURCE_EXHAUSTED: no memory"
    assert [path.name for path in (folder / "out").iterdir()] == ["results.jsonl"]


def test_an_interrupted_run_keeps_what_is_done_and_goes_on(folder):
    rows = [{"id": f"j{i}", "task": "text_to_image", "prompt": f"p{i}", "seed": i} for i in range(6)]
    jobs_path = write(folder, *rows)
    with pytest.raises(KeyboardInterrupt):
        work(jobs_path, folder / "out", FakePipeline(stops=("p4",)), batch=2)
    assert list(lines_of(folder / "out")) == ["j0", "j1", "j2", "j3"]
    with open(folder / "out/results.jsonl", "a") as file:
        file.write('{"id": "j4", "status": "do')  # torn by a kill
    results, pipeline = work(jobs_path, folder / "out", batch=2)
    assert (results.earlier, pipeline.calls) == (4, [("text_to_image", [4, 5])])
    assert list(lines_of(folder / "out")) == [f"j{i}" for i in range(6)]


class Slow(FakePipeline):
    """Takes longer for the first batches, so that several pipelines end them in another order."""

    def generate(self, prompts, *, seed, **options):
        time.sleep(0.02 * (2 - min(2, len(self.calls))) + 0.002 * (seed[0] % 3))
        return super().generate(prompts, seed=seed, **options)


def test_several_pipelines_share_the_batches_and_change_nothing(folder):
    rows = [
        {
            "id": f"j{i}",
            "task": "text_to_image",
            "prompt": "p" * (i + 1),
            "seed": 10 * i,
            "images_per_prompt": 1 + i % 3,
        }
        for i in range(20)
    ]
    path = write(folder, *rows)
    work(path, folder / "one", batch=2)
    results, pipelines = work(path, folder / "three", [Slow(), Slow(), Slow()], batch=2)
    assert results.done == 20 and all(pipeline.calls for pipeline in pipelines)
    # Each batch was made once, and is that of one pipeline.
    _, alone = work(path, folder / "again", batch=2)
    assert sorted(call for pipeline in pipelines for call in pipeline.calls) == sorted(alone.calls)
    names = sorted(path.name for path in (folder / "one").glob("*.png"))
    assert names == sorted(path.name for path in (folder / "three").glob("*.png"))
    for name in names:
        with Image.open(folder / "one" / name) as one, Image.open(folder / "three" / name) as three:
            assert one.tobytes() == three.tobytes()


def test_one_of_several_pipelines_that_breaks_stops_the_others(folder):
    class Broken(FakePipeline):
        def generate(self, prompts, **options):
            raise ZeroDivisionError("a fault of the code")

    rows = [{"id": f"j{i}", "task": "text_to_image", "prompt": "p", "seed": i} for i in range(200)]
    slow = Slow()
    with pytest.raises(ZeroDivisionError):
        work(write(folder, *rows), folder / "out", [slow, Broken()], batch=1)
    assert len(slow.calls) < 100
    done = [line for line in lines_of(folder / "out").values() if line["status"] == "done"]
    assert len(done) == len(slow.calls)  # what it made until then is kept


def test_a_disk_that_fills_up_stops_the_run(folder, monkeypatch):
    def full(image, path, parameters):
        if path.name == "j2.png":
            raise OSError(f"cannot write {path}: No space left on device")
        save_png(image, path, parameters)

    save_png = job_runner.save_png
    monkeypatch.setattr(job_runner, "save_png", full)
    jobs_path = write(folder, *({"id": f"j{i}", "task": "text_to_image", "prompt": "p"} for i in range(40)))
    pipeline = FakePipeline()
    with pytest.raises(OSError, match="j2.png: No space left"):
        work(jobs_path, folder / "out", pipeline, batch=2)
    assert len(pipeline.calls) < 6  # it does not work on for nothing
    assert list(lines_of(folder / "out"))[:2] == ["j0", "j1"] and "j2" not in lines_of(folder / "out")


def test_reading_and_writing_go_on_beside_the_pipeline(folder, monkeypatch):
    """The next batch is read while the pipeline works: here it refuses to end before that has happened."""
    read = {name: threading.Event() for name in ("a", "b")}
    load_images = job_runner.load_images

    def load(samples):
        read[samples[0].job.id].set()
        return load_images(samples)

    class Patient(FakePipeline):
        def generate(self, prompts, **options):
            assert read["b"].wait(timeout=10)
            return super().generate(prompts, **options)

    monkeypatch.setattr(job_runner, "load_images", load)
    rows = [{"id": name, "task": "text_to_image", "prompt": name} for name in ("a", "b")]
    results, _ = work(write(folder, *rows), folder / "out", Patient(), batch=1)
    assert results.done == 2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "lines",
    [
        b'{"loss": 1}\n{"loss": 2}\n',
        b"[1]\n2\n",
        b'{"status": "done", "id": ["a"]}\n{}\n',
        b"\xff\xfe\n\n",
        b"[" * 100_000 + b"\n\n",
    ],
)
def test_results_of_something_else(folder, refuses, lines):
    (folder / "results.jsonl").write_bytes(lines)
    refuses(lambda: Results(folder), "results.jsonl:1 is no line of results; choose another --output")
    assert (folder / "results.jsonl").read_bytes() == lines


@pytest.mark.bad_input
def test_an_output_folder_that_cannot_be(folder, refuses):
    refuses(lambda: Results(folder / "red.png/out"), "cannot write into", "red.png/out: Not a directory")
    (folder / "results.jsonl").mkdir()
    refuses(lambda: Results(folder), "results.jsonl is a folder, expected a file")


def test_png_text_survives_any_language(folder):
    parameters = {"prompt": "Ein Fuchs im Schnee – 雪の中の狐", "seed": 3}
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    job_runner.save_png(image, folder / "a.png", parameters)
    with Image.open(folder / "a.png") as opened:
        assert json.loads(opened.text["parameters"]) == parameters
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))
    with pytest.raises(OSError, match="cannot write .*/red.png/b.png: ") as raised:
        job_runner.save_png(image, folder / "red.png" / "b.png", parameters)
    assert ".partial" not in str(raised.value) and "Errno" not in str(raised.value)


def test_jobs_are_checked_without_jax():
    code = "import sys, unialign_jax.inference.jobs, unialign_jax.inference.job_runner; sys.exit('jax' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
