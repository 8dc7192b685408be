"""A page in the browser that draws with trained weights.

    python -m twinflow_jax.demo --checkpoint runs/mnist --checkpoint runs/mnist_rcgm
    python -m twinflow_jax.demo --checkpoint checkpoints/qwen_image --checkpoint runs/qwen

The same noise at 1, 2, 4, 8 and 32 evaluations, checkpoints side by side, and the trajectories. A
checkpoint is a training run's --workdir, or an imported one (twinflow convert); one that edits asks
for pictures too. The page is for browsers of this machine unless --host says otherwise; it asks for
nothing from elsewhere. It takes the extra `demo`: pip install -e ".[demo]" -c constraints.txt
"""

import argparse
import socket
import threading

from twinflow_jax import arguments, files
from twinflow_jax.errors import UserError, run_verb

LOOPBACK = "127.0.0.1"
PORT = 8160


def main() -> None:
    args = parse()
    try:
        import uvicorn

        from twinflow_jax.serving import app, networks, studio
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("uvicorn", "starlette"):
            raise
        raise UserError(
            "the page takes more packages: pip install -e '.[demo]' -c constraints.txt"
        ) from error
    with bound(args.host, args.port) as door:
        drawing = studio.Studio(networks.open_networks(args.checkpoint))
        local = args.host == LOOPBACK
        served = app.create(drawing, [LOOPBACK, "localhost"] if local else ["*"])
        server = uvicorn.Server(uvicorn.Config(
            served, log_level="error", access_log=False, server_header=False
        ))
        print(f"http://{args.host}:{door.getsockname()[1]} draws with "
              f"{', '.join(one.name for one in drawing.networks)}; Ctrl-C ends it", flush=True)
        # In a thread, where it leaves signals alone: they end this process, whatever is drawn.
        thread = threading.Thread(target=server.run, args=([door],), daemon=True)
        thread.start()
        thread.join()


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, taken before anything is loaded.

    Raises:
      UserError: it is in use, or no address of this machine.
    """
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
        door.listen()
    except (OSError, OverflowError) as error:
        door.close()
        raise UserError(
            f"{host}:{port} cannot be listened at ({getattr(error, 'strerror', None) or error}): "
            "choose another --port, 0 for any free one"
        ) from error
    return door


def parse() -> argparse.Namespace:
    parser = arguments.parser("demo", __doc__)
    parser.add_argument("--checkpoint", type=files.path, action="append", required=True,
                        help="a run's --workdir, or imported; may be given again")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0: any free one")
    parser.add_argument("--host", default=LOOPBACK,
                        help=f"address to listen at (default {LOOPBACK}, this machine alone)")
    return parser.parse_args()


if __name__ == "__main__":
    run_verb(main)
