"""One case: a source is copied and mutated, goes through the door or a command, and what came of it is judged."""

import hashlib
import json
import random
import shutil
from pathlib import Path

from teal_fast.cli import run
from teal_fast.tests.fuzz.bases import NAMES
from teal_fast.tests.fuzz.children import Ended, run_child
from teal_fast.tests.fuzz.doors import command, run_command, run_door
from teal_fast.tests.fuzz.judge import TOKENIZERS, differs_from_transformers, same
from teal_fast.tests.fuzz.mutate import Mutation, mutate

COMMANDS = 16  # every so many-th case is one


def contents(folder: Path) -> dict[str, str]:
    """What lies at a path and below it, hidden files and links too, with a hash of each file's bytes."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"link to {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir() and path != folder:
            found[str(path.relative_to(folder))] = "folder"
    return found


class Case:
    """One mutated source, in a folder of its own."""

    def __init__(self, seed: int, number: int, bases: Path, place: Path, sound: dict[str, dict]):
        self.rng, self.number, self.bases, self.place = random.Random(f"{seed}-{number}"), number, bases, place
        self.name = self.rng.choice(NAMES)
        self.sound, self.base = sound[self.name], bases / self.name
        self.source, self.out, self.answer = place / self.name, place / "out", place.with_name(f"{place.name}.answer")
        self.command = None

    def run(self) -> dict:
        """The case's record; "fault" says what must not be, and is empty where all is well. Its folder goes."""
        try:
            shutil.copytree(self.base, self.source)
            mutation = mutate(self.rng, self.source)
            if self.number % COMMANDS == 0:
                self.command = command(self.rng, self.source, self.out, self.bases / "corpus.txt")
            before = contents(self.source)
            ended = self._run()
            kind, fault = ("refused", ended.fault or self._left_behind(before, ended))
            if not fault and ended.code == 0:
                kind, fault = (self._judge_command if self.command else self._judge_answer)(mutation, ended)
            said = ended.err.strip().splitlines()[-1:] if ended.code else []
            about = {"number": self.number, "source": self.name, "file": mutation.file, "mutation": mutation.text}
            words = self.command and " ".join([self.command[0].__module__.rsplit(".", 1)[1], *self.command[1]])
            return about | {"command": words, "kind": kind, "fault": fault, "line": "".join(said)[:400]}
        finally:
            for rest in (self.place, *self.place.parent.glob(f"{self.place.name}.*")):
                shutil.rmtree(rest, ignore_errors=True) if rest.is_dir() else rest.unlink(missing_ok=True)

    def _run(self) -> Ended:
        if self.command:
            return run_child(lambda: run(lambda: run_command(*self.command)), self.place)
        return run_child(lambda: run(lambda: run_door(self.source, self.out, self.answer)), self.place)

    def _left_behind(self, before: dict[str, str], ended: Ended) -> str:
        """Files that should not be: beside the output, in the source, hidden, temporary; output of a failed run."""
        if contents(self.source) != before:
            return f"the source is changed: {sorted(set(contents(self.source).items()) ^ set(before.items()))[:3]}"
        temporary = self.place.with_name(f"{self.place.name}.tmp")
        rest = [path.name for path in self.place.iterdir() if path not in (self.source, self.out)]
        rest += [str(path.name) for path in temporary.iterdir()]
        rest += [name for name in contents(self.out) if Path(name).name.startswith(".") and name != "."]
        if ended.code and self.out.exists() and not self.answer.exists():
            rest.append("out")
        return f"left behind: {', '.join(sorted(rest))}" if rest else ""

    def _judge_command(self, mutation: Mutation, ended: Ended) -> tuple[str, str]:
        """The same command on the unmutated source says and writes the same, or else a sound value was changed."""
        ours = self._comparable(ended)
        shutil.rmtree(self.place)
        shutil.copytree(self.base, self.source)
        if self._comparable(self._run()) == ours:
            return "same", ""
        return "changed", "" if mutation.sound else "another result than the unmutated source's"

    def _comparable(self, ended: Ended) -> tuple[list[str], dict[str, str]]:
        lines = [line for line in ended.out.splitlines() if not line.startswith(("{", "["))]  # records hold times
        return lines, {} if self.out.is_file() and self.command[0].__module__.endswith("eval") else contents(self.out)

    def _judge_answer(self, mutation: Mutation, _: Ended) -> tuple[str, str]:
        """Two steps agree, and the answer is the unmutated source's or that of a judge, where there is one."""
        found = json.loads(self.answer.read_text())
        if difference := found.get("steps differ"):
            return "changed", f"the compiled and the plain step differ {difference}"
        alike = same(found, self.sound)
        if (folder := self._judged_folder(mutation.file)) is None:
            return (
                "same" if alike else "changed",
                "" if alike or mutation.sound else "another result, of an unsound file",
            )

        def judge() -> None:
            self.answer.write_text(json.dumps(differs_from_transformers(folder, mutation.file, found)))

        ended = run_child(judge, self.place, seconds=60)
        if ended.code and self.name.startswith("gguf"):  # it needs more metadata than a model has
            return "same" if alike else "changed", ""
        if ended.code:
            alike = same(found, self.sound, only=("ids", "tokens"))  # ends and templates we may pass over
            return "same", "" if alike else "an answer, where transformers fails: " + ended.err.strip()[-200:]
        difference = json.loads(self.answer.read_text())
        if difference:
            return "same" if alike else "changed", f"transformers differs: {difference}" + " (as unmutated)" * alike
        return "same" if alike else "as transformers", ""

    def _judged_folder(self, file: str) -> Path | None:
        """A folder that transformers can read and that has the mutated file; None where there is none."""
        if self.name in ("hf-tiktoken", "hf-mistral") and file.startswith(TOKENIZERS):
            return None  # a tokenizer.model alone transformers reads otherwise, or not without protobuf
        if self.name.startswith("hf") or (self.name.startswith("gguf") and self.name != "gguf-rope"):
            return self.source  # of GGUF files transformers 5.23 does not read the rotary scaling
        if self.name.startswith("own") and file.startswith(TOKENIZERS):
            return self.source
        if self.name == "own-dense" and file == "config.json":
            folder = self.place / "judged"
            shutil.copytree(self.bases / "hf-llama", folder)
            shutil.copyfile(self.source / file, folder / file)
            return folder
        return None
