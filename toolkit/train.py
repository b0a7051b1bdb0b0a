"""Train a language model under DeepSpeed: `deepspeed launch/train.py ...` or `python -m toolkit.train ...`.

Everything the user can get wrong is checked before a model is built. No mathematics and no memory arithmetic
live here: the rules are in `toolkit.optim`, the sharding in `toolkit.zero`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError
from toolkit.records.run import CHECKPOINTS, METRICS, PLOT, strict
from toolkit.run import compiling, deterministic, feed, ranks, stopping
from toolkit.run import folder as run_folder
from toolkit.run.memory import end_without_memory, held_now, make_explainer, watch
from toolkit.run.output import outliving
from toolkit.run.plan import Plan, make_plan, settle_again
from toolkit.run.resume import facts, make_saver, take_over
from toolkit.run.saving import Saver
from toolkit.run.screen import Screen
from toolkit.run.settings import RunSettings, parse
from toolkit.run.start import NONE, Start, find_start
from toolkit.run.stopping import INTERRUPTED, OUT_OF_MEMORY, LeftBehind, OutOfMemory, StopRequest, Watch, abandon
from toolkit.run.summary import summarize

if TYPE_CHECKING:
    import torch
    from torch import nn

    from toolkit.memory.ledger import Ledger

DIVERGED = 3


def train(settings: RunSettings) -> dict[str, Any]:
    """Do the whole run on this rank, which the launcher (or nobody: world size 1) has started.

    Returns:
        The summary that summary.json holds; the same on every rank.

    Raises:
        UserError: the settings, the JSON, the data or the model are not fit for a run. Raised by every rank.
        OutOfMemory: raised by ranks whose memory ran out, and by those that this stopped.
        LeftBehind: another rank has ended.
    """
    screen = Screen(settings.steps, shown=ranks.rank() == 0)
    screen.say(f"starting {ranks.world_size()} rank(s)")
    if settings.deterministic:
        deterministic.enforce()
    background = compiling.begin(settings)
    try:
        device = ranks.start()
        with Watch() as watching:
            return _train(settings, device, StopRequest(watching), screen, background)
    finally:
        if background is not None:
            background.close()


def _train(
    settings: RunSettings,
    device: torch.device,
    stop: StopRequest,
    screen: Screen,
    background: compiling.Background | None,
) -> dict[str, Any]:
    import torch

    import toolkit.memory.out_of_memory  # noqa: F401 (when it is needed, there is no memory to import it)

    screen.say(f"reading {settings.data}")
    plan = ranks.agreed(lambda: make_plan(settings))
    plan.folder = ranks.from_first(plan.folder)  # its default name holds the time
    held = ranks.agreed(lambda: _claim(plan, device))
    explainer = saver = None
    try:
        start = ranks.agreed(lambda: find_start(plan.settings, plan.folder, plan.identity))
        ranks.agreed(lambda: settle_again(plan, start.saved))
        settings = plan.settings
        screen.expect(settings.steps)
        if start.step >= settings.steps:
            where = start.source and start.source.folder
            screen.say(f"nothing to do: {where} is at step {start.step} of {settings.steps}; --steps gives it more.")
            return {"interrupted": False, "diverged": False}
        plan.remarks += start.remarks
        explainer = make_explainer(plan, device)
        _announce(plan, screen, device)
        screen.say(explainer.words())
        torch.manual_seed(settings.seed)
        screen.say(compiling.building(plan.ds))
        with explainer:
            engine = _engine(plan)
            ranks.agreed(lambda: take_over(plan, engine, start, screen.say))
            records = ranks.from_first(held.go_on(start.step, plan.config) if held is not None else [])
            if held is not None and held.dropped:
                screen.say(f"note: {held.dropped} line(s) of {METRICS} were no steps and are dropped.")
            saver = make_saver(plan, engine, start, screen.say)
            compile_s = compiling.step_compiled(engine, background, screen.say)
            with stop, watch(plan, engine, explainer) as ledger:
                with screen:
                    records = _loop(plan, engine, screen, held, stop, ledger, saver, start, records, compile_s)
                ledger.close()
                summary = summarize(plan, engine, records, ledger.largest)
                if held is not None:
                    held.write_summary(summary)
                    run_folder.plot_loss(records, plan.folder / PLOT, title=plan.folder.name)
        screen.summary(summary)
    except UserError:
        raise
    except Exception as error:
        if explainer is not None and explainer.ended_by_memory():
            raise OutOfMemory from None
        if settings.deterministic and (told := deterministic.explained(error)) is not None:
            raise told from None
        # Once the user has stopped the run, ranks fail merely because others are gone already.
        if stop.requested:
            raise KeyboardInterrupt from None
        raise
    finally:
        if saver is not None:
            saver.close()
        if held is not None:
            held.close()
    return summary


def _claim(plan: Plan, device: torch.device) -> run_folder.RunFolder | None:
    """Rank 0 takes the run folder; the other ranks have none."""
    from toolkit import models

    if ranks.rank() != 0:
        return None
    facts = run_folder.describe(
        settings=plan.settings.model_dump(mode="json"),
        world_size=plan.batch.world_size,
        micro_batch=plan.batch.micro,
        gradient_accumulation=plan.batch.accumulation,
        global_batch=plan.batch.total,
        parameters=plan.parameters,
        device=_device_name(device),
        bf16_products="fp32" if device.type == "cpu" and models.cpu_matmul.computes_in_fp32() else "native",
        ds_config=plan.config,
    )
    settings = plan.settings
    keeps, resuming = settings.save_every > 0 and plan.ds.stage > 0, settings.resume != NONE
    return run_folder.RunFolder(plan.folder, facts, plan.config, checkpoints=keeps, resuming=resuming)


def _announce(plan: Plan, screen: Screen, device: torch.device) -> None:
    settings, batch = plan.settings, plan.batch
    screen.say(
        f"{settings.model}: {plan.parameters:,} parameters on {batch.world_size} x {_device_name(device)}; "
        f"{settings.config}; data {settings.data}"
    )
    screen.say(
        f"{settings.steps} steps of {batch.total} sequences x {settings.seq_len} tokens: micro-batch "
        f"{batch.micro} x accumulation {batch.accumulation} x {batch.world_size} rank(s)"
    )
    screen.say(f"files in {plan.folder}")
    if settings.eval_every and len(plan.validation) < settings.eval_sequences:
        plan.remarks.append(f"the validation text fills only {len(plan.validation)} sequences; all are used.")
    for remark in plan.remarks:
        screen.say(f"note: {remark}")


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _engine(plan: Plan) -> Any:
    import torch

    import toolkit
    from toolkit import memory, models

    settings, config = plan.settings, plan.config
    if settings.memory_profile == "full" and not torch.accelerator.is_available():
        memory.count_from_here()
    # At stage 3 the model is partitioned while it is built, so the layout of partitions must be in place.
    toolkit.register()
    model: nn.Module = models.build_model(
        settings.model,
        dtype=plan.ds.dtype,
        seed=settings.seed,
        zero3_config=config if plan.ds.stage == 3 else None,
        from_checkpoint=settings.from_checkpoint,
        activation_checkpointing=settings.activation_checkpointing,
        loss=settings.loss,
    )
    engine, *_ = toolkit.initialize(model=model, config=config, total_steps=settings.steps)
    return engine


def _loop(
    plan: Plan,
    engine: Any,
    screen: Screen,
    held: run_folder.RunFolder | None,
    stop: StopRequest,
    ledger: Ledger,
    saver: Saver | None,
    start: Start,
    records: list[dict[str, Any]],
    compile_s: float | None,
) -> list[dict[str, Any]]:
    """Step to the end, or until a rank is asked to stop; returns the records of metrics.jsonl."""
    from toolkit import data
    from toolkit.zero import rule_optimizer

    settings, batch = plan.settings, plan.batch
    batches = data.rank_batches(
        plan.data, rank=ranks.rank(), world_size=batch.world_size, micro_batch=batch.micro, start=start.position
    )
    telling = feed.Telling(batches, screen.say)
    rule = rule_optimizer(engine)
    tokens = batch.total * settings.seq_len
    skipped = 0
    # What came before this step: the compiler, the copy of a checkpoint begun after the step before, another setting.
    waited: dict[str, Any] = {} if compile_s is None else {"compile_s": compile_s}
    waited |= {"changed": plan.terms.changed} if plan.terms.changed else {}
    for step in range(start.step + 1, settings.steps + 1):
        started = time.perf_counter()
        lr = float(engine.get_lr()[0])  # before the step: after it the scheduler has set the next one
        keep = partial(saver.now, step - 1, facts(plan, batches.position)) if saver and step > start.step + 1 else None
        with feed.kept(keep):
            mine = _step(engine, batches, batch.accumulation)
        [loss], [memory, stopping] = ranks.mean_max([mine], [held_now(ledger), stop.requested], engine.device)
        stop.border(last=bool(stopping))
        seconds = time.perf_counter() - started
        norm = engine.get_global_grad_norm()
        record: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": None if norm is None else float(norm),
            **(rule.report() if rule is not None else {}),
            **{"sequences": batch.total, "tokens": tokens},
            "tokens_per_s": tokens / seconds,
            "step_time_s": seconds,
            "memory_bytes": int(memory),
            "skipped": not engine.was_step_applied(),
            **waited,
        }
        waited = {}
        skipped = skipped + 1 if record["skipped"] else 0
        last = step == settings.steps
        diverged = skipped >= settings.max_skipped
        if plan.validation and not stopping and (last or step % settings.eval_every == 0):
            record["val_loss"] = _validate(engine, plan.validation, batch.micro)
        record = strict(record)
        records.append(record)
        if held is not None:
            held.write_step(record)
        _monitor(engine, record)
        screen.step(record)
        telling.tell()
        # After the line of this step: a checkpoint must not be ahead of the metrics.
        ending = last or stopping or diverged
        if saver is not None:
            due = not ending and step % settings.save_every == 0
            _say(screen, saver.wait() if ending or due else saver.poll())
            if due:
                waited = {"save_wait_s": saver.start(step, facts(plan, batches.position))}
            elif ending:
                saver.now(step, facts(plan, batches.position))
        if ending:
            where = f"; a checkpoint is in {plan.folder / CHECKPOINTS}" if saver is not None else ""
            if diverged:
                screen.say(
                    f"stopped after step {step}: the gradient was not finite in {skipped} steps in a row, which is "
                    f"--max-skipped; weights and state are those of step {step - skipped}{where}."
                )
            elif not last:
                screen.say(f"stopped after step {step} of {settings.steps}{where}.")
            break
    batches.close()
    plan.read_to = batches.read_to
    return records


def _say(screen: Screen, message: str | None) -> None:
    if message is not None:
        screen.say(f"note: {message}")


def _step(engine: Any, batches: Iterator[torch.Tensor], accumulation: int) -> float:
    """One optimizer step; returns this rank's mean loss over its micro-batches."""
    total: Any = 0.0
    for _ in range(accumulation):
        loss = engine(next(batches).to(engine.device, non_blocking=True))
        engine.backward(loss)
        engine.step()
        # Kept on the device: reading it here would make the host wait once a micro-batch.
        total = total + loss.detach().float()
    return float(total) / accumulation


def _validate(engine: Any, sequences: list[torch.Tensor], micro_batch: int) -> float:
    """Mean loss over `sequences`, dealt out to the ranks; the same at every world size up to rounding."""
    import torch

    world = ranks.world_size()
    mine = sequences[ranks.rank() :: world]
    # Under ZeRO-3 every rank must run the same number of forward passes: one with no sequence left
    # repeats the first and counts it zero times.
    passes = -(-len(sequences[::world]) // micro_batch)
    total = 0.0
    engine.eval()
    with torch.no_grad():
        for index in range(passes):
            rows = mine[index * micro_batch : (index + 1) * micro_batch]
            tokens = torch.stack(rows or sequences[:1]).to(engine.device)
            total += float(engine(tokens).float()) * len(rows)
    engine.train()
    [mean], _ = ranks.mean_max([total], [], engine.device)
    return mean * world / len(sequences)


def _monitor(engine: Any, record: dict[str, Any]) -> None:
    """Add to the monitors of the JSON what DeepSpeed does not write itself (it writes the rate)."""
    if engine.monitor.enabled:
        names = {"loss": "Train/loss", "val_loss": "Validation/loss", "alpha": "Train/alpha"}
        names |= {"grad_norm": "Train/grad_norm", "tokens_per_s": "Train/tokens_per_s"}
        events = [(name, record[key], record["step"]) for key, name in names.items() if record.get(key) is not None]
        engine.monitor.write_events(events)


@outliving("nobody reads the output of this run any more; it continues, and its metrics are in its run folder.")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 2 for the user's errors, 3 where gradients stayed not finite, 12
    without memory, 110 where a rank gave no sign of life, 130 when stopped by a signal."""
    ranks.prepare()
    try:
        settings = parse(arguments)
        if settings is None:
            return 0
        summary = train(settings)
        status = DIVERGED if summary["diverged"] else INTERRUPTED if summary["interrupted"] else 0
    except UserError as error:
        ranks.report(error)
        status = 2
    except KeyboardInterrupt:
        abandon(INTERRUPTED)
    except OutOfMemory:
        abandon(OUT_OF_MEMORY)
    except LeftBehind as error:
        print(f"note: {error}", file=sys.stderr)
        abandon(error.status)
    except Exception as error:
        end_without_memory(error)
        if ranks.world_size() == 1:
            raise
        if (words := stopping.lost_peer(error)) is not None:
            print(f"error: {words}", file=sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())
        abandon(1)  # others may be in a collective, and this process would wait for them
    ranks.finish()
    return status


if __name__ == "__main__":
    sys.exit(main())
