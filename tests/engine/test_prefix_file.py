"""The file of a store of prefixes: there and back, what is refused and how, and what tells one model from another."""

import json
import random
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal_fast.engine.prefix_file import identity, load_prefixes, save_prefixes
from teal_fast.engine.prefixes import PrefixStore
from teal_fast.files.calibration import Calibration
from teal_fast.files.load import load_model
from teal_fast.model import KVCache
from teal_fast.tests.engine.test_prefixes import check
from teal_fast.tests.fuzz import mutate_tensors

MODEL = {"weights": "0123", "dtype": "torch.float32"}
CONVERSATIONS = [  # in blocks of 4: [1 2 3 4] [5 6 7 8] [9], which all three begin with, [10 11], [20]
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0.0] * 6 + [0.5] * 3),
    ([1, 2, 3, 4, 10, 11], [0.0] * 6),
    ([20], [0.3]),
]
TOKEN = 2 * 2 * 3 * 2  # values of a token: keys and values of two layers, three heads of two


def random_cache(dtype=torch.float32, heads=3) -> KVCache:
    rows = torch.randn(4, 1, heads, 16, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    return KVCache(list(rows[:2]), list(rows[2:]), torch.zeros(0))


def filled(dtype=torch.float32) -> PrefixStore:
    store = PrefixStore(10**6, 4)
    for ids, made in CONVERSATIONS:
        store.put(ids, made, random_cache(dtype))
    return store


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "cache" / "prefixes.safetensors"  # in a folder that is not there yet
    save_prefixes(filled(), path, MODEL)
    return path


def loaded(path, budget=10**6, model=MODEL, cache=None) -> PrefixStore:
    store = PrefixStore(budget, 4)
    load_prefixes(store, path, model, cache or random_cache())
    check(store)
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_there_and_back(tmp_path, dtype, capsys):
    path, store = tmp_path / "prefixes.safetensors", filled(dtype)
    save_prefixes(store, path, MODEL)
    found = loaded(path, cache=random_cache(dtype))
    assert [block.ids for block in found.parents] == [block.ids for block in store.parents]  # in the order of use
    for ids, made in CONVERSATIONS:
        cache = random_cache(dtype)
        for row in (*cache.k, *cache.v):
            row.zero_()
        assert found.known([*ids, 99], 0.5) == len(ids)
        assert found.fetch([*ids, 99], 0.5, 0, len(ids), cache) == made
        for row, expected in zip((*cache.k, *cache.v), (*random_cache(dtype).k, *random_cache(dtype).v), strict=True):
            assert torch.equal(row[:, :, : len(ids)], expected[:, :, : len(ids)])
    assert capsys.readouterr() == ("", "")


def test_a_smaller_budget_takes_what_was_used_last(path):
    store = loaded(path, budget=8 * TOKEN * 4)
    known = [store.known([*ids, 99], 0.5) for ids, _ in CONVERSATIONS]
    assert known == [4, 6, 1] and store.nbytes == 7 * TOKEN * 4
    store.put([1, 2, 3, 4, 5, 6], [0.0] * 6, random_cache())  # goes on as a store does
    check(store)


def test_what_was_loaded_is_its_own_memory(path):
    store = loaded(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    cache = random_cache()
    store.fetch([20, 1], 0.3, 0, 1, cache)
    assert torch.equal(torch.stack(cache.k), torch.stack(random_cache().k))


def test_only_its_owner_may_read_it_and_no_other_file_is_left(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_it_is_not_written_without_a_change(path):
    store = loaded(path)
    path.unlink()
    store.known([1, 2, 3], 0)
    store.put(*CONVERSATIONS[0], random_cache())  # is there already
    save_prefixes(store, path, MODEL)
    assert not path.exists()


@pytest.mark.parametrize(
    "change, known",
    [
        (lambda store: store.put([9] * 6, [0.0] * 6, random_cache()), 6),
        (lambda store: store.put([20], [0.0], random_cache()), 1),  # more densely than before
        (PrefixStore.clear, 0),
    ],
)
def test_it_is_written_after_a_change(path, change, known):
    store = loaded(path)
    change(store)
    save_prefixes(store, path, MODEL)
    assert not store.changed
    found = loaded(path)
    assert max(found.known([9] * 7, 0), found.known([20, 9], 0)) == known


def test_a_missing_file_is_an_empty_store(tmp_path, capsys):
    assert loaded(tmp_path / "none").nbytes == 0
    assert capsys.readouterr() == ("", "")


def rewrite(path, change) -> None:
    """Writes the file soundly with other blocks in its metadata."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["prefixes"])
    change(about)
    save_file(load_file(path), path, {"prefixes": json.dumps(about)})


def entry(number, part, value):
    def change(about):
        about["blocks"][number][part] = value

    return change


def tensor(change):
    def damage(path):
        data = path.read_bytes()
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata)

    return damage


# As saved: 1 = [20], 2 = [1 2 3 4] after the root, 3 = [10 11] after 2, 4 = [5 6 7 8] after 2, 5 = [9] after 4.
ABOUT = {
    "version": (lambda about: about.update(version="0"), "version is '0'"),
    "no model": (lambda about: about.pop("model"), "another model's: model is None"),
    "blocks": (lambda about: about.update(blocks={}), "blocks is {}"),
    "block less": (lambda about: about["blocks"].pop(), "5 tensors"),
    "no list": (lambda about: about["blocks"].__setitem__(0, 7), "block 1 is 7"),
    "parent after": (entry(2, 0, 3), "block 3: parent is 3"),
    "parent negative": (entry(2, 0, -1), "parent is -1"),
    "parent true": (entry(2, 0, True), "parent is True"),
    "parent short": (entry(2, 0, 1), "its parent has 1 tokens"),
    "ids text": (entry(2, 1, "ab"), "block 3 is"),
    "id text": (entry(2, 1, ["1", 2]), "ids are"),
    "id negative": (entry(2, 1, [-1, 2]), "ids are"),
    "id true": (entry(2, 1, [True, 2]), "ids are"),
    "ids none": (entry(2, 1, []), "ids are"),
    "ids many": (entry(2, 1, [1] * 5), "ids are"),
    "ids fewer": (entry(1, 1, [1, 2, 3]), "sparsities are"),
    "made above": (entry(2, 2, [0.5, 1.5]), "sparsities are"),
    "made negative": (entry(0, 2, [-0.1]), "sparsities are"),
    "made falls": (entry(3, 2, [0.0, 0.0, 0.5, 0.3]), "sparsities are"),
    "made below parent": (entry(4, 2, [0.3]), "sparsities are"),
    "made null": (entry(0, 2, [None]), "sparsities are"),
    "made text": (entry(0, 2, ["0"]), "sparsities are"),
    "twice": (
        lambda about: about["blocks"].__setitem__(3, [0, [1, 2, 3, 4], [0.0] * 4]),
        "has a block twice",
    ),
}
DAMAGE = {
    "empty": (lambda path: path.write_bytes(b""), "not a safetensors file"),
    "text": (lambda path: path.write_text("hello " * 100), "not a safetensors file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a safetensors file"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:50]), "not a safetensors file"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "missing"),
    "no metadata": (lambda path: save_file(load_file(path), path), "no metadata"),
    "no JSON": (lambda path: save_file(load_file(path), path, {"prefixes": "{"}), "not valid JSON"),
    "deep JSON": (lambda path: save_file(load_file(path), path, {"prefixes": "[" * 9000}), "not valid JSON"),
    "tensor less": (tensor(lambda tensors: tensors.pop("3")), "4 tensors"),
    "tensor more": (tensor(lambda tensors: tensors.update(x=torch.ones(1))), "6 tensors"),
    "shape": (tensor(lambda tensors: tensors.update({"3": tensors["3"][:, :, :1].clone()})), "tensor 3 is"),
    "dtype": (tensor(lambda tensors: tensors.update({"3": tensors["3"].half()})), "tensor 3 is"),
    "NaN": (tensor(lambda tensors: tensors["5"][0, 0, 0].fill_(float("nan"))), "tensor 5 holds NaN"),
    **{name: (lambda path, change=change: rewrite(path, change), said) for name, (change, said) in ABOUT.items()},
}


@pytest.mark.parametrize("damage, said", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_one_line_and_is_replaced(path, damage, said, capsys):
    damage(path)
    store = loaded(path)
    lines = capsys.readouterr().err.splitlines()
    assert store.nbytes == 0 and len(lines) == 1 and said in lines[0] and len(lines[0]) < 500
    if path.is_dir():
        path.rmdir()
    store.put([5, 6], [0.0, 0.0], random_cache())
    save_prefixes(store, path, MODEL)
    assert loaded(path).known([5, 6, 7], 0) == 2


def test_no_mutation_is_an_error(path, capsys):
    sound = path.read_bytes()
    refused = 0
    for seed in range(150):
        path.write_bytes(sound)
        rng = random.Random(seed)
        kinds = (mutate_tensors.mutate_header, mutate_tensors.mutate_length, mutate_tensors.mutate_values)
        what = rng.choice((*kinds, mutate_tensors.mutate_stored))(rng, path)
        store = loaded(path)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (0 if store.nbytes else 1), what
        refused += len(lines)
    assert refused > 75


@pytest.mark.parametrize(
    "model, said",
    [
        (MODEL | {"weights": "4567"}, "weights is '0123', expected '4567'"),
        (MODEL | {"more": ""}, "model is {"),
        ({}, "model is {"),
    ],
)
def test_the_file_of_another_model_is_refused(path, model, said, capsys):
    assert loaded(path, model=model).nbytes == 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("cache", [random_cache(torch.bfloat16), random_cache(heads=1)])
def test_a_cache_of_another_kind_is_refused(path, cache, capsys):
    assert loaded(path, cache=cache).nbytes == 0
    assert "expected ('" in capsys.readouterr().err


def test_a_place_that_takes_no_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    store = filled()
    for path in (tmp_path, tmp_path / "file" / "prefixes"):
        save_prefixes(store, path, MODEL)
        assert len(capsys.readouterr().err.splitlines()) == 1 and store.changed


def test_keys_that_are_not_finite_are_not_saved(path, capsys):
    before = path.read_bytes()
    store, cache = filled(), random_cache()
    cache.k[0].fill_(float("inf"))
    store.put([40], [0.0], cache)
    save_prefixes(store, path, MODEL)
    assert path.read_bytes() == before and "NaN or values out of range" in capsys.readouterr().err


def test_identity_tells_what_keys_and_values_depend_on(tiny):
    model = load_model(tiny)
    calibration = Calibration({"layers.0": torch.tensor([0.0, 1.0])}, {}, {})
    base = identity(tiny, model, calibration)
    assert base == identity(tiny, load_model(tiny), replace(calibration, origin={"method": "x"}))
    assert all(isinstance(value, str) for value in base.values())
    others = [
        identity(tiny, model, None),
        identity(tiny, model, replace(calibration, curves={"layers.0": torch.tensor([0.0, 2.0])})),
        identity(tiny, model, replace(calibration, factors={"layers.0": torch.ones(3)})),
        identity(tiny, load_model(tiny, dtype=torch.bfloat16), calibration),
    ]
    model.args = replace(model.args, norm_eps=1e-3)
    others.append(identity(tiny, model, calibration))
    assert len({json.dumps(other) for other in (base, *others)}) == 6
