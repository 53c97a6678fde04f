import jax
import jax.numpy as jnp
import pytest

from unialign_jax.models import flops
from unialign_jax.models.autoencoder import AutoencoderConfig, make_autoencoder
from unialign_jax.models.mmdit import AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.presets import AUTOENCODER
from unialign_jax.models.text_encoder import TextEncoderConfig

TERA = 1e12
MMDIT = MMDiTConfig()
T5_XXL = TextEncoderConfig()
SD3_VAE = AutoencoderConfig()
HEADS = AlignmentHeadsConfig()
FULL_SIZE = dict(latent_size=(64, 64), text_length=256)


def torch_flops(build, run):
    """FLOPs of `run(build())` as torch counts them, on the meta device: nothing is computed."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        module = build().eval()
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            run(module, torch)
    return counter.get_total_flops()


def test_the_figures_at_full_size():
    # Independent arithmetic for 512 pixels and 256 tokens, in TFLOP.
    assert flops.mmdit_forward(MMDIT, **FULL_SIZE) / TERA == pytest.approx(1.98, rel=0.005)
    assert flops.mmdit_forward(MMDIT, **FULL_SIZE, num_conditions=1) / TERA == pytest.approx(3.91, rel=0.005)
    text_pass = flops.mmdit_forward(MMDIT, **FULL_SIZE, velocity_head=False, text_head=True)
    assert text_pass / TERA == pytest.approx(2.01, rel=0.005)
    assert flops.text_encoder_forward(T5_XXL, text_length=256) / TERA == pytest.approx(2.40, rel=0.005)
    assert flops.autoencoder_encode(SD3_VAE, image_size=512) / TERA == pytest.approx(1.1, rel=0.05)


def test_training_samples_at_full_size():
    def sample(**stream):
        return flops.training_sample_flops(MMDIT, T5_XXL, SD3_VAE, HEADS, image_size=512, text_length=256, **stream)

    assert sample() / TERA == pytest.approx(17.9, rel=0.02)
    assert sample(num_conditions=1) / TERA == pytest.approx(24.8, rel=0.02)
    # vqa: 3 x 2.01 + 2.40 + 1.1.
    assert sample(image_pass=False) / TERA == pytest.approx(9.53, rel=0.02)
    assert sample(text_pass=False) / TERA == pytest.approx(3 * 1.98 + 2.40 + 1.1, rel=0.02)


def test_attention_heads_and_text_head_are_counted_against_xla():
    # One joint block, unscanned and without norms, as XLA counts it: both streams' matmuls and the attention.
    width, image_tokens, text_tokens = 256, 48, 32
    config = MMDiTConfig(depth=1, num_heads=4, head_width=64, latent_channels=4, text_width=64, vocab_size=512)
    shape = jax.ShapeDtypeStruct
    stream = {
        "qkv": shape((width, 3 * width), jnp.float32),
        "out": shape((width, width), jnp.float32),
        "mlp_in": shape((width, 4 * width), jnp.float32),
        "mlp_out": shape((4 * width, width), jnp.float32),
        "modulation": shape((width, 6 * width), jnp.float32),
    }
    weights = {
        "image": stream,
        "text": stream,
        "patch_embed": shape((16, width), jnp.float32),
        "text_embed": shape((64, width), jnp.float32),
        "text_head": shape((width, 512), jnp.float32),
    }

    def forward(weights, patches, text, time):
        x = {"image": patches @ weights["patch_embed"], "text": text @ weights["text_embed"]}
        scale = {name: (time @ weights[name]["modulation"]).reshape(6, width).sum(0) for name in x}
        qkv = jnp.concatenate([(x[name] * scale[name]) @ weights[name]["qkv"] for name in x])
        query, key, value = jnp.split(qkv, 3, axis=1)
        attended = jnp.split((query @ key.T) @ value, [image_tokens])
        for name, part in zip(x, attended, strict=True):
            x[name] = x[name] + part @ weights[name]["out"]
            x[name] = x[name] + (x[name] @ weights[name]["mlp_in"]) @ weights[name]["mlp_out"]
        return x["image"], x["text"] @ weights["text_head"]

    inputs = shape((image_tokens, 16), jnp.float32), shape((text_tokens, 64), jnp.float32)
    lowered = jax.jit(forward).lower(weights, *inputs, shape((width,), jnp.float32))
    counted = lowered.compile().cost_analysis()["flops"]
    ours = flops.mmdit_forward(
        config, latent_size=(12, 16), text_length=text_tokens, velocity_head=False, text_head=True
    )
    ours -= 2 * (256 * width + width * width)  # the time embedding's two layers, which the above leaves out
    # XLA also counts the element-wise operations.
    assert counted == pytest.approx(ours, rel=0.01)


@pytest.mark.parametrize("image_size", [64, 512])
def test_autoencoder_equals_torch(image_size):
    diffusers = pytest.importorskip("diffusers")

    def build():
        return diffusers.AutoencoderKL(
            block_out_channels=SD3_VAE.block_widths,
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )

    counted = torch_flops(build, lambda vae, torch: vae.encoder(torch.empty(1, 3, image_size, image_size)))
    assert flops.autoencoder_encode(SD3_VAE, image_size=image_size) == counted
    side = image_size // 8
    counted = torch_flops(build, lambda vae, torch: vae.decoder(torch.empty(1, 16, side, side)))
    assert flops.autoencoder_decode(SD3_VAE, image_size=image_size) == counted


def test_an_encoder_without_residual_blocks_counts_its_kernels():
    """2 FLOPs for each weight of a kernel at each position, and attention over 64 positions of width 64."""
    config = AUTOENCODER["tiny"]
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(make_autoencoder(config).init, jax.random.key(0), images)["params"]["encoder"]
    side = {"conv_in": 64, "down_0_downsample": 32, "down_1_downsample": 16}  # 8 everywhere else
    counted = 2 * 2 * 64 * 64 * 64
    for name, layer in shapes.items():
        kernels = [leaf for leaf in jax.tree.leaves(layer) if leaf.ndim > 1]
        counted += sum(2 * kernel.size * side.get(name, 8) ** 2 for kernel in kernels)
    assert flops.autoencoder_encode(config, image_size=64) == counted


def test_text_encoder_equals_torch():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        num_heads=8,
        d_ff=160,
        num_layers=3,
        feed_forward_proj="gated-gelu",
    )

    def run(encoder, torch):
        return encoder(input_ids=torch.zeros(1, 24, dtype=torch.long))

    counted = torch_flops(lambda: transformers.T5EncoderModel(config), run)
    ours = TextEncoderConfig(width=64, mlp_width=160, num_heads=8, head_width=16, depth=3)
    assert flops.text_encoder_forward(ours, text_length=24) == counted


def test_mmdit_blocks_equal_torch():
    # SD3 in diffusers differs in its last block only: three blocks less two are one of ours.
    diffusers = pytest.importorskip("diffusers")

    def counted(depth):
        def build():
            return diffusers.SD3Transformer2DModel(
                sample_size=16,
                num_layers=depth,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=48,
                caption_projection_dim=64,
                pooled_projection_dim=32,
                pos_embed_max_size=16,
            )

        def run(network, torch):
            latents, text = torch.empty(1, 16, 16, 16), torch.empty(1, 10, 48)
            return network(latents, text, torch.empty(1, 32), torch.ones(1))

        return torch_flops(build, run)

    def ours(depth):
        config = MMDiTConfig(depth=depth, num_heads=4, head_width=16, text_width=48)
        return flops.mmdit_forward(config, latent_size=(16, 16), text_length=10)

    assert ours(3) - ours(2) == counted(3) - counted(2)


def test_alignment_heads_count_their_weights():
    # Pooled: 2 FLOPs for each weight (20,982,784 parameters less 11,264 biases).
    weights = 20_982_784 - 2 * (2048 + 3584)
    assert flops.alignment_heads_forward(HEADS, width=1536) == 2 * weights


def test_the_stand_in_autoencoder_costs_nothing():
    tiny = AutoencoderConfig(kind="space_to_depth", latent_channels=48, downsample_factor=4)
    assert flops.autoencoder_encode(tiny, image_size=64) == 0
    assert flops.autoencoder_decode(tiny, image_size=64) == 0


@pytest.mark.parametrize(
    "device_kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("cpu", None),
        ("Tesla T4", 8.1e12),  # in float32, for it has no bf16
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_flops(device_kind, peak):
    assert flops.peak_flops(device_kind) == peak
