"""Shares calibrations on the Hugging Face Hub: `calibrate.py --push_to_hub` and `--from_hub`.

A repo holds calibration.safetensors and a model card. The card shows which sparsity the thresholds achieve on text
that they were not measured on and, if eval.py's records are given, perplexities. Weights are never pushed. A fetched
file is kept only if its fingerprint is that of the checkpoint at hand.
"""

import argparse
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or, since 2.0, httpx2: the base of what cannot connect
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from teal_fast.calibration.corpus import read_ids
from teal_fast.engine.accounting import tally_kept
from teal_fast.files.calibration import CALIBRATION, Calibration, set_sparsity
from teal_fast.files.load import load_model
from teal_fast.files.paths import DATA, command
from teal_fast.files.store import new_file, read_json
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.sparse_model import Phase

CARD_TEXT = DATA / "evaluation"
CARD_TOKENS = 1024
CARD_SPARSITIES = (0.25, 0.4, 0.5, 0.65)
CARD = """---
library_name: teal-fast
tags: [activation-sparsity, teal]
---

# Activation thresholds for {model}

Thresholds for the hidden states at the input of every linear layer of the blocks, as curves from which teal-fast reads
those of any sparsity. No weights are here. They fit one model only:

{fingerprint}

Measured on: {origin}.

```sh
python calibrate.py --checkpoint FOLDER --from_hub {repo_id}
```

Sparsity achieved on {tokens} tokens of other text ({text}), all but the first of them sparse, by weight bytes:

{achieved}
{perplexity}"""


def repo_id(text: str) -> str:
    """argparse type: the name of a repo on the hub."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def explain(error: Exception, repo_id: str, revision: str | None, again: str) -> str | None:
    """One line about an error of the hub or the network and what to do about it; None for any other error.

    again: the advice when trying again may help.
    """
    if isinstance(error, LocalEntryNotFoundError):  # the wrapper of whatever kept a file's metadata from us
        error = error.__cause__ or error
    match error:
        case GatedRepoError():
            return f"{repo_id} is gated: accept its terms at {ENDPOINT}/{repo_id}, then set HF_TOKEN to your token"
        case RepositoryNotFoundError():
            return f"no model {repo_id} at {ENDPOINT}: check the name, or set HF_TOKEN if it is private"
        case RevisionNotFoundError():
            return f"{repo_id} has no revision {revision}: give a branch, tag or commit of {ENDPOINT}/{repo_id}"
        case HfHubHTTPError(response=response) if response.status_code in (401, 403):
            return f"{ENDPOINT} refused the token for {repo_id} ({response.status_code}): check HF_TOKEN"
        case HfHubHTTPError(response=response):
            return f"{ENDPOINT} answered {response.status_code} {response.reason_phrase}: {again}"
        case HTTPError() | ConnectionError() | LocalEntryNotFoundError():
            return f"no connection to {ENDPOINT} ({error or type(error).__name__}): check the network and {again}"
    return None


def fetch(repo_id: str, folder: Path, out: Path) -> None:
    """Writes the repo's calibration to `out`. Raises ValueError unless it belongs to the checkpoint in `folder`."""
    try:
        path = Path(hf_hub_download(repo_id, CALIBRATION))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"{repo_id} has no {CALIBRATION}: give a repo made by --push_to_hub") from error
        raise ValueError(explain(error, repo_id, None, "run the command again")) from error
    except (HTTPError, ConnectionError) as error:
        raise ValueError(explain(error, repo_id, None, "run the command again")) from error
    calibration = Calibration.load(path)
    calibration.check(folder)
    with new_file(out) as temporary:
        temporary.write_bytes(path.read_bytes())
    print(f"wrote {out}: from {ENDPOINT}/{repo_id}, measured on {_origin(calibration)}")


def push(repo_id: str, folder: Path, path: Path, results: Path | None, device: torch.device) -> None:
    """Pushes the calibration at `path` and its card in one commit.

    results: eval.py's records for the card. Raises ValueError when calibration or results belong to another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run `{command('calibrate')}` without --push_to_hub first")
    calibration = Calibration.load(path)
    calibration.check(folder)
    records = read_results(results, calibration, folder.resolve().name) if results else []
    card = make_card(repo_id, folder, calibration, achieved_curve(folder, calibration, device), records)
    files = {CALIBRATION: path.read_bytes(), "README.md": card.encode()}
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message="Calibration made by teal-fast")
    except (HTTPError, ConnectionError) as error:
        raise ValueError(explain(error, repo_id, None, "run the command again")) from error
    print(f"pushed {path} and its card: {commit.commit_url}")


@torch.no_grad()
def achieved_curve(folder: Path, calibration: Calibration, device: torch.device) -> dict[float, dict[str, float]]:
    """The sparsity achieved on text that ships with teal-fast: nominal sparsity to tensor kind (or "all") to share."""
    model, tokenizer = load_model(folder, device), Tokenizer.load(folder)
    ids = read_ids([CARD_TEXT], tokenizer, model.args)[: min(CARD_TOKENS, model.args.max_position)]
    curve = {}
    for nominal in CARD_SPARSITIES:
        set_sparsity(model, calibration, nominal)
        with tally_kept(model) as tally:
            model.hidden(torch.tensor([ids], device=device), phase=Phase(1))
        curve[nominal] = tally.by_kind(model)
    return curve


def read_results(path: Path, calibration: Calibration, model: str) -> list[dict]:
    """The perplexity records of an eval.py run. Raises ValueError when they are of another model or calibration."""
    try:
        records = [
            record
            for record in read_json(path, list)
            if record["benchmark"] == "eval" and "perplexity" in record and "text" in record
        ]
        numbers = [r[name] for r in records for name in ("sparsity", "achieved_sparsity", "perplexity")]
        texts = [text for r in records for text in (*r["text"], r["protocol"], r["format"])]
        if not all(isinstance(n, int | float) for n in numbers) or not all(isinstance(t, str) for t in texts):
            raise TypeError
        other = [r for r in records if r["model"] != model or r["calibration"] != calibration.origin or r["baseline"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no records of eval.py ({type(error).__name__}): give its --out") from error
    if other or not records:
        found = f"of {other[0]['model']}, calibrated on {other[0]['calibration']}" if other else "without perplexities"
        raise ValueError(f"{path} holds records {found}: expected {model}, calibrated on {calibration.origin}")
    return records


def make_card(
    repo_id: str, folder: Path, calibration: Calibration, curve: dict[float, dict[str, float]], records: list[dict]
) -> str:
    """The repo's README.md: the model that it fits, the sparsity achieved, and perplexities if records are given."""
    kinds = list(next(iter(curve.values())))
    achieved = [["nominal", *kinds]]
    achieved += [[f"{s:.0%}", *(f"{by_kind[kind]:.1%}" for kind in kinds)] for s, by_kind in curve.items()]
    perplexity = ""
    if records:
        rows = [["nominal", "achieved", "perplexity"]]
        rows += [[f"{r['sparsity']:.0%}", f"{r['achieved_sparsity']:.1%}", f"{r['perplexity']:.2f}"] for r in records]
        text, protocol, format = ", ".join(records[0]["text"]), records[0]["protocol"], records[0]["format"]
        perplexity = f"\nPerplexity on {text} ({protocol}; {format}):\n\n{_table(rows)}\n"
    return CARD.format(
        model=folder.resolve().name,
        repo_id=repo_id,
        fingerprint=_table([["what", "value"], *map(list, calibration.model.items())]),
        origin=_origin(calibration),
        tokens=CARD_TOKENS,
        text=", ".join(sorted(file.name for file in CARD_TEXT.iterdir())),
        achieved=_table(achieved),
        perplexity=perplexity,
    )


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _origin(calibration: Calibration) -> str:
    return ", ".join(f"{name} {value}" for name, value in calibration.origin.items()) or "unknown text"
