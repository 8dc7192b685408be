"""The command `twinflow`: each verb is also `python -m twinflow_jax.VERB`."""

import importlib
import importlib.metadata
import sys

from twinflow_jax.errors import run_verb

VERBS = {
    "train": "train a network, or go on where a run was stopped",
    "sample": "draw pictures, by class or from prompts",
    "demo": "a page in the browser that draws",
    "evaluate": "score runs, and draw and score published suites",
    "plan": "what training would take on TPUs that are not here",
    "rehearse": "whether everything that a run compiles fits there",
    "convert": "published checkpoints in and out",
    "encode": "pictures and captions to training records",
    "features": "the weights that evaluation sees with, as safetensors",
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("usage: twinflow VERB ...; twinflow VERB --help says what it takes\n")
        print("\n".join(f"  {name:9} {what}" for name, what in VERBS.items()))
        return
    if verb == "--version":
        print(importlib.metadata.version("twinflow-jax"))
        return
    if verb not in VERBS:
        print(f"error: no verb {verb!r}; choose from {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    run_verb(lambda: importlib.import_module(f"twinflow_jax.{verb}").main())
