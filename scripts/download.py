"""Fetches a model from the Hugging Face Hub: `python -m teal_fast.scripts.download meta-llama/Llama-3.2-1B`.

Takes only what a conversion reads: config, tokenizer and one set of weights (safetensors, else PyTorch's .bin), or
with --gguf one GGUF file. Run again after an interruption, it keeps the files that are finished: one file is fetched
after the other, so no more than one starts anew (since 1.18, huggingface_hub resumes a file only within a run, and the
threads of its `snapshot_download` finish all files in flight before they obey Ctrl-C). Converts nothing.
"""

import argparse
import errno
import shlex
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import hf_hub_download, model_info
from huggingface_hub.errors import HTTPError

from teal_fast.calibration.hub import explain, repo_id
from teal_fast.cli import run

CONFIG_AND_TOKENIZER = {
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt"),
    *("teal_thresholds.safetensors", "teal_calibration.safetensors"),  # of files/exported.py
}
WEIGHT_PATTERNS = (  # one set a line; the first set that a repo has is taken, as many repos hold weights twice
    ("model.safetensors",),
    ("model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin",),
    ("pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)


def choose_files(repo_id: str, names: list[str]) -> list[str]:
    """The files of a repo to fetch, small ones first; those in subfolders are other formats' copies."""
    patterns = next(
        (patterns for patterns in WEIGHT_PATTERNS if any(fnmatchcase(name, patterns[0]) for name in names)), ()
    )
    if "config.json" not in names or not patterns:
        ggufs = [name for name in names if name.endswith(".gguf")]
        advice = f"fetch one of its GGUF files, e.g. --gguf {ggufs[0]}" if ggufs else "choose another repo"
        raise ValueError(f"{repo_id} lacks config.json or weights (model*.safetensors, pytorch_model*.bin): {advice}")
    weights = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return sorted(CONFIG_AND_TOKENIZER.intersection(names)) + sorted(weights)


def download(repo_id: str, revision: str | None, out: Path, gguf: str | None) -> None:
    """Brings `out` up to the repo's files at `revision` that are needed, or to the one file `gguf`."""
    info = model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    if gguf and gguf not in (ggufs := [name for name in sizes if name.endswith(".gguf")]):
        raise ValueError(f"{repo_id} has no GGUF file {gguf}, it has {', '.join(ggufs) or 'none'}: give one as --gguf")
    names = [gguf] if gguf else choose_files(repo_id, list(sizes))

    out.mkdir(parents=True, exist_ok=True)
    missing = sum(sizes[name] for name in names if not (out / name).exists())
    if missing > (free := shutil.disk_usage(out).free):
        raise OSError(errno.ENOSPC, f"needs {missing / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    for name in names:
        hf_hub_download(repo_id, name, revision=info.sha, local_dir=out)


def explain_error(error: Exception, repo_id: str, revision: str | None, out: Path) -> str:
    """What happened and what to do, for an error that `download` met on the hub, the network or the disk."""
    again = "run the same command again, finished files are kept"
    if explanation := explain(error, repo_id, revision, again):
        return explanation
    match error:
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"disk full at {out} ({error.strerror}): free some space or choose another folder with --out"
        case OSError(strerror=str(reason)):
            return f"cannot write {error.filename or out} ({reason}): choose another folder with --out"
    return f"the download of {repo_id} broke off ({error}): {again}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fetch a model from the Hugging Face Hub (token: HF_TOKEN).")
    parser.add_argument("repo_id", type=repo_id, metavar="REPO_ID", help="e.g. meta-llama/Llama-3.2-1B")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--out", type=Path, help="folder to fetch into (default: checkpoints/hf/<owner>--<name>)")
    parser.add_argument("--gguf", metavar="NAME.gguf", help="fetch this file of the repo and no other")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out or Path("checkpoints/hf", args.repo_id.replace("/", "--"))
    try:
        download(args.repo_id, args.revision, out, args.gguf)
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: the Xet client's
        raise ValueError(explain_error(error, args.repo_id, args.revision, out)) from error
    script, target = ("convert_gguf", out / args.gguf) if args.gguf else ("convert_hf_checkpoint", out)
    print("next:", shlex.join(["python", "-m", f"teal_fast.scripts.{script}", str(target)]))


if __name__ == "__main__":
    run(main)
