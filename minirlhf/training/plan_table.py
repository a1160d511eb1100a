"""What a user sees of a memory plan: a table on request, else one line; a word where it will not fit."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from minirlhf.training.memory_plan import Plan, available
from minirlhf.training.setting import Setting


def announce(plan: Plan, setting: Setting) -> bool:
    """Shows the plan, whole in a dry run; returns whether this is one, so that the stage ends here."""
    plan, say = setting.planned(plan), setting.show if setting.dry_run else _beside_the_progress
    if setting.dry_run:
        say(table_of(plan))
    say(line_of(plan))
    room = available(plan.device)
    if room is not None and plan.peak > room:
        say(warning_of(plan, room))
    return setting.dry_run


def _beside_the_progress(line: object) -> None:
    """A run's own output is the same twice; what the process has of memory is not."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(line, markup=False)


def table_of(plan: Plan) -> str:
    """Entries by phases, in MB, and what each phase takes of the machine."""
    table = Table(title=f"{plan.stage}: memory in MB", title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    for phase in plan.phases:
        table.add_column(phase.name, justify="right", overflow="fold")
    found = [{(entry.owner, entry.what): 0 for entry in phase.entries} for phase in plan.phases]
    for sums, phase in zip(found, plan.phases, strict=True):
        for entry in phase.entries:
            sums[entry.owner, entry.what] += entry.size
    names = {name: max(sums.get(name, 0) for sums in found) for sums in found for name in sums}
    for owner, what in sorted((name for name, most in names.items() if most), key=lambda name: name[0]):
        cells = [_mb(sums.get((owner, what), 0)) for sums in found]
        table.add_row(f"{owner}: {what}", *cells)
    table.add_section()
    table.add_row("together", *(_mb(phase.size) for phase in plan.phases))
    if plan.device.type == "cpu":
        table.add_row("the process, with what it freed", *(_mb(total) for total in plan.totals))
    text = io.StringIO()
    Console(file=text, width=max(110, 36 + 11 * len(plan.phases))).print(table)
    notes = [f"counted for: {each}" for each in plan.assumed]
    if plan.device.type == "cpu":
        notes.append(f"the process without tensors: {_mb(plan.base)} MB; freed memory stays with it")
        if plan.left:
            notes.append(f"the stages before left it {_mb(plan.left)} MB, which this one uses first")
    else:
        notes.append(
            f"on {plan.device}: tensors alone, without the device's context and its allocator's gaps"
        )
    return text.getvalue() + "\n".join(notes)


def line_of(plan: Plan, *, at: str | None = None) -> str:
    """The peak in one line, and where it is reached (at)."""
    peak, place = plan.peak / 1e9, at or plan.fullest.name
    return f"{plan.stage}: planned peak of memory {peak:.2f} GB on {plan.device} ({place})"


def summary_of(plans: Sequence[Plan]) -> str:
    """The stages of a run in one process, in order, and the peak over all of them in one line."""
    table = Table(pad_edge=False)
    table.add_column("stage of the run")
    table.add_column("planned peak, MB", justify="right")
    table.add_column("reached at")
    for plan in plans:
        table.add_row(plan.stage, _mb(plan.peak), plan.fullest.name)
    text, most = io.StringIO(), max(plans, key=lambda plan: plan.peak)
    Console(file=text, width=110).print(table)
    return text.getvalue() + line_of(most._replace(stage="run"), at=f"{most.stage}: {most.fullest.name}")


def warning_of(plan: Plan, room: int) -> str:
    """What to do where the machine has less."""
    sampling = any(entry.what == "KV cache" for entry in plan.fullest.entries)
    first = "fewer --slots or shorter responses" if sampling else "a smaller --micro-batch-size"
    held = sum(entry.size for entry in plan.fullest.entries if entry.what in ("moments", "gradients"))
    why = f" (gradients and moments take {held / 1e9:.2f} GB of it)" if held else ""
    return (
        f"warning: {plan.stage} is planned to need {plan.peak / 1e9:.2f} GB{why} and {plan.device} has "
        f"{room / 1e9:.2f} GB; try {' or '.join((first, *plan.remedies, 'a smaller model'))}"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size else ""
