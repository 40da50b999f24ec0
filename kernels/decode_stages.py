"""A decode step's launches in CUDA C++ (csrc/three_stages.cu): three a layer, then the output layer and its best token.

A model's sizes are compiled in (stage_shape.py). `StageLayer` and `StageStep` are the structures that the kernels take,
`DecodeStages` launches them. They serve GPUs of compute capability 9.0 on.
"""

import ctypes
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from dataclasses import asdict

from teal_fast.kernels.cuda_driver import CudaModule, launch_config
from teal_fast.kernels.nvrtc import compile_cuda
from teal_fast.kernels.stage_shape import MOST_RANKS, THREADS, WARPS, StageShape

SOURCE = "three_stages.cu"
SHORT, TOLD = 512, 8  # as stages_base.cuh has them
DRAWERS = 8  # CTAs of stage_draw, as stages_draw.cuh has it


class StageLayer(ctypes.Structure):
    """`Layer` of stages_base.cuh, which says what the addresses are of."""

    _fields_ = [
        *((name, c_void_p) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, c_void_p) for name in ("qkv_scale", "o_scale", "gate_up_scale", "down_scale", "gate_up_groups")),
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")),
        *((name, c_void_p) for name in ("qkv_threshold", "o_threshold", "gate_up_threshold", "down_threshold")),
        *((name, c_void_p) for name in ("qkv_grid", "o_grid", "down_grid", "k", "v")),
        ("window", c_int64),
    ]


class StageSampling(ctypes.Structure):
    """`Sampling` of stages_draw.cuh: how a token is drawn."""

    _fields_ = [("inverse", c_float), ("top_p", c_float), ("min_p", c_float), ("top_k", c_int), ("seed", c_uint64)]


class StageStep(ctypes.Structure):
    """`Step` of stages_base.cuh."""

    _fields_ = [
        *((name, c_void_p * 2) for name in ("residual", "o_update")),
        *((name, c_void_p) for name in ("mlp_update", "qkv", "partial", "embedding", "token", "position")),
        ("frequencies", c_void_p),
        *((name, c_void_p) for name in ("output", "output_scale", "norm", "logits", "largest", "best")),
        *((name, c_void_p) for name in ("arrived", "beyond", "told", "sampling")),
        ("length", c_int64),
        ("words", c_void_p * MOST_RANKS),
        *((name, c_void_p) for name in ("calls", "lost")),
        ("rank", c_int64),
        ("eps", c_float),
    ]


def defines(shape: StageShape, launches: dict[str, int], delay: int = 0) -> dict[str, int]:
    """All constants of the source. delay: microseconds that some CTAs come late, for tests of what waits for what."""
    sizes = {name.upper(): int(value) for name, value in asdict(shape).items()}
    structures = {"LAYER_BYTES": ctypes.sizeof(StageLayer), "STEP_BYTES": ctypes.sizeof(StageStep)}
    return sizes | launches | structures | {"DELAY": delay}


def added(constants: dict[str, int]) -> int:
    """How often a layer adds four columns at once to sums over CTAs, each time asking whether they are beyond grids."""
    columns = (constants["HEADS"] + 2 * constants["KV_HEADS"]) * constants["HEAD_DIM"]
    segment = 4096 // constants["BITS_A"]  # columns of a warp
    last = (columns - 1) // segment
    each = constants["CTAS_QKV"] * WARPS // (last + 1)  # warps
    count = (constants["CTAS_O"] + constants["CTAS_MLP"]) * constants["DIM"] // 4
    for cta in range(constants["CTAS_QKV"]):
        touched = {min(warp // each, last) for warp in range(cta * WARPS, (cta + 1) * WARPS)}
        count += sum(min(segment, columns - number * segment) // 4 for number in touched)
    return count


class DecodeStages:
    """The compiled kernels of one model's sizes, loaded on the current device. CudaError: they can't be had.

    shared_memory: bytes of a multiprocessor, of which a CTA takes more than half, so that no two share one: under
    dependent launch they would.
    """

    def __init__(
        self, constants: dict[str, int], arch: str, processors: int, shared_memory: int, dependent: bool = True
    ):
        self.module = CudaModule(compile_cuda(SOURCE, arch, constants))
        grids = {
            "stage_qkv": constants["CTAS_QKV"],
            "stage_attention": constants["SPLITS"] * constants["KV_HEADS"] * constants["BATCHES"],
            "stage_o": constants["CTAS_O"],
            "stage_mlp": constants["CTAS_MLP"],
            "stage_output": processors,
        }
        if constants["RANKS"] > 1:
            grids |= {"stage_sum": -(-constants["DIM"] // THREADS), "stage_gather": processors}
        shared = max(self.module.size("shared_bytes"), shared_memory // 2 + 1024)
        if shared > shared_memory - 1024:  # what the driver keeps of each CTA's
            raise ValueError(f"no kernels for {shared} bytes of shared memory")
        self.constants = constants
        self.kernels = {name: self.module.kernel(name, shared) for name in grids}
        self.configs = {name: launch_config(ctas, THREADS, shared, dependent) for name, ctas in grids.items()}
        self.kernels["stage_draw"] = self.module.kernel("stage_draw", 0)
        self.configs["stage_draw"] = launch_config(DRAWERS, THREADS, 0, dependent, DRAWERS)
        self.first = launch_config(grids["stage_qkv"], THREADS, shared, False)  # waits for what is before

    def launch(self, step: StageStep, layers: list[StageLayer], long: bool, drawn: bool) -> None:
        """One token on the current stream; long: a layer may attend over more than SHORT positions.

        drawn: whether the next token is drawn as the step's sampling says, and is not the likeliest.
        """
        for number, layer in enumerate(map(c_int, range(len(layers)))):
            self._launch("stage_qkv", step, layers[number], layer, config=None if number else self.first)
            if long and not 0 < layers[number].window <= SHORT:
                self._launch("stage_attention", step, layers[number])
            self._launch("stage_o", step, layers[number], layer)
            self._sum(step, 2 * number, step.o_update[number % 2])
            self._launch("stage_mlp", step, layers[number], layer)
            self._sum(step, 2 * number + 1, step.mlp_update)
        self._launch("stage_output", step, c_int(len(layers)))
        if "stage_gather" in self.kernels:
            self._launch("stage_gather", step, c_int(2 * len(layers)))
        if drawn:
            self.draw(step)

    def draw(self, step: StageStep) -> None:
        """The last launch alone: draws from the step's logits."""
        self._launch("stage_draw", step)

    def _sum(self, step: StageStep, call: int, update: int) -> None:
        """Adds up the ranks' updates, where there are several."""
        if "stage_sum" in self.kernels:
            self._launch("stage_sum", step, c_int(call), c_void_p(update))

    def _launch(self, name: str, *parameters, config=None) -> None:
        self.module.launch(self.kernels[name], config or self.configs[name], *parameters)
