"""Unfinished files and folders: whose they are, and when they go; and where none can be made, that is said at once."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from teal_fast import calibrate, eval, quantize
from teal_fast.benchmarks import decode, kernels, prompts, quality, table
from teal_fast.files.checkpoint import CONFIG
from teal_fast.files.store import TEMPORARY, check_new, check_writable, new_file, new_folder, one_line
from teal_fast.report import page, plot_activations, results
from teal_fast.scripts import convert_gguf, convert_hf_checkpoint, import_teal, prepare_demo, prepare_tasks

HOLD = """
import sys
from pathlib import Path
from teal_fast.files.store import new_file, new_folder

with {make}(Path({path!r})) as temporary:
    (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
    print("holding", flush=True)
    sys.stdin.read()
"""


def hold(make: str, path) -> subprocess.Popen:
    """A process in the middle of writing `path`; at the end of its input it finishes."""
    words = [sys.executable, "-c", HOLD.format(make=make, path=str(path))]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holding\n"
    return process


def grow_old(folder) -> list[str]:
    """Makes hidden entries look older than the second in which another process may not have locked them yet."""
    names = [name for name in os.listdir(folder) if name.startswith(".")]
    for name in names:
        os.utime(folder / name, (time.time() - 10,) * 2)
    return names


@pytest.mark.parametrize("make, ending", [("new_file", signal.SIGTERM), ("new_folder", signal.SIGKILL)])
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path, make, ending):
    process = hold(make, tmp_path / "out")
    try:
        assert len(left := grow_old(tmp_path)) == 1 and left[0].startswith(".out.") and left[0].endswith(TEMPORARY)
        with new_file(tmp_path / "other") as temporary:
            temporary.write_text("x")
        assert sorted(os.listdir(tmp_path)) == [*left, "other"]  # its process lives
    finally:
        process.send_signal(ending)
        process.wait()
    grow_old(tmp_path)
    with new_folder(tmp_path / "another"):
        assert not (tmp_path / left[0]).exists()
    assert sorted(os.listdir(tmp_path)) == ["another", "other"]


def test_a_process_that_was_not_killed_finishes_beside_others(tmp_path):
    process = hold("new_folder", tmp_path / "out")
    grow_old(tmp_path)
    with new_folder(tmp_path / "other"):
        pass
    process.communicate("")
    assert process.returncode == 0 and (tmp_path / "out" / "half").read_text() == "half"
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_what_is_seconds_old_or_is_not_ours_stays(tmp_path):
    for name in (f".a{TEMPORARY}", ".b.tmp", f"c{TEMPORARY}"):
        (tmp_path / name).write_text("x")
    with new_file(tmp_path / "out"):
        pass
    assert len(os.listdir(tmp_path)) == 4
    grow_old(tmp_path)
    os.utime(tmp_path / f"c{TEMPORARY}", (0, 0))
    with new_file(tmp_path / "out"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".b.tmp", f"c{TEMPORARY}", "out"]


def test_threads_write_the_same_file_apart(tmp_path):
    """Each whole; the last one stays."""
    together, failed = threading.Barrier(8, timeout=20), []

    def write(number: int) -> None:
        try:
            with new_file(tmp_path / "out") as temporary:
                together.wait()
                temporary.write_text(f"{number}" * 100_000)
                together.wait()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "out").read_text()
    assert not failed and len(text) == 100_000 and len(set(text)) == 1 and os.listdir(tmp_path) == ["out"]


# --- what exists


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_full_disk_names_the_file(tmp_path, make):
    full = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: '.*/out'"), make(tmp_path / "out"):
        print("x", file=full, flush=True)
    with pytest.raises(FileNotFoundError, match=r"^no such model$"), make(tmp_path / "out"):
        raise FileNotFoundError("no such model")
    assert os.listdir(tmp_path) == []


def test_a_file_cannot_replace_a_folder_or_a_device(tmp_path):
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "no ordinary file")):
        if path != tmp_path:
            os.mkfifo(path)
        with pytest.raises(ValueError, match=rf"cannot write {path}: it is {kind}, expected the name of a file"):
            check_writable(path)
        with pytest.raises(ValueError, match="cannot write"), new_file(path):
            pytest.fail("the work has begun")


def test_a_folder_replaces_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists already: remove it, or choose another place"):
            check_new(tmp_path / name)
        with pytest.raises(FileExistsError), new_folder(tmp_path / name):
            pytest.fail("the work has begun")
    check_new(tmp_path / "new")


MISSING = "no such file"  # what a command would complain of if its work began
COMMANDS = {
    convert_hf_checkpoint.main: [MISSING],
    convert_gguf.main: [MISSING],
    prepare_demo.main: [],
    quantize.main: ["--checkpoint", "TINY", "--calibrated", "--corpus", MISSING],
    calibrate.main: ["--checkpoint", "TINY", "--corpus", MISSING],
    import_teal.main: [MISSING, "--checkpoint", "TINY"],
    eval.main: ["--checkpoint", MISSING, "--text", MISSING],
    decode.main: ["--checkpoint", MISSING],
    prompts.main: ["--checkpoint", MISSING],
    kernels.main: ["--device", "cpu"],
    table.main: ["--checkpoint", MISSING],
    quality.main: ["--checkpoint", MISSING, "--calibration", MISSING],
    plot_activations.main: ["--checkpoint", "TINY", "--corpus", MISSING, "--calibration", MISSING],
    page.main: ["--checkpoint", "TINY", "--results", MISSING],
    results.main: ["--results", MISSING],
}


@pytest.mark.parametrize("main", COMMANDS, ids=lambda main: main.__module__.removeprefix("teal_fast."))
def test_every_command_refuses_an_existing_folder_before_its_work(run_main, tiny, tmp_path, main):
    (tmp_path / "kept").write_text("kept")
    words = [tiny if word == "TINY" else word for word in COMMANDS[main]]
    code, out, err = run_main(main, *words, "--out", tmp_path)
    assert (code, out) == (1, "") and len(err.splitlines()) == 1 and MISSING not in err
    assert f"{tmp_path} exists already: remove it" in err or f"cannot write {tmp_path}: it is a folder" in err
    assert os.listdir(tmp_path) == ["kept"]


def test_folders_of_several_files_are_looked_at_before_the_work(run_main, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "tasks" / "piqa.jsonl").mkdir(parents=True)
    words = ["--checkpoint", tiny, "--corpus", MISSING, "--calibration", MISSING, "--out", tmp_path / "out"]
    code, _, err = run_main(plot_activations.main, *words, "--figures", tmp_path / "file")
    assert code == 1 and "file takes no new file" in err and len(err.splitlines()) == 1
    code, _, err = run_main(prepare_tasks.main, MISSING, "--out", tmp_path / "tasks")
    assert code == 1 and "piqa.jsonl: it is a folder" in err and len(err.splitlines()) == 1


def test_conversion_into_an_existing_folder_reads_nothing(run_main, tiny, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / CONFIG).write_text("{")
    code, _, err = run_main(convert_hf_checkpoint.main, tmp_path / "source", "--out", tiny)
    assert code == 1 and f"{tiny} exists already" in err


def test_what_a_library_says_is_one_line_and_cut():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    cut = one_line(ValueError("a" * 9999 + "\nend"))
    assert len(cut) < 310 and cut.startswith("aaa") and cut.endswith("a end")
