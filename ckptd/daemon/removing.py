"""What is removed from a tier, carried out and told: prunes, garbage, and room that a flush needs."""

from __future__ import annotations

from itertools import compress

from ckptd.core.events import Input
from ckptd.core.prune_events import Collect, MakeRoom, Prune
from ckptd.daemon.checkpoints import Checkpoints
from ckptd.log import Logger


async def remove(order: Prune | Collect | MakeRoom, checkpoints: Checkpoints, log: Logger) -> Input | None:
    """Remove what an order names; return what the job's machine is to hear of it, if it waits for that."""
    answer: Input | None = None
    match order:
        case Prune():
            removed, answer = await checkpoints.prune(order)
        case Collect():
            removed = await checkpoints.collect(order)
        case MakeRoom():
            removed, answer = await checkpoints.make_room(order)
    for error in removed.errors[-1:]:
        log.warning("prune failed", tier=order.tier, error=str(error))
    if not isinstance(order, Collect) and removed.checkpoints:
        went = [item in removed.checkpoints for item in order.ids]
        steps, reasons = [item.step for item in compress(order.ids, went)], list(compress(order.reasons, went))
        log.debug("checkpoint pruned", tier=order.tier, steps=steps, reasons=reasons)
    if not isinstance(order, Prune):
        fields = {"tier": order.tier, "files": removed.files, "freed_bytes": removed.freed_bytes}
        fields |= {"records": removed.records, "swept": list(removed.swept)}
        if isinstance(order, MakeRoom):
            log.info("garbage collected", **fields)
        else:
            log.debug("garbage collected", **fields)
    return answer
