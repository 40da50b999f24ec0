"""Where measured launches of the step in three stages are looked for, and what is refused."""

import json
from dataclasses import replace

import pytest

from teal_fast.kernels import tuning
from teal_fast.kernels.stage_shape import StageShape, cut
from teal_fast.kernels.tuning import find_tuned, key_of, own_file, read_tuned

SHAPE = StageShape(4096, 32, 8, 128, 14336, 128256, 16, 16, 0, 16, False, False)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._say_unknown.cache_clear()
    return tmp_path


def write(card: str, constants: dict) -> None:
    path = own_file(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key_of(SHAPE): constants}))


def test_this_machines_measurements_are_found_by_the_cards_name(cache, capsys):
    write("NVIDIA X/1", {"unroll_m": 3, "channels": 64})
    assert own_file("NVIDIA X/1") == cache / "teal-fast" / "tuning" / "NVIDIA-X-1.json"
    assert find_tuned("NVIDIA X/1", SHAPE) == {"unroll_m": 3, "channels": 64}
    constants = cut(SHAPE, 256, **find_tuned("NVIDIA X/1", SHAPE))
    assert (constants["UNROLL_M"], constants["CHANNELS"], constants["CTAS_MLP"]) == (3, 64, 224)
    assert not capsys.readouterr().err


def test_an_unknown_card_is_named_once_and_served(cache, capsys):
    assert find_tuned("NVIDIA X", SHAPE) == find_tuned("NVIDIA X", SHAPE) == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("NVIDIA X is not tuned for") and "teal-fast tune" in said


def test_known_cards_have_files_that_are_sound(cache, capsys):
    for path in tuning.SHIPPED.iterdir():
        read_tuned(path)
    int8 = replace(SHAPE, bits_a=8, bits_m=8, output_bits=8)
    assert find_tuned("NVIDIA H200", int8) == {"sharers": 3} and find_tuned("NVIDIA H200", SHAPE) == {}
    assert not capsys.readouterr().err


@pytest.mark.parametrize("unsound", [{"unroll_m": 0}, {"unroll_m": 2.0}, {"unroll_m": 17}, {"warps": 4}])
def test_other_contents_are_refused_in_a_line(cache, unsound):
    write("NVIDIA X", unsound)
    with pytest.raises(ValueError, match="is not what `teal-fast tune` writes: remove it"):
        find_tuned("NVIDIA X", SHAPE)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"shape": 3}'])
def test_other_files_are_refused_in_a_line(cache, text):
    path = own_file("NVIDIA X")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match="remove it"):
        read_tuned(path)
