"""What a report says: one model that the HTML page, the Markdown and the JSON are all written from.

Sizes are bytes of one rank, times seconds, losses nats per token, errors and imbalances percent. None is "not known".
"""

from __future__ import annotations

from typing import Literal

from toolkit.records.activations import Written
from toolkit.records.memory import Change, LargeTensor, OutOfMemoryRecord, Record, Timeline

Topic = Literal["run", "training", "prediction", "measurement", "out of memory"]


class Problem(Record):
    """What could not be read, or does not fit together."""

    part: Topic
    """What the report lacks something of."""
    sentence: str


class RunFacts(Record):
    """What was trained and how: from run.json, and what that does not say from the memory records."""

    model: str | None = None
    parameters: int | None = None
    optimizer: str | None = None
    state_format: str | None = None
    weights: str | None = None
    stage: int | None = None
    offload: list[str] = []
    world_size: int | None = None
    micro_batch: int | None = None
    gradient_accumulation: int | None = None
    global_batch: int | None = None
    """At the start of the run; `Training.batches` says what it was at every step."""
    seq_len: int | None = None
    learning_rate: float | None = None
    """The base rate, of the optimizer or the scheduler's peak; None where the optimizer's default holds."""
    betas: list[float] | None = None
    weight_decay: float | None = None
    clipping: float | None = None
    scheduler: str | None = None
    warmup: int | None = None
    """Steps."""
    steps: int | None = None
    """As asked for; `Training.steps` says how many were made."""
    activations: Written | None = None
    loss: str | None = None
    data: str | None = None
    tokenizer: str | None = None
    seed: int | None = None
    device: str | None = None
    started: str | None = None
    versions: dict[str, str] = {}


class LossCurve(Record):
    """Loss and what belongs to it over steps; None where it was not finite."""

    steps: list[int]
    loss: list[float | None]
    lr: list[float | None] = []
    grad_norm: list[float | None] = []
    tokens_per_s: list[float | None] = []
    val_steps: list[int] = []
    val_loss: list[float | None] = []


class BatchChange(Record):
    """Sequences of each step, from step `first` on."""

    first: int
    sequences: int


class Resumed(Record):
    """What was changed when the run was resumed, before step `first`, in words."""

    first: int
    changed: list[str]


class Slowest(Record):
    """A rank whose forward passes take longer than the others'."""

    rank: int
    percent: float
    """By how much, of what the median of the others takes."""


class ExpertLayer(Record):
    """How a layer's tokens were shared out among its experts, over all ranks, in a mean step of the last `over`."""

    layer: str
    busiest: float
    """Tokens of the expert with most of them, over the mean of all; 1 is an even share."""
    idlest: float
    evenness: float
    """Entropy of the shares over its maximum."""
    unused: float
    """Experts that got no token."""
    over: int


class Training(Record):
    """How the run went."""

    steps: int
    complete: bool
    """There is a summary that says so: the run neither crashed nor was interrupted."""
    tokens: int | None
    """The sum over the steps of what each of them saw."""
    batches: list[BatchChange]
    """More than one where the global batch was changed when the run was resumed."""
    changes: list[Resumed]
    seconds: float
    """Of the steps, validation aside."""
    compile_s: float
    """Spent on compiling the optimizer step before the first step of this run and of each that resumed it."""
    loss: float | None
    """Mean of the last `loss_steps`; None where one of them is not finite."""
    loss_steps: int
    val_loss: float | None
    tokens_per_s: float | None
    """Of the median step."""
    flops_per_s: float | None
    """Floating-point operations of the model alone, all ranks together, of the median step."""
    mfu: float | None
    """Their share of what the devices can do, of the median step; None where that is not known."""
    waiting: float | None
    """Share of the steps' time that the slowest rank waited for data."""
    slowest: Slowest | None
    """The rank for which the others wait, where there is one."""
    experts: list[ExpertLayer]
    """Empty for a model without experts."""
    nonfinite_steps: list[int]
    skipped_steps: int
    curve: LossCurve


class Peak(Record):
    """The most that a rank held."""

    bytes: int
    kind: Literal["allocated", "resident set", "predicted"]
    source: str
    """Where the number comes from, in words."""
    rank: int | None = None
    phase: str | None = None
    held: dict[str, int] = {}
    """By category; empty where categories were not measured."""
    per_parameter: float | None = None
    before: int | None = None
    """Of a resident set: bytes that were there before the model."""


class StepTimeline(Record):
    """`timeline` of the largest rank that has one, or the predicted one."""

    measured: bool
    rank: int | None
    step: int | None
    timeline: Timeline


class Pair(Record):
    """One size, predicted and measured."""

    name: str
    predicted: int
    measured: int
    error: float | None
    """(predicted - measured) / measured in percent; None where nothing was measured, or too little to matter."""


class Comparison(Record):
    """Predicted against measured at one moment, on the rank with the largest peak."""

    moment: Literal["at the peak", "between steps", "in host memory"]
    rank: int
    phases: list[str] = []
    """In which the peak was predicted and measured, where these differ."""
    categories: list[Pair]
    """Empty where categories were not measured."""
    model_state: Pair | None
    """Weights, gradients and optimizer state together."""
    total: Pair


class PhasePair(Record):
    """The peak of one phase; None where it is not known."""

    name: str
    predicted: int | None
    measured: int | None
    """Of the rank with the largest peak."""
    resident_set: int | None
    """Largest resident set (CPU) or reserved bytes (GPU) in this phase, of that rank."""


class Rank(Record):
    """What one rank measured."""

    rank: int
    host: str
    device: str
    peak: int | None
    phase: str | None
    held: dict[str, int]
    resident: int | None
    """Between steps, all categories together."""
    resident_set: int | None
    limit: int | None
    """Bytes that this process may have."""
    reserved: int | None
    fragmentation: float | None
    """Share of the reserved bytes that is not allocated."""


class Imbalance(Record):
    """The largest rank against the mean of all."""

    of: Literal["peak", "resident set"]
    rank: int
    largest: int
    mean: float
    percent: float
    category: str | None
    """In which the largest rank is furthest above the mean, and by how many bytes."""
    excess: float | None


class PerParameter(Record):
    """One category's bytes, and the same per parameter of the whole model."""

    category: str
    peak: int
    resident: int | None
    peak_per_parameter: float | None
    resident_per_parameter: float | None


class Explanation(Record):
    """What a rank left behind that ran out of memory: the record, or its page of text where that is all there is."""

    rank: int | None
    record: OutOfMemoryRecord | None
    text: str | None = None


class RunReport(Record):
    """All that is known of one run."""

    name: str
    folder: str
    headline: str
    facts: RunFacts
    problems: list[Problem]
    training: Training | None
    peak: Peak | None
    timeline: StepTimeline | None
    comparisons: list[Comparison]
    phases: list[PhasePair]
    ranks: list[Rank]
    missing_ranks: list[int]
    imbalance: Imbalance | None
    blocks: list[LargeTensor]
    """The largest tensors at the peak, of the rank with the largest peak."""
    per_parameter: list[PerParameter]
    held: int | None
    """Weights, gradients and optimizer state of the rank that holds most of them, allocated between steps."""
    held_by: dict[str, int]
    """The same by category; empty where it was not measured."""
    resident_set: int | None
    """The largest of the ranks' processes, libraries included."""
    changes: list[Change]
    predicted_peak: int | None
    context: int
    host: dict[str, int]
    nvme: int
    per_block: dict[str, int]
    remarks: list[str]
    measuring: str | None
    """How it was measured and at what cost, in a sentence."""
    out_of_memory: list[Explanation]


class Paired(Record):
    """Loss of a run minus that of the first run, at the same steps."""

    steps: list[int]
    difference: list[float]
    mean: float
    """Over the last `over` of them."""
    standard_error: float | None
    over: int


class Method(Record):
    """One run's line in the table of several."""

    run: str
    optimizer: str | None
    loss: float | None
    val_loss: float | None
    memory: int | None
    """Bytes of `memory_kind`, which is the same for every run that has it."""
    memory_kind: str | None
    resident_set: int | None
    state_format: str | None
    weights: str | None
    stage: int | None
    ranks: int | None
    per_parameter: float | None
    tokens_per_s: float | None
    seconds: float | None
    against_first: Paired | None
    """None for the first run, and where no step is common."""


class Report(Record):
    """One run, or several side by side."""

    title: str
    headline: str
    gaps: list[str]
    """In what the runs differ that the comparison takes to be equal, a sentence each."""
    methods: list[Method]
    """Empty for a single run."""
    footnotes: list[str]
    """Of the table of methods."""
    runs: list[RunReport]
    leanstate: str
    """The version that wrote the report."""
