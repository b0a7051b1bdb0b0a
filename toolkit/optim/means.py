"""What a step finds out before it updates: means by owner, and the small states that follow them.

Each measuring pass goes over what this rank holds; sums are by owner (a parameter, a row or column of it, a component,
the model) and go over the ranks once for all parameters, after a matrix once for those of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from toolkit.errors import UserError
from toolkit.optim.rule import Mean, Rule
from toolkit.optim.statistics import Member, Parameter, Ranks, by_block, flats, run


def find_means(members: Sequence[Member], functions: Sequence[str], scale: Tensor, ranks: Ranks) -> None:
    """The passes of these measuring functions of the rule, one after the other, and its small states among them."""
    rule = members[0].step.function.rule
    passes, last = rule.passes(), rule.last_followed()
    for function in functions:
        _measure(members, function, passes[function], scale, ranks)
        if function == last:
            _follow(rule, members)


def _measure(members: Sequence[Member], function: str, means: tuple[Mean, ...], scale: Tensor, ranks: Ranks) -> None:
    device, parameters = members[0].step.theta.device, tuple(member.parameter for member in members)
    lengths = [[mean.sums(parameter.shape) for parameter in parameters] for mean in means]
    sums = torch.zeros(sum(map(sum, lengths)), dtype=torch.float64, device=device)
    by_mean = sums.split([sum(each) for each in lengths])
    if by_block(members, function):
        for flat in flats(members):
            for own, found in zip(by_mean, flat.measure(function, scale), strict=True):
                own[flat.place] = found.to(device)
    else:
        owned = zip(*(own.split(each) for own, each in zip(by_mean, lengths, strict=True)), strict=True)
        for member, targets in zip(members, owned, strict=True):
            for start, results in run(member, function, scale):
                for mean, target, result in zip(means, targets, results, strict=True):
                    _add(target, mean, member.parameter, start, result.to(device))
    total = ranks.add(sums).split([sum(each) for each in lengths])
    for mean, found, each in zip(means, total, lengths, strict=True):
        values = _mean(mean, found, each, parameters).float().split(each)
        for member, value in zip(members, values, strict=True):
            here = value.to(member.step.theta.device)
            if mean.over in ("row", "column"):
                member.wide[mean.name] = (mean.over + "s", here)
            else:
                member.numbers[mean.name] = here.squeeze(0)


def _mean(mean: Mean, sums: Tensor, lengths: Sequence[int], parameters: tuple[Parameter, ...]) -> Tensor:
    """The means by parameter, from the sums of all ranks: what has one owner has the same value."""
    if mean.over in ("component", "model"):
        owner = [parameter.component if mean.over == "component" else "" for parameter in parameters]
        for name in dict.fromkeys(owner):
            mine = [i for i, other in enumerate(owner) if other == name]
            place = torch.tensor(mine).to(sums.device, non_blocking=True)
            sums[place] = sums[place].sum() / sum(parameters[i].numel for i in mine)
        return sums
    return sums / _counts(tuple(lengths), parameters).to(sums.device, non_blocking=True)


@lru_cache(maxsize=16)
def _counts(lengths: tuple[int, ...], parameters: tuple[Parameter, ...]) -> Tensor:
    """Of each sum, how many elements it is of."""
    counts = [parameter.numel // length for parameter, length in zip(parameters, lengths, strict=True)]
    return torch.repeat_interleave(torch.tensor(counts, dtype=torch.float64), torch.tensor(lengths))


def _add(sums: Tensor, mean: Mean, parameter: Parameter, start: int, values: Tensor) -> None:
    """Add to `sums` what has been measured: sums of blocks, or a value for each element from `start` on."""
    if mean.over not in ("row", "column"):
        sums += values.sum(dtype=torch.float64)
        return
    columns = parameter.columns
    first, before = divmod(start, columns)
    rows = -(-(before + values.numel()) // columns)
    if before or values.numel() % columns:
        padded = values.new_zeros(rows * columns)
        padded[before : before + values.numel()] = values
        values = padded
    grid = values.view(rows, columns)
    if mean.over == "row":
        sums[first : first + rows] += grid.sum(1)
    else:
        sums += grid.sum(0)


def _follow(rule: type[Rule], members: Sequence[Member]) -> None:
    """The new small states of every parameter, on every rank."""
    for member in members:
        if member.small:
            scalars = dict(zip(member.step.function.names, member.step.scalars.unbind(), strict=True))
            lines_of = {name: value for name, (kind, value) in member.wide.items() if kind != "elements"}
            means = member.numbers | lines_of
            new = rule.follow(*(state.clone() for state in member.small.values()), **scalars, **means)
            for (name, state), value in zip(member.small.items(), new, strict=True):
                if value.shape != state.shape:  # which copying would repeat
                    raise UserError(
                        f"{rule.__name__}.follow returns {list(value.shape)} for state {name!r}, which is "
                        f"{list(state.shape)}"
                    )
                state.copy_(value)
            kinds = {state.name: state.of for state in rule.states if state.of is not None}
            for name, value in member.small.items():
                if kinds[name] == "parameter":
                    member.numbers[name] = value.squeeze(0)
                else:
                    member.wide[name] = (str(kinds[name]), value)
