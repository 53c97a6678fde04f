"""A model as a web service: python launch/serve.py --help"""

import argparse
import json
import logging
import os
import re
import secrets
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from unialign_jax.command_line import Parser, explain_missing_packages, run_command

explain_missing_packages()

log = logging.getLogger("serve")

LOCAL = ("localhost", "127.0.0.1", "::1")

HOW_TO_INSTALL_GRADIO = "Gradio is not installed: pip install --no-deps -r requirements-page.txt"

DESCRIPTION = """\
Serves a bundle, or a training run's newest checkpoint, by OpenAI's API and as a web page: images, edits, captions and
answers. Requests of one shape are done in batches, on all devices that are there.
"""

EXAMPLES = """\
examples
  python launch/serve.py
  python launch/serve.py --bundle=BUNDLE --batch=16 --warm-up=512x512
  python launch/serve.py --bundle=BUNDLE --lora=style=runs/mine:0.8 --lora=water=watercolor.safetensors
  UNIALIGN_API_KEYS=secret1,secret2 python launch/serve.py --bundle=BUNDLE --host=0.0.0.0

  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \\
       -d '{"prompt": "a large red circle", "seed": 7}'
The paths, their options and clients in Python: docs/serving.md, and /docs of the running server.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    add = parser.add_argument
    add("--bundle", default="demo", metavar="DIR", help="a bundle, a run's folder, or demo (default %(default)s)")
    add("--name", metavar="NAME", help="of the model in answers (default: the folder's)")
    add("--traceback", action="store_true", help="show where an error came from")
    add = parser.add_argument_group("the network").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)")
    add("--port", type=int, default=8000, help="default %(default)s; 0 takes a free one")
    add("--allow-host", action="append", default=[], metavar="NAME", help="lets requests call this server by this name")
    add("--no-key", action="store_true", help="let everybody in who reaches a --host that is not this machine alone")
    add("--cors-origin", action="append", default=[], metavar="URL", help="lets pages of this origin call; repeatable")
    add("--no-page", action="store_true", help="the API alone, without the web page at /")
    add("--log-prompts", action="store_true", help="write the texts of requests into the log")
    add = parser.add_argument_group("the queue").add_argument
    add("--batch", type=int, default=8, metavar="N", help="most samples at a time (default %(default)s)")
    add("--queue", type=int, default=256, metavar="N", help="samples that may wait; 429 beyond (default %(default)s)")
    add("--time-limit", type=float, default=300.0, metavar="S", help="that a request may wait (default %(default)g)")
    add("--max-samples", type=int, default=16, metavar="N", help="images of a request, up to --queue (%(default)s)")
    add("--max-steps", type=int, default=100, metavar="N", help="of the sampler (default %(default)s)")
    add("--max-side", type=int, default=2048, metavar="N", help="pixels of an image (default %(default)s)")
    add("--max-megabytes", type=int, default=32, metavar="N", help="of a request (default %(default)s)")
    add = parser.add_argument_group("the machine").add_argument
    add("--devices", type=int, metavar="N", help="replicas of the model, one a device (default: all; on a CPU 1)")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=FILE[:SCALE]",
        help="adapters that a request may name; repeatable",
    )
    add(
        "--lora-sets",
        type=int,
        default=2,
        metavar="N",
        help="sets of adapted weights that stay on a device; others are read anew (default %(default)s)",
    )
    add(
        "--shapes",
        type=int,
        default=64,
        metavar="N",
        help="shapes (task, size, steps, batch) of each program that stay compiled in memory (default %(default)s)",
    )
    add("--reproducible", action="store_true", help="a seed gives the same bytes alone and among others; no batches")
    add("--dtype", choices=["bfloat16", "float32"], help="default bfloat16, on a CPU float32")
    add("--quantize", choices=["int8", "w8a8", "fp8"], help="weights of 8 bits; w8a8, fp8: inputs too")
    add("--weights", choices=["raw", "ema"], help="of a run: default its average, if it keeps one")
    add("--attention", default="auto", metavar="NAME", help="auto, xla, cudnn (GPU) or splash (TPU)")
    add(
        "--warm-up",
        metavar="WxH,..",
        help="compile images of these sizes first, alone and in full batches; none: nothing",
    )
    add(
        "--compilation-cache",
        metavar="DIR",
        default="",
        help="keeps compiled programs, for a fast second start; none: nothing (default ~/.cache/unialign_jax/compiled)",
    )
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, batch=1, queue=1, time_limit=0.1, max_samples=1, max_steps=1, max_side=1, port=0)
    parser.check_least(arguments, lora_sets=1, shapes=1)
    if arguments.devices is not None:
        parser.check_least(arguments, devices=1)
    return arguments


def api_keys(arguments: argparse.Namespace) -> list[str]:
    """The keys of the environment. Raises ValueError where an open address has none."""
    keys = [key.strip() for key in os.environ.get("UNIALIGN_API_KEYS", "").split(",") if key.strip()]
    if not keys and not is_local(arguments.host) and not arguments.no_key:
        raise ValueError(
            f"--host={arguments.host} can be reached from other machines, and there is no key: set UNIALIGN_API_KEYS, "
            f"for example to {secrets.token_urlsafe(24)}, or give --no-key"
        )
    return keys


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    return host in LOCAL


def hosts(arguments: argparse.Namespace) -> list[str]:
    """The names that requests may call the server by; none is any, of one that other machines reach."""
    return [*(LOCAL if is_local(arguments.host) else ()), *arguments.allow_host]


def parse_loras(texts: list[str]) -> dict[str, tuple[str, float]]:
    """NAME=FILE[:SCALE] of each adapter -> {name: (file, scale)}. Raises ValueError."""
    from unialign_jax.conversion.lora import parse_reference
    from unialign_jax.files import shown

    loras = {}
    for text in texts:
        name, _, reference = text.partition("=")
        if not re.fullmatch(r"[\w.-]{1,64}", name) or not reference:
            raise ValueError(
                f"--lora is {shown(text)}, expected NAME=FILE or NAME=FILE:SCALE, the name of letters and - _ ."
            )
        if name in loras:
            raise ValueError(f"--lora has {name} twice")
        loras[name] = parse_reference(reference)
    return loras


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError, in one line, where the address is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)  # so that a second server on this port is refused now
    except OSError as error:
        found.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return found


class JsonLines(logging.Formatter):
    """Each message of the log as one line of JSON; those that are JSON already stay."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if message.startswith("{") and not record.exc_info:
            return message
        facts = {"level": record.levelname.lower(), "message": message}
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(facts)


def add_page(app, engine, **options) -> bool:
    """Puts the web page at /. Returns whether Gradio, which makes it, is installed."""
    try:
        from unialign_jax.serving import page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gradio":
            raise
        log.info(json.dumps({"page": f"not served: {HOW_TO_INSTALL_GRADIO}"}))
        return False
    page.add_page(app, engine, **options)
    return True


def serve(arguments: argparse.Namespace) -> None:
    """Runs until SIGINT or SIGTERM; requests that were taken are answered first."""
    keys, bound = api_keys(arguments), listen(arguments.host, arguments.port)  # first: what follows takes seconds
    import uvicorn

    from unialign_jax.inference.opening import ModelSource
    from unialign_jax.parallel.compiled import keep_compiled
    from unialign_jax.serving import api, warming
    from unialign_jax.serving.engine import Engine
    from unialign_jax.serving.metrics import Metrics
    from unialign_jax.serving.requests import Limits

    sizes, loras = warming.parse_sizes(arguments.warm_up), parse_loras(arguments.lora)
    source = ModelSource(arguments.bundle, weights=arguments.weights)
    source.check_complete()
    keep_compiled(arguments.compilation_cache)
    how = {name: getattr(arguments, name) for name in ("dtype", "quantize", "attention", "reproducible")}
    how |= {"max_batch": arguments.batch, "kept_shapes": arguments.shapes}
    pipelines = warming.open_replicas(source, arguments.devices, loras, **how)
    for pipeline in pipelines:
        pipeline.warns_of_cuts = False  # the API's answers have the warning: the log has no texts
    metrics = Metrics()
    engine = Engine(
        pipelines,
        max_waiting=arguments.queue,
        time_limit=arguments.time_limit,
        loras={name: scale for name, (_, scale) in loras.items()},
        kept_loras=arguments.lora_sets,
        observe=metrics.observe,
    )
    metrics.watch(engine)
    warming.warm_up(pipelines, sizes)
    limits = Limits(
        request_bytes=arguments.max_megabytes * 2**20,
        samples=min(arguments.max_samples, arguments.queue),
        max_steps=arguments.max_steps,
        max_side=arguments.max_side,
    )
    shared = {
        "model": arguments.name or source.folder.resolve().name,
        "limits": limits,
        "log_prompts": arguments.log_prompts,
        "stamp": source.stamp(arguments.dtype, arguments.quantize, arguments.reproducible),
        "metrics": metrics,
    }
    is_ending = lambda: server.should_exit  # noqa: E731
    doors = {"keys": keys, "hosts": hosts(arguments), "origins": arguments.cors_origin}
    app = api.make_app(engine, **doors, **shared, is_ending=is_ending)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_keep_alive=30))
    has_page = not arguments.no_page and add_page(app, engine, needs_key=bool(keys), is_ending=is_ending, **shared)
    host, port = bound.getsockname()[:2]
    url = f"http://{host}:{port}"
    facts = {"serving": source.folder.name, "url": f"{url}/v1", "replicas": len(pipelines)}
    log.info(json.dumps(facts | ({"page": url} if has_page else {})))
    server.run(sockets=[bound])


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("serve", "unialign_jax"):
        logging.getLogger(name).setLevel(logging.INFO)
    hint = "; try a smaller --batch or --quantize=int8"
    return run_command(
        lambda: serve(arguments), traceback=arguments.traceback, hint=hint, interrupted="the server ended"
    )


if __name__ == "__main__":
    sys.exit(main())
