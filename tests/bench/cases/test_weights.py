"""Weight files that cannot be loaded are found by their headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rlhfbench.cases.weights import check_gguf, check_weights
from rlhfkernels.errors import ModelError

GOOD = save({"a": torch.ones(4), "b": torch.zeros(2, 3)}, {"format": "pt"})


def fault(folder: Path) -> str:
    """The sentence about a folder's weights, without its beginning."""
    with pytest.raises(ModelError) as caught:
        check_weights("m", folder)
    start = "model 'm' is invalid: its "
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(start)


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def test_files_that_safetensors_wrote_pass(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    check_weights("m", tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"^model 'm' is a folder without weights \(\*\.safetensors, .*: a plan needs none"
    ):
        check_weights("m", tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    check_weights("m", tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty."),
        (bytes(range(20)), "is not a safetensors file."),
        (GOOD[:6], "is truncated: its header ends at byte"),
        (GOOD[:40], "is truncated: its header ends at byte"),
        (GOOD[:-1], f"is truncated: its tensors end at byte {len(GOOD)}, the file at byte {len(GOOD) - 1}."),
        (header(b"{}"), "holds no tensors."),
        (header(b'{"__metadata__": {}}'), "holds no tensors."),
        (header(b"[1]"), "is not a safetensors file."),
        (header(b"\xff"), "is not a safetensors file."),
        (header(b'{"a": 3}'), "is not a safetensors file."),
        (header(b'{"a": {"data_offsets": [0, "x"]}}'), "is not a safetensors file."),
        (header(b"[" * 100_000), "is not a safetensors file."),
    ],
)
def test_a_safetensors_file_that_cannot_be_loaded(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert fault(tmp_path).startswith(f"model.safetensors {says}")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}']
)
def test_a_broken_index_of_shards(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert fault(tmp_path) == "model.safetensors.index.json has no weight_map from tensors to files."


def test_every_shard_of_an_index_is_there_and_whole(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert fault(tmp_path) == "1.safetensors cannot be read (No such file or directory)."
    (tmp_path / "1.safetensors").write_bytes(GOOD[:-8])
    assert fault(tmp_path).startswith("1.safetensors is truncated")
    (tmp_path / "1.safetensors").write_bytes(GOOD)
    check_weights("m", tmp_path)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(*, version: int = 3, num_tensors: int = 2, data: int = 64) -> bytes:
    """A file with metadata of every kind, tensors of 32 float32 at offsets 0 and 64, and so many bytes of data."""
    values = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        string("general.alignment") + struct.pack("<II", 4, 64),
        string("x" * 100) + struct.pack("<If", 6, 0.5),
        string("tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
        string("scores") + struct.pack("<IIQ", 9, 12, 3) + bytes(24),
    ]
    tensors = [string(name) + struct.pack("<IQIQ", 1, 32, 0, offset) for name, offset in (("a", 0), ("b", 64))]
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, len(values)) + b"".join(values + tensors[:num_tensors])
    return head + bytes(-len(head) % 64) + bytes(data)


def gguf_fault(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"^model 'm' is invalid: its m\.gguf ") as caught:
        check_gguf("m", path)
    return str(caught.value).removeprefix("model 'm' is invalid: its m.gguf ")


def test_a_gguf_file_with_its_tensors_passes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(data=192))
    check_gguf("m", path)


def test_a_gguf_file_that_the_gguf_package_wrote_passes(tmp_path: Path) -> None:
    package, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    path = tmp_path / "m.gguf"
    writer = package.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("a", numpy.ones((4, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf("m", path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty."),
        (b"GGML" + bytes(40), "is not a GGUF file."),
        (b"GGUF\x03\0\0\0", "is truncated: it ends in its header."),
        (gguf()[:100], "is truncated: it ends in its header."),
        (gguf(version=1), "has GGUF version 1: it must be 2 or 3, little-endian."),
        (gguf(num_tensors=0), "holds no tensors."),
        (gguf(data=0), "is truncated: its last tensor begins at byte"),
        (gguf(data=64), "is truncated: its last tensor begins at byte"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63), "is truncated: it ends in its header."),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + string("a") + struct.pack("<I", 99), "has metadata of an unknown"),
    ],
)
def test_a_gguf_file_that_cannot_be_loaded(tmp_path: Path, content: bytes, says: str) -> None:
    assert gguf_fault(tmp_path / "m.gguf", content).startswith(says)
