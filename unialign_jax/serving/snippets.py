"""A request of the web page as what a user can run elsewhere: Python, curl, a line of a jobs file.

Images are named image.png, or image_1.png, image_2.png, ... where there are several: the pictures that were sent.
"""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from unialign_jax.inference.jobs import INPUTS, Job
from unialign_jax.inference.options import IMAGE_TASKS

METHODS = {
    "text_to_image": "generate",
    "edit": "edit",
    "perception": "perceive",
    "personalization": "personalize",
    "caption": "caption",
    "vqa": "answer",
}
SAVE = (
    "python3 -c 'import base64, json, sys; "
    '[open("made_{}.png".format(item["seed"]), "wb").write(base64.b64decode(item["b64_json"])) '
    """for item in json.load(sys.stdin)["data"]]'"""
)


def image_names(job: Job) -> list[str]:
    count = len(job.images)
    return ["image.png"] if count == 1 else [f"image_{number}.png" for number in range(1, count + 1)]


def _options(job: Job) -> dict[str, Any]:
    """All options that a job was given, with its seed."""
    options = {"seed": job.seed} | job.options
    if job.images_per_prompt != 1:
        options["images_per_prompt"] = job.images_per_prompt
    if job.negative_prompt:
        options["negative_prompt"] = job.negative_prompt
    return {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}


def as_python(job: Job, model: str, loras: Mapping[str, float] | None = None, *, reproducible: bool = False) -> str:
    """The call of `Pipeline` that makes the same.

    Args:
      model: the bundle's name.
      loras: {name: scale} of its adapters; the name stands for their file.
      reproducible: whether the server is.
    """
    options, names = _options(job), image_names(job)
    texts = [job.text] if job.text is not None else []
    images = [names if job.task == "personalization" else names[0]] if job.images else []
    if job.task == "perception":
        arguments = [options.pop("kind"), *images]
        options |= {"instruction": job.text} if texts else {}
    else:
        arguments = [*images, *texts] if job.task == "vqa" else [*texts, *images]
    listed = ", ".join([*map(repr, arguments), *(f"{key}={value!r}" for key, value in options.items())])
    how = ", reproducible=True" if reproducible else ""
    begin = f"from unialign_jax import Pipeline\n\npipeline = Pipeline.from_bundle({model!r}{how})\n"
    begin += "".join(f"pipeline.load_lora({name!r}, scale={scale!r})\n" for name, scale in (loras or {}).items())
    call = f"pipeline.{METHODS[job.task]}({listed})"
    if job.task not in IMAGE_TASKS:
        return f"{begin}print({call}[0])\n"
    save = f'    image.save(f"made_{{{job.seed} + number}}.png")\n'
    return f"{begin}for number, image in enumerate({call}):\n{save}"


def as_job(job: Job) -> str:
    """The line of a jobs file (launch/generate.py --jobs)."""
    fields: dict[str, Any] = {"task": job.task}
    if job.text is not None:
        fields[INPUTS[job.task].texts[0]] = job.text
    if job.images:
        names = image_names(job)
        fields |= {"image": names[0]} if len(names) == 1 else {"images": names}
    return json.dumps(fields | _options(job)) + "\n"


def as_curl(job: Job, url: str, loras: Mapping[str, float] | None = None, *, needs_key: bool = False) -> str:
    """The request to a server, whose images it saves by their seeds.

    Args:
      url: of the server, such as http://127.0.0.1:8000.
      loras: {name: scale} of its adapters.
      needs_key: reads the key from UNIALIGN_API_KEY.
    """
    key = ' \\\n  -H "Authorization: Bearer $UNIALIGN_API_KEY"' if needs_key else ""
    options = _options(job) | ({"lora": dict(loras)} if loras else {})
    if "images_per_prompt" in options:
        options["n"] = options.pop("images_per_prompt")

    def request(path: str) -> str:
        return f"curl -s {shlex.quote(f'{url}/v1/{path}')}{key}"

    if job.task in ("edit", "personalization"):
        slots = [f"-F 'image[]=@{name}'" for name in image_names(job)]
        texts = {"prompt": job.text} | options
        fields = [f"--form-string {shlex.quote(f'{name}={_as_form(value)}')}" for name, value in texts.items()]
        return " \\\n  ".join([request("images/edits"), *slots, *fields]) + f" \\\n  | {SAVE}\n"
    if job.task == "text_to_image":
        body, images, path, then = {"prompt": job.text} | options, "", "images/generations", f" \\\n  | {SAVE}"
    elif job.task == "perception":
        body, path, then = {"image": _PICTURE} | options, "tasks/perceive", f" \\\n  | {SAVE}"
        body |= {"instruction": job.text} if job.text is not None else {}
    else:
        parts: list[dict] = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_PICTURE}"}}]
        parts += [{"type": "text", "text": job.text}] if job.text is not None else []
        body = {"task": job.task, "messages": [{"role": "user", "content": parts}]} | options
        path, then = "chat/completions", ""
    images = "$(base64 < image.png | tr -d '\\n')"
    content = _in_document(json.dumps(body)).replace(_PICTURE, images)
    head = f"{request(path)} \\\n  -H 'Content-Type: application/json' -d @-"
    return f"{head} <<END{then}\n{content}\nEND\n"


_PICTURE = "THE-PICTURE-AS-BASE64"  # stands for it until the text around it is quoted


def _as_form(value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _in_document(text: str) -> str:
    """A text as it stands in a here-document in which the shell replaces."""
    for character in "\\$`":
        text = text.replace(character, f"\\{character}")
    return text
