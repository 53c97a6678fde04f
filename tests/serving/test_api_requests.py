"""What a request is checked for before anything runs: images before they are decoded, texts, and words of refusals."""

import base64
import io
import json
import threading

import numpy as np
import pytest
import requests
from PIL import Image

from unialign_jax.inference import job_runner
from unialign_jax.inference.job_runner import Sample
from unialign_jax.serving import api
from unialign_jax.serving import requests as served_requests
from unialign_jax.serving.engine import Engine
from unialign_jax.serving.requests import BadRequest, Limits, check_fit, image_bytes, make_work


def png(size=(32, 32), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def refusal(task, fields, data=(), limits=Limits(), **more):  # noqa: B008 (it is frozen)
    with pytest.raises(BadRequest) as error:
        make_work(task, fields, list(data), limits, **more)
    assert "\n" not in str(error.value)
    return str(error.value), error.value.parameter


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded."""
    names, decode = [], served_requests.decode_rgb
    monkeypatch.setattr(served_requests, "decode_rgb", lambda data, name: names.append(name) or decode(data, name))
    return names


LIMITS = Limits(image_pixels=2**12)


@pytest.mark.parametrize(
    "task, fields, data, words, parameter",
    [
        ("edit", {"prompt": "x"}, [png()] * 2, "edit needs 1 image (image), 2 given", "image"),
        ("personalization", {"prompt": "x"}, [png()] * 5, "needs 1 to 4 images (image), 5 given", "image"),
        ("edit", {"prompt": "x"}, [png((65, 64))], "image is 65 x 64 pixels, expected at most 4,096", "image"),
        ("personalization", {"prompt": "x"}, [png(), png((65, 64))], "image 1 is 65 x 64 pixels", "image"),
        ("personalization", {"prompt": "x"}, [png((64, 64))] * 3, "12,288 pixels in all, expected at most 8", "image"),
        ("edit", {"prompt": "x", "steps": -1}, [png()], "steps is -1", "steps"),
        ("edit", {}, [png()], "prompt is not given", "prompt"),
        ("edit", {"instruction": " "}, [png()], "instruction is", "instruction"),
        ("edit", {"prompt": "x", "colour": 1}, [png()], "edit takes no colour; it takes prompt, image", "colour"),
    ],
)  # fmt: skip
def test_nothing_is_decoded_before_all_else_is_right(decoded, task, fields, data, words, parameter):
    message, found = refusal(task, fields, data, LIMITS)
    assert words in message and found == parameter
    assert decoded == []


def test_all_images_of_a_good_request_are_decoded_once(decoded):
    work = make_work("personalization", {"prompt": "x"}, [png(), png(seed=1)], LIMITS)
    assert decoded == ["image 0", "image 1"]
    assert [image.size for image in work.images] == [(32, 32), (32, 32)] == list(work.job.sizes)


def test_few_requests_are_decoded_at_once(monkeypatch):
    decode, lock, begun, most = served_requests.decode_rgb, threading.Lock(), [], served_requests.DECODED_AT_ONCE
    all_begun, gate = threading.Event(), threading.Event()

    def slow(data, name):
        with lock:
            begun.append(name)
            if len(begun) == most:
                all_begun.set()
        assert gate.wait(30)
        return decode(data, name)

    monkeypatch.setattr(served_requests, "decode_rgb", slow)
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(make_work("edit", {"prompt": "x"}, [png()], Limits())))
        for _ in range(most + 2)
    ]
    for thread in threads:
        thread.start()
    assert all_begun.wait(30)
    threads[-1].join(0.2)  # time for one too many
    assert len(begun) == most
    gate.set()
    for thread in threads:
        thread.join(30)
    assert len(made) == most + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, fields",
    [
        ("caption", {}),
        ("vqa", {"question": "what is it?"}),
        ("edit", {"prompt": "x", "width": 48}),
        ("perception", {"kind": "canny", "size": "32x16"}),
        ("personalization", {"prompt": "x"}),
    ],
)
def test_images_that_wait_are_small_and_change_no_result(tiny_pipeline, task, fields):
    fields = {"seed": 3, "steps": 2} | fields
    data = [png((181, 97), seed) for seed in range(2 if task == "personalization" else 1)]
    works = [make_work(task, fields, data, Limits(), image_size=side) for side in (32, None)]
    small, whole = (sum(image.width * image.height for image in work.images) for work in works)
    assert small <= len(data) * 48 * 48 and small < 181 * 97
    assert whole == len(data) * 181 * 97 or "size" in fields or "width" in fields
    whole = [[Image.open(io.BytesIO(content)) for content in data]]
    results = [
        job_runner.call(tiny_pipeline, [Sample(works[0].job, 0)], images)[0]
        for images in ([list(works[0].images)], whole)
    ]
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        np.testing.assert_array_equal(*map(np.asarray, results))
        assert results[0].info["parameters"] == results[1].info["parameters"]


def test_an_edit_without_a_size_keeps_its_image():
    [image] = make_work("edit", {"prompt": "x"}, [png((181, 97))], Limits(), image_size=32).images
    assert image.size == (181, 97)


def test_an_image_that_is_too_narrow_to_be_cut():
    line = io.BytesIO()
    Image.new("RGB", (3000, 30)).save(line, "PNG")
    fields = {"prompt": "x", "size": "2048x2048"}
    message, parameter = refusal("edit", fields, [line.getvalue()], image_size=512)
    assert "3,000 x 30 pixels cannot be cut to 2,048 x 2,048" in message and parameter == "image"


@pytest.mark.parametrize(
    "task, name",
    [("text_to_image", "prompt"), ("text_to_image", "negative_prompt"), ("vqa", "question"), ("caption", "prefix")],
)
def test_texts_of_a_server(task, name):
    data = [png()] if task in ("vqa", "caption") else []
    fields = {"prompt": "x"} if task == "text_to_image" else {}
    limits = Limits(text_characters=10)
    make_work(task, fields | {name: "x" * 10}, data, limits)
    message, parameter = refusal(task, fields | {name: "x" * 11}, data, limits)
    assert message == f"{name} has 11 characters, expected at most 10 on this server" and parameter == name
    message, parameter = refusal(task, fields | {name: "a\ud800"}, data, limits)
    assert "holds half of a character" in message and parameter == name


@pytest.mark.parametrize(
    "task, options, words",
    [
        ("text_to_image", {"prompt": "x", "width": 30}, "width is 30"),
        ("caption", {"max_tokens": 25}, "max_tokens is 25, expected at most 24"),
        ("caption", {"max_tokens": 9, "text_length": 8}, "max_tokens is 9, expected at most 8"),
        ("caption", {"prefix": "red " * 30}, "prefix is"),
    ],
)
def test_what_the_model_cannot_do_is_found_before_it_is_tried(tiny_pipeline, task, options, words):
    data = [png()] if task == "caption" else []
    with pytest.raises(BadRequest, match=words):
        check_fit(make_work(task, options, data, Limits()).job, tiny_pipeline)


def test_guidance_that_excludes_another():
    fields = {"prompt": "x", "image_guidance_scale": 1.5}
    message, parameter = refusal("edit", fields | {"guidance_interval": [0.2, 0.8]}, [png()])
    assert "leave out image_guidance_scale" in message and parameter == "guidance_interval"
    job = make_work("edit", fields | {"quality": "fast"}, [png()], Limits()).job
    assert job.options["solver"] == "unipc" and "guidance_interval" not in job.options


def test_data_uris():
    content = base64.b64encode(b"picture").decode()
    for head in ("data:image/png;", "data:image/png;charset=utf-8;", "DATA:image/svg+xml;name=a.png;x=y;", "data:;"):
        assert image_bytes(f"{head}base64,{content}", "image") == b"picture"
    for value, words in {
        "data:image/png,abc": "without base64",
        f"data:image/png;charset=utf-8,{content}": "without base64",
        "https://example.org/data:image/png;base64,AAAA": "not fetched",
        "data:image/png;base64,***": "no base64",
    }.items():
        with pytest.raises(BadRequest, match=words):
            image_bytes(value, "image")


def test_a_form_has_numbers():
    assert [api.from_form("n", value) for value in ("-1", "3", "many", "1_0")] == [-1, 3, "many", "1_0"]
    assert refusal("text_to_image", {"prompt": "x", "n": -1})[0] == "n is -1, expected 1 to 16"


@pytest.fixture(scope="module")
def url(tiny_pipeline, running):
    with running(api.make_app(Engine([tiny_pipeline], max_waiting=4), model="tiny")) as url:
        yield url


@pytest.mark.parametrize(
    "path, body, parameter, words",
    [
        ("images/generations", '{"prompt": "x",}', None, "the request is no JSON: "),
        ("images/edits", '{"prompt": "x",}', None, "the request is not JSON: "),
        ("images/generations", {"prompt": "x", "colour": 1}, "colour", "takes no colour"),
        ("images/generations", {"prompt": "\ud800"}, "prompt", "half of a character"),
        ("images/generations", {"prompt": "x" * 10_001}, "prompt", "10,001 characters, expected at most 10,000"),
        ("images/generations", {"prompt": "x", "n": 8}, "n", "8 images are asked for at once, expected at most 4"),
        ("images/edits", {"prompt": "x", "image": ["AAAA"] * 5}, "image", "5 images are given, expected at most 4"),
        ("images/edits", {"prompt": "x", "image": "?"}, "image", "image is no base64"),
        ("images/edits", {"image": base64.b64encode(png()).decode()}, "prompt", "prompt is not given"),
    ],
)
def test_refusals_name_what_is_wrong(url, path, body, parameter, words):
    content = body if isinstance(body, str) else json.dumps(body)
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{url}/v1/{path}", data=content, headers=headers, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, parameter)
    assert words in error["message"]


@pytest.mark.slow
def test_a_prompt_that_is_cut_is_told_to_its_client(url, caplog):
    body = {"prompt": "a red circle", "negative_prompt": "blue " * 50, "seed": 1, "steps": 1}
    [warning] = requests.post(f"{url}/v1/images/generations", json=body, timeout=60).json()["warnings"]
    assert warning.startswith("negative_prompt is ") and "the model reads 23: the rest was cut off" in warning
    assert requests.post(f"{url}/v1/images/generations", json=body | {"negative_prompt": ""}, timeout=60).json()[
        "warnings"
    ] == []  # fmt: skip


def test_the_model_is_silent_where_its_user_is_told(tiny_pipeline, caplog, monkeypatch):
    monkeypatch.setattr(tiny_pipeline, "warns_of_cuts", False)
    tiny_pipeline._warn_of_cut("secret " * 50, 23, "prompt")
    assert not caplog.records
    monkeypatch.undo()
    tiny_pipeline._warn_of_cut("secret " * 50, 23, "prompt")
    assert "secret" in caplog.text


def test_the_openapi_page_has_the_body_of_an_edit(url):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    found = requests.get(f"{url}/openapi.json", timeout=60).json()
    content = found["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    jsonschema.validate({"prompt": "x", "image": ["AAAA", "BBBB"], "slots": 2, "steps": 3, "n": 1}, schema)
    jsonschema.validate({"prompt": "x", "image": "AAAA", "guidance_interval": [0, 1], "lora": {"a": 0.5}}, schema)
    for wrong in ({"image": "AAAA"}, {"prompt": "x"}, {"prompt": "x", "image": "A", "steps": "many"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    files = content["multipart/form-data"]["schema"]["properties"]["image"]
    assert files["items"] == {"type": "string", "format": "binary"}
    assert not [path for path in found["paths"] if "{name:path}" in path]
