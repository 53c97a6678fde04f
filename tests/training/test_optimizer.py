import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unialign_jax.training.optimizer import ema_update, make_optimizer, make_schedule

SETTINGS = dict(learning_rate=3e-2, warmup_steps=4, weight_decay=1e-2, clip_norm=2.0, b1=0.9, b2=0.999, eps=1e-8)
SETTINGS["decay_1d"] = True


def make_params(seed=0):
    """A tree shaped like the real one: blocks stacked on their first axis, so that their biases have two."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        {
            "transformer": {
                "blocks": {"qkv": {"kernel": (3, 4, 5), "bias": (3, 5)}, "norm": {"scale": (3, 4)}},
                "text_head": {"kernel": (4, 6), "bias": (6,)},
            },
            "heads": {"kernel": (4, 2)},
        },
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_gradients(params, steps):
    """Norms on both sides of the clip, and components so small that eps matters."""
    rng = np.random.default_rng(1)
    scales = [0.05, 3.0, 0.2, 1.0, 1e-6, 2.0][:steps]
    return [jax.tree.map(lambda x, s=s: (s * rng.normal(size=x.shape)).astype(np.float32), params) for s in scales]


def run(tx, params, gradients):
    update = jax.jit(tx.update)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def loop_adamw(params, gradients, decays):
    """AdamW of Loshchilov & Hutter in float64 over flat lists of arrays; decays is a list of 0 or 1."""
    params = [p.astype(np.float64) for p in params]
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for k, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradient))
        rate = 3e-2 * min(1, k / 4)
        for i, g in enumerate(gradient):
            g = g * min(1, 2.0 / norm)
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            step = (m[i] / (1 - 0.9**k)) / (np.sqrt(v[i] / (1 - 0.999**k)) + 1e-8)
            params[i] = params[i] - rate * (step + 1e-2 * decays[i] * params[i])
    return params


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("decay_1d", [True, False])
def test_against_a_float64_loop(decay_1d):
    params = make_params()
    gradients = make_gradients(params, 6)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    decays = [float(decay_1d or "kernel" in name) for name in names]
    assert sum(decays) == (6 if decay_1d else 3)
    tx, _ = make_optimizer(**SETTINGS | {"decay_1d": decay_1d})
    found, _ = run(tx, params, gradients)
    expected = loop_adamw(jax.tree.leaves(params), [jax.tree.leaves(g) for g in gradients], decays)
    assert_close(found, expected)
    # The tolerance would see a decay that is applied or left out wrongly.
    wrong = loop_adamw(jax.tree.leaves(params), [jax.tree.leaves(g) for g in gradients], [0.0] * 6)
    if decay_1d:
        assert max(np.abs(a - b).max() for a, b in zip(expected, wrong, strict=True)) > 1e-4


def test_against_torch():
    torch = pytest.importorskip("torch")
    params = make_params(2)
    gradients = make_gradients(params, 6)
    tx, schedule = make_optimizer(**SETTINGS)
    found, _ = run(tx, params, gradients)

    tensors = [torch.nn.Parameter(torch.tensor(x)) for x in jax.tree.leaves(params)]
    adamw = torch.optim.AdamW(tensors, lr=3e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for step, gradient in enumerate(gradients):
        for tensor, g in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_(tensors, 2.0)
        adamw.param_groups[0]["lr"] = float(schedule(step))
        adamw.step()
    assert_close(found, [tensor.detach().numpy() for tensor in tensors])


def test_schedules():
    constant = make_schedule(3e-5, 2000)
    steps = [0, 999, 1999, 2000, 500_000]
    np.testing.assert_allclose([constant(s) for s in steps], [3e-5 / 2000, 1.5e-5, 3e-5, 3e-5, 3e-5], rtol=1e-6)
    cooled = make_schedule(1.0, 10, cooldown_start=70, cooldown_steps=30)
    steps = (4, 10, 69, 70, 85, 99, 100, 200)
    np.testing.assert_allclose([cooled(s) for s in steps], [0.5, 1, 1, 1, 0.5, 1 / 30, 0, 0], atol=1e-6)
    assert make_schedule(1.0, 0)(0) == 1


def test_frozen_parameters():
    params = make_params(3)
    gradients = make_gradients(params, 4)
    tx, _ = make_optimizer(**SETTINGS, freeze=("transformer/blocks/.*kernel", "^heads/"))
    found, state = run(tx, params, gradients)
    np.testing.assert_array_equal(
        found["transformer"]["blocks"]["qkv"]["kernel"], params["transformer"]["blocks"]["qkv"]["kernel"]
    )
    np.testing.assert_array_equal(found["heads"]["kernel"], params["heads"]["kernel"])
    # The others move as if the frozen ones did not exist: their gradients have no share in the clip.
    trained = lambda tree: [  # noqa: E731
        tree["transformer"]["blocks"]["norm"]["scale"],
        tree["transformer"]["blocks"]["qkv"]["bias"],
        tree["transformer"]["text_head"]["bias"],
        tree["transformer"]["text_head"]["kernel"],
    ]
    assert_close(trained(found), loop_adamw(trained(params), [trained(g) for g in gradients], [1.0] * 4))
    # Two moments for each trained number, counters, and nothing for the frozen ones.
    memory = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 0)
    assert memory == 2 * sum(x.size for x in trained(params))


def test_a_pattern_that_finds_nothing_is_an_error():
    tx, _ = make_optimizer(**SETTINGS, freeze=("heads", "txt_head"))
    with pytest.raises(ValueError, match="'txt_head', which finds none of the 6 parameters"):
        tx.init(make_params())


def test_ema():
    # Against the closed form of a constant decay: decay^n * start + sum of (1 - decay) * decay^(n-1-k) * params_k.
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(30, 7)).astype(np.float32)
    ema = {"w": jnp.asarray(weights[0])}
    update = jax.jit(ema_update)
    for step in range(1, 30):
        ema = update(ema, {"w": weights[step]}, 0.9)
    powers = 0.9 ** np.arange(28, -1, -1)
    expected = 0.9**29 * weights[0].astype(np.float64) + 0.1 * powers @ weights[1:]
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-5, atol=1e-6)


def test_ema_is_float32_and_moves_by_small_fractions():
    ema, params = {"w": jnp.zeros(3, jnp.bfloat16)}, {"w": jnp.full(3, 2.0, jnp.bfloat16)}
    moved = ema_update(ema, params, 0.9999)
    assert moved["w"].dtype == jnp.float32
    np.testing.assert_allclose(moved["w"], np.full(3, 2e-4), rtol=1e-6)


def test_the_first_moment_may_be_kept_in_bfloat16():
    moved = {}
    for dtype in ("float32", "bfloat16"):
        params = {"transformer": {"kernel": jnp.ones((16, 16))}}
        tx, _ = make_optimizer(**SETTINGS, mu_dtype=dtype)
        state = tx.init(params)
        for seed in range(4):
            drawn = np.random.default_rng(seed).normal(size=(16, 16)).astype(np.float32)
            gradients = {"transformer": {"kernel": drawn}}
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        is_adam = lambda part: hasattr(part, "mu")  # noqa: E731
        (adam,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
        assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
        moved[dtype] = np.asarray(params["transformer"]["kernel"]) - 1
    error = np.abs(moved["bfloat16"] - moved["float32"]).max()
    assert 0 < error < 0.01 * np.abs(moved["float32"]).max()
