"""Text files, folders and .jsonl files, good and bad."""

import json
import os
from pathlib import Path

import pytest

from teal_fast.calibration.corpus import read_corpus


def test_files_and_folders_in_order(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "looks_like.txt").mkdir()
    (folder / "b.txt").write_text("b")
    (folder / "a.md").write_text("a")
    (folder / "deep" / "c.raw").write_text("c")
    (folder / "model.bin").write_bytes(b"\xff\xfe")  # other files in a folder are passed by …
    (tmp_path / "named").write_text("named")  # … but one that is named is read
    assert read_corpus([tmp_path / "named", folder]) == ["named", "a", "b", "c"]


def test_a_jsonl_line_is_a_document(tmp_path):
    texts = ["one", "two\nlines", "a line\u2028separator and \x85 stay", "日本 🙂", ""]
    for ascii_only in (True, False):
        lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=ascii_only) for text in texts]
        path = tmp_path / "corpus.jsonl"
        path.write_bytes("\r\n".join([*lines, "", "  "]).encode())
        assert read_corpus([path]) == texts


@pytest.mark.parametrize("line", ['{"text": "cut', "[1]", '"text"', "3", "null", '{"texts": "a"}', '{"text": 5}'])
def test_bad_jsonl_lines_are_named(tmp_path, line):
    path = tmp_path / "corpus.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r'corpus\.jsonl, line 3: expected a JSON object with a "text" field'):
        read_corpus([path])


def test_bad_utf8_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"so weit gut, " + "schön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(.* at byte 16\)"):
        read_corpus([path])


def test_devices_and_closed_folders_are_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="corpus /dev/zero is a device: expected a text file"):
        read_corpus([Path("/dev/zero")])
    (tmp_path / "a.txt").write_text("a")
    tmp_path.chmod(0)
    try:
        if os.access(tmp_path, os.R_OK):
            pytest.skip("root reads every folder")
        with pytest.raises(PermissionError):
            read_corpus([tmp_path])
    finally:
        tmp_path.chmod(0o700)


def test_missing_path(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: expected a text file, a \.jsonl file or a f"):
        read_corpus([tmp_path / "a.txt", tmp_path / "nowhere"])


def test_empty_corpora(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("blank.txt", "empty.jsonl", "empty", ""):  # the last is the whole folder
        with pytest.raises(ValueError, match="the corpus holds no text"):
            read_corpus([tmp_path / name])
