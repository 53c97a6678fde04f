"""Small PyTorch models in the files that people download: a diffusers folder, a Stability single file, a release."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from unialign_jax.data.tokenizer import load_tokenizer

DEPTH, HEADS, HEAD_WIDTH, CHANNELS, TEXT_WIDTH, POOLED_WIDTH = 3, 2, 64, 4, 24, 2048
WIDTH = HEADS * HEAD_WIDTH
MAX_PATCHES, BASE_PATCHES = 24, 8
VOCAB_SIZE = load_tokenizer().vocab_size


@pytest.fixture(scope="session")
def torch_models():
    """Random diffusers and transformers models, small but for the head width, which single files do not tell."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=2 * BASE_PATCHES,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=DEPTH,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=MAX_PATCHES,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=VOCAB_SIZE + 28,
            d_model=TEXT_WIDTH,
            d_ff=40,
            num_heads=3,
            d_kv=8,
            num_layers=2,
            relative_attention_max_distance=20,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    with torch.no_grad():
        for model in (sd3, vae, t5):
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                    parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
                elif parameter.ndim == 1:  # biases start at zero, where swapped ones would not show
                    parameter.copy_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.mul_(1.5)
    return SimpleNamespace(sd3=sd3.eval(), vae=vae.eval(), t5=t5.eval())


@pytest.fixture(scope="session")
def sd3_folder(torch_models, tmp_path_factory):
    """The diffusers layout; T5 in several shards."""
    folder = tmp_path_factory.mktemp("sd3") / "diffusers"
    torch_models.sd3.save_pretrained(folder / "transformer")
    torch_models.vae.save_pretrained(folder / "vae")
    torch_models.t5.save_pretrained(folder / "text_encoder_3", max_shard_size="30KB")
    assert len(list((folder / "text_encoder_3").glob("*.safetensors"))) > 1
    load_tokenizer().save(folder / "tokenizer_3")
    for name in ("text_encoder", "text_encoder_2"):  # CLIP, which is not used
        (folder / name).mkdir()
        save_tensors(
            folder / name / "model.safetensors", {"text_model.embeddings.token_embedding.weight": np.zeros((3, 2))}
        )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/merges.txt").write_text("")
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return folder


@pytest.fixture(scope="session")
def sd3_file(torch_models, tmp_path_factory):
    """Stability's single file of the same models, with a CLIP that is not used."""
    tensors = {f"model.diffusion_model.{key}": value for key, value in stability_transformer(torch_models.sd3).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in ldm_autoencoder(torch_models.vae).items()}
    tensors |= {f"text_encoders.t5xxl.transformer.{key}": value for key, value in arrays(torch_models.t5).items()}
    tensors["text_encoders.clip_l.transformer.text_model.final_layer_norm.weight"] = np.ones(4, np.float32)
    path = tmp_path_factory.mktemp("sd3") / "sd3_medium_incl_clips_t5xxl.safetensors"
    save_tensors(path, tensors)
    return path


@pytest.fixture(scope="session")
def released_model(torch_models):
    """The released UniAlignment transformer as a PyTorch module, parameters under its names."""
    return make_released(torch_models.sd3)


@pytest.fixture(scope="session")
def released_folder(released_model, torch_models, tmp_path_factory):
    """The release's layout; its transformer has another class name and its T5 lies in text_encoder/."""
    folder = tmp_path_factory.mktemp("unialign") / "release"
    (folder / "transformer").mkdir(parents=True)
    save_tensors(folder / "transformer/diffusion_pytorch_model.safetensors", arrays(released_model))
    config = dict(torch_models.sd3.config) | {"_class_name": "SD3JointModelFlexible", "vocab_size": VOCAB_SIZE}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    torch_models.vae.save_pretrained(folder / "vae")
    torch_models.t5.save_pretrained(folder / "text_encoder")
    load_tokenizer().save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def dual_file(torch_models, tmp_path_factory):
    """DualDiffusion's transformer: the release's without the adapters, here as a file alone."""
    path = tmp_path_factory.mktemp("dual") / "dual.safetensors"
    save_tensors(path, arrays(make_released(torch_models.sd3, adapters=False)))
    return path


@pytest.fixture(scope="session")
def run(small_config, tmp_path_factory):
    """A run's folder with the checkpoints of steps 3 and 12; the text head has grown by the step, the average by 1."""
    from unialign_jax.training.checkpoints import Checkpoints
    from unialign_jax.training.config import build_configs
    from unialign_jax.training.optimizer import make_optimizer
    from unialign_jax.training.state import Networks, init_state

    config = small_config()
    networks = Networks.create(*build_configs(config, "cpu"))
    state = init_state(networks, make_optimizer(**config.optimizer, decay_1d=True)[0], 0.9, jax.random.key(0))
    state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    checkpoints = Checkpoints(workdir)
    for step in (3, 12):
        moved = jax.tree.map(lambda x, step=step: x + step, state.params["transformer"]["text_head"])
        params = {**state.params, "transformer": {**state.params["transformer"], "text_head": moved}}
        checkpoints.save(state._replace(params=params), step)
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps(json.loads(config.to_json_best_effort())))
    return workdir, state


def make_released(sd3, adapters=True):
    """A module with the parameters of the released transformer, random where SD3 has none."""
    import copy

    import torch

    torch.manual_seed(1)
    return as_released(copy.deepcopy(sd3), adapters).eval()


def as_released(model, adapters=True):
    import torch
    from diffusers.models.attention import JointTransformerBlock

    del model.time_text_embed.text_embedder
    model.transformer_blocks[-1] = JointTransformerBlock(WIDTH, HEADS, HEAD_WIDTH)
    model.image_norm_out, model.image_proj_out = model.norm_out, model.proj_out
    del model.norm_out, model.proj_out
    model.text_proj_out = torch.nn.Linear(WIDTH, VOCAB_SIZE)
    model.null_image_embd = torch.nn.Parameter(torch.randn(1, 8, WIDTH))
    for name in ("siglip_adapter_img", "siglip_adapter_text") if adapters else ():
        layers = [torch.nn.Linear(WIDTH, 20), torch.nn.SiLU(), torch.nn.Linear(20, 12), torch.nn.SiLU()]
        adapter = torch.nn.Module()
        adapter.fc = torch.nn.Sequential(*layers)
        setattr(model, name, adapter)
    return model


@pytest.fixture(scope="session")
def released_class():
    """A stand-in for the released class, as diffusers builds it from a config.json."""
    import diffusers
    from diffusers.configuration_utils import register_to_config

    class SD3JointModelFlexible(diffusers.SD3Transformer2DModel):
        @register_to_config
        def __init__(
            self,
            vocab_size,
            sample_size=128,
            patch_size=2,
            in_channels=16,
            num_layers=18,
            attention_head_dim=64,
            num_attention_heads=18,
            joint_attention_dim=4096,
            caption_projection_dim=1152,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=96,
            **kwargs,
        ):
            sizes = sample_size, patch_size, in_channels, num_layers, attention_head_dim, num_attention_heads
            text = joint_attention_dim, caption_projection_dim, pooled_projection_dim
            super().__init__(*sizes, *text, out_channels, pos_embed_max_size)
            as_released(self)

    return SD3JointModelFlexible


def arrays(module) -> dict:
    return {key: tensor.detach().numpy() for key, tensor in module.state_dict().items()}


def save_tensors(path, tensors):
    """Through the safetensors library, not through our own writer."""
    from safetensors.numpy import save_file

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, str(path))


def swap_halves(x):
    return np.concatenate([x[len(x) // 2 :], x[: len(x) // 2]])


def stability_transformer(model) -> dict:
    """Stability's names for a diffusers SD3 transformer, written from the published correspondence."""
    state = arrays(model)
    out = {"pos_embed": state["pos_embed.pos_embed"]}

    def linear(new, old, change=lambda x: x):
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = change(state[f"{old}.{kind}"])

    linear("x_embedder.proj", "pos_embed.proj")
    linear("context_embedder", "context_embedder")
    for i, j in ((0, 1), (2, 2)):
        linear(f"t_embedder.mlp.{i}", f"time_text_embed.timestep_embedder.linear_{j}")
        linear(f"y_embedder.mlp.{i}", f"time_text_embed.text_embedder.linear_{j}")
    linear("final_layer.linear", "proj_out")
    linear("final_layer.adaLN_modulation.1", "norm_out.linear", swap_halves)
    for i in range(DEPTH):
        old, last = f"transformer_blocks.{i}", i == DEPTH - 1
        x, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        for kind in ("weight", "bias"):
            out[f"{x}.attn.qkv.{kind}"] = np.concatenate([state[f"{old}.attn.to_{n}.{kind}"] for n in "qkv"])
            out[f"{context}.attn.qkv.{kind}"] = np.concatenate(
                [state[f"{old}.attn.add_{n}_proj.{kind}"] for n in "qkv"]
            )
        linear(f"{x}.attn.proj", f"{old}.attn.to_out.0")
        linear(f"{x}.mlp.fc1", f"{old}.ff.net.0.proj")
        linear(f"{x}.mlp.fc2", f"{old}.ff.net.2")
        linear(f"{x}.adaLN_modulation.1", f"{old}.norm1.linear")
        linear(f"{context}.adaLN_modulation.1", f"{old}.norm1_context.linear", swap_halves if last else lambda v: v)
        if not last:
            linear(f"{context}.attn.proj", f"{old}.attn.to_add_out")
            linear(f"{context}.mlp.fc1", f"{old}.ff_context.net.0.proj")
            linear(f"{context}.mlp.fc2", f"{old}.ff_context.net.2")
    assert len(out) == len(state) - 2 * 2 * 2 * DEPTH  # q, k, v become one: two weights and two biases less a stream
    return out


def ldm_autoencoder(model) -> dict:
    """The older names for a diffusers AutoencoderKL, written from the published correspondence."""
    out = {}
    levels = len(model.config.block_out_channels)
    for key, value in arrays(model).items():
        parts = key.split(".")
        name = {"conv_norm_out": "norm_out"}.get(parts[1], parts[1])
        rest = parts[2:]
        if name in ("down_blocks", "up_blocks"):
            direction = name.removesuffix("_blocks")
            level = int(rest[0]) if direction == "down" else levels - 1 - int(rest[0])
            if rest[1] == "resnets":
                tail = ["block", rest[2], *rest[3:]]
            else:
                tail = [rest[1].removesuffix("rs"), *rest[3:]]  # downsamplers.0.conv -> downsample.conv
            parts = [parts[0], direction, str(level), *tail]
        elif name == "mid_block":
            if rest[0] == "resnets":
                parts = [parts[0], "mid", f"block_{int(rest[1]) + 1}", *rest[2:]]
            else:
                old = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[rest[2]]
                if rest[2] != "group_norm" and value.ndim == 2:
                    value = value[:, :, None, None]  # these were 1x1 convolutions
                parts = [parts[0], "mid", "attn_1", old, rest[-1]]
        else:
            parts = [parts[0], name, *rest]
        out[".".join("nin_shortcut" if part == "conv_shortcut" else part for part in parts)] = value
    return out
