"""Draft models beside a checkpoint and by name: copies share the cache, others must have the same tokenizer."""

import json
import shutil

import pytest

from teal_fast.engine.load import load
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.find import find_drafts
from teal_fast.engine.speculation.statistics import Statistics
from teal_fast.files.checkpoint import source_of
from teal_fast.files.huggingface import convert_huggingface
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.generate import main
from teal_fast.quantization.checkpoint import make_quantized
from teal_fast.tests.models import write_llama
from teal_fast.weights.formats import Format


@pytest.fixture(scope="module")
def beside(even, tmp_path_factory):
    """A checkpoint called even, its copy even-int8, and another model with the same tokenizer."""
    root = tmp_path_factory.mktemp("beside")
    shutil.copytree(even, root / "even")
    (root / "even-int8").mkdir()
    make_quantized(root / "even", root / "even-int8", Format("int8"))
    convert_huggingface(write_llama(root / "hf", even, 64, 128, layers=1), root / "other", None)
    return root


def find(folder, draft="auto"):
    return list(find_drafts(folder, load_model(folder), Tokenizer.load(folder), draft))


def test_a_copy_is_known_by_its_source(beside, tmp_path, capsys):
    (copy,) = find(beside / "even")
    assert (copy.name, copy.shared, copy.calibration) == ("even-int8", True, None)
    assert source_of(beside / "even-int8") == source_of(beside / "even") != source_of(beside / "other")
    shutil.copytree(beside / "other", tmp_path / "even")
    shutil.copytree(beside / "even-int8", tmp_path / "even-int8")
    assert find(tmp_path / "even") == [] and "is no copy of" in capsys.readouterr().err
    assert find(beside / "even", "self") == find(beside / "even", "ngram") == []


def test_other_vocabularies_and_tokenizers_are_refused(beside, even, tmp_path):
    (other,) = find(beside / "even", str(beside / "other"))
    assert not other.shared
    convert_huggingface(
        write_llama(tmp_path / "hf", even, 64, 128, layers=1, vocab_size=49160), tmp_path / "more", None
    )
    with pytest.raises(ValueError, match=r"more has 49160 tokens, .* 49152: a draft model needs the same vocabulary"):
        find(beside / "even", str(tmp_path / "more"))
    shutil.copytree(beside / "other", tmp_path / "renamed")
    path = tmp_path / "renamed" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (next(word for word, id in vocabulary.items() if id == wanted) for wanted in (1000, 1001))
    vocabulary[first], vocabulary[second] = 1001, 1000
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="have different tokenizers"):
        find(beside / "even", str(tmp_path / "renamed"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find(beside / "even", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("draft", ["even-int8", "other"])
def test_the_command_gives_the_dense_text_and_says_what_it_did(beside, run_main, draft):
    words = ("--checkpoint", beside / "even", "--temperature", 0, "--max_new_tokens", 24, "--json", "--device", "cpu")
    dense = run_main(main, *words)
    code, out, error = run_main(main, *words, "--lossless", "--draft", beside / draft, "--draft_tokens", 3)
    assert code == 0, error
    record = json.loads(out.splitlines()[-1])
    assert out.splitlines()[:-1] == dense[1].splitlines()[:-1] and record["mode"] == "lossless"
    assert record["lossless"]["lengths"].get("3") and len(record["lossless"]["acceptance"]) <= 3
    assert "tokens a cycle" in error and json.loads(dense[1].splitlines()[-1])["lossless"] is None


@pytest.mark.parametrize(
    "words, code, said",
    [
        (("--lossless", "--sparsity", 0.5), 2, "--draft_sparsity is that of drafts"),
        (("--draft", "self"), 2, "--draft is for --lossless"),
        (("--lossless", "--draft_tokens", "many"), 2, "got 'many', expected a whole number"),
        (("--lossless", "--draft_tokens", 16), 1, "draft_tokens 16: expected a whole number from 1 to 15"),
        (("--lossless", "--draft", "self", "--no_prepare"), 1, "has no calibration"),
        (("--lossless", "--draft", "ngram", "--draft_sparsity", 0.5), 1, "ngram reads no weights"),
        (("--lossless", "--eager"), 1, "or decode without --eager"),
    ],
)
def test_bad_input_is_one_line(beside, run_main, words, code, said):
    found, out, error = run_main(main, "--checkpoint", beside / "even", "--device", "cpu", *words)
    assert found == code and said in error.splitlines()[-1] and "Traceback" not in error and out == ""


def test_a_program_may_hand_over_draft_models(beside):
    engine, tokenizer = load(beside / "even", device="cpu", context=64)
    assert engine.lossless.statistics == Statistics()
    list(engine.stream(Request(tokenizer.encode("The light"), Sampling(0.0), 0.0, 8, stop=(), lossless=True)))
    assert engine.lossless.statistics.tokens == 7
