"""Settings of the stages in `pipeline/`.

Apart from the stages so that the command line can show help without importing numpy or torch.
"""

from deltaclip.pipeline.settings.finetune import FinetuneConfig
from deltaclip.pipeline.settings.heads import AblateConfig, SweepConfig
from deltaclip.pipeline.settings.learning import MAX_SEED, BaseInit, LearningSettings
from deltaclip.pipeline.settings.report import DemoConfig, ReportConfig
from deltaclip.pipeline.settings.runs import CompareConfig, EvaluateConfig, PredictConfig
from deltaclip.pipeline.settings.sharing import ExportConfig, ServeConfig
from deltaclip.pipeline.settings.training import TrainConfig

__all__ = [
    "MAX_SEED",
    "AblateConfig",
    "BaseInit",
    "CompareConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "LearningSettings",
    "PredictConfig",
    "ReportConfig",
    "ServeConfig",
    "SweepConfig",
    "TrainConfig",
]
