"""Settings of the stages in `pipeline/`.

Apart from the stages so that the command line can show help without importing numpy or torch.
"""

from deltaclip.pipeline.settings.finetuning import FinetuneConfig
from deltaclip.pipeline.settings.finished import (
    PAGES,
    RUNS,
    TABLES,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    PredictConfig,
    ReportConfig,
    ServeConfig,
    newest_run,
)
from deltaclip.pipeline.settings.learning import (
    MAX_SEED,
    Base,
    ByTarget,
    LearningSettings,
    by_target,
    check_fractions,
    words_by_target,
)
from deltaclip.pipeline.settings.ranking import RankConfig, no_such_generator
from deltaclip.pipeline.settings.sharing import PullConfig, PushConfig, ShareConfig
from deltaclip.pipeline.settings.sweeping import (
    BY_TARGET,
    LOGARITHMIC,
    PLAIN,
    Range,
    SweepConfig,
    sweep_axes,
    swept_values,
)
from deltaclip.pipeline.settings.training import AblateConfig, Against, FrozenClip, TrainConfig

__all__ = [
    "BY_TARGET",
    "LOGARITHMIC",
    "MAX_SEED",
    "PAGES",
    "PLAIN",
    "RUNS",
    "TABLES",
    "AblateConfig",
    "Against",
    "Base",
    "ByTarget",
    "CompareConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FinetuneConfig",
    "FrozenClip",
    "LearningSettings",
    "PredictConfig",
    "PullConfig",
    "PushConfig",
    "Range",
    "RankConfig",
    "ReportConfig",
    "ServeConfig",
    "ShareConfig",
    "SweepConfig",
    "TrainConfig",
    "by_target",
    "check_fractions",
    "newest_run",
    "no_such_generator",
    "sweep_axes",
    "swept_values",
    "words_by_target",
]
