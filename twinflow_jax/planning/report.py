"""A plan as text and as a picture."""

from collections.abc import Mapping, Sequence

from etils import epath

from twinflow_jax import images, models, parallel
from twinflow_jax.parallel.mesh import AnyMesh
from twinflow_jax.planning.cost import OFF
from twinflow_jax.planning.plan import Plan
from twinflow_jax.planning.topology import GIB

HEADER = (
    f"{'topology':<14}{'mesh':<26}{'strategy':<15}{'remat':<9}{'batch':>6}{'text':>6}{'GiB':>7}"
    f"{'step s':>8}{'less overlap':>13}{'images/s':>10}{'of peak':>9}{'chip-hours':>11}"
)


def line(plan: Plan) -> str:
    """One plan on one line, under HEADER."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    start = (
        f"{plan.topology:<14}{mesh:<26}{plan.strategy:<15}{plan.remat:<9}{plan.rows:>6}"
        f"{plan.text:>6}"
    )
    if plan.refused:
        return f"{start}  {plan.refused}"
    return (
        f"{start}{plan.peak_bytes / GIB:>7.1f}{plan.seconds:>8.2f}{plan.overlapped:>13.2f}"
        f"{plan.images_per_second:>10.1f}{plan.utilisation:>9.0%}{plan.chip_hours:>11.0f}"
    )


def known(plan: Plan) -> str:
    """What is known before anything is compiled."""
    held = ", ".join(f"{name} {size / GIB:.3g}" for name, size in plan.parts.items() if size)
    flops = sum(plan.analytic.values()) / 1e12
    return (
        f"{plan.topology}: holds {sum(plan.parts.values()) / GIB:.2f} of "
        f"{plan.hbm_bytes / GIB:.2f} GiB per device before a step ({held}); "
        f"{flops:.3g} TFLOP per device and step"
    )


def details(plan: Plan) -> str:
    """Everything about one plan."""
    if plan.refused:
        return f"{plan.topology}: {plan.refused} (known after {plan.compile_seconds:.0f} s)"
    fast, slow = (round(100 * share) for share in OFF)
    lines = [
        f"{plan.topology}: fits, {plan.peak_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.2f} GiB "
        f"per device (compiler's word; compiled in {plan.compile_seconds:.0f} s)",
        "  of that " + ", ".join(
            f"{name} {size / GIB:.3g}" for name, size in plan.parts.items() if size
        ) + f"; on the host {plan.host_bytes / GIB:.2f}",
        "FLOPs per device and step, TFLOP: " + ", ".join(
            f"{name} {plan.compiled[name] / 1e12:.4g} compiled, {count / 1e12:.4g} counted "
            f"({plan.compiled[name] / count - 1:+.1%})"
            for name, count in plan.analytic.items() if count
        ) + f"; {plan.forwards:.2f} forwards of the batch",
        f"{'collectives':<28}{'count':>9}{'GB':>9}{'overlapped':>12}",
    ]
    lines += [
        f"  {name:<26}{row['count']:>9}{row['bytes'] / 1e9:>9.3g}{row['overlapped'] / 1e9:>12.3g}"
        for name, row in sorted(plan.collectives.items(), key=lambda item: -item[1]["bytes"])
    ]
    lines.append(f"{'time model':<28}{'count':>9}{'seconds':>9}{'hidden':>12}")
    lines += [
        f"  {name:<26}{row['count']:>9}{row['seconds']:>9.3f}{row['hidden']:>12.3f}"
        for name, row in plan.components.items() if row["seconds"] >= 5e-4
    ]
    lines += [
        f"  {'step':<26}{'':>9}{plan.seconds:>9.3f}{plan.seconds - plan.overlapped:>12.3f}",
        f"about {plan.overlapped:.3g} s per step, {plan.images_per_second:.1f} images/s, "
        f"{plan.utilisation:.0%} of peak; {plan.steps:,} steps: {plan.run_seconds / 3600:.1f} h, "
        f"{plan.chip_hours:,.0f} chip-hours",
        f"The seconds are a model: published steps of others that it was not fitted to came out up "
        f"to {fast} % too fast and {slow} % too slow. It charges each collective to the torus axes "
        "that it spans and cannot see links that are shared, hosts, or data that comes late.",
    ]
    if plan.options:
        lines.append(
            "compiled with " + " ".join(f"--{k}={v}" for k, v in plan.options.items())
        )
    return "\n".join(lines + [f"note: {note}" for note in plan.notes])


def mean(plans: Sequence[Plan], shares: Mapping[int, float]) -> str:
    """The step of one config on average over its lengths of text. shares: of the rows with each."""
    used, one = [plan for plan in plans if shares.get(plan.text)], plans[0]
    start = f"{one.topology}, {one.strategy}, {one.remat}, batch {one.rows}"
    if refused := [str(plan.text) for plan in used if plan.refused]:
        return f"{start}: no mean step, with {', '.join(refused)} text tokens it does not fit"
    seconds = {plan.text: plan.overlapped * plan.mean for plan in used}
    whole = sum(shares[text] * each for text, each in seconds.items())
    return f"{start}: a step takes {whole:.3g} s in the mean of the records' rows, " + ", ".join(
        f"{each:.3g} s with {text} text tokens ({shares[text]:.1%})"
        for text, each in seconds.items()
    )


def by_objective(names: Sequence[str], plans: Sequence[Plan]) -> str:
    """What each objective passes through its networks and holds on a device, in GiB; of what does
    not compile what is known before. Gradients are taken off the activations."""
    passes = {"forwards": 10, "backwards": 11, "derivatives": 13}
    kinds = ("weights", "optimizer", "teacher", "average", "auxiliary networks")
    lines = [
        f"{'objective':<22}" + "".join(f"{name:>{width}}" for name, width in passes.items())
        + "".join(f"{kind.split()[0]:>12}" for kind in (*kinds, "gradients", "activations", "all"))
        + f"{'step s':>8}"
    ]
    for name, plan in zip(names, plans, strict=True):
        if not plan.parts:  # refused before anything was counted
            lines.append(f"{name:<22}  {plan.refused}")
            continue
        start = f"{name:<22}" + "".join(
            f"{plan.passes.get(key, 0):>{width}.2f}" for key, width in passes.items()
        )
        held = [plan.parts.get(kind, 0) for kind in kinds] + [plan.gradients]
        if not plan.refused:
            held += [plan.parts["activations"] - plan.gradients, plan.peak_bytes]
        start += "".join(f"{size / GIB:>12.2f}" for size in held)
        seconds = f"{plan.overlapped * plan.mean:>8.2f}"
        lines.append(start + (f"  {plan.refused.partition(';')[0]}" if plan.refused else seconds))
    return "\n".join(lines)


def parameters(topology: str, model: models.Model, mesh: AnyMesh) -> str:
    """Where each weight of a network lies on a mesh, the largest on a device first; and why it is
    not split further."""
    placed = parallel.report(mesh, model.abstract_params(), model.axes())
    shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    width = max(len(one.path) for one in placed)
    lines = [
        f"{topology}, mesh {shape or 'of one device'}: {len(placed)} weights, "
        f"{sum(one.bytes for one in placed) / GIB:.3f} GiB of them per device",
        f"{'weight':<{width}}  {'shape':<24}{'layout':<42}{'MiB':>9}",
    ]
    for one in placed:
        axes = ", ".join("-" if axes is None else str(axes) for axes in one.spec)
        lines.append(
            f"{one.path:<{width}}  {str(one.shape):<24}{axes:<42}{one.bytes / 2**20:>9.2f}"
            + "".join(f"  {reason}" for reason in one.reasons)
        )
    return "\n".join(lines)


def plot(plans: Sequence[Plan], file: epath.PathLike) -> None:
    """Bars of memory by part and of seconds by component, one for each plan that fits."""
    from matplotlib.figure import Figure

    fitting = [plan for plan in plans if not plan.refused]
    names = [f"{p.topology} {p.strategy}\n{p.remat}, batch {p.rows}" for p in fitting]
    figure = Figure(figsize=(12, 1.5 + 0.5 * len(fitting)), layout="constrained")
    axes = figure.subplots(1, 2)
    bars = (
        ("GiB per device", [{k: v / GIB for k, v in p.parts.items()} for p in fitting]),
        ("predicted seconds per step, nothing overlapped",
         [{k: row["seconds"] for k, row in p.components.items()} for p in fitting]),
    )
    for ax, (title, rows) in zip(axes, bars, strict=True):
        left = [0.0] * len(rows)
        for part in {name: None for row in rows for name in row}:
            values = [row.get(part, 0.0) for row in rows]
            ax.barh(names, values, left=left, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
        ax.set_title(title)
        ax.legend(fontsize="small")
        ax.invert_yaxis()
    axes[1].set_yticklabels([])
    images.save(epath.Path(file), images.of_figure(figure))
