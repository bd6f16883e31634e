"""What a fork server of `tests.programs` does once, and its processes do not do again."""

import torch.distributed.run
import torch.fx.experimental.symbolic_shapes  # noqa: F401 - which the first backward imports

import launch.ablate
import launch.chain
import launch.distill  # noqa: F401
from distkgd.reporting.html import page

page._template()
