"""One of two processes, for test_hosts.py: process 1 gets SIGTERM before the first look for one,
cannot read the newest checkpoint, and later fails alone while process 0 waits for it."""

import argparse
import os
import signal
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from twinflow_jax import checkpoints
from twinflow_jax.errors import UserError, run_verb
from twinflow_jax.parallel import hosts


class Torn(checkpoints.Saver):
    def load(self, step, abstract_parts):
        if jax.process_index() == 1 and step == 2:
            raise UserError("checkpoint 2 is torn")
        return super().load(step, abstract_parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--workdir", "--coordinator"):
        parser.add_argument(name)
    for name in ("--processes", "--process"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    hosts.join(args.coordinator, args.processes, args.process)
    if args.process == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # JAX looks every second
    print("stopped by", hosts.stop_requested(0).name)
    with hosts.together():
        mesh = jax.make_mesh((jax.device_count(),), ("rows",))
        layout = jax.NamedSharding(mesh, jax.P("rows"))
        saver = Torn(args.workdir, keep=3)
        for step in (1, 2):
            saver.save(step, {"params": {"w": hosts.put(np.full(8, step), layout)}})
        saver.wait()
        wanted = jax.ShapeDtypeStruct((8,), np.int32, sharding=layout)
        restored = saver.restore({"params": {"w": wanted}})["params"]["w"]
        print("restored", [shard.data.tolist() for shard in restored.addressable_shards])
        print("left", saver.steps, flush=True)
        saver.close()
        if jax.process_index() == 1:
            raise UserError("no room on this host")
        multihost_utils.process_allgather(np.zeros(1))


if __name__ == "__main__":
    run_verb(main)
