"""Write the model made of the first columns of a finished one: whatever a croppable model (method med) was trained for,
and any dim in between.

python launch/crop.py RUN/stages/student OUT --dim 32
"""

from pathlib import Path
from typing import Annotated

import typer

from distkgd.display import Display
from distkgd.distributed.ranks import Ranks
from distkgd.launching import launch
from distkgd.model_folder import bytes_on_disk, crop_model


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a finished stage or of its model.")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    dim: Annotated[int, typer.Option(min=1, help="Real numbers per entity to keep; complex scorers: even.")],
) -> None:
    """Write a model folder that needs nothing of the one it was cut from."""

    def body(ranks: Ranks, display: Display) -> None:
        cropped = crop_model(model, out, dim, ranks)
        display.line(f"written: {out} ({cropped.scorer}; {bytes_on_disk(out) / 1e6:,.1f} MB)")

    launch(body, device="cpu")


if __name__ == "__main__":
    typer.run(main)
