"""The tables of docs/scaling.md: what compiled programs of whole slices take and send."""

# ruff: noqa: ANN201, D103 -- a part of make_figures.py

from results import result, source

from t5x_domain.planning.plan import Plan

MODELS = ("T5 base", "T5 XL", "T5 XXL", "UL2 20B")
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")


def gib(size, digits=1):
    return f"{size / 2**30:.{digits}f}"


def plans_table():
    """Plans of train steps: the largest slices first, then by model and chip."""
    found = result("plan_table")
    rows = []
    for name, fields in found["plans"].items():
        model, chip = name.partition(" on ")[0], fields["topology"].partition(":")[0]
        plan = Plan.of_json(fields)
        rows.append(((-plan.num_chips, MODELS.index(model), CHIPS.index(chip)), model, plan))
    lines = [source("plan_table", found["environment"]), ""]
    lines += ["| model | slice | chips | rows | mesh | parameters, optimizer | activations kept | temporaries | all |"]
    lines[-1] += " a step takes at least | to compile |"
    lines += ["|---|---|--:|--:|---|--:|--:|--:|--:|---|--:|"]
    return lines + [f"| {' | '.join((model, *cells(plan)))} |" for _, model, plan in sorted(rows, key=lambda r: r[0])]


def cells(plan):
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1 and axis != "slice")
    sizes = [f"{plan.num_chips:,}", f"{plan.batch_size:,}", mesh]
    compiler = f"{plan.compile_seconds:.0f} s, {gib(plan.compiler_bytes)}"
    if plan.memory is None or plan.bounds is None:
        return [plan.topology, *sizes, "", "", "", "no room", "", compiler]
    memory, bounds = plan.memory, plan.bounds
    parts = map(gib, (memory.parameters + memory.optimizer, memory.activations, memory.temporaries))
    whole = f"{gib(memory.peak)} of {gib(memory.limit)}" + ("" if plan.fits else ", too much")
    return [plan.topology, *sizes, *parts, whole, f"{bounds.step:.3f} s, {bounds.largest}", compiler]


def fsdp_table():
    """What a device sends with parameters spread over a whole slice and over a part of it."""
    found = result("tpu_fsdp")
    lines = [source("tpu_fsdp", found["environment"]), ""]
    lines += [f"| slice, mesh | {' | '.join(COLLECTIVES)} |", "|---|--:|--:|--:|"]
    for name, sent in found["bytes"].items():
        sizes = [gib(sent[kind], 2) if sent[kind] else "" for kind in COLLECTIVES]
        lines.append(f"| {name} | {' | '.join(sizes)} |")
    return lines
