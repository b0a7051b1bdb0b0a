"""A training run on one rank: its parts, its steps, and the order in which everything happens."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from toolkit.agreed import AgreedError, agreed
from toolkit.errors import UserError
from toolkit.records.run import CHECKPOINTS, LAST_STEPS, METRICS, strict
from toolkit.run import bad_documents, compiling, deterministic, ranks
from toolkit.run.engine import build_engine, open_batches, optimizer_step
from toolkit.run.folder import RunFolder
from toolkit.run.identity import note_base
from toolkit.run.memory import Forecast, machines, make_explainer, memory_now, watch_memory
from toolkit.run.moment import Moment, steps_behind
from toolkit.run.monitors import Monitors
from toolkit.run.pace import Pace
from toolkit.run.prepare import PreparedRun, claim_folder, prepare
from toolkit.run.range_test import find_rate
from toolkit.run.resume import checkpoint_facts, make_saver, restore
from toolkit.run.routers import Routers
from toolkit.run.saving import Due
from toolkit.run.screen import Screen
from toolkit.run.settings import AUTO, RunSettings
from toolkit.run.start import Start, find_start
from toolkit.run.stopping import MemoryRanOut, StopRequest
from toolkit.run.summary import MEASURED, Measured, measure, peak_of_ranks, summarize, written_again
from toolkit.run.tracking import Tracking, scalars
from toolkit.run.weighing import check_apart

if TYPE_CHECKING:
    import torch

    from toolkit.data import Position
    from toolkit.memory.ledger import Ledger
    from toolkit.memory.out_of_memory import Explainer


def train_on_this_rank(
    settings: RunSettings,
    device: torch.device,
    stop: StopRequest,
    screen: Screen,
    background: compiling.Background | None,
) -> dict[str, Any]:
    """Prepare, build, train and summarize; every rank must call this, once `ranks.start` has joined them.

    Returns:
        The summary that summary.json holds; the same on every rank.

    Raises:
        UserError, MemoryRanOut, KeyboardInterrupt: as `toolkit.train.train`.
    """
    import torch

    import toolkit.memory.out_of_memory  # noqa: F401 (when it is needed, there is no memory to import it)

    screen.say(f"checking the settings, then reading {settings.data}")
    prepared = agreed(lambda: prepare(settings))
    note_base(prepared.settings, prepared.identity, screen.say)
    prepared.folder = ranks.from_first(prepared.folder)  # its default name holds the time
    folder = agreed(lambda: claim_folder(prepared, device))
    explainer: Explainer | None = None
    run: Run | None = None
    try:
        start = agreed(lambda: find_start(prepared.settings, prepared.folder, prepared.identity))
        agreed(lambda: prepared.resolve_again(start.saved))
        settings = prepared.settings
        screen.expect(settings.steps)
        if start.step >= settings.steps:
            where = start.source and start.source.folder
            screen.say(f"nothing to do: {where} is at step {start.step} of {settings.steps}; --steps gives it more.")
            ended = agreed(lambda: written_again(prepared, folder, start, screen) if folder is not None else None)
            return ranks.from_first(ended) or {"interrupted": False, "diverged": False}
        prepared.remarks += start.remarks
        forecast = Forecast(prepared, device)
        explainer = make_explainer(prepared, device, forecast)
        for line in prepared.lines(device):
            screen.say(line)
        for line in machines(explainer):
            screen.say(line)
        screen.say(explainer.words())
        screen.say(compiling.building(prepared.ds))
        with explainer:
            if settings.lr == AUTO:
                found = find_rate(prepared, background, screen.say)
                agreed(lambda: prepared.resolve_rate(found.lr))
                screen.say(found.words())
                if folder is not None:
                    folder.note({"lr_range_test": found.record()})
            torch.manual_seed(settings.seed)
            run = Run(prepared, start, folder, screen, stop)
            screen.go_on(run.records, explainer.limit)
            run.compile(background)
        with stop, watch_memory(prepared, run.engine, explainer) as ledger:
            with screen:
                run.train(ledger, explainer)
            ledger.close()
            if run.whole:
                stop.step_boundary(last=True)
                forecast.changes()  # for the report
            summary = run.finish(ledger, explainer)
        screen.summary(summary)
        if (problem := ranks.from_first(run.unwritten)) is not None:
            raise AgreedError(problem)
        return summary
    except UserError:
        raise
    except Exception as error:
        if explainer is not None and explainer.ended_by_memory():
            raise MemoryRanOut from None
        if settings.deterministic and (told := deterministic.explained(error)) is not None:
            raise told from None
        # Once the user has stopped the run, ranks fail merely because others are gone already.
        if stop.requested:
            raise KeyboardInterrupt from None
        raise
    finally:
        if run is not None:
            run.close(failed=sys.exc_info()[0] is not None)
        if folder is not None:
            folder.close()


class Run:
    """A run whose model is built and whose state is that of its start; every rank calls the same methods.

    Args:
        prepared: settings, data and folder, checked.
        start: after which step it begins, and from which checkpoint.
        folder: the run folder, on rank 0.
        screen: shows progress, on rank 0.
        stop: asked after every step.
    """

    def __init__(
        self, prepared: PreparedRun, start: Start, folder: RunFolder | None, screen: Screen, stop: StopRequest
    ) -> None:
        from toolkit.zero import rule_optimizer
        from toolkit.zero.wire import Wire

        self.prepared, self.start, self.folder = prepared, start, folder
        self.screen, self.stop = screen, stop
        self.settings, self.batch = prepared.settings, prepared.batch
        self.engine = build_engine(prepared)
        if prepared.data.documents.conversations:
            agreed(lambda: check_apart(self.engine))
        agreed(lambda: restore(prepared, self.engine, start, screen.say))
        self.records: list[dict[str, Any]] = ranks.from_first(
            agreed(lambda: folder.continue_after(start.step, prepared.config) if folder is not None else [])
        )
        """The records of metrics.jsonl."""
        if folder is not None and folder.dropped:
            screen.say(f"note: lines of {METRICS} that were no steps are dropped: {folder.dropped}.")
        self.unwritten: str | None = None
        """What `finish` could not write, and why; on rank 0."""
        self._tracking = agreed(lambda: self._track(folder))
        self.engine.monitor = self._monitors = Monitors(prepared.config, screen.say)
        self.batches = open_batches(prepared, prepared.data, start.position)
        self._notes = bad_documents.Notes(self.batches, screen.say)
        self._rule = rule_optimizer(self.engine)
        self._wire, self._sent = Wire(), dict[str, int]()
        self._pace, self._routers = Pace(self.engine, prepared.ds.stage), Routers(self.engine)
        self._skipped_in_a_row = 0
        self._behind = steps_behind(self.engine.device)
        self._made: deque[Callable[[], tuple[dict[str, Any], bool]]] = deque()
        self._names: tuple[str, ...] = ()
        self._ended: Moment | None = None  # the step before
        self._peak = peak_of_ranks(
            self.engine.device, prepared.ds.computed, self.batch.world_size, self.settings.peak_tflops
        )
        # For the next record, what came before its step: another setting, the compiler, the copy for a checkpoint.
        self._before: dict[str, Any] = {}
        self._due = Due(max(self.settings.save_every, 1), self.settings.keep_every, start.step)
        self.saver = make_saver(prepared, self.engine, start, screen.say)  # last: it has a thread, which `close` ends

    def compile(self, background: compiling.Background | None) -> None:
        """Compile what the run wants compiled; the process `background` may be working on the optimizer step."""
        seconds = compiling.run_compiled(self.prepared, self.engine, background, self.screen.say)
        self._routers.forget()  # what compiling the model has sent through it
        if seconds is not None:
            self._before["compile_s"] = seconds

    def train(self, ledger: Ledger, explainer: Explainer) -> None:
        """Step to the end, or until a rank is asked to stop or too many steps in a row were skipped."""
        if self.prepared.resolved.changed:
            self._before["changed"] = self.prepared.resolved.changed
        for step in range(self.start.step + 1, self.settings.steps + 1):
            self._made.append(self.step(step, ledger))
            last = step == self.settings.steps
            validates = bool(self.prepared.validation) and (last or step % self.settings.eval_every == 0)
            saves = self.saver is not None and self._due.at(step)
            diverged = self._skipped_in_a_row >= self.settings.max_skipped
            records, asked_to_stop = self._read(0 if last or validates or saves or diverged else self._behind)
            if validates and not asked_to_stop:
                records[-1]["val_loss"] = self.validate()
            for record in records:
                self.record(record)
            if (found := self.engine.leanstate_audit.news()) is not None:
                self.screen.say(found)
            ending = last or asked_to_stop or diverged
            self.save(step, (lambda: self.measured(ledger, explainer)) if ending else None)
            if ending:
                self._say_why_it_ends(step, diverged)
                break

    def _read(self, behind: int) -> tuple[list[dict[str, Any]], bool]:
        """The records of the steps that were made, but of the last `behind`; whether a rank was asked to stop. Then it
        is those of all."""
        records = []
        asked_to_stop = False
        while len(self._made) > (0 if asked_to_stop else behind):
            record, asked = self._made.popleft()()
            records.append(record)
            asked_to_stop = asked_to_stop or asked
        return records, asked_to_stop

    def step(self, step: int, ledger: Ledger) -> Callable[[], tuple[dict[str, Any], bool]]:
        """One optimizer step; returns what waits until it has ended and gives its record, and whether any rank has been
        asked to stop."""
        import torch

        from toolkit.zero.gradients import HostCopy

        engine, tokens = self.engine, self.batch.total * self.settings.seq_len
        started, waited = Moment(engine.device), self.batches.waited
        self._wire.since()  # of what came between the steps
        lr = float(engine.get_lr()[0])  # before the step: after it the scheduler has set the next one
        with bad_documents.saved_before(partial(self._save_after, step - 1, self.batches.position)):
            mine = optimizer_step(engine, self.batches, self.batch.accumulation)
        waited = self.batches.waited - waited
        paced = self._pace.step(waited)
        largest = [memory_now(ledger), self.stop.requested, waited]
        over_ranks = ranks.mean_max_later([mine], largest, engine.device)
        routed = self._routers.step()
        last, self._ended = self._ended, (ended := Moment(engine.device))
        norm = engine.get_global_grad_norm()
        norm_read = HostCopy(norm).wait if isinstance(norm, torch.Tensor) else lambda: norm
        told = self._rule.report_later(lambda found: HostCopy(found).wait) if self._rule is not None else dict
        skipped = not engine.was_step_applied()
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        before, self._before = self._before, {}
        self._sent = self._wire.since()

        def read() -> tuple[dict[str, Any], bool]:
            [loss], [memory, asked, waited] = over_ranks()
            self.stop.step_boundary(last=bool(asked))
            seconds = started.until(ended)
            paced()
            norm, reported = norm_read(), told()
            self._names = tuple(reported)
            flops = tokens * self.prepared.flops_per_token / seconds
            return {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": None if norm is None else float(norm),
                **reported,
                **routed(),
                **{"sequences": self.batch.total, "tokens": tokens},
                "tokens_per_s": tokens / seconds,
                "step_time_s": seconds,
                **({"between_s": last.until(started)} if last is not None else {}),
                "data_seconds": waited,
                "flops_per_s": flops,
                **({"mfu": flops / self._peak} if self._peak is not None else {}),
                "memory_bytes": int(memory),
                "skipped": skipped,
                **before,
            }, bool(asked)

        return read

    @property
    def whole(self) -> bool:
        """Whether its last step has been made."""
        return bool(self.records) and self.records[-1]["step"] >= self.settings.steps

    def validate(self) -> float:
        """Mean loss over the predictions in the validation sequences, dealt out to the ranks; the same at every world
        size up to rounding."""
        import torch

        from toolkit.models import predictions

        sequences, micro_batch, world_size = self.prepared.validation, self.batch.micro, ranks.world_size()
        mine = sequences[ranks.rank() :: world_size]
        # Under ZeRO-3 every rank must run the same number of forward passes: one with no sequence left
        # repeats the first and counts it zero times.
        passes = -(-len(sequences[::world_size]) // micro_batch)
        total: Any = 0.0
        self.engine.eval()
        with torch.no_grad():
            for index in range(passes):
                rows = mine[index * micro_batch : (index + 1) * micro_batch]
                tokens = torch.stack(rows or sequences[:1]).to(self.engine.device)
                counted = predictions(tokens) / self.settings.seq_len if rows else 0.0
                total = total + self.engine(tokens).double() * counted  # on the device: nothing waits for it
        self.engine.train()
        [mean], _ = ranks.mean_max([total], [], self.engine.device)
        return mean * world_size / (float(predictions(torch.stack(sequences))) / self.settings.seq_len)

    def record(self, record: dict[str, Any]) -> None:
        """Write the record of a step: metrics.jsonl, the monitors of the JSON, the screen."""
        record = strict(record)
        self.records.append(record)
        if self.folder is not None:
            self.folder.write_step(record)
        self._monitors.write(record["step"], scalars(record))
        if self._tracking is not None:
            self._tracking.write(record)
        self.screen.step(record, self._names)
        self._notes.say_new()

    def _track(self, folder: RunFolder | None) -> Tracking | None:
        if folder is None or self.settings.tracker is None:
            return None
        return Tracking(self.settings.tracker, folder, self.start.step, self.records, self.screen.say)

    def save(self, step: int, measured: Callable[[], Measured] | None) -> None:
        """Save where a checkpoint is due, after the record of its step: it must not be ahead of the metrics.

        `measured`: at the end of the run, what its checkpoint notes for a summary that could not be written.
        """
        if self.saver is None:
            return
        due = measured is None and self._due.at(step)
        if due or self._due.late(step):
            self.stop.step_boundary(last=True)  # it takes as long as the disk does
            waited = self._in_place()
            if due:
                waited += self.saver.start(step, checkpoint_facts(self.prepared, self.batches.position))
                self._due.begun(step, self.saver.saved)
            if self._due.late(step):
                waited += self._in_place()
            self._before["save_wait_s"] = waited
            self.stop.step_boundary()
        self._note(self.saver.poll() if measured is None else self.saver.wait())
        if measured is not None:
            noted = {MEASURED: measured().model_dump()}
            self.saver.now(step, checkpoint_facts(self.prepared, self.batches.position) | noted)

    def _note(self, note: str | None) -> None:
        if note is not None:
            self.screen.say(f"note: {note}")

    def _in_place(self) -> float:
        """Wait until the checkpoint that is being written is in place; returns the seconds."""
        began = time.perf_counter()
        if self.saver is not None and self._due.writing:
            self._note(self.saver.wait())
            usual = statistics.median(record["step_time_s"] for record in self.records[-LAST_STEPS:])
            self._due.ended(ranks.from_first(self.saver.seconds / usual))
        return time.perf_counter() - began

    def measured(self, ledger: Ledger, explainer: Explainer) -> Measured:
        """What was measured of the run so far."""
        read_to, forward = self.batches.read_to, self._pace.median()
        return measure(self.prepared, self.engine, ledger, explainer, read_to, self._sent, forward)

    def finish(self, ledger: Ledger, explainer: Explainer) -> dict[str, Any]:
        """Write and return the summary."""
        summary = summarize(self.prepared, self.records, self.measured(ledger, explainer))
        if self.folder is not None:
            self.unwritten = self.folder.write_end(summary, self.records)
        return summary

    def close(self, *, failed: bool) -> None:
        """End the threads that read and save, and the curves; `failed`: with an error."""
        self.batches.close()
        if self.saver is not None:
            self.saver.close()
        if self._tracking is not None:
            self._tracking.close(failed=failed)

    def _save_after(self, step: int, position: Position) -> None:
        """Save the state after `step`, which was the last one, unless it is where the run began."""
        for record in self._read(0)[0]:
            self.record(record)
        if self.saver is not None and step != self.start.step:
            self.saver.now(step, checkpoint_facts(self.prepared, position))

    def _say_why_it_ends(self, step: int, diverged: bool) -> None:
        where = f"; a checkpoint is in {self.prepared.folder / CHECKPOINTS}" if self.saver is not None else ""
        if diverged:
            skipped = self._skipped_in_a_row
            used = ", and of gradients that came before the first that was not finite"
            self.screen.say(
                f"stopped after step {step}: the gradient was not finite in {skipped} steps in a row, which is "
                f"--max-skipped; weights and state are those of step {step - skipped}"
                f"{used if self.prepared.ds.releases_gradients else ''}{where}."
            )
        elif step != self.settings.steps:
            self.screen.say(f"stopped after step {step} of {self.settings.steps}{where}.")
