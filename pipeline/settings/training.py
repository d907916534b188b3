"""Settings of `train`: heads on cached embeddings, the backbone frozen."""

from __future__ import annotations

from dataclasses import dataclass

from deltaclip.base.extras import require_extra
from deltaclip.base.settings import setting
from deltaclip.pipeline.settings.learning import FrozenClip, LearningSettings


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FrozenClip, LearningSettings):
    """Settings of `train`: heads on cached embeddings, the backbone frozen."""

    view: str = setting("stages", help="View that --base-init kernel reads; give it to `extract --views`.")
    tensorboard: bool = setting(False, help="Write curves for TensorBoard, into the run at the end.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_frozen()

    def check_more(self) -> None:
        """Refuse to start without the library of an option."""
        if self.tensorboard:
            require_extra("tensorboard", "tensorboard", place="--tensorboard")
