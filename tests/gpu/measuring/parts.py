"""What is measured on a GPU, in what order, and what passes: the one list that the command and the page read."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Check:
    """One figure. With a `bound` it passes where it is at least or at most that much, as `sense` says."""

    key: str
    words: str
    unit: str = ""
    sense: str = ""
    """">=", "<=" or "=="; empty where the figure is only reported."""
    bound: float | None = None

    def passes(self, value: float | None) -> bool | None:
        """None where there is no bound, or nothing was measured."""
        if self.bound is None or value is None:
            return None
        return {">=": value >= self.bound, "<=": value <= self.bound, "==": value == self.bound}[self.sense]

    @property
    def target(self) -> str:
        return "" if self.bound is None else f"{self.sense} {self.bound:g}{' ' + self.unit if self.unit else ''}"


@dataclass(frozen=True)
class Table:
    """Figures by row and column; its cells may be missing."""

    key: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One part: `measure(recorder)` of the module of this name, in a process of its own.

    `seconds` is what it is expected to take on an H100; it is stopped after twice as long.
    """

    name: str
    title: str
    seconds: int
    about: str
    checks: tuple[Check, ...]
    tables: tuple[Table, ...] = field(default=())


RULES = ("AMCS", "AMCS single", "SOAM")
FORMATS = ("fp32", "8bit", "4bit", "compact", "minimal")
WEIGHTS = ("fp32", "bf16+16", "bf16+8", "bf16+4", "bf16")
CASES = tuple(f"{rule} {name}" for rule in RULES for name in FORMATS)

STEPS = (
    "copy",
    *("amcs:8bit:fp32", "amcs:8bit:bf16+16", "amcs:8bit:bf16+8", "amcs:compact:bf16+4", "amcs:minimal:bf16+4"),
    *("soam:8bit:bf16+8", "soam:compact:bf16+4"),
    *("torch-adamw:fp32", "torch-adamw:bf16", "bnb-adamw8bit:fp32", "bnb-adamw8bit:bf16", "flash-adamw:bf16"),
)
"""A copy, and optimizers as `toolkit bench step` names them: rule, state format, weights."""
LAUNCHES = tuple(f"{blocks} block(s), {warps} warp(s)" for blocks, warps in ((1, 1), (1, 2), (4, 1), (4, 4)))

_PEAK = (
    Check("peak_gb", "peak of allocated memory", "GB"),
    Check("predicted_gb", "predicted peak", "GB"),
    Check("peak_error", "prediction against measurement, without its sign", "%", "<=", 3),
)
_SPEED = (Check("tokens_per_s", "tokens a second"), Check("step_ms", "median step", "ms"))

PARTS: tuple[Part, ...] = (
    Part(
        "ground",
        "Versions, bandwidth, context",
        15,
        "What the machine is, and what it can do: a copy of 4 GB within the GPU, a bf16 product of 8192 x 8192 x 8192, "
        "and what the CUDA context and libraries hold outside torch's allocator (an assumption of `toolkit estimate`).",
        (
            Check("copy_tb_s", "copy within the GPU, bytes read and written", "TB/s", ">=", 2.8),
            Check("matmul_tflop_s", "bf16 product", "TFLOP/s"),
            Check("context_gb", "CUDA context, with cuBLAS", "GB"),
            Check("nccl_gb", "more of it after one NCCL all-reduce on one rank", "GB"),
            Check("workspace_mb", "cuBLAS workspaces, in torch's allocator", "MB"),
        ),
    ),
    Part(
        "suite",
        "The tests that need a GPU",
        70,
        "`pytest tests/gpu -m gpu`, whole.",
        (
            Check("failed", "tests that failed", "", "==", 0),
            Check("passed", "tests that passed", "", ">=", 1),
            Check("skipped", "tests that were skipped", "", "==", 0),
        ),
    ),
    Part(
        "numbers",
        "The same numbers as on a CPU",
        40,
        "Ten steps of every rule, state format and way of keeping weights on the GPU, compiled and eager, against "
        "eager steps on the CPU: the share of stored codes that are equal. Gradients in pieces against the whole "
        "gradient, bit for bit. A tensor of 2^31 + 512 elements, made of copies of one of 2^24, "
        "against that one, bit for bit.",
        (
            Check("compiled_equal", "codes equal to the CPU's, compiled, worst case", "%", ">=", 99.9),
            Check("eager_equal", "codes equal to the CPU's, eager, worst case", "%", ">=", 99.9),
            Check("cases", "cases compared", "", "==", len(CASES) * len(WEIGHTS)),
            Check("pieces_differ", "cases in which pieces do not give what the whole gives", "", "==", 0),
            Check("twin_differs", "tensors of the large one that differ from its twin's", "", "==", 0),
            Check("fell_back", "cases whose compilation failed, so that they ran eagerly", "", "==", 0),
        ),
        (
            Table("compiled", "Codes equal to the CPU's after ten compiled steps, %", CASES, WEIGHTS),
            Table("moved", "Error of the weights' movement against the CPU's, %", CASES, WEIGHTS),
        ),
    ),
    Part(
        "steps",
        "The step's speed",
        70,
        "One tensor of 134M and one of 622M elements (the vocabulary matrix of Qwen3-8B), in turn with a copy and "
        "other optimizers, as `toolkit bench step` measures and names them. `of copy`: bytes that the step must move "
        "over its time, as a share of what the copy reaches.",
        (
            Check("of_copy", "AMCS 8bit, bf16+8, 622M elements, share of the copy's bandwidth", "%", ">=", 80),
            Check("over_torch", "its time over that of torch's fused AdamW with fp32 weights", "", "<=", 0.9),
            Check("over_flash", "its time a byte over FlashAdamW's (goal: 1 at most), where that is installed"),
        ),
        (
            Table("steps", "Milliseconds a step", STEPS, ("134M, ms", "622M, ms", "bytes an element", "of copy, %")),
            Table(
                "launches",
                "AMCS 8bit, bf16+8, 622M elements, at fixed launch configurations, ms",
                ("chosen", *LAUNCHES),
                ("ms",),
            ),
        ),
    ),
    Part(
        "host",
        "The host's share of a step",
        35,
        "`engine.step()` at ZeRO stage 2 with the shapes of the 134M and the 1.7B model and the GPU idle before it: "
        "how long the host takes to return, and how often it waits for the GPU, as torch warns "
        "(`torch.cuda.set_sync_debug_mode`) and by calls of `synchronize`.",
        (
            Check("host_ms_134m", "host time of a step, 134M shapes", "ms", "<=", 1),
            Check("syncs_134m", "operations that wait for the GPU, 134M shapes", "", "<=", 1),
            Check("whole_ms_134m", "until the GPU is done, 134M shapes", "ms"),
            Check("host_ms_1_7b", "host time of a step, 1.7B shapes", "ms", "<=", 1),
            Check("syncs_1_7b", "operations that wait for the GPU, 1.7B shapes", "", "<=", 1),
            Check("whole_ms_1_7b", "until the GPU is done, 1.7B shapes", "ms"),
            Check("torch_ms_134m", "torch's fused AdamW, host time of a step, 134M shapes", "ms"),
            Check("torch_ms_1_7b", "torch's fused AdamW, host time of a step, 1.7B shapes", "ms"),
        ),
    ),
    Part(
        "train_134m",
        "Training the 134M model",
        80,
        "`deepspeed launch/train.py`, AMCS 8bit at stage 2, 30 steps of 16 x 1,024 tokens, full memory profile. MFU: 6 "
        "times the parameters of the matrix products, and causal attention, over the GPU's dense bf16 rate (989 "
        "TFLOP/s); what is computed again does not count.",
        (
            Check("mfu", "MFU", "%", ">=", 30),
            *_SPEED,
            *_PEAK,
            Check("optimizer_share", "optimizer step, share of the whole step", "%", "<=", 5),
            Check("compile_s", "waited for the step to be compiled", "s"),
        ),
    ),
    Part(
        "train_1_7b",
        "Training the 1.7B model",
        70,
        "The same with qwen3-1.7b, 6 steps of 4 x 2,048 tokens, activation checkpointing.",
        (Check("mfu", "MFU", "%", ">=", 40), *_SPEED, *_PEAK),
    ),
    Part(
        "resume",
        "The same bits again",
        45,
        "The 134M model, 12 steps twice, and 6 of them and then 6 more from the checkpoint, with and without "
        "`--deterministic`: losses, gradient norms and every tensor of the last checkpoint, bit for bit.",
        (
            Check("twice_differ", "with --deterministic, differences between two runs", "", "==", 0),
            Check("resumed_differ", "with --deterministic, differences between a run and a resumed one", "", "==", 0),
            Check("twice_differ_without", "without it, differences between two runs"),
            Check("resumed_differ_without", "without it, differences between a run and a resumed one"),
            Check("compared", "tensors and figures compared each time", "", ">=", 1),
        ),
    ),
    Part(
        "out_of_memory",
        "Out of memory",
        20,
        "The 134M model in 4 GB (`set_per_process_memory_fraction`), which it does not fit: the page that explains it, "
        "the exit status, and how long the process lives after the page is written.",
        (
            Check("pages", "pages written", "", "==", 1),
            Check("status", "exit status", "", "==", 12),
            Check("seconds", "from the page to the exit", "s", "<=", 15),
        ),
    ),
    Part(
        "train_8b",
        "Training the 8B model on one GPU",
        85,
        "qwen3-8b, weights drawn on the GPU itself, AMCS 8bit at stage 2, two steps of 1 x 2,048 tokens, activation "
        "checkpointing.",
        (
            *_PEAK,
            Check("reserved_over_allocated", "peak reserved over peak allocated", "", "<=", 1.05),
            Check("step_ms", "second step", "ms"),
            Check("host_ms", "host time of the optimizer step in it, 8B shapes (goal: 1)", "ms"),
        ),
    ),
    Part(
        "offload",
        "Weights, state and the step on the host",
        60,
        "The 134M model at stage 3 with weights and AMCS lean on the host, 8 steps of 4 x 1,024 tokens, "
        "`--deterministic`, without clipping: gradients held on the host until the step, and released to it during the "
        "backward pass (`amcs_zero3_offload_lean`).",
        (
            Check("losses_differ", "steps whose losses differ", "", "==", 0),
            Check("released_over_held", "step time with release over that without", "", "<=", 1),
            Check("held_ms", "median step without release", "ms"),
            Check("mfu", "MFU", "%"),
            *_SPEED,
            *_PEAK,
        ),
    ),
)

BY_NAME = {part.name: part for part in PARTS}
