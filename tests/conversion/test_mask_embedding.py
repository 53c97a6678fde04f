"""The released mask embedding: read as PyTorch reads it, without PyTorch, and nothing else is unpickled."""

import collections
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from unialign_jax import bundle
from unialign_jax.conversion import torch_pickle
from unialign_jax.conversion.importing import convert
from unialign_jax.data.tokenizer import load_tokenizer

RELEASED = Path(__file__).resolve().parents[3] / "shared/data/mask_token_emb.00-of-01.pth"


def test_the_released_file_is_read():
    if not RELEASED.exists():
        pytest.skip(f"{RELEASED} is not there")
    found = torch_pickle.read_single(RELEASED)
    assert found.shape == (4096,) and found.dtype.name == "bfloat16"
    values = found.astype(np.float32)
    assert (values.min(), values.max()) == (-33.5, 74.0)
    assert abs(np.linalg.norm(values) - 208.2) < 0.1
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(values, torch.load(RELEASED, map_location="cpu").float().detach().numpy())


def test_tensors_are_read_as_pytorch_wrote_them(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6)
    for name, value in {
        "plain": base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "half": base.half(),
        "parameter": torch.nn.Parameter(base),
        "in a dictionary": {"weight": base},
    }.items():
        torch.save(value, tmp_path / "x.pth")
        expected = value["weight"] if isinstance(value, dict) else value
        np.testing.assert_array_equal(torch_pickle.read_single(tmp_path / "x.pth"), expected.detach().numpy(), name)


class Evil:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def write_archive(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(content, protocol=2))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    marker = tmp_path / "ran"
    for content in (Evil(os.mkdir, str(marker)), {"a": Evil(eval, f"__import__('os').mkdir({str(marker)!r})")}):
        write_archive(tmp_path / "x.pth", content)
        with pytest.raises(ValueError, match="is refused: it wants to load .*, which is not part of a plain tensor"):
            torch_pickle.read_single(tmp_path / "x.pth")
    assert not marker.exists()


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    for content, match in (
        ([1, 2], "expected one tensor"),
        (collections.OrderedDict(a=1, b=2), "holds 2 entries, expected one tensor"),
    ):
        write_archive(path, content)
        with pytest.raises(ValueError, match=match):
            torch_pickle.read_single(path)
    path.write_bytes(b"not a zip archive")
    with pytest.raises(ValueError, match="is not a PyTorch file"):
        torch_pickle.read_single(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match="holds no data.pkl"):
        torch_pickle.read_single(path)


def test_it_takes_the_mask_tokens_row_in_the_bundle(sd3_folder, tmp_path):
    torch = pytest.importorskip("torch")
    mask = torch.randn(24, dtype=torch.bfloat16)
    torch.save(mask, tmp_path / "mask.pth")
    options = {"components": ["text_encoder"]}
    convert("sd3", sd3_folder, tmp_path / "plain", **options)
    convert("sd3", sd3_folder, tmp_path / "masked", mask_embedding=tmp_path / "mask.pth", **options)
    plain, masked = (
        np.asarray(bundle.load(tmp_path / n)[1]["text_encoder"]["token_embedding"]) for n in ("plain", "masked")
    )
    row = load_tokenizer().mask_id
    np.testing.assert_array_equal(masked[row], mask.float().numpy())
    np.testing.assert_array_equal(np.delete(masked, row, 0), np.delete(plain, row, 0))
    assert bundle.read_config(tmp_path / "masked").provenance["mask_embedding"] == {"file": "mask.pth", "row": row}
    torch.save(torch.zeros(5), tmp_path / "mask.pth")
    with pytest.raises(ValueError, match=r"has shape \(5,\), the text encoder's embeddings have \(24,\)"):
        convert("sd3", sd3_folder, tmp_path / "bad", mask_embedding=tmp_path / "mask.pth", **options)
