"""Checkpoint folders: files written whole or not at all, read back by the safetensors library, damaged in every way."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal_fast.files import checkpoint
from teal_fast.files.checkpoint import CONFIG, WEIGHTS, MissingDemoError, find_checkpoint, fingerprint, read_config
from teal_fast.files.load import load_model
from teal_fast.files.store import (
    MOST_BYTES,
    MOST_LEVELS,
    check_writable,
    is_finite,
    new_file,
    new_folder,
    open_safetensors,
    parse_json,
    read_json,
    short,
    write_safetensors,
)

# --- writing


def test_new_file_replaces_at_the_end(tmp_path):
    path = tmp_path / "made" / "file"
    with new_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_file_leaves_the_old_one_after_an_error(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), new_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_new_folder_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert os.listdir(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_folder_goes_after_an_error(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_new_folder_never_overwrites(tmp_path):
    with pytest.raises(FileExistsError, match="remove it"), new_folder(tmp_path):
        pass


def test_written_safetensors_read_back_with_aligned_rows(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 64).bfloat16(),
        "b": torch.randn(7),
        "c": torch.randn(4, 5).half().t(),  # laid out otherwise than its shape says
    }
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / WEIGHTS, layout, tensors.__getitem__, {"format": "x"})
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    header = int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0
    with open_safetensors(tmp_path / WEIGHTS) as file:
        assert file.metadata() == {"format": "x"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_values_that_fp16_cannot_hold_are_refused(tmp_path, bad):
    tensor = torch.zeros(4, 4)
    tensor[2, 1] = bad
    with pytest.raises(ValueError, match="layer holds NaN or values out of range for F16"):
        write_safetensors(tmp_path / WEIGHTS, {"layer": (torch.float16, tensor.shape)}, lambda name: tensor, {})


# --- reading


def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


@pytest.mark.parametrize("size", [0, 5, 8, 300, 100_000, -1])
def test_truncated_weights_are_one_error(tiny, tmp_path, size):
    folder = copy(tiny, tmp_path)
    os.truncate(folder / WEIGHTS, size if size >= 0 else (folder / WEIGHTS).stat().st_size + size)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_model(folder)


def test_garbage_weights_are_one_error(tiny, tmp_path):
    folder = copy(tiny, tmp_path)
    (folder / WEIGHTS).write_bytes(b"\xff\x00garbage" * 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_model(folder)


def test_weights_that_do_not_fit_the_config_are_named(tiny, tmp_path):
    folder = copy(tiny, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"intermediate_size": 170}))
    with pytest.raises(ValueError, match=r"0\.feed_forward\.w13\.weight is \[64, 344\], .* \[64, 340\]"):
        load_model(folder)
    (folder / CONFIG).write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks layers\.2\."):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "\x00", '{"a": 1,}', "[" * 100_000], ids=range(5))
def test_broken_config_is_one_error(tmp_path, text):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


def test_config_that_is_no_object_or_no_text_is_one_error(tmp_path):
    (tmp_path / CONFIG).write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read_config(tmp_path)
    (tmp_path / CONFIG).write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        read_config(tmp_path)


def nested(levels: int, object: bool) -> str:
    opening, closing = ('{"a":', "}") if object else ("[", "]")
    return '{"a":' + opening * (levels - 1) + "1" + closing * (levels - 1) + "}"


@pytest.mark.parametrize("object", [False, True])
def test_json_is_nested_so_deep_and_no_deeper(object):
    assert parse_json(nested(MOST_LEVELS, object), "text")
    for levels in (MOST_LEVELS + 1, 500, 5000, 1_000_000):
        with pytest.raises(ValueError, match=r"^text is not valid JSON \(nested deeper than 64 levels\): do this$"):
            parse_json(nested(levels, object), "text", todo="do this")


@pytest.mark.parametrize(
    "text", ["NaN", "-Infinity", '{"a": [Infinity]}', '{"a": NaN}', "9" * 5000, "", "{", '{"a": 1,}']
)
def test_what_json_does_not_have_is_refused(text):
    with pytest.raises(ValueError, match=r"^text is not valid JSON \(.*\): make it again$"):
        parse_json(text, "text")


@pytest.mark.parametrize("text, kind", [("[]", dict), ("{}", list), ("1", dict), ("null", list), ('"a"', dict)])
def test_json_of_another_kind_is_refused(text, kind):
    with pytest.raises(ValueError, match=r"^text holds a .*, expected an? (object|list): make it again$"):
        parse_json(text, "text", kind)


def test_huge_json_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / CONFIG
    path.write_text("{}")
    assert read_json(path) == {}
    os.truncate(path, MOST_BYTES + 1)
    monkeypatch.setattr(Path, "read_text", pytest.fail)
    with pytest.raises(ValueError, match=rf"config\.json has {MOST_BYTES + 1} bytes, expected at most {MOST_BYTES}"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"has .* characters, expected at most"):
        parse_json("1" * (MOST_BYTES + 1), "text")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "a\nb", {"a": ["b"] * 10**6}, [[[[[[[[[[1]]]]]]]]]], 10**3000], ids=range(5)
)
def test_foreign_values_are_shown_in_a_short_line(value):
    assert len(short(value)) < 150 and "\n" not in short(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_finite(dtype):
    values = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)  # whose sum is not
    assert is_finite(values) and is_finite(-values) and is_finite(values * 0)
    for bad in (torch.nan, torch.inf, -torch.inf):
        values[7] = bad
        assert not is_finite(values)
    assert not is_finite(torch.tensor([torch.inf, 1, -torch.inf], dtype=dtype))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_incomplete_checkpoint_says_what_it_lacks(tiny, tmp_path, name):
    folder = copy(tiny, tmp_path)
    assert find_checkpoint(str(folder)) == folder
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}: expected a folder made by"):
        find_checkpoint(str(folder))


def test_unconverted_folder_says_what_to_run(tiny_hf):
    with pytest.raises(
        ValueError, match=r"is not converted yet: run `python -m teal_fast\.scripts\.convert_hf_checkpoint"
    ):
        load_model(find_checkpoint(str(tiny_hf)))


def test_fingerprint_tells_models_apart(tiny, tmp_path):
    folder = copy(tiny, tmp_path)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text())))  # other spaces
    assert fingerprint(folder) == fingerprint(tiny)
    tensors = load_file(folder / WEIGHTS)
    tensors["layers.1.feed_forward.w2.weight"][0, 0] += 1
    save_file(tensors, folder / WEIGHTS)
    changed, original = fingerprint(folder), fingerprint(tiny)
    assert {name for name in changed if changed[name] != original[name]} == {"weights"}


# --- commands


def test_a_missing_demo_is_an_error_for_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "demo_folder", lambda: tmp_path / "demo")
    with pytest.raises(MissingDemoError, match=r"run `python -m teal_fast\.scripts\.prepare_demo`"):
        find_checkpoint("demo")


def test_find_checkpoint_says_what_is_there_instead(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        find_checkpoint(str(tmp_path / "none"))
    (tmp_path / "model.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match=r"model.gguf is no GGUF file, expected one, a converted"):
        find_checkpoint(str(tmp_path / "model.gguf"))


def test_check_writable_speaks_of_the_path_that_was_asked_for(tmp_path):
    check_writable(tmp_path / "not" / "yet" / "there.json")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"cannot write /proc/x/y.json: /proc takes no new file"):
        check_writable(Path("/proc/x/y.json"))
