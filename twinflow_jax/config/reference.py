"""Every key of a run in words: of one run for `--help-config`, and of all for the documents.

    python -m twinflow_jax.config.reference > docs/configs.md
"""

import textwrap

from twinflow_jax import keys, models, objectives
from twinflow_jax.config.files import flatten
from twinflow_jax.config.run import PARTS, PIPELINE, Run, keys_of

HEAD = """\
# Config keys

Every key of a run. Set them in a config file (`config.train.steps = 500`) or on the command line
(`--config.train.steps=500`); `--config FILE --help-config` prints those of one config with their
present values. `--config.objective=meanflow` is that preset in place of the config's objective;
[choose.md](choose.md#an-objective) says which. This page is made from the code:
`python -m twinflow_jax.config.reference`.
"""


def describe(run: Run) -> str:
    """The keys of a run: type, value, the default where it is another, meaning."""
    fields, lines = run.fields(), []
    values = flatten(fields)
    for name, one in keys_of(fields).items():
        default = "" if values[name] == one.default else f"  (default {one.default!r})"
        lines.append(f"{name} = {values[name]!r}{default}")
        lines += textwrap.wrap(f"{one.type}: {one.told}", 96, initial_indent="    ",
                               subsequent_indent="    ")
    return "\n".join(lines)


def reference() -> str:
    """All keys as Markdown, a table for each part, family and form."""
    parts = [("A whole run", {"pipeline": PIPELINE})]
    parts += [(f"`{section}`", keys.keys_of(part)) for section, part in PARTS.items()]
    parts += [
        (f"`model`, `model.name={name}`", keys.keys_of(family.config))
        for name, family in models.FAMILIES.items()
    ]
    parts += [
        (f"`objective`, `objective.form={name}`", keys.keys_of(form.Config))
        for name, form in objectives.FORMS.items()
    ]
    return HEAD + "".join(f"\n## {title}\n\n{_table(known)}" for title, known in parts)


def _table(known: dict[str, keys.Key]) -> str:
    rows = [
        f"| `{name}` | {one.type} | `{one.default!r}` | {one.told} |\n"
        for name, one in known.items()
    ]
    return "| key | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


if __name__ == "__main__":
    print(reference(), end="")
