"""What a fork server of `tests.programs` does once, and its processes do not do again."""

import torch.distributed.run
import torch.fx.experimental.symbolic_shapes  # noqa: F401

import distkgd.commands.app
import distkgd.evaluation.model_metrics
import distkgd.evaluation.trained_model
import distkgd.models.export
import distkgd.pipeline.autoconfig
import distkgd.pipeline.ray.driver
import distkgd.pipeline.stage_job
import distkgd.pipeline.sweep.sweep  # noqa: F401
from distkgd.reporting.html import page

page._template()
