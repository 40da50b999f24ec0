"""TEAL's release turned into our calibration: files written here, and the release's own where they are at hand."""

import csv
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from teal_fast.calibration.probe import POINTS
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION, Calibration, load_calibration
from teal_fast.files.checkpoint import CONFIG, METADATA, WEIGHTS, read_config
from teal_fast.model import Transformer
from teal_fast.scripts import import_teal
from teal_fast.scripts.import_teal import INPUTS, Histogram, check_realised, read_histogram, read_table
from teal_fast.sparse_model import SPARSE_WEIGHT

RELEASE = os.environ.get("TEAL_RELEASE", "")  # folder with Llama-2-7B, Llama-3-8B, Mistral-7B, layers 0, 15 and 31
WIDTHS = {"attention.wqkv": 64, "attention.wo": 64, "feed_forward.w13": 64, "feed_forward.w2": 172}  # of `tiny`
LEVELS = np.linspace(0, 1, POINTS)
COLUMNS = ["Effective Sparsity", "Activation Error", "Baseline Error", "q", "k", "v", "o", "gate", "up", "down"]


def histogram_of(x: np.ndarray, bins: int = 10_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and centers as the release has them: even bins between two percentiles, a tail at either end."""
    inner = np.linspace(*np.quantile(x, (0.01, 0.99)), bins - 1)
    edges = np.concatenate(([x.min()], inner, [x.max()]))
    return torch.tensor(np.histogram(x, edges)[0]).float(), torch.tensor((edges[:-1] + edges[1:]) / 2).float()


def write_block(folder: Path, inputs: dict[str, np.ndarray]) -> None:
    data = {}
    for layer, (part, key) in INPUTS.items():
        counts, centers = histogram_of(inputs[layer])
        data.setdefault(part, {}).update({key: counts, f"{key}_centers": centers})
    for part, tensors in data.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        torch.save(tensors, folder / part / "histograms.pt")


def draw(width: int, seed: int, tokens: int = 500) -> np.ndarray:
    """Skewed inputs, bounded so far on one side that the percentiles lie unevenly about zero."""
    x = np.random.default_rng(seed).gamma(2.0, 1.0, width * tokens) - 1.9
    return np.where(np.arange(len(x)) % 3, x, -x)


def write_table(path: Path, rows: list[list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *[[9.0, 0.1, 0.2, *row] for row in rows]])  # 9: theirs is not believed


@pytest.fixture(scope="module")
def inputs():
    return {
        f"layers.{number}.{layer}": draw(width, 10 * number + place)
        for number in range(2)
        for place, (layer, width) in enumerate(WIDTHS.items())
    }


@pytest.fixture
def release(inputs, tmp_path):
    """A model's folder as TEAL has it, for the tiny model."""
    folder = tmp_path / "models" / "Tiny"
    for number in range(2):
        block = {layer: inputs[f"layers.{number}.{layer}"] for layer in WIDTHS}
        write_block(folder / "histograms" / f"layer-{number}", block)
        rows = [[s / 2, s, s, s / 4, s, s / 2, min(0.95, 1.5 * s)] for s in np.linspace(0.01, 0.8, 80)]
        write_table(folder / "lookup" / f"layer-{number}" / "results.csv", rows)
    return folder


@pytest.fixture
def checkpoint(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "tiny")


@pytest.fixture
def run_here(run_main):
    return functools.partial(run_main, import_teal.main)


@pytest.mark.parametrize("target", [0.1, 0.253, 0.5, 0.9])
def test_uniform_thresholds_drop_what_they_say(run_here, release, checkpoint, inputs, target):
    code, out, err = run_here(release, "--checkpoint", checkpoint, "--allocation", "uniform")
    assert code == 0, err
    calibration = load_calibration(checkpoint)
    assert calibration.origin["allocation"] == "uniform"
    assert out.startswith(f"wrote {checkpoint / CALIBRATION}: uniform thresholds of 8 layers")
    for name, x in inputs.items():
        share = (np.abs(x) <= float(calibration.threshold(name, target))).mean()
        assert share == pytest.approx(target, abs=0.002), name


def test_greedy_thresholds_drop_what_the_table_says(run_here, release, checkpoint, inputs):
    code, _, err = run_here(release, "--checkpoint", checkpoint)
    assert code == 0, err
    calibration = load_calibration(checkpoint)
    args = model_args(read_config(checkpoint))
    sizes = {"attention.wqkv": 64 * 128, "attention.wo": 64 * 64, "feed_forward.w13": 128 * 172}
    sizes["feed_forward.w2"] = 64 * 172
    for number in range(2):
        effective, curves = read_table(release / "lookup" / f"layer-{number}" / "results.csv", args)
        for target in (0.2, 0.5, 0.6):
            dropped = 0.0
            for layer, curve in curves.items():
                name = f"layers.{number}.{layer}"
                share = (np.abs(inputs[name]) <= float(calibration.threshold(name, target))).mean()
                assert share == pytest.approx(np.interp(target, effective, curve), abs=0.004), (name, target)
                dropped += share * sizes[layer]
            assert dropped / sum(sizes.values()) == pytest.approx(target, abs=0.003)


def test_tables_are_read_with_the_sizes_of_the_model(tiny, tmp_path):
    """By hand: q and o are 64 x 64, k and v 64 x 32, gate, up and down 64 x 172."""
    args = model_args(read_config(tiny))
    write_table(tmp_path / "results.csv", [[0.2, 0.4, 0.6, 0.1, 0.3, 0.5, 0.7]])
    effective, curves = read_table(tmp_path / "results.csv", args)
    assert curves["attention.wqkv"].tolist() == pytest.approx([0, (64 * 0.2 + 32 * 0.4 + 32 * 0.6) / 128])
    assert curves["feed_forward.w13"].tolist() == pytest.approx([0, 0.4])
    assert (curves["attention.wo"][1], curves["feed_forward.w2"][1]) == pytest.approx((0.1, 0.7))
    whole = 64 * (0.2 + 0.1) + 32 * (0.4 + 0.6) + 172 * (0.3 + 0.5 + 0.7)
    assert effective.tolist() == pytest.approx([0, whole / (2 * 64 + 2 * 32 + 3 * 172)])


def test_both_sides_count_and_tails_are_not_made_up():
    """Entries at -3 … -1 and 1: |x| <= 1 holds a fifth on one side and none on the other; beyond 2 nothing is known."""
    histogram = Histogram(np.array([10.0, 20, 0, 0, 20, 0]), -3.0, 3.0, 60.0)  # ten more lie in the tails
    assert histogram.share(1.0) == 0
    assert histogram.share(2.0) == pytest.approx(40 / 60)
    assert histogram.share(1.5) == pytest.approx(20 / 60)
    assert histogram.share(3.0) == pytest.approx(50 / 60)
    assert histogram.abs_quantiles(np.array([0, 1 / 3, 2 / 3, 0.9, 1])).tolist() == pytest.approx([1, 1.5, 2, 3, 3])
    lopsided = Histogram(np.array([10.0, 20, 20]), -1.0, 2.0, 60.0)
    assert lopsided.largest_resolved == 1
    assert lopsided.abs_quantiles(np.array([0.25, 0.5, 0.9])).tolist() == pytest.approx([0.5, 1, 1])
    assert Histogram(np.array([10.0, 20]), 1.0, 2.0, 32.0).abs_quantiles(LEVELS).max() == 0


def test_realised_sparsity_is_checked(run_here, release, checkpoint, inputs):
    run_here(release, "--checkpoint", checkpoint, "--allocation", "uniform")
    calibration = load_calibration(checkpoint)
    histograms = {
        f"layers.{n}.{layer}": read_histogram(release / "histograms" / f"layer-{n}" / part / "histograms.pt", key)
        for n in range(2)
        for layer, (part, key) in INPUTS.items()
    }
    levels = dict.fromkeys(histograms, LEVELS)
    assert check_realised(calibration, histograms, levels) < 0.002
    calibration.curves["layers.1.attention.wo"].mul_(1.1)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.wo: the threshold for .* drops"):
        check_realised(calibration, histograms, levels)


def test_another_models_set_is_refused_by_its_width(run_here, release, checkpoint):
    """A copy of a model with wider down projections, as the release has for Llama-3-8B; the right set lies beside."""
    shutil.move(release / "histograms", release / "right")
    for number in range(2):
        block = {layer: draw(width + 20 * (width == 172), 1) for layer, width in WIDTHS.items()}
        write_block(release / "histograms" / f"layer-{number}", block)
    code, out, err = run_here(release, "--checkpoint", checkpoint)
    message = (
        "layer-0 is another model's: the input of feed_forward.w2 is 192 wide over 500 tokens, the checkpoint's 172"
    )
    assert code == 0
    assert err.startswith("refused: ") and message in err
    assert str(release / "right") in out
    shutil.rmtree(release / "right")
    (checkpoint / CALIBRATION).unlink()
    code, out, err = run_here(release, "--checkpoint", checkpoint)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: no set of histograms")
    assert not (checkpoint / CALIBRATION).exists()


def edit(path: Path, **changes) -> None:
    torch.save(torch.load(path, weights_only=True) | changes, path)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: shutil.rmtree(r / "histograms" / "layer-1"), "lacks layers 1 of the checkpoint's 2"),
        (lambda r: shutil.rmtree(r / "lookup" / "layer-0"), "lacks the greedy tables of layers 0: use --allocation"),
        (lambda r: shutil.copytree(r / "histograms" / "layer-1", r / "histograms" / "layer-2"), "has a layer-2, the"),
        (lambda r: shutil.rmtree(r / "histograms"), "holds no layer-*/*/histograms.pt"),
        (lambda r: shutil.rmtree(r), "is no folder: expected a model's folder of TEAL's release"),
        (lambda r: (r / "histograms/layer-0/mlp/histograms.pt").write_bytes(b"PK"), "is no histograms.pt of TEAL"),
        (lambda r: torch.save(Malicious(), r / "histograms/layer-0/mlp/histograms.pt"), "is no histograms.pt of TEAL"),
        (lambda r: torch.save([1], r / "histograms/layer-0/mlp/histograms.pt"), "is no histograms.pt of TEAL"),
        (lambda r: edit(r / "histograms/layer-0/mlp/histograms.pt", h2=torch.ones(9)), "expected equal rows"),
        (
            lambda r: edit(r / "histograms/layer-0/mlp/histograms.pt", h2_centers=torch.linspace(0, 9, 10_000) ** 2),
            "are not of one width",
        ),
        (lambda r: write_table(r / "lookup/layer-1/results.csv", [[0.5] * 7, [0.4] * 7]), "grow from row to row"),
        (lambda r: write_table(r / "lookup/layer-1/results.csv", [[1.5] * 7]), "expected sparsities from 0 to 1"),
        (lambda r: (r / "lookup/layer-1/results.csv").write_text("a,b\n1,2\n"), "is no table of TEAL's greedy search"),
    ],
)
def test_bad_input(run_here, release, checkpoint, monkeypatch, tmp_path, damage, message):
    monkeypatch.chdir(tmp_path)
    damage(release)
    code, out, err = run_here(release, "--checkpoint", checkpoint)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not (checkpoint / CALIBRATION).exists() and not Path("executed").exists()


LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 8, "rms_norm_eps": 1e-5}
LLAMA |= {"num_hidden_layers": 3, "max_position_embeddings": 4096, "tie_word_embeddings": True}
REAL = {
    "Llama-2-7B": LLAMA | {"intermediate_size": 11008, "num_key_value_heads": 32},
    "Llama-3-8B": LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "Mistral-7B": LLAMA | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8},
}


def write_hollow(folder: Path, config: dict) -> Path:
    """A checkpoint of real widths whose weights are a hole in a file: 2 GB long, 4 KB on disk."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(model_args(config)).named_parameters()}
    header, end = {"__metadata__": METADATA}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        stored = [*reversed(shape)] if SPARSE_WEIGHT.fullmatch(name) else [*shape]
        header[name] = {"dtype": "BF16", "shape": stored, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.mark.skipif(not Path(RELEASE, "Llama-2-7B").is_dir(), reason="TEAL_RELEASE names no copy of TEAL's release")
@pytest.mark.parametrize("allocation", ["uniform", "greedy"])
@pytest.mark.parametrize("name", REAL)
def test_the_release_itself(run_here, tmp_path, name, allocation):
    """Its layers 0, 15 and 31 as a model of three."""
    folder = write_hollow(tmp_path / "model", REAL[name])
    copy = tmp_path / name
    for path in sorted(Path(RELEASE, name).glob("**/layer-*")):
        number = (0, 15, 31).index(int(path.name[6:]))
        target = copy / path.relative_to(Path(RELEASE, name)).with_name(f"layer-{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    code, out, err = run_here(copy, "--checkpoint", folder, "--allocation", allocation)
    assert code == 0, err
    print(out, err)
    assert ("the input of feed_forward.w2 is 11008 wide over 56320 tokens, the checkpoint's 14336" in err) == (
        name == "Llama-3-8B"
    )
    calibration = Calibration.load(folder / CALIBRATION)
    calibration.check(folder)
    assert len(calibration.curves) == 12
