"""Configurations: the stages run, and what is wrong with one is said at once, each thing in one line."""

import json
import logging
import math
import re
import types
from datetime import datetime
from pathlib import Path

import jax
import pytest

from unialign_jax.configs.base import paper_config, stream
from unialign_jax.training import runs
from unialign_jax.training.config import (
    RENAMED,
    active_streams,
    config_problems,
    load_stage,
    make_changes,
    parse_value,
    read_config,
    with_new_names,
)
from unialign_jax.training.loop import Trainer, inherit_sources, write_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
@pytest.mark.parametrize("size", ["", ":tiny"])
def test_the_stages_can_run(stage, size):
    config = load_stage(f"{ROOT}/configs/{stage}.py{size}")
    assert config_problems(config, device_count=8) == []
    assert config.name == stage


def test_the_stages_are_the_papers():
    """arXiv 2509.23760, implementation details: 80 K steps over two stages, 30 K in the third."""
    stages = [load_stage(f"{ROOT}/configs/stage{number}.py") for number in (1, 2, 3)]
    assert sum(stage.num_steps for stage in stages[:2]) == 80_000 and stages[2].num_steps == 30_000
    for stage in stages:
        weights = stage.loss_weights
        assert (weights.masked_text, weights.cross_modal, weights.intrinsic_modal) == (0.2, 0.05, 0.1)
        assert (stage.optimizer.learning_rate, stage.optimizer.weight_decay) == (3e-5, 1e-2)
        assert (stage.batch_size, stage.image_size, stage.text_length) == (256, 512, 256)
    assert [set(stage.streams) for stage in stages] == [
        {"text_to_image"},
        {"text_to_image", "edit", "perception", "personalization"},
        {"text_to_image", "edit", "perception", "personalization", "vqa"},
    ]


# key, what it is set to, what the one line must say
BAD_VALUES = [
    ("num_steps", 0, "num_steps is 0"),
    ("accumulation", 0, "accumulation is 0"),
    ("batch_size", 0, "batch_size is 0"),
    ("image_size", 36, "multiple of 16"),
    ("text_length", 1, "text_length is 1"),
    ("model.latent_channels", 16, "the autoencoder gives 8"),
    ("model.text_width", 64, "the text encoder gives 128"),
    ("model.vocab_size", 1000, "512 rows"),
    ("model.tap_depth", 5, "1 to model.depth 4"),
    ("model.depth", 0, "model.depth is 0"),
    ("model.remat", "all", "none, block, dots"),
    ("model.attention", "flash", "auto, xla, cudnn, splash"),
    ("model.dtype", "float16", "bfloat16, float32"),
    ("parity.flow_matching_form", "eps", "velocity, x0"),
    ("parity.masked_text_normalization", "mean", "positions, maskable"),
    ("parity.cross_modal_direction", "both", "symmetric, image_to_text"),
    ("parity.sigma_levels", -1, "0 or more"),
    ("cross_modal.temperature", 0.0, "above 0"),
    ("init_weights", "average", "raw, ema"),
    ("prompt_dropout", 1.5, "0 to 1"),
    ("ema_decay", 1.0, "less than 1"),
    ("min_mask_fraction", 0.0, "between 0 and 1"),
    ("loss_weights.masked_text", -1.0, "0 or more"),
    ("loss_weights.flow_matching", math.nan, "0 or more"),
    ("optimizer.learning_rate", math.inf, "above 0"),
    ("optimizer.clip_norm", 0.0, "above 0"),
    ("optimizer.freeze", ("(",), "no regular expression"),
    ("teacher.grid", -8, "0 or more"),
    ("teacher.grid", 24, "a multiple of a token's"),
    ("data.max_bad_fraction", -0.1, "0 to 1"),
    ("data.prefetch", -1, "0 or more"),
    ("data.prefetch_gb", 0.0, "above 0"),
    ("data.prefetch_gb", -4.0, "above 0"),
    ("data.prefetch_gb", math.nan, "above 0"),
    ("data.prefetch_gb", math.inf, "above 0"),
    ("log_every", 0, "at least 1"),
    ("checkpoint.keep_last", 0, "at least 1"),
    ("samples.steps", 0, "at least 1"),
    ("streams.text_to_image.path", "", "has no data: set streams.text_to_image.path, or its weight to 0"),
    ("streams.text_to_image.weight", 0.0, "every stream has weight 0"),
    ("streams.text_to_image.weight", -1.0, "0 or more"),
    ("streams.text_to_image.kind", "video", "text_to_image, edit, perception, personalization, vqa"),
    ("streams.text_to_image.num_conditions", 2, "0 for text_to_image"),
    ("mesh.tensor", 3, "mesh tensor=3 does not fit 8 devices"),
    ("mesh.data", -2, "sizes are positive"),
    ("mesh.context", 8, "model.num_heads is 4, expected a multiple of mesh.context 8, over which attention splits"),
]


@pytest.mark.bad_input
@pytest.mark.bad_input
@pytest.mark.parametrize(("key", "value", "expected"), BAD_VALUES)
def test_each_bad_value_is_one_line_that_names_it(key, value, expected):
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    config.update_from_flattened_dict({key: value})
    problems = config_problems(config, device_count=8)
    assert any(expected in problem for problem in problems), problems
    assert len(problems) <= 2 and not any("\n" in problem for problem in problems)


def test_batch_by_devices_and_accumulation():
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    config.update({"batch_size": 24, "accumulation": 2, "mesh": {"data": 2, "fsdp": -1, "tensor": 1}})
    (problem,) = config_problems(config, device_count=8)
    assert problem == (
        "batch_size 24 is not divisible by 16 (accumulation 2 x 8 devices of the mesh's axes that split the batch): "
        "the nearest that fits is 32"
    )
    config.mesh.tensor = 2  # the tensor axis does not split the batch
    assert config_problems(config, device_count=8) == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        (["text_length=269"], 1293),
        (["image_size=496"], 31 * 31 + 256),
        (["image_size=496", "text_length=255"], 2 * 31 * 31 + 255),  # of an edit, with its condition image
    ],
)
def test_cudnn_trains_even_numbers_of_tokens(changes, tokens):
    """JAX refuses others ("Unsupported sequence length Q 1293, KV 1293"); "auto" is cuDNN on an NVIDIA GPU."""
    config = read_config(f"{ROOT}/configs/stage2.py", changes)
    gpu, old = (types.SimpleNamespace(platform="gpu", compute_capability=name) for name in ("9.0", "7.5"))
    (problem,) = config_problems(config, device=gpu)
    assert f"give {tokens} tokens, and cuDNN trains attention over even numbers only" in problem
    assert problem.endswith("(image_size in multiples of 32), or model.attention=xla")
    assert config_problems(config) == config_problems(config, device=old) == []
    config.model.attention = "cudnn"
    assert config_problems(config) == [problem]
    config.model.attention = "xla"
    assert config_problems(config, device=gpu) == []


@pytest.mark.bad_input
def test_split_tokens_come_out_even():
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    config.mesh.update({"data": 4, "context": 2})
    assert config_problems(config, device_count=8) == []
    config.mesh.update({"data": 1, "tensor": 4})
    (problem,) = config_problems(config, device_count=8)
    assert problem.startswith("model.num_heads is 4, expected a multiple of mesh.context 2 x mesh.tensor 4")
    config.update({"model": {"num_heads": 5}, "mesh": {"context": 5, "tensor": 1}})
    assert config_problems(config, device_count=5) == [
        "text_length is 32, expected a multiple of mesh.context 5, which splits tokens",
        "an image of 64 x 64 has 16 tokens, expected a multiple of mesh.context 5, which splits them",
    ]


def test_a_mesh_is_open_or_given():
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    assert config_problems(config, device_count=8) == []
    (problem,) = config_problems(config, device_count=16)  # whatever is chosen splits the batch over all
    assert problem.startswith("batch_size 8 is not divisible by 16 (accumulation 1 x 16 devices")
    config.mesh.fsdp = -1
    assert config_problems(config, device_count=8) == []
    config.mesh.data = -1
    assert config_problems(config, device_count=8) == [
        "mesh data=-1, fsdp=-1: sizes are positive, and at most one may be -1"
    ]
    config.mesh.update({"replica": 2, "data": 2, "encoder": 0, "fsdp": 0})
    assert config_problems(config, device_count=4) == []
    assert config_problems(config, device_count=8) == [
        "mesh replica=2, data=2 does not fit 8 devices: sizes multiply to that, and one may be -1, the rest"
    ]
    config.mesh.update({"replica": 1, "data": 1, "encoder": 1, "fsdp": -1, "tensor": 1})  # as runs before had it
    assert config_problems(config, device_count=8) == []


def test_a_stage_file_with_misspelt_keys_does_not_pass():
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    config.batchsize = 4
    config.optimizer.learningrate = 1e-4
    config.streams.edit = stream("edit", "data/edit")
    config.streams.edit.wieght = 2.0
    del config.log_every
    assert config_problems(config) == [
        "unknown key batchsize (nearest: batch_size)",
        "unknown key optimizer.learningrate (nearest: optimizer.learning_rate)",
        "unknown key streams.edit.wieght (nearest: streams.edit.weight)",
        "missing key log_every",
    ]


def test_the_trainer_lists_everything_at_once_and_before_the_data(small_config):
    config = small_config(num_steps=0, batch_size=3, image_size=33, mesh__data=2, mesh__fsdp=1)
    with pytest.raises(ValueError) as error:
        Trainer(config, jax.devices()[:2])
    lines = str(error.value).splitlines()
    assert lines[0] == "the configuration cannot run:"
    assert [line.split()[0] for line in lines[1:]] == ["num_steps", "batch_size", "image_size"]


def test_changes_keep_their_types():
    config = paper_config()
    config.streams.edit = stream("edit", "somewhere")
    changes = ["batch_size=32", "optimizer.learning_rate=1e-4", "parity.decay_1d=False", "name=a=b", "mesh.fsdp=4"]
    changes += ["optimizer.freeze=transformer/(a|b)", "streams.edit.weight=2", "autoencoder.block_widths=(8, 16)"]
    assert make_changes(config, changes) == []
    assert (config.batch_size, config.optimizer.learning_rate, config.mesh.fsdp) == (32, 1e-4, 4)
    assert config.parity.decay_1d is False and config.name == "a=b"
    assert config.optimizer.freeze == ("transformer/(a|b)",)
    assert config.streams.edit.weight == 2.0 and isinstance(config.streams.edit.weight, float)
    assert config.autoencoder.block_widths == (8, 16)
    assert make_changes(config, ["optimizer.freeze=('a', 'b,c')"]) == []
    assert config.optimizer.freeze == ("a", "b,c")
    assert make_changes(config, ["optimizer.freeze=()"]) == [] and config.optimizer.freeze == ()


@pytest.mark.parametrize(
    ("text", "like", "expected"),
    [
        ("abc", 1, "a whole number"),
        ("1.5", 1, "a whole number"),
        ("", 1, "a whole number"),
        ("fast", 1.0, "a number"),
        ("yes", True, "true or false"),
        ("(1, 'a')", (1, 2), "a tuple of int"),
        ("3", ("a",), "a tuple of str"),
    ],
)
def test_values_of_another_type(text, like, expected):
    with pytest.raises(ValueError, match=expected):
        parse_value(text, like)


def test_a_new_stream_by_changes_alone():
    """Its defaults are those of its kind, wherever the kind stands among the changes."""
    config = read_config(
        f"{ROOT}/configs/stage1.py",
        [
            "streams.more_edits.weight=0.5",
            "streams.more_edits.path=data/more",
            "streams.more_edits.kind=edit",
            "streams.scenes.kind=personalization",
            "streams.scenes.path=data/scenes",
            "streams.scenes.num_conditions=2",
        ],
    )
    assert set(config.streams) == {"text_to_image", "more_edits", "scenes"}
    assert config.streams.more_edits.to_dict() == stream("edit", "data/more", 0.5, 1).to_dict()
    assert config.streams.scenes.to_dict() == stream("personalization", "data/scenes", 1.0, 2).to_dict()
    assert config_problems(config) == [] and "more_edits" in active_streams(config)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            ["streams.more.path=x"],
            "unknown key streams.more.path (nearest: streams.text_to_image.path; streams.more.kind",
        ),
        (
            ["streams.more.kind=film", "streams.more.path=x"],
            "streams.more.kind is 'film', expected one of text_to_image",
        ),
        (["streams.more.kind=edit"], "streams.more has no data: set streams.more.path"),
        (["streams.a/b.kind=edit"], "'a/b' is no name for a stream"),
        (["streams.a.b.kind=edit"], "'a.b' is no name for a stream"),
        (["streams..kind=edit"], "'' is no name for a stream"),
        (["streams.more.kind=edit", "streams.more.wait=1", "streams.more.path=x"], "unknown key streams.more.wait"),
    ],
)
def test_what_makes_no_stream(changes, expected):
    config = load_stage(f"{ROOT}/configs/stage1.py")
    assert expected in "\n".join(make_changes(config, changes) + config_problems(config))


def test_changes_at_a_restart_are_recorded(tmp_path):
    config = load_stage(f"{ROOT}/configs/stage2.py")
    write_config(config, tmp_path)
    write_config(config, tmp_path, 100)
    assert not (tmp_path / "config_history.jsonl").exists()
    make_changes(config, ["streams.edit.weight=3", "streams.more.kind=edit", "streams.more.path=data/more"])
    write_config(config, tmp_path, 200)
    make_changes(config, ["streams.edit.weight=2"])
    write_config(config, tmp_path, 300)
    first, second = map(json.loads, (tmp_path / "config_history.jsonl").read_text().splitlines())
    before = load_stage(f"{ROOT}/configs/stage2.py").streams.edit.weight
    assert first["step"] == 200 and datetime.fromisoformat(first["time"]).tzinfo
    assert first["changes"] == [
        {"key": "streams.edit.weight", "from": before, "to": 3.0},
        {"key": "streams.more", "from": None, "to": config.streams.more.to_dict()},
    ]
    assert second["step"] == 300
    assert second["changes"] == [{"key": "streams.edit.weight", "from": 3.0, "to": 2.0}]


def test_a_set_that_is_read_often_is_told(small_config, caplog):
    """40 records; 100 steps of 8, of which text to image has half and each edit stream a quarter."""
    config = small_config(num_steps=100, data__max_epochs_warning=9)
    path = config.streams.text_to_image.path.replace("text_to_image", "edit")
    for name in ("edit", "more"):
        config.streams[name] = stream("edit", path, weight=0.5)
    trainer = Trainer(config, jax.devices()[:1])
    assert trainer.mixture.epochs(100) == {"edit": 5.0, "more": 5.0, "text_to_image": 10.0}
    told = [line for line in caplog.messages if "are read" in line]
    assert told == [
        "stream text_to_image: 40 records are read 10 times each, more than data.max_epochs_warning 9: "
        "lower its weight or num_steps, or add records"
    ]


def test_all_problems_of_a_command_line_come_at_once():
    changes = ["batchsize=4", "learning_rate=1", "batch_size=abc", "optimizer=3", "prompt_dropout=2", "zzzz=1"]
    with pytest.raises(ValueError) as error:
        read_config(f"{ROOT}/configs/stage1.py:tiny", changes)
    lines = str(error.value).splitlines()
    assert lines[0] == "the configuration cannot run:"
    assert [line.strip() for line in lines[1:4]] == [
        "unknown key batchsize (nearest: batch_size)",
        "unknown key learning_rate (nearest: optimizer.learning_rate)",
        "batch_size is 'abc', expected a whole number",
    ]
    assert lines[4].strip().startswith("optimizer is a group of keys: set one of optimizer.b1, ")
    assert lines[5].strip() == "unknown key zzzz"
    assert lines[6].strip().startswith("prompt_dropout is 2.0, expected 0 to 1")
    assert len(lines) == 7


def test_a_stage_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no stage file configs/stage9.py: name configs/stage1.py"):
        load_stage("configs/stage9.py:tiny")
    with pytest.raises(ValueError, match=r"stage1.py:huge gives .* unknown size 'huge' .* expected nothing or :tiny$"):
        load_stage(f"{ROOT}/configs/stage1.py:huge")
    for source, expected in {
        "x = (": "was never closed",
        "import nowhere": "line 1: ModuleNotFoundError: No module named 'nowhere'",
        "x = 1": "it has no function get_config",
        "def get_config(size):\n    return {}": "get_config returns dict, expected a ConfigDict",
        "from unialign_jax.configs.base import paper_config\n\n\ndef get_config(size):\n"
        "    config = paper_config(size)\n    config.batch_size = 'many'\n    return config": "line 6: TypeError",
    }.items():
        (tmp_path / "mine.py").write_text(source)
        with pytest.raises(ValueError, match=expected) as error:
            load_stage(str(tmp_path / "mine.py"))
        assert "\n" not in str(error.value)


def test_a_stage_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_stage("stage2:tiny") == load_stage(f"{ROOT}/configs/stage2.py:tiny")
    (tmp_path / "copied.py").write_text((ROOT / "configs" / "stage1.py").read_text())
    copied = load_stage("copied.py")
    assert copied.name == "copied" and config_problems(copied) == []


OLD = """
from unialign_jax.training.config import paper_config, stream, tiny

def get_config(size):
    config = paper_config(size)
    config.name = "mine"
    config.num_steps = 10
    config.streams.text_to_image = stream("text_to_image", "data")
    return tiny(config, num_steps=10)
"""


def test_a_stage_file_from_before_the_recipe_lay_in_configs(tmp_path):
    (tmp_path / "mine.py").write_text(OLD)
    config = load_stage(f"{tmp_path}/mine.py")
    assert config.name == "mine" and config_problems(config) == []


def test_old_keys_are_told_their_new_names():
    for old, new in RENAMED.items():
        told = f"(nearest: {new})" if new else "(it is always on)"
        with pytest.raises(ValueError, match=re.escape(f"unknown key {old} {told}")):
            read_config(f"{ROOT}/configs/stage1.py:tiny", [f"{old}=1"])
        config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
        config.update_from_flattened_dict({old: 1})
        assert config_problems(config) == [f"unknown key {old} {told}"]


def test_a_run_with_the_keys_of_before_can_be_read(tmp_path, caplog):
    """Its switches become those of `parity`, so that nothing seems to have changed but what has."""
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    config.parity.flow_matching_form = "x0"
    before = json.loads(config.to_json_best_effort())
    parity = before.pop("parity")
    before |= {"one_forward": True, "flow_matching_form": "x0", "masked_text_normalization": "positions"}
    before["cross_modal"]["direction"] = parity["cross_modal_direction"]
    before["optimizer"]["decay_1d"], before["sigma"]["levels"] = parity["decay_1d"], 1000
    before["sigma"]["of_old"] = {}
    (tmp_path / "config.json").write_text(json.dumps(before))
    after = with_new_names(before)
    assert after["parity"] == parity | {"sigma_levels": 1000}
    assert not {"one_forward", "flow_matching_form"} & after.keys() and after["cross_modal"] == {"temperature": 0.07}
    assert after["sigma"] == {"mean": 0.0, "std": 1.0, "shift": 3.0, "of_old": {}}
    assert with_new_names(after) == after
    settings = runs.read_settings(tmp_path)  # by which it is exported, converted and sampled from
    assert runs.component_configs(tmp_path, settings)["transformer"].depth == config.model.depth
    assert runs.describe(tmp_path, settings)["tasks"] == ("text_to_image", "caption")
    with caplog.at_level(logging.WARNING):
        write_config(inherit_sources(config, tmp_path), tmp_path)
    changed = [record.getMessage() for record in caplog.records]
    assert len(changed) == 2 and "parity.sigma_levels from 1000 to 0" in changed[0] and "sigma.of_old" in changed[1]


def test_a_run_from_before_a_key_was_known_goes_on(tmp_path, caplog):
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    before = json.loads(config.to_json_best_effort())
    del before["data"]["prefetch_gb"]
    (tmp_path / "config.json").write_text(json.dumps(before | {"frozen_from": "kept", "of_old": 1}))
    config = inherit_sources(config, tmp_path)
    assert config.frozen_from == "kept"
    with caplog.at_level(logging.WARNING):
        write_config(config, tmp_path)
    assert "data.prefetch_gb from None to 4.0" in caplog.text and "of_old from 1 to None" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["data"]["prefetch_gb"] == 4.0


def test_a_bundle_of_frozen_encoders_brings_its_tokenizer(small_config, tiny_bundle, tmp_path):
    """The text encoder must read the ids that it was made for; a resumed run keeps what it was trained with."""
    config = inherit_sources(small_config("stage1", frozen_from=str(tiny_bundle)), tmp_path)
    assert config.tokenizer == str(tiny_bundle / "tokenizer")
    named = inherit_sources(small_config("stage1", frozen_from=str(tiny_bundle), tokenizer="other"), tmp_path)
    assert named.tokenizer == "other"
    (tmp_path / "config.json").write_text(json.dumps({"frozen_from": str(tiny_bundle), "tokenizer": ""}))
    assert inherit_sources(small_config("stage1"), tmp_path).tokenizer == ""


def test_the_encoders_of_the_package_stand_back_behind_those_of_a_run(tiny_bundle, tmp_path):
    config = load_stage(f"{ROOT}/configs/stage1.py:tiny")
    fresh = inherit_sources(config, tmp_path)
    assert (fresh.frozen_from, fresh.tokenizer) == ("demo", "")
    config.init_from = str(tiny_bundle)
    assert inherit_sources(config, tmp_path).frozen_from == str(tiny_bundle)
    config.init_from = "demo"
    assert inherit_sources(config, tmp_path).frozen_from == "demo"
    (tmp_path / "config.json").write_text(json.dumps({"frozen_from": "", "tokenizer": ""}))  # drawn from a fixed seed
    assert inherit_sources(config, tmp_path).frozen_from == ""
