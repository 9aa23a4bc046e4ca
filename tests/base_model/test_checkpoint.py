import errno
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

import base_model.checkpoint
from base_model.checkpoint import atomic_write, check_can_write, load_weights, read_json, save_weights, weights_bytes
from base_model.errors import UserError


def tensors() -> dict[str, torch.Tensor]:
    shared = torch.randn(4, 6)
    return {
        "weight": shared,
        "tied": shared,
        "transposed": shared.T,
        "every_other": shared[:, ::2],
        "half": torch.randn(3).bfloat16(),
        "codes": torch.tensor([0, 255], dtype=torch.uint8),
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 2),
        "grad": torch.randn(2, requires_grad=True),
    }


def test_tensors_and_metadata_come_back_exactly(tmp_path: Path) -> None:
    saved = tensors()
    save_weights(tmp_path / "deep" / "w.safetensors", saved, {"config": '{"width": 3}'})
    loaded, metadata = load_weights(tmp_path / "deep" / "w.safetensors")
    assert metadata == {"config": '{"width": 3}'} and set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.detach()), name
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_equal_weights_and_metadata_are_equal_files_in_any_order(tmp_path: Path) -> None:
    metadata = {f"k{number}": f'"{number}\\ \u00e9\n\x01 \U0001f600' for number in range(20)}
    forwards, backwards = (weights_bytes({"a": torch.arange(3.0)}, dict(items)) for items in (metadata.items(), reversed(metadata.items())))
    assert forwards == backwards
    (tmp_path / "w").write_bytes(forwards)
    loaded, found = load_weights(tmp_path / "w")
    assert found == metadata and torch.equal(loaded["a"], torch.arange(3.0))
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w")["a"], torch.arange(3.0))


def test_the_file_is_what_the_library_reads(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"a": torch.arange(3.0)}, {})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "w")["a"], torch.arange(3.0))
    save_weights(tmp_path / "none", {}, {})
    assert load_weights(tmp_path / "none") == ({}, {})


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_by_content_whatever_its_name(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps({"state": Bomb()}, protocol=protocol))
    assert "refused to open a pickled checkpoint" in complaint(path) and "Convert it to safetensors" in complaint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_save_file_is_refused_by_content_whatever_its_name(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    assert "refused to open a pickled checkpoint" in complaint(path)


def test_a_safetensors_file_may_have_any_name(tmp_path: Path) -> None:
    save_weights(tmp_path / "weights.pt", {"a": torch.zeros(3)}, {})
    assert set(load_weights(tmp_path / "weights.pt")[0]) == {"a"}


def test_a_header_as_long_as_a_pickle_mark_is_still_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w"
    contents = (weights_bytes({"a": torch.zeros(1)}, {"pad": "x" * length}) for length in range(700))
    path.write_bytes(next(content for content in contents if content[:2] == b"\x80\x02"))
    assert torch.equal(load_weights(path)[0]["a"], torch.zeros(1))


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "no such weights file" in complaint(tmp_path / "none.safetensors")


def test_a_folder_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read the weights" in complaint(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 100, -1])
def test_a_truncated_file_is_reported_wherever_it_was_cut(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors(), {})
    path.write_bytes(path.read_bytes()[:keep])
    said = complaint(path)
    assert any(word in said for word in ("truncated", "empty", "not a safetensors file"))


def test_bytes_after_the_end_and_a_broken_header_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors(), {})
    whole = path.read_bytes()
    path.write_bytes(whole + b"x")
    assert "damaged" in complaint(path)
    path.write_bytes(struct.pack("<Q", 20) + b'{"a": [1, 2, 3], "b"' + b"0" * 50)
    assert "damaged" in complaint(path)
    path.write_bytes(b"hello, these are not weights")
    assert "not a safetensors file" in complaint(path)


@pytest.mark.parametrize(
    "header",
    [
        '{"a":5}',
        '{"a":null}',
        '{"a":[]}',
        '{"a":{"data_offsets":5}}',
        '{"a":{"data_offsets":[0]}}',
        '{"a":{"data_offsets":["0","4"]}}',
        '{"a":{"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        '{"__metadata__":5}',
        '{"__metadata__":{"a":5}}',
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_a_header_that_makes_no_sense_is_damage(tmp_path: Path, header: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4)
    assert "damaged" in complaint(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "5", "null", "[" * 100_000, '{"a": NaN'])
def test_json_that_is_no_object_is_a_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    for path in (tmp_path / "a.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot read the card") as caught:
            read_json(path, "the card")
        assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_can_write(tmp_path / "new" / "er")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            check_can_write(folder)
    with pytest.raises(UserError, match="Choose another --results"):
        check_can_write(tmp_path / "file", "--results")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.zeros(2)}, {})

    def full(where: Path, content: bytes) -> None:
        where.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(base_model.checkpoint, "write_synced", full)
    with pytest.raises(UserError, match=r"the disk is full, while writing .*w\.safetensors"):
        save_weights(path, {"a": torch.ones(2)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(load_weights(path)[0]["a"], torch.zeros(2))


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "file" / "below", b"x")
