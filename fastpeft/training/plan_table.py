"""A plan as text."""

from fastpeft.training.plan import GIB, Plan

MIB = 2**20


def table(plan: Plan) -> str:
    """What is planned, the bytes at the peak, what fits, and what is modelled."""
    return "\n".join([*_what(plan), "", *_parts(plan), "", *_fits(plan), *_largest(plan), "", *_modelled(plan)])


def _what(plan: Plan) -> list[str]:
    o = plan.options
    rank = f" r={o.peft.r}" if hasattr(o.peft, "r") else ""
    base = "" if o.quantization == "none" else f", base in {o.quantization}" + (" (double)" * _is_double(plan))
    checkpointing = ", gradient checkpointing" if o.gradient_checkpointing else ""
    fast = f", accelerate ({o.memory})" if o.accelerate else ", without accelerate"
    sharded = f"{o.distributed}{', adapters sharded' * o.shard_adapters}"
    return [
        f"{o.model}: {plan.total / 1e9:.2f} B parameters, {o.peft.peft_type}{rank} trains {plan.trainable / 1e6:.2f} M",
        f"batch {o.batch_size} x {o.seq_len} tokens{base}{checkpointing}{fast}, {o.optim}",
        *([f"on each of {o.processes} GPUs ({sharded})"] if o.processes > 1 else []),
    ]


def _is_double(plan: Plan) -> bool:
    return plan.options.quantization in ("nf4", "fp4") and plan.options.double_quant


def _parts(plan: Plan) -> list[str]:
    theirs = plan.peft.parts if plan.peft else None
    head = f"{'at the peak':28}{'MiB':>12}{'':>7}" + (f"{'PEFT, MiB':>14}" if theirs is not None else "")
    lines = [head]
    kinds = dict.fromkeys([*plan.parts, *(theirs or {})])
    for kind in kinds:
        nbytes = plan.parts.get(kind, 0)
        line = f"  {kind:26}{nbytes / MIB:12,.1f}{nbytes / plan.peak_bytes:7.1%}"
        lines.append(line + (f"{theirs.get(kind, 0) / MIB:14,.1f}" if theirs is not None else ""))
    total = f"{'peak':28}{plan.peak_bytes / MIB:12,.1f}{'':>7}"
    lines.append(total + (f"{plan.peft.peak_bytes / MIB:14,.1f}" if plan.peft else f"   in {_where(plan)}"))
    lines.append(f"{'+ allowance':28}{plan.allowance_bytes / MIB:12,.1f}")
    lines.append(f"{'needed':28}{plan.needed_bytes / MIB:12,.1f}          {plan.needed_bytes / GIB:.2f} GiB")
    return lines


def _where(plan: Plan) -> str:
    phase, operator = plan.where
    return f"{phase}, at {operator.removesuffix('.default')}"


def _fits(plan: Plan) -> list[str]:
    lines = [f"{'GPU':28}{'fits':>12}{'GiB left':>12}"]
    for fit in plan.fits:
        name = f"{fit.gib:g} GiB ({', '.join(fit.names[:2])})"
        lines.append(f"{name:28}{'yes' if fit.fits else 'no':>12}{fit.margin_bytes / GIB:12.2f}")
    return lines


def _largest(plan: Plan) -> list[str]:
    found, o = plan.largest, plan.options
    if found is None:
        return []
    rows = f"batch {found.batch_size}" + (" (more were not tried)" if found.rows_limited else "")
    tokens = f"{found.seq_len} tokens" + (" (the model has no more positions)" if found.tokens_limited else "")
    lines = ["", f"on {found.gib:g} GiB, allowance included"]
    if found.batch_size:
        lines.append(f"  largest batch at {o.seq_len} tokens: {rows}, peak {found.batch_bytes / MIB:,.1f} MiB")
    else:
        lines.append(f"  largest batch at {o.seq_len} tokens: none, one row needs more")
    if found.seq_len:
        lines.append(f"  longest row at batch 1: {tokens}, peak {found.seq_bytes / MIB:,.1f} MiB")
    else:
        lines.append("  longest row at batch 1: none")
    return lines


def _modelled(plan: Plan) -> list[str]:
    o = plan.options
    lines = []
    if o.device == "cuda":
        lines.append(
            "modelled: two training steps on tensors without data, as on a GPU: the allocations of the Triton launchers"
        )
        lines.append("(tiles and algorithms of an H100), sizes rounded up to 512 bytes, rows of full length")
    else:
        lines.append(
            "modelled: two training steps on tensors without data, as on a CPU: library calls, rows of full length"
        )
    if plan.layers is not None and plan.layers not in plan.layers_run:
        runs = ", ".join(map(str, plan.layers_run))
        lines.append(
            f"run with {runs} of {plan.layers} layers; the bytes of every kind lie on one line, which was followed"
        )
    lines.append("allowance, not modelled: CUDA context, libraries' workspaces, fragmentation")
    return lines
