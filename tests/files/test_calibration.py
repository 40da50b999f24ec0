"""Mutations of a calibration: every tensor and every key of its metadata gives one line that names it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal_fast.files.calibration import CALIBRATION_VERSION, Calibration, load_calibration
from teal_fast.files.checkpoint import FINGERPRINT, fingerprint

SHAPES = {"attention.wqkv": 64, "attention.wo": 64, "feed_forward.w13": 64, "feed_forward.w2": 172}  # of `tiny`
LAYERS = {f"layers.{i}.{name}": size for i in range(2) for name, size in SHAPES.items()}
POINTS = 11


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory) -> Path:
    """A calibration file of `tiny` with factors for every layer."""
    curves = {name: torch.linspace(0, 1, POINTS) for name in LAYERS}
    factors = {name: torch.full((size,), 0.5) for name, size in LAYERS.items()}
    path = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    Calibration(curves, fingerprint(tiny), {"corpus": "none"}, factors).save(path)
    return path


def about(tiny) -> dict:
    return {"version": CALIBRATION_VERSION, "model": fingerprint(tiny), "origin": {"corpus": "none"}}


def refusal(tiny, path: Path) -> str:
    """The one line with which the file is refused for `tiny`."""
    with pytest.raises(ValueError) as refused:
        load_calibration(tiny, path)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 900 and "run `python calibrate.py" in line
    return line


def test_the_sound_one_is_taken(tiny, sound):
    found = load_calibration(tiny, sound)
    assert found.curves.keys() == found.factors.keys() == LAYERS.keys()
    assert set(found.model) == set(FINGERPRINT)


CURVES = {
    "dtype": lambda t: t.double(),
    "integers": lambda t: t.long(),
    "dimensions": lambda t: t[None],
    "scalar": lambda t: t[0],
    "one point": lambda t: t[:1],
    "no point": lambda t: t[:0],
    "another length": lambda t: t[:-1],
    "nan": lambda t: torch.where(torch.arange(len(t)) == 3, torch.nan, t),
    "infinite": lambda t: torch.where(torch.arange(len(t)) == len(t) - 1, torch.inf, t),
    "negative": lambda t: t - 2,
    "as if all were kept": lambda t: torch.full_like(t, -1),
    "descending": lambda t: t.flip(0),
    "huge": lambda t: torch.zeros(2**16 + 1),
}
FACTORS = {name: CURVES[name] for name in ("dtype", "integers", "dimensions", "scalar", "no point", "another length")}
FACTORS |= {name: CURVES[name] for name in ("nan", "infinite", "negative")} | {"zero": lambda t: t * 0}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("suffix, mutations", [("", CURVES), (".factor", FACTORS)], ids=["curve", "factor"])
def test_every_tensor_is_checked(tiny, sound, tmp_path, layer, suffix, mutations):
    whole, metadata = load_file(sound), {"calibration": json.dumps(about(tiny))}
    name, path = layer + suffix, tmp_path / "mutated.safetensors"
    for mutation, mutate in mutations.items():
        save_file(whole | {name: mutate(whole[name]).clone()}, path, metadata)
        assert name in refusal(tiny, path), mutation
    save_file(whole | {f"x{name}": whole[name].clone()}, path, metadata)
    assert f"x{layer}" in refusal(tiny, path)
    save_file({key: tensor for key, tensor in whole.items() if key != name}, path, metadata)
    if suffix:
        assert layer not in load_calibration(tiny, path).factors  # documented: factors of 1 are left out
    else:
        assert f"lacks layer '{layer}'" in refusal(tiny, path)


WRONG = {"null": None, "true": True, "number": 2, "list": ["2"], "object": {}, "nested": "NESTED", "NaN": torch.nan}
WRONG |= {"long": "x" * 1_000_000, "digits": "DIGITS", "surrogate": "\ud800", "empty": ""}
MODEL = [("model", key) for key in FINGERPRINT]


@pytest.mark.parametrize("wrong", ["absent", *WRONG])
@pytest.mark.parametrize("keys", [("version",), ("model",), ("origin",), *MODEL, ("origin", "corpus")], ids=".".join)
def test_every_key_of_the_metadata_is_checked(tiny, sound, tmp_path, keys, wrong):
    whole = about(tiny)
    place = whole if len(keys) == 1 else whole[keys[0]]
    if wrong == "absent":
        del place[keys[-1]]
    else:
        place[keys[-1]] = WRONG[wrong]
    text = json.dumps(whole).replace('"NESTED"', "[" * 100_000).replace('"DIGITS"', "9" * 5000)
    path = tmp_path / "mutated.safetensors"
    save_file(load_file(sound), path, {"calibration": text})
    if keys[0] == "origin" and (len(keys) == 2 and wrong in ("absent", "long", "surrogate", "empty")):
        assert load_calibration(tiny, path).curves  # documented: the origin may be any texts
    elif (keys, wrong) == (("origin",), "object"):
        assert load_calibration(tiny, path).origin == {}
    else:
        line = refusal(tiny, path)
        assert keys[-1] in line or "calibration is not valid JSON" in line


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "true", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, "NaN"], ids=range(11)
)
def test_metadata_that_are_no_object(tiny, sound, tmp_path, text):
    path = tmp_path / "mutated.safetensors"
    save_file(load_file(sound), path, {"calibration": text})
    assert "calibration" in refusal(tiny, path) or text == "{}"
    save_file(load_file(sound), path, {"other": text})
    assert "no metadata called calibration" in refusal(tiny, path)


def test_an_unknown_key_is_refused(tiny, sound, tmp_path):
    path = tmp_path / "mutated.safetensors"
    for change, named in (({"extra": 1}, "extra"), ({"model": fingerprint(tiny) | {"eps": "1"}}, "eps")):
        save_file(load_file(sound), path, {"calibration": json.dumps(about(tiny) | change)})
        assert named in refusal(tiny, path)


def test_the_command_ends_in_one_line(tiny, sound, tmp_path, command):
    path = tmp_path / "mutated.safetensors"
    save_file(load_file(sound), path, {"calibration": "[" * 100_000})
    done = command("generate", "--checkpoint", tiny, "--calibration", path, "--device", "cpu", "--sparsity", 0.5)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and "calibration is not valid JSON" in done.stderr
