"""Our safetensors reader and writer against the library's."""

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from unialign_jax.conversion import safetensors_file


def tensors():
    rng = np.random.default_rng(0)
    values = {"a": rng.standard_normal((3, 5)).astype(np.float32), "empty": np.zeros((0, 2), np.float16)}
    values |= {"b": rng.standard_normal(7).astype(np.float16), "scalar": np.array(3, np.int64)}
    return values


def test_what_the_library_wrote_is_read(tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = safetensors_file.read_header(tmp_path / "x.safetensors")
    assert header.keys() == tensors().keys()
    for key, expected in tensors().items():
        found = safetensors_file.read_tensor(header[key])
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def test_what_we_wrote_the_library_reads(tmp_path):
    torch = pytest.importorskip("torch")
    values = tensors() | {"bf16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3)}
    announced = {key: (value.dtype, value.shape) for key, value in values.items()}
    with safetensors_file.Writer(tmp_path / "x.safetensors", announced) as writer:
        for key in reversed(values):  # any order
            writer.write(key, values[key].copy(order="F"))
        assert not (tmp_path / "x.safetensors").exists()
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(values)
        for key, expected in values.items():
            found = file.get_tensor(key)
            assert tuple(found.shape) == expected.shape
            np.testing.assert_array_equal(found.to(torch.float64).numpy(), expected.astype(np.float64))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_unfinished_file_never_gets_its_name(tmp_path):
    announced = {"a": (np.float32, (2,)), "b": (np.float32, (2,))}
    with pytest.raises(ValueError, match="1 tensors were not written: b"):
        with safetensors_file.Writer(tmp_path / "x.safetensors", announced) as writer:
            writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"a has shape \(3,\), announced as \(2,\)"):
        with safetensors_file.Writer(tmp_path / "x.safetensors", announced) as writer:
            writer.write("a", np.zeros(3, np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "header", [b'{"a"', b"[1]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}']
)
def test_a_damaged_header(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match="damaged safetensors header"):
        safetensors_file.read_header(tmp_path / "x.safetensors")
