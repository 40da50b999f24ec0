"""GGUF files as checkpoints: one whole entry a file and name, made once; damaged and unfinished ones are never used."""

import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from teal_fast import cli
from teal_fast.engine.load import load
from teal_fast.files import gguf_cache
from teal_fast.files.checkpoint import CONFIG, WEIGHTS, find_checkpoint
from teal_fast.files.gguf_cache import LIST, MissingPreparedError, hash_of, is_whole, prepare_folder, prepared_folder
from teal_fast.files.load import load_model
from teal_fast.tests.gguf_models import make_model, write_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(gguf_cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.Q8_0.gguf"
    write_gguf(path, make_model(), Type.Q8_0)
    return path


@pytest.fixture
def file(written, tmp_path) -> Path:
    return Path(shutil.copy(written, tmp_path))


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "hashes")


def test_an_entry_is_made_once_with_a_word(file, cache, capfd):
    folder = cli.open_checkpoint(str(file))
    said = capfd.readouterr().err.splitlines()
    assert said[0] == f"preparing {file}, once: its values are laid out anew in {folder}"
    assert folder.name == "small.Q8_0" and folder.parent.parent == cache
    assert folder.parent.name.startswith(hash_of(file)[:16])
    before = (folder / WEIGHTS).stat()
    assert cli.open_checkpoint(str(file)) == folder == cli.open_checkpoint(str(file), prepare=False)
    assert (folder / WEIGHTS).stat() == before and capfd.readouterr().err == ""
    assert load_model(folder).layers[0].attention.wo.weight.parts[0].kind.name == "Q8_0"


def test_nothing_is_made_where_that_is_refused(file, cache):
    for find in (partial(cli.open_checkpoint, prepare=False), load, find_checkpoint):
        with pytest.raises(MissingPreparedError, match=r"not prepared yet: run `python -m .*convert_gguf .*Q8_0.gguf`"):
            find(str(file))
    assert not cache.exists() or entries(cache) == []
    cli.open_checkpoint(str(file))
    engine, _ = load(file, "cpu")
    assert engine.model.args.dim == 64


def test_a_file_that_changes_has_another_entry(file, cache):
    first = cli.open_checkpoint(str(file))
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    second = cli.open_checkpoint(str(file))
    assert second != first and second.name == first.name and len(entries(cache)) == 2
    assert (second / WEIGHTS).read_bytes() != (first / WEIGHTS).read_bytes()


def test_a_file_of_another_name_has_its_own(file, cache):
    first = cli.open_checkpoint(str(file))
    other = file.rename(file.with_name(f"{'long' * 60}.gguf"))
    assert cli.open_checkpoint(str(other)).name == ("long" * 60)[:100]
    assert is_whole(first)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json", f"../{LIST}"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_made_again(file, cache, capfd, name, damage):
    folder = cli.open_checkpoint(str(file))
    whole, path = (folder / WEIGHTS).read_bytes(), folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        changed = bytes([*data[:-20], data[-20] ^ 1, *data[-19:]])
        path.write_bytes(changed if damage == "changed" else data[: len(data) // 2])
    assert not is_whole(folder)
    with pytest.raises(MissingPreparedError):
        find_checkpoint(str(file))
    capfd.readouterr()
    assert cli.open_checkpoint(str(file)) == folder and is_whole(folder)
    assert "preparing" in capfd.readouterr().err and (folder / WEIGHTS).read_bytes() == whole


def test_what_is_added_to_an_entry_stays(file, cache, capfd):
    folder = cli.open_checkpoint(str(file))
    (folder / "calibration.safetensors").write_bytes(b"of later")
    assert is_whole(folder) and cli.open_checkpoint(str(file)) == folder


def test_an_entry_that_was_not_finished_is_not_there(file, cache):
    def fail(out: Path) -> None:
        out.mkdir()
        (out / CONFIG).write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_folder(file, fail)
    assert entries(cache) == [] and not is_whole(prepared_folder(file))


def test_of_two_who_make_an_entry_the_first_counts(file, cache):
    def convert(out: Path) -> None:
        inner = cli.open_checkpoint(str(file))  # another process, in the meantime
        (inner / "mark").write_text("first")
        shutil.copytree(inner, out)

    folder = prepare_folder(file, convert)
    assert (folder / "mark").read_text() == "first" and is_whole(folder) and entries(cache) == [folder.parent.name]


def test_a_hash_is_kept_for_a_file_that_rests(file, cache, monkeypatch):
    monkeypatch.setattr(gguf_cache, "SETTLED", -1)
    expected = hash_of(file)
    monkeypatch.setattr(gguf_cache.hashlib, "file_digest", None)
    assert hash_of(file) == expected
    os.utime(file)
    with pytest.raises(TypeError):
        hash_of(file)


def test_a_hash_of_a_file_that_was_just_written_is_not_kept(file, cache):
    assert len(hash_of(file)) == 64 and not (cache / "hashes").exists()


def test_a_cache_that_takes_no_hash_costs_only_its_time(file, cache):
    expected = hash_of(file)
    os.utime(file, (1, 1))
    cache.mkdir(parents=True)
    (cache / "hashes").write_text("no folder")
    assert hash_of(file) == expected and (cache / "hashes").read_text() == "no folder"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "text.txt",
            b"no model",
            "text.txt is no GGUF file, expected one, a converted checkpoint's folder, or the",
        ),
        ("empty.gguf", b"", "empty.gguf is no GGUF file"),
        ("cut.gguf", b"GGUF\3\0\0\0", "cut.gguf is truncated or not a GGUF file"),
        ("models--of--a.gguf", b"GGUF\3\0\0\0", r"^[^:]*--a.gguf is truncated .*: download it again$"),
    ],
)
def test_files_that_are_no_models(tmp_path, cache, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        cli.open_checkpoint(str(tmp_path / name))
    assert not cache.exists() or entries(cache) == []


def test_what_a_converter_left_out_names_the_command_that_takes_it(tmp_path, cache):
    write_gguf(path := tmp_path / "old.gguf", make_model("qwen2"), Type.Q8_0, metadata={"rope.freq_base": None})
    with pytest.raises(ValueError, match=r"old.gguf: .* as --rope_theta, flags of `python -m .*convert_gguf .*gguf`"):
        cli.open_checkpoint(str(path))
    assert entries(cache) == []
