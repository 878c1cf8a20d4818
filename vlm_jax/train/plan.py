"""What training is: the optimizer, how long, on how many examples a step, on what mesh, and what is kept of it."""

from dataclasses import dataclass

from vlm_jax.errors import UserError, check_seed
from vlm_jax.sharding import MeshShape
from vlm_jax.train.optim import Adafactor, Optimizer


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained, whatever it is and whatever its data are."""

    optimizer: Optimizer | Adafactor
    steps: int
    """Optimizer steps in all."""
    batch_size: int
    """Examples a step, over all devices."""
    micro_steps: int = 1
    """Compute each batch in this many parts, for its gradient to fit in memory."""
    ema_decay: float | None = None
    """Decay of an average of the parameters, which evaluations then use; None: no average."""
    seed: int = 0
    """Of the initialisation, the order of the data, augmentation, dropout and noise."""
    mesh: MeshShape = MeshShape()
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints; with a validation split, each is scored and the best one kept."""
    keep_last: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_steps", "log_every", "checkpoint_every", "keep_last"):
            if not 1 <= getattr(self, name) < 2**31:  # on the devices they are int32
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1 and less than 2^31")
        check_seed(self.seed)
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay is {self.ema_decay}: it must lie in [0, 1)")
