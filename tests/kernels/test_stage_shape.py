"""Which models the step in three launches serves, how its launches are cut, and that its source compiles."""

from dataclasses import replace

import pytest

from teal_fast.kernels.decode_stages import SOURCE, added, defines
from teal_fast.kernels.nvrtc import CudaError, compile_cuda, nvrtc
from teal_fast.kernels.stage_shape import StageShape, cut

LLAMA = StageShape(4096, 32, 8, 128, 14336, 128256, 16, 16, 0, 16, False, False)
SHAPES = {
    "llama-3-8b": LLAMA,
    "llama-3-8b-int8": replace(LLAMA, bits_a=8, bits_m=8, output_bits=8),
    "llama-3-8b-int4": replace(LLAMA, bits_a=8, bits_m=4, group=128, output_bits=8),
    "llama-3-8b-fp16": replace(LLAMA, half_is_fp16=True),
    "llama-3-70b-int8": StageShape(8192, 64, 8, 128, 28672, 128256, 8, 8, 0, 8, False, False),
    "llama-3.2-1b": StageShape(2048, 32, 8, 64, 8192, 128256, 16, 16, 0, 16, False, False),
    "qwen3-8b": StageShape(4096, 32, 8, 128, 12288, 151936, 16, 16, 0, 16, False, True),
    "qwen2.5-7b": StageShape(3584, 28, 4, 128, 18944, 152064, 16, 16, 0, 16, False, False),
    "smollm2-135m": StageShape(576, 9, 3, 64, 1536, 49152, 16, 16, 0, 16, False, False),
    "gemma-2b": StageShape(2048, 8, 1, 256, 16384, 256000, 16, 16, 0, 16, False, False),
}


def has_nvrtc() -> bool:
    try:
        return nvrtc() is not None
    except CudaError:
        return False


@pytest.mark.parametrize("processors", [114, 132, 148])
@pytest.mark.parametrize("name", SHAPES)
def test_every_channel_and_head_has_a_cta_at_once(name, processors):
    shape, launches = SHAPES[name], cut(SHAPES[name], processors)
    assert shape.ffn <= launches["CHANNELS"] * launches["CTAS_MLP"] < shape.ffn + launches["CHANNELS"]
    assert launches["CTAS_O"] == shape.heads * launches["SHARERS"]
    ctas = [launches[f"CTAS_{stage}"] for stage in ("QKV", "O", "MLP")]
    ctas.append(launches["SPLITS"] * launches["BATCHES"] * shape.kv_heads)
    assert max(ctas) <= processors
    row = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.bits_a // 8
    warps = launches["CTAS_QKV"] * 16 // -(-row // 512)  # of a segment: their CTAs are those that add to its columns
    assert 16 <= warps <= 16 * (launches["ADDENDS_QKV"] - 1)


def test_additions_are_counted():
    # q/k/v: 24 segments of 64 times four columns, of 88 warps each: of 23 borders every other one is within a CTA.
    constants = defines(LLAMA, cut(LLAMA, 132))
    assert added(constants) == (128 + 112) * 1024 + (132 + 12) * 64


def test_what_it_does_not_serve_is_named():
    for changes, what in (
        ({"ffn": 14340}, "an MLP of 14340"),
        ({"head_dim": 96}, "heads of 96"),
        ({"bits_a": 4}, "weights of 4 and 16 bits"),
        ({"dim": 4104}, "a width of 4104"),
        ({"heads": 256, "kv_heads": 256}, "256 heads with an MLP of 14336 on 132 multiprocessors"),
    ):
        with pytest.raises(ValueError, match=f"^no kernels for {what}$"):
            cut(replace(LLAMA, **changes), 132)


@pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC here (nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("name", ["llama-3-8b-int4", "qwen3-8b", "smollm2-135m"])
def test_the_source_compiles(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    constants = defines(SHAPES[name], cut(SHAPES[name], 132))
    code = compile_cuda(SOURCE, "sm_90", constants)
    assert code.startswith(b"\x7fELF") and "compiling three_stages.cu for sm_90" in capsys.readouterr().err
    assert compile_cuda(SOURCE, "sm_90", constants) == code and not capsys.readouterr().err  # from the cache
    (cached,) = (tmp_path / "teal-fast").glob("*.cubin")
    cached.write_bytes(code[:1000])
    assert compile_cuda(SOURCE, "sm_90", constants) == code and "compiling" in capsys.readouterr().err


@pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC here (nvidia-cuda-nvrtc)")
def test_structures_of_another_size_do_not_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    constants = defines(LLAMA, cut(LLAMA, 132))
    with pytest.raises(CudaError, match=r"the structures of kernels/decode_stages\.py"):
        compile_cuda(SOURCE, "sm_90", constants | {"LAYER_BYTES": constants["LAYER_BYTES"] + 8})
