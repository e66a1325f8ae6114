"""``ci/compare``: one checkpoint, loaded as stock does and streaming."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from sglang_overlay.settings import SCHEME_VARIABLE
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadWorkers, compare


@click.command()
@click.option("--tp-size", default=1, show_default=True)
@click.option("--ep-size", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--most", default=40, show_default=True, help="Differences that are named.")
@click.option("--scheme", help=f"Of the streaming load ({SCHEME_VARIABLE}); stock's unless given.")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.pass_context
def main(
    context: click.Context, checkpoint: Path, tp_size: int, ep_size: int, device: str, most: int, scheme: str | None
) -> None:
    """Name the tensors in which CHECKPOINT, loaded streaming, differs from stock's --quantization fp8.

    Values, dtype, shape, strides, class and flags of all parameters, buffers and further tensors on all ranks. Experts
    are numbered by the rank's own slots. A checkpoint that `require` refuses is an error here. Exits with 1 where
    anything differs.
    """
    environ = {SCHEME_VARIABLE: scheme} if scheme else {}
    with tempfile.TemporaryDirectory() as logs, LoadWorkers.on(device, Path(logs)) as workers:
        stock, streaming = (
            workers.load(
                LoadJob(
                    checkpoint,
                    mode,
                    tp_size=tp_size,
                    ep_size=ep_size,
                    device=device,
                    environ=environ if mode != "0" else {},
                    uninitialized=0.0,
                    timeout_seconds=3600.0,
                )
            )
            for mode in ("0", "require")
        )
    found = compare(stock, streaming)
    for line in found[:most]:
        click.echo(line)
    if len(found) > most:
        click.echo(f"and {len(found) - most} more")
    click.echo(f"{len(found)} differences" if found else "bit-identical")
    context.exit(1 if found else 0)


if __name__ == "__main__":
    main()
