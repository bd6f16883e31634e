"""Files of torch.save that hold tensors and plain values, read without running anything that they say."""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distkgd.errors import ModelError


def load_tensors(path: Path, stand_ins: Sequence[tuple[type, str]] = ()) -> Any:
    """What `path` holds, on the CPU. stand_ins: a class to use in place of another, named in full.

    Raises ModelError for a file that is missing, damaged, or would have to be run to be read.
    """
    try:
        with torch.serialization.safe_globals(list(stand_ins)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"{path} holds more than tensors and plain values, or is damaged: {reason}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ModelError(f"{path}: missing, truncated, or no file of torch.save: {reason}") from None
