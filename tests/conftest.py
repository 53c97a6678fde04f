"""Every test sees eight virtual CPU devices; programs that name no mesh use the first."""

import collections
import dataclasses
import functools
import gc
import http.server
import importlib.machinery
import importlib.util
import json
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from unialign_jax.models import presets
from unialign_jax.training.config import flat_items, load_stage

# Most of the suite's time is compiling. With these a train step compiles in 3 s instead of 14, but takes 50 ms
# instead of 15; the fixture `optimized` is for tests where that counts. Commands that tests start inherit them.
COMPILE_FAST = (
    "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILE_FAST}"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes many objects that live long, and a source line for each operation: both cost a tenth of its time.
gc.set_threshold(200_000, 20, 20)
jax.config.update("jax_traceback_in_locations_limit", 0)
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
# Two steps in flight on more virtual devices than cores can wait for each other's collectives for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)

ROOT = Path(__file__).resolve().parent.parent
# Of requirements-test.txt: --fast does without.
WITHOUT = ("torch", "diffusers", "peft", "matplotlib", "nbformat", "nbclient")
STREAMS = ("text_to_image", "edit", "perception", "personalization", "vqa")


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="no PyTorch, and no test that is marked slow")


class FastFinder(importlib.machinery.PathFinder):
    """Finds the packages of WITHOUT nowhere."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.partition(".")[0] in WITHOUT else super().find_spec(fullname, path, target)


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist keeps the order below, instead of most tests first
    if config.getoption("--fast"):
        sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = FastFinder


def pytest_collection_modifyitems(config, items):
    """Files of many slow tests come first: a long one at the end would leave the other cores idle."""
    slow_tests = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow_tests[item.path])
    if config.getoption("--fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(autouse=True)
def levels_of_logs():
    """Commands that run in this process set levels for good; every test begins with those of a fresh one."""
    for name, level in {None: logging.WARNING, "unialign_jax": 0, "generate": 0, "absl": 0, "asyncio": 0}.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def memory_as_it_is():
    """A command that trains in this process would set how the process keeps its memory, for all tests after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unialign_jax.parallel.processes.keep_freed_memory", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(pytestconfig):
    """A program that a test compiled is loaded by others, by the commands that they start and by later sessions."""
    directory = str(pytestconfig.cache.mkdir("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"compilation_cache_dir": directory, "persistent_cache_min_compile_time_secs": 0.1}.items():
            jax.config.update(f"jax_{name}", value)
            patch.setenv(f"JAX_{name.upper()}", str(value))
        yield directory


@pytest.fixture(scope="module")
def optimized():
    """The programs that the module's tests compile from here on are optimized: for those that run for many seconds."""
    from unialign_jax.sampling.programs import Programs

    for switch in (False, True):
        jax.config.update("jax_disable_most_optimizations", switch)
        Programs.of.__func__.cache_clear()
        if not switch:
            yield


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
    """A small shapes data set of all five streams, 32 px, 40 records each."""
    from unialign_jax.data.shapes.tasks import write_shapes

    directory = tmp_path_factory.mktemp("shapes")
    write_shapes(directory, num_records=40, image_size=32, teacher_width=16)
    return directory


# What of a configuration does not change the program of a step, but through the networks, the mesh and the batch.
NOT_OF_THE_STEP = {"name", "num_steps", "init_from", "init_weights", "frozen_from", "tokenizer", "streams", "data"}
NOT_OF_THE_STEP |= {"mesh", "compilation_cache", "tracker", "log_every", "checkpoint", "samples", "validation"}


@pytest.fixture(scope="session")
def shared_programs():
    """Runs of one process share what is the same: executables, first states and random encoders.

    Most of a small run is tracing its programs and loading them, 5 s where the steps take half a second.
    """
    from unialign_jax.data.kinds import has_image_pass
    from unialign_jax.training import program
    from unialign_jax.training.loop import Trainer
    from unialign_jax.training.validation import Validator

    made = {}

    def once(key, make):
        if key not in made:
            made[key] = make()
        return made[key]

    def key_of(trainer):
        config = {key: value for key, value in trainer.config.to_dict().items() if key not in NOT_OF_THE_STEP}
        flag = jax.config.values["jax_disable_most_optimizations"]
        return json.dumps(config, sort_keys=True), trainer.networks, trainer.mesh, trainer.token_ids, flag

    def step_of(trainer, name):
        batch = tuple(sorted(trainer.batch_shapes(name).items()))
        return *key_of(trainer), has_image_pass(trainer.settings[name].kind), batch, type(trainer).step_function

    def compile_step(self, name, compiling=program.StepProgram.compile_step):
        return once(("step", *step_of(self, name)), lambda: compiling(self, name))

    def compile_validation(self, name, compiling=Validator._compile):
        return once(("validation", *step_of(self._trainer, name)), lambda: compiling(self, name))

    def init_state(self, initial=Trainer.init_state):
        if self.config.init_from:
            return initial(self)
        # Copies, since a step donates the state.
        return jax.tree.map(lambda leaf: leaf.copy(), once(("state", *key_of(self)), lambda: initial(self)))

    def init_frozen(self, base=None, initial=Trainer.init_frozen):
        networks = self.networks
        if self.config.frozen_from or networks.lora or networks.teacher or self.config.autoencoder.kind == "kl":
            return initial(self, base)
        return jax.tree.map(lambda leaf: leaf, once(("frozen", *key_of(self)), lambda: initial(self)))

    def make_optimizer(making=program.make_optimizer, **settings):
        return once(("optimizer", json.dumps(settings, sort_keys=True)), lambda: making(**settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.StepProgram, "compile_step", compile_step)
        patch.setattr(Validator, "_compile", compile_validation)
        patch.setattr(Trainer, "init_state", init_state)
        patch.setattr(Trainer, "init_frozen", init_frozen)
        patch.setattr(program, "make_optimizer", make_optimizer)
        for name in ("abstract_state", "abstract_frozen"):
            patch.setattr(program, name, functools.cache(getattr(program, name)))
        yield


@pytest.fixture(scope="session")
def small_config(shapes_dir, shared_programs):
    """A function (stage, key__subkey=value ...) -> the stage's configuration, small enough to compile in seconds."""

    def make(stage="stage1", **overrides):
        config = load_stage(f"{stage}:tiny")
        config.update(
            {
                "num_steps": 6,
                "batch_size": 8,
                "image_size": 32,
                "text_length": 24,
                "init_from": "",
                "log_every": 1,
                "sigma": {"shift": 1.0},
                "frozen_from": "",
                "autoencoder": dataclasses.asdict(presets.AUTOENCODER["pixels"]),
                "model": {
                    "depth": 2,
                    "num_heads": 2,
                    "head_width": 16,
                    "tap_depth": 1,
                    "text_width": 32,
                    "latent_channels": 48,
                    "max_patches": 96,
                    "text_positions": 0,
                },
                # A recipe of the tests' own: that of the tiny stages is searched for, and moves.
                "loss_weights": {"masked_text": 0.2},
                "optimizer": {
                    "learning_rate": 2e-3,
                    "warmup_steps": 50,
                    "cooldown_start": 0,
                    "cooldown_steps": 0,
                    "clip_norm": 2.0,
                    "b2": 0.999,
                },
                "ema_decay": 0.995,
                "heads": {"hidden_width": 32, "teacher_width": 16},
                "text_encoder": {"width": 32, "mlp_width": 48, "num_heads": 2, "head_width": 16, "depth": 1},
                "checkpoint": {"every": 3, "keep_last": 2, "keep_every": 0},
                "samples": {
                    "every": 0,
                    "count": 0,
                    "steps": 2,
                    "caption_steps": 2,
                    "guidance_scale": 3.0,
                    "shift": 3.0,
                },
            }
        )
        for name, stream in config.streams.items():
            stream.path = str(shapes_dir / name)
        for key, value in overrides.items():
            config.update_from_flattened_dict({key.replace("__", "."): value})
        return config

    return make


@pytest.fixture(scope="session")
def changes_of():
    """A function (configuration) -> the "key=value" changes that make it of its tiny stage, streams aside."""

    def make(config):
        stage = dict(flat_items(load_stage(f"{config.name}:tiny")))
        changed = ((key, value) for key, value in flat_items(config) if stage.get(key) != value)
        return [f"{key}={value}" for key, value in changed if not key.startswith("streams.")]

    return make


# What no message to a user may hold: the repr of an object, a traceback, a nested prefix ("stream a: stream a:").
UNKIND = re.compile(r"object at 0x|<_io\.|<built-in|Traceback|\b(\S+ ?\S+: )\1")


def assert_one_line(message: str, *words: str):
    """A message to a user: one line, not empty, without Python's inner names, and with every one of `words`."""
    assert message.strip() and "\n" not in message.strip(), f"expected one line, found {message!r}"
    assert not UNKIND.search(message), f"not a message for a user: {message!r}"
    missing = [word for word in words if word not in message]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.fixture(scope="session")
def refuses():
    """A function (call, *words): the call raises ValueError or OSError in one line that holds the words."""

    def check(call, *words):
        with pytest.raises((ValueError, OSError)) as raised:
            call()
        assert_one_line(str(raised.value), *words)
        return str(raised.value)

    return check


@pytest.fixture(scope="session")
def launch_command():
    """A function (name) -> the module launch/<name>.py, imported as a command's file is."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def command_refuses(launch_command, capsys):
    """A function (name, arguments, *words): `launch/<name>.py` ends with a status that is not 0 and one `error:` line.

    What else it prints on stderr (progress, warnings) is allowed, a traceback is not.
    """

    def check(name, arguments, *words):
        capsys.readouterr()
        try:
            status = launch_command(name).main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            status = stopped.code
        printed = capsys.readouterr().err
        if isinstance(status, str):  # sys.exit("error: ...") prints it at the end of the process
            printed += status + "\n"
        assert status not in (0, None), f"{name} accepted {arguments}"
        errors = [line for line in printed.splitlines() if "error: " in line]
        assert len(errors) == 1, f"expected one line of error, found {printed!r}"
        assert "Traceback" not in printed
        assert_one_line(errors[0], *words)
        return errors[0]

    return check


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A bundle with random weights that carry signal everywhere: 32 px, 24 tokens, pixels for latents, float32."""
    import numpy as np

    from unialign_jax import bundle
    from unialign_jax.data.tokenizer import load_tokenizer

    config = bundle.BundleConfig(
        transformer=dataclasses.replace(
            presets.MMDIT["tiny"],
            depth=2,
            num_heads=2,
            head_width=16,
            tap_depth=1,
            text_width=32,
            latent_channels=48,
            max_patches=96,
            text_positions=0,
        ),
        text_encoder=dataclasses.replace(
            presets.TEXT_ENCODER["tiny"], width=32, mlp_width=48, num_heads=2, head_width=16, depth=1
        ),
        autoencoder=presets.AUTOENCODER["pixels"],
        image_size=32,
        text_length=24,
    )
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (0.2 * generator.normal(size=leaf.shape)).astype(np.float32), bundle.abstract_params(config)
    )
    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    bundle.save(directory, config, params, tokenizer=load_tokenizer())
    return directory


@pytest.fixture(scope="session")
def positioned_bundle(tiny_bundle, tmp_path_factory):
    """`tiny_bundle` with a table of 24 text positions, random as its other weights."""
    import dataclasses

    import numpy as np

    from unialign_jax import bundle

    config, params = bundle.load(tiny_bundle)
    transformer = dataclasses.replace(config.transformer, text_positions=24)
    table = np.random.default_rng(1).normal(size=(24, transformer.width)).astype(np.float32)
    params["transformer"] = params["transformer"] | {"text_positions": table}
    directory = tmp_path_factory.mktemp("bundles") / "positioned"
    config = dataclasses.replace(config, transformer=transformer)
    bundle.save(directory, config, params, tokenizer=bundle.tokenizer_path(tiny_bundle))
    return directory


class ChatServer(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on this machine, as well or badly behaved as a test wants it.

    Attributes:
      name_of: the name of a request by its body; what `asked` counts.
      behave: (name, how often it was asked) -> (status, headers, content); a status of None hangs up, and a list of
        contents comes drop by drop.
      requests: (path, headers, body) of all, in their order.
      most: how many were answered at a time.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ChatHandler)
        self.asked, self.requests, self.running, self.most = collections.Counter(), [], 0, 0
        self.lock = threading.Lock()
        self.name_of = lambda body: json.dumps(body, sort_keys=True)
        self.behave = lambda name, times: (200, {}, self.answer("yes"))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @staticmethod
    def answer(text, **choice):
        """The content of an answer that says `text`."""
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        return json.dumps({"choices": [{"message": {"content": text}} | choice], "usage": usage}).encode()


class ChatHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        name = server.name_of(body)
        with server.lock:
            server.asked[name] += 1
            times = server.asked[name]
            server.requests.append((self.path, dict(self.headers), body))
            server.running += 1
            server.most = max(server.most, server.running)
        try:
            status, headers, content = server.behave(name, times)
            if status is None:  # hangs up
                self.connection.close()
                return
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            for piece in content if isinstance(content, list) else [content]:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.1 if isinstance(content, list) else 0)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.running -= 1

    def log_message(self, *_):
        pass


@pytest.fixture
def chat_server():
    """A running `ChatServer`."""
    with ChatServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
