"""Several processes compute what one computes: real ones, over gloo, each with its shard of real checkpoints."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from teal_fast import generate
from teal_fast.calibration.probe import measure_quantiles
from teal_fast.cli import ModelChoice, open_model
from teal_fast.families.config import model_args
from teal_fast.files.calibration import CALIBRATION, Calibration
from teal_fast.files.checkpoint import fingerprint, read_config
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.files.paths import ROOT
from teal_fast.quantization.checkpoint import make_quantized
from teal_fast.quantization.mixtures import make_format
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine.ranks.rank import NEAREST, compute
from teal_fast.tests.models import write_tokenizer
from teal_fast.weights.formats import Format

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 301,  # which no number of ranks divides
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "attention_bias": True,
}
NAMES = ("llama", "qwen3", "int8", "int4", "q8_0")
SCRIPT = ROOT / "tests/engine/ranks/rank.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def calibrate(folder):
    """A calibration from random tokens, whose thresholds differ from channel to channel in the summed layers."""
    model = load_model(folder)
    sequences = torch.randint(3, 250, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
    generator = torch.Generator().manual_seed(3)
    inputs = {name: layer.threshold.shape for name, layer in sparse_layers(model).items()}
    factors = {name: 0.5 + torch.rand(shape, generator=generator) for name, shape in inputs.items()}
    Calibration(measure_quantiles(model, sequences), fingerprint(folder), {}, factors).save(folder / CALIBRATION)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    configs = {
        "llama": transformers.LlamaConfig(**SIZES, mlp_bias=True),
        "qwen3": transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for tensor_name, tensor in model.named_parameters():
            if tensor_name.endswith("bias"):
                torch.nn.init.normal_(tensor, std=0.3)
        model.save_pretrained(root / "hf" / name)
        write_tokenizer(root / "hf" / name)
        convert_huggingface(root / "hf" / name, root / name, None)
    args = model_args(read_config(root / "llama"))
    formats = {"int8": Format("int8"), "int4": Format("int4", 64), "q8_0": make_format("q8_0", args, torch.float32)[0]}
    for name, format in formats.items():
        (root / name).mkdir()
        make_quantized(root / "llama", root / name, format)
        write_tokenizer(root / name)
    for name in NAMES:
        calibrate(root / name)
    return root


def start(ranks: int, module: str, *arguments, **options) -> list[subprocess.Popen]:
    """The processes as torchrun starts them, without torchrun, which would end the others itself."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    meeting = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = []
    for rank in range(ranks):
        places = meeting | {"RANK": rank, "LOCAL_RANK": rank}
        environment = ENVIRONMENT | {name: str(value) for name, value in places.items()}
        words = [sys.executable, "-m", f"teal_fast.{module}", *map(str, arguments)]
        found.append(subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE, **options))
    return found


def torchrun(ranks: int, *arguments, **more) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    environment = ENVIRONMENT | more
    return subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def check_equal_to_one(out, name: str, ranks: int):
    """What every rank found in a model, against one process."""
    alone, *found = (load_file(out / f"{name}-{rank}.safetensors") for rank in ("alone", *range(ranks)))
    for other in found[1:]:
        assert all(torch.equal(other[key], found[0][key]) for key in alone if key != NEAREST)  # bit for bit
    error = (found[0]["logits"] - alone["logits"]).abs().max() / alone["logits"].abs().max()
    assert error <= 1e-5, f"{name}: logits are off by {error:.1e} of the largest"
    assert torch.equal(found[0]["dense"], alone["dense"])
    # Until an input comes so near to its threshold that one may keep what the other drops, all is equal up to rounding.
    sure = 1 + int((alone[NEAREST] > 2e-6).sum())
    torch.testing.assert_close(found[0]["margins"][:sure], alone["margins"][:sure], rtol=0, atol=1e-3)
    parted = int(torch.cat(((found[0]["greedy"] != alone["greedy"]), torch.tensor([True]))).nonzero()[0])
    assert parted >= sure or alone["margins"][parted] < 1e-3, f"{name} parted at token {parted}"
    torch.testing.assert_close(found[0]["achieved"], alone["achieved"], rtol=0, atol=0.03)


@pytest.fixture(scope="module")
def computed(folders, tmp_path_factory):
    """What one process finds in each. In plain PyTorch: the C++ kernels of int4 round inputs by those beside them."""
    out = tmp_path_factory.mktemp("computed")
    words = [sys.executable, SCRIPT, out, *(folders / name for name in NAMES)]
    subprocess.run([*map(str, words)], env=ENVIRONMENT | {"TEAL_CPU": "torch"}, check=True)
    return out


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_compute_what_one_process_does(folders, computed, ranks):
    done = torchrun(ranks, SCRIPT, computed, *(folders / name for name in NAMES), TEAL_CPU="torch")
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        check_equal_to_one(computed, name, ranks)


def test_three_ranks_share_the_demo(demo, tmp_path):
    save_file(compute(open_model(ModelChoice(str(demo), "cpu", "fp32"))), tmp_path / "demo-alone.safetensors")
    done = torchrun(3, SCRIPT, tmp_path, demo)
    assert done.returncode == 0, done.stderr
    check_equal_to_one(tmp_path, "demo", 3)


def test_the_command(folders):
    """As users start it: rank 0 alone speaks, of its share of the bytes."""
    arguments = (
        "--checkpoint",
        folders / "llama",
        "--sparsity",
        0.5,
        "--max_new_tokens",
        8,
        "--prompt",
        "Hi",
    )
    done = torchrun(2, "generate.py", *arguments, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Hi") == 1
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["mode"] == "plain" and 0.4 < record["achieved_sparsity"] < 0.6
    assert record["ranks"] == 2
    assert (
        done.stderr.count("tokens/s") == 1
        and done.stderr.count("a model that ranks share is decoded in plain PyTorch") == 1
    )


def test_a_number_of_heads_that_does_not_divide_is_one_line(demo):
    done = torchrun(2, "generate.py", "--checkpoint", demo, "--device", "cpu")
    assert done.returncode == 1 and done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ours == ["error: 2 ranks cannot share this model (its 9 heads do not divide by 2): start 1 or 3"]


def test_a_killed_rank_ends_the_others(folders):
    arguments = ("--checkpoint", folders / "llama", "--device", "cpu", "--max_new_tokens", 400, "--prompt", "Hi")
    processes = start(2, "generate", *arguments, stdout=subprocess.PIPE)
    try:
        processes[0].stdout.read(20)  # they are decoding
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, errors = processes[0].communicate(timeout=60)
        assert time.monotonic() - began < 20
        assert processes[0].returncode == 1 and "Traceback" not in errors
        said = "error: another rank has ended or hangs: start all of them again (rank 0 of 2 was told: "
        assert errors.splitlines()[-1].startswith(said)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_what_runs_as_one_process_alone_says_so():
    processes = start(2, "serve", stdout=subprocess.PIPE)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    said = "error: torchrun started 2 processes, but of the commands generate alone runs as several"
    assert "".join(errors).splitlines().count(said) == 1 and "Traceback" not in "".join(errors)


@pytest.mark.parametrize("flag", ["--interactive", "--lossless", "--compile_prefill"])
def test_what_needs_one_process(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--checkpoint", "demo", flag])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        generate.parse_arguments()
    assert "--interactive, --lossless and --compile_prefill are for one process" in capsys.readouterr().err
