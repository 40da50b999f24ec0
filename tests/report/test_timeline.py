"""The picture of a token's kernels shows when each works, and when it waits for the one before it."""

import pytest

from teal_fast.files.paths import ROOT
from teal_fast.report.results import RESULTS, read_results
from teal_fast.report.timeline import LAYERS, PARTS, spans, timeline_figures, timeline_section


def record(step: str, names: list[str], took: int) -> dict:
    """A token of 20 layers whose kernels take so many nanoseconds, each beginning a microsecond too early."""
    kernels = [f"{i % len(names)} {i * (took - 1000)} {took}" for i in range(20 * len(names))]
    about = {"benchmark": "timeline", "file": "small.json", "model": "small", "device": "GPU", "sparsity": 0.5}
    return about | {"format": "bf16", "step": step, "us": 1234.5, "names": names, "kernels": ";".join(kernels)}


TRITON = record("triton", [f"_{name}" for name in ("norm_compact", "a", "b", "c", "d", "norm_compact", "e", "f")], 5000)
STAGES = record("stages", ["stage_qkv", "stage_o", "stage_mlp"], 9000) | {"drawn_us": 1300.0}


@pytest.mark.parametrize("row", [TRITON, STAGES], ids=["triton", "stages"])
def test_a_kernel_works_when_the_one_before_it_has_ended(row):
    found, parts = spans(row), PARTS[row["step"]]
    assert [span.part for span in found] == list(parts) * (LAYERS[1] - LAYERS[0])
    work = 4.0 if row is TRITON else 8.0
    for number, span in enumerate(found):
        assert span == (span.part, work * number - 1, work * number, work * (number + 1))


def test_a_layer_with_other_kernels_is_refused():
    with pytest.raises(ValueError, match=r"^small\.json: 8 kernels in 2 layers, expected 3 in each$"):
        spans(record("stages", ["stage_qkv", "stage_o", "stage_sum", "stage_mlp"], 9000))


def test_the_picture_and_its_table():
    (figure,) = timeline_figures([STAGES, TRITON])
    assert figure.name == "small" and ">down<" in figure.svg.replace("> ", ">").replace(" <", "<")
    picture, table = timeline_section([TRITON, STAGES]).tables
    assert "(small.svg)" in picture
    parts = "norm, q/k/v 8.0 · attention, o 8.0 · norm, gate, up, down 8.0"
    assert table.splitlines()[-1] == f"| bf16 | three launches | 1,234.5 | 1,300.0 | 24.0 | {parts} |"


@pytest.mark.parametrize("figure", timeline_figures(read_results(RESULTS)), ids=lambda figure: figure.name)
def test_pictures_are_what_the_records_say(figure):
    drawn = (ROOT / "docs" / f"{figure.name}.svg").read_text(encoding="utf-8")
    assert figure.svg.split(">", 1)[1] in drawn, f"docs/{figure.name}.svg is stale: run `make results`"
